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

import dataclasses
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from networks.lora import LoraArgs, LoRAModule, LoRANetwork, Shape, ShapeRule, read_network_args

UPDATES = ("all", "unit")
# What does not go with ranks that are drawn, and why.
REFUSED = {
    "rank_dropout": "DyLoRA draws ranks itself",
    "block_dims": "all modules share the rank that is drawn",
    "block_alphas": "all modules share the rank that is drawn",
    "conv_block_dims": "all modules share the rank that is drawn",
    "conv_block_alphas": "all modules share the rank that is drawn",
}


@dataclasses.dataclass(frozen=True)
class DyLoraArgs(LoraArgs):
    """The arguments of `--network_args key=value`."""

    unit: int = 1
    dylora_update: str = "all"


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
    rank_share: Tensor
    is_newest: Tensor

    def __init__(
        self,
        text_encoder: nn.Module | Sequence[nn.Module] | None,
        unet: nn.Module,
        rule: ShapeRule,
        args: DyLoraArgs,
        *,
        multiplier: float = 1.0,
        neuron_dropout: float | None = None,
    ) -> None:
        super().__init__(text_encoder, unet, rule, args, multiplier=multiplier, neuron_dropout=neuron_dropout)
        rank = max((module.lora_dim for module in self.modules_in_order()), default=args.unit)
        self.rank, self.unit, self.holds_older = rank, args.unit, args.dylora_update == "unit"
        self.drawn_rank = self.fixed_rank = rank
        # Changed in place, so that a compiled graph or another process sees the same tensors all the time.
        # R / b for the first b ranks and 0 for the rest: times alpha / R that is the scale alpha / b.
        self.register_buffer("rank_share", torch.ones(rank), persistent=False)
        self.register_buffer("is_newest", torch.ones(rank, dtype=torch.bool), persistent=False)
        for module in self.modules():
            if isinstance(module, DyLoRAModule):
                module.network_ref = [self]

    @classmethod
    def read_args(cls, network_args: Mapping[str, Any], shapes: Iterable[Shape]) -> DyLoraArgs:
        """Return the network_args read; raises ValueError for those that are unknown, bad, or do not go with shapes."""
        own: dict[str, Any] = {}
        for key, (read, form) in OWN_READINGS.items():
            try:
                own |= {key: read(network_args[key])} if key in network_args else {}
            except ValueError:
                raise ValueError(f"network_args: {key} must be {form}, got {network_args[key]!r}") from None
        for key, reason in REFUSED.items():
            if network_args.get(key) not in (None, "0", 0):
                raise ValueError(f"network_args: {key} does not go with networks.dylora: {reason}")
        common = read_network_args({key: value for key, value in network_args.items() if key not in OWN_READINGS})
        args = DyLoraArgs(**vars(common), **own)
        linear = sorted(set(shapes))
        ranks = sorted({shape.rank for shape in linear})
        if len(ranks) > 1:
            raise ValueError(f"DyLoRA needs one rank in all modules, the file has {ranks}")
        if ranks:
            check_rank(ranks[0], args)
        if len(linear) == 1 and "conv_alpha" not in network_args:  # as sd-scripts' DyLoRA has it for all layers
            args = dataclasses.replace(args, conv_alpha=linear[0].alpha)
        return args

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


# key -> (reading, form)
OWN_READINGS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "unit": (read_unit, "a whole number of at least 1"),
    "dylora_update": (read_update, "one of all, unit"),
}


def check_rank(rank: int, args: DyLoraArgs) -> None:
    """Raise ValueError where rank, unit and conv_dim do not fit, with the numbers that would do."""
    unit = args.unit
    if rank % unit:
        divisors = ", ".join(str(number) for number in range(1, rank + 1) if rank % number == 0)
        raise ValueError(
            f"network_args: unit {unit} does not divide network_dim {rank}: take a unit of {divisors}, "
            f"or network_dim {rank // unit * unit or unit} or {rank // unit * unit + unit}"
        )
    if args.conv_dim not in (None, rank):
        raise ValueError(
            f"network_args: conv_dim must be network_dim, {rank}, or be left out, got {args.conv_dim}: "
            "all modules share the rank that is drawn"
        )


# Entry points that trainers and pipelines call by name.
create_network = DyLoRANetwork.create_network
create_network_from_weights = DyLoRANetwork.create_network_from_weights
check_network_args = DyLoRANetwork.check_network_args
