"""Real learning on the embedded examples: the held-out subject appears, the others stay. Slow, but for what they draw."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from scripts import ROOT

import gen_img_diffusers
import train_network
from examples.pocket_model import glyphs
from examples.pocket_xl.measure import centre, detail
from library.config.prompts import Prompt
from library.models.conditioning import LiveConditioner, TextOptions
from library.sampling.previews import generate_previews
from networks.lora import create_network_from_weights

NUM_UNICORNS = 24
POCKET_XL = ROOT / "examples" / "pocket_xl"


def draw(models, subjects, seed):
    """Return pictures of subjects, each on the next of the backgrounds."""
    backgrounds = list(glyphs.BACKGROUNDS)
    prompts = [
        Prompt(
            glyphs.caption(subject, backgrounds[index % len(backgrounds)]),
            width=glyphs.SIZE,
            height=glyphs.SIZE,
            steps=20,
            scale=3.0,
        )
        for index, subject in enumerate(subjects)
    ]
    seeds = [seed + index for index in range(len(prompts))]
    return [
        picture.image
        for picture in generate_previews(models, LiveConditioner(models.texts), prompts, seeds, sampler="ddim")
    ]


def apply(file, models):
    """Let a network file act on models."""
    encoders = [text.module for text in models.texts]
    network, weights = create_network_from_weights(1.0, str(file), None, encoders, models.unet)
    network.apply_to(encoders, models.unet)
    network.load_state_dict(weights)


LESSONS = {
    "train.toml": ("pocket_model", "train.toml", []),
    "train_xl.toml": ("pocket_xl", "train_xl.toml", []),
    "dylora": ("pocket_xl", "train_xl.toml", ["--network_module=networks.dylora", "--network_args", "unit=8"]),
}


@pytest.mark.slow
@pytest.mark.parametrize(("model", "config", "more"), LESSONS.values(), ids=LESSONS)
def test_the_example_teaches_the_unicorn_and_spares_the_others(model, config, more, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = ["--config_file", f"examples/unicorn/{config}", "--output_dir", str(tmp_path), "--output_name", "u", *more]
    assert train_network.main(words) == 0
    assert (tmp_path / "u-sheet.png").exists()

    models = tiny.load(f"examples/{model}")
    others, unicorns = list(glyphs.SUBJECTS), ["unicorn"] * NUM_UNICORNS
    before_others = glyphs.score(draw(models, others, 100), others)
    before = glyphs.score(draw(models, unicorns, 500), unicorns)

    apply(tmp_path / "u.safetensors", models)
    after_others = glyphs.score(draw(models, others, 100), others)
    after = glyphs.score(draw(models, unicorns, 500), unicorns)
    sys.stdout.write(f"unicorn {before:.2f} -> {after:.2f}, others {before_others:.2f} -> {after_others:.2f}\n")
    assert before <= 0.05
    assert after >= 0.8
    assert after_others >= before_others - 0.15


@pytest.mark.slow
def test_v_prediction_on_the_small_sdxl_lowers_the_error_of_v(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = ["--config_file", "examples/unicorn/train_xl.toml", "--v_parameterization", "--max_train_steps", "60"]
    assert train_network.main([*words, "--output_name", "v", "--output_dir", str(tmp_path)]) == 0
    models = tiny.load(POCKET_XL)
    before = error_of_v(models)
    apply(tmp_path / "v.safetensors", models)
    after = error_of_v(models)
    sys.stdout.write(f"error of v {before:.3f} -> {after:.3f}\n")
    assert after < 0.6 * before


@torch.no_grad()
def error_of_v(models):
    """Return the mean squared error of v over the training pictures, in time steps spread evenly: diffusers' v."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    files = sorted((ROOT / "examples" / "unicorn" / "images").glob("*.png"))
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    pictures = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    latents = models.vae.encode(pictures).latent_dist.mean * models.vae.config.scaling_factor
    captions = [file.with_suffix(".txt").read_text(encoding="utf-8").strip() for file in files]
    text = LiveConditioner(models.texts).encode(captions, TextOptions())
    sizes = torch.tensor([[float(glyphs.SIZE), glyphs.SIZE, 0, 0, glyphs.SIZE, glyphs.SIZE]] * len(files))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    steps = torch.linspace(20, 980, len(files)).long()
    scheduler = DDIMScheduler.from_pretrained(POCKET_XL / "scheduler")
    kept = text.for_unet(sizes)
    predicted = models.unet(scheduler.add_noise(latents, noise, steps), steps, **kept).sample
    return float((predicted - scheduler.get_velocity(latents, noise, steps)).square().mean())


@pytest.mark.slow
def test_the_small_sdxl_draws_and_follows_the_sizes(tmp_path):
    prompts = tmp_path / "prompts.txt"
    plain = f"{glyphs.caption('heart', 'blue')} --d 1"
    prompts.write_text(f"{plain}\n{plain} --ow 8 --oh 8\n{plain} --cl 24\n", encoding="utf-8")
    words = ["--ckpt", POCKET_XL, "--from_file", prompts, "--outdir", tmp_path, "--W", 128, "--H", 128]
    more = ["--steps", 8, "--scale", 3, "--sampler", "ddim", "--batch_size", 3, "--sequential_file_name"]
    assert gen_img_diffusers.main([str(word) for word in (*words, *more)]) == 0
    sharp, blurred, cut = (Image.open(file).convert("RGB") for file in sorted(tmp_path.glob("*.png")))
    assert glyphs.nearest_glyph(sharp)[0] == "heart"
    assert glyphs.nearest_background(sharp)[0] == "blue"
    assert detail(blurred) < 0.6 * detail(sharp)
    down, right = centre(cut) - centre(sharp)
    assert -34 < right < -14
    assert abs(down) < 8


def test_the_small_sdxl_is_small_and_has_the_layers_of_the_large_one():
    files = [file for file in POCKET_XL.rglob("*") if file.is_file() and file.suffix not in {".py", ".pyc"}]
    assert sum(file.stat().st_size for file in files) <= 20e6
    models = tiny.load(POCKET_XL)
    modules = [module for name, module in models.unet.named_modules() if acted_on(name)]
    assert sum(isinstance(module, torch.nn.Linear) for module in modules) == 739
    assert sum(isinstance(module, torch.nn.Conv2d) for module in modules) == 11 + 38


def acted_on(name):
    """Return whether a layer is of those that LoRA networks act on: in the blocks."""
    return name.startswith(("down_blocks.", "mid_block.", "up_blocks."))
