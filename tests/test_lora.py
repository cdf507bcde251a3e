"""networks/lora.py: names and counts, what it changes and what not, files, and that it stands alone."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys

import pytest
import tiny
import torch
from drawing import pipe_of
from loras import applied, outputs
from safetensors.torch import load_file
from scripts import ROOT
from torch import nn

from library.models import loading
from networks import lora
from networks.lora import LoRAModule, Shape, create_network, create_network_from_weights

COUNTS = {  # U-Net LierLa, U-Net C3Lier, text encoder; and values for each rank: LierLa, C3Lier linear, 3x3, text
    "sd1": (192, 278, 72, 423_936, 506_816, 544_000, 165_888),
    "sd2": (192, 278, 138, 432_128, 515_008, 544_000, 423_936),
}


@pytest.fixture
def models(model_store, family_name):
    """Return fresh copies of a tiny model's U-Net and text encoder."""
    made, _ = model_store(family_name)
    return copy.deepcopy(made["text_encoder"]), copy.deepcopy(made["unet"])


# ---- names, shapes, counts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("conv", [False, True])
def test_real_sizes_give_the_published_counts_names_and_shapes(family_name, conv):
    family = tiny.FAMILIES[family_name]
    unet, text = loading.build_unet(family.unet), loading.build_text_encoder(family.text_models[0].config)
    args = {"conv_dim": "1"} if conv else {}
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoRAModule, "_update_scale", lambda self: None)  # reads alpha, which has no value on meta
        network = create_network(1.0, 1, 1, None, text, unet, **args)
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


def test_two_text_encoders_are_numbered_and_one_in_a_list_is_not(models):
    text, unet = models
    both = create_network(1.0, 4, 1, None, [text, copy.deepcopy(text)], unet)
    prefixes = {module.lora_name.split("_text_model")[0] for module in both.text_encoder_loras}
    assert prefixes == {"lora_te1", "lora_te2"}
    one = create_network(1.0, 4, 1, None, [text], unet)
    assert all(module.lora_name.startswith("lora_te_text_model") for module in one.text_encoder_loras)


def test_building_one_network_never_changes_what_the_next_targets(models):
    text, unet = models
    count = lambda network: len(network.unet_loras)  # noqa: E731
    first = create_network(1.0, 4, 1, None, text, unet)
    c3 = create_network(1.0, 4, 1, None, text, unet, conv_dim="2")
    weights = {name: tensor.clone() for name, tensor in c3.state_dict().items()}
    from_weights, _ = create_network_from_weights(1.0, None, None, text, unet, weights)
    again = create_network(1.0, 4, 1, None, text, unet)
    assert (count(first), count(c3), count(from_weights), count(again)) == (192, 278, 278, 192)


# ---- what it changes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [{}, {"conv_dim": "4"}, {"neuron_dropout": 0.5, "rank_dropout": "0.5"}])
def test_a_fresh_network_changes_nothing_bit_for_bit(models, args):
    before = outputs(*models)
    network = create_network(1.0, 4, 1, None, *models, **args)
    network.apply_to(*models)
    network.train()
    assert all(torch.equal(a, b) for a, b in zip(outputs(*models), before, strict=True))


@pytest.mark.parametrize("args", [{}, {"conv_dim": "4"}])
def test_apply_then_remove_is_the_identity(models, args):
    text, unet = models
    before = outputs(text, unet)
    network = applied(text, unet, **args)
    assert not torch.equal(outputs(text, unet)[1], before[1])
    network.remove()
    assert all(torch.equal(a, b) for a, b in zip(outputs(text, unet), before, strict=True))
    assert not any("forward" in vars(module) for model in models for module in model.modules())


def test_networks_on_one_model_add_up_and_come_off_in_any_order(models):
    text, unet = models
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


@pytest.mark.parametrize("args", [{}, {"conv_dim": "4", "conv_alpha": "2"}])
@pytest.mark.parametrize("multiplier", [1.0, -0.7])
def test_merged_equals_applied(models, args, multiplier):
    text, unet = models
    network = applied(text, unet, multiplier=multiplier, **args)
    expected = outputs(text, unet)
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.remove()
    merged, _ = create_network_from_weights(multiplier, None, None, text, unet, weights)
    merged.merge_to(text, unet, weights)
    for got, want in zip(outputs(text, unet), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-5 * float(want.abs().max()))


