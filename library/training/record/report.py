"""What a run tells a person: at the start in numbers what it will do, at the end whether it learned."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

from library.data.batches import RunPlan, samples_by_bucket
from library.data.records import Dataset
from library.networks.trainable import TrainableNetwork
from library.training.charts.loss_curve import draw_loss_curve
from library.training.record.run_files import RunFiles, state_folder
from library.training.run.events import At, Moment

logger = logging.getLogger(__name__)

MOST_BUCKETS = 12  # listed one by one


def describe_data(datasets: list[Dataset]) -> None:
    """Log pictures, repeats and buckets of each dataset."""
    for index, dataset in enumerate(datasets):
        training = [record for record in dataset.records if not record.subset.is_reg]
        regularisation = len(dataset.records) - len(training)
        width, height = dataset.options.size
        logger.info(
            "dataset %d: %d pictures (%d with repeats)%s at %dx%d, batches of %d",
            index + 1,
            len(training),
            dataset.num_images(is_reg=False),
            f" and {regularisation} for regularisation ({dataset.num_images(is_reg=True)})" if regularisation else "",
            width,
            height,
            dataset.options.batch_size,
        )
        buckets = sorted(samples_by_bucket(dataset, index).items())
        if dataset.options.enable_bucket:
            listed = ", ".join(f"{w}x{h}: {len(samples)}" for (w, h), samples in buckets[:MOST_BUCKETS])
            more = f" and {len(buckets) - MOST_BUCKETS} more" if len(buckets) > MOST_BUCKETS else ""
            logger.info("  buckets: %s%s", listed, more)


def describe_run(plan: RunPlan, network: TrainableNetwork, names: Sequence[str], final: Path) -> None:
    """Log steps, epochs, what is trained and where the file will be."""
    parameters = sum(parameter.numel() for parameter in network.parameters())
    modules = len(network.delta_norms())
    logger.info(
        "adapter: %s%s trained parameters in %s",
        f"{modules} modules, " if modules else "",
        f"{parameters:,}",
        ", ".join(names),
    )
    logger.info(
        "steps: %d in %d epoch%s of %d batches%s%s",
        plan.num_steps,
        plan.num_epochs,
        "" if plan.num_epochs == 1 else "s",
        plan.batches_per_epoch,
        f", {plan.accumulation} to a step" if plan.accumulation > 1 else "",
        f", on each of {plan.num_processes} processes" if plan.num_processes > 1 else "",
    )
    logger.info("seed %d; the file will be %s", plan.seed, final)


def describe_result(network: TrainableNetwork, final: Path) -> None:
    """Log how much of the adapter changed, and where it is; warn if nothing did."""
    norms = network.delta_norms()
    if norms:
        learned = [norm for norm in norms if norm > 0]
        report = logger.info if learned else logger.warning
        report(
            "learned: %d of %d modules (%.0f %%) changed; norm of a change from %.3g to %.3g",
            len(learned),
            len(norms),
            100 * len(learned) / len(norms),
            min(learned, default=0.0),
            max(norms),
        )
    logger.info("saved %s", final)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What is told once the steps are over; only the first process tells it."""

    network: TrainableNetwork
    files: RunFiles
    is_main: bool

    def tell(self, moment: Moment) -> None:
        """Log how a run ended that is through, or how one goes on that was stopped; plot its loss."""
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
        if draw_loss_curve(self.files.metrics, self.files.loss_curve):
            logger.info("course of the loss: %s", self.files.loss_curve)
