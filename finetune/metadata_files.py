"""Metadata files: JSON objects of picture -> {"caption", "tags", ...}, as `library.data.sources` reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from library.config.kinds import read_str, why_not
from library.config.toml_text import load_json
from library.errors import UserError, shown
from library.files import replacing

Entries = dict[str, dict[str, Any]]


def check_json_path(path: Path, label: str, *, exists: bool) -> None:
    """Raise UserError for a path that does not end in `.json`, or that must exist and does not."""
    if path.suffix.lower() != ".json":
        raise UserError(f"{label} must be the name of a .json file, got {path}")
    if exists and not path.is_file():
        raise UserError(f"{label}: {why_not(path, 'a file')}")


def read_metadata(path: Path) -> Entries:
    """Return the entries of a metadata file by picture; raises UserError for a damaged file."""
    table = load_json(path)
    if not isinstance(table, dict):
        raise UserError(f"{path} must be an object of picture names, got {type(table).__name__}")
    for name, values in table.items():
        try:
            for text in (name, *(values.get(key) or "" for key in ("caption", "tags"))):
                read_str(text)
        except (AttributeError, ValueError):
            raise UserError(f"{path}: {shown(name)} must have texts as caption and tags, got {shown(values)}") from None
    return table


def write_metadata(path: Path, entries: Entries) -> None:
    """Write a metadata file completely or not at all, in UTF-8 without escapes."""
    text = json.dumps(entries, indent=2, ensure_ascii=False)
    try:
        content = f"{text}\n".encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{shown(text[max(0, error.start - 40) : error.end])} is no UTF-8 text and cannot be written to {path}: "
            "rename that picture"
        ) from None
    with replacing(path) as temporary:
        temporary.write_bytes(content)
