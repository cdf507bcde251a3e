"""networks/sdxl_merge_lora.py, LoRA files of every naming, Diffusers folders and --lbws: against sums in float64.

Where a module stands in the checkpoint is found by its numbers, which diffusers' model and the checkpoint share.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from typing import Any

import pytest
import torch
from conversions import convert
from loras import deltas, make_lora
from safetensors.torch import load_file, save_file
from scripts import call
from sdxl_networks import (
    INS,
    LISTS,
    OPENCLIP,
    OUTS,
    UNET,
    assert_is,
    block_weights,
    expected_state,
    make_network,
    one_word,
    read_sdxl,
    sd_block,
    sdxl_block,
    sgm_word,
    write_network,
)
from tensors import assert_same, read_folder

from library.errors import UserError
from library.models.checkpoint import EXTRAS_FILE
from networks import merge_lora, sdxl_merge_lora

pytestmark = pytest.mark.usefixtures("tidy")


def merge(*argv, script=sdxl_merge_lora):
    call(script, *argv)


def assert_close(found, expected):
    """Hold that tables of tensors are the same but for the last bits, which depend on how memory is aligned."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7, msg=name)


# ---- a network on every layer, in every naming --------------------------------------------------------------


@pytest.fixture(scope="module")
def sdxl(model_store):
    return read_sdxl(*model_store("sdxl"))


@pytest.fixture(scope="module")
def merged(sdxl, tmp_path_factory):
    """Return the network, its file in each naming, and the checkpoint with it at 0.7."""
    root = tmp_path_factory.mktemp("merged")
    network = make_network(sdxl)
    namings = ("sgm", "diffusers", "peft")
    files = {naming: write_network(sdxl, network, root / f"{naming}.safetensors", naming) for naming in namings}
    out = root / "out.safetensors"
    merge("--sd_model", sdxl.paths["safetensors"], "--save_to", out, "--models", files["sgm"], "--ratios", 0.7)
    yield network, files, out
    shutil.rmtree(root)


def test_every_layer_gets_its_change(sdxl, merged):
    network, _, out = merged
    names = {sdxl.places[key][0] for key in network}
    assert any("in_proj_weight" in name for name in names)
    expected = expected_state(sdxl, [(network, lambda key: 0.7)])
    assert assert_is(load_file(out), expected, sdxl.state) == len(names)


@pytest.mark.parametrize("naming", ["diffusers", "peft"])
def test_the_naming_of_a_file_changes_nothing(sdxl, merged, tmp_path, naming):
    _, files, out = merged
    base = sdxl.paths["safetensors"]
    merge("--sd_model", base, "--save_to", tmp_path / "x.safetensors", "--models", files[naming], "--ratios", 0.7)
    assert_same(load_file(tmp_path / "x.safetensors"), load_file(out))


def test_a_folder_becomes_what_the_checkpoint_becomes(sdxl, merged, tmp_path):
    _, files, out = merged
    merge("--sd_model", sdxl.paths["folder"], "--save_to", tmp_path / "x", "--models", files["peft"], "--ratios", 0.7)
    convert(out, tmp_path / "y")
    assert_close(read_folder(tmp_path / "x"), read_folder(tmp_path / "y"))
    others = {path.relative_to(sdxl.paths["folder"]) for path in sdxl.paths["folder"].rglob("*")}
    assert {path.relative_to(tmp_path / "x") for path in (tmp_path / "x").rglob("*")} == others


def test_diffusers_makes_the_same_of_the_file(sdxl, tmp_path):
    """So the test's own naming, which it takes from places in the checkpoint, is what others read.

    With one alpha: diffusers 0.42 loses those of attentions and text encoders where they differ.
    """
    import diffusers

    network = {key: (down, up, 3.0) for key, (down, up, _) in make_network(sdxl).items()}
    file = write_network(sdxl, network, tmp_path / "sgm.safetensors", "sgm")
    merge("--sd_model", sdxl.paths["folder"], "--save_to", tmp_path / "x", "--models", file, "--ratios", 0.7)
    found = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "x", local_files_only=True)
    assert_fused(sdxl, found, file, 0.7, least=len(network))


def assert_fused(sdxl, found, file, strength, *, least):
    """Hold that a pipeline has the weights that diffusers itself makes of the base and a LoRA file."""
    import diffusers

    parts = ["unet", "text_encoder", "text_encoder_2"]
    oracle = diffusers.StableDiffusionXLPipeline.from_pretrained(sdxl.paths["folder"], local_files_only=True)
    oracle.load_lora_weights(str(file.parent), weight_name=file.name)
    oracle.fuse_lora(components=parts, lora_scale=strength)
    oracle.unload_lora_weights()
    changed = 0
    for part in parts:
        state, plain = getattr(found, part).state_dict(), sdxl.models[part].state_dict()
        for name, tensor in getattr(oracle, part).state_dict().items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-5, msg=f"{part} {name}")
            changed += not torch.equal(tensor, plain[name])
    assert changed >= least


