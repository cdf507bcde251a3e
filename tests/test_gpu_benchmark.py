"""The report of benchmarks/gpu.py: parts that fail or hang hide nothing, the budget ends, and the page says it all."""

from __future__ import annotations

import json
import math
import operator
import os
import re
import sys
import time
import warnings
from types import SimpleNamespace

import psutil
import pytest
from scripts import ROOT, python

from benchmarks import gpu
from benchmarks.card import memory, page, rows, running, suite, traced
from benchmarks.card.parts import BY_NAME, MACHINE, PARTS
from benchmarks.card.rows import BAD, Row, RowFile
from benchmarks.card.running import Part, Report, run_parts
from benchmarks.card.setting import Setting

WRITES = """
import faulthandler, json, subprocess, sys, time
from benchmarks.card.running import TELLS_WHERE
if TELLS_WHERE is not None:
    faulthandler.register(TELLS_WHERE)
def row(name, verdict="equal", **values):
    with open(sys.argv[1], "a", encoding="utf-8") as file:
        file.write(json.dumps({{"name": name, "verdict": verdict, "values": values, "note": ""}}) + "\\n")
{then}
"""
PROCESSES = {
    "good": "row('one', speed=2.5)",
    "broken": "row('first'); raise SystemExit('no')",
    "hanging": "row('first')\n"
    "while True: subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); time.sleep(0.5)",
    "slow": "for at in range(600): row(f'row {at}'); time.sleep(0.05)",
    "cut": "row('whole'); open(sys.argv[1], 'a').write('{\"name\": \"ha')",
}


