"""Options of the scripts in `networks/` and `tools/` that name files, and checks of these files before reading."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from library.config.options import REQUIRED, option
from library.errors import LessMemory, Problems, UserError

if TYPE_CHECKING:
    import torch

Precision = Literal["float", "fp16", "bf16"]
LESS_MEMORY = LessMemory("leave out --device, so that the CPU and main memory are used")  # of scripts with --device
WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth")
DTYPES = {"float": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertedLora:
    """Files."""

    model: Path = option(REQUIRED, "LoRA file", missing="the LoRA file", reads="a file")
    save_to: Path = option(REQUIRED, "LoRA file to write", missing="the file to write")

    def check_save_to(self, problems: Problems) -> None:
        """Add to problems what is wrong with --save_to."""
        check_output("--save_to", self.save_to, problems)
        check_apart("--save_to", self.save_to, (self.model,))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergedLoras:
    """Files."""

    save_to: Path = option(REQUIRED, "LoRA file to write", missing="the file to write")
    models: tuple[Path, ...] = option(REQUIRED, "LoRA files", missing="the LoRA files", reads="a file")
    ratios: tuple[float, ...] = option((), "strength of each, of any sign")
    lbws: tuple[str, ...] | None = option(
        None, "weights by block for each LoRA file: JSON lists of 12 or 20 (SDXL), 17 or 26 numbers"
    )
    no_metadata: bool = option(False, "write no metadata about the files that were merged")

    def check_save_to(self, problems: Problems) -> None:
        """Add to problems what is wrong with --save_to."""
        check_output("--save_to", self.save_to, problems)
        check_apart("--save_to", self.save_to, self.models)

    def check_ratios(self, problems: Problems) -> None:
        """Add to problems what is wrong with --ratios."""
        count, ratios = len(self.models), self.ratios
        if len(ratios) != count:
            problems.add(f"--ratios must have a number for each of the {count} files of --models, got {len(ratios)}")
        if not all(math.isfinite(ratio) for ratio in ratios):
            problems.add(f"--ratios must be finite numbers, got {' '.join(map(str, ratios))}")


def check_output(flag: str, path: Path, problems: Problems, *, folder: bool = False) -> None:
    """Add to problems why a weight file, or the folder of a model, cannot be written to a path."""
    problems.run(check_new_folder if folder else check_weight_file, flag, path)
    problems.run(check_place, flag, path)


def check_apart(flag: str, path: Path, inputs: Iterable[Path | None]) -> None:
    """Raise UserError if the path to write is one of the inputs, or within one."""
    for source in inputs:
        if source is None or not source.exists():
            continue
        if source.is_dir() and path.resolve().is_relative_to(source.resolve()):
            raise UserError(f"{flag}: {path} is within {source}, which is an input: choose another path")
        if path.is_file() and source.samefile(path):
            raise UserError(f"{flag}: {path} is one of the inputs: choose another name")


def check_new_folder(flag: str, path: Path) -> None:
    """Raise UserError if a path has the suffix of a weight file, or is not a new or empty folder."""
    if path.suffix.lower() in WEIGHT_SUFFIXES:
        raise UserError(
            f"{flag} must be a folder, because the model is one, got {path}; "
            "tools/convert_diffusers20_original_sd.py converts folders to files"
        )
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{flag}: {path} exists and is not empty: take another name")


def check_weight_file(flag: str, path: Path) -> None:
    """Raise UserError if a path does not have the suffix of a weight file, or is a folder."""
    if path.suffix.lower() not in WEIGHT_SUFFIXES:
        raise UserError(f"{flag} must end in {', '.join(WEIGHT_SUFFIXES)}, got {path}")
    if path.is_dir():
        raise UserError(f"{flag}: {path} is a folder; name a file")


def check_place(flag: str, path: Path) -> None:
    """Raise UserError if nothing can be written at a path; missing folders are created later."""
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise UserError(f"{flag}: {parent} is a file, so {path} cannot be in it")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{flag}: there is no permission to write to {parent}")


def check_device(device: str) -> None:
    """Raise UserError for a --device that torch cannot use; torch is imported only if it is not the CPU."""
    if device == "cpu":
        return
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device: there is no {device} that torch can use here; omit --device for the CPU") from None


def dtype_named(name: str) -> torch.dtype:
    """Return the type that an option names."""
    import torch

    return getattr(torch, DTYPES[name])


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankOptions:
    """Ranks."""

    new_rank: int = option(4, "rank of the written file; with --dynamic_method the largest", minimum=1)
    new_conv_rank: int | None = option(
        None, "the same for convolutions with kernels larger than 1x1; unset: --new_rank", minimum=1
    )
    dynamic_method: Literal["sv_ratio", "sv_fro", "sv_cumulative"] | None = option(
        None, "choose the rank of each module by its singular values: ratio to the largest, Frobenius norm, sum"
    )
    dynamic_param: float | None = option(None, "target of --dynamic_method: above 1 for sv_ratio, else up to 1")

    def rank_of(self, *, is_large_conv: bool) -> int:
        """Return the rank for a linear layer or 1x1 convolution, or for a larger convolution."""
        return self.new_conv_rank if is_large_conv and self.new_conv_rank is not None else self.new_rank


def check_ranks(options: RankOptions) -> None:
    """Raise UserError for --dynamic_method and --dynamic_param that do not fit together."""
    method, target = options.dynamic_method, options.dynamic_param
    if method is None and target is not None:
        raise UserError(f"--dynamic_param {target:g} needs --dynamic_method: sv_ratio, sv_fro or sv_cumulative")
    if method is not None and target is None:
        raise UserError(f"--dynamic_method {method} needs --dynamic_param: its target")
    if method is None or target is None:
        return
    if method == "sv_ratio" and not target > 1:
        raise UserError(f"--dynamic_param must be above 1 for sv_ratio, got {target:g}")
    if method != "sv_ratio" and not 0 < target <= 1:
        raise UserError(f"--dynamic_param must be above 0 and at most 1 for {method}, got {target:g}")


def check_quantile(quantile: float | None) -> None:
    """Raise UserError for a --clamp_quantile outside (0, 1]."""
    if quantile is not None and not 0 < quantile <= 1:
        raise UserError(f"--clamp_quantile must be above 0 and at most 1, got {quantile:g}")
