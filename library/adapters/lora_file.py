"""LoRA files as what they mean: modules by name, each a low-rank change; and which models they are for.

Files of sd-scripts and of this suite are read, and those of diffusers and PEFT. Modules are named as the suite
writes them, whatever the file's own names, so that files of different trainers can be worked on together.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.adapters.layers import Layer, layers_by_name, module_name
from library.adapters.low_rank import Change
from library.errors import UserError
from library.models import keys
from library.models.family import FAMILIES, SD1, SD2, SDXL, ModelFamily
from library.weight_file import WeightFile, check_finite, data_sha256, is_finite, open_weights

DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
# Ending of a tensor's name (after `.weight` is taken off) -> what it is.
ROLES = {
    ".lora_down": "down",
    ".lora_up": "up",
    ".alpha": "alpha",
    ".lora_A": "down",
    ".lora_B": "up",
    ".lora_A.default": "down",
    ".lora_B.default": "up",
    ".lora.down": "down",
    ".lora.up": "up",
    ".lora_linear_layer.down": "down",
    ".lora_linear_layer.up": "up",
    "_lora.down": "down",
    "_lora.up": "up",
}
# Part of a tensor's name -> what a file with it is.
OTHER_KINDS = (
    (".hada_", "a LoHa"),
    (".lokr_", "a LoKr"),
    (".dora_scale", "a DoRA"),
    ("lora_magnitude_vector", "a DoRA"),
    (".oft_", "an OFT"),
    (".boft_", "a BOFT"),
    (".on_input", "an IA3"),
    (".lora_mid.", "a LoCon with Tucker decomposition"),
    (".diff", "a file with full differences"),
)
# Beginnings of names in base models and their parts.
MODEL_NAMES = (keys.UNET_PREFIX, keys.VAE_PREFIX, *keys.TEXT_PREFIXES, "down_blocks.")
# What files of diffusers keep instead of alphas: the configuration of PEFT, each key after its part.
PEFT_METADATA = "lora_adapter_metadata"
BASE_VERSIONS = {"sd_v1": SD1, "sd_v2": SD2, "sdxl_": SDXL}


@dataclasses.dataclass(frozen=True)
class LoraFile:
    """A LoRA file in memory."""

    path: Path
    changes: dict[str, Change]  # by module, as the suite names it
    metadata: dict[str, str]
    family: ModelFamily | None  # None where the modules do not tell
    extra: dict[str, Tensor]  # what is no part of a change, by its name in the file

    @property
    def ranks(self) -> set[int]:
        """The ranks of its modules."""
        return {change.rank for change in self.changes.values()}

    @property
    def title(self) -> str:
        """The title in its metadata, or the name of the file."""
        return self.metadata.get("modelspec.title") or self.path.stem

    def sha256(self) -> str:
        """Return the hash of the file's data, which web UIs know it by."""
        return data_sha256(self.path)

    def layer(self, module: str) -> Layer | None:
        """Return the layer of one of its modules; None for one that no model of its family has."""
        return layers_by_name(self.family or SD1).get(module)


def check_lora(path: Path) -> WeightFile:
    """Return a LoRA file opened; raises UserError for one that is none, or of another kind. Reads names only."""
    file = open_weights(path)
    refuse_model(file)
    for part, kind in OTHER_KINDS:
        found = next((name for name in file.shapes if part in name), None)
        if found is not None:
            raise UserError(f"{path} is {kind} ({found}); only LoRA files with lora_down and lora_up are taken here")
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
    """Raise UserError for a file that holds a base model, or nothing."""
    if not file.shapes:
        raise UserError(f"{file.path} holds no tensors")
    if any(name.startswith(MODEL_NAMES) for name in file.shapes):
        raise UserError(f"{file.path} is a base model, not a LoRA file: are two files in each other's place?")


