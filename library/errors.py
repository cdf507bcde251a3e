"""The exception for mistakes of the user, and the collection of several mistakes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, ParamSpec, TypeVar

Given = ParamSpec("Given")
Result = TypeVar("Result")


MOST_NAMED = 5  # names in a message
LINE_BREAKS = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029\ud800-\udfff]")  # and what cannot be written
QUOTES = ("'", '"', "`", "\u2018", "\u2019", "\u201c", "\u201d")


class UserError(ValueError):
    """One or several mistakes of the user, each a line with what is wrong, the value received and what to do.

    Entry scripts print it without a traceback and exit with code 2.
    """

    def __init__(self, *lines: str) -> None:
        super().__init__(*lines)
        self.lines = tuple(in_one_line(line) for line in lines)

    def __str__(self) -> str:
        return "\n".join(self.lines)


def in_one_line(text: str) -> str:
    """Return a text with its control characters as escapes: a value in a message must not break its line."""
    return LINE_BREAKS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


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


def quotes_hint(path: object) -> str:
    """Return what is said of a path that is not there and begins with a quote character; else an empty text."""
    is_quoted = str(path).startswith(QUOTES)
    return "; the quotes are part of the value: Windows' cmd takes only double quotes" if is_quoted else ""


def message_of(error: Exception) -> str:
    """Return the message of an exception in one line, with its type if the message is only a key, or empty."""
    text = " ".join(str(error).split())
    return shortened(text if text and not isinstance(error, LookupError) else f"{type(error).__name__}: {text}")


# What torch and the libraries of a GPU say when memory is short: torch has a class for its own allocations, but
# kernels, cuBLAS and cuDNN allocate by themselves.
SAY_TOO_LITTLE = (
    "out of memory",  # CUDA's own error, and torch's
    "ALLOC_FAILED",  # CUBLAS_STATUS_ALLOC_FAILED, CUDNN_STATUS_ALLOC_FAILED and those of its sublibraries
    "can't allocate memory",  # torch on the CPU
    "not enough memory",  # the same on Windows
)


class LessMemory(NamedTuple):
    """What makes a script need less memory, for the message that it has too little."""

    on_gpu: str
    elsewhere: str = "close other programs"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a machine or its GPU has too little memory."""
    says_so = isinstance(error, RuntimeError) and any(text in str(error) for text in SAY_TOO_LITTLE)
    return isinstance(error, MemoryError) or says_so


class Problems:
    """Collects mistakes, so that all are reported together; equal lines only once."""

    def __init__(self) -> None:
        self._lines: dict[str, None] = {}

    def add(self, *lines: str) -> None:
        """Add mistakes, each a line."""
        self._lines.update(dict.fromkeys(lines))

    def run(self, check: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs) -> Result | None:
        """Return the result of check; if it raises UserError, add that and return None."""
        try:
            return check(*args, **kwargs)
        except UserError as error:
            self.add(*error.lines)
            return None

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._lines)

    def raise_if_any(self) -> None:
        """Raise one UserError with all collected lines, if there are any."""
        if self._lines:
            raise UserError(*self._lines)
