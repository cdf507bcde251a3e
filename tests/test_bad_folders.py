"""Bad states, pictures, masks, captions and folders, each a row of a table; see `refusals.Refused`."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from refusals import Payload, rows, write
from runs import train


def permissions_hold():
    """Return whether a folder without permissions cannot be read; root reads it all the same."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0)
        try:
            return not os.access(folder, os.R_OK)
        finally:
            Path(folder).chmod(0o700)


needs_permissions = pytest.mark.skipif(not permissions_hold(), reason="root reads and writes everything")


# ---- states -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def state(model_store, tmp_path_factory):
    """Return the folder of a state after one step."""
    root = tmp_path_factory.mktemp("state")
    (root / "train" / "1_x").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(root / "train" / "1_x" / "0.png")
    train(model_store("sd1")[1]["safetensors"], root / "train", root, max_train_steps=1, save_state=True)
    return root / "x-state"


def position(**more):
    def change(folder):
        path = folder / "train_state.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | more), encoding="utf-8")

    return change


def tensors(change):
    def rewrite(folder):
        content = torch.load(folder / "state.pt", weights_only=True)
        torch.save(change(content), folder / "state.pt")

    return rewrite


def one_bit(folder):
    content = bytearray((folder / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "state.pt").write_bytes(content)


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-20])


POSITION_DAMAGED, TENSORS_DAMAGED = "train_state.json is damaged (", "state.pt is damaged ("
STATES = {
    "missing": (shutil.rmtree, {}, "--resume: state is no state of this suite: it has no train_state.json"),
    "another folder": (cut("options.toml"), {"resume": "train"}, "--resume: train is no state of this suite"),
    "without position": (lambda f: (f / "train_state.json").unlink(), {}, "it has no train_state.json or no state.pt"),
    "without tensors": (lambda f: (f / "state.pt").unlink(), {}, "it has no train_state.json or no state.pt"),
    "position cut short": (cut("train_state.json"), {}, POSITION_DAMAGED, "take another state"),
    "position is a number": (lambda f: write(f / "train_state.json", "3"), {}, POSITION_DAMAGED),
    "position not UTF-8": (lambda f: write(f / "train_state.json", b'{"\xe9": 1}'), {}, POSITION_DAMAGED, "0xe9"),
    "step is a text": (position(current_step="a"), {}, POSITION_DAMAGED, "current_step is 'a'"),
    "step is negative": (position(current_step=-5), {}, POSITION_DAMAGED, "current_step is -5"),
    "no seed": (position(seed=None), {}, POSITION_DAMAGED, "seed is None"),
    "losses are a text": (position(losses="abc"), {}, POSITION_DAMAGED, "'a'"),
    "of another version": (position(version=9), {}, "was written by another version of the suite"),
    "tensors are empty": (lambda f: write(f / "state.pt", b""), {}, TENSORS_DAMAGED, "take another state"),
    "tensors cut short": (cut("state.pt"), {}, TENSORS_DAMAGED),
    "one bit turned": (one_bit, {}, TENSORS_DAMAGED, "checksum"),
}
UNFIT = "--resume: the state does not fit this run ("
UNFIT_STATES = {
    "of a finished run": (
        position(current_step=9),
        {},
        "nothing is left to train: 9 steps are made, and 3 are asked for",
    ),
    "pickle that runs code": (tensors(lambda t: t | {"x": Payload()}), {}, "state.pt is refused", "could run code"),
    "tensors are a list": (tensors(lambda _: [1]), {}, UNFIT, "use the options it has"),
    "of another network": (tensors(dict), {"network_dim": 8}, UNFIT, "lora_down.weight has the shape (4, "),
    "of another optimizer": (tensors(dict), {"optimizer_type": "SGD"}, UNFIT, "its optimizer is AdamW, this one SGD"),
    "of another part": (tensors(dict), {"network_train_unet_only": True}, UNFIT, "Unexpected key"),
}


@pytest.mark.parametrize("name", [*STATES, *UNFIT_STATES])
def test_states(refused, tmp_path, monkeypatch, state, name):
    change, more, *fragments = (STATES | UNFIT_STATES)[name]
    shutil.copytree(state, tmp_path / "state")
    change(tmp_path / "state")
    refused({"resume": "state", "network_dim": 4, **more}, *fragments, loads=name in UNFIT_STATES)


