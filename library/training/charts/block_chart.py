"""A picture of the U-Net's blocks: learning rate, rank and number of modules of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw

from library.sampling.contact_sheet import BACKGROUND, INK, label_font

BAR, GAP, MARGIN = 40, 6, 20  # pixels
CHART_HEIGHT, LINE = 200, 18
BAR_COLOUR, EMPTY_COLOUR = "#2b5fb3", "#d8d8d8"
ROWS = ("block", "rate", "rank", "modules")
LABEL_WIDTH = 70


def draw_blocks(blocks: Sequence[Mapping[str, Any]], rate: float) -> Image.Image:
    """Return a bar for each block, as high as its learning rate; a block without modules is gray.

    blocks are those of a network's describe_blocks: index, weight of the rate, ranks, count of modules.
    """
    width = 2 * MARGIN + LABEL_WIDTH + len(blocks) * (BAR + GAP)
    height = 2 * MARGIN + CHART_HEIGHT + len(ROWS) * LINE
    picture = Image.new("RGB", (width, height), BACKGROUND)
    pen, font = ImageDraw.Draw(picture), label_font(11)
    base = MARGIN + CHART_HEIGHT
    highest = max((block["weight"] for block in blocks if block["count"]), default=1.0) or 1.0
    for line, name in enumerate(ROWS):
        pen.text((MARGIN, base + LINE * (line + 0.5)), name, fill=INK, font=font, anchor="lm")
    for number, block in enumerate(blocks):
        left = MARGIN + LABEL_WIDTH + number * (BAR + GAP)
        has_modules = block["count"] > 0
        share = block["weight"] / highest if has_modules else 0.02
        top = base - max(2, round(share * CHART_HEIGHT))
        pen.rectangle([left, top, left + BAR, base], fill=BAR_COLOUR if has_modules else EMPTY_COLOUR)
        for line, text in enumerate(texts_of(block, rate)):
            pen.text((left + BAR / 2, base + LINE * (line + 0.5)), text, fill=INK, font=font, anchor="mm")
    return picture


def texts_of(block: Mapping[str, Any], rate: float) -> tuple[str, str, str, str]:
    """Return what stands under the bar of a block."""
    if not block["count"]:
        return str(block["index"]), "-", "-", "0"
    ranks = "/".join(str(rank) for rank in block["ranks"])
    return str(block["index"]), short(rate * block["weight"]), ranks, str(block["count"])


def short(rate: float) -> str:
    """Return a rate in as many letters as fit under a bar: 6.4e-4."""
    digits, exponent = f"{rate:.1e}".split("e")
    return f"{digits}e{int(exponent)}"
