"""gen_img_diffusers.py: its pictures against diffusers' own pipelines, and what holds for every run."""

from __future__ import annotations

import base64
import copy
import dataclasses
import functools
import html
import importlib.util
import io
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file
from test_merge_lora import make_lora

import gen_img_diffusers
from library import logs
from library.config.generation import GenerateConfig
from library.config.options import parse
from library.config.retired import GENERATION
from library.errors import UserError
from library.generation import artist, infotext, recipe
from library.models.loading import text_model
from library.models.prompt_encoding import PromptOptions, encode_prompts, tokenize_prompt
from library.models.prompt_weights import parse_weights
from library.models.text_encoding import encode_tokens, tokenize
from library.models.tokenizer import load_clip_tokenizer
from library.sampling import dynamic_prompts
from library.sampling.prompts import SAMPLER_NAMES
from library.sampling.requests import MOST_SEED, Request
from library.sampling.samplers import ROWS, build_sampler

ROOT = Path(__file__).resolve().parents[1]
SAMPLERS = [name for name in SAMPLER_NAMES if not name.startswith("k_")]
SIZE = ["--W", 64, "--H", 64]
COMMON = [*SIZE, "--steps", 2, "--scale", 4, "--seed", 5, "--sequential_file_name"]
SETTINGS = {"width": 64, "height": 64, "num_inference_steps": 2, "guidance_scale": 4.0}
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LONG = ", ".join(f"thing {index}" for index in range(40))  # two windows


def slow(*values):
    """Return a row of a table that the default run leaves out: another row shows the same."""
    return pytest.param(*values, marks=pytest.mark.slow)


class Shot(NamedTuple):
    """A picture that was written: its file, its pixels, what the file says."""

    path: Path
    pixels: np.ndarray
    texts: dict


def shot(path):
    with Image.open(path) as file:
        file.load()
        return Shot(path, np.asarray(file.convert("RGB")).astype(int), dict(infotext.read_texts(path)[0]))


CHANGED_BY = {"--textual_inversion_embeddings", "--opt_channels_last", "--vae_tiling", "--vae_slices", "--offload"}


@pytest.fixture(scope="session")
def loaded():
    """Return a memory of models that runs do not change: loading is most of the time of a small picture."""
    return {}


@pytest.fixture
def draw(model_store, tmp_path, loaded, monkeypatch):
    """Return what runs the script and returns its new pictures in order of their names, sheets left out."""
    load, networks = recipe.loading.load_models, False

    def remembered(config, detected, **types):
        key = (config, *types.values())
        if key not in loaded:
            loaded[key] = load(config, detected, **types)
        found = loaded[key]  # of what networks change, a copy
        copies = {"unet": copy.deepcopy(found.unet), "text_encoders": copy.deepcopy(found.text_encoders)}
        return dataclasses.replace(found, **copies) if networks else found

    def run(*words, family="sd1", layout="folder", out="o"):
        folder = tmp_path / out
        before = set(folder.rglob("*")) if folder.is_dir() else set()
        argv = ["--ckpt", model_store(family)[1][layout], "--outdir", folder, *COMMON, *words]
        nonlocal networks
        networks = "--network_module" in words
        monkeypatch.setattr(recipe.loading, "load_models", load if CHANGED_BY & set(words) else remembered)
        assert gen_img_diffusers.main([str(word) for word in argv]) == 0
        new = sorted(path for path in set(folder.rglob("*")) - before if path.suffix in SUFFIXES)
        return [shot(path) for path in new if not path.name.startswith("grid")]

    return run


known_tokenizer = functools.cache(load_clip_tokenizer)


