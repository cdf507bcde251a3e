"""A bar chart of the U-Net's blocks: learning rate, rank and number of modules of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw

from library.adapters.blocks import BlockTable
from library.sampling.contact_sheet import BACKGROUND, INK, label_font

BAR, GAP, MARGIN = 40, 6, 20  # pixels
CHART_HEIGHT, LINE = 200, 18
BAR_COLOUR, EMPTY_COLOUR = "#2b5fb3", "#d8d8d8"
ROWS = ("block", "rate", "rank", "modules")
LABEL_WIDTH = 70


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


def plot_blocks(blocks: Sequence[BlockRow], rate: float) -> Image.Image:
    """Return a chart with a bar for each block, as high as its learning rate; gray without modules."""
    width = 2 * MARGIN + LABEL_WIDTH + len(blocks) * (BAR + GAP)
    height = 2 * MARGIN + CHART_HEIGHT + len(ROWS) * LINE
    picture = Image.new("RGB", (width, height), BACKGROUND)
    pen, font = ImageDraw.Draw(picture), label_font(11)
    base = MARGIN + CHART_HEIGHT
    highest = max((block.weight for block in blocks if block.count), default=1.0) or 1.0
    for line, name in enumerate(ROWS):
        pen.text((MARGIN, base + LINE * (line + 0.5)), name, fill=INK, font=font, anchor="lm")
    for number, block in enumerate(blocks):
        left = MARGIN + LABEL_WIDTH + number * (BAR + GAP)
        share, colour = (block.weight / highest, BAR_COLOUR) if block.count else (0.02, EMPTY_COLOUR)
        top = base - max(2, round(share * CHART_HEIGHT))
        pen.rectangle([left, top, left + BAR, base], fill=colour)
        for line, text in enumerate(texts_of(block, rate)):
            pen.text((left + BAR / 2, base + LINE * (line + 0.5)), text, fill=INK, font=font, anchor="mm")
    return picture


def texts_of(block: BlockRow, rate: float) -> tuple[str, str, str, str]:
    """Return the texts under the bar of a block, in the order of ROWS."""
    if not block.count:
        return str(block.index), "-", "-", "0"
    ranks = "/".join(str(rank) for rank in sorted(block.ranks))
    return str(block.index), short(rate * block.weight), ranks, str(block.count)


def short(rate: float) -> str:
    """Return a rate in two digits, such as 6.4e-4, which fit under a bar."""
    digits, exponent = f"{rate:.1e}".split("e")
    return f"{digits}e{int(exponent)}"
