"""train_network.py from its command line: what it trains."""

from __future__ import annotations

import json

import pytest
import torch
from runs import ALSO_SDXL_SLOW, BY_FILE, options, same, train
from safetensors.torch import load_file
from scripts import ROOT, two_processes
from tensors import metadata

from library.errors import UserError

# ---- what it trains -----------------------------------------------------------------------------------------


@pytest.mark.repetitions(keep=3)
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


@ALSO_SDXL_SLOW
def test_the_same_seed_gives_the_same_file_and_another_does_not(base, pictures, tmp_path):
    first = train(base, pictures, tmp_path / "a")
    same(first, train(base, pictures, tmp_path / "b"))
    other = train(base, pictures, tmp_path / "c", seed=8)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.repetitions(keep=2)
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
@ALSO_SDXL_SLOW
def test_how_it_is_done_does_not_change_a_bit_of_the_result(base, pictures, tmp_path, change):
    extra = {"flip_aug": True, "shuffle_caption": True, "network_dropout": 0.2, "caption_dropout_rate": 0.3}
    expected = train(base, pictures, tmp_path / "a", **extra)
    if "sample_at_first" in change:
        (tmp_path / "p.txt").write_text("a dog --w 64 --h 64 --s 2\n", encoding="utf-8")
        change = change | {"sample_prompts": tmp_path / "p.txt"}
    same(train(base, pictures, tmp_path / "b", **extra, **change), expected)


@ALSO_SDXL_SLOW
def test_checkpointing_gives_the_same_result_to_rounding(base, pictures, tmp_path):
    expected = train(base, pictures, tmp_path / "a", network_dropout=0.2)
    same(train(base, pictures, tmp_path / "b", network_dropout=0.2, gradient_checkpointing=True), expected, 1e-3)


@ALSO_SDXL_SLOW
def test_accumulated_batches_equal_one_large_batch(base, pictures, tmp_path):
    for path in (pictures / "1_sks dog").glob("[23].*"):
        path.unlink()
    single = {"optimizer_type": "SGDNesterov", "learning_rate": "1.0", "max_train_steps": 4}
    one = train(base, pictures, tmp_path / "a", train_batch_size=2, **single)
    two = train(base, pictures, tmp_path / "b", train_batch_size=1, gradient_accumulation_steps=2, **single)
    same(two, one, 1e-3)


