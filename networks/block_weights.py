"""Rank, alpha and learning rate by block of the U-Net.

The blocks of SD 1.x and 2.x are numbered 0 to 24: 12 on the way down, the middle (12), 12 on the way up. Block 0,
the first convolution, has no modules. SDXL has 23: the layers before (0), 9 on the way down, 3 in the middle, 9 on the
way up, the layers after (22). Numbering, presets and names of arguments are those of sd-scripts.

Arguments are read twice: before a model is loaded, where they must fit the blocks of some model, and for the U-Net.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, TypeVar

from library.adapters.blocks import SD, SDXL, BlockTable
from networks.lora import PREFIX_UNET, UNET_CONV_CONTAINERS, Blocks, LoRAModule, RateGroup, Shape, ShapeRule, Target

LR_ARGUMENTS = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")
RANK_ARGUMENTS, ALPHA_ARGUMENTS = ("block_dims", "conv_block_dims"), ("block_alphas", "conv_block_alphas")
SHAPE_ARGUMENTS = ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")
ARGUMENTS = (*LR_ARGUMENTS, "block_lr_zero_threshold", *SHAPE_ARGUMENTS)

TABLES = (SD, SDXL)

Number = TypeVar("Number", int, float)


def count_of(key: str, table: BlockTable) -> int:
    """Return how many numbers an argument has for a kind of U-Net."""
    return table.lr_parts[LR_ARGUMENTS.index(key)] if key in LR_ARGUMENTS else table.count


def form_of(key: str, kind: str, tables: Sequence[BlockTable]) -> str:
    """Return in words which numbers an argument takes."""
    counts = ", ".join(f"{count_of(key, table)} for {table.name}" for table in tables)
    return f"{key} must be {kind}, separated by commas: {counts}"


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


def read_lr_weights(key: str, text: str, tables: Sequence[BlockTable] = TABLES) -> dict[int, list[float]]:
    """Return number of blocks -> the weights that an argument gives them; a preset has some for every table.

    Raises ValueError with the expected form.
    """
    is_mid = key == "mid_lr_weight"
    name, _, offset = text.strip().partition("+")
    if name in PRESETS and not is_mid:
        try:
            added = float(offset or 0)
        except ValueError:
            raise ValueError(
                f"network_args: {key}: the offset of {text!r} must be a number, as in {name}+.25"
            ) from None
        counts = [count_of(key, table) for table in tables]
        return {count: [PRESETS[name](index, count) + added for index in range(count)] for count in counts}
    presets = "" if is_mid else f"; or one of {', '.join(PRESETS)}, with an offset as in sine+.25"
    # Nothing between two commas is 0, as in sd-scripts.
    return split_numbers(key, text, lambda part: float(part or 0), form_of(key, "numbers", tables) + presets, tables)


def read_numbers(key: str, text: str, tables: Sequence[BlockTable], kind: type[Number]) -> dict[int, list[Number]]:
    """Return number of blocks -> one number for each; raises ValueError with the form."""

    def read(part: str) -> Number:
        number = kind(part)
        if not number >= 0:
            raise ValueError
        return number

    kinds = {int: "whole numbers, none negative", float: "numbers, none negative"}
    return split_numbers(key, text, read, form_of(key, kinds[kind], tables), tables)


def split_numbers(
    key: str, text: str, read: Callable[[str], Number], form: str, tables: Sequence[BlockTable]
) -> dict[int, list[Number]]:
    """Return how many numbers a text has -> them; raises ValueError for others, and for a number that no table has."""
    try:
        values = [read(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"network_args: {form}; got {text!r}") from None
    if len(values) not in [count_of(key, table) for table in tables]:
        raise ValueError(f"network_args: {form}; got {len(values)}: {text!r}")
    return {len(values): values}


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

    texts: Mapping[str, str]  # of the arguments, and the rank of 3x3 convolutions beside them
    conv_dim: int | None
    table: BlockTable
    dims: Sequence[int] | None
    alphas: Sequence[float] | None
    conv_dims: Sequence[int] | None
    conv_alphas: Sequence[float] | None
    weights: Sequence[float]  # of the learning rate; a block of weight 0 has no modules

    @property
    def has_weights(self) -> bool:
        """Whether weights were given: only then does the learning rate depend on the block."""
        return any(key in self.texts for key in LR_ARGUMENTS)

    def for_unet(self, *, is_sgm: bool) -> BlockPlan:
        """Return the plan of the same arguments for one kind of U-Net; raises ValueError for those of the other."""
        return plan_of(self.texts, self.conv_dim, (SDXL if is_sgm else SD,))

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


def read_plan(given: Mapping[str, str | None], conv_dim: int | None) -> BlockPlan | None:
    """Return the plan for the texts of arguments by block, for the first kind of U-Net that they fit; None for none.

    Raises ValueError for texts that cannot be read, or fit no U-Net.
    """
    texts = {key: text for key, text in given.items() if text is not None}
    return plan_of(texts, conv_dim, TABLES) if texts else None


def plan_of(texts: Mapping[str, str], conv_dim: int | None, tables: Sequence[BlockTable]) -> BlockPlan:
    """Return the plan for the first of the tables that all arguments fit; raises ValueError as above."""
    if "conv_block_alphas" in texts and conv_dim is None and "conv_block_dims" not in texts:
        raise ValueError("network_args: conv_block_alphas needs conv_block_dims or conv_dim, the ranks it goes with")
    limit = read_threshold(texts)
    weights = {key: read_lr_weights(key, texts[key], tables) for key in LR_ARGUMENTS if key in texts}
    ranks = {key: read_numbers(key, texts[key], tables, int) for key in RANK_ARGUMENTS if key in texts}
    alphas = {key: read_numbers(key, texts[key], tables, float) for key in ALPHA_ARGUMENTS if key in texts}
    table = common_table({key: list(found) for key, found in (weights | ranks | alphas).items()}, tables)
    by_block = [1.0] * table.edge
    for key, count in zip(LR_ARGUMENTS, table.lr_parts, strict=True):
        given = weights[key][count] if key in weights else None
        by_block += [1.0] * count if given is None else [weight if weight > limit else 0.0 for weight in given]
    by_block += [1.0] * table.edge
    plan = BlockPlan(
        texts=texts,
        conv_dim=conv_dim,
        table=table,
        weights=by_block,
        dims=ranks.get("block_dims", {}).get(table.count),
        alphas=alphas.get("block_alphas", {}).get(table.count),
        conv_dims=ranks.get("conv_block_dims", {}).get(table.count),
        conv_alphas=alphas.get("conv_block_alphas", {}).get(table.count),
    )
    shapes = plan.shapes(Shape(1, 1.0), Shape(conv_dim or 0, 1.0))[table.edge : table.count - table.edge]
    if not any(shape.linear.rank or shape.conv.rank for shape in shapes):
        raise ValueError("network_args: every block has weight or rank 0, so that the U-Net gets no module")
    return plan


def common_table(found: Mapping[str, Collection[int]], tables: Sequence[BlockTable]) -> BlockTable:
    """Return the first table with a number of blocks that each argument was read for; raises ValueError for none."""
    for table in tables:
        if all(count_of(key, table) in counts for key, counts in found.items()):
            return table
    fits = {key: [table.name for table in tables if count_of(key, table) in found[key]] for key in found}
    raise ValueError(
        "network_args: numbers for the blocks of one model are needed, got "
        + ", ".join(f"{key} for {names[0]}" for key, names in fits.items() if len(names) < len(tables))
    )


def read_threshold(texts: Mapping[str, str]) -> float:
    """Return up to which weight a block has none; raises ValueError for no number, and where there are no weights."""
    text = texts.get("block_lr_zero_threshold")
    if text is not None and all(key not in texts for key in LR_ARGUMENTS):
        raise ValueError("network_args: block_lr_zero_threshold needs down_lr_weight, mid_lr_weight or up_lr_weight")
    try:
        return float(text or 0)
    except ValueError:
        raise ValueError(f"network_args: block_lr_zero_threshold must be a number, got {text!r}") from None


def name_blocks(indices: Sequence[int]) -> str:
    """Return the name of a group of blocks with one learning rate: unet_block7, unet_block1-4,7."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return "unet_block" + ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
