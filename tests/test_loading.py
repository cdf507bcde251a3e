"""Models from disk: every layout gives the same weights, and diffusers agrees."""

from __future__ import annotations

import os

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from library.config.model import ModelConfig
from library.errors import UserError
from library.models import building, checkpoint, keys, layout
from library.models import family as families
from library.models.base import find_base, load_vae
from library.models.precision import types_of
from library.weight_file import open_weights


def parts(loaded):
    return {"unet": loaded.unet, "vae": loaded.vae, "text_encoder": loaded.texts[0].module}


@pytest.mark.repetitions(keep=3)
@pytest.mark.parametrize("layout", ["folder", "safetensors", "ckpt"])
def test_every_layout_gives_the_same_weights_bit_for_bit(model_store, family_name, layout):
    models, paths = model_store(family_name)
    loaded = tiny.load(paths[layout])
    assert loaded.family.name == family_name
    for part, model in parts(loaded).items():
        expected = models[part].state_dict()
        state = model.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in state)
        assert all(p.data_ptr() % 64 == 0 for p in model.parameters()), "unaligned weights change the arithmetic"
        assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.repetitions(keep=1)
def test_an_fp16_file_gives_its_values_in_float32(model_store, family_name):
    models, paths = model_store(family_name)
    unet = tiny.load(paths["fp16"]).unet
    for name, tensor in models["unet"].state_dict().items():
        assert torch.equal(unet.state_dict()[name], tensor.half().float())


def test_diffusers_converters_agree_with_the_key_map(model_store, family_name):
    from diffusers.loaders import single_file_utils as oracle

    models, _ = model_store(family_name)
    state = tiny.original_state(models, family_name)
    unet = oracle.convert_ldm_unet_checkpoint(dict(state), dict(models["unet"].config))
    vae = oracle.convert_ldm_vae_checkpoint(dict(state), dict(models["vae"].config))
    for converted, part in ((unet, "unet"), (vae, "vae")):
        expected = models[part].state_dict()
        assert converted.keys() == expected.keys()
        assert all(torch.equal(converted[name].reshape(expected[name].shape), expected[name]) for name in expected)
    if family_name == "sd1":
        text = oracle.convert_ldm_clip_checkpoint(dict(state))
    else:
        text = oracle.convert_open_clip_checkpoint(
            models["text_encoder"], dict(state), prefix="cond_stage_model.model."
        )
    for name, tensor in tiny.body_state(models["text_encoder"]).items():
        assert torch.equal(text[f"text_model.{name}"], tensor)


COUNTS = {"sd1": (859_520_964, 123_060_480), "sd2": (865_910_724, 340_387_840)}


def test_real_configurations_have_the_published_sizes(family_name):
    family = tiny.FAMILIES[family_name]
    unet, text = building.build_unet(family.unet), building.build_text_encoder(family.text_models[0].config)
    vae = building.build_vae(family.vae)
    count = lambda model: sum(p.numel() for p in model.parameters())  # noqa: E731
    assert (count(unet), count(text)) == COUNTS[family_name]
    assert count(vae) == 83_653_863
    assert len(unet.state_dict()) == 686


def test_configurations_come_back_from_the_shapes_of_real_files(family_name):
    family = tiny.FAMILIES[family_name]
    unet, vae = building.build_unet(family.unet), building.build_vae(family.vae)
    unet_names = tiny.original_names(layout.unet_rule(family, {}), unet.state_dict())
    vae_names = tiny.original_names(layout.vae_rule(4), vae.state_dict())
    assert len(set(unet_names.values())) == 686
    shapes = {unet_names[name]: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    assert building.unet_config(family, shapes) == family.unet
    shapes = {vae_names[name]: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    assert building.vae_config(family, shapes) == family.vae


@pytest.mark.repetitions(keep=3)
@pytest.mark.parametrize("layout", ["folder", "safetensors", "bare", "diffusers.bin", "old_names.bin", "checkpoint"])
def test_a_vae_is_read_in_each_of_its_layouts(model_store, tmp_path, layout):
    models, paths = model_store("sd1")
    other = tiny.make_models("sd1", seed=50)["vae"]
    state = other.state_dict()
    original = {
        name.removeprefix(keys.VAE_PREFIX): tensor
        for name, tensor in tiny.original_state(models | {"vae": other}, "sd1").items()
        if name.startswith(keys.VAE_PREFIX)
    }
    path = tmp_path / layout
    if layout == "folder":
        other.save_pretrained(path)
    elif layout == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file({keys.VAE_PREFIX + name: tensor for name, tensor in original.items()}, path)
    elif layout == "bare":
        path = path.with_suffix(".pt")
        torch.save({"state_dict": original}, path)
    elif layout == "checkpoint":
        path = tiny.write_checkpoint(models | {"vae": other}, "sd1", tmp_path / "whole.safetensors")
    else:
        rename = keys.vae_old_diffusers_name if layout.startswith("old") else str
        torch.save({rename(name): tensor for name, tensor in state.items()}, path)
    loaded = tiny.load(paths["safetensors"], vae=path).vae
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in state.items())


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path):
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "callback": Evil()}, path)
    with pytest.raises(UserError, match=r"contains more than weights .*mkdir.*could run code"):
        tiny.load(path)
    assert not marker.exists()


