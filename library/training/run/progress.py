"""The progress of a run: counts and results from step to step, which a state stores."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Collection
from pathlib import Path


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
