"""networks/lora.py: files, arguments, groups of parameters, the readers of its files, and that it stands alone."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from drawing import pipe_of
from loras import applied, outputs
from safetensors.torch import load_file
from scripts import ROOT, python

from networks import lora
from networks.lora import create_network, create_network_from_weights

# ---- files --------------------------------------------------------------------------------------------------


@pytest.mark.repetitions(keep=6)
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", ["safetensors", "pt", "ckpt"])
def test_save_and_load_is_the_identity(fresh_models, tmp_path, suffix, dtype):
    text, unet = fresh_models
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


def test_hashes_are_what_web_uis_compute(fresh_models, tmp_path):
    import hashlib

    network = applied(*fresh_models)
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


def test_a_file_without_alphas_means_alpha_equals_rank(fresh_models):
    text, unet = fresh_models
    network = applied(text, unet)
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items() if not name.endswith("alpha")}
    network.remove()
    loaded, _ = create_network_from_weights(1.0, None, None, text, unet, weights)
    loaded.load_state_dict(weights)
    assert all(module.scale == 1.0 for module in loaded.modules_in_order())


def test_linear_and_pointwise_weights_stand_for_each_other(fresh_models):
    text, unet = fresh_models
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


def test_a_file_that_matches_nothing_is_an_error_and_one_in_part_is_told(fresh_models, caplog, tmp_path):
    text, unet = fresh_models
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
        ({"conv_dim": "four"}, "conv_dim must be a whole number of at least 1, got 'four'"),
        ({"conv_dim": "0"}, "conv_dim must be a whole number of at least 1"),
        ({"rank_dropout": "1.5"}, "rank_dropout must be a number of at least 0 and below 1"),
    ],
)
def test_bad_network_args_are_told(fresh_models, args, message):
    with pytest.raises(ValueError, match=message):
        create_network(1.0, 4, 1, None, *fresh_models, **args)


def test_parts_left_out_are_neither_trained_nor_saved(fresh_models):
    text, unet = fresh_models
    network = create_network(1.0, 4, 1, None, text, unet)
    network.apply_to(text, unet, False, True)
    groups, names = network.prepare_optimizer_params(1e-4, 1e-3, 1e-5)
    assert names == ["unet"]
    assert groups[0]["lr"] == 1e-3
    assert all(name.startswith("lora_unet_") for name in network.state_dict())
    assert not any("forward" in vars(module) for module in text.modules())


def test_parameter_groups_take_the_finer_rate_first(fresh_models):
    network = create_network(1.0, 4, 1, None, *fresh_models)
    network.apply_to(*fresh_models)
    groups, names = network.prepare_optimizer_params(None, None, 1e-5)
    assert names == ["textencoder", "unet"]
    assert [group["lr"] for group in groups] == [1e-5, 1e-5]
    groups, names = network.prepare_optimizer_params(0, 1e-3, 1e-5)
    assert names == ["unet"]
    count = sum(p.numel() for p in network.parameters())
    groups, _ = network.prepare_optimizer_params(1e-4, 1e-3)
    assert sum(p.numel() for group in groups for p in group["params"]) == count


def test_loraplus_gives_the_up_matrices_their_own_rate(fresh_models):
    text, unet = fresh_models
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


@pytest.mark.repetitions(keep=2)
@pytest.mark.parametrize("args", [{}, {"conv_dim": "2", "conv_alpha": "1"}], ids=["LierLa", "C3Lier"])
def test_diffusers_loads_the_file_and_gives_the_same_output(fresh_models, model_store, family_name, tmp_path, args):
    text, unet = fresh_models
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


def test_the_diffusers_example_of_the_documentation_runs(fresh_models, model_store, family_name, tmp_path):
    paths = []
    for number in range(3):
        network = applied(*fresh_models, seed=number)
        paths.append(str(tmp_path / f"lora{number}.safetensors"))
        network.save_weights(paths[-1], torch.float32, None)
        network.remove()
    text_encoder, unet = fresh_models
    pipe = pipe_of(model_store(family_name)[0] | {"text_encoder": text_encoder, "unet": unet}, family=family_name)
    plain = outputs(text_encoder, unet)[1]

    networks = []
    for path, multiplier in zip(paths, (0.5, 0.7, 0.5), strict=True):
        network, weights = create_network_from_weights(multiplier, None, pipe.vae, text_encoder, unet, load_file(path))
        network.apply_to(text_encoder, unet)
        network.load_state_dict(weights)
        network.to("cpu", dtype=torch.float32)
        networks.append(network)
    for network in networks:
        network.set_multiplier(0.8)
    stacked = outputs(text_encoder, unet)[1]
    image = pipe("a cat", num_inference_steps=1, height=64, width=64, output_type="np").images[0]
    assert image.shape == (64, 64, 3)
    for network in networks:
        network.remove()
    assert torch.equal(outputs(text_encoder, unet)[1], plain)
    for path in paths:
        network, weights = create_network_from_weights(0.8, None, pipe.vae, text_encoder, unet, load_file(path))
        network.merge_to(text_encoder, unet, weights)
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
try:
    create_network(1.0, 4, 1, None, None, unet, mid_lr_weight="2")
except ValueError as error:
    assert "mid_lr_weight: not known without networks/block_weights.py" in str(error)
else:
    raise AssertionError("arguments by block were taken")
print("alone")
"""


@pytest.mark.slow
def test_the_file_works_copied_into_an_empty_folder(tmp_path):
    (tmp_path / "networks").mkdir()
    shutil.copy(ROOT / "networks" / "lora.py", tmp_path / "networks" / "lora.py")
    done = python("-c", STANDALONE, cwd=tmp_path)
    assert done.stdout.strip() == "alone", done.stderr
