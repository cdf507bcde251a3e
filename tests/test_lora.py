"""networks/lora.py: names and counts, and what it changes and what not."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import tiny
import torch
from loras import applied, outputs
from scripts import ROOT
from torch import nn

from library.models import building
from networks import lora
from networks.lora import LoRAModule, Shape, create_network, create_network_from_weights

COUNTS = {  # U-Net LierLa, U-Net C3Lier, text encoder; and values for each rank: LierLa, C3Lier linear, 3x3, text
    "sd1": (192, 278, 72, 423_936, 506_816, 544_000, 165_888),
    "sd2": (192, 278, 138, 432_128, 515_008, 544_000, 423_936),
}


# ---- names, shapes, counts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("conv", [False, True])
def test_real_sizes_give_the_published_counts_names_and_shapes(family_name, conv):
    family = tiny.FAMILIES[family_name]
    unet, text = building.build_unet(family.unet), building.build_text_encoder(family.text_models[0].config)
    args = {"conv_dim": "1"} if conv else {}
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoRAModule, "_update_scale", lambda self: None)  # reads alpha, which has no value on meta
        network = create_network(1.0, 1, 1, None, text, unet, None, **args)
    lierla, c3lier, num_text, linear, c3_linear, conv3, text_values = COUNTS[family_name]
    assert len(network.unet_loras) == (c3lier if conv else lierla)
    assert len(network.text_encoder_loras) == num_text
    values = sum(p.numel() for module in network.unet_loras for p in module.parameters())
    assert values == (c3_linear + conv3 if conv else linear)
    assert sum(p.numel() for module in network.text_encoder_loras for p in module.parameters()) == text_values
    names = {module.lora_name for module in network.modules_in_order()}
    assert "lora_unet_down_blocks_0_attentions_0_proj_in" in names
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0" in names
    assert "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_ff_net_0_proj" in names
    assert "lora_te_text_model_encoder_layers_11_mlp_fc2" in names
    assert ("lora_unet_up_blocks_0_resnets_2_conv_shortcut" in names) is conv
    assert ("lora_unet_down_blocks_2_downsamplers_0_conv" in names) is conv
    assert "lora_unet_conv_in" not in names
    state = network.state_dict()
    assert len(state) == 3 * len(names)
    down = state["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"]
    assert down.ndim == (4 if family_name == "sd1" else 2)
    if conv:
        assert state["lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight"].shape == (1, 320, 3, 3)
        assert state["lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight"].shape == (320, 1, 1, 1)


def test_names_match_the_snapshot(model_store, family_name):
    made, _ = model_store(family_name)
    network = create_network(1.0, None, 1, None, made["text_encoder"], made["unet"], conv_dim="4")
    names = sorted(module.lora_name for module in network.modules_in_order())
    snapshot = ROOT / "tests" / "data" / f"lora_names_{family_name}.txt"
    assert "\n".join(names) + "\n" == snapshot.read_text(encoding="utf-8")
    assert all(module.lora_dim == 4 and module.scale == 0.25 for module in network.modules_in_order())


def test_two_text_encoders_are_numbered_and_one_in_a_list_is_not(fresh_models):
    text, unet = fresh_models
    both = create_network(1.0, 4, 1, None, [text, copy.deepcopy(text)], unet)
    prefixes = {module.lora_name.split("_text_model")[0] for module in both.text_encoder_loras}
    assert prefixes == {"lora_te1", "lora_te2"}
    one = create_network(1.0, 4, 1, None, [text], unet)
    assert all(module.lora_name.startswith("lora_te_text_model") for module in one.text_encoder_loras)


def test_building_one_network_never_changes_what_the_next_targets(fresh_models):
    text, unet = fresh_models
    count = lambda network: len(network.unet_loras)  # noqa: E731
    first = create_network(1.0, 4, 1, None, text, unet)
    c3 = create_network(1.0, 4, 1, None, text, unet, conv_dim="2")
    weights = {name: tensor.clone() for name, tensor in c3.state_dict().items()}
    from_weights, _ = create_network_from_weights(1.0, None, None, text, unet, weights)
    again = create_network(1.0, 4, 1, None, text, unet)
    assert (count(first), count(c3), count(from_weights), count(again)) == (192, 278, 278, 192)


# ---- what it changes ----------------------------------------------------------------------------------------


@pytest.mark.repetitions(keep=3)
@pytest.mark.parametrize("args", [{}, {"conv_dim": "4"}, {"neuron_dropout": 0.5, "rank_dropout": "0.5"}])
def test_a_fresh_network_changes_nothing_bit_for_bit(fresh_models, args):
    before = outputs(*fresh_models)
    network = create_network(1.0, 4, 1, None, *fresh_models, **args)
    network.apply_to(*fresh_models)
    network.train()
    assert all(torch.equal(a, b) for a, b in zip(outputs(*fresh_models), before, strict=True))


@pytest.mark.repetitions(keep=2)
@pytest.mark.parametrize("args", [{}, {"conv_dim": "4"}])
def test_apply_then_remove_is_the_identity(fresh_models, args):
    text, unet = fresh_models
    before = outputs(text, unet)
    network = applied(text, unet, **args)
    assert not torch.equal(outputs(text, unet)[1], before[1])
    network.remove()
    assert all(torch.equal(a, b) for a, b in zip(outputs(text, unet), before, strict=True))
    assert not any("forward" in vars(module) for model in fresh_models for module in model.modules())


def test_networks_on_one_model_add_up_and_come_off_in_any_order(fresh_models):
    text, unet = fresh_models
    before = outputs(text, unet)[1]
    first = applied(text, unet, seed=1)
    only_first = outputs(text, unet)[1]
    second = applied(text, unet, seed=2)
    third = applied(text, unet, seed=3)
    second.remove()
    third.set_multiplier(0.0)
    assert torch.equal(outputs(text, unet)[1], only_first)
    third.set_enabled(False)
    first.remove()
    third.remove()
    assert torch.equal(outputs(text, unet)[1], before)


@pytest.mark.repetitions(keep=3)
@pytest.mark.parametrize("args", [{}, {"conv_dim": "4", "conv_alpha": "2"}])
@pytest.mark.parametrize("multiplier", [1.0, -0.7])
def test_merged_equals_applied(fresh_models, args, multiplier):
    text, unet = fresh_models
    network = applied(text, unet, multiplier=multiplier, **args)
    expected = outputs(text, unet)
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.remove()
    merged, _ = create_network_from_weights(multiplier, None, None, text, unet, weights)
    merged.merge_to(text, unet, weights)
    for got, want in zip(outputs(text, unet), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-5 * float(want.abs().max()))


LAYERS: dict[str, tuple[Callable[[], nn.Linear | nn.Conv2d], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(24, 40), (2, 7, 24)),
    "conv1": (lambda: nn.Conv2d(24, 40, 1), (2, 24, 6, 5)),
    "conv3": (lambda: nn.Conv2d(24, 40, 3, padding=1), (2, 24, 6, 5)),
    "strided": (lambda: nn.Conv2d(24, 24, 3, stride=2, padding=1), (2, 24, 6, 5)),
    "strided1": (lambda: nn.Conv2d(24, 24, 1, stride=2), (2, 24, 6, 5)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_output_and_gradients_equal_the_formula_in_float64(kind):
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer = make()
    plain = copy.deepcopy(layer).double()
    module = LoRAModule("x", layer, Shape(3, 6.0), multiplier=0.5)
    nn.init.normal_(module.lora_up.weight)
    x = torch.randn(shape, requires_grad=True)
    module.apply_to()
    out = layer(x)
    out.square().mean().backward()

    down, up = (w.detach().double().requires_grad_() for w in (module.lora_down.weight, module.lora_up.weight))
    delta = 0.5 * 2.0 * (up.flatten(1) @ down.flatten(1)).view(plain.weight.shape)
    x64 = x.detach().double().requires_grad_()
    expected = torch.func.functional_call(plain, {"weight": plain.weight.detach() + delta}, x64)
    expected.square().mean().backward()
    assert out.is_contiguous()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    for got, want in (
        (x.grad, x64.grad),
        (module.lora_down.weight.grad, down.grad),
        (module.lora_up.weight.grad, up.grad),
    ):
        assert got is not None
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(module.delta_weight().double(), delta.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(module.delta_norm(), (module.delta_weight() / 0.5).norm(), rtol=1e-5, atol=1e-6)


def test_initial_weights_are_uniform_within_the_published_bound():
    torch.manual_seed(0)
    module = LoRAModule("x", nn.Conv2d(64, 8, 3, padding=1), Shape(16, 1.0))
    bound = (64 * 9) ** -0.5
    weight = module.lora_down.weight
    assert weight.abs().max() <= bound
    assert abs(weight.std().item() - bound / 3**0.5) < 0.01 * bound
    assert not module.lora_up.weight.any()


def test_dropouts_act_in_training_only_and_keep_the_mean():
    torch.manual_seed(0)
    layer = nn.Linear(32, 16)
    x = torch.randn(4, 9, 32)
    for dropouts in (lora.Dropouts(neuron=0.5), lora.Dropouts(rank=0.5)):
        module = LoRAModule("x", layer, Shape(8, 8.0), dropouts=dropouts)
        nn.init.normal_(module.lora_up.weight)
        module.apply_to()
        module.eval()
        exact = layer(x)
        assert torch.equal(layer(x), exact)
        module.train()
        mean = torch.stack([layer(x) for _ in range(3000)]).mean(0)
        assert not torch.equal(layer(x), exact)
        base = module.org_forward(x)
        assert (mean - exact).norm() < 0.05 * (exact - base).norm()
        module.remove()


def test_rank_dropout_drops_whole_ranks_for_each_picture():
    layer = nn.Linear(8, 8, bias=False)
    module = LoRAModule("x", layer, Shape(8, 8.0), dropouts=lora.Dropouts(rank=0.5))
    nn.init.eye_(module.lora_up.weight)
    nn.init.ones_(module.lora_down.weight)
    module.apply_to()
    module.train()
    delta = layer(torch.ones(6, 5, 8)) - module.org_forward(torch.ones(6, 5, 8))
    assert torch.allclose(delta, delta[:, :1].expand_as(delta), atol=1e-5), "one mask for all tokens of a picture"
    values = (delta[:, 0] / 16).round(decimals=3)
    assert set(values.flatten().tolist()) == {0.0, 1.0}
    assert len({tuple(row.tolist()) for row in values}) > 1


def test_module_dropout_skips_the_module_in_its_share_of_calls():
    layer = nn.Linear(8, 8)
    module = LoRAModule("x", layer, Shape(2, 2.0), dropouts=lora.Dropouts(module=0.25))
    nn.init.normal_(module.lora_up.weight)
    module.apply_to()
    module.train()
    x = torch.randn(3, 8)
    base = module.org_forward(x)
    skipped = sum(torch.equal(layer(x), base) for _ in range(2000))
    assert 400 < skipped < 600


def test_max_norm_scales_what_is_too_large_and_only_that(fresh_models):
    text, unet = fresh_models
    network = applied(text, unet, conv_dim="2")
    before = network.delta_norms()
    limit = float(before.median())
    count, mean, largest = network.apply_max_norm_regularization(limit, None)
    expected = before.clamp(max=limit)
    torch.testing.assert_close(network.delta_norms(), expected, rtol=1e-4, atol=1e-6)
    assert count == int((before > limit * (1 + 1e-6)).sum())
    assert mean == pytest.approx(float(expected.mean()), rel=1e-4)
    assert largest == pytest.approx(limit, rel=1e-4)


# ---- layer and change as one operation ----------------------------------------------------------------------


def fused_pair(kind, dtype, *, held=0, used=6):
    """Return (layer, module over it, input) with copies for the gradients; of rank 6."""
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(5, 7) if kind == "linear" else torch.nn.Conv2d(5, 7, 1, bias=kind != "no bias")
    module = LoRAModule("x", layer, Shape(6, 3.0))
    for parameter in [*layer.parameters(), *module.parameters()]:
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    layer.requires_grad_(False)
    x = torch.randn((2, 3, 5) if kind == "linear" else (2, 5, 3, 4), generator=generator, dtype=torch.float64).to(dtype)
    if kind == "channels last":
        x = x.to(memory_format=torch.channels_last)
    module.use_ranks(used, held)
    module.apply_to()
    return layer, module, x.requires_grad_()


def outcome(layer, module, x):
    """Return output, and gradients of input and factors, for a fixed gradient of the output."""
    output = layer(x)
    weight = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape).to(output.dtype)
    output.backward(weight)
    return [output.detach(), x.grad, module.lora_down.weight.grad, module.lora_up.weight.grad]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("ranks", [(0, 6), (0, 4), (2, 4)])
@pytest.mark.parametrize("kind", ["linear", "1x1", "no bias", "channels last"])
def test_the_fused_layer_is_the_plain_formula_and_its_gradients_those_of_autograd(kind, ranks, in_place):
    results = []
    for fused in (True, False):
        layer, module, x = fused_pair(kind, torch.float64, held=ranks[0], used=ranks[1])
        if not fused:
            module._can_fuse = lambda x: False
        if in_place:
            for parameter in module.parameters():
                parameter.grad = torch.ones_like(parameter)  # gradients are added
            module.compute_with(module.lora_down.weight, module.lora_up.weight)
        results.append(outcome(layer, module, x))
        assert module._can_fuse(x) is fused
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    of_down = results[0][2].flatten(1)[:, 0] - float(in_place)
    assert of_down.ne(0).tolist() == [ranks[0] <= rank < ranks[1] for rank in range(6)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "1x1"])
def test_gradients_of_the_fused_layer_are_those_of_float64(kind, dtype):
    layer, module, x = fused_pair(kind, dtype)
    wide, wide_module, wide_x = fused_pair(kind, torch.float64)
    for own, other in zip(
        [*layer.parameters(), *module.parameters(), x],
        [*wide.parameters(), *wide_module.parameters(), wide_x],
        strict=True,
    ):
        other.data = own.data.double()
    bound = 1e-5 if dtype is torch.float32 else 0.03
    for got, expected in zip(outcome(layer, module, x), outcome(wide, wide_module, wide_x), strict=True):
        assert (got.double() - expected).norm() <= bound * expected.norm()


def test_weights_of_another_type_are_cast_to_that_of_the_layer():
    layer, module, x = fused_pair("linear", torch.bfloat16)
    exact = layer(x).detach()
    module.float()
    assert torch.equal(layer(x), exact)
    layer(x).sum().backward()
    assert module.lora_up.weight.grad.dtype is torch.float32


def test_a_layer_whose_input_needs_no_gradient_still_trains_its_factors():
    for in_place in (False, True):
        layer, module, x = fused_pair("linear", torch.float64)
        if in_place:
            for parameter in module.parameters():
                parameter.grad = torch.zeros_like(parameter)
            module.compute_with(module.lora_down.weight, module.lora_up.weight)
        layer(x.detach()).sum().backward()
        assert all(bool(parameter.grad.any()) for parameter in module.parameters())


def test_the_output_of_a_fused_layer_can_be_changed_in_place():
    for kind in ("linear", "1x1"):
        results = []
        for changed in (True, False):
            layer, module, x = fused_pair(kind, torch.float64)
            assert module._can_fuse(x)
            output = layer(x)
            output = output.add_(1) if changed else output + 1
            output.square().sum().backward()
            results.append([x.grad, *(parameter.grad for parameter in module.parameters())])
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)
