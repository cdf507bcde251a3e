"""LoRA files as what they mean: modules by name, each a low-rank change; and which models they are for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from library.adapters.low_rank import Change
from library.errors import UserError
from library.weights_io import WeightFile, open_weights

DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
# Part of a tensor's name -> what a file with it is.
OTHER_KINDS = (
    (".hada_", "a LoHa"),
    (".lokr_", "a LoKr"),
    (".dora_scale", "a DoRA"),
    (".oft_", "an OFT"),
    (".lora_mid.", "a LoCon with Tucker decomposition"),
    (".diff", "a file with full differences"),
    (".lora_A.", "a diffusers or PEFT file"),
    (".lora.down.", "a diffusers file"),
)
# Input width of the cross-attention's keys -> models.
CONTEXT_WIDTHS = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}


@dataclasses.dataclass(frozen=True)
class LoraFile:
    """A LoRA file in memory."""

    path: Path
    changes: dict[str, Change]
    metadata: dict[str, str]
    family: str | None  # "SD 1.x", "SD 2.x" or "SDXL"; None where the modules do not tell

    @property
    def ranks(self) -> set[int]:
        """The ranks of its modules."""
        return {change.rank for change in self.changes.values()}


def check_lora(path: Path) -> WeightFile:
    """Return a LoRA file opened; raises UserError for one that is none, or of another kind. Reads names only."""
    file = open_weights(path)
    for part, kind in OTHER_KINDS:
        found = next((name for name in file.shapes if part in name), None)
        if found is not None:
            raise UserError(f"{path} is {kind} ({found}); only LoRA files with lora_down and lora_up are taken here")
    if not any(name.endswith(DOWN) for name in file.shapes):
        raise UserError(f"{path} is no LoRA file: it has no tensor named ...{DOWN}")
    for name in file.shapes:
        if name.endswith(DOWN) and name.removesuffix(DOWN) + UP not in file.shapes:
            raise UserError(f"{path} is damaged: {name} has no {UP} beside it")
    return file


def read_lora(path: Path) -> LoraFile:
    """Return a LoRA file; raises UserError for one that is none, damaged, or of another kind."""
    file = check_lora(path)
    tensors = dict(file.tensors(file.shapes))
    changes = {
        name.removesuffix(DOWN): change_of(tensors, name.removesuffix(DOWN))
        for name in sorted(tensors)
        if name.endswith(DOWN)
    }
    bad = next((name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())), None)
    if bad is not None:
        raise UserError(f"{path} is damaged: {bad} holds numbers that are not finite")
    return LoraFile(path, changes, dict(file.metadata), family_of(file.shapes))


def change_of(tensors: Mapping[str, Tensor], module: str) -> Change:
    """Return the change of a module; an alpha that is left out is the rank."""
    down, up = tensors[module + DOWN], tensors[module + UP]
    alpha = tensors.get(module + ALPHA)
    return Change(
        up=up.flatten(1),
        down=down.flatten(1),
        alpha=float(down.shape[0]) if alpha is None else float(alpha),
        down_shape=tuple(down.shape),
    )


def family_of(shapes: Mapping[str, Sequence[int]]) -> str | None:
    """Return the models that a LoRA file is for, by names and widths; None where it has no telling module."""
    names = " ".join(shapes)
    if "lora_te2_" in names or "lora_unet_input_blocks_" in names or "lora_unet_output_blocks_" in names:
        return "SDXL"
    for name, shape in shapes.items():
        if "attn2_to_k" in name and name.endswith(DOWN):
            return CONTEXT_WIDTHS.get(shape[1])
    for name, shape in shapes.items():
        if name.startswith("lora_te_") and "self_attn_q_proj" in name and name.endswith(DOWN):
            return CONTEXT_WIDTHS.get(shape[1])
    return None


def same_family(files: Iterable[LoraFile]) -> str | None:
    """Return the family that all files are for; raises UserError where they differ."""
    told = {file.family: file.path for file in files if file.family is not None}
    if len(told) > 1:
        pairs = ", ".join(f"{path} is for {family}" for family, path in told.items())
        raise UserError(f"the files are for different models: {pairs}")
    return next(iter(told), None)


def tensors_of(changes: Mapping[str, Change], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return the tensors of a file with these changes in a type (None: float32), alphas included."""
    tensors = {}
    for name, change in changes.items():
        is_conv = len(change.down_shape) == 4
        up = change.up[:, :, None, None] if is_conv else change.up
        for ending, tensor in ((DOWN, change.down.reshape(change.down_shape)), (UP, up)):
            tensors[name + ending] = tensor.to(dtype or torch.float32).contiguous()
        tensors[name + ALPHA] = torch.tensor(change.alpha)
    return tensors
