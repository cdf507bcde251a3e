"""What happens in a run besides its steps, as rows of a table: a name, when it is due, what to do.

The table is walked from the top at each moment of the run, so steps and epochs have one order of events.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterable
from typing import NamedTuple

from library.training.run.progress import Progress
from library.training.run.step import StepResult


class At(enum.Enum):
    """A point of the run at which events are looked for."""

    START = "before the first step"
    STEP = "after a step"
    EPOCH = "after an epoch"
    STOP = "when a signal ends the run early"
    END = "after the last step"


class Moment(NamedTuple):
    """A point of the run, and where the run is then."""

    at: At
    progress: Progress
    result: StepResult | None = None  # of the step that was made, after a step


@dataclasses.dataclass(frozen=True)
class Every:
    """When an event is due: after every n-th step, after every n-th epoch, and once at other points."""

    steps: int | None = None
    epochs: int | None = None
    once: tuple[At, ...] = ()
    but_epoch: int | None = None  # the last epoch, for what the end of the run does anyway

    def is_due(self, moment: Moment) -> bool:
        """Return whether the moment is one of these."""
        progress = moment.progress
        if moment.at is At.STEP:
            return self.steps is not None and progress.step % self.steps == 0
        if moment.at is At.EPOCH:
            return self.epochs is not None and progress.epoch % self.epochs == 0 and progress.epoch != self.but_epoch
        return moment.at in self.once


class Event(NamedTuple):
    """A row of the table. All processes walk it together; what only one of them may do, the action restricts."""

    name: str
    due: Every
    act: Callable[[Moment], None]


def happen(events: Iterable[Event], moment: Moment) -> None:
    """Do what is due at a moment, in the order of the table."""
    for event in events:
        if event.due.is_due(moment):
            event.act(moment)
