"""Reduce the rank of a LoRA file: to the nearest LoRA of a rank, or to the rank that each module needs.

python networks/resize_lora.py --model lora.safetensors --save_to small.safetensors --new_rank 8 --save_precision fp16
python networks/resize_lora.py --model lora.safetensors --save_to small.safetensors --new_rank 32
    --dynamic_method sv_fro --dynamic_param 0.97
"""

from __future__ import annotations

import dataclasses
import json
import logging
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # started as a script, from any folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config import tool_files
from library.config.command_line import parse
from library.config.options import option
from library.config.tool_files import ConvertedLora, Precision, RankOptions
from library.errors import Problems, named
from library.logs import run_script
from library.progress import Bar

if TYPE_CHECKING:
    from torch import Tensor

    from library.adapters.lora_file import LoraFile
    from library.adapters.low_rank import Change, Spectrum

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResizeFiles(ConvertedLora):
    """Files."""

    save_precision: Precision | None = option(None, "type of what is written; unset: float")
    device: str = option("cpu", "where the decompositions are computed, such as cuda")
    verbose: bool = option(False, "log for every module how much is kept")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResizeConfig:
    """All options."""

    files: ResizeFiles
    ranks: RankOptions


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with a command line; return the exit code."""
    config = parse(ResizeConfig, argv, description=__doc__, rules=(check_options,))
    from library.parallel import one_thread

    with one_thread():
        run(config)
    return 0


def run(config: ResizeConfig) -> None:
    """Read the file, reduce its ranks, and write the result."""
    from library.adapters.lora_file import read_lora, to_state_dict, with_own_text_names
    from library.files import disk_errors
    from networks.lora import write_weights

    file = read_lora(config.files.model)
    file.refuse_unknown()
    changes = resized(config, file)
    tensors = to_state_dict(changes, tool_files.dtype_named(config.files.save_precision or "float"))
    tensors = with_own_text_names(tensors | kept_tensors(file), [file])
    with disk_errors(config.files.save_to):
        write_weights(config.files.save_to, tensors, metadata_of(config, file, changes))
    logger.info("saved %s", config.files.save_to)


def check_options(config: ResizeConfig, problems: Problems) -> None:
    """Add to problems what is wrong with --save_to, and with the options of ranks and decompositions."""
    problems.run(config.files.check_save_to, problems)
    problems.run(tool_files.check_ranks, config.ranks)
    problems.run(tool_files.check_device, config.files.device)


def kept_tensors(file: LoraFile) -> dict[str, Tensor]:
    """Return what is written unchanged: vectors, embeddings, and with a warning tensors that nothing reads."""
    if file.strange:
        shown = named(list(file.strange))
        logger.warning("%s: %d tensors are kept, but no program reads them: %s", file.path, len(file.strange), shown)
    return {name: vector.values for name, vector in file.vectors.items()} | file.embeddings | file.strange


def resized(config: ResizeConfig, file: LoraFile) -> dict[str, Change]:
    """Return the changes of a file truncated to their new ranks.

    Alpha is chosen so that alpha / rank stays the same for a module of the whole new rank. Modules of smaller ranks
    have that alpha too, and so have all if the source has several alphas / ranks: diffusers takes one alpha for all
    attention layers.
    """

    from library.adapters.alphas import with_one_alpha
    from library.adapters.energy import EnergyByBlock
    from library.adapters.low_rank import rank_to_keep, spectrum_of
    from library.parallel import by_module

    options, energy = config.ranks, EnergyByBlock()
    largest: dict[bool, int] = {}
    for change in file.changes.values():
        largest[change.is_large_conv] = max(change.rank, largest.get(change.is_large_conv, 0))

    def smaller(change: Change) -> tuple[Change, Spectrum]:
        unscaled = dataclasses.replace(change, alpha=float(change.rank)).to(config.files.device)
        spectrum = spectrum_of(unscaled)
        most = options.rank_of(is_large_conv=change.is_large_conv)
        rank = rank_to_keep(spectrum.values, most, options.dynamic_method, options.dynamic_param)
        kept = spectrum.truncated(rank, change.down_shape).to("cpu")
        whole = most if options.dynamic_method is not None else min(most, largest[change.is_large_conv])
        scaled = dataclasses.replace(kept, alpha=change.scale * kept.rank)
        return scaled.with_alpha(change.scale * whole), spectrum

    changes, norms = {}, []
    results = by_module(smaller, file.changes.values(), device=config.files.device)
    bar = Bar(results, desc="resizing", total=len(file.changes), unit="module")
    for (name, former), (change, spectrum) in zip(file.changes.items(), bar, strict=True):
        changes[name] = change
        energy.add(file.layer(name), spectrum, change.rank, scale=former.scale)
        norms.append(spectrum.energy(change.rank) ** 0.5)
        if config.files.verbose:
            bar.write(f"{name:75} {kept_part(spectrum, former.rank, change.rank)}")
    energy.log()
    if config.files.verbose:
        logger.info(
            "norm kept by a module: %.2f%% ± %.3f%%", 100 * statistics.mean(norms), 100 * statistics.pstdev(norms)
        )
    return with_one_alpha(changes, config.files.save_to)


def kept_part(spectrum: Spectrum, before: int, after: int) -> str:
    """Return in one line what a module keeps: shares of sum and norm of its values, largest / smallest, ranks."""
    values = spectrum.values.double()
    total = float(values.sum())
    share = float(values[:after].sum()) / total if total > 0 else 1.0
    ratio = float(values[0] / values[after - 1]) if values[after - 1] > 0 else float("inf")
    norm = spectrum.energy(after) ** 0.5
    return f"sum {share:6.1%}  norm {norm:6.1%}  largest/smallest {ratio:8.1f}  rank {before} -> {after}"


def metadata_of(config: ResizeConfig, file: LoraFile, changes: Mapping[str, Change]) -> dict[str, str]:
    """Return the metadata of the source with the new ranks and a comment; write_weights adds the hashes."""
    from library.adapters.metadata import commented, common

    options = config.ranks
    former = {change.rank for change in file.changes.values()}
    if options.dynamic_method is not None:
        how = f"resized by {options.dynamic_method} {options.dynamic_param:g} to at most {options.new_rank}"
    else:
        how = f"resized from rank {common(former)} to {options.new_rank}"
        if options.new_conv_rank not in (None, options.new_rank):
            how += f", convolutions to {options.new_conv_rank}"
    kept = commented(file.metadata, how)
    linear = [change for change in changes.values() if not change.is_large_conv] or list(changes.values())
    kept["ss_network_dim"] = common({change.rank for change in linear})
    kept["ss_network_alpha"] = common({change.alpha for change in linear})
    kept |= conv_arguments(kept, [change for change in changes.values() if change.is_large_conv])
    if "modelspec.title" in kept:
        kept["modelspec.title"] = config.files.save_to.stem
    kept.setdefault("ss_network_module", "networks.lora")
    return kept


def conv_arguments(metadata: Mapping[str, str], convolutions: Sequence[Change]) -> dict[str, str]:
    """Return ss_network_args with the new rank and alpha of the convolutions, or nothing if it has none."""
    from library.adapters.metadata import common

    try:
        arguments = json.loads(metadata.get("ss_network_args", ""))
    except ValueError:
        return {}
    if not convolutions or not isinstance(arguments, dict) or "conv_dim" not in arguments:
        return {}
    arguments["conv_dim"] = common({change.rank for change in convolutions})
    arguments["conv_alpha"] = common({change.alpha for change in convolutions})
    return {"ss_network_args": json.dumps(arguments)}


if __name__ == "__main__":
    run_script(main, tool_files.LESS_MEMORY)
