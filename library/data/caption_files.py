"""Caption files: which one a picture has, its lines, and what is said of those that are missing, empty or not used."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from library.config.dataset import SubsetOptions
from library.data.faults import Notes
from library.data.images import face_in_name
from library.errors import named, shown
from library.files import PICTURE_SUFFIXES
from library.text_files import UnreadableTextError, read_text

# Files that are named like pictures but hold no caption: settings, metadata, caches, other pictures.
NO_CAPTIONS = (
    *(".npz", ".safetensors", ".pt", ".db", ".zip", ".lnk", ".url", ".ini", ".bak", ".tmp"),
    *(".json", ".jsonl", ".xmp", ".xml", ".html", ".htm", ".yaml", ".yml", ".toml", ".csv"),
    *(".gif", ".tif", ".tiff", ".psd", ".svg", ".mp4", ".webm"),
)


class CaptionFile(NamedTuple):
    """The caption file of a picture, or None, and its lines that are not blank, stripped."""

    path: Path | None
    lines: tuple[str, ...]


def stems_of(picture: Path) -> list[str]:
    """Return the names without extension that a caption file of a picture can have, the first one before the others.

    A face crop `name_x_y_w_h` without a file of its own has that of `name`.
    """
    crop = face_in_name(picture.stem)
    return [picture.stem] if crop is None else [picture.stem, crop[0]]


def read_caption(picture: Path, extension: str) -> CaptionFile:
    """Return the caption file of a picture; raises UnreadableTextError for one that is not UTF-8."""
    paths = (picture.with_name(stem + extension) for stem in stems_of(picture))
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return CaptionFile(None, ())
    return CaptionFile(path, tuple(line.strip() for line in read_text(path).splitlines() if line.strip()))


# --------------------------------------------------------------------------------------------------------------
# What is said of them
# --------------------------------------------------------------------------------------------------------------


def note_captions(found: Mapping[Path, CaptionFile], subset: SubsetOptions, notes: Notes) -> None:
    """Note what is said of the caption files of the pictures in a subset's folder."""
    if is_planned(found, subset):
        notes.tell(f"{subset.folder}: the caption of all {len(found)} pictures is {shown(subset.class_tokens)}")
    else:
        for line in describe_captions(found, subset):
            notes.warn(line)


def is_planned(found: Mapping[Path, CaptionFile], subset: SubsetOptions) -> bool:
    """Return whether class tokens are the caption of all pictures, and no file beside them could be a caption."""
    has_files = any(file.path is not None for file in found.values())
    return (
        bool(found)
        and bool(subset.class_tokens)
        and not has_files
        and not other_files(found, subset.folder, subset.caption_extension)
    )


def describe_captions(found: Mapping[Path, CaptionFile], subset: SubsetOptions) -> Iterator[str]:
    """Yield warnings about the caption files of the pictures in a subset's folder."""
    extension = shown_extension(subset.caption_extension)
    others = other_files(found, subset.folder, subset.caption_extension)
    option = "--caption_extension {}, or caption_extension in the dataset file"
    way = f"rename these to {subset.caption_extension}" if any(file.lines for file in found.values()) else option
    missing = [picture for picture, file in found.items() if file.path is None]
    if missing:
        yield (
            f"{subset.folder}: {len(missing)} of {len(found)} pictures have no {extension} file and "
            f"{caption_without_file(subset)}: {names_of(missing)}{remedies(others, missing, way)}"
        )
    empty = [picture for picture, file in found.items() if file.path is not None and not file.lines]
    if empty:
        unused = f", and not {shown(subset.class_tokens)}" if subset.class_tokens else ""
        yield (
            f"{subset.folder}: the {extension} files of {len(empty)} of {len(found)} pictures are empty, so that their "
            f"caption is empty{unused}: {names_of(empty)}{remedies(others, empty, way)}"
        )
    longer = [picture for picture, file in found.items() if len(file.lines) > 1]
    if longer and not subset.enable_wildcard:
        yield (
            f"{subset.folder}: the {extension} files of {len(longer)} of {len(found)} pictures have several lines, of "
            f"which only the first is used: {names_of(longer)}; --enable_wildcard takes one at random"
        )
    lonely = files_without_picture(found, subset)
    if lonely:
        yield f"{subset.folder}: {len(lonely)} {extension} files belong to no picture: {named(lonely)}"


