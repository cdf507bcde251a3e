"""Reading LoRA files as low-rank changes by module, with the family of models that they are for.

Files of sd-scripts, this suite, LyCORIS, diffusers, PEFT and ComfyUI are read. Modules have the names of the suite,
and shapes are those of the layers, whatever they are in the file, so that files of different trainers can be merged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from library.adapters.layers import Layer, layers_by_name, layers_by_word, module_name, norms_by_word
from library.adapters.low_rank import Change
from library.adapters.names import (
    ALL_ROLES,
    ALPHA,
    ANY_TEXT,
    BEGINNINGS,
    DOWN,
    PEFT_ROOT,
    TEXT,
    TEXT_2,
    UP,
    VECTORS,
    Shapes,
    family_of,
    kind_of,
    refused_kind,
    roles_of,
    spelled,
)
from library.adapters.peft_config import CONFIG_FILE, read_config
from library.errors import UserError, named
from library.models import keys
from library.models.family import SD1, SD2, SDXL, ModelFamily
from library.weight_file import EMBEDDING, WeightFile, check_finite, is_finite, open_weights

logger = logging.getLogger(__name__)

# Beginnings of names in base models and their parts.
MODEL_NAMES = (keys.UNET_PREFIX, keys.VAE_PREFIX, *keys.TEXT_PREFIXES, "down_blocks.")
# Beginnings of the names of a text encoder that is alone, and of the first of two: they have the same layers.
ALONE, FIRST_OF_TWO = "lora_te_", "lora_te1_"


class Vector(NamedTuple):
    """A vector that is added to the weight or bias of a layer: of a normalisation, or the bias of another layer."""

    layer: Layer
    kind: Literal["weight", "bias"]
    ending: str  # of its name
    values: Tensor

    @property
    def change(self) -> Change:
        """The vector as a change of one column."""
        return Change(self.values.flatten()[:, None], torch.ones(1, 1), 1.0, (1, 1))

    def name(self, word: Callable[[Layer, ModelFamily], str], family: ModelFamily | None) -> str:
        """Return its name in a file, with the name of its module as word makes it."""
        return word(self.layer, family or SD1) + self.ending


@dataclasses.dataclass(frozen=True)
class LoraFile:
    """A LoRA file in memory."""

    path: Path
    changes: dict[str, Change]  # by module, as the suite names it
    metadata: dict[str, str]
    family: ModelFamily | None  # None where the modules fit several
    extra: dict[str, Tensor]  # tensors that are not part of a change, by their names in the file
    numbers_text: bool = False  # it is of a text encoder alone, numbered as the first of two: SDXL, or diffusers

    @property
    def title(self) -> str:
        """The title in its metadata, or the name of the file."""
        return self.metadata.get("modelspec.title") or self.path.stem

    @functools.cached_property
    def vectors(self) -> dict[str, Vector]:
        """The vectors among its extra tensors, by their names as the suite writes them."""
        found = (vector_of(name, tensor, self.family) for name, tensor in self.extra.items())
        return {vector.name(module_name, self.family): vector for vector in found if vector is not None}

    @property
    def embeddings(self) -> dict[str, Tensor]:
        """The embeddings among its extra tensors, which web UIs read with the network."""
        return {name: tensor for name, tensor in self.extra.items() if name.startswith(EMBEDDING)}

    @property
    def strange(self) -> dict[str, Tensor]:
        """The other extra tensors: nothing reads them in a file of the suite."""
        known = {name for name, tensor in self.extra.items() if vector_of(name, tensor, self.family) is not None}
        return {name: self.extra[name] for name in sorted(self.extra.keys() - known - self.embeddings.keys())}

    @property
    def unknown(self) -> list[str]:
        """Names of what the strange tensors are: modules that no model has, tensors."""
        modules = {name: module for module, _, name in roles_of(self.extra, ALL_ROLES)}
        return sorted({modules.get(name, name) for name in self.strange})

    def refuse_unknown(self) -> None:
        """Raise UserError if one of the strange tensors is meant for a model: then keeping it would lose its effect."""
        changed = {module for module, role, _ in roles_of(self.strange) if role == "down"}
        modules = [name for name in self.unknown if name in changed or name.startswith(BEGINNINGS)]
        if modules:
            raise UserError(
                f"{self.path}: {len(modules)} of {len(modules) + len(self.changes)} modules cannot be read "
                f"({named(modules)}); networks/convert_lora.py --allow_unmatched writes a file without them"
            )

    def layer(self, module: str) -> Layer | None:
        """Return the layer of a module; None if models of its family have no such layer."""
        return layers_by_name(self.family or SD1).get(module)


def check_lora(path: Path) -> WeightFile:
    """Return an opened LoRA file; raises UserError if it is not a LoRA. Of safetensors only the header is read."""
    file = open_weights(path)
    refuse_model(file)
    for name, shape in file.shapes.items():
        kind = refused_kind(name, shape)
        if kind is not None:
            raise UserError(f"{path} is {kind} ({name}); only LoRA files with lora_down and lora_up are taken here")
    roles = list(roles_of(file.shapes))
    if not any(role == "down" for _, role, _ in roles):
        raise UserError(f"{path} is no LoRA file: it has no tensor named ...{DOWN} (its first is {min(file.shapes)})")
    for role, partner in (("down", "up"), ("up", "down")):
        partners = {stem for stem, found, _ in roles if found == partner}
        lonely = next((name for stem, found, name in roles if found == role and stem not in partners), None)
        if lonely is not None:
            raise UserError(f"{path} is damaged: {lonely} has no {partner} matrix beside it")
    return file


def refuse_model(file: WeightFile) -> None:
    """Raise UserError for a file that holds a base model or nothing."""
    if not file.shapes:
        raise UserError(f"{file.path} holds no tensors")
    is_network = any(True for _ in roles_of(file.shapes)) or any(kind_of(name) for name in file.shapes)
    if not is_network and any(name.startswith(MODEL_NAMES) for name in file.shapes):
        raise UserError(f"{file.path} is a base model, not a LoRA file: are two options swapped?")


def read_lora(path: Path) -> LoraFile:
    """Return a LoRA file; raises UserError for a damaged file, one that is not a LoRA, and one of unknown layers."""
    file = check_lora(path)
    tensors = dict(file.tensors(file.shapes))
    for name, tensor in tensors.items():
        check_finite(tensor, name, path)
    refuse_doubles(file)
    parts = parts_of(tensors)
    downs = {module: tuple(part["down"].shape) for module, part in parts.items() if "down" in part}
    family = family_of(downs, file.metadata)
    layers = named_layers(downs, family)
    alphas = alphas_of(path, file.metadata, {module: parts[module] for module in layers})
    changes: dict[str, Change] = {}
    for module, layer in sorted(layers.items()):
        name = module_name(layer, family or SD1)
        if name in changes:
            raise UserError(f"{path} has {name} twice, under names of different trainers")
        try:
            changes[name] = fitted(change_of(module, parts[module], alphas.get(module)), layer, family, module)
        except ValueError as error:
            raise UserError(f"{path} is damaged: {error}") from None
    if not changes:
        raise UserError(
            f"{path}: none of its {len(downs)} modules is a layer of SD 1.x, SD 2.x or SDXL ({named(sorted(downs))})"
        )
    used = {name for module, _, name in roles_of(tensors, ALL_ROLES) if module in layers}
    extra = {name: tensor for name, tensor in tensors.items() if name not in used}
    numbers_text = family is None and all(module.startswith(FIRST_OF_TWO) for module in layers)
    return LoraFile(path, changes, dict(file.metadata), family, extra, numbers_text)


def refuse_doubles(file: WeightFile) -> None:
    """Raise UserError for a file with two changes of a module: of two adapters, or in the names of two programs."""
    found: dict[tuple[str, str], str] = {}
    for module, role, name in roles_of(file.shapes, ALL_ROLES):
        first = found.setdefault((module, role), name)
        if first != name:
            raise UserError(f"{file.path} has {module} twice ({first} and {name}): save one adapter")


def named_layers(modules: Shapes, family: ModelFamily | None) -> dict[str, Layer]:
    """Return module by its name in a file -> layer, for those (with the shapes of their downs) that the family has.

    A name that does not tell which text encoder it means is that of SDXL's wider one if the width is.
    """
    table, found = layers_by_word(family or SD1), {}
    widths = {shape[1] for module, shape in modules.items() if module.endswith(("q_proj", "fc1")) and len(shape) > 1}
    text = TEXT_2 if SDXL.text_widths[TEXT_2] in widths else TEXT
    for module in modules:
        part, word, _ = spelled(module)
        layer = table.get((text if part == ANY_TEXT else part, word))
        if layer is not None:
            found[module] = layer
    return found


def vector_of(name: str, tensor: Tensor, family: ModelFamily | None) -> Vector | None:
    """Return what a tensor adds to a vector of a layer; None for one that does not, or of an unknown layer."""
    module, dot, last = name.rpartition(".")
    kind = VECTORS.get(dot + last)
    if kind is None or tensor.ndim != 1:
        return None
    part, word, _ = spelled(module)
    layer = norms_by_word(family or SD1).get((part, word))
    if layer is None and kind_of(name) != "norm" and kind == "bias":
        layer = layers_by_word(family or SD1).get((part, word))
    return None if layer is None else Vector(layer, kind, dot + last, tensor)


def whole_changes(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Change]:
    """Return module (by its name in the file) -> change for those whose tensors are complete and fit together.

    tensors are of any kinds of networks. A warning tells why a configuration of PEFT is not used; the alphas are the
    ranks then.
    """
    parts = {
        module: {role: tensor if tensor.is_floating_point() else tensor.float() for role, tensor in part.items()}
        for module, part in parts_of(tensors).items()
        if {"down", "up"} <= part.keys() and part["down"].ndim > 1
    }
    try:
        alphas = alphas_of(path, metadata, parts)
    except UserError as error:
        logger.warning("%s; the ranks are taken for alphas", error)
        alphas = {}
    found = {}
    for module, part in parts.items():
        with contextlib.suppress(ValueError):
            found[module] = change_of(module, part, alphas.get(module))
    return found


def alphas_of(path: Path, metadata: Mapping[str, str], parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
    """Return the alphas of the modules without an alpha that a configuration of PEFT tells.

    Raises UserError for a configuration of another network than a LoRA, and if PEFT's own file lacks it.
    """
    without = {module: len(part["down"]) for module, part in parts.items() if "alpha" not in part}
    by_peft = [module for module in without if PEFT_ROOT in module]
    config = read_config(path, metadata, is_peft=bool(by_peft) or path.stem == "adapter_model")
    if config is None and by_peft:
        raise UserError(f"{path} is an adapter of PEFT, whose alphas are in {CONFIG_FILE}: put that file beside it")
    if config is None:
        return {}
    found = {module: config.alpha_of(module, rank) for module, rank in without.items()}
    return {module: alpha for module, alpha in found.items() if alpha is not None}


def parts_of(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return module -> role -> tensor for the tensors of a file that are part of a change."""
    parts: dict[str, dict[str, Tensor]] = {}
    for stem, role, name in roles_of(tensors, ALL_ROLES):
        parts.setdefault(stem, {})[role] = tensors[name]
    return parts


