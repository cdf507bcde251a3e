"""Tensors that travel together to a device: nested in tuples and dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

UNPINNED = ("cpu", "mps")  # devices whose memory is that of the host


def sent(value: T, device: torch.device) -> T:
    """Return a value with its tensors on a device.

    The host does not wait: from pinned memory the copy runs after the work that the device already has.
    """
    if device.type in UNPINNED:
        return mapped(value, lambda tensor: tensor.to(device))
    return mapped(value, lambda tensor: _pinned(tensor).to(device, non_blocking=True))


def _pinned(tensor: Tensor) -> Tensor:
    return tensor.pin_memory() if tensor.device.type == "cpu" else tensor


def mapped(value: T, function: Callable[[Tensor], Any]) -> T:
    """Return a value with a function applied to each of its tensors."""
    return _mapped(value, function)


def _mapped(value: Any, function: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        parts = [_mapped(part, function) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **{name: _mapped(part, function) for name, part in own.items()})
    return value


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yield the tensors of a value, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from tensors_in(part)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))


class Reading:
    """Numbers of a small tensor, copied to the host in the background; the host waits only when it reads them."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: Any = None
        self._values = tensor
        if tensor.device.type not in UNPINNED:
            self._values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._values.copy_(tensor, non_blocking=True)
            self._event = torch.Event(tensor.device.type)
            self._event.record()

    def numbers(self) -> list[float]:
        """Return the numbers; waits until they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()
