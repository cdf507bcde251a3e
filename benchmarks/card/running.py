"""Parts of a report, each in a process of its own with a time limit; what is found is written after each part."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from benchmarks.card.page import page
from benchmarks.card.rows import BAD, FAILED, NOT_RUN, Row, RowFile
from benchmarks.card.setting import Setting
from library.files import replacing

SHORTEST = 10.0  # seconds below which no part is begun
SILENCE = {True: 200.0, False: 900.0}  # seconds without a row after which a part hangs, with --quick and without
LOOKED_AT_EVERY = 0.25
WAITED_FOR_STACKS = 1.0
TELLS_WHERE: signal.Signals | None = getattr(signal, "SIGUSR1", None)  # what a part answers with its stacks
WAITED_FOR_THE_KILLED = 10.0
NO_TIME = "the minutes of --minutes were used up"


@dataclasses.dataclass(frozen=True)
class Part:
    """A row of the table of parts."""

    name: str
    title: str
    find: Callable[[Setting], Iterator[Row]]
    limit: float  # its share of the time, in seconds; with --quick as many as `quick_limit`
    quick_limit: float = 120
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of its process
    beside_others: bool = False  # it measures neither time nor memory, and can run while others do

    def limit_of(self, setting: Setting) -> float:
        """Return the time limit in seconds."""
        return self.quick_limit if setting.quick else self.limit


class Ended(NamedTuple):
    """How the process of a part ended."""

    code: int | None  # None: it was ended at a limit
    silent: float  # seconds since its last row, or its start


class Report:
    """The report so far, in memory and on disk."""

    def __init__(self, folder: Path, arguments: Sequence[str]) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self.values: dict[str, Any] = {
            "format": 1,
            "arguments": list(arguments),
            "started": now(),
            "ended": None,
            "environment": {},
            "parts": [],
        }

    def add(self, part: Part, rows: Iterable[Row], seconds: float) -> None:
        """Add what a part found, and write the report."""
        found = [dataclasses.asdict(row) for row in rows]
        shown = {"name": part.name, "title": part.title, "seconds": round(seconds, 1), "rows": found}
        with self._lock:
            if part.name == "machine":
                self.values["environment"] |= {key: value for row in found for key, value in row["values"].items()}
            self.values["parts"].append(shown)
            self.write()

    def end(self) -> None:
        """Write that the report is complete."""
        self.values["ended"] = now()
        self.write()

    def write(self) -> None:
        """Write both files; each is there as a whole at any time."""
        texts = {"gpu.json": json.dumps(self.values, indent=1, ensure_ascii=False), "gpu.md": page(self.values)}
        for name, text in texts.items():
            with replacing(self.folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8")

    @property
    def has_faults(self) -> bool:
        """Whether a check failed."""
        return any(row["verdict"] in BAD for part in self.values["parts"] for row in part["rows"])


def now() -> str:
    """Return the date and time with the zone."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def run_parts(
    parts: Iterable[Part],
    setting: Setting,
    report: Report,
    command: Callable[[Part, Path], Sequence[str]],
    *,
    seconds: float,
    at_once: int = 1,
    tell: Callable[[str], None] = print,
) -> None:
    """Run parts until the seconds are used up, those that can run beside others at_once at a time.

    command returns the words that start a part, given its file of rows.
    """
    end = time.monotonic() + seconds
    (report.folder / "logs").mkdir(parents=True, exist_ok=True)

    def run(part: Part) -> None:
        left = end - time.monotonic()
        if left < min(SHORTEST, seconds):
            report.add(part, [Row(part.title, NOT_RUN, note=NO_TIME)], 0)
            return
        tell(f"{part.name}: {part.title} ...")
        start, file = time.monotonic(), RowFile(setting.work / f"{part.name}.rows")
        file.path.unlink(missing_ok=True)
        silence = min(SILENCE[setting.quick], part.limit_of(setting))
        ended = run_limited(
            command(part, file.path),
            environment(setting, part),
            report.folder / "logs" / f"{part.name}.log",
            file.path,
            limit=min(part.limit_of(setting), left),
            silence=silence,
        )
        taken = time.monotonic() - start
        report.add(part, [*file.read(), *ending(part, ended, silence)], taken)
        tell(f"{part.name}: {taken:.0f} s")

    for beside_others, group in itertools.groupby(parts, key=lambda part: part.beside_others):
        with ThreadPoolExecutor(at_once if beside_others else 1) as pool:
            list(pool.map(run, group))


def ending(part: Part, ended: Ended, silence: float) -> list[Row]:
    """Return the row for a process that did not end well; without a row for `silence` seconds it hangs."""
    log = f"see logs/{part.name}.log"
    if ended.code == 0:
        return []
    if ended.code is not None:
        return [Row("the part", FAILED, note=f"its process ended with {ended.code}; {log}")]
    if ended.silent >= silence:
        return [Row("what follows", FAILED, note=f"nothing was found for {ended.silent:.0f} s; {log}")]
    return [Row("what follows", NOT_RUN, note="the time of this part, or of the report, was used up")]


def run_limited(
    words: Sequence[str], variables: Mapping[str, str], log: Path, rows: Path, *, limit: float, silence: float
) -> Ended:
    """Run a command with its output in a log, and end it at its limit, or if its file of rows does not grow."""
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=dict(variables)
        )
    start = last = time.monotonic()
    size = 0
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return Ended(process.wait(LOOKED_AT_EVERY), time.monotonic() - last)
            moment, grown = time.monotonic(), rows.stat().st_size if rows.exists() else 0
            if grown > size:
                last, size = moment, grown
            if moment - start >= limit or moment - last >= silence:
                return Ended(None, moment - last)
    finally:
        if process.poll() is None:
            end_tree(process.pid)
            with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in the driver cannot be ended
                process.wait(WAITED_FOR_THE_KILLED)


def end_tree(pid: int) -> None:
    """End a process and those that it started, such as loaders, launchers and references on the CPU.

    Where there are signals, the process may first write to its log where it hangs. Only then, when it is to end anyway:
    Python 3.12 can crash while it looks at the stacks of running threads.
    """
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid)
        started = set(parent.children(recursive=True))
        if TELLS_WHERE is not None:
            parent.send_signal(TELLS_WHERE)
            psutil.wait_procs([parent], timeout=WAITED_FOR_STACKS)
        with contextlib.suppress(psutil.Error):
            parent.suspend()  # so that it starts nothing more
            started.update(parent.children(recursive=True))
        for process in [*started, parent]:
            with contextlib.suppress(psutil.Error):
                process.kill()


def environment(setting: Setting, part: Part) -> dict[str, str]:
    """Return the variables of a part's process: no network, and with --device cpu no card."""
    ours = {"HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1", "PYTHONFAULTHANDLER": "1"}
    variables = {**os.environ, **ours, **part.variables}
    return variables if setting.on_card else variables | NO_CARD


NO_CARD = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}


def python(*words: object) -> list[str]:
    """Return a command line of this Python."""
    return [sys.executable, *map(str, words)]
