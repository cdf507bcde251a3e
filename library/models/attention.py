"""Attention of xformers instead of torch's own."""

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
    """Switch models to xformers if it works on their device; else warn and leave them unchanged."""
    reason = xformers_problem(device)
    if reason is not None:
        logger.warning(
            "--xformers: %s; torch's attention (SDPA) is used, which is as fast and needs as little memory", reason
        )
        return
    for model in models:
        model.enable_xformers_memory_efficient_attention()


def xformers_problem(device: torch.device) -> str | None:
    """Return why xformers cannot be used on a device, or None if a small test call works."""
    if device.type != "cuda":
        return "it needs a CUDA GPU, and there is none"
    try:
        from xformers.ops import memory_efficient_attention

        probe = torch.zeros(1, 8, 1, 64, device=device, dtype=torch.float16)
        memory_efficient_attention(probe, probe, probe)
    except (ImportError, NotImplementedError, RuntimeError) as error:
        return f"it does not work here ({str(error).splitlines()[0]})"
    return None
