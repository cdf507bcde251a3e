"""A plot of the loss of a DyLoRA by rank."""

from __future__ import annotations

from PIL import Image, ImageDraw

from library.sampling.contact_sheet import INK, label_font
from library.training.charts.axes import ACCENT_COLOUR, FONT_SIZE, LINE_COLOUR, WIDTH, Axes, draw_line, new_plot
from library.training.measure.rank_results import RankResult, RankResults

MARGINS = {"left": 92, "right": 28, "top": 44, "bottom": 62}
BASE_COLOUR = "#7a7a7a"
MOST_LABELS = 16  # of ranks


def draw_plot(results: RankResults) -> Image.Image:
    """Return the plot; its bars are the intervals of the difference to the best rank, which decide the choice."""
    axes = _axes_for(results)
    picture, pen = new_plot()
    axes.draw_grid(pen, ".5g")
    every = -(-len(results.ranks) // MOST_LABELS)
    labelled = results.ranks[::-1][::every]
    axes.draw_title(pen, "rank")
    axes.draw_labels(pen, [(row.rank, str(row.rank)) for row in labelled])
    axes.draw_title(pen, "file, MB", 1, BASE_COLOUR)
    axes.draw_labels(pen, [(row.rank, f"{row.size / 1e6:.3g}") for row in labelled], 1, BASE_COLOUR)
    _draw_base(pen, axes, results.rows[0])
    places = [axes.place(row.rank, row.loss.mean) for row in results.ranks]
    draw_line(pen, places, LINE_COLOUR)
    for row, (x, y) in zip(results.ranks, places, strict=True):
        colour = ACCENT_COLOUR if row is results.choice else LINE_COLOUR
        ends = [axes.place(row.rank, row.loss.mean + sign * row.to_best.half)[1] for sign in (1, -1)]
        pen.line([(x, ends[0]), (x, ends[1])], fill=colour, width=2)
        for end in ends:
            pen.line([(x - 6, end), (x + 6, end)], fill=colour, width=2)
        pen.ellipse([x - 5, y - 5, x + 5, y + 5], fill=colour)
    font = label_font(FONT_SIZE)
    choice = f"red: rank {results.choice.rank}, the one to take"
    pen.text((axes.left, 17), choice, fill=ACCENT_COLOUR, font=font, anchor="lm")
    legend = "bars: 95 % interval of the difference to the best rank, same pictures and noise"
    pen.text((WIDTH - axes.right, 17), legend, fill=INK, font=font, anchor="rm")
    return picture


def _axes_for(results: RankResults) -> Axes:
    """Return axes over all ranks; the base model is included only if the ranks stay apart then."""
    low = min(row.loss.mean - row.to_best.half for row in results.ranks)
    high = max(row.loss.mean + row.to_best.half for row in results.ranks)
    base = results.rows[0].loss.mean
    if abs(base - (low + high) / 2) < 2 * (high - low):
        low, high = min(low, base), max(high, base)
    margin = (high - low) * 0.1 or abs(high) * 0.01 or 1.0
    return Axes(last=results.ranks[-1].rank, low=low - margin, high=high + margin, **MARGINS)


def _draw_base(pen: ImageDraw.ImageDraw, axes: Axes, base: RankResult) -> None:
    """Draw the loss of the base model as a line, or as a note at the edge if it is outside the axes."""
    _, y = axes.place(0, base.loss.mean)
    is_inside = axes.low < base.loss.mean < axes.high
    for x in range(axes.left, WIDTH - axes.right, 12) if is_inside else ():
        pen.line([(x, y), (x + 6, y)], fill=BASE_COLOUR, width=2)
    text = f"base model {base.loss.mean:.5g}" + ("" if is_inside else ", beyond this edge")
    inwards = 6 if base.loss.mean >= axes.high else -6
    anchor = "rt" if inwards > 0 else "rb"
    pen.text((WIDTH - axes.right, y + inwards), text, fill=BASE_COLOUR, font=label_font(FONT_SIZE), anchor=anchor)
