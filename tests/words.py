"""Options as the words of a command line, for tests and benchmarks."""

from __future__ import annotations


def words(**values: object) -> list[str]:
    """Return a command line; None leaves an option out, True makes it a switch."""
    argv = []
    for name, value in values.items():
        if value is not None and value is not False:
            given = [] if value is True else value if isinstance(value, list) else [value]
            argv += [f"--{name}", *map(str, given)]
    return argv
