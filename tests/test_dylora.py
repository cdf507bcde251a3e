"""DyLoRA: the paper's algorithm, its draws, and training with it."""

from __future__ import annotations

import collections
import json

import pytest
import torch
from runs import ALSO_SDXL_SLOW, C3LIER, LIERLA, RATE, options, same, train
from tensors import metadata

import train_network
from library.adapters.blocks import SD
from library.errors import UserError
from networks import dylora, lora
from networks.dylora import DyLoRANetwork


class Transformer2DModel(torch.nn.Module):
    """A container of targets: a linear layer, a 1x1 convolution."""

    def __init__(self):
        super().__init__()
        self.proj = torch.nn.Conv2d(6, 5, 1)
        self.linear = torch.nn.Linear(5, 7)

    def forward(self, x):
        return self.linear(self.proj(x).flatten(2).transpose(1, 2))


class ResnetBlock2D(torch.nn.Module):
    """A container with a 3x3 convolution."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 6, 3, stride=2, padding=1)

    def forward(self, x):
        return self.conv(x)


class Toy(torch.nn.Module):
    """A model with one layer of each kind."""

    def __init__(self):
        super().__init__()
        self.resnet, self.attention = ResnetBlock2D(), Transformer2DModel()
        self.requires_grad_(False)

    def forward(self, x):
        return self.attention(self.resnet(x))


def toy_network(update="all", rank=8, unit=2, alpha=3.0, **more):
    torch.manual_seed(0)
    toy = Toy().double()
    network = dylora.create_network(
        1.0,
        rank,
        alpha,
        None,
        None,
        toy,
        unit=str(unit),
        dylora_update=update,
        conv_dim=str(rank),
        conv_alpha=str(alpha),
    ).double()
    for module in network.modules_in_order():
        torch.nn.init.normal_(module.lora_up.weight, std=0.3)
    network.apply_to(None, toy)
    network.train()
    return toy, network


# ---- the algorithm ------------------------------------------------------------------------------------------


class Reference:
    """The paper's algorithm written out: dense changes of the weights, gradients of the truncated parts, float64."""

    def __init__(self, toy, network, unit, alpha, update):
        self.unit, self.alpha, self.update = unit, alpha, update
        layers = {"conv": toy.resnet.conv, "proj": toy.attention.proj, "linear": toy.attention.linear}
        self.base = {name: (layer.weight.clone(), layer.bias.clone()) for name, layer in layers.items()}
        self.factors = {}
        for module in network.modules_in_order():
            name = next(name for name, layer in layers.items() if layer is module.org_module)
            down, up = module.lora_down.weight.detach().flatten(1), module.lora_up.weight.detach().flatten(1)
            self.factors[name] = [down.clone(), up.clone()]

    def step(self, x, b, rate):
        """Return the output at rank b; then make a step of gradient descent on half its square."""
        leaves = {}
        for name, (down, up) in self.factors.items():
            first = b - self.unit if self.update == "unit" else 0
            leaves[name] = (down[first:b].clone().requires_grad_(), up[:, first:b].clone().requires_grad_(), first)
        weights = {}
        for name, (down, up, first) in leaves.items():
            whole_down = torch.cat([self.factors[name][0][:first], down])
            whole_up = torch.cat([self.factors[name][1][:, :first], up], dim=1)
            weight, _ = self.base[name]
            weights[name] = weight + (self.alpha / b) * (whole_up @ whole_down).reshape(weight.shape)
        functional = torch.nn.functional
        hidden = functional.conv2d(x, weights["conv"], self.base["conv"][1], stride=2, padding=1)
        hidden = functional.conv2d(hidden, weights["proj"], self.base["proj"][1])
        output = functional.linear(hidden.flatten(2).transpose(1, 2), weights["linear"], self.base["linear"][1])
        (output.square().sum() / 2).backward()
        gradients = {}
        for name, (down, up, first) in leaves.items():
            whole = [torch.zeros_like(factor) for factor in self.factors[name]]
            whole[0][first:b], whole[1][:, first:b] = down.grad, up.grad
            gradients[name] = whole
            self.factors[name][0] -= rate * whole[0]
            self.factors[name][1] -= rate * whole[1]
        return output.detach(), gradients


@pytest.mark.parametrize("update", ["all", "unit"])
def test_outputs_gradients_and_steps_are_those_of_the_paper(update):
    toy, network = toy_network(update)
    reference = Reference(toy, network, unit=2, alpha=3.0, update=update)
    layers = {toy.resnet.conv: "conv", toy.attention.proj: "proj", toy.attention.linear: "linear"}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    seen = set()
    for step in range(12):
        network.on_optimizer_step(step * 7919)
        seen.add(network.sampled_rank)
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(step)).double()
        output = toy(x)
        expected, gradients = reference.step(x, network.sampled_rank, 0.01)
        torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
        (output.square().sum() / 2).backward()
        for module in network.modules_in_order():
            down, up = gradients[layers[module.org_module]]
            torch.testing.assert_close(module.lora_down.weight.grad.flatten(1), down, rtol=1e-8, atol=1e-9)
            torch.testing.assert_close(module.lora_up.weight.grad.flatten(1), up, rtol=1e-8, atol=1e-9)
        optimizer.step()
        optimizer.zero_grad()
    assert seen == {2, 4, 6, 8}


