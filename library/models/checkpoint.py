"""A base model on disk: an original-layout file, or the parts of a Diffusers folder.

Names of a folder's tensors begin with the part: `unet/conv_in.weight`. Weights are read one by one and not kept in
memory, so that tools can process a model of any size.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
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

WHOLE = ""  # the one part of an original-layout file
UNET, VAE = "unet", "vae"
UNET_FILES = ("diffusion_pytorch_model",)
TEXT_FILES = ("model", "pytorch_model")
# Tensors of a checkpoint that Diffusers has no place for: the conversion keeps them in a file of the folder.
EXTRAS, EXTRAS_FILE = "extras", "original_extras.safetensors"
WEIGHT_ENDINGS = (".safetensors", ".fp16.safetensors", ".non_ema.safetensors", ".bin", ".fp16.bin")
# Metadata of a checkpoint converted from a Diffusers folder of unusual sizes: JSON, part -> configuration.
CONFIGURATIONS = "diffusers_configurations"
# Metadata of a checkpoint whose text encoders know more tokens than CLIP's: JSON, part -> token -> id.
ADDED_TOKENS = "diffusers_added_tokens"


@dataclasses.dataclass(frozen=True)
class Part:
    """The weights of a part, found and opened on first use; a pickle is read completely then."""

    file: Path | None = None  # one that is the whole part
    folder: Path | None = None  # or a folder with config.json and weights
    variant: str | None = None  # of the weights in the folder

    @property
    def paths(self) -> list[Path]:
        """The weight files; raises UserError for a folder without them."""
        if self.folder is not None:
            return weight_files(self.folder, variant=self.variant)
        return [] if self.file is None else [self.file]

    @functools.cached_property
    def files(self) -> tuple[WeightFile, ...]:
        """The opened files."""
        return tuple(open_weights(path) for path in self.paths)

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of its tensors."""
        return {name: shape for file in self.files for name, shape in file.shapes.items()}

    @property
    def metadata(self) -> Mapping[str, str]:
        """Metadata of the first file."""
        return self.files[0].metadata

    def infos(self) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Yield name, type and shape of each tensor, in the order of the files' data."""
        for file in self.files:
            yield from file.infos()

    def close(self) -> None:
        """Release the files, with what a pickle still holds; they are opened again if they are needed."""
        self.__dict__.pop("files", None)


@dataclasses.dataclass(frozen=True)
class PlannedPart(Part):
    """A part that is not written yet; of a folder, the configuration is there already."""

    planned: Mapping[str, tuple[torch.dtype, tuple[int, ...]]] = dataclasses.field(kw_only=True)
    planned_metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of its tensors."""
        return {name: shape for name, (_, shape) in self.planned.items()}

    @property
    def metadata(self) -> Mapping[str, str]:
        """The metadata that will be written."""
        return self.planned_metadata

    def infos(self) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Yield name, type and shape of each tensor."""
        for name, (dtype, shape) in self.planned.items():
            yield name, dtype, shape


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A base model on disk."""

    path: Path
    family: ModelFamily
    parts: Mapping[str, Part]  # by folder: unet, vae, text_encoder, text_encoder_2; for an original file `WHOLE`

    @property
    def is_folder(self) -> bool:
        """Whether it is a Diffusers folder."""
        return WHOLE not in self.parts

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of all tensors."""
        return {name: shape for name, _, shape in self.infos()}

    @property
    def metadata(self) -> Mapping[str, str]:
        """Metadata of the file; for a folder, of the U-Net's first file."""
        return self.parts[UNET if self.is_folder else WHOLE].metadata

    def folder_of(self, part: str) -> Path | None:
        """Return the folder with the configuration of a part, or None."""
        return self.parts[part].folder if part in self.parts else None

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor, None if there is none of this name; opens no other part."""
        part, own = split_name(name)
        return self.parts[part].shapes.get(own) if part in self.parts else None

    def close(self) -> None:
        """Release the files of all parts."""
        for part in self.parts.values():
            part.close()

    def infos(self) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Yield name, type and shape of each tensor."""
        for name, part in self.parts.items():
            for own, dtype, shape in part.infos():
                yield tensor_name(name, own), dtype, shape

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, in its own memory."""
        part, own = split_name(name)
        return next(file for file in self.parts[part].files if own in file.shapes).tensor(own)

    def take_as(self, name: str, dtype: torch.dtype) -> tuple[torch.Tensor, bool]:
        """Return one tensor in a type, as `WeightFile.take_as` does: from a pickle only once."""
        part, own = split_name(name)
        return next(file for file in self.parts[part].files if own in file.shapes).take_as(own, dtype)

    def in_order(self, names: Collection[str]) -> list[str]:
        """Return the names of tensors in the order of the files' data; opens no other part."""
        parts = dict.fromkeys(split_name(name)[0] for name in names)
        present = (tensor_name(part, own) for part in parts for own, _, _ in self.parts[part].infos())
        return [name for name in present if name in names]


def tensor_name(part: str, name: str) -> str:
    """Return the name of a part's tensor in the whole model."""
    return f"{part}/{name}" if part else name


def split_name(name: str) -> tuple[str, str]:
    """Return the part and the name within it of a tensor of a model."""
    part, _, own = name.rpartition("/")
    return part, own


