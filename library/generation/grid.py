"""Grids: all combinations of some settings, generated and laid on sheets with labelled axes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from PIL import Image

from library.config.options import nearest
from library.config.prompts import OPTIONS, SIZES
from library.errors import UserError
from library.generation.requests import CHECKS, Request
from library.sampling.contact_sheet import draw_sheet

# Axis -> the option of a prompt line that it changes. `replace` changes words of the prompt.
AXES = {
    "seed": "seeds",
    "steps": "steps",
    "scale": "scale",
    "strength": "strength",
    "am": "multipliers",
    "sampler": "sampler",
    "width": "width",
    "height": "height",
    "negative": "negative_prompt",
    **{name: name for name in SIZES},
}
REPLACE = "replace"
MOST_AXES = 3
CELL = 512


@dataclasses.dataclass(frozen=True)
class Axis:
    """An axis of a grid: its name, and for each value its text and what it changes in a request."""

    name: str
    values: tuple[tuple[str, Any], ...]

    def applied(self, request: Request, value: Any) -> Request:
        """Return a request with a value of this axis."""
        if self.name == REPLACE:
            first = self.values[0][1]
            return dataclasses.replace(request, prompt=request.prompt.replace(first, value))
        if self.name == "seed":
            return dataclasses.replace(request, seed=value[0])
        changed: dict[str, Any] = {AXES[self.name]: value}
        return dataclasses.replace(request, **changed)


def read_axes(texts: Sequence[str]) -> tuple[Axis, ...]:
    """Return the axes of --grid; raises UserError for one that cannot be read.

    Values stand with commas between; those of several networks in one value with a colon: am=1:0,0:1.
    """
    if len(texts) > MOST_AXES:
        raise UserError(f"--grid has columns, rows and sheets: at most {MOST_AXES} axes, got {len(texts)}")
    axes: list[Axis] = []
    for text in texts:
        name, sign, rest = text.partition("=")
        if not sign or not rest:
            raise UserError(f"--grid: an axis is written name=value,value, got {text!r}")
        if name != REPLACE and name not in AXES:
            known = (*AXES, REPLACE)
            raise UserError(f"--grid: {name!r} is no axis{nearest(name, known)} ({', '.join(known)})")
        if name in (axis.name for axis in axes):
            raise UserError(f"--grid: the axis {name} is named twice: give all its values in one")
        axes.append(Axis(name, tuple((word, read_value(name, word)) for word in rest.split(","))))
    return tuple(axes)


def read_value(name: str, word: str) -> Any:
    """Return a value of an axis; raises UserError for one that cannot be read."""
    if name == REPLACE:
        return word
    field, label = AXES[name], f"--grid: {name}"
    value = OPTIONS[field].read(word.replace(":", ",") if name == "am" else word, label)
    if field in CHECKS:
        CHECKS[field](value, label)
    return value


def check_words(axes: Sequence[Axis], requests: Sequence[Request]) -> None:
    """Raise UserError where no prompt has the word that is to be replaced."""
    for axis in axes:
        if axis.name == REPLACE and not any(axis.values[0][1] in request.prompt for request in requests):
            raise UserError(f"--grid: no prompt has {axis.values[0][1]!r}, the first value of replace")


def combinations(axes: Sequence[Axis], request: Request) -> Iterator[Request]:
    """Yield a request for every combination: columns change fastest, then rows, then sheets."""
    for values in itertools.product(*(axis.values for axis in reversed(axes))):
        changed = request
        for axis, (_, value) in zip(reversed(axes), values, strict=True):
            changed = axis.applied(changed, value)
        yield changed


def titles(axes: Sequence[Axis]) -> list[str]:
    """Return what tells each combination from others, such as `am=0.5 steps=20`, but for seeds, which names have."""
    named = [
        [f"{axis.name}={text}" if axis.name != "seed" else "" for text, _ in axis.values] for axis in reversed(axes)
    ]
    return [" ".join(word for word in reversed(words) if word) for words in itertools.product(*named)]


def sheets(
    axes: Sequence[Axis], requests: Sequence[Request], images: Mapping[int, Image.Image]
) -> Iterator[tuple[str, Image.Image]]:
    """Yield (label, sheet) of a grid; images are by number, in the order of `combinations` for each request.

    With one axis the requests are the rows of one sheet; with more, each request has its own sheets.
    """
    columns = [f"{axes[0].name} {text}" for text, _ in axes[0].values]
    width = len(columns)
    if len(axes) == 1:
        cells = [[images.get(row * width + at) for at in range(width)] for row in range(len(requests))]
        yield "", draw_sheet(cells, [request.prompt for request in requests], columns, cell=CELL)
        return
    rows = [f"{axes[1].name} {text}" for text, _ in axes[1].values]
    labels = [f"{axes[2].name} {text}" for text, _ in axes[2].values] if len(axes) > 2 else [""]
    start = 0
    for request in requests:
        for label in labels:
            cells = [[images.get(start + row * width + at) for at in range(width)] for row in range(len(rows))]
            start += width * len(rows)
            title = ", ".join(part for part in (request.prompt, label) if part)
            yield label, draw_sheet(cells, rows, columns, cell=CELL, title=title)
