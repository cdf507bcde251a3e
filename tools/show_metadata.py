"""Print the metadata of .safetensors files as JSON.

python tools/show_metadata.py --model lora.safetensors
python tools/show_metadata.py --model a.safetensors b.safetensors --nested

Of one file its metadata are printed, of several an object of file -> metadata. Keys are sorted. Values are texts, as
they stand in the file; --nested shows those that hold JSON, such as tag frequencies, as what they hold. The exit code
is 1 if a file has no metadata, 2 if one cannot be read.
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
from library.config.options import REQUIRED, option
from library.errors import Problems, UserError
from library.logs import FAILURE, run_script
from library.pickles import PICKLE_SUFFIXES
from library.safetensors_io import read_header

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilesConfig:
    """Metadata."""

    model: tuple[Path, ...] = option(REQUIRED, "files to read (.safetensors)", missing="the .safetensors files to read")
    nested: bool = option(False, "show values that hold JSON as what they hold, not as one line of text")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """What is shown of which files."""

    files: FilesConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with a command line; return the exit code."""
    files = parse(ShowConfig, argv, description=__doc__).files
    found = read_all(files.model)
    told = {str(path): metadata for path, metadata in found.items() if metadata}
    for path in found:
        if str(path) not in told:
            logger.error("%s has no metadata", path)
    if told:
        write(shown_as(told, single=len(found) == 1, nested=files.nested))
    return 0 if len(told) == len(found) else FAILURE


def read_all(paths: Sequence[Path]) -> dict[Path, dict[str, str]]:
    """Return path -> metadata; raises UserError that lists the files that cannot be read."""
    problems = Problems()
    found = {path: problems.run(read_one, path) for path in paths}
    problems.raise_if_any()
    return {path: metadata for path, metadata in found.items() if metadata is not None}


def read_one(path: Path) -> dict[str, str]:
    """Return the metadata of a file; raises UserError for one that is no safetensors file."""
    if not path.is_file():
        raise UserError(f"--model: {path} is not a file")
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise UserError(f"--model: {path} is a {path.suffix} file, which has no metadata: give a .safetensors file")
    return read_header(path).metadata


def shown_as(told: Mapping[str, Mapping[str, str]], *, single: bool, nested: bool) -> str:
    """Return the JSON text: the metadata of a single file, or path -> metadata."""
    entries = {
        path: {key: unfolded(text) if nested else text for key, text in metadata.items()}
        for path, metadata in told.items()
    }
    content = next(iter(entries.values())) if single else entries
    return json.dumps(content, indent=4, sort_keys=True, ensure_ascii=False)


def unfolded(text: Any) -> Any:
    """Return what a text holds if it is a JSON object or list, else the text itself."""
    if not isinstance(text, str) or not text.lstrip().startswith(("{", "[")):
        return text  # a number stays as it is written: 1e-4, or a hash that has only digits
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def write(text: str) -> None:
    """Write a text to standard output in UTF-8, whatever the machine's own encoding is."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    sys.stdout.write(f"{text}\n")


if __name__ == "__main__":
    run_script(main)
