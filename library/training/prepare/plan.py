"""The start and the length of a run: the state to resume, the seed, the plan of its steps."""

from __future__ import annotations

import dataclasses
import logging
import os
import random
from pathlib import Path

from library.config.hub import HubConfig, parse_hub_state
from library.config.saving import SavingConfig, StateConfig
from library.config.training import RunConfig
from library.data.batches import RunPlan
from library.data.records import Dataset
from library.errors import UserError
from library.training.record.run_files import RunFiles
from library.training.record.upload import fetch_state
from library.training.run.runtime import Runtime
from library.training.run.state import find_state, read_progress

logger = logging.getLogger(__name__)

DOWNLOADED = "from_hub"  # folder in --output_dir for states from the hub


def find_resumed(resume: str | None, saving: SavingConfig, hub: HubConfig, runtime: Runtime) -> Path | None:
    """Return the state to resume; the first process downloads one that is on the Hub."""
    if resume is None or not hub.resume_from_huggingface:
        return find_state(resume, saving) if resume else None
    place = parse_hub_state(resume)
    folder = saving.output_dir / DOWNLOADED / place.name
    if runtime.is_main:
        fetch_state(place, hub, folder)
    runtime.barrier()
    return find_state(str(folder), saving)


def choose_seed(given: int | None, resumed: Path | None) -> int:
    """Return the seed of the options, else of the resumed state, else a new one."""
    if resumed is not None:
        seed = read_progress(resumed).seed
        if given not in (None, seed):
            logger.warning("--seed %d is not that of the state, %d: the run goes on otherwise", given, seed)
        return seed if given is None else given
    return random.SystemRandom().randrange(2**32) if given is None else given


def warn_of_split(given: int | None, seed: int, datasets: list[Dataset], resumed: Path | None) -> None:
    """Warn of a resumed run that holds out other pictures than before, if it began with a seed and has none now."""
    by_seed = any(dataset.held_out and dataset.options.validation_seed is None for dataset in datasets)
    if given is None and resumed is not None and by_seed:
        logger.warning(
            "--resume without --seed: the held-out pictures are those of the seed 0. If the run began with --seed %d, "
            "give it again, because others were held out then",
            seed,
        )


def start_step(state: StateConfig, saving: SavingConfig, resumed: Path | None, steps_per_epoch: int) -> int:
    """Return the number of steps made before this run."""
    if state.initial_step is not None:
        return state.initial_step
    if state.initial_epoch is not None:
        return (state.initial_epoch - 1) * steps_per_epoch
    if state.resume and resumed is None:
        logger.info("--resume auto: no state of %s yet; the run begins", saving.output_name or "this name")
    return 0 if resumed is None else read_progress(resumed).step


def plan_steps(run: RunConfig, datasets: list[Dataset], seed: int, *, rank: int = 0, num_processes: int = 1) -> RunPlan:
    """Return the plan of a whole run for one process; --max_train_epochs overrides --max_train_steps."""
    plan = RunPlan(
        datasets=datasets,
        seed=seed,
        num_steps=run.max_train_steps,
        accumulation=run.gradient_accumulation_steps,
        rank=rank,
        num_processes=num_processes,
    )
    if run.max_train_epochs is not None:
        plan = dataclasses.replace(plan, num_steps=run.max_train_epochs * plan.steps_per_epoch)
    return plan


def resume_plan(plan: RunPlan, state: StateConfig, saving: SavingConfig, resumed: Path | None) -> RunPlan:
    """Return the plan from the step of the resumed state, or of the options; raises UserError if no step is left."""
    plan = dataclasses.replace(plan, start_step=start_step(state, saving, resumed, plan.steps_per_epoch))
    # A run that was stopped after its last step, before its file, has only the file left to write.
    is_through = RunFiles(saving).network.exists()
    if plan.start_step > plan.num_steps or (plan.start_step == plan.num_steps and is_through):
        raise UserError(
            f"nothing is left to train: {plan.start_step} steps are made, and {plan.num_steps} are asked for"
        )
    if plan.start_step:
        logger.info(
            "goes on after step %d of %d%s", plan.start_step, plan.num_steps, f" from {resumed}" if resumed else ""
        )
    return plan


def num_workers(most: int, *, is_cached: bool) -> int:
    """Return the number of processes that load pictures, at most `most`; 0 with cached latents."""
    return 0 if is_cached else min(most, max(0, (os.cpu_count() or 1) - 1))
