"""A bar chart of the U-Net's blocks: learning rate, rank and number of modules of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from library.adapters.blocks import BlockTable
from library.training.charts import style
from library.training.charts.style import our_settings, rate_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAR_HEIGHT = 0.2  # inches for a block: a line of text
REST_HEIGHT = 1.1  # for title and axes
ROOM = 1.3  # the length of an axis, in longest bars: there is a number behind the bar


@dataclasses.dataclass
class BlockRow:
    """The modules of the adapter in a block of the U-Net."""

    index: int
    weight: float = 1.0  # of the learning rate
    ranks: set[int] = dataclasses.field(default_factory=set)
    count: int = 0


def count_blocks(modules: Iterable[tuple[str, int, float]], table: BlockTable) -> list[BlockRow]:
    """Return a row for each block of a table, from (name, rank, weight of the rate) of the modules; [] without any."""
    rows = [BlockRow(index) for index in range(table.count)]
    for name, rank, weight in modules:
        row = rows[table.index_of(name)]
        row.weight, row.count = weight, row.count + 1
        row.ranks.add(rank)
    return rows if any(row.count for row in rows) else []


@our_settings()
def draw_blocks(blocks: Sequence[BlockRow], table: BlockTable, rate: float) -> Figure:
    """Return a chart with three bars for each block, from the input above to the output below; none without modules."""
    figure = style.new_figure(height=REST_HEIGHT + BAR_HEIGHT * len(blocks))
    figure.suptitle(f"The adapter by block of the U-Net ({table.name})", x=0.01, ha="left", fontsize=11)
    panels = figure.subplots(1, 3, sharey=True, width_ratios=[2, 1.3, 1.3])
    rates = [rate * block.weight if block.count else 0.0 for block in blocks]
    ranks = [max(block.ranks, default=0) for block in blocks]
    _draw_bars(panels[0], rates, [rate_text(value) for value in rates], style.BLUE)
    _draw_bars(panels[1], ranks, ["/".join(map(str, sorted(block.ranks))) for block in blocks], style.ORANGE)
    _draw_bars(panels[2], [block.count for block in blocks], [str(block.count) for block in blocks], style.GREEN)
    for number, block in enumerate(blocks):
        if not block.count:
            _write_behind(panels[0], (0, number), "no modules", style.GRAY)
    panels[0].set(xlabel="learning rate", ylabel="block: number in network_args, name")
    is_mixed = any(len(block.ranks) > 1 for block in blocks)
    panels[1].set_xlabel("rank (two where 3x3 convolutions differ)" if is_mixed else "rank")
    panels[2].set_xlabel("modules")
    style.rate_axis(panels[0].xaxis)
    for axes in panels[1:]:
        style.whole_axis(axes.xaxis, 4)
        axes.tick_params(left=False)
    names = [f"{block.index:>2}  {name:<5}" for block, name in zip(blocks, table.names, strict=True)]
    panels[0].set_yticks(range(len(blocks)), names, family="DejaVu Sans Mono", fontsize=8)
    panels[0].set_ylim(len(blocks) - 0.4, -0.6)
    return figure


def _draw_bars(axes: Axes, lengths: Sequence[float], texts: Sequence[str], colour: str) -> None:
    """Draw a bar for each block, its text behind it where there is one to see."""
    axes.barh(range(len(lengths)), lengths, height=0.72, color=colour)
    for number, (length, text) in enumerate(zip(lengths, texts, strict=True)):
        if length:
            _write_behind(axes, (length, number), text, style.INK)
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, (max(lengths) or 1.0) * ROOM)


def _write_behind(axes: Axes, end: tuple[float, int], text: str, colour: str) -> None:
    """Write a text to the right of the end of a bar, at its length and number."""
    axes.annotate(text, end, (4, 0), textcoords="offset points", va="center", fontsize=8, color=colour)
