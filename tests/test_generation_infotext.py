"""What a picture's file says of how it was drawn, written by gen_img_diffusers.py and read again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawing import HIGHRES, LONG, same_pixels
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from library.errors import UserError
from library.generation import infotext, recorded
from library.generation.jobs import Job, Settings
from library.generation.recorded import RecordedNetwork
from library.generation.requests import Request
from library.models.conditioning import TextOptions

# ---- drawn again from its own file --------------------------------------------------------------------------


AGAIN = {
    "plain": ["--sampler", "euler_a", "--scale", 3.5],
    "weights": ["--prompt", "(a:1.4) cat --n [dog]", "--clip_skip", 2, "--emb_normalize_mode", "abs"],
    "windows": ["--prompt", LONG, "--max_embeddings_multiples", 2],
    "highres": HIGHRES,
    "latents": [*HIGHRES, "--highres_fix_latents_upscaling"],
}


@pytest.mark.repetitions(keep=2)
@pytest.mark.parametrize("name", AGAIN)
def test_a_picture_is_drawn_again_from_its_own_file(draw, name):
    (first,) = draw("--prompt", "a {cat|dog} --n bird", *AGAIN[name], "--steps", 3)
    (again,) = draw("--from_picture", first.path, "--seed", 99, "--steps", 9, "--scale", 1)
    assert np.array_equal(first.pixels, again.pixels)
    assert json.loads(first.texts["generation"]) == json.loads(again.texts["generation"])


@pytest.mark.slow
def test_networks_act_again_with_the_strengths_of_the_file(draw, two, caplog):
    _, words = two
    (first,) = draw("--prompt", "a cat --am 0.6,0.2", *words)
    (second,) = draw("--prompt", "a cat", *words, "--network_mul", 0.5, "--network_merge_n_models", 1)
    with caplog.at_level("WARNING"):
        again = draw("--from_picture", first.path, second.path, *words)
        assert "other networks" not in caplog.text
        assert np.array_equal(again[0].pixels, first.pixels)
        same_pixels(again[1].pixels, second.pixels)
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


A1111: dict[str, tuple[str, dict[str, Any]]] = {
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
        {"prompt": 'first line, \nsecond "line": (x:1.1)', "negative_prompt": "low quality",
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
    record = recorded.read_recorded(tmp_path / "a.png")
    assert {key: getattr(record.request, key) for key in expected} == expected
    if name == "networks":
        known = (RecordedNetwork("mine", "a1b2c3d4e5f6", 0.8), RecordedNetwork("other", "0011223344ff"))
        assert record.networks == known
        assert record.model_sha256 == "abc"


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
    request = Request(prompt=prompt.strip(), seed=seed, negative_prompt="n: m")
    text = TextOptions(clip_skip=2, weights="original")
    job_settings = Settings(64, 72, 20, 7.5, "euler_a", text, (), strength=0.5)
    job = Job(0, request, job_settings, max_windows=1, init_image=Path("x.png"))
    facts = infotext.RunFacts(
        "a, b: c.safetensors",
        "ab" * 32,
        None,
        (infotext.NetworkFacts("networks.lora", "x, y.pt", "cd" * 32, 1.0, has_tag=True),),
        "float32",
        "v",
        zero_snr=False,
    )
    texts = infotext.texts_for(job, facts)
    values: dict[str, Any] = {"width": 64, "height": 72, "steps": 20, "scale": 7.5, "sampler": "euler_a"}
    values |= {"strength": 0.5, "clip_skip": 2}
    expected = dataclasses.replace(request, **values)
    read = recorded.from_json(json.loads(texts["generation"]), Path("x"))
    assert read.request == expected
    assert read.begins_with == "x.png"
    if "Negative prompt:" not in prompt and prompt.strip():
        read = recorded.from_parameters(texts["parameters"], Path("x"), (512, 512), None)
        assert read.request == expected
        assert read.networks == (RecordedNetwork("x, y", "cd" * 6, 1.0),)
        assert read.model_sha256 == "ab" * 5
