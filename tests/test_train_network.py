"""train_network.py from its command line: what it trains, writes and says."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import options, same, train
from safetensors.torch import load_file
from scripts import ROOT
from tensors import metadata

import train_network
from library.errors import UserError
from library.files import file_sha256
from library.weight_file import file_legacy_hash

# ---- what it trains -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["folder", "safetensors", "ckpt", "fp16"])
def test_it_trains_offline_from_each_layout_to_the_same_result(model_store, family_name, pictures, tmp_path, layout):
    _, paths = model_store(family_name)
    weights = train(paths[layout], pictures, tmp_path / "out")
    ups = [tensor for name, tensor in weights.items() if "lora_up" in name]
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert sum(bool(tensor.any()) for tensor in ups) == len(ups)
    assert len(weights) == 3 * (192 + 18)
    assert metadata(tmp_path / "out" / "x.safetensors")["ss_v2"] == str(family_name == "sd2")
    if layout in ("folder", "ckpt"):
        same(weights, train(paths["safetensors"], pictures, tmp_path / "again"))


def test_the_example_command_line_runs_and_says_what_it_cannot_honour(base, pictures, tmp_path, caplog):
    train(
        base,
        pictures,
        tmp_path,
        optimizer_type="AdamW8bit",
        xformers=True,
        mixed_precision="fp16",
        cache_latents=True,
        gradient_checkpointing=True,
        save_every_n_epochs=1,
        max_train_steps=8,
        prior_loss_weight="1.0",
        save_model_as="safetensors",
    )
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    if not torch.cuda.is_available():
        assert sum("--xformers" in text and "CUDA" in text for text in warnings) == 1
        assert sum("--mixed_precision fp16" in text and "float32" in text for text in warnings) == 1
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == ["x-000001.safetensors", "x.safetensors"]


def test_the_same_seed_gives_the_same_file_and_another_does_not(base, pictures, tmp_path):
    first = train(base, pictures, tmp_path / "a")
    same(first, train(base, pictures, tmp_path / "b"))
    other = train(base, pictures, tmp_path / "c", seed=8)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    "change",
    [
        {"cache_latents": True},
        {"cache_latents_to_disk": True},
        {"max_data_loader_n_workers": 2},
        {"sample_every_n_steps": 1, "sample_at_first": True},
    ],
    ids=["cache", "disk", "workers", "previews"],
)
def test_how_it_is_done_does_not_change_a_bit_of_the_result(base, pictures, tmp_path, change):
    extra = {"flip_aug": True, "shuffle_caption": True, "network_dropout": 0.2, "caption_dropout_rate": 0.3}
    expected = train(base, pictures, tmp_path / "a", **extra)
    if "sample_at_first" in change:
        (tmp_path / "p.txt").write_text("a dog --w 64 --h 64 --s 2\n", encoding="utf-8")
        change = change | {"sample_prompts": tmp_path / "p.txt"}
    same(train(base, pictures, tmp_path / "b", **extra, **change), expected)


def test_checkpointing_gives_the_same_result_to_rounding(base, pictures, tmp_path):
    expected = train(base, pictures, tmp_path / "a", network_dropout=0.2)
    same(train(base, pictures, tmp_path / "b", network_dropout=0.2, gradient_checkpointing=True), expected, 1e-3)


def test_accumulated_batches_equal_one_large_batch(base, pictures, tmp_path):
    for path in (pictures / "1_sks dog").glob("[23].*"):
        path.unlink()
    single = {"optimizer_type": "SGDNesterov", "learning_rate": "1.0", "max_train_steps": 4}
    one = train(base, pictures, tmp_path / "a", train_batch_size=2, **single)
    two = train(base, pictures, tmp_path / "b", train_batch_size=1, gradient_accumulation_steps=2, **single)
    same(two, one, 1e-3)


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def test_two_processes_equal_one_with_the_doubled_batch(base, pictures, tmp_path):
    for path in (pictures / "1_sks dog").glob("[23].*"):
        path.unlink()
    extra = {"optimizer_type": "SGDNesterov", "learning_rate": "1.0", "max_train_steps": 4}
    one = train(base, pictures, tmp_path / "one", train_batch_size=2, **extra)
    argv = options(base, pictures, tmp_path / "two", train_batch_size=1, **extra)
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "DUMP_RANKS": str(tmp_path / "rank"),
    }
    script = tmp_path / "ranks.py"
    script.write_text(RANKS.format(root=str(ROOT)), encoding="utf-8")
    done = subprocess.run(
        [*TORCHRUN, "--nproc_per_node", "2", str(script), *argv],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(f"{tmp_path / 'rank'}{rank}.pt") for rank in range(2)]
    same(ranks[0], ranks[1])
    same(load_file(tmp_path / "two" / "x.safetensors"), one, 1e-3)


RANKS = """
import os, sys
sys.path.insert(0, {root!r})
import torch
import train_network
from library.training.run.loop import Trainer