LAYERS = {
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
    module = LoRAModule("x", layer, Shape(3, 6.0), multiplier=0.5)
    nn.init.normal_(module.lora_up.weight)
    x = torch.randn(shape, requires_grad=True)
    module.apply_to()
    out = layer(x)
    out.square().mean().backward()

    down, up = (w.detach().double().requires_grad_() for w in (module.lora_down.weight, module.lora_up.weight))
    weight = layer.weight.detach().double() + 0.5 * 2.0 * (up.flatten(1) @ down.flatten(1)).view(layer.weight.shape)
    x64 = x.detach().double().requires_grad_()
    bias = layer.bias.detach().double()
    if isinstance(layer, nn.Linear):
        expected = nn.functional.linear(x64, weight, bias)
    else:
        expected = nn.functional.conv2d(x64, weight, bias, layer.stride, layer.padding)
    expected.square().mean().backward()
    assert out.is_contiguous()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    for got, want in (
        (x.grad, x64.grad),
        (module.lora_down.weight.grad, down.grad),
        (module.lora_up.weight.grad, up.grad),
    ):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        module.delta_weight().double(), weight.detach() - layer.weight.detach().double(), rtol=1e-5, atol=1e-6
    )
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


def test_max_norm_scales_what_is_too_large_and_only_that(models):
    text, unet = models
    network = applied(text, unet, conv_dim="2")
    before = network.delta_norms()
    limit = float(before.median())
    count, mean, largest = network.apply_max_norm_regularization(limit, None)
    expected = before.clamp(max=limit)
    torch.testing.assert_close(network.delta_norms(), expected, rtol=1e-4, atol=1e-6)
    assert count == int((before > limit * (1 + 1e-6)).sum())
    assert mean == pytest.approx(float(expected.mean()), rel=1e-4)
    assert largest == pytest.approx(limit, rel=1e-4)


# ---- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", ["safetensors", "pt", "ckpt"])
def test_save_and_load_is_the_identity(models, tmp_path, suffix, dtype):
    text, unet = models
    network = applied(text, unet)
    for module in network.modules_in_order():
        module.alpha.fill_(0.1)  # which bfloat16 would round
    path = tmp_path / f"x.{suffix}"
    network.save_weights(path, dtype, {"ss_v2": "False"})
    weights = lora.read_weights(path)
    for name, tensor in network.state_dict().items():
        if name.endswith(".alpha"):
            assert float(weights[name]) == float(tensor)
        else:
            assert weights[name].dtype == (dtype or torch.float32)
            assert torch.equal(weights[name].float(), tensor.to(dtype or torch.float32).float())
    other = create_network(1.0, 4, 1.0, None, text, unet)
    assert other.load_weights(path) == f"{len(other.modules_in_order())} modules loaded"
    assert all(module.scale == pytest.approx(0.1 / 4) for module in other.modules_in_order()), "the file's alpha counts"
    assert not list(tmp_path.glob(".*")), "no temporary file stays"


def test_hashes_are_what_web_uis_compute(models, tmp_path):
    import hashlib

    network = applied(*models)
    path = tmp_path / "x.safetensors"
    network.save_weights(path, torch.float16, {"ss_output_name": "x", "modelspec.title": "日本"})
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8:start])["__metadata__"]
    assert metadata["sshs_model_hash"] == hashlib.sha256(content[start:]).hexdigest()
    assert metadata["modelspec.title"] == "日本"
    assert start % 8 == 0
    from safetensors.torch import save

    plain = save(load_file(path), metadata={"ss_output_name": "x"})
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(plain[0x100000:0x110000]).hexdigest()[:8]


def test_a_file_without_alphas_means_alpha_equals_rank(models):
    text, unet = models
    network = applied(text, unet)
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items() if not name.endswith("alpha")}
    network.remove()
    loaded, _ = create_network_from_weights(1.0, None, None, text, unet, weights)
    loaded.load_state_dict(weights)
    assert all(module.scale == 1.0 for module in loaded.modules_in_order())


