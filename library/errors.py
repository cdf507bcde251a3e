"""The one exception for a user's mistake, and how several are reported together."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

Given = ParamSpec("Given")
Result = TypeVar("Result")


class UserError(ValueError):
    """What a user can mend: one line for each thing that is wrong, with the value received and what to do.

    Entry scripts print it without a traceback and end with exit code 2.
    """


def shortened(text: str, most: int = 300) -> str:
    """Return the beginning of a text."""
    return text if len(text) <= most else f"{text[:most]} ..."


def shown(value: object) -> str:
    """Return a value that was received, as a message shows it."""
    return shortened(repr(value), 120)


def told(error: Exception) -> str:
    """Return in one line what an exception of others says; some say no more than a key, or nothing."""
    text = " ".join(str(error).split())
    return shortened(text if text and not isinstance(error, LookupError) else f"{type(error).__name__}: {text}")


class Problems:
    """Collects mistakes, so that a user reads about all of them at once; the same line is kept once."""

    def __init__(self) -> None:
        self._lines: dict[str, None] = {}

    def add(self, text: str) -> None:
        """Add the line of a mistake, or several lines."""
        self._lines.update(dict.fromkeys(text.split("\n")))

    def run(self, check: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs) -> Result | None:
        """Return what check returns; a UserError that it raises is added, and the result is None."""
        try:
            return check(*args, **kwargs)
        except UserError as error:
            self.add(str(error))
            return None

    def raise_if_any(self) -> None:
        """Raise one UserError for all that were collected, each in its own line."""
        if self._lines:
            raise UserError("\n".join(self._lines))
