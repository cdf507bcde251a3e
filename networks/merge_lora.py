"""Merge LoRA files into a checkpoint of SD 1.x or 2.x, or into one LoRA file.

python networks/merge_lora.py --sd_model model.safetensors --save_to merged.safetensors
    --models a.safetensors b.safetensors --ratios 0.8 0.5
python networks/merge_lora.py --save_to both.safetensors --models a.safetensors b.safetensors --ratios 0.8 0.5 --concat

Into a checkpoint the sum is exact in float32. Into one LoRA it is exact with --concat, for any ranks and ratios;
without it, factors of equal ranks are added up, as in sd-scripts, which holds for variants of one training only.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if __package__ in (None, ""):  # started as a script, from any folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.options import option, parse
from library.errors import UserError
from library.logs import run_script

if TYPE_CHECKING:
    import torch

    from library.adapters.lora_file import LoraFile
    from library.adapters.low_rank import Change
    from library.weights_io import WeightFile

logger = logging.getLogger(__name__)

SUFFIXES = (".safetensors", ".ckpt", ".pt")
MOST_NAMED = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilesConfig:
    """Files."""

    sd_model: Path | None = option(None, "checkpoint to merge into; unset: the LoRA files become one")
    save_to: Path | None = option(None, "file to write (.safetensors or .ckpt)")
    models: tuple[Path, ...] | None = option(None, "LoRA files")
    ratios: tuple[float, ...] | None = option(None, "strength of each, of any sign")
    v2: bool = option(False, "the checkpoint is SD 2.x; it is recognised by itself, this is a check")
    no_metadata: bool = option(False, "write no modelspec.* metadata")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Merging."""

    precision: Literal["float", "fp16", "bf16"] = option("float", "accepted; sums are always made in float32")
    save_precision: Literal["float", "fp16", "bf16"] | None = option(
        None, "type of what is written; unset: --precision"
    )
    concat: bool = option(False, "put the ranks of all LoRA files side by side: exact, for any ranks")
    shuffle: bool = option(False, "with --concat: mix the ranks by a random rotation, so that the parts are hidden")
    reference_scale: bool = option(False, "the numbers of sd-scripts, which squares ratios and weakens --concat")
    allow_unmatched: bool = option(False, "go on where modules of a LoRA file are not in the checkpoint")
    seed: int | None = option(None, "seed of --shuffle; unset: a new one", minimum=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """What is merged into what."""

    files: FilesConfig
    merge: MergeOptions


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with a command line; return the exit code."""
    config = parse(MergeConfig, argv, description=__doc__)
    check(config)
    from library.adapters.lora_file import read_lora, same_family

    files = [read_lora(path) for path in config.files.models]
    family = same_family(files)
    if config.files.sd_model is not None:
        merge_into_checkpoint(config, files, family)
    else:
        merge_into_lora(config, files)
    logger.info("saved %s", config.files.save_to)
    return 0


def check(config: MergeConfig) -> None:
    """Raise UserError that lists what is missing or does not fit, before anything is read."""
    problems = list(problems_of(config.files, config.merge))
    if problems:
        raise UserError("\n".join(problems))


def problems_of(files: FilesConfig, merge: MergeOptions) -> Iterator[str]:
    """Yield what is wrong with the options."""
    if files.save_to is None:
        yield "--save_to is missing: the file to write"
    elif files.save_to.suffix.lower() not in SUFFIXES:
        yield f"--save_to must end in {', '.join(SUFFIXES)}, got {files.save_to}"
    if not files.models:
        yield "--models is missing: the LoRA files"
    if len(files.ratios or ()) != len(files.models or ()):
        yield f"--ratios must have a number for each of the {len(files.models or ())} files of --models, got " + str(
            len(files.ratios or ())
        )
    if not all(math.isfinite(ratio) for ratio in files.ratios or ()):
        yield f"--ratios must be finite numbers, got {' '.join(map(str, files.ratios))}"
    yield from path_problems(files)
    if files.sd_model is not None and (merge.concat or merge.shuffle):
        yield "--concat and --shuffle are for merging into a LoRA file: leave them out, or --sd_model"
    if merge.shuffle and not merge.concat:
        yield "--shuffle goes with --concat"


def path_problems(files: FilesConfig) -> Iterator[str]:
    """Yield which files are absent, and whether one that is read would be written over."""
    inputs = [path for path in (files.sd_model, *(files.models or ())) if path is not None]
    for path in inputs:
        if not path.is_file():
            yield f"{path} is not a file"
        elif files.save_to is not None and files.save_to.exists() and path.samefile(files.save_to):
            yield f"--save_to {files.save_to} is one of the files to be read: take another name"


# --------------------------------------------------------------------------------------------------------------
# Into a checkpoint
# --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Addition:
    """What is added to a tensor of the checkpoint, or to a third of it."""

    ratio: float
    change: Change
    third: int | None


def merge_into_checkpoint(config: MergeConfig, files: list[LoraFile], family: str | None) -> None:
    """Write the checkpoint with the changes of all files added, tensor by tensor."""
    from tqdm import tqdm

    from library.weights_io import open_weights, write_stream, write_weights

    model = open_weights(config.files.sd_model)
    title = check_model(config, model, family)
    additions = additions_by_tensor(config, files, model, title)
    dtype = dtype_named(config.merge.save_precision or config.merge.precision)
    logger.info("%d tensors of %s change, %d stay", len(additions), model.path, len(model.shapes) - len(additions))
    tensors = (
        (name, merged_tensor(name, tensor, additions.get(name, ()), dtype))
        for name, tensor in tqdm(model.tensors(model.shapes), total=len(model.shapes), desc="merging", unit="tensor")
    )
    if config.files.save_to.suffix.lower() != ".safetensors":
        write_weights(config.files.save_to, dict(tensors))
        return
    infos = {name: (result_type(name, own, dtype), shape) for name, own, shape in types_and_shapes(model)}
    write_stream(config.files.save_to, infos, tensors, checkpoint_metadata(config, model, files))


def check_model(config: MergeConfig, model: WeightFile, family: str | None) -> str:
    """Return the checkpoint's family; raises UserError where the LoRA files are for another."""
    from library.models.family import SD2, detect_family

    title = "SD 2.x" if detect_family(model.shapes, str(model.path)) is SD2 else "SD 1.x"
    if config.files.v2 and title != "SD 2.x":
        raise UserError(f"--v2 was given, but {model.path} is an {title} model: leave out --v2")
    if family not in (None, title):
        raise UserError(f"the LoRA files are for {family}, {model.path} is an {title} model")
    return title


def additions_by_tensor(
    config: MergeConfig, files: list[LoraFile], model: WeightFile, family: str
) -> dict[str, list[Addition]]:
    """Return tensor name -> what is added to it; raises UserError for modules that the checkpoint does not have."""
    from library.adapters.targets import places

    known = places(model.shapes, family)
    additions: dict[str, list[Addition]] = {}
    for file, ratio in zip(files, config.files.ratios, strict=True):
        missing = sorted(set(file.changes) - set(known))
        if missing:
            names = ", ".join(missing[:MOST_NAMED])
            text = f"{file.path}: {len(missing)} of {len(file.changes)} modules are not in {model.path} ({names})"
            if not config.merge.allow_unmatched:
                raise UserError(f"{text}; --allow_unmatched goes on without them")
            logger.warning("%s; they are left out", text)
        for name, change in file.changes.items():
            if name in known:
                place = known[name]
                check_shape(file, name, change, model.shapes[place.key], place.third)
                additions.setdefault(place.key, []).append(Addition(ratio, change, place.third))
    return additions


def check_shape(file: LoraFile, name: str, change: Change, shape: Sequence[int], third: int | None) -> None:
    """Raise UserError where a change does not fit the tensor that it is for."""
    rows = shape[0] if third is None else shape[0] // 3
    if change.layer_shape != (rows, math.prod(shape[1:])):
        raise UserError(
            f"{file.path}: {name} is for a layer of {change.layer_shape}, this model has {(rows, math.prod(shape[1:]))}"
        )


def merged_tensor(name: str, tensor: torch.Tensor, additions: Sequence[Addition], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor of the checkpoint with what is added to it, summed in float32, in the type it is written in."""
    kept = result_type(name, tensor.dtype, dtype)
    if not additions:
        return tensor.to(kept)
    total = tensor.float()
    rows = total.view(total.shape[0], -1)  # a view: what is added to it is added to the tensor
    for addition in additions:
        size = rows.shape[0] // 3
        part = rows if addition.third is None else rows[addition.third * size : (addition.third + 1) * size]
        strength = addition.ratio * addition.change.scale
        part.addmm_(addition.change.up.float(), addition.change.down.float(), alpha=strength)
    return total.to(kept)


def result_type(name: str, own: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """Return the type in which a tensor is written: U-Net and text encoders in the one asked for, the rest as it is."""
    is_merged_part = name.startswith(("model.diffusion_model.", "cond_stage_model.", "conditioner."))
    return dtype if is_merged_part and own.is_floating_point else own


def types_and_shapes(model: WeightFile) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Yield name, type and shape of each tensor of a file, in the order in which they are read."""
    import torch

    from library.weights_io import DTYPE_NAMES, Header

    if isinstance(model.content, Header):
        for name, info in sorted(model.content.tensors.items(), key=lambda entry: entry[1].start):
            yield name, getattr(torch, DTYPE_NAMES[info.dtype]), info.shape
    else:
        for name, tensor in model.content.items():
            yield name, tensor.dtype, tuple(tensor.shape)


def checkpoint_metadata(config: MergeConfig, model: WeightFile, files: list[LoraFile]) -> dict[str, str]:
    """Return the metadata of the merged checkpoint: the base's, and what it was merged from."""
    if config.files.no_metadata:
        return {}
    parts = [model.path.name, *provenance(files, config.files.ratios)]
    own = {"modelspec.title": config.files.save_to.stem, "modelspec.merged_from": ", ".join(parts)}
    return dict(model.metadata) | own


def provenance(files: list[LoraFile], ratios: Sequence[float]) -> list[str]:
    """Return each file's name with its ratio and hash."""
    return [f"{file.path.name}*{ratio:g}{short_hash(file)}" for file, ratio in zip(files, ratios, strict=True)]


def short_hash(file: LoraFile) -> str:
    """Return the first letters of the hash that a file tells of itself, or nothing."""
    text = file.metadata.get("sshs_model_hash", "")
    return f" ({text[:12]})" if text else ""


# --------------------------------------------------------------------------------------------------------------
# Into one LoRA file
# --------------------------------------------------------------------------------------------------------------


def merge_into_lora(config: MergeConfig, files: list[LoraFile]) -> None:
    """Write one LoRA file for all."""
    import torch

    from library.adapters.lora_file import tensors_of
    from library.adapters.low_rank import concatenated, mixed
    from networks.lora import write_weights

    ratios, merge = config.files.ratios, config.merge
    by_module: dict[str, list[tuple[float, Change]]] = {}
    for file, ratio in zip(files, ratios, strict=True):
        for name, change in file.changes.items():
            by_module.setdefault(name, []).append((ratio, change))
    check_alike(by_module, same_ranks=not merge.concat)
    join = concatenated if merge.concat else summed
    if merge.reference_scale:
        join = concatenated_as_sd_scripts if merge.concat else summed_as_sd_scripts
    changes = {name: join(parts) for name, parts in by_module.items()}
    if merge.shuffle:
        generator = torch.Generator()
        generator.seed() if merge.seed is None else generator.manual_seed(merge.seed)
        changes = {name: mixed(change, generator) for name, change in changes.items()}
    dtype = dtype_named(merge.save_precision or merge.precision)
    ranks = sorted({change.rank for change in changes.values()})
    logger.info("%d modules of rank %s", len(changes), " to ".join(str(rank) for rank in {ranks[0], ranks[-1]}))
    write_weights(config.files.save_to, tensors_of(changes, dtype), lora_metadata(config, files, changes))


def check_alike(by_module: Mapping[str, list[tuple[float, Change]]], *, same_ranks: bool) -> None:
    """Raise UserError for modules of the same name and other layers, or of other ranks where these must agree."""
    for name, parts in by_module.items():
        if len({change.layer_shape for _, change in parts}) > 1:
            raise UserError(f"{name} is for different layers in the files: they are for different models")
        ranks = [change.rank for _, change in parts]
        if same_ranks and len(set(ranks)) > 1:
            raise UserError(
                f"{name} has the ranks {', '.join(map(str, ranks))} in the files: merge with --concat, "
                "or with networks/svd_merge_lora.py"
            )


def summed(parts: Sequence[tuple[float, Change]]) -> Change:
    """Return the sum of the factors, with the strength that the ratios mean.

    U = sum of sqrt|c| U_i and D = sum of sign(c) sqrt|c| D_i with c = ratio * alpha / R: exact for one file, and
    for files with equal factors; otherwise products of one file's U with another's D come in.
    """
    from library.adapters.low_rank import concatenated

    joined, rank = concatenated(parts), parts[0][1].rank
    up = joined.up.unflatten(1, (-1, rank)).sum(dim=1)
    down = joined.down.unflatten(0, (-1, rank)).sum(dim=0)
    return dataclasses.replace(joined, up=up, down=down, alpha=float(rank), down_shape=(rank, *joined.down_shape[1:]))


def summed_as_sd_scripts(parts: Sequence[tuple[float, Change]]) -> Change:
    """Return the sum of the factors as sd-scripts makes it: both take the ratio, alpha is the first one's."""
    joined = concatenated_as_sd_scripts(parts)
    rank = parts[0][1].rank
    up = joined.up.unflatten(1, (-1, rank)).sum(dim=1)
    down = joined.down.unflatten(0, (-1, rank)).sum(dim=0)
    return dataclasses.replace(joined, up=up, down=down, down_shape=(rank, *joined.down_shape[1:]))


def concatenated_as_sd_scripts(parts: Sequence[tuple[float, Change]]) -> Change:
    """Return the ranks side by side as sd-scripts has them, with the first one's alpha for all."""
    import torch

    base = parts[0][1]
    strengths = [math.sqrt(change.alpha / base.alpha) * ratio for ratio, change in parts]
    up = torch.cat([change.up.float() * abs(t) for t, (_, change) in zip(strengths, parts, strict=True)], dim=1)
    down = torch.cat([change.down.float() * t for t, (_, change) in zip(strengths, parts, strict=True)])
    return dataclasses.replace(base, up=up, down=down, down_shape=(down.shape[0], *base.down_shape[1:]))


def lora_metadata(config: MergeConfig, files: list[LoraFile], changes: Mapping[str, Change]) -> dict[str, str]:
    """Return the metadata of the merged LoRA file."""

    def common(values: set[Any]) -> str:
        return str(next(iter(values))) if len(values) == 1 else "Dynamic"

    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": common({change.rank for change in changes.values()}),
        "ss_network_alpha": common({change.alpha for change in changes.values()}),
    }
    for key in ("ss_v2", "ss_base_model_version"):
        told = next((file.metadata[key] for file in files if key in file.metadata), None)
        metadata |= {} if told is None else {key: told}
    if config.files.no_metadata:
        return metadata
    merged_from = ", ".join(provenance(files, config.files.ratios))
    return metadata | {"modelspec.title": config.files.save_to.stem, "modelspec.merged_from": merged_from}


def dtype_named(name: str) -> torch.dtype:
    """Return the type of an option's word."""
    import torch

    return {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]


if __name__ == "__main__":
    run_script(main)
