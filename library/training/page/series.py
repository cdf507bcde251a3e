"""The numbers of a metrics file as lines of a chart: smoothed, and with few enough points for a page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

MOST_POINTS = 2000
SMOOTHED_OVER = 0.02  # of the steps: after so many a value has half of its weight

Points = dict[int, float]  # step -> value
Series = dict[str, Points]  # name in the metrics file -> points

LOSS, AVERAGE = "loss/current", "loss/average"
VALIDATION = ("loss/validation/step_average", "loss/validation/epoch_average")


def read_series(path: Path) -> Series:
    """Return the series of a metrics file; empty if there is none. What is no line of such a file is left out."""
    series: Series = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            values = json.loads(line)
            step = int(values["step"])
        except (ValueError, KeyError, TypeError):
            continue  # a line that was cut when the process was killed
        for name, value in values.items():
            if name != "step" and isinstance(value, int | float):
                # Times are of the first line of a step, which is the step's own.
                kept = series.setdefault(name, {})
                kept[step] = kept.get(step, value) if name == "time" else value
    return series


def validation_of(series: Series) -> Points:
    """Return the validation losses, of steps and of epochs."""
    return dict(sorted((step, value) for name in VALIDATION for step, value in series.get(name, {}).items()))


def smoothed(points: Points) -> Points:
    """Return an exponential average, which counts the first values in full; values that are not finite are left out."""
    keep = 0.5 ** (1 / max(1.0, SMOOTHED_OVER * len(points)))
    total = weight = 0.0
    result = {}
    for step, value in points.items():
        if math.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
            result[step] = total / weight
    return result


def chosen_steps(points: Points, most: int = MOST_POINTS) -> list[int]:
    """Return the steps of at most so many points: all, or the lowest and the highest of each stretch, and the ends."""
    steps = [step for step, value in points.items() if math.isfinite(value)]
    if len(steps) <= most:
        return list(points)
    size = math.ceil(len(steps) / ((most - 2) // 2))
    chosen = {steps[0], steps[-1]}
    for start in range(0, len(steps), size):
        stretch = steps[start : start + size]
        chosen |= {min(stretch, key=points.__getitem__), max(stretch, key=points.__getitem__)}
    return sorted(chosen)


def table(columns: Sequence[Points], steps: Sequence[int]) -> list[Sequence[float | None]]:
    """Return the steps and, for each of the columns, its values at them, None where it has none."""
    return [list(steps), *([column.get(step) for step in steps] for column in columns)]


def merged_names(lines: Mapping[str, Points]) -> dict[str, Points]:
    """Return the lines with one name, joined by commas, for all that are the same."""
    groups: dict[tuple[tuple[int, float], ...], list[str]] = {}
    for name, points in lines.items():
        groups.setdefault(tuple(points.items()), []).append(name)
    return {", ".join(names): lines[names[0]] for names in groups.values()}
