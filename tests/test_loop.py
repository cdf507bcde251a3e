"""The training loop: what happens while a step is under way, and what waits for its results."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from library.training.run import loop
from library.training.run.events import At, Event, Every, Needs
from library.training.run.progress import Progress
from library.training.run.step import StepResult


class Steps:
    """Steps that note when they begin and when somebody waits for their results."""

    def __init__(self) -> None:
        self.noted: list[str] = []

    def __call__(self, step: int, batches: object) -> Any:
        self.noted.append(f"begin {step + 1}")

        def result() -> StepResult:
            self.noted.append(f"wait {step + 1}")
            return StepResult(step + 1, [float(step)], {}, {}, {}, num_skipped=step)

        return SimpleNamespace(result=result)


class Plan:
    """Two epochs of three steps, each of one batch."""

    num_steps, start_step, steps_per_epoch = 6, 0, 3

    def __iter__(self):
        return (SimpleNamespace(epoch=1 + step // 3, step=step) for step in range(6))


def trained(*events, steps=None, asked=lambda: False):
    """Run the plan with events; return what was noted and the progress at the end."""
    steps, progress = steps or Steps(), Progress(0, 0, 1)

    def noting(event: Event) -> Event:
        return event._replace(act=lambda moment: steps.noted.append(f"{event.name} {moment.progress.step}"))

    given: Any = {
        "step": steps,
        "network": SimpleNamespace(on_epoch_start=lambda: None),
        "loader": [object()] * 6,
        "plan": Plan(),
        "runtime": SimpleNamespace(is_main=False),
        "stop": SimpleNamespace(asked=lambda runtime: asked(), finishing_steps=pytest.MonkeyPatch.context),
    }
    loop.run(progress=progress, events=[noting(event) for event in events], **given)
    return steps.noted, progress


def event(name, due, needs=Needs.ALL):
    return Event(name, due, lambda moment: None, needs)


def test_results_are_read_when_the_next_step_is_under_way():
    noted, progress = trained()
    assert noted == [
        *("begin 1", "begin 2", "wait 1", "begin 3", "wait 2", "wait 3"),  # an epoch ends with all that is known of it
        *("begin 4", "begin 5", "wait 4", "begin 6", "wait 5", "wait 6"),
    ]
    assert list(progress.losses) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert (progress.step, progress.epoch, progress.num_skipped) == (6, 2, 5)


def test_what_needs_a_complete_step_finds_no_other_one_begun():
    noted, _ = trained(event("state", Every(2)))
    assert noted[:6] == ["begin 1", "begin 2", "wait 1", "wait 2", "state 2", "begin 3"]


def test_what_needs_results_or_nothing_keeps_no_step_waiting():
    noted, _ = trained(event("metrics", Every(1), Needs.RESULTS), event("captions", Every(1), Needs.NOTHING))
    assert noted[:8] == [
        *("begin 1", "captions 1", "begin 2", "wait 1", "metrics 2", "captions 2", "begin 3", "wait 2"),
    ]
    assert sum(text.startswith("metrics") for text in noted) == 6


def test_a_stop_comes_after_the_results_of_the_step():
    answers, steps = iter([False, True]), Steps()
    with pytest.raises(KeyboardInterrupt):
        trained(event("stop", Every(once=(At.STOP,))), steps=steps, asked=lambda: next(answers))
    assert steps.noted == ["begin 1", "begin 2", "wait 1", "wait 2", "stop 2"]
