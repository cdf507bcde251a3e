"""The course of a run: its losses by step, and its learning rates below them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from library.training.charts import style
from library.training.charts.series import Points, RunSeries, named_together, quantile, read_metrics, smoothed, thinned
from library.training.charts.style import our_settings
from library.words import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_POINTS = 3000  # of a line; the axes are about 1,700 pixels wide
FEW_STEPS = 20  # up to here single steps can be seen: they get markers, and no smoothed line
LOG_FROM = 20  # ratio of the highest to the lowest value from which the axis is logarithmic
TAILS = 0.02  # share of the steps that may be outside the axis on each side
MOST_RATES = len(style.LINES)  # that are told apart


def plot_loss_curve(metrics: Path, path: Path) -> bool:
    """Draw a metrics file as PNG; return False, without a chart, if it has fewer than two steps with a loss."""
    series = read_metrics(metrics)
    if len(series.losses) < 2:
        return False
    style.save_figure(draw_course(series), path)
    return True


@our_settings()
def draw_course(series: RunSeries) -> Figure:
    """Return the chart of a run, of at least one step with a loss."""
    figure = style.new_figure()
    if series.rates:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3.4, 1])
        _draw_rates(below, series.rates)
        lowest = below
    else:
        lowest = above = figure.subplots()
    _draw_losses(above, series)
    lowest.set_xlabel("step")
    style.whole_axis(lowest.xaxis, 10)
    style.legend_below(figure, columns=2)
    return figure


def _draw_losses(axes: Axes, series: RunSeries) -> None:
    """Draw the losses of the training, faint and smoothed, those of the validation, and where a loss is missing."""
    losses, validation = series.losses, series.validation
    window = window_of(len(losses))
    means = smoothed(losses, window)
    lines = [value for _, value in means + validation]
    low, high = limits([value for _, value in losses], lines)
    is_log = is_wide(lines)
    if is_log:
        low = max(low, min(lines) / LOG_FROM)  # a single step may have a loss of 0, which no logarithmic axis has
    beyond = sum(not low <= value <= high for _, value in losses)
    label = f"training, each step ({beyond:,} beyond the axis)" if beyond else "training, each step"
    marker = "." if len(losses) <= FEW_STEPS else None
    is_smoothed = window > 1
    colour, width = (style.FAINT_BLUE, 0.7) if is_smoothed else (style.BLUE, 1.8)
    axes.plot(*_columns(losses), color=colour, linewidth=width, marker=marker, label=label)
    if is_smoothed:
        axes.plot(*_columns(means), color=style.BLUE, linewidth=2, label=f"training, smoothed over {window:,} steps")
    if validation:
        axes.plot(*_columns(validation), color=style.VERMILION, linewidth=1.8, marker="o", ms=4, label="validation")
        step, loss = min(validation, key=lambda point: (point[1], point[0]))
        label = f"lowest validation: {loss:.4g} at step {step:,}"
        axes.plot([step], [loss], "*", color=style.VERMILION, mec="white", ms=16, zorder=5, label=label, clip_on=False)
    if series.left_out:
        label = f"{counted(len(series.left_out), 'step')} left out: the loss was not finite"
        edge = axes.get_xaxis_transform()  # x by step, y by the height of the axes
        places = thinned([(step, 0.0) for step in series.left_out], MOST_POINTS)
        axes.plot(
            [step for step, _ in places], [0.015] * len(places), "x", color=style.INK, ms=5, transform=edge, label=label
        )
    axes.set_title("Loss of training and validation" if validation else "Loss of training")
    axes.set_ylabel("loss")
    style.scale_losses(axes, is_log=is_log)
    axes.set_ylim(low, high)


def _draw_rates(axes: Axes, rates: dict[str, Points]) -> None:
    """Draw the learning rates; groups with equal ones are one line, and many lines have one label."""
    groups = named_together(rates)
    are_many = len(groups) > MOST_RATES
    for index, (names, course) in enumerate(groups):
        label = f"learning rate: {', '.join(names)}" if len(groups) > 1 else "learning rate"
        if are_many:
            label = "" if index else f"learning rates of {len(groups)} groups"
        colour = style.LINES[0 if are_many else index]
        axes.plot(*_columns(course), "--", color=colour, linewidth=1.2, label=label)
    peaks = [max(rate for _, rate in course) for _, course in groups]
    positive = [peak for peak in peaks if peak > 0]
    is_log = is_wide(positive)
    low = min(positive) / 20 if is_log else 0.0
    axes.set_title("Learning rate")
    style.scale_rates(axes, is_log=is_log)
    axes.set_ylim(low, max(peaks) * (2 if is_log else 1.08) or 1.0)


def window_of(number: int) -> int:
    """Return over how many of a number of steps the line is smoothed, odd: a twentieth, of short runs more."""
    return 1 if number <= FEW_STEPS else max(number // 20, min(number // 4, 15)) // 2 * 2 + 1


def limits(steps: Sequence[float], lines: Sequence[float]) -> tuple[float, float]:
    """Return the range of an axis from the losses of single steps and the values of the other lines.

    The lines are all within it, and the middle half of the steps. Most steps are too, unless their noise is so large
    that it would flatten the lines, which take at least a third of the height then.
    """
    low, high = min(lines), max(lines)
    room = (high - low) or math.inf
    bottom = min(max(min(low, quantile(steps, TAILS)), low - room), quantile(steps, 0.25))
    top = max(min(max(high, quantile(steps, 1 - TAILS)), high + room), quantile(steps, 0.75))
    reach = (top - bottom) / 5  # what is a little beyond is worth showing
    bottom = min(value for value in (bottom, *steps) if value >= bottom - reach)
    top = max(value for value in (top, *steps) if value <= top + reach)
    is_flat = top - bottom <= abs(top) * 1e-6  # what is left is rounding
    margin = (abs(top) * 0.1 or 0.1) if is_flat else (top - bottom) * 0.05
    return (max(bottom - margin, bottom / 1.2) if bottom > 0 else bottom - margin), top + margin


def is_wide(values: Sequence[float]) -> bool:
    """Return whether positive values are over more than a decade, so that they need a logarithmic axis."""
    return bool(values) and min(values) > 0 and max(values) / min(values) >= LOG_FROM


def _columns(points: Points) -> tuple[list[int], list[float]]:
    """Return steps and values of as many points as can be seen."""
    shown = thinned(points, MOST_POINTS)
    return [step for step, _ in shown], [value for _, value in shown]
