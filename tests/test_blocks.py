"""Rates and ranks by block: which block a module is in, what each gets, and the examples of users' documents."""

from __future__ import annotations

import json
import math

import pytest
import torch
from runs import options, train
from safetensors import safe_open

import train_network
from library.adapters.blocks import SD, SDXL
from library.adapters.layers import block_of, layers_by_name
from library.errors import UserError
from library.models.family import FAMILIES
from library.training.charts.block_chart import BlockRow, count_blocks
from networks import lora
from networks.block_weights import name_blocks, read_lr_weights, read_plan

# Modules of each block of SD 1.x and 2.x: LierLa, C3Lier.
COUNTS = {
    **dict.fromkeys((0,), (0, 0)),
    **dict.fromkeys((1, 2), (12, 15)),
    **dict.fromkeys((3, 6, 9), (0, 1)),
    **dict.fromkeys((4, 7), (12, 16)),
    **dict.fromkeys((5, 8), (12, 15)),
    **dict.fromkeys((10, 11), (0, 3)),
    12: (12, 18),
    **dict.fromkeys((13, 14), (0, 4)),
    15: (0, 5),
    **dict.fromkeys((16, 17, 19, 20, 22, 23, 24), (12, 16)),
    **dict.fromkeys((18, 21), (12, 17)),
}
# Examples as they stand in users' documents.
BY_HAND = {
    "down_lr_weight": "0.5,0.5,0.5,0.5,1.0,1.0,1.0,1.0,1.5,1.5,1.5,1.5",
    "mid_lr_weight": "2.0",
    "up_lr_weight": "1.5,1.5,1.5,1.5,1.0,1.0,1.0,1.0,0.5,0.5,0.5,0.5",
}
BY_PRESET = {
    "block_lr_zero_threshold": "0.1",
    "down_lr_weight": "sine+.5",
    "mid_lr_weight": "1.5",
    "up_lr_weight": "cosine+.5",
}
DIMS = "2,4,4,4,8,8,8,8,12,12,12,12,16,12,12,12,12,8,8,8,8,4,4,4,2"
ALPHAS = "2,2,2,2,4,4,4,4,6,6,6,6,8,6,6,6,6,4,4,4,4,2,2,2,2"


@pytest.fixture(scope="module")
def models(model_store):
    return model_store("sd1")[0]


def network_of(models, dim=4, alpha=1.0, **arguments):
    return lora.create_network(1.0, dim, alpha, None, models["text_encoder"], models["unet"], **arguments)


def weights_of(arguments):
    plan = read_plan(arguments, None)
    assert plan is not None
    return plan.weights


def ranks_by_block(network, *, large=False):
    found: dict[int, set[tuple[int, float]]] = {}
    for module in network.unet_loras:
        is_large = module.is_conv and module.lora_down.kernel_size != (1, 1)
        if is_large == large:
            shape = (module.lora_dim, float(module.alpha))
            found.setdefault(SD.index_of(module.lora_name), set()).add(shape)
    return found


# ---- blocks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conv", [False, True])
def test_every_module_is_in_the_block_that_the_table_says(models, conv):
    network = network_of(models, **({"conv_dim": "4"} if conv else {}))
    rows = count_blocks(network.describe_unet(), SD)
    assert [row.count for row in rows] == [COUNTS[index][conv] for index in range(25)]
    assert SD.count == 25


def test_sdxl_has_its_place_with_23_blocks():
    assert SDXL.count == 23
    names = {
        "lora_unet_input_blocks_4_1_proj_in": 5,
        "lora_unet_middle_block_1_proj_in": 11,
        "lora_unet_output_blocks_8_0_x": 21,
    }
    assert {name: SDXL.index_of(name) for name in names} == names


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_all_names_of_a_layer_are_in_its_block(family):
    names = {name: layer for name, layer in layers_by_name(family).items() if name.startswith("lora_")}
    assert None not in {layer.block for layer in names.values()}
    assert {name: block_of(name) for name in names} == {name: layer.block for name, layer in names.items()}


