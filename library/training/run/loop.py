"""The training loop: epochs, steps (`run.step`), and the events between them (`run.events`)."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Iterable, Sequence

from library.data.batches import Batch, RunPlan, load_batches
from library.networks.trainable import TrainableNetwork
from library.progress import Bar
from library.training.run.events import At, Event, Moment, Needs, due, happen, needing, telling_errors
from library.training.run.interruption import StopRequest
from library.training.run.progress import Progress, StepSeconds, Waits, timed
from library.training.run.runtime import Runtime
from library.training.run.step import OptimizerStep, PendingStep, StepResult


def run(
    step: OptimizerStep,
    network: TrainableNetwork,
    loader: Iterable[Batch],
    *,
    plan: RunPlan,
    progress: Progress,
    events: Sequence[Event],
    runtime: Runtime,
    stop: StopRequest,
) -> None:
    """Train from the step of progress to the last step of the plan.

    While a device works on a step, the host reads the results of the one before and prepares the next one. Raises
    KeyboardInterrupt after the events of a step if a signal asked the run to stop, and at once before the first.
    """
    network.on_epoch_start()
    happen(events, Moment(At.START, progress))
    bar: Bar[None] = Bar(
        total=plan.num_steps,
        initial=plan.start_step,
        desc="training",
        unit="step",
        disable=not runtime.is_main,
        smoothing=0.1,
    )
    under_way: deque[tuple[PendingStep, StepSeconds]] = deque()
    waits = Waits()

    def settle(left: int) -> None:
        """Wait for the results of all steps but the last ones."""
        while len(under_way) > left:
            result, seconds = end(*under_way.popleft())
            progress.losses.extend(result.losses)
            progress.num_skipped = result.num_skipped
            bar.note(f"avr_loss={progress.average_loss:.4g}")
            bar.update()
            happen(needing(events, Needs.RESULTS), Moment(At.STEP, progress, result, seconds=seconds))

    def stop_if_asked() -> None:
        if stop.asked(runtime) and progress.step < plan.num_steps:  # after the last step the run ends as usual
            settle(0)
            happen(events, Moment(At.STOP, progress))
            raise KeyboardInterrupt

    telling = telling_errors(events, progress)
    with telling, bar, stop.finishing_steps(), contextlib.closing(load_batches(loader)) as batches:
        pairs = zip(plan, waits.of(batches), strict=True)
        for epoch, in_epoch in itertools.groupby(pairs, key=lambda pair: pair[0].epoch):
            progress.epoch = epoch
            network.on_epoch_start()
            for number, micro_batches in itertools.groupby(in_epoch, key=lambda pair: pair[0].step):
                under_way.append(begin(step, number, [batch for _, batch in micro_batches], waits))
                progress.step = number + 1
                points = points_after(progress.step, plan)
                moment = Moment(At.STEP, progress, None, points)
                waiting = due(needing(events, Needs.ALL), moment)
                settle(0 if waiting or At.EPOCH in points else 1)
                happen([event for event in events if event in waiting or event.needs is Needs.NOTHING], moment)
                if At.EPOCH not in points:
                    stop_if_asked()
            happen(events, Moment(At.EPOCH, progress, None, points_after(progress.step, plan)))
            stop_if_asked()  # after the events, so that a complete epoch has its file
        bar.close()  # before the last lines of the log
        happen(events, Moment(At.END, progress, None, points_after(progress.step, plan)))


def points_after(step: int, plan: RunPlan) -> tuple[At, ...]:
    """Return the points of the run after a number of steps, in their order."""
    is_last = step == plan.num_steps
    epoch = (At.EPOCH,) if is_last or step % plan.steps_per_epoch == 0 else ()
    return (At.STEP, *epoch, *((At.END,) if is_last else ()))


def begin(step: OptimizerStep, number: int, batches: list[Batch], waits: Waits) -> tuple[PendingStep, StepSeconds]:
    """Begin a step (from 0); return it with the seconds so far."""
    waited = waits.taken()
    begun, seconds = timed(lambda: step(number, batches))
    return begun, StepSeconds(waited + seconds, waited)


def end(begun: PendingStep, so_far: StepSeconds) -> tuple[StepResult, StepSeconds]:
    """Wait for a step; return its results and all its seconds."""
    result, seconds = timed(begun.result)
    return result, so_far._replace(step=so_far.step + seconds)
