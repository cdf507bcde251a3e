"""The work of a run: copies are made in threads, within a bound on memory."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from pathlib import Path
from typing import TypeVar

from PIL import Image

from library.data import images
from library.data.buckets import Size
from library.data.resizing.picture import OutputFormat, Picture, read_picture
from library.data.resizing.plan import Copy, Reduced, Task, without_larger
from library.data.resizing.reduce import middle_frame, reduce
from library.files import replacing

MOST_BYTES = 4 * 2**30  # of all pictures in work at one time; a larger one is in work alone
BYTES_PER_PIXEL = 12  # at most, while a picture is in work: as decoded, as an array, parts of it in float32
# Where one write is refused for these, all will be.
HOPELESS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Making:
    """How copies are made."""

    format: OutputFormat
    interpolation: str  # of RESIZERS
    divisible_by: int  # margins are cut so that both sides are multiples of it
    skip_small: bool  # whether sizes that a picture does not exceed are left out


@dataclasses.dataclass
class Outcome:
    """What became of a file: what was written for it, and what has to be said of it."""

    source: Path
    copied: list[Copy] = dataclasses.field(default_factory=list)
    reduced: list[Reduced] = dataclasses.field(default_factory=list)
    num_unreduced: int = 0  # those of reduced that are as large as their picture
    num_too_small: int = 0  # copies that were not made, as the picture is no larger
    notices: tuple[str, ...] = ()  # keys of NOTICES
    error: str | None = None  # why something was left out


def carry_out(tasks: Sequence[Task], making: Making, destination: Path, workers: int | None) -> list[Outcome]:
    """Do all tasks, by default as many at one time as there are cores; raises OSError where the disk is full.

    The workers are threads: reading, resizing and writing of pictures are done outside the interpreter's lock,
    and threads start at once and share the bound on memory.
    """
    import cv2
    from tqdm import tqdm

    Image.init()  # now, for all formats: two threads that do it at one time see half of them
    work = functools.partial(carry_out_one, making=making, gate=MemoryGate(MOST_BYTES))
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # each worker has a core; threads within threads would wait for each other
    try:
        # The longest work first: at the end no worker waits for another.
        ordered = sorted(tasks, key=lambda task: task.source.stat().st_size if task.reduced else 0, reverse=True)
        results = in_parallel(work, ordered, workers or available_cores())
        return list(tqdm(results, total=len(tasks), desc="resizing", unit="file"))
    except HopelessError as error:
        raise OSError(
            f"{destination} cannot be written: {error}; what was written before is whole, and --skip_existing goes on "
            "from there"
        ) from error
    finally:
        cv2.setNumThreads(threads)


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_parallel(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Yield function(item) for all items, as they become ready; few are begun ahead, so that stopping is quick."""
    waiting: set[Future[Result]] = set()
    pool = ThreadPoolExecutor(workers)
    try:
        for item in items:
            waiting.add(pool.submit(function, item))
            if len(waiting) > 2 * workers:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        yield from (future.result() for future in as_completed(waiting))
    finally:
        pool.shutdown(cancel_futures=True)


class MemoryGate:
    """Lets work on pictures begin while all in work need no more than `most` bytes together."""

    def __init__(self, most: int) -> None:
        self.most = self.free = most
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def holding(self, size: Size) -> Iterator[None]:
        """Wait until there is room for a picture of size (width, height), and take it meanwhile."""
        need = min(size[0] * size[1] * BYTES_PER_PIXEL, self.most)
        with self.changed:
            self.changed.wait_for(lambda: self.free >= need)
            self.free -= need
        try:
            yield
        finally:
            with self.changed:
                self.free += need
                self.changed.notify_all()


class HopelessError(Exception):
    """A refusal of the disk that every other write would meet as well; the message is the reason."""


class TooNarrowError(Exception):
    """A picture of which the cut to multiples would leave nothing; the message says at what size."""


def carry_out_one(task: Task, *, making: Making, gate: MemoryGate) -> Outcome:
    """Write the files of a task; what is wrong with its source is in the outcome. Raises HopelessError."""
    outcome = Outcome(task.source)
    try:
        if task.reduced:
            size = images.read_size(task.source)
            with gate.holding(size):
                picture = read_picture(task.source)
                hides = picture.shines_through and making.format.name == "JPEG"
                outcome.notices = (*picture.notices, *(["alpha"] if hides else []))
                if making.skip_small:
                    whole, task = task, without_larger(task, size[0] * size[1])
                    outcome.num_too_small = len(whole.reduced) - len(task.reduced)
                write_reduced(picture, task, making, outcome)
        for entry in task.copies:
            copy_file(entry.source, entry.path)
            outcome.copied.append(entry)
    except (images.UnreadablePictureError, TooNarrowError) as problem:
        outcome.error = str(problem)
    except OSError as problem:
        reason = os.strerror(problem.errno) if problem.errno else str(problem)
        if problem.errno in HOPELESS:
            raise HopelessError(reason) from problem
        outcome.error = f"it could not be copied: {reason}"
    return outcome


def write_reduced(picture: Picture, task: Task, making: Making, outcome: Outcome) -> None:
    """Write the copies of a picture in the sizes, each of which is added to the outcome.

    Raises TooNarrowError before the first one.
    """
    frames = [middle_frame(picture.size, entry.target.area, making.divisible_by) for entry in task.reduced]
    for entry, frame in zip(task.reduced, frames, strict=True):
        if 0 in frame.size:
            narrow = f"at {entry.target.name} it is {frame.resized[0]}x{frame.resized[1]}"
            raise TooNarrowError(f"{narrow}, too narrow for --divisible_by {making.divisible_by}")
    for entry, frame in zip(task.reduced, frames, strict=True):
        if frame.size == picture.size and picture.is_as_written(making.format.name):
            copy_file(task.source, entry.path)  # to write the same pixels anew would lose quality
        else:
            with replacing(entry.path, durable=False) as temporary:
                making.format.write(reduce(picture, frame, making.interpolation), picture.profile, temporary)
        outcome.reduced.append(entry)
        outcome.num_unreduced += frame.resized == picture.size


def copy_file(source: Path, path: Path) -> None:
    """Copy a file byte for byte, with its time of change."""
    with replacing(path, durable=False) as temporary:
        shutil.copyfile(source, temporary)
        status = source.stat()
        os.utime(temporary, ns=(status.st_atime_ns, status.st_mtime_ns))
