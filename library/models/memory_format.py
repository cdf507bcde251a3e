"""The order of a picture's numbers in memory: channels last, which the tensor cores of GPUs take without a copy."""

from __future__ import annotations

import torch
from torch import nn


def use_channels_last(*models: nn.Module) -> None:
    """Store the weights of 2D convolutions with the channels last; torch then orders what goes through them alike."""
    for model in models:
        torch.nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last)
