"""Networks over SDXL: names of files, rates of two text encoders, blocks, and what was trained in other programs."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import tiny
import torch
from loras import deltas
from runs import options, train
from safetensors.torch import load_file, save_file
from scripts import call
from sdxl_networks import assert_is, expected_state, make_network, read_sdxl, sgm_word, write_network
from tensors import assert_same, metadata
from tiny import load

import train_network
from library.adapters.blocks import SDXL as BLOCKS
from library.adapters.layers import diffusers_word, layers_of, module_name
from library.config.network import NetworkConfig
from library.config.optimizer import OptimizerConfig
from library.errors import UserError
from library.models import building
from library.models.checkpoint import UNET
from library.models.family import FAMILIES, SD1, SD2, SDXL
from library.networks.applied import apply_file
from library.networks.merging import merge_base_weights
from library.networks.modules import find_module
from library.networks.parts import split_by_encoder, trained_parts
from library.networks.trainable import build_network
from library.networks.views import canonical_names, unet_names
from networks import (
    check_lora_weights,
    convert_lora,
    extract_lora_from_dylora,
    extract_lora_from_models,
    lora,
    resize_lora,
    sdxl_merge_lora,
    svd_merge_lora,
)
from tools import dylora_report

CPU = torch.device("cpu")
# Modules of a published model by block: LierLa, C3Lier.
LIERLA = {5: 22, 6: 22, 8: 102, 9: 102, 11: 102, 13: 102, 14: 102, 15: 102, 16: 22, 17: 22, 18: 22}
C3LIER = {2: 3, 3: 3, 4: 1, 5: 26, 6: 25, 7: 1, 8: 106, 9: 105, 10: 3, 11: 102, 12: 3}
C3LIER |= {13: 106, 14: 106, 15: 107, 16: 26, 17: 26, 18: 27, 19: 4, 20: 4, 21: 4}
DIMS = "2,2,2,2,4,4,4,4,8,8,8,8,8,8,8,8,4,4,4,4,2,2,2"
EXAMPLES = [
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    "lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj",
    "lora_unet_output_blocks_2_1_proj_out",
    "lora_unet_input_blocks_3_0_op",
    "lora_unet_output_blocks_2_2_conv",
    "lora_unet_input_blocks_4_0_emb_layers_1",
    "lora_unet_output_blocks_8_0_skip_connection",
    "lora_te2_text_model_encoder_layers_31_mlp_fc2",
]


@pytest.fixture(scope="module")
def sdxl(model_store):
    return read_sdxl(*model_store("sdxl"))


@pytest.fixture
def base(sdxl):
    return load(sdxl.paths["safetensors"])


def models_of(sdxl):
    """Return copies of the text encoders and the U-Net."""
    return [copy.deepcopy(sdxl.models[part]) for part in ("text_encoder", "text_encoder_2")], copy.deepcopy(
        sdxl.models["unet"]
    )


@torch.no_grad()
def outputs(texts, unet):
    """Return the states of both text encoders, the pooled state, and what the U-Net makes of them."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 49406, (1, 77), generator=generator)
    tokens[0, -1] = 49407
    first, second = (text(tokens, output_hidden_states=True) for text in texts)
    hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    added = {"text_embeds": second.text_embeds, "time_ids": torch.tensor([[128.0, 64, 0, 0, 128, 64]])}
    latents = torch.randn(1, 4, 16, 8, generator=generator)
    return hidden, second.text_embeds, unet(latents, torch.tensor([500]), hidden, added_cond_kwargs=added).sample


def assert_equal(found, expected, plain, tolerance=1e-5):
    for one, other, without in zip(found, expected, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * max(1.0, float(other.abs().max())))
        assert (one - without).abs().max() > 100 * tolerance


# ---- names ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_size():
    """Return the text encoders and the U-Net of the published sizes, without memory."""
    texts = [building.build_text_encoder(text.config, has_projection=text.has_projection) for text in SDXL.text_models]
    return texts, building.build_unet(SDXL.unet)


