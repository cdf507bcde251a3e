"""Reading LoRA files as low-rank changes by module, with the family of models that they are for.

Files of sd-scripts, this suite, diffusers and PEFT are read. Modules have the names of the suite, whatever their names
in the file, so that files of different trainers can be merged.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.adapters.layers import Layer, layers_by_name, module_name
from library.adapters.low_rank import Change
from library.adapters.names import ALPHA, DOWN, KINDS, UP, family_by_version, family_of, roles_of
from library.errors import UserError
from library.models import keys
from library.models.family import SD1, ModelFamily
from library.weight_file import WeightFile, check_finite, is_finite, open_weights

# Beginnings of names in base models and their parts.
MODEL_NAMES = (keys.UNET_PREFIX, keys.VAE_PREFIX, *keys.TEXT_PREFIXES, "down_blocks.")
# Metadata that diffusers writes instead of alphas: the configuration of PEFT, with the part before each key.
PEFT_METADATA = "lora_adapter_metadata"


@dataclasses.dataclass(frozen=True)
class LoraFile:
    """A LoRA file in memory."""

    path: Path
    changes: dict[str, Change]  # by module, as the suite names it
    metadata: dict[str, str]
    family: ModelFamily | None  # None where the modules fit several
    extra: dict[str, Tensor]  # tensors that are not part of a change, by their names in the file

    @property
    def title(self) -> str:
        """The title in its metadata, or the name of the file."""
        return self.metadata.get("modelspec.title") or self.path.stem

    def layer(self, module: str) -> Layer | None:
        """Return the layer of a module; None if models of its family have no such layer."""
        return layers_by_name(self.family or SD1).get(module)


def check_lora(path: Path) -> WeightFile:
    """Return an opened LoRA file; raises UserError if it is not a LoRA. Of safetensors only the header is read."""
    file = open_weights(path)
    refuse_model(file)
    for part, _, title in KINDS:
        found = next((name for name in file.shapes if part in name), None)
        if title is not None and found is not None:
            raise UserError(f"{path} is {title} ({found}); only LoRA files with lora_down and lora_up are taken here")
    roles = list(roles_of(file.shapes))
    if not any(role == "down" for _, role, _ in roles):
        raise UserError(f"{path} is no LoRA file: it has no tensor named ...{DOWN}")
    for role, other in (("down", "up"), ("up", "down")):
        others = {stem for stem, found, _ in roles if found == other}
        lonely = next((name for stem, found, name in roles if found == role and stem not in others), None)
        if lonely is not None:
            raise UserError(f"{path} is damaged: {lonely} has no {other} matrix beside it")
    return file


def refuse_model(file: WeightFile) -> None:
    """Raise UserError for a file that holds a base model or nothing."""
    if not file.shapes:
        raise UserError(f"{file.path} holds no tensors")
    if any(name.startswith(MODEL_NAMES) for name in file.shapes):
        raise UserError(f"{file.path} is a base model, not a LoRA file: are two options swapped?")


def read_lora(path: Path) -> LoraFile:
    """Return a LoRA file; raises UserError for a damaged file, and for one that is not a LoRA."""
    file = check_lora(path)
    tensors = dict(file.tensors(file.shapes))
    for name, tensor in tensors.items():
        check_finite(tensor, name, path)
    parts = parts_of(tensors)
    family = family_of({stem: tuple(part["down"].shape) for stem, part in parts.items() if "down" in part})
    family = family or family_by_version(file.metadata)
    alphas = PeftAlphas(file.metadata)
    changes: dict[str, Change] = {}
    for stem, part in sorted(parts.items()):
        if "down" not in part:
            continue
        layer = layers_by_name(family or SD1).get(stem)
        name = module_name(layer, family or SD1) if layer else stem
        if name in changes:
            raise UserError(f"{path} has {name} twice, under names of different trainers")
        try:
            changes[name] = change_of(stem, part, alphas.of(stem, len(part["down"])))
        except ValueError as error:
            raise UserError(f"{path} is damaged: {error}") from None
    used = {name for stem, _, name in roles_of(tensors) if "down" in parts[stem]}
    extra = {name: tensor for name, tensor in tensors.items() if name not in used}
    return LoraFile(path, changes, dict(file.metadata), family, extra)


def parts_of(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return module -> role -> tensor for the tensors of a file that are part of a change."""
    parts: dict[str, dict[str, Tensor]] = {}
    for stem, role, name in roles_of(tensors):
        parts.setdefault(stem, {})[role] = tensors[name]
    return parts


def change_of(stem: str, part: Mapping[str, Tensor], default_alpha: float | None = None) -> Change:
    """Return the change of a module; a missing alpha is default_alpha, or the rank.

    Raises ValueError for tensors that do not fit together, and KeyError for a missing one.
    """
    down, up = part["down"], part["up"]
    rank = down.shape[0] if down.ndim > 1 else 0
    if not rank or up.ndim < 2 or up.shape[1] != rank or up.flatten(1).shape[1] != rank:
        raise ValueError(f"{stem} has the shapes {tuple(down.shape)} and {tuple(up.shape)}")
    alpha = part.get("alpha")
    if alpha is not None and alpha.numel() != 1:
        raise ValueError(f"{stem}{ALPHA} has the shape {tuple(alpha.shape)}, one number is meant")
    default = float(rank) if default_alpha is None else default_alpha
    return Change(
        up=up.flatten(1),
        down=down.flatten(1),
        alpha=default if alpha is None else float(alpha),
        down_shape=tuple(down.shape),
    )


class PeftAlphas:
    """The alphas that diffusers writes as a configuration of PEFT into the metadata."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        try:
            found = json.loads(metadata.get(PEFT_METADATA, "{}"))
        except ValueError:
            found = {}
        self.table: dict[str, Any] = found if isinstance(found, dict) else {}

    def of(self, stem: str, rank: int) -> float | None:
        """Return the alpha of a module, None if the table has none. Patterns match the ends of paths, as in PEFT."""
        part, _, path = stem.partition(".")
        alpha = self.table.get(f"{part}.lora_alpha")
        for pattern, own in (self.table.get(f"{part}.alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                alpha = own
                break
        if alpha is None:
            return None
        # Rank-stabilised LoRA: PEFT divides alpha by the root of the rank, other programs by the rank.
        return float(alpha) * (rank**0.5 if self.table.get(f"{part}.use_rslora") else 1.0)


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
