"""Mistakes in the files of a run by kind, so that all are told together, and hundreds do not fill the screen."""

from __future__ import annotations

import logging
from pathlib import Path

from library.errors import Problems, shortened

logger = logging.getLogger(__name__)

MOST_LISTED = 20  # files listed of one kind


class Faults:
    """Collects files that cannot be used; a file is listed once for each kind of fault."""

    def __init__(self) -> None:
        self._by_kind: dict[str, dict[str, None]] = {}

    def __bool__(self) -> bool:
        return bool(self._by_kind)

    def add(self, kind: str, file: Path | str, detail: str = "") -> None:
        """Add a file; kind is what all such files are, after their number, and what to do."""
        name = shortened(str(file))
        self._by_kind.setdefault(kind, {})[f"  {name}: {detail}" if detail else f"  {name}"] = None

    def report(self, problems: Problems) -> None:
        """Add for each kind the number of files, and the first of them, to problems."""
        for kind, lines in self._by_kind.items():
            first = f" (the first {MOST_LISTED} of them)" if len(lines) > MOST_LISTED else ""
            problems.add("\n".join([f"{len(lines)} {kind}{first}:", *list(lines)[:MOST_LISTED]]))

    def raise_if_any(self) -> None:
        """Raise one UserError for all files, if there are any."""
        problems = Problems()
        self.report(problems)
        problems.raise_if_any()


class Notes:
    """Collects warnings about the files of a run; equal ones, of a folder that is used twice, are given once."""

    def __init__(self) -> None:
        self._lines: dict[str, int] = {}

    def warn(self, text: str) -> None:
        """Add a warning."""
        self._lines[text] = logging.WARNING

    def tell(self, text: str) -> None:
        """Add a line that is no warning."""
        self._lines.setdefault(text, logging.INFO)

    def log(self) -> None:
        """Log all lines in order."""
        for text, level in self._lines.items():
            logger.log(level, "%s", text)
