"""Extract a LoRA from two models: their difference, approximated at a rank. SD 1.x, SD 2.x and SDXL.

python networks/extract_lora_from_models.py --model_org base.safetensors --model_tuned tuned.safetensors
    --save_to difference.safetensors --dim 32 --save_precision fp16

Each model is a checkpoint or a Diffusers folder. They are read layer by layer, and differences are computed in float32.
A text encoder that did not change is omitted.
"""

from __future__ import annotations

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
from library.config.tool_files import Precision
from library.errors import Problems, UserError, named
from library.logs import run_script
from library.progress import Bar

if TYPE_CHECKING:
    from torch import Tensor

    from library.adapters.energy import EnergyByBlock
    from library.adapters.layers import Layer, Place
    from library.adapters.low_rank import Change, Spectrum
    from library.models.checkpoint import Checkpoint

    Pairs = dict[Layer, tuple[Place, Place]]  # place of a layer in the original model, and in the tuned one

logger = logging.getLogger(__name__)

BYTES_PER_NUMBER = 10  # of a layer, while it is compared: in float32 in both models, and as it is stored in one


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractFiles(TakesModels):
    """Files."""

    model_org: Path = option(
        REQUIRED,
        "original model: a checkpoint, a Diffusers folder, or OWNER/NAME of the Hugging Face Hub",
        missing="the original model",
        hub="model",
    )
    model_tuned: Path = option(
        REQUIRED,
        "tuned model: a checkpoint, a Diffusers folder, or OWNER/NAME of the Hugging Face Hub",
        missing="the tuned model",
        hub="model",
    )
    save_to: Path = option(REQUIRED, "LoRA file to write", missing="the file to write")
    save_precision: Precision | None = option(None, "type of the tensors to write; unset: float")
    no_metadata: bool = option(False, "write no metadata about the two models")
    offline: bool = repeated(ModelConfig, "offline")

    def check_save_to(self, problems: Problems) -> None:
        """Add to problems what is wrong with --save_to."""
        tool_files.check_output("--save_to", self.save_to, problems)
        tool_files.check_apart("--save_to", self.save_to, (self.model_org, self.model_tuned))


