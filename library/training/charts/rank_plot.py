"""The loss of a DyLoRA by rank, with the rank to take and the sizes of the files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.training.charts import style
from library.training.charts.style import our_settings
from library.training.measure.rank_results import RankResults

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LABELS = 16  # of ranks
MEGABYTE = 1e6


@our_settings()
def draw_ranks(results: RankResults) -> Figure:
    """Return the chart; its bars are the intervals of the difference to the best rank, which decide the choice."""
    figure = style.new_figure()
    axes = figure.subplots()
    ranks = [row.rank for row in results.ranks]
    losses, halves = [row.loss.mean for row in results.ranks], [row.to_best.half for row in results.ranks]
    label = f"loss of {results.num_pictures} pictures; bars: 95 % interval of the difference to the best rank"
    size = 5 if len(ranks) <= 2 * MOST_LABELS else 2.5  # many would hide each other
    axes.errorbar(ranks, losses, halves, fmt="none", ecolor=style.BLUE, elinewidth=1.3, capsize=size - 1)
    axes.plot(ranks, losses, "-o", color=style.BLUE, linewidth=1.8, ms=size, label=label)
    best, choice = results.best, results.choice
    if best is not choice:
        label = f"lowest loss: rank {best.rank}"
        axes.plot([best.rank], [best.loss.mean], "s", color=style.GREEN, ms=9, zorder=4, label=label)
    label = f"rank {choice.rank}, the one to take: " + (
        "it has the lowest loss" if best is choice else "the smallest whose interval reaches the best"
    )
    axes.plot([choice.rank], [choice.loss.mean], "D", color=style.VERMILION, ms=10, zorder=5, label=label)
    _draw_base(axes, results)
    axes.set_title("\n".join(["Loss by rank", *([f"Caution: {results.caution}"] if results.caution else [])]))
    axes.set(xlabel="rank", ylabel="loss", xlim=(0, ranks[-1] * 1.04))
    style.scale_losses(axes, is_log=False)
    _label_ranks(axes, results)
    style.legend_below(figure, columns=1)
    return figure


def _draw_base(axes: Axes, results: RankResults) -> None:
    """Draw the loss of the base model as a line if the ranks stay apart with it, else name it in the legend."""
    low = min(row.loss.mean - row.to_best.half for row in results.ranks)
    high = max(row.loss.mean + row.to_best.half for row in results.ranks)
    base = results.rows[0].loss.mean
    is_near = abs(base - (low + high) / 2) <= 2 * (high - low)
    margin = max((high - low) * 0.08, abs(high) * 1e-4) or 1e-4
    axes.set_ylim(low - margin, high + margin)
    if is_near:
        axes.axhline(base, color=style.GRAY, linestyle="--", linewidth=1.4, label=f"base model: {base:.5g}")
        axes.set_ylim(min(low, base) - margin, max(high, base) + margin)
    else:
        side = "above" if base > high else "below"
        axes.plot([], [], "--", color=style.GRAY, label=f"base model: {base:.5g}, {side} what is shown")


def _label_ranks(axes: Axes, results: RankResults) -> None:
    """Name the ranks under the axes and the sizes of their files above, for as many as there is room."""
    every = -(-len(results.ranks) // MOST_LABELS)
    shown = results.ranks[::-1][::every][::-1]
    places = [row.rank for row in shown]
    axes.set_xticks(places)
    sizes = axes.secondary_xaxis("top")
    sizes.set_xticks(places, [f"{row.size / MEGABYTE:.3g}" for row in shown])
    sizes.set_xlabel("size of the file, MB")
