"""Pictures -> latents: the VAE's encoder on its device, in its type."""

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
    """A VAE as an encoder of pictures, B at a time."""

    vae: AutoencoderKL
    dtype: torch.dtype  # of the VAE's weights

    @property
    def scaling_factor(self) -> float:
        """What latents are multiplied by for the U-Net."""
        return self.vae.config["scaling_factor"]

    def identity(self) -> str:
        """Return what the moments of a picture depend on, for caches on disk: the weights' SHA-256 and the type."""
        return f"{tensors_sha256(self.vae.state_dict())} {self.dtype}"

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:
        """Return mean and log-variance of the posterior, (B, 8, H/8, W/8), for pixels (B, 3, H, W) in [-1, 1].

        A picture for which the VAE overflows in half precision is encoded in float32. What is not finite even so
        is returned as it is.
        """
        pixels = pixels.to(self.vae.device)
        moments = self.vae.encode(pixels.to(self.dtype)).latent_dist.parameters
        overflowed = ~torch.isfinite(moments).flatten(1).all(dim=1)
        if self.dtype is not torch.float32 and bool(overflowed.any()):
            logger.warning("the VAE overflows in half precision and is run in float32: --no_half_vae does so at once")
            move(self.vae, torch.float32)
            moments[overflowed] = self.vae.encode(pixels[overflowed].float()).latent_dist.parameters.to(moments.dtype)
            move(self.vae, self.dtype)  # its weights were of this type, so nothing is lost
        return moments