@pytest.mark.parametrize(("args", "counts"), [({}, LIERLA), ({"conv_dim": "1"}, C3LIER)])
def test_modules_have_the_names_and_the_numbers_of_sd_scripts(full_size, args, counts):
    network = lora.create_network(1.0, 1, None, None, *full_size, **args)
    names = [module.lora_name for module in network.modules_in_order()]
    assert len(network.unet_loras) == sum(counts.values()) == (788 if args else 722)
    assert [sum(name.startswith(f"lora_te{n}_text_model_") for name in names) for n in (1, 2)] == [72, 192]
    assert set(names) <= {module_name(layer, SDXL) for layer in layers_of(SDXL)}
    assert set(EXAMPLES[:3]) <= set(names)
    assert set(EXAMPLES) <= set(names) or not args
    found = [BLOCKS.index_of(module.lora_name) for module in network.unet_loras]
    assert {index: found.count(index) for index in sorted(set(found))} == counts


def test_both_rules_for_the_names_of_the_unet_are_one(base):
    """networks/lora.py stands alone, so it has the rule, too."""
    layers = [layer for layer in layers_of(SDXL) if layer.part == UNET and "block" in layer.path]
    layers = [layer for layer in layers if "blocks.2." not in layer.path or "samplers" not in layer.path]
    words = {diffusers_word(layer, SDXL): module_name(layer, SDXL) for layer in layers}
    assert len(words) > 788
    assert {word: lora.sgm_name(word) for word in words} == words
    assert {name: lora.sgm_name(name) for name in words.values()} == {name: name for name in words.values()}
    leaves = {
        f"lora_unet_{path}".replace(".", "_") for path, layer in base.unet.named_modules() if hasattr(layer, "weight")
    }
    theirs = {word: name for word, name in unet_names(base).items() if word in leaves and "block" in word}
    assert {word: lora.sgm_name(word) for word in theirs} == theirs
    assert sum("norm" in word for word in theirs) > 30


@pytest.mark.parametrize("family", [SD1, SD2])
def test_other_families_keep_the_names_of_diffusers(family):
    network = lora.create_network(1.0, 1, None, None, None, building.build_unet(tiny.unet_config(family)))
    assert "lora_unet_mid_block_attentions_0_proj_in" in {module.lora_name for module in network.unet_loras}


@pytest.fixture
def file(sdxl, tmp_path):
    """Return a file over every layer that can have a module, and its network."""
    network = {
        (part, path): change
        for (part, path), change in make_network(sdxl).items()
        if part != "unet" or any(word in path for word in ("attentions", "resnets", "samplers"))
    }
    return write_network(sdxl, network, tmp_path / "sgm.safetensors", "sgm"), network


def renamings(sdxl, tmp_path, file):
    """Yield files of the same network: in the words of diffusers, and in both without `text_model`."""
    path, network = file
    words = write_network(sdxl, network, tmp_path / "words.safetensors", "diffusers")
    yield words
    half = {name: tensor for name, tensor in load_file(path).items() if "output_blocks" in name}
    half |= {name: tensor for name, tensor in load_file(words).items() if "up_blocks" not in name}
    half = {name.replace("_text_model_", "_"): tensor for name, tensor in half.items()}
    save_file(half, tmp_path / "half.safetensors")
    yield tmp_path / "half.safetensors"


def test_every_naming_is_read_and_applied_equals_merged(sdxl, base, file, tmp_path, caplog):
    path, network = file
    merged = tmp_path / "merged.safetensors"
    call(sdxl_merge_lora, "--sd_model", sdxl.paths["safetensors"], "--save_to", merged, "--models", path,
         "--ratios", 0.7)  # fmt: skip
    assert_is(load_file(merged), expected_state(sdxl, [(network, lambda key: 0.7)]), sdxl.state)
    whole = load(merged)
    expected, plain = outputs(whole.text_modules, whole.unet), outputs(*models_of(sdxl))
    caplog.clear()
    renamed = list(renamings(sdxl, tmp_path, file))
    for one in (path, *renamed):
        texts, unet = models_of(sdxl)
        made, weights = lora.create_network_from_weights(0.7, one, None, texts, unet)
        made.apply_to(texts, unet)
        made.load_state_dict(weights)
        assert_equal(outputs(texts, unet), expected, plain)
        assert made.load_weights(one) == f"{len(network)} modules loaded"
        assert canonical_names(load_file(one), whole).keys() == load_file(path).keys()
    config = NetworkConfig(network_module="networks.lora", base_weights=(renamed[0],), base_weights_multiplier=(0.7,))
    merge_base_weights(config, base)
    assert_equal(outputs(base.text_modules, base.unet), expected, plain)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_module_under_both_namings_is_an_error(sdxl, base, file, tmp_path):
    path, _ = file
    words = load_file(next(renamings(sdxl, tmp_path, file)))
    twice = load_file(path) | {name: tensor for name, tensor in words.items() if "mid_block_attentions" in name}
    save_file(twice, tmp_path / "twice.safetensors")
    with pytest.raises(ValueError, match=r"has lora_unet_middle_block_1_\S+ twice \(\S+ and \S+\): save one adapter"):
        lora.create_network_from_weights(1.0, tmp_path / "twice.safetensors", None, *models_of(sdxl))
    with pytest.raises(UserError, match=r"twice.safetensors has \S+ twice"):
        canonical_names(twice, base, tmp_path / "twice.safetensors")


