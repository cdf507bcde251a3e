"""The progress of a run: counts and results from step to step, which a state stores."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

Item = TypeVar("Item")


@dataclasses.dataclass
class Progress:
    """The position of a run, and its results so far."""

    step: int  # optimizer steps made
    epoch: int  # of the last of these steps, from 1
    seed: int
    losses: deque[float] = dataclasses.field(default_factory=deque)  # of the micro-batches of the last known steps
    num_skipped: int = 0  # of the last known steps, those left out in a row because they were not finite
    best: tuple[float, int] | None = None  # lowest validation loss, and its step
    columns: list[tuple[str, list[Path]]] = dataclasses.field(default_factory=list)  # of the contact sheet

    @property
    def average_loss(self) -> float:
        """Mean training loss over about an epoch, NaN before the first step."""
        return mean(self.losses)


def mean(values: Collection[float]) -> float:
    """Return the mean; NaN of no values, as when all steps were skipped."""
    return sum(values) / len(values) if values else math.nan


class StepSeconds(NamedTuple):
    """How long a step took, from the results of the one before to its own, and how much of that was spent waiting."""

    step: float
    data: float  # waiting for batches, while the step before may have been under way


class StepClock:
    """Measures the steps of a run, without the events between them."""

    def __init__(self) -> None:
        self._since, self._waited = time.perf_counter(), 0.0

    def waiting_for(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Yield the batches, and add up how long each is waited for."""
        iterator = iter(batches)
        while True:
            before = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - before
            yield batch

    def start(self) -> None:
        """Begin a step now, not when the one before ended."""
        self._since = time.perf_counter()

    def stop(self) -> StepSeconds:
        """End a step, and begin the next one."""
        now = time.perf_counter()
        result = StepSeconds(now - self._since, self._waited)
        self._since, self._waited = now, 0.0
        return result
