"""Writing the copies, in threads and with limited memory."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from library.data import images
from library.data.buckets import Size
from library.data.resizing.picture import OutputFormat, Picture, middle_frame, read_picture, reduce
from library.data.resizing.plan import Copy, Reduced, Task, select
from library.files import replacing
from library.parallel import in_order, num_cores
from library.progress import Bar

MOST_BYTES = 4 * 2**30  # of all pictures processed at the same time; a larger one is processed alone
BYTES_PER_PIXEL = 12  # at most, while a picture is processed: decoded, as an array, parts of it in float32
# After one of these, every further write fails, too.
HOPELESS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Making:
    """Options of the copies."""

    format: OutputFormat
    interpolation: str  # of RESIZERS
    divisible_by: int  # margins are cropped so that both sides are multiples of it
    skip_small: bool  # whether to skip sizes that are no smaller than the picture


@dataclasses.dataclass
class Outcome:
    """The result for one file: what was written, and what to report."""

    source: Path
    copied: list[Copy] = dataclasses.field(default_factory=list)
    reduced: list[Reduced] = dataclasses.field(default_factory=list)
    num_unreduced: int = 0  # of reduced, those as large as their picture
    num_too_small: int = 0  # copies skipped because the picture is no larger
    notices: tuple[str, ...] = ()  # keys of NOTICES
    error: str | None = None  # why something was skipped


def carry_out(tasks: Sequence[Task], making: Making, destination: Path, workers: int | None) -> list[Outcome]:
    """Do all tasks, by default as many at the same time as there are cores; raises OSError if the disk is full.

    The workers are threads: they read, resize and write pictures without holding Python's global lock, start
    quickly and share the limit on memory.
    """
    import cv2

    Image.init()  # loads all formats; not safe in two threads at the same time
    work = functools.partial(carry_out_one, making=making, gate=MemoryGate(MOST_BYTES))
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # each worker has a core; threads within threads would wait for each other
    try:
        # The longest work first, so that all workers end at about the same time.
        ordered = sorted(tasks, key=lambda task: task.source.stat().st_size if task.reduced else 0, reverse=True)
        results = in_order(work, ordered, workers or num_cores())
        return list(Bar(results, total=len(tasks), desc="resizing", unit="file"))
    except HopelessError as error:
        raise OSError(
            f"{destination} cannot be written: {error}; what was written before is whole, and --skip_existing goes on "
            "from there"
        ) from error
    finally:
        cv2.setNumThreads(threads)


class MemoryGate:
    """Delays pictures so that those processed at the same time need no more than `most` bytes in total."""

    def __init__(self, most: int) -> None:
        self.most = self.free = most
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def holding(self, size: Size) -> Iterator[None]:
        """Wait for the memory of a picture of size (width, height); hold it within the context."""
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
    """A failed write after which every other would fail, too; the message is the reason."""


class TooNarrowError(Exception):
    """A picture that has nothing left after cropping to multiples; the message gives the size."""


def carry_out_one(task: Task, *, making: Making, gate: MemoryGate) -> Outcome:
    """Write the files of a task; an error of its source is in the outcome. Raises HopelessError."""
    outcome = Outcome(task.source)
    try:
        if task.reduced:
            size = images.read_size(task.source)
            with gate.holding(size):
                picture = read_picture(task.source)
                loses_alpha = picture.is_transparent and making.format.name == "JPEG"
                outcome.notices = (*picture.notices, *(["alpha"] if loses_alpha else []))
                if making.skip_small:
                    whole, area = task, size[0] * size[1]
                    task = select(whole, lambda output: output.target is None or output.target.area < area)
                    outcome.num_too_small = len(whole.reduced) - len(task.reduced)
                write_reduced(picture, task, making, outcome)
        for copy in task.copies:
            copy_file(copy.source, copy.path)
            outcome.copied.append(copy)
    except (images.UnreadablePictureError, TooNarrowError) as problem:
        outcome.error = str(problem)
    except OSError as problem:
        reason = os.strerror(problem.errno) if problem.errno else str(problem)
        if problem.errno in HOPELESS:
            raise HopelessError(reason) from problem
        outcome.error = f"it could not be copied: {reason}"
    return outcome


def write_reduced(picture: Picture, task: Task, making: Making, outcome: Outcome) -> None:
    """Write the smaller copies of a picture and add each to the outcome; raises TooNarrowError before the first."""
    frames = [(copy, middle_frame(picture.size, copy.target.area, making.divisible_by)) for copy in task.reduced]
    for copy, frame in frames:
        if 0 in frame.size:
            narrow = f"at {copy.target.name} it is {frame.resized[0]}x{frame.resized[1]}"
            raise TooNarrowError(f"{narrow}, too narrow for --divisible_by {making.divisible_by}")
    for copy, frame in frames:
        if frame.size == picture.size and picture.is_as_written(making.format.name):
            copy_file(task.source, copy.path)  # encoding the same pixels again would lose quality
        else:
            with replacing(copy.path, durable=False) as temporary:
                making.format.write(reduce(picture, frame, making.interpolation), picture.profile, temporary)
        outcome.reduced.append(copy)
        outcome.num_unreduced += frame.resized == picture.size


def copy_file(source: Path, path: Path) -> None:
    """Copy a file byte for byte, with its modification time."""
    with replacing(path, durable=False) as temporary:
        shutil.copyfile(source, temporary)
        status = source.stat()
        os.utime(temporary, ns=(status.st_atime_ns, status.st_mtime_ns))
