"""The loss curve of a run, plotted from its metrics file."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image, ImageDraw

from library.sampling.contact_sheet import INK, label_font, save_sheet
from library.training.charts import axes
from library.training.charts.axes import ACCENT_COLOUR, FONT_SIZE, HEIGHT, LINE_COLOUR, NUM_TICKS, WIDTH, Axes

MARGINS = {"left": 76, "right": 16, "top": 40, "bottom": 44}
STEP_COLOUR, AVERAGE_COLOUR, VALIDATION_COLOUR = "#c9d7ee", LINE_COLOUR, ACCENT_COLOUR

Points = list[tuple[int, float]]  # (step, loss)


def plot_loss_curve(metrics: Path, path: Path) -> bool:
    """Plot a metrics file as PNG; return False, without a plot, if it has fewer than two steps."""
    series = read_series(metrics) if metrics.is_file() else {"loss/average": []}
    if len(series["loss/average"]) < 2:
        return False
    save_sheet(plot_series(series), path)
    return True


def read_series(metrics: Path) -> dict[str, Points]:
    """Return name -> points of each loss: of single steps, their average, and validation."""
    names = ("loss/current", "loss/average", "loss/validation/step_average", "loss/validation/epoch_average")
    series: dict[str, Points] = {name: [] for name in names}
    for line in metrics.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        for name in names:
            if name in values:
                series[name].append((values["step"], values[name]))
    return series


def plot_series(series: dict[str, Points]) -> Image.Image:
    """Return the plot; its range is that of the averages, single steps may be outside."""
    validation = sorted(series["loss/validation/step_average"] + series["loss/validation/epoch_average"])
    shown = [loss for _, loss in series["loss/average"] + validation]
    low, high = min(shown), max(shown)
    margin = (high - low) * 0.15 or abs(high) * 0.1 or 1.0
    last = series["loss/average"][-1][0]
    plot = Axes(last=last, low=max(0.0, low - margin), high=high + margin, **MARGINS)
    picture, pen = axes.new_plot()
    plot.draw_grid(pen, ".4g")
    ticks = [last * index / NUM_TICKS for index in range(NUM_TICKS + 1)]
    plot.draw_labels(pen, [(step, f"{round(step)}") for step in ticks])
    pen.text((WIDTH - plot.right, HEIGHT - 6), "step", fill=INK, font=label_font(FONT_SIZE), anchor="rb")
    for points, colour, width in (
        (series["loss/current"], STEP_COLOUR, 1),
        (series["loss/average"], AVERAGE_COLOUR, 3),
        (validation, VALIDATION_COLOUR, 3),
    ):
        places = [plot.place(*point) for point in points]
        axes.draw_line(pen, places, colour, width)
        for x, y in places if len(places) < 3 else ():
            pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
    labels = [("each step", STEP_COLOUR), ("average over an epoch", AVERAGE_COLOUR)]
    _draw_legend(pen, [*labels, *([("validation", VALIDATION_COLOUR)] if validation else [])])
    return picture


def _draw_legend(pen: ImageDraw.ImageDraw, labels: list[tuple[str, str]]) -> None:
    font, x = label_font(FONT_SIZE), MARGINS["left"]
    for text, colour in labels:
        pen.rectangle([x, 14, x + 18, 20], fill=colour)
        pen.text((x + 24, 17), text, fill=INK, font=font, anchor="lm")
        x += 44 + int(font.getlength(text))
