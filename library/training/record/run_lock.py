"""The lock of an output name: while a run holds it, no other run writes the same files.

The lock is a file beside those of the run, which names the process that holds it. It is created exclusively and then
filled. The lock of a process of this machine that has ended is taken over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from library.errors import UserError
from library.files import disk_errors
from library.training.run.runtime import Runtime, shared

logger = logging.getLogger(__name__)

PROC = Path("/proc")
ADVICE = "take another --output_name or --output_dir"
ATTEMPTS, PAUSE = 5, 0.1  # to take a lock that others fill, release or take over at the same moment; seconds between


@dataclasses.dataclass(frozen=True)
class Holder:
    """The process that holds a lock."""

    host: str
    process: int
    birth: str  # of the process, whose number can be that of a later one; empty: unknown
    since: str


@contextlib.contextmanager
def run_lock(path: Path, runtime: Runtime) -> Iterator[None]:
    """Hold a lock within the context, for all processes; raises on all what `take` raises."""
    failure, holder = None, own_holder()
    if runtime.is_main:
        try:
            take(path, holder)
        except (UserError, OSError) as error:
            failure = error
    failure = shared(failure, runtime)
    if failure is not None:
        raise failure
    try:
        yield
    finally:
        if runtime.is_main:
            release(path, holder)


def own_holder() -> Holder:
    """Return this process as a holder."""
    process = os.getpid()
    return Holder(this_host(), process, birth_of(process) or "", datetime.now().isoformat(" ", "seconds"))


def this_host() -> str:
    """Return the name of this machine, on Linux with its numbering of processes, which containers do not share."""
    try:
        return f"{platform.node()} {(PROC / 'self/ns/pid').readlink()}"
    except OSError:
        return platform.node()


def take(path: Path, holder: Holder) -> None:
    """Create the lock, in place of that of a process that has ended.

    Raises UserError if another run holds it, and OSError if it cannot be written.
    """
    for _ in range(ATTEMPTS):
        try:
            create(path, holder)
        except FileExistsError:
            other = read(path)
        else:
            return
        if other is None:
            time.sleep(PAUSE)
        else:
            check_ended(path, other)
            remove_ended(path, other, holder)
    raise UserError(
        f"{path}, the lock of a run with this output name, is being taken by another run: {ADVICE}; if there is no "
        "such run, delete the file"
    )


def create(path: Path, holder: Holder) -> None:
    """Write the lock; raises FileExistsError if there is one, and OSError if it cannot be written."""
    number = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    try:
        with disk_errors(path), os.fdopen(number, "w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(holder), file)
    except BaseException:  # a signal, too
        path.unlink(missing_ok=True)
        raise


def read(path: Path) -> Holder | None:
    """Return the holder of a lock; raises UserError for one that cannot be read.

    None if there is no lock, or if it is empty: it has been created, but not yet filled.
    """
    try:
        text = path.read_text(encoding="utf-8")
        return Holder(**json.loads(text)) if text else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError):
        raise UserError(
            f"{path}, the lock of a run with this output name, cannot be read: {ADVICE}; if there is no such run, "
            "delete the file"
        ) from None


def is_held(path: Path) -> bool:
    """Return whether a run holds a lock, or may do so on another machine."""
    try:
        holder = read(path)
    except UserError:
        return True
    return path.exists() if holder is None else birth_now(holder) in ("", holder.birth)


def birth_now(holder: Holder) -> str | None:
    """Return the birth of the process that has the number of a holder, as `birth_of` does, which is of this machine."""
    return birth_of(holder.process) if holder.host == this_host() else ""


def check_ended(path: Path, holder: Holder) -> None:
    """Raise UserError unless the process of a holder has ended, which is known only on this machine."""
    birth = birth_now(holder)
    if birth is None:
        return
    name = path.with_name(path.name.rpartition("-run.lock")[0])
    if not birth or not holder.birth:
        raise UserError(
            f"another run, process {holder.process} on {holder.host} since {holder.since}, writes {name}: {ADVICE}; "
            f"if that run has ended, delete {path}"
        )
    if birth == holder.birth:
        raise UserError(
            f"another run, process {holder.process} since {holder.since}, writes {name}: wait for it or stop it, or "
            f"{ADVICE}"
        )


def remove_ended(path: Path, ended: Holder, holder: Holder) -> None:
    """Remove the lock of a process that has ended, unless another run was faster and the lock is now its own."""
    # Only one run at a time compares and removes. It holds a lock for that, which is taken over like any other.
    guard = path.with_name(f"{path.name}.taking")
    take(guard, holder)
    try:
        if read(path) == ended:
            path.unlink(missing_ok=True)
            logger.info(
                "the run of process %d, since %s, has ended without removing its lock: %s is taken over",
                *(ended.process, ended.since, path),
            )
    finally:
        release(guard, holder)


def release(path: Path, holder: Holder) -> None:
    """Remove the lock, unless it is another's by now.

    Where that fails, there is only a warning: an error would hide how the run ended, and the lock will be taken over.
    """
    try:
        if read(path) == holder:
            path.unlink(missing_ok=True)
    except (OSError, UserError) as error:
        logger.warning("the lock of this run was not removed: %s", error)


def birth_of(process: int) -> str | None:
    """Return a text that no other process of this number has on this machine.

    Empty if it cannot be known; None if there is no such process.
    """
    return birth_in_proc(process) if (PROC / "self" / "stat").is_file() else birth_from_system(process)


def birth_in_proc(process: int) -> str | None:
    """Return the birth of a process on Linux: the boot, and the ticks since then, which do not depend on the date."""
    try:
        # After the name, which is in brackets and can hold anything: the state, and 19 fields later the start.
        fields = (PROC / str(process) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    except OSError:
        return ""
    if fields[0] in ("Z", "X"):
        return None
    try:
        return f"{(PROC / 'sys/kernel/random/boot_id').read_text(encoding='utf-8').strip()} {fields[19]}"
    except OSError:
        return ""


def birth_from_system(process: int) -> str | None:
    """Return the birth of a process on other systems: its date, to the second."""
    import psutil

    try:
        return str(round(psutil.Process(process).create_time()))
    except psutil.NoSuchProcess:
        return None
    except psutil.AccessDenied:
        return ""
