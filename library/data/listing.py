"""The names of files in folders: each folder is listed at once, since asking for single files takes long."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path

from library.errors import UserError
from library.files import PICTURE_SUFFIXES


def file_names(folder: Path) -> list[str]:
    """Return the names of the files directly in a folder, in the order of paths; raises OSError."""
    with os.scandir(folder) as entries:
        return sorted((entry.name for entry in entries if entry.is_file()), key=os.path.normcase)


def names_in(folder: Path) -> list[str]:
    """Return the names of the files directly in a folder, in order; raises UserError if it cannot be read."""
    try:
        return file_names(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}); mend its permissions") from None


def pictures_of(names: Collection[str], suffixes: Collection[str] = PICTURE_SUFFIXES) -> list[str]:
    """Return those of some file names whose extension is one of several."""
    endings = tuple(suffixes)
    return [name for name in names if name.lower().endswith(endings) and split_name(name)[1]]


def list_pictures(folder: Path) -> list[Path]:
    """Return the pictures directly in a folder, sorted by path; raises UserError for one that cannot be read."""
    return [folder / name for name in pictures_of(names_in(folder))]


def split_name(name: str) -> tuple[str, str]:
    """Return a file name without its extension, and the extension with its dot, as pathlib does."""
    position = name.rfind(".")
    return (name[:position], name[position:]) if 0 < position < len(name) - 1 else (name, "")


def stem_of(file: str) -> str:
    """Return the name of a file, given by its path, without extension."""
    return split_name(os.path.basename(file))[0]  # noqa: PTH119 (a Path takes three times as long)


def parents_of(files: Iterable[str]) -> list[Path]:
    """Return the folders of files, given by their paths."""
    return [Path(folder) for folder in dict.fromkeys(os.path.split(file)[0] for file in files)]


def beginning_of(folder: Path) -> str:
    """Return what the paths of all files in a folder begin with."""
    return str(folder / "x")[:-1]


def files_of(folder: Path) -> list[str]:
    """Return the names of the files directly in a folder, in order; none of a folder that cannot be read."""
    try:
        return file_names(folder)
    except OSError:
        return []


def folders_in(folder: Path) -> list[Path]:
    """Return the sub-folders of a folder, sorted; none of one that cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted(folder / entry.name for entry in entries if entry.is_dir())
    except OSError:
        return []