def test_linear_and_pointwise_weights_stand_for_each_other(models):
    text, unet = models
    network = applied(text, unet)
    expected = outputs(text, unet)[1]
    weights = {}
    for name, tensor in network.state_dict().items():
        is_projection = "_proj_in." in name or "_proj_out." in name
        if is_projection and tensor.ndim:
            weights[name] = tensor.flatten(1) if tensor.ndim == 4 else tensor[:, :, None, None]
        else:
            weights[name] = tensor.clone()
    network.remove()
    other, _ = create_network_from_weights(1.0, None, None, text, unet, weights)
    other.apply_to(text, unet)
    other.load_state_dict(weights)
    assert torch.equal(outputs(text, unet)[1], expected)


def test_a_file_that_matches_nothing_is_an_error_and_one_in_part_is_told(models, caplog, tmp_path):
    text, unet = models
    network = applied(text, unet)
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.remove()
    foreign = {f"lora_unet_input_blocks_4_1_{i}.lora_down.weight": torch.zeros(4, 8) for i in range(3)}
    with pytest.raises(ValueError, match="none of the 3 modules is in these models"):
        create_network_from_weights(1.0, None, None, text, unet, foreign)
    create_network_from_weights(1.0, None, None, text, unet, weights | foreign)
    assert "3 left out (such as lora_unet_input_blocks_4_1_0)" in caplog.text
    torch.save(foreign, tmp_path / "f.pt")
    with pytest.raises(ValueError, match="none of its 3 modules"):
        create_network(1.0, 4, 1, None, text, unet).load_weights(tmp_path / "f.pt")
    torch.save(weights, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="has rank 4, this network 8"):
        create_network(1.0, 8, 1, None, text, unet).load_weights(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"conv_dm": "4"}, "conv_dm is not known; did you mean conv_dim"),
        ({"conv_dim": "four"}, "conv_dim must be a number, got 'four'"),
        ({"conv_dim": "0"}, "conv_dim must be at least 1"),
        ({"rank_dropout": "1.5"}, "rank_dropout must be at least 0 and below 1"),
    ],
)
def test_bad_network_args_are_told(models, args, message):
    with pytest.raises(ValueError, match=message):
        create_network(1.0, 4, 1, None, *models, **args)


def test_parts_left_out_are_neither_trained_nor_saved(models):
    text, unet = models
    network = create_network(1.0, 4, 1, None, text, unet)
    network.apply_to(text, unet, False, True)
    groups, names = network.prepare_optimizer_params(1e-4, 1e-3, 1e-5)
    assert names == ["unet"]
    assert groups[0]["lr"] == 1e-3
    assert all(name.startswith("lora_unet_") for name in network.state_dict())
    assert not any("forward" in vars(module) for module in text.modules())


def test_parameter_groups_take_the_finer_rate_first(models):
    network = create_network(1.0, 4, 1, None, *models)
    network.apply_to(*models)
    groups, names = network.prepare_optimizer_params(None, None, 1e-5)
    assert names == ["textencoder", "unet"]
    assert [group["lr"] for group in groups] == [1e-5, 1e-5]
    groups, names = network.prepare_optimizer_params(0, 1e-3, 1e-5)
    assert names == ["unet"]
    count = sum(p.numel() for p in network.parameters())
    groups, _ = network.prepare_optimizer_params(1e-4, 1e-3)
    assert sum(p.numel() for group in groups for p in group["params"]) == count


def test_loraplus_gives_the_up_matrices_their_own_rate(models):
    text, unet = models
    network = create_network(1.0, 4, 1, None, text, unet, loraplus_lr_ratio="16", loraplus_text_encoder_lr_ratio="4")
    network.apply_to(text, unet)
    groups, names = network.prepare_optimizer_params(1e-4, 1e-3, 1e-5)
    assert names == ["textencoder", "textencoder plus", "unet", "unet plus"]
    assert [group["lr"] for group in groups] == pytest.approx([1e-4, 4e-4, 1e-3, 16e-3])
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in network.parameters()}
    ups = {id(module.lora_up.weight) for module in network.unet_loras}
    assert {id(p) for p in groups[3]["params"]} == ups
    network.set_loraplus_lr_ratio(0, None, 2)
    assert network.prepare_optimizer_params(1e-4, 1e-3)[1] == ["textencoder", "textencoder plus", "unet"]


