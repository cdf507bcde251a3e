"""Pictures -> latents with the VAE's encoder, on its device and in its type."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.models.overflow import within_range
from library.weight_file import tensors_sha256

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL


@dataclasses.dataclass(frozen=True)
class LatentEncoder:
    """A VAE as an encoder of batches of B pictures."""

    vae: AutoencoderKL
    dtype: torch.dtype  # of the VAE's weights
    at_once: int | None = None  # most pictures in a call of the VAE; None: all that are given

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

        A picture for which the VAE overflows in fp16 is encoded in float32; if it overflows there too, the result is
        not finite.
        """
        return within_range(self.vae, self._encode, pixels.to(self.vae.device), at_once=self.at_once)

    def _encode(self, pixels: Tensor) -> Tensor:
        return self.vae.encode(pixels).latent_dist.parameters
