"""Energy (squared norm) of changes that a smaller rank keeps, by block."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from library.adapters.layers import UNET, Layer
from library.adapters.low_rank import Spectrum


@dataclasses.dataclass
class Kept:
    """Squared norms of the changes of a group of modules: all, and what was kept; and the ranks."""

    total: float = 0.0
    kept: float = 0.0
    modules: int = 0
    ranks: tuple[int, ...] = ()

    def add(self, kept: float, total: float, rank: int) -> None:
        """Take in a module."""
        self.total, self.kept, self.modules = self.total + total, self.kept + min(kept, total), self.modules + 1
        self.ranks += (rank,)

    @property
    def share(self) -> float:
        """The share of the squared norm that was kept; 1 of nothing."""
        return self.kept / self.total if self.total > 0 else 1.0

    @property
    def mean_rank(self) -> float:
        """The mean rank."""
        return sum(self.ranks) / max(1, len(self.ranks))


@dataclasses.dataclass
class KeptByBlock:
    """`Kept` of each block, and of all."""

    blocks: dict[str, Kept] = dataclasses.field(default_factory=dict)
    all: Kept = dataclasses.field(default_factory=Kept)

    def add(self, layer: Layer | None, spectrum: Spectrum, rank: int, *, scale: float = 1.0) -> None:
        """Take in a module at its layer: scale times a spectrum, of which the first rank values are kept."""
        kept, total = scale**2 * spectrum.kept(rank), scale**2 * spectrum.total
        for group in (self.blocks.setdefault(block_title(layer), Kept()), self.all):
            group.add(kept, total, rank)

    def lines(self) -> Iterator[str]:
        """Yield a table: block, modules, mean rank, share of the squared norm that was kept."""
        yield f"{'block':<16} {'modules':>7} {'mean rank':>9} {'kept':>8}"
        for title, group in [*sorted(self.blocks.items(), key=lambda entry: order_of(entry[0])), ("all", self.all)]:
            yield f"{title:<16} {group.modules:>7} {group.mean_rank:>9.1f} {group.share:>8.2%}"


def block_title(layer: Layer | None) -> str:
    """Return the block of a layer in words."""
    if layer is None:
        return "other"
    if layer.part != UNET:
        return layer.part.replace("_", " ")
    return layer.block.title if layer.block else "edges"


def order_of(title: str) -> tuple[int, str]:
    """Return the place of a block in the table: as the computation goes."""
    starts = ("text", "edges", "down", "middle", "up")
    return next((at for at, start in enumerate(starts) if title.startswith(start)), len(starts)), title
