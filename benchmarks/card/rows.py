"""What a part of the report finds: rows with a verdict, and how two results are compared."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ParamSpec, TypeAlias

logger = logging.getLogger("benchmarks")

EQUAL, WITHIN, DIFFERS, FAILED = "equal", "within bound", "differs", "failed"
NOT_RUN, MEASURED = "not run", "measured"
BAD = (DIFFERS, FAILED)  # verdicts that make the exit code 1

Value: TypeAlias = float | int | str | None
P = ParamSpec("P")


class NotHere(Exception):
    """A check that this machine or this checkout cannot do; the message says why."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of a table: what was done, its verdict, values by column (with the unit in the column's name), a note."""

    name: str
    verdict: str
    values: Mapping[str, Value] = dataclasses.field(default_factory=dict)
    note: str = ""  # the bound, or the reason


class RowFile:
    """The rows of a part, one line of JSON each, written as soon as they are known."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, row: Row) -> None:
        """Append a row."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(row)) + "\n")

    def read(self) -> list[Row]:
        """Return the rows; a last line that a killed process left incomplete is none."""
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        complete, _, _ = text.rpartition("\n")
        return [Row(**json.loads(line)) for line in complete.splitlines()]


def attempt(name: str, measure: Callable[P, Row], *args: P.args, **kwargs: P.kwargs) -> Row:
    """Return the row that a function measures, or one that tells why there is none."""
    try:
        return measure(*args, **kwargs)
    except NotHere as reason:
        return Row(name, NOT_RUN, note=str(reason))
    except Exception as error:  # whatever a driver or a library may raise: the next check goes on
        logger.exception("%s", name)
        return Row(name, FAILED, note=told(error))


def told(error: BaseException) -> str:
    """Return the kind and the first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the card has too little memory, in the words of any version of torch."""
    return "OutOfMemory" in type(error).__name__ or "out of memory" in str(error).lower()


def greatest_difference(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the greatest relative difference of two traces; infinite if their lengths differ or one is not finite."""
    if len(one) != len(other) or not one or not all(map(math.isfinite, [*one, *other])):
        return math.inf
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(one, other, strict=True))


def compared(name: str, difference: float, bound: float, values: Mapping[str, Value] | None = None) -> Row:
    """Return the row of a comparison: a difference of 0 is equal, one up to the bound is within it."""
    verdict = EQUAL if difference == 0 else WITHIN if difference <= bound else DIFFERS
    shown: dict[str, Value] = {"greatest difference": difference if math.isfinite(difference) else None}
    note = f"bound {bound:.2g}" if math.isfinite(difference) else "not comparable: lengths differ, or not finite"
    return Row(name, verdict, {**(values or {}), **shown}, note)
