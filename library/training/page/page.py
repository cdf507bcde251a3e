"""The page of a run: one HTML file that needs nothing else, a function of the files of the run alone."""

from __future__ import annotations

import functools
from pathlib import Path

from library import NAME
from library.files import replacing
from library.html_page import escape, page
from library.training.page import charts
from library.training.page.gather import Run
from library.training.page.previews import previews
from library.training.page.repeat import repeat
from library.training.page.sections import adapter, data, files, head, learning, memory

ASSETS = Path(__file__).parent / "assets"
STYLES, SCRIPTS = ("uPlot.min.css", "page.css"), ("uPlot.iife.min.js", "page.js")
# Sections in their order, with their titles in the list at the top.
SECTIONS = {
    "Charts": learning,
    "Pictures": previews,
    "Files": files,
    "Data": data,
    "Adapter": adapter,
    "Memory": memory,
    "Repeat": repeat,
}
VIEWER = (
    '<dialog id="viewer" aria-label="Enlarged picture">'
    '<form method="dialog"><button aria-label="Close">×</button></form><img alt="">'
    '<p><span class="what"></span> <a href="#" target="_blank" rel="noopener">Open the file</a></p></dialog>'
)


def write_page(run: Run, path: Path) -> None:
    """Write the page of a run, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(page_of(run), encoding="utf-8", errors="replace")


def page_of(run: Run) -> str:
    """Return the page of a run."""
    made = {title: make(run) for title, make in SECTIONS.items()}
    links = "".join(
        f'<a href="#{body.partition("id=")[2].split(chr(34))[1]}">{title}</a>' for title, body in made.items() if body
    )
    body = f'<nav aria-label="Sections">{links}</nav><main>{head(run)}{"".join(made.values())}</main>{foot()}{VIEWER}'
    found = {
        "loss": charts.loss_chart(run),
        "rate": charts.rate_chart(run),
        "time": charts.time_chart(run),
        "norms": charts.norm_chart(run),
    }
    return framed(f"{run.name} · training", body, {name: chart for name, chart in found.items() if chart})


def framed(title: str, body: str, drawn: dict[str, charts.Chart]) -> str:
    """Return a page with the style and the scripts of reports."""
    return page(
        title, asset_text(STYLES), body, data={"charts": drawn}, scripts=tuple(asset_text((name,)) for name in SCRIPTS)
    )


def foot() -> str:
    """Return the end of a page."""
    return f"<footer>Made by {escape(NAME)} from the files of the run. Charts by uPlot (MIT licence).</footer>"


@functools.cache
def asset_text(names: tuple[str, ...]) -> str:
    """Return the text of files that belong to this package."""
    return "\n".join((ASSETS / name).read_text(encoding="utf-8") for name in names)
