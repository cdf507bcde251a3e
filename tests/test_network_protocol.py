"""The methods of network modules: the suite's by type, and two others, one with the fewest and one with the most."""

from __future__ import annotations

import json
import sys
import types
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensors import assert_same
from torch import nn

import networks.dylora
import networks.lora
from library.errors import UserError
from library.networks import protocol

# Ours hold the types; mypy says so.
if TYPE_CHECKING:
    OUR_MODULES: list[protocol.NetworkModule] = [networks.lora, networks.dylora]
    OUR_READERS: list[protocol.ReadsFiles] = [networks.lora, networks.dylora]
    OUR_CHECKS: list[protocol.ChecksArguments] = [networks.lora, networks.dylora]
    OURS: list[type[protocol.Network]] = [networks.lora.LoRANetwork, networks.dylora.DyLoRANetwork]
    MULTIPLIER: type[protocol.HasMultiplier] = networks.lora.LoRANetwork

    class EveryMethod(networks.dylora.DyLoRANetwork):
        """Ours with the two optional methods that it lacks."""

        def prepare_network(self, args: object, /) -> None: ...
        def on_step_start(self, text_encoder: object, unet: object, /) -> None: ...

    OPTIONAL: type[protocol.OptionalMethods] = EveryMethod


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

    def prepare_optimizer_params(self, text_encoder_lr, unet_lr, learning_rate=None):
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
        assert self.unet.grad is not None
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
    vars(module)["create_network"] = create_network
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
    vars(module).update(create_network=create_network, create_network_from_weights=create_network_from_weights)
    monkeypatch.setitem(sys.modules, "complete_network", module)


def metrics(folder):
    lines = (folder / "x-metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "loss/current" in line]


def test_a_module_with_only_the_required_methods_trains_and_resumes(minimal, run, tmp_path, caplog):
    given: dict[str, Any] = {"network_module": "minimal_network", "text_encoder_lr": "1e-3", "unet_lr": "1e-2"}
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
    run("parts", killed_after=1, save_state=True, save_every_n_steps=1, **given)
    assert_same(run("parts", resume="auto", **given), weights)


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
    with pytest.raises(UserError, match="minimal_network has no load_weights"):
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
