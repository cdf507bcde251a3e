"""Bad input of gen_img_diffusers.py, told before anything is loaded."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from drawing import SIZE
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file
from scripts import ROOT, python

import gen_img_diffusers
from library.errors import UserError
from library.generation import recipe

# ---- mistakes -----------------------------------------------------------------------------------------------

CKPT = ["--ckpt", "{tmp}/m.safetensors"]
PROMPT = [*CKPT, "--prompt", "a"]
NET = ["--network_module", "networks.lora", "--network_weights", "{tmp}/net.safetensors"]
# Command line, where {tmp} is a folder with some files -> parts of the message.
MISTAKES = [
    ([], ["--ckpt is missing: the base model"]),
    (CKPT, ["no prompt is given: use --prompt, --from_file, --from_picture or --interactive"]),
    (["--ckpt", "{tmp}/no.ckpt", "--prompt", "a"], ["--ckpt: {tmp}/no.ckpt does not exist; name a .safetensors or .ckpt file or a Diffusers folder, or a repo"]),
    (["--ckpt", "{tmp}/*.safetensors", "--prompt", "a"], ["--ckpt: 2 files fit {tmp}/*.safetensors: name one"]),
    (["--ckpt", "{tmp}/*.ckpt", "--prompt", "a"], ["--ckpt: 0 files fit"]),
    ([*PROMPT, "--vae", "hub/name"], ["--vae: hub/name does not exist here, and the Hugging Face cache has no model of that name; nothing is downloaded"]),
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
    ([*CKPT, "--from_picture", "{tmp}/comfy.png"], ["comfy.png is of ComfyUI, whose records cannot be read here; give the prompt by --prompt"]),
    ([*CKPT, "--from_picture", "{tmp}/damaged.png"], ["damaged.png: its text 'generation' is damaged"]),
    ([*CKPT, "--from_picture", "{tmp}/other.png"], ["other.png was drawn with the sampler 'Wobbly', which is not here"]),
    ([*PROMPT, "--mask_path", "{tmp}/plain.png"], ["--mask_path needs --image_path"]),
    ([*PROMPT, "--image_path", "{tmp}/no"], ["--image_path: {tmp}/no does not exist"]),
    ([*PROMPT, "--image_path", "{tmp}/nothing"], ["--image_path: {tmp}/nothing holds no pictures (.png, .jpg"]),
    ([*PROMPT, "--image_path", "{tmp}/empty.txt"], ["empty.txt cannot be read: the file is empty"]),
    ([*PROMPT, "--guide_image_path", "{tmp}/plain.png"], ["--guide_image_path is for ControlNets: give --control_net_models"]),
    ([*PROMPT, "--control_net_models", "a", "b", "--guide_image_path", "{tmp}/plain.png"],
     ["--guide_image_path must name a picture for each of 2 ControlNets, got 1", "--control_net_models: a does not exist"]),
    ([*PROMPT, "--control_net_preps", "depth"], ["--control_net_preps must be none, canny or canny_T1_T2, got 'depth'"]),
    ([*PROMPT, "--control_net_ratios", "1.5"], ["--control_net_ratios must be at most 1, got 1.5"]),
    ([*PROMPT, "--textual_inversion_embeddings", "x.pt"], ["--textual_inversion_embeddings: x.pt does not exist"]),
    ([*PROMPT, "--network_module", "networks.lora"], ["--network_weights must name as many networks, got 1 and 0"]),
    ([*PROMPT, *NET, "{tmp}/m.safetensors"], ["--network_weights must name as many networks, got 1 and 2"]),
    ([*PROMPT, *NET, "--network_mul", "1", "2"], ["--network_mul has 2 values for 1 networks"]),
    ([*PROMPT, *NET, "--network_args", "preset"], ["--network_args must be key=value;key=value", "'preset' has no key and value"]),
    ([*PROMPT, "--network_module", "networks.lroa", "--network_weights", "{tmp}/net.safetensors"],
     ["--network_module networks.lroa: there is no such module"]),
    ([*PROMPT, "--network_module", "networks.lora", "--network_weights", "x"], ["--network_weights: x does not exist"]),
    ([*PROMPT, "--grid", "seed"], ["--grid: an axis is written name=value,value, got 'seed'"]),
    ([*PROMPT, "--grid", "sed=1"], ["--grid: 'sed' is no axis; did you mean seed?"]),
    ([*PROMPT, "--grid", "steps=1,x"], ["--grid: steps must be a whole number, got 'x'"]),
    ([*PROMPT, "--grid", *["seed=1"] * 4], ["at most 3 axes, got 4"]),
    ([*PROMPT, "--hight", "64"], ["--hight is not known"]),
    ([*PROMPT, "word"], ["unexpected argument 'word'", "quotes"]),
    ([*PROMPT, "--negative_scale", "3"], ["--negative_scale is not available: three-way guidance"]),
    ([*PROMPT, "--ds_depth_1", "3"], ["--ds_depth_1 is not available", "--highres_fix_scale"]),
    ([*PROMPT, "--control_net_lllite_models", "a"], ["--control_net_lllite_models is not available"]),
    ([*PROMPT, "--crop_top", "-1"], ["--crop_top must be at least 0, got -1"]),
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
        "other": {"parameters": "a\nSteps: 3, Sampler: Wobbly, CFG scale: 7, Seed: 1, Size: 64x64"},
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
    ("a --W 3", "--w must be at least 64, got 3"),
    ("a --h 500", "--h must be a multiple of 8, got 500; the next are 496 and 504"),
    ("a --h tall", "got 'tall'"),
    ("a --s many", "--s must be a whole number, got 'many'"),
    ("a --d 1,x", "--d must be seeds from 0 on, with commas between, got '1,x'"),
    ("a --d -4", "--d must be at least 0, got -4"),
    ("a --l inf", "--l must be a finite number, got inf"),
    ("a --t 2", "--t must be at most 1, got 2.0"),
    ("a --am 1;2", "--am must be numbers with commas between, got '1;2'"),
    ("a --f cat.bmp", "--f must be a name below --outdir that ends in .png, .jpg"),
    ("a --f ../cat.png", "got '../cat.png'"),
    ("a --f /cat.png", "got '/cat.png'"),
    ("a --ss eule", "--ss must be one of ddim, pndm, lms, euler,"),
    ("a --nl 3", "--nl is not available: three-way guidance"),
    ("a --glt 3", "--glt is not available: Gradual Latent is not part of this suite: draw small first"),
    ("a --ow -3", "--ow must be at least 0, got -3"),
]


def test_all_bad_lines_of_a_file_are_told_at_once(mistaken):
    text = "\n".join(["# a comment", "  # another", "", "good --w 64 --g 3", *(line for line, _ in LINES)])
    (mistaken / "p.txt").write_text(text, encoding="utf-8")
    argv = ["--ckpt", mistaken / "m.safetensors", "--from_file", mistaken / "p.txt", "--W", 65]
    with pytest.raises(UserError) as caught:
        gen_img_diffusers.main([str(word) for word in argv])
    first, *told = str(caught.value).split("\n")
    assert first.startswith("--W must be a multiple of 8, got 65")
    assert len(told) == len(LINES)
    for number, ((_, message), line) in enumerate(zip(LINES, told, strict=True), 5):
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
    done = python("-c", code, *words, cwd=ROOT)
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
    assert "--v1" not in caplog.text


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
