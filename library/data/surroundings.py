"""What lies beside the pictures of a run and is not used: in the wrong place, of another format, or listed nowhere."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from library.config.dataset import DataConfig, SubsetOptions
from library.config.dataset_file import is_numbered
from library.data.faults import Notes
from library.data.listing import files_of, folders_in, pictures_of, split_name, stem_of
from library.data.sources import Listed
from library.errors import Problems, named
from library.files import PICTURE_SUFFIXES

# Pictures that other programs show, and training does not read.
OTHER_FORMATS = (
    *(".gif", ".tif", ".tiff", ".heic", ".heif", ".jfif", ".jpe", ".jp2", ".tga", ".psd"),
    *(".ppm", ".pgm", ".exr", ".hdr", ".dds", ".ico"),
)


def pictures_in(folder: Path) -> list[str]:
    """Return the names of the pictures directly in a folder, in order; none if it cannot be read."""
    return pictures_of(files_of(folder))


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
                    f"{named(loose)}; move them to a sub-folder named like 10_name"
                )
            continue
        text = f"--{option} {parent} has no sub-folder named like 10_name{what_to_do(option, parent, loose)}"
        if option == "train_data_dir":
            problems.add(text)
        else:
            notes.warn(f"{text}; the training goes on without regularisation")


def what_to_do(option: str, parent: Path, loose: Sequence[str]) -> str:
    """Return what is probably meant by a folder without sub-folders N_name: ": ..." with the way out."""
    if loose and is_numbered(parent.resolve()):
        return f": name the folder above it, --{option} {parent.resolve().parent}"
    if loose:
        return f", but {len(loose)} pictures directly in it ({named(loose)}): move them to such a sub-folder"
    for folder in folders_in(parent):
        if any(is_numbered(inner) for inner in folders_in(folder)):
            return f", but {folder} has: --{option} {folder}"
        if pictures := pictures_in(folder):
            return f", but {folder} has {len(pictures)} pictures: rename it to 10_{folder.name}"
    return ": put the pictures into such a sub-folder"


# --------------------------------------------------------------------------------------------------------------
# Files beside those that are used
# --------------------------------------------------------------------------------------------------------------


class Used:
    """Which pictures a run uses, however their folders are written."""

    def __init__(self, subsets: Sequence[SubsetOptions], pictures: Sequence[Listed]) -> None:
        self._whole = {subset.folder.resolve() for subset in subsets if subset.metadata_file is None}
        masks = [subset.conditioning_data_dir for subset in subsets]
        self._masked = {folder.resolve() for folder in masks if folder is not None}
        self._names: dict[Path, set[str]] = {}  # of pictures that metadata files list, by folder
        by_folder: dict[str, list[str]] = {}
        for listed in pictures:
            if listed.subset.metadata_file is not None:
                parent, name = os.path.split(listed.file)
                by_folder.setdefault(parent, []).append(name)
        self.folders = {subset.folder: None for subset in subsets} | {Path(parent): None for parent in by_folder}
        for parent, names in by_folder.items():
            self._names.setdefault(Path(parent).resolve(), set()).update(names)

    def others(self, folder: Path, names: Sequence[str]) -> list[str]:
        """Return those of the names of pictures in a folder that are not used; none of a folder of masks."""
        real = folder.resolve()
        if real in self._whole or real in self._masked:
            return []
        used = self._names.get(real, ())
        return [name for name in names if name not in used]


def note_unused(subsets: Sequence[SubsetOptions], pictures: Sequence[Listed], notes: Notes) -> None:
    """Warn of pictures and masks in the folders of a run that no subset uses, with the first names."""
    used = Used(subsets, pictures)
    for folder in used.folders:
        for line in unused_beside(folder, used):
            notes.warn(line)
    for folder in {subset.folder: None for subset in subsets if subset.metadata_file is None}:
        for line in unused_below(folder, used):
            notes.warn(line)
    stems: dict[Path, set[str]] = {}  # of the pictures whose masks are in a folder
    for listed in pictures:
        if (masks := listed.subset.conditioning_data_dir) is not None:
            stems.setdefault(masks, set()).add(stem_of(listed.file))
    for masks, of_pictures in stems.items():
        for line in unused_masks(masks, of_pictures):
            notes.warn(line)


def unused_masks(folder: Path, stems: Collection[str]) -> Iterator[str]:
    """Yield warnings about masks in a folder that none of the pictures with some names uses."""
    masks = pictures_in(folder)
    lonely = [name for name in masks if split_name(name)[0] not in stems]
    if lonely:
        yield f"{folder}: {len(lonely)} masks are of no picture of the run: {named(lonely)}"
    last = {split_name(name)[0]: name for name in masks}
    double = [name for name in masks if last[split_name(name)[0]] != name]
    if double:
        yield f"{folder}: {len(double)} masks go unused, for another has the same name: {named(double)}"


def unused_beside(folder: Path, used: Used) -> Iterator[str]:
    """Yield warnings about pictures in a folder of which some are used."""
    names = files_of(folder)
    others = pictures_of(names, OTHER_FORMATS)
    if others:
        kinds = ", ".join(PICTURE_SUFFIXES)
        yield f"{folder}: {len(others)} pictures are of formats that are not read ({kinds} are): {named(others)}"
    unlisted = used.others(folder, pictures_of(names))
    if unlisted:
        yield f"{folder}: {len(unlisted)} pictures are in no metadata file and are not used: {named(unlisted)}"


def unused_below(folder: Path, used: Used) -> Iterator[str]:
    """Yield a warning about pictures in the sub-folders of a folder, which are not searched."""
    deeper = [f"{inner.name}/{name}" for inner in folders_in(folder) for name in used.others(inner, pictures_in(inner))]
    if deeper:
        yield (
            f"{folder}: {len(deeper)} pictures in its sub-folders are not used, for these are not searched: "
            f"{named(deeper)}"
        )
