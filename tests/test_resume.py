"""A run that stops and goes on writes the same bytes as one that never stopped."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import ALSO_SDXL_SLOW, BY_FILE, options, same, train_killed, train_with
from safetensors.torch import load_file
from scripts import ROOT, two_processes

import train_network
from library.config.saving import SavingConfig
from library.errors import UserError
from library.optim.flat import TrainedWeights
from library.training.charts.series import read_metrics
from library.training.run import state


@pytest.fixture
def data(tmp_path):
    """Return a dataset file with two datasets, buckets, flips, shuffled and dropped captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index, size in enumerate([(64, 64), (64, 128), (64, 64), (64, 128), (64, 64)]):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a, b, c, tag{index}", encoding="utf-8")
    path = tmp_path / "data.json"
    subset = {"image_dir": str(folder), "caption_extension": ".txt"}
    drawn = {"flip_aug": True, "shuffle_caption": True, "caption_dropout_rate": 0.2, "caption_tag_dropout_rate": 0.2}
    buckets = {"enable_bucket": True, "bucket_no_upscale": True}
    datasets = [
        {"resolution": 96, **buckets, "batch_size": 2, "subsets": [subset | drawn]},
        {"resolution": 64, "batch_size": 1, "subsets": [subset | drawn | {"random_crop": True}]},
    ]
    path.write_text(json.dumps({"datasets": datasets}), encoding="utf-8")
    return path


RUN = {
    "network_dropout": 0.1,
    "network_args": ["rank_dropout=0.1", "module_dropout=0.1"],
    "gradient_accumulation_steps": 2,
    "learning_rate": "1e-3",
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
}


def arguments(base, data, out, *more, steps=7, seed=3):
    """Return the command line of a run."""
    values = BY_FILE | RUN | {"dataset_config": data, "max_train_steps": steps, "seed": seed}
    return [*options(base, None, out, **values), *map(str, more)]


def run(base, data, out, *more, **values):
    assert train_network.main(arguments(base, data, out, *more, **values)) == 0
    return load_file(out / "x.safetensors")


@pytest.mark.parametrize(  # an epoch has 4 steps, the last one of a single batch
    "step", [pytest.param(3, marks=pytest.mark.slow), 4, pytest.param(5, marks=pytest.mark.slow)]
)
@ALSO_SDXL_SLOW
def test_resumed_equals_never_stopped(base, data, tmp_path, step):
    expected = run(base, data, tmp_path / "whole")
    train_killed(arguments(base, data, tmp_path / "parts", "--save_state", "--save_every_n_steps", "1"), after=step)
    assert not (tmp_path / "parts" / "x.safetensors").exists()
    same(run(base, data, tmp_path / "parts", "--resume", "auto", seed=None), expected)


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(["--optimizer_type", "AdamW8bit", "--network_dim", "64"], marks=pytest.mark.slow),
        pytest.param(["--optimizer_type", "AdaFactor"], marks=pytest.mark.slow),
        pytest.param(["--optimizer_type", "SGDNesterov"], marks=pytest.mark.slow),
        pytest.param(["--optimizer_type", "Prodigy", "--learning_rate", "1.0"], marks=pytest.mark.slow),
        pytest.param(
            ["--optimizer_type", "AdamWScheduleFree", "--lr_warmup_steps", "0", "--lr_scheduler", "constant"],
            marks=pytest.mark.slow,
        ),
        pytest.param(["--max_data_loader_n_workers", "2"], marks=pytest.mark.slow),
        pytest.param(["--scale_weight_norms", "0.01", "--noise_offset", "0.1"], marks=pytest.mark.slow),
    ],
    ids=lambda more: more[1],
)
@ALSO_SDXL_SLOW
def test_resumed_equals_never_stopped_with(base, data, tmp_path, more):
    expected = run(base, data, tmp_path / "whole", *more)
    train_killed(arguments(base, data, tmp_path / "parts", "--save_state", "--save_every_n_steps", "3", *more), after=3)
    folder = tmp_path / "parts" / "x-step00000003-state"
    same(run(base, data, tmp_path / "parts", "--resume", folder, *more), expected)


@ALSO_SDXL_SLOW
def test_a_run_killed_after_its_last_step_still_gets_its_file(base, data, tmp_path):
    expected = run(base, data, tmp_path / "whole")
    train_killed(arguments(base, data, tmp_path / "parts", "--save_state", "--save_every_n_steps", "1"), after=7)
    assert not (tmp_path / "parts" / "x.safetensors").exists()
    same(run(base, data, tmp_path / "parts", "--resume", "auto"), expected)


