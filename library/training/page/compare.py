"""One page that compares several runs: their losses, their pictures side by side, the options that differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from library.files import replacing
from library.html_page import escape, link_to
from library.sampling.contact_sheet import spread
from library.training.page import charts
from library.training.page.facts import Column
from library.training.page.gather import Run
from library.training.page.page import VIEWER, foot, framed
from library.training.page.parts import NONE, chart, number, section, table
from library.training.page.previews import cell, stepper
from library.training.page.repeat import shown
from library.training.page.sections import STATES, state_of
from library.words import counted

MOST_STEPS = 12
OWN = ("output_dir", "output_name")  # options that every run has to have for itself
NOTHING = Column(label="none yet", step=0, pictures=())

Runs = Mapping[str, Run]  # title on the page -> run


def titled(runs: Sequence[Run]) -> dict[str, Run]:
    """Return the runs by their names, with the folder where several have one name."""
    counts = Counter(run.name for run in runs)
    return {run.name if counts[run.name] == 1 else f"{run.folder.name}/{run.name}": run for run in runs}


def write_comparison(runs: Sequence[Run], path: Path) -> None:
    """Write the page that compares runs, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(comparison(titled(runs), path.parent), encoding="utf-8", errors="replace")


def comparison(runs: Runs, folder: Path) -> str:
    """Return the page that compares runs; folder is that in which it will be."""
    losses = {title: run.average for title, run in runs.items()}
    validations = {title: run.series.validation for title, run in runs.items()}
    drawn = {"loss": charts.compared_chart(losses), "validation": charts.compared_chart(validations)}
    found = {name: data for name, data in drawn.items() if data}
    titles = {"loss": "Training loss, smoothed", "validation": "Validation loss"}
    places = "".join(chart(name, titles[name], f"Of {counted(len(runs), 'run')}") for name in found)
    body = (
        '<main><header class="head"><p class="eyebrow">Comparison</p>'
        f"<h1>{escape(counted(len(runs), 'run'))}</h1></header>{_table(runs, folder)}"
        + (section("learning", "Which one learns?", f'<div class="charts">{places}</div>') if places else "")
        + _pictures(runs, folder)
        + _differences(runs)
        + f"</main>{foot()}{VIEWER}"
    )
    return framed("Comparison of runs", body, found)


def _table(runs: Runs, folder: Path) -> str:
    rows = (_row(title, run, folder) for title, run in runs.items())
    made = table("files runs", ("Run", "State", "Steps", "Loss", "Best validation"), rows)
    return f'<section aria-label="Runs">{made}</section>'


def _row(title: str, run: Run, folder: Path) -> str:
    name = f'<a href="{escape(link_to(run.files_of.page, folder))}">{escape(title)}</a>'
    values = (
        STATES[state_of(run)][0],
        f"{run.facts.step:,}",
        number(run.average[-1][1] if run.average else None),
        number(run.best_validation[1] if run.best_validation else None),
    )
    return f"<tr><td>{name}</td>{''.join(f'<td>{value}</td>' for value in values)}</tr>"


def _pictures(runs: Runs, folder: Path) -> str:
    steps = sorted({column.step for run in runs.values() for column in run.facts.columns})
    prompts = list(dict.fromkeys(prompt for run in runs.values() for prompt in prompts_of(run)))
    if not steps:
        return ""
    shown_steps = spread(steps, MOST_STEPS)
    articles = ""
    for prompt in prompts:
        sides = "".join(
            _side(title, run, prompt, shown_steps, folder) for title, run in runs.items() if prompt in prompts_of(run)
        )
        articles += (
            f'<article class="card prompt compared"><h3>{escape(prompt)}</h3><div class="side">{sides}</div></article>'
        )
    lead = "Of each run the last pictures up to the step of the slider. Click to enlarge; the arrow keys go on."
    return section(
        "pictures", "How do they differ?", stepper([f"step {step:,}" for step in shown_steps]) + articles, lead
    )


def prompts_of(run: Run) -> list[str]:
    """Return the prompts of the previews; those of a run that does not tell them by their numbers."""
    rows = max((len(column.pictures) for column in run.facts.columns), default=0)
    known = list(run.facts.prompts[:rows])
    return known + [f"Prompt {row + 1}" for row in range(len(known), rows)]


def _side(title: str, run: Run, prompt: str, steps: Sequence[int], folder: Path) -> str:
    row = prompts_of(run).index(prompt)
    cells, before = list[str](), dict[int, int]()  # number of a column -> the cell that has its picture
    for at, step in enumerate(steps):
        column = max((index for index, one in enumerate(run.facts.columns) if one.step <= step), default=None)
        if column is None:
            cells.append(cell(run.folder, prompt, NOTHING, 0, -1, page_folder=folder))
        elif column in before:
            cells.append(f'<button type="button" class="cell" data-same="{before[column]}"></button>')
        else:
            before[column] = at
            shown_as = f"{title}: {prompt}"
            cells.append(cell(run.folder, shown_as, run.facts.columns[column], row, column, page_folder=folder))
    return (
        f'<div><figure class="now" data-title="{escape(title)}"><button type="button"></button>'
        f'<figcaption></figcaption></figure><div class="strip" hidden>{"".join(cells)}</div></div>'
    )


def _differences(runs: Runs) -> str:
    flags = list(dict.fromkeys(flag for run in runs.values() for flag in run.options if flag not in OWN))
    rows = {flag: [run.options.get(flag) for run in runs.values()] for flag in flags}
    differing = {flag: values for flag, values in rows.items() if any(value != values[0] for value in values)}
    if not differing:
        return section("options", "Which options differ?", '<p class="empty">None, as far as the files tell.</p>')
    lines = (
        f'<tr><th scope="row"><code>{escape(flag)}</code></th>'
        + "".join(f"<td>{NONE if value is None else escape(shown(value))}</td>" for value in values)
        + "</tr>"
        for flag, values in differing.items()
    )
    made = table("diff", ("Option", *runs), lines)
    return section("options", "Which options differ?", made, f"{NONE} is the default.")
