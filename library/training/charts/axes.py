"""Axes of the plots: the place of a point, the grid, lines and their colours."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw

from library.sampling.contact_sheet import BACKGROUND, INK, label_font

WIDTH, HEIGHT = 960, 540
LINE_COLOUR, ACCENT_COLOUR, GRID_COLOUR = "#2b5fb3", "#c4462b", "#e4e4e4"
NUM_TICKS = 5
LABEL_GAP = 8  # pixels between an axis and its labels
FONT_SIZE, LINE_HEIGHT = 13, 18

Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Axes:
    """The axes of a plot of losses: margins in pixels, and the ranges between them; x starts at 0."""

    last: float  # value of x at the right edge
    low: float
    high: float
    left: int
    right: int
    top: int
    bottom: int

    def place(self, x: float, loss: float) -> Point:
        """Return the pixel of a point; a loss outside the range is put at the edge."""
        share = (min(max(loss, self.low), self.high) - self.low) / (self.high - self.low)
        width, height = WIDTH - self.left - self.right, HEIGHT - self.top - self.bottom
        return self.left + x / self.last * width, HEIGHT - self.bottom - share * height

    def draw_grid(self, pen: ImageDraw.ImageDraw, form: str) -> None:
        """Draw horizontal lines, labelled with their loss in a format."""
        font = label_font(FONT_SIZE)
        for index in range(NUM_TICKS + 1):
            loss = self.low + (self.high - self.low) * index / NUM_TICKS
            _, y = self.place(0, loss)
            pen.line([(self.left, y), (WIDTH - self.right, y)], fill=GRID_COLOUR)
            pen.text((self.left - LABEL_GAP, y), f"{loss:{form}}", fill=INK, font=font, anchor="rm")
        pen.text((self.left - LABEL_GAP, self.top - 14), "loss", fill=INK, font=font, anchor="rb")

    def draw_labels(
        self, pen: ImageDraw.ImageDraw, labels: Iterable[tuple[float, str]], line: int = 0, colour: str = INK
    ) -> None:
        """Write texts under the axis, each at its x; line is the number of the line of text, from 0."""
        for x, text in labels:
            place, _ = self.place(x, self.low)
            pen.text((place, self._below(line)), text, fill=colour, font=label_font(FONT_SIZE), anchor="mt")

    def draw_title(self, pen: ImageDraw.ImageDraw, title: str, line: int = 0, colour: str = INK) -> None:
        """Write the title of a line of text under the axis, to its left."""
        place = (self.left - LABEL_GAP, self._below(line))
        pen.text(place, title, fill=colour, font=label_font(FONT_SIZE), anchor="rt")

    def _below(self, line: int) -> int:
        return HEIGHT - self.bottom + LABEL_GAP + LINE_HEIGHT * line


def new_plot() -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """Return an empty plot and a pen to draw on it."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    return picture, ImageDraw.Draw(picture)


def draw_line(pen: ImageDraw.ImageDraw, points: Sequence[Point], colour: str, width: int = 3) -> None:
    """Draw a line through points, if there are at least two."""
    if len(points) > 1:
        pen.line(points, fill=colour, width=width, joint="curve")
