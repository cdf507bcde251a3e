"""The progress of a run: counts and results from step to step, which a state stores."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

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
    """How long a run was at work on a step or waited for it, without the events after it."""

    step: float  # in all
    data: float  # of that, waiting for its batches


class Waits:
    """Adds up how long a run waits for its batches."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def of(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Yield the batches, and measure how long each is waited for."""
        iterator = iter(batches)
        while True:
            batch, seconds = timed(lambda: next(iterator, _END))
            if batch is _END:
                return
            self._seconds += seconds
            yield batch

    def taken(self) -> float:
        """Return the seconds since this was asked last."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


_END: Any = object()


def timed(act: Callable[[], Item]) -> tuple[Item, float]:
    """Return what an action returns, and the seconds that it took."""
    before = time.perf_counter()
    result = act()
    return result, time.perf_counter() - before
