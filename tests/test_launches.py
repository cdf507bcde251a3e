"""What a step of full size gives a GPU to do, counted on shapes (`benchmarks/launches.py`), and its bounds."""

from __future__ import annotations

import json

import fake_device
import pytest
from scripts import ROOT, python

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(fake_device.missing() is not None, reason=str(fake_device.missing())),
]


def total(figures: dict, name: str) -> int:
    return sum(figures[name]["launches"].values())


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    path = tmp_path_factory.mktemp("counts") / "counts.json"
    words = ["sd15", "--variants", "floor", "floor-no-autocast", "ours", "dylora", "peft", "--json", path]
    done = python(ROOT / "benchmarks" / "launches.py", *words)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_step_stays_within_its_bounds(figures):
    """Bounds for SD 1.5, 512 px, batch 1, rank 32, fp16, both parts; the host bounds such a step on a fast GPU."""
    assert total(figures, "sd15 ours") <= 4600
    assert figures["sd15 ours"]["saved"] <= 1050e6
    assert total(figures, "sd15 dylora") <= 1.1 * total(figures, "sd15 ours")
    assert sum(figures["waits"].values()) <= 1


def test_the_counts_are_those_of_other_ways_to_count(figures):
    """The floor has no adapters and no casts without autocast; peft launches most."""
    floor, bare, ours = (total(figures, f"sd15 {name}") for name in ("floor", "floor-no-autocast", "ours"))
    assert bare < floor
    assert bare < ours < total(figures, "sd15 peft")
    convolutions = figures["sd15 floor-no-autocast"]["operations"]["aten::convolution"]
    assert convolutions == 98  # 2 at the ends, 44 in residual blocks and 14 beside, 32 around attention, 6 at sizes
