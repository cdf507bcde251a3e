"""What the scripts in `networks/` and `tools/` ask of the files that they are given, before anything is read."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from library.errors import Problems, UserError

if TYPE_CHECKING:
    import torch

Precision = Literal["float", "fp16", "bf16"]
WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth")
DTYPES = {"float": "float32", "fp16": "float16", "bf16": "bfloat16"}


def check_output(flag: str, path: Path, problems: Problems, *, folder: bool = False) -> None:
    """Add to problems why a weight file, or a folder of a model, cannot be written to a path."""
    problems.run(check_new_folder if folder else check_weight_file, flag, path)
    problems.run(check_place, flag, path)


def check_apart(flag: str, path: Path, inputs: Iterable[Path | None]) -> None:
    """Raise UserError for a path to write that is one of the inputs, or within one."""
    for source in inputs:
        if source is None or not source.exists():
            continue
        if source.is_dir() and path.resolve().is_relative_to(source.resolve()):
            raise UserError(f"{flag}: {path} is within {source}, which is read: take another place")
        if path.is_file() and source.samefile(path):
            raise UserError(f"{flag}: {path} is one of the files to be read: take another name")


def check_new_folder(flag: str, path: Path) -> None:
    """Raise UserError for a path that is no name of a new folder."""
    if path.suffix.lower() in WEIGHT_SUFFIXES:
        raise UserError(
            f"{flag} must be a folder, for the model is one, got {path}; "
            "tools/convert_diffusers20_original_sd.py makes files of folders"
        )
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{flag}: {path} is there already and not empty: take another name")


def check_weight_file(flag: str, path: Path) -> None:
    """Raise UserError for a path that is no name of a weight file."""
    if path.suffix.lower() not in WEIGHT_SUFFIXES:
        raise UserError(f"{flag} must end in {', '.join(WEIGHT_SUFFIXES)}, got {path}")
    if path.is_dir():
        raise UserError(f"{flag}: {path} is a folder; name a file")


def check_place(flag: str, path: Path) -> None:
    """Raise UserError where nothing can be written at a path; folders that are missing are made later."""
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise UserError(f"{flag}: {parent} is a file, so {path} cannot be in it")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{flag}: nothing may be written to {parent}")


def check_ratios(ratios: Sequence[float], models: Sequence[Path], problems: Problems) -> None:
    """Add to problems what is wrong with the ratios of LoRA files."""
    if len(ratios) != len(models):
        problems.add(f"--ratios must have a number for each of the {len(models)} files of --models, got {len(ratios)}")
    if not all(math.isfinite(ratio) for ratio in ratios):
        problems.add(f"--ratios must be finite numbers, got {' '.join(map(str, ratios))}")


def check_device(device: str) -> None:
    """Raise UserError for a --device that is not there; torch is asked only where it is not the CPU."""
    if device == "cpu":
        return
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device: there is no {device} that torch can use here; leave it out for the CPU") from None


def dtype_named(name: str) -> torch.dtype:
    """Return the type of an option's word."""
    import torch

    return getattr(torch, DTYPES[name])
