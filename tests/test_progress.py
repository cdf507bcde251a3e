"""Progress: a bar on a terminal, lines of the log elsewhere."""

from __future__ import annotations

import io
import logging

import pytest

from library import progress
from library.progress import Bar, step_shown_on


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def wait(monkeypatch):
    """Return what lets seconds pass."""
    passed = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: passed[0])
    return lambda seconds: passed.__setitem__(0, passed[0] + seconds)


def lines(caplog):
    return [record.getMessage() for record in caplog.records]


def test_quick_work_says_nothing_in_a_file(wait, caplog, capsys):
    caplog.set_level(logging.INFO)
    for _ in Bar(range(10), total=10, desc="merging", unit="tensor"):
        wait(0.1)
    assert lines(caplog) == []
    assert capsys.readouterr().err == ""


def test_long_work_says_a_line_after_a_tenth_and_at_the_end(wait, caplog):
    caplog.set_level(logging.INFO)
    bar: Bar[None]
    with Bar(total=40, desc="training", unit="step", initial=10) as bar:
        for _ in range(30):
            wait(3)
            bar.note("avr_loss=0.5")
            bar.update()
    assert lines(caplog) == [
        *(
            f"training: {step} of 40 steps, {left} left, avr_loss=0.5"
            for step, left in [
                *(
                    (14, "1 min 18 s"),
                    (18, "1 min 6 s"),
                    (22, "54.0 s"),
                    (26, "42.0 s"),
                    (30, "30.0 s"),
                    (34, "18.0 s"),
                ),
                (38, "6.0 s"),
            ]
        ),
        "training: 40 of 40 steps, in 1 min 30 s, avr_loss=0.5",
    ]


def test_slow_pictures_say_their_step(wait, caplog):
    caplog.set_level(logging.INFO)
    bar: Bar[None]
    with Bar(total=2, desc="drawing", unit="picture") as bar:
        for step in range(1, 51):
            wait(1)
            step_shown_on(bar)(step, 50)
        bar.update()
    assert lines(caplog)[0] == "drawing: 0 of 2 pictures, step 30 of 50"
    assert lines(caplog)[1].startswith("drawing: 1 of 2 pictures, 50.0 s left")


def test_nothing_is_said_of_what_leaves_nothing_or_is_disabled(wait, caplog):
    caplog.set_level(logging.INFO)
    bar: Bar[None]
    for disable in (True, False):
        with Bar(total=3, desc="x", unit="step", leave=False, disable=disable) as bar:
            wait(31 if disable else 6)
            bar.update()
            wait(1)
            bar.update()
    assert lines(caplog) == ["x: 1 of 3 steps, 12.0 s left"]


def test_a_terminal_has_a_bar(monkeypatch, caplog, capsys):
    caplog.set_level(logging.INFO)
    terminal = Terminal()
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    bar = Bar(range(4), total=4, desc="drawing", unit="picture")
    for number in bar:
        step_shown_on(bar)(number, 4)
        bar.write("a line")
    assert "100%" in terminal.getvalue()
    assert "step 3 of 4" in terminal.getvalue()
    assert capsys.readouterr().out == "a line\n" * 4
    assert lines(caplog) == []