@pytest.fixture
def setting(tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    return Setting("cpu", tiny=True, quick=True, work=work)


def found(report):
    return {part["name"]: [(row["name"], row["verdict"]) for row in part["rows"]] for part in report.values["parts"]}


def run(names, setting, tmp_path, monkeypatch, *, limit=30.0, silence=30.0, seconds=60.0):
    """Run parts whose processes are short scripts; return the report."""
    monkeypatch.setattr(running, "SILENCE", {True: silence})
    monkeypatch.setattr(running, "LOOKED_AT_EVERY", 0.05)
    report = Report(tmp_path / "out", ["--quick"])
    parts = [Part(name, f"The {name} part", lambda setting: iter(()), limit, limit) for name in names]
    run_parts(
        parts,
        setting,
        report,
        lambda part, file: [sys.executable, "-c", WRITES.format(then=PROCESSES[part.name]), str(file)],
        seconds=seconds,
        tell=lambda text: None,
    )
    assert json.loads((tmp_path / "out" / "gpu.json").read_text(encoding="utf-8")) == report.values
    return report


def test_a_part_that_fails_or_hangs_hides_nothing(setting, tmp_path, monkeypatch):
    before = set(psutil.Process().children(recursive=True))  # those that torch keeps for other tests
    report = run(["broken", "hanging", "cut", "good"], setting, tmp_path, monkeypatch, silence=1.5)
    assert found(report) == {
        "broken": [("first", "equal"), ("the part", "failed")],
        "hanging": [("first", "equal"), ("what follows", "failed")],
        "cut": [("whole", "equal")],
        "good": [("one", "equal")],
    }
    assert report.has_faults
    log = (tmp_path / "out" / "logs" / "hanging.log").read_text(encoding="utf-8")
    assert running.TELLS_WHERE is None or 'most recent call first):\n  File "<string>", line' in log
    assert "ended with 1; see logs/broken.log" in report.values["parts"][0]["rows"][1]["note"]
    assert (tmp_path / "out" / "logs" / "broken.log").read_text(encoding="utf-8").strip() == "no"
    assert set(psutil.Process().children(recursive=True)) <= before, "what a part started is ended with it"


def test_a_slow_part_is_cut_without_a_fault_and_the_budget_ends(setting, tmp_path, monkeypatch):
    start = time.monotonic()
    monkeypatch.setattr(running, "SHORTEST", 1.0)
    report = run(["slow", "good"], setting, tmp_path, monkeypatch, seconds=1.5)
    assert time.monotonic() - start < 20
    slow, good = found(report).values()
    assert slow[0] == ("row 0", "equal")
    assert slow[-1] == ("what follows", "not run")
    assert good == [("The good part", "not run")]
    assert not report.has_faults


def test_a_part_has_no_more_than_its_share(setting, tmp_path, monkeypatch):
    report = run(["slow", "good"], setting, tmp_path, monkeypatch, limit=1.5)
    assert found(report)["slow"][-1] == ("what follows", "not run")
    assert found(report)["good"] == [("one", "equal")]


def test_parts_that_measure_no_time_run_at_once(setting, tmp_path):
    """Each waits for the other; the third begins when both are done."""
    meets = "import pathlib\n{own}.touch()\nwhile not {other}.exists(): time.sleep(0.02)\nrow('met')"
    one, other = (f"pathlib.Path({str(tmp_path / name)!r})" for name in ("one", "other"))
    scripts = {
        "one": meets.format(own=one, other=other),
        "other": meets.format(own=other, other=one),
        "alone": f"import pathlib\nassert {one}.exists() and {other}.exists()\nrow('last')",
    }
    report = Report(tmp_path / "out", [])
    parts = [Part(name, name, lambda setting: iter(()), 20, 20, beside_others=name != "alone") for name in scripts]
    run_parts(
        parts,
        setting,
        report,
        lambda part, file: [sys.executable, "-c", WRITES.format(then=scripts[part.name]), str(file)],
        seconds=60,
        at_once=2,
        tell=lambda text: None,
    )
    assert {name: rows[-1] for name, rows in found(report).items()} == {
        "one": ("met", "equal"),
        "other": ("met", "equal"),
        "alone": ("last", "equal"),
    }
    assert report.values["parts"][-1]["name"] == "alone"


def test_errors_of_a_check_become_rows():
    def fails(error):
        raise error

    assert rows.attempt("x", fails, rows.NotHere("no card")) == Row("x", "not run", note="no card")
    assert rows.attempt("x", fails, RuntimeError("CUDA error\nmore")) == Row(
        "x", "failed", note="RuntimeError: CUDA error"
    )
    assert rows.attempt("x", fails, AttributeError()) == Row("x", "failed", note="AttributeError")
    assert rows.attempt("x", Row, "x", "equal") == Row("x", "equal")
    assert rows.is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not rows.is_out_of_memory(RuntimeError("CUDA error: an illegal memory access"))


TRACES = {
    "the same": ([1.0, 2.0], [1.0, 2.0], 0.0, "equal"),
    "near": ([1.0, 2.002], [1.0, 2.0], 1e-3, "within bound"),
    "far": ([1.0, 3.0], [1.0, 2.0], 0.5, "differs"),
    "shorter": ([1.0], [1.0, 2.0], math.inf, "differs"),
    "nothing": ([], [], math.inf, "differs"),
    "left out": ([1.0, math.inf], [1.0, 2.0], math.inf, "differs"),
}


@pytest.mark.parametrize("case", TRACES)
def test_traces_are_compared_by_their_greatest_relative_difference(case):
    one, other, difference, verdict = TRACES[case]
    assert rows.greatest_difference(one, other) == pytest.approx(difference)
    row = rows.compared("x", rows.greatest_difference(one, other), 1e-2, {"steps": len(one)})
    assert (row.verdict, row.values["steps"]) == (verdict, len(one))


def test_page_has_every_value_with_its_unit_and_names_faults_first():
    found = [
        Row("ours | bf16", "measured", {"steps/s": 12.3456, "peak GiB": None}),
        Row("fp16", "differs", {"greatest difference": 0.25}, "bound 0.01"),
    ]
    part = {"name": "sd15", "title": "Speed", "seconds": 3.2, "rows": [row.__dict__ for row in found]}
    report = {"environment": {"card": "A card", "torch": "2.13"}, "ended": None, "parts": [part]}
    text = page.page(report)
    assert "**The report is not complete" in text
    assert "not complete" not in page.page(report | {"ended": "now"})
    assert text.index("- Speed: fp16: **differs** bound 0.01") < text.index("## Machine") < text.index("## Speed")
    assert "| card | A card |" in text
    assert "| what | verdict | steps/s | peak GiB | greatest difference | note |" in text
    assert "| ours \\| bf16 | measured | 12.35 |  |  |  |" in text
    assert "| fp16 | differs |  |  | 0.25 | bound 0.01 |" in text
    assert "2 rows: 1 differs, 1 measured." in text


def test_parts_have_names_of_their_own_and_mistakes_are_told(capsys):
    assert len(BY_NAME) == len(PARTS) + 1
    assert MACHINE not in PARTS
    for argv in (["--device", "cpu"], ["--only", "nothing"]):
        with pytest.raises(SystemExit) as end:
            gpu.main(argv)
        assert end.value.code == 2
    assert "--device cpu needs --tiny" in capsys.readouterr().err


def test_without_a_card_it_ends_with_exit_code_2(tmp_path):
    done = python(ROOT / "benchmarks" / "gpu.py", "--quick", "--output", tmp_path / "out", env=no_card())
    assert done.returncode == 2
    assert "torch sees no card" in done.stderr
    assert "torch" in json.loads((tmp_path / "out" / "gpu.json").read_text(encoding="utf-8"))["environment"]


def no_card():
    return os.environ | running.NO_CARD


def test_all_that_the_parts_call_is_in_this_torch():
    """Most of it is reached on a card only."""
    import torch

    folder = ROOT / "benchmarks" / "card"
    text = "\n".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    named = set(re.findall(r"\btorch\.((?:cuda|backends|profiler|amp|version)\.[\w.]+)", text))
    assert len(named) > 10
    for name in named:
        operator.attrgetter(name.removesuffix("."))(torch)


@pytest.mark.slow
def test_all_parts_run_here_with_tiny_models(tmp_path):
    """The parts of SDXL but its first do what those of SD 1.5 do."""
    chosen = [part.name for part in PARTS if not part.name.startswith("sdxl-")]
    words = ["--device", "cpu", "--tiny", "--quick", "--minutes", 30, "--output", tmp_path, "--only", *chosen]
    done = python(ROOT / "benchmarks" / "gpu.py", *words)
    assert done.returncode == 0, (tmp_path / "gpu.md").read_text(encoding="utf-8") + done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert [part["name"] for part in report["parts"]] == ["machine", *chosen]
    found = {part["name"]: part["rows"] for part in report["parts"]}
    assert all(found.values())
    assert not [row for part in found.values() for row in part if row["verdict"] in BAD]
    notes = [row["note"] for row in found["traces"] if row["verdict"] == "not run"]
    assert notes == ["fp16 needs a GPU: on a CPU the run would be in float32"] * 2
    for name in ("traces", "pictures"):
        exact = [row["verdict"] for row in found[name] if "float32 against" in row["name"]]
        assert exact, name
        assert set(exact) == {"equal"}, "the same processor on both sides"
    assert [row["verdict"] for row in found["resume"]] == ["equal"]
    speeds = [row["values"]["steps/s"] for row in found["sd15"] if "ours" in row["name"]]
    assert speeds
    assert all(speed > 0 for speed in speeds)


def test_a_row_file_leaves_out_what_was_not_written_to_its_end(tmp_path):
    file = RowFile(tmp_path / "rows")
    assert file.read() == []
    file.add(Row("one", "equal", {"x": 1.5}))
    with file.path.open("a", encoding="utf-8") as stream:
        stream.write('{"name": "two"')
    assert file.read() == [Row("one", "equal", {"x": 1.5})]


# ---- what only a card reaches, with stand-ins for its calls ------------------------------------------------------


class OnCard(Setting):
    """A setting that takes the ways of a card."""

    on_card = True


def test_waits_are_counted_by_line(setting, monkeypatch):
    modes: list[str] = []
    monkeypatch.setattr("torch.cuda.set_sync_debug_mode", modes.append)
    waits = traced.WaitLines(OnCard("cuda", True, True, setting.work))
    waits.start()
    for _ in range(2):
        warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
    warnings.warn("another", stacklevel=1)
    waits.stop()
    assert modes == ["warn", "default"]
    assert list(waits.lines.values()) == [2]
    assert re.fullmatch(r"tests/test_gpu_benchmark\.py:\d+", next(iter(waits.lines)))
    assert traced.short("/x/lib/site-packages/diffusers/models/unet.py") == "diffusers/models/unet.py"


def test_calls_and_times_of_a_trace_are_told_apart(setting):
    def event(key, count, kind="CPU", time=0.0, note=False):
        return SimpleNamespace(
            key=key, count=count, device_type=f"DeviceType.{kind}", self_device_time_total=time, is_user_annotation=note
        )

    events = [
        event("aten::mm", 3, time=5000.0),
        event("cudaLaunchKernel", 7),
        event("cuLaunchKernelEx", 2),
        event("cudaMemcpyAsync", 4),
        event("cudaStreamSynchronize", 1),
        event("cudaDeviceSynchronize", 2),
        event("Memcpy HtoD (Pageable -> Device)", 4, "CUDA", 1000.0),
        event("gemm", 3, "CUDA", 4000.0),
        event("Optimizer.step", 1, "CUDA", 9000.0, note=True),
    ]
    tracer = traced.StepTracer(OnCard("cuda", True, True, setting.work))
    tracer._profile = SimpleNamespace(key_averages=lambda: events)
    found = tracer.values()
    assert (found["launches"], found["copies"], found["busy ms"]) == (9, 4, 5.0)
    assert (found["waits for a stream or event"], found["operators on the CPU"]) == (1, 3)


@pytest.mark.parametrize(("whole", "limit", "fraction"), [(24, 7.3, 7.3 / 24), (6, None, 1.0)])
def test_the_memory_of_a_smaller_card_leaves_room_for_the_driver(setting, monkeypatch, whole, limit, fraction):
    given: list[float] = []
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda at: SimpleNamespace(total_memory=whole * 2**30))
    monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", given.append)
    card = OnCard("cuda", True, True, setting.work)
    assert memory.limited(card, 8) == limit
    memory.limited(card, None)
    assert given == [pytest.approx(fraction), 1.0]


def test_the_clock_waits_for_the_device_only_between_groups_of_steps(setting, monkeypatch):
    waits: list[Setting] = []
    monkeypatch.setattr(suite, "wait_for_device", waits.append)
    clock = suite.Clock(setting, suite.Windows(2, 2, 3))
    for step in range(1, 9):
        clock.note_step(step)
    assert len(waits) == len(clock.times) == 3
    clock.times[:] = [0.0, 3.0, 9.0]
    assert clock.seconds == 1.5