def test_what_lies_beyond_the_rank_has_no_part_in_the_output():
    toy, network = toy_network()
    x = torch.randn(1, 4, 8, 8).double()
    key = next(key for key in range(100) if network.on_optimizer_step(key) or network.sampled_rank == 4)
    network.on_optimizer_step(key)
    before = toy(x)
    with torch.no_grad():
        for module in network.modules_in_order():
            module.lora_down.weight[4:] = 1e6
            module.lora_up.weight[:, 4:] = 1e6
    assert torch.equal(toy(x), before)


def test_draws_are_uniform_and_a_function_of_the_key():
    _, network = toy_network(rank=8, unit=2)
    drawn = []
    for key in range(2000):
        network.on_optimizer_step(key)
        drawn.append(network.sampled_rank)
    counts = collections.Counter(drawn)
    assert set(counts) == {2, 4, 6, 8}
    assert all(abs(count - 500) < 100 for count in counts.values())
    _, other = toy_network(rank=8, unit=2)
    other.on_optimizer_step(1234)
    assert other.sampled_rank == drawn[1234]


def test_evaluation_uses_a_fixed_rank_and_draws_nothing():
    toy, network = toy_network()
    x = torch.randn(1, 4, 8, 8).double()
    network.eval()
    full = toy(x)
    for key in range(5):
        network.on_optimizer_step(key)
        assert torch.equal(toy(x), full)
    network.set_rank(2)
    truncated = toy(x)
    assert not torch.equal(truncated, full)
    network.train()
    network.eval()
    assert torch.equal(toy(x), truncated)
    with pytest.raises(ValueError, match="from 1 to 8, got 9"):
        network.set_rank(9)


def test_in_half_precision_the_scale_of_a_rank_is_not_rounded():
    """Of rank 12 in 16 the share is 4/3, which bfloat16 rounds by a third of a percent."""
    torch.manual_seed(0)
    toy = Toy()
    network = dylora.create_network(1.0, 16, 16.0, None, None, toy, unit="4")
    for module in network.modules_in_order():
        torch.nn.init.constant_(module.lora_up.weight, 1.0)
        torch.nn.init.constant_(module.lora_down.weight, 1.0)
        for parameter in module.org_module.parameters():
            torch.nn.init.zeros_(parameter)
    network.apply_to(None, toy)
    network.eval()
    network.set_rank(12)
    linear = toy.attention.linear
    with torch.autocast("cpu", torch.bfloat16):
        output = linear(torch.ones(1, 3, 5))
    assert output.unique().tolist() == [80.0]  # 16 / 12 * 12 ranks * 5 inputs


def test_a_compiled_module_is_compiled_once_for_all_ranks():
    toy, network = toy_network()
    network.keep_shapes()
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(toy, backend=counter)
    x = torch.randn(1, 4, 8, 8).double()
    for key in range(8):
        network.on_optimizer_step(key)
        torch.testing.assert_close(compiled(x), toy(x))
    assert counter.frame_count <= 3  # the graphs of one compilation, none for each rank
    torch._dynamo.reset()


# ---- arguments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "arguments", "message"),
    [
        (
            16,
            {"unit": "5"},
            "unit 5 does not divide network_dim 16: take a unit of 1, 2, 4, 8, 16, or network_dim 15 or 20",
        ),
        (2, {"unit": "4"}, "or network_dim 4 or 4"),
        (16, {"conv_dim": "8"}, "conv_dim must be network_dim, 16, or be left out, got 8"),
        (16, {"unit": "0"}, "unit must be a whole number of at least 1, got '0'"),
        (16, {"unit": "x"}, "unit must be a whole number of at least 1, got 'x'"),
        (16, {"dylora_update": "some"}, "dylora_update must be one of all, unit, got 'some'"),
        (16, {"rank_dropout": "0.1"}, "rank_dropout does not go with networks.dylora: DyLoRA samples ranks itself"),
        (16, {"block_dims": "4"}, "block_dims does not go with networks.dylora"),
        (16, {"units": "4"}, "units is not known"),
    ],
)
def test_what_does_not_fit_is_told_with_what_would(rank, arguments, message):
    with pytest.raises(ValueError) as caught:
        dylora.create_network(1.0, rank, 1.0, None, None, Toy(), **arguments)
    assert message in str(caught.value)


def test_what_combines_does(model_store):
    models = model_store("sd1")[0]
    network = dylora.create_network(
        1.0,
        8,
        4.0,
        None,
        models["text_encoder"],
        models["unet"],
        neuron_dropout=0.1,
        unit="4",
        module_dropout="0.1",
        down_lr_weight="zeros",
        loraplus_lr_ratio="4",
    )
    assert isinstance(network, DyLoRANetwork)
    assert network.modules_in_order()[0].dropouts == lora.Dropouts(0.1, 0.0, 0.1)
    assert min(SD.index_of(name) for name, _, _ in network.describe_unet()) == 12
    assert {"unet_block12,16-24", "unet_block12,16-24 plus"} <= set(network.prepare_optimizer_params(1, 1, 1)[1])


