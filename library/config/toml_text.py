"""Reads TOML and JSON with one form of error messages, and writes TOML.

The `toml` package, which sd-scripts uses, writes invalid files for Windows paths and refuses `[1e-4, 1]`.
Python 3.10 has no `tomllib`; the package `tomli` is the same code.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.text_files import read_text


def load(path: Path) -> dict[str, Any]:
    """Return the table in a TOML file (UTF-8, with or without a byte order mark).

    Raises UserError with the file and the position of the mistake.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    text = read_text(path)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid TOML: {error}{path_hint(text, str(error), windows_path_hint)}") from None


def load_json(path: Path) -> Any:
    """Return the value in a JSON file (UTF-8, with or without a byte order mark); raises UserError if that fails."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}{path_hint(text, str(error), with_slashes)}") from None


IN_DOUBLE_QUOTES = re.compile(r'"([^"]*\\[^"]*)"')


def path_hint(text: str, error: str, hint: Callable[[str], str]) -> str:
    """Return the hint for a text with a backslash in the line that an error names; "" if it has none."""
    line = re.search(r"\bline (\d+)", error)
    found = IN_DOUBLE_QUOTES.findall(text.split("\n")[int(line[1]) - 1] if line else text)
    return f"; a backslash in double quotes begins an escape: write {hint(found[-1])}" if found else ""


def windows_path_hint(path: str) -> str:
    """Return how TOML takes a path whose backslashes begin escapes in double quotes."""
    return f"'{path}' in single quotes, or {with_slashes(path)}"


def with_slashes(path: str) -> str:
    """Return a path with slashes, which Windows takes too, and which need no escape."""
    start = re.match(r"\\*", path)
    leading = len(start[0]) if start else 0  # two begin the name of a server
    return "/" * leading + re.sub(r"\\+", "/", path[leading:])


def dump(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """Return TOML for section -> key -> value (bool, int, float, str, Path, or a tuple of them)."""
    blocks = []
    for title, values in sections.items():
        lines = [f"[{title}]", *(f"{key} = {dump_value(value)}" for key, value in values.items())]
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def dump_value(value: Any) -> str:
    """Return one value as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        text = repr(value)
        return text if any(mark in text for mark in ".en") else f"{text}.0"
    if isinstance(value, tuple | list):
        return f"[{', '.join(dump_value(item) for item in value)}]"
    # A JSON string is a TOML basic string, except that TOML requires DEL to be escaped.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
