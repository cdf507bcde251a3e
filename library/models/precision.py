"""Types of a run: those of U-Net, VAE and adapter, in memory and in computations."""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch import nn

from library.errors import UserError

logger = logging.getLogger(__name__)

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Types(NamedTuple):
    """The types of a run; the text encoders have the type of the U-Net."""

    unet: torch.dtype
    vae: torch.dtype
    adapter: torch.dtype  # of the network's weights, as they are saved
    casts: bool = False  # whether a network needs autocast in half precision; the models do not

    def autocast(self, device: torch.device) -> torch.autocast:
        """Return the autocast context of a forward pass on a device: enabled in half precision, for those that need it.

        The models compute in the type of their weights. On CUDA autocast would let their norms compute in float32, and
        each layer cast its input again: a third more operations, and a quarter more memory for the backward pass.
        """
        return torch.autocast(device.type, self.unet, enabled=self.casts and self.unet is not torch.float32)


def move(module: nn.Module, to: torch.device | torch.dtype | str) -> None:
    """Move a model to a device or convert its weights; typed, unlike `to` of diffusers' models."""
    module.to(to)


def types_of(
    mixed_precision: str, *, vae_overflows: bool = False, no_half_vae: bool = False, half_adapter: bool = False
) -> Types:
    """Return the types for a kind of mixed precision ("no", "fp16", "bf16").

    The VAE is in float32 if no_half_vae, or if it would overflow in fp16; bf16 has the range of float32.
    """
    dtype = DTYPES[mixed_precision]
    whole_vae = no_half_vae or (vae_overflows and dtype is torch.float16)
    return Types(dtype, torch.float32 if whole_vae else dtype, dtype if half_adapter else torch.float32)


class Device(NamedTuple):
    """What decides which types are fast on a device."""

    kind: str  # as torch names it, such as cuda
    name: str  # of the product
    has_bf16: bool  # by itself: torch emulates it where it is missing, several times slower than fp16
    has_tf32: bool  # whether float32 products can be computed with factors of 10 bits


def describe(device: torch.device) -> Device:
    """Return what a device can do."""
    if device.type != "cuda":
        return Device(device.type, device.type, has_bf16=True, has_tf32=False)
    with torch.cuda.device(device):  # torch answers for the current one
        return Device(
            device.type,
            torch.cuda.get_device_name(device),
            has_bf16=torch.cuda.is_bf16_supported(including_emulation=False),
            has_tf32=torch.cuda.is_tf32_supported(),
        )


def supported_precision(mixed_precision: str, device: Device) -> str:
    """Return the mixed precision that a device supports; warns if it is not the requested one.

    Raises UserError for bf16 on a GPU without it.
    """
    if mixed_precision == "fp16" and device.kind == "cpu":
        logger.warning("--mixed_precision fp16 needs a GPU; this machine has none: the run and its file are in float32")
        return "no"
    if mixed_precision == "bf16":
        check_bf16("--mixed_precision bf16", "--mixed_precision fp16", device)
    return mixed_precision


def check_bf16(option: str, instead: str, device: Device) -> None:
    """Raise UserError for bf16, asked for by an option, on a device that only emulates it."""
    if not device.has_bf16:
        raise UserError(f"{option}: this GPU ({device.name}) has no bfloat16 and is slow with it: use {instead}")
