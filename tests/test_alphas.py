"""Alphas that differ between modules: what diffusers makes of them, and the files that it reads as they are meant."""

from __future__ import annotations

import copy
import json
import logging
from typing import Any

import pytest
import torch
from drawing import pipe_of
from loras import assert_deltas, deltas, make_lora, weighted_sum
from runs import options, train
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train_network
from library.adapters.alphas import NOTE, misread
from library.errors import UserError
from networks import (
    convert_lora,
    dylora,
    extract_lora_from_models,
    lora,
    merge_lora,
    resize_lora,
    svd_merge_lora,
)

pytestmark = pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match:RuntimeWarning")

DIMS = "block_dims=2,4,4,4,8,8,8,8,2,4,4,4,8,4,4,4,4,8,8,8,8,4,4,4,2"
ALPHAS = "block_alphas=2,2,2,2,4,4,4,4,6,6,6,6,8,6,6,6,6,4,4,4,4,2,2,2,3"


def in_diffusers(models, path):
    """Return module -> its change in float64, as diffusers applies the file, and the alphas of the file."""
    text, unet = copy.deepcopy(models["text_encoder"]), copy.deepcopy(models["unet"])
    pipe_of(models | {"text_encoder": text, "unet": unet}).load_lora_weights(path.parent, weight_name=path.name)
    found = {}
    for prefix, model in (("lora_unet", unet), ("lora_te_text_model", text)):
        for name, module in model.named_modules():
            if hasattr(module, "lora_A"):
                (adapter,) = module.lora_A
                down = module.lora_A[adapter].weight.double().flatten(1)
                up = module.lora_B[adapter].weight.double().flatten(1)
                word = f"{prefix}_{name.removeprefix('text_model.').replace('.', '_')}"
                found[word] = module.scaling[adapter] * up @ down
    return found


def wrong_in_diffusers(models, path):
    """Return the modules that diffusers applies with another strength."""
    meant, found = deltas(path), in_diffusers(models, path)
    assert meant.keys() == found.keys()
    return {name for name in meant if (found[name] - meant[name]).norm() > 1e-5 * meant[name].norm()}


def alphas_of(path):
    return {name.removesuffix(".alpha"): float(t) for name, t in load_file(path).items() if name.endswith(".alpha")}


def rewrite(path, change):
    weights = {name: tensor for name, old in load_file(path).items() if (tensor := change(name, old)) is not None}
    save_file(weights, path)
    return path


# Name of a file -> how the alphas of one with alpha 2 (convolutions 1) change; None takes an alpha away.
FILES = {
    "one alpha": lambda name, t: t,
    "keys": lambda name, t: t * 3 if "_attn2_to_k.alpha" in name else t,
    "outputs": lambda name, t: t * 3 if "_to_out_0.alpha" in name else t,
    "feed-forward": lambda name, t: t * 3 if "_ff_net_" in name and name.endswith("alpha") else t,
    "convolutions": lambda name, t: t * 5 if "_conv1.alpha" in name else t,
    "text layers": lambda name, t: t * 3 if "_mlp_fc1.alpha" in name else t,
    "text attention": lambda name, t: t * 3 if "_self_attn_v_proj.alpha" in name else t,
    "few attentions": lambda name, t: t if "resnets" in name or "mid_block_attentions" in name else None,
    "no alphas": lambda name, t: None if name.endswith("alpha") else t,
    "some alphas": lambda name, t: None if "_attn1_to_q.alpha" in name else t,
}


@pytest.mark.repetitions(keep=4)
@pytest.mark.parametrize("change", FILES.values(), ids=FILES)
def test_what_is_said_to_be_misread_is_what_diffusers_misreads(model_store, tmp_path, change):
    models, _ = model_store("sd1")
    path = make_lora(models, tmp_path / "a.safetensors", alpha=2.0, conv_dim="2", conv_alpha="1")
    rewrite(path, change)
    written = alphas_of(path)
    ranks = {name.split(".")[0]: float(len(t)) for name, t in load_file(path).items() if ".lora_down." in name}
    assert set(misread(ranks | written, written)) == wrong_in_diffusers(models, path)


