"""The state of a run: what it takes to go on as if it had never stopped.

A state is a folder with `state.pt` (adapter, optimizer, schedule, gradient scaler), `train_state.json` (where
the run is) and `options.toml`. It holds no random numbers: everything random is keyed by position. It
appears under its name by one rename, so that a state that is there is complete.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.config.saving import SavingConfig
from library.errors import UserError, shown, told
from library.files import new_folder
from library.pickles import load_pickle

if TYPE_CHECKING:
    import torch

    from library.networks.trainable import TrainableNetwork

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
POSITION_FILE, TENSOR_FILE, OPTIONS_FILE = "train_state.json", "state.pt", "options.toml"


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a run is: optimizer steps made, epoch (from 1) they end in, its seed, and what it shows of itself."""

    current_step: int
    current_epoch: int
    seed: int
    losses: tuple[float, ...] = ()  # of the last micro-batches, for the average on the progress bar
    columns: tuple[tuple[str, tuple[str, ...]], ...] = ()  # of the contact sheet: label, files
    best: tuple[float, int] | None = None  # lowest loss of the validation, and its step


def write_state(folder: Path, tensors: dict[str, Any], position: Position, options: str) -> None:
    """Write a state under a temporary name and rename it; one that was there under the name goes."""
    import torch

    with new_folder(folder, replace=True) as temporary:
        torch.save(tensors, temporary / TENSOR_FILE)
        record = {"version": FORMAT_VERSION, **dataclasses.asdict(position)}
        (temporary / POSITION_FILE).write_text(json.dumps(record), encoding="utf-8")
        (temporary / OPTIONS_FILE).write_text(options, encoding="utf-8")


def find_state(resume: str, saving: SavingConfig) -> Path | None:
    """Return the folder that --resume means; for "auto" the one furthest on under this output name, or None."""
    if resume != "auto":
        check_state(Path(resume))
        return Path(resume)
    name = saving.output_name or ""
    found = []
    for folder in sorted(saving.output_dir.glob(f"{name}*-state")) if saving.output_dir.is_dir() else []:
        rest = folder.name.removesuffix("-state").removeprefix(saving.output_name or "")
        if saving.output_name is None or rest == "" or rest.lstrip("-").removeprefix("step").isdecimal():
            try:
                found.append((read_position(folder).current_step, folder))
            except UserError:
                continue  # another tool's, or damaged: the next best one serves
    for _, folder in sorted(found, reverse=True):
        try:
            check_state(folder)
        except UserError as error:
            logger.warning("%s; the next best one serves", error)
        else:
            return folder
    return None


def check_state(folder: Path) -> None:
    """Raise UserError for a folder that is no state, or one whose tensors are not as they were written."""
    read_position(folder)
    path = folder / TENSOR_FILE
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"--resume: {path} is damaged ({told(error)}); take another state") from None
    if damaged is not None:
        raise UserError(f"--resume: {path} is damaged (checksum of {damaged}); take another state")


def read_position(folder: Path) -> Position:
    """Return where the run of a state is; raises UserError for a folder that is no state of this suite."""
    path = folder / POSITION_FILE
    if not path.is_file() or not (folder / TENSOR_FILE).is_file():
        raise UserError(f"--resume: {folder} is no state of this suite: it has no {POSITION_FILE} or no {TENSOR_FILE}")
    try:
        record = dict(json.loads(path.read_text(encoding="utf-8")))
        if record.pop("version") != FORMAT_VERSION:
            raise UserError(f"--resume: {folder} was written by another version of the suite")
        return Position(
            current_step=_count(record, "current_step"),
            current_epoch=_count(record, "current_epoch"),
            seed=_count(record, "seed"),
            losses=tuple(float(loss) for loss in record["losses"]),
            columns=tuple((str(label), tuple(map(str, files))) for label, files in record["columns"]),
            best=_best(*record["best"]) if record.get("best") else None,
        )
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"--resume: {path} is damaged ({told(error)}); take another state") from None


def _count(record: dict[str, Any], name: str) -> int:
    if type(record[name]) is not int or record[name] < 0:
        raise ValueError(f"{name} is {shown(record[name])}")
    return record[name]


def _best(loss: Any, step: Any) -> tuple[float, int]:
    return float(loss), int(step)


def read_tensors(folder: Path) -> dict[str, Any]:
    """Return the tensors of a state; of the pickle only weights are read."""
    return load_pickle(folder / TENSOR_FILE)


def collect(
    network: TrainableNetwork,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None,
    scaler: torch.amp.GradScaler,
) -> dict[str, Any]:
    """Return what a state holds besides the position."""
    schedule = {} if scheduler is None else {k: v for k, v in scheduler.state_dict().items() if k != "lr_lambdas"}
    return {
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "optimizer_class": type(optimizer).__qualname__,
        "schedule": schedule,
        "scaler": scaler.state_dict(),
    }


def restore(
    tensors: dict[str, Any],
    network: TrainableNetwork,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None,
    scaler: torch.amp.GradScaler,
) -> None:
    """Put a state into the parts of a run; raises UserError where they do not fit each other."""
    try:
        made_by, own = tensors.get("optimizer_class"), type(optimizer).__qualname__
        if made_by not in (None, own):  # torch would take over numbers that mean something else
            raise ValueError(f"its optimizer is {made_by}, this one {own}")
        network.load_state_dict(tensors["network"])
        optimizer.load_state_dict(tensors["optimizer"])
        if scheduler is not None:
            scheduler.load_state_dict(tensors["schedule"] | {"lr_lambdas": [None] * len(optimizer.param_groups)})
        scaler.load_state_dict(tensors["scaler"])
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"--resume: the state does not fit this run ({told(error)}); use the options it has") from None
