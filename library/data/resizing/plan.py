"""Which copies of which files are written, under which names."""

from __future__ import annotations

import collections
import dataclasses
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from library.errors import UserError, named
from library.files import PICTURE_SUFFIXES

CACHES = (".npz", ".safetensors")  # latents and text encodings, which are not those of a smaller copy


class Target(NamedTuple):
    """A size of copies: its name, and its area in pixels."""

    name: str
    area: int


def targets(text: str) -> list[Target]:
    """Return the sizes in a text such as "512x512,256x256"; raises ValueError."""
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
    suffix: str  # of the smaller copies
    has_companions: bool  # whether captions and other files of a picture's name are copied for each size


class Copy(NamedTuple):
    """A file that is copied byte for byte."""

    source: Path
    path: Path
    kind: Literal["original", "associated", "other"]
    target: Target | None = None  # the size that an associated file belongs to


class Reduced(NamedTuple):
    """A smaller copy."""

    target: Target
    path: Path


@dataclasses.dataclass(frozen=True)
class Task:
    """The files to write for one file; without `reduced` it need not be a picture."""

    source: Path
    copies: tuple[Copy, ...]
    reduced: tuple[Reduced, ...] = ()

    @property
    def outputs(self) -> list[Path]:
        return [*(copy.path for copy in self.copies), *(copy.path for copy in self.reduced)]


class Listing(NamedTuple):
    """The files of a folder, and path -> reason for everything that is skipped."""

    files: list[Path]
    left_out: dict[Path, str]


def list_files(source: Path) -> Listing:
    """Return all files in a folder and its subfolders, sorted; raises UserError if there is no picture."""
    files: list[Path] = []
    left_out: dict[Path, str] = {}
    for folder, subfolders, names in os.walk(source, onerror=_unreadable_folder):
        for name in subfolders:
            if (Path(folder) / name).is_symlink():  # it may link to a parent folder
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
    """Return whether the name of a file is that of a picture."""
    return path.suffix.lower() in PICTURE_SUFFIXES


def make_tasks(files: Iterable[Path], layout: Layout) -> list[Task]:
    """Return the task of each of the files."""
    companions = collections.defaultdict(list)  # picture's path without its extension -> files of that name
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
        copies += [
            Copy(other, sized_name(place, target, other.suffix), "associated", target)
            for target in layout.targets
            for other in companions[path.with_suffix("")]
        ]
        reduced = tuple(Reduced(target, sized_name(place, target, layout.suffix)) for target in layout.targets)
        tasks.append(Task(path, tuple(copies), reduced))
    return tasks


def sized_name(path: Path, target: Target, suffix: str) -> Path:
    """Return the path of a copy in a size, such as photo+512x512.jpg."""
    return path.with_name(f"{path.stem}+{target.name}{suffix}")


def check_names(tasks: Iterable[Task]) -> None:
    """Raise UserError if two files would be written to the same path."""
    # Some systems ignore case: PHOTO and photo are the same name there.
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
    """Return which of the files to write exist already; an empty one, as after a power cut, does not count."""
    found = (path for task in tasks for path in task.outputs if os.path.lexists(path))
    return {path for path in found if not path.is_file() or path.stat().st_size}


def without(task: Task, existing: set[Path]) -> Task:
    """Return a task without the files that exist."""
    return select(task, lambda output: output.path not in existing)


def select(task: Task, keeps: Callable[[Copy | Reduced], bool]) -> Task:
    """Return a task with only those of its files for which keeps returns True."""
    return Task(task.source, tuple(filter(keeps, task.copies)), tuple(filter(keeps, task.reduced)))