def roles_of(names: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Yield (module, role, name) for the names of tensors that are a part of a change; role is down, up or alpha."""
    for name in names:
        body = name.removesuffix(".weight")
        ending = next((ending for ending in sorted(ROLES, key=len, reverse=True) if body.endswith(ending)), None)
        if ending is not None:
            stem = body.removesuffix(ending)
            # Processors of old diffusers: attn1.processor.to_out_lora.up for attn1.to_out.0.
            is_processor = ending.startswith("_lora")
            stem = re.sub(r"\.processor\.to_out$", ".to_out.0", stem).replace(".processor.", ".")
            yield (re.sub(r"\.to_out$", ".to_out.0", stem) if is_processor else stem), ROLES[ending], name


def read_lora(path: Path) -> LoraFile:
    """Return a LoRA file; raises UserError for one that is none, damaged, or of another kind."""
    file = check_lora(path)
    tensors = dict(file.tensors(file.shapes))
    for name, tensor in tensors.items():
        check_finite(tensor, name, path)
    parts: dict[str, dict[str, Tensor]] = {}
    for stem, role, name in roles_of(tensors):
        parts.setdefault(stem, {})[role] = tensors[name]
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
        changes[name] = change_of(part, path, stem, alphas.of(stem, len(part["down"])))
    used = {name for stem, _, name in roles_of(tensors) if "down" in parts[stem]}
    extra = {name: tensor for name, tensor in tensors.items() if name not in used}
    return LoraFile(path, changes, dict(file.metadata), family, extra)


def change_of(part: Mapping[str, Tensor], path: Path, stem: str, default_alpha: float | None) -> Change:
    """Return the change of a module; an alpha that is left out is the rank."""
    down, up = part["down"], part["up"]
    rank = down.shape[0] if down.ndim else 0
    if not rank or up.ndim < 2 or up.shape[1] != rank or up[0].numel() != rank:
        raise UserError(f"{path} is damaged: {stem} has the shapes {tuple(down.shape)} and {tuple(up.shape)}")
    alpha = part.get("alpha")
    if alpha is not None and alpha.numel() != 1:
        raise UserError(f"{path} is damaged: {stem}{ALPHA} has the shape {tuple(alpha.shape)}, one number is meant")
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
        """Return the alpha of a module, None where nothing is said of it. Patterns match ends of paths, as in PEFT."""
        part, _, path = stem.partition(".")
        alpha = self.table.get(f"{part}.lora_alpha")
        for pattern, own in (self.table.get(f"{part}.alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                alpha = own
                break
        if alpha is None:
            return None
        # Rank-stabilised: PEFT divides by the root of the rank, everyone else by the rank.
        return float(alpha) * (rank**0.5 if self.table.get(f"{part}.use_rslora") else 1.0)


def family_of(modules: Mapping[str, Sequence[int]]) -> ModelFamily | None:
    """Return the models that modules (name -> shape of their down matrix) are for; None where nothing tells.

    The width of the text that cross-attention reads tells the most; then names; then the text encoder's width.
    """
    by_context = {family.context_width: family for family in FAMILIES}
    for name, shape in modules.items():
        if re.search(r"attn2[._]to_k$", name) and len(shape) > 1 and shape[1] in by_context:
            return by_context[shape[1]]
    if any(re.match(r"lora_te[12]_|text_encoder_2\.|lora_unet_(input|middle|output)_block", name) for name in modules):
        return SDXL
    if any(re.search(r"transformer_blocks[._][1-9][._]", name) for name in modules):
        return SDXL
    for name, shape in modules.items():
        if re.match(r"lora_te_|text_encoder\.", name) and re.search(r"(_proj|fc1)$", name):
            return {768: SD1, 1024: SD2}.get(shape[1])
    return None


def family_by_version(metadata: Mapping[str, str]) -> ModelFamily | None:
    """Return the family that the metadata name."""
    version = metadata.get("ss_base_model_version", "")
    return next((family for start, family in BASE_VERSIONS.items() if version.startswith(start)), None)


def same_family(files: Iterable[LoraFile]) -> ModelFamily | None:
    """Return the family that all files are for; raises UserError where they differ."""
    told = {file.family: file.path for file in files if file.family is not None}
    if len(told) > 1:
        pairs = ", ".join(f"{path} is for {family.title}" for family, path in told.items())
        raise UserError(f"the files are for different models: {pairs}")
    return next(iter(told), None)


def tensors_of(changes: Mapping[str, Change], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return the tensors of a file with these changes in a type (None: float32), alphas in float32."""
    tensors = {}
    for name, change in changes.items():
        up, down = stored_factors(change)
        for ending, tensor in ((DOWN, down), (UP, up)):
            tensors[name + ending] = tensor.to(dtype or torch.float32).contiguous()
            if not is_finite(tensors[name + ending]):
                kind = str(dtype or torch.float32).removeprefix("torch.")
                raise UserError(f"{name}{ending} becomes too large for {kind}: take smaller ratios, or another type")
        tensors[name + ALPHA] = torch.tensor(change.alpha)
    return tensors


def stored_factors(change: Change) -> tuple[Tensor, Tensor]:
    """Return up and down in the shapes in which files hold them: 4-D for convolutions."""
    is_conv = len(change.down_shape) == 4
    up = change.up[:, :, None, None] if is_conv else change.up
    return up, change.down.reshape(change.down_shape)
