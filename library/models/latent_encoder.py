"""Pictures -> latents with the VAE's encoder, on its device and in its type."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.models.precision import move
from library.weight_file import tensors_sha256

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LatentEncoder:
    """A VAE as an encoder of batches of B pictures."""

    vae: AutoencoderKL
    dtype: torch.dtype  # of the VAE's weights

    @property
    def scaling_factor(self) -> float:
        """The factor between the VAE's latents and the U-Net's."""
        return self.vae.config["scaling_factor"]

    def identity(self) -> str:
        """Return a text that identifies the encoder, for caches on disk: the weights' SHA-256 and the type."""
        return f"{tensors_sha256(self.vae.state_dict())} {self.dtype}"

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:
        """Return mean and log-variance of the posterior, (B, 8, H/8, W/8), for pixels (B, 3, H, W) in [-1, 1].

        A picture for which the VAE overflows in half precision is encoded in float32; if it overflows there too, the
        result is not finite.
        """
        pixels = pixels.to(self.vae.device)
        moments = self.vae.encode(pixels.to(self.dtype)).latent_dist.parameters
        overflowed = ~torch.isfinite(moments).flatten(1).all(dim=1)
        if self.dtype is not torch.float32 and bool(overflowed.any()):
            logger.warning(
                "the VAE overflows in half precision and is run in float32: --no_half_vae does so from the start"
            )
            move(self.vae, torch.float32)
            try:
                again = self.vae.encode(pixels[overflowed].float()).latent_dist.parameters
            finally:
                move(self.vae, self.dtype)  # lossless, since the weights had this type before
            moments[overflowed] = again.to(moments.dtype)
        return moments
