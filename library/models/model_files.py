"""A base model on disk, tensor by tensor: a file of the original layout, or the parts of a Diffusers folder.

Tensors of a folder are named after their part: `unet/conv_in.weight`. Nothing is built here and nothing is kept in
memory, so that tools can go through a model of any size.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.config import toml_text
from library.errors import UserError, shown
from library.models import family as families
from library.models import keys
from library.models.family import ModelFamily
from library.weight_file import WeightFile, open_weights

if TYPE_CHECKING:
    import torch

UNET_FILES = ("diffusion_pytorch_model",)
TEXT_FILES = ("model", "pytorch_model")
# What a checkpoint held and Diffusers has no place for: written by the conversion into the folder, read back by it.
EXTRAS, EXTRAS_FILE = "extras", "original_extras.safetensors"
WEIGHT_ENDINGS = (".safetensors", ".fp16.safetensors", ".non_ema.safetensors", ".bin", ".fp16.bin")


# Metadata of a checkpoint that was a Diffusers folder of unusual sizes: JSON, part -> its configuration.
CONFIGURATIONS = "diffusers_configurations"


def stored_configuration(metadata: Mapping[str, str], part: str) -> dict[str, Any]:
    """Return the configuration of a part that a checkpoint keeps, empty where it keeps none."""
    try:
        found = json.loads(metadata.get(CONFIGURATIONS, "{}")).get(part, {})
    except (ValueError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """A base model on disk."""

    path: Path
    family: ModelFamily
    predicts_v: bool | None  # None where the files do not say
    parts: dict[str, tuple[WeightFile, ...]]  # part of a folder -> its files; one part "" of an original file

    @property
    def is_folder(self) -> bool:
        """Whether it is a Diffusers folder."""
        return "" not in self.parts

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of all tensors."""
        return {
            tensor_name(part, name): shape
            for part, files in self.parts.items()
            for file in files
            for name, shape in file.shapes.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, in memory of its own."""
        part, _, own = name.rpartition("/")
        file = next(file for file in self.parts[part] if own in file.shapes)
        return file.tensor(own)


def tensor_name(part: str, name: str) -> str:
    """Return the name of a part's tensor among those of the whole model."""
    return f"{part}/{name}" if part else name


def open_model(path: Path, *, variant: str | None = None) -> ModelFiles:
    """Return the model that a path holds; raises UserError where it holds none. Reads names, not weights."""
    if path.is_file():
        file = open_weights(path)
        return ModelFiles(path, families.detect_family(file.shapes, str(path)), None, {"": (file,)})
    family, predicts_v = folder_kind(path)
    parts: dict[str, tuple[WeightFile, ...]] = {}
    for part in ("unet", "vae", *(text.folder for text in family.text_models)):
        if (path / part).is_dir():
            files = weight_files(path / part, TEXT_FILES if part.startswith("text") else UNET_FILES, variant)
            parts[part] = tuple(open_weights(file) for file in files)
    if (path / EXTRAS_FILE).is_file():
        parts[EXTRAS] = (open_weights(path / EXTRAS_FILE),)
    return ModelFiles(path, family, predicts_v, parts)


def folder_kind(path: Path) -> tuple[ModelFamily, bool | None]:
    """Return the family of a Diffusers folder, and whether its scheduler says that it predicts v."""
    unet = read_config(path / "unet")
    families.check_channels(unet.get("in_channels"), path)
    family = families.detect_folder_family(unet, read_config(path / "text_encoder"))
    if (path / families.SDXL.text_models[1].folder).is_dir():
        family = families.SDXL
    scheduler = path / "scheduler" / "scheduler_config.json"
    prediction = read_json(scheduler).get("prediction_type", "epsilon") if scheduler.is_file() else None
    return family, None if prediction is None else prediction == "v_prediction"


def check_stem(file: WeightFile) -> None:
    """Raise UserError for a checkpoint whose U-Net takes more than latents."""
    stem = file.shapes.get(f"{keys.UNET_PREFIX}input_blocks.0.0.weight", ())
    families.check_channels(stem[1] if len(stem) == 4 else None, file.path)


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a part of a Diffusers folder."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder.parent} is no Diffusers folder: {folder.name}/config.json is missing")
    return read_json(folder / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds."""
    table = toml_text.load_json(path)
    if not isinstance(table, dict):
        raise UserError(f"{path} must hold an object, got {shown(table)}")
    return table


def weight_files(folder: Path, stems: Iterable[str], variant: str | None = None) -> list[Path]:
    """Return the weight files of a part: one, or the shards that an index lists; without a variant the full ones."""
    for stem in stems:
        # In this order safetensors come before .bin.
        for index in sorted(folder.glob(f"{stem}*.index{f'.{variant}' if variant else ''}.json"), reverse=True):
            return shards_of(index)
        for ending in (f".{variant}.safetensors", f".{variant}.bin") if variant else WEIGHT_ENDINGS:
            if (folder / f"{stem}{ending}").is_file():
                return [folder / f"{stem}{ending}"]
        for index in [] if variant else sorted(folder.glob(f"{stem}*.index.*.json"), reverse=True):
            return shards_of(index)
    kind = f" of the variant {variant}" if variant else ""
    raise UserError(f"{folder} holds no weights{kind}: a .safetensors or .bin file is missing")


def shards_of(index: Path) -> list[Path]:
    """Return the files that an index lists."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise UserError(f'{index} has no "weight_map" of tensors and their files')
    return [index.parent / name for name in sorted(set(shards.values()))]