def test_a_module_that_is_in_no_block_is_no_module_of_the_last_one():
    with pytest.raises(ValueError, match="lora_unet_time_embedding_linear_1 is in no block of SD"):
        SD.index_of("lora_unet_time_embedding_linear_1")


# ---- weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", [SD, SDXL], ids=["sd", "sdxl"])
def test_presets_are_their_formulas(table):
    count = table.lr_parts[0]
    last = count - 1
    sine = [math.sin(math.pi / 2 * i / last) for i in range(count)]
    linear = [i / last for i in range(count)]
    expected = {
        "sine": sine,
        "cosine": sine[::-1],
        "linear": linear,
        "reverse_linear": linear[::-1],
        "zeros": [0.0] * count,
        "cosine+.25": [value + 0.25 for value in sine[::-1]],
        "linear+-0.5": [value - 0.5 for value in linear],
    }
    for text, values in expected.items():
        assert read_lr_weights("down_lr_weight", text, [table])[count] == pytest.approx(values)
    assert read_lr_weights("up_lr_weight", "1,,2" + ",0" * (count - 3), [table])[count][:3] == [1.0, 0.0, 2.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"down_lr_weight": "0.5"},
            "down_lr_weight must be numbers, separated by commas: 12 for SD 1.x and 2.x, 9 for SDXL; or one of sine, .*"
            " got 1: '0.5'",
        ),
        ({"up_lr_weight": "1," * 12}, "got 13"),
        ({"down_lr_weight": "sinus"}, "or one of sine, cosine, linear, reverse_linear, zeros, .*got 'sinus'"),
        ({"down_lr_weight": "sine+x"}, "the offset of 'sine.x' must be a number, as in sine"),
        ({"mid_lr_weight": "1,2"}, "mid_lr_weight must be .*: 1 for SD 1.x and 2.x, 3 for SDXL; got 2: '1,2'"),
        ({"mid_lr_weight": "sine"}, "mid_lr_weight must be .*, 3 for SDXL; got 'sine'"),
        ({"block_lr_zero_threshold": "0.1"}, "block_lr_zero_threshold needs down_lr_weight"),
        ({"block_lr_zero_threshold": "x", "mid_lr_weight": "1"}, "block_lr_zero_threshold must be a number, got 'x'"),
        (
            {"block_dims": "4,4"},
            "block_dims must be whole numbers, none negative, .*: 25 for SD 1.x and 2.x, 23 for SDXL; got 2: '4,4'",
        ),
        ({"block_dims": "4.5" + ",4" * 24}, "block_dims must be whole numbers"),
        ({"block_dims": "-1" + ",4" * 24}, "block_dims must be whole numbers, none negative"),
        ({"block_alphas": "nan" + ",4" * 24}, "block_alphas must be numbers, none negative"),
        (
            {"block_dims": DIMS, "mid_lr_weight": "1,1,1", "up_lr_weight": "sine"},
            "the blocks of one model are needed, got mid_lr_weight for SDXL, block_dims for SD 1.x and 2.x$",
        ),
        ({"block_dims": "0" + ",0" * 24}, "every block has weight or rank 0"),
        (
            {"down_lr_weight": "zeros", "mid_lr_weight": "0", "up_lr_weight": "zeros"},
            "every block has weight or rank 0",
        ),
        ({"conv_block_alphas": ALPHAS}, "conv_block_alphas needs conv_block_dims or conv_dim"),
        ({"block_dim": DIMS}, "block_dim is not known; did you mean block_dims"),
    ],
)
def test_what_cannot_be_read_is_told_with_the_form_that_can(arguments, message):
    with pytest.raises(ValueError, match=message):
        lora.read_network_args(arguments, lora.LoraArgs)


def test_left_out_parts_weigh_1_and_small_weights_become_0():
    without_mid = {key: text for key, text in BY_PRESET.items() if key != "mid_lr_weight"}
    weights = weights_of(without_mid | {"block_lr_zero_threshold": "0.6"})
    assert weights[12] == 1.0
    assert weights[0] == 0.0  # 0.5
    assert weights[1] == pytest.approx(0.5 + math.sin(math.pi / 2 / 11))
    assert weights_of({"up_lr_weight": "-1" + ",1" * 11}) == [1.0] * 13 + [0.0] + [1.0] * 11


