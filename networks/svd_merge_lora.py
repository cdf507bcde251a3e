"""Merge LoRA files of any ranks into one of a chosen rank, by singular values: SD 1.x, SD 2.x and SDXL.

python networks/svd_merge_lora.py --save_to both.safetensors --models a.safetensors b.safetensors --ratios 0.8 0.5
    --new_rank 16

The result is the nearest one of its rank to the exact weighted sum. The sum is never formed: its factors are, and
only a core as small as their ranks is decomposed, in float64.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # started as a script, from any folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config import tool_files
from library.config.command_line import parse
from library.config.options import REQUIRED, option
from library.config.tool_files import Precision
from library.errors import Problems
from library.logs import run_script

if TYPE_CHECKING:
    from library.adapters.energy import KeptByBlock
    from library.adapters.lora_file import LoraFile
    from library.adapters.low_rank import Change
    from library.adapters.merging import Weighted

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilesConfig:
    """Files."""

    save_to: Path = option(REQUIRED, "LoRA file to write", missing="the file to write")
    models: tuple[Path, ...] = option(REQUIRED, "LoRA files", missing="the LoRA files", reads="a file")
    ratios: tuple[float, ...] = option((), "strength of each, of any sign")
    no_metadata: bool = option(False, "write no metadata of where the file comes from")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Merging."""

    precision: Precision = option("float", "accepted; the core is always decomposed in float64")
    save_precision: Precision | None = option(None, "type of what is written; unset: --precision")
    lbws: tuple[str, ...] | None = option(
        None, "weights by block for each LoRA file: JSON lists of 12 or 20 (SDXL), 17 or 26 numbers"
    )
    clamp_quantile: float | None = option(
        None, "cut numbers of the factors above this quantile (sd-scripts: 0.99), which changes the result; unset: none"
    )
    allow_unmatched: bool = option(False, "leave out tensors that are no part of a LoRA")
    device: str = option("cpu", "where the decompositions are made, such as cuda")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SvdMergeConfig:
    """What is merged into what."""

    files: FilesConfig
    merge: MergeOptions
    ranks: tool_files.RankOptions


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with a command line; return the exit code."""
    config = parse(SvdMergeConfig, argv, description=__doc__, rules=(check_save_to, check_strengths, check_merging))
    from library.adapters.energy import KeptByBlock
    from library.adapters.lora_file import to_state_dict
    from library.adapters.merging import parts_by_module, read_weighted
    from library.files import disk_errors
    from networks.lora import write_weights

    files = read_weighted(config.files.models, config.files.ratios, config.merge.lbws)
    parts = parts_by_module(files, allow_unmatched=config.merge.allow_unmatched)
    kept = KeptByBlock()
    changes = merged_changes(config, parts, files[0].file, kept)
    for line in kept.lines():
        logger.info("%s", line)
    dtype = tool_files.dtype_named(config.merge.save_precision or config.merge.precision)
    metadata = metadata_of(config, files, changes)
    with disk_errors(config.files.save_to):
        write_weights(config.files.save_to, to_state_dict(changes, dtype), metadata)
    logger.info("saved %s", config.files.save_to)
    return 0


def check_save_to(config: SvdMergeConfig, problems: Problems) -> None:
    """Add to problems what is wrong with --save_to."""
    tool_files.check_output("--save_to", config.files.save_to, problems)
    tool_files.check_apart("--save_to", config.files.save_to, config.files.models)


def check_strengths(config: SvdMergeConfig, problems: Problems) -> None:
    """Add to problems what is wrong with --ratios and --lbws."""
    from library.adapters import layer_weights

    files = config.files
    tool_files.check_ratios(files.ratios, files.models, problems)
    if config.merge.lbws is not None:
        layer_weights.check_lists(config.merge.lbws, len(files.models), problems)


def check_merging(config: SvdMergeConfig, problems: Problems) -> None:
    """Add to problems what is wrong with the options of ranks and decompositions."""
    problems.run(tool_files.check_ranks, config.ranks)
    problems.run(tool_files.check_quantile, config.merge.clamp_quantile)
    problems.run(tool_files.check_device, config.merge.device)


def merged_changes(
    config: SvdMergeConfig, parts: dict[str, list[tuple[float, Change]]], file: LoraFile, kept: KeptByBlock
) -> dict[str, Change]:
    """Return the merged change of each module, cut to its rank."""
    from tqdm import tqdm

    from library.adapters.low_rank import clamped, concatenated, rank_to_keep, spectrum_of

    changes = {}
    for name, same in tqdm(parts.items(), desc="merging", unit="module"):
        whole = concatenated(same).to(config.merge.device)
        spectrum = spectrum_of(whole)
        most = config.ranks.rank_of(is_large_conv=whole.is_large_conv)
        rank = rank_to_keep(spectrum.values, most, config.ranks.dynamic_method, config.ranks.dynamic_param)
        # One alpha for all, whatever ranks are left out: diffusers takes one for all attention layers.
        change = spectrum.truncated(rank, whole.down_shape).with_alpha(float(most))
        if config.merge.clamp_quantile is not None:
            change = clamped(change, config.merge.clamp_quantile)
        changes[name] = change.to("cpu")
        kept.add(file.layer(name), spectrum, change.rank)
    return changes


def metadata_of(config: SvdMergeConfig, files: Sequence[Weighted], changes: Mapping[str, Change]) -> dict[str, str]:
    """Return the metadata of the merged file."""
    import json

    from library.adapters.metadata import architecture, common, merged_metadata, network_metadata

    ranks = config.ranks
    linear = {change.rank for change in changes.values() if not change.is_large_conv}
    conv = {change.rank for change in changes.values() if change.is_large_conv}
    metadata = network_metadata([entry.file for entry in files], linear or conv, {float(ranks.new_rank)})
    if conv:
        alpha = float(ranks.rank_of(is_large_conv=True))
        metadata["ss_network_args"] = json.dumps({"conv_dim": common(conv), "conv_alpha": str(alpha)})
    if config.files.no_metadata:
        return metadata
    settings = {
        "dynamic_param": ranks.dynamic_param,
        "lbws": config.merge.lbws,
        "clamp_quantile": config.merge.clamp_quantile,
        "dynamic_method": ranks.dynamic_method,
    }
    origin, first = merged_metadata(config.files.save_to, "svd", files, settings=settings), files[0].file
    return metadata | origin | architecture(first.family, first.metadata, is_network=True)


if __name__ == "__main__":
    run_script(main)
