"""How a run is repeated: the commands, all options, the versions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from library.config.options import Option, format_default, root_options
from library.config.train import TrainConfig
from library.html_page import escape
from library.shell import in_lines, joined
from library.training.page.gather import Run
from library.training.page.parts import NONE, code, section

# Where a run went on from, which its repetition does not.
OF_A_PART = ("resume", "initial_step", "initial_epoch", "skip_until_initial_step")


def repeat(run: Run) -> str:
    """Return the section."""
    parts = []
    if run.options:
        short = joined(["python", "train_network.py", "--config_file", str(run.files_of.options)])
        whole = in_lines(["python train_network.py", *words_of(run.options)])
        parts.append(code(short, "Command that repeats the run"))
        parts.append(
            f"<details><summary>The same without the file</summary>{code(whole, 'The whole command')}</details>"
        )
        parts.append(_options(run.options))
    if run.facts.versions:
        rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in run.facts.versions.items())
        device = f"<dt>device</dt><dd>{escape(run.facts.device)}</dd>" if run.facts.device else ""
        parts.append(f'<div class="card"><h3>Versions</h3><dl class="pairs">{rows}{device}</dl></div>')
    lead = "The first line takes the options from the file beside this page, with the seed of this run."
    return section("repeat", "How do I repeat it?", "".join(parts), lead if run.options else "") if parts else ""


def words_of(options: Mapping[str, Any]) -> list[str]:
    """Return the options of a command line, each as one text."""
    words = []
    for flag, value in options.items():
        if flag in OF_A_PART or value is False:
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        words.append(joined([f"--{flag}", *map(str, values)]))
    return words


def _options(given: Mapping[str, Any]) -> str:
    known = root_options(TrainConfig)
    changed = [(flag, shown(value), known[flag].spec.help if flag in known else "") for flag, value in given.items()]
    left = [
        (flag, default_of(entry), entry.spec.help)
        for flag, entry in known.items()
        if flag not in given and not entry.spec.secret and entry.section != "file"
    ]
    return (
        f'<div class="card"><h3>Options of this run</h3>{_table(changed)}'
        f"<details><summary>{len(left)} options at their defaults</summary>{_table(left)}</details></div>"
    )


def default_of(entry: Option) -> str:
    """Return the default of an option as it is shown."""
    return {None: NONE, False: "off", True: "on"}.get(entry.default, "") or format_default(entry.default) or NONE


def shown(value: Any) -> str:
    """Return a value of TOML as it is shown."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return (
        " ".join(map(shown, value))
        if isinstance(value, list)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def _table(rows: Iterable[tuple[str, str, str]]) -> str:
    lines = "".join(
        f'<tr><th scope="row"><code>{escape(flag)}</code></th><td>{escape(value)}</td>'
        f'<td class="soft">{escape(text)}</td></tr>'
        for flag, value, text in rows
    )
    return f'<table class="options">{lines}</table>'
