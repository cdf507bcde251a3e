"""Real learning on the embedded example: the held-out subject appears, the others stay. Slow."""

from __future__ import annotations

import sys

import pytest
import tiny
from scripts import ROOT

import train_network
from library.config.prompts import Prompt
from library.models.conditioning import LiveConditioner
from library.sampling.previews import generate_previews
from networks.lora import create_network_from_weights

NUM_UNICORNS = 24


def draw(models, subjects, glyphs, seed):
    """Return pictures of subjects, each on the next of the backgrounds."""
    backgrounds = list(glyphs.BACKGROUNDS)
    prompts = [
        Prompt(
            f"a {subject} on a {backgrounds[index % len(backgrounds)]} background",
            width=128,
            height=128,
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


@pytest.mark.slow
def test_the_example_teaches_the_unicorn_and_spares_the_others(tmp_path, monkeypatch):
    from examples.pocket_model import glyphs

    monkeypatch.chdir(ROOT)
    assert train_network.main(["--config_file", "examples/unicorn/train.toml", "--output_dir", str(tmp_path)]) == 0
    assert (tmp_path / "unicorn-sheet.png").exists()

    models = tiny.load("examples/pocket_model")
    others, unicorns = list(glyphs.SUBJECTS), ["unicorn"] * NUM_UNICORNS
    before_others = glyphs.score(draw(models, others, glyphs, 100), others)
    before = glyphs.score(draw(models, unicorns, glyphs, 500), unicorns)

    file = tmp_path / "unicorn.safetensors"
    text_encoder, unet = models.texts[0].module, models.unet
    network, weights = create_network_from_weights(1.0, str(file), None, text_encoder, unet)
    network.apply_to(text_encoder, unet)
    network.load_state_dict(weights)
    after_others = glyphs.score(draw(models, others, glyphs, 100), others)
    after = glyphs.score(draw(models, unicorns, glyphs, 500), unicorns)
    sys.stdout.write(f"unicorn {before:.2f} -> {after:.2f}, others {before_others:.2f} -> {after_others:.2f}\n")
    assert before <= 0.05
    assert after >= 0.8
    assert after_others >= before_others - 0.15
