"""Targets, distances between prediction and target, and weights by timestep. B samples."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from library.config.loss import LossConfig
from library.diffusion.schedule import NUM_TIMESTEPS, NoiseSchedule


def target_for(
    latents: Tensor, noise: Tensor, timesteps: Tensor, schedule: NoiseSchedule, *, predicts_v: bool
) -> Tensor:
    """Return what the U-Net should predict, (B, C, H, W): the noise, or v.

    v = sqrt(abar) noise - sqrt(1 - abar) x0 (Salimans and Ho 2022, arXiv 2202.00512).
    """
    if not predicts_v:
        return noise
    signal, noise_level = schedule.scales(timesteps)
    return signal * noise - noise_level * latents


# Element-wise distances: (difference, threshold c broadcast to it) -> distance.
DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l2": lambda d, c: d.square(),
    "l1": lambda d, c: d.abs(),
    # pseudo-Huber, arXiv 2403.16728: near 0 like d squared, far away like 2 c |d|
    "huber": lambda d, c: 2 * c * ((d.square() + c.square()).sqrt() - c),
    "smooth_l1": lambda d, c: 2 * ((d.square() + c.square()).sqrt() - c),
}


def huber_threshold(timesteps: Tensor, schedule: NoiseSchedule, config: LossConfig) -> Tensor:
    """Return the threshold c of the Huber losses at timesteps, (B,).

    sigma is the noise level relative to the signal, sqrt((1 - abar) / abar).
    """
    start = config.huber_c
    if config.huber_schedule == "constant":
        return torch.full(timesteps.shape, start * config.huber_scale, device=timesteps.device)
    if config.huber_schedule == "exponential":
        return start ** (timesteps.float() / NUM_TIMESTEPS) * config.huber_scale
    sigma = schedule.snr(timesteps).rsqrt()
    return ((1 - start) / (1 + sigma).square() + start) * config.huber_scale


def per_sample_loss(
    prediction: Tensor, target: Tensor, timesteps: Tensor, schedule: NoiseSchedule, config: LossConfig
) -> Tensor:
    """Return the mean distance of each sample, (B,), float32."""
    threshold = huber_threshold(timesteps, schedule, config)[:, None, None, None]
    difference = prediction.float() - target.float()
    return DISTANCES[config.loss_type](difference, threshold).mean(dim=(1, 2, 3))


def timestep_weights(timesteps: Tensor, schedule: NoiseSchedule, config: LossConfig, *, predicts_v: bool) -> Tensor:
    """Return the weight of each sample's loss, (B,).

    Min-SNR (Hang et al. 2023, arXiv 2303.09556): min(SNR, gamma) / SNR, for v / (SNR + 1).
    """
    if not config.min_snr_gamma:
        return torch.ones(timesteps.shape, device=timesteps.device)
    snr = schedule.snr(timesteps)
    return snr.clamp(max=config.min_snr_gamma) / (snr + 1 if predicts_v else snr)
