"""Where pictures come from: folders with caption files, and metadata files that list pictures with captions."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from library.config.dataset import SubsetOptions
from library.config.options import read_str
from library.data.captions import read_caption
from library.data.images import Mask, list_pictures
from library.errors import UserError, shown
from library.files import PICTURE_SUFFIXES

MOST_NAMED = 5  # entries named in a message


@dataclasses.dataclass(frozen=True)
class Listed:
    """One picture of a subset with its caption; tags is what tag statistics count."""

    path: Path
    subset: SubsetOptions
    caption: str
    tags: str


def list_subset(subset: SubsetOptions) -> list[Listed]:
    """Return the pictures of a subset, sorted by path; raises UserError for folders and files that do not serve."""
    if subset.metadata_file is not None:
        return sorted(read_metadata(subset), key=lambda entry: entry.path)
    listed = []
    for path in list_pictures(subset.image_dir):
        caption = read_caption(path, subset)
        listed.append(Listed(path, subset, caption, caption))
    return listed


# --------------------------------------------------------------------------------------------------------------
# Metadata files
# --------------------------------------------------------------------------------------------------------------


def read_metadata(subset: SubsetOptions) -> list[Listed]:
    """Return the pictures that a metadata file lists.

    A `.json` file is an object of picture -> {"caption", "tags"}, a `.jsonl` file has an object with
    "image_path", "caption" and "tags" on each line. A picture is a path, absolute or below image_dir; its
    extension may be left out. Raises UserError for a damaged file and for pictures that are not there.
    """
    entries = read_entries(subset.metadata_file)
    found, missing = [], []
    for name, values in entries.items():
        path = find_picture(name, subset)
        if path is None:
            missing.append(name)
        else:
            found.append(Listed(path, subset, joined_caption(values, subset), values["tags"]))
    if missing:
        raise UserError(
            f"{subset.metadata_file}: {len(missing)} of {len(entries)} pictures are not there "
            f"(they are looked for in {picture_folder(subset)}): {', '.join(missing[:MOST_NAMED])}"
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
    return {name: _entry(path, name, values) for name, values in table.items()}


def _by_line(path: Path, text: str) -> dict[str, Any]:
    table = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise UserError(f"metadata_file {path} cannot be read: line {number}: {error}") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("image_path"), str):
            raise UserError(
                f'metadata_file {path}: line {number} must be an object with a text as "image_path", got {shown(entry)}'
            )
        table[entry["image_path"]] = entry
    return table


def _entry(path: Path, name: str, values: Any) -> dict[str, str]:
    try:
        return {key: read_str(values.get(key) or "") for key in ("caption", "tags")}
    except (AttributeError, ValueError):
        raise UserError(
            f"metadata_file {path}: {name} must have texts as caption and tags, got {shown(values)}"
        ) from None


def picture_folder(subset: SubsetOptions) -> Path:
    """Return where the pictures of a metadata file lie: in image_dir, else beside the file."""
    return subset.image_dir or subset.metadata_file.parent


def find_picture(name: str, subset: SubsetOptions) -> Path | None:
    """Return the file of a picture's name, with or without extension, or None."""
    path = Path(name)
    if not path.is_absolute():
        path = picture_folder(subset) / path
    endings = [ending for extension in PICTURE_SUFFIXES for ending in (extension, extension.upper())]
    candidates = (Path(f"{path}{ending}") for ending in ("", *endings))
    try:
        return next((candidate for candidate in candidates if candidate.is_file()), None)
    except OSError:  # a name that is too long
        return None


def joined_caption(values: dict[str, str], subset: SubsetOptions) -> str:
    """Return caption and tags as one caption; with wildcards the tags follow each line of the caption."""
    caption, tags, separator = values["caption"].strip(), values["tags"].strip(), subset.caption_separator
    if not subset.enable_wildcard:
        return separator.join(part for part in (caption.split("\n")[0], tags) if part)
    tags = separator.join(line.strip() for line in tags.splitlines() if line.strip())
    lines = [line.strip() for line in caption.splitlines() if line.strip()] or [""]
    return "\n".join(separator.join(part for part in (line, tags) if part) for line in lines)


# --------------------------------------------------------------------------------------------------------------
# Masks
# --------------------------------------------------------------------------------------------------------------


def find_masks(listed: list[Listed]) -> dict[Path, Mask]:
    """Return picture -> its loss mask: its own opacity, or the picture of its name in the masks' folder.

    All are of one subset. Raises UserError that lists the pictures without a mask.
    """
    if not listed:
        return {}
    subset = listed[0].subset
    if subset.conditioning_data_dir is None:
        return {entry.path: Mask(entry.path, "alpha") for entry in listed} if subset.alpha_mask else {}
    by_stem = {path.stem: path for path in list_pictures(subset.conditioning_data_dir)}
    missing = [entry.path.name for entry in listed if entry.path.stem not in by_stem]
    if missing:
        raise UserError(
            f"conditioning_data_dir {subset.conditioning_data_dir}: {len(missing)} of {len(listed)} pictures have no "
            f"mask of their name: {', '.join(missing[:MOST_NAMED])}"
        )
    return {entry.path: Mask(by_stem[entry.path.stem], "red") for entry in listed}
