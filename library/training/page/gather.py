"""Reads the files that a run leaves: the only source of its page, while it lasts and after."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from library.config import toml_text
from library.config.saving import SavingConfig
from library.errors import UserError
from library.safetensors_io import read_header
from library.training.charts.loss_curve import window_of
from library.training.charts.series import Points, RunSeries, read_metrics, smoothed
from library.training.page.facts import Facts, Save, read_facts
from library.training.page.old_runs import columns_in, facts_in, whole
from library.training.record.run_files import UNNAMED, RunFiles
from library.training.record.run_lock import is_held

logger = logging.getLogger(__name__)

Kind = TypeVar("Kind")

FORMATS = ("safetensors", "ckpt", "pt")
ENDINGS = ("-run.json", "-metrics.jsonl", "-options.toml")  # of files that tell of a run
SMOOTHED_AT_LEAST = 9  # steps; the loss of a single one says little
HASH = "sshs_model_hash"  # that web UIs show


@dataclasses.dataclass(frozen=True)
class SavedFile:
    """A network on the disk."""

    save: Save
    path: Path
    size: int  # in bytes
    hash: str | None  # of its tensors, 64 hex digits


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as its page shows it."""

    folder: Path
    name: str
    facts: Facts
    options: dict[str, Any]  # flag -> value of TOML, those that differ from their defaults
    series: RunSeries
    files: tuple[SavedFile, ...]  # in the order of their steps
    is_alive: bool  # whether a process holds its lock

    @functools.cached_property
    def average(self) -> Points:
        """The smoothed loss of the training."""
        number = len(self.series.losses)
        return smoothed(self.series.losses, max(window_of(number), SMOOTHED_AT_LEAST)) if number else []

    @property
    def best_validation(self) -> tuple[int, float] | None:
        """The step with the lowest validation loss, and that loss."""
        return min(self.series.validation, key=lambda point: point[1], default=None)

    @property
    def files_of(self) -> RunFiles:
        """The names of its files."""
        return run_files(self.folder, self.name, self.options)


def names_in(folder: Path) -> list[str]:
    """Return the names of the runs whose files are in a folder."""
    found = {
        path.name.removesuffix(ending)
        for ending in ENDINGS
        for path in folder.glob(f"*{ending}")
        if path.name != ending and not path.name.startswith(".")
    }
    return sorted(found)


def gather(folder: Path, name: str) -> Run:
    """Return a run from its files; of a damaged one of them only a warning is given."""
    options = read_options(folder / f"{name}-options.toml")
    files = run_files(folder, name, options)
    facts = _tolerant(read_facts, files.record) or Facts()
    saved = saved_files(files, facts)
    series = read_metrics(files.metrics)
    if facts.began is None:
        facts = old_facts(files, saved, series)
    return Run(
        folder=folder,
        name=name,
        facts=facts,
        options=options,
        series=series,
        files=tuple(sorted(saved, key=lambda entry: (entry.save.step, entry.path == files.network))),
        is_alive=is_held(files.lock),
    )


def read_options(path: Path) -> dict[str, Any]:
    """Return flag -> value of the options that a run wrote; empty if it wrote none that can be read."""
    tables = _tolerant(toml_text.load, path) or {}
    return {flag: value for table in tables.values() if isinstance(table, dict) for flag, value in table.items()}


def run_files(folder: Path, name: str, options: Mapping[str, Any]) -> RunFiles:
    """Return the names of the files of a run in a folder."""
    given = {"output_name": options.get("output_name", name if name != UNNAMED else None), "output_dir": folder}
    if options.get("save_model_as") in FORMATS:
        given["save_model_as"] = options["save_model_as"]
    return RunFiles(SavingConfig(**given))


def saved_files(files: RunFiles, facts: Facts) -> list[SavedFile]:
    """Return the networks of a run that are on the disk: those of the record, without one all with its names."""
    folder, recorded = files.saving.output_dir, {save.file: save for save in facts.saves}
    paths = [folder / name for name in recorded] if facts.began is not None else sorted(files.all_networks())
    return [saved_file(path, recorded.get(path.name)) for path in paths if path.is_file()]


def saved_file(path: Path, save: Save | None) -> SavedFile:
    """Return what is known of a saved network; without the record its step is that of its metadata."""
    metadata = metadata_of(path)
    if save is None:
        step, epoch = (whole(metadata.get(key)) or 0 for key in ("ss_steps", "ss_epoch"))
        save = Save(file=path.name, step=step, epoch=epoch)
    return SavedFile(save, path, path.stat().st_size, metadata.get(HASH))


def metadata_of(path: Path) -> dict[str, str]:
    """Return the metadata of a network; empty of a pickle, which has none, and of a damaged file."""
    if path.suffix != ".safetensors":
        return {}
    header = _tolerant(read_header, path)
    return header.metadata if header is not None else {}


def old_facts(files: RunFiles, saved: Sequence[SavedFile], series: RunSeries) -> Facts:
    """Return the facts of a run without a record."""
    last = max(saved, key=lambda entry: entry.save.step, default=None)
    facts = facts_in(metadata_of(last.path)) if last is not None else Facts()
    name = files.saving.output_name
    return dataclasses.replace(
        facts,
        state="finished" if files.network.is_file() else "unknown",
        step=max([facts.step, *(step for step, _ in series.losses)]),
        columns=columns_in(files.saving.output_dir, name, facts.steps_per_epoch),
    )


def _tolerant(read: Callable[[Path], Kind], path: Path) -> Kind | None:
    """Return what is in a file; None if there is none, or with a warning if it cannot be read."""
    if not path.is_file():
        return None
    try:
        return read(path)
    except (UserError, OSError) as error:
        logger.warning("%s", error)
        return None
