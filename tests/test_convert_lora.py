"""networks/convert_lora.py: the change that a file means stays, to the bit; diffusers reads and writes are the oracle."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from drawing import pipe_of
from loras import assert_deltas, deltas, make_lora, outputs
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.weight_file import data_sha256
from networks import convert_lora, lora, merge_lora, resize_lora, svd_merge_lora

SHAPES = {"lora_down.weight": (2, 768), "lora_up.weight": (3072, 2)}


def convert(source, target, *argv):
    assert convert_lora.main(["--model", str(source), "--save_to", str(target), *map(str, argv)]) == 0
    return target


@pytest.mark.repetitions(keep=5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("alpha", "keep"), [(4.0, False), (1.0, False), (0.5, False), (3.0, True), (1.0, True)])
def test_to_diffusers_and_back_is_equal_to_the_bit(model_store, tmp_path, dtype, alpha, keep):
    models, _ = model_store("sd1")
    file = make_lora(models, tmp_path / "a.safetensors", alpha=alpha, dtype=dtype, conv_dim="2", conv_alpha="1")
    there = convert(file, tmp_path / "b.safetensors", "--to", "diffusers", *(["--keep_alpha"] if keep else []))
    back = convert(there, tmp_path / "c.safetensors")
    assert all(".lora_A." in name or ".lora_B." in name for name in load_file(there))
    before, after = deltas(file), deltas(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[module], after[module]) for module in before)
    if keep:
        first, second = load_file(file), load_file(back)
        assert all(torch.equal(first[name].float(), second[name].float()) for name in first)


def test_a_scale_that_is_no_power_of_two_costs_one_rounding_of_float32(model_store, tmp_path):
    models, _ = model_store("sd1")
    file = make_lora(models, tmp_path / "a.safetensors", alpha=3.3, dtype=torch.float16)
    back = convert(convert(file, tmp_path / "b.safetensors", "--to", "diffusers"), tmp_path / "c.safetensors")
    for (module, before), after in zip(deltas(file).items(), deltas(back).values(), strict=True):
        assert (after - before).norm() < 1e-7 * before.norm(), module


@pytest.mark.repetitions(keep=1)
@pytest.mark.parametrize("keep", [[], pytest.param(["--keep_alpha"], marks=pytest.mark.slow)])
def test_diffusers_loads_what_was_converted(model_store, family_name, tmp_path, keep):
    models, _ = model_store(family_name)
    text, unet = copy.deepcopy(models["text_encoder"]), copy.deepcopy(models["unet"])
    file = make_lora(models, tmp_path / "a.safetensors", rank=4, alpha=3.0, conv_dim="2", conv_alpha="1.5")
    folder = tmp_path / "peft"
    convert(file, folder / "pytorch_lora_weights.safetensors", "--to", "diffusers", *keep)
    network, weights = lora.create_network_from_weights(1.0, str(file), None, text, unet)
    network.load_state_dict(weights)
    network.apply_to(text, unet)
    expected_text, expected = outputs(text, unet)
    network.remove()
    plain = outputs(text, unet)[1]
    pipe_of(model_store(family_name)[0] | {"text_encoder": text, "unet": unet}, family=family_name).load_lora_weights(
        folder
    )
    got_text, got = outputs(text, unet)
    assert (expected - plain).abs().max() > 0.01
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 * max(1.0, float(expected.abs().max())))
    torch.testing.assert_close(got_text, expected_text, rtol=0, atol=2e-5 * max(1.0, float(expected_text.abs().max())))


@pytest.mark.repetitions(keep=1)
@pytest.mark.parametrize("again", [[], ["--keep_alpha"]])
def test_the_alphas_of_a_configuration_count_once(model_store, tmp_path, again):
    """A file with such metadata goes to diffusers, to sd-scripts and through a resize, and means the same."""
    models, _ = model_store("sd1")
    file = make_lora(models, tmp_path / "a.safetensors", alpha=2.0)
    there = convert(file, tmp_path / "b.safetensors", "--to", "diffusers", "--keep_alpha")
    other = convert(there, tmp_path / "c.safetensors", "--to", "diffusers", *again)
    with safe_open(other, "pt") as opened:
        assert ("lora_adapter_metadata" in opened.metadata()) == bool(again)
    assert_deltas(convert(other, tmp_path / "d.safetensors"), deltas(file))
    smaller = tmp_path / "e.safetensors"
    assert resize_lora.main(["--model", str(there), "--save_to", str(smaller), "--new_rank", "4"]) == 0
    assert_deltas(smaller, deltas(file), 1e-5)
    found = []
    for path in (file, there, other, smaller):
        text, unet = copy.deepcopy(models["text_encoder"]), copy.deepcopy(models["unet"])
        pipe_of(models | {"text_encoder": text, "unet": unet}, family="sd1").load_lora_weights(
            tmp_path, weight_name=path.name
        )
        found.append(outputs(text, unet)[1])
    for output in found[1:]:
        torch.testing.assert_close(output, found[0], rtol=0, atol=2e-5 * max(1.0, float(found[0].abs().max())))


def test_what_diffusers_saves_is_read_with_its_alphas(model_store, tmp_path):
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    models, _ = model_store("sd1")
    unet = copy.deepcopy(models["unet"])
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q", "to_out.0", "proj_in", "conv1"],
        rank_pattern={"to_q": 2},
        alpha_pattern={"conv1": 1},
    )
    unet.add_adapter(config)
    torch.manual_seed(0)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=state, **_collate_lora_metadata({"unet": unet})
    )
    out = convert(tmp_path / "pytorch_lora_weights.safetensors", tmp_path / "out.safetensors")
    found = deltas(out)
    layers = {name: module for name, module in unet.named_modules() if hasattr(module, "lora_A")}
    assert len(found) == len(layers) > 20
    for name, layer in layers.items():
        delta = layer.get_delta_weight("default").double().flatten(1)
        module = f"lora_unet_{name.replace('.', '_')}"
        torch.testing.assert_close(found[module], delta, rtol=1e-5, atol=1e-6)


def test_processors_of_old_diffusers_are_read(tmp_path):
    path, module = (
        "mid_block.attentions.0.transformer_blocks.0.attn1",
        "unet.mid_block.attentions.0.transformer_blocks.0.",
    )
    weights = {}
    for layer in ("to_q", "to_out"):
        weights[f"unet.{path}.processor.{layer}_lora.down.weight"] = torch.randn(2, 8)
        weights[f"unet.{path}.processor.{layer}_lora.up.weight"] = torch.randn(8, 2)
    weights[f"{module}attn2.to_k.lora.down.weight"] = torch.randn(2, 768)
    weights[f"{module}attn2.to_k.lora.up.weight"] = torch.randn(8, 2)
    weights["text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.down.weight"] = torch.randn(2, 8)
    weights["text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.up.weight"] = torch.randn(8, 2)
    save_file(weights, tmp_path / "old.safetensors")
    out = convert(tmp_path / "old.safetensors", tmp_path / "new.safetensors")
    start = "lora_unet_mid_block_attentions_0_transformer_blocks_0_"
    ends = ("attn1_to_q", "attn1_to_out_0", "attn2_to_k")
    assert set(deltas(out)) == {start + end for end in ends} | {"lora_te_text_model_encoder_layers_0_mlp_fc1"}
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"


def test_sdxl_goes_through_all_three_kinds_of_names(tmp_path):
    block = "lora_unet_input_blocks_7_1_transformer_blocks_9_attn2_to_k"
    names = (block, "lora_unet_output_blocks_2_2_conv", "lora_te2_text_model_encoder_layers_31_mlp_fc2")
    weights = {}
    for name, width in zip(names, (2048, 64, 64), strict=True):
        is_conv = name.endswith("conv")
        weights[f"{name}.lora_down.weight"] = torch.randn(2, width, *((3, 3) if is_conv else ()))
        weights[f"{name}.lora_up.weight"] = torch.randn(64, 2, *((1, 1) if is_conv else ()))
        weights[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(weights, tmp_path / "a.safetensors")
    words = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--to", "kohya_diffusers")
    peft = convert(words, tmp_path / "c.safetensors", "--to", "diffusers", "--keep_alpha")
    back = convert(peft, tmp_path / "d.safetensors", "--to", "kohya")
    assert "lora_unet_down_blocks_2_attentions_0_transformer_blocks_9_attn2_to_k.alpha" in load_file(words)
    assert "lora_unet_up_blocks_0_upsamplers_0_conv.alpha" in load_file(words)
    assert "unet.down_blocks.2.attentions.0.transformer_blocks.9.attn2.to_k.lora_A.weight" in load_file(peft)
    assert "text_encoder_2.text_model.encoder.layers.31.mlp.fc2.lora_B.weight" in load_file(peft)
    result = load_file(back)
    assert result.keys() == weights.keys()
    assert all(torch.equal(result[name], tensor) for name, tensor in weights.items())
    with safe_open(back, "pt") as file:
        assert file.metadata()["ss_base_model_version"] == "sdxl_base_v1-0"


def test_metadata_go_along_and_hashes_are_those_of_the_file(model_store, tmp_path):
    models, _ = model_store("sd1")
    file = make_lora(models, tmp_path / "a.safetensors")
    lora.write_weights(
        file,
        load_file(file),
        {"ss_tag_frequency": '{"a": 1}', "modelspec.title": "mine"} | {"modelspec.hash_sha256": "0x1"},
    )
    out = convert(file, tmp_path / "b.safetensors", "--to", "diffusers")
    with safe_open(out, "pt") as written:
        metadata = written.metadata()
    assert metadata["ss_tag_frequency"] == '{"a": 1}'
    assert metadata["modelspec.title"] == "mine"
    assert "modelspec.hash_sha256" not in metadata
    assert metadata["sshs_model_hash"] == data_sha256(out)
    assert json.loads(metadata.get("lora_adapter_metadata", "{}")) == {}


def test_mistakes(model_store, tmp_path):
    models, _ = model_store("sd1")
    file = make_lora(models, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="is one of the inputs"):
        convert(file, file)
    with pytest.raises(UserError, match="--keep_alpha is for --to diffusers"):
        convert(file, tmp_path / "b.safetensors", "--keep_alpha")
    with pytest.raises(UserError, match="--to must be one of kohya, kohya_diffusers, diffusers, got 'peft'"):
        convert(file, tmp_path / "b.safetensors", "--to", "peft")
    weights = load_file(file) | {"odd.weight": torch.ones(1)}
    save_file(weights, file)
    with pytest.raises(UserError, match=re.escape("(odd.weight); --allow_unmatched skips")):
        convert(file, tmp_path / "b.safetensors", "--to", "diffusers")
    save_file({name: tensor * 1e6 for name, tensor in load_file(file).items() if "odd" not in name}, file)
    with pytest.raises(UserError, match="becomes too large for float16"):
        convert(file, tmp_path / "b.safetensors", "--save_precision", "fp16")
    assert not (tmp_path / "b.safetensors").exists()
    save_file(weights, file)
    convert(file, tmp_path / "b.safetensors", "--to", "diffusers", "--allow_unmatched")
    weights["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"] = torch.ones(3, 3)
    save_file(weights, file)
    with pytest.raises(UserError, match="is damaged: lora_unet_mid_block_attentions_0_proj_in has the shapes"):
        convert(file, tmp_path / "c.safetensors", "--to", "diffusers")


PARTLY = ("44 of 60 tensors", "24 of 60 tensors")  # ComfyUI does not know names of attention, sd.cpp those of encoders
AUDIENCES = {
    (): "read by diffusers, AUTOMATIC1111, Forge, ComfyUI, InvokeAI, sd-scripts, stable-diffusion.cpp",
    **{
        ("--to", "diffusers", *more): f"read by diffusers; in part by ComfyUI ({PARTLY[0]}{remark}), "
        f"stable-diffusion.cpp ({PARTLY[1]}{remark}); not by AUTOMATIC1111, Forge, InvokeAI, sd-scripts"
        for more, remark in (((), ""), (("--keep_alpha",), ", without the alphas in the metadata"))
    },
}


@pytest.mark.parametrize(("words", "audience"), AUDIENCES.items())
def test_the_last_line_tells_who_reads_the_result(model_store, tmp_path, caplog, words, audience):
    models, _ = model_store("sd1")
    file = make_lora(models, tmp_path / "a.safetensors", keep=lambda name: "mid_block" in name or "te_" in name)
    caplog.set_level("INFO")
    convert(file, tmp_path / "b.safetensors", *words)
    assert caplog.messages[-1] == audience


@pytest.mark.parametrize("start", ["lora_te_", "lora_te1_"])
def test_a_text_encoder_keeps_its_name_where_no_family_is_told(tmp_path, start):
    """The first encoder of SDXL is that of SD 1.x, and files with it alone may be for either."""
    module = f"{start}text_model_encoder_layers_0_"
    weights = {f"{module}mlp_fc1.{name}": torch.randn(shape) for name, shape in SHAPES.items()}
    weights |= {f"{module}layer_norm1.w_norm": torch.randn(768)}
    file = tmp_path / "a.safetensors"
    save_file(weights, file)
    out = tmp_path / "out.safetensors"
    for tool, argv in (
        (convert_lora, ("--model", file)),
        (resize_lora, ("--model", file, "--new_rank", "2")),
        (merge_lora, ("--models", file, file, "--ratios", "0.5", "0.5", "--save_precision", "float")),
        (svd_merge_lora, ("--models", file, file, "--ratios", "0.5", "0.5", "--new_rank", "2")),
    ):
        assert tool.main([*map(str, argv), "--save_to", str(out)]) == 0
        assert {name.rpartition("_layers")[0] for name in load_file(out)} == {f"{start}text_model_encoder"}, tool
        assert_deltas(out, deltas(file), 1e-5)
    save_file(weights, file, {"ss_base_model_version": "sd_v1"})
    assert all(name.startswith("lora_te_") for name in load_file(convert(file, out)))