saved = Trainer.run
def run(self, loader):
    saved(self, loader)
    torch.save(self.network.network.state_dict(), os.environ["DUMP_RANKS"] + str(self.runtime.rank) + ".pt")
Trainer.run = run
train_network.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("more", "unet", "text"),
    [
        ({"network_train_unet_only": True}, 192, 0),
        ({"network_train_text_encoder_only": True}, 0, 18),
        ({"text_encoder_lr": "0"}, 192, 0),
        ({"unet_lr": "0"}, 0, 18),
        ({"network_args": ["conv_dim=2", "conv_alpha=1"]}, 278, 18),
    ],
)
def test_only_what_is_trained_is_saved(base, pictures, tmp_path, more, unet, text):
    weights = train(base, pictures, tmp_path, **more)
    names = {name.split(".")[0] for name in weights}
    assert sum(name.startswith("lora_unet_") for name in names) == unet
    assert sum(name.startswith("lora_te_text_model_") for name in names) == text


def test_training_goes_on_from_weights_and_takes_their_dimensions(base, pictures, tmp_path):
    first = train(base, pictures, tmp_path / "a", network_dim=3, network_alpha=2)
    path = tmp_path / "a" / "x.safetensors"
    still = {"learning_rate": "1e-12", "max_train_steps": 1}
    same(train(base, pictures, tmp_path / "b", network_dim=3, network_weights=path, **still), first, 1e-5)
    again = train(base, pictures, tmp_path / "c", network_weights=path, dim_from_weights=True, **still)
    same(again, first, 1e-5)
    with pytest.raises(UserError, match="has rank 3, this network 4"):
        train(base, pictures, tmp_path / "d", network_weights=path)


@pytest.mark.parametrize("option", ["network_weights", "base_weights"])
def test_weights_for_another_model_are_refused_in_one_line(base, model_store, pictures, tmp_path, option):
    train(model_store("sd2")[1]["safetensors"], pictures, tmp_path / "a", network_args=["conv_dim=4"])
    path = tmp_path / "a" / "x.safetensors"
    with pytest.raises(UserError, match="the file is for another model or has other ranks"):
        train(base, pictures, tmp_path / "b", **{option: [path] if option == "base_weights" else path})


def test_base_weights_are_merged_before_training(base, model_store, pictures, tmp_path, monkeypatch):
    from library.training import recipe

    train(base, pictures, tmp_path / "a")
    path = tmp_path / "a" / "x.safetensors"
    seen = {}
    build = recipe.build_network

    def spy(config, optimizer, models, **more):
        network = build(config, optimizer, models, **more)
        seen["unet"] = {name: tensor.clone() for name, tensor in models.unet.state_dict().items()}
        return network

    monkeypatch.setattr(recipe, "build_network", spy)
    train(base, pictures, tmp_path / "b", base_weights=[path], base_weights_multiplier=["0.5"])
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    weights = load_file(path)
    key = f"lora_unet_{name.replace('.', '_')}"
    delta = weights[f"{key}.lora_up.weight"].double() @ weights[f"{key}.lora_down.weight"].double()
    scale = 0.5 * float(weights[f"{key}.alpha"]) / 4
    original = model_store("sd1")[0]["unet"].state_dict()[f"{name}.weight"]
    assert delta.abs().max() > 0
    torch.testing.assert_close(
        seen["unet"][f"{name}.weight"].double(), original.double() + scale * delta, rtol=1e-5, atol=1e-7
    )


