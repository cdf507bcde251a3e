"""Energy (squared norm) of changes, and how much of it smaller ranks keep, by block."""

from __future__ import annotations

import dataclasses
import logging

from library.adapters.layers import Layer
from library.adapters.low_rank import Spectrum
from library.models.checkpoint import UNET

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Energy:
    """Squared norms of the changes of a group of modules, total and kept, and their ranks."""

    total: float = 0.0
    kept: float = 0.0
    ranks: list[int] = dataclasses.field(default_factory=list)

    @property
    def share(self) -> float:
        """The share of the squared norm that was kept; 1 if the norm is 0."""
        return self.kept / self.total if self.total > 0 else 1.0


class EnergyByBlock:
    """The energy of each block, and of all."""

    def __init__(self) -> None:
        self.blocks: dict[str, Energy] = {}
        self.all = Energy()

    def add(self, layer: Layer | None, spectrum: Spectrum, rank: int, *, scale: float = 1.0) -> None:
        """Add the module of a layer: scale times a spectrum, of which the first rank values are kept."""
        kept, total = scale**2 * spectrum.kept(rank), scale**2 * spectrum.total
        for energy in (self.blocks.setdefault(block_title(layer), Energy()), self.all):
            energy.total += total
            energy.kept += min(kept, total)
            energy.ranks.append(rank)

    def log(self) -> None:
        """Log a table: block, modules, mean rank, share of the squared norm that was kept."""
        logger.info("%-16s %7s %9s %8s", "block", "modules", "mean rank", "kept")
        blocks = sorted(self.blocks.items(), key=lambda row: order_of(row[0]))
        for title, energy in [*blocks, ("all", self.all)]:
            count = len(energy.ranks)
            mean = sum(energy.ranks) / max(1, count)
            logger.info("%s", f"{title:<16} {count:>7} {mean:>9.1f} {energy.share:>8.2%}")


def block_title(layer: Layer | None) -> str:
    """Return the name of the block of a layer."""
    if layer is None:
        return "other"
    if layer.part != UNET:
        return layer.part.replace("_", " ")
    return layer.block.title if layer.block else "edges"


def order_of(title: str) -> tuple[int, str]:
    """Return the sort key of a block in the table: in the order of computation."""
    starts = ("text", "edges", "down", "middle", "up")
    return next((at for at, start in enumerate(starts) if title.startswith(start)), len(starts)), title
