"""Which files of a repository on the Hugging Face Hub a model needs, by their names alone.

Of a Diffusers folder these are the parts that are read, each with its configuration and one set of weights. What else
such repositories hold is not needed: the same weights in other formats, checkpoints beside the folders, and parts such
as the safety checker.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from library.config.hub_names import MODEL_SUFFIXES
from library.config.options import Role
from library.errors import UserError, named
from library.models.checkpoint import EXTRAS_FILE, UNET, VAE, WEIGHT_ENDINGS, choose_weights, read_json, shards_of

INDEX = "model_index.json"  # names the parts of a Diffusers folder
WEIGHTED = (UNET, VAE, "text_encoder", "text_encoder_2")
DESCRIBED = ("scheduler", "tokenizer", "tokenizer_2")  # parts without weights: their .json and .txt files
TEXT = "text_encoder"  # whose weights have other names than those of the other parts
SHARD = re.compile(r"-\d+-of-\d+")


@dataclasses.dataclass(frozen=True)
class Needed:
    """What is needed of a repository."""

    files: tuple[str, ...]  # paths in the repository, the small ones first
    path: str = ""  # of what is named: a file, a folder, or the whole repository
    is_file: bool = False

    @property
    def variant(self) -> str | None:
        """The variant of all weights, such as "fp16"; None for full ones, and for a mixture."""
        endings = {name.split(".")[-2] for name in self.files if name.endswith(MODEL_SUFFIXES) and not self.is_file}
        known = {ending.split(".")[1] for ending in WEIGHT_ENDINGS if ending.count(".") == 2}
        return next(iter(endings)) if len(endings) == 1 and endings <= known else None


def needed(names: Collection[str], role: Role, *, path: str = "", variant: str | None = None) -> Needed:
    """Return what a role needs among the files of a repository, or of the folder or file in it that path is.

    Raises UserError, without the name of the repository, if there is no model for the role.
    """
    if path in names:
        if not path.endswith(MODEL_SUFFIXES):
            raise UserError(f"{path} is no weight file ({', '.join(MODEL_SUFFIXES)})")
        return Needed((path,), path, is_file=True)
    start = f"{path}/" if path else ""
    own = [name.removeprefix(start) for name in names if name.startswith(start)]
    if not own:
        raise UserError(f"there is no {path} in it")
    for form in FORMS[role]:
        found = form(own, variant)
        if found is not None:
            files = tuple(f"{start}{name}" for name in found.files)
            return dataclasses.replace(found, files=files, path=f"{start}{found.path}".rstrip("/"))
    raise UserError(f"there is no {KINDS[role]} in it")


def is_complete(found: Needed, role: Role, folder: Path) -> bool:
    """Return whether all that is needed is in a folder of the cache, of which only a part may have been downloaded."""
    indexes = [folder / name for name in found.files if ".index." in name]
    if not all(shard.is_file() for index in indexes for shard in shards_of(index)):
        return False
    if role != "model" or found.is_file:
        return True
    root = folder / found.path
    if not (root / INDEX).is_file():
        return False
    parts = {name for name, kind in read_json(root / INDEX).items() if isinstance(kind, list) and kind[:1] != [None]}
    return all((root / part).is_dir() for part in parts.intersection((*WEIGHTED, *DESCRIBED)))


def diffusers_folder(names: Collection[str], variant: str | None) -> Needed | None:
    """Return the parts of a Diffusers folder that are read."""
    if "transformer/config.json" in names:
        raise UserError("it is a model with a transformer in place of the U-Net; only SD 1.x, 2.x and XL are supported")
    if f"{UNET}/config.json" not in names:
        return None
    small = [name for name in (INDEX, EXTRAS_FILE) if name in names]
    small += [name for part in DESCRIBED for name in described(names, part)]
    large = []
    for part in WEIGHTED:
        if any(name.startswith(f"{part}/") for name in names):
            config, *weights = part_files(names, part, variant)
            small.append(config)
            large += weights
    return Needed((*small, *large))


def own_part(names: Collection[str], variant: str | None) -> Needed | None:
    """Return a VAE or a ControlNet that is a repository of its own; full weights come first, whatever the variant."""
    has_weights = "config.json" in names and choose_weights([name for name in names if "/" not in name], "") is not None
    return Needed(tuple(part_files(names, "", None))) if has_weights else None


def vae_of_model(names: Collection[str], variant: str | None) -> Needed | None:
    """Return the VAE of a Diffusers folder."""
    has_vae = f"{VAE}/config.json" in names
    return Needed(tuple(part_files(names, VAE, None)), VAE) if has_vae else None


def one_file(names: Collection[str], variant: str | None) -> Needed | None:
    """Return the only weight file, or the only .safetensors; raises UserError if there are several."""
    weights = sorted(name for name in names if name.endswith(MODEL_SUFFIXES))
    top = [name for name in weights if "/" not in name] or weights
    if "config.json" in names:  # of transformers and diffusers: weights of a single part
        top = [name for name in top if choose_weights([name], "") is None and choose_weights([name], TEXT) is None]
    safe = [name for name in top if name.endswith(".safetensors")] or top
    if not safe:
        return None
    if variant is not None:
        raise UserError(f"--variant is for Diffusers folders, and it holds single files: {named(safe)}")
    if len(safe) > 1:
        raise UserError(f"it holds several files, of which one must be named (OWNER/NAME/FILE): {named(safe)}")
    return Needed((safe[0],), safe[0], is_file=True)


def surroundings(names: Collection[str], variant: str | None) -> Needed | None:
    """Return scheduler and tokenizers of a Diffusers folder."""
    files = tuple(name for part in DESCRIBED for name in described(names, part))
    return Needed(files) if files else None


def described(names: Collection[str], part: str) -> list[str]:
    """Return the files of a part without weights."""
    return sorted(name for name in names if name.startswith(f"{part}/") and name.endswith((".json", ".txt")))


def part_files(names: Collection[str], part: str, variant: str | None) -> list[str]:
    """Return configuration and weights of a part; raises UserError if there are none for torch."""
    start = f"{part}/" if part else ""
    own = [name.removeprefix(start) for name in names if name.startswith(start)]
    own = [name for name in own if "/" not in name]
    chosen = choose_weights(own, part, variant=variant)
    if chosen is None or "config.json" not in own:
        of_variant = f" of the variant {variant}" if variant else ""
        raise UserError(f"its {part} has no config.json with weights for torch{of_variant} (.safetensors or .bin)")
    files = ["config.json", chosen, *(shards(own, chosen) if chosen.endswith(".json") else ())]
    return [f"{start}{name}" for name in files]


def shards(names: Collection[str], index: str) -> list[str]:
    """Return the files among the names that the index of a part lists, without reading it."""
    words = set(index.split(".")) - {"index", "json"}
    return sorted(name for name in names if SHARD.search(name) and set(SHARD.sub("", name).split(".")) == words)


Form = Callable[[Collection[str], str | None], Needed | None]
# What can be named for a role, in this order.
FORMS: Mapping[Role, tuple[Form, ...]] = {
    "model": (diffusers_folder, one_file),
    "vae": (own_part, vae_of_model, one_file),
    "control net": (own_part, one_file),
    "checkpoint": (one_file,),
    "surroundings": (surroundings,),
}
KINDS: Mapping[Role, str] = {
    "model": "Diffusers model (unet/config.json) and no checkpoint (.safetensors or .ckpt)",
    "vae": "VAE: config.json with weights, a folder vae, or a single weight file",
    "control net": "ControlNet: config.json with weights, or a single weight file",
    "checkpoint": "checkpoint (.safetensors or .ckpt)",
    "surroundings": "scheduler and no tokenizer of a Diffusers model",
}
