"""Merge checkpoints of one family into one: each tensor becomes the weighted sum of all models' tensors.

python tools/merge_models.py --models a.safetensors b.safetensors --ratios 0.7 0.3 --output merged.safetensors

The sum is computed in float32, tensor by tensor. The result has the tensors of the first model, and their types unless
--saving_precision is given. What is no weight, such as indices and the noise schedule, is taken from the first model.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # started as a script, from any folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config import tool_files
from library.config.hub_names import TakesModels
from library.config.model import ModelConfig
from library.config.options import REQUIRED, option, repeated
from library.config.tool_files import Precision, dtype_named
from library.errors import Problems, UserError
from library.file_kinds import weight_format
from library.logs import run_script
from library.models import keys
from library.progress import Bar

if TYPE_CHECKING:
    import torch

    from library.weight_file import WeightFile

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
BYTES_PER_NUMBER = 12  # of a tensor, while it is merged: the sum and a term in float32, and as they are stored
TOLERANCE = 0.02  # of the sum of ratios: three times 0.33 is meant to be 1
# Parts that --unet_only takes from the first model.
NOT_UNET = (keys.VAE_PREFIX, *keys.TEXT_PREFIXES)
TEXT_ENCODER = f"{keys.TEXT_PREFIX}transformer."
# Tensors that are no weights, whatever type they are stored in: what they are, and the end of their names.
NOT_WEIGHTS = {
    "indices and counts": r"position_ids|token_type_ids|relative_position_index|num_batches_tracked|num_updates",
    "noise schedule": (
        r"betas|alphas|(sqrt_|log_)?(recip_|recipm1_|one_minus_)?alphas_cumprod(_prev|_next)?|posterior_\w+"
        r"|lvlb_weights|(log_)?sigmas|sigma_(min|max|data)|timesteps|logvar|scale_factor|v_pred|ztsnr"
    ),
    "masks and frequencies": r"attn_mask|causal_mask|attention_mask|inv_freq|freqs",
    "settings": r"model_ema\.decay|data_mean|data_std",
}
SAME = 1e-5  # relative difference of constants that programs compute in other orders
OLD_TEXT_NAMES = tuple(f"{TEXT_ENCODER}{part}." for part in ("embeddings", "encoder", "final_layer_norm"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeFiles(TakesModels):
    """Files."""

    models: tuple[Path, ...] = option(
        REQUIRED,
        "checkpoints (.safetensors or .ckpt), or OWNER/NAME/FILE of the Hugging Face Hub",
        missing="the checkpoints",
        reads="a file",
        hub="checkpoint",
    )
    output: Path = option(
        REQUIRED, "file to write; .safetensors is appended if it is missing", missing="the file to write"
    )
    ratios: tuple[float, ...] | None = option(None, "share of each model, of any sign; unset: equal shares")
    offline: bool = repeated(ModelConfig, "offline")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Merging."""

    unet_only: bool = option(False, "take text encoders and VAE from the first model")
    device: str = option("cpu", "where the sums are computed, such as cuda")
    precision: Precision = option("float", "accepted; sums are always computed in float32")
    saving_precision: Precision | None = option(None, "type of the tensors to write; unset: those of the first model")
    show_skipped: bool = option(False, "list the tensors that not all models have")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """All options."""

    files: MergeFiles
    merge: MergeOptions


@dataclasses.dataclass(frozen=True)
class WeightedCheckpoint:
    """A checkpoint with its ratio; names are current names -> names in the file."""

    file: WeightFile
    ratio: float
    names: dict[str, str]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self.file.shapes[self.names[name]]

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor; it can be read only once."""
        return self.file.take(self.names[name])

    def weight(self, name: str) -> torch.Tensor:
        """Return a tensor, as `tensor` does; raises UserError if a number in it is NaN or infinite."""
        from library.weight_file import check_finite

        tensor = self.tensor(name)
        check_finite(tensor, self.names[name], self.file.path)
        return tensor


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with a command line; return the exit code."""
    from library.models.hub import parse_with_models

    config = parse_with_models(MergeConfig, argv, description=__doc__, rules=(check_output, check_models))
    from library.parallel import one_thread

    with one_thread():
        run(config)
    return 0


