"""The state of a run, from which it resumes as if it had never stopped.

A state is a folder with `state.pt` (adapter, optimizer, schedule, gradient scaler), `train_state.json` (progress)
and `options.toml`. It holds no state of random generators: everything random is keyed by position. It gets its name
by one rename, so that a state that exists is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import zipfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from library.config.saving import SavingConfig
from library.data.batches import RunPlan
from library.errors import UserError, is_out_of_memory, message_of, shown
from library.files import new_folder
from library.optim.flat import TrainedWeights
from library.optim.optimizers import averaged_weights
from library.pickles import load_pickle
from library.training.run.progress import Progress

if TYPE_CHECKING:
    from library.networks.trainable import TrainableNetwork

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
POSITION_FILE, TENSOR_FILE, OPTIONS_FILE = "train_state.json", "state.pt", "options.toml"


@dataclasses.dataclass(frozen=True)
class TrainState:
    """The objects that the steps of a run change; a state stores all of them."""

    network: TrainableNetwork
    weights: TrainedWeights
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler | None
    scaler: torch.amp.GradScaler
    group_names: Sequence[str]  # of the optimizer's parameter groups, for the log

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Within it the network is as in its file: without dropouts, with averaged weights."""
        try:
            self.network.eval()
            with averaged_weights(self.optimizer):
                self.weights.publish()
                yield
        finally:
            self.weights.publish()
            self.network.train()

    def tensors(self) -> dict[str, Any]:
        """Return the content of `state.pt`."""
        schedule = {} if self.scheduler is None else self.scheduler.state_dict()
        return {
            "network": self.network.state_dict(),
            "masters": self.weights.hidden_masters(),
            "optimizer": self.optimizer.state_dict(),
            "optimizer_class": type(self.optimizer).__qualname__,
            "schedule": {name: value for name, value in schedule.items() if name != "lr_lambdas"},
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, tensors: dict[str, Any]) -> None:
        """Load the content of `state.pt`; raises UserError if it does not fit."""
        try:
            made_by, own = tensors.get("optimizer_class"), type(self.optimizer).__qualname__
            own_groups = self.optimizer.param_groups
            if made_by not in (None, own):  # torch would load values of another meaning
                raise ValueError(f"its optimizer is {made_by}, this one {own}")
            self.network.load_state_dict(tensors["network"])
            self.weights.restore(tensors.get("masters"))  # states of older versions have none
            saved, here = (_num_parameters(groups) for groups in (tensors["optimizer"]["param_groups"], own_groups))
            if saved != here:  # those of 8-bit optimizers were apart in older versions
                raise ValueError(f"its optimizer has {saved} tensors, this one {here}: another network or version")
            self.optimizer.load_state_dict(tensors["optimizer"])
            if self.scheduler is not None:
                lambdas = {"lr_lambdas": [None] * len(self.optimizer.param_groups)}
                self.scheduler.load_state_dict(tensors["schedule"] | lambdas)
                follow_schedule(self.optimizer, self.scheduler)
            if tensors["scaler"]:  # empty of a run in bf16 or float32, which has no scale to go on with
                self.scaler.load_state_dict(tensors["scaler"])
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            if is_out_of_memory(error):
                raise
            raise UserError(
                f"--resume: the state does not fit this run ({message_of(error)}); use the options it has"
            ) from None


def follow_schedule(optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler) -> None:
    """Give the next step the rate of the schedule, which is another than the state's if the run is longer by now."""
    if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        for group, base, rule in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = base * rule(scheduler.last_epoch)


def _num_parameters(groups: Sequence[Mapping[str, Any]]) -> int:
    return sum(len(group["params"]) for group in groups)


