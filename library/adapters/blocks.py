"""The blocks of a U-Net, as the arguments by block number them."""

from __future__ import annotations

import dataclasses

from library.adapters.layers import block_of
from library.models import family as families
from library.models.family import ModelFamily


@dataclasses.dataclass(frozen=True)
class BlockTable:
    """The blocks of a kind of U-Net.

    lr_parts are the numbers of weights of down, mid and up; edge is the number of blocks before and after these, which
    have no weight.
    """

    name: str
    lr_parts: tuple[int, int, int]
    edge: int

    @property
    def count(self) -> int:
        """The number of blocks."""
        return sum(self.lr_parts) + 2 * self.edge

    @property
    def names(self) -> list[str]:
        """The name of each block in web UIs, in order: IN00, IN01, ..., MID, OUT00, ...; first and last have none."""
        down, middle, up = self.lr_parts
        middles = ["MID"] if middle == 1 else [f"MID{number}" for number in range(middle)]
        named = [
            *(f"IN{number:02d}" for number in range(down)),
            *middles,
            *(f"OUT{number:02d}" for number in range(up)),
        ]
        return ["first", *named, "last"] if self.edge else named

    def index_of(self, module_name: str) -> int:
        """Return the number of a module's block by the name in files; raises ValueError for a name of no block."""
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
BY_FAMILY = {families.SD1: SD, families.SD2: SD, families.SDXL: SDXL}


def table_of(family: ModelFamily) -> BlockTable:
    """Return the blocks of the U-Net of a family."""
    return BY_FAMILY[family]
