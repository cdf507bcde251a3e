"""One optimizer step: from micro-batches to changed weights.

Where the optimizer can leave out a step on the device, nothing here waits for it: the numbers of a step are copied in
the background, and read when the next one is under way (`run.loop`).
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from library.data.batches import Batch
from library.errors import UserError
from library.models.sending import Reading
from library.optim.optimizers import adapted_rates, current_rates
from library.randomness import seed_for
from library.training.run.objective import Objective, StepInputs
from library.training.run.runtime import Runtime, anywhere, average_gradients, seed_micro_batch
from library.training.run.state import TrainState

logger = logging.getLogger(__name__)

MOST_SKIPPED = 10  # steps in a row that are not finite before a run with --on_nan skip gives up


@dataclasses.dataclass(frozen=True)
class StepResult:
    """The results of one optimizer step."""

    step: int  # steps made with it
    losses: list[float]  # of its micro-batches, without those that are not finite
    rates: dict[str, float]  # learning rate by name of the parameter group
    adapted_rates: dict[str, float]  # the same times the step size that the optimizer found; empty for most optimizers
    norms: dict[str, float]  # of the network's weights, by name in the log
    num_skipped: int  # steps in a row that were left out because they were not finite, up to this one


class Pass(Protocol):
    """Makes the forward and the backward pass of a micro-batch."""

    def __call__(self, inputs: StepInputs, scale: Tensor | float) -> Tensor:
        """Add the gradients of the loss times a scale to those of the weights; return the loss (0-D), detached."""
        ...


@dataclasses.dataclass(frozen=True)
class EagerPass:
    """The passes in PyTorch's eager mode."""

    objective: Objective

    def __call__(self, inputs: StepInputs, scale: Tensor | float) -> Tensor:
        """Make the passes of one micro-batch."""
        loss = self.objective.training_loss(inputs)
        (loss * scale).backward()
        return loss.detach()


class Verdict:
    """Judges steps whose numbers are not finite, in their order: they are left out, or end the run."""

    def __init__(self, on_nan: Literal["stop", "skip"], scaler: torch.amp.GradScaler, *, num_skipped: int = 0) -> None:
        """num_skipped is the number of the last steps before that were left out, all in a row."""
        # A gradient that overflows is the scaler's business, which lowers the scale.
        self._on_nan, self._scales_losses = on_nan, scaler.is_enabled()
        self._num_skipped = num_skipped

    def judge(self, step: int, losses: list[float], norm: float, batches: Sequence[Batch]) -> int:
        """Return how many steps in a row are left out, up to this one (from 1), with a warning if it is.

        Raises UserError where that ends the run.
        """
        problem = self._not_finite(step, losses, norm, batches)
        if problem is None:
            self._num_skipped = 0
            return 0
        if self._on_nan == "stop":
            raise UserError(
                f"{problem}: nothing was overwritten; try a lower learning rate, --no_half_vae, bf16 in place of "
                "fp16, or --on_nan skip"
            )
        self._num_skipped += 1
        if self._num_skipped >= MOST_SKIPPED:
            raise UserError(f"{problem}, as in the {MOST_SKIPPED - 1} steps before: the run does not come back from it")
        logger.warning("%s; the step is left out", problem)
        return self._num_skipped

    def _not_finite(self, step: int, losses: list[float], norm: float, batches: Sequence[Batch]) -> str | None:
        bad = [(loss, batch) for loss, batch in zip(losses, batches, strict=True) if not math.isfinite(loss)]
        if bad:
            return f"the loss became {bad[0][0]} in step {step} with {_pictures(bad[0][1])}"
        if not math.isfinite(norm) and not self._scales_losses:
            pictures = "; ".join(_pictures(batch) for batch in batches)
            return f"the gradient became {norm} in step {step} with {pictures}"
        return None


@dataclasses.dataclass(frozen=True)
class PendingStep:
    """A step that is under way."""

    step: int  # steps made with it
    batches: Sequence[Batch]
    reading: Reading  # losses of the micro-batches, norm of the gradient
    rates: dict[str, float]
    adapted_rates: dict[str, float]
    norms: dict[str, float]
    verdict: Verdict

    def result(self) -> StepResult:
        """Wait for the step and return its results; raises UserError to end the run."""
        *losses, norm = self.reading.numbers()
        num_skipped = self.verdict.judge(self.step, losses, norm, self.batches)
        return StepResult(
            step=self.step,
            losses=[loss for loss in losses if math.isfinite(loss)],
            rates=self.rates,
            adapted_rates=self.adapted_rates,
            norms=self.norms,
            num_skipped=num_skipped,
        )