@pytest.mark.parametrize(("step", "file"), [(4, "x-000001.safetensors"), (7, "x.safetensors")])
def test_a_signal_in_the_last_step_of_an_epoch_or_the_run_leaves_its_file(base, data, tmp_path, step, file):
    argv = arguments(base, data, tmp_path, "--save_every_n_epochs", "1")
    with contextlib.nullcontext() if step == 7 else pytest.raises(KeyboardInterrupt):
        train_with(argv, lambda progress: signal.raise_signal(signal.SIGINT), after=step)
    assert (tmp_path / file).exists()


@ALSO_SDXL_SLOW
def test_counters_names_and_pictures_go_on(base, data, tmp_path):
    (tmp_path / "p.txt").write_text("a --w 64 --h 64 --s 1 --d 1\n", encoding="utf-8")
    more = ["--save_state", "--save_every_n_steps", "2", "--sample_prompts", tmp_path / "p.txt"]
    more += ["--sample_every_n_steps", "2", "--sample_at_first"]
    train_killed(arguments(base, data, tmp_path / "o", *more), after=4)
    before = {path.name for path in (tmp_path / "o" / "sample").iterdir()}
    run(base, data, tmp_path / "o", *more, "--resume", "auto")
    after = sorted(path.name for path in (tmp_path / "o" / "sample").iterdir())
    assert len(before) == 3
    assert [name.split("_")[1] for name in after] == ["000002", "000004", "000006", "000007", "e000000"]
    names = sorted(path.name for path in (tmp_path / "o").glob("x*"))
    assert [name for name in names if name.endswith("-state")] == [
        "x-state",
        "x-step00000002-state",
        "x-step00000004-state",
        "x-step00000006-state",
    ]
    assert state.read_progress(tmp_path / "o" / "x-state").step == 7
    lines = [json.loads(line) for line in (tmp_path / "o" / "x-metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines if "loss/current" in line] == [1, 2, 3, 4, 5, 6, 7]
    with Image.open(tmp_path / "o" / "x-sheet.png") as sheet:
        assert sheet.width > 5 * 64, "the sheet holds the pictures of both runs"


@ALSO_SDXL_SLOW
@pytest.mark.slow
def test_a_finished_run_can_be_made_longer(base, data, tmp_path):
    extra = ["--lr_scheduler", "constant", "--lr_warmup_steps", "0"]
    expected = run(base, data, tmp_path / "whole", *extra, steps=6)
    run(base, data, tmp_path / "parts", *extra, "--save_state_on_train_end", steps=4)
    same(run(base, data, tmp_path / "parts", *extra, "--resume", "auto", steps=6), expected)
    with pytest.raises(UserError, match="nothing is left to train: 4 steps are made, and 4 are asked for"):
        run(base, data, tmp_path / "parts", *extra, "--resume", tmp_path / "parts" / "x-state", steps=4)


def test_the_first_step_of_a_run_that_was_made_longer_has_the_rate_of_its_schedule(base, data, tmp_path):
    run(base, data, tmp_path / "whole", steps=6)
    run(base, data, tmp_path / "parts", "--save_state_on_train_end", steps=4)
    run(base, data, tmp_path / "parts", "--resume", "auto", steps=6)
    rates = [read_metrics(tmp_path / name / "x-metrics.jsonl").rates["unet"] for name in ("whole", "parts")]
    assert rates[0][4:] == rates[1][4:]
    assert rates[1][4][1] > 0


def test_a_damaged_metrics_file_stops_no_run(base, data, tmp_path):
    run(base, data, tmp_path, "--save_state_on_train_end", steps=2)
    metrics = tmp_path / "x-metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes() + b'{"step": 2, "loss/cur\n[1]\n\xe3\n{"step": "x"}')
    run(base, data, tmp_path, "--resume", "auto", steps=3)
    assert [step for step, _ in read_metrics(metrics).losses] == [1, 2, 3]
    assert [json.loads(line)["step"] for line in metrics.read_text(encoding="utf-8").splitlines()][-1] == 3


def test_old_states_go_and_auto_takes_the_one_furthest_on(base, data, tmp_path):
    run(base, data, tmp_path, "--save_state", "--save_every_n_steps", "1", "--save_last_n_steps_state", "2", steps=5)
    found = sorted(path.name for path in tmp_path.glob("x-step*-state"))
    assert found == ["x-step00000003-state", "x-step00000004-state", "x-step00000005-state"]
    saving = SavingConfig(output_dir=tmp_path, output_name="x")
    assert state.find_state("auto", saving) == tmp_path / "x-step00000005-state"
    shutil.rmtree(tmp_path / "x-state")
    (tmp_path / "x-step00000005-state" / state.TENSOR_FILE).unlink()
    assert state.find_state("auto", saving) == tmp_path / "x-step00000004-state"
    assert state.find_state("auto", SavingConfig(output_dir=tmp_path, output_name="y")) is None
    (tmp_path / "x-other-state").mkdir()
    assert state.find_state("auto", saving) == tmp_path / "x-step00000004-state"


def test_a_state_that_does_not_fit_or_is_damaged_is_told(base, data, tmp_path):
    run(base, data, tmp_path, "--save_state_on_train_end", steps=1)
    folder = tmp_path / "x-state"
    with pytest.raises(UserError, match="the state does not fit this run"):
        run(base, data, tmp_path, "--resume", folder, "--network_dim", "8")
    with pytest.raises(UserError, match="is no state of this suite"):
        run(base, data, tmp_path, "--resume", tmp_path)
    (folder / state.TENSOR_FILE).write_bytes(b"x")
    with pytest.raises(UserError, match="state.pt is damaged"):
        run(base, data, tmp_path, "--resume", folder)
    (folder / state.POSITION_FILE).write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="train_state.json is damaged"):
        run(base, data, tmp_path, "--resume", folder)


def test_a_state_holds_only_what_is_trained(base, data, tmp_path):
    run(base, data, tmp_path, "--save_state", steps=1)
    size = sum(path.stat().st_size for path in (tmp_path / "x-state").iterdir())
    assert size < 4.5 * (tmp_path / "x.safetensors").stat().st_size
    assert (tmp_path / "x-state" / state.OPTIONS_FILE).read_text(encoding="utf-8").count("seed = 3") == 1


# ---- runs that are killed -----------------------------------------------------------------------------------

# Imports take longer than the runs: one process imports, and each run is a fork of it.
SERVER = """
import json, os, sys
sys.path.insert(0, {root!r})
import torch, train_network
import library.training.recipe
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if not child:
        try:
            train_network.main(json.loads(line))
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture
def server():
    """Return a function that starts a run, kills it after some seconds, and returns its wait status."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER.format(root=str(ROOT))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    given, printed, errors = process.stdin, process.stdout, process.stderr
    assert given and printed and errors
    reading = threading.Thread(target=errors.read, daemon=True)
    reading.start()
    assert printed.readline() == "ready\n"

    def run_for(argv, seconds):
        given.write(json.dumps(argv) + "\n")
        given.flush()
        child = int(printed.readline())
        killer = threading.Timer(seconds, os.kill, (child, signal.SIGKILL))
        killer.start()
        status = int(printed.readline())
        killer.cancel()
        return status

    yield run_for
    given.close()
    process.wait(timeout=60)
    reading.join()
    printed.close()
    errors.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.slow
@pytest.mark.parametrize("rounds", [10, 100])
@ALSO_SDXL_SLOW
def test_a_run_killed_again_and_again_ends_with_the_same_bytes(base, data, tmp_path, server, rounds):
    more = ["--save_state", "--save_every_n_steps", "1", "--cache_latents_to_disk"]
    plain = json.loads(data.read_text(encoding="utf-8"))
    plain["datasets"] = plain["datasets"][:1]
    data.write_text(json.dumps(plain), encoding="utf-8")
    steps = 2 * rounds  # more than there is time for between the kills
    expected = run(base, data, tmp_path / "whole", *more, steps=steps)
    argv = arguments(base, data, tmp_path / "parts", *more, "--resume", "auto", steps=steps)
    moments, killed = random.Random(0), 0
    for _ in range(rounds):
        status = server(argv, moments.uniform(0.1, 2.5))
        killed += os.WIFSIGNALED(status)
        for file in (tmp_path / "parts").glob("*.safetensors"):
            assert load_file(file)  # whole under its name
        for folder in (tmp_path / "parts").glob("*-state"):
            assert state.read_progress(folder).step > 0
            state.read_tensors(folder)
        if (tmp_path / "parts" / "x.safetensors").exists():
            break
    assert killed >= 3
    final = tmp_path / "parts" / "x.safetensors"
    if not final.exists():
        assert server(argv, 300) == 0
    same(load_file(final), expected)


# ---- disks and processes ------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits on the size of files")
@pytest.mark.parametrize("limited", ["network", pytest.param("state", marks=pytest.mark.slow)])
@ALSO_SDXL_SLOW
def test_a_disk_that_is_full_ends_the_run_with_a_sentence_and_whole_files(base, data, tmp_path, limited):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(progress):
        size = (tmp_path / "x-step00000001.safetensors").stat().st_size + 4096 if limited == "state" else 50_000
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    try:
        with pytest.raises(OSError, match=r"could not be written: .*; what was saved before is unchanged") as caught:
            train_with(arguments(base, data, tmp_path, "--save_state", "--save_every_n_steps", "1"), limit, after=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    name = "x-step00000002.safetensors" if limited == "network" else "x-step00000002-state"
    assert str(tmp_path / name) in str(caught.value)
    assert load_file(tmp_path / "x-step00000001.safetensors")
    assert (
        state.find_state("auto", SavingConfig(output_dir=tmp_path, output_name="x"))
        == tmp_path / "x-step00000001-state"
    )
    assert not [path for path in tmp_path.rglob("*") if ".tmp" in path.name]
    run(base, data, tmp_path, "--resume", "auto")


TWO_RUNS = """
import json, sys
sys.path.insert(0, {root!r})
import train_network
from accelerate import Accelerator
Accelerator.end_training = lambda self: None  # the second run needs the processes' group, too
for argv in json.loads(sys.argv[1]):
    train_network.main(argv)
"""


@ALSO_SDXL_SLOW
@pytest.mark.slow
def test_two_processes_go_on_to_the_same_bytes(base, data, tmp_path):
    more = ["--cache_latents", "--save_state", "--save_every_n_steps", "3"]
    plain = json.loads(data.read_text(encoding="utf-8"))
    plain["datasets"] = plain["datasets"][:1]
    data.write_text(json.dumps(plain), encoding="utf-8")
    whole = arguments(base, data, tmp_path / "whole", *more, steps=5)
    resumed = arguments(base, data, tmp_path / "parts", *more, steps=5)
    resumed += ["--resume", str(tmp_path / "whole" / "x-step00000003-state")]
    untrained = [*more, "--network_train_unet_only"]  # text encoders, which are off the device in the last run
    live = arguments(base, data, tmp_path / "live", *untrained, steps=5)
    ahead = arguments(base, data, tmp_path / "ahead", *untrained, "--cache_text_encoder_outputs", steps=5)
    script = tmp_path / "runs.py"
    script.write_text(TWO_RUNS.format(root=str(ROOT)), encoding="utf-8")
    done = two_processes(script, json.dumps([whole, resumed, live, ahead]))
    assert done.returncode == 0, done.stderr[-3000:]
    same(load_file(tmp_path / "ahead" / "x.safetensors"), load_file(tmp_path / "live" / "x.safetensors"))
    expected = load_file(tmp_path / "whole" / "x.safetensors")
    same(load_file(tmp_path / "parts" / "x.safetensors"), expected)


# ---- the gradient scaler ------------------------------------------------------------------------------------


def state_with(scaler):
    """Return the state of a run over one layer."""
    layer: Any = torch.nn.Linear(2, 2)  # in place of a network
    weights = TrainedWeights([{"params": list(layer.parameters())}], None)
    optimizer = torch.optim.SGD(weights.groups(together=True), lr=0.1)
    return state.TrainState(layer, weights, optimizer, None, scaler, ("unet",))


@pytest.mark.parametrize(("was_fp16", "scale"), [(False, 256.0), (True, 2.0)])
def test_a_run_in_fp16_goes_on_from_a_state_of_any_precision(was_fp16, scale):
    """A state of a run in bf16 or float32 has no scale: the scaler begins anew."""
    before = state_with(torch.amp.GradScaler("cpu", init_scale=2.0, enabled=was_fp16))
    after = state_with(torch.amp.GradScaler("cpu", init_scale=256.0))
    after.restore(before.tensors())
    assert after.scaler.get_scale() == scale
    assert torch.equal(after.network.weight, before.network.weight)


def test_a_gpu_that_is_too_small_for_a_state_is_no_wrong_state(monkeypatch):
    def full(*given):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    after = state_with(torch.amp.GradScaler("cpu"))
    monkeypatch.setattr(after.optimizer, "load_state_dict", full)
    with pytest.raises(torch.OutOfMemoryError):
        after.restore(after.tensors())
