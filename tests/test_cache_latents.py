"""tools/cache_latents.py: the training finds what it made, and would have made the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from runs import ALSO_SDXL_SLOW, options, same, train
from safetensors.torch import load_file
from scripts import ROOT

from library.data import latent_cache
from library.errors import UserError
from tools import cache_latents


def entries(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*.latents.safetensors")}


@ALSO_SDXL_SLOW
def test_the_training_finds_the_latents_and_makes_the_same(base, pictures, tmp_path, caplog):
    import train_network

    argv = options(base, pictures, tmp_path / "out", max_train_steps=1, cache_latents_to_disk=True)
    caplog.set_level("INFO")
    assert cache_latents.main(argv) == 0
    made = entries(pictures)
    assert len(made) == 4
    assert "latents: 0 of 4 pictures are valid on disk" in caplog.messages
    assert f"beside the pictures, in {next(pictures.iterdir())}" in caplog.messages[-1]
    assert caplog.messages[-1].startswith("4 latents were written, 0 were there: 0.0 MB in files *.latents.safetensors")
    caplog.clear()
    assert train_network.main(argv) == 0
    assert "latents: 4 of 4 pictures are valid on disk" in caplog.messages
    for path in pictures.rglob("*.latents.safetensors"):
        path.unlink()
    assert train_network.main([*argv, "--output_name", "again"]) == 0
    assert entries(pictures) == made


def test_pictures_that_are_equal_have_an_entry_each(base, pictures, tmp_path):
    first, second = sorted(pictures.rglob("*.png"))[:2]
    shutil.copyfile(first, second)
    train(base, pictures, tmp_path / "out", cache_latents_to_disk=True, max_train_steps=3)
    assert {name.split(".latents")[0].split(".png")[0] for name in entries(pictures)} >= {first.stem, second.stem}
    assert len(entries(pictures)) == 4


@pytest.mark.slow
def test_runs_at_the_same_time_on_one_folder_lose_nothing(base, pictures, tmp_path):
    ways: tuple[dict[str, object], ...] = ({}, {"flip_aug": True}, {"resize_interpolation": "box"}, {})
    alone = []
    for number, way in enumerate(ways):
        other = shutil.copytree(pictures, tmp_path / f"pictures{number}")
        alone.append(train(base, other, tmp_path / f"alone{number}", cache_latents=True, **way))
    runs = [
        subprocess.Popen(
            [
                sys.executable,
                str(ROOT / "train_network.py"),
                *options(base, pictures, tmp_path / f"out{number}", cache_latents_to_disk=True, **way),
            ]
        )
        for number, way in enumerate(ways)
    ]
    assert [run.wait() for run in runs] == [0] * len(ways)
    for number, expected in enumerate(alone):
        same(load_file(tmp_path / f"out{number}" / "x.safetensors"), expected)
    assert not [path for path in pictures.rglob("*") if ".tmp" in path.name]


def test_only_what_concerns_latents_is_asked_for(base, pictures):
    argv = ["--pretrained_model_name_or_path", str(base), "--train_data_dir", str(pictures), "--resolution", "64"]
    assert cache_latents.main(argv) == 0
    assert len(entries(pictures)) == 4
    with pytest.raises(UserError, match="--resolution is missing"):
        cache_latents.main(argv[:-2])


def read_only(path, mode):  # root can write everywhere
    return mode == os.R_OK


def test_a_folder_that_cannot_be_written_is_refused_before_a_model_is_loaded(base, pictures, tmp_path, monkeypatch):
    given = {"cache_latents": True, "cache_latents_to_disk": True}
    monkeypatch.setattr("library.data.latent_cache.os.access", read_only)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="with 4 pictures without latents; use a copy"):
        patch.setattr("library.training.recipe.start_runtime", None)
        train(base, pictures, tmp_path / "one", **given)
    with pytest.raises(UserError, match=r"nothing can be written to .*1_sks dog, with 4 pictures without latents"):
        cache_latents.main(options(base, pictures, tmp_path / "two", **given))
    monkeypatch.undo()
    assert cache_latents.main(options(base, pictures, tmp_path / "three", **given)) == 0
    monkeypatch.setattr("library.data.latent_cache.os.access", read_only)
    train(base, pictures, tmp_path / "four", **given)
    with pytest.raises(UserError, match="with 4 pictures without latents"):
        train(base, pictures, tmp_path / "larger", **given, resolution=128, enable_bucket=None)
    monkeypatch.setattr("library.data.latent_cache.os.access", lambda path, mode: False)  # it cannot be listed either
    train(base, pictures, tmp_path / "five", **given)


def test_latents_that_cannot_be_written_are_told_with_what_helps(base, pictures, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError("x could not be written: the disk is full")

    monkeypatch.setattr(latent_cache, "write_weights", full)
    with pytest.raises(UserError, match="the disk is full; use a copy of the folder, or train with --cache_latents"):
        train(base, pictures, tmp_path / "o", cache_latents=True, cache_latents_to_disk=True)