# ---- the readers of the files -------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [{}, {"conv_dim": "2", "conv_alpha": "1"}], ids=["LierLa", "C3Lier"])
def test_diffusers_loads_the_file_and_gives_the_same_output(models, model_store, family_name, tmp_path, args):
    text, unet = models
    network = applied(text, unet, **args)
    expected_text, expected = outputs(text, unet)
    network.save_weights(tmp_path / "x.safetensors", None, {"ss_v2": str(family_name == "sd2")})
    network.remove()
    plain = outputs(text, unet)[1]
    pipe = pipe_of(model_store(family_name)[0] | {"text_encoder": text, "unet": unet}, family=family_name)
    pipe.load_lora_weights(tmp_path, weight_name="x.safetensors")
    got_text, got = outputs(text, unet)
    assert (expected - plain).abs().max() > 0.01, "the network must do something"
    torch.testing.assert_close(got_text, expected_text, rtol=0, atol=1e-5 * max(1.0, float(expected_text.abs().max())))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))


def test_the_diffusers_example_of_the_documentation_runs(models, model_store, family_name, tmp_path):
    paths = []
    for number in range(3):
        network = applied(*models, seed=number)
        paths.append(str(tmp_path / f"lora{number}.safetensors"))
        network.save_weights(paths[-1], torch.float32, None)
        network.remove()
    text_encoder, unet = models
    pipe = pipe_of(model_store(family_name)[0] | {"text_encoder": text_encoder, "unet": unet}, family=family_name)
    plain = outputs(text_encoder, unet)[1]

    sd = load_file(paths[0])
    network1, sd = create_network_from_weights(0.5, None, pipe.vae, text_encoder, unet, sd)
    network1.apply_to(text_encoder, unet)
    network1.load_state_dict(sd)
    network1.to("cpu", dtype=torch.float32)
    sd = load_file(paths[1])
    network2, sd = create_network_from_weights(0.7, None, pipe.vae, text_encoder, unet, sd)
    network2.apply_to(text_encoder, unet)
    network2.load_state_dict(sd)
    sd3 = load_file(paths[2])
    network3, sd3 = create_network_from_weights(0.5, None, pipe.vae, text_encoder, unet, sd3)
    network3.apply_to(text_encoder, unet)
    network3.load_state_dict(sd3)
    network1.set_multiplier(0.8)
    network2.set_multiplier(0.8)
    network3.set_multiplier(0.8)
    stacked = outputs(text_encoder, unet)[1]
    image = pipe("a cat", num_inference_steps=1, height=64, width=64, output_type="np").images[0]
    assert image.shape == (64, 64, 3)
    for network in (network1, network2, network3):
        network.remove()
    assert torch.equal(outputs(text_encoder, unet)[1], plain)
    for path in paths:
        sd = load_file(path)
        network, sd = create_network_from_weights(0.8, None, pipe.vae, text_encoder, unet, sd)
        network.merge_to(text_encoder, unet, sd)
    merged = outputs(text_encoder, unet)[1]
    torch.testing.assert_close(merged, stacked, rtol=0, atol=1e-4 * float(stacked.abs().max()))


STANDALONE = """
import sys, torch
from networks.lora import LoRAModule, create_network, create_network_from_weights
from diffusers import UNet2DConditionModel
assert not [name for name in sys.modules if name.startswith("library")]
torch.manual_seed(0)
unet = UNet2DConditionModel(block_out_channels=(32, 32), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1, cross_attention_dim=16, attention_head_dim=4)
x, t, c = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 7, 16)
unet.requires_grad_(False)
network = create_network(1.0, 4, 1, None, None, unet, conv_dim="2")
network.apply_to(None, unet)
optimizer = torch.optim.Adam(network.prepare_optimizer_params(None, 1e-2)[0])
losses = []
for _ in range(5):
    loss = (unet(x, t, c).sample - 1).square().mean()
    loss.backward(); optimizer.step(); optimizer.zero_grad(); losses.append(loss.item())
assert losses[-1] < losses[0], losses
network.save_weights("here.safetensors", torch.float32, {"ss_v2": "False"})
trained = unet(x, t, c).sample
network.remove()
again, weights = create_network_from_weights(1.0, "here.safetensors", None, None, unet)
again.apply_to(None, unet)
again.load_state_dict(weights)
assert torch.equal(unet(x, t, c).sample, trained)
print("alone")
"""


def test_the_file_works_copied_into_an_empty_folder(tmp_path):
    (tmp_path / "networks").mkdir()
    shutil.copy(ROOT / "networks" / "lora.py", tmp_path / "networks" / "lora.py")
    done = subprocess.run([sys.executable, "-c", STANDALONE], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "alone", done.stderr
