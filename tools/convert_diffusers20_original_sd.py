"""Convert a base model between one file (checkpoint) and a Diffusers folder: SD 1.x, SD 2.x and SDXL.

python tools/convert_diffusers20_original_sd.py model.safetensors folder
python tools/convert_diffusers20_original_sd.py folder model.safetensors --fp16

The kind of model is detected. A destination that ends in .safetensors or .ckpt is a checkpoint, any other a folder.
Tensors are converted one by one.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if __package__ in (None, ""):  # started as a script, from any folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config import tool_files
from library.config.hub_names import TakesModels
from library.config.model import ModelConfig
from library.config.options import REQUIRED, option, repeated
from library.errors import Problems, named
from library.logs import run_script
from library.progress import Bar

if TYPE_CHECKING:
    import torch

    from library.models.checkpoint import Checkpoint
    from library.models.layout import Content

logger = logging.getLogger(__name__)


def read_metadata(text: str) -> dict[str, str]:
    """Return the metadata in a JSON object, or in a Python dict as in sd-scripts; values become texts.

    Raises ValueError for anything else.
    """
    try:
        table = json.loads(text)
    except (ValueError, RecursionError):
        try:
            table = ast.literal_eval(text)  # constants only: no code is run
        except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):  # those in its documentation
            table = None
    if not isinstance(table, dict):
        raise ValueError(text)
    return {
        str(key): value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        for key, value in table.items()
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertFiles(TakesModels):
    """Files."""

    model_to_load: Path = option(
        REQUIRED, "checkpoint, Diffusers folder, or OWNER/NAME of the Hugging Face Hub", positional=True, hub="model"
    )
    model_to_save: Path = option(REQUIRED, "checkpoint (.safetensors, .ckpt) or folder", positional=True)
    variant: str | None = repeated(ModelConfig, "variant")
    reference_model: Path | None = option(
        None,
        "Diffusers folder, or OWNER/NAME, whose scheduler and tokenizer are copied; unset: those of published models",
        reads="a folder",
        hub="surroundings",
    )
    offline: bool = repeated(ModelConfig, "offline")
    use_safetensors: bool = option(False, "accepted; folders always hold safetensors")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KindOptions:
    """Model."""

    v1: bool = option(False, "check that the model is SD 1.x; the kind is detected")
    v2: bool = option(False, "check that the model is SD 2.x; the kind is detected")
    v_parameterization: bool = option(False, "the model predicts v, which the scheduler or the metadata record")
    unet_use_linear_projection: bool = option(False, "accepted; the U-Nets of SD 2.x are always written with it")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """Saving."""

    fp16: bool = option(False, "write float16")
    bf16: bool = option(False, "write bfloat16")
    float_: bool = option(False, "write float32", flag="float")
    save_precision_as: Literal["no", "fp16", "bf16", "float"] = option("no", "the same in one option; no: unchanged")
    epoch: int = option(0, "epochs written to a .ckpt, added to those of the source")
    global_step: int = option(0, "steps written to a .ckpt, added to those of the source")
    metadata: str | None = option(None, 'metadata of a .safetensors file: a JSON object such as {"title": "x"}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """All options."""

    files: ConvertFiles
    model: KindOptions
    saving: WriteOptions


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with a command line; return the exit code."""
    from library.models.hub import parse_with_models

    rules = (check_files, check_options, check_saving)
    config = parse_with_models(ConvertConfig, argv, description=__doc__, rules=rules)
    from library.parallel import one_thread

    with one_thread():
        run(config)
    return 0


def run(config: ConvertConfig) -> None:
    """Read the model, convert it, and write the result."""
    from library.models.checkpoint import open_checkpoint
    from library.models.family import check_flags

    model = open_checkpoint(config.files.model_to_load, variant=config.files.variant)
    check_flags(model.family, model.path, v1=config.model.v1, v2=config.model.v2)
    warn_of_no_vae(model, config.files.model_to_save)
    if is_checkpoint(config.files.model_to_save):
        write_checkpoint(config, model)
    else:
        write_folder(config, model)
    logger.info("saved %s", config.files.model_to_save)


def warn_of_no_vae(model: Checkpoint, destination: Path) -> None:
    """Log that a model has no VAE, and what reads the result nevertheless."""
    from library.models.checkpoint import VAE
    from library.models.completeness import parts_of

    if VAE not in parts_of(model):
        others = (
            "others need a VAE beside the file"
            if is_checkpoint(destination)
            else ("from_pretrained of diffusers refuses the folder unless it is given vae=AutoencoderKL...")
        )
        logger.warning(
            "%s has no VAE, and neither has %s: train_network.py and gen_img_diffusers.py read it with --vae, and %s",
            model.path,
            destination,
            others,
        )


