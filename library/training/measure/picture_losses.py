"""The loss of each picture with a network, at many timesteps and always with the same noise, to compare networks.

The difference between two networks on the same pictures and noise is far more precise than the loss of either,
because the difficulty of the pictures cancels out.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import torch

from library.config.loss import LossConfig
from library.config.train import TrainConfig
from library.data.latent_cache import LatentCache
from library.data.picture_index import index_for
from library.data.records import Dataset, unvaried
from library.diffusion.schedule import stable_diffusion_schedule
from library.errors import UserError
from library.models.base import BaseFiles, BaseModel
from library.models.conditioning import LiveConditioner, TextOptions
from library.models.latent_encoder import LatentEncoder
from library.models.precision import move
from library.networks.trainable import TrainableNetwork
from library.progress import Bar
from library.training.measure.validation import HeldOut, held_out, spread_timesteps, validation_seed
from library.training.prepare.caches import cache_latents
from library.training.prepare.checks import options_for
from library.training.prepare.placing import caption_options, open_base
from library.training.run.objective import Objective
from library.training.run.runtime import Runtime, start_runtime

Losses = dict[str, list[float]]  # picture -> loss at each timestep


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Measures networks over a base model, on the same pictures, timesteps and noise."""

    runtime: Runtime
    base: BaseModel
    loss: LossConfig
    text: TextOptions  # how captions are read
    pictures: HeldOut
    timesteps: list[int]
    draws: int  # noises for each picture and timestep

    def losses(self, network: TrainableNetwork, label: str) -> Losses:
        """Return the losses of all pictures with a network over the base model, as means over the draws."""

        schedule = stable_diffusion_schedule(zero_terminal_snr=self.base.zero_snr)
        objective = Objective(
            base=self.base,
            network=network,
            encoder=LatentEncoder(self.base.vae, self.runtime.types.vae),
            conditioner=LiveConditioner(self.base.texts),
            text=self.text,
            schedule=schedule.to(self.runtime.device),
            loss=self.loss,
            types=self.runtime.types,
            device=self.runtime.device,
            seed=self.pictures.seed,
        )
        found: dict[str, list[list[float]]] = {}
        parts = list(itertools.product(self.pictures.requests, range(self.draws)))
        for request, draw in Bar(parts, total=len(parts), desc=label, unit="batch", leave=False):
            # The first draw is that of the validation during training.
            batch, columns = self.pictures.losses(objective, request, self.timesteps, draw)
            rows = torch.stack(columns, dim=1).double()
            if not bool(torch.isfinite(rows).all()):
                raise UserError(f"{label}: the loss of {', '.join(batch.names)} is no finite number; try bf16 or fp32")
            for name, row in zip(batch.names, rows.tolist(), strict=True):
                found.setdefault(name, []).append(row)
        return {name: [statistics.fmean(column) for column in zip(*found[name], strict=True)] for name in sorted(found)}


def load_measurement(
    config: TrainConfig, datasets: list[Dataset], files: BaseFiles, *, seed: int, num_timesteps: int, draws: int
) -> Measurement:
    """Load the models and encode the pictures of datasets from `to_measure`; return their measurement."""
    config = options_for(config, files.checkpoint.family)
    runtime = start_runtime(config.precision, config.logs, vae_overflows=files.vae_overflows)
    base = open_base(files, config.network, config.precision, config.text.clip_skip, runtime)
    encoder = LatentEncoder(base.vae, runtime.types.vae)
    cache = cache_latents(config.precision, datasets, encoder, runtime, index_for(config.data))
    for module in (base.unet, *base.text_modules):
        move(module, runtime.device)
    return Measurement(
        runtime=runtime,
        base=base,
        loss=config.loss,
        text=caption_options(config.text),
        pictures=pictures_of(config, datasets, seed, cache),
        timesteps=spread_timesteps(config.loss.timestep_range, num_timesteps),
        draws=draws,
    )


def pictures_of(config: TrainConfig, datasets: list[Dataset], seed: int, cache: LatentCache | None) -> HeldOut:
    """Return the pictures to measure of datasets from `to_measure`; raises UserError if there are none."""
    seed, most = validation_seed(config.dataset, seed), config.validation.max_validation_steps
    pictures = held_out(datasets, seed, cache, config.data.prior_loss_weight, most)
    if pictures is None:
        raise UserError("there is no picture to measure: all of them are for regularisation")
    return pictures


def to_measure(datasets: list[Dataset]) -> list[Dataset]:
    """Return the datasets with only the pictures to measure, as held out: those held out already, else all."""
    if any(dataset.held_out for dataset in datasets):
        return [Dataset(dataset.options, (), dataset.held_out) for dataset in datasets]
    return [
        Dataset(dataset.options, (), unvaried(record for record in dataset.records if not record.subset.is_reg))
        for dataset in datasets
    ]


# --------------------------------------------------------------------------------------------------------------
# Intervals
# --------------------------------------------------------------------------------------------------------------


class Interval(NamedTuple):
    """A mean, and half the width of its 95 % confidence interval."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:.5f} ± {self.half:.5f}"


def picture_means(losses: Losses) -> list[float]:
    """Return the mean loss of each picture; these are independent, the losses of one picture are not."""
    return [statistics.fmean(row) for row in losses.values()]


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of at least two independent values with its interval (Student's t)."""
    mean = statistics.fmean(values)
    return Interval(mean, t_quantile(len(values) - 1) * statistics.stdev(values, mean) / math.sqrt(len(values)))


def paired(losses: Losses, others: Losses) -> Interval:
    """Return the mean of losses minus others, picture by picture, with its interval (paired t)."""
    assert losses.keys() == others.keys()
    pairs = zip(picture_means(losses), picture_means(others), strict=True)
    return interval([one - other for one, other in pairs])


@functools.cache
def t_quantile(degrees: int) -> float:
    """Return t such that 95 % of Student's t distribution with these degrees of freedom are between -t and t."""
    low, high = 1.9, 12.8
    while high - low > 1e-7:
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, degrees) < 0.95 else (low, middle)
    return high


def t_probability(t: float, degrees: int) -> float:
    """Return the share of Student's t distribution between -t and t (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle, odd = math.atan(t / math.sqrt(degrees)), degrees % 2
    term, total = math.cos(angle) if odd else 1.0, 0.0
    for index in range(degrees // 2):
        total += term
        term *= math.cos(angle) ** 2 * (2 * index + 1 + odd) / (2 * index + 2 + odd)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