def change_of(stem: str, part: Mapping[str, Tensor], default_alpha: float | None = None) -> Change:
    """Return the change of a module; a missing alpha is default_alpha, or the rank.

    The core of a Tucker decomposition is multiplied into down, a factor of the whole change into up. Raises ValueError
    for tensors that do not fit together, and KeyError for a missing one.
    """
    down, up = part["down"], part["up"]
    if "mid" in part:
        down = with_core(stem, down, part["mid"])
    rank = down.shape[0] if down.ndim > 1 else 0
    if not rank or up.ndim < 2 or up.shape[1] != rank or up.flatten(1).shape[1] != rank:
        raise ValueError(f"{stem} has the shapes {tuple(down.shape)} and {tuple(up.shape)}")
    for role in ("alpha", "scalar"):
        if role in part and part[role].numel() != 1:
            raise ValueError(f"{stem}.{role} has the shape {tuple(part[role].shape)}, one number is meant")
    default = float(rank) if default_alpha is None else default_alpha
    return Change(
        up=up.flatten(1) * part["scalar"].float().reshape(()) if "scalar" in part else up.flatten(1),
        down=down.flatten(1),
        alpha=float(part["alpha"]) if "alpha" in part else default,
        down_shape=tuple(down.shape),
    )


def with_core(stem: str, down: Tensor, core: Tensor) -> Tensor:
    """Return down (R, in, 1, 1) with the core (R, R, kh, kw) of a convolution multiplied in: (R, in, kh, kw), float32.

    That is how LyCORIS and ComfyUI rebuild the weight: up @ core @ down, summed over both ranks. Raises ValueError for
    shapes that do not fit.
    """
    if down.ndim < 2 or core.ndim != 4 or core.shape[:2] != (len(down), len(down)) or down[0].numel() != down.shape[1]:
        raise ValueError(f"{stem} has the shapes {tuple(down.shape)} and {tuple(core.shape)} (lora_mid)")
    return torch.einsum("mnhw,ni->mihw", core.double(), down.double().flatten(1)).float()