@dataclasses.dataclass(frozen=True, kw_only=True)
class KindConfig:
    """Kind of model, which is detected."""

    v2: bool = option(False, "check that the models are SD 2.x")
    sdxl: bool = option(False, "check that the models are SDXL")
    v_parameterization: bool | None = option(None, "for the metadata; unset: true for SD 2.x, as in sd-scripts")
    load_precision: Precision | None = option(None, "accepted; differences are always computed in float32")
    load_original_model_to: str | None = option(None, "accepted; models are read layer by layer")
    load_tuned_model_to: str | None = option(None, "accepted; models are read layer by layer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """Extraction."""

    dim: int = option(4, "rank of linear layers and 1x1 convolutions", minimum=1)
    conv_dim: int | None = option(
        None, "rank of larger convolutions; unset: no modules for layers of resnets", minimum=1
    )
    min_diff: float = option(0.01, "omit a text encoder in which no number differs by more", minimum=0)
    clamp_quantile: float | None = option(
        None, "cut numbers of the factors above this quantile (sd-scripts: 0.99), which changes the result; unset: none"
    )
    exact: bool = option(False, "decompose the whole differences; otherwise the kept energy is within 0.1 % of that")
    seed: int = option(0, "seed of the random start of decompositions", minimum=0)
    device: str = option("cpu", "where the decompositions are computed, such as cuda")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """All options."""

    files: ExtractFiles
    kind: KindConfig
    extract: ExtractOptions


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with a command line; return the exit code."""
    from library.models.hub import parse_with_models

    config = parse_with_models(ExtractConfig, argv, description=__doc__, rules=(check_options,))
    from library.parallel import one_thread

    with one_thread():
        run(config)
    return 0


def run(config: ExtractConfig) -> None:
    """Compare the models, and write how they differ."""
    from library.adapters.alphas import with_one_alpha
    from library.adapters.energy import EnergyByBlock
    from library.adapters.lora_file import to_state_dict
    from library.files import disk_errors
    from library.models.checkpoint import open_checkpoint
    from networks.lora import write_weights

    problems = Problems()
    original, tuned = (
        problems.run(open_checkpoint, path) for path in (config.files.model_org, config.files.model_tuned)
    )
    problems.raise_if_any()
    assert original is not None and tuned is not None  # else there are problems
    check_kind(config.kind, original, tuned)
    has_convolutions = config.extract.conv_dim is not None
    pairs = paired_layers(original, tuned, with_convolutions=has_convolutions)
    energy = EnergyByBlock()
    changes = extracted(config.extract, original, tuned, pairs, energy)
    if not changes:
        others = left_out_words(original, tuned, pairs, has_convolutions=has_convolutions)
        raise UserError(
            f"{original.path} and {tuned.path} do not differ in the layers that are extracted, in those of text "
            f"encoders by no more than --min_diff {config.extract.min_diff:g}: there is nothing to extract"
            f"{f', but {others}' if others else ''}"
        )
    energy.log()
    if others := left_out_words(original, tuned, pairs, has_convolutions=has_convolutions):
        logger.warning("not in the LoRA: %s", others)
    changes = with_one_alpha(changes, config.files.save_to)
    tensors = to_state_dict(changes, tool_files.dtype_named(config.files.save_precision or "float"))
    with disk_errors(config.files.save_to):
        write_weights(config.files.save_to, tensors, metadata_of(config, original, tuned, changes))
    logger.info("saved %s: %d modules", config.files.save_to, len(changes))


def check_options(config: ExtractConfig, problems: Problems) -> None:
    """Add to problems what is wrong with the options of files, kind, ranks and decompositions."""
    problems.run(config.files.check_save_to, problems)
    if config.kind.v2 and config.kind.sdxl:
        problems.add("--v2 and --sdxl were both given: leave out both, the kind of model is detected")
    problems.run(tool_files.check_quantile, config.extract.clamp_quantile)
    problems.run(tool_files.check_device, config.extract.device)


def check_kind(kind: KindConfig, original: Checkpoint, tuned: Checkpoint) -> None:
    """Raise UserError for models of two kinds, or of another kind than the options name."""
    from library.models.family import check_flags

    if original.family is not tuned.family:
        raise UserError(
            f"{original.path} is an {original.family.title} model, {tuned.path} an {tuned.family.title} model: "
            "both must be of one kind"
        )
    check_flags(original.family, original.path, v2=kind.v2, sdxl=kind.sdxl)


def paired_layers(original: Checkpoint, tuned: Checkpoint, *, with_convolutions: bool) -> Pairs:
    """Return the layers that a LoRA changes, with their places in both models; raises UserError for unequal shapes."""
    from library.adapters.layers import places
    from library.models.checkpoint import UNET

    first, second = places(original), places(tuned)

    def wanted(layer: Layer) -> bool:
        return is_wanted(layer, with_convolutions=with_convolutions)

    pairs = {layer: (place, second[layer]) for layer, place in first.items() if layer in second and wanted(layer)}
    only_one = sorted(f"{layer.part}.{layer.path}" for layer in {*first, *second} - pairs.keys() if wanted(layer))
    if any(name.startswith(f"{UNET}.") for name in only_one):
        raise UserError(
            f"{len(only_one)} layers are in one of {original.path} and {tuned.path} only, such as {only_one[-1]}: "
            "one of the models is incomplete"
        )
    if only_one:
        logger.warning("%d layers of text encoders are in only one of the models; they are omitted", len(only_one))
    for layer, (one, other) in pairs.items():
        # Without ones: a linear layer and a 1x1 convolution are the same.
        first_shape, second_shape = original.shapes[one.name], tuned.shapes[other.name]
        if [size for size in first_shape if size != 1] != [size for size in second_shape if size != 1]:
            raise UserError(
                f"{layer.path} has the shape {first_shape} in {original.path} and {second_shape} in {tuned.path}: "
                "the models do not belong together"
            )
    return pairs


def is_wanted(layer: Layer, *, with_convolutions: bool) -> bool:
    """Return whether a layer is extracted: all of text encoders, of the U-Net attentions or, with more, all blocks."""
    from library.models.checkpoint import UNET

    return layer.part != UNET or ("_block" if with_convolutions else ".attentions.") in layer.path


def extracted(
    options: ExtractOptions, original: Checkpoint, tuned: Checkpoint, pairs: Pairs, energy: EnergyByBlock
) -> dict[str, Change]:
    """Return the change of each module that differs, except in text encoders below --min_diff; add their energy."""

    from library.adapters.layers import module_name
    from library.adapters.low_rank import clamped, exact_spectrum, nearest_spectrum
    from library.parallel import by_module
    from library.randomness import generator_for

    omitted = unchanged_encoders(options, original, tuned, pairs)
    pairs = {layer: places for layer, places in pairs.items() if layer.part not in omitted}

    def extract(layer: Layer) -> tuple[Change, Spectrum] | None:
        difference = difference_of(original, tuned, pairs[layer])
        if not bool(difference.any()):
            return None
        matrix = difference.flatten(1).to(options.device)
        is_large_conv = difference.ndim == 4 and difference.shape[2:] != (1, 1)
        rank = options.conv_dim if is_large_conv and options.conv_dim is not None else options.dim
        # A generator for each layer, so that the order of the work does not change the result.
        start = generator_for(options.seed, layer.part, layer.path)
        spectrum = exact_spectrum(matrix) if options.exact else nearest_spectrum(matrix, rank, start)
        # The same alpha for all, whatever their ranks: diffusers takes one alpha for all attention layers.
        change = spectrum.truncated(rank, (rank, *difference.shape[1:])).with_alpha(float(rank))
        if options.clamp_quantile is not None:
            change = clamped(change, options.clamp_quantile)
        return change.to("cpu"), spectrum

    def needed(layer: Layer) -> int:
        return BYTES_PER_NUMBER * math.prod(original.shapes[pairs[layer][0].name])

    changes: dict[str, Change] = {}
    results = by_module(extract, pairs, device=options.device, size=needed)
    for layer, found in zip(pairs, Bar(results, desc="extracting", total=len(pairs), unit="module"), strict=True):
        if found is not None:
            change, spectrum = found
            changes[module_name(layer, original.family)] = change
            energy.add(layer, spectrum, change.rank)
    return changes


def left_out_words(original: Checkpoint, tuned: Checkpoint, pairs: Pairs, *, has_convolutions: bool) -> str | None:
    """Return in words which layers have weights or biases that differ and are not extracted; None if there are none."""
    from library.adapters.layers import layers_of

    left = list(left_out(original, tuned, pairs))
    names = [f"{layer.part}.{layer.path}.{kind}" for layer, kind in left]
    matrices = {layer for layer in layers_of(original.family) if is_wanted(layer, with_convolutions=True)}
    more = [layer for layer, kind in left if kind == "weight" and layer in matrices]
    advice = f"; --conv_dim extracts {len(more)} of them" if more and not has_convolutions else ""
    return f"{len(names)} other tensors differ ({named(names)}){advice}" if names else None


def left_out(
    original: Checkpoint, tuned: Checkpoint, pairs: Pairs
) -> Iterator[tuple[Layer, Literal["weight", "bias"]]]:
    """Yield the weights and biases that differ and are not among the pairs."""
    import torch

    from library.adapters.layers import layers_of, norms_of, place_of
    from library.models.layout import Layout
    from library.parallel import by_module

    layouts = Layout(original), Layout(tuned)
    left: dict[tuple[Layer, Literal["weight", "bias"]], tuple[Place, Place]] = {}
    for layer in (*layers_of(original.family), *norms_of(original.family)):
        kinds: tuple[Literal["weight", "bias"], ...] = ("bias",) if layer in pairs else ("weight", "bias")
        for kind in kinds:
            one, other = (place_of(layout, layer, kind) for layout in layouts)
            if one is not None and other is not None:
                left[layer, kind] = one, other

    def differ(places: tuple[Place, Place]) -> bool:
        one, other = places
        first, second = one.part_of(original.read(one.name)), other.part_of(tuned.read(other.name))
        return first.shape == second.shape and not torch.equal(first.float(), second.float())

    def needed(places: tuple[Place, Place]) -> int:
        return BYTES_PER_NUMBER * math.prod(original.shapes[places[0].name])

    results = by_module(differ, left.values(), size=needed)
    yield from (key for key, is_other in zip(left, results, strict=True) if is_other)


def unchanged_encoders(options: ExtractOptions, original: Checkpoint, tuned: Checkpoint, pairs: Pairs) -> set[str]:
    """Return the text encoders in which no number differs by more than --min_diff."""
    from library.models.checkpoint import UNET

    largest: dict[str, float] = {}
    for layer, places in pairs.items():
        if layer.part != UNET and largest.get(layer.part, 0.0) <= options.min_diff:
            found = float(difference_of(original, tuned, places).abs().max())
            largest[layer.part] = max(found, largest.get(layer.part, 0.0))
    unchanged = {part for part, found in largest.items() if found <= options.min_diff}
    for part in sorted(unchanged):
        logger.info(
            "%s is omitted: its numbers differ by %.2g at most (--min_diff %g)",
            part.replace("_", " "),
            largest[part],
            options.min_diff,
        )
    return unchanged


def difference_of(original: Checkpoint, tuned: Checkpoint, places: tuple[Place, Place]) -> Tensor:
    """Return tuned minus original of a layer, float32, in the shape of the original; raises UserError for NaN."""
    from library.weight_file import check_finite

    weights = []
    for model, place in zip((original, tuned), places, strict=True):
        tensor = model.read(place.name).float()
        check_finite(tensor, place.name, model.path)
        weights.append(place.part_of(tensor))
    return weights[1].reshape(weights[0].shape).sub_(weights[0])


def metadata_of(
    config: ExtractConfig, original: Checkpoint, tuned: Checkpoint, changes: Mapping[str, Change]
) -> Mapping[str, str]:
    """Return the metadata of the LoRA file, with the keys that sd-scripts writes."""
    from library.adapters.metadata import RECIPE, common
    from library.models.family import SD2

    family, options = original.family, config.extract
    given = config.kind.v_parameterization
    predicts_v = family is SD2 if given is None else given
    linear = [change for change in changes.values() if not change.is_large_conv]
    conv = {}
    if options.conv_dim is not None:
        alphas = {change.alpha for change in changes.values() if change.is_large_conv} or {float(options.conv_dim)}
        conv = {"conv_dim": str(options.conv_dim), "conv_alpha": f"{alphas.pop():g}"}
    metadata = {
        "ss_v2": str(family is SD2),
        "ss_base_model_version": family.base_version(predicts_v=predicts_v),
        "ss_network_module": "networks.lora",
        "ss_network_dim": common({change.rank for change in linear}),
        "ss_network_alpha": common({change.alpha for change in linear} or {float(options.dim)}),
        "ss_network_args": json.dumps(conv),
    }
    if config.files.no_metadata:
        return metadata
    titles = [config.files.title_of(field) for field in ("model_org", "model_tuned")]
    return metadata | {
        "modelspec.title": config.files.save_to.stem,
        "modelspec.architecture": f"{family.architecture(predicts_v=predicts_v)}/lora",
        "modelspec.prediction_type": "v" if predicts_v else "epsilon",
        RECIPE: json.dumps({"operation": "extract", "original": titles[0], "tuned": titles[1]}, ensure_ascii=False),
    }


if __name__ == "__main__":
    run_script(main, tool_files.LESS_MEMORY)
