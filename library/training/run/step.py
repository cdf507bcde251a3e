"""One optimizer step: from micro-batches to changed weights."""

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
from library.optim.optimizers import adapted_rates, current_rates
from library.randomness import seed_for
from library.training.run.objective import Objective
from library.training.run.runtime import Runtime, average_gradients, seed_micro_batch
from library.training.run.state import TrainState

logger = logging.getLogger(__name__)

MOST_SKIPPED = 10  # steps in a row that are not finite before a run with --on_nan skip gives up


@dataclasses.dataclass(frozen=True)
class StepResult:
    """The results of one optimizer step."""

    losses: list[float]  # of its micro-batches, without those that are not finite
    gradient_norm: float  # before clipping
    rates: dict[str, float]  # learning rate by name of the parameter group
    adapted_rates: dict[str, float]  # the same times the step size that the optimizer found; empty for most optimizers
    norms: dict[str, float]  # of the network's weights, by name in the log
    was_skipped: bool  # the weights are as they were, because something was not finite


class Step(Protocol):
    """Makes optimizer steps; `EagerStep` is the one implementation so far."""

    def __call__(self, step: int, batches: Sequence[Batch]) -> StepResult:
        """Make a step (from 0) from the mean gradient of some micro-batches; raises UserError to end the run."""
        ...


class EagerStep:
    """Makes steps in PyTorch's eager mode."""

    def __init__(
        self,
        objective: Objective,
        state: TrainState,
        runtime: Runtime,
        *,
        seed: int,
        max_grad_norm: float | None = None,
        scale_weight_norms: float | None = None,
        on_nan: Literal["stop", "skip"] = "stop",
        zero_in_place: bool = False,  # gradients are views of flat ones, which must stay
    ) -> None:
        self._objective, self._runtime = objective, runtime
        self._state, self._network, self._optimizer = state, state.network, state.optimizer
        self._seed, self._max_grad_norm, self._scale_weight_norms = seed, max_grad_norm, scale_weight_norms
        self._on_nan = on_nan
        self._zero_in_place = zero_in_place
        self._parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
        self._num_skipped = 0  # in a row

    def __call__(self, step: int, batches: Sequence[Batch]) -> StepResult:
        """Make a step (from 0) from the mean gradient of some micro-batches."""
        losses = []
        self._network.on_optimizer_step(seed_for(self._seed, "step", step))
        for index, batch in enumerate(batches):
            seed_micro_batch(self._seed, step, index, self._runtime.rank)
            self._network.on_step_start()
            loss = self._objective.training_loss(batch)
            self._state.scaler.scale(loss / len(batches)).backward()
            losses.append(loss.detach())
        average_gradients(self._parameters, self._runtime.num_processes)
        norm = self._clip()
        # The only wait for the device in a step; before the update, so that what is not finite never enters a weight.
        *values, size = torch.stack([*losses, norm]).tolist()
        problem = self._not_finite(step, values, size, batches)
        advanced = self._update() if problem is None else self._skip(problem)
        rates = current_rates(self._optimizer)  # of this step; the schedule goes on to the next one's
        if advanced and self._state.scheduler is not None:
            self._state.scheduler.step()
        return StepResult(
            losses=[value for value in values if math.isfinite(value)],
            gradient_norm=size,
            rates=dict(zip(self._state.group_names, rates, strict=True)),
            adapted_rates=dict(zip(self._state.group_names, adapted_rates(self._optimizer), strict=False)),
            norms=self._scale_norms(),
            was_skipped=not advanced,
        )

    def _clip(self) -> Tensor:
        """Clip the gradients to --max_grad_norm; return their norm before (0-D)."""
        self._state.scaler.unscale_(self._optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None], foreach=True)
        if self._max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._max_grad_norm, norm, foreach=True)
        self._network.after_clipping()
        return norm.float()

    def _not_finite(self, step: int, losses: list[float], norm: float, batches: Sequence[Batch]) -> str | None:
        """Return what is not finite and with which pictures, or None.

        A gradient that overflows under a scaler is left to the scaler, which skips the step.
        """
        bad = [(loss, batch) for loss, batch in zip(losses, batches, strict=True) if not math.isfinite(loss)]
        if bad:
            return f"the loss became {bad[0][0]} in step {step + 1} with {_pictures(bad[0][1])}"
        if not math.isfinite(norm) and not self._state.scaler.is_enabled():
            pictures = "; ".join(_pictures(batch) for batch in batches)
            return f"the gradient became {norm} in step {step + 1} with {pictures}"
        return None

    def _update(self) -> bool:
        """Apply the gradients; return False where the scaler found an overflow and skipped the step."""
        self._num_skipped = 0
        scaler, scale = self._state.scaler, self._state.scaler.get_scale()
        scaler.step(self._optimizer)
        scaler.update()
        self._optimizer.zero_grad(set_to_none=not self._zero_in_place)
        return scaler.get_scale() >= scale

    def _skip(self, problem: str) -> bool:
        """Drop the gradients of a step that is not finite, or end the run, as --on_nan says; return False."""
        if self._on_nan == "stop":
            raise UserError(
                f"{problem}: nothing was overwritten; try a lower learning rate, --no_half_vae, bf16 in place of "
                "fp16, or --on_nan skip"
            )
        self._num_skipped += 1
        if self._num_skipped >= MOST_SKIPPED:
            raise UserError(f"{problem}, as in the {MOST_SKIPPED - 1} steps before: the run does not come back from it")
        logger.warning("%s; the step is left out", problem)
        self._state.scaler.update()
        self._optimizer.zero_grad(set_to_none=not self._zero_in_place)
        return False

    def _scale_norms(self) -> dict[str, float]:
        """Scale weights down to --scale_weight_norms, where that is given; return the norms for the log."""
        if not self._scale_weight_norms:
            return self._network.norms()
        result = self._network.scale_norms(self._scale_weight_norms, self._runtime.device)
        names = ("max_norm/keys_scaled", "norm/avg_key_norm", "max_norm/max_key_norm")
        return {} if result is None else dict(zip(names, result, strict=True))


def _pictures(batch: Batch) -> str:
    """Return the pictures of a batch with their captions, for a message."""
    pairs = zip(batch.names, batch.captions, strict=True)
    return ", ".join(f"{name} ({caption!r})" for name, caption in pairs)
