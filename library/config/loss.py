"""Options of noise and loss."""

from __future__ import annotations

import dataclasses
from typing import Literal

from library.config.options import option

LossName = Literal["l1", "l2", "huber", "smooth_l1"]
HuberSchedule = Literal["constant", "exponential", "snr"]
WITH_THRESHOLD = ("loss_type=huber", "loss_type=smooth_l1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Noise and loss."""

    noise_offset: float | None = option(None, "add this times one random number per channel to the noise", minimum=0)
    noise_offset_random_strength: bool = option(
        False, "vary --noise_offset between 0 and its value", only_with=("noise_offset",)
    )
    adaptive_noise_scale: float | None = option(None, "add this times the absolute channel mean to --noise_offset")
    multires_noise_iterations: int | None = option(None, "layers of coarser noise; 6 to 10 are usual", minimum=0)
    multires_noise_discount: float = option(
        0.3, "factor from one layer of coarser noise to the next", minimum=0, only_with=("multires_noise_iterations",)
    )
    ip_noise_gamma: float | None = option(None, "add this much more noise to the input than to the target", minimum=0)
    ip_noise_gamma_random_strength: bool = option(
        False, "vary --ip_noise_gamma between 0 and its value", only_with=("ip_noise_gamma",)
    )
    zero_terminal_snr: bool = option(False, "rescale the noise schedule so that its last timestep is pure noise")
    min_timestep: int | None = option(None, "lowest timestep that is trained; unset: 0", minimum=0, maximum=999)
    max_timestep: int | None = option(None, "all trained timesteps are below it; unset: 1000", minimum=1, maximum=1000)
    loss_type: LossName = option("l2", "distance between prediction and target")
    huber_schedule: HuberSchedule = option(
        "snr", "how the Huber threshold depends on the timestep", only_with=WITH_THRESHOLD
    )
    huber_c: float = option(
        0.1, "Huber threshold; for the schedules its value at the noisy end", minimum=0, only_with=WITH_THRESHOLD
    )
    huber_scale: float = option(1.0, "factor on the Huber threshold", minimum=0, only_with=WITH_THRESHOLD)
    min_snr_gamma: float | None = option(None, "weight the loss by min(SNR, gamma); 5 is usual", minimum=0)
    scale_v_pred_loss_like_noise_pred: bool = option(False, "weight the loss of v like that of noise")
    v_pred_like_loss: float | None = option(None, "add this times the loss weighted like that of v", minimum=0)
    debiased_estimation_loss: bool = option(False, "weight the loss by 1 / sqrt(SNR), for v by 1 / (SNR + 1)")
    masked_loss: bool = option(False, "weight the loss by the masks in conditioning_data_dir of the dataset")

    @property
    def timestep_range(self) -> tuple[int, int]:
        """The lowest timestep that is sampled, and the exclusive upper limit."""
        return self.min_timestep or 0, 1000 if self.max_timestep is None else self.max_timestep
