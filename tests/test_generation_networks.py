"""Networks and embeddings in gen_img_diffusers.py, against diffusers and lycoris."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from drawing import differ, lora_of, pipe_of, pixels_of, same_pixels, slow
from loras import make_lora
from safetensors.torch import load_file, save_file

from library.errors import UserError


def folded(path):
    """Write the same network with all alphas in its matrices, since diffusers leaves some alphas out; return where."""
    weights = load_file(path)
    for name in [name for name in weights if name.endswith(".alpha")]:
        stem, rank = name.removesuffix(".alpha"), len(weights[name.replace(".alpha", ".lora_down.weight")])
        weights[f"{stem}.lora_up.weight"] *= weights[name] / rank
        weights[name] = torch.tensor(float(rank))
    save_file(weights, path.with_name(f"folded-{path.name}"))
    return path.with_name(f"folded-{path.name}")


# ---- networks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "conv"), [("sd1", True), slow("sd2", False), slow("sd1", False), slow("sd2", True)])
def test_a_lora_is_what_diffusers_makes_of_the_file(draw, model_store, tmp_path, family, conv):
    models, _ = model_store(family)
    more: dict[str, Any] = {"conv_dim": "2", "conv_alpha": "1.5"} if conv else {}
    file = lora_of(models, tmp_path / "a.safetensors", rank=2 + conv, **more)
    words = ["--network_module", "networks.lora", "--network_weights", file]
    (found,) = draw("--prompt", "a cat --n dog", *words, family=family)
    pipe = pipe_of(models, family=family, changed=True)
    plain = pixels_of(pipe)
    pipe.load_lora_weights(str(tmp_path), weight_name=folded(file).name)
    same_pixels(found.pixels, pixels_of(pipe))
    differ(found.pixels, plain)
    (scaled,) = draw("--prompt", "a cat --n dog", *words, "--network_mul", 0.5, family=family)
    pipe.set_adapters(pipe.get_active_adapters(), 0.5)
    same_pixels(scaled.pixels, pixels_of(pipe))
    differ(scaled.pixels, found.pixels)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # two adapters are meant
def test_two_networks_at_strengths_of_each_prompt(draw, model_store, two, tmp_path):
    files, words = two
    lines = ["a cat --n dog --am 0.7,-0.4", "a cat --n dog --am 0.7", "a cat --n dog", "a cat --n dog --am 0"]
    (tmp_path / "p.txt").write_text("\n".join(f"{line} --d 5" for line in lines), encoding="utf-8")
    shots = draw("--from_file", tmp_path / "p.txt", *words, "--network_mul", 0.3, "--batch_size", 4)
    pipe = pipe_of(model_store("sd1")[0], changed=True)
    plain = pixels_of(pipe)
    for index, file in enumerate(files):
        pipe.load_lora_weights(str(file.parent), weight_name=folded(file).name, adapter_name=str(index))
    for found, strengths in zip(shots, ([0.7, -0.4], [0.7, 0.7], [0.3, 1.0]), strict=False):
        pipe.set_adapters(["0", "1"], strengths)
        same_pixels(found.pixels, pixels_of(pipe))
        told = json.loads(found.texts["generation"])["networks"]
        assert [network["strength"] for network in told] == strengths
        assert [network["file"] for network in told] == ["net0.safetensors", "net1.safetensors"]
    same_pixels(shots[3].pixels, plain)


@pytest.mark.parametrize(
    "how",
    [
        ["--network_merge"],
        ["--network_pre_calc"],
        pytest.param(["--network_merge_n_models", 1], marks=pytest.mark.slow),
    ],
)
def test_merging_draws_what_the_applied_networks_draw(draw, two, how):
    _, words = two
    multipliers = ["--network_mul", 0.7, 0.4]
    (applied,) = draw("--prompt", "a cat --n dog", *words, *multipliers)
    (merged,) = draw("--prompt", "a cat --n dog", *words, *multipliers, *how)
    same_pixels(merged.pixels, applied.pixels)
    assert json.loads(merged.texts["generation"])["networks"] == json.loads(applied.texts["generation"])["networks"]


def test_added_beforehand_networks_still_follow_each_prompt(draw, two, tmp_path):
    _, words = two
    (tmp_path / "p.txt").write_text("a cat --am 1 --d 5\na cat --am 0.2 --d 5\na cat --am 1 --d 5", encoding="utf-8")
    applied = draw("--from_file", tmp_path / "p.txt", *words)
    added = draw("--from_file", tmp_path / "p.txt", *words, "--network_pre_calc")
    for one, other in zip(applied, added, strict=True):
        same_pixels(one.pixels, other.pixels)
    assert np.array_equal(added[0].pixels, added[2].pixels)


def test_a_dylora_file_acts_at_its_full_rank(draw, model_store, tmp_path):
    from networks import dylora

    models, _ = model_store("sd1")
    torch.manual_seed(0)
    text, unet = copy.deepcopy(models["text_encoder"]), copy.deepcopy(models["unet"])
    network = dylora.create_network(1.0, 4, 8.0, None, text, unet, unit="2")
    for name, parameter in network.named_parameters():
        if "lora_B" in name or "up" in name:
            torch.nn.init.normal_(parameter, std=0.16)
    path = tmp_path / "dy.safetensors"
    network.save_weights(path, None, {})
    by_module = [
        draw("--prompt", "a cat", "--network_module", module, "--network_weights", path)[0].pixels
        for module in ("networks.dylora", "networks.lora")
    ]
    same_pixels(*by_module)
    differ(by_module[0], draw("--prompt", "a cat")[0].pixels)


def test_a_file_in_diffusers_names_is_read(draw, model_store, tmp_path):
    from networks import convert_lora

    file = lora_of(model_store("sd1")[0], tmp_path / "a.safetensors")
    peft = tmp_path / "peft.safetensors"
    assert convert_lora.main(["--model", str(file), "--save_to", str(peft), "--to", "diffusers"]) == 0
    words = ["--prompt", "a cat", "--network_module", "networks.lora", "--network_weights"]
    same_pixels(draw(*words, file)[0].pixels, draw(*words, peft)[0].pixels)


def test_a_loha_of_lycoris_is_drawn_as_lycoris_applies_it(draw, model_store, tmp_path, caplog):
    lycoris = pytest.importorskip("lycoris.kohya")
    from library.networks.views import CanonicalTextEncoder

    models, _ = model_store("sd1")
    pipe = pipe_of(models, changed=True)
    lycoris.LycorisNetworkKohya.apply_preset(lycoris.PRESET["attn-mlp"])
    torch.manual_seed(0)
    shim = CanonicalTextEncoder(pipe.text_encoder)
    network = lycoris.create_network(1.0, 4, 2.0, None, shim, pipe.unet, algo="loha", preset="attn-mlp")
    path = tmp_path / "loha.safetensors"
    network.apply_to(shim, pipe.unet, True, True)
    for name, parameter in network.named_parameters():
        if "hada" in name:
            torch.nn.init.normal_(parameter, std=0.16)
    network.save_weights(str(path), torch.float32, {})
    words = ["--network_module", "lycoris.kohya", "--network_weights", path, "--network_args", "preset=attn-mlp"]
    (found,) = draw("--prompt", "a cat --n dog", *words)
    same_pixels(found.pixels, pixels_of(pipe))
    differ(found.pixels, draw("--prompt", "a cat --n dog")[0].pixels)
    with caplog.at_level("WARNING"):
        assert np.array_equal(draw("--prompt", "a cat --n dog", *words, "--network_merge")[0].pixels, found.pixels)
    assert "loha.safetensors is not merged but applied" in caplog.text
    network.set_multiplier(0.4)
    same_pixels(draw("--prompt", "a cat --n dog --am 0.4", *words, "--network_pre_calc")[0].pixels, pixels_of(pipe))


def test_a_file_for_another_family_is_refused(draw, tmp_path):
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    shapes = {"lora_down.weight": (2, 1024), "lora_up.weight": (320, 2)}
    save_file({f"{stem}.{name}": torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="b.safetensors is for SD 2.x, the model is SD 1.x"):
        draw("--prompt", "a cat", "--network_module", "networks.lora", "--network_weights", tmp_path / "b.safetensors")


def test_metadata_of_networks_are_shown(draw, model_store, tmp_path, caplog):
    file = make_lora(model_store("sd1")[0], tmp_path / "a.safetensors")
    with caplog.at_level("INFO"):
        words = ["--network_module", "networks.lora", "--network_weights", file]
        draw("--prompt", "a cat", *words, "--network_show_meta")
    assert '"ss_v2": "False"' in caplog.text


# ---- textual inversion --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "count"), [slow(".pt", 3), (".safetensors", 1), slow(".pt", 1), slow(".safetensors", 3)]
)
def test_embeddings_are_those_of_diffusers(draw, model_store, tmp_path, count, suffix):
    vectors = torch.randn(count, 64, generator=torch.Generator().manual_seed(0))
    path = tmp_path / f"Bad-hands{suffix}"
    if suffix == ".pt":
        torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "x", "step": 3}, path)
    else:
        save_file({"emb_params": vectors}, path)
    prompt = "a cat, Bad-hands, of"
    (found,) = draw("--prompt", f"{prompt} --n dog Bad-hands", "--textual_inversion_embeddings", path)
    pipe = pipe_of(model_store("sd1")[0], changed=True)
    pipe.load_textual_inversion(str(tmp_path), weight_name=path.name, token="Bad-hands", local_files_only=True)
    same_pixels(found.pixels, pixels_of(pipe, prompt, negative_prompt="dog Bad-hands"))
    differ(found.pixels, draw("--prompt", f"{prompt} --n dog Bad-hands")[0].pixels)
    (weighted,) = draw("--prompt", "a cat (Bad-hands:1.5)", "--textual_inversion_embeddings", path)
    differ(weighted.pixels, draw("--prompt", "a cat Bad-hands", "--textual_inversion_embeddings", path)[0].pixels)


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        ("cat.safetensors", {"emb_params": torch.ones(1, 64)}, "the word 'cat' is in the vocabulary: rename"),
        ("x1y2.safetensors", {"emb_params": torch.ones(1, 768)}, "has vectors of 768 numbers, this model 64"),
        ("x1y2.safetensors", {"emb_params": torch.ones(1, 2, 64)}, "x1y2.safetensors holds no embedding"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(draw, tmp_path, name, tensors, message):
    save_file(tensors, tmp_path / name)
    with pytest.raises(UserError, match=message):
        draw("--prompt", "a", "--textual_inversion_embeddings", tmp_path / name)