@ALSO_SDXL_SLOW
def test_two_processes_equal_one_with_the_doubled_batch(base, pictures, tmp_path):
    for path in (pictures / "1_sks dog").glob("[23].*"):
        path.unlink()
    extra = {"optimizer_type": "SGDNesterov", "learning_rate": "1.0", "max_train_steps": 4}
    one = train(base, pictures, tmp_path / "one", train_batch_size=2, **extra)
    argv = options(base, pictures, tmp_path / "two", train_batch_size=1, **extra)
    script = tmp_path / "ranks.py"
    script.write_text(RANKS.format(root=str(ROOT), dumped=str(tmp_path / "rank")), encoding="utf-8")
    done = two_processes(script, *argv)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(f"{tmp_path / 'rank'}{rank}.pt") for rank in range(2)]
    same(ranks[0], ranks[1])
    lines = [
        json.loads(line) for line in (tmp_path / "two" / "x-metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [line["step"] for line in lines if "loss/current" in line] == [1, 2, 3, 4], "one run, not two"
    found = metadata(tmp_path / "two" / "x.safetensors")
    assert (found["ss_steps"], found["ss_total_batch_size"]) == ("4", "2")
    same(load_file(tmp_path / "two" / "x.safetensors"), one, 1e-3)


RANKS = """
import os, sys
sys.path.insert(0, {root!r})
import torch
import train_network
from library.training import recipe

build, made = recipe.build_network, []
def spy(*given, **more):
    made.append(build(*given, **more))
    return made[0]
recipe.build_network = spy
train_network.main(sys.argv[1:])
torch.save(made[0].state_dict(), {dumped!r} + os.environ["RANK"] + ".pt")
"""


@pytest.mark.repetitions(keep=2)
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


@ALSO_SDXL_SLOW
def test_training_goes_on_from_weights_and_takes_their_dimensions(base, pictures, tmp_path):
    first = train(base, pictures, tmp_path / "a", network_dim=3, network_alpha=2)
    path = tmp_path / "a" / "x.safetensors"
    still = {"learning_rate": "1e-12", "max_train_steps": 1}
    same(train(base, pictures, tmp_path / "b", network_dim=3, network_weights=path, **still), first, 1e-5)
    again = train(base, pictures, tmp_path / "c", network_weights=path, dim_from_weights=True, **still)
    same(again, first, 1e-5)
    told = metadata(tmp_path / "c" / "x.safetensors")
    assert (told["ss_network_dim"], told["ss_network_alpha"]) == ("3", "2.0")
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


@ALSO_SDXL_SLOW
def test_scaled_norms_stay_below_their_limit(base, pictures, tmp_path):
    weights = train(base, pictures, tmp_path, scale_weight_norms="0.001")
    names = [name.removesuffix(".alpha") for name in weights if name.endswith(".alpha")]
    factors = [(weights[f"{name}.lora_up.weight"], weights[f"{name}.lora_down.weight"]) for name in names]
    norms = torch.stack([(up.flatten(1) @ down.flatten(1) / 4).norm() for up, down in factors])
    assert norms.max() == pytest.approx(0.001, rel=1e-3)
    assert (norms > 0.000999).sum() > len(norms) / 2


@pytest.mark.repetitions(keep=4)
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
@ALSO_SDXL_SLOW
def test_it_learns_with_other_settings(base, pictures, tmp_path, more):
    weights = train(base, pictures, tmp_path, **more)
    ups = [tensor for name, tensor in weights.items() if "lora_up" in name]
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert sum(bool(tensor.any()) for tensor in ups) > 0.9 * len(ups)


# ---- holding the network to the base model ------------------------------------------------------------------


def preserving(pictures, tmp_path, preserved):
    """Return the options of a run in which the base model may be the target."""
    path = tmp_path / "data.toml"
    table = f"[[datasets.subsets]]\nimage_dir = '{pictures / '1_sks dog'}'\n"
    more = "custom_attributes.diff_output_preservation = true\n" if preserved else ""
    path.write_text(f"[[datasets]]\nresolution = 64\n{table}{more}", encoding="utf-8")
    return BY_FILE | {"dataset_config": path}


def test_where_the_base_model_is_the_target_a_fresh_network_has_nothing_to_learn(base, pictures, tmp_path):
    learned = train(base, pictures, tmp_path / "a", **preserving(pictures, tmp_path, False))
    assert any(bool(tensor.any()) for name, tensor in learned.items() if "lora_up" in name)
    kept = train(base, pictures, tmp_path / "b", **preserving(pictures, tmp_path, True))
    lines = (tmp_path / "b" / "x-metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(json.loads(line).get("loss/current", 0.0) == 0.0 for line in lines)
    assert not any(bool(tensor.any()) for name, tensor in kept.items() if "lora_up" in name)


@pytest.mark.slow
def test_a_network_that_went_astray_is_led_back_to_the_base_model(base, pictures, tmp_path):
    more = {"max_train_steps": 12}
    train(base, pictures, tmp_path / "a", **more, **preserving(pictures, tmp_path, False))
    start = {"network_weights": tmp_path / "a" / "x.safetensors", "optimizer_type": "SGD", "learning_rate": "1e-1"}
    train(base, pictures, tmp_path / "b", **more, **start, **preserving(pictures, tmp_path, True))
    lines = (tmp_path / "b" / "x-metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["loss/current"] for line in lines if "loss/current" in line]
    assert losses[0] > 0
    assert sum(losses[-4:]) < sum(losses[:4])
