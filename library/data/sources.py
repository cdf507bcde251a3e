"""The sources of pictures: folders with caption files, and metadata files that list pictures with captions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from library.config.dataset import SubsetOptions
from library.config.options import read_str
from library.data.captions import Caption, read_caption
from library.data.images import Mask, list_pictures
from library.errors import UserError, shown
from library.files import PICTURE_SUFFIXES

MOST_NAMED = 5  # pictures named in a message


class Listed(NamedTuple):
    """One picture of a subset with its caption; tag statistics count the tags in the texts of tags."""

    path: Path
    subset: SubsetOptions
    caption: Caption
    tags: tuple[str, ...]
    mask: Mask | None

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of picture and mask."""
        return (self.path,) if self.mask is None else (self.path, self.mask.path)


def list_subset(subset: SubsetOptions) -> list[Listed]:
    """Return the pictures of a subset, sorted by path; raises UserError for folders and files that cannot be used."""
    if subset.metadata_file is not None:
        captions = sorted(read_metadata(subset.metadata_file, subset), key=lambda row: row[0])
    else:
        read = ((path, caption_of(path, subset)) for path in list_pictures(subset.folder))
        captions = [(path, caption, caption) for path, caption in read]
    masks = find_masks(subset, [path for path, _, _ in captions])
    return [Listed(path, subset, caption, tags, masks.get(path)) for path, caption, tags in captions]


def caption_of(picture: Path, subset: SubsetOptions) -> Caption:
    """Return the caption of a picture in a folder: that of its caption file, else the class token, else ("",).

    Of a file the first line counts, or with wildcards every line that is not blank.
    """
    lines = read_caption(picture, subset.caption_extension)
    if lines is None:
        return tuple((subset.class_tokens or "").split("\n"))
    return tuple(lines if subset.enable_wildcard else lines[:1]) or ("",)


# --------------------------------------------------------------------------------------------------------------
# Metadata files
# --------------------------------------------------------------------------------------------------------------


def read_metadata(file: Path, subset: SubsetOptions) -> list[tuple[Path, Caption, tuple[str, ...]]]:
    """Return (picture, caption, tags) for the pictures that a metadata file lists; the tags as lines.

    A `.json` file is an object of picture -> {"caption", "tags"}, a `.jsonl` file has an object with
    "image_path", "caption" and "tags" on each line. A picture is a path, absolute or below image_dir; its
    extension may be missing. Raises UserError for a damaged file and for missing pictures.
    """
    found, missing = [], []
    entries = read_entries(file)
    for name, values in entries.items():
        path = find_picture(name, subset.folder)
        if path is None:
            missing.append(name)
        else:
            found.append((path, joined_caption(values, subset), tuple(values["tags"].split("\n"))))
    if missing:
        raise UserError(
            f"{file}: {len(missing)} of {len(entries)} pictures are not there "
            f"(they are looked for in {subset.folder}): {', '.join(missing[:MOST_NAMED])}"
        )
    return found


def read_entries(path: Path) -> dict[str, dict[str, str]]:
    """Return picture name -> {"caption", "tags"} as texts."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        table = _by_line(path, text) if path.suffix.lower() == ".jsonl" else json.loads(text)
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"metadata_file {path} cannot be read: {error}") from None
    if not isinstance(table, dict):
        raise UserError(f"metadata_file {path} must be an object of picture names, got {type(table).__name__}")
    return {name: _texts(path, name, values) for name, values in table.items()}


def _by_line(path: Path, text: str) -> dict[str, Any]:
    table = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"metadata_file {path} cannot be read: line {number}: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("image_path"), str):
            raise UserError(
                f'metadata_file {path}: line {number} must be an object with a text as "image_path", got {shown(row)}'
            )
        table[row["image_path"]] = row
    return table


def _texts(path: Path, name: str, values: Any) -> dict[str, str]:
    try:
        return {key: read_str(values.get(key) or "") for key in ("caption", "tags")}
    except (AttributeError, ValueError):
        raise UserError(
            f"metadata_file {path}: {name} must have texts as caption and tags, got {shown(values)}"
        ) from None


def find_picture(name: str, folder: Path) -> Path | None:
    """Return the file of a picture's name, with or without extension, or None; folder is that of relative names."""
    path = folder / name
    endings = [ending for extension in PICTURE_SUFFIXES for ending in (extension, extension.upper())]
    candidates = (Path(f"{path}{ending}") for ending in ("", *endings))
    try:
        return next((candidate for candidate in candidates if candidate.is_file()), None)
    except OSError:  # a name that is too long
        return None


def joined_caption(values: Mapping[str, str], subset: SubsetOptions) -> Caption:
    """Return caption and tags as one caption; with wildcards the tags follow each line of the caption."""
    caption, tags, separator = values["caption"].strip(), values["tags"].strip(), subset.caption_separator
    if not subset.enable_wildcard:
        return tuple(separator.join(part for part in (caption.split("\n")[0], tags) if part).split("\n"))
    tags = separator.join(line.strip() for line in tags.splitlines() if line.strip())
    lines = [line.strip() for line in caption.splitlines() if line.strip()] or [""]
    return tuple(separator.join(part for part in (line, tags) if part) for line in lines)


# --------------------------------------------------------------------------------------------------------------
# Masks
# --------------------------------------------------------------------------------------------------------------


def find_masks(subset: SubsetOptions, pictures: Sequence[Path]) -> dict[Path, Mask]:
    """Return picture -> its loss mask: its own opacity, or the picture of its name in the masks' folder.

    Raises UserError that lists the pictures without a mask.
    """
    folder = subset.conditioning_data_dir
    if folder is None or not pictures:
        return {path: Mask(path, "alpha") for path in pictures} if subset.alpha_mask else {}
    by_stem = {path.stem: path for path in list_pictures(folder)}
    missing = [path.name for path in pictures if path.stem not in by_stem]
    if missing:
        raise UserError(
            f"conditioning_data_dir {folder}: {len(missing)} of {len(pictures)} pictures have no "
            f"mask of their name: {', '.join(missing[:MOST_NAMED])}"
        )
    return {path: Mask(by_stem[path.stem], "red") for path in pictures}