def test_several_networks_into_half_precision(sdxl, merged, tmp_path):
    """Sums are made in float32, rounded once; negative ratios take away."""
    network, files, _ = merged
    other = make_network(sdxl, seed=5)
    more = write_network(sdxl, other, tmp_path / "more.safetensors", "diffusers")
    merge(
        "--sd_model", sdxl.paths["ckpt"], "--save_to", tmp_path / "x.safetensors",
        "--models", files["peft"], more, "--ratios", 0.5, -0.8, "--save_precision", "fp16",
    )  # fmt: skip
    expected = expected_state(sdxl, [(network, lambda key: 0.5), (other, lambda key: -0.8)])
    found = load_file(tmp_path / "x.safetensors")
    for name, tensor in found.items():
        if name.startswith("first_stage_model."):
            assert torch.equal(tensor, sdxl.state[name])
        elif tensor.is_floating_point():
            assert tensor.dtype == torch.float16
            assert (tensor.double() - expected[name]).abs().max() <= 2**-11 * expected[name].abs().max() + 1e-6, name


def test_parts_of_a_network_touch_nothing_else(sdxl, tmp_path):
    """A key of the second text encoder alone changes a third of one tensor."""
    network = make_network(sdxl)
    key = ("text_encoder_2", "encoder.layers.1.self_attn.k_proj")
    file = write_network(sdxl, {key: network[key]}, tmp_path / "k.safetensors", "peft")
    out = tmp_path / "x.safetensors"
    merge("--sd_model", sdxl.paths["safetensors"], "--save_to", out, "--models", file, "--ratios", 1)
    found, name = load_file(out), f"{OPENCLIP}transformer.resblocks.1.attn.in_proj_weight"
    assert [each for each in found if not torch.equal(found[each], sdxl.state[each])] == [name]
    same = [torch.equal(a, b) for a, b in zip(found[name].chunk(3), sdxl.state[name].chunk(3), strict=True)]
    assert same == [True, False, True]


def test_tensors_of_pickles_may_lie_otherwise_in_memory(tmp_path):
    up, down, weight = torch.randn(6, 2, 1, 1), torch.randn(2, 4, 3, 3), torch.randn(6, 4, 3, 3)
    word = "lora_unet_down_blocks_0_resnets_0_conv1"
    save_file({f"{word}.lora_up.weight": up, f"{word}.lora_down.weight": down}, tmp_path / "a.safetensors")
    name, out = f"{UNET}input_blocks.1.0.in_layers.2.weight", tmp_path / "x.safetensors"
    state = {"cond_stage_model.transformer.text_model.final_layer_norm.bias": torch.zeros(4)}
    state[name] = weight.contiguous(memory_format=torch.channels_last)
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    merge("--sd_model", tmp_path / "last.ckpt", "--save_to", out, "--models", tmp_path / "a.safetensors", "--ratios", 1)
    torch.testing.assert_close(load_file(out)[name], weight + (up.flatten(1) @ down.flatten(1)).reshape(weight.shape))


# ---- alphas of PEFT -----------------------------------------------------------------------------------------


def test_without_alphas_the_rank_is_the_alpha(sdxl, merged, tmp_path):
    network, files, _ = merged
    save_file(load_file(files["peft"]), tmp_path / "bare.safetensors")
    bare = {key: (down, up, float(len(down))) for key, (down, up, _) in network.items()}
    same = write_network(sdxl, bare, tmp_path / "same.safetensors", "sgm")
    for file in (tmp_path / "bare.safetensors", same):
        merge("--save_to", tmp_path / f"{file.stem}_out.safetensors", "--models", file, "--ratios", 1)
    assert_same(load_file(tmp_path / "bare_out.safetensors"), load_file(tmp_path / "same_out.safetensors"))


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_files_that_diffusers_wrote_act_as_in_diffusers(sdxl, tmp_path, rank_stabilised):
    """Ranks and alphas by pattern, which diffusers keeps as PEFT's configuration; merged by diffusers itself."""
    import diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    kind = diffusers.StableDiffusionXLPipeline
    torch.manual_seed(0)
    pipeline = kind.from_pretrained(sdxl.paths["folder"], local_files_only=True)
    own: dict[str, dict[str, Any]] = {
        "unet": {
            "target_modules": ["to_q", "to_out.0", "conv1", "proj_in"],
            "rank_pattern": {"conv1": 3, "mid_block.attentions.0.proj_in": 5},
            "alpha_pattern": {"to_q": 7, "mid_block.attentions.0.proj_in": 2},
        },
        "text_encoder": {"target_modules": ["q_proj", "fc1"], "alpha_pattern": {"fc1": 3}},
        "text_encoder_2": {"target_modules": ["k_proj", "out_proj"]},
    }
    layers, notes = {}, {}
    for part, words in own.items():
        config = LoraConfig(r=4, lora_alpha=6, init_lora_weights="gaussian", use_rslora=rank_stabilised, **words)
        module = getattr(pipeline, part)
        module.add_adapter(config)
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
        layers[f"{part}_lora_layers"] = get_peft_model_state_dict(module)
        notes[f"{part}_lora_adapter_metadata"] = config.to_dict()
    kind.save_lora_weights(tmp_path, **layers, **notes)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    merge("--sd_model", sdxl.paths["folder"], "--save_to", tmp_path / "out", "--models", file, "--ratios", 0.6)
    found = kind.from_pretrained(tmp_path / "out", local_files_only=True)
    assert_fused(sdxl, found, file, 0.6, least=50)


