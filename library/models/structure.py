"""The structure of a U-Net from the names in an original-layout file: its blocks, their layers and transformers.

Names are without the prefix of the part. What no name tells (sizes, heads, groups, activations) is not here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

# For each resnet the number of transformers in the attention that follows it; None: no attention.
Block = tuple[int | None, ...]
STAGE = re.compile(r"(input_blocks|middle_block|output_blocks)\.(\d+)\.(.+)")
ATTENTION = re.compile(r"1\.(?:norm|proj_in|proj_out|transformer_blocks\.(\d+))\.")


class UNetStructure(NamedTuple):
    """The blocks of a U-Net, in the order of its data."""

    down: tuple[Block, ...]
    middle: Block | None  # None: there is no middle block
    up: tuple[Block, ...]

    def settings(self) -> dict[str, Any]:
        """Return the structure as settings of diffusers, with one value for all blocks where they are alike."""
        depths = tuple(depth_of(block) for block in self.down)
        if self.down and not has_attention(self.down[-1]):  # in diffusers the middle block has the last number
            depths = (*depths[:-1], depth_of(self.middle or ()))
        settings: dict[str, Any] = {
            "down_block_types": tuple(f"{attention_word(block)}DownBlock2D" for block in self.down),
            "mid_block_type": None if self.middle is None else f"UNetMidBlock2D{attention_word(self.middle)}",
            "up_block_types": tuple(f"{attention_word(block)}UpBlock2D" for block in self.up),
            "layers_per_block": joined([len(block) for block in self.down]),
            "transformer_layers_per_block": joined(depths),
        }
        pairs = zip(self.up, reversed(depths), strict=False)
        is_mirrored = all(depth_of(block) == depth for block, depth in pairs if has_attention(block))
        if not is_mirrored or any(isinstance(depth, tuple) for depth in depths):
            settings["reverse_transformer_layers_per_block"] = tuple(depth_of(block) for block in self.up)
        return settings


def unet_structure(names: Iterable[str]) -> UNetStructure:
    """Return the structure of a U-Net; raises KeyError with a name of a stage that is missing between others."""
    sides: dict[str, dict[int, list[str]]] = {}  # side -> number of the stage -> names in it
    for name in names:
        stage = STAGE.match(name)
        if stage:
            sides.setdefault(stage[1], {}).setdefault(int(stage[2]), []).append(stage[3])
    down: list[Block] = [()]
    for own in stages_of(sides, "input_blocks", first=1):
        if any(name.startswith("0.op.") for name in own):
            down.append(())
        else:
            down[-1] += (transformers_in(own),)
    up: list[Block] = [()]
    for own in stages_of(sides, "output_blocks", first=0):
        up[-1] += (transformers_in(own),)
        if any(name.startswith(("1.conv.", "2.conv.")) for name in own):
            up.append(())
    middle = sides.get("middle_block")
    if middle is None:
        return UNetStructure(tuple(down), None, tuple(up))
    return UNetStructure(tuple(down), (transformers_in(f"1.{name}" for name in middle.get(1, ())),), tuple(up))


def stages_of(sides: dict[str, dict[int, list[str]]], side: str, *, first: int) -> Iterable[list[str]]:
    """Yield the names of each stage of a side in its order; raises KeyError for a gap."""
    found = sides.get(side, {})
    for number in range(first, max(found, default=-1) + 1):
        if number not in found:
            raise KeyError(f"{side}.{number}.0.in_layers.0.weight")
        yield found[number]


def transformers_in(names: Iterable[str]) -> int | None:
    """Return the number of transformers in the attention of a stage; None if it has no attention."""
    found = [match[1] for match in map(ATTENTION.match, names) if match]
    return len(set(found) - {None}) if found else None


def has_attention(block: Block) -> bool:
    """Return whether a block has attentions."""
    return any(depth is not None for depth in block)


def attention_word(block: Block) -> str:
    """Return the word for a block with attentions in the names of diffusers."""
    return "CrossAttn" if has_attention(block) else ""


def depth_of(block: Block) -> int | tuple[int, ...]:
    """Return the number of transformers in each attention of a block: one number if it is the same in all."""
    return joined([depth or 0 for depth in block] if has_attention(block) else [1])


def joined(values: Sequence[Any]) -> Any:
    """Return the value that all values are, else the values as a tuple."""
    return values[0] if values and all(value == values[0] for value in values) else tuple(values)
