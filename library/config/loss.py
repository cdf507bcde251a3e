"""Options of noise and loss."""

from __future__ import annotations

import dataclasses
from typing import Literal

from library.config.options import option

LossName = Literal["l1", "l2", "huber", "smooth_l1"]
HuberSchedule = Literal["constant", "exponential", "snr"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Noise and loss."""

    noise_offset: float | None = option(None, "add this times one random number per channel to the noise")
    loss_type: LossName = option("l2", "distance between prediction and target")
    huber_schedule: HuberSchedule = option("snr", "how the Huber threshold depends on the timestep")
    huber_c: float = option(0.1, "Huber threshold; for the schedules its value at the noisy end", minimum=0)
    huber_scale: float = option(1.0, "factor on the Huber threshold", minimum=0)
    min_snr_gamma: float | None = option(None, "weight the loss by min(SNR, gamma); 5 is usual", minimum=0)