# ---- folders of the other families --------------------------------------------------------------------------


@pytest.mark.parametrize("name", [pytest.param("sd1", marks=pytest.mark.slow), "sd2"])
def test_folders_of_sd1_and_sd2(model_store, tmp_path, name):
    models, paths = model_store(name)
    file = make_lora(models, tmp_path / "a.safetensors", conv_dim="2")
    convert(paths["safetensors"], tmp_path / "base")  # with what Diffusers has no place for
    argv = ("--models", file, "--ratios", -0.6)
    merge("--sd_model", paths["safetensors"], "--save_to", tmp_path / "x.safetensors", *argv, script=merge_lora)
    convert(tmp_path / "x.safetensors", tmp_path / "x")
    merge("--sd_model", tmp_path / "base", "--save_to", tmp_path / "y", *argv, script=merge_lora)
    assert_close(read_folder(tmp_path / "y"), read_folder(tmp_path / "x"))
    assert_same(load_file(tmp_path / "y" / EXTRAS_FILE), load_file(tmp_path / "base" / EXTRAS_FILE))
    changed = read_folder(tmp_path / "y"), read_folder(tmp_path / "base")
    assert sum(not torch.equal(changed[0][each], changed[1][each]) for each in changed[0]) == len(deltas(file))


def test_a_sharded_folder_stays_sharded(model_store, tmp_path):
    models, paths = model_store("sd1")
    file = make_lora(models, tmp_path / "a.safetensors")
    shutil.copytree(paths["folder"], tmp_path / "base")
    shutil.rmtree(tmp_path / "base" / "unet")
    models["unet"].save_pretrained(tmp_path / "base" / "unet", max_shard_size="5MB")
    for base in (paths["folder"], tmp_path / "base"):
        out = tmp_path / f"out_{base.name}"
        merge("--sd_model", base, "--save_to", out, "--models", file, "--ratios", 1, script=merge_lora)
    assert_same(read_folder(tmp_path / "out_base"), read_folder(tmp_path / "out_folder"))
    index = json.loads(next((tmp_path / "out_base" / "unet").glob("*.index.json")).read_text())
    assert all((tmp_path / "out_base" / "unet" / shard).is_file() for shard in index["weight_map"].values())


# ---- weights by block ---------------------------------------------------------------------------------------


@pytest.mark.repetitions(keep=2)
@pytest.mark.parametrize("length", sorted(LISTS))
def test_weights_by_block_into_a_checkpoint(sdxl, merged, tmp_path, length):
    network, files, _ = merged
    weights = block_weights(length)
    by_block = dict(zip(LISTS[length], weights, strict=True))
    naming = {12: "sgm", 17: "peft", 20: "diffusers", 26: "sgm"}[length]
    out = tmp_path / "x.safetensors"
    words = ("--models", files[naming], "--ratios", 0.7, "--lbws", json.dumps(weights))
    merge("--sd_model", sdxl.paths["safetensors"], "--save_to", out, *words)
    expected = expected_state(sdxl, [(network, lambda key: 0.7 * by_block.get(sdxl_block(sdxl, key), 1.0))])
    assert_is(load_file(out), expected, sdxl.state)


@pytest.mark.repetitions(keep=4)
@pytest.mark.parametrize("more", [[], ["--concat"], ["--concat", "--shuffle", "--seed", "1"]], ids=len)
@pytest.mark.parametrize("length", sorted(LISTS))
def test_weights_by_block_act_once_in_a_lora_too(sdxl, merged, tmp_path, length, more):
    """sd-scripts applies them to both factors, so that they act squared."""
    _, files, _ = merged
    by_block = dict(zip(LISTS[length], block_weights(length), strict=True))
    out = tmp_path / "x.safetensors"
    words = ("--ratios", -0.5, "--lbws", json.dumps(block_weights(length)), *more)
    merge("--save_to", out, "--models", files["sgm"], *words)
    before, after = deltas(files["sgm"]), deltas(out)
    assert before.keys() == after.keys()
    for key in sdxl.places:
        name = sgm_word(sdxl, *key) if key[0] == "unet" else one_word(*key)
        expected = -0.5 * by_block.get(sdxl_block(sdxl, key), 1.0) * before[name]
        assert (after[name] - expected).norm() <= 1e-5 * before[name].norm(), name