def is_checkpoint(path: Path) -> bool:
    """Return whether a destination is one file; a folder may have a dot in its name."""
    return path.suffix.lower() in tool_files.WEIGHT_SUFFIXES


def check_files(config: ConvertConfig, problems: Problems) -> None:
    """Add to problems what is wrong with the model to read and the destination."""
    source, destination = config.files.model_to_load, config.files.model_to_save
    tool_files.check_apart("model_to_save", destination, (source,))
    tool_files.check_output("model_to_save", destination, problems, folder=not is_checkpoint(destination))


def check_options(config: ConvertConfig, problems: Problems) -> None:
    """Add to problems two kinds of model."""
    if config.model.v1 and config.model.v2:
        problems.add("--v1 and --v2 were both given: leave out both, the kind of model is detected")


def check_saving(config: ConvertConfig, problems: Problems) -> None:
    """Add to problems what is wrong with the type and the metadata to write."""
    saving, destination = config.saving, config.files.model_to_save
    given = [name for name, value in (("fp16", saving.fp16), ("bf16", saving.bf16), ("float", saving.float_)) if value]
    if len(given) > 1:
        problems.add(f"one type can be written, got --{' --'.join(given)}")
    try:
        read_metadata(saving.metadata or "{}")
    except ValueError:
        problems.add(f'--metadata must be a JSON object such as {{"title": "x"}}, got {saving.metadata}')
    if saving.metadata and destination.suffix.lower() != ".safetensors":
        problems.add(f"--metadata is for .safetensors files, {destination} is not one")


def written_type(saving: WriteOptions) -> torch.dtype | None:
    """Return the type of the tensors to write, None to keep the type of each."""
    words = {"fp16": saving.fp16, "bf16": saving.bf16, "float": saving.float_}
    word = next((word for word, given in words.items() if given), saving.save_precision_as)
    return None if word == "no" else tool_files.dtype_named(word)


def write_checkpoint(config: ConvertConfig, model: Checkpoint) -> None:
    """Write a checkpoint of the original layout."""
    from library.models import conversion, layout
    from library.models.completeness import check_result

    path = config.files.model_to_save
    v_prediction = said_prediction(config, model)
    plan, whole = conversion.plan_of_file(model, v_prediction=bool(v_prediction))
    infos = layout.planned_infos(plan, model, written_type(config.saving))
    kept = conversion.kept_beside(model, whole, infos, path)
    metadata = own_metadata(model) | kept.metadata() | checkpoint_metadata(config, model, v_prediction=v_prediction)
    check_result(conversion.planned_file(path, infos, metadata), model, whole)
    write_file(config.saving, model, layout.Content(plan, infos), path, metadata)


def own_metadata(model: Checkpoint) -> dict[str, str]:
    """Return the metadata of a model without those that describe its tensors."""
    from library.models.checkpoint import ADDED_TOKENS, CONFIGURATIONS

    own = ("format", CONFIGURATIONS, ADDED_TOKENS)
    return {key: text for key, text in model.metadata.items() if key not in own}


def said_prediction(config: ConvertConfig, model: Checkpoint) -> bool | None:
    """Return whether a model predicts v as the option or its files say; None if they do not."""
    from library.models.prediction import prediction_of

    found = prediction_of(model)
    return config.model.v_parameterization or (found.predicts_v if found.is_sure else None)


def checkpoint_metadata(config: ConvertConfig, model: Checkpoint, *, v_prediction: bool | None) -> dict[str, str]:
    """Return what is added to the metadata of a checkpoint: its architecture, unless it has one, and --metadata.

    v_prediction: whether it predicts v; None if nothing says so.
    """
    added = {}
    if v_prediction is not None and "modelspec.prediction_type" not in model.metadata:
        added["modelspec.prediction_type"] = "v" if v_prediction else "epsilon"
    if "modelspec.architecture" not in model.metadata:
        added["modelspec.architecture"] = model.family.architecture(predicts_v=bool(v_prediction))
    return added | read_metadata(config.saving.metadata or "{}")


