"""The exception for mistakes of the user, and the collection of several mistakes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

Given = ParamSpec("Given")
Result = TypeVar("Result")


MOST_NAMED = 5  # names in a message


class UserError(ValueError):
    """A mistake of the user: one line for each, with what is wrong, the value received and what to do.

    Entry scripts print it without a traceback and exit with code 2.
    """


def shortened(text: str, most: int = 300) -> str:
    """Return a text cut to a number of characters."""
    return text if len(text) <= most else f"{text[:most]} ..."


def shown(value: object) -> str:
    """Return a received value as it is shown in messages."""
    return shortened(repr(value), 120)


def named(names: Sequence[str], separator: str = ", ") -> str:
    """Return the first few names, and the number of the others."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return separator.join(names[:MOST_NAMED]) + more


def message_of(error: Exception) -> str:
    """Return the message of an exception in one line, with its type if the message is only a key, or empty."""
    text = " ".join(str(error).split())
    return shortened(text if text and not isinstance(error, LookupError) else f"{type(error).__name__}: {text}")


class Problems:
    """Collects mistakes, so that all are reported together; equal lines only once."""

    def __init__(self) -> None:
        self._lines: dict[str, None] = {}

    def add(self, text: str) -> None:
        """Add one or several lines."""
        self._lines.update(dict.fromkeys(text.split("\n")))

    def run(self, check: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs) -> Result | None:
        """Return the result of check; if it raises UserError, add that and return None."""
        try:
            return check(*args, **kwargs)
        except UserError as error:
            self.add(str(error))
            return None

    def raise_if_any(self) -> None:
        """Raise one UserError with all collected lines, if there are any."""
        if self._lines:
            raise UserError("\n".join(self._lines))
