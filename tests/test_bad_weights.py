"""Bad weight files and models, each a row of a table; see `refusals.Refused`."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct

import pytest
import tiny
import torch
from refusals import Payload, as_file, pickled, rows, write
from safetensors.torch import save

from library.models import keys


def test_the_payload_would_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Payload()))
    assert (tmp_path / "ran").is_dir()


def raw(header, data=b""):
    """Return a safetensors file with a header as it is given."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8")
    return struct.pack("<Q", len(text)) + text + data


def entry(**more):
    return {"lora_unet_x.lora_down.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | more}


DAMAGED = "header is damaged; copy or download it again"
EMPTY = "is not a weight file: it is empty (0 bytes); copy or download it again"
EVIL = (
    "is refused: it contains more than weights (posix.mkdir)" if os.name == "posix" else "is refused: it contains more"
)
# Suffix, content from the tensors of a sound file, what is told. These are damaged whatever they should be.
DAMAGED_FILES = {
    "empty": (".safetensors", lambda _: b"", "f.safetensors", EMPTY),
    "a few bytes": (".safetensors", lambda good: save(good)[:5], DAMAGED),
    "header cut short": (".safetensors", lambda good: save(good)[:100], DAMAGED),
    "data cut short": (
        ".safetensors",
        lambda good: save(good)[:-1000],
        "f.safetensors is cut short: it has",
        "copy it",
    ),
    "vast header": (".safetensors", lambda good: b"\xff" * 8 + save(good)[8:], DAMAGED),
    "wrong length of the header": (".safetensors", lambda good: b"\x99" + save(good)[1:], DAMAGED),
    "header is no JSON": (".safetensors", lambda _: raw(b"hello, this is no JSON"), DAMAGED),
    "header is a list": (".safetensors", lambda _: raw([1]), DAMAGED),
    "header of brackets": (".safetensors", lambda _: raw(b"[" * 100_000), DAMAGED),
    "metadata is a list": (".safetensors", lambda _: raw({"__metadata__": [1]} | entry(), bytes(4)), DAMAGED),
    "negative place": (".safetensors", lambda _: raw(entry(data_offsets=[-4, 0]), bytes(4)), DAMAGED),
    "negative shape": (".safetensors", lambda _: raw(entry(shape=[-1]), bytes(4)), DAMAGED),
    "a web page": (
        ".safetensors",
        lambda _: b"<!DOCTYPE html><html>Not found",
        "is not a weight file, but a web page (HTML): the download failed",
    ),
    "empty pickle": (".pt", lambda _: b"", "f.pt", EMPTY),
    "a text": (".pt", lambda _: b"hello", "is not a weight file, but a text that begins 'hello'"),
    "pickle cut short": (".ckpt", lambda good: pickled(good)[:-1000], "f.ckpt is a zip archive, as torch writes, that"),
    "pickle that runs code": (".ckpt", lambda good: pickled(good | {"x": Payload()}), EVIL, "could run code; convert"),
    "old pickle that runs code": (
        ".pt",
        lambda _: pickle.dumps(Payload()),
        "could run code; convert it to .safetensors",
    ),
    "pickle of a list": (".pt", lambda _: pickled([1, 2]), "f.pt has no weights"),
    "pickle of numbers": (".pt", lambda _: pickled({1: torch.zeros(1)}), "f.pt has no weights"),
}


@pytest.fixture(scope="session")
def adapters(model_store):
    """Return family name -> tensors of an adapter of rank 4."""
    from networks.lora import create_network

    def make(family):
        models = model_store(family)[0]
        network = create_network(1.0, 4, 1.0, None, models["text_encoder"], models["unet"])
        return {name: tensor.clone() for name, tensor in network.state_dict().items()}

    return {family: make(family) for family in ("sd1", "sd2")}


UP = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight"
ADAPTERS = {
    "holds nothing": (".safetensors", lambda _: {}, "f.safetensors has no weights"),
    "nothing but metadata": (".safetensors", lambda _: raw({"__metadata__": {"a": "b"}}), "has no weights"),
    "another type": (
        ".safetensors",
        lambda _: raw(entry(dtype="Q3"), bytes(4)),
        "has the type Q3, which is not supported",
    ),
    "another size": (".safetensors", lambda _: raw(entry(shape=[2]), bytes(4)), "has 4 bytes, its shape needs 8"),
    "vast size": (".safetensors", lambda _: raw(entry(shape=[10**12]), bytes(4)), "has 4 bytes, its shape needs 40000"),
    "more than it tells": (
        ".safetensors",
        lambda good: save(good) + bytes(9),
        "f.safetensors is damaged: 9 bytes follow its last tensor",
    ),
    "NaN": (
        ".safetensors",
        lambda good: good | {UP: good[UP] * torch.nan},
        f"f.safetensors: {UP} holds NaN",
        "another copy",
    ),
    "one infinity": (
        ".pt",
        lambda good: good | {UP: good[UP].index_fill(0, torch.tensor(3), torch.inf)},
        f"{UP} holds",
    ),
    "NaN in 8 bits": (
        ".safetensors",
        lambda good: good | {UP: (good[UP] * torch.nan).to(torch.float8_e4m3fn)},
        f"{UP} holds NaN or infinity",
    ),
}
OTHERS = {
    "no adapter": (lambda _: {"a.b": torch.zeros(1)}, "f.safetensors: none of ", "1 modules", "(such as a)"),
    "another family": (lambda all_: all_["sd2"], "f.safetensors: lora_", "the file is for another model or has other"),
    "another shape": (lambda all_: all_["sd1"] | {UP: torch.zeros(3, 4)}, f"f.safetensors: {UP} has the shape (3, 4)"),
}


@rows(DAMAGED_FILES | ADAPTERS)
def test_adapters_to_start_from(refused, tmp_path, adapters, case):
    suffix, change, *fragments = case
    refused({"network_weights": as_file(tmp_path / f"f{suffix}", change(adapters["sd1"]))}, *fragments)


FOR_MERGING = ("empty", "data cut short", "pickle that runs code", "holds nothing", "NaN")


@rows({name: (DAMAGED_FILES | ADAPTERS)[name] for name in FOR_MERGING})
def test_adapters_to_merge(refused, tmp_path, adapters, case):
    suffix, change, *fragments = case
    sound = as_file(tmp_path / "sound.safetensors", adapters["sd1"])
    refused({"base_weights": [sound, as_file(tmp_path / f"f{suffix}", change(adapters["sd1"]))]}, *fragments)


@pytest.mark.parametrize("option", ["network_weights", "base_weights"])
@rows(OTHERS)
def test_adapters_for_something_else(refused, tmp_path, adapters, option, case):
    change, *fragments = case
    path = as_file(tmp_path / "f.safetensors", change(adapters))
    refused({option: [path] if option == "base_weights" else path}, *fragments, loads=True)


@pytest.fixture(scope="session")
def checkpoint(model_store):
    """Return the tensors of a tiny checkpoint."""
    return tiny.original_state(model_store("sd1")[0], "sd1")


@pytest.fixture(scope="session")
def small(checkpoint):
    """Return a few tensors of a checkpoint, for files that are damaged as files."""
    return {name: checkpoint[name] for name in list(checkpoint)[:5]}


@pytest.mark.parametrize("option", ["network_weights", "base_weights"])
def test_a_base_model_is_no_adapter(refused, tmp_path, checkpoint, option):
    path = as_file(tmp_path / "model.safetensors", checkpoint)
    refused(
        {option: [path] if option == "base_weights" else path}, "model.safetensors is a base model, not a LoRA file"
    )


TO_Q = f"{keys.UNET_PREFIX}input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
STEM = f"{keys.UNET_PREFIX}input_blocks.0.0.weight"
FEED = f"{keys.UNET_PREFIX}input_blocks.1.1.transformer_blocks.0.ff.net.0.proj.weight"
TEXT = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
NORM = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
CONV_IN = "encoder.conv_in.weight"
VAE = keys.VAE_PREFIX + CONV_IN


def without(*prefixes):
    return lambda state: {name: tensor for name, tensor in state.items() if not name.startswith(prefixes)}


def changed(name, change):
    return lambda state: state | {name: change(state[name])}


def poisoned(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[tensor.numel() // 2] = torch.nan
    return tensor


CHECKPOINTS = {
    "another architecture": (
        lambda _: {"double_blocks.0.x": torch.zeros(1)},
        "a model of the kind of Flux",
    ),
    "nothing": (lambda _: {}, "is not a Stable Diffusion", "its first is none"),
    "an inpainting model": (
        changed(STEM, lambda stem: torch.zeros(len(stem), 9, 3, 3)),
        "is an inpainting model: its U-Net takes 9 channels, and only those that take 4 can be used for training",
    ),
}
INCOMPLETE_CHECKPOINTS = {
    "no U-Net": (
        without(keys.UNET_PREFIX),
        "has an incomplete U-Net: model.diffusion_model.input_blocks",
        "is missing",
    ),
    "no text encoder": (
        without("cond_stage_model."),
        "has no text encoder (nothing under cond_stage",
        "name a whole",
    ),
    "no VAE": (without(keys.VAE_PREFIX), "has no VAE: name one with --vae"),
    "one tensor less": (without(TO_Q), "is incomplete: unet/", "in the file it would be", TO_Q),
    "one tensor less of the text": (without(TEXT), f"has an incomplete text encoder: {TEXT} is missing"),
    "wrong shape": (changed(TO_Q, lambda _: torch.zeros(3, 5)), f"{TO_Q} has the shape (3, 5), (32, 32) is needed"),
    "turned": (changed(FEED, lambda t: t.t().contiguous()), f"{FEED} has the shape (32, 256), (256, 32) is needed"),
    "one number for a matrix": (changed(STEM, lambda _: torch.zeros(())), "describes no U-Net that can be built"),
    "odd width": (
        changed(f"{keys.UNET_PREFIX}input_blocks.1.0.out_layers.3.weight", lambda _: torch.zeros(33, 3, 3, 3)),
        "is not a Stable Diffusion model of the usual sizes (unet: (33, 64, 96, 96) channels)",
    ),
    "another type": (
        changed(TO_Q, lambda t: t.to(torch.complex64)),
        f"{TO_Q} has the type C64, which is not supported",
    ),
    "NaN in the U-Net": (changed(TO_Q, poisoned), f"{TO_Q} holds NaN or infinity", "take another copy"),
    "NaN in the text encoder": (changed(NORM, poisoned), f"{NORM} holds NaN or infinity"),
    "NaN in the VAE": (changed(VAE, poisoned), f"{VAE} holds NaN or infinity"),
}
VAES = {
    "a U-Net": (lambda state: {TO_Q: state[TO_Q]}, False, "--vae: ", "has no VAE; name a file or a Diffusers folder"),
    "one tensor less": (without(CONV_IN), True, "is incomplete: vae/", "is missing", CONV_IN),
    "wrong shape": (changed(CONV_IN, lambda _: torch.zeros(3, 5)), True, f"{CONV_IN} has the shape (3, 5)"),
    "NaN": (changed(CONV_IN, poisoned), True, f"v.safetensors: {CONV_IN} holds NaN or infinity"),
    "a part in Diffusers names": (
        lambda _: {"encoder.down_blocks.0.resnets.0.conv1.weight": torch.zeros(32, 32, 3, 3)},
        True,
        "has an incomplete VAE: encoder.down.0.block.0.conv2.weight is missing",
    ),
}


@rows(DAMAGED_FILES)
@pytest.mark.parametrize("option", ["base", "vae"])
def test_models_that_are_damaged(refused, tmp_path, small, option, case):
    suffix, change, *fragments = case
    refused({option: as_file(tmp_path / f"f{suffix}", change(small))}, *fragments)


@rows(CHECKPOINTS)
def test_checkpoints_of_another_kind(refused, tmp_path, checkpoint, case):
    change, *fragments = case
    refused({"base": as_file(tmp_path / "m.safetensors", change(checkpoint))}, "m.safetensors ", *fragments)


@rows(INCOMPLETE_CHECKPOINTS)
def test_checkpoints_that_are_not_whole(refused, tmp_path, checkpoint, case):
    change, *fragments = case
    refused({"base": as_file(tmp_path / "m.safetensors", change(checkpoint))}, "m.safetensors", *fragments, loads=True)


@pytest.fixture(scope="session")
def sdxl(model_store):
    """Return the tensors of a tiny checkpoint of SDXL in fp16."""
    state = tiny.original_state(model_store("sdxl")[0], "sdxl")
    return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


FIRST, SECOND = (f"{keys.TEXT_PREFIX_XL}embedders.{number}." for number in (0, 1))
PROJECTION = f"{SECOND}model.text_projection"
FUSED = f"{SECOND}model.transformer.resblocks.0.attn.in_proj_weight"
INCOMPLETE_SDXL = {
    "no first text encoder": (
        without(FIRST),
        "has no text encoder (nothing under conditioner.embedders.0",
        "name a whole",
    ),
    "no second text encoder": (without(SECOND), "has no text encoder (nothing under conditioner.embedders.1"),
    "no projection": (
        without(PROJECTION),
        "is incomplete: text_encoder_2/text_projection.weight is missing",
        PROJECTION,
    ),
    "narrow projection": (
        changed(PROJECTION, lambda t: t[:, :64].contiguous()),
        "its text encoders make pooled outputs of width 64, its U-Net takes 128",
    ),
    "NaN in the projection": (changed(PROJECTION, poisoned), f"{PROJECTION} holds NaN or infinity"),
    "two thirds of an attention": (changed(FUSED, lambda t: t[:256]), f"{FUSED} has the shape"),
    "text encoder of another model": (
        lambda state: (
            state
            | {name: state[name][:, :64].contiguous() for name in state if "attn2.to_k" in name or "attn2.to_v" in name}
        ),
        "its text encoders make states of width 192, its U-Net takes 64",
    ),
    "no sizes": (without(f"{keys.UNET_PREFIX}label_emb."), "label_emb.0.0.weight"),
}


@rows(INCOMPLETE_SDXL)
def test_checkpoints_of_sdxl_that_are_not_whole(refused, tmp_path, sdxl, case):
    change, *fragments = case
    refused({"base": as_file(tmp_path / "m.safetensors", change(sdxl))}, "m.safetensors", *fragments, loads=True)


def test_a_flag_of_another_family_for_sdxl(refused, model_store):
    refused({"base": model_store("sdxl")[1]["fp16"], "v2": True}, "is an SDXL model: omit --v2")


def test_nan_in_a_pickled_checkpoint(refused, tmp_path, checkpoint):
    path = as_file(tmp_path / "m.ckpt", changed(TO_Q, poisoned)(checkpoint))
    refused({"base": path}, f"m.ckpt: {TO_Q} holds NaN or infinity", loads=True)


def test_a_flag_that_contradicts_the_checkpoint(refused, model_store):
    refused({"v2": True}, "--v2 was given, but ", "is an SD 1.x model: omit --v2")


@rows(VAES)
def test_vaes_that_are_none(refused, tmp_path, checkpoint, case):
    change, loads, *fragments = case
    bare = {name.removeprefix(keys.VAE_PREFIX): tensor for name, tensor in checkpoint.items()}
    refused({"vae": as_file(tmp_path / "v.safetensors", change(bare))}, *fragments, loads=loads)


def test_a_folder_that_holds_no_vae(refused):
    refused({"vae": "train"}, "train is not a Diffusers folder: vae/config.json is missing")


UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
# What changes in a Diffusers folder: a part to remove (None), or a file to write. Then whether the model is loaded.
FOLDERS = {
    "no U-Net": ("unet", None, False, "is not a Diffusers folder: unet/config.json is missing"),
    "no text encoder": ("text_encoder", None, False, "is not a Diffusers folder: text_encoder/config.json is missing"),
    "no VAE": ("vae", None, True, "is not a Diffusers folder: vae/config.json is missing"),
    "no weights": (UNET_FILE, None, True, "has no weights: a .safetensors or .bin file is missing"),
    "empty weights": (UNET_FILE, "", True, "diffusion_pytorch_model.safetensors", EMPTY),
    "damaged configuration": ("unet/config.json", "{", False, "config.json is not valid JSON: Expecting property name"),
    "configuration is a list": ("text_encoder/config.json", "[1]", False, "config.json must hold an object, got [1]"),
    "damaged scheduler": ("scheduler/scheduler_config.json", "x", False, "scheduler_config.json is not valid JSON"),
    "an inpainting model": (
        "unet/config.json",
        '{"in_channels": 9}',
        False,
        "is an inpainting model: its U-Net takes 9",
    ),
    "unbuildable U-Net": ("unet/config.json", '{"block_out_channels": 3}', True, "describes no unet that can be built"),
    "unbuildable text encoder": (
        "text_encoder/config.json",
        '{"hidden_size": "wide"}',
        True,
        "config.json describes no text_encoder that can be built",
        "wide",
    ),
    "another VAE": ("vae/config.json", "{}", True, "has the shape (32, 3, 3, 3), (64, 3, 3, 3) is needed"),
    "shards without a map": (f"{UNET_FILE}.index.json", "{}", True, 'index.json has no "weight_map" of tensors'),
    "an absent shard": (f"{UNET_FILE}.index.json", '{"weight_map": {"a": "b.safetensors"}}', True, "does not exist"),
    "damaged tokenizer": ("tokenizer/tokenizer.json", "{}", True, "tokenizer in ", "cannot be read"),
    "SDXL": (
        "unet/config.json",
        '{"addition_embed_type": "text_time"}',
        True,
        "text_encoder_2",
    ),
}


@rows(FOLDERS)
def test_folders_that_are_no_model(refused, tmp_path, model_store, case):
    part, content, loads, *fragments = case
    folder = tmp_path / "model"
    shutil.copytree(model_store("sd1")[1]["folder"], folder)
    if content is not None:
        write(folder / part, content)
    elif (folder / part).is_dir():
        shutil.rmtree(folder / part)
    else:
        (folder / part).unlink()
    refused({"base": folder}, *fragments, loads=loads)