@pytest.mark.parametrize("length", [17, 26])
def test_weights_by_block_of_several_sd1_files(model_store, tmp_path, length):
    models, _ = model_store("sd1")
    files = [make_lora(models, tmp_path / f"{n}.safetensors", seed=n, rank=2 + n, conv_dim="2") for n in range(2)]
    tables = [block_weights(length), block_weights(length)[::-1]]
    out, words = tmp_path / "x.safetensors", [json.dumps(table) for table in tables]
    merge("--save_to", out, "--models", *files, "--ratios", 0.7, 2, "--concat", "--lbws", *words)
    found, parts, blocks = deltas(out), [deltas(file) for file in files], set()
    for name, delta in found.items():
        blocks.add(sd_block(name))
        expected = torch.zeros(())
        for changes, ratio, table in zip(parts, (0.7, 2), tables, strict=True):
            by_block = dict(zip(LISTS[length], table, strict=True))
            expected = expected + ratio * by_block.get(sd_block(name), 1.0) * changes[name]
        assert (delta - expected).norm() <= 1e-5 * (1e-3 + expected.norm()), name
    assert blocks == {"BASE", *INS[1:], "MID", *OUTS}


# ---- mistakes -----------------------------------------------------------------------------------------------


def told(*argv):
    """Return what a merge says that is refused: one line."""
    with pytest.raises(UserError) as caught:
        merge(*argv)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize("base", ["safetensors", "folder"])
def test_files_for_other_models_are_refused_in_a_sentence(sdxl, model_store, tmp_path, base):
    sd1_models, sd1_paths = model_store("sd1")
    out = tmp_path / ("out" if base == "folder" else "out.safetensors")
    into_sdxl = ("--sd_model", sdxl.paths[base], "--save_to", out, "--ratios", 1, "--models")
    into_sd1 = ("--sd_model", sd1_paths[base], "--save_to", out, "--ratios", 1, "--models")

    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    wide = {f"{name}.lora_down.weight": torch.ones(1, 768), f"{name}.lora_up.weight": torch.ones(640, 1)}
    save_file(wide, tmp_path / "wide.safetensors")
    save_file({name.replace("attn2_to_k", "attn1_to_q"): t for name, t in wide.items()}, tmp_path / "said.safetensors",
              {"ss_base_model_version": "sd_v1"})  # fmt: skip
    for stem in ("wide", "said"):
        text = told(*into_sdxl, tmp_path / f"{stem}.safetensors")
        assert re.search(rf"{stem}.safetensors is for SD 1.x, .* is an SDXL model", text)

    tiny_file = make_lora(sd1_models, tmp_path / "tiny.safetensors")  # of sizes that tell no family
    assert re.search(r"is for a layer of|are not in", told(*into_sdxl, tiny_file))

    network = make_network(sdxl)
    for naming in ("sgm", "diffusers", "peft"):
        file = write_network(sdxl, network, tmp_path / f"{naming}.safetensors", naming)
        assert re.search(rf"{naming}.safetensors is for SDXL, .* is an SD 1.x model", told(*into_sd1, file))
    assert not out.exists()


def test_names_of_two_trainers_for_one_layer_are_refused(sdxl, tmp_path):
    key = ("unet", "mid_block.attentions.0.proj_in")
    network = {key: make_network(sdxl)[key]}
    parts = [load_file(write_network(sdxl, network, tmp_path / "x.safetensors", naming)) for naming in ("sgm", "peft")]
    save_file(parts[0] | parts[1], tmp_path / "x.safetensors")
    text = told("--save_to", tmp_path / "o.safetensors", "--models", tmp_path / "x.safetensors", "--ratios", 1)
    assert "has lora_unet_middle_block_1_proj_in twice, under names of different trainers" in text


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["[1,2]"], "--lbws: 2 numbers; 12, 17, 20, 26 are known"),
        ([str([1] * 12), str([1] * 12)], "--lbws must have a list for each of the 1 files of --models, got 2"),
        (["1,2,3"], "is no JSON list of numbers"),
        ([str(["a"] * 12)], "is no JSON list of numbers"),
        ([json.dumps([math.nan] + [1] * 11)], "is no JSON list of numbers"),
    ],
)
def test_lists_that_are_none(merged, tmp_path, words, text):
    argv = ("--save_to", tmp_path / "o.safetensors", "--models", merged[1]["sgm"], "--ratios", 1, "--lbws", *words)
    assert text in told(*argv)