def write_folder(config: ConvertConfig, model: Checkpoint) -> None:
    """Write a Diffusers folder."""
    from library.adapters.merging import copy_others
    from library.files import new_folder
    from library.models import conversion, layout
    from library.models.checkpoint import EXTRAS, EXTRAS_FILE, UNET, file_stems, split_name
    from library.models.completeness import check_result, whole_plan
    from library.models.prediction import prediction_of
    from library.models.surroundings import write_surroundings

    whole = whole_plan(model)
    if model.is_folder:
        plan = layout.copy_plan(model)
    else:
        copied = layout.copy_plan(model)
        extras = {f"{EXTRAS}/{name}": copied[name] for name in conversion.kept_in_folder(model, whole)}
        plan = whole | extras
    infos = layout.planned_infos(plan, model, written_type(config.saving))
    with new_folder(config.files.model_to_save) as folder:
        if model.is_folder:
            copy_others(model, folder, shards=False)  # shards become one file
        else:
            tokens = conversion.tokens_of(model, whole)
            v_prediction = v_prediction_of(config, model)
            zero_snr = v_prediction and prediction_of(model).zero_snr
            write_surroundings(folder, model, tokens=tokens, v_prediction=v_prediction, zero_snr=zero_snr)
        check_result(conversion.planned_folder(folder, infos), model, whole)
        for part in dict.fromkeys(split_name(name)[0] for name in plan):
            start = f"{part}/"
            own = {name.removeprefix(start): piece for name, piece in plan.items() if name.startswith(start)}
            content = layout.Content(own, {name: infos[f"{start}{name}"] for name in own})
            metadata = own_metadata(model) if part == UNET else {}
            name = EXTRAS_FILE if part == EXTRAS else f"{part}/{file_stems(part)[0]}.safetensors"
            write_file(config.saving, model, content, folder / name, metadata | {"format": "pt"})
        if config.files.reference_model is not None:
            copy_reference(config.files.reference_model, folder)


def copy_reference(source: Path, folder: Path) -> None:
    """Copy scheduler and tokenizers of a Diffusers folder over those of another."""
    import shutil

    for part in ("scheduler", "tokenizer", "tokenizer_2"):
        if (source / part).is_dir() and (folder / part).is_dir():
            shutil.rmtree(folder / part)  # a tokenizer must not mix files of two
            shutil.copytree(source / part, folder / part)


def v_prediction_of(config: ConvertConfig, model: Checkpoint) -> bool:
    """Return whether the scheduler records that the model predicts v; if the options do not say so, log it."""
    from library.models.prediction import prediction_of

    if config.model.v_parameterization:
        return True
    found = prediction_of(model).predicts_v
    if found is not None:
        logger.info(
            "scheduler: the model predicts %s, as far as its file shows; if it predicts v, give --v_parameterization",
            "v" if found else "noise",
        )
    return bool(found)


def converted_tensors(
    model: Checkpoint, content: Content, path: Path, dtype: torch.dtype | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield names and tensors of a file; at the end log those, written in a type, that are not finite."""

    from library.models.checkpoint import TEXT_FILES, UNET_FILES
    from library.models.layout import planned_tensor
    from library.parallel import WRITERS, by_module
    from library.weight_file import is_finite

    def converted(name: str) -> tuple[torch.Tensor, bool]:
        tensor = planned_tensor(content.plan[name], model, content.infos[name][0])
        return tensor, is_finite(tensor)

    def needed(name: str) -> int:
        kind, shape = content.infos[name]
        return 2 * kind.itemsize * math.prod(shape)  # as it is read, too

    part = path.stem if path.stem not in (*UNET_FILES, *TEXT_FILES) else path.parent.name
    results = by_module(converted, content.plan, most=WRITERS, size=needed)
    bad = []
    for name, (tensor, is_good) in zip(
        content.plan, Bar(results, desc=part, total=len(content.plan), unit="tensor"), strict=True
    ):
        bad += [] if is_good else [name]
        yield name, tensor
        del tensor  # before the next one is made
    if bad:
        kind = str(dtype).removeprefix("torch.")
        advice = "" if dtype is None else f"; numbers of the source that are finite are too large for {kind}"
        logger.warning("%s: NaN or infinity in tensors: %d (%s)%s", path.name, len(bad), named(bad), advice)


def write_file(
    saving: WriteOptions, model: Checkpoint, content: Content, path: Path, metadata: Mapping[str, str]
) -> None:
    """Write one weight file, tensor by tensor."""
    from library.file_kinds import PICKLE, weight_format
    from library.pickles import load_pickle, write_pickle
    from library.safetensors_io import write_stream

    tensors = converted_tensors(model, content, path, written_type(saving))
    if path.suffix.lower() == ".safetensors":
        write_stream(path, content.infos, tensors, metadata)
        return
    counts = {"epoch": saving.epoch, "global_step": saving.global_step}
    source = model.path
    if source.is_file() and weight_format(source) == PICKLE:
        former = load_pickle(source)
        known = {name: former[name] for name in counts if isinstance(former.get(name), int)}
        counts = {name: number + known.get(name, 0) for name, number in counts.items()}
    write_pickle(path, counts | {"state_dict": dict(tensors)})


if __name__ == "__main__":
    run_script(main)
