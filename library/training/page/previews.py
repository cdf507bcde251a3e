"""The section of the previews: for each prompt the base picture, the one of the chosen step, and a strip of all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from library.html_page import escape, json_text, link_to
from library.sampling.contact_sheet import spread
from library.training.page.facts import Column
from library.training.page.gather import Run
from library.training.page.parts import section
from library.training.page.pictures import PREVIEW_SIDE, thumbnail

MOST_COLUMNS, MOST_PICTURES = 24, 240


def shown_columns(run: Run) -> list[tuple[int, Column]]:
    """Return number and previews of the moments that are shown: evenly spaced, so that the page stays small."""
    rows = max((len(column.pictures) for column in run.facts.columns), default=1)
    return spread(list(enumerate(run.facts.columns)), max(4, min(MOST_COLUMNS, MOST_PICTURES // max(1, rows))))


def previews(run: Run) -> str:
    """Return the section, empty without previews."""
    columns = shown_columns(run)
    if not columns:
        return ""
    rows = max(len(column.pictures) for _, column in columns)
    left_out = len(run.facts.columns) - len(columns)
    lead = "Move the slider, or click on a picture to enlarge it; then the arrow keys go through steps and prompts."
    lead += f" {left_out} moments between these are left out." if left_out else ""
    body = stepper([column.label for _, column in columns])
    body += "".join(_prompt(run, row, columns) for row in range(rows))
    return section("pictures", "What do the pictures look like?", body, lead)


def stepper(labels: Sequence[str]) -> str:
    """Return the slider through all steps."""
    last, texts = len(labels) - 1, escape(json_text(list(labels)))
    return (
        '<div class="stepper" role="group" aria-label="Step of the pictures">'
        '<button type="button" class="back" aria-label="Earlier pictures">‹</button>'
        f'<input type="range" id="step" data-labels="{texts}" min="0" max="{last}" value="{last}" step="1" '
        'aria-label="Step of the pictures">'
        '<button type="button" class="on" aria-label="Later pictures">›</button>'
        f'<output for="step">{escape(labels[-1])}</output></div>'
    )


def _prompt(run: Run, row: int, columns: Sequence[tuple[int, Column]]) -> str:
    prompts = run.facts.prompts
    prompt = prompts[row] if row < len(prompts) else f"Prompt {row + 1}"
    cells = "".join(cell(run.folder, prompt, column, row, number, page_folder=run.folder) for number, column in columns)
    return (
        f'<article class="card prompt"><h3>{escape(prompt)}</h3><div class="pair">'
        '<figure class="base"><button type="button"></button><figcaption></figcaption></figure>'
        '<figure class="now"><button type="button"></button><figcaption></figcaption></figure></div>'
        f'<div class="strip" style="--cell: {cell_width(len(columns))}">{cells}</div></article>'
    )


def cell_width(number: int) -> str:
    """Return the least width of a picture in a strip of so many."""
    return "7rem" if number <= 6 else "5.5rem" if number <= 12 else "4.25rem"


def cell(folder: Path, prompt: str, column: Column, row: int, number: int, *, page_folder: Path) -> str:
    """Return a picture of a strip, or what says that it is gone; number is that of its column.

    folder is that of the run, page_folder that of the page.
    """
    recorded = column.pictures[row] if row < len(column.pictures) else ""
    path = folder / recorded
    found = thumbnail(path, PREVIEW_SIDE) if recorded else None
    marks = f'data-column="{number}" data-label="{escape(column.label)}"'
    if found is None:
        return f'<button type="button" class="cell gone" {marks} disabled><span>{escape(column.label)}</span></button>'
    return (
        f'<button type="button" class="cell" {marks} data-href="{escape(link_to(path, page_folder))}">'
        f'<img src="{found.url}" width="{found.width}" height="{found.height}" '
        f'alt="{escape(f"{prompt}, {column.label}")}"><span>{escape(column.label)}</span></button>'
    )