def caption_without_file(subset: SubsetOptions) -> str:
    """Return which caption a picture gets that has no caption file."""
    return f"get the caption {shown(subset.class_tokens)}" if subset.class_tokens else "an empty caption"


def remedies(others: Mapping[str, Sequence[Path]], lacking: Iterable[Path], way: str) -> str:
    """Return what gives the lacking pictures a caption, from the files beside them: ending -> pictures.

    way says what to do, with {} for the ending.
    """
    lacking = set(lacking)
    numbers = {ending: sum(picture in lacking for picture in pictures) for ending, pictures in others.items()}
    return "".join(
        f"; {number} of them have a {ending} file: {way.replace('{}', ending)}"
        for ending, number in numbers.items()
        if number
    )


def names_of(pictures: Sequence[Path]) -> str:
    """Return the names of the first pictures."""
    return named([picture.name for picture in pictures])


def shown_extension(extension: str) -> str:
    """Return an extension, in quotes if it has white space, which could be taken for several extensions."""
    return repr(extension) if any(character.isspace() or character == "," for character in extension) else extension


def other_files(found: Mapping[Path, CaptionFile], folder: Path, extension: str) -> dict[str, list[Path]]:
    """Return ending -> pictures of a folder that lack a caption and have a text of that ending, most pictures first.

    The ending is what follows the picture's name without extension: `.txt`, `.TXT`, or `.png.txt` of `a.png.txt`.
    """
    lacking: dict[str, list[Path]] = {}
    for picture, file in found.items():
        for stem in [] if file.lines else stems_of(picture):
            lacking.setdefault(stem, []).append(picture)
    if not lacking:
        return {}
    stems = {stem for picture in found for stem in stems_of(picture)}
    by_ending: dict[str, dict[Path, Path]] = {}
    for path in files_of(folder):
        stem = longest_stem(path.name, stems) or ""
        ending = path.name.removeprefix(stem)
        if stem in lacking and ending != extension and can_be_caption(path):
            by_ending.setdefault(ending, {}).update(dict.fromkeys(lacking[stem], path))
    texts = {ending: files for ending, files in by_ending.items() if is_text(next(iter(files.values())))}
    return {ending: list(files) for ending, files in sorted(texts.items(), key=lambda item: -len(item[1]))}


def files_without_picture(found: Mapping[Path, CaptionFile], subset: SubsetOptions) -> list[str]:
    """Return the names of files with the captions' extension that are neither used nor found by `other_files`."""
    stems = {stem for picture in found for stem in stems_of(picture)}
    lacking = {stem for picture, file in found.items() if not file.lines for stem in stems_of(picture)}
    extension = subset.caption_extension
    names = [path.name for path in files_of(subset.folder) if path.name.endswith(extension)]
    return [
        name for name in names if name.removesuffix(extension) not in stems and longest_stem(name, stems) not in lacking
    ]


def files_of(folder: Path) -> list[Path]:
    """Return the files directly in a folder, sorted; none of a folder that cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted(folder / entry.name for entry in entries if entry.is_file())
    except OSError:
        return []


def longest_stem(name: str, stems: set[str]) -> str | None:
    """Return the longest of the stems that a file name begins with, before a dot."""
    while "." in name:
        name = name.rpartition(".")[0]
        if name in stems:
            return name
    return None


def can_be_caption(path: Path) -> bool:
    """Return whether a file may hold a caption, by its name and size."""
    suffix = path.suffix.lower()
    return suffix not in NO_CAPTIONS and suffix not in PICTURE_SUFFIXES and path.stat().st_size > 0


def is_text(path: Path) -> bool:
    """Return whether a file is text, in UTF-8 or another encoding that can be told."""
    try:
        return bool(read_text(path).strip())
    except UnreadableTextError as error:
        return error.encoding is not None
