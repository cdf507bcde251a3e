"""Conditioning that was computed before and is looked up: by text, or by the texts that are encoded together.

The output of an encoder for a text depends, in its last bits, on the number of texts in the call: matrix products of
another size are summed in another order. Whoever needs the bits of a call must repeat the call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import torch

from library.models.base import TextEncoder
from library.models.conditioning import Conditioner, Conditioning, TextOptions
from library.progress import Bar

ENCODED_AT_ONCE = 16  # texts


class Call(NamedTuple):
    """What `Conditioner.encode` is called with: texts of one batch, and how they are read."""

    texts: tuple[str, ...]
    options: TextOptions


@dataclasses.dataclass(frozen=True)
class RememberedConditioner:
    """Looks up texts that were encoded before; raises KeyError for others."""

    rows: dict[tuple[str, TextOptions], Conditioning]

    def read(self, texts: Sequence[str], options: TextOptions) -> Conditioning:
        """Return what `encode` returns: here nothing has to be encoded."""
        return self.encode(texts, options)

    def encode(self, texts: Sequence[str], options: TextOptions) -> Conditioning:
        """Return the conditioning of texts."""
        return Conditioning.stacked([self.rows[text, options] for text in texts])


def remember(
    conditioner: Conditioner, wanted: Iterable[tuple[str, TextOptions]], dtype: torch.dtype
) -> RememberedConditioner:
    """Encode all texts of a run once, and return the conditioner that looks them up in a type, on the CPU."""
    by_options: dict[TextOptions, list[str]] = {}
    for text, options in sorted(set(wanted), key=repr):
        by_options.setdefault(options, []).append(text)
    calls = [
        Call(tuple(texts[start : start + ENCODED_AT_ONCE]), options)
        for options, texts in by_options.items()
        for start in range(0, len(texts), ENCODED_AT_ONCE)
    ]
    rows = {
        (text, call.options): row
        for call, encoded in encode_calls(conditioner, calls, dtype).items()
        for text, row in zip(call.texts, encoded.rows(), strict=True)
    }
    return RememberedConditioner(rows)


@torch.no_grad()
def encode_calls(conditioner: Conditioner, calls: Collection[Call], dtype: torch.dtype) -> dict[Call, Conditioning]:
    """Return the result of each call in a type, on the CPU; each is made as it stands, and once."""
    found: dict[Call, Conditioning] = {}
    bar: Bar[None] = Bar(total=sum(len(call.texts) for call in calls), desc="encoding captions", unit="caption")
    with bar:
        for call in dict.fromkeys(calls):
            found[call] = conditioner.encode(*call).to(torch.device("cpu"), dtype)
            bar.update(len(call.texts))
    return found


def bytes_of_text(encoders: Sequence[TextEncoder], options: TextOptions, dtype: torch.dtype) -> int:
    """Return the size of the conditioning of one text in a type."""
    configs = [(encoder.module.config, encoder.row) for encoder in encoders]
    hidden = sum(config.hidden_size for config, _ in configs) * (options.num_tokens + 2)
    pooled = sum(config.projection_dim or 0 for config, row in configs if row.has_projection)
    return (hidden + pooled) * dtype.itemsize


def bytes_of(conditionings: Iterable[Conditioning]) -> int:
    """Return the size of conditionings in memory."""
    tensors = [tensor for one in conditionings for tensor in (one.hidden, one.pooled) if tensor is not None]
    return sum(tensor.nbytes for tensor in tensors)