def test_scaled_norms_stay_below_their_limit(base, pictures, tmp_path):
    weights = train(base, pictures, tmp_path, scale_weight_norms="0.001")
    names = [name.removesuffix(".alpha") for name in weights if name.endswith(".alpha")]
    factors = [(weights[f"{name}.lora_up.weight"], weights[f"{name}.lora_down.weight"]) for name in names]
    norms = torch.stack([(up.flatten(1) @ down.flatten(1) / 4).norm() for up, down in factors])
    assert norms.max() == pytest.approx(0.001, rel=1e-3)
    assert (norms > 0.000999).sum() > len(norms) / 2


@pytest.mark.parametrize(
    "more",
    [
        {"optimizer_type": "AdaFactor"},
        {"optimizer_type": "AdaFactor", "optimizer_args": ["relative_step=False", "scale_parameter=False"]},
        {"optimizer_type": "torch.optim.RAdam", "optimizer_args": ["betas=0.8,0.9"]},
        {"optimizer_type": "NAdam", "lr_scheduler": "cosine", "lr_warmup_steps": "10%"},
        {"loss_type": "huber", "noise_offset": "0.1", "min_snr_gamma": "5"},
        {"v_parameterization": True, "loss_type": "smooth_l1", "min_snr_gamma": "5"},
        {
            "noise_offset": "0.1",
            "adaptive_noise_scale": "0.1",
            "multires_noise_iterations": "6",
            "ip_noise_gamma": "0.1",
        },
        {"v_parameterization": True, "zero_terminal_snr": True, "scale_v_pred_loss_like_noise_pred": True},
        {"debiased_estimation_loss": True, "v_pred_like_loss": "0.5", "min_timestep": "100", "max_timestep": "600"},
        {"max_token_length": "150", "clip_skip": "2"},
        {"mixed_precision": "bf16"},
        {"random_crop": True, "color_aug": True},
        {"lr_scheduler_type": "CosineAnnealingLR", "lr_scheduler_args": ["T_max=3"]},
    ],
    ids=lambda more: "-".join(map(str, more)),
)
def test_it_learns_with_other_settings(base, pictures, tmp_path, more):
    weights = train(base, pictures, tmp_path, **more)
    ups = [tensor for name, tensor in weights.items() if "lora_up" in name]
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert sum(bool(tensor.any()) for tensor in ups) > 0.9 * len(ups)


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
    assert json.loads(found["ss_tag_frequency"]) == {
        "1_sks dog": {"a dog": 4, "x": 4, **{f"tag{i}": 1 for i in range(4)}}
    }
    assert json.loads(found["ss_dataset_dirs"]) == {"1_sks dog": {"n_repeats": 1, "img_count": 4}}
    assert json.loads(found["ss_bucket_info"])["buckets"]["0"] == {"resolution": [64, 64], "count": 2}
    assert found["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert found["modelspec.encoder_layer"] == "2"
    weights = load_file(tmp_path / "x.safetensors")
    assert all(tensor.dtype == torch.float16 for tensor in weights.values())


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


@pytest.mark.parametrize("kind", ["ckpt", "pt"])
def test_pickled_files_hold_the_same_weights(base, pictures, tmp_path, kind):
    expected = train(base, pictures, tmp_path / "a")
    same(train(base, pictures, tmp_path / "b", save_model_as=kind), expected)


def test_previews_go_to_files_and_one_contact_sheet(base, pictures, tmp_path):
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
        assert sheet.width > 3 * 64
        assert sheet.height > 2 * 64


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


def script(*argv, **more):
    return subprocess.run(
        [sys.executable, str(ROOT / "train_network.py"), *argv], capture_output=True, text=True, check=False, **more
    )


def test_a_mistake_is_one_line_with_exit_code_2(tmp_path):
    done = script("--netwrk_dim", "4")
    assert done.returncode == 2
    assert done.stderr.strip() == "train_network.py: error: --netwrk_dim is not known; did you mean network_dim?"
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
        done = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.strip().endswith("[]"), argv


MISTAKES = {
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
    "optimizer": ({"optimizer_type": "AdamX"}, "torch.optim has no class AdamX; did you mean AdamW"),
    "optimizer package": ({"optimizer_type": "prodigyyopt.Prodigy"}, "pip install prodigyyopt"),
    "optimizer args": ({"optimizer_args": ["betas=high"]}, "betas must be a number"),
    "optimizer refuses": ({"optimizer_args": ["beta3=1"]}, "AdamW refuses them"),
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
    "vae": ({"vae": __file__}, "is not a safetensors file"),
    "adaptive": ({"adaptive_noise_scale": "0.1"}, "--adaptive_noise_scale needs --noise_offset"),
    "range": ({"min_timestep": 500, "max_timestep": 400}, "--min_timestep 500 must be below --max_timestep 400"),
    "not v": ({"scale_v_pred_loss_like_noise_pred": True}, "needs --v_parameterization"),
    "v": ({"v_pred_like_loss": 1, "v_parameterization": True}, "is for models that predict noise"),
    "file for a folder": ({"train_data_dir": __file__}, "is a file; name the folder above"),
    "zero rates": ({"learning_rate": 0}, "the learning rate of what is left is 0"),
    "pieces": ({"lr_scheduler": "piecewise_constant"}, "piecewise_constant needs step_rules"),
    "v2": ({"v2": True}, "is an SD 1.x model: leave out --v2"),
    "weights": ({"network_weights": "absent.safetensors"}, "--network_weights: absent.safetensors does not exist"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_before_the_model_is_loaded(base, pictures, tmp_path, name, monkeypatch):
    from library.training import recipe

    monkeypatch.setattr(recipe, "load_models", lambda *args, **more: pytest.fail("the model was loaded"))
    more, message = dict(MISTAKES[name][0]), MISTAKES[name][1]
    with pytest.raises(UserError) as caught:
        train_network.main(options(base, pictures, more.pop("output_dir", tmp_path / "out"), **more))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_the_run_can_go_on(base, pictures, tmp_path, monkeypatch, caplog, number):
    from library.training.run.loop import Trainer

    expected = train(base, pictures, tmp_path / "whole", max_train_steps=4)
    step = Trainer.step

    def interrupted(self, index, batches):
        if index == 1:
            signal.raise_signal(number)
        return step(self, index, batches)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "step", interrupted)
        train(base, pictures, tmp_path / "parts", max_train_steps=4)
    assert metadata(tmp_path / "parts" / "x-step00000002.safetensors")["ss_steps"] == "2"
    assert not (tmp_path / "parts" / "x.safetensors").exists()
    folder = tmp_path / "parts" / "x-step00000002-state"
    assert f"--resume {folder}" in caplog.text
    same(train(base, pictures, tmp_path / "parts", max_train_steps=4, resume=folder), expected)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_signal_stops_at_once(base, pictures, tmp_path, monkeypatch):
    from library.training.run.loop import Trainer

    def twice(self, index, batches):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "step", twice)
    with pytest.raises(KeyboardInterrupt):
        train(base, pictures, tmp_path)
    assert not list(tmp_path.glob("x*.safetensors"))


def test_a_folder_of_the_dataset_file_trains_like_the_folder_layout(base, pictures, tmp_path):
    (tmp_path / "d.toml").write_text(
        '[general]\ncaption_extension = ".txt"\n[[datasets]]\nresolution = 96\nenable_bucket = true\n'
        "min_bucket_reso = 64\nmax_bucket_reso = 128\nbucket_no_upscale = true\n"
        f"[[datasets.subsets]]\nimage_dir = '{pictures / '1_sks dog'}'\n",
        encoding="utf-8",
    )
    expected = train(base, pictures, tmp_path / "a")
    plain = dict.fromkeys(
        ("train_data_dir", "enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_no_upscale")
    )
    same(train(base, pictures, tmp_path / "b", dataset_config=tmp_path / "d.toml", **plain), expected)
    found = metadata(tmp_path / "b" / "x.safetensors")
    described = json.loads(found["ss_datasets"])[0]
    assert described["subsets"][0]["image_dir"] == "1_sks dog"
    assert described["num_train_images"] == 4


def test_an_unchanged_disk_cache_serves_the_next_run(base, pictures, tmp_path):
    first = train(base, pictures, tmp_path / "a", cache_latents_to_disk=True)
    entries = sorted((pictures / "1_sks dog").glob("*.latents.safetensors"))
    times = [path.stat().st_mtime_ns for path in entries]
    time.sleep(0.01)
    same(train(base, pictures, tmp_path / "b", cache_latents_to_disk=True), first)
    assert len(entries) == 4
    assert [path.stat().st_mtime_ns for path in entries] == times


def test_it_starts_from_another_folder_and_through_accelerate(base, pictures, tmp_path):
    launcher = shutil.which("accelerate", path=str(Path(sys.executable).parent)) or "accelerate"
    argv = options(base, pictures, tmp_path / "out", max_train_steps=1)
    done = subprocess.run(
        [
            launcher,
            "launch",
            "--cpu",
            "--num_processes",
            "1",
            "--num_cpu_threads_per_process",
            "1",
            str(ROOT / "train_network.py"),
            *argv,
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_HOME": str(tmp_path / "hf")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "x.safetensors").exists()
    assert "steps: 1 in 1 epoch of 4 batches" in done.stderr
    assert "learned: 210 of 210 modules (100 %) changed" in done.stderr


# ---- holding the network to the base model ------------------------------------------------------------------


def preserving(pictures, tmp_path, preserved):
    path = tmp_path / "data.toml"
    tables = [
        f"[[datasets.subsets]]\nimage_dir = '{pictures / '1_sks dog'}'\n"
        + ("custom_attributes.diff_output_preservation = true\n" if preserved else "")
    ]
    path.write_text("[[datasets]]\nresolution = 64\n" + "\n".join(tables), encoding="utf-8")
    return {"dataset_config": path, "train_data_dir": None, "resolution": None, "enable_bucket": None}


def test_where_the_base_model_is_the_target_a_fresh_network_has_nothing_to_learn(base, pictures, tmp_path):
    more = {"min_bucket_reso": None, "max_bucket_reso": None, "bucket_no_upscale": None}
    learned = train(base, pictures, tmp_path / "a", **more, **preserving(pictures, tmp_path, False))
    assert any(bool(tensor.any()) for name, tensor in learned.items() if "lora_up" in name)
    kept = train(base, pictures, tmp_path / "b", **more, **preserving(pictures, tmp_path, True))
    lines = (tmp_path / "b" / "x-metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(json.loads(line).get("loss/current", 0.0) == 0.0 for line in lines)
    assert not any(bool(tensor.any()) for name, tensor in kept.items() if "lora_up" in name)


def test_a_network_that_went_astray_is_led_back_to_the_base_model(base, pictures, tmp_path):
    more = {"min_bucket_reso": None, "max_bucket_reso": None, "bucket_no_upscale": None, "max_train_steps": 12}
    train(base, pictures, tmp_path / "a", **more, **preserving(pictures, tmp_path, False))
    start = {"network_weights": tmp_path / "a" / "x.safetensors", "optimizer_type": "SGD", "learning_rate": "1e-1"}
    train(base, pictures, tmp_path / "b", **more, **start, **preserving(pictures, tmp_path, True))
    lines = (tmp_path / "b" / "x-metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["loss/current"] for line in lines if "loss/current" in line]
    assert losses[0] > 0
    assert sum(losses[-4:]) < sum(losses[:4])
