"""The loss on held-out pictures, always with the same noise at the same timesteps."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from library.config.dataset import DatasetOptions
from library.data.batches import Batch, BatchMaker, BatchRequest, TaskMaker, plan_epoch
from library.data.latent_cache import LatentCache
from library.data.records import Dataset
from library.training.record.metrics import Metrics
from library.training.run.events import At, Every, Moment
from library.training.run.interruption import StopRequest
from library.training.run.objective import Objective
from library.training.run.runtime import Runtime
from library.training.run.state import TrainState

logger = logging.getLogger(__name__)

KINDS = {At.STEP: "step", At.EPOCH: "epoch"}  # point of the run -> what a loss that is due there is of, in the log
NUM_TIMESTEPS = 4  # at which each picture is measured: evenly spaced, 200, 400, 600 and 800 of 0 to 1000


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Pictures to measure, in batches whose order and noise depend only on a seed."""

    maker: BatchMaker
    requests: list[BatchRequest]
    seed: int

    def share(self, rank: int, num_processes: int) -> list[BatchRequest]:
        """Return the requests that one of the processes measures."""
        return self.requests[rank::num_processes]

    @torch.no_grad()
    def losses(
        self, objective: Objective, request: BatchRequest, timesteps: Sequence[int], draw: int = 0
    ) -> tuple[Batch, list[Tensor]]:
        """Return a batch with its losses, (B,) for each timestep; draw is the number of the noise, from 0."""
        further = (draw,) if draw else ()
        keys = [(self.seed, "validation", *sample, *further) for sample in request.samples]
        batch = self.maker[request]
        inputs = objective.draw(batch, keys)
        prepared = objective.prepare(inputs)
        same = [torch.full((len(keys),), timestep, device=prepared.latents.device) for timestep in timesteps]
        return batch, [objective.losses(inputs, prepared, timestep) for timestep in same]


def held_out(
    datasets: list[Dataset], seed: int, cache: LatentCache | None, prior_loss_weight: float, most: int | None
) -> HeldOut | None:
    """Return the held-out pictures of the datasets, in at most `most` batches; None if there are none."""
    measured = [dataset.validation for dataset in datasets]
    if not any(dataset.records for dataset in measured):
        return None
    requests = [BatchRequest(0, 0, samples) for samples in itertools.islice(plan_epoch(measured, seed, 0), most)]
    # The number of steps, 1, matters only for the token warm-up, which held-out pictures do not have.
    return HeldOut(BatchMaker(measured, TaskMaker(seed, 1, prior_loss_weight, cache)), requests, seed)


def validation_seed(dataset: DatasetOptions, seed: int) -> int:
    """Return the seed of the split and the noise: --validation_seed, else that of the run."""
    return seed if dataset.validation_seed is None else dataset.validation_seed


def spread_timesteps(timestep_range: tuple[int, int], number: int) -> list[int]:
    """Return evenly spaced timesteps within a range, without its ends."""
    return torch.linspace(*timestep_range, number + 2)[1:-1].long().tolist()


@dataclasses.dataclass(frozen=True)
class Validation:
    """Measures and logs the validation loss during training, and records the lowest one."""

    due: Every
    pictures: HeldOut
    objective: Objective
    state: TrainState
    metrics: Metrics
    runtime: Runtime
    stop: StopRequest

    def log(self, moment: Moment) -> None:
        """Measure the loss once, and log it as that of the step, of the epoch, or of both."""
        progress = moment.progress
        with self.state.evaluation():
            loss = self.measure()
        if loss is None:
            logger.warning("validation after step %d is left out, because of the stop", progress.step)
            return
        if progress.best is None or loss < progress.best[0]:
            progress.best = (loss, progress.step)
        logger.info("validation after step %d: %.4g (lowest: %.4g, step %d)", progress.step, loss, *progress.best)
        values = {"average": loss, "divergence": loss - progress.average_loss}
        named = {
            f"loss/validation/{kind}_{name}": value for kind in self.kinds(moment) for name, value in values.items()
        }
        self.metrics.write(progress.step, named)

    def kinds(self, moment: Moment) -> list[str]:
        """Return what the loss is of at a moment; at the end of the run also of the epoch."""
        found = [kind for at, kind in KINDS.items() if at in moment.points and self.due.falls_on(at, moment.progress)]
        return found or ["epoch"]

    def measure(self) -> float | None:
        """Return the mean loss over all pictures and timesteps, None after a stop; each process measures a part."""
        runtime, part = self.runtime, torch.zeros(2, dtype=torch.float64)
        is_complete = self.stop.cut_short(lambda: self._add_losses(part))
        total = torch.tensor([*part.tolist(), float(not is_complete)], dtype=torch.float64)
        if runtime.num_processes > 1:
            on_device = total.float().to(runtime.device)
            torch.distributed.all_reduce(on_device)
            total = on_device.double().cpu()
        return None if total[2] else float(total[0] / total[1])

    def _add_losses(self, total: Tensor) -> None:
        """Add the sum of this process's losses and their number to total, (2,)."""
        runtime = self.runtime
        timesteps = spread_timesteps(self.objective.loss.timestep_range, NUM_TIMESTEPS)
        for request in self.pictures.share(runtime.rank, runtime.num_processes):
            for losses in self.pictures.losses(self.objective, request, timesteps)[1]:
                total += torch.tensor([losses.double().sum().item(), len(losses)], dtype=torch.float64)
