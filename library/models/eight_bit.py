"""Weights of a frozen model in 8 bits: float8_e4m3fn in memory, the run's type in computations.

Autograd would keep the converted weights until the backward pass and so use the memory that 8 bits save. Linear layers
and convolutions, which have nearly all weights, therefore convert them again in the backward pass.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_input

STORAGE = torch.float8_e4m3fn


def store_in_eight_bits(model: nn.Module) -> int:
    """Round the weights of linear layers and convolutions to float8_e4m3fn; return the number of bytes saved.

    Embeddings, norms and biases are small and stay as they are. So does the first layer: diffusers takes its type for
    that of the computations. The model must be frozen.
    """
    saved, first = 0, next(model.parameters())
    for module in model.modules():
        if getattr(module, "weight", None) is first:
            continue
        if isinstance(module, nn.Linear):
            forward = functools.partial(_linear, module)
        elif isinstance(module, nn.Conv2d):
            forward = functools.partial(_convolution, module)
        else:
            continue
        saved += module.weight.numel() * (module.weight.element_size() - STORAGE.itemsize)
        module.weight.data = module.weight.data.to(STORAGE)
        setattr(module, "forward", forward)  # noqa: B010 (mypy refuses assignments to methods)
    return saved


def _operands(layer: nn.Linear | nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return input and bias in the type of the computation."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    bias: Tensor | None = layer.bias
    return x.to(dtype), None if bias is None else bias.to(dtype)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return _Linear.apply(*_operands(layer, x), layer.weight)


def _convolution(layer: nn.Conv2d, x: Tensor) -> Tensor:
    return _Convolution.apply(*_operands(layer, x), layer.weight, (layer.stride, layer.padding))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, bias: Tensor | None, weight: Tensor) -> Tensor:
        context.save_for_backward(weight)
        return functional.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = context.saved_tensors
        return gradient @ weight.to(gradient.dtype), None, None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, bias: Tensor | None, weight: Tensor, geometry: tuple[Any, Any]) -> Tensor:
        context.save_for_backward(weight)
        context.shape, context.geometry = x.shape, geometry
        return functional.conv2d(x, weight.to(x.dtype), bias, *geometry)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = context.saved_tensors
        widened = weight.to(gradient.dtype)
        return conv2d_input(context.shape, widened, gradient, *context.geometry), None, None, None
