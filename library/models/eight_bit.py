"""Weights of a frozen model in 8 bits: float8_e4m3fn in memory, the run's type in arithmetic.

Autograd would keep the widened weights until the backward pass, and with them the memory that was to be saved;
so the two layers that hold nearly all weights widen them again there.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional

STORAGE = torch.float8_e4m3fn


def store_in_eight_bits(model: nn.Module) -> int:
    """Round the weights of linear layers and convolutions to float8_e4m3fn; return the bytes that this saves.

    Embeddings, norms and biases stay, for they are small. The model must be frozen.
    """
    saved = 0
    for module in model.modules():
        forward = FORWARDS.get(type(module).__name__)
        if forward is not None:
            saved += module.weight.numel() * (module.weight.element_size() - STORAGE.itemsize)
            module.weight.data = module.weight.data.to(STORAGE)
            module.forward = functools.partial(forward, module)
    return saved


def _operands(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return input and bias in the type of the arithmetic."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return x.to(dtype), None if module.bias is None else module.bias.to(dtype)


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    x, bias = _operands(module, x)
    return _Linear.apply(x, module.weight, bias)


def _convolution(module: nn.Conv2d, x: Tensor) -> Tensor:
    x, bias = _operands(module, x)
    return _Convolution.apply(x, module.weight, bias, (module.stride, module.padding))


FORWARDS = {"Linear": _linear, "Conv2d": _convolution}


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(context, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ANN001
        context.save_for_backward(weight)
        return functional.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN001
        (weight,) = context.saved_tensors
        return gradient @ weight.to(gradient.dtype), None, None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(context, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple) -> Tensor:  # noqa: ANN001
        context.save_for_backward(weight)
        context.shape, context.geometry = x.shape, geometry
        return functional.conv2d(x, weight.to(x.dtype), bias, *geometry)

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN001
        (weight,) = context.saved_tensors
        widened = weight.to(gradient.dtype)
        return torch.nn.grad.conv2d_input(context.shape, widened, gradient, *context.geometry), None, None, None
