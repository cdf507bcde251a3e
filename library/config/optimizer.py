"""Options of the optimizer, the learning rates and their schedule."""

from __future__ import annotations

import dataclasses
from typing import Literal

from library.config.options import option
from library.config.values import parse_pairs, parse_steps

POLYNOMIAL_END = 1e-7  # learning rate at the end of --lr_scheduler polynomial
STEPS_FORM = "a whole number of steps, or a share of all steps such as 0.1 or 10%"
WITH_CYCLES = (
    "lr_scheduler=cosine_with_restarts",
    "lr_scheduler=cosine_with_min_lr",
    "lr_scheduler=warmup_stable_decay",
)

ScheduleName = Literal[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "warmup_stable_decay",
    "piecewise_constant",
    "adafactor",
]

# The rows of `library.optim.optimizers`, each the class of a package; any other class can be named by its path.
OPTIMIZER_NAMES = (
    "AdamW",
    "AdamW8bit",
    "PagedAdamW",
    "PagedAdamW8bit",
    "PagedAdamW32bit",
    "Lion",
    "Lion8bit",
    "PagedLion8bit",
    "SGDNesterov",
    "SGDNesterov8bit",
    "Prodigy",
    "DAdaptation",
    "DAdaptAdam",
    "DAdaptAdamPreprint",
    "DAdaptAdaGrad",
    "DAdaptAdan",
    "DAdaptAdanIP",
    "DAdaptLion",
    "DAdaptSGD",
    "AdamWScheduleFree",
    "RAdamScheduleFree",
    "SGDScheduleFree",
    "AdaFactor",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer."""

    optimizer_type: str = option(
        "AdamW", "AdamW, AdamW8bit, AdaFactor, ... or package.module.Class", known=OPTIMIZER_NAMES
    )
    optimizer_args: dict[str, str] | None = option(
        None, "further arguments, each key=value", parse=parse_pairs, form="a list of key=value"
    )
    use_8bit_adam: bool = option(False, "old spelling of --optimizer_type AdamW8bit", excludes=("optimizer_type",))
    use_lion_optimizer: bool = option(
        False, "old spelling of --optimizer_type Lion", excludes=("optimizer_type", "use_8bit_adam")
    )
    learning_rate: float = option(2e-6, "default learning rate; 1e-4 to 1e-3 suits a LoRA", minimum=0)
    unet_lr: float | None = option(
        None, "learning rate of the U-Net's adapter", minimum=0, not_with=("network_train_text_encoder_only",)
    )
    text_encoder_lr: tuple[float, ...] | None = option(
        None,
        "learning rate of the text encoder's adapter; of two encoders, one for both or one for each",
        minimum=0,
        not_with=("network_train_unet_only",),
    )
    max_grad_norm: float = option(1.0, "clip the norm of the gradients to this; 0 does not clip", minimum=0)

    @property
    def unet_rate(self) -> float:
        """The learning rate of the U-Net."""
        return self.learning_rate if self.unet_lr is None else self.unet_lr

    def text_rates(self, number: int) -> list[float]:
        """Return the learning rate of each of a number of text encoders; the last given is that of all further ones."""
        given = self.text_encoder_lr or (self.learning_rate,)
        return [given[min(index, len(given) - 1)] for index in range(number)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate schedule."""

    lr_scheduler: ScheduleName = option("constant", "how the learning rate changes over the run")
    lr_warmup_steps: int | float = option(
        0, "steps of linear warm-up", parse=parse_steps, form=STEPS_FORM, interval="steps"
    )
    lr_decay_steps: int | float = option(
        0,
        "steps of decay of warmup_stable_decay",
        parse=parse_steps,
        form=STEPS_FORM,
        only_with=("lr_scheduler=warmup_stable_decay",),
        interval="steps",
    )
    lr_scheduler_num_cycles: int = option(1, "cycles of the cosine schedules", minimum=1, only_with=WITH_CYCLES)
    lr_scheduler_power: float = option(1.0, "power of polynomial", only_with=("lr_scheduler=polynomial",))
    lr_scheduler_timescale: int | None = option(
        None, "time scale of inverse_sqrt; unset: the warm-up", minimum=1, only_with=("lr_scheduler=inverse_sqrt",)
    )
    lr_scheduler_min_lr_ratio: float | None = option(
        None,
        "lowest factor of cosine_with_min_lr and warmup_stable_decay",
        minimum=0,
        maximum=1,
        only_with=WITH_CYCLES[1:],
    )
    lr_scheduler_type: str = option(
        "", "torch.optim.lr_scheduler class or package.module.Class instead of the above", wins_over=("lr_scheduler",)
    )
    lr_scheduler_args: dict[str, str] | None = option(
        None, "arguments of the schedule, each key=value", parse=parse_pairs, form="a list of key=value"
    )
