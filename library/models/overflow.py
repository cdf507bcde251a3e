"""The VAE in fp16: what exceeds its range is computed again in float32, for training, previews and drawing alike."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.models.precision import move

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

logger = logging.getLogger(__name__)


def within_range(
    vae: AutoencoderKL, work: Callable[[Tensor], Tensor], batch: Tensor, *, at_once: int | None = None
) -> Tensor:
    """Return work(batch) in the VAE's type for a batch (B, ...); work gets at most at_once rows, None: all.

    Rows for which the VAE overflows in fp16 are computed in float32 and rounded; if it overflows there too, the result
    is not finite. One question to the device serves the whole batch. Other types are not checked: bf16 has the range of
    float32.
    """

    def run(rows: Tensor) -> Tensor:
        return torch.cat([work(part) for part in rows.split(at_once or len(rows))])

    result = run(batch.to(vae.dtype))
    if vae.dtype is not torch.float16:
        return result
    overflowed = ~torch.isfinite(result).flatten(1).all(dim=1)
    if bool(overflowed.any()):
        tell()
        move(vae, torch.float32)
        try:
            again = run(batch[overflowed].float())
        finally:
            move(vae, torch.float16)  # lossless, since the weights had this type before
        result[overflowed] = again.to(result.dtype)
    return result


@functools.cache  # once in a run
def tell() -> None:
    """Warn that the VAE overflows."""
    logger.warning("the VAE overflows in half precision and is run in float32: --no_half_vae does so from the start")