# ---- text encoders ----------------------------------------------------------------------------------------------


def built(base, module="networks.lora", **options: Any):
    rates = options.pop("text_encoder_lr", None)
    config = NetworkConfig(network_module=module, network_dim=2, **options)
    optimizer = OptimizerConfig(learning_rate=1e-3, unet_lr=4e-3, text_encoder_lr=rates)
    network = build_network(config, optimizer, base, checkpointing=False, device=CPU)
    groups, _ = network.groups(optimizer)
    rate_of = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    found: dict[str, set[float]] = {}
    for name, parameter in network.network.named_parameters():
        found.setdefault(name.split("_")[1], set()).add(round(rate_of[id(parameter)], 9))
    return network, found


ONE_EACH = {"te1": {1e-3}, "te2": {1e-3}, "unet": {4e-3}}
RATES = {
    None: ONE_EACH,
    (2e-3,): ONE_EACH | {"te1": {2e-3}, "te2": {2e-3}},
    (2e-3, 5e-4): ONE_EACH | {"te1": {2e-3}, "te2": {5e-4}},
    (2e-3, 0.0): {"te1": {2e-3}, "unet": {4e-3}},
    (0.0, 2e-3): {"te2": {2e-3}, "unet": {4e-3}},
    (0.0,): {"unet": {4e-3}},
}


RATE_CASES = [("networks.lora", rates) for rates in RATES] + [
    ("lycoris.kohya", rates) for rates in ((2e-3, 5e-4), (0.0, 2e-3))
]


@pytest.mark.repetitions(keep=3)
@pytest.mark.parametrize(("module", "rates"), RATE_CASES)
def test_each_text_encoder_has_its_rate_and_none_at_0(base, module, rates):
    expected = RATES[rates]
    args = {}
    if module == "lycoris.kohya":
        pytest.importorskip(module)
        args = {"preset": "attn-mlp"}
    network, found = built(base, module, text_encoder_lr=rates, network_args=args)
    assert found == expected
    assert network.trains_text_encoder is ("te1" in expected or "te2" in expected)


def test_a_foreign_network_that_does_not_tell_encoders_apart_has_one_rate(caplog):
    network: Any = torch.nn.Linear(2, 2)
    groups: list[dict[str, Any]] = [{"params": [network.weight], "lr": 2e-3}, {"params": [network.bias]}]
    assert split_by_encoder(groups, ["a", "b"], (2e-3, 5e-4), network) == (groups, ["a", "b"])
    assert "takes one rate for all text encoders: 0.002" in caplog.text
    caplog.clear()
    network = torch.nn.ModuleDict({"lora_te1_x": torch.nn.Linear(1, 1), "lora_te2_x": torch.nn.Linear(1, 1)})
    split, names = split_by_encoder([{"params": list(network.parameters()), "lr": 5e-4}], None, (1e-3, 5e-4), network)
    assert [(group["lr"], len(group["params"])) for group in split] == [(5e-4, 2), (2.5e-4, 2)]
    assert names is None
    assert not caplog.text


