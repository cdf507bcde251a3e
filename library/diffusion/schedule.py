"""The noise schedule of Stable Diffusion.

Letters: B samples, T = 1000 timesteps, abar the product of 1 - beta up to a timestep
(Ho et al. 2020, arXiv 2006.11239).
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """abar of each timestep, (T,), float32."""

    alphas_cumprod: Tensor

    @functools.cached_property
    def _roots(self) -> tuple[Tensor, Tensor]:
        """sqrt(abar) and sqrt(1 - abar) of each timestep."""
        return self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()

    def snr(self, timesteps: Tensor) -> Tensor:
        """Return the signal-to-noise ratio abar / (1 - abar) at timesteps (B,), shape (B,)."""
        abar = self.alphas_cumprod[timesteps]
        return abar / (1 - abar)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return sqrt(abar) x0 + sqrt(1 - abar) noise for latents and noise (B, C, H, W), timesteps (B,)."""
        signal, noise_level = self.scales(timesteps)
        return signal * latents + noise_level * noise

    def scales(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return (sqrt(abar), sqrt(1 - abar)) at timesteps (B,), each (B, 1, 1, 1)."""
        signal, noise_level = self._roots
        return signal[timesteps][:, None, None, None], noise_level[timesteps][:, None, None, None]

    def to(self, device: torch.device) -> NoiseSchedule:
        """Return the schedule on a device."""
        return NoiseSchedule(self.alphas_cumprod.to(device))


def stable_diffusion_schedule(*, zero_terminal_snr: bool = False) -> NoiseSchedule:
    """Return the schedule of SD 1.x, 2.x and XL: the square roots of beta are linear."""
    roots = torch.linspace(BETA_START**0.5, BETA_END**0.5, NUM_TIMESTEPS, dtype=torch.float64)
    abar = (1 - roots**2).cumprod(0)
    return NoiseSchedule((with_zero_terminal_snr(abar) if zero_terminal_snr else abar).float())


def with_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Return abar (T,) shifted and scaled so that the last timestep has no signal and the first keeps its own.

    Algorithm 1 of Lin et al. 2023, arXiv 2305.08891. SNR weightings see the rescaled schedule.
    """
    roots = alphas_cumprod.sqrt()
    return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])).square()