def run(config: MergeConfig) -> None:
    """Read the models, merge them, and write the result."""
    output = output_path(config.files.output)
    from library.safetensors_io import write_stream

    models = open_models(config.files)
    check_family(models)
    check_shapes(models, config.merge)
    log_skipped(models, config.merge)
    types = types_to_write(models[0], config.merge)
    warn_of_eight_bits(models[0], types)
    infos = {name: (dtype, models[0].shape(name)) for name, dtype in types.items()}
    write_stream(output, infos, merged_tensors(models, types, config.merge), metadata_of(models, output, config.merge))
    logger.info("saved %s", output)


def output_path(output: Path) -> Path:
    """Return the file to write, with .safetensors appended if it is missing."""
    return output if output.suffix.lower() == SUFFIX else Path(f"{output}{SUFFIX}")


def check_output(config: MergeConfig, problems: Problems) -> None:
    """Raise UserError for an --output of another format."""
    output = config.files.output
    if output.suffix.lower() in tool_files.WEIGHT_SUFFIXES and output.suffix.lower() != SUFFIX:
        raise UserError(f"--output must end in {SUFFIX}, got {output}: other formats are read, but not written")


def check_models(config: MergeConfig, problems: Problems) -> None:
    """Add to problems what is wrong with --device, --ratios and --models."""
    problems.run(tool_files.check_device, config.merge.device)
    number, ratios = len(config.files.models), config.files.ratios
    if ratios is not None and len(ratios) != number:
        problems.add(f"--ratios must have a number for each of the {number} files of --models, got {len(ratios)}")
    existing = [path for path in config.files.models if path.exists()]
    for path in existing:
        problems.run(weight_format, path)
    output = output_path(config.files.output)
    if output.exists() and any(path.samefile(output) for path in existing):
        problems.add(f"--output {output} is one of the inputs: choose another name")


def check_family(models: Sequence[WeightedCheckpoint]) -> None:
    """Raise UserError for networks and for models of several families; an unknown family is no error."""
    for model in models:
        kind = network_kind(model)
        if kind is not None:
            raise UserError(
                f"{model.file.path} is a network ({kind}), and no checkpoint: networks/merge_lora.py merges LoRA files"
            )
    titles = {model.file.path: title for model in models if (title := family_title(model)) is not None}
    if len(set(titles.values())) > 1:
        found = ", ".join(f"{path} is {title}" for path, title in titles.items())
        raise UserError(f"only models of one family can be merged: {found}")


def network_kind(model: WeightedCheckpoint) -> str | None:
    """Return the kind of network that a file is, or None for another file; a checkpoint may have embeddings in it."""
    from library.adapters.readers import BUNDLED, kind_by_name

    kinds = (kind_by_name(name, model.shape(name)) for name in model.names)
    return next((kind for kind in kinds if kind not in (None, BUNDLED)), None)


def family_title(model: WeightedCheckpoint) -> str | None:
    """Return the name of a model's family, or None if it is not known."""
    from library.models.family import detect_family

    try:
        return detect_family({name: model.shape(name) for name in model.names}, str(model.file.path)).title
    except UserError:
        return None


def check_shapes(models: Sequence[WeightedCheckpoint], merge: MergeOptions) -> None:
    """Raise UserError for tensors of one name that cannot be summed, and for files without common names."""
    first = models[0]
    for other in models[1:]:
        common = [name for name in first.names if name in other.names]
        if not common:
            raise UserError(
                f"{other.file.path} has no tensor in common with {first.file.path}: are both of them checkpoints?"
            )
        for name in common:
            if is_merged(name, merge) and first.shape(name) != other.shape(name):
                raise UserError(
                    f"only models of one family and kind can be merged: {name} is of the shape {first.shape(name)} in "
                    f"{first.file.path} and {other.shape(name)} in {other.file.path}"
                )


