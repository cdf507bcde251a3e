"""The lines of the page's charts, as the script draws them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from library.sampling.contact_sheet import spread
from library.training.charts.loss_curve import limits
from library.training.charts.series import Points, named_together, quantile, thinned
from library.training.page.gather import Run

Chart = dict[str, Any]
Line = tuple[str, str, Points]  # title, style, points

TIMES = {"step": "whole step", "data": "waiting for data"}
STYLES = ("main", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")  # colours of the style sheet
MOST_POINTS, MOST_GAPS = 2000, 200
SHOWN_TIMES = 0.98  # share of the steps whose seconds are within the chart


def loss_chart(run: Run) -> Chart | None:
    """Return the loss of single steps, smoothed, and of the held-out pictures; None without any."""
    raw, average, validation = run.series.losses, run.average, run.series.validation
    if not raw and not validation:
        return None
    lines: list[Line] = [("each step", "raw", raw), ("smoothed", "main", average)]
    if validation:
        lines.append(("validation", "second", validation))
    shown = values_of([average, validation])
    return {
        **lines_of(lines, further=spread(run.series.left_out, MOST_GAPS)),
        "range": limits(values_of([raw]) or shown, shown),
        "best": run.best_validation,
        "unit": "loss",
    }


def rate_chart(run: Run) -> Chart | None:
    """Return the learning rates, equal ones as one line; None without any."""
    groups = named_together({TITLES.get(name, name): points for name, points in run.series.rates.items()})
    if not groups:
        return None
    lines = [(", ".join(names), style_of(index), points) for index, (names, points) in enumerate(groups)]
    return {**lines_of(lines), "unit": "learning rate", "from_zero": True}


TITLES = {"textencoder": "text encoder", "unet": "U-Net"}  # of groups of weights


def time_chart(run: Run) -> Chart | None:
    """Return the seconds of each step, and of its wait for data; None of a run that did not measure them."""
    found = [(title, run.series.times[name]) for name, title in TIMES.items() if run.series.times.get(name)]
    if not found:
        return None
    most = max(quantile(values_of([points]), SHOWN_TIMES) for _, points in found)
    lines = [(title, style_of(index), points) for index, (title, points) in enumerate(found)]
    return {**lines_of(lines), "unit": "seconds", "range": [0.0, most * 1.15 or 1.0]}


def norm_chart(run: Run) -> Chart | None:
    """Return the norms of the change by kind at each save; None for fewer than two saves with norms."""
    saves = {save.step: save.norms_by_kind for save in run.facts.saves if save.norms_by_kind}
    if len(saves) < 2:
        return None
    kinds = sorted(saves[max(saves)], key=lambda kind: -saves[max(saves)][kind])
    lines = [
        (kind, style_of(index), [(step, norms.get(kind, 0.0)) for step, norms in sorted(saves.items())])
        for index, kind in enumerate(kinds)
    ]
    return {**lines_of(lines), "unit": "norm", "from_zero": True, "points": True}


def compared_chart(losses: Mapping[str, Points]) -> Chart | None:
    """Return a line for each run by its title, always in the same colour; None where no run has points."""
    lines = [(title, style_of(index), points) for index, (title, points) in enumerate(losses.items()) if points]
    if not lines:
        return None
    values = values_of([points for *_, points in lines])
    return {**lines_of(lines), "unit": "loss", "range": limits(values, values)}


def style_of(index: int) -> str:
    """Return the colour of a line by its number."""
    return STYLES[index % len(STYLES)]


def values_of(lines: Sequence[Points]) -> list[float]:
    """Return the values of all points."""
    return [value for points in lines for _, value in points]


def lines_of(lines: Sequence[Line], further: Sequence[int] = ()) -> Chart:
    """Return lines at the same steps, few enough for a page; further are steps at which lines without a value break."""
    steps = sorted({step for *_, points in lines for step, _ in thinned(points, MOST_POINTS)} | {*further})
    columns = [dict(points) for *_, points in lines]
    return {
        "lines": [{"title": title, "style": style} for title, style, _ in lines],
        "data": [steps, *(rounded([column.get(step) for step in steps]) for column in columns)],
    }


def rounded(values: Sequence[float | None]) -> list[float | None]:
    """Return the values with six digits."""
    return [None if value is None else float(f"{value:.6g}") for value in values]


def seconds_a_step(run: Run) -> tuple[float, float] | None:
    """Return the median of the seconds of a step and the share of them that was waited for data."""
    steps, waits = (values_of([run.series.times.get(name, [])]) for name in TIMES)
    whole = sum(steps)
    return (statistics.median(steps), sum(waits) / whole) if whole else None
