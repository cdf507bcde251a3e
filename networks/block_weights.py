"""Rank, alpha and learning rate by block of the U-Net.

The blocks of SD 1.x and 2.x are numbered 0 to 24: 12 on the way down, the middle (12), 12 on the way up. Block 0,
the first convolution, has no modules. SDXL has 23. Numbering, presets and names of arguments are those of sd-scripts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from library.adapters.blocks import SD, BlockTable
from networks.lora import PREFIX_UNET, UNET_CONV_CONTAINERS, Blocks, LoRAModule, RateGroup, Shape, ShapeRule, Target

LR_ARGUMENTS = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")
SHAPE_ARGUMENTS = ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")
ARGUMENTS = (*LR_ARGUMENTS, "block_lr_zero_threshold", *SHAPE_ARGUMENTS)

Number = TypeVar("Number", int, float)


# --------------------------------------------------------------------------------------------------------------
# Weights of the learning rate
# --------------------------------------------------------------------------------------------------------------

# Preset -> weight at position i of n.
PRESETS: dict[str, Callable[[int, int], float]] = {
    "sine": lambda i, n: math.sin(math.pi / 2 * i / (n - 1)),
    "cosine": lambda i, n: math.sin(math.pi / 2 * (n - 1 - i) / (n - 1)),
    "linear": lambda i, n: i / (n - 1),
    "reverse_linear": lambda i, n: (n - 1 - i) / (n - 1),
    "zeros": lambda i, n: 0.0,
}


def read_lr_weights(key: str, text: str, count: int) -> list[float]:
    """Return the weights that an argument gives; raises ValueError with the expected form."""
    is_mid = key == "mid_lr_weight"
    name, _, offset = text.strip().partition("+")
    if name in PRESETS and not is_mid:
        try:
            return [PRESETS[name](index, count) + float(offset or 0) for index in range(count)]
        except ValueError:
            raise ValueError(
                f"network_args: {key}: the offset of {text!r} must be a number, as in {name}+.25"
            ) from None
    presets = "" if is_mid else f", or one of {', '.join(PRESETS)}, with an offset as in sine+.25"
    form = f"{count} number{'s separated by commas' if count > 1 else ''}{presets}"
    try:
        values = [float(part or 0) for part in text.split(",")]  # nothing between two commas is 0, as in sd-scripts
    except ValueError:
        raise ValueError(f"network_args: {key} must be {form}, got {text!r}") from None
    if len(values) != count:
        raise ValueError(f"network_args: {key} must be {form}, got {len(values)}: {text!r}")
    return values


def read_numbers(
    key: str, given: Mapping[str, str], table: BlockTable, kind: type[Number]
) -> tuple[Number, ...] | None:
    """Return one number for each block, None where the argument is left out; raises ValueError with the form."""
    text = given.get(key)
    if text is None:
        return None
    kinds = {int: "whole numbers, none negative", float: "numbers, none negative"}
    form = f"{table.count} {kinds[kind]}, separated by commas (one for each block of {table.name})"
    try:
        values = tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"network_args: {key} must be {form}, got {text!r}") from None
    if len(values) != table.count or any(not value >= 0 for value in values):
        raise ValueError(f"network_args: {key} must be {form}, got {len(values)}: {text!r}")
    return values


# --------------------------------------------------------------------------------------------------------------
# The shapes and learning rates of each block
# --------------------------------------------------------------------------------------------------------------


class BlockShape(NamedTuple):
    """The shapes of the modules of a block, for linear layers and for 3x3 convolutions."""

    linear: Shape
    conv: Shape


NO_MODULES = BlockShape(Shape(0, 0.0), Shape(0, 0.0))


@dataclasses.dataclass(frozen=True)
class BlockPlan(Blocks):
    """The numbers for every block; None for an argument that is not given."""

    table: BlockTable
    dims: tuple[int, ...] | None
    alphas: tuple[float, ...] | None
    conv_dims: tuple[int, ...] | None
    conv_alphas: tuple[float, ...] | None
    weights: tuple[float, ...]  # of the learning rate; a block of weight 0 has no modules
    has_weights: bool  # whether any was given: only then does the learning rate depend on the block

    def shapes(self, linear: Shape, conv: Shape) -> list[BlockShape]:
        """Return the shapes of every block; linear and conv are for numbers that are not given."""
        count = self.table.count
        linears = zip(self.dims or [linear.rank] * count, self.alphas or [linear.alpha] * count, strict=True)
        convs = zip(self.conv_dims or [conv.rank] * count, self.conv_alphas or [conv.alpha] * count, strict=True)
        return [
            BlockShape(Shape(*of_linear), Shape(*of_conv)) if weight else NO_MODULES
            for of_linear, of_conv, weight in zip(linears, convs, self.weights, strict=True)
        ]

    def rule(self, linear: Shape, conv: Shape) -> ShapeRule:
        """Return the rule with the shape of its block for a target of the U-Net, and linear for text encoders."""
        shapes = self.shapes(linear, conv)
        has_conv = any(shape.conv.rank for shape in shapes)

        def rule(target: Target) -> Shape | None:
            if not target.name.startswith(PREFIX_UNET):
                return linear
            if target.container in UNET_CONV_CONTAINERS and not has_conv:
                return None
            shape = shapes[self.table.index_of(target.name)]
            return shape.conv if target.is_large_conv else shape.linear

        return rule

    def groups(self, modules: Sequence[LoRAModule]) -> list[RateGroup]:
        """Return a group for each weight of the learning rate, in the order of blocks."""
        if not self.has_weights:
            return [RateGroup("unet", modules)]
        by_weight: dict[float, dict[int, list[LoRAModule]]] = {}
        for module in modules:
            index = self.table.index_of(module.lora_name)
            by_weight.setdefault(self.weights[index], {}).setdefault(index, []).append(module)
        return [
            RateGroup(name_blocks(list(found)), [module for index in sorted(found) for module in found[index]], weight)
            for weight, found in sorted(by_weight.items(), key=lambda pair: min(pair[1]))
        ]

    def check_from_file(self) -> None:
        """Raise ValueError if ranks or alphas are given for a network that has those of a file."""
        given = (self.dims, self.alphas, self.conv_dims, self.conv_alphas)
        for key, numbers in zip(SHAPE_ARGUMENTS, given, strict=True):
            if numbers is not None:
                raise ValueError(f"network_args: {key} does not go with a network made from a file, which has its own")


def read_plan(given: Mapping[str, str | None], conv_dim: int | None, table: BlockTable = SD) -> BlockPlan | None:
    """Return the plan for the texts of arguments by block, or None if none is given.

    Raises ValueError for texts that cannot be read.
    """
    texts = {key: text for key, text in given.items() if text is not None}
    if not texts:
        return None
    if "conv_block_alphas" in texts and conv_dim is None and "conv_block_dims" not in texts:
        raise ValueError("network_args: conv_block_alphas needs conv_block_dims or conv_dim, the ranks it goes with")
    plan = BlockPlan(
        table=table,
        weights=tuple(lr_weights(texts, table)),
        has_weights=any(key in texts for key in LR_ARGUMENTS),
        dims=read_numbers("block_dims", texts, table, int),
        alphas=read_numbers("block_alphas", texts, table, float),
        conv_dims=read_numbers("conv_block_dims", texts, table, int),
        conv_alphas=read_numbers("conv_block_alphas", texts, table, float),
    )
    shapes = plan.shapes(Shape(1, 1.0), Shape(conv_dim or 0, 1.0))
    if not any(shape.linear.rank or shape.conv.rank for shape in shapes):
        raise ValueError("network_args: every block has weight or rank 0, so that the U-Net gets no module")
    return plan


def lr_weights(given: Mapping[str, str], table: BlockTable) -> list[float]:
    """Return the weight of every block; parts that are not given have 1, weights up to the threshold become 0."""
    threshold = given.get("block_lr_zero_threshold")
    if threshold is not None and all(key not in given for key in LR_ARGUMENTS):
        raise ValueError("network_args: block_lr_zero_threshold needs down_lr_weight, mid_lr_weight or up_lr_weight")
    try:
        limit = float(threshold or 0)
    except ValueError:
        raise ValueError(f"network_args: block_lr_zero_threshold must be a number, got {threshold!r}") from None
    weights = []
    for key, number in zip(LR_ARGUMENTS, table.lr_parts, strict=True):
        if key in given:
            weights += [weight if weight > limit else 0.0 for weight in read_lr_weights(key, given[key], number)]
        else:
            weights += [1.0] * number
    edge = [1.0] * table.edge
    return edge + weights + edge


def name_blocks(indices: Sequence[int]) -> str:
    """Return the name of a group of blocks with one learning rate: unet_block7, unet_block1-4,7."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return "unet_block" + ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