def log_skipped(models: Sequence[WeightedCheckpoint], merge: MergeOptions) -> None:
    """Log tensors that not all models have, and ratios that do not add up to 1."""
    first, total = models[0], sum(model.ratio for model in models)
    if abs(total - 1) > TOLERANCE:
        logger.warning("the ratios add up to %g, not 1: the model becomes that much stronger or weaker", total)
    for other in models[1:]:
        lacking = sorted(name for name in first.names if name not in other.names and is_merged(name, merge))
        surplus = sorted(name for name in other.names if name not in first.names)
        if lacking:
            logger.info("%s lacks %d tensors: those of the first model are used", other.file.path, len(lacking))
        if surplus:
            logger.info("%s has %d tensors that the first model does not have: omitted", other.file.path, len(surplus))
        if merge.show_skipped:
            for kind, names in (("lacks", lacking), ("omitted", surplus)):
                for name in names:
                    logger.info("%s: %s %s", other.file.path, kind, name)


def open_models(files: MergeFiles) -> list[WeightedCheckpoint]:
    """Return the opened models; of safetensors files only the headers are read."""
    from library.weight_file import open_weights

    ratios = files.ratios or (1 / len(files.models),) * len(files.models)
    pairs = zip(map(open_weights, files.models), ratios, strict=True)
    return [WeightedCheckpoint(file, ratio, current_names(file.shapes)) for file, ratio in pairs]


def current_names(names: Mapping[str, object]) -> dict[str, str]:
    """Return current name -> name in the file; of a tensor under both names the current one is used."""
    return {current_name(name): name for name in names} | {name: name for name in names if name == current_name(name)}


def current_name(name: str) -> str:
    """Return a tensor's name with `text_model`, which early SD 1.x files lack in the names of the text encoder."""
    return name.replace(TEXT_ENCODER, f"{TEXT_ENCODER}text_model.", 1) if name.startswith(OLD_TEXT_NAMES) else name


def constant_kind(name: str) -> str | None:
    """Return what a tensor is that is no weight, None for a weight."""
    return next((kind for kind, end in NOT_WEIGHTS.items() if re.fullmatch(rf"(.*\.)?({end})", name)), None)


def is_merged(name: str, merge: MergeOptions) -> bool:
    """Return whether a tensor is summed if its type is floating point."""
    if constant_kind(name) is not None:
        return False
    return not (merge.unet_only and any(part in name for part in NOT_UNET))


def types_to_write(first: WeightedCheckpoint, merge: MergeOptions) -> dict[str, torch.dtype]:
    """Return name -> type to write, for all tensors in the order in which they are read; constants keep theirs."""
    current = {own: name for name, own in first.names.items()}
    types = {current[own]: dtype for own, dtype, _ in first.file.infos() if own in current}
    if merge.saving_precision is None:
        return types
    wanted = dtype_named(merge.saving_precision)
    return {
        name: wanted if dtype.is_floating_point and constant_kind(name) is None else dtype
        for name, dtype in types.items()
    }


def warn_of_eight_bits(first: WeightedCheckpoint, types: Mapping[str, torch.dtype]) -> None:
    """Log that sums are rounded to 8 bits, if the first model is stored in them."""
    rounded = [name for name, dtype in types.items() if dtype.is_floating_point and dtype.itemsize == 1]
    if rounded:
        logger.warning(
            "%s stores %d tensors in 8 bits, and so does the merged model; --saving_precision fp16 keeps more digits",
            first.file.path,
            len(rounded),
        )


