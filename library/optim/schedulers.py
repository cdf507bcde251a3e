"""Learning-rate schedules: functions from the step to a factor, as rows of a table.

The schedule advances once with each optimizer step, for any number of processes. The curves are those of diffusers and
transformers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch

from library.config.optimizer import POLYNOMIAL_END, ScheduleConfig
from library.errors import UserError, message_of
from library.optim.optimizers import AveragesWeights, import_class, read_arguments


@dataclasses.dataclass(frozen=True)
class Curve:
    """The parameters of the factor functions; all lengths are in steps."""

    num_steps: int
    warmup: int
    decay: int
    cycles: int
    power: float
    timescale: int
    min_ratio: float
    learning_rate: float
    pieces: tuple[tuple[float, float], ...] = ()  # (factor, up to this step)

    def progress(self, step: int) -> float:
        """Return the share of the steps after the warm-up that are done, from 0."""
        return (step - self.warmup) / max(1, self.num_steps - self.warmup)


def linear(step: int, curve: Curve) -> float:
    """Decrease linearly to 0."""
    return max(0.0, (curve.num_steps - step) / max(1, curve.num_steps - curve.warmup))


def cosine(step: int, curve: Curve) -> float:
    """Decrease along half a cosine to 0 (arXiv 1608.03983)."""
    return max(0.0, (1 + math.cos(math.pi * curve.progress(step))) / 2)


def cosine_with_restarts(step: int, curve: Curve) -> float:
    """Decrease along half a cosine, several times."""
    progress = curve.progress(step)
    return 0.0 if progress >= 1 else (1 + math.cos(math.pi * ((curve.cycles * progress) % 1.0))) / 2


def polynomial(step: int, curve: Curve) -> float:
    """Decrease with a power of the remaining time to a rate of 1e-7."""
    rate = curve.learning_rate
    remaining = (1 - min(1.0, curve.progress(step))) ** curve.power
    return ((rate - POLYNOMIAL_END) * remaining + POLYNOMIAL_END) / rate


def inverse_sqrt(step: int, curve: Curve) -> float:
    """Decrease with the inverse square root of time."""
    return ((step + curve.timescale - curve.warmup) / curve.timescale) ** -0.5


def cosine_with_min_lr(step: int, curve: Curve) -> float:
    """Decrease along a cosine to a share of the rate."""
    wave = (1 + math.cos(math.pi * curve.cycles * curve.progress(step))) / 2
    return max(0.0, wave * (1 - curve.min_ratio) + curve.min_ratio)


def warmup_stable_decay(step: int, curve: Curve) -> float:
    """Stay at 1, then decrease along a cosine over the last steps."""
    start = curve.num_steps - curve.decay
    if step < start:
        return 1.0
    if step >= curve.num_steps:
        return curve.min_ratio
    wave = (1 + math.cos(math.pi * curve.cycles * (step - start) / max(1, curve.decay))) / 2
    return max(0.0, wave * (1 - curve.min_ratio) + curve.min_ratio)


def piecewise_constant(step: int, curve: Curve) -> float:
    """Return the factor of the first piece that has not ended."""
    return next(factor for factor, end in curve.pieces if step < end)


FACTORS: dict[str, Callable[[int, Curve], float]] = {
    "constant": lambda step, curve: 1.0,
    "constant_with_warmup": lambda step, curve: 1.0,
    "linear": linear,
    "cosine": cosine,
    "cosine_with_restarts": cosine_with_restarts,
    "polynomial": polynomial,
    "inverse_sqrt": inverse_sqrt,
    "cosine_with_min_lr": cosine_with_min_lr,
    "warmup_stable_decay": warmup_stable_decay,
    "piecewise_constant": piecewise_constant,
}


def curve_for(config: ScheduleConfig, num_steps: int, learning_rate: float) -> Curve:
    """Return the curve of a run; steps below 1 are shares of num_steps."""
    warmup = _in_steps(config.lr_warmup_steps, num_steps)
    return Curve(
        num_steps=num_steps,
        warmup=warmup,
        decay=_in_steps(config.lr_decay_steps, num_steps),
        cycles=config.lr_scheduler_num_cycles,
        power=config.lr_scheduler_power,
        timescale=config.lr_scheduler_timescale or warmup or 10_000,
        min_ratio=config.lr_scheduler_min_lr_ratio or 0.0,
        learning_rate=learning_rate,
        pieces=_pieces(config) if config.lr_scheduler == "piecewise_constant" else (),
    )


def _in_steps(value: int | float, num_steps: int) -> int:
    return value if isinstance(value, int) else int(value * num_steps)


def _pieces(config: ScheduleConfig) -> tuple[tuple[float, float], ...]:
    """Return the pieces of step_rules='1:10,0.1:20,0.01': factor 1 before step 10, 0.1 before 20, then 0.01."""
    text = (config.lr_scheduler_args or {}).get("step_rules", "").strip("'\"")
    try:
        pieces = []
        for rule in text.split(","):
            factor, _, end = rule.partition(":")
            pieces.append((float(factor), float(end) if end else math.inf))
            if not math.isfinite(pieces[-1][0]) or math.isnan(pieces[-1][1]):
                raise ValueError
    except ValueError:
        pieces = []
    if not pieces or pieces[-1][1] != math.inf:
        raise UserError(f"--lr_scheduler_args: piecewise_constant needs step_rules='1:10,0.1:20,0.01', got {text!r}")
    return tuple(pieces)


def factor(name: str, step: int, curve: Curve) -> float:
    """Return the factor of the learning rate at a step (from 0), including the linear warm-up."""
    if step < curve.warmup and name not in ("constant", "piecewise_constant"):
        return step / max(1, curve.warmup)
    return FACTORS[name](step, curve)


MOST_CHECKED = 10_000  # steps; a tenth of a second


def check_scheduler(
    config: ScheduleConfig, optimizer: torch.optim.Optimizer, learning_rate: float, num_steps: int
) -> None:
    """Raise UserError for a schedule that cannot be created, or that fails within num_steps.

    Classes of torch and of packages are run through, since some end before the run does.
    """
    schedule = build_scheduler(config, optimizer, num_steps, learning_rate)
    if schedule is None:
        return
    try:
        optimizer.step()  # torch warns if the schedule advances first
        for _ in range(min(num_steps, MOST_CHECKED) if config.lr_scheduler_type else 1):
            schedule.step()
    except Exception as error:
        raise UserError(
            f"--lr_scheduler_type {config.lr_scheduler_type} cannot be used: {message_of(error)}"
        ) from error


def build_scheduler(
    config: ScheduleConfig, optimizer: torch.optim.Optimizer, num_steps: int, learning_rate: float
) -> torch.optim.lr_scheduler.LRScheduler | None:
    """Return the schedule over an optimizer; None if the optimizer computes its rate or is schedule-free."""
    if any(group["lr"] is None for group in optimizer.param_groups) or isinstance(optimizer, AveragesWeights):
        return None
    if config.lr_scheduler_type:
        path = config.lr_scheduler_type
        path = path if "." in path else f"torch.optim.lr_scheduler.{path}"
        kind = import_class(path, "--lr_scheduler_type")
        arguments = read_arguments(kind, config.lr_scheduler_args or {}, "--lr_scheduler_args")
        try:
            return kind(optimizer, **arguments)
        except Exception as error:  # also of other packages' classes
            raise UserError(
                f"--lr_scheduler_args: {config.lr_scheduler_type} refuses them: {message_of(error)}"
            ) from error
    if config.lr_scheduler == "adafactor":
        raise UserError("--lr_scheduler adafactor goes with --optimizer_type AdaFactor and relative_step=True only")
    curve = curve_for(config, num_steps, learning_rate)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(config.lr_scheduler, step, curve))
