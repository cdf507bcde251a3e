"""Merging LoRA files by their strengths, into one LoRA or into a base model, which is written tensor by tensor."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from library.adapters.layer_weights import check_family, read_weights, weight_of
from library.adapters.layers import Layer, place_of, places
from library.adapters.lora_file import LoraFile, read_lora
from library.adapters.low_rank import Change
from library.config.tool_files import MergedLoras
from library.errors import UserError, named
from library.files import new_folder
from library.models import keys
from library.models.checkpoint import EXTRAS_FILE, TEXT_FILES, UNET_FILES, WHOLE, Checkpoint, tensor_name
from library.models.layout import Layout, Place
from library.parallel import WRITERS, by_module
from library.progress import Bar
from library.safetensors_io import write_stream
from library.weight_file import WeightFile, is_finite, write_weights

logger = logging.getLogger(__name__)

# Beginnings of the names of tensors that networks change; only these are written in another type.
MERGED_PARTS = (keys.UNET_PREFIX, *keys.TEXT_PREFIXES, "unet/", "text_encoder")
SUMMED_AT_ONCE = 2**20  # numbers of a tensor
ROW_GROUP = 16  # matrix products compute so many rows together, or a divisor of it


# --------------------------------------------------------------------------------------------------------------
# Files with their strengths
# --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Weighted:
    """A LoRA file with its strength."""

    file: LoraFile
    ratio: float
    weights: tuple[float, ...] | None = None  # by block, of --lbws

    def ratio_of(self, module: str) -> float:
        """Return the strength of one of its modules."""
        return self.ratio if self.weights is None else self.ratio * weight_of(module, self.weights)


def read_weighted(files: MergedLoras) -> list[Weighted]:
    """Return LoRA files with their ratios and lists of --lbws; raises UserError for files of different families."""
    weighted = []
    for path, ratio, lbw in zip(files.models, files.ratios, files.lbws or [None] * len(files.models), strict=True):
        file, weights = read_lora(path), None if lbw is None else read_weights(lbw)
        if weights is not None:
            check_family(weights, file.family, path)
        weighted.append(Weighted(file, ratio, weights))
    known = {each.file.family: each.file.path for each in weighted if each.file.family is not None}
    if len(known) > 1:
        pairs = ", ".join(f"{path} is for {family.title}" for family, path in known.items())
        raise UserError(f"the files are for different models: {pairs}")
    return weighted


def parts_by_module(files: Sequence[Weighted], *, allow_unmatched: bool) -> dict[str, list[tuple[float, Change]]]:
    """Return module -> its changes in the files, each with its ratio.

    Raises UserError if modules of the same name are for layers of different shapes.
    """
    parts: dict[str, list[tuple[float, Change]]] = {}
    for weighted in files:
        file = weighted.file
        warn_of_unmatched(file, [*file.unknown, *file.embeddings], "a LoRA network", allowed=allow_unmatched)
        for name, change in file.changes.items():
            parts.setdefault(name, []).append((weighted.ratio_of(name), change))
    for name, same in parts.items():
        if len({change.layer_shape for _, change in same}) > 1:
            raise UserError(f"{name} is for different layers in the files: they are for different models")
    return parts


# --------------------------------------------------------------------------------------------------------------
# Into a base model
# --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Merge:
    """How a model is changed: additions by tensor, the type of the result, metadata to add to the model's own."""

    additions: Mapping[str, Sequence[Addition]]
    dtype: torch.dtype
    metadata: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Addition:
    """A term that is added to a tensor of a model, or to a third of it: ratio * alpha / R * U D."""

    ratio: float
    change: Change
    third: int | None

    def term(self, num_rows: int) -> tuple[int, torch.Tensor, torch.Tensor, float]:
        """Return the first of the rows that change, of so many, U and D in float32, and the factor of U D."""
        first = 0 if self.third is None else self.third * (num_rows // 3)
        return first, self.change.up.float(), self.change.down.float(), self.ratio * self.change.scale


def additions_by_tensor(
    model: Checkpoint, files: Sequence[Weighted], *, allow_unmatched: bool
) -> dict[str, list[Addition]]:
    """Return tensor name -> additions.

    Raises UserError for files of another family, modules that the model does not have, and shapes that do not fit.
    """
    known = places(model)
    additions: dict[str, list[Addition]] = {}
    for weighted in files:
        file = weighted.file
        if file.family is not None and file.family is not model.family:
            raise UserError(f"{file.path} is for {file.family.title}, {model.path} is an {model.family.title} model")
        missing = []
        for name, change, place in placed(file, model, known):
            if place is None:
                missing.append(name)
                continue
            check_shape(file, name, change, model.shapes[place.name], place)
            ratio = weighted.ratio_of(name)
            if ratio != 0:
                additions.setdefault(place.name, []).append(Addition(ratio, change, place.third))
        if len(missing) == len(file.changes) + len(file.vectors):
            raise UserError(f"{file.path}: none of its {len(missing)} modules is in {model.path} ({missing[0]}, ...)")
        left = [*sorted(missing), *file.unknown, *file.embeddings]
        warn_of_unmatched(file, left, model.path, allowed=allow_unmatched)
    if not additions:
        logger.warning("nothing of %s changes: every strength is 0", model.path)
    return additions


def placed(
    file: LoraFile, model: Checkpoint, known: Mapping[Layer, Place]
) -> Iterator[tuple[str, Change, Place | None]]:
    """Yield the name of each change and vector of a file, the change, and its place in a model; None: it has none."""
    for name, change in file.changes.items():
        layer = file.layer(name)
        yield name, change, None if layer is None else known.get(layer)
    layout = Layout(model)
    for name, vector in file.vectors.items():
        yield name, vector.change, place_of(layout, vector.layer, vector.kind)


def merged_vectors(files: Sequence[Weighted]) -> dict[str, torch.Tensor]:
    """Return the weighted sum of the vectors of the files, by name, float32.

    Raises UserError if vectors of the same name have different sizes.
    """
    total: dict[str, torch.Tensor] = {}
    for weighted in files:
        for name, vector in weighted.file.vectors.items():
            values = vector.values.float() * weighted.ratio_of(name)
            if name in total and total[name].shape != values.shape:
                raise UserError(f"{name} has different sizes in the files: they are for different models")
            total[name] = total[name] + values if name in total else values
    return total


def warn_of_unmatched(file: LoraFile, names: Sequence[str], where: Path | str, *, allowed: bool) -> None:
    """Warn of modules that have no place in a model; raises UserError unless that is allowed."""
    if not names:
        return
    total = len({*names, *file.changes, *file.vectors})
    text = f"{file.path}: {len(names)} of {total} modules are not in {where} ({named(names)})"
    if not allowed:
        raise UserError(f"{text}; --allow_unmatched skips them")
    logger.warning("%s; they are skipped", text)


def check_shape(file: LoraFile, name: str, change: Change, shape: Sequence[int], place: Place) -> None:
    """Raise UserError if a change does not fit its tensor."""
    rows = shape[0] if place.third is None else shape[0] // 3
    needed = (rows, math.prod(shape[1:]))
    if change.layer_shape != needed:
        raise UserError(f"{file.path}: {name} is for a layer of {change.layer_shape}, this model has {needed}")


def merged_tensor(tensor: torch.Tensor, additions: Sequence[Addition], dtype: torch.dtype) -> torch.Tensor:
    """Return the sum of a tensor of a model and its additions, computed in float32, in dtype.

    The result is in the tensor's own memory if its type is dtype and it is contiguous. Some rows are summed at a time,
    which the cache of a core holds: a float32 copy of the whole would cost more than the arithmetic.
    """
    if not additions:
        return tensor.to(dtype)
    tensor = tensor.contiguous()  # those of pickles may lie otherwise in memory
    result = tensor if tensor.dtype == dtype else torch.empty_like(tensor, dtype=dtype)
    source, target = (each.view(each.shape[0], -1) for each in (tensor, result))
    terms = [addition.term(len(source)) for addition in additions]
    step = max(1, SUMMED_AT_ONCE // source.shape[1] // ROW_GROUP) * ROW_GROUP
    for start in range(0, len(source), step):
        total = source[start : start + step].to(torch.float32, copy=True)
        for first, up, down, strength in terms:
            low, high = max(start, first), min(start + len(total), first + len(up))
            if low < high:
                part = total[low - start : high - start]
                part.addmm_(up[low - first : high - first], down, alpha=strength)
        target[start : start + step] = total
    return result


def result_type(name: str, own: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """Return the type in which a tensor is written."""
    return dtype if name.startswith(MERGED_PARTS) and own.is_floating_point else own


# --------------------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------------------


def write_merged(model: Checkpoint, merge: Merge, save_to: Path) -> None:
    """Write a merged model to a file, or to a folder if the model is one."""
    total = len(model.shapes)
    logger.info("%d tensors of %s change, %d stay", len(merge.additions), model.path, total - len(merge.additions))
    bar: Bar[None] = Bar(total=total, desc="merging", unit="tensor")
    with bar:
        if not model.is_folder:
            write_part(model.parts[WHOLE].files[0], "", merge, save_to, bar)
            return
        with new_folder(save_to) as folder:
            copy_others(model, folder, shards=True, dtype=merge.dtype)
            for part, files in model.parts.items():
                for file in files.files:
                    write_part(file, part, merge, folder / file.path.relative_to(model.path), bar)


def write_part(file: WeightFile, part: str, merge: Merge, path: Path, bar: Bar[None]) -> None:
    """Write one weight file of a model, merged, tensor by tensor."""
    sources = {name: (dtype, shape) for name, dtype, shape in file.infos()}
    infos = {
        name: (result_type(tensor_name(part, name), dtype, merge.dtype), shape)
        for name, (dtype, shape) in sources.items()
    }

    def needed(own_name: str) -> int:
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in (sources[own_name], infos[own_name]))

    def result_of(own_name: str) -> tuple[torch.Tensor, bool]:
        added = merge.additions.get(tensor_name(part, own_name), ())
        return checked_sum(own_name, file.take(own_name), added, infos[own_name][0])

    results = by_module(result_of, sources, most=WRITERS, size=needed)

    def merged() -> Iterator[tuple[str, torch.Tensor]]:
        for own_name, (result, was_finite) in zip(sources, results, strict=True):
            if not was_finite:
                logger.warning("%s: %s holds NaN or infinity, and so does the result", file.path, own_name)
            yield own_name, result
            bar.update()

    if path.suffix.lower() != ".safetensors":
        write_weights(path, dict(merged()))
        return
    write_stream(path, infos, merged(), dict(file.metadata) | dict(merge.metadata))


def checked_sum(
    name: str, tensor: torch.Tensor, additions: Sequence[Addition], dtype: torch.dtype
) -> tuple[torch.Tensor, bool]:
    """Return the merged tensor, and whether the tensor of the model is finite.

    Raises UserError if only the result is not.
    """
    own, was_finite = tensor.dtype, is_finite(tensor)
    result = merged_tensor(tensor, additions, dtype)
    if was_finite and (additions or dtype != own) and not is_finite(result):
        raise UserError(
            f"{name} becomes too large for {str(dtype).removeprefix('torch.')}: "
            "take smaller ratios, or --save_precision bf16 or float"
        )
    return result, was_finite


def copy_others(model: Checkpoint, folder: Path, *, shards: bool, dtype: torch.dtype | None = None) -> None:
    """Copy the files of a Diffusers folder other than weights: configurations, tokenizer, scheduler; indexes if shards.

    Other files, such as a model card, describe the former model and are not copied. dtype is the new type of the text
    encoders, which their configurations contain.
    """
    weights = (*UNET_FILES, *TEXT_FILES)
    for path in sorted(model.path.rglob("*")):
        relative = path.relative_to(model.path)
        is_weights = relative.parts[0] in model.parts and path.name.startswith(weights)
        is_index = ".index." in path.name and path.suffix == ".json"
        is_foreign = len(relative.parts) == 1 and relative.name not in ("model_index.json", EXTRAS_FILE)
        if path.is_dir() or is_foreign or (is_weights and not (shards and is_index)):
            continue
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, folder / relative)
        if dtype is not None and relative.parts[0].startswith("text_encoder") and relative.name == "config.json":
            name_type(folder / relative, dtype)
        if relative.name == "model_index.json":
            leave_out_parts(folder / relative, model.path)


def leave_out_parts(path: Path, source: Path) -> None:
    """Leave out of a model index the parts that the source lacks, such as a safety checker: diffusers asks for them."""
    index = json.loads(path.read_text(encoding="utf-8"))
    absent = {
        name: [None, None] for name, kind in index.items() if isinstance(kind, list) and not (source / name).is_dir()
    }
    if absent and any(index[name] != kind for name, kind in absent.items()):
        path.write_text(json.dumps(index | absent, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def name_type(path: Path, dtype: torch.dtype) -> None:
    """Write a type of weights into a configuration of transformers, if it contains one."""
    config = json.loads(path.read_text(encoding="utf-8"))
    named = {key: str(dtype).removeprefix("torch.") for key in ("dtype", "torch_dtype") if key in config}
    path.write_text(json.dumps(config | named, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