# ---- networks -----------------------------------------------------------------------------------------------


def test_ranks_and_alphas_go_by_block(models):
    network = network_of(models, dim=3, alpha=2.0, block_dims=DIMS, block_alphas=ALPHAS)
    dims, alphas = ([int(number) for number in text.split(",")] for text in (DIMS, ALPHAS))
    assert ranks_by_block(network) == {
        index: {(dims[index], float(alphas[index]))} for index in range(25) if COUNTS[index][0]
    }
    assert not ranks_by_block(network, large=True)
    assert {module.lora_dim for module in network.text_encoder_loras} == {3}


@pytest.mark.parametrize("given", [{"conv_block_dims": DIMS}, {"conv_block_dims": DIMS, "conv_block_alphas": ALPHAS}])
def test_conv_block_dims_alone_are_honoured(models, given):
    network = network_of(models, dim=3, alpha=2.0, **given)
    dims, alphas = ([int(number) for number in text.split(",")] for text in (DIMS, ALPHAS))
    found = ranks_by_block(network, large=True)
    for index, shapes in found.items():
        assert shapes == {(dims[index], float(alphas[index]) if "conv_block_alphas" in given else 1.0)}
    assert set(found) == set(range(1, 25))
    assert set().union(*ranks_by_block(network).values()) == {(3, 2.0)}


def test_a_block_of_weight_or_rank_0_has_no_modules(models):
    network = network_of(models, down_lr_weight="zeros", conv_dim="2")
    assert set(ranks_by_block(network)) | set(ranks_by_block(network, large=True)) == set(range(12, 25))
    network = network_of(models, block_dims="0," * 24 + "4")
    assert set(ranks_by_block(network)) == {24}


@pytest.mark.parametrize("given", [BY_HAND, BY_PRESET])
def test_each_rate_is_one_group_with_the_names_of_its_blocks(models, given):
    network = network_of(models, **given)
    groups, names = network.prepare_optimizer_params(1e-4, 1e-3, 1e-5)
    weights = weights_of(given)
    assert names[0] == "textencoder"
    rates = [group["lr"] for group in groups[1:]]
    assert len(set(rates)) == len(rates)
    seen = {}
    for group in groups[1:]:
        for parameter in group["params"]:
            seen[id(parameter)] = group["lr"]
    for module in network.unet_loras:
        expected = 1e-3 * weights[SD.index_of(module.lora_name)]
        assert seen[id(module.lora_down.weight)] == seen[id(module.lora_up.weight)] == pytest.approx(expected)
    with_modules: dict[float, list[int]] = {weight: [] for weight in weights if weight}
    for index, weight in enumerate(weights):
        if weight and COUNTS[index][0]:
            with_modules[weight].append(index)
    assert set(names[1:]) == {name_blocks(found) for found in with_modules.values() if found}


def test_lora_plus_splits_every_group(models):
    network = network_of(models, mid_lr_weight="2", loraplus_unet_lr_ratio="16")
    groups, names = network.prepare_optimizer_params(0.0, 1e-3, 1e-5)
    rates = {name: group["lr"] for name, group in zip(names, groups, strict=True)}
    assert sorted(rates.values()) == pytest.approx([1e-3, 2e-3, 16e-3, 32e-3])
    assert rates["unet_block12 plus"] == pytest.approx(32e-3)


def test_names_of_groups_are_short():
    assert name_blocks([7]) == "unet_block7"
    assert name_blocks([4, 1, 2, 3, 9, 11, 10]) == "unet_block1-4,9-11"


# ---- the command line ---------------------------------------------------------------------------------------


def arguments_of(given):
    return [f"{key}={value}" for key, value in given.items()]