def test_two_alphas_that_are_equally_common_count_as_misread():
    names = [f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_{layer}" for layer in "qkv"]
    assert misread(dict(zip(names, (1.0, 2.0, 2.0), strict=True))) == names[:1]
    assert misread(dict(zip(names[:2], (1.0, 2.0), strict=True))) == names[:2]
    assert misread({"something.else": 1.0, "lora_unet_conv_in": 2.0}) == misread({}) == []


# ---- the tools ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uneven(model_store, tmp_path_factory):
    """Return the models, a file with ranks and alphas by block, and one that has only some modules, of another rank."""
    models, _ = model_store("sd1")
    folder = tmp_path_factory.mktemp("uneven")
    given: dict[str, Any] = dict(text.split("=") for text in (DIMS, ALPHAS))
    one = make_lora(models, folder / "one.safetensors", dtype=torch.float16, **given)
    some = make_lora(
        models, folder / "some.safetensors", rank=3, alpha=2.0, seed=1, keep=lambda name: "_attn1_" in name
    )
    assert wrong_in_diffusers(models, one)
    return models, one, some


def words_of(uneven, out):
    """Return tool -> its main function, its words, and the sum that it means to the tolerance that follows."""
    _, one, some = uneven
    merge = ["--models", one, some, "--ratios", 0.8, -0.5, "--save_to", out]
    both = weighted_sum([one, some], [0.8, -0.5])
    return {
        "concat": (merge_lora.main, [*merge, "--concat"], both, 1e-6),
        "sum": (
            merge_lora.main,
            ["--models", one, "--ratios", 0.5, "--save_to", out],
            weighted_sum([one], [0.5]),
            1e-6,
        ),
        "svd": (svd_merge_lora.main, [*merge, "--new_rank", 11], both, 1e-5),
        "convert": (convert_lora.main, ["--model", one, "--save_to", out], deltas(one), 1e-6),
        "resize": (resize_lora.main, ["--model", one, "--save_to", out, "--new_rank", 8], deltas(one), 1e-5),
    }


@pytest.mark.repetitions(keep=2)
@pytest.mark.parametrize("tool", ["concat", "sum", "svd", "convert", "resize"])
def test_what_the_tools_write_acts_in_diffusers_as_everywhere(uneven, tmp_path, tool, caplog):
    out = tmp_path / "out.safetensors"
    run, words, meant, tolerance = words_of(uneven, out)[tool]
    caplog.set_level(logging.INFO)
    assert run([str(word) for word in words]) == 0
    assert_deltas(out, meant, tolerance)
    assert wrong_in_diffusers(uneven[0], out) == set()
    assert ("now all have alpha" in caplog.text) == (tool != "svd"), "svd chooses one alpha from the start"
    assert len(set(alphas_of(out).values())) == 1
    with safe_open(out, "pt") as file:
        assert float(file.metadata()["ss_network_alpha"]) == next(iter(alphas_of(out).values()))


def test_an_even_file_is_converted_without_a_change(model_store, tmp_path):
    models, _ = model_store("sd1")
    path = make_lora(models, tmp_path / "a.safetensors", alpha=3.0, dtype=torch.float16, conv_dim="2", conv_alpha="1")
    out = tmp_path / "b.safetensors"
    assert convert_lora.main(["--model", str(path), "--save_to", str(out)]) == 0
    one, other = load_file(path), load_file(out)
    assert all(torch.equal(one[name].float(), other[name].float()) for name in one)


def test_ratios_of_alphas_that_are_powers_of_two_cost_no_bit(model_store, tmp_path):
    models, _ = model_store("sd1")
    path = make_lora(models, tmp_path / "a.safetensors", alpha=2.0, dtype=torch.float16)
    rewrite(path, lambda name, t: t * 4 if "_attn1_to_k.alpha" in name else t)
    out = tmp_path / "b.safetensors"
    assert convert_lora.main(["--model", str(path), "--save_to", str(out)]) == 0
    before, after = deltas(path), deltas(out)
    assert all(torch.equal(before[module], after[module]) for module in before)


def test_extraction_of_a_model_whose_attention_hardly_changed(model_store, tmp_path):
    """Layers that did not change have no module, and the commonest alpha can be that of the convolutions."""
    models, paths = model_store("sd1")
    weights = load_file(paths["safetensors"])
    generator = torch.Generator().manual_seed(0)
    changed = ("in_layers.2.weight", "out_layers.3.weight", "middle_block.1.transformer_blocks.0.attn1.to_q.weight")
    for name in weights:
        if name.startswith("model.diffusion_model.") and name.endswith(changed):
            weights[name] = weights[name] + 0.1 * torch.randn(weights[name].shape, generator=generator)
    save_file(weights, tmp_path / "tuned.safetensors")
    out = tmp_path / "out.safetensors"
    argv = ["--model_org", paths["safetensors"], "--model_tuned", tmp_path / "tuned.safetensors", "--save_to", out]
    assert extract_lora_from_models.main([str(word) for word in [*argv, "--dim", 2, "--conv_dim", 4]]) == 0
    assert wrong_in_diffusers(models, out) == set()
    with safe_open(out, "pt") as file:
        told = file.metadata()
    assert float(told["ss_network_alpha"]) == float(json.loads(told["ss_network_args"])["conv_alpha"]) == 4


# ---- training -----------------------------------------------------------------------------------------------


def network_of(models, module=lora, dim=8, alpha=3.0, **arguments):
    """Return a network over copies of the models with up matrices that act."""
    text, unet = copy.deepcopy(models["text_encoder"]), copy.deepcopy(models["unet"])
    network = module.create_network(1.0, dim, alpha, None, text, unet, **arguments)
    generator = torch.Generator().manual_seed(0)
    for each in network.modules_in_order():
        each.lora_up.weight.data = torch.randn(each.lora_up.weight.shape, generator=generator) * 0.05
    return network


@pytest.mark.parametrize(
    "dtype",
    [None, pytest.param(torch.float16, marks=pytest.mark.slow), pytest.param(torch.bfloat16, marks=pytest.mark.slow)],
)
def test_one_alpha_is_the_same_change_in_diffusers_too(model_store, tmp_path, dtype):
    models, _ = model_store("sd1")
    given = dict(text.split("=") for text in (DIMS, ALPHAS)) | {"conv_dim": "4", "conv_alpha": "1"}
    network = network_of(models, one_alpha="True", **given)
    path = tmp_path / "x.safetensors"
    network.save_weights(path, dtype, {})
    tolerance = {None: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert_deltas(
        path, {m.lora_name: m.delta_weight().double().flatten(1) for m in network.modules_in_order()}, tolerance
    )
    assert wrong_in_diffusers(models, path) == set()
    assert set(alphas_of(path).values()) == {8.0} == set(network.file_alphas().values())
    assert {t.dtype for name, t in load_file(path).items() if name.endswith("weight")} == {dtype or torch.float32}
    # Going on from it: with the arguments of the training the alphas of the training are there again.
    other = network_of(models, one_alpha="True", **given)
    other.load_weights(path)
    assert other.alphas() == network.alphas()
    assert len(set(other.alphas().values())) > 3
    for one, two in zip(network.modules_in_order(), other.modules_in_order(), strict=True):
        assert (one.delta_weight() - two.delta_weight()).norm() <= 2 * tolerance * one.delta_weight().norm()


@pytest.mark.slow
def test_a_dylora_from_a_file_of_several_alphas_has_one_alpha_at_every_rank(model_store, tmp_path):
    models, _ = model_store("sd1")
    source = make_lora(models, tmp_path / "a.safetensors", rank=4, alpha=2.0)
    rewrite(source, lambda name, t: t * 3 if "_attn1_to_k.alpha" in name else t)
    text, unet = copy.deepcopy(models["text_encoder"]), copy.deepcopy(models["unet"])
    network, weights = dylora.create_network_from_weights(1.0, source, None, text, unet, unit="2", one_alpha="1")
    network.load_state_dict(weights)
    path = tmp_path / "b.safetensors"
    network.save_weights(path, None, {})
    assert_deltas(path, deltas(source))
    assert wrong_in_diffusers(models, path) == set()
    for file in (source, path):  # rank 2 of each: alpha / 2 of the first two rows and columns
        rewrite(file, lambda name, t: t[:2].clone() if ".lora_down" in name else t)
        rewrite(file, lambda name, t: t[:, :2].clone() if ".lora_up" in name else t)
    assert_deltas(path, deltas(source))


def test_mistakes_in_the_argument(model_store):
    for wrong in ("maybe", "2", ""):
        with pytest.raises(ValueError, match="one_alpha must be True or False, got"):
            lora.check_network_args(4, {"one_alpha": wrong})


BLOCKS = {"network_args": [DIMS, ALPHAS], "max_train_steps": 4}


@pytest.mark.slow
def test_training_with_one_alpha_learns_the_same(model_store, pictures, tmp_path):
    models, paths = model_store("sd1")
    base, arguments = paths["folder"], BLOCKS | {"network_args": [DIMS, ALPHAS, "one_alpha=True"]}
    train(base, pictures, tmp_path / "plain", **BLOCKS)
    train(base, pictures, tmp_path / "one", **arguments, save_every_n_steps=2, save_state=True)
    plain, one = tmp_path / "plain" / "x.safetensors", tmp_path / "one" / "x.safetensors"
    assert_deltas(one, deltas(plain))
    assert wrong_in_diffusers(models, plain)
    assert wrong_in_diffusers(models, one) == set()
    with safe_open(one, "pt") as file:
        assert NOTE not in file.metadata()
    # States hold what is trained, not what is written: a resumed run ends with the same file, to the bit.
    resumed = train(base, pictures, tmp_path / "on", **arguments, resume=tmp_path / "one" / "x-step00000002-state")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in load_file(one).items())


def test_a_run_that_diffusers_will_misread_says_so_at_start_end_and_in_the_file(
    model_store, pictures, tmp_path, caplog
):
    caplog.set_level(logging.INFO)
    base, path, given = model_store("sd1")[1]["folder"], tmp_path / "x.safetensors", BLOCKS | {"max_train_steps": 1}
    train(base, pictures, tmp_path, **given)
    said = [record.levelno for record in caplog.records if "diffusers takes one alpha" in record.getMessage()]
    assert said == [logging.WARNING] * 2
    assert convert_lora.main(["--model", str(path), "--save_to", str(tmp_path / "y.safetensors")]) == 0
    for name, has_note in (("x", True), ("y", False)):
        with safe_open(tmp_path / f"{name}.safetensors", "pt") as file:
            assert (NOTE in file.metadata()) == has_note


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["one_alpha=1"]])
def test_a_dry_run_says_so(model_store, pictures, tmp_path, caplog, more):
    caplog.set_level(logging.INFO)
    given = BLOCKS | {"network_args": [DIMS, ALPHAS, *more], "dry_run": True}
    assert train_network.main(options(model_store("sd1")[1]["folder"], pictures, tmp_path, **given)) == 0
    assert ("diffusers takes one alpha" in caplog.text) == (not more)


def test_the_argument_is_refused_before_anything_is_loaded(pictures, tmp_path):
    with pytest.raises(UserError, match="one_alpha must be True or False, got 'yes please'"):
        train_network.main(options(tmp_path, pictures, tmp_path, network_args=["one_alpha=yes please"]))