class OptimizerStep:
    """Makes steps: passes over the micro-batches, then clipping, optimizer and schedule."""

    def __init__(
        self,
        objective: Objective,
        passes: Pass,
        state: TrainState,
        runtime: Runtime,
        *,
        verdict: Verdict,
        seed: int,
        max_grad_norm: float | None = None,
        scale_weight_norms: float | None = None,
    ) -> None:
        self._draw, self._passes, self._runtime = objective.draw_step, passes, runtime
        self._state, self._network, self._optimizer = state, state.network, state.optimizer
        self._seed, self._max_grad_norm, self._scale_weight_norms = seed, max_grad_norm, scale_weight_norms
        self._verdict = verdict
        # Fused optimizers of torch read on the device whether a step is left out.
        self._skips_on_device = bool(getattr(state.optimizer, "_step_supports_amp_scaling", False))

    def __call__(self, step: int, batches: Sequence[Batch]) -> PendingStep:
        """Begin a step (from 0) from the mean gradient of some micro-batches."""
        weights, scaler = self._state.weights, self._state.scaler
        self._network.on_optimizer_step(seed_for(self._seed, "step", step))
        scale = scaler.scale(torch.ones((), device=self._runtime.device)) if scaler.is_enabled() else 1.0
        losses = []
        weights.clear()
        for index, batch in enumerate(batches):
            inputs = self._draw(batch)
            seed_micro_batch(self._seed, step, index, self._runtime.rank)
            self._network.on_step_start()
            losses.append(self._passes(inputs, scale / len(batches)))
            weights.collect()
        average_gradients(weights.gradients, self._runtime.num_processes)
        norm = self._clip()
        values = torch.stack([*losses, norm])
        self._update(values)
        rates = dict(zip(self._state.group_names, current_rates(self._optimizer), strict=True))
        adapted = dict(zip(self._state.group_names, adapted_rates(self._optimizer), strict=False))
        # The schedule follows the steps of the run, also those that are left out: it ends with the last one.
        if self._state.scheduler is not None:
            self._state.scheduler.step()
        norms = self._scale_norms()
        weights.publish()
        return PendingStep(step + 1, batches, Reading(values), rates, adapted, norms, self._verdict)

    def _clip(self) -> Tensor:
        """Clip the gradients to --max_grad_norm; return their norm before (0-D)."""
        gradients = self._state.weights.gradients
        self._state.scaler.unscale_(self._optimizer)
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        if self._max_grad_norm:
            ratio = (self._max_grad_norm / (norm + 1e-6)).clamp_max(1.0)  # as torch's clip_grads_with_norm_
            for gradient in gradients:
                gradient.mul_(ratio)
        self._network.after_clipping()
        return norm.float()

    def _update(self, values: Tensor) -> None:
        """Apply the gradients, unless a loss or the norm among values is not finite."""
        # 1 or 0, as kernels of optimizers want it: 0 times a number that is not finite is NaN.
        is_bad = anywhere((values * 0).sum().isnan().float(), self._runtime.num_processes)
        if self._skips_on_device:
            setattr(self._optimizer, "found_inf", is_bad)  # noqa: B010 (no attribute by its type)
            self._optimizer.step()
        elif not bool(is_bad):
            self._optimizer.step()
        self._state.scaler.update()

    def _scale_norms(self) -> dict[str, float]:
        """Scale weights down to --scale_weight_norms, where that is given; return the norms for the log."""
        if not self._scale_weight_norms:
            return self._network.norms()
        with self._state.weights.unhidden():
            result = self._network.scale_norms(self._scale_weight_norms, self._runtime.device)
        names = ("max_norm/keys_scaled", "norm/avg_key_norm", "max_norm/max_key_norm")
        return {} if result is None else dict(zip(names, result, strict=True))


def _pictures(batch: Batch) -> str:
    """Return the pictures of a batch with their captions, for a message."""
    pairs = zip(batch.names, batch.captions, strict=True)
    return ", ".join(f"{name} ({caption!r})" for name, caption in pairs)
