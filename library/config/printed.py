"""What --print_options prints: every option with its value and where the value comes from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from library.config.options import Given, Option, format_default, section_options, sections_of
from library.config.values import written

MARK = "*"  # of values that are not the default
WIDEST = 48  # letters of a value for which a column is kept; a longer one pushes its source to the right


class Implied(NamedTuple):
    """A value that an option has because of another one, and why."""

    section: str
    field: str
    value: Any
    why: str


class Row(NamedTuple):
    """An option that holds, as it is printed."""

    label: str
    value: str
    source: str
    is_changed: bool  # from the default


def options_text(config: object, given: Given, implied: Iterable[Implied]) -> str:
    """Return the lines of --print_options: sections as in --help, in each first what is not the default.

    config is a root that `build` made of the given options; required ones may be missing.
    """
    changes = {(change.section, change.field): change for change in implied}
    root: type = type(config)
    blocks: dict[str, list[Row]] = {}
    for name, section in sections_of(root):
        values = vars(getattr(config, name) if name else config)
        title = (section.__doc__ or name).split("\n")[0].rstrip(".")
        for entry in section_options(section, name):
            if not entry.spec.file_only:
                row = row_of(entry, values, given.sources, changes.get((name, entry.field)))
                blocks.setdefault(title, []).append(row)
    rows = [row for block in blocks.values() for row in block]
    widths = max(len(row.label) for row in rows), min(WIDEST, max(len(row.value) for row in rows))
    text = f"{MARK} is not the default. The values of a --dataset_config are not shown: --dry_run tells them.\n"
    text = text if any(row.label == "--dataset_config" for row in rows) else f"{MARK} is not the default.\n"
    for title, block in blocks.items():
        text += f"\n{title}\n"
        for row in sorted(block, key=lambda row: not row.is_changed):
            line = f"{row.label:{widths[0]}}  {row.value:{widths[1]}}  {row.source}"
            text += f"{MARK if row.is_changed else ' '} {line}\n"
    return text


def row_of(entry: Option, values: Mapping[str, Any], sources: Mapping[str, str], implied: Implied | None) -> Row:
    """Return the row of an option; values are those of its section, where a missing one is not among them."""
    if entry.field not in values:
        return Row(entry.label, "missing", "required", is_changed=True)
    value, source = values[entry.field], sources.get(entry.flag, "default")
    if implied is not None:
        value, source = implied.value, implied.why
    return Row(entry.label, value_text(entry, value), source, is_changed=value != entry.default)


def value_text(entry: Option, value: Any) -> str:
    """Return a value as it is written on the command line; "on" or "off" of a switch, and nothing of a secret."""
    if value is None or value == ():
        return "unset"
    if entry.spec.secret:
        return "(hidden)"
    if isinstance(value, bool):
        return "on" if value else "off"
    return format_default(written(value)) or '""'
