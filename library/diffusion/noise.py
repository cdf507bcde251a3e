"""Samples latents, noise and timesteps for a batch, each row by the key of its sample.

Keyed by (seed, epoch, sample), a row depends neither on its batch nor on its process: one process with a batch of
four and two with batches of two train on the same noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from library.config.loss import LossConfig
from library.diffusion.schedule import NUM_TIMESTEPS
from library.randomness import generator_for, randn_per_sample

Key = tuple[int | str, ...]


def sample_latents(moments: Tensor, keys: Sequence[Key]) -> Tensor:
    """Return samples (B, 4, H/8, W/8) of the VAE's posterior with moments (B, 8, H/8, W/8), unscaled."""
    mean, log_variance = moments.float().chunk(2, dim=1)
    unit = randn_per_sample(mean.shape[1:], [(*key, "latents") for key in keys]).to(mean.device)
    return mean + (log_variance.clamp(-30.0, 20.0) / 2).exp() * unit  # the bounds are diffusers'


def sample_noise(latents: Tensor, keys: Sequence[Key], config: LossConfig) -> Tensor:
    """Return the noise for scaled latents (B, C, H, W), on their device, float32."""
    noise = randn_per_sample(latents.shape[1:], [(*key, "noise") for key in keys])
    if config.noise_offset is not None:
        noise += offset_noise(latents.cpu(), keys, config.noise_offset, config)
    if config.multires_noise_iterations:
        noise = torch.stack(
            [
                multires_noise(row, key, config.multires_noise_iterations, config.multires_noise_discount)
                for row, key in zip(noise, keys, strict=True)
            ]
        )
    return noise.to(latents.device)


def offset_noise(latents: Tensor, keys: Sequence[Key], offset: float, config: LossConfig) -> Tensor:
    """Return one normal number for each channel of each sample, times its strength, (B, C, 1, 1).

    The strength is the offset, or a uniform share of it for each sample, plus --adaptive_noise_scale
    times the absolute mean of the channel, never below 0
    (https://www.crosslabs.org/blog/diffusion-with-offset-noise).
    """
    strength = torch.full((len(keys), 1, 1, 1), offset)
    if config.noise_offset_random_strength:
        strength = strength * uniform_per_sample(keys, "offset strength")
    if config.adaptive_noise_scale is not None:
        means = latents.float().mean(dim=(2, 3), keepdim=True).abs()
        strength = (strength + config.adaptive_noise_scale * means).clamp_min(0)
    return strength * randn_per_sample((latents.shape[1], 1, 1), [(*key, "offset") for key in keys])


def multires_noise(noise: Tensor, key: Key, iterations: int, discount: float) -> Tensor:
    """Return noise (C, H, W) with coarser and coarser noise added, scaled to a standard deviation of 1.

    Layer i is sampled at about 1/r^i of the size, r between 2 and 4, enlarged, and multiplied by discount^i. The last
    layer is the first with a side of one (https://wandb.ai/johnowhitaker/multires_noise).
    """
    channels, height, width = noise.shape
    generator = generator_for(*key, "multires")
    for layer in range(iterations):
        ratio = 2 + 2 * torch.rand((), generator=generator).item()
        size = max(1, int(height / ratio**layer)), max(1, int(width / ratio**layer))
        coarse = torch.randn((1, channels, *size), generator=generator)
        coarse = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
        noise = noise + discount**layer * coarse[0]
        if 1 in size:
            break
    return noise / noise.std()


def perturbed_noise(noise: Tensor, keys: Sequence[Key], config: LossConfig) -> Tensor:
    """Return the noise of the U-Net's input, (B, C, H, W), which is more than that of the target.

    Input perturbation (Ning et al. 2023, arXiv 2301.11706); the unchanged noise if --ip_noise_gamma is unset.
    """
    if not config.ip_noise_gamma:
        return noise
    strength = torch.full((len(keys), 1, 1, 1), config.ip_noise_gamma)
    if config.ip_noise_gamma_random_strength:
        strength = strength * uniform_per_sample(keys, "perturbation strength")
    further = randn_per_sample(noise.shape[1:], [(*key, "perturbation") for key in keys])
    return noise + (strength * further).to(noise.device)


def uniform_per_sample(keys: Sequence[Key], use: str) -> Tensor:
    """Return a number from [0, 1) for each sample, (B, 1, 1, 1)."""
    return torch.stack([torch.rand((1, 1, 1), generator=generator_for(*key, use)) for key in keys])


def sample_timesteps(keys: Sequence[Key], lowest: int = 0, limit: int = NUM_TIMESTEPS) -> Tensor:
    """Return a uniform timestep from [lowest, limit) for each sample, (B,), int64."""
    return torch.cat([torch.randint(lowest, limit, (1,), generator=generator_for(*key, "timestep")) for key in keys])
