"""Stopping a run: the first Ctrl-C or SIGTERM lets the step finish, a second one stops immediately."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import torch

from library.training.run.runtime import Runtime

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None


class StopRequest:
    """Records, within its context, whether a signal asked the run to stop."""

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[signal.Signals, Handler] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        logger.warning("stopping after this step; once more stops at once, and loses what was not saved")

    def asked(self, runtime: Runtime) -> bool:
        """Return whether any process was asked to stop; all processes must call this."""
        if runtime.num_processes == 1:
            return self._asked
        flag = torch.tensor(float(self._asked), device=runtime.device)
        torch.distributed.all_reduce(flag)
        return bool(flag.item())
