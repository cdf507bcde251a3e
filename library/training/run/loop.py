"""The loop of a training: epochs, steps, and what happens between them. `step` has a step, `events` the rest."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from tqdm import tqdm

from library.data.batches import Batch, RunPlan
from library.networks.trainable import TrainableNetwork
from library.training.run.events import At, Event, Moment, happen
from library.training.run.interruption import StopRequest
from library.training.run.progress import Progress
from library.training.run.runtime import Runtime
from library.training.run.step import Step


def run(
    step: Step,
    network: TrainableNetwork,
    loader: Iterable[Batch],
    *,
    plan: RunPlan,
    progress: Progress,
    events: Sequence[Event],
    runtime: Runtime,
) -> None:
    """Train from where progress is to the last step of the plan.

    Raises KeyboardInterrupt after a step, once its events have happened, if a signal asked the run to stop.
    """
    network.on_epoch_start()
    happen(events, Moment(At.START, progress))
    batches = zip(plan, loader, strict=True)
    with _progress_bar(plan, runtime) as bar, StopRequest() as stop:

        def stop_if_asked() -> None:
            if stop.asked(runtime) and progress.step < plan.num_steps:  # a run that is through ends as usual
                happen(events, Moment(At.STOP, progress))
                raise KeyboardInterrupt

        for epoch, in_epoch in itertools.groupby(batches, key=lambda pair: pair[0].epoch):
            progress.epoch = epoch
            network.on_epoch_start()
            for number, micro_batches in itertools.groupby(in_epoch, key=lambda pair: pair[0].step):
                result = step(number, [batch for _, batch in micro_batches])
                progress.advance(number, result.losses)
                bar.update()
                bar.set_postfix(avr_loss=f"{progress.average_loss:.4g}", refresh=False)
                happen(events, Moment(At.STEP, progress, result))
                if progress.step % plan.steps_per_epoch:
                    stop_if_asked()
            happen(events, Moment(At.EPOCH, progress))
            stop_if_asked()  # only now, so that a whole epoch has its file and its pictures
    happen(events, Moment(At.END, progress))


def _progress_bar(plan: RunPlan, runtime: Runtime) -> tqdm:
    return tqdm(
        total=plan.num_steps,
        initial=plan.start_step,
        desc="steps",
        disable=not runtime.is_main,
        smoothing=0.1,
    )
