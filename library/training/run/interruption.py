"""Stopping a run by Ctrl-C or SIGTERM.

While the run is prepared, a signal ends it at once. In training the first signal lets the step finish and leaves out
what only reports on it (`StopRequest.cut_short`), and a second one ends the run at once.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

import torch

from library.training.run.runtime import Runtime

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None


class CutShort(BaseException):
    """Leaves an action that a stop cuts short; no Exception, so that nothing else catches it."""


class StopRequest:
    """Receives, within its context, the signals of a stop; raises KeyboardInterrupt where they end the run at once."""

    def __init__(self) -> None:
        self._finishes_steps = False
        self._asked = False
        self._cuts = False
        self._before: dict[signal.Signals, Handler] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            if handler is not None:  # None: one that is not Python's, which cannot be set again
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._asked or not self._finishes_steps:
            raise KeyboardInterrupt
        self._asked = True
        logger.warning("stopping after this step; a second signal stops at once and loses what is not saved")
        if self._cuts:
            raise CutShort

    @contextlib.contextmanager
    def finishing_steps(self) -> Iterator[None]:
        """Within it, which is the training, the first signal does not end the run, but is recorded for `asked`."""
        self._finishes_steps = True
        try:
            yield
        finally:
            self._finishes_steps = False

    def asked(self, runtime: Runtime) -> bool:
        """Return whether any process was asked to stop; all processes must call this.

        Several wait here for each other's answers: one that was asked has left out, or cut short, what the others did.
        """
        if runtime.num_processes == 1:
            return self._asked
        flag = torch.full((), float(self._asked), device=runtime.device)
        torch.distributed.all_reduce(flag)
        return bool(flag.item())

    def cut_short(self, act: Callable[[], object]) -> bool:
        """Do what a stop need not wait for, and leave it where a signal comes; return whether it was done completely.

        The action is left at any instruction, so it must not wait for other processes. After a signal it is not begun.
        """
        if self._asked:
            return False
        try:
            try:
                self._cuts = True
                act()
            finally:
                self._cuts = False
        except CutShort:
            return False
        return True
