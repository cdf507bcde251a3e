"""What lies beside the pictures of a run and is not used: in the wrong place, of another format, or listed nowhere."""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from library.config.dataset import DataConfig, SubsetOptions
from library.config.dataset_file import is_numbered
from library.data.caption_files import files_of
from library.data.faults import Notes
from library.data.sources import Listed, masks_by_stem
from library.errors import Problems, named
from library.files import PICTURE_SUFFIXES

# Pictures that other programs show, and training does not read.
OTHER_FORMATS = (
    *(".gif", ".tif", ".tiff", ".heic", ".heif", ".jfif", ".jpe", ".jp2", ".tga", ".psd"),
    *(".ppm", ".pgm", ".exr", ".hdr", ".dds", ".ico"),
)

Used = Collection[tuple[Path, str]]  # the places of files


def pictures_in(folder: Path, suffixes: Collection[str] = PICTURE_SUFFIXES) -> list[Path]:
    """Return the files directly in a folder whose extension is one of several, sorted; none if it cannot be read."""
    return [path for path in files_of(folder) if path.suffix.lower() in suffixes]


def folders_in(folder: Path) -> list[Path]:
    """Return the sub-folders of a folder, sorted; none of one that cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted(folder / entry.name for entry in entries if entry.is_dir())
    except OSError:
        return []


def names_below(folder: Path, paths: Sequence[Path]) -> str:
    """Return the first of some paths, relative to a folder."""
    return named([path.relative_to(folder).as_posix() for path in paths])


# --------------------------------------------------------------------------------------------------------------
# Folders N_name
# --------------------------------------------------------------------------------------------------------------


def check_layout(data: DataConfig, problems: Problems, notes: Notes) -> None:
    """Add a --train_data_dir without folders N_name to problems, such a --reg_data_dir and loose pictures to notes."""
    for option, parent in (("train_data_dir", data.train_data_dir), ("reg_data_dir", data.reg_data_dir)):
        if parent is None or not parent.is_dir():
            continue
        loose = pictures_in(parent)
        if any(is_numbered(folder) for folder in folders_in(parent)):
            if loose:
                notes.warn(
                    f"--{option} {parent}: {len(loose)} pictures directly in it are not used: "
                    f"{names_below(parent, loose)}; move them to a sub-folder named like 10_name"
                )
            continue
        text = f"--{option} {parent} has no sub-folder named like 10_name{what_to_do(option, parent, loose)}"
        if option == "train_data_dir":
            problems.add(text)
        else:
            notes.warn(f"{text}; the training goes on without regularisation")


def what_to_do(option: str, parent: Path, loose: Sequence[Path]) -> str:
    """Return what is probably meant by a folder without sub-folders N_name: ": ..." with the way out."""
    if loose and is_numbered(parent.resolve()):
        return f": name the folder above it, --{option} {parent.resolve().parent}"
    if loose:
        return (
            f", but {len(loose)} pictures directly in it ({names_below(parent, loose)}): move them to such a sub-folder"
        )
    for folder in folders_in(parent):
        if any(is_numbered(inner) for inner in folders_in(folder)):
            return f", but {folder} has: --{option} {folder}"
        if pictures := pictures_in(folder):
            return f", but {folder} has {len(pictures)} pictures: rename it to 10_{folder.name}"
    return ": put the pictures into such a sub-folder"


# --------------------------------------------------------------------------------------------------------------
# Files beside those that are used
# --------------------------------------------------------------------------------------------------------------


def place_of(path: Path) -> tuple[Path, str]:
    """Return what identifies a file, however its folder is written."""
    return real_folder(path.parent), path.name


@functools.lru_cache(maxsize=1024)
def real_folder(folder: Path) -> Path:
    """Return the absolute path of a folder, without symbolic links."""
    return folder.resolve()


def note_unused(subsets: Sequence[SubsetOptions], pictures: Sequence[Listed], notes: Notes) -> None:
    """Warn of pictures and masks in the folders of a run that no subset uses, with the first names."""
    used = {place_of(path) for listed in pictures for path in listed.files}
    masked = {folder.resolve() for subset in subsets if (folder := subset.conditioning_data_dir) is not None}
    folders = {subset.folder: None for subset in subsets} | {listed.path.parent: None for listed in pictures}
    for folder in folders:
        for line in unused_beside(folder, used, masked):
            notes.warn(line)
    for folder in {subset.folder: None for subset in subsets if subset.metadata_file is None}:
        for line in unused_below(folder, used, masked):
            notes.warn(line)
    for folder in {subset.conditioning_data_dir: None for subset in subsets}:
        stems = {listed.path.stem for listed in pictures if listed.subset.conditioning_data_dir == folder}
        if folder is not None and folder.is_dir() and stems:
            masks = pictures_in(folder)
            lonely = [path.name for path in masks if path.stem not in stems]
            if lonely:
                notes.warn(f"{folder}: {len(lonely)} masks are of no picture of the run: {named(lonely)}")
            last = set(masks_by_stem(folder).values())
            double = [path.name for path in masks if path not in last]
            if double:
                notes.warn(f"{folder}: {len(double)} masks go unused, for another has the same name: {named(double)}")


def unused_beside(folder: Path, used: Used, masked: Collection[Path]) -> Iterator[str]:
    """Yield warnings about pictures in a folder of which some are used."""
    others = [path.name for path in pictures_in(folder, OTHER_FORMATS)]
    if others:
        kinds = ", ".join(PICTURE_SUFFIXES)
        yield f"{folder}: {len(others)} pictures are of formats that are not read ({kinds} are): {named(others)}"
    if folder.resolve() not in masked:
        unlisted = [path.name for path in pictures_in(folder) if place_of(path) not in used]
        if unlisted:
            yield f"{folder}: {len(unlisted)} pictures are in no metadata file and are not used: {named(unlisted)}"


def unused_below(folder: Path, used: Used, masked: Collection[Path]) -> Iterator[str]:
    """Yield a warning about pictures in the sub-folders of a folder, which are not searched."""
    deeper = [
        path
        for inner in folders_in(folder)
        if inner.resolve() not in masked
        for path in pictures_in(inner)
        if place_of(path) not in used
    ]
    if deeper:
        names = names_below(folder, deeper)
        yield f"{folder}: {len(deeper)} pictures in its sub-folders are not used, for these are not searched: {names}"