def test_lora_plus_goes_with_a_rate_for_each_encoder(base):
    args = {"loraplus_lr_ratio": "4", "loraplus_text_encoder_lr_ratio": "2"}
    found = built(base, text_encoder_lr=(2e-3, 5e-4), network_args=args)[1]
    assert found == {"te1": {2e-3, 4e-3}, "te2": {5e-4, 1e-3}, "unet": {4e-3, 16e-3}}


def test_parts_that_are_not_trained():
    both = NetworkConfig(network_module="networks.lora")
    some = OptimizerConfig(learning_rate=1e-3, unet_lr=0.0, text_encoder_lr=(0.0, 1e-4))
    assert trained_parts(both, some, 2).texts == (False, True)
    assert trained_parts(both, some, 2).left_out == [0]
    with pytest.raises(UserError, match="nothing is trained"):  # the second rate is for a second encoder
        trained_parts(both, some, 1)


# ---- blocks -----------------------------------------------------------------------------------------------------


def test_ranks_and_rates_go_by_23_blocks(sdxl):
    args: dict[str, Any] = {"block_dims": DIMS, "down_lr_weight": "0,0,0,0,0.5,0.5,0,1,1", "mid_lr_weight": "1,2,1"}
    texts, unet = models_of(sdxl)
    network = lora.create_network(1.0, 4, 1.0, None, texts, unet, conv_dim="3", **args)
    dims = [int(number) for number in DIMS.split(",")]
    weights = {5: 0.5, 6: 0.5, 8: 1.0, 9: 1.0, 10: 1.0, 11: 2.0} | dict.fromkeys(range(12, 22), 1.0)
    found = set()
    for name, rank, weight in network.describe_unet():
        index = BLOCKS.index_of(name)
        assert weight == weights[index]
        assert rank in (3, dims[index])
        found.add((index, rank))
    assert {index for index, _ in found} == set(weights)
    assert {(5, 4), (8, 8), (16, 4), (5, 3)} <= found
    for module in (module for module in network.unet_loras if not module.is_conv):
        assert module.lora_dim == dims[BLOCKS.index_of(module.lora_name)]


@pytest.mark.parametrize("number", [23, 25])
def test_numbers_for_another_model_end_the_run_before_it_is_loaded(
    model_store, pictures, tmp_path, monkeypatch, number
):
    from library.training import recipe

    name, other = ("sd1", 25) if number == 23 else ("sdxl", 23)
    monkeypatch.setattr(recipe, "open_base", lambda *args, **more: pytest.fail("the model was loaded"))
    args = options(
        model_store(name)[1]["folder"], pictures, tmp_path, network_args=["block_dims=" + ",".join("4" * number)]
    )
    with pytest.raises(
        UserError, match=rf"block_dims must be .*: {other} for {'SD 1' if other == 25 else 'SDXL'}.*; got {number}"
    ):
        train_network.main(args)


# ---- trained files ----------------------------------------------------------------------------------------------

SHORT: dict[str, Any] = {"resolution": "64", "enable_bucket": None, "min_bucket_reso": None, "max_bucket_reso": None}
SHORT |= {"bucket_no_upscale": None, "max_train_steps": 2, "cache_latents": True}


@pytest.fixture(scope="module")
def trained(sdxl, tmp_path_factory):
    """Return what trains on SDXL for two steps."""
    import numpy as np
    from PIL import Image

    root = tmp_path_factory.mktemp("trained")
    folder = root / "train" / "1_x"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    for index, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a dog, tag{index}", encoding="utf-8")

    def run(name, **more):
        weights = train(sdxl.paths["safetensors"], folder.parent, root / name, **SHORT | more)
        return root / name / "x.safetensors", weights

    return run


@pytest.fixture(scope="module")
def lora_file(trained):
    """Return a file with modules over linear layers and convolutions, trained with most of what there is."""
    more = {"network_args": ["conv_dim=3", "conv_alpha=2", "loraplus_lr_ratio=2"], "network_dim": 3, "network_alpha": 2}
    return trained("lora", **more, text_encoder_lr=["1e-2", "2e-2"], scale_weight_norms=0.1)


