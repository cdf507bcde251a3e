"""The scripts on a GPU that is not there (`fake_device.py`): device placement, types, waits of the host.

The device refuses what CUDA refuses, so that a run that ends well has every tensor where it belongs.
"""

from __future__ import annotations

import json
import os
from typing import Any

import device_cases
import fake_device
import pytest
from device_cases import CASES, DRAWINGS, TOOLS, TRAININGS, Outcome, World
from scripts import ROOT, python

import train_network

pytestmark = pytest.mark.skipif(fake_device.missing() is not None, reason=str(fake_device.missing()))

# Where the host may wait in a step of a training, and how often: reason, file and function. A wait costs more than the
# kernels of a small layer: whoever adds one justifies it here.
RESULTS: dict[str, float] = {
    "event: library/models/sending.py numbers": 1
}  # of the step before, while the next one is under way
ALLOWED: dict[str, dict[str, float]] = {"float32": RESULTS, "fp16": RESULTS, "bf16": RESULTS}

# Where models and cached latents are while steps are made: what the next steps do not need is off the device.
PLACES = {
    "float32": {
        "UNet2DConditionModel": "fakegpu",
        "CLIPTextModel": "fakegpu",
        "AutoencoderKL": "cpu",
        "MemoryCache": "cpu",
    },
    "bf16": {"UNet2DConditionModel": "fakegpu", "CLIPTextModel": "fakegpu", "AutoencoderKL": "fakegpu"},
    "fp16": {
        "UNet2DConditionModel": "fakegpu",
        "CLIPTextModel": "fakegpu",
        "AutoencoderKL": "cpu",
        "MemoryCache": "cpu",
    },
    # The first picture is encoded in the same call of the pipeline.
    "draw-offload": {"UNet2DConditionModel": "fakegpu", "CLIPTextModel": "cpu", "Encoder": "fakegpu"},
    "texts": {"UNet2DConditionModel": "fakegpu", "CLIPTextModel": "meta", "AutoencoderKL": "cpu", "MemoryCache": "cpu"},
}

TELLING = ("float32", "fp16", "draw-offload", "resize")
LATER = [name for name in CASES if name not in TELLING]
GROUPS = {
    "trainings": [name for name in LATER if name in TRAININGS or name in ("unbroken", "resumed")],
    "drawings": [name for name in LATER if name in DRAWINGS],
    "samplers": [name for name in LATER if name.startswith("sampler-")],
    "tools": [name for name in LATER if name in TOOLS],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    """Return the files that all cases read."""
    return device_cases.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole_world(world) -> World:
    """Return the files that all cases read, with those of the rarer ones."""
    return device_cases.make_rest(world)


def outcomes(world: World, names: Any) -> dict[str, Outcome]:
    """Run cases on the device, in one process of its own."""
    done = python(ROOT / "tests" / "device_cases.py", world.folder, *names)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
    found = {line.pop("case"): Outcome(**line) for line in lines}
    assert list(found) == list(names), done.stderr[-2000:]
    return found


def failures(found: dict[str, Outcome]) -> str:
    """Return what failed, for a message."""
    return "\n\n".join(f"{name}: {one.error}" for name, one in found.items() if one.error)


def check(found: dict[str, Outcome]) -> None:
    """Hold that all cases ended well, and what the tables say of them."""
    assert not failures(found)
    for name, one in found.items():
        assert one.operations, f"{name} leaves the device idle"
        if name in ALLOWED:
            assert one.waits == ALLOWED[name], name
        if name in PLACES:
            assert one.places == PLACES[name], name


def test_the_most_telling_runs_work_on_the_device(world):
    """The float32 file is the CPU's to the bit; the host waits only where it is allowed to."""
    found = outcomes(world, TELLING)
    check(found)
    folder = world.out("cpu")
    assert train_network.main(device_cases.training(world, folder, **TRAININGS["float32"])) == 0
    assert device_cases.digest([folder / "x.safetensors"]) == found["float32"].digest


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_every_other_run_works_on_the_device(whole_world, group):
    found = outcomes(whole_world, GROUPS[group])
    check(found)
    if group == "trainings":
        assert found["unbroken"].digest == found["resumed"].digest


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="a place is left out in a fork")
def test_a_placement_that_is_left_out_is_noticed():
    """`mutations.py` does it for all places, which takes an hour; these are some that every step needs."""
    paths = ["library/models/sending.py", "library/models/latent_encoder.py", "library/diffusion/schedule.py"]
    done = python(ROOT / "tests" / "mutations.py", *paths, "--cases", "float32")
    assert done.returncode == 0, done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["places"] > 5


# ---- the device itself ----------------------------------------------------------------------------------------------

# Each is a program on the device, and what it says: in a process of its own, since torch has one such device for good.
PROGRAMS = {
    "a CPU tensor beside one of the device": ("a + torch.ones(3)", "RuntimeError: .*on the same device"),
    "a number on the CPU": ("print((a + torch.tensor(2.0)).tolist())", r"\[3.0, 3.0, 3.0\]"),
    "a generator of the CPU": ("a.normal_(generator=torch.Generator())", "RuntimeError: .*generator"),
    "a product under autocast": ("print(narrow(lambda: a @ a).dtype)", "torch.float16"),
    "a norm under autocast": ("print(narrow(lambda: F.layer_norm(a.half(), (3,))).dtype)", "torch.float32"),
    "an empty model": ("\nwith torch.device('meta'):\n    print(torch.nn.Linear(3, 3).weight.device)", "meta"),
    "a copy read too early": ("print(a.to('cpu', non_blocking=True).tolist())", r"\[nan, nan, nan\]"),
    "a copy read in time": (
        "b = a.to('cpu', non_blocking=True); e = torch.Event(); e.record(); e.synchronize(); print(b.tolist())",
        r"\[1.0, 1.0, 1.0\]",
    ),
    "pinned memory overwritten too early": (
        "p = torch.zeros(3).pin_memory(); p.to(d, non_blocking=True); p.add_(1); torch.accelerator.synchronize()",
        "RuntimeError: pinned memory was overwritten",
    ),
    "pinned memory": (
        "p = torch.zeros(3).pin_memory(); fake_device.RECORD.clear(); p.to(d, non_blocking=True); "
        "print(p.is_pinned(), len(fake_device.RECORD.waits)); p.to(d); print(len(fake_device.RECORD.waits))",
        "True 0\n1",
    ),
}
BEGINNING = """
import sys, torch
import torch.nn.functional as F
import fake_device
d = fake_device.install()
a = torch.ones(3, device=d)
def narrow(make):
    with torch.autocast(d.type, torch.float16):
        return make()
def tried(code):
    try:
        exec(code, globals())
    except RuntimeError as error:
        print(f"RuntimeError: {error}")
"""


def test_the_device_refuses_what_cuda_refuses_and_tells_waits():
    import re

    code = BEGINNING + "".join(f"print('## {name}'); tried({code!r})\n" for name, (code, _) in PROGRAMS.items())
    done = python("-c", code, cwd=ROOT / "tests")
    assert done.returncode == 0, done.stderr
    told = dict(part.split("\n", 1) for part in done.stdout.split("## ")[1:])
    for name, (_, expected) in PROGRAMS.items():
        assert re.match(expected, told[name]), f"{name}: {told[name]}"
