"""The plan of a run: which copies of which files are written, under which names."""

from __future__ import annotations

import collections
import dataclasses
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from library.errors import UserError
from library.files import PICTURE_SUFFIXES

CACHES = (".npz", ".safetensors")  # latents and text encodings: those of a picture are not those of its smaller copy
MOST_NAMED = 5


class Target(NamedTuple):
    """A size that copies are made in: its name, and its area in pixels."""

    name: str
    area: int


def targets(text: str) -> list[Target]:
    """Return the sizes that a text such as "512x512,256x256" names; raises ValueError."""
    found: dict[str, Target] = {}
    for name in (part.strip() for part in text.split(",")):
        match = re.fullmatch("([1-9][0-9]*)x([1-9][0-9]*)", name)
        if match is None:
            raise ValueError(f"{name!r} is none")
        if name in found:
            raise ValueError(f"{name} is given twice")
        found[name] = Target(name, int(match[1]) * int(match[2]))
    return list(found.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Which copies are made of the files of a folder, and where."""

    source: Path
    destination: Path
    targets: Sequence[Target]
    suffix: str  # of the copies that are made
    has_companions: bool  # whether captions and other files of a picture's name are copied for each size


class Copy(NamedTuple):
    """A file that is copied byte for byte."""

    source: Path
    path: Path
    kind: Literal["original", "associated", "other"]
    target: Target | None = None  # the size that an associated file belongs to


class Reduced(NamedTuple):
    """A copy in a size that is to be made."""

    target: Target
    path: Path


@dataclasses.dataclass(frozen=True)
class Task:
    """What is written for one file; without `reduced` it need not be a picture."""

    source: Path
    copies: tuple[Copy, ...]
    reduced: tuple[Reduced, ...] = ()

    @property
    def outputs(self) -> list[Path]:
        """The files to be written."""
        return [*(copy.path for copy in self.copies), *(entry.path for entry in self.reduced)]


class Listing(NamedTuple):
    """The files of a folder, and what else is in it: path -> why it is left out."""

    files: list[Path]
    left_out: dict[Path, str]


def list_files(source: Path) -> Listing:
    """Return all files in a folder and its subfolders, in order; raises UserError if there is no picture."""
    files: list[Path] = []
    left_out: dict[Path, str] = {}
    for folder, subfolders, names in os.walk(source, onerror=_unreadable_folder):
        for name in subfolders:
            if (Path(folder) / name).is_symlink():  # it may lead back to here
                left_out[Path(folder) / name] = "a link to a folder; copy what it links to"
        for path in (Path(folder) / name for name in names):
            if path.is_file():
                files.append(path)
            else:
                left_out[path] = "neither a file nor a folder"
    if not any(is_picture(path) for path in files):
        kinds = ", ".join(PICTURE_SUFFIXES)
        raise UserError(f"src_img_folder: {source} has no pictures ({kinds}); give the folder of the pictures")
    return Listing(sorted(files), left_out)


def _unreadable_folder(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be read ({error.strerror}); mend its permissions")


def is_picture(path: Path) -> bool:
    """Tell from its name whether a file is a picture."""
    return path.suffix.lower() in PICTURE_SUFFIXES


def make_tasks(files: Iterable[Path], layout: Layout) -> list[Task]:
    """Return what is to be written for each of the files."""
    companions = collections.defaultdict(list)  # picture's path without its extension -> files that go with it
    if layout.has_companions:
        for path in files:
            if path.suffix and path.suffix.lower() not in (*PICTURE_SUFFIXES, *CACHES):
                companions[path.with_suffix("")].append(path)

    tasks = []
    for path in files:
        place = layout.destination / path.relative_to(layout.source)
        if not is_picture(path):
            tasks.append(Task(path, (Copy(path, place, "other"),)))
            continue
        copies = [Copy(path, place, "original")]
        for target in layout.targets:
            for other in companions[path.with_suffix("")]:
                copies.append(Copy(other, sized_name(place, target, other.suffix), "associated", target))
        reduced = tuple(Reduced(target, sized_name(place, target, layout.suffix)) for target in layout.targets)
        tasks.append(Task(path, tuple(copies), reduced))
    return tasks


def sized_name(path: Path, target: Target, suffix: str) -> Path:
    """Return the path of what belongs to a picture in a size, such as photo+512x512.jpg."""
    return path.with_name(f"{path.stem}+{target.name}{suffix}")


def check_names(tasks: Iterable[Task]) -> None:
    """Raise UserError where two files would be written to one name."""
    # Where the system does not tell them apart, PHOTO and photo are one name.
    same = str.lower if sys.platform in ("win32", "darwin") else str
    origins: dict[str, Path] = {}
    clashes: dict[tuple[Path, Path], Path] = {}
    for task in tasks:
        for path in task.outputs:
            other = origins.setdefault(same(str(path)), task.source)
            if other != task.source:
                clashes.setdefault((other, task.source), path)
    if clashes:
        lines = [f"{one} and {two} would both be written to {path.name}" for (one, two), path in clashes.items()]
        raise UserError(f"{named(lines, '; ')}: rename one of the two")


def existing(tasks: Iterable[Task]) -> set[Path]:
    """Return which of the files to be written are there; one that is empty, as after a power cut, is not."""
    return {path for task in tasks for path in task.outputs if os.path.lexists(path) and not is_empty(path)}


def is_empty(path: Path) -> bool:
    """Tell whether path is a file without content."""
    return path.is_file() and path.stat().st_size == 0


def without(task: Task, there: set[Path]) -> Task:
    """Return what is left of a task when some of its files are there."""
    return keeping(task, lambda entry: entry.path not in there)


def without_larger(task: Task, area: int) -> Task:
    """Return a task without the copies in sizes that a picture of an area in pixels does not exceed."""
    return keeping(task, lambda entry: entry.target is None or entry.target.area < area)


def keeping(task: Task, keeps: Callable[[Copy | Reduced], bool]) -> Task:
    """Return a task with those of its files that are to be kept."""
    return Task(task.source, tuple(filter(keeps, task.copies)), tuple(filter(keeps, task.reduced)))


def named(names: Sequence[str], separator: str = ", ") -> str:
    """Return the first few names, and how many more there are."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return separator.join(names[:MOST_NAMED]) + more
