"""Log lines about a run: its data and steps at the start, what changed at the end."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path

from library.adapters.alphas import note_on_alphas
from library.config.prompts import Prompt
from library.config.train import TrainConfig
from library.data.batches import RunPlan, count_draws
from library.data.records import Dataset
from library.networks.trainable import TrainableNetwork
from library.training.charts.loss_curve import plot_loss_curve
from library.training.charts.series import read_metrics
from library.training.record.next_steps import commands_after_end, go_on_command, keys_to_give
from library.training.record.run_files import RunFiles
from library.training.run.events import At, Moment
from library.training.run.progress import Progress
from library.words import counted, duration, in_bytes

logger = logging.getLogger(__name__)

MOST_BUCKETS = 12  # listed one by one


def describe_data(datasets: list[Dataset]) -> None:
    """Log the pictures, repeats and buckets of each dataset."""
    for index, dataset in enumerate(datasets):
        training = [record for record in dataset.records if not record.subset.is_reg]
        regularisation = len(dataset.records) - len(training)
        pictures = f"{len(training)} pictures ({dataset.num_images(is_reg=False)} with repeats)"
        if regularisation:
            pictures += f" and {regularisation} for regularisation ({dataset.num_images(is_reg=True)})"
        size, batch_size = "{}x{}".format(*dataset.options.size), dataset.options.batch_size
        logger.info("dataset %d: %s at %s, batches of %d", index + 1, pictures, size, batch_size)
        buckets = list(count_draws(dataset).items())
        if dataset.options.enable_bucket:
            listed = ", ".join(f"{w}x{h}: {draws}" for (w, h), draws in buckets[:MOST_BUCKETS])
            more = f" and {len(buckets) - MOST_BUCKETS} more" if len(buckets) > MOST_BUCKETS else ""
            logger.info("  buckets: %s%s", listed, more)


def describe_run(plan: RunPlan, network: TrainableNetwork, names: Sequence[str], final: Path) -> None:
    """Log the number of parameters, the steps and epochs, the seed and the path of the file."""
    parameters = sum(parameter.numel() for parameter in network.parameters())
    number = len(network.delta_norms())
    modules = f"{number} modules, " if number else ""
    logger.info("adapter: %s%s trained parameters in %s", modules, f"{parameters:,}", ", ".join(names))
    warn_of_alphas(network)
    steps = f"{plan.num_steps} in {counted(plan.num_epochs, 'epoch')}"
    batches = f"{plan.batches_per_epoch} batches"
    batches += f", {plan.accumulation} to a step" if plan.accumulation > 1 else ""
    batches += f", on each of {plan.num_processes} processes" if plan.num_processes > 1 else ""
    logger.info("steps: %s of %s", steps, batches)
    logger.info("seed %d; the file will be %s", plan.seed, final)


def warn_of_alphas(network: TrainableNetwork) -> None:
    """Warn if diffusers will misread the alphas of the network's files."""
    note = note_on_alphas(network.file_alphas())
    if note is not None:
        logger.warning("%s", note)


def describe_result(network: TrainableNetwork, final: Path) -> None:
    """Log how many modules of the adapter changed, and the path and size of its file; warn if none did."""
    norms = network.delta_norms()
    if norms:
        changed = [norm for norm in norms if norm > 0]
        share = f"{len(changed)} of {len(norms)} modules ({100 * len(changed) / len(norms):.0f} %)"
        level, smallest = logging.INFO if changed else logging.WARNING, min(changed, default=0.0)
        logger.log(level, "learned: %s changed; norm of a change from %.3g to %.3g", share, smallest, max(norms))
    warn_of_alphas(network)
    logger.info("saved %s (%s)", final, in_bytes(final.stat().st_size))


def describe_course(plan: RunPlan, progress: Progress, averages: Sequence[tuple[int, float]], seconds: float) -> None:
    """Log how long the steps took, and the losses at the end and where they were lowest.

    averages are (step, loss) of the epochs.
    """
    steps = progress.step - plan.start_step
    drawn = steps * sum(dataset.num_draws for dataset in plan.datasets) / plan.steps_per_epoch
    rate = drawn / max(seconds, 1e-3)
    logger.info(
        "trained %d steps in %s, %.3g pictures a second, with previews and files", steps, duration(seconds), rate
    )
    parts = [f"{progress.average_loss:.4g} at the end"] if not math.isnan(progress.average_loss) else []
    if len(averages) > 1:
        step, loss = min(averages, key=lambda point: point[1])
        parts.append(f"{loss:.4g} in the epoch to step {step}, the lowest average of an epoch")
    if progress.best is not None:
        loss, step = progress.best
        parts.append(f"validation {loss:.4g} after step {step}, its lowest")
    if parts:
        logger.info("loss: %s", "; ".join(parts))


class Outcome:
    """Logs the outcome of a run after its steps, on the first process only; it is made when they begin."""

    def __init__(
        self,
        config: TrainConfig,
        prompts: Sequence[Prompt],
        plan: RunPlan,
        network: TrainableNetwork,
        *,
        is_main: bool,
    ) -> None:
        self._config, self._prompts, self._plan, self._network = config, prompts, plan, network
        self._files, self._is_main, self._begun = RunFiles(config.saving), is_main, time.monotonic()

    def log(self, moment: Moment) -> None:
        """Log the result of a finished run and plot its loss, or log how to resume a stopped run."""
        if not self._is_main:
            return
        progress, files, processes = moment.progress, self._files, self._plan.num_processes
        if moment.at is At.STOP:
            path = files.after_step(progress.step)
            logger.warning("stopped after step %d: what was learned is in %s", progress.step, path)
            command = go_on_command(self._config, path, progress.step, processes)
            logger.warning("this goes on%s: %s", keys_to_give(self._config), command)
            return
        if progress.step > self._plan.start_step:
            averages = read_metrics(files.metrics).epochs
            describe_course(self._plan, progress, averages, time.monotonic() - self._begun)
        describe_result(self._network, files.network)
        if progress.columns:
            logger.info("pictures: %s", files.contact_sheet)
        if plot_loss_curve(files.metrics, files.loss_curve):
            logger.info("course of the loss: %s", files.loss_curve)
        after = commands_after_end(self._config, self._plan.datasets, self._prompts, progress.step, processes)
        for title, command in after.items():
            logger.info("%s:\n  %s", title, command)
