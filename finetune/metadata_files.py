"""Metadata files: JSON objects of picture -> {"caption", "tags", ...}, as `library.data.sources` reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from library.config.options import read_str
from library.errors import UserError, shown

TEXTS = ("caption", "tags")

Entries = dict[str, dict[str, Any]]


def check_json_path(path: Path, label: str, *, exists: bool) -> None:
    """Raise UserError for a path that is no `.json` file, or that does not exist where it must."""
    if path.suffix.lower() != ".json":
        raise UserError(f"{label} must be the name of a .json file, got {path}")
    if exists and not path.is_file():
        raise UserError(f"{label}: {path} is not a file")


def read_metadata(path: Path) -> Entries:
    """Return all that a metadata file says of its pictures; raises UserError for a damaged one."""
    try:
        table = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(table, dict):
        raise UserError(f"{path} must be an object of picture names, got {type(table).__name__}")
    for name, values in table.items():
        check_entry(path, name, values)
    return table


def check_entry(path: Path, name: str, values: Any) -> None:
    """Raise UserError for what is no entry of a picture: an object, its caption and tags texts."""
    try:
        for text in (name, *(values.get(key) or "" for key in TEXTS)):
            read_str(text)
    except (AttributeError, ValueError):
        raise UserError(f"{path}: {shown(name)} must have texts as caption and tags, got {shown(values)}") from None


def write_metadata(path: Path, entries: Entries) -> None:
    """Write a metadata file whole or not at all: UTF-8, letters of all scripts as they are."""
    from library.files import replacing

    text = json.dumps(entries, indent=2, ensure_ascii=False)
    try:
        content = f"{text}\n".encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{shown(text[max(0, error.start - 40) : error.end])} is no UTF-8 text and cannot be written to {path}: "
            "rename that file"
        ) from None
    with replacing(path) as temporary:
        temporary.write_bytes(content)
