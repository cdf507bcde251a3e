"""The part that counts what a step asks of the card, and names the lines at which the host waits for it."""

from __future__ import annotations

import collections
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.card import suite
from benchmarks.card.rows import MEASURED, NOT_RUN, Row, Value
from benchmarks.card.setting import Setting, half_of, need_half, wait_for_device
from benchmarks.card.speed import measured

# Calls of CUDA's runtime and driver in a trace; both names of a call are counted.
LAUNCHES = ("LaunchKernel", "cudaGraphLaunch", "hipLaunch", "hipModuleLaunch")
WAITS = ("StreamSynchronize", "EventSynchronize")
DEVICE_WAITS = ("DeviceSynchronize",)
COPIES = ("MemcpyAsync", "hipMemcpy")


def traced(setting: Setting, family: str) -> Iterator[Row]:
    """Count launches, waits and copies of a step, and name the lines at which the host waits."""
    precisions = [half_of(setting)] if setting.quick or setting.tiny else ["bf16", "fp16"]
    for precision in precisions:
        name = f"{precision}, batch 1"
        yield measured(name, setting, traced_training, setting, name, family, precision)


def traced_training(setting: Setting, name: str, family: str, precision: str) -> Row:
    """Train, and trace one step and the waits of another."""
    from library.training.run.events import Event, Every, Moment, Needs

    need_half(setting, precision)
    options = suite.full_training(setting, family, "traced", 1, mixed_precision=precision)
    steps = suite.windows_of(setting).warm_up + 2
    tracer, waits = StepTracer(setting), WaitLines(setting)

    def act(moment: Moment) -> None:
        done = moment.progress.step
        if done == steps - 2:
            tracer.start()
        elif done == steps - 1:
            tracer.stop()
            waits.start()
        elif done == steps:
            waits.stop()

    suite.train(setting, {**options, "max_train_steps": steps}, [Event("trace", Every(1), act, Needs.NOTHING)])
    values = tracer.values()
    note = "; ".join(f"{line} ({number})" for line, number in waits.lines.items())
    if not setting.on_card:
        return Row(name, NOT_RUN, values, "launches and waits are those of a card")
    return Row(name, MEASURED, values | {"waits that torch tells": sum(waits.lines.values())}, note)


class StepTracer:
    """Traces what happens between two moments."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._profile: Any = None

    def start(self) -> None:
        """Begin."""
        import torch

        wait_for_device(self._setting)
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self._setting.on_card:
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(activities=kinds)
        self._profile.__enter__()

    def stop(self) -> None:
        """End."""
        wait_for_device(self._setting)
        self._profile.__exit__(None, None, None)

    def values(self) -> dict[str, Value]:
        """Return the counts of what was traced."""
        events = self._profile.key_averages()

        def count(names: tuple[str, ...]) -> int:
            return sum(event.count for event in events if any(name in event.key for name in names))

        on_device = [
            event
            for event in events
            if not str(getattr(event, "device_type", "CPU")).endswith("CPU")
            and not getattr(event, "is_user_annotation", False)
        ]
        busy = sum(getattr(event, "self_device_time_total", 0) for event in on_device)
        return {
            "launches": count(LAUNCHES),
            "waits for a stream or event": count(WAITS),
            "waits for the device (1 or 2 of the trace itself)": count(DEVICE_WAITS),
            "copies": count(COPIES),
            "busy ms": busy / 1000 if self._setting.on_card else None,
            "operators on the CPU": sum(event.count for event in events if event.key.startswith("aten::")),
        }


class WaitLines:
    """The lines at which torch tells of a wait of the host for the device."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._recorded: Any = None
        self._found: Any = []
        self.lines: dict[str, int] = {}

    def start(self) -> None:
        """Begin."""
        import torch

        self._recorded = warnings.catch_warnings(record=True)
        self._found = self._recorded.__enter__()
        warnings.simplefilter("always")
        if self._setting.on_card:
            torch.cuda.set_sync_debug_mode("warn")

    def stop(self) -> None:
        """End, and count by line."""
        import torch

        if self._setting.on_card:
            torch.cuda.set_sync_debug_mode("default")
        self._recorded.__exit__(None, None, None)
        told = [found for found in self._found if "called a synchronizing" in str(found.message)]
        places = [f"{short(found.filename)}:{found.lineno}" for found in told]
        self.lines = dict(collections.Counter(places))


def short(file: str) -> str:
    """Return the path of a module below the suite or the installed packages."""
    path = Path(file).as_posix()
    for folder in (f"{suite.ROOT.as_posix()}/", "site-packages/", "dist-packages/"):
        _, found, rest = path.partition(folder)
        if found:
            return rest
    return path
