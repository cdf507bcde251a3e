"""The sections of the page of a run, in the order in which people ask; each makes HTML of a `Run` alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from library.html_page import escape, link_to
from library.training.page import charts
from library.training.page.facts import Bucket, DataFacts, Facts, Fed, Save
from library.training.page.gather import Run, SavedFile
from library.training.page.parts import (
    NONE,
    Tile,
    bars,
    card,
    chart,
    date,
    number,
    section,
    table,
    tiles,
)
from library.training.page.pictures import EXAMPLE_SIDE, thumbnail
from library.words import counted, duration, in_bytes

CAPTIONS_AT_FIRST, BARS_OF_TAGS = 8, 40

STATES = {
    "running": ("Running", "live"),
    "finished": ("Finished", "good"),
    "stopped": ("Stopped", "warn"),
    "broken": ("Broken off", "bad"),
    "failed": ("Ended by an error", "bad"),
    "unknown": ("Not finished", "warn"),
}


def state_of(run: Run) -> str:
    """Return the state of a run: one that says that it is running, and holds no lock, was broken off."""
    return "broken" if run.facts.state == "running" and not run.is_alive else run.facts.state


def head(run: Run) -> str:
    """Return the name of the run, its state, its progress and its main numbers."""
    facts, (word, kind) = run.facts, STATES[state_of(run)]
    done = f"step {facts.step:,} of {facts.steps:,}" if facts.steps else f"step {facts.step:,}"
    share = min(1.0, facts.step / facts.steps) if facts.steps else 0.0
    when = f" · last written {date(facts.updated)}" if facts.updated else ""
    number_of = counted(len(facts.warnings), "warning")
    warned = f' · <a href="#data">{number_of}</a>' if facts.warnings else ""
    progress = (
        f'<progress max="1" value="{share:.4f}" aria-label="Progress">{share:.0%}</progress>' if facts.steps else ""
    )
    error = f'<p class="error">{escape(facts.error)}</p>' if facts.error else ""
    return (
        f'<header class="head"><p class="eyebrow">Training run</p><h1>{escape(run.name)}</h1>'
        f'<p class="state"><span class="pill {kind}">{word}</span> {escape(done + when)}{warned}</p>{progress}'
        f"{error}"
        f"{tiles(main_numbers(run))}</header>"
    )


def main_numbers(run: Run) -> list[Tile]:
    """Return what is known of: losses, time, speed."""
    facts, found = run.facts, list[Tile]()
    if run.average:
        (_, first), (_, last) = run.average[0], run.average[-1]
        found.append(Tile("Loss, smoothed", number(last), f"from {number(first)}"))
    if run.best_validation is not None:
        step, loss = run.best_validation
        found.append(Tile("Best validation loss", number(loss), f"after step {step:,}"))
    if facts.epochs and facts.epoch:
        found.append(Tile("Epoch", f"{facts.epoch:,}", f"of {facts.epochs:,}"))
    trained = seconds_trained(facts)
    if trained is not None:
        found.append(Tile("Time so far" if facts.state == "running" else "Time", duration(trained)))
    if (left := seconds_left(facts)) is not None and state_of(run) == "running":
        found.append(Tile("Time left, about", duration(left)))
    if (speed := charts.seconds_a_step(run)) is not None:
        per_step, waits = speed
        found.append(Tile("Seconds a step", f"{per_step:.3g}", f"{waits:.0%} waiting for data"))
    return found


def seconds_trained(facts: Facts) -> float | None:
    """Return the time from the start to the last record; None where the record does not tell."""
    if facts.updated is None or facts.began is None:
        return None
    return facts.updated - facts.began + facts.seconds_before


def seconds_left(facts: Facts) -> float | None:
    """Return the time that the rest takes at the pace of this part of the run, with all that happens between steps."""
    made = facts.step - facts.first_step
    if facts.updated is None or facts.began is None or facts.steps is None or not made:
        return None
    return (facts.updated - facts.began) / made * (facts.steps - facts.step)


# --------------------------------------------------------------------------------------------------------------
# Is it learning?
# --------------------------------------------------------------------------------------------------------------


def learning(run: Run) -> str:
    """Return the places of the charts, with what they show in a sentence."""
    places = [
        ("loss", "Loss", describe_loss(run), charts.loss_chart(run)),
        ("rate", "Learning rate", "What each group of weights is trained with", charts.rate_chart(run)),
        ("time", "Seconds a step", describe_times(run), charts.time_chart(run)),
    ]
    drawn = "".join(chart(name, title, summary) for name, title, summary, data in places if data)
    if not drawn:
        drawn = '<p class="empty">No step is recorded yet.</p>'
    hint = "Drag over a chart to enlarge a part of it; double-click to see all."
    return section("learning", "Is it learning?", f'<div class="charts">{drawn}</div>', hint if places[0][3] else "")


def describe_loss(run: Run) -> str:
    """Return what the chart of the loss shows."""
    average, left_out = run.average, run.series.left_out
    text = f"From {number(average[0][1])} to {number(average[-1][1])}, smoothed" if average else "No finite loss"
    if left_out:
        text += f"; {counted(len(left_out), 'step')} left out"
    if run.best_validation is not None:
        step, loss = run.best_validation
        text += f"; lowest validation loss {number(loss)} after step {step:,}"
    return text


def describe_times(run: Run) -> str:
    """Return what the chart of the times shows."""
    found = charts.seconds_a_step(run)
    return f"Median {found[0]:.3g} s; {found[1]:.1%} of it is waiting for data" if found else ""


# --------------------------------------------------------------------------------------------------------------
# Which file should I take?
# --------------------------------------------------------------------------------------------------------------


def files(run: Run) -> str:
    """Return a table of the saved networks."""
    if not run.files:
        return section("files", "Which file should I take?", '<p class="empty">No file is saved yet.</p>')
    validation, average = dict(run.series.validation), dict(run.average)
    with_loss = {entry.save.step: validation[entry.save.step] for entry in run.files if entry.save.step in validation}
    best = min(with_loss, key=with_loss.__getitem__) if with_loss else None
    rows = (_file(run, entry, validation, average, best) for entry in run.files)
    names = ("File", "Step", "Epochs done", "Loss", "Validation", "Size", "Hash", "Pictures")
    lead = "A lower validation loss is better; without one, let the pictures decide."
    return section("files", "Which file should I take?", table("files", names, rows), lead)


def _file(
    run: Run, entry: SavedFile, validation: Mapping[int, float], average: Mapping[int, float], best: int | None
) -> str:
    save = entry.save
    mark = '<span class="pill good">lowest validation</span>' if best == save.step else ""
    column = next((index for index, one in enumerate(run.facts.columns) if one.step == save.step), None)
    shown = f'<span class="mini" data-column="{column}"></span>' if column is not None else NONE
    cells = [
        f'<a href="{escape(link_to(entry.path, run.folder))}">{escape(entry.path.name)}</a> {mark}',
        f"{save.step:,}",
        f"{save.epoch:,}",
        number(average.get(save.step)),
        number(validation.get(save.step)),
        in_bytes(entry.size),
        f'<code title="{escape(entry.hash)}">{escape(entry.hash[:10])}</code>' if entry.hash else NONE,
        shown,
    ]
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


# --------------------------------------------------------------------------------------------------------------
# What did I train on?
# --------------------------------------------------------------------------------------------------------------


def data(run: Run) -> str:
    """Return the datasets with their buckets and pictures, captions, tags and warnings."""
    facts = run.facts
    parts = [_dataset(run, index, entry) for index, entry in enumerate(facts.datasets)]
    if facts.captions:
        parts.append(_captions(run, facts.captions))
    if facts.tags:
        shown = dict(facts.tags[:BARS_OF_TAGS])
        more = f" The {BARS_OF_TAGS} most frequent of {facts.num_tags:,}." if facts.num_tags > len(shown) else ""
        counts = bars(shown, {tag: f"{count:,}" for tag, count in shown.items()}, "Tags", columns=True)
        parts.append(card("Tags", counts, f"How many captions have each.{more}"))
    if facts.warnings:
        lines = "".join(f"<li>{escape(text)}</li>" for text in facts.warnings)
        parts.append(card("Warnings", f"<ul>{lines}</ul>", kind="warnings"))
    return section("data", "What did I train on?", "".join(parts)) if parts else ""


def _dataset(run: Run, index: int, entry: DataFacts) -> str:
    title = f"Dataset {index + 1}" if len(run.facts.datasets) > 1 else "Pictures"
    text = f"{counted(entry.pictures, 'picture')} at {entry.size[0]} × {entry.size[1]}, batches of {entry.batch_size}"
    text += f"; {entry.regularisation:,} for regularisation" if entry.regularisation else ""
    text += f"; {entry.held_out:,} held out for validation" if entry.held_out else ""
    most = max((bucket.draws for bucket in entry.buckets), default=1)
    rows = "".join(_bucket(run, bucket, most) for bucket in entry.buckets)
    return card(title, f'<ul class="buckets">{rows}</ul>', text)


def _bucket(run: Run, bucket: Bucket, most: int) -> str:
    pictures = "".join(_example(run, path) for path in bucket.examples)
    draws = f"{counted(bucket.pictures, 'picture')}, {bucket.draws:,} an epoch"
    if bucket.pictures == bucket.draws:
        draws = f"{bucket.draws:,} an epoch"
    return (
        f'<li><span class="name">{bucket.width} × {bucket.height}</span><span class="bar">'
        f'<i style="width:{100 * bucket.draws / most:.2f}%"></i></span><span class="number">{draws}</span>'
        f'<span class="examples">{pictures}</span></li>'
    )


def _example(run: Run, recorded: str) -> str:
    path = run.folder / recorded
    found = thumbnail(path, EXAMPLE_SIDE)
    if found is None:
        return f'<span class="gone" title="{escape(path.name)}"></span>'
    return (
        f'<img src="{found.url}" width="{found.width}" height="{found.height}" loading="lazy" '
        f'alt="{escape(path.name)}" title="{escape(path.name)}">'
    )


def _captions(run: Run, captions: Sequence[Fed]) -> str:
    rows = [
        f"<li>{_example(run, fed.picture)}<span>{escape(fed.caption) or '<em>empty</em>'}</span></li>"
        for fed in captions
    ]
    more = rows[CAPTIONS_AT_FIRST:]
    rest = f"<details><summary>{len(more)} more</summary><ol>{''.join(more)}</ol></details>" if more else ""
    shown = f"<ol>{''.join(rows[:CAPTIONS_AT_FIRST])}</ol>{rest}"
    return card("Captions", shown, "As they are fed in the first epoch, in order.", kind="captions")


# --------------------------------------------------------------------------------------------------------------
# The adapter
# --------------------------------------------------------------------------------------------------------------


def adapter(run: Run) -> str:
    """Return what was trained, and how much of it changed."""
    options = run.options
    items = [
        Tile("Module", str(options.get("network_module", NONE))),
        Tile("Rank", str(options.get("network_dim", "default"))),
        Tile("Alpha", f"{options['network_alpha']:g}" if "network_alpha" in options else "1"),
    ]
    if run.facts.parameters:
        items.append(Tile("Trained parameters", f"{run.facts.parameters:,}"))
    arguments = " ".join(options.get("network_args", ()))
    parts = [tiles(items)]
    if arguments:
        parts.append(f'<p class="soft">Arguments: <code>{escape(arguments)}</code></p>')
    last = next((entry.save for entry in reversed(run.files) if entry.save.norms_by_block), None)
    if last is not None:
        parts.append(_norms(run, last))
    return section("adapter", "What changed in the model?", "".join(parts))


def _norms(run: Run, save: Save) -> str:
    blocks, kinds, ranks = save.norms_by_block, save.norms_by_kind, save.norms_by_rank
    drawn = [
        ("By block", "Numbered as in checkpoints", blocks),
        ("By kind of layer", "", kinds),
        ("By rank", "Of the file cut to each rank", ranks),
    ]
    cards = "".join(
        card(title, bars(values, {name: number(value) for name, value in values.items()}, title), note)
        for title, note, values in drawn
        if values
    )
    summary = "Norm of the change by kind of layer, at each save"
    over = chart("norms", "Over the run", summary) if charts.norm_chart(run) else ""
    lead = f"Frobenius norm of the change of the weights in {save.file}, with alpha and rank in it."
    return f'<p class="lead">{escape(lead)}</p><div class="columns">{cards}</div>{over}'


def memory(run: Run) -> str:
    """Return the most memory that was taken."""
    taken, items = run.facts.memory, list[Tile]()
    if taken.device is not None:
        items.append(Tile("GPU", in_bytes(taken.device), "allocated by PyTorch"))
    if taken.process is not None:
        items.append(Tile("Main memory", in_bytes(taken.process), "of the first process"))
    if not items:
        return ""
    device = [Tile("Device", run.facts.device)] if run.facts.device else []
    return section("memory", "How much memory did it take?", tiles([*items, *device]))