def merged_tensors(
    models: Sequence[WeightedCheckpoint], types: Mapping[str, torch.dtype], merge: MergeOptions
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and tensor of the merged model; few tensors are in memory at a time.

    At the end what differs in the models and is not summed is logged. Raises UserError as `merged_tensor` does.
    """

    from library.parallel import WRITERS, by_module

    def needed(name: str) -> int:
        return BYTES_PER_NUMBER * math.prod(models[0].shape(name))

    def merged(name: str) -> tuple[torch.Tensor, list[Path]]:
        return merged_tensor(models, name, types[name], merge)

    results = by_module(merged, types, device=merge.device, most=WRITERS, size=needed)
    differing: dict[tuple[Path, str], list[str]] = {}
    for name, (tensor, others) in zip(
        types, Bar(results, desc="merging", total=len(types), unit="tensor"), strict=True
    ):
        for path in others:
            differing.setdefault((path, constant_kind(name) or "whole numbers"), []).append(name)
        yield name, tensor
    for (path, kind), names in differing.items():
        shown = f"{names[0]}, ..." if len(names) > 1 else names[0]
        logger.warning("%s: the %s differ (%s); those of the first model are used", path, kind, shown)


def merged_tensor(
    models: Sequence[WeightedCheckpoint], name: str, dtype: torch.dtype, merge: MergeOptions
) -> tuple[torch.Tensor, list[Path]]:
    """Return a tensor of the merged model, and the models in which it differs although it is not summed.

    Raises UserError for weights with NaN or infinity, and for sums that are too large for their type.
    """
    from library.weight_file import is_finite

    is_constant, others = constant_kind(name) is not None, []
    tensor = models[0].tensor(name) if is_constant else models[0].weight(name)
    if tensor.is_floating_point() and is_merged(name, merge):
        tensor = weighted_sum(models, name, tensor, merge.device)
    elif not merge.unet_only or not any(part in name for part in NOT_UNET):
        having = [model for model in models[1:] if name in model.names]
        others = [model.file.path for model in having if not is_same(tensor, model.tensor(name))]
    tensor = tensor.to(dtype)
    if not is_constant and not is_finite(tensor):
        raise UserError(
            f"{name} becomes too large for {str(dtype).removeprefix('torch.')}: "
            "take smaller ratios, or --saving_precision bf16 or float"
        )
    return tensor, others


def is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two constants are equal, to the rounding of the types that they are stored in."""
    import torch

    types = [tensor.dtype for tensor in (one, other) if tensor.is_floating_point()]
    rounding = max([SAME, *(torch.finfo(dtype).eps for dtype in types)]) if types else 0.0
    return one.shape == other.shape and torch.allclose(one.double(), other.double(), rtol=rounding, atol=0.0)


def weighted_sum(models: Sequence[WeightedCheckpoint], name: str, first: torch.Tensor, device: str) -> torch.Tensor:
    """Return the sum of ratio * tensor over the models, float32; a model that lacks it has the first one's.

    The first tensor may be overwritten.
    """
    import torch

    lacking = sum(model.ratio for model in models if name not in model.names)
    total = first.to(device, torch.float32).mul_(models[0].ratio + lacking)
    for model in models[1:]:
        if name in model.names:
            total.add_(model.weight(name).to(device, torch.float32), alpha=model.ratio)
    return total.cpu()


def metadata_of(models: Sequence[WeightedCheckpoint], output: Path, merge: MergeOptions) -> dict[str, str]:
    """Return the metadata of the merged model: those of the first one, title, sources and recipe."""
    from library.adapters.metadata import HASHES, RECIPE, inherited

    titles = [model.file.metadata.get("modelspec.title") or model.file.path.stem for model in models]
    sources = [
        {"name": model.file.path.name, "ratio": model.ratio}
        | {key: model.file.metadata[key] for key in HASHES if key in model.file.metadata}
        for model in models
    ]
    recipe = {"operation": "merge_models", "unet_only": merge.unet_only, "models": sources}
    return inherited(models[0].file.metadata) | {
        "modelspec.title": output.stem,
        "modelspec.merged_from": ", ".join(titles),
        RECIPE: json.dumps(recipe, ensure_ascii=False),
    }


if __name__ == "__main__":
    run_script(main, tool_files.LESS_MEMORY)
