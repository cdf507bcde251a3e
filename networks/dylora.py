"""DyLoRA: one training for all ranks (Valipour et al. 2022, arXiv 2210.07558).

For every optimizer step one rank b of {u, 2u, ..., R} is sampled for the whole network, and the step uses only the
first b rows of D (down) and columns of U (up): h = W x + alpha / b * U[:, :b] D[:b] x. So the trained file can be
truncated to any b, and that is what was trained. With `dylora_update=unit` a step changes only the last u of these rows
and columns (the paper's frozen variant), with `all` all b of them. `all` is the default: with it every rank came within
the noise of a LoRA of that rank, and with `unit` every rank was worse (benchmarks/dylora.py).

The file is an ordinary LoRA file of rank R. Evaluation and previews use rank R, or the rank set with `set_rank`.
Layers, names and files are those of `networks.lora`.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from networks.lora import (
    POSITIVE,
    LoraArgs,
    LoRAModule,
    LoRANetwork,
    Module,
    Shape,
    ShapeRule,
    TextEncoders,
    read_network_args,
)

ONE_RANK = "all modules share the rank that is sampled"
# Argument that cannot be combined with sampled ranks -> why.
REFUSED = {
    "rank_dropout": "DyLoRA samples ranks itself",
    **dict.fromkeys(("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas"), ONE_RANK),
}


def read_update(text: Any) -> str:
    """Return which ranks a step changes: all, or the last unit; raises ValueError for other texts."""
    if text not in ("all", "unit"):
        raise ValueError
    return text


@dataclasses.dataclass(frozen=True)
class DyLoraArgs(LoraArgs):
    """The arguments of `--network_args key=value`."""

    unit: int = dataclasses.field(default=1, metadata=POSITIVE)
    dylora_update: str = dataclasses.field(default="all", metadata={"read": read_update, "form": "one of all, unit"})


class DyLoRAModule(LoRAModule):
    """A LoRA module that uses the ranks of its network's current rank.

    Usually it cuts its matrices to them, so that a step is no slower than that of a small LoRA. Where shapes have to
    stay (`DyLoRANetwork.keep_shapes`), it multiplies the others by 0.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.network_ref: list[DyLoRANetwork] = []  # in a list, so that torch does not register it as a child

    def _can_fuse(self, x: Tensor) -> bool:
        return not self.network_ref[0].keeps_shapes and super()._can_fuse(x)

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        network = self.network_ref[0]
        if not network.keeps_shapes:
            return super()._factors(dtype)
        down, up = self._computed or (self.lora_down.weight, self.lora_up.weight)
        down, up = self._without_held(down, axis=0), self._without_held(up, axis=1)
        share = network.rank_share.view(-1, 1, 1) if up.ndim == 4 else network.rank_share
        return down.to(dtype), (up * share).to(dtype)

    def _without_held(self, weight: Tensor, axis: int) -> Tensor:
        """Return the weight; with `unit` only its last unit gets a gradient."""
        network = self.network_ref[0]
        if not (self.training and network.holds_older):
            return weight
        shape = [1] * weight.ndim
        shape[axis] = -1
        return torch.where(network.is_newest.view(shape), weight, weight.detach())


