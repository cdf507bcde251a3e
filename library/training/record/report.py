"""Log lines about a run: its data and steps at the start, what changed at the end."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

from library.adapters.alphas import note_on_alphas
from library.data.batches import RunPlan, count_draws
from library.data.records import Dataset
from library.networks.trainable import TrainableNetwork
from library.training.charts.loss_curve import plot_loss_curve
from library.training.record.run_files import RunFiles, state_folder
from library.training.run.events import At, Moment

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
    steps = f"{plan.num_steps} in {plan.num_epochs} epoch{'' if plan.num_epochs == 1 else 's'}"
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
    """Log how many modules of the adapter changed, and its path; warn if none did."""
    norms = network.delta_norms()
    if norms:
        changed = [norm for norm in norms if norm > 0]
        share = f"{len(changed)} of {len(norms)} modules ({100 * len(changed) / len(norms):.0f} %)"
        level, smallest = logging.INFO if changed else logging.WARNING, min(changed, default=0.0)
        logger.log(level, "learned: %s changed; norm of a change from %.3g to %.3g", share, smallest, max(norms))
    warn_of_alphas(network)
    logger.info("saved %s", final)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Logs the outcome of a run after its steps, on the first process only."""

    network: TrainableNetwork
    files: RunFiles
    is_main: bool

    def log(self, moment: Moment) -> None:
        """Log the result of a finished run and plot its loss, or log how to resume a stopped run."""
        if not self.is_main:
            return
        if moment.at is At.STOP:
            path = self.files.after_step(moment.progress.step)
            logger.warning("stopped after step %d: what was learned is in %s", moment.progress.step, path)
            logger.warning("the same command with this goes on: --resume %s", state_folder(path))
            return
        describe_result(self.network, self.files.network)
        if moment.progress.columns:
            logger.info("pictures: %s", self.files.contact_sheet)
        if plot_loss_curve(self.files.metrics, self.files.loss_curve):
            logger.info("course of the loss: %s", self.files.loss_curve)