def fitted(change: Change, layer: Layer, family: ModelFamily | None, stem: str) -> Change:
    """Return a change with the number of dimensions that its layer has in a family, None for SD 1.x or 2.x.

    Trainers write 1x1 kernels for linear layers, as sd-scripts does for SD 2.x, and the other way round. Raises
    ValueError for a larger kernel of a linear layer.
    """
    kernels = {layer.kernel(one) for one in ((SD1, SD2) if family is None else (family,))}
    inner = change.down_shape[2:]
    if kernels <= {"linear", "pointwise"} and any(size != 1 for size in inner):
        raise ValueError(f"{stem} has the shape {change.down_shape}, its layer has no kernel")
    if kernels == {"linear"}:
        return dataclasses.replace(change, down_shape=change.down_shape[:2])
    if kernels == {"pointwise"}:
        return dataclasses.replace(change, down_shape=(*change.down_shape[:2], 1, 1))
    return change


def with_own_text_names(tensors: Mapping[str, Tensor], files: Sequence[LoraFile]) -> dict[str, Tensor]:
    """Return tensors to be written, with the names that the text encoder has in the files if no family tells them."""
    if any(file.family is not None for file in files) or not any(file.numbers_text for file in files):
        return dict(tensors)
    return {re.sub(f"^{ALONE}", FIRST_OF_TWO, name): tensor for name, tensor in tensors.items()}


def to_state_dict(
    changes: Mapping[str, Change], dtype: torch.dtype | None, endings: Sequence[str] = (DOWN, UP, ALPHA)
) -> dict[str, Tensor]:
    """Return the tensors of a file with changes by module.

    Matrices are in dtype (None: unchanged), 4-D for convolutions; alphas in float32. endings are those of the names of
    down, up and alpha; without the third one alphas are omitted. Raises UserError for numbers too large for dtype.
    """
    tensors = {}
    for name, change in changes.items():
        up = change.up[:, :, None, None] if len(change.down_shape) == 4 else change.up
        matrices = change.down.reshape(change.down_shape), up
        for ending, matrix in zip(endings, matrices, strict=False):
            tensors[name + ending] = tensor = matrix.to(dtype or matrix.dtype).contiguous()
            if not is_finite(tensor):
                kind = str(tensor.dtype).removeprefix("torch.")
                raise UserError(f"{name}{ending} becomes too large for {kind}: take smaller ratios, or another type")
        tensors |= {name + ending: torch.tensor(change.alpha) for ending in endings[2:]}
    return tensors
