"""The lock of an output name: while a run holds it, no other run writes the same files.

The lock is a file beside those of the run, which names the process that holds it. It is created exclusively, and the
lock of a process of this machine that has ended is taken over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import platform
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from library.errors import UserError
from library.training.run.runtime import Runtime, shared

logger = logging.getLogger(__name__)

PROC = Path("/proc")
ADVICE = "take another --output_name or --output_dir"
ATTEMPTS = 3  # to take a lock that others release or take at the same moment


@dataclasses.dataclass(frozen=True)
class Holder:
    """The process that holds a lock."""

    host: str
    process: int
    birth: str  # of the process: its number can be that of a later one
    since: str


@contextlib.contextmanager
def run_lock(path: Path, runtime: Runtime) -> Iterator[None]:
    """Hold a lock within the context, for all processes; raises UserError on all if another run holds it."""
    problem, holder = None, own_holder()
    if runtime.is_main:
        try:
            take(path, holder)
        except UserError as error:
            problem = str(error)
    problem = shared(problem, runtime)
    if problem is not None:
        raise UserError(problem)
    try:
        yield
    finally:
        if runtime.is_main:
            release(path, holder)


def own_holder() -> Holder:
    """Return this process as a holder."""
    process = os.getpid()
    return Holder(platform.node(), process, birth_of(process) or "", datetime.now().isoformat(" ", "seconds"))


def take(path: Path, holder: Holder) -> None:
    """Create the lock, in place of that of a process that has ended; raises UserError if another run holds it."""
    for _ in range(ATTEMPTS):
        try:
            create(path, holder)
        except FileExistsError:
            other = read(path)
        else:
            return
        if other is None:  # released meanwhile
            continue
        check_ended(path, other)
        if remove(path, other):
            logger.info(
                "the run of process %d, since %s, has ended without removing its lock: %s is taken over",
                *(other.process, other.since, path),
            )
    raise UserError(f"{path} is taken by other runs again and again: {ADVICE}")


def create(path: Path, holder: Holder) -> None:
    """Write the lock; raises FileExistsError if there is one."""
    number = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    try:
        with os.fdopen(number, "w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(holder), file)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def read(path: Path) -> Holder | None:
    """Return the holder of a lock, None if there is no lock; raises UserError for one that cannot be read."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError):
        raise UserError(
            f"{path}, the lock of a run with this output name, cannot be read: {ADVICE}; if there is no such run, "
            "delete the file"
        ) from None


def check_ended(path: Path, holder: Holder) -> None:
    """Raise UserError unless the process of a holder has ended, which is known only on this machine."""
    name = path.with_name(path.name.removesuffix("-run.lock"))
    if holder.host != platform.node():
        raise UserError(
            f"another run, process {holder.process} on {holder.host} since {holder.since}, writes {name}: {ADVICE}; "
            f"if that run has ended, delete {path}"
        )
    if holder.birth == birth_of(holder.process):
        raise UserError(
            f"another run, process {holder.process} since {holder.since}, writes {name}: wait for it or stop it, or "
            f"{ADVICE}"
        )


def remove(path: Path, holder: Holder) -> bool:
    """Remove the lock if it is that of a holder; return whether it was."""
    # Renamed first: of two runs that remove the same lock, the second would remove the new lock of the first.
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return False
    if read(aside) != holder:
        aside.rename(path)
        return False
    aside.unlink()
    return True


def release(path: Path, holder: Holder) -> None:
    """Remove the lock at the end of a run, unless somebody else did, or it is another's by now."""
    if path.is_file():
        remove(path, holder)


def birth_of(process: int) -> str | None:
    """Return a text that no other process of this number has on this machine; None if there is no such process."""
    return birth_in_proc(process) if (PROC / "self" / "stat").is_file() else birth_from_system(process)


def birth_in_proc(process: int) -> str | None:
    """Return the birth of a process on Linux: the boot, and the ticks since then, which do not depend on the date."""
    try:
        # After the name, which is in brackets and can hold anything: the state, and 19 fields later the start.
        fields = (PROC / str(process) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        boot = (PROC / "sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else f"{boot} {fields[19]}"


def birth_from_system(process: int) -> str | None:
    """Return the birth of a process on other systems: its date, to the second."""
    import psutil

    try:
        return str(round(psutil.Process(process).create_time()))
    except psutil.NoSuchProcess:
        return None
