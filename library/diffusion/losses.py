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
    prediction: Tensor,
    target: Tensor,
    timesteps: Tensor,
    schedule: NoiseSchedule,
    config: LossConfig,
    *,
    masks: Tensor | None = None,
) -> Tensor:
    """Return the mean distance of each sample, (B,), float32; masks (B, 1, H, W) weight its elements.

    The mean is over all elements, as in sd-scripts: what a mask hides counts as a distance of 0.
    """
    threshold = huber_threshold(timesteps, schedule, config)[:, None, None, None]
    difference = prediction.float() - target.float()
    distances = DISTANCES[config.loss_type](difference, threshold)
    return (distances if masks is None else distances * masks).mean(dim=(1, 2, 3))


MOST_SNR = 1000.0  # bounds of the SNR in the weightings that sd-scripts bounds so


def timestep_weights(timesteps: Tensor, schedule: NoiseSchedule, config: LossConfig, *, predicts_v: bool) -> Tensor:
    """Return the weight of each sample's loss, (B,): the product of all weightings that are on.

    A timestep without signal (SNR 0) counts like the last one that has some, where a weighting divides by it.
    """
    all_snr = schedule.snr(torch.arange(NUM_TIMESTEPS, device=timesteps.device))
    snr = all_snr[timesteps].clamp_min(all_snr[all_snr > 0].min())
    bounded = snr.clamp(max=MOST_SNR)
    weights = torch.ones_like(snr)
    if config.min_snr_gamma:
        weights = weights * min_snr_weight(snr, config.min_snr_gamma, predicts_v=predicts_v)
    if config.scale_v_pred_loss_like_noise_pred:
        weights = weights * bounded / (bounded + 1)
    if config.v_pred_like_loss:
        weights = weights * (1 + config.v_pred_like_loss * (bounded + 1) / bounded)
    if config.debiased_estimation_loss:
        weights = weights * debiased_weight(bounded, predicts_v=predicts_v)
    return weights


def min_snr_weight(snr: Tensor, gamma: float, *, predicts_v: bool) -> Tensor:
    """Return min(SNR, gamma) / SNR, for v / (SNR + 1), (B,) (Hang et al. 2023, arXiv 2303.09556)."""
    return snr.clamp(max=gamma) / (snr + 1 if predicts_v else snr)


def debiased_weight(snr: Tensor, *, predicts_v: bool) -> Tensor:
    """Return 1 / sqrt(SNR), for v 1 / (SNR + 1), (B,) (Yu et al. 2023, arXiv 2310.08442)."""
    return 1 / (snr + 1) if predicts_v else snr.rsqrt()
