"""The one exception for a user's mistake, and how several are told at once."""

from __future__ import annotations

from types import TracebackType


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
    """Collects the UserErrors of several checks, each in a `with` block, so that they can be told together."""

    def __init__(self) -> None:
        self._messages: list[str] = []

    def __enter__(self) -> Problems:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if isinstance(error, UserError):
            self._messages.append(str(error))
            return True
        return False

    def raise_if_any(self) -> None:
        """Raise one UserError for all that were collected, each in its own line."""
        if self._messages:
            raise UserError("\n".join(self._messages))
