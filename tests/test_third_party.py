"""lycoris as the network module of a training: it trains, resumes, is read again, and what it refuses is told."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch
from safetensors.torch import save_file
from tensors import assert_same, metadata

import networks.lora
from library import logs
from library.errors import UserError
from library.networks.views import CanonicalTextEncoder
from library.training.prepare import placing

LYCORIS = {"network_module": "lycoris.kohya"}


@pytest.fixture
def lycoris():
    return pytest.importorskip("lycoris.kohya")


def forget_preset():
    """Leave lycoris as a new process has it: it keeps the preset in a class."""
    if "lycoris.kohya" in sys.modules:
        module = sys.modules["lycoris.kohya"]
        module.LycorisNetworkKohya.apply_preset(module.PRESET["full"])


@pytest.fixture
def run(run):
    """Return what trains as the first run of a new process."""

    def as_new(*out, **more):
        forget_preset()
        return run(*out, **more)

    return as_new


def arguments(algo, *more):
    return LYCORIS | {"network_args": [f"algo={algo}", "preset=attn-mlp", *more]}


RUNS = {
    "lokr": arguments("lokr", "rank_dropout=0.1"),
    # Norms are scaled by a buffer that lycoris writes into no file.
    "locon": arguments("locon", "rank_dropout=0.1") | {"scale_weight_norms": 0.01, "network_dropout": 0.1},
    # The block of ranks is drawn with Python's own generator.
}
SLOW_RUNS = {
    "dylora": arguments("dylora", "block_size=1"),
    "loha": arguments("loha", "module_dropout=0.2"),
    "lora": arguments("lora", "loraplus_lr_ratio=4") | {"optimizer_type": "AdamW8bit"},
    "dora": arguments("locon", "dora_wd=True"),
    "lokr of factors": arguments("lokr", "factor=4", "decompose_both=True", "use_scalar=True") | {"network_dim": 2},
    "full": arguments("full"),
    "diag-oft": arguments("diag-oft"),
    "glora": arguments("glora"),
    "U-Net only": arguments("lokr") | {"network_train_unet_only": True},
    "accumulated": arguments("loha") | {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    "convolutions": LYCORIS | {"network_args": ["algo=locon", "preset=unet-convblock-only", "conv_dim=2"]},
    "Adafactor": arguments("locon") | {"optimizer_type": "AdaFactor"},
}
CASES = [*RUNS.items(), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_RUNS.items())]


@pytest.mark.repetitions(keep=1)
@pytest.mark.parametrize(("name", "more"), CASES, ids=[*RUNS, *SLOW_RUNS])
def test_lycoris_trains_and_a_resumed_run_equals_one_never_stopped(lycoris, run, model_store, tmp_path, name, more):
    expected = run("whole", **more)
    check_file(tmp_path / "whole" / "x.safetensors", expected, more)
    check_effect(lycoris, model_store("sd1")[0], expected, tmp_path / "whole" / "x.safetensors", more)
    run("parts", killed_after=1, save_state=True, save_every_n_steps=1, **more)
    assert_same(run("parts", resume="auto", **more), expected)


def check_file(path, weights, more):
    names = {name.split(".")[0] for name in weights}
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    written = metadata(path)
    assert written["ss_network_module"] == "lycoris.kohya"
    assert json.loads(written["ss_network_args"])["algo"] == more["network_args"][0].removeprefix("algo=")
    assert written["sshs_model_hash"]
    if "preset=attn-mlp" in more["network_args"]:
        assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q" in names
    is_text_trained = "preset=attn-mlp" in more["network_args"] and "network_train_unet_only" not in more
    assert ("lora_te_text_model_encoder_layers_0_self_attn_q_proj" in names) is is_text_trained


@torch.no_grad()
def check_effect(lycoris, models, weights, path, more):
    """Hold that the file changes what each trained part of the base model gives.

    networks.lora reads what is a LoRA to it; lycoris the rest, but not its own files of dylora.
    """
    reader = networks.lora if any("lora_up" in name for name in weights) else lycoris
    lycoris.LycorisNetworkKohya.apply_preset(lycoris.PRESET["attn-mlp"])
    unet, encoder = copy.deepcopy(models["unet"]), copy.deepcopy(models["text_encoder"])
    generator = torch.Generator().manual_seed(0)
    noisy, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 77, 64, generator=generator)
    tokens = torch.arange(77)[None]

    def outputs():
        return unet(noisy, torch.tensor([500]), text).sample, encoder(tokens).last_hidden_state

    before = outputs()
    shim = CanonicalTextEncoder(encoder)
    network, weights = reader.create_network_from_weights(1.0, str(path), None, shim, unet)
    network.apply_to(shim, unet, True, True)
    network.load_state_dict(weights, strict=False)
    after = outputs()
    for index, prefix in enumerate(("lora_unet", "lora_te")):
        is_trained = any(name.startswith(prefix) for name in weights)
        assert torch.allclose(before[index], after[index], atol=1e-5) is not is_trained


def test_the_default_preset_of_lycoris_ends_before_training_in_one_line(lycoris, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(logs, "set_up_logging", lambda: None)
    with pytest.raises(SystemExit) as stop:
        logs.run_script(lambda argv: run(**LYCORIS, network_args=["algo=lokr"]))
    assert stop.value.code == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: --network_module lycoris.kohya failed in create_network: AssertionError: duplicated" in told
    assert "--network_args: algo=lokr;" in told
    assert "preset=attn-mlp" in told
    assert not list((tmp_path / "o").glob("x*"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["algo=nope", "preset=attn-mlp"], "failed in create_network: KeyError: 'nope' \\(kohya.py:"),
        (["preset=nope"], "failed in create_network: AssertionError: assert preset is not None .*: preset=nope;"),
    ],
)
def test_what_lycoris_refuses_is_told_in_a_line(lycoris, run, given, message):
    with pytest.raises(UserError, match=message) as error:
        run(**LYCORIS, network_args=given)
    assert "\n" not in str(error.value)


def test_a_lycoris_file_is_gone_on_from(lycoris, run, tmp_path, caplog):
    first = run("first", **arguments("lokr"))
    start = {"network_weights": tmp_path / "first" / "x.safetensors"}
    still = {"learning_rate": 1e-9, "max_train_steps": 1, "seed": 2}
    for more in ({}, {"dim_from_weights": True}):
        second = run("second", **arguments("lokr"), **start, **still, **more)
        assert second.keys() == first.keys()
        for name, tensor in first.items():
            torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-6)
    with pytest.raises(
        UserError, match="failed in load_weights: RuntimeError: .*size mismatch.*; --network_args: algo=lo"
    ):
        run("other", **arguments("lokr", "factor=2"), **start)
    run("other", **arguments("lokr", "full_matrix=True"), **start, **still)
    assert "x.safetensors: 200 of 736 tensors (lora_te_text" in caplog.text
    assert "have no place in the modules of the network and are left out: give the --network_args" in caplog.text
    with pytest.raises(UserError, match="lycoris.kohya loaded nothing of it"):
        run("other", **arguments("loha"), **start)


def test_base_weights_of_lycoris_are_merged_with_their_multiplier(lycoris, run, tmp_path, monkeypatch):
    run("first", **arguments("lokr"))
    file = tmp_path / "first" / "x.safetensors"
    changes = []
    plain = placing.merge_base_weights

    def merge(config, models):
        weights = [models.unet.down_blocks[0].attentions[0].proj_in.weight]
        weights.append(models.texts[0].module.get_submodule("encoder.layers.0.mlp.fc1").weight)
        before = [weight.detach().clone() for weight in weights]
        plain(config, models)
        changes.append([weight.detach() - old for weight, old in zip(weights, before, strict=True)])

    monkeypatch.setattr(placing, "merge_base_weights", merge)
    for multipliers in ([1.0], [-0.5, 2.0]):
        more = {"base_weights": [file] * len(multipliers), "base_weights_multiplier": multipliers}
        run(**arguments("lokr"), **more, max_train_steps=1)
    whole, both = changes
    for index in range(2):
        assert whole[index].abs().max() > 1e-4
        torch.testing.assert_close(both[index], 1.5 * whole[index], rtol=0, atol=1e-6)


def test_base_weights_that_change_nothing_are_told(lycoris, run, tmp_path):
    save_file({"lora_unet_other.lora_up.weight": torch.ones(2, 2)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="w.safetensors changes nothing"):
        run(**arguments("lokr"), base_weights=[tmp_path / "w.safetensors"])


def test_a_state_of_other_arguments_is_refused(lycoris, run):
    run(**arguments("lokr"), max_train_steps=1, save_state=True)
    for other in ({"network_alpha": 2}, {"network_args": ["algo=loha", "preset=attn-mlp"]}):
        with pytest.raises(UserError, match="the state does not fit this run"):
            run(**(arguments("lokr") | {"resume": "auto"} | other))


def test_without_the_package_its_name_is_told(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "lycoris", None)
    monkeypatch.delitem(sys.modules, "lycoris.kohya", raising=False)
    with pytest.raises(UserError, match="--network_module lycoris.kohya: .*; pip install lycoris-lora"):
        run(**LYCORIS)
