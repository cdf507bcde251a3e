"""Third parties' network modules from the command line: lycoris, and two of our own that have the least and the most."""

from __future__ import annotations

import copy
import json
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import networks.lora
import train_network
from library import logs
from library.errors import UserError
from library.training import network_protocol, recipe
from library.training.run import loop

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
def base(model_store):
    return model_store("sd1")[1]["safetensors"]


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "train" / "1_x"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(4):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder.parent


@pytest.fixture
def run(base, pictures, tmp_path):
    """Return a function that trains from a command line and returns the weights it wrote."""

    def train(out="o", **more):
        values = {
            "pretrained_model_name_or_path": base,
            "train_data_dir": pictures,
            "resolution": 64,
            "output_dir": tmp_path / out,
            "output_name": "x",
            "learning_rate": "1e-2",
            "max_train_steps": 2,
            "max_data_loader_n_workers": 0,
            "cache_latents": True,
            "seed": 1,
        } | more
        forget_preset()
        assert train_network.main(list(command_line(values))) == 0
        return load_file(tmp_path / out / "x.safetensors")

    return train


def command_line(values):
    for name, value in values.items():
        if value is not None and value is not False:
            yield f"--{name}"
            if value is not True:
                yield from map(str, value if isinstance(value, list) else [value])


def arguments(algo, *more):
    return LYCORIS | {"network_args": [f"algo={algo}", "preset=attn-mlp", *more]}


def same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def kill_after(monkeypatch, steps):
    plain = loop.Trainer._after_step

    def killed(self, *args):
        plain(self, *args)
        if self.num_done == steps:
            raise MemoryError("killed")

    monkeypatch.setattr(loop.Trainer, "_after_step", killed)


# ---- lycoris ------------------------------------------------------------------------------------------------

