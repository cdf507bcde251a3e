"""A run that stops and goes on writes the same bytes as one that never stopped."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train_network
from library.config.saving import SavingConfig
from library.errors import UserError
from library.training import state

ROOT = Path(__file__).resolve().parents[1]


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


@pytest.fixture
def base(model_store):
    return model_store("sd1")[1]["safetensors"]


def arguments(base, data, out, *more, steps=7, seed="3"):
    """Return the command line of a run."""
    argv = [
        "--pretrained_model_name_or_path",
        base,
        "--dataset_config",
        data,
        "--output_dir",
        out,
        "--output_name",
        "x",
        "--network_module",
        "networks.lora",
        "--learning_rate",
        "1e-3",
        "--network_dropout",
        "0.1",
        "--network_args",
        "rank_dropout=0.1",
        "module_dropout=0.1",
        "--gradient_accumulation_steps",
        "2",
        "--lr_scheduler",
        "cosine",
        "--lr_warmup_steps",
        "2",
        "--max_data_loader_n_workers",
        "0",
        "--max_train_steps",
        steps,
        *more,
    ]
    if seed is not None:
        argv += ["--seed", seed]
    return [str(word) for word in argv]


def run(base, data, out, *more, **values):
    assert train_network.main(arguments(base, data, out, *more, **values)) == 0
    return load_file(Path(out) / "x.safetensors")


def stop_after(monkeypatch, steps):
    """Make the next run end as if it were killed after a number of steps."""
    from library.training.loop import Trainer

    after = Trainer._after_step

    def killed(self, epoch):
        after(self, epoch)
        if self.num_done == steps:
            raise MemoryError("killed")

    monkeypatch.setattr(Trainer, "_after_step", killed)


def same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("step", [3, 4, 5])  # an epoch has 4 steps, the last one of a single batch
def test_resumed_equals_never_stopped(base, data, tmp_path, monkeypatch, step):
    expected = run(base, data, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        stop_after(patch, step)
        run(base, data, tmp_path / "parts", "--save_state", "--save_every_n_steps", "1")
    assert not (tmp_path / "parts" / "x.safetensors").exists()
    same(run(base, data, tmp_path / "parts", "--resume", "auto", seed=None), expected)


@pytest.mark.parametrize(
    "more",
    [
        ["--optimizer_type", "AdamW8bit", "--network_dim", "64"],
        ["--optimizer_type", "AdaFactor"],
        ["--optimizer_type", "SGDNesterov"],
        ["--max_data_loader_n_workers", "2"],
        ["--scale_weight_norms", "0.01", "--noise_offset", "0.1"],
    ],
    ids=lambda more: more[1],
)
def test_resumed_equals_never_stopped_with(base, data, tmp_path, monkeypatch, more):
    expected = run(base, data, tmp_path / "whole", *more)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        stop_after(patch, 3)
        run(base, data, tmp_path / "parts", "--save_state", "--save_every_n_steps", "3", *more)
    folder = tmp_path / "parts" / "x-step00000003-state"
    same(run(base, data, tmp_path / "parts", "--resume", folder, *more), expected)


def test_a_run_killed_after_its_last_step_still_gets_its_file(base, data, tmp_path, monkeypatch):
    expected = run(base, data, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        stop_after(patch, 7)
        run(base, data, tmp_path / "parts", "--save_state", "--save_every_n_steps", "1")
    assert not (tmp_path / "parts" / "x.safetensors").exists()
    same(run(base, data, tmp_path / "parts", "--resume", "auto"), expected)


@pytest.mark.parametrize(("step", "file"), [(4, "x-000001.safetensors"), (7, "x.safetensors")])
def test_a_signal_in_the_last_step_of_an_epoch_or_the_run_leaves_its_file(
    base, data, tmp_path, monkeypatch, step, file
):
    from library.training.loop import Trainer

    plain = Trainer.step

    def signalled(self, index, batches):
        if index + 1 == step:
            signal.raise_signal(signal.SIGINT)
        return plain(self, index, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", signalled)
        if step < 7:
            with pytest.raises(KeyboardInterrupt):
                run(base, data, tmp_path, "--save_every_n_epochs", "1")
        else:
            run(base, data, tmp_path, "--save_every_n_epochs", "1")
    assert (tmp_path / file).exists()


def test_counters_names_and_pictures_go_on(base, data, tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("a --w 64 --h 64 --s 1 --d 1\n", encoding="utf-8")
    more = ["--save_state", "--save_every_n_steps", "2", "--sample_prompts", tmp_path / "p.txt"]
    more += ["--sample_every_n_steps", "2", "--sample_at_first"]
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        stop_after(patch, 4)
        run(base, data, tmp_path / "o", *more)
    before = {path.name for path in (tmp_path / "o" / "sample").iterdir()}
    run(base, data, tmp_path / "o", *more, "--resume", "auto")
    after = sorted(path.name for path in (tmp_path / "o" / "sample").iterdir())
    assert len(before) == 3
    assert [name.split("_")[1] for name in after] == ["000002", "000004", "000006", "e000000"]
    names = sorted(path.name for path in (tmp_path / "o").glob("x*"))
    assert [name for name in names if name.endswith("-state")] == [
        "x-state",
        "x-step00000002-state",
        "x-step00000004-state",
        "x-step00000006-state",
    ]
    assert state.read_position(tmp_path / "o" / "x-state").current_step == 7
    lines = [json.loads(line) for line in (tmp_path / "o" / "x-metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines if "loss/current" in line] == [1, 2, 3, 4, 5, 6, 7]
    with Image.open(tmp_path / "o" / "x-sheet.png") as sheet:
        assert sheet.width > 4 * 64, "the sheet holds the pictures of both runs"


def test_a_finished_run_can_be_made_longer(base, data, tmp_path):
    extra = ["--lr_scheduler", "constant", "--lr_warmup_steps", "0"]
    expected = run(base, data, tmp_path / "whole", *extra, steps=6)
    run(base, data, tmp_path / "parts", *extra, "--save_state_on_train_end", steps=4)
    same(run(base, data, tmp_path / "parts", *extra, "--resume", "auto", steps=6), expected)
    with pytest.raises(UserError, match="nothing is left to train: 4 steps are made, and 4 are asked for"):
        run(base, data, tmp_path / "parts", *extra, "--resume", tmp_path / "parts" / "x-state", steps=4)


def test_old_states_go_and_auto_takes_the_one_furthest_on(base, data, tmp_path):
    run(base, data, tmp_path, "--save_state", "--save_every_n_steps", "1", "--save_last_n_steps_state", "2", steps=5)
    found = sorted(path.name for path in tmp_path.glob("x-step*-state"))
    assert found == ["x-step00000003-state", "x-step00000004-state", "x-step00000005-state"]
    saving = SavingConfig(output_dir=tmp_path, output_name="x")
    assert state.find_state("auto", saving).name == "x-step00000005-state"
    shutil.rmtree(tmp_path / "x-state")
    (tmp_path / "x-step00000005-state" / state.TENSOR_FILE).unlink()
    assert state.find_state("auto", saving).name == "x-step00000004-state"
    assert state.find_state("auto", SavingConfig(output_dir=tmp_path, output_name="y")) is None
    (tmp_path / "x-other-state").mkdir()
    assert state.find_state("auto", saving).name == "x-step00000004-state"


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


KILLED = """
import sys, time
sys.path.insert(0, {root!r})
import train_network
print("ready", flush=True)
train_network.main(sys.argv[1:])
"""


def kill_somewhere(argv, seed):
    """Start a run, kill it after a random time without warning; return whether it had finished."""
    code = KILLED.format(root=str(ROOT))
    process = subprocess.Popen([sys.executable, "-c", code, *argv], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    process.stdout.readline()
    try:
        process.wait(timeout=random.Random(seed).uniform(5, 14))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()
    return process.returncode == 0


@pytest.mark.parametrize("rounds", [pytest.param(2), pytest.param(30, marks=pytest.mark.slow)])
def test_a_run_killed_again_and_again_ends_with_the_same_bytes(base, data, tmp_path, rounds):
    more = ["--save_state", "--save_every_n_steps", "1", "--cache_latents_to_disk"]
    plain = json.loads(data.read_text(encoding="utf-8"))
    plain["datasets"] = plain["datasets"][:1]
    data.write_text(json.dumps(plain), encoding="utf-8")
    expected = run(base, data, tmp_path / "whole", *more, steps=40)
    argv = arguments(base, data, tmp_path / "parts", *more, "--resume", "auto", steps=40)
    for number in range(rounds):
        if kill_somewhere(argv, number):
            break
        for file in (tmp_path / "parts").glob("*.safetensors"):
            assert load_file(file)  # whole under its name
        for folder in (tmp_path / "parts").glob("*-state"):
            assert state.read_position(folder).current_step > 0
            state.read_tensors(folder)
    final = tmp_path / "parts" / "x.safetensors"
    same(
        load_file(final)
        if final.exists()
        else run(base, data, tmp_path / "parts", *more, "--resume", "auto", steps=40),
        expected,
    )
