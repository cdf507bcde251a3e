"""DyLoRA: one training for all ranks (Valipour et al. 2022, arXiv 2210.07558).

In every optimizer step one rank b is drawn from {u, 2u, ..., R} for the whole network, and the step is made with
the first b rows of D (down) and columns of U (up) alone: h = W x + alpha / b * U[:, :b] D[:b] x. So any b can be
cut out of the trained file and is what was trained. With `dylora_update=unit` only the newest u rows and columns
learn in a step (the paper's frozen variant), with `all` all b of them. `all` is the default, for with it every rank
came within the noise of a LoRA of that rank alone, and `unit` was worse at each (benchmarks/dylora.py).

The file is an ordinary LoRA file of rank R. Evaluation and previews use rank R, or the one set with `set_rank`.
Layers, names and files are those of `networks.lora`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from networks.lora import (
    DEFAULT_RANK,
    LORAPLUS_ARGS,
    Dropouts,
    LoRAModule,
    LoRANetwork,
    Shape,
    Weights,
    block_rule,
    plan_of_blocks,
    read_weights,
    shapes_in,
    uniform_rule,
)
from networks.lora import read_network_args as read_lora_args

UPDATES = ("all", "unit")
# What does not go with ranks that are drawn, and why.
REFUSED = {
    "rank_dropout": "DyLoRA draws ranks itself",
    "block_dims": "all modules share the rank that is drawn",
    "block_alphas": "all modules share the rank that is drawn",
    "conv_block_dims": "all modules share the rank that is drawn",
    "conv_block_alphas": "all modules share the rank that is drawn",
}


class DyLoRAModule(LoRAModule):
    """A LoRA module of which only the rows and columns of the network's current rank take part."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.network_ref: list[DyLoRANetwork] = []  # a list hides the network from torch

    def _down(self, x: Tensor) -> Tensor:
        hidden = super()._down(x)
        share = self.network_ref[0].rank_share
        # In float32: in half precision R / b would be rounded, and every step of this rank with it.
        return (hidden * (share.view(-1, 1, 1) if self.is_conv else share)).to(hidden.dtype)

    def _down_weight(self) -> Tensor:
        return self._held(self.lora_down.weight, axis=0)

    def _up_weight(self) -> Tensor:
        return self._held(self.lora_up.weight, axis=1)

    def _held(self, weight: Tensor, axis: int) -> Tensor:
        """Return the weight, of which under `unit` only the newest unit gets a gradient."""
        network = self.network_ref[0]
        if not (self.training and network.holds_older):
            return weight
        shape = [1] * weight.ndim
        shape[axis] = -1
        return torch.where(network.is_newest.view(shape), weight, weight.detach())


class DyLoRANetwork(LoRANetwork):
    """All DyLoRA modules over one set of models, with the rank that they share."""

    module_class = DyLoRAModule

    def __init__(self, *args: Any, rank: int, unit: int, update: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rank, self.unit, self.holds_older = rank, unit, update == "unit"
        self.drawn_rank = self.fixed_rank = rank
        # Changed in place, so that a compiled graph or another process sees the same tensors all the time.
        # R / b for the first b ranks and 0 for the rest: times alpha / R that is the scale alpha / b.
        self.register_buffer("rank_share", torch.ones(rank), persistent=False)
        self.register_buffer("is_newest", torch.ones(rank, dtype=torch.bool), persistent=False)
        for module in self.modules_in_order():
            module.network_ref = [self]

    @property
    def ranks(self) -> list[int]:
        """The ranks that are trained."""
        return list(range(self.unit, self.rank + 1, self.unit))

    def on_optimizer_step(self, key: int) -> None:
        """Draw the rank of a step; key depends on seed and step, so that all processes and a resumed run agree."""
        self.drawn_rank = random.Random(key).choice(self.ranks)
        if self.training:
            self._use(self.drawn_rank)

    def set_rank(self, rank: int) -> None:
        """Set the rank for evaluation."""
        if not 0 < rank <= self.rank:
            raise ValueError(f"the rank must be from 1 to {self.rank}, got {rank}")
        self.fixed_rank = rank
        if not self.training:
            self._use(rank)

    def train(self, mode: bool = True) -> DyLoRANetwork:
        """Switch to training with the rank that was drawn, or to evaluation with the fixed one."""
        super().train(mode)
        self._use(self.drawn_rank if mode else self.fixed_rank)
        return self

    def _use(self, rank: int) -> None:
        order = torch.arange(self.rank, device=self.rank_share.device)
        self.rank_share.copy_((order < rank).to(self.rank_share.dtype) * (self.rank / rank))
        self.is_newest.copy_((order < rank) & (order >= rank - self.unit))


# --------------------------------------------------------------------------------------------------------------
# Entry points that trainers and pipelines call by name
# --------------------------------------------------------------------------------------------------------------


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: Any,
    text_encoder: nn.Module | Sequence[nn.Module],
    unet: nn.Module,
    neuron_dropout: float | None = None,
    **network_args: Any,
) -> DyLoRANetwork:
    """Return a fresh network; network_args come as texts. Raises ValueError for unknown or bad ones."""
    del vae
    given = read_network_args(network_args)
    rank = network_dim or DEFAULT_RANK
    alpha = 1.0 if network_alpha is None else network_alpha
    check_ranks(rank, given)
    if "conv_alpha" not in network_args:
        given["conv_alpha"] = alpha  # as sd-scripts' DyLoRA has it for all layers
    linear = Shape(rank, alpha)
    blocks = plan_of_blocks(given, linear)
    network = DyLoRANetwork(
        text_encoder,
        unet,
        uniform_rule(given, linear) if blocks is None else block_rule(blocks, linear),
        multiplier=multiplier,
        dropouts=Dropouts(neuron_dropout or 0.0, 0.0, given["module_dropout"]),
        rank=rank,
        unit=given["unit"],
        update=given["dylora_update"],
    )
    network.blocks = blocks
    network.set_loraplus_lr_ratio(*(given[key] for key in LORAPLUS_ARGS))
    return network


