"""Attention of xformers in place of torch's own."""

from __future__ import annotations

import logging
from typing import Protocol

import torch

logger = logging.getLogger(__name__)


class HasAttention(Protocol):
    """A model of diffusers with attention layers."""

    def enable_xformers_memory_efficient_attention(self) -> None:
        """Compute attention with xformers."""


def use_xformers(device: torch.device, *models: HasAttention) -> None:
    """Switch models to xformers where it works on their device; warns and leaves them as they are elsewhere."""
    reason = xformers_problem(device)
    if reason is not None:
        logger.warning("--xformers: %s; torch's attention (SDPA) is used, which is as fast and sparing", reason)
        return
    for model in models:
        model.enable_xformers_memory_efficient_attention()


def xformers_problem(device: torch.device) -> str | None:
    """Return why xformers cannot be used on a device, or None if one small call works."""
    if device.type != "cuda":
        return "it needs a CUDA GPU, which is absent here"
    try:
        from xformers.ops import memory_efficient_attention

        probe = torch.zeros(1, 8, 1, 64, device=device, dtype=torch.float16)
        memory_efficient_attention(probe, probe, probe)
    except (ImportError, NotImplementedError, RuntimeError) as error:
        return f"it does not work here ({str(error).splitlines()[0]})"
    return None