@pytest.mark.repetitions(keep=1)
@pytest.mark.parametrize("given", [BY_HAND, BY_PRESET, {"block_dims": DIMS, "block_alphas": ALPHAS}])
def test_the_examples_train_from_the_command_line_and_from_a_file(base, pictures, tmp_path, given):
    one = train(base, pictures, tmp_path / "a", network_args=arguments_of(given), max_train_steps=2)
    path = tmp_path / "x.toml"
    path.write_text(f"network_args = {json.dumps(arguments_of(given))}\n", encoding="utf-8")
    other = train(base, pictures, tmp_path / "b", config_file=path, max_train_steps=2)
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    with safe_open(tmp_path / "a" / "x.safetensors", "pt") as file:
        written = json.loads(file.metadata()["ss_network_args"])
    assert {key: written[key] for key in given} == given
    lines = (tmp_path / "a" / "x-metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rates = {key: value for key, value in json.loads(lines[0]).items() if key.startswith("lr/unet")}
    assert len(rates) == len({w for i, w in enumerate(weights_of(given)) if COUNTS[i][0] and w > 0})


def test_a_block_of_double_rate_goes_double_as_far(base, pictures, tmp_path):
    """With SGD the first step is rate times gradient, and the gradient is the same."""
    more = {
        "optimizer_type": "SGD",
        "max_train_steps": 1,
        "learning_rate": "1.0",
        "max_grad_norm": 0,
        "text_encoder_lr": 0,
    }
    plain = train(base, pictures, tmp_path / "a", **more)
    weighted = train(base, pictures, tmp_path / "b", **more, network_args=["mid_lr_weight=2", "up_lr_weight=zeros+.5"])
    for name, tensor in weighted.items():
        if "lora_up" in name and name.startswith("lora_unet"):
            index = SD.index_of(name.split(".")[0])
            factor = 2.0 if index == 12 else 0.5 if index > 12 else 1.0
            torch.testing.assert_close(tensor, plain[name] * factor)


def test_a_wrong_count_ends_the_run_before_the_model_is_loaded(base, pictures, tmp_path, monkeypatch):
    from library.training import recipe

    monkeypatch.setattr(recipe, "open_base", lambda *args, **more: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match="block_dims must be whole numbers"):
        train_network.main(options(base, pictures, tmp_path, network_args=["block_dims=2,4"]))


def test_a_network_from_a_file_takes_rates_by_block_but_no_ranks(models):
    weights = network_of(models).state_dict()
    network, _ = lora.create_network_from_weights(
        1.0, None, None, models["text_encoder"], models["unet"], weights, mid_lr_weight="2"
    )
    _, names = network.prepare_optimizer_params(0.0, 1e-3, 1e-5)
    assert len(names) == 2
    with pytest.raises(ValueError, match="block_dims does not go with a network made from a file"):
        lora.create_network_from_weights(
            1.0, None, None, models["text_encoder"], models["unet"], weights, block_dims=DIMS
        )


def test_the_plan_without_arguments_is_none():
    assert read_plan({"block_dims": None}, None) is None


def test_the_dry_run_draws_the_blocks(base, pictures, tmp_path, monkeypatch):
    from library.training.rehearse import dry_run, memory

    drawn: list[tuple[list[BlockRow], float]] = []
    draw = dry_run.draw_blocks
    known = [memory.Stage("training", {"U-Net": 1})]
    monkeypatch.setattr(dry_run, "estimate_memory", lambda *args, **more: known)

    def drawing(blocks, table, rate):
        drawn.append((blocks, rate))
        return draw(blocks, table, rate)

    monkeypatch.setattr(dry_run, "draw_blocks", drawing)
    given = {"dry_run": True, "network_args": ["up_lr_weight=zeros", "mid_lr_weight=0.5"], "learning_rate": 2e-4}
    assert train_network.main(options(base, pictures, tmp_path, **given)) == 0
    ((blocks, rate),) = drawn
    assert [block.index for block in blocks if block.count] == [1, 2, 4, 5, 7, 8, 12]
    assert (rate, blocks[12].weight) == (2e-4, 0.5)
    assert (tmp_path / "x-blocks.png").read_bytes().startswith(b"\x89PNG")
