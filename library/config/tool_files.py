"""What the scripts in `networks/` and `tools/` ask of the files that they are given, before anything is read."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from library.errors import UserError

if TYPE_CHECKING:
    import torch

Precision = Literal["float", "fp16", "bf16"]
WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth")
DTYPES = {"float": "float32", "fp16": "float16", "bf16": "bfloat16"}


def refuse(problems: Iterable[str]) -> None:
    """Raise UserError with all problems, one in a line, where there are any."""
    lines = list(problems)
    if lines:
        raise UserError("\n".join(lines))


def input_problems(flag: str, path: Path | None, what: str, *, folders: bool = False) -> Iterator[str]:
    """Yield what is wrong with a path to read."""
    if path is None:
        yield f"{flag} is missing: {what}"
    elif not (path.is_file() or (folders and path.is_dir())):
        yield f"{flag}: {path} is not a file{' or a folder' if folders else ''}"


def output_problems(
    flag: str, path: Path | None, inputs: Iterable[Path | None], *, folder: bool = False
) -> Iterator[str]:
    """Yield what is wrong with a path to write, given those that are read; folder: a folder is written."""
    if path is None:
        yield f"{flag} is missing: the {'folder' if folder else 'file'} to write"
        return
    sources = [source for source in inputs if source is not None and source.exists()]
    for source in sources:
        if source.is_dir() and path.resolve().is_relative_to(source.resolve()):
            yield f"{flag}: {path} is within {source}, which is read: take another place"
            return
    yield from (folder_problems if folder else file_problems)(flag, path, sources)
    yield from place_problems(flag, path)


def folder_problems(flag: str, path: Path, sources: Sequence[Path]) -> Iterator[str]:
    """Yield what is wrong with a folder to write."""
    if path.suffix.lower() in WEIGHT_SUFFIXES:
        yield (
            f"{flag} must be a folder, for the model is one, got {path}; "
            "tools/convert_diffusers20_original_sd.py makes files of folders"
        )
    elif path.exists() and not (path.is_dir() and not any(path.iterdir())):
        yield f"{flag}: {path} is there already and not empty: take another name"


def file_problems(flag: str, path: Path, sources: Sequence[Path]) -> Iterator[str]:
    """Yield what is wrong with a file to write."""
    if path.suffix.lower() not in WEIGHT_SUFFIXES:
        yield f"{flag} must end in {', '.join(WEIGHT_SUFFIXES)}, got {path}"
    elif path.is_dir():
        yield f"{flag}: {path} is a folder; name a file"
    for source in sources:
        if path.exists() and source.samefile(path):
            yield f"{flag}: {path} is one of the files to be read: take another name"


def place_problems(flag: str, path: Path) -> Iterator[str]:
    """Yield why nothing can be written at a place; folders that are missing are made later."""
    parent = next(parent for parent in (*path.absolute().parents,) if parent.exists())
    if not parent.is_dir():
        yield f"{flag}: {parent} is a file, so {path} cannot be in it"
    elif not os.access(parent, os.W_OK | os.X_OK):
        yield f"{flag}: nothing may be written to {parent}"


def ratio_problems(ratios: Sequence[float] | None, models: Sequence[Path] | None) -> Iterator[str]:
    """Yield what is wrong with the ratios of files."""
    if not models:
        yield "--models is missing: the LoRA files"
    needed, got = len(models or ()), len(ratios or ())
    if got != needed:
        yield f"--ratios must have a number for each of the {needed} files of --models, got {got}"
    if not all(math.isfinite(ratio) for ratio in ratios or ()):
        yield f"--ratios must be finite numbers, got {' '.join(map(str, ratios or ()))}"


def device_problems(device: str) -> Iterator[str]:
    """Yield what is wrong with --device; torch is asked only where it is not the CPU."""
    if device == "cpu":
        return
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        yield f"--device: there is no {device} that torch can use here; leave it out for the CPU"


def dtype_named(name: str) -> torch.dtype:
    """Return the type of an option's word."""
    import torch

    return getattr(torch, DTYPES[name])
