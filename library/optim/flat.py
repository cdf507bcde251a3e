"""Lays the weights of a parameter group and their gradients side by side in memory.

A LoRA has hundreds of small matrices, and most of the time of a step is overhead for each. If they and their gradients
are views of one tensor, a step takes a few operations: gradients are clipped, weights cast, and both averaged over
processes at once.

Optimizers own float32 weights also where a run computes in half precision and where a network is in fp16, in which the
squares of small gradients are 0: AdamW then divides by them. Only a network in bf16 is changed in bf16, which saves
memory at the price of small changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def type_of_masters(own: torch.dtype) -> torch.dtype:
    """Return the type in which an optimizer changes weights of a type."""
    return torch.float32 if own is torch.float16 else own


class FlatWeights:
    """The weights of one group and type: `master` is what the optimizer changes; networks compute with `copies`.

    Where the computations need another type than the masters, there are two flat tensors, and each step casts one into
    the other: `collect` the gradients, `publish` the weights. The network's parameters, which are saved, are views of
    the tensor of their own type.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], computed: torch.dtype | None) -> None:
        """computed is the type of the copies; None is that of the parameters, which are then no copies."""
        own = parameters[0].dtype
        flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
        wide = type_of_masters(own)
        narrow = computed or own
        self.is_cast, self.hides_masters = narrow != wide, own != wide
        self.master = nn.Parameter(flat.to(wide))
        self.gradient = torch.zeros_like(self.master, requires_grad=False)
        self.master.grad = self.gradient
        self._work = flat.to(narrow) if self.is_cast else self.master.detach()
        self.pass_gradient = torch.zeros_like(self._work) if self.is_cast else self.gradient
        self._places: list[tuple[nn.Parameter, slice]] = []
        self.copies: dict[Tensor, Tensor] = {}
        start = 0
        for parameter in parameters:
            place, shape = slice(start, start + parameter.numel()), parameter.shape
            self._places.append((parameter, place))
            start = place.stop
            work, of_work = self._work[place].view(shape), self.pass_gradient[place].view(shape)
            copy: Tensor = parameter
            if own == narrow:
                parameter.data, parameter.grad = work, of_work
            else:
                parameter.data = self.master.data[place].view(shape)
                parameter.grad = self.gradient[place].view(shape)
                copy = work.detach().requires_grad_()
                copy.grad = of_work
            self.copies[parameter] = copy

    def for_optimizer(self, *, together: bool) -> list[nn.Parameter]:
        """Return what an optimizer changes: one parameter, or one for each of the network's."""
        if together:
            return [self.master]
        if not self.hides_masters:
            return [parameter for parameter, _ in self._places]
        parts = []
        for parameter, place in self._places:
            part = nn.Parameter(self.master.data[place].view(parameter.shape))
            part.grad = self.gradient[place].view(parameter.shape)
            parts.append(part)
        return parts

    @torch.no_grad()
    def clear(self) -> None:
        """Set all gradients to zero."""
        self.gradient.zero_()

    @torch.no_grad()
    def collect(self) -> None:
        """Add the gradients of the copies to those of the masters."""
        if self.is_cast:
            self.gradient.add_(self.pass_gradient)
            self.pass_gradient.zero_()

    @torch.no_grad()
    def publish(self) -> None:
        """Cast the masters into the copies."""
        if self.is_cast:
            self._work.copy_(self.master)

    @contextlib.contextmanager
    def unhidden(self) -> Iterator[None]:
        """Within it the network's parameters are the masters, for what changes them besides the optimizer."""
        for parameter, place in self._places if self.hides_masters else ():
            parameter.data = self.master.data[place].view(parameter.shape)
        try:
            yield
        finally:
            for parameter, place in self._places if self.hides_masters else ():
                parameter.data = self._work[place].view(parameter.shape)
            self.publish()


class TrainedWeights:
    """All weights that a run trains."""

    def __init__(self, groups: Sequence[Mapping[str, Any]], computed: torch.dtype | None) -> None:
        """groups are parameter groups; computed is the type that the network computes in, None that of its parameters.

        The parameters become views of flat tensors; their values stay.
        """
        self._groups = groups
        self._flats: list[list[FlatWeights]] = []
        for group in groups:
            by_kind: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                by_kind.setdefault((parameter.dtype, parameter.device), []).append(parameter)
            self._flats.append([FlatWeights(parameters, computed) for parameters in by_kind.values()])

    @property
    def flats(self) -> list[FlatWeights]:
        """The flat weights of all groups."""
        return [flat for of_group in self._flats for flat in of_group]

    @property
    def gradients(self) -> list[Tensor]:
        """The gradients of all weights."""
        return [flat.gradient for flat in self.flats]

    @property
    def pass_gradients(self) -> list[Tensor]:
        """The gradients that a backward pass adds to, in the type of the computations."""
        return [flat.pass_gradient for flat in self.flats]

    @property
    def copies(self) -> dict[Tensor, Tensor]:
        """What the network computes with, by its parameters."""
        return {parameter: copy for flat in self.flats for parameter, copy in flat.copies.items()}

    def groups(self, *, together: bool) -> list[dict[str, Any]]:
        """Return the groups for an optimizer; together: each as one parameter for each type."""
        return [
            {**group, "params": [part for flat in flats for part in flat.for_optimizer(together=together)]}
            for group, flats in zip(self._groups, self._flats, strict=True)
        ]

    def clear(self) -> None:
        """Set all gradients to zero."""
        for flat in self.flats:
            flat.clear()

    def collect(self) -> None:
        """Add the gradients of a backward pass to those that the optimizer reads."""
        for flat in self.flats:
            flat.collect()

    def publish(self) -> None:
        """Let the network compute with the weights as they are now."""
        for flat in self.flats:
            flat.publish()

    @contextlib.contextmanager
    def unhidden(self) -> Iterator[None]:
        """Within it the network's parameters are what the optimizer changes; afterwards they are published."""
        with contextlib.ExitStack() as stack:
            for flat in self.flats:
                stack.enter_context(flat.unhidden())
            yield

    def are_finite(self) -> bool:
        """Return whether all weights are finite; waits for the device."""
        return all(bool(torch.isfinite(flat.master.detach()).all()) for flat in self.flats)

    def hidden_masters(self) -> list[Tensor]:
        """Return the masters that a network's own parameters do not tell, because they are rounded."""
        return [flat.master.detach() for flat in self.flats if flat.hides_masters]

    @torch.no_grad()
    def restore(self, masters: Sequence[Tensor] | None) -> None:
        """Set the hidden masters; None: from the network's parameters, which were loaded before."""
        hidden = [flat for flat in self.flats if flat.hides_masters]
        if masters is not None and [len(one) for one in masters] != [len(flat.master) for flat in hidden]:
            raise ValueError("its float32 weights are others")
        for index, flat in enumerate(hidden):
            flat.master.copy_(flat._work if masters is None else masters[index])
        self.publish()
