"""Merge LoRA files of any ranks into one of a chosen rank, by singular values: SD 1.x, SD 2.x and SDXL.

python networks/svd_merge_lora.py --save_to both.safetensors --models a.safetensors b.safetensors --ratios 0.8 0.5
    --new_rank 16

The result is the LoRA of that rank which is nearest to the exact weighted sum. The sum is not formed as a full matrix:
its factors are, and only a core as small as their ranks is decomposed, in float64.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # started as a script, from any folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config import tool_files
from library.config.command_line import parse
from library.config.options import option
from library.config.tool_files import MergedLoras, Precision
from library.errors import Problems
from library.logs import run_script
from library.progress import Bar

if TYPE_CHECKING:
    from library.adapters.energy import EnergyByBlock
    from library.adapters.lora_file import LoraFile
    from library.adapters.low_rank import Change, Spectrum
    from library.adapters.merging import Weighted

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Merging."""

    precision: Precision = option("float", "accepted; the core is always decomposed in float64")
    save_precision: Precision | None = option(None, "type of what is written; unset: --precision")
    clamp_quantile: float | None = option(
        None, "cut numbers of the factors above this quantile (sd-scripts: 0.99), which changes the result; unset: none"
    )
    allow_unmatched: bool = option(False, "skip tensors that are not part of a LoRA")
    device: str = option("cpu", "where the decompositions are computed, such as cuda")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SvdMergeConfig:
    """All options."""

    files: MergedLoras
    merge: MergeOptions
    ranks: tool_files.RankOptions


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with a command line; return the exit code."""
    config = parse(SvdMergeConfig, argv, description=__doc__, rules=(check_files, check_merging))
    from library.parallel import one_thread

    with one_thread():
        run(config)
    return 0


def run(config: SvdMergeConfig) -> None:
    """Read the files, merge them, and write the result."""
    from library.adapters.alphas import with_one_alpha
    from library.adapters.energy import EnergyByBlock
    from library.adapters.lora_file import to_state_dict, with_own_text_names
    from library.adapters.merging import merged_vectors, parts_by_module, read_weighted
    from library.files import disk_errors
    from networks.lora import write_weights
    from networks.merge_lora import check_readable

    problems = Problems()
    check_readable(config.files.models, problems)
    problems.raise_if_any()
    files = read_weighted(config.files)
    parts = parts_by_module(files, allow_unmatched=config.merge.allow_unmatched)
    energy = EnergyByBlock()
    changes = with_one_alpha(merged_changes(config, parts, files[0].file, energy), config.files.save_to)
    energy.log()
    dtype = tool_files.dtype_named(config.merge.save_precision or config.merge.precision)
    metadata = metadata_of(config, files, changes)
    with disk_errors(config.files.save_to):
        vectors = {name: values.to(dtype) for name, values in merged_vectors(files).items()}
        tensors = with_own_text_names(to_state_dict(changes, dtype) | vectors, [each.file for each in files])
        write_weights(config.files.save_to, tensors, metadata)
    logger.info("saved %s", config.files.save_to)


def check_files(config: SvdMergeConfig, problems: Problems) -> None:
    """Add to problems what is wrong with the files and their strengths."""
    from library.adapters.layer_weights import check_strengths

    problems.run(config.files.check_save_to, problems)
    problems.run(check_strengths, config.files, problems)


def check_merging(config: SvdMergeConfig, problems: Problems) -> None:
    """Add to problems what is wrong with the options of ranks and decompositions."""
    problems.run(tool_files.check_ranks, config.ranks)
    problems.run(tool_files.check_quantile, config.merge.clamp_quantile)
    problems.run(tool_files.check_device, config.merge.device)


def merged_changes(
    config: SvdMergeConfig, parts: dict[str, list[tuple[float, Change]]], file: LoraFile, energy: EnergyByBlock
) -> dict[str, Change]:
    """Return the merged change of each module, truncated to its rank, and add their energy by block."""

    from library.adapters.low_rank import clamped, concatenated, rank_to_keep, spectrum_of
    from library.parallel import by_module

    def merged(same: list[tuple[float, Change]]) -> tuple[Change, Spectrum]:
        whole = concatenated(same).to(config.merge.device)
        spectrum = spectrum_of(whole)
        most = config.ranks.rank_of(is_large_conv=whole.is_large_conv)
        rank = rank_to_keep(spectrum.values, most, config.ranks.dynamic_method, config.ranks.dynamic_param)
        # The same alpha for all, whatever their ranks: diffusers takes one alpha for all attention layers.
        change = spectrum.truncated(rank, whole.down_shape).with_alpha(float(most))
        if config.merge.clamp_quantile is not None:
            change = clamped(change, config.merge.clamp_quantile)
        return change.to("cpu"), spectrum

    changes = {}
    results = by_module(merged, parts.values(), device=config.merge.device)
    bar = Bar(results, desc="merging", total=len(parts), unit="module")
    for name, (change, spectrum) in zip(parts, bar, strict=True):
        changes[name] = change
        energy.add(file.layer(name), spectrum, change.rank)
    return changes


def metadata_of(config: SvdMergeConfig, files: Sequence[Weighted], changes: Mapping[str, Change]) -> dict[str, str]:
    """Return the metadata of the merged file."""
    from library.adapters.metadata import architecture, common, merged_metadata, network_metadata

    ranks = config.ranks
    conv = [change for change in changes.values() if change.is_large_conv]
    linear = [change for change in changes.values() if not change.is_large_conv] or conv
    metadata = network_metadata(
        [weighted.file for weighted in files], {each.rank for each in linear}, {each.alpha for each in linear}
    )
    if conv:
        found = {"conv_dim": common({each.rank for each in conv}), "conv_alpha": common({each.alpha for each in conv})}
        metadata["ss_network_args"] = json.dumps(found)
    if config.files.no_metadata:
        return metadata
    settings = {
        "dynamic_param": ranks.dynamic_param,
        "lbws": config.files.lbws,
        "clamp_quantile": config.merge.clamp_quantile,
        "dynamic_method": ranks.dynamic_method,
    }
    origin, first = merged_metadata(config.files.save_to, "svd", files, settings=settings), files[0].file
    return metadata | origin | architecture(first.family, first.metadata, is_network=True)


if __name__ == "__main__":
    run_script(main, tool_files.LESS_MEMORY)
