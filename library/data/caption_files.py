"""Caption files: which one a picture has, its lines, and what is said of those that are missing, empty or not used."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from library.config.dataset import SubsetOptions
from library.data.faults import Notes
from library.data.images import face_in_name, reading_threads
from library.data.listing import beginning_of, split_name
from library.errors import named, shown
from library.files import PICTURE_SUFFIXES
from library.text_files import UnreadableTextError, read_text

# Files that are named like pictures but hold no caption: settings, metadata, caches, other pictures.
NO_CAPTIONS = (
    *(".npz", ".safetensors", ".pt", ".db", ".zip", ".lnk", ".url", ".ini", ".bak", ".tmp"),
    *(".json", ".jsonl", ".xmp", ".xml", ".html", ".htm", ".yaml", ".yml", ".toml", ".csv"),
    *(".gif", ".tif", ".tiff", ".psd", ".svg", ".mp4", ".webm"),
)

T = TypeVar("T", str, Path)

READ_AT_ONCE = 256  # files


class CaptionFile(NamedTuple):
    """The name of the caption file of a picture, or None, and its lines that are not blank, stripped."""

    name: str | None
    lines: tuple[str, ...]


NO_FILE = CaptionFile(None, ())


def stems_of(picture: str) -> list[str]:
    """Return the names without extension that a caption file of a picture can have, the first one before the others.

    A face crop `name_x_y_w_h` without a file of its own has that of `name`.
    """
    stem = split_name(picture)[0]
    crop = face_in_name(stem)
    return [stem] if crop is None else [stem, crop[0]]


def read_caption(picture: Path, extension: str) -> CaptionFile:
    """Return the caption file of a picture; raises UnreadableTextError for one that is not UTF-8."""
    names = (stem + extension for stem in stems_of(picture.name))
    name = next((name for name in names if picture.with_name(name).is_file()), None)
    return NO_FILE if name is None else CaptionFile(name, lines_of(picture.with_name(name)))


def read_captions(
    folder: Path, pictures: Sequence[str], names: Sequence[str], extension: str
) -> Iterator[CaptionFile | UnreadableTextError]:
    """Yield the caption file of each picture of a folder, or why it cannot be read; names are those of all files."""
    beginning = beginning_of(folder)
    ending = os.path.normcase(extension)
    captions = {key: name for name in names if (key := os.path.normcase(name)).endswith(ending)}

    def read(part: Sequence[str]) -> list[CaptionFile | UnreadableTextError]:
        return [read_one(picture) for picture in part]

    def read_one(picture: str) -> CaptionFile | UnreadableTextError:
        possible = (captions.get(os.path.normcase(stem + extension)) for stem in stems_of(picture))
        name = next((name for name in possible if name is not None), None)
        try:
            return NO_FILE if name is None else CaptionFile(name, lines_of(beginning + name))
        except UnreadableTextError as error:
            return error

    with reading_threads() as pool:  # in parts, for handing over a single file takes longer than to read it
        parts = [pictures[start : start + READ_AT_ONCE] for start in range(0, len(pictures), READ_AT_ONCE)]
        for files in pool.map(read, parts):
            yield from files


def lines_of(file: Path | str) -> tuple[str, ...]:
    """Return the lines of a text that are not blank, stripped; raises UnreadableTextError."""
    return tuple([stripped for line in read_text(file).splitlines() if (stripped := line.strip())])


# --------------------------------------------------------------------------------------------------------------
# What is said of them
# --------------------------------------------------------------------------------------------------------------


def note_captions(found: Mapping[str, CaptionFile], names: Sequence[str], subset: SubsetOptions, notes: Notes) -> None:
    """Note what is said of the caption files of the pictures in a subset's folder; names are those of all its files."""
    others = other_files(found, subset.folder, names, subset.caption_extension)
    if is_planned(found, subset) and not others:
        notes.tell(f"{subset.folder}: the caption of all {len(found)} pictures is {shown(subset.class_tokens)}")
    else:
        for line in [*describe_captions(found, others, subset), *describe_lonely(found, names, subset)]:
            notes.warn(line)


def is_planned(found: Mapping[str, CaptionFile], subset: SubsetOptions) -> bool:
    """Return whether class tokens are the caption of all pictures."""
    return bool(found) and bool(subset.class_tokens) and all(file.name is None for file in found.values())


