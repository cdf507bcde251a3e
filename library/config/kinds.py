"""How values of each Python type are read from a command line and from TOML or JSON."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from library.config.toml_text import windows_path_hint
from library.errors import in_one_line


def is_there(path: Path, what: str) -> bool:
    """Return whether a path is "a file", "a folder" or "a file or a folder"."""
    try:
        return (path.is_file() and "file" in what) or (path.is_dir() and "folder" in what)
    except OSError:  # a name that is too long
        return False


def why_not(path: Path, what: str) -> str:
    """Return what is said of a path that is not "a file", "a folder" or "a file or a folder": absent, or another."""
    return f"{path} is not {what}" if is_there(path, "a file or a folder") else f"{path} does not exist"


@dataclasses.dataclass(frozen=True)
class Kind:
    """How values of one Python type are read from the command line and from TOML."""

    name: str  # for tables: "int", "flag", "list of str"
    form: str  # for messages: "a whole number"
    nargs: str | int | None  # of argparse; 0 for a switch
    read: Callable[[Any], Any]
    says_why: bool = False  # whether the texts of its ValueErrors are for users
    choices: tuple[Any, ...] = ()  # all values, where they can be listed


def read_bool(value: Any) -> bool:
    if value not in (0, 1):  # numbers, as GUIs write them, or false and true
        raise ValueError
    return bool(value)


def read_int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError
    return int(value)


def read_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    return float(value)


def read_str(value: Any) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ValueError
    value.encode("utf-8")  # a lone surrogate, which JSON can contain, could not be written to the record of the run
    return value


def read_choice(value: Any, *, choices: tuple[Any, ...]) -> Any:
    for choice in choices:
        if type(value) is type(choice) and value == choice:
            return choice
        if isinstance(value, str) and value == str(choice):
            return choice
    raise ValueError


def read_path(value: Any) -> Path | None:
    """Return a path; None for "", which GUIs write for unset.

    Raises ValueError for a path with control characters that is not there: in TOML and JSON, double quotes turn
    `C:\\new` into a line break and `ew`.
    """
    if value == "":
        return None
    path = Path(read_str(value))
    if in_one_line(value) != value and not is_there(path, "a file or a folder"):
        meant = "".join(ESCAPES.get(character, character) for character in value)
        raise ValueError(f"a backslash in double quotes begins an escape: write {windows_path_hint(meant)}")
    return path


# What double quotes in TOML and JSON make of a backslash and a letter.
ESCAPES = {"\b": r"\b", "\t": r"\t", "\n": r"\n", "\f": r"\f", "\r": r"\r", "\x1b": r"\e"}


def read_path_text(value: Any) -> str:
    """Return the text of a path that may be something else, such as a name on a hub; raises as `read_path` does."""
    read_path(value)
    return read_str(value)


def read_many(value: Any, *, item: Kind) -> tuple[Any, ...]:
    """Return a tuple from a list or one value; a comma after a value, or between numbers, separates."""
    values = value if isinstance(value, list | tuple) else [value]
    read = (item.read(part) for entry in values for part in _parts(entry, item))
    return tuple(entry for entry in read if entry is not None)


def _parts(value: Any, item: Kind) -> list[Any]:
    if not isinstance(value, str):
        return [value]
    if item in (SIMPLE_KINDS[int], SIMPLE_KINDS[float]):
        return [part for part in value.split(",") if part.strip()] or [value]
    return [value.rstrip().removesuffix(",") or value]


SIMPLE_KINDS = {
    bool: Kind("flag", "true or false", 0, read_bool),
    int: Kind("int", "a whole number", None, read_int),
    float: Kind("float", "a number", None, read_float),
    str: Kind("str", "a text", None, read_str),
    Path: Kind("path", "a path", None, read_path, says_why=True),
    dict: Kind("table", "a table", None, lambda value: _expect(value, dict)),
}


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError
    return value


def kind_of(annotation: Any) -> Kind:
    """Return the kind for a type annotation: a simple one, Literal, tuple[T, ...], dict[str, str], or X | None."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return kind_of(next(argument for argument in arguments if argument is not type(None)))
    if origin is Literal:
        words = ", ".join(str(choice) for choice in arguments)
        name = type(arguments[0]).__name__
        read = functools.partial(read_choice, choices=arguments)
        return Kind(name, f"one of {words}", None, read, choices=arguments)
    if origin is tuple:
        item = kind_of(arguments[0])
        if arguments[-1] is not Ellipsis:  # a pair in one word
            return Kind(f"{item.name} or {item.name},{item.name}", "a pair", None, read_str)
        name = item.name.removeprefix("list of ")
        read = functools.partial(read_many, item=item)
        return Kind(f"list of {name}", f"a list of {item.name}", "*", read, item.says_why, item.choices)
    if origin is dict:  # texts of the form key=value
        return Kind("list of str", "a list of key=value", "*", functools.partial(_expect, kind=dict))
    return SIMPLE_KINDS[annotation]
