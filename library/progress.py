"""How far long work is: a bar that moves in place on a terminal, lines of the log now and then everywhere else."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from library.words import duration

if TYPE_CHECKING:
    from tqdm import tqdm

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

# Where there is no terminal, a line comes after such a share of the work, but not before the first number of seconds;
# after the second one it comes in any case.
SHARE, SOONEST, LATEST = 0.1, 5.0, 30.0


class Bar(Generic[Item]):
    """The progress of work, as a context or around its items; `tqdm` is imported only for a terminal.

    Without leave nothing of it stays when it is closed.
    """

    def __init__(
        self,
        items: Iterable[Item] = (),
        *,
        total: int,
        desc: str,
        unit: str,
        initial: int = 0,
        leave: bool = True,
        disable: bool = False,
        smoothing: float = 0.3,
    ) -> None:
        self._items, self._total, self._desc, self._leave = items, total, desc, leave
        self._unit, self._done, self._first, self._notes = unit, initial, initial, ""
        self._begun = self._told_at = time.monotonic()
        self._told = initial
        self._bar: tqdm[Any] | None = None
        self._is_open = not disable
        if self._is_open and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=initial, desc=desc, unit=unit, leave=leave, smoothing=smoothing)

    def __enter__(self) -> Bar[Item]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Item]:
        with self:
            for item in self._items:
                yield item
                self.update()

    def update(self, number: int = 1) -> None:
        """Count more of the work as done."""
        self._done += number
        if self._bar is not None:
            self._bar.update(number)
        else:
            self._tell()

    def note(self, text: str, *, at_once: bool = False) -> None:
        """Show a text behind the numbers, with the next update or at once."""
        self._notes = text
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=at_once)
        elif at_once:
            self._tell()

    def write(self, text: str) -> None:
        """Print a line to standard output, above the bar."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            sys.stdout.write(f"{text}\n")

    def close(self) -> None:
        """Leave the bar as it is, or remove it; tell how long the work took, if that was told before."""
        if not self._is_open:
            return
        self._is_open = False
        if self._bar is not None:
            self._bar.close()
        elif self._leave and self._told not in (self._first, self._done):
            self._log()

    def _tell(self) -> None:
        """Log a line if one is due."""
        waited = time.monotonic() - self._told_at
        is_share = waited >= SOONEST and self._done - self._told >= SHARE * self._total
        if self._is_open and (is_share or waited >= LATEST):
            self._log()

    def _log(self) -> None:
        now = time.monotonic()
        done, passed = self._done - self._first, now - self._begun
        parts = [f"{self._done} of {self._total} {self._unit}s"]
        if done > 0 and self._done < self._total:
            parts.append(f"{duration(passed / done * (self._total - self._done))} left")
        elif done:
            parts.append(f"in {duration(passed)}")
        parts += [self._notes] if self._notes else []
        logger.info("%s: %s", self._desc, ", ".join(parts))
        self._told, self._told_at = self._done, now


def step_shown_on(bar: Bar[Any]) -> Callable[[int, int], None]:
    """Return what shows on a bar the step of a picture and how many it has, where one picture takes long."""
    return lambda step, steps: bar.note(f"step {step} of {steps}", at_once=True)