class DyLoRANetwork(LoRANetwork):
    """All DyLoRA modules of one set of models, with the rank that they share."""

    module_class = DyLoRAModule
    rank_share: Tensor
    is_newest: Tensor

    def __init__(
        self, text_encoder: TextEncoders, unet: Module, rule: ShapeRule, args: DyLoraArgs, **more: Any
    ) -> None:
        super().__init__(text_encoder, unet, rule, args, **more)
        rank = max((module.lora_dim for module in self.modules_in_order()), default=args.unit)
        self.rank, self.unit, self.holds_older = rank, args.unit, args.dylora_update == "unit"
        self.sampled_rank = self.fixed_rank = rank
        self.keeps_shapes = False
        # Changed in place, so that a compiled graph keeps the same tensors.
        # R / b for the first b ranks and 0 for the rest: times alpha / R this is the scale alpha / b.
        self.register_buffer("rank_share", torch.ones(rank), persistent=False)
        self.register_buffer("is_newest", torch.ones(rank, dtype=torch.bool), persistent=False)
        for module in self.modules():
            if isinstance(module, DyLoRAModule):
                module.network_ref = [self]

    @classmethod
    def read_args(cls, network_args: Mapping[str, Any], shapes: Iterable[Shape]) -> DyLoraArgs:
        """Return the network_args as values; raises ValueError for unknown or bad ones, and if shapes do not fit."""
        for key, reason in REFUSED.items():
            if network_args.get(key) not in (None, "0", 0):
                raise ValueError(f"network_args: {key} does not go with networks.dylora: {reason}")
        args = read_network_args(network_args, DyLoraArgs)
        linear = sorted(set(shapes))
        ranks = sorted({shape.rank for shape in linear})
        if len(ranks) > 1:
            raise ValueError(f"DyLoRA needs one rank in all modules, the file has {ranks}")
        if ranks:
            check_rank(ranks[0], args)
        if len(linear) == 1 and "conv_alpha" not in network_args:  # as in sd-scripts' DyLoRA, where all layers have one
            args = dataclasses.replace(args, conv_alpha=linear[0].alpha)
        return args

    @property
    def ranks(self) -> list[int]:
        """The ranks that are trained."""
        return list(range(self.unit, self.rank + 1, self.unit))

    def on_optimizer_step(self, key: int) -> None:
        """Sample the rank of a step; key depends only on seed and step, so all processes and a resumed run agree."""
        self.sampled_rank = random.Random(key).choice(self.ranks)
        if self.training:
            self._use(self.sampled_rank)

    @torch.no_grad()
    def rank_norms(self) -> dict[int, float]:
        """Return rank -> Frobenius norm of the change of all modules together, where all have the matrices of it."""
        total = torch.zeros(self.rank, device=self.rank_share.device)
        for module in self.modules_in_order():
            down, up = module.lora_down.weight.float().flatten(1), module.lora_up.weight.float().flatten(1)
            products = ((up.T @ up) * (down @ down.T)).cumsum(0).cumsum(1).diagonal()  # the first b of both, for each b
            total += products.clamp_min(0) * module.alpha_value**2
        return {rank: math.sqrt(total[rank - 1]) / rank for rank in self.ranks}

    def keep_shapes(self) -> None:
        """Compute with matrices of the same shapes at every rank, for compiled or recorded steps."""
        self.keeps_shapes = True
        self._use(self.sampled_rank if self.training else self.fixed_rank)

    def set_rank(self, rank: int) -> None:
        """Set the rank for evaluation."""
        if not 0 < rank <= self.rank:
            raise ValueError(f"the rank must be from 1 to {self.rank}, got {rank}")
        self.fixed_rank = rank
        if not self.training:
            self._use(rank)

    def train(self, mode: bool = True) -> DyLoRANetwork:
        """Switch to training with the sampled rank, or to evaluation with the fixed one."""
        super().train(mode)
        self._use(self.sampled_rank if mode else self.fixed_rank)
        return self

    def _use(self, rank: int) -> None:
        held = rank - self.unit if self.training and self.holds_older else 0
        for module in self.modules_in_order():
            module.use_ranks(*((self.rank, 0) if self.keeps_shapes else (rank, held)))
        if self.keeps_shapes:
            order = torch.arange(self.rank, device=self.rank_share.device)
            self.rank_share.copy_((order < rank).to(self.rank_share.dtype) * (self.rank / rank))
            self.is_newest.copy_((order < rank) & (order >= rank - self.unit))


def check_rank(rank: int, args: DyLoraArgs) -> None:
    """Raise ValueError if rank, unit and conv_dim do not fit together; the message names numbers that do."""
    unit = args.unit
    if rank % unit:
        divisors = ", ".join(str(number) for number in range(1, rank + 1) if rank % number == 0)
        raise ValueError(
            f"network_args: unit {unit} does not divide network_dim {rank}: take a unit of {divisors}, "
            f"or network_dim {rank // unit * unit or unit} or {rank // unit * unit + unit}"
        )
    if args.conv_dim not in (None, rank):
        raise ValueError(
            f"network_args: conv_dim must be network_dim, {rank}, or be left out, got {args.conv_dim}: {ONE_RANK}"
        )


# Entry points that trainers and pipelines call by name.
create_network = DyLoRANetwork.create_network
create_network_from_weights = DyLoRANetwork.create_network_from_weights
check_network_args = DyLoRANetwork.check_network_args
