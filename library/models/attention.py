"""Attention of xformers instead of torch's own."""

from __future__ import annotations

import contextlib
import logging
from typing import Protocol

import torch

from library.errors import is_out_of_memory, message_of

logger = logging.getLogger(__name__)


class HasAttention(Protocol):
    """A model of diffusers with attention layers."""

    def enable_xformers_memory_efficient_attention(self) -> None:
        """Compute attention with xformers."""

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Compute attention with torch."""


def use_xformers(device: torch.device, *models: HasAttention) -> None:
    """Switch models to xformers if it works on their device; else warn and leave them unchanged."""
    reason = xformers_problem(device) or enabling_problem(device, *models)
    if reason is not None:
        logger.warning(
            "--xformers: %s; torch's attention (SDPA) is used, which is as fast and needs as little memory", reason
        )


def xformers_problem(device: torch.device) -> str | None:
    """Return why xformers cannot be used on a device, or None if a small test call works."""
    if device.type != "cuda":
        return "it needs a CUDA GPU, and there is none"
    try:
        from xformers.ops import memory_efficient_attention

        probe = torch.zeros(1, 8, 1, 64, device=device, dtype=torch.float16)
        memory_efficient_attention(probe, probe, probe)
    except Exception as error:  # noqa: BLE001 (also libraries that do not load, and kernels that are not there)
        return failure(error)
    return None


def enabling_problem(device: torch.device, *models: HasAttention) -> str | None:
    """Switch models to xformers; if one of them cannot, switch all back and return why.

    Diffusers makes a test call of its own, in float32, on the current GPU.
    """
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        try:
            for model in models:
                model.enable_xformers_memory_efficient_attention()
        except Exception as error:  # noqa: BLE001 (as with the probe)
            for model in models:
                model.disable_xformers_memory_efficient_attention()
            return failure(error)
    return None


def failure(error: Exception) -> str:
    """Return what is said of an error of xformers; raises it again if it is too little memory."""
    if is_out_of_memory(error):
        raise error
    return f"it does not work here ({message_of(error)})"
