"""gen_img_diffusers.py: its pictures against diffusers' own pipelines, and one picture for each seed."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import tiny
import torch
from drawing import LONG, SAMPLERS, SIZE, differ, pipe_of, pixels_of, same_pixels, shot, slow
from safetensors.torch import save_file

import gen_img_diffusers
from library.config import samplers
from library.config.command_line import parse
from library.config.generation import GenerateConfig
from library.config.retired import GENERATION
from library.generation import checks, image_generator
from library.generation.requests import MOST_DRAWN_SEED, all_requests


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


# ---- the same picture as diffusers --------------------------------------------------------------------------


@pytest.mark.repetitions(keep=5)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws_what_the_pipeline_of_diffusers_draws(draw, model_store, sampler):
    (found,) = draw("--prompt", "a cat --n dog", "--sampler", sampler, "--steps", 3)
    pipe = pipe_of(model_store("sd1")[0], sampler=sampler)
    same_pixels(found.pixels, pixels_of(pipe, num_inference_steps=3))
    assert json.loads(found.texts["generation"])["sampler"] == sampler


def test_names_with_k_are_the_same_samplers():
    rows = {str(name): row for name, row in samplers.SAMPLERS.items()}
    assert all(row is rows[name.removeprefix("k_")] for name, row in rows.items())


@pytest.mark.parametrize(
    ("sampler", "flag", "skip"), [("ddim", True, 2), slow("ddim", False, None), slow("euler_a", True, None)]
)
def test_sd2_and_v_prediction_are_as_in_diffusers(draw, model_store, sampler, flag, skip):
    words = ["--v_parameterization"] * flag + (["--clip_skip", skip] if skip else [])
    (found,) = draw("--prompt", "a cat --n dog", "--sampler", sampler, *words, family="sd2", layout="safetensors")
    pipe = pipe_of(model_store("sd2")[0], family="sd2", sampler=sampler, predicts_v=flag, changed=True)
    same_pixels(found.pixels, pixels_of(pipe, **with_skip(pipe, skip)))


def test_clip_skip_is_that_of_diffusers_and_one_more(draw, model_store):
    plain, first, third = (
        draw("--prompt", "a cat --n dog", *(["--clip_skip", skip] if skip else [])) for skip in (None, 1, 3)
    )
    assert np.array_equal(plain[0].pixels, first[0].pixels)
    pipe = pipe_of(model_store("sd1")[0], changed=True)
    same_pixels(third[0].pixels, pixels_of(pipe, **with_skip(pipe, 3)))
    differ(third[0].pixels, plain[0].pixels)
    assert "Clip skip: 3" in third[0].texts["parameters"]


def test_a_scale_of_one_leaves_the_negative_prompt_out(draw, model_store):
    (found,) = draw("--prompt", "a cat --n dog --l 1")
    same_pixels(found.pixels, pixels_of(pipe_of(model_store("sd1")[0]), guidance_scale=1.0))
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
    same_pixels(found.pixels, pixels_of(pipe_of(model_store("sd1")[0] | {"vae": other["vae"]})))
    assert json.loads(found.texts["generation"])["vae"] == "vae.safetensors"


# ---- one seed is one picture --------------------------------------------------------------------------------

DIFFERENT = [
    "a cat --n blurry, dark --d 1",
    "(two:1.3) dogs and a [bird] --d 22",
    "a unicorn --n dog --d 333",
    f"{LONG} --n ugly --d 4444",
]


@pytest.mark.parametrize("sampler", ["euler_a", slow("dpm_2_a"), slow("ddim")])
def test_a_batch_of_four_is_four_batches_of_one(draw, tmp_path, sampler):
    (tmp_path / "p.txt").write_text("\n".join(DIFFERENT), encoding="utf-8")
    words = ["--from_file", tmp_path / "p.txt", "--sampler", sampler, "--max_embeddings_multiples", 2, "--steps", 3]
    alone = draw(*words, out="one")
    together = draw(*words, "--batch_size", 4, out="four")
    for one, other in zip(alone, together, strict=True):
        same_pixels(one.pixels, other.pixels)
    negatives = [shot.texts["negative-prompt"] for shot in together]
    assert negatives == ["blurry, dark", "", "dog", "ugly"]
    assert [shot.texts["seed"] for shot in together] == ["1", "22", "333", "4444"]
    assert "Negative prompt: blurry, dark\n" in together[0].texts["parameters"]
    assert "Negative prompt" not in together[1].texts["parameters"]
    for index in range(3):
        differ(together[index].pixels, together[index + 1].pixels)


def test_what_is_drawn_together_has_one_size_and_one_length(monkeypatch, draw, tmp_path):
    sizes = []
    plain = image_generator.sample_latents

    def counted(base, inputs, on_step):
        sizes.append(len(inputs.seeds))
        return plain(base, inputs, on_step)

    monkeypatch.setattr(image_generator, "sample_latents", counted)
    (tmp_path / "p.txt").write_text("a\nb\nc --w 72\nd\ne --s 1\nf --l 2\ng --l 2\n" + LONG, encoding="utf-8")
    draw("--from_file", tmp_path / "p.txt", "--batch_size", 8, "--max_embeddings_multiples", 3)
    assert sizes == [2, 1, 1, 1, 2, 1]


def requests_of(*words):
    """Return what a command line asks for, without drawing it."""
    config = parse(GenerateConfig, ["--ckpt", "x", *map(str, words)], retired=GENERATION)
    return list(all_requests(config, checks.load_lines(config.prompts)))


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
    assert all(0 <= int(seed) <= MOST_DRAWN_SEED for seed in seeds)


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


# ---- precision and memory -----------------------------------------------------------------------------------


@pytest.mark.repetitions(keep=2)
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
        same_pixels(one.pixels, other.pixels)


@pytest.mark.parametrize("words", [slow(["--bf16"]), slow(["--fp16"]), ["--bf16", "--no_half_vae"]], ids=str)
@pytest.mark.parametrize("given", [(), ("image",), ("image", "mask")], ids="".join)
def test_half_precision_draws_much_the_same_pixels(draw, words, given, source, mask, monkeypatch):
    """A seed has one picture: its noise is that of float32, and latents are not rounded between the steps."""
    randn = torch.randn

    def drawn_in_float32(*arguments, dtype=None, **more):
        assert dtype in {None, torch.float32}, "torch before 2.13 draws other numbers in half precision on the CPU"
        return randn(*arguments, dtype=dtype, **more)

    monkeypatch.setattr(torch, "randn", drawn_in_float32)
    files = {"image": ["--image_path", source], "mask": ["--mask_path", mask]}
    argv = ["--prompt", "a cat", "--sampler", "euler_a", *[word for name in given for word in files[name]]]
    half, whole = draw(*argv, *words)[0], draw(*argv)[0]
    assert half.pixels.std() > 5
    assert np.abs(half.pixels - whole.pixels).mean() < 2
    assert json.loads(half.texts["generation"])["dtype"] in ("bfloat16", "float16")
