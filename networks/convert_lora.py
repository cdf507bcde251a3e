"""Convert LoRA files between the formats of sd-scripts and of diffusers and PEFT: SD 1.x, SD 2.x and SDXL.

python networks/convert_lora.py --model pytorch_lora_weights.safetensors --save_to lora.safetensors
python networks/convert_lora.py --model lora.safetensors --save_to pytorch_lora_weights.safetensors --to diffusers

The format of the source is detected. Numbers and their types are unchanged wherever the new format allows. The last
line tells which programs read the result.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if __package__ in (None, ""):  # started as a script, from any folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config import tool_files
from library.config.command_line import parse
from library.config.options import option
from library.config.tool_files import ConvertedLora, Precision
from library.errors import Problems
from library.logs import run_script

if TYPE_CHECKING:
    import torch

    from library.adapters.layers import Layer
    from library.adapters.lora_file import LoraFile
    from library.models.family import ModelFamily

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Conversion."""

    to: Literal["kohya", "kohya_diffusers", "diffusers"] = option(
        "kohya",
        "names to write: kohya, which all programs read; kohya_diffusers the same, but SDXL's U-Net by the blocks of "
        "diffusers, which sd-scripts does not read; diffusers for load_lora_weights and PEFT, which web UIs do not "
        "read, or only in part",
    )
    keep_alpha: bool = option(
        False,
        "with --to diffusers: write alphas as PEFT's configuration, which only diffusers reads, from version 0.35; "
        "otherwise the matrices are multiplied by them",
    )
    save_precision: Precision | None = option(None, "type of the tensors to write; unset: that of the source")
    allow_unmatched: bool = option(False, "skip modules that have no name in the other format")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """All options."""

    files: ConvertedLora
    convert: ConvertOptions


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with a command line; return the exit code."""
    config = parse(ConvertConfig, argv, description=__doc__, rules=(check_options,))
    from library.parallel import one_thread

    with one_thread():
        run(config)
    return 0


def run(config: ConvertConfig) -> None:
    """Read the file, convert it, and write the result."""
    from library.adapters.lora_file import read_lora
    from library.files import disk_errors
    from networks.lora import write_weights

    file = read_lora(config.files.model)
    layers = known_layers(file, config.convert)
    tensors, metadata = (for_diffusers if config.convert.to == "diffusers" else for_kohya)(file, layers, config.convert)
    with disk_errors(config.files.save_to):
        write_weights(config.files.save_to, tensors, metadata)
    logger.info("saved %s: %d modules, %s", config.files.save_to, len(layers), family_title(file))
    logger.info("%s", readers_of(config.files.save_to, tensors, file.family, metadata))


def readers_of(
    path: Path, tensors: Mapping[str, torch.Tensor], family: ModelFamily | None, metadata: Mapping[str, str]
) -> str:
    """Return in words which programs read a file with such tensors."""
    from library.adapters import readers
    from library.adapters.lora_file import whole_changes

    keys = readers.keys_of({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    alphas = {module: change.alpha for module, change in whole_changes(path, metadata, tensors).items()}
    return readers.audience(keys, family, alphas, metadata)


def check_options(config: ConvertConfig, problems: Problems) -> None:
    """Add to problems what is wrong with --save_to, and options that do not fit together."""
    problems.run(config.files.check_save_to, problems)
    if config.convert.keep_alpha and config.convert.to != "diffusers":
        problems.add("--keep_alpha is for --to diffusers; files of sd-scripts always have their alphas")


def known_layers(file: LoraFile, options: ConvertOptions) -> dict[str, Layer]:
    """Return module -> layer; raises UserError for modules that are not known, unless skipping them is allowed."""
    from library.adapters.merging import warn_of_unmatched

    where = f"models of {family_title(file)}" if options.to != "diffusers" else "files of diffusers"
    warn_of_unmatched(file, left_over(file, options), where, allowed=options.allow_unmatched)
    return {name: layer for name in file.changes if (layer := file.layer(name)) is not None}


def left_over(file: LoraFile, options: ConvertOptions) -> list[str]:
    """Return the names of what the other format cannot hold: files of diffusers have neither vectors nor embeddings."""
    more = [*file.vectors, *file.embeddings] if options.to == "diffusers" else []
    return [*file.unknown, *more]


def family_title(file: LoraFile) -> str:
    """Return the name of the family of models that a file is for."""
    return file.family.title if file.family else "SD 1.x or 2.x"


def written_type(options: ConvertOptions) -> torch.dtype | None:
    """Return the type of the tensors to write, None to keep the type of each."""
    return None if options.save_precision is None else tool_files.dtype_named(options.save_precision)


def for_kohya(
    file: LoraFile, layers: Mapping[str, Layer], options: ConvertOptions
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return tensors and metadata in the format of sd-scripts."""
    from library.adapters.alphas import with_one_alpha
    from library.adapters.layers import diffusers_word, module_name
    from library.adapters.lora_file import to_state_dict, with_own_text_names
    from library.adapters.metadata import architecture, common, inherited, network_metadata
    from library.models.family import SD1

    family = file.family or SD1  # SD 2.x has the same names
    name_of = module_name if options.to == "kohya" else diffusers_word
    named = {name_of(layer, family): file.changes[module] for module, layer in layers.items()}
    named = with_one_alpha(named, file.path)
    vectors = {vector.name(name_of, family): vector.values for vector in file.vectors.values()}
    tensors, changes = to_state_dict(named, written_type(options)) | vectors | file.embeddings, named.values()
    metadata = network_metadata([file], {change.rank for change in changes}, {change.alpha for change in changes})
    if file.family is not None:
        metadata |= {"ss_v2": str(family.name == "sd2"), "ss_base_model_version": family.base_version(predicts_v=False)}
    kept = {key: text for key, text in inherited(file.metadata).items() if key != "format"}
    if common({change.rank for change in changes}) == "Dynamic":
        logger.info("modules have different ranks; readers take each module's own")
    tensors = with_own_text_names(tensors, [file])
    return tensors, architecture(file.family, file.metadata, is_network=True) | metadata | kept