# ---- training from the command line -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [pytest.param(LIERLA, id="LierLa", marks=pytest.mark.slow), pytest.param(C3LIER, id="C3Lier")]
)
def test_the_file_is_an_ordinary_lora_file(base, pictures, tmp_path, kind):
    weights = train(base, pictures, tmp_path / "a", **kind, **RATE)
    plain = train(
        base,
        pictures,
        tmp_path / "b",
        **(
            kind
            | {"network_module": "networks.lora"}
            | {"network_args": [text for text in kind["network_args"] if not text.startswith("unit")] or None}
        ),
        **RATE,
    )
    assert {name: tensor.shape for name, tensor in weights.items()} == {n: t.shape for n, t in plain.items()}
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    written = metadata(tmp_path / "a" / "x.safetensors")
    assert written["ss_network_module"] == "networks.dylora"
    assert json.loads(written["ss_network_args"])["unit"] == "2"


@ALSO_SDXL_SLOW
@pytest.mark.slow
def test_checkpointing_computes_with_the_same_rank_again(base, pictures, tmp_path):
    one = train(base, pictures, tmp_path / "a", **LIERLA, **RATE, network_dropout=0.1)
    same(
        train(base, pictures, tmp_path / "b", **LIERLA, **RATE, network_dropout=0.1, gradient_checkpointing=True),
        one,
        1e-3,
    )


@pytest.mark.parametrize("update", [pytest.param("all", marks=pytest.mark.slow), "unit"])
@ALSO_SDXL_SLOW
def test_a_resumed_run_draws_on(base, pictures, tmp_path, update):
    more = LIERLA | RATE | {"network_args": ["unit=2", f"dylora_update={update}"], "save_state": True}
    whole = train(base, pictures, tmp_path / "whole", **more, save_every_n_steps=2, gradient_accumulation_steps=2)
    state = tmp_path / "whole" / "x-step00000002-state"
    parts = train(base, pictures, tmp_path / "parts", **more, resume=state, gradient_accumulation_steps=2)
    same(parts, whole)


@ALSO_SDXL_SLOW
@pytest.mark.slow
def test_previews_and_their_absence_give_the_same_bytes(base, pictures, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("a dog --w 64 --h 64 --s 1\n", encoding="utf-8")
    drawn = {"sample_prompts": prompts, "sample_every_n_steps": 2}
    same(
        train(base, pictures, tmp_path / "a", **LIERLA, **RATE),
        train(base, pictures, tmp_path / "b", **LIERLA, **RATE, **drawn),
    )


def test_training_goes_on_from_a_dylora_file_and_takes_its_rank(base, pictures, tmp_path):
    train(base, pictures, tmp_path / "a", **LIERLA, **RATE)
    start = {"network_weights": tmp_path / "a" / "x.safetensors", "dim_from_weights": True}
    weights = train(base, pictures, tmp_path / "b", **(LIERLA | {"network_dim": None}), **start, max_train_steps=1)
    assert {tensor.shape[0] for name, tensor in weights.items() if "lora_down" in name} == {8}


def test_convolutions_have_the_networks_alpha_unless_another_is_given():
    for arguments, alpha in (({}, 3.0), ({"conv_alpha": "2"}, 2.0)):
        network = dylora.create_network(1.0, 4, 3.0, None, None, Toy(), None, conv_dim="4", **arguments)
        assert {module.lora_name: float(module.alpha) for module in network.modules_in_order()} == {
            "lora_unet_resnet_conv": alpha,
            "lora_unet_attention_proj": 3.0,
            "lora_unet_attention_linear": 3.0,
        }


def test_a_unit_that_does_not_fit_ends_the_run_before_the_model_is_loaded(base, pictures, tmp_path, monkeypatch):
    from library.training import recipe

    monkeypatch.setattr(recipe, "open_base", lambda *args, **more: pytest.fail("the model was loaded"))
    monkeypatch.setattr(recipe, "start_runtime", lambda *args, **more: pytest.fail("the runtime was started"))
    with pytest.raises(UserError, match="unit 3 does not divide network_dim 8"):
        train_network.main(options(base, pictures, tmp_path, **(LIERLA | {"network_args": ["unit=3"]})))


@pytest.mark.parametrize("update", ["all", "unit"])
def test_shapes_that_stay_give_the_same_outputs_and_gradients(update):
    results = []
    for keeps in (False, True):
        torch.manual_seed(0)
        toy, network = toy_network(dylora_update=update)
        for module in network.modules_in_order():
            torch.nn.init.normal_(module.lora_up.weight)
        if keeps:
            network.keep_shapes()
        network.train()
        network.on_optimizer_step(3)
        output = toy(torch.linspace(-1, 1, 256).view(1, 4, 8, 8).double())
        output.square().sum().backward()
        results.append([output.detach(), *(parameter.grad for parameter in network.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
