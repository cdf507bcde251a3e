"""train_network.py from its command line: what it writes, says and refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from runs import ALSO_SDXL_SLOW, BY_FILE, options, same, train, train_with
from safetensors.torch import load_file
from scripts import ROOT, python
from tensors import metadata

import train_network
from library.errors import UserError
from library.files import file_sha256
from library.sampling.contact_sheet import draw_sheet
from library.training.record import preview
from library.weight_file import file_legacy_hash

# ---- what it writes -----------------------------------------------------------------------------------------


def test_files_appear_at_their_steps_and_old_ones_go(base, pictures, tmp_path):
    more = {"save_every_n_steps": 1, "save_last_n_steps": 2, "save_every_n_epochs": 1, "save_last_n_epochs": 1}
    train(base, pictures, tmp_path, max_train_steps=9, **more)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        "x-000002.safetensors",
        "x-step00000007.safetensors",
        "x-step00000008.safetensors",
        "x-step00000009.safetensors",
        "x.safetensors",
    ]
    assert metadata(tmp_path / "x-step00000007.safetensors")["ss_steps"] == "7"
    assert metadata(tmp_path / "x.safetensors")["ss_epoch"] == "3"


def test_metadata_tells_what_was_trained_on_what(base, pictures, tmp_path):
    train(base, pictures, tmp_path, save_precision="fp16", training_comment="こんにちは", clip_skip=2)
    found = metadata(tmp_path / "x.safetensors")
    assert {name for name in EXPECTED_KEYS if name not in found} == set()
    assert found["ss_base_model_version"] == "sd_v1"
    assert found["ss_network_dim"] == "None"
    assert found["ss_learning_rate"] == "0.01"
    assert found["ss_num_train_images"] == "4"
    assert found["ss_training_comment"] == "こんにちは"
    assert found["ss_new_sd_model_hash"] == file_sha256(base)
    assert found["ss_sd_model_hash"] == file_legacy_hash(base)
    assert found["ss_optimizer"] == "torch.optim.adamw.AdamW"
    assert found["ss_text_encoder_lr"] == "None"
    assert not [name for name in found if "vae" in name]
    assert json.loads(found["ss_tag_frequency"]) == {
        "1_sks dog": {"a dog": 4, "x": 4, **{f"tag{i}": 1 for i in range(4)}}
    }
    assert json.loads(found["ss_dataset_dirs"]) == {"1_sks dog": {"n_repeats": 1, "img_count": 4}}
    assert json.loads(found["ss_bucket_info"])["buckets"]["0"] == {"resolution": [64, 64], "count": 2}
    assert found["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert found["modelspec.encoder_layer"] == "2"
    weights = load_file(tmp_path / "x.safetensors")
    assert all(tensor.dtype == torch.float16 for tensor in weights.values())


def test_optimizer_and_rates_are_recorded_as_sd_scripts_does(base, pictures, tmp_path):
    more = {"optimizer_args": ["weight_decay=0.1", "betas=.9,.99"], "text_encoder_lr": "5e-5"}
    train(base, pictures, tmp_path, max_train_steps=1, **more)
    found = metadata(tmp_path / "x.safetensors")
    assert found["ss_optimizer"] == "torch.optim.adamw.AdamW(weight_decay=0.1,betas=(0.9, 0.99))"
    assert found["ss_text_encoder_lr"] == "[5e-05]"


@pytest.mark.repetitions(keep=1)
@pytest.mark.parametrize("layout", ["folder", "file", "parent"])
def test_a_vae_is_recorded_with_its_hashes(model_store, pictures, tmp_path, layout):
    _, paths = model_store("sd1")
    folder = paths["folder"] / "vae"
    file = folder / "diffusion_pytorch_model.safetensors"
    vae = {"folder": folder, "file": file, "parent": paths["folder"]}[layout]
    train(paths["safetensors"], pictures, tmp_path, max_train_steps=1, vae=vae)
    found = metadata(tmp_path / "x.safetensors")
    assert found["ss_vae_name"] == vae.name
    assert found["ss_vae_hash"] == file_legacy_hash(file)
    assert found["ss_new_vae_hash"] == file_sha256(file)


def test_only_complete_epochs_count_until_the_run_ends(base, pictures, tmp_path):
    train(base, pictures, tmp_path, save_every_n_steps=1, save_every_n_epochs=1, max_train_steps=9)  # 4 in an epoch
    steps = [metadata(tmp_path / f"x-step{step:08d}.safetensors")["ss_epoch"] for step in range(1, 10)]
    assert steps == ["0", "0", "0", "1", "1", "1", "1", "2", "2"]
    epochs = [metadata(tmp_path / f"x-{epoch:06d}.safetensors")["ss_epoch"] for epoch in (1, 2)]
    assert epochs == ["1", "2"]
    assert metadata(tmp_path / "x.safetensors")["ss_epoch"] == "3"


EXPECTED_KEYS = [
    "ss_session_id",
    "ss_training_started_at",
    "ss_training_finished_at",
    "ss_output_name",
    "ss_unet_lr",
    "ss_text_encoder_lr",
    "ss_num_reg_images",
    "ss_num_batches_per_epoch",
    "ss_num_epochs",
    "ss_max_train_steps",
    "ss_lr_scheduler",
    "ss_network_module",
    "ss_network_alpha",
    "ss_mixed_precision",
    "ss_seed",
    "ss_optimizer",
    "ss_steps",
    "ss_epoch",
    "ss_resolution",
    "ss_total_batch_size",
    "ss_reg_dataset_dirs",
    "modelspec.sai_model_spec",
    "modelspec.title",
    "modelspec.resolution",
    "modelspec.date",
    "modelspec.prediction_type",
    "modelspec.implementation",
    "modelspec.implementation_version",
    "sshs_model_hash",
    "sshs_legacy_hash",
]


def test_no_metadata_keeps_what_readers_need(base, pictures, tmp_path):
    train(base, pictures, tmp_path, no_metadata=True)
    found = metadata(tmp_path / "x.safetensors")
    assert {name for name in found if name.startswith("ss_")} <= {
        "ss_v2",
        "ss_base_model_version",
        "ss_network_module",
        "ss_network_dim",
        "ss_network_alpha",
        "ss_network_args",
    }
    assert "sshs_model_hash" in found


@pytest.mark.repetitions(keep=1)
@pytest.mark.parametrize("kind", ["ckpt", "pt"])
def test_pickled_files_hold_the_same_weights(base, pictures, tmp_path, kind):
    expected = train(base, pictures, tmp_path / "a")
    same(train(base, pictures, tmp_path / "b", save_model_as=kind), expected)


@ALSO_SDXL_SLOW
def test_previews_go_to_files_and_one_contact_sheet(base, pictures, tmp_path, monkeypatch):
    titles = []

    def drawing(*cells, title):
        titles.append(title)
        return draw_sheet(*cells, title=title)

    monkeypatch.setattr(preview, "draw_sheet", drawing)
    monkeypatch.setattr(preview, "MOST_COLUMNS", 2)
    lines = "a dog --w 64 --h 72 --s 2 --d 5\na cat --w 64 --h 64 --s 1 --l 3 --n dog\n"
    (tmp_path / "p.txt").write_text(lines, encoding="utf-8")
    more = {"sample_prompts": tmp_path / "p.txt", "sample_every_n_steps": 2, "sample_at_first": True}
    train(base, pictures, tmp_path / "out", max_train_steps=4, **more)
    names = sorted(path.name for path in (tmp_path / "out" / "sample").iterdir())
    assert len(names) == 6
    assert names[0].startswith("x_000002_00_")
    assert names[-1].startswith("x_e000000_01_")
    first = next((tmp_path / "out" / "sample").glob("x_e000000_00_*_5.png"))
    with Image.open(first) as picture:
        assert picture.size == (64, 72)
    with Image.open(tmp_path / "out" / "x-sheet.png") as sheet:
        assert sheet.width > 2 * 64
        assert sheet.height > 2 * 64
    assert titles == ["", "", "2 of 3 previews"]


@pytest.mark.repetitions(keep=3)
@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"sample_every_n_steps": 2, "max_train_steps": 5}, ["000002", "000004", "000005"]),
        ({"sample_every_n_steps": 2, "max_train_steps": 4}, ["000002", "000004"]),
        ({"sample_every_n_steps": 100, "max_train_steps": 2}, ["000002"]),
        ({"sample_every_n_epochs": 1, "max_train_steps": 6}, ["e000001", "e000002"]),
        ({"sample_every_n_epochs": 2, "max_train_steps": 9}, ["e000002", "e000003"]),
        ({"sample_at_first": True, "max_train_steps": 1}, ["000001", "e000000"]),
        ({"max_train_steps": 1}, []),
    ],
)
def test_the_end_is_always_in_the_previews_and_once(base, pictures, tmp_path, monkeypatch, more, expected):
    (tmp_path / "p.txt").write_text("a --w 64 --h 64 --s 1 --d 5\n", encoding="utf-8")
    folder = tmp_path / "out" / "sample"
    seen = []

    def sheet(cells, rows, columns, title):
        seen.append(columns)
        return Image.new("L", (1, 1))

    monkeypatch.setattr(preview, "draw_sheet", sheet)
    train(base, pictures, tmp_path / "out", sample_prompts=tmp_path / "p.txt", **more)
    found = sorted(path.name.split("_")[1] for path in folder.iterdir()) if folder.exists() else []
    assert found == expected
    assert len(seen[-1] if seen else []) == len(expected), "columns of the contact sheet"


def test_metrics_are_always_written_one_object_a_line(base, pictures, tmp_path):
    for _ in range(2):
        train(base, pictures, tmp_path, lr_scheduler="linear", max_train_steps=5)
    lines = [json.loads(line) for line in (tmp_path / "x-metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "loss/current" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5], "a second run of the name begins anew"
    assert [line["lr/unet"] for line in steps] == pytest.approx([0.01 * rest / 5 for rest in (5, 4, 3, 2, 1)])
    assert [line["step"] for line in lines if "loss/epoch_average" in line] == [4, 5]


def test_tensorboard_gets_loss_and_rates(base, pictures, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(base, pictures, tmp_path / "out", logging_dir=tmp_path / "logs", log_prefix="p", unet_lr="1e-3")
    (run,) = (tmp_path / "logs").iterdir()
    assert run.name.startswith("p20")
    events = EventAccumulator(str(next(run.rglob("events.*")).parent)).Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"loss/current", "loss/average", "loss/epoch_average", "lr/textencoder", "lr/unet"} <= scalars
    assert [event.value for event in events.Scalars("lr/unet")] == pytest.approx([1e-3] * 3)


# ---- what it refuses ----------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_and_overwrites_nothing(base, pictures, tmp_path):
    train(base, pictures, tmp_path)
    good = (tmp_path / "x.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"the loss became (nan|inf) in step \d with .*\.png"):
        train(base, pictures, tmp_path, learning_rate="1e30")
    assert (tmp_path / "x.safetensors").read_bytes() == good


def test_each_mistake_is_a_line_with_exit_code_2(tmp_path):
    done = python(ROOT / "train_network.py", "--netwrk_dim", 4)
    assert done.returncode == 2
    first, *others = done.stderr.strip().splitlines()
    assert first == "train_network.py: error: --netwrk_dim is not known; did you mean network_dim?"
    assert len(others) == 5
    assert all(" is missing: " in line or line.startswith("no training data: ") for line in others), others
    assert done.stdout == ""


def test_help_and_mistakes_answer_without_heavy_imports(pictures):
    code = (
        "import sys, train_network\n"
        "from library.errors import UserError\n"
        "try: train_network.main(sys.argv[1:])\n"
        "except (UserError, SystemExit): pass\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'accelerate'}\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & heavy))"
    )
    for argv in (["--help"], ["--foo"], ["--max_train_steps", "many"], ["--dataset_config", "absent.toml"]):
        done = python("-c", code, *argv, cwd=ROOT)
        assert done.stdout.strip().endswith("[]"), argv


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({"pretrained_model_name_or_path": None}, "--pretrained_model_name_or_path is missing"),
    "a hub id": ({"pretrained_model_name_or_path": "runwayml/sd"}, "nothing is downloaded"),
    "no module": ({"network_module": None}, "--network_module is missing: networks.lora"),
    "wrong module": ({"network_module": "networks.laro"}, "--network_module networks.laro: No module named"),
    "not a module": ({"network_module": "json"}, "is no network module: it has no create_network"),
    "no output": ({"output_dir": None}, "--output_dir is missing"),
    "no data": ({"train_data_dir": None}, "no training data"),
    "no resolution": ({"resolution": None}, "--resolution is missing"),
    "no folder": ({"train_data_dir": "absent"}, "--train_data_dir: absent does not exist"),
    "both only": (
        {"network_train_unet_only": True, "network_train_text_encoder_only": True},
        "leave nothing to train",
    ),
    "constant warm-up": ({"lr_warmup_steps": 5}, "--lr_scheduler constant has no warm-up"),
    "previews without prompts": (
        {"sample_every_n_steps": 5},
        "--sample_prompts, the file with their prompts, is missing",
    ),
    "network args": ({"network_args": ["conv_dm=4"]}, "conv_dm is not known; did you mean conv_dim"),
    "optimizer": ({"optimizer_type": "AdamX"}, "got 'AdamX'; did you mean AdamW?"),
    "optimizer package": ({"optimizer_type": "prodigyyopt.Prodigy"}, "pip install prodigyyopt"),
    "optimizer args": ({"optimizer_args": ["betas=high"]}, "betas must be a number"),
    "optimizer refuses": ({"optimizer_args": ["beta3=1"]}, "--optimizer_args: AdamW has no beta3; did you mean betas?"),
    "schedule": (
        {"lr_scheduler_type": "CosineAnnealing"},
        "torch.optim.lr_scheduler has no class CosineAnnealing; did you mean CosineAnnealingLR",
    ),
    "plateau": ({"lr_scheduler_type": "ReduceLROnPlateau"}, "ReduceLROnPlateau cannot be used"),
    "adafactor schedule": ({"lr_scheduler": "adafactor"}, "goes with --optimizer_type AdaFactor"),
    "warm-up for nothing": (
        {"lr_scheduler": "piecewise_constant", "lr_warmup_steps": 5},
        "does not go with --lr_scheduler piecewise_constant",
    ),
    "polynomial": (
        {"lr_scheduler": "polynomial", "learning_rate": 0, "unet_lr": "1e-4"},
        "--learning_rate must be above",
    ),
    "output": ({"output_dir": str(Path(__file__) / "out")}, "--output_dir: nothing can be written to"),
    "vae": ({"vae": __file__}, "is not a weight file, but a text"),
    "adaptive": ({"adaptive_noise_scale": "0.1"}, "--adaptive_noise_scale needs --noise_offset"),
    "range": ({"min_timestep": 500, "max_timestep": 400}, "--min_timestep 500 must be below --max_timestep 400"),
    "not v": ({"scale_v_pred_loss_like_noise_pred": True}, "needs --v_parameterization"),
    "v": ({"v_pred_like_loss": 1, "v_parameterization": True}, "is for models that predict noise"),
    "file for a folder": ({"train_data_dir": __file__}, "is a file; name the folder above"),
    "zero rates": ({"learning_rate": 0}, "the learning rate of what is left is 0"),
    "pieces": ({"lr_scheduler": "piecewise_constant"}, "piecewise_constant needs step_rules"),
    "v2": ({"v2": True}, "is an SD 1.x model: omit --v2"),
    "weights": ({"network_weights": "absent.safetensors"}, "--network_weights: absent.safetensors does not exist"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_before_the_model_is_loaded(base, pictures, tmp_path, name, monkeypatch):
    from library.training import recipe

    monkeypatch.setattr(recipe, "open_base", lambda *args, **more: pytest.fail("the model was loaded"))
    more, message = dict(MISTAKES[name][0]), MISTAKES[name][1]
    with pytest.raises(UserError) as caught:
        train_network.main(options(base, pictures, more.pop("output_dir", tmp_path / "out"), **more))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@ALSO_SDXL_SLOW
def test_a_config_file_gives_the_same_run_and_the_command_line_wins(base, pictures, tmp_path):
    expected = train(base, pictures, tmp_path / "a", network_dim=2)
    argv = options(base, pictures, tmp_path / "b", network_dim=8)
    path = tmp_path / "run"
    assert train_network.main([*argv, "--config_file", str(path), "--output_config"]) == 0
    assert train_network.main(["--config_file", str(path), "--networkdim", "2"]) == 0
    same(load_file(tmp_path / "b" / "x.safetensors"), expected)
    record = tmp_path / "b" / "x-options.toml"
    assert train_network.main(["--config_file", str(record), "--output_dir", str(tmp_path / "c")]) == 0
    same(load_file(tmp_path / "c" / "x.safetensors"), expected)
    with pytest.raises(UserError, match="does not overwrite"):
        train_network.main([*argv, "--config_file", str(path), "--output_config"])


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
@ALSO_SDXL_SLOW
def test_a_signal_finishes_the_step_and_the_run_can_go_on(base, pictures, tmp_path, caplog, number):
    expected = train(base, pictures, tmp_path / "whole", max_train_steps=4)
    argv = options(base, pictures, tmp_path / "parts", max_train_steps=4)
    with pytest.raises(KeyboardInterrupt):
        train_with(argv, lambda progress: signal.raise_signal(number), after=2)
    assert metadata(tmp_path / "parts" / "x-step00000002.safetensors")["ss_steps"] == "2"
    assert not (tmp_path / "parts" / "x.safetensors").exists()
    folder = tmp_path / "parts" / "x-step00000002-state"
    assert f"--resume {folder}" in caplog.text
    same(train(base, pictures, tmp_path / "parts", max_train_steps=4, resume=folder), expected)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_signal_stops_at_once(base, pictures, tmp_path):
    def twice(progress):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train_with(options(base, pictures, tmp_path), twice, after=1)
    assert not list(tmp_path.glob("x*.safetensors"))


def test_a_folder_of_the_dataset_file_trains_like_the_folder_layout(base, pictures, tmp_path):
    (tmp_path / "d.toml").write_text(
        '[general]\ncaption_extension = ".txt"\n[[datasets]]\nresolution = 96\nenable_bucket = true\n'
        "min_bucket_reso = 64\nmax_bucket_reso = 128\nbucket_no_upscale = true\n"
        f"[[datasets.subsets]]\nimage_dir = '{pictures / '1_sks dog'}'\n",
        encoding="utf-8",
    )
    expected = train(base, pictures, tmp_path / "a")
    same(train(base, pictures, tmp_path / "b", dataset_config=tmp_path / "d.toml", **BY_FILE), expected)
    found = metadata(tmp_path / "b" / "x.safetensors")
    described = json.loads(found["ss_datasets"])[0]
    assert described["subsets"][0]["image_dir"] == "1_sks dog"
    assert described["num_train_images"] == 4


@ALSO_SDXL_SLOW
def test_an_unchanged_disk_cache_serves_the_next_run(base, pictures, tmp_path):
    first = train(base, pictures, tmp_path / "a", cache_latents_to_disk=True)
    entries = sorted((pictures / "1_sks dog").glob("*.latents.safetensors"))
    times = [path.stat().st_mtime_ns for path in entries]
    time.sleep(0.01)
    same(train(base, pictures, tmp_path / "b", cache_latents_to_disk=True), first)
    assert len(entries) == 4
    assert [path.stat().st_mtime_ns for path in entries] == times


@ALSO_SDXL_SLOW
def test_it_starts_from_another_folder_and_through_accelerate(base, pictures, tmp_path):
    launcher = shutil.which("accelerate", path=str(Path(sys.executable).parent)) or "accelerate"
    argv = options(base, pictures, tmp_path / "out", max_train_steps=1)
    launch = [launcher, "launch", "--cpu", "--num_processes", "1", "--num_cpu_threads_per_process", "1"]
    done = subprocess.run(
        [*launch, str(ROOT / "train_network.py"), *argv],
        cwd=tmp_path, capture_output=True, text=True, check=False, env=os.environ | {"HF_HOME": str(tmp_path / "hf")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "x.safetensors").exists()
    assert "steps: 1 in 1 epoch of 4 batches" in done.stderr
    # SDXL does not use the last layer of its first text encoder, which has six modules.
    assert re.findall(r"learned: (\d+) of (\d+) modules", done.stderr) in ([("210", "210")], [("326", "332")])
