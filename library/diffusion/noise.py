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


def latents_of(moments: Tensor, unit: Tensor) -> Tensor:
    """Return latents (B, 4, H/8, W/8), unscaled: samples of the VAE's posterior with moments (B, 8, H/8, W/8).

    unit is standard normal noise in the shape of the result.
    """
    mean, log_variance = moments.float().chunk(2, dim=1)
    return mean + (log_variance.clamp(-30.0, 20.0) / 2).exp() * unit  # the bounds are diffusers'


def posterior_noise(shape: tuple[int, ...], keys: Sequence[Key]) -> Tensor:
    """Return the unit noise of `latents_of` for latents (C, H, W) of each sample, (B, C, H, W)."""
    return randn_per_sample(shape, [(*key, "latents") for key in keys])


def sample_noise(shape: tuple[int, ...], keys: Sequence[Key], config: LossConfig, latents: Tensor | None) -> Tensor:
    """Return the noise for scaled latents (C, H, W) of each sample, (B, C, H, W), float32.

    The latents themselves, on the CPU, are read only with --adaptive_noise_scale.
    """
    noise = randn_per_sample(shape, [(*key, "noise") for key in keys])
    if config.noise_offset is not None:
        noise += offset_noise(shape[0], keys, config.noise_offset, config, latents)
    if config.multires_noise_iterations:
        noise = torch.stack(
            [
                multires_noise(row, key, config.multires_noise_iterations, config.multires_noise_discount)
                for row, key in zip(noise, keys, strict=True)
            ]
        )
    return noise


def reads_latents(config: LossConfig) -> bool:
    """Return whether the noise depends on the latents."""
    return config.noise_offset is not None and config.adaptive_noise_scale is not None


def offset_noise(
    channels: int, keys: Sequence[Key], offset: float, config: LossConfig, latents: Tensor | None
) -> Tensor:
    """Return one normal number for each channel of each sample, times its strength, (B, C, 1, 1).

    The strength is the offset, or a uniform share of it for each sample, plus --adaptive_noise_scale
    times the absolute mean of the channel in latents (B, C, H, W), never below 0
    (https://www.crosslabs.org/blog/diffusion-with-offset-noise).
    """
    strength = torch.full((len(keys), 1, 1, 1), offset)
    if config.noise_offset_random_strength:
        strength = strength * uniform_per_sample(keys, "offset strength")
    if config.adaptive_noise_scale is not None:
        assert latents is not None  # see reads_latents
        means = latents.float().mean(dim=(2, 3), keepdim=True).abs()
        strength = (strength + config.adaptive_noise_scale * means).clamp_min(0)
    return strength * randn_per_sample((channels, 1, 1), [(*key, "offset") for key in keys])


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


def perturbation(shape: tuple[int, ...], keys: Sequence[Key], config: LossConfig) -> Tensor | None:
    """Return what the U-Net's input has more of noise than the target, (B, C, H, W) for latents (C, H, W).

    Input perturbation (Ning et al. 2023, arXiv 2301.11706); None if --ip_noise_gamma is unset.
    """
    if not config.ip_noise_gamma:
        return None
    strength = torch.full((len(keys), 1, 1, 1), config.ip_noise_gamma)
    if config.ip_noise_gamma_random_strength:
        strength = strength * uniform_per_sample(keys, "perturbation strength")
    return strength * randn_per_sample(shape, [(*key, "perturbation") for key in keys])


def uniform_per_sample(keys: Sequence[Key], use: str) -> Tensor:
    """Return a number from [0, 1) for each sample, (B, 1, 1, 1)."""
    return torch.stack([torch.rand((1, 1, 1), generator=generator_for(*key, use)) for key in keys])


def sample_timesteps(keys: Sequence[Key], lowest: int = 0, limit: int = NUM_TIMESTEPS) -> Tensor:
    """Return a uniform timestep from [lowest, limit) for each sample, (B,), int64."""
    return torch.cat([torch.randint(lowest, limit, (1,), generator=generator_for(*key, "timestep")) for key in keys])