def begin(plan: RunPlan, resumed: Path | None) -> Progress:
    """Return the progress at the start of a run, with the losses and previews of the resumed state."""
    before = Progress(0, 0, plan.seed) if resumed is None else read_progress(resumed)
    return Progress(
        step=plan.start_step,
        epoch=-(-plan.start_step // plan.steps_per_epoch),
        seed=plan.seed,
        losses=deque(before.losses, maxlen=plan.batches_per_epoch),
        num_skipped=before.num_skipped,
        best=before.best,
        columns=[(label, files) for label, files in before.columns if all(file.is_file() for file in files)],
    )


def write_state(folder: Path, state: TrainState, progress: Progress, options: str) -> None:
    """Write a state under a temporary name and rename it; replaces a state of the same name."""
    with new_folder(folder, replace=True) as temporary:
        torch.save(state.tensors(), temporary / TENSOR_FILE)
        (temporary / POSITION_FILE).write_text(json.dumps(_record(progress)), encoding="utf-8")
        (temporary / OPTIONS_FILE).write_text(options, encoding="utf-8")


def _record(progress: Progress) -> dict[str, Any]:
    return {
        "version": FORMAT_VERSION,
        "current_step": progress.step,
        "current_epoch": progress.epoch,
        "seed": progress.seed,
        "losses": list(progress.losses),
        "columns": [(label, [str(file) for file in files]) for label, files in progress.columns],
        "num_skipped": progress.num_skipped,
        "best": progress.best,
    }


def find_state(resume: str, saving: SavingConfig) -> Path | None:
    """Return the state of --resume; for "auto" the one with the most steps under this output name, or None."""
    if resume != "auto":
        check_state(Path(resume))
        return Path(resume)
    name = saving.output_name or ""
    found = []
    for folder in sorted(saving.output_dir.glob(f"{name}*-state")) if saving.output_dir.is_dir() else []:
        rest = folder.name.removesuffix("-state").removeprefix(saving.output_name or "")
        if saving.output_name is None or rest == "" or rest.lstrip("-").removeprefix("step").isdecimal():
            try:
                found.append((read_progress(folder).step, folder))
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
    """Raise UserError for a folder that is not a state, or whose tensors are damaged."""
    read_progress(folder)
    path = folder / TENSOR_FILE
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"--resume: {path} is damaged ({message_of(error)}); take another state") from None
    if damaged is not None:
        raise UserError(f"--resume: {path} is damaged (checksum of {damaged}); take another state")


def read_progress(folder: Path) -> Progress:
    """Return the progress of a state; raises UserError for a folder that is not a state of this suite."""
    path = folder / POSITION_FILE
    if not path.is_file() or not (folder / TENSOR_FILE).is_file():
        raise UserError(f"--resume: {folder} is no state of this suite: it has no {POSITION_FILE} or no {TENSOR_FILE}")
    try:
        record = dict(json.loads(path.read_text(encoding="utf-8")))
        if record.pop("version") != FORMAT_VERSION:
            raise UserError(f"--resume: {folder} was written by another version of the suite")
        return Progress(
            step=_count(record, "current_step"),
            epoch=_count(record, "current_epoch"),
            seed=_count(record, "seed"),
            losses=deque(float(loss) for loss in record["losses"]),
            num_skipped=_count(record, "num_skipped") if "num_skipped" in record else 0,  # not in older states
            best=_best(*record["best"]) if record.get("best") else None,
            columns=[(str(label), [Path(str(file)) for file in files]) for label, files in record["columns"]],
        )
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"--resume: {path} is damaged ({message_of(error)}); take another state") from None


def _count(record: dict[str, Any], name: str) -> int:
    if type(record[name]) is not int or record[name] < 0:
        raise ValueError(f"{name} is {shown(record[name])}")
    return record[name]


def _best(loss: Any, step: Any) -> tuple[float, int]:
    return float(loss), int(step)


def read_tensors(folder: Path) -> dict[str, Any]:
    """Return the content of `state.pt`, read without running code of the pickle."""
    return load_pickle(folder / TENSOR_FILE, needs_all=True)
