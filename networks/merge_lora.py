"""Merge LoRA files into a base model, or into one LoRA file: SD 1.x, SD 2.x and SDXL.

python networks/merge_lora.py --sd_model model.safetensors --save_to merged.safetensors
    --models a.safetensors b.safetensors --ratios 0.8 0.5
python networks/merge_lora.py --save_to both.safetensors --models a.safetensors b.safetensors --ratios 0.8 0.5 --concat

Into a model the sum is exact in float32. Into one LoRA it is exact with --concat, for any ranks and ratios;
without it, factors of equal ranks are added up, as in sd-scripts, which holds for variants of one training only.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # started as a script, from any folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config import tool_files
from library.config.options import option, parse
from library.config.tool_files import Precision
from library.errors import UserError
from library.logs import run_script

if TYPE_CHECKING:
    import torch

    from library.adapters.lora_file import LoraFile
    from library.adapters.low_rank import Change

    Ratios = Mapping[str, float]  # of each module of a file

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilesConfig:
    """Files."""

    sd_model: Path | None = option(
        None, "base model to merge into: a checkpoint or a Diffusers folder; unset: the LoRA files become one"
    )
    save_to: Path | None = option(
        None, "what to write: a .safetensors or .ckpt file, or a folder where the model is one"
    )
    models: tuple[Path, ...] | None = option(None, "LoRA files")
    ratios: tuple[float, ...] | None = option(None, "strength of each, of any sign")
    v2: bool = option(False, "the model is SD 2.x; it is recognised by itself, this is a check")
    no_metadata: bool = option(False, "write no metadata of where the file comes from")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Merging."""

    precision: Precision = option("float", "accepted; sums are always made in float32")
    save_precision: Precision | None = option(None, "type of what is written; unset: --precision")
    concat: bool = option(False, "put the ranks of all LoRA files side by side: exact, for any ranks")
    shuffle: bool = option(False, "with --concat: mix the ranks by a random rotation, so that the parts are hidden")
    lbws: tuple[str, ...] | None = option(
        None, "weights by block for each LoRA file: JSON lists of 12 or 20 (SDXL), 17 or 26 numbers"
    )
    reference_scale: bool = option(False, "the numbers of sd-scripts, which squares ratios and weakens --concat")
    allow_unmatched: bool = option(False, "go on where modules of a LoRA file are not in the model")
    seed: int | None = option(None, "seed of --shuffle; unset: a new one", minimum=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """What is merged into what."""

    files: FilesConfig
    merge: MergeOptions


def main(argv: Sequence[str] | None = None, description: str | None = __doc__) -> int:
    """Run the script with a command line; return the exit code."""
    config = parse(MergeConfig, argv, description=description)
    tool_files.refuse(problems_of(config.files, config.merge))
    from library.adapters.lora_file import same_family

    weighted = weighted_files(config.files, config.merge)
    same_family(file for file, _ in weighted)
    if config.files.sd_model is not None:
        merge_into_model(config, weighted)
    else:
        merge_into_lora(config, weighted)
    logger.info("saved %s", config.files.save_to)
    return 0


def problems_of(files: FilesConfig, merge: MergeOptions) -> Iterator[str]:
    """Yield what is wrong with the options."""
    from library.adapters import layer_weights

    is_folder = files.sd_model is not None and files.sd_model.is_dir()
    if files.sd_model is not None:
        yield from tool_files.input_problems("--sd_model", files.sd_model, "the base model", folders=True)
    for path in files.models or ():
        yield from tool_files.input_problems("--models", path, "the LoRA files")
    yield from tool_files.output_problems(
        "--save_to", files.save_to, (files.sd_model, *(files.models or ())), folder=is_folder
    )
    yield from tool_files.ratio_problems(files.ratios, files.models)
    if merge.lbws is not None:
        yield from layer_weights.problems(merge.lbws, len(files.models or ()))
    if files.sd_model is not None and (merge.concat or merge.shuffle):
        yield "--concat and --shuffle are for merging into a LoRA file: leave them out, or --sd_model"
    if merge.shuffle and not merge.concat:
        yield "--shuffle goes with --concat"


def weighted_files(files: Any, merge: Any) -> list[tuple[LoraFile, Ratios]]:
    """Return the LoRA files of --models, each with the ratio of its modules: its own, times the weight of the block."""
    from library.adapters import layer_weights
    from library.adapters.lora_file import read_lora

    weighted = []
    for index, path in enumerate(files.models):
        file, ratio = read_lora(path), files.ratios[index]
        weights = None if merge.lbws is None else layer_weights.read_weights(merge.lbws[index])
        if weights is not None:
            layer_weights.check_family(weights, file.family, path)
        factors = {name: 1.0 if weights is None else layer_weights.weight_of(name, weights) for name in file.changes}
        weighted.append((file, {name: ratio * factor for name, factor in factors.items()}))
    return weighted


def merge_into_model(config: MergeConfig, files: Sequence[tuple[LoraFile, Ratios]]) -> None:
    """Write the base model with the changes of all files added, tensor by tensor."""
    from library.adapters.merging import Merge, additions_by_tensor, write_merged
    from library.adapters.provenance import architecture
    from library.models.checkpoint import open_checkpoint
    from library.models.family import check_flags

    model = open_checkpoint(config.files.sd_model)
    check_flags(model.family, model.path, v2=config.files.v2)
    additions = additions_by_tensor(model, files, allow_unmatched=config.merge.allow_unmatched)
    own = {} if model.is_folder else dict(model.metadata)
    base = own.get("modelspec.title") or model.path.stem
    metadata = origin(config, files, base=base)
    if metadata and not model.is_folder:
        metadata |= architecture(model.family, own, is_network=False)
    write_merged(model, Merge(additions, written_type(config), metadata), config.files.save_to)


def merge_into_lora(config: MergeConfig, files: Sequence[tuple[LoraFile, Ratios]]) -> None:
    """Write one LoRA file for all."""
    import torch
    from tqdm import tqdm

    from library.adapters.lora_file import tensors_of
    from library.adapters.low_rank import mixed
    from library.adapters.provenance import architecture, network_metadata
    from library.files import disk_errors
    from networks.lora import write_weights

    merge = config.merge
    parts = parts_by_module(files, allow_unmatched=merge.allow_unmatched)
    check_layers(parts)
    check_factors(parts, merge)
    join = joining(merge)
    changes = {name: join(same) for name, same in tqdm(parts.items(), desc="merging", unit="module")}
    if merge.shuffle:
        generator = torch.Generator()
        generator.seed() if merge.seed is None else generator.manual_seed(merge.seed)
        changes = {name: mixed(change, generator) for name, change in changes.items()}
    ranks = {change.rank for change in changes.values()}
    logger.info("%d modules of rank %s", len(changes), " to ".join(map(str, sorted({min(ranks), max(ranks)}))))
    first = files[0][0]
    metadata = network_metadata([file for file, _ in files], ranks, {change.alpha for change in changes.values()})
    provenance = origin(config, files)
    if provenance:
        metadata |= provenance | architecture(first.family, first.metadata, is_network=True)
    with disk_errors(config.files.save_to):
        write_weights(config.files.save_to, tensors_of(changes, written_type(config)), metadata)


def parts_by_module(
    files: Sequence[tuple[LoraFile, Ratios]], *, allow_unmatched: bool
) -> dict[str, list[tuple[float, Change]]]:
    """Return module -> the changes that files have for it, each with its ratio."""
    from library.adapters.merging import tell_unmatched

    parts: dict[str, list[tuple[float, Change]]] = {}
    for file, ratios in files:
        tell_unmatched(file, sorted(file.extra), Path("a LoRA network"), allowed=allow_unmatched)
        for name, change in file.changes.items():
            parts.setdefault(name, []).append((ratios[name], change))
    return parts


def check_layers(parts: Mapping[str, list[tuple[float, Change]]]) -> None:
    """Raise UserError for modules of the same name and other layers."""
    for name, same in parts.items():
        if len({change.layer_shape for _, change in same}) > 1:
            raise UserError(f"{name} is for different layers in the files: they are for different models")


def check_factors(parts: Mapping[str, list[tuple[float, Change]]], merge: MergeOptions) -> None:
    """Raise UserError for factors that cannot be joined as asked."""
    for name, same in parts.items():
        ranks = [change.rank for _, change in same]
        if not merge.concat and len(set(ranks)) > 1:
            raise UserError(
                f"{name} has the ranks {', '.join(map(str, ranks))} in the files: merge with --concat, "
                "or with networks/svd_merge_lora.py"
            )
        if merge.reference_scale and any(change.alpha <= 0 for _, change in same):
            raise UserError(f"{name} has an alpha of 0 or less, which --reference_scale cannot work with")


def joining(merge: MergeOptions) -> Callable[[Sequence[tuple[float, Change]]], Change]:
    """Return the function that makes one change of several, of which each has its ratio."""
    from library.adapters import low_rank

    return {
        (False, False): low_rank.summed,
        (True, False): low_rank.concatenated,
        (False, True): low_rank.summed_as_sd_scripts,
        (True, True): low_rank.concatenated_as_sd_scripts,
    }[merge.concat, merge.reference_scale]


def origin(config: MergeConfig, files: Sequence[tuple[LoraFile, Ratios]], *, base: str | None = None) -> dict[str, str]:
    """Return what the written file says of the files that went into it; nothing with --no_metadata."""
    from library.adapters.provenance import merged_metadata

    if config.files.no_metadata:
        return {}
    given = [(file, ratio) for (file, _), ratio in zip(files, config.files.ratios, strict=True)]
    merge = config.merge
    return merged_metadata(
        config.files.save_to,
        "merge" if base else "concat" if merge.concat else "sum of factors",
        given,
        base=base,
        lbws=merge.lbws,
        reference_scale=True if merge.reference_scale else None,
        shuffled=True if merge.shuffle else None,
    )


def written_type(config: MergeConfig) -> torch.dtype:
    """Return the type of what is written."""
    return tool_files.dtype_named(config.merge.save_precision or config.merge.precision)


if __name__ == "__main__":
    run_script(main)