def for_diffusers(
    file: LoraFile, layers: Mapping[str, Layer], options: ConvertOptions
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return tensors and metadata in the format of diffusers and PEFT."""
    from library.adapters.layers import peft_name
    from library.adapters.lora_file import to_state_dict
    from library.adapters.metadata import inherited
    from library.adapters.peft_config import METADATA_KEY

    named = {peft_name(layer): file.changes[module] for module, layer in layers.items()}
    if not options.keep_alpha:
        named = {name: change.with_alpha(float(change.rank)) for name, change in named.items()}
    tensors = to_state_dict(named, written_type(options), (".lora_A.weight", ".lora_B.weight"))
    metadata = {"format": "pt"} | inherited(file.metadata)
    if options.keep_alpha:
        metadata[METADATA_KEY] = json.dumps(peft_configuration(file, layers), sort_keys=True)
    return tensors, metadata


def peft_configuration(file: LoraFile, layers: Mapping[str, Layer]) -> dict[str, Any]:
    """Return the configuration of PEFT for each part: the commonest rank and alpha, and the modules with others.

    PEFT matches the ends of paths, so those of text encoders are without `text_model.`, which newer versions of
    transformers do not have.
    """
    configuration: dict[str, Any] = {}
    for part in sorted({layer.part for layer in layers.values()}):
        own = {layer.path: file.changes[module] for module, layer in layers.items() if layer.part == part}
        rank = statistics.mode(change.rank for change in own.values())
        alpha = statistics.mode(change.alpha for change in own.values())
        configuration |= {
            f"{part}.r": rank,
            f"{part}.lora_alpha": alpha,
            f"{part}.rank_pattern": {path: change.rank for path, change in own.items() if change.rank != rank},
            f"{part}.alpha_pattern": {path: change.alpha for path, change in own.items() if change.alpha != alpha},
            f"{part}.target_modules": sorted(own),
        }
    return configuration


if __name__ == "__main__":
    run_script(main)
