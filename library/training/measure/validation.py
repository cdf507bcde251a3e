"""The loss on pictures that are not trained on, always with the same noise at the same timesteps."""

from __future__ import annotations

import dataclasses

import torch

from library.config.training import ValidationConfig
from library.data.dataset import BatchMaker, BatchRequest, plan_epoch
from library.data.records import TrainingSet
from library.training.run.objective import Objective
from library.training.run.runtime import Runtime

NUM_TIMESTEPS = 4  # at which each picture is measured: evenly spaced, 200, 400, 600 and 800 of 0 to 1000


@dataclasses.dataclass(frozen=True)
class Validation:
    """What is measured: the pictures held out, in batches whose order and noise depend on a seed only."""

    config: ValidationConfig
    sets: list[TrainingSet]
    maker: BatchMaker
    seed: int

    def due_at_step(self, step: int) -> bool:
        """Return whether to measure after a step."""
        interval = self.config.validate_every_n_steps
        return interval is not None and step % interval == 0

    def due_at_epoch(self, epoch: int) -> bool:
        """Return whether to measure after an epoch; every one unless the options say otherwise."""
        return epoch % (self.config.validate_every_n_epochs or 1) == 0

    def batches(self) -> list[BatchRequest]:
        """Return the batches that are measured."""
        return [BatchRequest(0, 0, samples) for samples in plan_epoch(self.sets, self.seed, 0)][
            : self.config.max_validation_steps
        ]

    @torch.no_grad()
    def measure(self, objective: Objective, runtime: Runtime) -> float:
        """Return the mean loss over all pictures and timesteps; each process measures its share."""
        lowest, limit = objective.loss.timestep_range
        timesteps = torch.linspace(lowest, limit, NUM_TIMESTEPS + 2)[1:-1].long().tolist()
        total = torch.zeros(2, dtype=torch.float64)
        for request in self.batches()[runtime.rank :: runtime.num_processes]:
            keys = [(self.seed, "validation", *sample) for sample in request.samples]
            prepared = objective.prepare(self.maker[request], keys)
            for timestep in timesteps:
                losses = objective.losses(
                    prepared, keys, torch.full((len(keys),), timestep, device=prepared.latents.device)
                )
                total += torch.tensor([losses.double().sum().item(), len(keys)], dtype=torch.float64)
        if runtime.num_processes > 1:
            on_device = total.float().to(runtime.device)
            torch.distributed.all_reduce(on_device)
            total = on_device.double().cpu()
        return float(total[0] / total[1])