def describe_captions(
    found: Mapping[str, CaptionFile], others: Mapping[str, Sequence[str]], subset: SubsetOptions
) -> Iterator[str]:
    """Yield warnings about the caption files of a subset's folder; others is what `other_files` returns."""
    extension = shown_extension(subset.caption_extension)
    option = "--caption_extension {}, or caption_extension in the dataset file"
    way = f"rename these to {subset.caption_extension}" if any(file.lines for file in found.values()) else option
    missing = [picture for picture, file in found.items() if file.name is None]
    if missing:
        yield (
            f"{subset.folder}: {len(missing)} of {len(found)} pictures have no {extension} file and "
            f"{caption_without_file(subset)}: {named(missing)}{remedies(others, missing, way)}"
        )
    empty = [picture for picture, file in found.items() if file.name is not None and not file.lines]
    if empty:
        unused = f", and not {shown(subset.class_tokens)}" if subset.class_tokens else ""
        yield (
            f"{subset.folder}: the {extension} files of {len(empty)} of {len(found)} pictures are empty, so that their "
            f"caption is empty{unused}: {named(empty)}{remedies(others, empty, way)}"
        )
    longer = [picture for picture, file in found.items() if len(file.lines) > 1]
    if longer and not subset.enable_wildcard:
        yield (
            f"{subset.folder}: the {extension} files of {len(longer)} of {len(found)} pictures have several lines, of "
            f"which only the first is used: {named(longer)}; --enable_wildcard takes one at random"
        )


def describe_lonely(found: Mapping[str, CaptionFile], names: Sequence[str], subset: SubsetOptions) -> Iterator[str]:
    """Yield a warning about the files of a subset's folder with the captions' extension that belong to no picture."""
    lonely = files_without_picture(found, names, subset.caption_extension)
    if lonely:
        extension = shown_extension(subset.caption_extension)
        yield f"{subset.folder}: {len(lonely)} {extension} files belong to no picture: {named(lonely)}"


def caption_without_file(subset: SubsetOptions) -> str:
    """Return which caption a picture gets that has no caption file."""
    return f"get the caption {shown(subset.class_tokens)}" if subset.class_tokens else "an empty caption"


def remedies(others: Mapping[str, Sequence[T]], lacking: Iterable[T], way: str) -> str:
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


def shown_extension(extension: str) -> str:
    """Return an extension, in quotes if it has white space, which could be taken for several extensions."""
    return repr(extension) if any(character.isspace() or character == "," for character in extension) else extension


def other_files(
    found: Mapping[str, CaptionFile], folder: Path, names: Sequence[str], extension: str
) -> dict[str, list[str]]:
    """Return ending -> pictures of a folder that lack a caption and have a text of that ending, most pictures first.

    names are those of all files in the folder. The ending is what follows the picture's name without extension:
    `.txt`, `.TXT`, or `.png.txt` of `a.png.txt`.
    """
    lacking: dict[str, list[str]] = {}
    for picture, file in found.items():
        for stem in [] if file.lines else stems_of(picture):
            lacking.setdefault(stem, []).append(picture)
    if not lacking:
        return {}
    stems = {stem for picture in found for stem in stems_of(picture)}
    by_ending: dict[str, dict[str, str]] = {}
    for name in names:
        stem = longest_stem(name, stems) or ""
        ending = name.removeprefix(stem)
        if stem in lacking and ending != extension and can_be_caption(folder, name):
            by_ending.setdefault(ending, {}).update(dict.fromkeys(lacking[stem], name))
    texts = {ending: files for ending, files in by_ending.items() if is_text(folder / next(iter(files.values())))}
    return {ending: list(files) for ending, files in sorted(texts.items(), key=lambda item: -len(item[1]))}


def files_without_picture(found: Mapping[str, CaptionFile], names: Sequence[str], extension: str) -> list[str]:
    """Return those of the names with the captions' extension that are neither used nor found by `other_files`."""
    stems = {stem for picture in found for stem in stems_of(picture)}
    lonely = [name for name in names if name.endswith(extension) and name.removesuffix(extension) not in stems]
    lacking = {stem for picture, file in found.items() if not file.lines for stem in stems_of(picture)}
    return [name for name in lonely if longest_stem(name, stems) not in lacking]


def longest_stem(name: str, stems: set[str]) -> str | None:
    """Return the longest of the stems that a file name begins with, before a dot."""
    while "." in name:
        name = name.rpartition(".")[0]
        if name in stems:
            return name
    return None


def can_be_caption(folder: Path, name: str) -> bool:
    """Return whether a file in a folder may hold a caption, by its name and size."""
    suffix = split_name(name)[1].lower()
    return suffix not in NO_CAPTIONS and suffix not in PICTURE_SUFFIXES and (folder / name).stat().st_size > 0


def is_text(path: Path) -> bool:
    """Return whether a file is text, in UTF-8 or another encoding that can be told."""
    try:
        return bool(read_text(path).strip())
    except UnreadableTextError as error:
        return error.encoding is not None
