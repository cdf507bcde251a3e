"""The section of the previews: for each prompt the base picture, the one of the chosen step, and a strip of all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from library.html_page import escape
from library.sampling.contact_sheet import spread
from library.training.page.facts import Column
from library.training.page.gather import Run
from library.training.page.parts import section
from library.training.page.pictures import PREVIEW_SIDE, link_to, thumbnail

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
    last = len(labels) - 1
    return (
        '<div class="stepper" role="group" aria-label="Step of the pictures">'
        '<button type="button" class="back" aria-label="Earlier pictures">‹</button>'
        f'<input type="range" id="step" min="0" max="{last}" value="{last}" step="1" aria-label="Step of the pictures">'
        '<button type="button" class="on" aria-label="Later pictures">›</button>'
        f'<output for="step">{escape(labels[-1])}</output></div>'
    )


def _prompt(run: Run, row: int, columns: Sequence[tuple[int, Column]]) -> str:
    prompts = run.facts.prompts
    prompt = prompts[row] if row < len(prompts) else f"Prompt {row + 1}"
    cells = "".join(
        cell(run.folder, column.pictures[row] if row < len(column.pictures) else "", prompt, column, number)
        for number, column in columns
    )
    return (
        f'<article class="card prompt"><h3>{escape(prompt)}</h3><div class="pair">'
        '<figure class="base"><button type="button"></button><figcaption></figcaption></figure>'
        '<figure class="now"><button type="button"></button><figcaption></figcaption></figure></div>'
        f'<div class="strip">{cells}</div></article>'
    )


def cell(folder: Path, recorded: str, prompt: str, column: Column, number: int) -> str:
    """Return a picture of a strip, or what says that it is gone; number is that of its column in the run."""
    path = folder / recorded
    found = thumbnail(path, PREVIEW_SIDE) if recorded else None
    marks = f'data-column="{number}" data-label="{escape(column.label)}"'
    if found is None:
        return f'<button type="button" class="cell gone" {marks} disabled><span>{escape(column.label)}</span></button>'
    return (
        f'<button type="button" class="cell" {marks} data-href="{escape(link_to(path, folder))}">'
        f'<img src="{found.url}" width="{found.width}" height="{found.height}" '
        f'alt="{escape(f"{prompt}, {column.label}")}"><span>{escape(column.label)}</span></button>'
    )
