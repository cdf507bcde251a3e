"""Keeps the record of a run (`facts`) up to date, and writes its page from it and the other files of the run."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import math
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil
import torch

from library import NAME, VERSION
from library.adapters.layers import Block, block_of
from library.config.prompts import Prompt
from library.data.batches import BatchMaker, RunPlan
from library.errors import UserError
from library.training.page.data_facts import captions_of, describe_dataset, describe_tags, relative
from library.training.page.facts import Column, Facts, Memory, Save, State, read_facts, write_facts
from library.training.page.gather import gather
from library.training.page.page import write_page
from library.training.page.sections import seconds_trained
from library.training.record.checkpoints import Checkpoints
from library.training.run.events import At, Moment
from library.training.run.progress import Progress
from library.words import counted

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors")
MOST_WARNINGS = 50
STATES: dict[At, State] = {At.END: "finished", At.STOP: "stopped", At.ERROR: "failed"}


def first_facts(
    checkpoints: Checkpoints, plan: RunPlan, maker: BatchMaker, prompts: Sequence[Prompt], device: torch.device
) -> Facts:
    """Return what is known before the first step; a resumed run goes on from the record of its earlier parts."""
    files, network = checkpoints.files, checkpoints.state.network
    folder = files.saving.output_dir
    before = earlier_facts(files.record, plan.start_step) if plan.start_step else Facts()
    tags, num_tags = describe_tags(plan.datasets)
    return dataclasses.replace(
        before,
        state="running",
        began=round(time.time(), 3),
        first_step=plan.start_step,
        step=plan.start_step,
        steps=plan.num_steps,
        epochs=plan.num_epochs,
        steps_per_epoch=plan.steps_per_epoch,
        batches_to_a_step=plan.accumulation,
        processes=plan.num_processes,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        prompts=tuple(prompt.prompt for prompt in prompts),
        datasets=tuple(describe_dataset(dataset, folder) for dataset in plan.datasets),
        tags=tags,
        num_tags=num_tags,
        captions=before.captions or captions_of(plan, maker, folder),
        device=device_name(device),
        versions={
            NAME: VERSION,
            "Python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
            "system": platform.platform(),
        },
    )


def earlier_facts(path: Path, step: int) -> Facts:
    """Return the record of what was before a step; an empty one if there is none, or it cannot be read."""
    if not path.is_file():
        return Facts()
    try:
        facts = read_facts(path)
    except (UserError, OSError) as error:
        logger.warning("the page of the run begins anew: %s", error)
        return Facts()
    return dataclasses.replace(
        facts,
        seconds_before=seconds_trained(facts) or 0.0,
        saves=tuple(save for save in facts.saves if save.step <= step),
    )


class Recorder:
    """Writes the record and the page of a run; the first process has it alone."""

    def __init__(
        self, facts: Facts, checkpoints: Checkpoints, device: torch.device, warnings: Sequence[str] = ()
    ) -> None:
        """Begin a part of the run; warnings may grow while it lasts."""
        self._checkpoints, self._device, self._warnings = checkpoints, device, warnings
        self._files, self._state = checkpoints.files, checkpoints.state
        self._facts, self._earlier_warnings = facts, facts.warnings

    def write(self, moment: Moment) -> None:
        """Write what the record and the page tell at a moment; where that fails, only warn."""
        self._facts = self._at(moment)
        try:
            write_facts(self._files.record, self._facts)
            write_page(gather(self._files.saving.output_dir, self._files.name), self._files.page)
        except (OSError, UserError) as error:  # what was trained is worth more than its page
            logger.warning("the page of the run was not written: %s", error)
            return
        if moment.at is not At.STEP and moment.at is not At.EPOCH:
            logger.info("the page of this run: %s", self._files.page)

    def _at(self, moment: Moment) -> Facts:
        progress = moment.progress
        saves = self._facts.saves
        if self._checkpoints.due.is_due(moment):
            save = self._save(moment)
            saves = (*(one for one in saves if one.file != save.file), save)
        return dataclasses.replace(
            self._facts,
            state=STATES.get(moment.at, "running"),
            error=moment.error,
            updated=round(time.time(), 3),
            step=progress.step,
            epoch=progress.epoch,
            best=progress.best,
            columns=columns_of(progress, self._facts, self._files.saving.output_dir),
            saves=saves,
            warnings=tuple(dict.fromkeys([*self._earlier_warnings, *self._warnings]))[:MOST_WARNINGS],
            memory=peak_memory(self._device),
        )

    def _save(self, moment: Moment) -> Save:
        with self._state.evaluation():
            changes, by_rank = self._state.network.changes(), self._state.network.rank_norms()
        return Save(
            file=self._checkpoints.path_at(moment).name,
            step=moment.progress.step,
            epoch=self._checkpoints.epochs_at(moment),
            norms_by_block=norms_by(block_label, changes),
            norms_by_kind=norms_by(kind_label, changes),
            norms_by_rank={str(rank): rounded(norm) for rank, norm in by_rank.items()},
        )


def columns_of(progress: Progress, facts: Facts, folder: Path) -> tuple[Column, ...]:
    """Return the previews so far."""
    return tuple(
        Column(
            label=label,
            step=step_of(label, facts.steps_per_epoch or 1, facts.steps or 0),
            pictures=tuple(relative(path, folder) for path in paths),
        )
        for label, paths in progress.columns
    )


def step_of(label: str, steps_per_epoch: int, num_steps: int) -> int:
    """Return the step of previews by their label: start, epoch N or step N."""
    kind, _, number = label.partition(" ")
    if kind == "start":
        return 0
    return int(number) if kind == "step" else min(int(number) * steps_per_epoch, num_steps)


# --------------------------------------------------------------------------------------------------------------
# Norms
# --------------------------------------------------------------------------------------------------------------

SIDES = {"in": "down", "out": "up"}  # word of checkpoints -> of the page
ORDER = ("text", "first", "in", "middle", "out", "last")
# Part of a module's name -> its kind; the first that is found counts.
KINDS = {
    "attn1": "self-attention",
    "attn2": "cross-attention",
    "ff_net": "feed-forward",
    "self_attn": "text attention",
    "mlp_fc": "text feed-forward",
    "emb": "time embedding",
    "proj_": "projections",
    "conv": "convolutions",
    "layers": "convolutions",  # of SDXL's names
    "op": "convolutions",
}


def block_label(module: str) -> str:
    """Return the block of a module: down 1 to 11, middle, up 0 to 11, as numbered in checkpoints."""
    block = block_of(module)
    return "other" if block is None else label_of(block)


def label_of(block: Block) -> str:
    """Return the name of a block."""
    name = SIDES.get(block.side, block.side)
    return f"{name} {block.number}" if block.side in SIDES else name


def kind_label(module: str) -> str:
    """Return what a module is in its block."""
    return next((kind for word, kind in KINDS.items() if word in module), "other")


def norms_by(group: Callable[[str], str], changes: Mapping[str, float]) -> dict[str, float]:
    """Return group -> norm of the changes in it together, in the order of computation for blocks."""
    squares: dict[str, float] = {}
    for module in sorted(changes, key=_order) if group is block_label else changes:
        squares[group(module)] = squares.get(group(module), 0.0) + changes[module] ** 2
    return {name: rounded(math.sqrt(square)) for name, square in squares.items()}


def _order(module: str) -> tuple[int, int]:
    block = block_of(module)
    return (len(ORDER), 0) if block is None else (ORDER.index(block.side), block.number)


def rounded(number: float) -> float:
    """Return a number with four digits."""
    return float(f"{number:.4g}")


# --------------------------------------------------------------------------------------------------------------
# The machine
# --------------------------------------------------------------------------------------------------------------


def device_name(device: torch.device) -> str:
    """Return the name of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.processor() or platform.machine()}), {counted(torch.get_num_threads(), 'thread')}"


def peak_memory(device: torch.device) -> Memory:
    """Return the most memory that this process took so far."""
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Memory(process=peak_of_process(), device=on_device)


def peak_of_process() -> int:
    """Return the most main memory that this process took so far, in bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
