"""What is drawn for a batch: posterior samples, noise and timesteps, each row from its sample's own key.

Keyed by (seed, epoch, sample), a row depends neither on the batch it lies in nor on the process that draws
it: one process with a batch of four and two with batches of two train on the same noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from library.diffusion.schedule import NUM_TIMESTEPS
from library.randomness import generator_for, randn_per_sample

Key = tuple[int | str, ...]


def sample_latents(moments: Tensor, keys: Sequence[Key]) -> Tensor:
    """Return a draw (B, 4, H/8, W/8) from the VAE's posterior with moments (B, 8, H/8, W/8), unscaled."""
    mean, log_variance = moments.float().chunk(2, dim=1)
    unit = randn_per_sample(mean.shape[1:], [(*key, "latents") for key in keys]).to(mean.device)
    return mean + (log_variance.clamp(-30.0, 20.0) / 2).exp() * unit  # the bounds are diffusers'


def draw_noise(shape: torch.Size, keys: Sequence[Key], *, offset: float = 0.0) -> Tensor:
    """Return noise of a shape (B, C, H, W) on the CPU, float32.

    offset adds one normal number times offset to each channel of each sample
    (https://www.crosslabs.org/blog/diffusion-with-offset-noise).
    """
    noise = randn_per_sample(shape[1:], [(*key, "noise") for key in keys])
    if offset:
        noise += offset * randn_per_sample((shape[1], 1, 1), [(*key, "offset") for key in keys])
    return noise


def draw_timesteps(keys: Sequence[Key]) -> Tensor:
    """Return a uniform timestep for each sample, (B,), int64."""
    return torch.cat([torch.randint(NUM_TIMESTEPS, (1,), generator=generator_for(*key, "timestep")) for key in keys])
