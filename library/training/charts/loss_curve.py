"""The course of the loss as a picture, drawn from the metrics that a run has written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from library.sampling.contact_sheet import BACKGROUND, INK, label_font, save_sheet

WIDTH, HEIGHT = 960, 540
LEFT, RIGHT, TOP, BOTTOM = 76, 16, 40, 44
STEP_COLOUR, AVERAGE_COLOUR, VALIDATION_COLOUR, GRID_COLOUR = "#c9d7ee", "#2b5fb3", "#c4462b", "#e4e4e4"
NUM_TICKS = 5

Points = list[tuple[int, float]]  # (step, loss)


def draw_loss_curve(metrics: Path, path: Path) -> bool:
    """Write the curves of a metrics file as PNG and return whether there was something to draw."""
    if not metrics.is_file():  # a run whose steps were all made elsewhere
        return False
    series = read_series(metrics)
    if len(series["loss/average"]) < 2:
        return False
    save_sheet(draw_curves(series), path)
    return True


def read_series(metrics: Path) -> dict[str, Points]:
    """Return the points of each loss: of single steps, of their average, of validation."""
    names = ("loss/current", "loss/average", "loss/validation/step_average", "loss/validation/epoch_average")
    series: dict[str, Points] = {name: [] for name in names}
    for line in metrics.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        for name in names:
            if name in values:
                series[name].append((values["step"], values[name]))
    return series


def draw_curves(series: dict[str, Points]) -> Image.Image:
    """Return the picture; the scale is that of the averages, single steps may leave it."""
    validation = sorted(series["loss/validation/step_average"] + series["loss/validation/epoch_average"])
    shown = [loss for _, loss in series["loss/average"] + validation]
    low, high = min(shown), max(shown)
    margin = (high - low) * 0.15 or abs(high) * 0.1 or 1.0
    axes = _Axes(last=series["loss/average"][-1][0], low=max(0.0, low - margin), high=high + margin)
    picture = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    pen = ImageDraw.Draw(picture)
    _draw_grid(pen, axes)
    for points, colour, width in (
        (series["loss/current"], STEP_COLOUR, 1),
        (series["loss/average"], AVERAGE_COLOUR, 3),
        (validation, VALIDATION_COLOUR, 3),
    ):
        _draw_line(pen, [axes.place(*point) for point in points], colour, width)
    _draw_legend(pen, with_validation=bool(validation))
    return picture


class _Axes:
    def __init__(self, *, last: int, low: float, high: float) -> None:
        self.last, self.low, self.high = last, low, high

    def place(self, step: float, loss: float) -> tuple[float, float]:
        share = (min(max(loss, self.low), self.high) - self.low) / (self.high - self.low)
        x = LEFT + step / self.last * (WIDTH - LEFT - RIGHT)
        return x, HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _draw_grid(pen: ImageDraw.ImageDraw, axes: _Axes) -> None:
    font = label_font(13)
    for index in range(NUM_TICKS + 1):
        loss = axes.low + (axes.high - axes.low) * index / NUM_TICKS
        x, y = axes.place(axes.last * index / NUM_TICKS, loss)
        pen.line([(LEFT, y), (WIDTH - RIGHT, y)], fill=GRID_COLOUR)
        pen.text((LEFT - 8, y), f"{loss:.4g}", fill=INK, font=font, anchor="rm")
        step = f"{round(axes.last * index / NUM_TICKS)}"
        pen.text((x, HEIGHT - BOTTOM + 8), step, fill=INK, font=font, anchor="mt")
    pen.text((LEFT - 8, TOP - 14), "loss", fill=INK, font=font, anchor="rb")
    pen.text((WIDTH - RIGHT, HEIGHT - 6), "step", fill=INK, font=font, anchor="rb")


def _draw_line(pen: ImageDraw.ImageDraw, points: Sequence[tuple[float, float]], colour: str, width: int) -> None:
    if len(points) > 1:
        pen.line(points, fill=colour, width=width, joint="curve")
    for x, y in points if len(points) < 3 else ():
        pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)


def _draw_legend(pen: ImageDraw.ImageDraw, *, with_validation: bool) -> None:
    entries = [("each step", STEP_COLOUR), ("average over an epoch", AVERAGE_COLOUR)]
    entries += [("validation", VALIDATION_COLOUR)] if with_validation else []
    font, x = label_font(13), LEFT
    for text, colour in entries:
        pen.rectangle([x, 14, x + 18, 20], fill=colour)
        pen.text((x + 24, 17), text, fill=INK, font=font, anchor="lm")
        x += 44 + int(font.getlength(text))
