"""tools/convert_diffusers20_original_sd.py: kinds of folders, mistakes, and how little is held in memory."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import weakref

import pytest
import tiny
import torch
from conversions import convert, read
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from scripts import ROOT, python
from tensors import assert_same, metadata, read_folder

from library import files, weight_file
from library.errors import UserError
from library.models.checkpoint import open_checkpoint

SCRIPT = ROOT / "tools" / "convert_diffusers20_original_sd.py"
pytestmark = pytest.mark.usefixtures("tidy")

# ---- folders ------------------------------------------------------------------------------------------------


def split_text_encoder(folder, ending=""):
    """Split the weights of a text encoder into two files with an index."""
    whole = folder / "model.safetensors"
    state = load_file(whole)
    names = sorted(state)
    weight_map: dict[str, str] = {}
    for at, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model{ending}-0000{at}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"model.safetensors.index{ending}.json").write_text(json.dumps(index))
    whole.unlink()


@pytest.mark.parametrize("name", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_sharded_folders(store, tmp_path, name):
    model = store(name)
    folder = tmp_path / "folder"
    shutil.copytree(model.folder, folder)
    shutil.rmtree(folder / "unet")
    model.models["unet"].save_pretrained(folder / "unet", max_shard_size="10MB")
    assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 1
    split_text_encoder(folder / "text_encoder")
    convert(folder, tmp_path / "out.safetensors")
    assert_same(read(tmp_path / "out.safetensors"), read(model.made_checkpoint))
    convert(folder, tmp_path / "whole")  # one file of each part, and no index of files that are not there
    assert not list((tmp_path / "whole").glob("*/*.index*"))
    assert_same(read_folder(tmp_path / "whole"), read_folder(model.folder))


def test_variants(store, tmp_path):
    model = store("sd1")
    folder = tmp_path / "folder"
    shutil.copytree(model.folder, folder)
    for path in sorted(folder.glob("*/*.safetensors")):
        state = {name: tensor.half() for name, tensor in load_file(path).items()}
        save_file(state, path.with_name(f"{path.stem}.fp16.safetensors"), {"format": "pt"})
    convert(folder, tmp_path / "full.safetensors")
    convert(folder, tmp_path / "half.safetensors", "--variant", "fp16")
    assert_same(read(tmp_path / "full.safetensors"), read(model.made_checkpoint))
    half = {name: tensor.half() for name, tensor in read(model.made_checkpoint).items()}
    assert_same(read(tmp_path / "half.safetensors"), half)
    with pytest.raises(UserError, match="unet has no weights of the variant bf16"):
        convert(folder, tmp_path / "x.safetensors", "--variant", "bf16")
    with pytest.raises(UserError, match="--variant is for Diffusers folders"):
        convert(model.checkpoint, tmp_path / "x", "--variant", "fp16")


def test_a_sharded_variant_does_not_stand_for_the_full_weights(store, tmp_path):
    model = store("sd1")
    folder, encoder = tmp_path / "folder", tmp_path / "folder" / "text_encoder"
    shutil.copytree(model.folder, folder)
    full = (encoder / "model.safetensors").read_bytes()
    save_file({name: tensor.half() for name, tensor in load_file(encoder / "model.safetensors").items()},
              encoder / "model.safetensors", {"format": "pt"})  # fmt: skip
    split_text_encoder(encoder, ".fp16")
    types = {tensor.dtype for name, tensor in folder_tensors(folder).items() if name.startswith("text_encoder/")}
    assert types == {torch.float16}  # nothing else is there
    (encoder / "model.safetensors").write_bytes(full)
    assert_same(folder_tensors(folder), folder_tensors(model.folder))
    split_text_encoder(encoder)
    assert_same(folder_tensors(folder), folder_tensors(model.folder))


def folder_tensors(folder):
    files = open_checkpoint(folder)
    return {name: files.read(name) for name in files.shapes}


def test_scheduler_and_tokenizer_of_another_folder(store, tmp_path):
    model, other = store("sdxl"), tmp_path / "other"
    for part in ("scheduler", "tokenizer", "unet"):
        (other / part).mkdir(parents=True)
    (other / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "EulerDiscreteScheduler"}')
    (other / "tokenizer" / "tokenizer.json").write_text("{}")
    convert(model.checkpoint, tmp_path / "out", "--reference_model", other)
    out = tmp_path / "out"
    assert "Euler" in (out / "scheduler" / "scheduler_config.json").read_text()
    assert [path.name for path in (out / "tokenizer").iterdir()] == ["tokenizer.json"]
    assert (out / "tokenizer_2" / "vocab.json").is_file()
    assert_same(read_folder(out), read_folder(model.made_folder))
    with pytest.raises(
        UserError, match="--reference_model: runwayml/x does not exist here, and the Hugging Face cache has no model"
    ):
        convert(model.checkpoint, tmp_path / "no", "--reference_model", "runwayml/x")


def test_the_name_of_a_folder_may_hold_a_dot_and_the_folder_be_there(store, tmp_path):
    model = store("sd1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for name in ("my.model", "link"):
        convert(model.checkpoint, tmp_path / name)
        assert (tmp_path / name / "model_index.json").is_file()
    assert_same(read_folder(tmp_path / "my.model"), read_folder(tmp_path / "empty"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "link", "my.model"]


def test_a_model_without_vae(store, tmp_path, caplog):
    model = store("sd1")
    state = {name: t for name, t in read(model.checkpoint).items() if not name.startswith("first_stage_model.")}
    save_file(state, tmp_path / "bare.safetensors")
    convert(tmp_path / "bare.safetensors", tmp_path / "folder")
    assert "bare.safetensors has no VAE, and neither has" in caplog.text
    with pytest.raises(ValueError, match="vae"):
        StableDiffusionPipeline.from_pretrained(tmp_path / "folder")
    assert "from_pretrained of diffusers refuses the folder unless it is given vae=" in caplog.text
    StableDiffusionPipeline.from_pretrained(tmp_path / "folder", vae=model.models["vae"])
    caplog.clear()
    convert(tmp_path / "folder", tmp_path / "back.safetensors")
    assert "has no VAE, and neither has" in caplog.text
    assert_same(read(tmp_path / "back.safetensors"), state)
    caplog.clear()
    convert(model.folder, tmp_path / "whole.safetensors")
    assert "VAE" not in caplog.text


@pytest.mark.repetitions(keep=1)
@pytest.mark.parametrize("target", ["out", "out.safetensors", "out.ckpt"])
def test_weights_that_are_no_numbers_are_told(store, tmp_path, caplog, target):
    state = read(store("sd1").checkpoint)
    name = "model.diffusion_model.out.2.weight"
    state[name][0, 0, 0, 0] = torch.nan
    state["first_stage_model.quant_conv.bias"][0] = 1e6
    save_file(state, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / target)
    shown = "conv_out.weight" if target == "out" else name
    assert f": NaN or infinity in tensors: 1 ({shown})" in caplog.text
    assert "too large" not in caplog.text
    caplog.clear()
    shutil.rmtree(tmp_path / target) if target == "out" else (tmp_path / target).unlink()
    convert(tmp_path / "a.safetensors", tmp_path / target, "--fp16")
    assert "quant_conv.bias" in caplog.text
    assert "too large for float16" in caplog.text


# ---- mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (
            ["gone.safetensors", "{out}"],
            "model_to_load: gone.safetensors does not exist; name a .safetensors or .ckpt file or a Diffusers folder",
        ),
        (["runwayml/stable-diffusion-v1-5", "{out}"], "nothing is downloaded"),
        (["{checkpoint}", "{full}"], "exists and is not empty: take another name"),
        (["{folder}", "{folder}"], "is within .*, which is an input: choose another path"),
        (["{checkpoint}", "{checkpoint}"], "is one of the inputs: choose another name"),
        (["{folder}", "{inside}"], "is within .*, which is an input: choose another path"),
        (["{checkpoint}", "{out}", "--v2"], "--v2 was given, but .* is an SD 1.x model: omit --v2"),
        (["{sdxl}", "{out}", "--v1"], "--v1 was given, but .* is an SDXL model: omit --v1"),
        (["{checkpoint}", "{out}", "--v1", "--v2"], "--v1 and --v2 were both given"),
        (["{checkpoint}", "{out}", "--fp16", "--bf16"], "one type can be written, got --fp16 --bf16"),
        (["{lora}", "{out}"], "is not a Stable Diffusion checkpoint"),
        (["{refiner}", "{out}"], "is an SDXL refiner"),
        (["{depth}", "{out}"], "is a depth model: its U-Net takes 5 channels, and a Diffusers folder"),
        (["{noise}", "{out}"], "is not a weight file"),
        (["{empty}", "{out}"], "is not a Diffusers folder: unet/config.json is missing"),
        (["{headless}", "{out}"], "has no text encoder"),
        (
            ["{blind}", "{out}"],
            "is incomplete: text_encoder_2/text_projection.weight",
        ),
        (["{odd}", "{out}.safetensors"], "has unet/something.weight, without a place in a checkpoint"),
    ],
)
def test_mistakes_are_told_and_leave_nothing(store, tmp_path, argv, text):
    model, sdxl = store("sd1"), store("sdxl")
    paths = {"checkpoint": model.checkpoint, "folder": model.folder, "sdxl": sdxl.checkpoint, "out": tmp_path / "out"}
    paths |= {"inside": model.folder / "vae" / "diffusion_pytorch_model.safetensors", "full": model.made_folder}
    changed = {
        "lora": lambda: {"lora_unet_a.lora_down.weight": torch.ones(1, 1)},
        "refiner": lambda: {"conditioner.embedders.0.model.ln_final.weight": torch.ones(1280)},
        "depth": lambda: (
            read(model.checkpoint) | {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(32, 5, 3, 3)}
        ),
        "headless": lambda: {name: t for name, t in read(model.checkpoint).items() if "cond_stage" not in name},
        "blind": lambda: {name: t for name, t in read(sdxl.checkpoint).items() if "text_projection" not in name},
    }
    for name, make in changed.items():
        if f"{{{name}}}" in argv:
            paths[name] = tmp_path / f"{name}.safetensors"
            save_file(make(), paths[name])
    paths["noise"], paths["empty"], paths["odd"] = tmp_path / "noise.safetensors", tmp_path / "empty", tmp_path / "odd"
    paths["noise"].write_bytes(bytes(range(200)))
    paths["empty"].mkdir()
    if "{odd}" in argv:
        shutil.copytree(model.folder, paths["odd"])
        unet = paths["odd"] / "unet" / "diffusion_pytorch_model.safetensors"
        save_file(load_file(unet) | {"something.weight": torch.ones(1)}, unet)
    before = sorted(tmp_path.rglob("*"))
    stamp = paths["inside"].stat().st_mtime_ns
    with pytest.raises(UserError, match=text) as caught:
        convert(*(word.format(**paths) for word in argv))
    assert len(str(caught.value).splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert paths["inside"].stat().st_mtime_ns == stamp


# ---- safety and size ----------------------------------------------------------------------------------------


@pytest.mark.repetitions(keep=2)
@pytest.mark.parametrize("target", ["out.safetensors", "out.ckpt", "out"])
@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
def test_an_end_in_the_middle_leaves_what_was_there(store, tmp_path, monkeypatch, target, failure):
    model, out = store("sd2"), tmp_path / target
    if out.suffix:
        out.write_bytes(b"old")
    else:
        out.mkdir()
    reads = itertools.count()
    true_read = weight_file.WeightFile.tensor

    def failing(self, name):
        if next(reads) == 700:
            raise KeyboardInterrupt if failure is KeyboardInterrupt else OSError(errno.EIO, "the disk is gone")
        return true_read(self, name)

    monkeypatch.setattr(weight_file.WeightFile, "tensor", failing)
    with pytest.raises(failure):
        convert(model.checkpoint if target == "out" else model.folder, out)
    assert list(tmp_path.iterdir()) == [out]
    assert not list(out.iterdir()) if target == "out" else out.read_bytes() == b"old"


@pytest.mark.parametrize("target", ["out.safetensors", "out.ckpt", "out"])
def test_a_full_disk_leaves_what_was_there(store, tmp_path, monkeypatch, target):
    model, out = store("sd1"), tmp_path / target
    if out.suffix:
        out.write_bytes(b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="could not be written: No space left"):
        convert(model.checkpoint, out)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([b"old"] if out.suffix else [])


def test_tensors_go_through_one_by_one(store, tmp_path, monkeypatch):
    """No more is alive than some tensors that are written and the parts of the next: query, key and value."""
    model, most, number = store("sdxl"), 0, 0
    alive: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
    true_read = weight_file.WeightFile.tensor

    def counted(self, name):
        nonlocal most, number
        tensor = true_read(self, name)
        holder = tensor.untyped_storage()
        alive.add(holder)
        tensor.__dict__["holder"] = holder  # a storage object lives as long as a tensor that knows it
        most, number = max(most, len(alive)), number + 1
        return tensor

    monkeypatch.setattr(weight_file.WeightFile, "tensor", counted)
    convert(model.checkpoint, tmp_path / "folder")
    convert(model.folder, tmp_path / "out.safetensors")
    assert number > 1500
    assert 2 <= most <= 10


# ---- the command line ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_script_runs_from_any_folder(store, tmp_path):
    model = store("sd1")
    shutil.copy(model.checkpoint, tmp_path / "model.safetensors")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = python(SCRIPT, "model.safetensors", "a b/folder", cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert_same(read_folder(tmp_path / "a b" / "folder"), read_folder(model.folder))


def test_help_and_mistakes_are_answered_without_torch(tmp_path):
    code = "import sys, runpy; sys.argv = {!r}\ntry: runpy.run_path({!r}, run_name='__main__')\n"
    code += "except SystemExit as end: code = end.code\nsys.exit(10 * ('torch' in sys.modules) + (code or 0))"
    for argv, expected in ((["x", "--help"], 0), (["x", "gone", "out"], 2)):
        done = python("-c", code.format(argv, str(SCRIPT)), cwd=tmp_path)
        assert done.returncode == expected, done.stderr


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.input_blocks.1.0.in_layers.2.bias",
        "first_stage_model.decoder.mid.block_1.norm1.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.bias",
    ],
)
def test_a_checkpoint_with_a_hole_is_refused(model_store, tmp_path, name):
    state = load_file(model_store("sd1")[1]["safetensors"])
    del state[name]
    save_file(state, tmp_path / "hole.safetensors")
    with pytest.raises(UserError, match="is incomplete|has an incomplete"):
        convert(tmp_path / "hole.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_metadata_of_a_checkpoint_come_back_with_it(model_store, tmp_path):
    source = tmp_path / "a.safetensors"
    save_file(load_file(model_store("sd1")[1]["safetensors"]), source, metadata={"modelspec.title": "mine", "x": "1"})
    folder, back = tmp_path / "folder", tmp_path / "back.safetensors"
    convert(source, folder)
    convert(folder, back)
    assert {"modelspec.title": "mine", "x": "1"}.items() <= metadata(back).items()
    with pytest.raises(UserError, match="--metadata is for .safetensors files"):
        convert(back, tmp_path / "other", "--metadata", '{"a": 1}')


@pytest.mark.slow
def test_a_model_of_unusual_sizes_comes_back_with_its_settings(tmp_path):
    source = ROOT / "examples" / "pocket_model"
    file, folder = tmp_path / "a.safetensors", tmp_path / "back"
    convert(source, file)
    convert(file, folder)
    for part in ("unet", "vae", "text_encoder"):
        before, after = (json.loads((path / part / "config.json").read_text()) for path in (source, folder))
        own = {key: value for key, value in before.items() if not key.startswith("_") and "dtype" not in key}
        assert own.items() <= after.items(), part
    models = tiny.load(file)
    described = json.loads((source / "unet" / "config.json").read_text())
    assert models.unet.config["norm_num_groups"] == described["norm_num_groups"]
    state = load_file(file)
    save_file(state, tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match="is not a Stable Diffusion model of the usual sizes"):
        convert(tmp_path / "bare.safetensors", tmp_path / "other")