def check_network_args(network_dim: int | None, network_args: Mapping[str, str], *, from_file: bool) -> None:
    """Raise ValueError for arguments that are unknown, cannot be read, or do not go with the rank."""
    given = read_network_args(network_args)
    if not from_file:
        check_ranks(network_dim or DEFAULT_RANK, given)


def create_network_from_weights(
    multiplier: float,
    file: str | Path | None,
    vae: Any,
    text_encoder: nn.Module | Sequence[nn.Module],
    unet: nn.Module,
    weights_sd: Weights | None = None,
    for_inference: bool = False,
    neuron_dropout: float | None = None,
    **network_args: Any,
) -> tuple[DyLoRANetwork, Weights]:
    """Return (network, weights): a network with the modules, rank and alphas of a file, values not yet loaded."""
    del vae, for_inference
    weights = read_weights(Path(file)) if weights_sd is None else weights_sd
    given = read_network_args(network_args)
    shapes = shapes_in(weights)
    ranks = sorted({shape.rank for shape in shapes.values()})
    if len(ranks) != 1:
        raise ValueError(f"{file or 'the weights'}: DyLoRA needs one rank in all modules, the file has {ranks}")
    check_ranks(ranks[0], given)
    network = DyLoRANetwork(
        text_encoder,
        unet,
        lambda target: shapes.get(target.name),
        multiplier=multiplier,
        dropouts=Dropouts(neuron_dropout or 0.0, 0.0, given["module_dropout"]),
        rank=ranks[0],
        unit=given["unit"],
        update=given["dylora_update"],
    )
    if not network.modules_in_order():
        raise ValueError(f"{file or 'the weights'}: none of its {len(shapes)} modules is in these models")
    network.blocks = plan_of_blocks(given, Shape(ranks[0], 1.0))
    network.set_loraplus_lr_ratio(*(given[key] for key in LORAPLUS_ARGS))
    return network, weights


def read_unit(text: Any) -> int:
    """Return the unit, at least 1."""
    unit = int(text)
    if unit < 1:
        raise ValueError
    return unit


def read_update(text: Any) -> str:
    """Return which part of the rank learns in a step."""
    if text not in UPDATES:
        raise ValueError
    return text


# key -> (reading, default, form)
OWN_ARGS: dict[str, tuple[Callable[[Any], Any], Any, str]] = {
    "unit": (read_unit, 1, "a whole number of at least 1"),
    "dylora_update": (read_update, "all", "one of all, unit"),
}


def read_network_args(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return key -> typed value of all network_args; raises ValueError for an unknown key or a bad value."""
    own = {}
    for key, (read, default, form) in OWN_ARGS.items():
        try:
            own[key] = read(given[key]) if key in given else default
        except ValueError:
            raise ValueError(f"network_args: {key} must be {form}, got {given[key]!r}") from None
    for key, reason in REFUSED.items():
        if given.get(key) not in (None, "0", 0):
            raise ValueError(f"network_args: {key} does not go with networks.dylora: {reason}")
    return read_lora_args({key: value for key, value in given.items() if key not in OWN_ARGS}) | own


def check_ranks(rank: int, given: Mapping[str, Any]) -> None:
    """Raise ValueError where rank, unit and conv_dim do not fit, with the numbers that would do."""
    unit = given["unit"]
    if rank % unit:
        divisors = ", ".join(str(number) for number in range(1, rank + 1) if rank % number == 0)
        raise ValueError(
            f"network_args: unit {unit} does not divide network_dim {rank}: take a unit of {divisors}, "
            f"or network_dim {rank // unit * unit or unit} or {rank // unit * unit + unit}"
        )
    if given["conv_dim"] not in (None, rank):
        raise ValueError(
            f"network_args: conv_dim must be network_dim, {rank}, or be left out, got {given['conv_dim']}: "
            "all modules share the rank that is drawn"
        )
