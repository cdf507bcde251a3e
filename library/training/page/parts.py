"""Small parts of pages: numbers in words, tiles, bars, tables; each returns HTML in which all texts are escaped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

from library.html_page import escape

NONE = "–"


class Tile(NamedTuple):
    """A number with its title."""

    title: str
    value: str
    note: str = ""


def tiles(items: Sequence[Tile]) -> str:
    """Return a row of numbers."""
    return f'<dl class="tiles">{"".join(map(_tile, items))}</dl>'


def _tile(item: Tile) -> str:
    note = f'<span class="note">{escape(item.note)}</span>' if item.note else ""
    return f"<div><dt>{escape(item.title)}</dt><dd>{escape(item.value)}{note}</dd></div>"


def bars(values: Mapping[str, float], text: Mapping[str, str], title: str, *, columns: bool = False) -> str:
    """Return a horizontal bar for each value, from 0 to the largest; text is what stands beside it."""
    most = max(values.values(), default=0) or 1
    rows = "".join(
        f'<li><span class="name" title="{escape(name)}">{escape(name)}</span>'
        f'<span class="bar"><i style="width:{100 * value / most:.2f}%"></i></span>'
        f'<span class="number">{escape(text[name])}</span></li>'
        for name, value in values.items()
    )
    return f'<ul class="bars{" columns" if columns else ""}" aria-label="{escape(title)}">{rows}</ul>'


def section(name: str, title: str, body: str, lead: str = "") -> str:
    """Return a section of the page."""
    said = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    head = f'<h2 id="{name}-title">{escape(title)}</h2>'
    return f'<section id="{name}" aria-labelledby="{name}-title">{head}{said}{body}</section>'


def card(title: str, body: str, note: str = "", *, kind: str = "") -> str:
    """Return a part of a section with a title, and a note below that."""
    said = f'<p class="soft">{escape(note)}</p>' if note else ""
    return f'<div class="card {kind}"><h3>{escape(title)}</h3>{said}{body}</div>'


def table(kind: str, head: Iterable[str], rows: Iterable[str]) -> str:
    """Return a table in a card that scrolls; rows are HTML."""
    titles = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    lines = "".join(rows)
    return (
        f'<div class="scroll card"><table class="{kind}"><thead><tr>{titles}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def chart(name: str, title: str, summary: str) -> str:
    """Return the place of an interactive chart, which the script fills."""
    said = escape(f"{title}: {summary}")
    return (
        f'<figure class="card chart"><figcaption><h3>{escape(title)}</h3><p>{escape(summary)}</p></figcaption>'
        f'<div class="plot" data-chart="{name}" role="img" aria-label="{said}"></div></figure>'
    )


def code(text: str, title: str) -> str:
    """Return a text with a button that copies it."""
    return (
        f'<div class="code"><pre aria-label="{escape(title)}"><code>{escape(text)}</code></pre>'
        '<button type="button" class="copy">Copy</button></div>'
    )


def number(value: float | None) -> str:
    """Return a number with four digits."""
    return NONE if value is None or not math.isfinite(value) else f"{value:.4g}"


def date(seconds: float | None) -> str:
    """Return a moment in the time of this machine."""
    return NONE if seconds is None else f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M}"