def test_v2_against_the_file_stops_and_a_forgotten_one_is_set(model_store, caplog):
    _, paths = model_store("sd1")
    with pytest.raises(UserError, match=r"--v2 was given, but .* is an SD 1\.x model"):
        tiny.load(paths["safetensors"], v2=True)
    _, paths = model_store("sd2")
    with caplog.at_level("INFO"):
        assert tiny.load(paths["ckpt"]).family is families.SD2
    assert "--v2 is set" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00{", "header is damaged"),
        ("text.safetensors", b"hello", "not a weight file, but a text"),
        ("text.ckpt", b"hello", "not a weight file"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        tiny.load(tmp_path / name)


def test_a_file_cut_short_is_named_with_its_size(model_store, tmp_path):
    _, paths = model_store("sd1")
    whole = paths["safetensors"].read_bytes()
    (tmp_path / "short.safetensors").write_bytes(whole[:-1000])
    with pytest.raises(UserError, match="is cut short"):
        tiny.load(tmp_path / "short.safetensors")


def test_other_files_are_told_by_name(tmp_path):
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="is not a Stable Diffusion"):
        tiny.load(tmp_path / "lora.safetensors")


def test_missing_parts_are_named(model_store, tmp_path):
    models, _ = model_store("sd1")
    state = tiny.original_state(models, "sd1")
    save_file(
        {name: t for name, t in state.items() if not name.startswith(keys.VAE_PREFIX)}, tmp_path / "novae.safetensors"
    )
    with pytest.raises(UserError, match="has no VAE: name one with --vae"):
        tiny.load(tmp_path / "novae.safetensors")
    name = keys.UNET_PREFIX + "middle_block.1.proj_in.weight"
    del state[name]
    save_file(state, tmp_path / "hole.safetensors")
    with pytest.raises(UserError, match="is incomplete: unet/mid_block.attentions.0.proj_in.weight is missing"):
        tiny.load(tmp_path / "hole.safetensors")


def test_only_the_parts_that_are_needed_are_read(model_store, tmp_path, monkeypatch):
    """A pickle is read completely when it is opened, so opening one more costs its memory."""
    models, _ = model_store("sd1")
    folder = tiny.write_folder(models, "sd1", tmp_path / "folder")
    for path in list(folder.glob("*/*.safetensors")):
        torch.save(load_file(path), path.with_suffix(".bin"))
        path.unlink()
    opened: list[str] = []

    def open_and_note(path):
        opened.append(path.parent.name)
        return open_weights(path)

    monkeypatch.setattr(checkpoint, "open_weights", open_and_note)
    config = ModelConfig(pretrained_model_name_or_path=str(folder))
    vae = load_vae(find_base(config), types_of("no"))
    assert opened == ["vae"]
    assert torch.equal(vae.state_dict()["decoder.conv_in.weight"], models["vae"].state_dict()["decoder.conv_in.weight"])
    (folder / "vae" / "diffusion_pytorch_model.bin").unlink()  # its own VAE need not be there if there is another
    models["vae"].save_pretrained(tmp_path / "other")
    opened.clear()
    tiny.load(folder, vae=tmp_path / "other")
    assert sorted(opened) == ["other", "text_encoder", "unet"]
