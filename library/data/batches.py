"""Batches: the order of an epoch, and the content of a batch. Both are pure functions of seed and position.

The plan of an epoch is a sequence of batches, each a tuple of samples of one bucket. A `BatchRequest` has everything
that a batch depends on, so workers keep no state, exist for the whole run, and a run can start at any position. The
records of its samples travel to a worker with it, not those of all pictures at the start.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import functools
import math
import random
import signal
import sys
from array import array
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from multiprocessing import resource_tracker
from typing import NamedTuple

import torch
from torch import Tensor

from library.config.values import LATENT_SCALE
from library.data import images
from library.data.buckets import Size
from library.data.captions import Moment, sample_caption
from library.data.latent_cache import DiskCache, LatentCache
from library.data.records import Dataset, ImageRecord
from library.parallel import in_order
from library.randomness import random_for

READING_THREADS = 4  # of cached latents; twice as many batches are ahead


class Sample(NamedTuple):
    """One use of a picture in an epoch."""

    dataset: int
    record: int
    repeat: int


class BatchRequest(NamedTuple):
    """Everything that determines a batch."""

    epoch: int  # from 1
    step: int  # optimizer step that the batch belongs to, from 0
    samples: tuple[Sample, ...]


@dataclasses.dataclass(frozen=True)
class Batch:
    """What one micro-batch trains on; B pictures of one size. Either moments or pixels is given."""

    epoch: int
    samples: tuple[Sample, ...]
    names: tuple[str, ...]  # of the picture files, for messages
    captions: tuple[str, ...]
    loss_weights: torch.Tensor  # (B,)
    preserved: torch.Tensor  # (B,), bool: whether the target is the base model's own prediction
    moments: torch.Tensor | None  # (B, 8, H/8, W/8): mean and log-variance of the latents, from the cache
    pixels: torch.Tensor | None  # (B, 3, H, W) in [-1, 1]
    masks: torch.Tensor | None  # (B, 1, H/8, W/8) in [0, 1], weights of the loss; None where no picture has one
    sizes: torch.Tensor  # (B, 6), int64: of each picture what `images.size_conditioning` returns


class Content(NamedTuple):
    """What a sample adds to its batch."""

    values: Tensor  # pixels (3, H, W) in [-1, 1], or cached moments (8, H/8, W/8)
    mask: Tensor | None  # (H/8, W/8)
    sizes: tuple[int, ...]  # of `images.size_conditioning`


# --------------------------------------------------------------------------------------------------------------
# Order
# --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class EpochOrder:
    """The batches of an epoch in order, as numbers: there can be millions, and samples are made when they are wanted.

    A draw is one number, of which repeat and record are the digits, in a base that is the dataset's own.
    """

    draws: array[int]  # of all batches, one after the other, in the order of datasets and buckets
    starts: array[int]  # of each batch in draws, and their end
    order: array[int]  # of the batches
    firsts: tuple[int, ...]  # the number of the first batch of each dataset
    bases: tuple[int, ...]  # the most repeats in each dataset

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> tuple[Sample, ...]:
        """Return the batch at a position; raises IndexError after the last one."""
        number = self.order[position]
        dataset = bisect.bisect_right(self.firsts, number) - 1
        drawn = self.draws[self.starts[number] : self.starts[number + 1]]
        return tuple(Sample(dataset, *divmod(draw, self.bases[dataset])) for draw in drawn)

    def __iter__(self) -> Iterator[tuple[Sample, ...]]:
        return (self[position] for position in range(len(self)))


def plan_epoch(datasets: Sequence[Dataset], seed: int, epoch: int) -> EpochOrder:
    """Return the batches of an epoch (from 1) in order; no batch mixes buckets or datasets."""
    draws, starts = array("Q"), array("Q")
    firsts, bases = [], []
    for index, dataset in enumerate(datasets):
        firsts.append(len(starts))
        bases.append(max((record.repeats for record in dataset.records), default=1))
        for bucket, drawn in sorted(_draws(dataset, bases[-1]).items()):
            random_for(seed, "bucket", epoch, index, *bucket).shuffle(drawn)
            starts.extend(range(len(draws), len(draws) + len(drawn), dataset.options.batch_size))
            draws.extend(drawn)
    order = array("Q", range(len(starts)))
    starts.append(len(draws))
    random_for(seed, "batches", epoch).shuffle(order)
    return EpochOrder(draws, starts, order, tuple(firsts), tuple(bases))


def _draws(dataset: Dataset, base: int) -> dict[Size, array[int]]:
    """Return bucket resolution -> all draws of an epoch in it."""
    grouped: dict[Size, array[int]] = {}
    for number, record in enumerate(dataset.records):
        drawn = grouped.setdefault(record.placement.bucket, array("Q"))
        drawn.extend(range(number * base, number * base + record.repeats))
    return grouped


def count_draws(dataset: Dataset) -> dict[Size, int]:
    """Return bucket resolution -> number of draws from it in an epoch, sorted."""
    numbers: Counter[Size] = Counter()
    for record in dataset.records:
        numbers[record.placement.bucket] += record.repeats
    return dict(sorted(numbers.items()))


def num_batches(datasets: Sequence[Dataset]) -> int:
    """Return the number of batches in an epoch, over all processes."""
    return sum(
        math.ceil(number / dataset.options.batch_size)
        for dataset in datasets
        for number in count_draws(dataset).values()
    )


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """The whole run as a sequence of batch requests for one of the processes.

    Batches are distributed to the processes in turn; the first ones of the epoch are repeated if necessary, so that
    every process makes the same number of steps.
    """

    datasets: list[Dataset]
    seed: int
    num_steps: int
    accumulation: int
    rank: int = 0
    num_processes: int = 1
    start_step: int = 0  # steps that were made before

    @functools.cached_property
    def batches_per_epoch(self) -> int:
        """Micro-batches that each process sees in an epoch."""
        return math.ceil(num_batches(self.datasets) / self.num_processes)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch; a short tail makes a step, too."""
        return math.ceil(self.batches_per_epoch / self.accumulation)

    @property
    def num_epochs(self) -> int:
        """Epochs that the run begins."""
        return math.ceil(self.num_steps / self.steps_per_epoch)

    def requests(self, epoch: int) -> Iterator[BatchRequest]:
        """Yield this process's requests of an epoch (from 1), cut where the run begins and ends."""
        batches = plan_epoch(self.datasets, self.seed, epoch)
        first_step = (epoch - 1) * self.steps_per_epoch
        steps = range(max(self.start_step, first_step), min(self.num_steps, first_step + self.steps_per_epoch))
        for step in steps:
            first = (step - first_step) * self.accumulation
            for index in range(first, min(first + self.accumulation, self.batches_per_epoch)):
                position = index * self.num_processes + self.rank
                yield BatchRequest(epoch, step, batches[position % len(batches)])

    def __iter__(self) -> Iterator[BatchRequest]:
        for epoch in range(self.start_step // self.steps_per_epoch + 1, self.num_epochs + 1):
            yield from self.requests(epoch)


# --------------------------------------------------------------------------------------------------------------
# Content
# --------------------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """A request with what the datasets say of its samples."""

    request: BatchRequest
    records: tuple[ImageRecord, ...]
    is_bucketed: bool  # all samples of a batch are of one dataset


@dataclasses.dataclass(frozen=True)
class TaskMaker(torch.utils.data.Dataset):
    """Creates the batch of a task; tasks are its indices, so that torch's loader can use it.

    Each worker process gets a copy, so nothing in it grows with the number of pictures; workers have no cache.
    """

    seed: int
    num_steps: int
    prior_loss_weight: float
    cache: LatentCache | None

    def __getitem__(self, task: Task) -> Batch:
        request, records, _ = task
        contents = [
            self._content(sample, record, task) for sample, record in zip(request.samples, records, strict=True)
        ]
        values = torch.stack([content.values for content in contents])
        return Batch(
            epoch=request.epoch,
            samples=request.samples,
            names=tuple(str(record.path) for record in records),
            captions=self.captions(task),
            loss_weights=torch.tensor([self.prior_loss_weight if record.subset.is_reg else 1.0 for record in records]),
            preserved=torch.tensor([record.subset.preserves_output for record in records]),
            moments=values if self.cache is not None else None,
            pixels=values if self.cache is None else None,
            masks=stack_masks([content.mask for content in contents], [record.placement.bucket for record in records]),
            sizes=torch.tensor([content.sizes for content in contents]),
        )

    def captions(self, task: Task) -> tuple[str, ...]:
        """Return the captions of a batch as they are fed to the text encoder."""
        epoch, step, samples = task.request
        moment = Moment(epoch, step, self.num_steps)
        return tuple(
            sample_caption(record.caption, record.subset, moment, random_for(self.seed, "caption", epoch, *sample))
            for record, sample in zip(task.records, samples, strict=True)
        )

    def _content(self, sample: Sample, record: ImageRecord, task: Task) -> Content:
        rng = random_for(self.seed, "picture", task.request.epoch, *sample)
        mirrored = record.subset.flip_aug and rng.random() < 0.5
        if self.cache is None:
            frame = sample_frame(record, task.is_bucketed, rng)
            values, mask = sample_picture(record, frame, mirrored, rng)
        else:
            frame = images.centre_frame(record.placement)
            values, mask = self.cache.read(record, mirrored=mirrored)
        return Content(values, mask, images.size_conditioning(record.size, frame, mirrored=mirrored))


@dataclasses.dataclass(frozen=True)
class BatchMaker:
    """Creates the batch of a request from the records of datasets."""

    datasets: list[Dataset]
    of_tasks: TaskMaker

    def __getitem__(self, request: BatchRequest) -> Batch:
        return self.of_tasks[self.task(request)]

    def captions(self, request: BatchRequest) -> tuple[str, ...]:
        """Return the captions of a batch as they are fed to the text encoder."""
        return self.of_tasks.captions(self.task(request))

    def task(self, request: BatchRequest) -> Task:
        """Return a request with what the datasets say of its samples."""
        dataset = self.datasets[request.samples[0].dataset]
        records = tuple(dataset.records[sample.record] for sample in request.samples)
        return Task(request, records, dataset.options.enable_bucket)


def sample_frame(record: ImageRecord, bucketed: bool, rng: random.Random) -> images.Frame:
    """Return the frame of one sample of a picture.

    Without buckets a random crop is a window of the picture in its own size, unless it is too small for that.
    """
    subset, placement = record.subset, record.placement
    if subset.face_crop_aug_range and not bucketed:
        crop = images.face_in_name(record.path.stem)
        if crop is not None and crop[1].x > 0:
            face, target, times = crop[1], placement.bucket, subset.face_crop_aug_range
            return images.face_frame(record.size, face, target, times, anywhere=subset.random_crop, rng=rng)
    if not subset.random_crop:
        return images.centre_frame(placement)
    width, height = placement.bucket
    if not bucketed and record.size[0] >= width and record.size[1] >= height:
        placement = dataclasses.replace(placement, resized=record.size)
    return images.random_frame(placement, rng)


def sample_picture(
    record: ImageRecord, frame: images.Frame, mirrored: bool, rng: random.Random
) -> tuple[Tensor, Tensor | None]:
    """Return the pixels (3, H, W) in [-1, 1] of a frame, varied in colour and mirrored, and its mask (H/8, W/8)."""
    pixels, weights = record.read(frame)
    if record.subset.color_aug:
        pixels = images.vary_colour(pixels, rng)
    mask = None if weights is None else torch.from_numpy(weights)
    if mirrored:
        pixels = pixels[:, ::-1]
        mask = None if mask is None else mask.flip(-1)
    return images.to_tensor(pixels), mask


def stack_masks(masks: list[Tensor | None], sizes: list[Size]) -> Tensor | None:
    """Return the masks of a batch (B, 1, H/8, W/8), all ones for a picture without; None if no picture has one."""
    if all(mask is None for mask in masks):
        return None
    whole = [torch.ones(height // LATENT_SCALE, width // LATENT_SCALE) for width, height in sizes]
    return torch.stack([one if mask is None else mask for mask, one in zip(masks, whole, strict=True)])[:, None]


def make_loader(maker: BatchMaker, plan: RunPlan, num_workers: int) -> Iterable[Batch]:
    """Return a loader over the whole run: threads for cached latents on disk, else processes, which start once.

    They start as fresh processes on every platform. A fork, the default of Linux before Python 3.14, would copy a
    process that uses a GPU and has threads, of which only one goes on: a lock that another holds is never released.
    """
    if isinstance(maker.of_tasks.cache, DiskCache):
        return ReadAhead(maker, plan)
    return torch.utils.data.DataLoader(
        maker.of_tasks,
        batch_size=None,
        sampler=Tasks(maker, plan),
        num_workers=num_workers,
        multiprocessing_context="spawn" if num_workers else None,
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=_ignore_stops,
    )


@dataclasses.dataclass(frozen=True)
class Tasks:
    """The tasks of a plan, one after the other."""

    maker: BatchMaker
    plan: Iterable[BatchRequest]

    def __iter__(self) -> Iterator[Task]:
        return map(self.maker.task, self.plan)


@dataclasses.dataclass(frozen=True)
class ReadAhead:
    """A loader whose batches are made ahead in threads, where making one is mostly waiting for the disk.

    Its threads end with the iterator; what making a batch raises, the iterator raises when it comes to it.
    """

    maker: BatchMaker
    plan: Iterable[BatchRequest]

    def __iter__(self) -> Iterator[Batch]:
        return in_order(self.maker.__getitem__, self.plan, READING_THREADS)


STOPS = (signal.SIGINT, signal.SIGTERM)  # a terminal sends them to all processes, and so do job schedulers


def _ignore_stops(worker: int) -> None:
    """Ignore the signals of a stop in workers: the main process finishes its step and needs them for it."""
    del worker
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def _stops_wait() -> Iterator[None]:
    """Within it the signals of a stop wait; processes that begin in it do not get them while they import torch."""
    if sys.platform == "win32":  # where signals cannot wait
        yield
        return
    resource_tracker.ensure_running()  # of multiprocessing, which ends the waiting when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def load_batches(loader: Iterable[Batch]) -> Generator[Batch]:
    """Yield the batches of a loader; its workers end with this iterator, also when it is closed before the last one."""
    with _stops_wait():
        batches = iter(loader)
    try:
        yield from batches
    finally:
        # A traceback can keep the loader until Python exits, and Python then waits for the workers. There is no public
        # method.
        if hasattr(batches, "_shutdown_workers"):
            batches._shutdown_workers()
        for worker in getattr(batches, "_workers", ()):  # one that waits for a drive ignores the signal of the method
            if worker.is_alive():
                worker.kill()
