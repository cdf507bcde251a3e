"""Puts all parameters of a group in one tensor, for element-wise optimizers.

A LoRA has hundreds of small matrices, and most of the time of a step is overhead for each. If they and their gradients
are views of one flat tensor, a step takes a few operations, clipping one norm, and averaging over processes one
message without copies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def flatten_groups(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return groups with one flat parameter for each type; the former parameters become views of it.

    Values do not change. Gradients are views too, so they must be set to zero in place, never to None.
    """
    flat_groups = []
    for group in groups:
        by_kind: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_kind.setdefault((parameter.dtype, parameter.device), []).append(parameter)
        flat_groups.append(group | {"params": [_flatten(parameters) for parameters in by_kind.values()]})
    return flat_groups


@torch.no_grad()
def _flatten(parameters: list[nn.Parameter]) -> nn.Parameter:
    flat = nn.Parameter(torch.cat([parameter.reshape(-1) for parameter in parameters]))
    flat.grad = torch.zeros_like(flat)
    start = 0
    for parameter in parameters:
        end = start + parameter.numel()
        parameter.data = flat.data[start:end].view(parameter.shape)
        parameter.grad = flat.grad[start:end].view(parameter.shape)
        start = end
    return flat
