"""Commands of the suite as a user pastes them into a shell."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # where the scripts are
PLAIN = re.compile(r"[\w.:=/\\+-]+", re.ASCII)  # needs no quotes in cmd and PowerShell


def command_line(script: str, words: Sequence[object], *, start: Sequence[str] = ("python",)) -> str:
    """Return the command that starts a script of the suite from this folder, quoted for the shell of this platform."""
    return joined([*start, script_path(script), *map(str, words)])


def joined(words: Iterable[str]) -> str:
    """Return the words of a command, each quoted where it needs it."""
    return " ".join(map(quoted, words))


def in_lines(parts: Sequence[str]) -> str:
    """Return the parts of a command on lines of their own; on one line on Windows, whose shells differ in that."""
    return (" " if os.name == "nt" else " \\\n    ").join(parts)


def script_path(script: str) -> str:
    """Return the path of a script: its name in the suite, if this is the folder of the suite."""
    return script if Path.cwd() == ROOT else str(ROOT / script)


def quoted(word: str, *, windows: bool = os.name == "nt") -> str:
    """Return a word as a shell takes it: sh, or on Windows both cmd and PowerShell."""
    if not windows:
        return shlex.quote(word)
    if PLAIN.fullmatch(word):
        return word
    # Backslashes are plain, but before a double quote, and the one that ends the word is such.
    before_quotes = re.sub(r'(\\*)"', r'\1\1\\"', word)
    return '"' + re.sub(r"(\\+)$", r"\1\1", before_quotes) + '"'
