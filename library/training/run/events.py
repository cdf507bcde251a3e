"""What happens in a run besides its steps, as rows of a table: name, when it is due, action.

At each moment of the run the due events happen in the order of the table.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from library.errors import message_of
from library.training.run.progress import Progress, StepSeconds
from library.training.run.step import StepResult


class At(enum.Enum):
    """A point of the run at which events can be due."""

    START = "before the first step"
    STEP = "after a step"
    EPOCH = "after an epoch"
    STOP = "when a signal ends the run early"
    END = "after the last step"
    ERROR = "when an error ends the run"


class Moment(NamedTuple):
    """A point of the run with the progress there."""

    at: At
    progress: Progress
    result: StepResult | None = None  # of a step, for events that need its results
    same_step: tuple[At, ...] = ()  # all points at this number of steps, in their order; empty: this one alone
    seconds: StepSeconds | None = None  # that the step of the result took
    error: str | None = None  # what ended the run

    @property
    def points(self) -> tuple[At, ...]:
        """All points at this number of steps, in their order."""
        return self.same_step or (self.at,)


@dataclasses.dataclass(frozen=True)
class Every:
    """When an event is due: after every n-th step, after every n-th epoch, and once at other points."""

    steps: int | None = None
    epochs: int | None = None
    once: tuple[At, ...] = ()
    but_epoch: int | None = None  # not after this epoch: the last one, for what happens at the end of the run anyway
    once_a_step: bool = False  # only at the first of several points at one step, such as an epoch's end and the run's

    def is_due(self, moment: Moment) -> bool:
        """Return whether the event is due at a moment."""
        points = moment.points if self.once_a_step else (moment.at,)
        due = [at for at in points if self.falls_on(at, moment.progress)]
        return bool(due) and moment.at is due[0]

    def falls_on(self, at: At, progress: Progress) -> bool:
        """Return whether the event is due at a point of the run, whatever else is at the same step."""
        if at is At.STEP:
            return self.steps is not None and progress.step % self.steps == 0
        if at is At.EPOCH:
            return self.epochs is not None and progress.epoch % self.epochs == 0 and progress.epoch != self.but_epoch
        return at in self.once


@dataclasses.dataclass(frozen=True)
class WithAny:
    """When an event is due that follows others: whenever one of them is."""

    others: tuple[Every | WithAny, ...]

    def is_due(self, moment: Moment) -> bool:
        """Return whether the event is due at a moment."""
        return any(other.is_due(moment) for other in self.others)


class Needs(enum.Enum):
    """What an event after a step waits for: a step is under way for a while after the host has begun it."""

    NOTHING = "the step has begun"
    RESULTS = "the results of the step are known, perhaps when the next one has begun"
    ALL = "the step is complete, with its results known, and no other one has begun"


class Event(NamedTuple):
    """A row of the table, the same on all processes, or of the first one alone; others check that in their action."""

    name: str
    due: Every | WithAny
    act: Callable[[Moment], None]
    needs: Needs = Needs.ALL


def happen(events: Iterable[Event], moment: Moment) -> None:
    """Run the actions of all due events, in the order of the table."""
    for event in due(events, moment):
        event.act(moment)


def due(events: Iterable[Event], moment: Moment) -> list[Event]:
    """Return the events that are due at a moment."""
    return [event for event in events if event.due.is_due(moment)]


def needing(events: Iterable[Event], needs: Needs) -> list[Event]:
    """Return the events with a need."""
    return [event for event in events if event.needs is needs]


@contextlib.contextmanager
def telling_errors(events: Iterable[Event], progress: Progress) -> Iterator[None]:
    """Within it an error makes the events happen that are due then, before it ends the run."""
    try:
        yield
    except Exception as error:
        happen(events, Moment(At.ERROR, progress, error=message_of(error)))
        raise