def test_a_trained_file_is_loaded_by_diffusers_with_the_same_outputs(sdxl, lora_file):
    """By its own reader, which makes layers of PEFT of it."""
    import diffusers

    path, weights = lora_file
    texts, unet = models_of(sdxl)
    network, tensors = lora.create_network_from_weights(1.0, path, None, texts, unet)
    network.apply_to(texts, unet)
    network.load_state_dict(tensors)
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(sdxl.paths["folder"], local_files_only=True)
    plain = outputs([pipe.text_encoder, pipe.text_encoder_2], pipe.unet)
    pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    kinds = {type(layer).__module__.split(".")[0] for layer in pipe.unet.modules()}
    assert "peft" in kinds
    assert_equal(outputs([pipe.text_encoder, pipe.text_encoder_2], pipe.unet), outputs(texts, unet), plain)
    assert len({name.split(".")[0] for name in weights}) == len(network.modules_in_order())


def test_only_what_takes_part_learns_and_norms_are_kept(lora_file):
    """The U-Net has the states before the last layer of the first encoder: modules there stay as they began."""
    path, weights = lora_file
    still = {name.split(".")[0] for name, tensor in weights.items() if "lora_up" in name and not tensor.any()}
    assert still == {f"lora_te1_text_model_encoder_layers_2_{layer}" for layer in (
        "mlp_fc1", "mlp_fc2", "self_attn_k_proj", "self_attn_out_proj", "self_attn_q_proj", "self_attn_v_proj"
    )}  # fmt: skip
    norms = [float(delta.norm()) for delta in deltas(path).values()]
    assert max(norms) == pytest.approx(0.1, rel=1e-4)
    assert metadata(path)["ss_base_model_version"] == "sdxl_base_v1-0"
    assert json.loads(metadata(path)["ss_network_args"])["conv_dim"] == "3"


@pytest.mark.parametrize("rates", [(1e-3,), (0.0, 1e-3)])
def test_a_training_goes_on_from_the_other_naming(base, lora_file, tmp_path, caplog, rates):
    path, weights = lora_file
    words = tmp_path / "words.safetensors"
    call(convert_lora, "--model", path, "--save_to", words, "--to", "kohya_diffusers")
    assert any("up_blocks" in name for name in load_file(words))
    caplog.clear()
    network, _ = built(base, text_encoder_lr=rates, network_weights=words, dim_from_weights=True)
    assert_same(network.network.state_dict(), {
        name: tensor for name, tensor in weights.items() if rates[0] or "_te1_" not in name
    })  # fmt: skip
    told = [record.message for record in caplog.records if "is not trained" in record.message]
    assert len(told) == (rates[0] == 0)


@pytest.mark.slow
def test_the_tools_take_a_trained_file(sdxl, lora_file, tmp_path, capsys):
    path, _ = lora_file
    expected = deltas(path)
    modules = len(expected)
    call(svd_merge_lora, "--models", path, path, "--ratios", 0.5, 0.5, "--new_rank", 3, "--new_conv_rank", 3,
         "--save_to", tmp_path / "svd.safetensors")  # fmt: skip
    call(resize_lora, "--model", path, "--new_rank", 3, "--save_to", tmp_path / "resized.safetensors")
    merged = tmp_path / "merged.safetensors"
    call(sdxl_merge_lora, "--sd_model", sdxl.paths["safetensors"], "--save_to", merged, "--models", path,
         "--ratios", 1.0)  # fmt: skip
    call(extract_lora_from_models, "--model_org", sdxl.paths["safetensors"], "--model_tuned", merged, "--dim", 3,
         "--conv_dim", 3, "--min_diff", 0, "--save_to", tmp_path / "extracted.safetensors")  # fmt: skip
    peft = tmp_path / "peft.safetensors"
    call(convert_lora, "--model", path, "--save_to", peft, "--to", "diffusers", "--keep_alpha")
    call(convert_lora, "--model", peft, "--save_to", tmp_path / "back.safetensors")
    for name, tolerance in (("svd", 1e-5), ("resized", 1e-5), ("extracted", 1e-3), ("back", 1e-6)):
        found = deltas(tmp_path / f"{name}.safetensors")
        assert len(found) <= modules
        for module, delta in expected.items():
            if float(delta.norm()) > 0:
                assert (found[module] - delta).norm() < tolerance * delta.norm(), (name, module)
    capsys.readouterr()
    call(check_lora_weights, path)
    told = capsys.readouterr().out
    assert "SDXL" in told
    assert f"({3 * modules} tensors)" in told


