"""Targets, distances between prediction and target, and weights by timestep. B samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from library.config.loss import LossConfig
from library.diffusion.schedule import NUM_TIMESTEPS, NoiseSchedule


def target_for(
    latents: Tensor, noise: Tensor, timesteps: Tensor, schedule: NoiseSchedule, *, predicts_v: bool
) -> Tensor:
    """Return the target of the U-Net, (B, C, H, W): the noise, or v.

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
    # pseudo-Huber, arXiv 2403.16728: like d squared for small d, like 2 c |d| for large d
    "huber": lambda d, c: 2 * c * ((d.square() + c.square()).sqrt() - c),
    "smooth_l1": lambda d, c: 2 * ((d.square() + c.square()).sqrt() - c),
}


USE_THRESHOLDS = ("huber", "smooth_l1")


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
    prediction: Tensor, target: Tensor, loss_type: str, thresholds: Tensor | None = None, *, masks: Tensor | None = None
) -> Tensor:
    """Return the mean distance of each sample, (B,), float32; masks (B, 1, H, W) weight its elements.

    thresholds (B,) are those of USE_THRESHOLDS. The mean is over all elements, as in sd-scripts: masked elements have a
    distance of 0.
    """
    difference = prediction.float() - target.float()
    threshold = difference if thresholds is None else thresholds[:, None, None, None]
    distances = DISTANCES[loss_type](difference, threshold)
    return (distances if masks is None else distances * masks).mean(dim=(1, 2, 3))


LARGEST_SNR = 1000.0  # bound of the SNR in some weightings, as in sd-scripts


def min_snr(snr: Tensor, gamma: float, predicts_v: bool) -> Tensor:
    """Return min(SNR, gamma) / SNR, for v / (SNR + 1), (B,) (Hang et al. 2023, arXiv 2303.09556)."""
    return snr.clamp(max=gamma) / (snr + 1 if predicts_v else snr)


def v_like_noise(snr: Tensor, is_on: float, predicts_v: bool) -> Tensor:
    """Return SNR / (SNR + 1), (B,): weights the loss of v like that of noise."""
    del is_on, predicts_v
    bounded = snr.clamp(max=LARGEST_SNR)
    return bounded / (bounded + 1)


def noise_like_v(snr: Tensor, share: float, predicts_v: bool) -> Tensor:
    """Return 1 + share (SNR + 1) / SNR, (B,): adds a share of the loss with the weight of v."""
    del predicts_v
    bounded = snr.clamp(max=LARGEST_SNR)
    return 1 + share * (bounded + 1) / bounded


def debiased(snr: Tensor, is_on: float, predicts_v: bool) -> Tensor:
    """Return 1 / sqrt(SNR), for v 1 / (SNR + 1), (B,) (Yu et al. 2023, arXiv 2310.08442)."""
    del is_on
    bounded = snr.clamp(max=LARGEST_SNR)
    return 1 / (bounded + 1) if predicts_v else bounded.rsqrt()


# Option -> weight of a sample's loss: (SNR (B,), value of the option, whether v is predicted) -> (B,).
WEIGHTINGS: dict[str, Callable[[Tensor, float, bool], Tensor]] = {
    "min_snr_gamma": min_snr,
    "scale_v_pred_loss_like_noise_pred": v_like_noise,
    "v_pred_like_loss": noise_like_v,
    "debiased_estimation_loss": debiased,
}


def timestep_weights(timesteps: Tensor, schedule: NoiseSchedule, config: LossConfig, *, predicts_v: bool) -> Tensor:
    """Return the weight of each sample's loss, (B,): the product of all weightings that are on.

    A timestep without signal (SNR 0) has the weight of the last one with signal, since weightings divide by the SNR.
    """
    all_snr = schedule.snr(torch.arange(NUM_TIMESTEPS, device=timesteps.device))
    snr = all_snr[timesteps].clamp_min(all_snr[all_snr > 0].min())
    weights = torch.ones_like(snr)
    for option, weighting in WEIGHTINGS.items():
        value = getattr(config, option)
        if value:
            weights = weights * weighting(snr, value, predicts_v)
    return weights


class LossTables(NamedTuple):
    """What a loss reads of each timestep, made once in a run: looked up, it costs one operation and no wait."""

    weights: Tensor | None  # (T,); None: all are 1
    thresholds: Tensor | None  # (T,), of the losses that have one


def loss_tables(schedule: NoiseSchedule, config: LossConfig, *, predicts_v: bool) -> LossTables:
    """Return the tables of a schedule, on its device."""
    every = torch.arange(NUM_TIMESTEPS, device=schedule.alphas_cumprod.device)
    is_weighted = any(getattr(config, option) for option in WEIGHTINGS)
    return LossTables(
        timestep_weights(every, schedule, config, predicts_v=predicts_v) if is_weighted else None,
        huber_threshold(every, schedule, config) if config.loss_type in USE_THRESHOLDS else None,
    )
