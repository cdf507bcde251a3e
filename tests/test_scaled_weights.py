"""Weights in 8 bits with a scale beside them: what is merged, extracted and converted are their products."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import tiny
import torch
from loras import deltas, make_lora
from safetensors.torch import load_file, save_file
from scripts import call

from library.errors import UserError
from library.weight_file import open_weights, read_weights, write_weights
from networks import extract_lora_from_models, merge_lora
from tools import convert_diffusers20_original_sd, merge_models

State = dict[str, torch.Tensor]
E4M3 = torch.float8_e4m3fn
TO_Q = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
MODULE = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def is_scaled(name: str, tensor: torch.Tensor) -> bool:
    return tensor.ndim == 2 and name.endswith(".weight") and ("attn" in name or "mlp" in name)


def scaled(state: Mapping[str, torch.Tensor], style: str) -> tuple[State, dict[str, str]]:
    """Return the tensors and metadata of a file as other programs write it."""
    stored: State = {}
    layers = {}
    for name, tensor in state.items():
        layer = name.removesuffix(".weight")
        if not is_scaled(name, tensor):
            stored[name] = tensor
            continue
        if style == "bare":
            stored[name] = tensor.to(E4M3)
            continue
        largest = 127.0 if style == "int8" else 448.0
        scale = tensor.abs().amax(1, keepdim=True) if style == "rows" else tensor.abs().max()
        scale = scale.float() / largest
        values = tensor / scale
        stored[name] = values.round().to(torch.int8) if style == "int8" else values.to(E4M3)
        if style == "old":
            stored |= {f"{layer}.scale_weight": scale.reshape(1), f"{layer}.scale_input": torch.ones(1)}
        else:
            stored |= {f"{layer}.weight_scale": scale, f"{layer}.input_scale": torch.tensor(2.0)}
        if style == "marked":
            text = json.dumps({"format": "float8_e4m3fn", "full_precision_matrix_mult": True})
            stored[f"{layer}.comfy_quant"] = torch.tensor(list(text.encode()), dtype=torch.uint8)
            layers[layer] = {"format": "float8_e4m3fn"}
    if style == "old":
        stored["model.diffusion_model.scaled_fp8"] = torch.zeros(2).to(E4M3)
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})} if layers else {}
    return stored, metadata


def meant(stored: State) -> State:
    """Return the weights that a file means, in float64."""
    found = {}
    for name, tensor in stored.items():
        layer = name.rpartition(".")[0]
        scale = stored.get(f"{layer}.weight_scale", stored.get(f"{layer}.scale_weight"))
        if name.endswith((".weight_scale", ".scale_weight", "_scale", "_input", "comfy_quant", "scaled_fp8")):
            continue
        exact = tensor.double() if tensor.is_floating_point() or scale is not None else tensor
        found[name] = exact * scale.double() if name.endswith(".weight") and scale is not None else exact
    return found


STYLES = ("old", "new", "marked", "rows", "int8", "bare")


@pytest.fixture
def base(model_store, tmp_path, style):
    """Return a checkpoint in 8 bits, and what its weights mean."""
    stored, metadata = scaled(tiny.original_state(model_store("sd1")[0], "sd1"), style)
    save_file(stored, tmp_path / "base.safetensors", metadata | {"title": "eight"})
    return tmp_path / "base.safetensors", meant(stored)


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("style", STYLES)
def test_a_file_shows_its_weights_as_they_are_meant(base, style):
    path, expected = base
    file = open_weights(path)
    assert file.shapes.keys() == expected.keys()
    assert file.metadata == {"title": "eight"}
    kinds = {name: dtype for name, dtype, _ in file.infos()}
    for name, tensor in file.tensors(file.shapes):
        assert tensor.dtype == kinds[name]
        assert_near(tensor, expected[name])
    assert_near(file.tensor(TO_Q), expected[TO_Q])
    assert kinds[TO_Q] == (E4M3 if style == "bare" else torch.float32)


def test_pickles_have_scales_too(tmp_path):
    stored, _ = scaled({TO_Q: torch.randn(6, 4)}, "new")
    write_weights(tmp_path / "a.ckpt", stored)
    found = read_weights(tmp_path / "a.ckpt")
    assert found.keys() == {TO_Q}
    assert_near(found[TO_Q], meant(stored)[TO_Q])


@pytest.mark.repetitions(keep=2)
@pytest.mark.parametrize("style", STYLES)
def test_a_network_that_is_merged_has_its_full_effect(model_store, base, tmp_path):
    path, expected = base
    network = make_lora(model_store("sd1")[0], tmp_path / "l.safetensors")
    out = tmp_path / "merged.safetensors"
    call(merge_lora, "--sd_model", path, "--models", network, "--ratios", 0.7, "--save_to", out)
    found, change = load_file(out), deltas(network)[MODULE]
    assert found.keys() == expected.keys()
    assert_near(found[TO_Q], expected[TO_Q] + 0.7 * change)
    assert (0.7 * change).norm() > 0.01 * expected[TO_Q].norm()


@pytest.mark.parametrize("style", ("old", "rows"))
def test_what_is_extracted_is_the_difference_of_what_is_meant(model_store, base, tmp_path):
    path, _ = base
    network = make_lora(model_store("sd1")[0], tmp_path / "l.safetensors", rank=2)
    call(merge_lora, "--sd_model", path, "--models", network, "--ratios", 1, "--save_to", tmp_path / "m.safetensors")
    words = ["--model_org", path, "--model_tuned", tmp_path / "m.safetensors", "--dim", 2, "--exact"]
    call(extract_lora_from_models, *words, "--save_to", tmp_path / "e.safetensors")
    found, change = deltas(tmp_path / "e.safetensors")[MODULE], deltas(network)[MODULE]
    assert (found - change).norm() < 1e-4 * change.norm()


@pytest.mark.parametrize("style", ("marked", "bare"))
def test_models_are_merged_and_converted_as_they_are_meant(base, tmp_path, style):
    path, expected = base
    doubled = {name: tensor * 2 if tensor.is_floating_point() else tensor for name, tensor in expected.items()}
    save_file({name: tensor.float() for name, tensor in doubled.items()}, tmp_path / "b.safetensors")
    out = tmp_path / "o.safetensors"
    words = ["--models", path, tmp_path / "b.safetensors", "--ratios", 0.5, 0.5, "--saving_precision", "float"]
    call(merge_models, *words, "--output", out)
    assert_near(load_file(out)[TO_Q], expected[TO_Q] * 1.5)
    call(convert_diffusers20_original_sd, path, tmp_path / "folder", "--float")
    unet = tiny.load(tmp_path / "folder").unet.state_dict()
    assert_near(unet["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"], expected[TO_Q])


@pytest.mark.parametrize("style", ("old", "int8"))
def test_training_begins_from_what_is_meant(base):
    path, expected = base
    loaded = tiny.load(path)
    assert_near(
        loaded.unet.state_dict()["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"], expected[TO_Q]
    )


# ---- formats that are not a product -------------------------------------------------------------------------

ONES = torch.ones(4, 6)


def settings_of(**values: object) -> torch.Tensor:
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


EIGHT = {"a.weight": ONES.to(E4M3), "a.weight_scale": torch.tensor(0.5)}
REFUSED: dict[str, tuple[State, dict[str, str], str]] = {
    "blocks": ({"a.weight": ONES.to(E4M3), "a.weight_scale": torch.ones(2, 3)}, {}, "one scale or one for each row"),
    "columns": ({"a.weight": ONES.to(E4M3), "a.weight_scale": torch.ones(1, 6)}, {}, "a.weight_scale has the shape"),
    "blocks of 128": (
        {"a.weight": ONES.to(E4M3), "a.weight_scale_inv": torch.ones(1, 1)},
        {},
        "in a format that is not read (a.weight_scale_inv)",
    ),
    "4 bits": (
        {"a.weight": torch.ones(4, 3, dtype=torch.uint8), "a.weight_scale": torch.ones(4)},
        {},
        "a.weight_scale is a scale, and a.weight is not stored in 8 bits",
    ),
    "nvfp4": (EIGHT | {"a.weight_scale_2": torch.ones(())}, {}, "(a.weight_scale_2)"),
    "NF4": (
        {"a.weight": torch.ones(12, 1, dtype=torch.uint8), "a.weight.absmax": torch.ones(1)},
        {},
        "not read (a.weight.absmax)",
    ),
    "whole numbers": ({"a.weight": ONES.to(torch.int8)}, {}, "a.weight is stored in whole numbers without a scale"),
    "one of two": (
        EIGHT | {"b.weight": ONES.to(torch.uint8), "c.weight": ONES},
        {},
        "b.weight is stored in whole numbers without a scale",
    ),
    "a scale alone": ({"a.scale_weight": torch.ones(1)}, {}, "a.scale_weight is a scale, and a.weight is not stored"),
    "rotated": (EIGHT | {"a.comfy_quant": settings_of(format="int8_tensorwise", convrot=True)}, {}, "'convrot': True"),
    "another format": (
        EIGHT | {"a.comfy_quant": settings_of(format="mxfp8")},
        {},
        "a.comfy_quant is stored in a format",
    ),
    "damaged settings": (EIGHT | {"a.comfy_quant": torch.tensor([1], dtype=torch.uint8)}, {}, "not read (None)"),
    "settings in other numbers": (EIGHT | {"a.comfy_quant": ONES}, {}, "a.comfy_quant is of the type float32, bytes"),
    "settings in a matrix": (EIGHT | {"a.comfy_quant": torch.ones(2, 3, dtype=torch.uint8)}, {}, "not read (None)"),
    "in the metadata": (
        EIGHT,
        {"_quantization_metadata": json.dumps({"layers": {"a": {"format": "svdquant_int4"}}})},
        "a is stored in a format that is not read",
    ),
    "damaged metadata": (EIGHT, {"_quantization_metadata": "[]"}, "the metadata _quantization_metadata are damaged"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_other_formats_are_refused_by_name(tmp_path: Path, case: tuple[State, dict[str, str], str]) -> None:
    tensors, metadata, message = case
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    with pytest.raises(UserError) as caught:
        open_weights(tmp_path / "a.safetensors")
    assert message in str(caught.value)
    assert str(caught.value).endswith(": take the file in 16 bits")
