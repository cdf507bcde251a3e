"""The report as a page of Markdown, from the same values as its JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.card.rows import BAD

VERDICTS = {
    "equal": "the same to the bit",
    "within bound": "different by no more than the bound in the note",
    "differs": "different by more than the bound: **a fault**",
    "failed": "ended with an error, or took too long: **a fault**; the log of the part has the whole of it",
    "not run": "the note says why",
    "measured": "a figure without a judgement",
}


def page(report: Mapping[str, Any]) -> str:
    """Return the page of a report."""
    rows = [row for part in report["parts"] for row in part["rows"]]
    bad = [(part["title"], row) for part in report["parts"] for row in part["rows"] if row["verdict"] in BAD]
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in VERDICTS}
    lines = [
        "# What the suite does on this card",
        "",
        f"{len(rows)} rows: " + ", ".join(f"{number} {verdict}" for verdict, number in counts.items() if number) + ".",
        "" if report.get("ended") else "\n**The report is not complete: it was still being made, or was stopped.**\n",
    ]
    if bad:
        lines += ["## Faults", ""]
        lines += [f"- {title}: {row['name']}: **{row['verdict']}** {cell(row['note'])}".rstrip() for title, row in bad]
        lines += [""]
    lines += ["## Machine", "", *table(["", ""], report["environment"].items()), ""]
    for part in report["parts"]:
        if part["name"] == "machine" and all(row["verdict"] not in BAD for row in part["rows"]):
            continue  # its values are the table above
        lines += [f"## {part['title']}", "", f"`{part['name']}`, {part['seconds']:.0f} s", ""]
        lines += [*part_table(part["rows"]), ""]
    lines += ["## Verdicts", "", *table(["verdict", "meaning"], list(VERDICTS.items())), ""]
    return "\n".join(lines)


def part_table(rows: list[Mapping[str, Any]]) -> list[str]:
    """Return the table of a part, with a column for every value that one of its rows has."""
    columns = list(dict.fromkeys(column for row in rows for column in row["values"]))
    used = [["what", "verdict", *columns, "note"]]
    used += [
        [row["name"], row["verdict"], *(cell(row["values"].get(column)) for column in columns), row["note"]]
        for row in rows
    ]
    if not any(row["note"] for row in rows):
        used = [line[:-1] for line in used]
    return table(used[0], used[1:])


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    """Return the lines of a table."""
    names = list(head)
    body = [f"| {' | '.join(map(cell, row))} |" for row in rows]
    return [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}", *body]


def cell(value: Any) -> str:
    """Return a value as the text of a cell."""
    if value is None:
        return ""
    if isinstance(value, float):
        size = abs(value)
        return f"{value:.2e}" if 0 < size < 1e-3 else f"{value:.4g}" if size < 1e4 else f"{value:.0f}"
    return str(value).replace("|", "\\|").replace("\n", " ")
