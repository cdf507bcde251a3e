"""Cut every rank out of a DyLoRA file: one ordinary LoRA file for each.

python networks/extract_lora_from_dylora.py --model dylora.safetensors --save_to out/split.safetensors --unit 4

writes out/split-0004.safetensors, out/split-0008.safetensors, ... up to the rank of the file. Alpha stays as it is,
so that a reader's alpha / b is the scale with which rank b was trained.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a script, from any folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.options import option, parse
from library.errors import UserError
from library.logs import run_script

logger = logging.getLogger(__name__)

DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilesConfig:
    """Files."""

    model: Path | None = option(None, "DyLoRA file (.safetensors, .ckpt or .pt)")
    save_to: Path | None = option(None, "name of the files to write; the rank goes before the extension")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RanksConfig:
    """Ranks."""

    unit: int | None = option(None, "smallest rank, and step to the next; unset: the unit of the training", minimum=1)
    sd_scripts_alpha: bool = option(
        False, "for files trained by sd-scripts: write the alpha with which it trained each rank"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """What is cut out of which file."""

    files: FilesConfig
    ranks: RanksConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with a command line; return the exit code."""
    config = parse(ExtractConfig, argv, description=__doc__)
    check_files(config.files)

    from tqdm import tqdm

    from library.weight_file import open_weights
    from networks.lora import write_weights

    file = open_weights(config.files.model)
    weights, metadata = dict(file.tensors(file.shapes)), dict(file.metadata)
    full = full_rank(file.shapes, config.files.model)
    ranks = ranks_to_write(config.ranks.unit or unit_of(metadata), full, config.files.model)
    tell_of_scale(metadata, config.ranks)
    for rank in tqdm(ranks, desc="ranks", unit="file"):
        part = truncated(weights, rank, full, matching_alpha=config.ranks.sd_scripts_alpha)
        path = name_for(config.files.save_to, rank)
        write_weights(path, part, described(metadata, rank, full))
        logger.info("rank %d: %s", rank, path)
    return 0


def check_files(files: FilesConfig) -> None:
    """Raise UserError for files that are missing or cannot be written so."""
    if files.model is None:
        raise UserError("--model is missing: the DyLoRA file")
    if not files.model.is_file():
        raise UserError(f"--model: {files.model} is not a file")
    if files.save_to is None:
        raise UserError("--save_to is missing: the name of the files to write, such as out/split.safetensors")
    if files.save_to.suffix.lower() not in (".safetensors", ".ckpt", ".pt"):
        raise UserError(f"--save_to must end in .safetensors, .ckpt or .pt, got {files.save_to}")


def full_rank(shapes: Mapping[str, Sequence[int]], path: Path) -> int:
    """Return the rank of a file with such tensors; raises UserError for a file that is no DyLoRA file."""
    ranks = {shape[0] for name, shape in shapes.items() if name.endswith(DOWN)}
    if not ranks:
        raise UserError(f"--model: {path} is no LoRA file: it has no tensor named ...{DOWN}")
    if len(ranks) > 1:
        raise UserError(f"--model: {path} has modules of the ranks {sorted(ranks)}; a DyLoRA has one rank")
    return ranks.pop()


def unit_of(metadata: Mapping[str, str]) -> int:
    """Return the unit that a file was trained with, from its metadata."""
    try:
        return int(json.loads(metadata["ss_network_args"])["unit"])
    except (KeyError, ValueError, TypeError):
        raise UserError("--unit is missing, and the file does not tell what it was trained with: give --unit") from None


def ranks_to_write(unit: int, full: int, path: Path) -> list[int]:
    """Return the ranks unit, 2 unit, ... up to the full one."""
    if full % unit:
        divisors = ", ".join(str(number) for number in range(1, full + 1) if full % number == 0)
        raise UserError(f"--unit {unit} does not divide the rank of {path}, {full}; these do: {divisors}")
    return list(range(unit, full + 1, unit))


def tell_of_scale(metadata: Mapping[str, str], ranks: RanksConfig) -> None:
    """Tell where a file was trained by sd-scripts, whose scale is another."""
    by_sd_scripts = metadata.get("modelspec.implementation_version", "").startswith("sd-scripts/")
    if by_sd_scripts and not ranks.sd_scripts_alpha:
        logger.warning(
            "this file was trained by sd-scripts, which trains rank b with alpha / sqrt(R b): with its alpha a reader "
            "applies lower ranks more strongly than they were trained; --sd_scripts_alpha writes the matching one"
        )
    if ranks.sd_scripts_alpha and metadata and not by_sd_scripts:
        logger.warning("--sd_scripts_alpha: the metadata do not say that sd-scripts trained this file")


def truncated(
    weights: Mapping[str, object], rank: int, full: int, *, matching_alpha: bool = False
) -> dict[str, object]:
    """Return the first rank rows of all down and columns of all up matrices; the rest of the file is kept."""
    part = {}
    for name, tensor in weights.items():
        if name.endswith(DOWN):
            part[name] = tensor[:rank].contiguous()
        elif name.endswith(UP):
            part[name] = tensor[:, :rank].contiguous()
        elif name.endswith(ALPHA) and matching_alpha:
            # alpha_b / b = alpha / R * sqrt(R / b), the scale with which sd-scripts trains rank b.
            part[name] = (tensor.float() * math.sqrt(rank / full)).to(tensor.dtype)
        else:
            part[name] = tensor
    return part


def described(metadata: Mapping[str, str], rank: int, full: int) -> dict[str, str]:
    """Return the metadata of the file of a rank; hashes are made anew where it is written."""
    if not metadata:
        return {}
    kept = {key: text for key, text in metadata.items() if not key.startswith("sshs_")}
    comment = f"rank {rank} of a DyLoRA of rank {full}"
    former = metadata.get("ss_training_comment")
    kept["ss_training_comment"] = comment if former in (None, "", "None") else f"{comment}; {former}"
    kept["ss_network_dim"] = str(rank)
    return kept


def name_for(save_to: Path, rank: int) -> Path:
    """Return the name with the rank in four digits, as sd-scripts has it."""
    return save_to.with_name(f"{save_to.stem}-{rank:04d}{save_to.suffix}")


if __name__ == "__main__":
    run_script(main)
