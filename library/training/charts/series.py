"""The metrics of a run as series of points, and what makes them readable: means, and fewer points."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

Points = list[tuple[int, float]]  # (step, value), by step

LOSS, EPOCH_AVERAGE = "loss/current", "loss/epoch_average"
VALIDATION = ("loss/validation/step_average", "loss/validation/epoch_average")
RATE, ADAPTED_RATE = "lr/", "lr/d*lr/"
TIME = "time/"


@dataclasses.dataclass(frozen=True)
class RunSeries:
    """What the metrics of a run say of its steps."""

    losses: Points  # of the training
    validation: Points
    left_out: list[int]  # steps without a loss, because it was not finite
    epochs: Points  # mean loss of an epoch, by its last step
    rates: dict[str, Points]  # name of a group of weights -> its learning rate
    times: dict[str, Points]  # field of `StepSeconds` -> seconds


def read_metrics(path: Path) -> RunSeries:
    """Return the series of a metrics file, which may still be written to; empty ones if there is no such file."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return series_of([row for row in map(row_in, lines) if row is not None])


def row_in(line: str) -> dict[str, float] | None:
    """Return the numbers of a line; None for one that is cut, as the last one can be, or damaged."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    if not isinstance(values, dict) or type(values.get("step")) is not int:
        return None
    return {name: value for name, value in values.items() if type(value) in (int, float)}


def series_of(rows: Sequence[dict[str, float]]) -> RunSeries:
    """Return the series of the lines of a metrics file."""
    rates: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith(RATE) and not name.startswith(ADAPTED_RATE):
                # An optimizer that adapts its rate multiplies the given one, often 1, by what it found.
                group = name.removeprefix(RATE)
                rates.setdefault(group, {})[int(row["step"])] = row.get(ADAPTED_RATE + group, value)
    timed = {name for row in rows for name in row if name.startswith(TIME)}
    losses = _points(rows, (LOSS,))
    with_loss = {step for step, _ in losses}
    steps = {int(row["step"]) for row in rows if "left_out" in row or LOSS in row}
    return RunSeries(
        losses=losses,
        validation=_points(rows, VALIDATION),
        left_out=sorted(steps - with_loss),
        epochs=_points(rows, (EPOCH_AVERAGE,)),
        rates={group: sorted(found.items()) for group, found in rates.items()},
        times={name.removeprefix(TIME): _points(rows, (name,)) for name in sorted(timed)},
    )


def _points(rows: Sequence[dict[str, float]], names: Sequence[str]) -> Points:
    """Return the finite values of any of the names, one for each step."""
    found = {int(row["step"]): row[name] for row in rows for name in names if name in row}
    return sorted((step, value) for step, value in found.items() if math.isfinite(value))


def named_together(lines: Mapping[str, Points]) -> list[tuple[list[str], Points]]:
    """Return the lines with the names of all that are the same."""
    groups: dict[tuple[tuple[int, float], ...], list[str]] = {}
    for name, points in lines.items():
        groups.setdefault(tuple(points), []).append(name)
    return [(names, list(points)) for points, names in groups.items()]


def smoothed(points: Points, window: int) -> Points:
    """Return the weighted mean of the points around each, window of them (odd), fewer at the ends.

    The weights fall off on both sides, so that one high loss makes a peak at its step, not a plateau around it.
    """
    values = np.array([value for _, value in points])
    weights = np.bartlett(window + 2)[1:-1]  # without the zeros at the ends
    sums, totals = (_neighbours(numbers, weights) for numbers in (values, np.ones(len(values))))
    return [(step, float(mean)) for (step, _), mean in zip(points, sums / totals, strict=True)]


def _neighbours(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the weighted sum of the values around each, also of fewer values than weights."""
    start = len(weights) // 2
    return np.convolve(values, weights)[start : start + len(values)]


def thinned(points: Points, most: int) -> Points:
    """Return at most `most` of the points, which look the same as a line: the extremes of equal parts."""
    if len(points) <= most:
        return points
    size = math.ceil(2 * len(points) / most)
    parts = (points[start : start + size] for start in range(0, len(points), size))
    return [point for part in parts for point in _extremes(part)]


def _extremes(part: Points) -> Points:
    """Return the lowest and the highest of some points, by step."""
    ends = (min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1]))
    return sorted(set(ends))


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value below which a share of the values lies."""
    return sorted(values)[round(share * (len(values) - 1))]
