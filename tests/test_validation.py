"""The loss on what is held out, its record, and the curve."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from runs import ALSO_SDXL_SLOW, options, same, train
from tensors import metadata

import train_network
from library.errors import UserError
from library.training.charts import style
from library.training.charts.series import read_metrics
from library.training.measure import validation


def metrics(out):
    return [json.loads(line) for line in (out / "x-metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def values(out, name):
    return [line[name] for line in metrics(out) if name in line]


STEP, EPOCH = "loss/validation/step_average", "loss/validation/epoch_average"


@ALSO_SDXL_SLOW
def test_the_same_weights_always_have_the_same_loss(base, pictures, tmp_path):
    """With a learning rate of nothing the loss stays, whatever is drawn for training; another seed measures another."""
    frozen = {"validation_split": 0.5, "learning_rate": "1e-30", "validate_every_n_steps": 1, "flip_aug": True}
    train(base, pictures, tmp_path / "a", **frozen)
    assert len(set(values(tmp_path / "a", STEP))) == 1
    assert len(values(tmp_path / "a", STEP)) == 3
    assert len(values(tmp_path / "a", EPOCH)) >= 1
    train(base, pictures, tmp_path / "b", **frozen, gradient_accumulation_steps=2, validation_seed=7)
    assert values(tmp_path / "b", STEP) == values(tmp_path / "a", STEP)  # 7 is --seed
    train(base, pictures, tmp_path / "c", **frozen, validation_seed=8)
    assert values(tmp_path / "c", STEP)[0] != values(tmp_path / "a", STEP)[0]


@ALSO_SDXL_SLOW
def test_measuring_changes_nothing_about_the_training(base, pictures, tmp_path):
    held_out = {"validation_split": 0.5, "network_dropout": 0.2, "cache_latents": True}
    watched = train(base, pictures, tmp_path / "a", **held_out, validate_every_n_steps=1)
    same(watched, train(base, pictures, tmp_path / "b", **held_out, validate_every_n_epochs=1000))
    assert len(values(tmp_path / "b", EPOCH)) == 1, "the end is always measured"


@pytest.mark.repetitions(keep=2)
@pytest.mark.parametrize(
    ("more", "steps", "epochs"),
    [
        ({"validate_every_n_steps": 2}, [2, 4], [2, 4, 5]),  # 2 steps in an epoch
        ({"validate_every_n_steps": 2, "validate_every_n_epochs": 4}, [2, 4], [5]),
        ({"validate_every_n_epochs": 2}, [], [4, 5]),
        ({"validate_every_n_steps": 5, "validate_every_n_epochs": 3}, [5], [5]),
        ({}, [], [2, 4, 5]),
    ],
)
def test_each_step_is_measured_once_and_the_end_always(base, pictures, tmp_path, monkeypatch, more, steps, epochs):
    measured, measure = [], validation.Validation.measure

    def spying(self):
        measured.append(self)
        return measure(self)

    monkeypatch.setattr(validation.Validation, "measure", spying)
    train(base, pictures, tmp_path, validation_split=0.5, max_train_steps=5, **more)
    assert [line["step"] for line in metrics(tmp_path) if STEP in line] == steps
    assert [line["step"] for line in metrics(tmp_path) if EPOCH in line] == epochs
    assert len(measured) == len({*steps, *epochs})


@ALSO_SDXL_SLOW
def test_the_loss_is_the_mean_over_pictures_and_timesteps(base, pictures, tmp_path, monkeypatch):
    seen: list[tuple[int, torch.Tensor]] = []
    losses_of = validation.HeldOut.losses

    def spying(self, objective, request, timesteps, *more):
        batch, columns = losses_of(self, objective, request, timesteps, *more)
        seen.extend(zip(timesteps, columns, strict=True))
        return batch, columns

    monkeypatch.setattr(validation.HeldOut, "losses", spying)
    train(base, pictures, tmp_path, validation_split=0.5, max_train_steps=1, train_batch_size=2)
    assert sorted({timestep for timestep, _ in seen}) == [200, 400, 600, 800]
    losses = [loss for _, column in seen for loss in column.tolist()]
    assert len(losses) == 2 * 4
    assert values(tmp_path, EPOCH) == [pytest.approx(np.mean(losses), rel=1e-6)]


def test_the_lowest_loss_stands_in_the_file(base, pictures, tmp_path):
    train(base, pictures, tmp_path, validation_split=0.5, validate_every_n_steps=1, learning_rate="3e-1")
    found = values(tmp_path, STEP) + values(tmp_path, EPOCH)
    written = metadata(tmp_path / "x.safetensors")
    assert float(written["ss_best_validation_loss"]) == min(found)
    assert written["ss_num_validation_images"] == "2"
    assert written["ss_num_train_images"] == "2"
    step = int(written["ss_best_validation_step"])
    assert any(line["step"] == step and min(found) in line.values() for line in metrics(tmp_path))


@ALSO_SDXL_SLOW
def test_a_resumed_run_measures_as_the_whole_one_and_keeps_its_best(base, pictures, tmp_path):
    more = {"validation_split": 0.5, "validate_every_n_steps": 1, "save_every_n_steps": 2, "save_state": True}
    train(base, pictures, tmp_path / "whole", **more, max_train_steps=4)
    whole = values(tmp_path / "whole", STEP)
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    (tmp_path / "part" / "x.safetensors").unlink()
    train(
        base, pictures, tmp_path / "part", **more, max_train_steps=4, resume=tmp_path / "part" / "x-step00000002-state"
    )
    assert values(tmp_path / "part", STEP) == whole
    found = [metadata(tmp_path / name / "x.safetensors") for name in ("whole", "part")]
    for key in ("ss_best_validation_loss", "ss_best_validation_step"):
        assert found[0][key] == found[1][key]


@pytest.mark.slow
def test_a_run_that_goes_on_without_its_seed_is_told_of_the_split(base, pictures, tmp_path, caplog):
    more = {"validation_split": 0.5, "save_state": True, "save_every_n_steps": 1, "max_train_steps": 2}
    train(base, pictures, tmp_path, **more)
    (tmp_path / "x.safetensors").unlink()
    go_on = more | {"resume": tmp_path / "x-step00000001-state"}
    train(base, pictures, tmp_path, **go_on)
    assert "--resume without --seed" not in caplog.text
    (tmp_path / "x.safetensors").unlink()
    train(base, pictures, tmp_path, **go_on, seed=None)
    assert "--resume without --seed: the held-out pictures are those of the seed 0. If the run began with --seed 7" in (
        caplog.text
    )


def test_max_validation_steps_measures_fewer_batches(base, pictures, tmp_path, monkeypatch):
    sizes = []
    measure = validation.Validation.measure

    def spying(self):
        sizes.append(len(self.pictures.requests))
        return measure(self)

    monkeypatch.setattr(validation.Validation, "measure", spying)
    train(base, pictures, tmp_path, validation_split=0.5, max_validation_steps=1, max_train_steps=1)
    assert sizes == [1]


def test_without_anything_held_out_there_is_no_validation(base, pictures, tmp_path):
    train(base, pictures, tmp_path)
    assert not values(tmp_path, STEP) + values(tmp_path, EPOCH)
    assert "ss_best_validation_loss" not in metadata(tmp_path / "x.safetensors")


def test_the_curve_shows_training_and_validation(base, pictures, tmp_path):
    train(base, pictures, tmp_path, validation_split=0.5, validate_every_n_steps=1, max_train_steps=6)
    series = read_metrics(tmp_path / "x-metrics.jsonl")
    assert [step for step, _ in series.losses] == [step for step, _ in series.validation] == [1, 2, 3, 4, 5, 6]
    assert [loss for _, loss in series.validation] == values(tmp_path, STEP)
    assert not series.left_out
    with Image.open(tmp_path / "x-loss.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**24) or []}
    assert {tuple(bytes.fromhex(colour[1:])) for colour in (style.BLUE, style.VERMILION)} <= colours


def test_nothing_left_to_train_on_is_told(base, pictures, tmp_path):
    with pytest.raises(UserError, match="validation_split holds out all 4 pictures"):
        train_network.main(options(base, pictures, tmp_path, validation_split=1.0))


def test_without_a_seed_the_record_still_tells_what_was_held_out(base, pictures, tmp_path):
    train(base, pictures, tmp_path, seed=None, validation_split=0.5, max_train_steps=1)
    assert metadata(tmp_path / "x.safetensors")["ss_validation_seed"] == "0"
    assert "validation_seed = 0" in (tmp_path / "x-options.toml").read_text(encoding="utf-8")