def test_of_several_states_a_damaged_one_is_passed_over(state, tmp_path, caplog):
    from library.config.saving import SavingConfig
    from library.training.run.state import find_state

    for step in (3, 4):
        shutil.copytree(state, tmp_path / f"x-step{step:08d}-state")
        position(current_step=step)(tmp_path / f"x-step{step:08d}-state")
    one_bit(tmp_path / "x-step00000004-state")
    assert find_state("auto", SavingConfig(output_dir=tmp_path, output_name="x")) == tmp_path / "x-step00000003-state"
    assert "x-step00000004-state" in caplog.text


# ---- pictures, masks, captions, folders ---------------------------------------------------------------------


def png_of(width, height):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = {
    "cut short": (lambda good: good[:2000], "0.png: image file is truncated"),
    "cut in the header": (lambda good: good[:20], "0.png: "),
    "one byte changed": (lambda good: good[:300] + bytes([good[300] ^ 255]) + good[301:], "0.png: broken data stream"),
    "no bytes": (lambda _: b"", "0.png: the file is empty"),
    "a text": (lambda _: b"a dog", "0.png: not a picture that can be read"),
    "a web page": (lambda _: b"<!DOCTYPE html>", "0.png: not a picture that can be read"),
    "1 x 1": (lambda _: png_of(1, 1), "1 pictures have a side of less than 8 pixels; remove them:", "0.png: 1x1"),
    "30000 x 10": (lambda _: png_of(30000, 10), "1 pictures are too long and narrow; crop or remove them:", "30000x10"),
    "10 x 30000": (lambda _: png_of(10, 30000), "1 pictures are too long and narrow; crop or remove them:", "10x30000"),
    "no pixels": (
        lambda _: b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBBI", 13, b"IHDR", 0, 0, 8, 2, 0, 0, 0, 0),
        "0.png: not a picture",
    ),
}
MASKS = {
    "absent folder": (shutil.rmtree, "conditioning_data_dir masks does not exist"),
    "absent mask": (
        lambda f: (f / "0.png").unlink(),
        "1 of 4 pictures have no mask of their name in conditioning_data_dir masks:\n",
        "0.png",
    ),
    "cut short": (
        lambda f: write(f / "0.png", (f / "0.png").read_bytes()[:2000]),
        "1 of 8 pictures cannot",
        "masks/0.png",
    ),
    "no bytes": (lambda f: write(f / "0.png", b""), "1 of 8 pictures cannot be read", "masks/0.png: the file is empty"),
    "a text": (lambda f: write(f / "0.png", b"white"), "masks/0.png: not a picture that can be read"),
    "another shape": (lambda f: write(f / "0.png", png_of(64, 128)), "1 masks have another aspect ratio", "64x128"),
}
NOT_UTF8 = "1 caption files are not UTF-8 text; save them as UTF-8:"
CAPTIONS = {
    "Latin-1": ("é".encode("latin-1"), NOT_UTF8, "0.txt: probably Windows-1252 (Latin-1)"),
    "UTF-16": ("a dog".encode("utf-16"), NOT_UTF8, "0.txt: probably UTF-16"),
    "binary": (bytes(range(256)), NOT_UTF8, "0.txt: it has zero bytes"),
}


def into_a_file(folder):
    shutil.rmtree(folder.parent)
    write(folder.parent, "")


TRAINING_FOLDERS = {
    "absent": (lambda f: shutil.rmtree(f.parent), "--train_data_dir: ", "train does not exist"),
    "empty": (shutil.rmtree, "has no sub-folder named like 10_name: put the pictures into such a sub-folder"),
    "without a number": (lambda f: f.rename(f.parent / "dog"), "has 4 pictures: rename it to 10_dog"),
    "repeated never": (lambda f: f.rename(f.parent / "0_dog"), "num_repeats of 1 or more"),
    "repeated for ever": (
        lambda f: f.rename(f.parent / f"{10**12}_dog"),
        "_dog: num_repeats must be at most 1000000, got 1000000000000",
    ),
    "without pictures": (lambda f: [path.unlink() for path in f.glob("*.png")], "no pictures (.png, .jpg", "1_sks dog"),
    "a file": (into_a_file, "is a file; name the folder above the N_name"),
}


