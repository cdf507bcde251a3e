"""Print the metadata of .safetensors files as JSON.

python tools/show_metadata.py --model lora.safetensors
python tools/show_metadata.py --model a.safetensors b.safetensors --nested

For one file its metadata are printed, for several an object of file -> metadata. Keys are sorted. Values are the texts
in the file; with --nested those that hold JSON, such as tag frequencies, are printed as JSON. The exit code is 1 if a
file has no metadata, 2 if one cannot be read.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a script, from any folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.command_line import parse
from library.config.kinds import why_not
from library.config.options import REQUIRED, option
from library.errors import Problems, UserError
from library.file_kinds import PICKLE, weight_format
from library.logs import FAILURE, run_script
from library.safetensors_io import read_header

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShowOptions:
    """Metadata."""

    model: tuple[Path, ...] = option(REQUIRED, "files to read (.safetensors)", missing="the .safetensors files to read")
    nested: bool = option(False, "print values that hold JSON as JSON, not as one line of text")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with a command line; return the exit code."""
    options = parse(ShowOptions, argv, description=__doc__)
    problems = Problems()
    found = {str(path): problems.run(read_one, path) for path in options.model}
    problems.raise_if_any()
    shown = {path: metadata for path, metadata in found.items() if metadata}
    for path in found:
        if path not in shown:
            logger.error("%s has no metadata", path)
    if shown:
        write(as_json(shown, single=len(found) == 1, nested=options.nested))
    return 0 if len(shown) == len(found) else FAILURE


def read_one(path: Path) -> dict[str, str]:
    """Return the metadata of a file; raises UserError for anything but a safetensors file."""
    if not path.is_file():
        raise UserError(f"--model: {why_not(path, 'a file')}")
    if weight_format(path) == PICKLE:
        raise UserError(f"--model: {path} is a pickle of torch, which has no metadata: give a .safetensors file")
    return read_header(path).metadata


def as_json(shown: Mapping[str, Mapping[str, str]], *, single: bool, nested: bool) -> str:
    """Return the JSON text: the metadata of a single file, or path -> metadata."""
    entries = {
        path: {key: unfolded(text) if nested else text for key, text in metadata.items()}
        for path, metadata in shown.items()
    }
    content = next(iter(entries.values())) if single else entries
    return json.dumps(content, indent=4, sort_keys=True, ensure_ascii=False)


def unfolded(text: Any) -> Any:
    """Return the object or list that a text holds as JSON, or the text itself."""
    if not isinstance(text, str) or not text.lstrip().startswith(("{", "[")):
        return text  # numbers are not read: 1e-4 and hashes of digits would change
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def write(text: str) -> None:
    """Write a text to standard output in UTF-8, whatever encoding the system has."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    sys.stdout.write(f"{text}\n")


if __name__ == "__main__":
    run_script(main)
