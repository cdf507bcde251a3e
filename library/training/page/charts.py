"""The lines of the page's charts, as the script draws them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from library.training.page.gather import Run
from library.training.page.series import LOSS, Points, chosen_steps, merged_names, smoothed, table, validation_of

Chart = dict[str, Any]
RATES = "lr/"
TIMES = {"time/step": "whole step", "time/data": "waiting for data"}
STYLES = ("main", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")  # colours of the style sheet
SHOWN = (0.01, 0.99)  # quantiles of the single steps that the range includes


def loss_chart(run: Run) -> Chart | None:
    """Return the loss of single steps, smoothed, and of the held-out pictures; None without any."""
    raw, validation = run.series.get(LOSS, {}), validation_of(run.series)
    if not raw and not validation:
        return None
    steps = sorted({*chosen_steps(raw), *validation})
    average = smoothed(raw)
    lines = [("each step", "raw", raw), ("smoothed", "main", average)]
    if validation:
        lines.append(("validation", "second", validation))
    best = min(validation.items(), key=lambda point: point[1], default=None)
    inner = quantiles(list(raw.values()), SHOWN)
    return {
        **lines_of(lines, steps),
        "range": padded([*inner, *average.values(), *validation.values()]),
        "best": best,
        "unit": "loss",
    }


def rate_chart(run: Run) -> Chart | None:
    """Return the learning rates, equal ones as one line; None without any."""
    found = {name.removeprefix(RATES): points for name, points in run.series.items() if name.startswith(RATES)}
    if not found:
        return None
    merged = merged_names({title_of_rate(name): points for name, points in found.items()})
    steps = sorted({step for points in merged.values() for step in chosen_steps(points)})
    lines = [(name, STYLES[index % len(STYLES)], points) for index, (name, points) in enumerate(merged.items())]
    return {**lines_of(lines, steps), "unit": "learning rate", "from_zero": True}


def title_of_rate(name: str) -> str:
    """Return the name of a group of weights in words."""
    part = name.removeprefix("d*lr/")
    title = {"textencoder": "text encoder", "unet": "U-Net"}.get(part, part)
    return f"{title} (adapted)" if part != name else title


def time_chart(run: Run) -> Chart | None:
    """Return the seconds of each step, and of its wait for data; None of a run that did not measure them."""
    found = {title: run.series[name] for name, title in TIMES.items() if run.series.get(name)}
    if not found:
        return None
    steps = sorted({step for points in found.values() for step in chosen_steps(points)})
    most = max(quantiles(list(points.values()), (0.98,))[0] for points in found.values())
    lines = [(name, kind, points) for (name, points), kind in zip(found.items(), ("main", "second"), strict=False)]
    return {**lines_of(lines, steps), "unit": "seconds", "range": [0.0, most * 1.15 or 1.0]}


def norm_chart(run: Run) -> Chart | None:
    """Return the norms of the change by kind at each save; None for fewer than two saves with norms."""
    saves = {save.step: save.norms_by_kind for save in run.facts.saves if save.norms_by_kind}
    if len(saves) < 2:
        return None
    kinds = sorted(saves[max(saves)], key=lambda kind: -saves[max(saves)][kind])
    lines = [
        (kind, STYLES[index % len(STYLES)], {step: norms.get(kind, 0.0) for step, norms in saves.items()})
        for index, kind in enumerate(kinds)
    ]
    return {**lines_of(lines, sorted(saves)), "unit": "norm", "from_zero": True, "points": True}


def compared_chart(losses: Mapping[str, Points]) -> Chart | None:
    """Return a line for each run by its title, always in the same colour; None where no run has points."""
    given = {title: points for title, points in losses.items() if points}
    if not given:
        return None
    steps = sorted({step for points in given.values() for step in chosen_steps(points)})
    order = list(losses)
    lines = [(title, STYLES[order.index(title) % len(STYLES)], points) for title, points in given.items()]
    values = [value for points in given.values() for value in points.values()]
    return {**lines_of(lines, steps), "unit": "loss", "range": padded(values)}


def lines_of(lines: Sequence[tuple[str, str, Points]], steps: Sequence[int]) -> Chart:
    """Return lines (title, style, points) at steps."""
    return {
        "lines": [{"title": title, "style": style} for title, style, _ in lines],
        "data": rounded(table([points for *_, points in lines], steps)),
    }


def rounded(columns: Sequence[Sequence[float | None]]) -> list[list[float | None]]:
    """Return the columns with six digits for what is no whole number."""
    return [
        [value if value is None or isinstance(value, int) else float(f"{value:.6g}") for value in column]
        for column in columns
    ]


def quantiles(values: Sequence[float], shares: Sequence[float]) -> list[float]:
    """Return the values below which some shares of them are; none of no finite values."""
    ordered = sorted(value for value in values if math.isfinite(value))
    return [ordered[round(share * (len(ordered) - 1))] for share in shares] if ordered else []


def padded(values: Sequence[float]) -> list[float]:
    """Return the lowest and the highest of the finite values, with a margin; a loss is not below 0."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    margin = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    return [max(0.0, low - margin), high + margin]


def seconds_a_step(run: Run) -> tuple[float, float] | None:
    """Return the median of the seconds of a step and the share of them that was waited for data."""
    steps, waits = (run.series.get(name, {}) for name in TIMES)
    whole = sum(steps.values())
    return (statistics.median(steps.values()), sum(waits.values()) / whole) if whole else None
