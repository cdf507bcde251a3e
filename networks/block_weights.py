"""Rank, alpha and learning rate by block of the U-Net: which block a module is in, and what each block gets.

The blocks of SD 1.x and 2.x are numbered 0 to 24: 12 on the way down, the middle (12), 12 on the way up. Block 0,
the first convolution, has no modules. SDXL has 23. Numbers, presets and names of arguments are those of
sd-scripts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from library.adapters.layers import block_of

ARGUMENTS = (
    "down_lr_weight",
    "mid_lr_weight",
    "up_lr_weight",
    "block_lr_zero_threshold",
    "block_dims",
    "block_alphas",
    "conv_block_dims",
    "conv_block_alphas",
)


@dataclasses.dataclass(frozen=True)
class BlockTable:
    """The blocks of a kind of U-Net.

    lr_parts are the numbers of weights that down, mid and up take; edge is the number of blocks before and after
    these, which have no weight.
    """

    name: str
    lr_parts: tuple[int, int, int]
    edge: int

    @property
    def count(self) -> int:
        """The number of blocks."""
        return sum(self.lr_parts) + 2 * self.edge

    def index_of(self, module_name: str) -> int:
        """Return the block of a module by its name in files; raises ValueError for a name that is in none."""
        down, middle, up = self.lr_parts
        starts = {"in": 0, "middle": down, "out": down + middle}
        if self.edge:
            starts |= {"first": -1, "last": down + middle + up}
        block = block_of(module_name)
        if block is None or block.side not in starts:
            raise ValueError(f"{module_name} is in no block of {self.name}")
        index = min(block.number, middle - 1) if block.side == "middle" else block.number
        return self.edge + starts[block.side] + index


SD = BlockTable("SD 1.x and 2.x", lr_parts=(12, 1, 12), edge=0)
SDXL = BlockTable("SDXL", lr_parts=(9, 3, 9), edge=1)


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
    """Return the weights that an argument means; raises ValueError that says the expected form."""
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


def read_numbers(key: str, text: str, table: BlockTable, kind: type) -> list[Any]:
    """Return one number for each block; raises ValueError that says the expected form."""
    kinds = {int: "whole numbers, none negative", float: "numbers, none negative"}
    form = f"{table.count} {kinds[kind]}, separated by commas (one for each block of {table.name})"
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"network_args: {key} must be {form}, got {text!r}") from None
    if len(values) != table.count or any(not value >= 0 for value in values):
        raise ValueError(f"network_args: {key} must be {form}, got {len(values)}: {text!r}")
    return values


# --------------------------------------------------------------------------------------------------------------
# What each block gets
# --------------------------------------------------------------------------------------------------------------


class BlockShape(NamedTuple):
    """Rank and alpha of a block's modules; those of 3x3 convolutions apart. A rank of 0 makes no module."""

    rank: int
    alpha: float
    conv_rank: int
    conv_alpha: float


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """Shape and weight of the learning rate of every block."""

    table: BlockTable
    shapes: tuple[BlockShape, ...]
    weights: tuple[float, ...]
    has_weights: bool  # whether any was given: then the learning rate goes by block

    @property
    def has_conv(self) -> bool:
        """Whether 3x3 convolutions get modules anywhere."""
        return any(shape.conv_rank for shape in self.shapes)

    def shape_of(self, module_name: str) -> BlockShape:
        """Return the shape of the block that a module is in."""
        return self.shapes[self.table.index_of(module_name)]


def plan_blocks(
    given: Mapping[str, Any],
    *,
    table: BlockTable,
    rank: int,
    alpha: float,
    conv_rank: int | None,
    conv_alpha: float,
) -> BlockPlan | None:
    """Return the plan that the block arguments ask for, or None where none is given.

    given maps the names of ARGUMENTS to texts or None; the rest are network_dim, network_alpha, conv_dim and
    conv_alpha, which serve blocks that are left open. Raises ValueError for what cannot be read.
    """
    if all(given.get(key) is None for key in ARGUMENTS):
        return None
    count = table.count

    def numbers(key: str, default: float, kind: type) -> list[Any]:
        text = given.get(key)
        return [default] * count if text is None else read_numbers(key, text, table, kind)

    if given.get("conv_block_alphas") is not None and conv_rank is None and given.get("conv_block_dims") is None:
        raise ValueError("network_args: conv_block_alphas needs conv_block_dims or conv_dim, the ranks it goes with")
    weights = lr_weights(given, table)
    shapes = zip(
        numbers("block_dims", rank, int),
        numbers("block_alphas", alpha, float),
        numbers("conv_block_dims", conv_rank or 0, int),
        numbers("conv_block_alphas", conv_alpha, float),
        strict=True,
    )
    # A block that does not learn gets no modules.
    kept = [BlockShape(*(shape if weight else (0, 0.0, 0, 0.0))) for shape, weight in zip(shapes, weights, strict=True)]
    if not any(shape.rank or shape.conv_rank for shape in kept):
        raise ValueError("network_args: every block has weight or rank 0, so that the U-Net gets no module")
    has_weights = any(given.get(key) is not None for key in ("down_lr_weight", "mid_lr_weight", "up_lr_weight"))
    return BlockPlan(table, tuple(kept), tuple(weights), has_weights)


def lr_weights(given: Mapping[str, Any], table: BlockTable) -> list[float]:
    """Return the weight of every block; parts that are left out have 1, weights up to the threshold become 0."""
    keys = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")
    threshold = given.get("block_lr_zero_threshold")
    if threshold is not None and all(given.get(key) is None for key in keys):
        raise ValueError("network_args: block_lr_zero_threshold needs down_lr_weight, mid_lr_weight or up_lr_weight")
    try:
        limit = float(threshold or 0)
    except ValueError:
        raise ValueError(f"network_args: block_lr_zero_threshold must be a number, got {threshold!r}") from None
    weights = []
    for key, number in zip(keys, table.lr_parts, strict=True):
        text = given.get(key)
        part = [1.0] * number if text is None else read_lr_weights(key, text, number)
        weights += part if text is None else [weight if weight > limit else 0.0 for weight in part]
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