def open_checkpoint(path: Path, *, variant: str | None = None) -> Checkpoint:
    """Return the model at a path; raises UserError if there is none.

    variant chooses among the weights of a Diffusers folder, such as "fp16".
    """
    if path.is_file():
        whole = Part(path)
        shapes = whole.files[0].shapes
        return Checkpoint(path, families.detect_family(shapes, str(path)), {WHOLE: whole})
    family = folder_family(path)
    parts = {
        part: Part(folder=path / part, variant=variant)
        for part in (UNET, VAE, *(text.folder for text in family.text_models))
        if (path / part).is_dir()
    }
    if (path / EXTRAS_FILE).is_file():
        parts[EXTRAS] = Part(path / EXTRAS_FILE)
    return Checkpoint(path, family, parts)


def open_vae(path: Path, family: ModelFamily) -> Checkpoint:
    """Return the model of --vae: a Diffusers folder or its parent, or a file in either layout, even a whole model.

    Raises UserError if its names and configuration are not those of a VAE. Sizes that the file does not determine are
    those of the family.
    """
    if path.is_dir():
        folder = path if (path / "config.json").is_file() else path / VAE
        read_config(folder)
        return Checkpoint(path, family, {VAE: Part(folder=folder)})
    file = Part(path)
    if not keys.holds_vae(file.files[0].shapes):
        raise UserError(f"--vae: {path} has no VAE; name a file or a Diffusers folder with one")
    is_diffusers = any(name.startswith("encoder.down_blocks.") for name in file.files[0].shapes)
    return Checkpoint(path, family, {VAE if is_diffusers else WHOLE: file})


def folder_family(path: Path) -> ModelFamily:
    """Return the family of a Diffusers folder; raises UserError for one of another kind."""
    if not (path / UNET).is_dir() and (path / "transformer" / "config.json").is_file():
        kind = read_json(path / "transformer" / "config.json").get("_class_name", "unknown")
        raise UserError(
            f"{path} is a model with a transformer ({kind}) in place of the U-Net, which is not supported: only "
            "SD 1.x, 2.x and XL are"
        )
    unet, first, second = read_config(path / UNET), *(path / text.folder for text in families.SDXL.text_models)
    if second.is_dir() and unet.get("cross_attention_dim") == families.REFINER_WIDTH:
        raise UserError(f"{path} is an SDXL refiner, which is not supported; the base model is another folder")
    family = families.detect_folder_family(unet, read_config(first))
    return families.SDXL if second.is_dir() else family


def scheduler_of(folder: Path) -> dict[str, Any] | None:
    """Return the configuration of the scheduler of a Diffusers folder, None if there is none."""
    path = folder / "scheduler" / "scheduler_config.json"
    return read_json(path) if path.is_file() else None


def stored_configuration(metadata: Mapping[str, str], part: str) -> dict[str, Any]:
    """Return the configuration of a part from the metadata of a checkpoint; empty if there is none."""
    return stored_table(metadata, CONFIGURATIONS, part)


def stored_tokens(metadata: Mapping[str, str], part: str) -> dict[str, int]:
    """Return token -> id for the tokens added to a text encoder, from the metadata of a checkpoint."""
    return {
        token: number for token, number in stored_table(metadata, ADDED_TOKENS, part).items() if type(number) is int
    }


def stored_table(metadata: Mapping[str, str], key: str, part: str) -> dict[str, Any]:
    """Return the table of a part in JSON in the metadata of a checkpoint; empty if there is none."""
    try:
        found = json.loads(metadata.get(key, "{}")).get(part, {})
    except (ValueError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a part of a Diffusers folder."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder.parent} is not a Diffusers folder: {folder.name}/config.json is missing")
    return read_json(folder / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file."""
    table = toml_text.load_json(path)
    if not isinstance(table, dict):
        raise UserError(f"{path} must hold an object, got {shown(table)}")
    return table


def file_stems(part: str) -> tuple[str, ...]:
    """Return the possible names of a part's weight files, without endings; the first is used for writing."""
    return TEXT_FILES if part.startswith("text_encoder") else UNET_FILES


def weight_files(folder: Path, *, variant: str | None = None) -> list[Path]:
    """Return the weight files of a part: one, or the shards listed in an index; without a variant the full ones."""
    names = [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    chosen = choose_weights(names, folder.name, variant=variant)
    if chosen is None:
        kind = f" of the variant {variant}" if variant else ""
        raise UserError(f"{folder} has no weights{kind}: a .safetensors or .bin file is missing")
    return shards_of(folder / chosen) if chosen.endswith(".json") else [folder / chosen]


def choose_weights(names: Collection[str], part: str, *, variant: str | None = None) -> str | None:
    """Return the weight file among the names in the folder of a part, or the index of its shards; None without one.

    safetensors come before .bin; without a variant the full weights come first.
    """
    for stem in file_stems(part):
        # In this order safetensors come before .bin.
        for index in sorted(fnmatch.filter(names, f"{stem}*.index{f'.{variant}' if variant else ''}.json"))[::-1]:
            return index
        for ending in (f".{variant}.safetensors", f".{variant}.bin") if variant else WEIGHT_ENDINGS:
            if f"{stem}{ending}" in names:
                return f"{stem}{ending}"
        for index in [] if variant else sorted(fnmatch.filter(names, f"{stem}*.index.*.json"))[::-1]:
            return index
    return None


def shards_of(index: Path) -> list[Path]:
    """Return the files listed in an index."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise UserError(f'{index} has no "weight_map" of tensors and their files')
    return [index.parent / name for name in sorted(set(shards.values()))]


def names_in(checkpoint: Checkpoint, part: str) -> Iterable[str]:
    """Return the names of a part's tensors without the part; empty if the folder lacks it."""
    return checkpoint.parts[part].shapes if part in checkpoint.parts else ()