def pipe_of(models, kind="", *, family="sd1", sampler="ddim", predicts_v=False, changed=False, **more):
    """Return diffusers' own pipeline over tiny models, over copies where something is loaded into them."""
    import diffusers

    pipe = getattr(diffusers, f"StableDiffusion{kind}Pipeline")(
        vae=models["vae"],
        text_encoder=copy.deepcopy(models["text_encoder"]) if changed else models["text_encoder"],
        tokenizer=(load_clip_tokenizer if changed else known_tokenizer)(
            pad_token=tiny.FAMILIES[family].text_models[0].pad_token
        ),
        unet=copy.deepcopy(models["unet"]) if changed else models["unet"],
        scheduler=build_sampler(sampler, predicts_v=predicts_v),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **more,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_skip(pipe, skip):
    """Return the arguments of diffusers for a clip skip of ours.

    It has one for the prompt only, so the negative prompt is encoded as a prompt; and it looks for a module that
    transformers 5 has not.
    """
    if skip is None:
        return {}
    if not hasattr(pipe.text_encoder, "text_model"):
        pipe.text_encoder.__dict__["text_model"] = pipe.text_encoder
    negative, _ = pipe.encode_prompt("dog", "cpu", 1, False, clip_skip=skip - 1)
    return {"clip_skip": skip - 1, "negative_prompt": None, "negative_prompt_embeds": negative}


def pixels_of(pipe, prompt="a cat", seed=5, **more):
    values = SETTINGS | {"negative_prompt": "dog", "generator": torch.Generator("cpu").manual_seed(seed)} | more
    return np.asarray(pipe(prompt, **values).images[0]).astype(int)


def same(one, other, most=1):
    """Hold that two pictures are equal to rounding, and that they show something."""
    assert one.shape == other.shape
    assert one.std() > 5, "a picture without content would be equal to any other"
    assert np.abs(one - other).max() <= most


def differ(one, other):
    assert one.shape != other.shape or np.abs(one - other).max() > 3


def lora_of(models, path, *, seed=0, **arguments):
    """Write a LoRA file that changes pictures visibly; alphas differ from module to module."""
    make_lora(models, path, seed=seed, **(arguments or {"conv_dim": "2", "conv_alpha": "1.5"}))
    weights = load_file(path)
    for index, name in enumerate(sorted(name for name in weights if name.endswith(".alpha"))):
        weights[name] = weights[name] * (0.5 + index % 4)
    save_file(weights, path)
    return path


def folded(path):
    """Write the same network with all alphas in its matrices, since diffusers leaves some alphas out; return where."""
    weights = load_file(path)
    for name in [name for name in weights if name.endswith(".alpha")]:
        stem, rank = name.removesuffix(".alpha"), len(weights[name.replace(".alpha", ".lora_down.weight")])
        weights[f"{stem}.lora_up.weight"] *= weights[name] / rank
        weights[name] = torch.tensor(float(rank))
    save_file(weights, path.with_name(f"folded-{path.name}"))
    return path.with_name(f"folded-{path.name}")


# ---- the same picture as diffusers --------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws_what_the_pipeline_of_diffusers_draws(draw, model_store, sampler):
    (found,) = draw("--prompt", "a cat --n dog", "--sampler", sampler, "--steps", 3)
    pipe = pipe_of(model_store("sd1")[0], sampler=sampler)
    same(found.pixels, pixels_of(pipe, num_inference_steps=3))
    assert json.loads(found.texts["generation"])["sampler"] == sampler


def test_names_with_k_are_the_same_samplers():
    assert all(ROWS[name] == ROWS[name.removeprefix("k_")] for name in SAMPLER_NAMES)


@pytest.mark.parametrize(
    ("sampler", "flag", "skip"), [("ddim", True, 2), slow("ddim", False, None), slow("euler_a", True, None)]
)
def test_sd2_and_v_prediction_are_as_in_diffusers(draw, model_store, sampler, flag, skip):
    words = ["--v_parameterization"] * flag + (["--clip_skip", skip] if skip else [])
    (found,) = draw("--prompt", "a cat --n dog", "--sampler", sampler, *words, family="sd2", layout="safetensors")
    pipe = pipe_of(model_store("sd2")[0], family="sd2", sampler=sampler, predicts_v=flag, changed=True)
    same(found.pixels, pixels_of(pipe, **with_skip(pipe, skip)))


def test_clip_skip_is_that_of_diffusers_and_one_more(draw, model_store):
    plain, first, third = (
        draw("--prompt", "a cat --n dog", *(["--clip_skip", skip] if skip else [])) for skip in (None, 1, 3)
    )
    assert np.array_equal(plain[0].pixels, first[0].pixels)
    pipe = pipe_of(model_store("sd1")[0], changed=True)
    same(third[0].pixels, pixels_of(pipe, **with_skip(pipe, 3)))
    differ(third[0].pixels, plain[0].pixels)
    assert "Clip skip: 3" in third[0].texts["parameters"]


def test_a_scale_of_one_leaves_the_negative_prompt_out(draw, model_store):
    (found,) = draw("--prompt", "a cat --n dog --l 1")
    same(found.pixels, pixels_of(pipe_of(model_store("sd1")[0]), guidance_scale=1.0))
    assert np.array_equal(found.pixels, draw("--prompt", "a cat --l 1")[0].pixels)


FEW_STEPS = ("pndm", "dpm_2_a", "dpmsingle")  # those that begin with more than one


@pytest.mark.parametrize("sampler", [name if name in FEW_STEPS else slow(name) for name in SAMPLERS])
def test_one_step_is_enough_for_every_sampler(draw, sampler):
    assert len(draw("--prompt", "a cat", "--sampler", sampler, "--steps", 1)) == 1


def test_a_vae_takes_the_place_of_the_models(draw, model_store, tmp_path):
    other = tiny.make_models("sd1", seed=9)
    path = tmp_path / "vae.safetensors"
    save_file({name: tensor.clone() for name, tensor in other["vae"].state_dict().items()}, path)
    (found,) = draw("--prompt", "a cat --n dog", "--vae", path)
    same(found.pixels, pixels_of(pipe_of(model_store("sd1")[0] | {"vae": other["vae"]})))
    assert json.loads(found.texts["generation"])["vae"] == "vae.safetensors"


# ---- networks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "conv"), [("sd1", True), ("sd2", False), slow("sd1", False), slow("sd2", True)])
def test_a_lora_is_what_diffusers_makes_of_the_file(draw, model_store, tmp_path, family, conv):
    models, _ = model_store(family)
    file = lora_of(
        models, tmp_path / "a.safetensors", rank=2 + conv, **({"conv_dim": "2", "conv_alpha": "1.5"} if conv else {})
    )
    words = ["--network_module", "networks.lora", "--network_weights", file]
    (found,) = draw("--prompt", "a cat --n dog", *words, family=family)
    pipe = pipe_of(models, family=family, changed=True)
    plain = pixels_of(pipe)
    pipe.load_lora_weights(str(tmp_path), weight_name=folded(file).name)
    same(found.pixels, pixels_of(pipe))
    differ(found.pixels, plain)
    (scaled,) = draw("--prompt", "a cat --n dog", *words, "--network_mul", 0.5, family=family)
    pipe.set_adapters(pipe.get_active_adapters(), 0.5)
    same(scaled.pixels, pixels_of(pipe))
    differ(scaled.pixels, found.pixels)


@pytest.fixture(scope="module")
def two(model_store, tmp_path_factory):
    """Return two LoRA files, and the words that name them."""
    models, _ = model_store("sd1")
    folder = tmp_path_factory.mktemp("two")
    files = [lora_of(models, folder / f"net{index}.safetensors", seed=index) for index in range(2)]
    return files, ["--network_module", "networks.lora", "networks.lora", "--network_weights", *files]


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
        same(found.pixels, pixels_of(pipe))
        told = json.loads(found.texts["generation"])["networks"]
        assert [network["strength"] for network in told] == strengths
        assert [network["file"] for network in told] == ["net0.safetensors", "net1.safetensors"]
    same(shots[3].pixels, plain)


@pytest.mark.parametrize("how", [["--network_merge"], ["--network_pre_calc"], ["--network_merge_n_models", 1]])
def test_merging_draws_what_the_applied_networks_draw(draw, two, how):
    _, words = two
    multipliers = ["--network_mul", 0.7, 0.4]
    (applied,) = draw("--prompt", "a cat --n dog", *words, *multipliers)
    (merged,) = draw("--prompt", "a cat --n dog", *words, *multipliers, *how)
    same(merged.pixels, applied.pixels)
    assert json.loads(merged.texts["generation"])["networks"] == json.loads(applied.texts["generation"])["networks"]


def test_added_beforehand_networks_still_follow_each_prompt(draw, two, tmp_path):
    _, words = two
    (tmp_path / "p.txt").write_text("a cat --am 1 --d 5\na cat --am 0.2 --d 5\na cat --am 1 --d 5", encoding="utf-8")
    applied = draw("--from_file", tmp_path / "p.txt", *words)
    added = draw("--from_file", tmp_path / "p.txt", *words, "--network_pre_calc")
    for one, other in zip(applied, added, strict=True):
        same(one.pixels, other.pixels)
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
    same(*by_module)
    differ(by_module[0], draw("--prompt", "a cat")[0].pixels)


def test_a_file_in_diffusers_names_is_read(draw, model_store, tmp_path):
    from networks import convert_lora

    file = lora_of(model_store("sd1")[0], tmp_path / "a.safetensors")
    peft = tmp_path / "peft.safetensors"
    assert convert_lora.main(["--model", str(file), "--save_to", str(peft), "--to", "diffusers"]) == 0
    words = ["--prompt", "a cat", "--network_module", "networks.lora", "--network_weights"]
    same(draw(*words, file)[0].pixels, draw(*words, peft)[0].pixels)


def test_a_loha_of_lycoris_is_drawn_as_lycoris_applies_it(draw, model_store, tmp_path, caplog):
    lycoris = pytest.importorskip("lycoris.kohya")
    from library.training.network_protocol import CanonicalTextEncoder

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
    same(found.pixels, pixels_of(pipe))
    differ(found.pixels, draw("--prompt", "a cat --n dog")[0].pixels)
    with caplog.at_level("WARNING"):
        assert np.array_equal(draw("--prompt", "a cat --n dog", *words, "--network_merge")[0].pixels, found.pixels)
    assert "loha.safetensors is not merged but applied" in caplog.text
    network.set_multiplier(0.4)
    same(draw("--prompt", "a cat --n dog --am 0.4", *words, "--network_pre_calc")[0].pixels, pixels_of(pipe))


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


# ---- one seed is one picture --------------------------------------------------------------------------------

DIFFERENT = [
    "a cat --n blurry, dark --d 1",
    "(two:1.3) dogs and a [bird] --d 22",
    "a unicorn --n dog --d 333",
    f"{LONG} --n ugly --d 4444",
]


@pytest.mark.parametrize("sampler", ["euler_a", "dpm_2_a", slow("ddim")])
def test_a_batch_of_four_is_four_batches_of_one(draw, tmp_path, sampler):
    (tmp_path / "p.txt").write_text("\n".join(DIFFERENT), encoding="utf-8")
    words = ["--from_file", tmp_path / "p.txt", "--sampler", sampler, "--max_embeddings_multiples", 2, "--steps", 3]
    alone = draw(*words, out="one")
    together = draw(*words, "--batch_size", 4, out="four")
    for one, other in zip(alone, together, strict=True):
        same(one.pixels, other.pixels)
    negatives = [shot.texts["negative-prompt"] for shot in together]
    assert negatives == ["blurry, dark", "", "dog", "ugly"]
    assert [shot.texts["seed"] for shot in together] == ["1", "22", "333", "4444"]
    assert "Negative prompt: blurry, dark\n" in together[0].texts["parameters"]
    assert "Negative prompt" not in together[1].texts["parameters"]
    for index in range(3):
        differ(together[index].pixels, together[index + 1].pixels)


def test_what_is_drawn_together_has_one_size_and_one_length(monkeypatch, draw, tmp_path):
    sizes = []
    plain = artist.draw_latents
    monkeypatch.setattr(
        artist, "draw_latents", lambda models, batch, step: sizes.append(len(batch.seeds)) or plain(models, batch, step)
    )
    (tmp_path / "p.txt").write_text("a\nb\nc --w 72\nd\ne --s 1\nf --l 2\ng --l 2\n" + LONG, encoding="utf-8")
    draw("--from_file", tmp_path / "p.txt", "--batch_size", 8, "--max_embeddings_multiples", 3)
    assert sizes == [2, 1, 1, 1, 2, 1]


def requests_of(*words):
    """Return what a command line asks for, without drawing it."""
    config = parse(GenerateConfig, [str(word) for word in words], retired=GENERATION)
    return list(recipe.all_requests(config, gen_img_diffusers.load_lines(config)))


def test_the_seed_of_one_picture_is_the_seed_and_of_several_their_seed():
    def seeds(*words):
        return [request.seed for request in requests_of("--prompt", "a", "--seed", 5, *words)]

    drawn = random.Random(5)
    expected = [drawn.randint(0, 2**31 - 1) for _ in range(6)]
    assert seeds() == [5]
    assert seeds("--images_per_prompt", 3) == expected[:3]
    assert seeds("--images_per_prompt", 3, "--n_iter", 2) == expected
    same_seed = seeds("--images_per_prompt", 2, "--n_iter", 2, "--iter_same_seed")
    assert same_seed == [expected[0], expected[0], expected[1], expected[1]]
    assert seeds("--images_per_prompt", 4, "--prompt", "a --d 7,9") == [7, 9, 9, 9]


def test_without_a_seed_pictures_differ(draw, model_store, tmp_path):
    argv = ["--ckpt", model_store("sd1")[1]["folder"], "--prompt", "a", *SIZE, "--steps", 1, "--outdir", tmp_path / "o"]
    for _ in range(2):
        assert gen_img_diffusers.main([*map(str, argv), "--images_per_prompt", "2"]) == 0
    seeds = {shot(path).texts["seed"] for path in (tmp_path / "o").iterdir()}
    assert len(seeds) == 4
    assert all(0 <= int(seed) <= MOST_SEED for seed in seeds)


def test_shuffled_prompts_are_all_drawn_in_each_repeat(tmp_path):
    prompts = [f"p{index}" for index in range(5)]
    (tmp_path / "p.txt").write_text("\n".join(prompts), encoding="utf-8")
    words = ["--from_file", tmp_path / "p.txt", "--shuffle_prompts", "--n_iter", 2, "--seed", 5]
    first, again = ([request.prompt for request in requests_of(*words)] for _ in range(2))
    assert first == again
    assert first != prompts * 2
    assert sorted(first[:5]) == sorted(first[5:]) == prompts


def test_variants_are_chosen_by_the_seed_of_each_picture():
    words = ["--prompt", "{a|b|c|d} {e|f|g} --n {h|i}", "--images_per_prompt", 12, "--seed", 1]
    together = requests_of(*words)
    assert len({request.prompt for request in together}) > 3
    for request in together:
        (alone,) = requests_of("--prompt", f"{{a|b|c|d}} {{e|f|g}} --n {{h|i}} --d {request.seed}")
        assert (alone.prompt, alone.negative_prompt) == (request.prompt, request.negative_prompt)


# ---- drawn again from its own file --------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path):
    """Return a picture to begin with."""
    rng = np.random.default_rng(3)
    path = tmp_path / "source.png"
    Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize((64, 64), Image.Resampling.BICUBIC).save(
        path
    )
    return path


HIGHRES = ["--highres_fix_scale", 0.5, "--highres_fix_steps", 2, "--strength", 0.6, "--W", 128, "--H", 128]
AGAIN = {
    "plain": ["--sampler", "euler_a", "--scale", 3.5],
    "weights": ["--prompt", "(a:1.4) cat --n [dog]", "--clip_skip", 2, "--emb_normalize_mode", "abs"],
    "windows": ["--prompt", LONG, "--max_embeddings_multiples", 2],
    "highres": HIGHRES,
    "latents": [*HIGHRES, "--highres_fix_latents_upscaling"],
}


@pytest.mark.parametrize("name", AGAIN)
def test_a_picture_is_drawn_again_from_its_own_file(draw, name):
    (first,) = draw("--prompt", "a {cat|dog} --n bird", *AGAIN[name], "--steps", 3)
    (again,) = draw("--from_picture", first.path, "--seed", 99, "--steps", 9, "--scale", 1)
    assert np.array_equal(first.pixels, again.pixels)
    assert json.loads(first.texts["generation"]) == json.loads(again.texts["generation"])


def test_networks_act_again_with_the_strengths_of_the_file(draw, two, caplog):
    _, words = two
    (first,) = draw("--prompt", "a cat --am 0.6,0.2", *words)
    (second,) = draw("--prompt", "a cat", *words, "--network_mul", 0.5, "--network_merge_n_models", 1)
    with caplog.at_level("WARNING"):
        again = draw("--from_picture", first.path, second.path, *words)
        assert "other networks" not in caplog.text
        assert np.array_equal(again[0].pixels, first.pixels)
        same(again[1].pixels, second.pixels)
        same_way = ["--network_mul", 0.5, "--network_merge_n_models", 1]
        (merged,) = draw("--from_picture", second.path, *words, *same_way)
        assert np.array_equal(merged.pixels, second.pixels)
        assert "which is merged now" not in caplog.text
        draw("--from_picture", second.path, *words, "--network_merge")
        assert "net0.safetensors at 0.5, which is merged now" in caplog.text
        draw("--from_picture", first.path)
    assert "a picture was drawn with other networks (net0.safetensors, net1.safetensors)" in caplog.text


def test_a_picture_that_began_with_another_is_drawn_again_with_it(draw, source, tmp_path):
    (first,) = draw("--prompt", "a cat", "--image_path", source, "--strength", 0.7, "--steps", 4)
    (again,) = draw("--from_picture", first.path, "--image_path", source)
    assert np.array_equal(first.pixels, again.pixels)
    with pytest.raises(UserError, match="drawn with source.png, which it does not hold: give --image_path"):
        draw("--from_picture", first.path)


def test_without_a_prompt_pictures_to_begin_with_say_it(draw, tmp_path):
    first = draw("--prompt", "a {cat|dog}", "--images_per_prompt", 2, out="first")
    again = draw("--image_path", tmp_path / "first", "--strength", 0.5, "--steps", 4, out="again")
    assert [shot.texts["prompt"] for shot in again] == [shot.texts["prompt"] for shot in first]
    assert [shot.texts["seed"] for shot in again] == [shot.texts["seed"] for shot in first]


@pytest.mark.parametrize("suffix", ["jpg", "webp", "png"])
def test_other_formats_keep_their_parameters(draw, suffix):
    (first,) = draw("--prompt", f'猫, "quoted", a: b --n 犬 --f sub/cat.{suffix}', "--clip_skip", 2)
    assert first.path.name == f"cat.{suffix}"
    assert first.texts["parameters"].startswith('猫, "quoted", a: b\nNegative prompt: 犬\nSteps: 2, Sampler: DDIM, CFG')
    with Image.open(first.path) as file:
        assert file.format == {"jpg": "JPEG"}.get(suffix, suffix.upper())
    (again,) = draw("--from_picture", first.path)
    assert again.texts["parameters"] == first.texts["parameters"]


def test_the_model_and_the_networks_are_told_with_their_hashes(draw, two, model_store):
    import hashlib

    files, words = two
    (found,) = draw("--prompt", "a", *words, "--network_mul", 0.5, layout="safetensors")
    table = json.loads(found.texts["generation"])
    path = model_store("sd1")[1]["safetensors"]
    assert table["model"] == path.name
    assert table["model_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert f"Model hash: {table['model_sha256'][:10]}, Model: model" in found.texts["parameters"]
    digests = []
    for file in files:
        content = file.read_bytes()
        digests.append(hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest())
    assert [network["sha256"] for network in table["networks"]] == digests
    assert f'Lora hashes: "net0: {digests[0][:12]}, net1: {digests[1][:12]}"' in found.texts["parameters"]


A1111 = {
    "plain": (
        "a cat, (masterpiece:1.2)\nNegative prompt: blurry,\nbad: hands\n"
        "Steps: 20, Sampler: Euler a, CFG scale: 7.5, Seed: 965400086, Size: 512x768, Model hash: 6ce0161689, "
        "Model: v1-5-pruned-emaonly, Clip skip: 2, Version: v1.6.0",
        {"prompt": "a cat, (masterpiece:1.2)", "negative_prompt": "blurry,\nbad: hands", "steps": 20, "scale": 7.5,
         "sampler": "euler_a", "seed": 965400086, "width": 512, "height": 768, "clip_skip": 2},
    ),
    "networks": (
        'first line, <lora:mine:0.8>\nsecond "line": (x:1.1)\nNegative prompt: low quality\n'
        "Steps: 28, Sampler: DPM++ 2M, Schedule type: Automatic, CFG scale: 5, Seed: 1, Size: 640x512, "
        'Model hash: abc, Model: "a, model: of mine", VAE hash: 1234, VAE: vae.pt, Denoising strength: 0.45, '
        'Lora hashes: "mine: a1b2c3d4e5f6, other: 0011223344ff", TI hashes: "x: 99", '
        'ControlNet 0: "Module: canny, Steps: 3", Version: v1.10.1',
        {"prompt": 'first line, <lora:mine:0.8>\nsecond "line": (x:1.1)', "negative_prompt": "low quality",
         "steps": 28, "sampler": "dpmsolver++", "scale": 5.0, "width": 640, "height": 512, "strength": 0.45},
    ),
    "without a negative prompt": (
        "no Negative prompt: here, Steps: 3\nSteps: 4, Sampler: DDIM, CFG scale: 7, Seed: 3, Size: 64x64",
        {"prompt": "no Negative prompt: here, Steps: 3", "negative_prompt": "", "steps": 4, "sampler": "ddim"},
    ),
    "without a prompt": (
        "Steps: 4, Sampler: PLMS, CFG scale: 7, Seed: 3, Size: 64x64",
        {"prompt": "", "negative_prompt": "", "sampler": "pndm"},
    ),
    "a schedule in an older sampler's name": (
        "x\nSteps: 4, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 3, Size: 64x64, Eta/noise-seed delta: 2",
        {"sampler": "dpmsolver++"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", A1111)
def test_texts_of_automatic1111_are_read(tmp_path, name):
    text, expected = A1111[name]
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", text)
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png", pnginfo=info)
    recorded = infotext.read_recorded(tmp_path / "a.png")
    assert {key: getattr(recorded.request, key) for key in expected} == expected
    if name == "networks":
        assert recorded.networks == (("mine", "a1b2c3d4e5f6"), ("other", "0011223344ff"))
        assert recorded.model_sha256 == "abc"


def test_keys_of_sd_scripts_are_read_with_the_size_of_the_picture(draw, tmp_path):
    info = PngImagePlugin.PngInfo()
    texts = {
        "prompt": "a cat",
        "negative-prompt": "dog",
        "seed": "12",
        "sampler": "k_euler_a",
        "steps": "2",
        "scale": "3.5",
    }
    for key, text in texts.items():
        info.add_text(key, text)
    Image.new("RGB", (72, 80)).save(tmp_path / "a.png", pnginfo=info)
    (found,) = draw("--from_picture", tmp_path / "a.png")
    assert {key: found.texts[key] for key in texts} == texts
    assert found.pixels.shape == (80, 72, 3)


@given(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=60), st.integers(0, 2**63 - 1)
)
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read_again(prompt, seed):
    request = Request(
        prompt=prompt.strip(), seed=seed, negative_prompt="n: m", width=64, height=72, strength=0.5, clip_skip=2
    )
    facts = infotext.RunFacts(
        "a, b: c.safetensors", "ab" * 32, None, (("networks.lora", "x, y.pt", "cd" * 32, 1.0),), "float32", "v"
    )
    texts = infotext.texts_for(request, facts, (), begins_with=None)
    read = infotext.from_json(json.loads(texts["generation"]))
    assert read.request.prompt == request.prompt
    assert read.request.seed == seed
    if "Negative prompt:" not in prompt and prompt.strip():
        read = infotext.from_parameters(texts["parameters"], Path("x"))
        assert read.request == Request(**vars(request) | {"multipliers": (1.0,)})
        assert read.networks == (("x, y", "cd" * 6),)
        assert read.model_sha256 == "ab" * 5


# ---- pictures to begin with ---------------------------------------------------------------------------------


def opened(path, size=(64, 64)):
    with Image.open(path) as file:
        picture = file.convert("RGB")
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)


IMG2IMG = [("ddim", 0.3), ("ddim", 1.0), ("euler_a", 0.3), ("heun", 0.3), ("dpmsingle", 1.0)]
MORE = [slow(name, 0.5) for name in SAMPLERS]


@pytest.mark.parametrize(("sampler", "strength"), [*IMG2IMG, *MORE])
def test_img2img_is_that_of_diffusers(draw, model_store, source, sampler, strength):
    words = ["--image_path", source, "--strength", strength, "--steps", 4, "--sampler", sampler]
    (found,) = draw("--prompt", "a cat --n dog", *words)
    pipe = pipe_of(model_store("sd1")[0], "Img2Img", sampler=sampler)
    values = {"image": opened(source), "strength": strength, "num_inference_steps": 4, "width": None, "height": None}
    same(found.pixels, pixels_of(pipe, **values))
    assert f"Denoising strength: {strength:g}" in found.texts["parameters"]


@pytest.fixture
def mask(tmp_path):
    """Return a mask of which the right half is drawn anew."""
    path = tmp_path / "mask.png"
    Image.fromarray(np.repeat(np.repeat([[0, 255]], 64, 0), 32, 1).astype(np.uint8)).save(path)
    return path


@pytest.mark.parametrize("strength", [0.3, 1.0])
@pytest.mark.parametrize("sampler", ["ddim", "euler_a"])
def test_inpainting_is_that_of_diffusers_and_keeps_the_rest(draw, model_store, source, mask, sampler, strength):
    words = ["--image_path", source, "--mask_path", mask, "--strength", strength, "--steps", 4, "--sampler", sampler]
    (found,) = draw("--prompt", "a cat --n dog", *words)
    pipe = pipe_of(model_store("sd1")[0], "Inpaint", sampler=sampler)
    values = {"image": opened(source), "mask_image": Image.open(mask), "strength": strength, "num_inference_steps": 4}
    expected = pixels_of(pipe, **values)
    same(found.pixels[:, 32:], expected[:, 32:])
    assert np.array_equal(found.pixels[:, :32], np.asarray(opened(source)).astype(int)[:, :32])
    differ(found.pixels[:, 32:], np.asarray(opened(source)).astype(int)[:, 32:])


def test_a_grey_mask_blends(draw, source, tmp_path):
    Image.new("L", (64, 64), 200).save(tmp_path / "grey.png")
    Image.new("L", (64, 64), 255).save(tmp_path / "white.png")
    grey, white = (
        draw("--prompt", "a cat", "--image_path", source, "--mask_path", tmp_path / name, "--steps", 4)[0].pixels
        for name in ("grey.png", "white.png")
    )
    kept = np.asarray(opened(source)).astype(int)
    assert np.abs(grey - (white * 200 + kept * 55) / 255).max() <= 1.5


def test_strengths_too_small_for_a_step_keep_the_picture(draw, source, mask):
    picture = ["--prompt", "a cat", "--image_path", source, "--steps", 2]
    nothing = [draw(*picture, "--strength", strength)[0].pixels for strength in (0, 0.3)]
    assert np.array_equal(*nothing)
    same(nothing[0], draw(*picture, "--strength", 0, "--sampler", "euler_a")[0].pixels)
    kept = draw(*picture, "--strength", 0.3, "--mask_path", mask)[0].pixels
    assert np.array_equal(kept[:, :32], np.asarray(opened(source)).astype(int)[:, :32])


def test_pictures_are_taken_as_they_are_meant_to_be_seen(draw, tmp_path):
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 255, (9, 7, 4), dtype=np.uint8), "RGBA")
    clear = small.resize((75, 93), Image.Resampling.BILINEAR)
    plain = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    folder = tmp_path / "sources"
    folder.mkdir()
    clear.save(folder / "1.PNG")
    plain.save(folder / "2.png")
    plain.transpose(Image.Transpose.ROTATE_90).save(folder / "3.jpg", quality=100, subsampling=0, exif=exif)
    plain.save(folder / "4.jpeg", quality=100, subsampling=0)
    (folder / "no picture.txt").write_text("x", encoding="utf-8")
    argv = ["--image_path", folder, "--steps", 4, "--strength", 0.3, "--images_per_prompt", 5]
    lines = "a cat --d 5"
    config_size = [str(word) for word in ("--prompt", lines, *argv)]
    shots = draw_without_size(draw, config_size)
    assert [shot.pixels.shape for shot in shots] == [(88, 72, 3)] * 5
    assert [json.loads(shot.texts["generation"])["begins_with"] for shot in shots] == [
        "1.PNG", "2.png", "3.jpg", "4.jpeg", "1.PNG"
    ]  # fmt: skip
    same(shots[0].pixels, shots[1].pixels)
    same(shots[2].pixels, shots[3].pixels, most=25)  # JPEG turned is not JPEG to the bit
    assert np.abs(shots[1].pixels - shots[3].pixels).mean() < 5
    assert np.array_equal(shots[0].pixels, shots[4].pixels)


def draw_without_size(draw, words):
    """Draw without --W and --H."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(draw.__globals__, "COMMON", [word for word in COMMON if word not in SIZE])
        return draw(*words)


def test_masks_of_a_folder_are_taken_in_turn(draw, source, tmp_path):
    folder = tmp_path / "masks"
    folder.mkdir()
    for index, columns in enumerate(([0, 255], [255, 0])):
        Image.fromarray(np.repeat(np.repeat([columns], 64, 0), 32, 1).astype(np.uint8)).save(folder / f"{index}.png")
    words = ["--image_path", source, "--mask_path", folder, "--steps", 4, "--images_per_prompt", 3, "--batch_size", 3]
    shots = draw("--prompt", "a cat --d 5", *words)
    kept = np.asarray(opened(source)).astype(int)
    for index, found in enumerate(shots):
        half = slice(32, 64) if index == 1 else slice(0, 32)
        assert np.array_equal(found.pixels[:, half], kept[:, half])
    assert np.array_equal(shots[0].pixels, shots[2].pixels)


def test_one_side_that_is_given_counts(draw, source):
    (found,) = draw_without_size(draw, ["--prompt", "a cat --w 72", "--image_path", source])
    assert found.pixels.shape == (64, 72, 3)


# ---- two stages ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latents", [False, True])
def test_highres_fix_is_the_two_pipelines_by_hand(draw, model_store, latents):
    words = [*HIGHRES, "--steps", 4, "--highres_fix_save_1st"] + ["--highres_fix_latents_upscaling"] * latents
    first, second = draw("--prompt", "a cat --n dog", *words, "--sampler", "euler_a")
    models, _ = model_store("sd1")
    pipe = pipe_of(models, sampler="euler_a")
    same(first.pixels, pixels_of(pipe))
    if latents:
        small = pipe(
            "a cat", negative_prompt="dog", generator=torch.Generator().manual_seed(5), output_type="latent", **SETTINGS
        ).images
        start = torch.nn.functional.interpolate(small, (16, 16), mode="bicubic")
    else:
        start = Image.fromarray(first.pixels.astype(np.uint8)).resize((128, 128), Image.Resampling.LANCZOS)
    values = {"image": start, "strength": 0.6, "num_inference_steps": 4, "width": None, "height": None}
    same(second.pixels, pixels_of(pipe_of(models, "Img2Img", sampler="euler_a"), seed=6, **values))
    assert [shot.path.name for shot in (first, second)] == ["im_0000001.png", "im_1000001.png"]
    assert first.texts["seed"] == second.texts["seed"] == "5"


def test_highres_fix_may_begin_with_a_picture(draw, model_store, source):
    words = [*HIGHRES, "--image_path", source, "--highres_fix_strength", 0.5, "--highres_fix_save_1st", "--steps", 4]
    first, _ = draw("--prompt", "a cat --n dog", *words, "--highres_fix_steps", 4)
    pipe = pipe_of(model_store("sd1")[0], "Img2Img")
    values = {"image": opened(source), "strength": 0.5, "num_inference_steps": 4, "width": None, "height": None}
    same(first.pixels, pixels_of(pipe, **values))


# ---- ControlNet ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nets(model_store, tmp_path_factory):
    """Return two small ControlNets, and the folders they are in."""
    from diffusers import ControlNetModel

    made = []
    for index in range(2):
        torch.manual_seed(index)
        net = ControlNetModel.from_unet(model_store("sd1")[0]["unet"])
        for part in (*net.controlnet_down_blocks, net.controlnet_mid_block):
            torch.nn.init.normal_(part.weight, std=0.05)
        torch.nn.init.normal_(net.controlnet_cond_embedding.conv_out.weight, std=0.3)
        folder = tmp_path_factory.mktemp("nets") / f"net{index}"
        net.eval().save_pretrained(folder)
        made.append((net, folder))
    return made


@pytest.fixture
def guides(tmp_path):
    """Return two guide pictures with edges."""
    rng = np.random.default_rng(1)
    paths = []
    for index in range(2):
        picture = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
        paths.append(tmp_path / f"guide{index}.png")
        picture.resize((64, 64), Image.Resampling.NEAREST).save(paths[-1])
    return paths


CONTROLS = {
    "one": (1, [], {}),
    "weighted": (1, ["--control_net_weights", 0.4], {"controlnet_conditioning_scale": 0.4}),
    "a share of the steps": (1, ["--control_net_ratios", 0.5], {"control_guidance_end": 0.5}),
    "canny": (1, ["--control_net_preps", "canny_100"], {}),
    "two": (
        2,
        ["--control_net_multipliers", 0.4, 0.9, "--control_net_ratios", 1, 0.5],
        {"controlnet_conditioning_scale": [0.4, 0.9], "control_guidance_end": [1.0, 0.5]},
    ),
    "one that never acts": (
        2,
        ["--control_net_ratios", 1, 0],
        {"controlnet_conditioning_scale": [1.0, 0.0]},
    ),
}


def edges(path, low, high):
    import cv2

    return Image.fromarray(cv2.Canny(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE), low, high)).convert("RGB")


@pytest.mark.parametrize("name", ["two", "canny", *(slow(name) for name in CONTROLS if name not in ("two", "canny"))])
def test_control_nets_are_those_of_diffusers(draw, model_store, nets, guides, name):
    count, words, values = CONTROLS[name]
    folders = [folder for _, folder in nets[:count]]
    argv = ["--control_net_models", *folders, "--guide_image_path", *guides[:count], "--steps", 4, *words]
    (found,) = draw("--prompt", "a cat --n dog", *argv)
    modules = [net for net, _ in nets[:count]]
    pictures = [opened(path) for path in guides[:count]] if name != "canny" else [edges(guides[0], 100, 191)]
    models, _ = model_store("sd1")
    pipe = pipe_of(models, "ControlNet", controlnet=modules if count > 1 else modules[0])
    image = pictures if count > 1 else pictures[0]
    same(found.pixels, pixels_of(pipe, image=image, num_inference_steps=4, **values))
    differ(found.pixels, pixels_of(pipe_of(models), num_inference_steps=4))


@pytest.mark.parametrize("kind", ["Img2Img", "Inpaint"])
def test_control_nets_go_with_pictures_to_begin_with(draw, model_store, nets, guides, source, mask, kind):
    words = ["--control_net_models", nets[0][1], "--guide_image_path", guides[0], "--image_path", source, "--steps", 4]
    words += ["--mask_path", mask] if kind == "Inpaint" else []
    (found,) = draw("--prompt", "a cat --n dog", *words)
    pipe = pipe_of(model_store("sd1")[0], f"ControlNet{kind}", controlnet=nets[0][0])
    values = {"image": opened(source), "control_image": opened(guides[0]), "strength": 0.8, "num_inference_steps": 4}
    values["controlnet_conditioning_scale"] = 1.0  # theirs differ from pipeline to pipeline
    expected = pixels_of(pipe, **values, **({"mask_image": Image.open(mask)} if kind == "Inpaint" else {}))
    same(found.pixels[:, 32:], expected[:, 32:])


def test_batches_are_guided_picture_by_picture(draw, nets, guides, tmp_path):
    folder = tmp_path / "guides"
    folder.mkdir()
    for index, path in enumerate(guides):
        path.rename(folder / f"{index}.png")
    folders = [folder for _, folder in nets]
    words = ["--control_net_models", *folders, "--guide_image_path", folder, folder / "0.png"]
    words = ["--prompt", "a {cat|dog} --d 1,2,3", "--images_per_prompt", 3, *words]
    for one, other in zip(draw(*words), draw(*words, "--batch_size", 3), strict=True):
        same(one.pixels, other.pixels)


def test_highres_fix_with_a_control_net(draw, nets, guides):
    words = ["--control_net_models", nets[0][1], "--guide_image_path", guides[0], *HIGHRES, "--prompt", "a cat"]
    (both,) = draw(*words)
    (first,) = draw(*words, "--highres_fix_disable_control_net")
    differ(both.pixels, first.pixels)


def ldm_names(state, config):
    """Return a ControlNet under the names of the original layout."""
    from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING

    from library.models import keys
    from library.models.loading import unet_rule_for

    fixed = DIFFUSERS_TO_LDM_MAPPING["controlnet"]["layers"]
    rule = unet_rule_for(config | {"up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3})
    renamed = {}
    for name, tensor in state.items():
        found = re.fullmatch(r"controlnet_(down_blocks\.(\d+)|mid_block|cond_embedding\.blocks\.(\d+))\.(.+)", name)
        if name in fixed:
            new = fixed[name]
        elif found is None:
            new = rule(name)
        elif found[2] is not None:
            new = f"zero_convs.{found[2]}.0.{found[4]}"
        elif found[3] is not None:
            new = f"input_hint_block.{2 * int(found[3]) + 2}.{found[4]}"
        else:
            new = f"middle_block_out.0.{found[4]}"
        renamed[f"control_model.{new}"] = tensor
    assert keys.UNET_PREFIX not in "".join(renamed)
    return renamed


def test_control_net_files_of_both_layouts_are_read(draw, nets, guides, tmp_path):
    net, folder = nets[0]
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    save_file(state, tmp_path / "diffusers.safetensors")
    save_file(ldm_names(state, dict(net.config)), tmp_path / "ldm.safetensors")
    words = ["--prompt", "a cat", "--guide_image_path", guides[0], "--control_net_models"]
    expected = draw(*words, folder)[0].pixels
    for name in ("diffusers.safetensors", "ldm.safetensors"):
        same(draw(*words, tmp_path / name)[0].pixels, expected)
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="x.safetensors is no ControlNet"):
        draw(*words, tmp_path / "x.safetensors")


# ---- textual inversion --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "count"), [(".pt", 3), (".safetensors", 1), slow(".pt", 1), slow(".safetensors", 3)]
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
    same(found.pixels, pixels_of(pipe, prompt, negative_prompt="dog Bad-hands"))
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


# ---- attention weights and windows --------------------------------------------------------------------------

WEIGHTS = {
    "(unbalanced": [("unbalanced", 1.1)],
    "(a)(b)": [("ab", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0), ("house", 1.573), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1),
        ("sky", 1.4641), (".", 1.1),
    ],
    r"\(a\) \[b\] \\": [("(a) [b] \\", 1.0)],
    "a) b] c:1.2)": [("a) b] c:1.2)", 1.0)],
    "(a:-0.5)[b]": [("a", -0.5), ("b", 1 / 1.1)],
    "": [("", 1.0)],
}  # fmt: skip


@pytest.mark.parametrize("prompt", WEIGHTS)
def test_worked_weights(prompt):
    found = parse_weights(prompt)
    assert [text for text, _ in found] == [text for text, _ in WEIGHTS[prompt]]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in WEIGHTS[prompt]])


@pytest.fixture(scope="module")
def encoders(model_store):
    """Return family -> tokenizer and text encoder, whose states have a mean as those of real ones have."""
    made = {}
    for name in ("sd1", "sd2"):
        encoder = copy.deepcopy(model_store(name)[0]["text_encoder"])
        text_model(encoder).final_layer_norm.bias.data.fill_(-0.2)
        made[name] = load_clip_tokenizer(pad_token=tiny.FAMILIES[name].text_models[0].pad_token), encoder
    return made


def encoded(pair, *prompts, **options):
    tokens = [tokenize_prompt(pair[0], prompt, options.get("max_windows", 1)) for prompt in prompts]
    return encode_prompts(*pair, tokens, PromptOptions(**options))


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize("normalize", ["original", "abs", "none"])
@torch.no_grad()
def test_weights_multiply_states_and_the_mean_is_kept(encoders, family, normalize):
    tokenizer, encoder = encoders[family]
    words = tokenizer("a big cat sits", add_special_tokens=False).input_ids
    assert len(words) == 4
    ids = [49406, *words, 49407, *[tokenizer.pad_token_id] * 71]
    states = encoder(torch.tensor([ids])).last_hidden_state[0].double()
    weights = torch.tensor([1.0, 1.0, 1.4, 1 / 1.1, 1 / 1.1, *[1.0] * 72], dtype=torch.float64)
    expected = states * weights[:, None]
    if normalize == "original":
        expected *= states.mean() / expected.mean()
    if normalize == "abs":
        expected *= states.abs().mean() / expected.abs().mean()
    found = encoded(encoders[family], "a (big:1.4) [cat sits]", normalize=normalize)[0].double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalize", ["original", "abs", "none"])
@torch.no_grad()
def test_plain_prompts_stay_to_the_bit_beside_weighted_ones(encoders, normalize):
    tokenizer, encoder = encoders["sd1"]
    both = encoded(encoders["sd1"], r"a cat \(1\)", "a (cat:1.2)", normalize=normalize)
    assert torch.equal(both[:1], encode_tokens(encoder, tokenize(tokenizer, ["a cat (1)", "a cat"]))[:1])


def test_a_mean_near_zero_is_not_brought_back(encoders):
    found = encoded(encoders["sd1"], "(a cat:-40)", "(a cat:0)")
    assert found.isfinite().all()
    assert found.abs().max() < 1e3


def test_break_begins_a_window_and_is_no_part_of_a_word(encoders):
    tokenizer = encoders["sd2"][0]
    one, other = (tokenizer(word, add_special_tokens=False).input_ids for word in ("a cat", "dog"))

    def ids(prompt):
        return list(tokenize_prompt(tokenizer, prompt, 3).ids)

    assert ids("a cat BREAK dog") == [*one, *[0] * (75 - len(one)), *other]
    assert ids("a cat BREAK(dog)") == ids("a cat BREAK dog")
    full = " ".join(["cat"] * 75)
    assert ids(f"{full} BREAK dog") == ids(f"{full} dog")
    assert ids("BREAK a cat BREAK") == [*one, *[0] * (75 - len(one))]
    assert ids("BREAKFAST breaks") == tokenizer("BREAKFAST breaks", add_special_tokens=False).input_ids
    assert tokenize_prompt(tokenizer, "(a cat BREAK dog:1.5)", 3).weights == (1.5,) * 2 + (1.0,) * 73 + (1.5,)


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize("windows", [2, 3])
@torch.no_grad()
def test_every_window_keeps_all_its_positions(encoders, family, windows):
    tokenizer, encoder = encoders[family]
    words = tokenizer(" ".join(f"word {index}" for index in range(200)), add_special_tokens=False).input_ids
    text = tokenizer.decode(words[: 75 * windows - 10])
    words = tokenizer(text, add_special_tokens=False).input_ids
    assert 75 * (windows - 1) < len(words) <= 75 * windows
    found = encoded(encoders[family], text, "", max_windows=windows)
    parts = []
    for index in range(windows):
        part = words[75 * index : 75 * index + 75]
        row = [49406, *part, *([49407] if len(part) < 75 else []), *[tokenizer.pad_token_id] * (74 - len(part)), 49407]
        if len(part) < 75 and family == "sd2":  # EOS only after the words
            row = [49406, *part, 49407, *[0] * (75 - len(part))]
        parts.append(encoder(torch.tensor([row])).last_hidden_state)
    assert found.shape == (2, 77 * windows, 64)
    torch.testing.assert_close(found[:1], torch.cat(parts, dim=1), rtol=1e-5, atol=1e-5)


def test_what_is_cut_is_named(draw, caplog):
    with caplog.at_level("WARNING"):
        draw("--prompt", f"{LONG} --n {LONG} end")
    lost = [message for message in caplog.messages if "is left out" in message]
    assert len(lost) == 2
    assert lost[0].startswith("the prompt is too long, this is left out: ")
    assert lost[1].startswith("the negative prompt is too long")
    assert "thing 39" in lost[0].replace("3 9", "39")
    assert "end" in lost[1]
    assert "--max_embeddings_multiples 2 has room for more" in lost[0]


# ---- dynamic prompts ----------------------------------------------------------------------------------------


def expansions(text, number=200):
    return {dynamic_prompts.expand(text, random.Random(seed)) for seed in range(number)}


DYNAMIC = {
    "a {b|c} d": {"a b d", "a c d"},
    "{a}": {"a"},
    "{2$$a|b|c}": {"a, b", "b, a", "a, c", "c, a", "b, c", "c, b"},
    "{5$$a|b}": {"a, b", "b, a"},
    "{2-1$$ and $$a|b}": {"a", "b", "a and b", "b and a"},
    "{0-1$$a}": {"", "a"},
    "{a{b|c}|d}": {"ab", "ac", "d"},
    r"\{a|b\} {c}": {"{a|b} c"},
    "{a|b": {"{a|b"},
    "a}": {"a}"},
    "{a|}": {"a", ""},
    "{1$$x$$a|b}": {"a", "b"},
}


@pytest.mark.parametrize("text", DYNAMIC)
def test_groups_choose_among_their_variants(text):
    assert expansions(text) == DYNAMIC[text]


ENUMERATED = {
    "{e$$a|b|c}": ["a", "b", "c"],
    "{E$$a|b} {e$$c|d}": ["a c", "a d", "b c", "b d"],
    "{e$$2$$a|b|c}": ["a, b", "a, c", "b, c"],
    "{e$$1-2$$+$$a|b}": ["a", "b", "a+b"],
}


@pytest.mark.parametrize("text", ENUMERATED)
def test_groups_that_are_enumerated_give_all_combinations(draw, text):
    number = dynamic_prompts.num_combinations(text)
    found = [dynamic_prompts.expand(text, random.Random(0), index) for index in range(number)]
    assert found == ENUMERATED[text]


def test_enumeration_takes_the_place_of_images_per_prompt(draw):
    shots = draw("--prompt", "{e$$a|b} {c|d} --d 1,2", "--images_per_prompt", 5, "--steps", 1)
    assert [shot.texts["prompt"][0] for shot in shots] == ["a", "b"]
    assert [shot.texts["seed"] for shot in shots] == ["1", "2"]
    assert shots[0].texts["raw-prompt"] == "{e$$a|b} {c|d}"


@given(st.text("ab{}|$\\ 12-", max_size=30), st.integers(0, 2**31))
@settings(max_examples=200, deadline=None)
def test_any_text_is_expanded_and_the_same_with_the_same_seed(text, seed):
    number = dynamic_prompts.num_combinations(text)
    assert number is None or number > 0
    once, again = (dynamic_prompts.expand(text, random.Random(seed)) for _ in range(2))
    assert once == again
    if "{" not in text:
        assert once == text.replace("\\}", "}")


# ---- files --------------------------------------------------------------------------------------------------


def test_numbers_go_on_after_those_of_the_folder(draw):
    words = ["--prompt", "a", "--images_per_prompt", 2, "--steps", 1]
    names = [shot.path.name for _ in range(2) for shot in draw(*words)]
    assert names == ["im_000001.png", "im_000002.png", "im_000003.png", "im_000004.png"]
    both = draw(*words, *HIGHRES, "--highres_fix_save_1st", "--batch_size", 2)
    assert [shot.path.name for shot in both] == ["im_0000005.png", "im_0000006.png", "im_1000005.png", "im_1000006.png"]


def test_names_of_their_own_are_never_written_over(draw, source):
    shots = draw("--prompt", "a --f x/cat.png", "--images_per_prompt", 2, "--steps", 1)
    again = draw("--prompt", "a --f x/cat.png --d 7", "--steps", 1)
    names = [shot.path.name for shot in (*shots, *again)]
    assert sorted(names) == ["cat-1.png", "cat-2.png", "cat.png"]
    words = ["--prompt", "a", "--image_path", source, "--use_original_file_name", "--images_per_prompt", 2]
    assert [shot.path.name for shot in draw(*words)] == ["source-1.png", "source.png"]


def test_default_names_have_time_place_and_seed(model_store, tmp_path):
    argv = [
        "--ckpt",
        model_store("sd1")[1]["folder"],
        "--prompt",
        "a --d 3,3,8",
        *SIZE,
        "--steps",
        1,
        "--batch_size",
        2,
    ]
    argv += ["--images_per_prompt", 3, "--outdir", tmp_path / "deep" / "er"]
    assert gen_img_diffusers.main([str(word) for word in argv]) == 0
    names = sorted(path.name for path in (tmp_path / "deep" / "er").iterdir())
    assert [re.fullmatch(r"im_\d{14}_(\d{3})_(\d+)\.png", name).groups() for name in names] in (
        [("000", "3"), ("000", "8"), ("001", "3")], [("000", "3"), ("001", "3"), ("000", "8")]
    )  # fmt: skip


def test_the_page_holds_every_picture_and_every_prompt(draw, tmp_path):
    prompts = ['<script>alert("1")</script> & a cat', "猫 'quoted'"]
    (tmp_path / "p.txt").write_text("\n".join(prompts) + " --n <b>", encoding="utf-8")
    shots = draw("--from_file", tmp_path / "p.txt", "--html")
    (page,) = (tmp_path / "o").glob("*.html")
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    for prompt, found in zip(prompts, shots, strict=True):
        assert html.escape(prompt) in text
        assert found.path.name in text
    assert "Negative prompt: &lt;b&gt;" in text
    encoded_pictures = re.findall(r"data:image/jpeg;base64,([^\"]+)", text)
    for index, code in enumerate(encoded_pictures):
        with Image.open(io.BytesIO(base64.b64decode(code))) as picture:
            own, other = (np.abs(np.asarray(picture) - shots[at].pixels).mean() for at in (index, 1 - index))
        assert own < other / 2
    assert "http" not in text.replace("http-equiv", "")


def cells_of(path, columns, rows):
    """Return the pictures of a sheet, from its lower right corner."""
    with Image.open(path) as file:
        sheet = np.asarray(file.convert("RGB")).astype(int)
    height, width = sheet.shape[:2]
    at = lambda row, column: (height - 68 * (rows - row), width - 68 * (columns - column))  # noqa: E731
    return [
        [sheet[y : y + 64, x : x + 64] for y, x in (at(row, column) for column in range(columns))]
        for row in range(rows)
    ]


def test_a_grid_of_one_axis_has_a_row_for_each_prompt(draw, tmp_path):
    (tmp_path / "p.txt").write_text("a cat\na dog --l 2\n", encoding="utf-8")
    draw("--from_file", tmp_path / "p.txt", "--grid", "seed=1,2,3", "--batch_size", 4)
    cells = cells_of(tmp_path / "o" / "grid.png", 3, 2)
    for row, line in enumerate(("a cat", "a dog --l 2")):
        for column in range(3):
            (single,) = draw("--prompt", f"{line} --d {column + 1}", out="single")
            same(cells[row][column], single.pixels)


def test_a_grid_of_two_axes(draw, tmp_path):
    draw("--prompt", "a cat on a mat", "--grid", "replace=cat,dog", "steps=1,3")
    cells = cells_of(tmp_path / "o" / "grid.png", 2, 2)
    for row, steps in enumerate((1, 3)):
        for column, word in enumerate(("cat", "dog")):
            (single,) = draw("--prompt", f"a {word} on a mat --s {steps}", out="single")
            same(cells[row][column], single.pixels)


def test_a_grid_of_three_axes_over_networks(draw, two, tmp_path):
    _, words = two
    axes = ["am=0:0,1:0.5", "sampler=ddim,euler_a", "scale=2,4"]
    draw("--prompt", "a cat", *words, "--grid", *axes)
    sheets = sorted((tmp_path / "o").glob("grid*.png"), key=lambda path: path.stat().st_mtime_ns)
    assert [path.name for path in sheets] == ["grid.png", "grid-1.png"]
    for path, scale in zip(sheets, (2, 4), strict=True):
        cells = cells_of(path, 2, 2)
        line = f"a cat --am 1,0.5 --ss euler_a --l {scale}"
        same(cells[1][1], draw("--prompt", line, *words, out="single")[0].pixels)
        same(cells[0][0], draw("--prompt", f"a cat --l {scale}", out="single")[0].pixels)


# ---- stopping and typing ------------------------------------------------------------------------------------


def stop_at(monkeypatch, number):
    """Have Ctrl-C come while the number-th picture is drawn."""
    plain, calls = artist.draw_latents, []

    def stopped(*args):
        calls.append(args)
        if len(calls) == number:
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(artist, "draw_latents", stopped)


def test_ctrl_c_keeps_what_is_finished(draw, tmp_path, monkeypatch):
    stop_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        draw("--prompt", "a cat", "--images_per_prompt", 5, "--html", "--steps", 1)
    files = sorted(path.name for path in (tmp_path / "o").iterdir())
    assert files[1:] == ["im_000001.png", "im_000002.png"]
    assert files[0].startswith("gallery-")
    assert (tmp_path / "o" / files[0]).read_text(encoding="utf-8").count("<figure>") == 2


def test_ctrl_c_leaves_a_sheet_with_holes(draw, tmp_path, monkeypatch):
    stop_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        draw("--prompt", "a cat", "--grid", "seed=1,2", "scale=2,3", "--steps", 1)
    cells = cells_of(tmp_path / "o" / "grid.png", 2, 2)
    shots = [shot(path) for path in sorted((tmp_path / "o").glob("im_*"))]
    assert len(shots) == 2
    filled = [cell for row in cells for cell in row if (cell != 255).any()]
    assert len(filled) == 2
    for cell in filled:
        assert any(np.array_equal(cell, found.pixels) for found in shots)


def test_ctrl_c_ends_with_its_exit_code(monkeypatch, model_store, tmp_path, capsys):
    monkeypatch.setattr(logs, "set_up_logging", lambda: None)
    stop_at(monkeypatch, 1)
    words = ["--ckpt", model_store("sd1")[1]["folder"], "--prompt", "a", "--outdir", tmp_path, *SIZE]
    monkeypatch.setattr(sys, "argv", ["gen_img_diffusers.py", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        logs.run_script(gen_img_diffusers.main)
    assert ended.value.code == 130
    assert "gen_img_diffusers.py: stopped" in capsys.readouterr().err


def test_typed_prompts_are_drawn_one_by_one(draw, monkeypatch, caplog):
    typed = ["a cat --d 5", "", "a dog --x 3", "a dog --w 70", "a dog --d 6 --s 1"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(typed) + "\n"))
    with caplog.at_level("INFO"):
        shots = draw("--interactive", "--n_iter", 3, "--batch_size", 4)
    assert [shot.texts["prompt"] for shot in shots] == ["a cat", "a dog"]
    assert "--x is not known" in caplog.text
    assert "--w must be a multiple of 8" in caplog.text
    assert str(shots[0].path) in caplog.text
    same(shots[0].pixels, draw("--prompt", "a cat --d 5")[0].pixels)


# ---- precision and memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["--vae_batch_size", 1],
        slow(["--vae_batch_size", 0.5]),
        ["--vae_tiling"],
        slow(["--vae_slices", 16]),
        ["--offload"],
        slow(["--sdpa"]),
        slow(["--xformers"]),
        ["--opt_channels_last"],
    ],
    ids=str,
)
def test_saving_memory_changes_no_picture(draw, words):
    argv = ["--prompt", "a cat", "--images_per_prompt", 3, "--batch_size", 3]
    for one, other in zip(draw(*argv), draw(*argv, *words), strict=True):
        same(one.pixels, other.pixels)


@pytest.mark.parametrize("words", [slow(["--bf16"]), slow(["--fp16"]), ["--bf16", "--no_half_vae"]], ids=str)
def test_half_precision_draws_much_the_same(draw, words, source, mask):
    argv = ["--prompt", "a cat", "--sampler", "euler_a"]
    half, whole = draw(*argv, *words)[0], draw(*argv)[0]
    assert half.pixels.std() > 5
    assert np.corrcoef(half.pixels.ravel(), whole.pixels.ravel())[0, 1] > 0.9
    assert json.loads(half.texts["generation"])["dtype"] in ("bfloat16", "float16")
    draw(*argv, *words, "--image_path", source)
    draw(*argv, *words, "--image_path", source, "--mask_path", mask)


# ---- mistakes -----------------------------------------------------------------------------------------------

CKPT = ["--ckpt", "{tmp}/m.safetensors"]
PROMPT = [*CKPT, "--prompt", "a"]
NET = ["--network_module", "networks.lora", "--network_weights", "{tmp}/net.safetensors"]
# Command line, where {tmp} is a folder with some files -> parts of the message.
MISTAKES = [
    ([], ["--ckpt is missing: the base model"]),
    (CKPT, ["what is to be drawn is missing: --prompt, --from_file, --from_picture or --interactive"]),
    (["--ckpt", "{tmp}/no.ckpt", "--prompt", "a"], ["--ckpt: {tmp}/no.ckpt does not exist, and nothing is downloaded"]),
    (["--ckpt", "{tmp}/*.safetensors", "--prompt", "a"], ["--ckpt: 2 files fit {tmp}/*.safetensors: name one"]),
    (["--ckpt", "{tmp}/*.ckpt", "--prompt", "a"], ["--ckpt: 0 files fit"]),
    ([*PROMPT, "--vae", "hub/name"], ["--vae: hub/name does not exist, and nothing is downloaded"]),
    ([*PROMPT, "--W", "500"], ["--W must be a multiple of 8, got 500; the next are 496 and 504"]),
    ([*PROMPT, "--H", "8"], ["--H must be at least 64, got 8"]),
    ([*PROMPT, "--H", "x"], ["--H must be a whole number, got 'x'"]),
    ([*PROMPT, "--steps", "0"], ["--steps must be at least 1, got 0"]),
    ([*PROMPT, "--scale", "nan"], ["--scale must be a finite number, got nan"]),
    ([*PROMPT, "--sampler", "eular"], ["--sampler must be one of ddim", "got 'eular'"]),
    ([*PROMPT, "--seed", "-1"], ["--seed must be at least 0, got -1"]),
    ([*PROMPT, "--seed", "99999999999999999999"], ["--seed must be at most", "got 99999999999999999999"]),
    ([*PROMPT, "--strength", "1.5"], ["--strength must be at most 1, got 1.5"]),
    ([*PROMPT, "--batch_size", "0"], ["--batch_size must be at least 1, got 0"]),
    ([*PROMPT, "--clip_skip", "0"], ["--clip_skip must be at least 1, got 0"]),
    ([*PROMPT, "--emb_normalize_mode", "mean"], ["--emb_normalize_mode must be one of original, abs, none, got 'mean'"]),
    ([*PROMPT, "--fp16", "--bf16"], ["--fp16 and --bf16 were both given: leave one out"]),
    ([*PROMPT, "--interactive"], ["--interactive does not go with --prompt"]),
    ([*CKPT, "--from_file", "{tmp}/no.txt"], ["{tmp}/no.txt"]),
    ([*CKPT, "--from_file", "{tmp}/empty.txt"], ["--from_file: {tmp}/empty.txt has no prompts"]),
    ([*CKPT, "--from_picture", "{tmp}/plain.png"], ["plain.png does not say how it was drawn", "--prompt"]),
    ([*CKPT, "--from_picture", "{tmp}/empty.txt"], ["empty.txt is not a picture that can be read"]),
    ([*CKPT, "--from_picture", "{tmp}/comfy.png"], ["comfy.png: what it says of itself cannot be read"]),
    ([*CKPT, "--from_picture", "{tmp}/damaged.png"], ["damaged.png: its text 'generation' is damaged"]),
    ([*CKPT, "--from_picture", "{tmp}/other.png"], ["other.png was drawn with the sampler 'UniPC', which is not here"]),
    ([*PROMPT, "--mask_path", "{tmp}/plain.png"], ["--mask_path needs --image_path"]),
    ([*PROMPT, "--image_path", "{tmp}/no"], ["--image_path: {tmp}/no is not a file or a folder"]),
    ([*PROMPT, "--image_path", "{tmp}/nothing"], ["--image_path: {tmp}/nothing holds no pictures (.png, .jpg"]),
    ([*PROMPT, "--image_path", "{tmp}/empty.txt"], ["empty.txt is not a picture that can be read"]),
    ([*PROMPT, "--guide_image_path", "{tmp}/plain.png"], ["--guide_image_path is for ControlNets: give --control_net_models"]),
    ([*PROMPT, "--control_net_models", "a", "b", "--guide_image_path", "{tmp}/plain.png"],
     ["--guide_image_path must name a picture for each of 2 ControlNets, got 1", "--control_net_models: a does not exist"]),
    ([*PROMPT, "--control_net_preps", "depth"], ["--control_net_preps must be none, canny or canny_T1_T2, got 'depth'"]),
    ([*PROMPT, "--control_net_ratios", "1.5"], ["--control_net_ratios must be at most 1, got 1.5"]),
    ([*PROMPT, "--textual_inversion_embeddings", "x.pt"], ["--textual_inversion_embeddings: x.pt does not exist"]),
    ([*PROMPT, "--network_module", "networks.lora"], ["--network_weights must name as many networks, got 1 and 0"]),
    ([*PROMPT, *NET, "{tmp}/m.safetensors"], ["--network_weights must name as many networks, got 1 and 2"]),
    ([*PROMPT, *NET, "--network_mul", "1", "2"], ["--network_mul has 2 values for 1 networks"]),
    ([*PROMPT, *NET, "--network_args", "preset"], ["--network_args must be key=value;key=value", "got 'preset'"]),
    ([*PROMPT, "--network_module", "networks.lroa", "--network_weights", "{tmp}/net.safetensors"],
     ["--network_module networks.lroa: there is no such module"]),
    ([*PROMPT, "--network_module", "networks.lora", "--network_weights", "x"], ["--network_weights: x is not a file"]),
    ([*PROMPT, "--grid", "seed"], ["--grid: an axis is written name=value,value, got 'seed'"]),
    ([*PROMPT, "--grid", "sed=1"], ["--grid: 'sed' is no axis; did you mean seed?"]),
    ([*PROMPT, "--grid", "steps=1,x"], ["--grid: steps must be a whole number, got 'x'"]),
    ([*PROMPT, "--grid", *["seed=1"] * 4], ["at most 3 axes, got 4"]),
    ([*PROMPT, "--hight", "64"], ["--hight is not known"]),
    ([*PROMPT, "word"], ["unexpected argument 'word'", "quotes"]),
    ([*PROMPT, "--negative_scale", "3"], ["--negative_scale is not available: three-way guidance"]),
    ([*PROMPT, "--ds_depth_1", "3"], ["--ds_depth_1 is not available", "--highres_fix_scale"]),
    ([*PROMPT, "--sdxl"], ["--sdxl is not available: this script draws with SD 1.x and 2.x"]),
    ([*PROMPT, "--outdir", "{tmp}/plain.png"], ["--outdir: {tmp}/plain.png is not a folder"]),
]  # fmt: skip


@pytest.fixture
def mistaken(tmp_path):
    """Return a folder with files that command lines name."""
    for name in ("m.safetensors", "net.safetensors", "empty.txt"):
        (tmp_path / name).touch()
    (tmp_path / "nothing").mkdir()
    texts = {
        "plain": {},
        "comfy": {"prompt": '{"3": {"class_type": "KSampler"}}'},
        "damaged": {"generation": "[1]"},
        "other": {"parameters": "a\nSteps: 3, Sampler: UniPC, CFG scale: 7, Seed: 1, Size: 64x64"},
    }
    for name, keys in texts.items():
        info = PngImagePlugin.PngInfo()
        for key, text in keys.items():
            info.add_text(key, text)
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png", pnginfo=info)
    return tmp_path


@pytest.mark.parametrize(("words", "parts"), MISTAKES, ids=lambda value: " ".join(map(str, value))[-60:])
def test_mistakes_are_told_before_anything_is_loaded(mistaken, monkeypatch, words, parts):
    monkeypatch.setattr(recipe, "generate", lambda *_: pytest.fail("the run began"))
    with pytest.raises(UserError) as caught:
        gen_img_diffusers.main([word.replace("{tmp}", str(mistaken)) for word in words])
    for part in parts:
        assert part.replace("{tmp}", str(mistaken)) in str(caught.value)


LINES = [
    ("a --x 3", "--x is not known"),
    ("a --W 3", "--w must be a multiple of 8 from 64 to"),
    ("a --h tall", "got 'tall'"),
    ("a --s many", "--s must be a whole number, got 'many'"),
    ("a --d 1,x", "--d must be seeds from 0 on, with commas between, got '1,x'"),
    ("a --d -4", "got '-4'"),
    ("a --l inf", "--l must be a number, got 'inf'"),
    ("a --t 2", "--t must be a number from 0 to 1, got '2'"),
    ("a --am 1;2", "--am must be numbers with commas between, got '1;2'"),
    ("a --f cat.bmp", "--f must be a name below --outdir that ends in .png, .jpg"),
    ("a --f ../cat.png", "got '../cat.png'"),
    ("a --f /cat.png", "got '/cat.png'"),
    ("a --ss eule", "sampler 'eule' is not known; did you mean euler"),
    ("a --nl 3", "--nl is not supported: three-way guidance"),
    ("a --glt 3", "--glt is not supported: Gradual Latent is not part of this suite: draw small first"),
    ("a --ow 3", "--ow is not supported: it is for SDXL"),
]


def test_all_bad_lines_of_a_file_are_told_at_once(mistaken):
    text = "\n".join(["# a comment", "", "good --w 64", *(line for line, _ in LINES)])
    (mistaken / "p.txt").write_text(text, encoding="utf-8")
    argv = ["--ckpt", mistaken / "m.safetensors", "--from_file", mistaken / "p.txt", "--W", 65]
    with pytest.raises(UserError) as caught:
        gen_img_diffusers.main([str(word) for word in argv])
    first, *told = str(caught.value).split("\n")
    assert first.startswith("--W must be a multiple of 8, got 65")
    assert len(told) == len(LINES)
    for number, ((_, message), line) in enumerate(zip(LINES, told, strict=True), 4):
        assert line.startswith(f"{mistaken / 'p.txt'}:{number}: ")
        assert message in line


@pytest.mark.parametrize(
    "words", [["--sampler", "lms"], ["--prompt", "a --ss k_lms"], ["--grid", "sampler=ddim,lms"]], ids=str
)
def test_a_sampler_that_lacks_its_package_is_told_first(mistaken, words, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "scipy" else found(name, *more)
    )
    argv = ["--ckpt", str(mistaken / "m.safetensors"), "--prompt", "a", *words]
    with pytest.raises(UserError, match="lms needs scipy: pip install scipy"):
        gen_img_diffusers.main(argv)


def test_a_mistake_ends_with_two_before_torch_is_imported(mistaken):
    code = (
        "import sys, gen_img_diffusers\nfrom library import logs\n"
        "try:\n    logs.run_script(gen_img_diffusers.main)\n"
        "finally:\n    print([name for name in ('torch', 'diffusers', 'transformers') if name in sys.modules])"
    )
    picture = ["--from_picture", mistaken / "plain.png", "--image_path", mistaken / "plain.png"]
    words = ["--ckpt", mistaken / "m.safetensors", "--prompt", "a {b|c} --x 3 --w 64", "--grid", "seed=1,2", *picture]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout.strip() == "[]"
    assert "error: --prompt: --x is not known" in done.stderr
    assert "plain.png does not say how it was drawn" in done.stderr


def test_what_only_the_run_can_see_is_told_in_it(draw):
    with pytest.raises(UserError, match="--device gpu cannot be used: .*such as cpu, cuda or cuda:1"):
        draw("--prompt", "a", "--device", "gpu")
    with pytest.raises(UserError, match="--grid: no prompt has 'dog', the first value of replace"):
        draw("--prompt", "a", "--grid", "replace=dog,cat")


def test_strengths_that_no_network_has_are_told(draw, caplog):
    with caplog.at_level("WARNING"):
        draw("--prompt", "a --am 1,2", "--steps", 1)
    assert "--prompt: --am has 2 values, networks that can change: 0" in caplog.text


def test_options_that_do_nothing_here_are_accepted(draw, caplog):
    with caplog.at_level("WARNING"):
        draw("--prompt", "a", "--v1", "--no_preview", "--console_log_simple", "--force_scheduler_zero_steps_offset")
    assert "--v1 is ignored: the kind of model is recognised" in caplog.text


def test_a_pattern_of_one_file_is_that_file(model_store, tmp_path):
    folder = model_store("sd1")[1]["folder"]
    argv = ["--ckpt", f"{folder.parent}/fold*", "--prompt", "a", *SIZE, "--steps", 1, "--outdir", tmp_path / "o"]
    assert gen_img_diffusers.main([str(word) for word in argv]) == 0
    assert len(list((tmp_path / "o").iterdir())) == 1


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (["seed=1,2", "seed=3"], "the axis seed is named twice"),
        (["am=0,1"], "am is the strength of networks, and there are none"),
        (["strength=0.1,0.9"], "strength is for pictures that begin with one"),
    ],
)
def test_axes_that_would_change_nothing_are_refused(draw, axes, message):
    with pytest.raises(UserError, match=message):
        draw("--prompt", "a", "--grid", *axes)


def test_what_is_no_embedding_and_a_mask_that_is_missing_are_told(draw, source, tmp_path):
    with pytest.raises(UserError, match="no embedding|vectors of"):
        draw("--prompt", "a", "--textual_inversion_embeddings", make_numbers(tmp_path / "x.safetensors"))
    (first,) = draw("--prompt", "a", "--image_path", source, "--mask_path", source)
    with pytest.raises(UserError, match="which it does not hold: give --mask_path"):
        draw("--from_picture", first.path, "--image_path", source)


def make_numbers(path):
    """Write a file of a single number, which is no embedding."""
    save_file({"x.alpha": torch.tensor(1.0)}, path)
    return path