RUNS = {
    "lokr": arguments("lokr", "rank_dropout=0.1"),
    "loha": arguments("loha", "module_dropout=0.2"),
    # Norms are scaled by a buffer that lycoris writes into no file.
    "locon": arguments("locon", "rank_dropout=0.1") | {"scale_weight_norms": 0.01, "network_dropout": 0.1},
    # The block of ranks is drawn with Python's own generator.
    "dylora": arguments("dylora", "block_size=1"),
}
SLOW_RUNS = {
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


@pytest.mark.parametrize(("name", "more"), CASES, ids=[*RUNS, *SLOW_RUNS])
def test_lycoris_trains_and_a_resumed_run_equals_one_never_stopped(
    lycoris, run, model_store, tmp_path, monkeypatch, name, more
):
    expected = run("whole", **more)
    check_file(tmp_path / "whole" / "x.safetensors", expected, more)
    check_effect(lycoris, model_store("sd1")[0], expected, tmp_path / "whole" / "x.safetensors", more)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        kill_after(patch, 1)
        run("parts", save_state=True, save_every_n_steps=1, **more)
    same(run("parts", resume="auto", **more), expected)


def check_file(path, weights, more):
    names = {name.split(".")[0] for name in weights}
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_module"] == "lycoris.kohya"
    assert json.loads(metadata["ss_network_args"])["algo"] == more["network_args"][0].removeprefix("algo=")
    assert metadata["sshs_model_hash"]
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
    shim = network_protocol.CanonicalTextEncoder(encoder)
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
    assert "x.safetensors: 200 of 736 tensors have no place in the network, such as lora_te_text" in caplog.text
    with pytest.raises(UserError, match="lycoris.kohya took over nothing of it"):
        run("other", **arguments("loha"), **start)


def test_base_weights_of_lycoris_are_merged_with_their_multiplier(lycoris, run, tmp_path, monkeypatch):
    run("first", **arguments("lokr"))
    file = tmp_path / "first" / "x.safetensors"
    changes = []
    plain = recipe.merge_base_weights

    def merge(config, models):
        weights = [models.unet.down_blocks[0].attentions[0].proj_in.weight]
        weights.append(models.text_encoders[0].get_submodule("encoder.layers.0.mlp.fc1").weight)
        before = [weight.detach().clone() for weight in weights]
        plain(config, models)
        changes.append([weight.detach() - old for weight, old in zip(weights, before, strict=True)])

    monkeypatch.setattr(recipe, "merge_base_weights", merge)
    for multipliers in ([1.0], [-0.5, 2.0]):
        more = {"base_weights": [file] * len(multipliers), "base_weights_multiplier": multipliers}
        run(**arguments("lokr"), **more, max_train_steps=1)
    whole, more = changes
    for index in range(2):
        assert whole[index].abs().max() > 1e-4
        torch.testing.assert_close(more[index], 1.5 * whole[index], rtol=0, atol=1e-6)


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


# ---- the least and the most that a module can have ----------------------------------------------------------


class Minimal(nn.Module):
    """A gain on one layer of each model, with the required methods and no more."""

    def __init__(self, text_encoder, unet):
        super().__init__()
        self.text = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.unet = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.frozen = nn.Parameter(torch.ones(()), requires_grad=False)

    def apply_to(self, text_encoder, unet, apply_text_encoder, apply_unet):
        if apply_text_encoder:
            layer = text_encoder.text_model.final_layer_norm
            layer.register_forward_hook(lambda module, given, out: out * (self.frozen + self.text.sum()))
        if apply_unet:
            unet.conv_out.register_forward_hook(lambda module, given, out: out * (1 + self.unet))

    def prepare_optimizer_params(self, text_encoder_lr, unet_lr):
        return [
            {"params": (p for p in [self.text, self.frozen]), "lr": text_encoder_lr},
            {"params": []},
            {"params": [self.unet], "lr": unet_lr},
        ]

    def prepare_grad_etc(self, text_encoder, unet):
        self.text.requires_grad_(True)
        self.unet.requires_grad_(True)

    def on_epoch_start(self, text_encoder, unet):
        self.train()

    def get_trainable_params(self):
        return self.parameters()

    def save_weights(self, file, dtype, metadata):
        save_file(
            {name: tensor.to(dtype or tensor.dtype) for name, tensor in self.state_dict().items()}, file, metadata
        )


class Complete(Minimal):
    """The same with every optional method."""

    def prepare_network(self, args):
        assert (args.network_dim, args.unet_lr, args.network_module) == (3, 0.5, "complete_network")

    def prepare_optimizer_params(self, text_encoder_lr, unet_lr, learning_rate):
        raise AssertionError("the one for several rates is preferred")

    def prepare_optimizer_params_with_multiple_te_lrs(self, text_encoder_lrs, unet_lr, learning_rate):
        assert (text_encoder_lrs, unet_lr, learning_rate) == ([0.25], 0.5, 0.01)
        return super().prepare_optimizer_params(text_encoder_lrs[0], unet_lr), ["text", "nothing", "picture"]

    def enable_gradient_checkpointing(self):
        pass

    def on_step_start(self, text_encoder, unet):
        assert self.training

    def load_weights(self, file):
        return self.load_state_dict(load_file(file))

    def merge_to(self, text_encoder, unet, weights_sd, dtype, device):
        unet.conv_out.weight.data *= 1 + weights_sd["unet"]

    def apply_max_norm_regularization(self, max_norm_value, device):
        return torch.tensor(1), torch.tensor(0.5), 0.75

    def update_grad_norms(self):
        self.norm = self.unet.grad.norm()
        assert self.norm > 0

    def update_norms(self):
        pass

    def weight_norms(self):
        return torch.tensor([1.0, 2.0])

    def grad_norms(self):
        return self.norm[None]

    def combined_weight_norms(self):
        return None


@pytest.fixture
def minimal(monkeypatch):
    def create_network(multiplier, network_dim, network_alpha, vae, text_encoder, unet, neuron_dropout=None, **kwargs):
        assert kwargs == {"dropout": None}
        return Minimal(text_encoder, unet)

    module = types.ModuleType("minimal_network")
    module.create_network = create_network
    monkeypatch.setitem(sys.modules, "minimal_network", module)
    return module


@pytest.fixture
def calls(monkeypatch):
    """Return a list that gets the name of each method of Complete when it is called."""
    called = []

    def recorded(name, method):
        def call(*args):
            called.append(name)
            return method(*args)

        return call

    for name, method in list(vars(Complete).items()):
        if not name.startswith("_"):
            monkeypatch.setattr(Complete, name, recorded(name, method))
    return called


@pytest.fixture
def complete(monkeypatch):
    def create_network(multiplier, network_dim, network_alpha, vae, text_encoder, unet, neuron_dropout=None, **kwargs):
        assert (multiplier, network_dim, network_alpha, neuron_dropout) == (1.0, 3, 2.0, 0.5)
        assert kwargs == {"key": "3", "dropout": 0.5}
        return Complete(text_encoder, unet)

    def create_network_from_weights(
        multiplier, file, vae, text_encoder, unet, weights_sd=None, for_inference=False, **kwargs
    ):
        weights = weights_sd or load_file(file)
        network = Complete(text_encoder, unet)
        network.load_state_dict(weights)
        return network, weights

    module = types.ModuleType("complete_network")
    module.create_network, module.create_network_from_weights = create_network, create_network_from_weights
    monkeypatch.setitem(sys.modules, "complete_network", module)


def metrics(folder):
    lines = (folder / "x-metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "loss/current" in line]


def test_a_module_with_only_the_required_methods_trains_and_resumes(minimal, run, tmp_path, monkeypatch, caplog):
    given = {"network_module": "minimal_network", "text_encoder_lr": "1e-3", "unet_lr": "1e-2"}
    given |= {"gradient_checkpointing": True, "scale_weight_norms": 1.0}
    weights = run("whole", **given)
    assert float(weights["unet"]) != 0
    assert weights["text"].all()
    assert float(weights["frozen"]) == 1, "what the module does not train stays"
    line = metrics(tmp_path / "whole")[-1]
    assert {name: value for name, value in line.items() if name.startswith("lr/")} == {
        "lr/group0": 1e-3,
        "lr/group2": 1e-2,
    }
    assert not any(name.startswith(("norm/", "max_norm/")) for name in line)
    assert "--scale_weight_norms: minimal_network does not offer it" in caplog.text
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        kill_after(patch, 1)
        run("parts", save_state=True, save_every_n_steps=1, **given)
    same(run("parts", resume="auto", **given), weights)


def test_every_optional_method_is_called_in_its_turn(complete, calls, run, tmp_path):
    given = {"network_module": "complete_network", "network_dim": 3, "network_alpha": 2, "network_args": ["key=3"]}
    given |= {"text_encoder_lr": 0.25, "unet_lr": 0.5, "network_dropout": 0.5, "gradient_checkpointing": True}
    given |= {"max_train_steps": 1, "learning_rate": "1e-2"}
    trained = run("first", **given)
    assert calls == [
        "prepare_network",
        "enable_gradient_checkpointing",
        "prepare_optimizer_params_with_multiple_te_lrs",
        "on_step_start",
        "update_grad_norms",
        "update_norms",
        "weight_norms",
        "grad_norms",
        "combined_weight_norms",
    ]
    line = metrics(tmp_path / "first")[0]
    assert line["norm/avg_key_norm"] == 1.5
    assert line["norm/avg_grad_norm"] > 0
    assert "norm/avg_combined_norm" not in line
    assert {name for name in line if name.startswith("lr/")} == {"lr/text", "lr/picture"}

    calls.clear()
    file = tmp_path / "first" / "x.safetensors"
    second = run(
        "second",
        network_weights=file,
        base_weights=[file],
        base_weights_multiplier=[0.5],
        scale_weight_norms=1,
        **given,
    )
    assert calls[:4] == ["merge_to", "prepare_network", "load_weights", "enable_gradient_checkpointing"]
    assert "apply_max_norm_regularization" in calls
    assert "weight_norms" not in calls
    line = metrics(tmp_path / "second")[0]
    assert (line["max_norm/keys_scaled"], line["norm/avg_key_norm"], line["max_norm/max_key_norm"]) == (1, 0.5, 0.75)
    assert float(second["unet"]) != float(trained["unet"]) != 0


def test_a_module_that_fails_or_lacks_something_is_told_before_training(minimal, run, tmp_path, monkeypatch):
    given = {"network_module": "minimal_network"}
    save_file({"unet": torch.ones(())}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="--base_weights: minimal_network has no create_network_from_weights"):
        run(**given, base_weights=[tmp_path / "w.safetensors"])
    with pytest.raises(UserError, match="failed in load_weights: AttributeError: .*load_weights"):
        run(**given, network_weights=tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="failed in create_network: AssertionError: .*; --network_args: a=1; see the"):
        run(**given, network_args=["a=1"])
    with monkeypatch.context() as patch:
        patch.delattr(Minimal, "on_epoch_start")
        with pytest.raises(UserError, match="minimal_network: its network has no on_epoch_start"):
            run(**given)
    with monkeypatch.context() as patch:
        patch.setattr(minimal, "create_network", lambda *args, **kwargs: None)
        with pytest.raises(UserError, match="minimal_network made no network"):
            run(**given)


def test_a_module_that_cannot_be_imported_is_told(run, tmp_path, monkeypatch):
    (tmp_path / "broken_network.py").write_text("import torch\ntorch.no_such_name\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"failed in import: AttributeError: .*no_such_name.*\(broken_network.py:2\)"):
        run(network_module="broken_network")


def test_a_mistake_in_a_module_of_ours_shows(run, monkeypatch):
    def create_network(*args, **kwargs):
        raise KeyError("ours")

    monkeypatch.setattr(networks.lora, "create_network", create_network)
    with pytest.raises(KeyError, match="ours"):
        run(network_module="networks.lora")
