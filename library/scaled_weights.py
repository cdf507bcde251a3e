"""Weights stored in 8 bits with a scale beside them, as ComfyUI and others write them: the weight is their product.

Layers have `weight` in float8 or int8 and `weight_scale` (ComfyUI since 2025-10; before it `scale_weight`, and a tensor
`scaled_fp8` marks the file). Whatever reads such a weight without its scale takes a number of another size for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError, shown

if TYPE_CHECKING:
    import torch

SCALES = ("weight_scale", "scale_weight")
# For computations in 8 bits: scales of activations, and marks of the format.
SETTINGS = "comfy_quant"  # a tensor of each layer: JSON as bytes
NOT_NEEDED = ("input_scale", "scale_input", "scaled_fp8", SETTINGS)
# Parts of formats that are not a product of a weight and its scale: 4 bits, two scales, rotated or smoothed weights.
# Those of ComfyUI and compressed-tensors, of GPTQ, of bitsandbytes (absmax, SCB), of quanto (_data).
NOT_READ = (
    *("weight_scale_2", "weight_scale_inv", "pre_quant_scale", "weight_zero_point", "weight_zp", "qweight"),
    *("absmax", "quant_map", "bitsandbytes__nf4", "bitsandbytes__fp4", "SCB", "_data"),
)
FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")
PLAIN_SETTINGS = {"format", "full_precision_matrix_mult"}  # others change what a weight means
METADATA = "_quantization_metadata"  # ComfyUI's key: JSON with the format of each layer
STORED = ("float8_e4m3fn", "float8_e5m2", "int8")
SHOWN_AS = "float32"  # holds every product exactly enough
ADVICE = "take the file in 16 bits"


def scales_of(path: Path, infos: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, str]:
    """Return weight -> its scale, for the tensors of a file as name -> (type in torch, shape).

    Raises UserError for weights in a format that is not a product of a weight and its scale.
    """
    for name in infos:
        if last_part(name) in NOT_READ:
            raise UserError(f"{path} is stored in a format that is not read ({name}): {ADVICE}")
    scales = {}
    for name, (_, shape) in infos.items():
        if last_part(name) not in SCALES:
            continue
        weight = f"{name.removesuffix(last_part(name))}weight"
        dtype, own = infos.get(weight, ("", ()))
        if dtype not in STORED:
            raise UserError(f"{path}: {name} is a scale, and {weight} is not stored in 8 bits: {ADVICE}")
        if math.prod(shape) != 1 and (not own or math.prod(shape) != own[0] or shape[0] != own[0]):
            raise UserError(f"{path}: {name} has the shape {shape}, one scale or one for each row is read: {ADVICE}")
        scales[weight] = name
    return scales


def check_whole_numbers(path: Path, types: Mapping[str, str]) -> None:
    """Raise UserError for weights in whole numbers; types are those of the tensors without a scale."""
    name = next(
        (name for name, kind in types.items() if kind in ("int8", "uint8") and last_part(name) == "weight"), None
    )
    if name is not None:
        raise UserError(f"{path}: {name} is stored in whole numbers without a scale that is known: {ADVICE}")


def last_part(name: str) -> str:
    """Return the last part of a tensor's name."""
    return name.rpartition(".")[2]


def is_marked(name: str) -> bool:
    """Return whether a tensor shows that weights are stored in such a format."""
    return last_part(name) in (*SCALES, *NOT_NEEDED, *NOT_READ)


def is_helper(name: str) -> bool:
    """Return whether a tensor is only there for weights in 8 bits."""
    return last_part(name) in (*SCALES, *NOT_NEEDED)


def check_settings(path: Path, layer: str, text: str | bytes) -> None:
    """Raise UserError for a layer in a format whose weights are not a product with their scale; text is JSON."""
    try:
        settings: Any = json.loads(text)
    except ValueError:
        settings = None
    if not isinstance(settings, dict) or settings.get("format") not in FORMATS or settings.keys() - PLAIN_SETTINGS:
        raise UserError(f"{path}: {layer} is stored in a format that is not read ({shown(settings)}): {ADVICE}")


def check_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Raise UserError if the metadata name such a format for a layer."""
    if METADATA not in metadata:
        return
    try:
        layers = dict(json.loads(metadata[METADATA])["layers"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: the metadata {METADATA} are damaged: {ADVICE}") from None
    for layer, settings in layers.items():
        check_settings(path, layer, json.dumps(settings))


def product(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the weight as it is meant, float32."""
    import torch

    dtype: torch.dtype = getattr(torch, SHOWN_AS)
    scale = scale.to(dtype)
    return weight.to(dtype) * (scale if scale.numel() == 1 else scale.reshape(-1, *(1,) * (weight.ndim - 1)))