@rows(PICTURES)
def test_pictures(refused, pictures, case):
    change, *fragments = case
    path = pictures / "1_sks dog" / "0.png"
    path.write_bytes(change(path.read_bytes()))
    refused({}, *fragments)


def test_a_picture_that_is_found_out_as_it_is_encoded(refused, pictures):
    path = pictures / "1_sks dog" / "0.png"
    path.write_bytes(path.read_bytes()[:2000])
    refused({"cache_latents": True}, "1 of 4 pictures cannot be read; mend or remove them:", "0.png: ", loads=True)


def test_all_pictures_that_cannot_be_read_are_told(refused, pictures):
    for name in "012":
        (pictures / "1_sks dog" / f"{name}.png").write_bytes(b"")
    assert refused({}, "3 of 4 pictures cannot be read").count("the file is empty") == 3


@rows(MASKS)
def test_masks(refused, pictures, tmp_path, case):
    change, *fragments = case
    folder = tmp_path / "masks"
    folder.mkdir()
    for path in (pictures / "1_sks dog").glob("*.png"):
        shutil.copy(path, folder)
    change(folder)
    refused({"masked_loss": True, "conditioning_data_dir": "masks"}, *fragments)


def test_masked_loss_without_masks(refused):
    refused({"masked_loss": True}, "--masked_loss needs masks: conditioning_data_dir of a subset, or --alpha_mask")


@rows(CAPTIONS)
def test_captions(refused, pictures, case):
    content, *fragments = case
    (pictures / "1_sks dog" / "0.txt").write_bytes(content)
    refused({}, *fragments)


@rows(TRAINING_FOLDERS)
def test_folders_of_pictures(refused, pictures, case):
    change, *fragments = case
    change(pictures / "1_sks dog")
    refused({}, *fragments)


@pytest.mark.parametrize("folder", ["train", "train/1_sks dog"])
@needs_permissions
def test_folders_that_cannot_be_read(refused, tmp_path, folder):
    (tmp_path / folder).chmod(0o000)
    try:
        refused({}, f"{folder} cannot be read (Permission denied); mend its permissions", readable=False)
    finally:
        (tmp_path / folder).chmod(0o700)


# ---- where to write -----------------------------------------------------------------------------------------

OUTPUT = {
    "a file": ({"output_dir": "train/1_sks dog/0.png"}, "--output_dir: train/1_sks dog/0.png is a file, not a folder"),
    "in a file": (
        {"output_dir": "train/1_sks dog/0.png/out"},
        "--output_dir: nothing can be written to ",
        "another folder",
    ),
    "too long": ({"output_dir": "a" * 300}, "--output_dir: nothing can be written to aaa", "File name too long"),
    "name too long": ({"output_name": "a" * 300}, "--output_name: no file can have the name 'aaa", "take another"),
    "name of a folder": (
        {"output_name": "../train"},
        "--output_name: ",
        "train.safetensors",
        "is a folder; take another",
    ),
    "logs in a file": (
        {"logging_dir": "train/1_sks dog/0.png"},
        "--logging_dir: nothing can be written to train/1_sks dog/0.png",
        "name another folder",
    ),
    "config in a file": (
        {"output_config": True, "config_file": "train/1_sks dog/0.png/c.toml"},
        "--output_config: train/1_sks dog/0.png/c.toml cannot be written",
    ),
    "config that is there": ({"output_config": True, "config_file": "train/c"}, "does not overwrite train/c.toml"),
}


@rows(OUTPUT)
def test_places_where_nothing_can_be_written(refused, pictures, case):
    given, *fragments = case
    (pictures.parent / "train.safetensors").mkdir()
    write(pictures / "c.toml", "")
    refused(given, *fragments)


@needs_permissions
def test_an_output_folder_without_permission(refused, tmp_path):
    (tmp_path / "out").chmod(0o500)
    try:
        refused({}, "--output_dir: nothing can be written to ", "(Permission denied); name another folder")
    finally:
        (tmp_path / "out").chmod(0o700)
