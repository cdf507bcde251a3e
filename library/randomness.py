"""Randomness by key: everything random is a pure function of its key.

With one stream of random numbers, results depend on the order of the work. Here each use has its own generator, with a
key such as (seed, "augment", epoch, sample). A run has the same batches with any number of workers and the same noise
with any batch size or number of processes, and can resume from any step without stored generator states.
"""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def seed_for(*key: int | str) -> int:
    """Return a 63-bit seed for a key; equal keys give equal seeds on every machine."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big") >> 1


def random_for(*key: int | str) -> random.Random:
    """Return a Python generator for a key."""
    return random.Random(seed_for(*key))


def generator_for(*key: int | str) -> torch.Generator:
    """Return a torch generator for a key, on the CPU, so that the numbers are the same for every device."""
    import torch

    return torch.Generator("cpu").manual_seed(seed_for(*key))


def randn_per_sample(shape: tuple[int, ...], samples: list[tuple[int | str, ...]]) -> torch.Tensor:
    """Return standard normal numbers (B, *shape), float32 on the CPU, each row from the generator of its key."""
    import torch

    return torch.stack([torch.randn(shape, generator=generator_for(*key)) for key in samples])