@pytest.fixture(scope="module")
def dylora_file(trained):
    args = ["unit=2", "conv_dim=4"]
    return trained("dylora", network_module="networks.dylora", network_dim=4, network_args=args)


def test_the_ranks_of_a_dylora_are_extracted(dylora_file, tmp_path):
    path, weights = dylora_file
    call(extract_lora_from_dylora, "--model", path, "--save_to", tmp_path / "r.safetensors")
    part = load_file(tmp_path / "r-0002.safetensors")
    assert part.keys() == weights.keys()
    name = "lora_unet_middle_block_1_transformer_blocks_2_attn2_to_k.lora_down.weight"
    assert torch.equal(part[name], weights[name][:2])


@pytest.mark.slow
def test_the_ranks_of_a_dylora_are_reported(sdxl, dylora_file, tmp_path):
    path, _ = dylora_file
    call(dylora_report, "--model", path, "--pretrained_model_name_or_path", sdxl.paths["safetensors"],
         "--train_data_dir", path.parents[1] / "train", "--resolution", 64, "--caption_extension", ".txt",
         "--timesteps", 1, "--save_to", tmp_path / "r")  # fmt: skip
    report = json.loads((tmp_path / "r-report.json").read_text(encoding="utf-8"))
    assert "rank 4" in json.dumps(report)


# ---- lycoris ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lycoris_file(trained):
    pytest.importorskip("lycoris.kohya")
    args = ["algo=locon", "preset=full", "conv_dim=2", "conv_alpha=1", "train_norm=True"]
    return trained("lycoris", network_module="lycoris.kohya", network_dim=2, network_args=args)


def test_lycoris_writes_the_names_of_sd_scripts(sdxl, lycoris_file):
    """Over every layer that the suite's own networks take, and over norms; its default preset works here."""
    _, weights = lycoris_file
    texts, unet = models_of(sdxl)
    ours = {module.lora_name for module in lora.create_network(1.0, 1, 1, None, texts, unet, conv_dim="1").children()}
    loras = {name.split(".")[0] for name in weights if "lora_up" in name}
    norms = {name.split(".")[0] for name in weights if "w_norm" in name}
    assert loras == ours
    assert "lora_unet_input_blocks_1_0_in_layers_0" in norms
    assert "lora_unet_middle_block_1_transformer_blocks_0_norm1" in norms
    places = {sgm_word(sdxl, *key) for key in sdxl.places if key[0] == "unet"}
    assert {name for name in loras if "_unet_" in name} <= places


@pytest.mark.slow
def test_lycoris_files_of_both_namings_are_drawn_and_gone_on_from(sdxl, trained, lycoris_file, tmp_path, base):
    path, weights = lycoris_file
    plain = outputs(base.text_modules, base.unet)
    back = {new: old for old, new in unet_names(base).items()}
    words = {f"{back.get(module, module)}.{rest}": tensor
             for (module, _, rest), tensor in ((name.partition("."), tensor) for name, tensor in weights.items())}  # fmt: skip
    assert any("down_blocks_1_resnets_0_norm1.w_norm" in name for name in words)
    save_file(words, tmp_path / "words.safetensors")
    module = find_module(NetworkConfig(network_module="lycoris.kohya"))
    found = []
    for file in (path, tmp_path / "words.safetensors"):
        whole = load(sdxl.paths["safetensors"])
        apply_file(module, file, whole, 1.0, device=CPU)
        found.append(outputs(whole.text_modules, whole.unet))
    for one, other, without in zip(*found, plain, strict=True):
        assert torch.equal(one, other)
        assert not torch.equal(one, without)
    args = json.loads(metadata(path)["ss_network_args"])
    again = built(base, "lycoris.kohya", network_args=args, network_weights=tmp_path / "words.safetensors")[0]
    assert_same({name: tensor for name, tensor in again.state_dict().items() if name in weights}, weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_names_of_a_family_are_a_fact_of_it(family):
    layer = next(layer for layer in layers_of(family) if layer.path == "mid_block.attentions.0.proj_in")
    assert ("middle_block" in module_name(layer, family)) is family.has_checkpoint_paths
