"""Files of LyCORIS act as their formulas say, in float64, at any strength, applied and merged; nothing is left out."""

from __future__ import annotations

import copy
import json
import sys
import types
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from drawing import differ, lora_of, same_pixels
from loras import outputs
from safetensors.torch import load_file, save_file

from library.config.generation import NetworksConfig
from library.config.model import ModelConfig
from library.config.network import NetworkConfig
from library.errors import UserError
from library.generation.embeddings import embeddings_of
from library.generation.networks import check_files
from library.models.base import find_base, load_base
from library.models.precision import types_of
from library.networks.applied import apply_file, attached
from library.networks.merging import merge_file
from library.networks.modules import find_module
from library.networks.views import CanonicalTextEncoder, models_for

CPU = torch.device("cpu")
LYCORIS = ["--network_module", "lycoris.kohya", "--network_weights"]
ATTENTION = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
CONVOLUTIONS = {"preset": "unet-convblock-only"}
# Rank 2, alpha 1 or 3: never the same, or alpha / rank could be left out or taken twice.
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"algo": "locon"},
    "convolutions": {"algo": "locon", **CONVOLUTIONS},
    "Tucker": {"algo": "locon", "use_tucker": "True", **CONVOLUTIONS},
    "scalar": {"algo": "locon", "use_scalar": "True"},
    "norms": {"algo": "locon", "train_norm": "True"},
    "LoHa": {"algo": "loha"},
    "LoHa of convolutions": {"algo": "loha", **CONVOLUTIONS},
    "LoKr": {"algo": "lokr", "factor": "4"},
    "LoKr of factors": {"algo": "lokr", "factor": "8", "decompose_both": "True"},
    "LoKr of convolutions": {"algo": "lokr", "factor": "4", **CONVOLUTIONS},
    "DoRA": {"algo": "locon", "dora_wd": "True"},
    "DoRA of LoHa": {"algo": "loha", "dora_wd": "True"},
    "DoRA of LoKr": {"algo": "lokr", "dora_wd": "True"},
    "full": {"algo": "full"},
    "OFT": {"algo": "diag-oft"},
    "GLoRA": {"algo": "glora"},
}
# Kinds that have something of all the others.
COMBINED = ("Tucker", "norms", "LoKr of factors", "DoRA of LoHa", "full", "OFT", "GLoRA")


@pytest.fixture(scope="module")
def lycoris():
    return pytest.importorskip("lycoris.kohya")


@pytest.fixture(scope="module")
def store(model_store, lycoris, tmp_path_factory):
    """Return kind -> file of LyCORIS over the tiny model, each made once."""
    models, _ = model_store("sd1")
    folder = tmp_path_factory.mktemp("lycoris")

    def get(kind: str) -> Path:
        path = folder / f"{kind.replace(' ', '-')}.safetensors"
        if not path.exists():
            make(lycoris, models, path, alpha=1.0 if len(kind) % 2 else 3.0, **KINDS[kind])
        return path

    return get


def make(lycoris: Any, models: Any, path: Path, alpha: float, **arguments: Any) -> None:
    """Write a file of lycoris with random numbers that act."""
    text, unet = CanonicalTextEncoder(copy.deepcopy(models["text_encoder"])), copy.deepcopy(models["unet"])
    torch.manual_seed(0)
    network = lycoris.create_network(1.0, 2, alpha, None, text, unet, **{"preset": "attn-mlp"} | arguments)
    network.apply_to(text, unet, True, True)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            # What has a value of its own, as magnitudes and whole weights have, is changed by a part of it.
            has_own = "dora_scale" in name or arguments["algo"] == "full"
            deviation = 0.3 if arguments["algo"] in ("loha", "lokr") else 0.1
            noise = torch.randn_like(parameter) * deviation
            parameter.copy_(parameter + 0.2 * noise.abs() * parameter if has_own else noise)
        network.save_weights(str(path), torch.float32, {})


@pytest.fixture
def base(model_store):
    path = model_store("sd1")[1]["folder"]
    return load_base(find_base(ModelConfig(pretrained_model_name_or_path=str(path))), types_of("no", no_half_vae=True))


def module_of(name: str = "lycoris.kohya", **arguments: str) -> Any:
    return find_module(NetworkConfig(network_module=name, network_args=arguments or None))


# ---- what the files mean ------------------------------------------------------------------------------------


def change(part: dict[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """Return the change of a weight in float64 by the published formulas, without magnitudes."""
    if "diff" in part:
        return part["diff"]
    if "w_norm" in part:
        return part["w_norm"]
    if "oft_blocks" in part:
        skew = part["oft_blocks"] - part["oft_blocks"].mT
        eye = torch.eye(skew.shape[1], dtype=skew.dtype)
        rotation = torch.block_diag(*((eye + skew) @ (eye - skew).inverse()).mT)
        return (rotation @ weight.flatten(1)).view_as(weight) - weight
    if "a1.weight" in part:
        flat = {name: tensor.flatten(1) for name, tensor in part.items() if tensor.ndim > 1}
        scale = part["alpha"] / len(flat["a2.weight"])
        whole = weight.flatten(1) @ flat["a1.weight"] @ flat["a2.weight"] + flat["b1.weight"] @ flat["b2.weight"]
        return (whole * scale).view_as(weight)
    if "lora_mid.weight" in part:
        up, mid, down = (part[f"lora_{name}.weight"] for name in ("up", "mid", "down"))
        whole = torch.einsum("oa,abhw,bi->oihw", up.flatten(1), mid, down.flatten(1))
        return whole * (part["alpha"] / len(down))
    if "hada_w1_a" in part:
        whole = (part["hada_w1_a"] @ part["hada_w1_b"]) * (part["hada_w2_a"] @ part["hada_w2_b"])
        return (whole * (part["alpha"] / len(part["hada_w1_b"]))).view_as(weight)
    if any(name.startswith("lokr_") for name in part):
        return kronecker(part, weight)
    up, down = part["lora_up.weight"].flatten(1), part["lora_down.weight"].flatten(1)
    return (up @ down * (part["alpha"] / len(down))).view_as(weight)


def kronecker(part: dict[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    rank = next((len(part[name]) for name in ("lokr_w1_b", "lokr_w2_b") if name in part), None)
    small = part["lokr_w1"] if "lokr_w1" in part else part["lokr_w1_a"] @ part["lokr_w1_b"]
    large = part["lokr_w2"] if "lokr_w2" in part else part["lokr_w2_a"] @ part["lokr_w2_b"]
    rows, columns = len(weight) // len(small), weight.shape[1] // small.shape[1]
    blocks = large.reshape(rows, columns, *weight.shape[2:])
    whole = torch.einsum("ac,bd...->abcd...", small, blocks).reshape(weight.shape)
    return whole if rank is None else whole * (part["alpha"] / rank)


def meant(models: dict[str, Any], strengths: dict[Path, float]) -> tuple[Any, Any]:
    """Return copies of text encoder and U-Net with the changes of files added to their weights."""
    text, unet = copy.deepcopy(models["text_encoder"]), copy.deepcopy(models["unet"])
    layers = {f"lora_unet_{name}".replace(".", "_"): layer for name, layer in unet.named_modules()}
    shim = CanonicalTextEncoder(text)
    layers |= {f"lora_te_{name}".replace(".", "_"): layer for name, layer in shim.named_modules()}
    plain = {name: tensor.detach().clone().double() for name, tensor in all_weights(layers)}
    for file, strength in strengths.items():
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in load_file(file).items():
            module, _, rest = name.partition(".")
            parts.setdefault(module, {})[rest] = tensor.double()
        for module, part in parts.items():
            weight, layer = plain[f"{module}.weight"], layers[module]
            delta = change(part, weight)
            if "dora_scale" in part:
                whole = weight + delta
                norms = whole.flatten(1).norm(dim=1).view(-1, *[1] * (whole.ndim - 1))
                delta = whole * (part["dora_scale"] / norms) - weight
            layer.weight.data += (strength * delta).float()
            for name in ("diff_b", "b_norm"):
                if name in part:
                    layer.bias.data += (strength * part[name]).float()
    return text, unet


def all_weights(layers: dict[str, torch.nn.Module]) -> Any:
    for name, layer in layers.items():
        weight = getattr(layer, "weight", None)
        if isinstance(weight, torch.Tensor):
            yield f"{name}.weight", weight


def assert_same(found: Any, expected: Any, plain: Any) -> None:
    """Hold that outputs are equal, and that they are not those without a network."""
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-4 * float(other.abs().max()))
    assert (found[1] - plain[1]).abs().max() > 0.01


@pytest.mark.repetitions(keep=3)
@pytest.mark.parametrize(
    "kind", [kind if kind in COMBINED else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_a_file_acts_as_its_formula_says_at_every_strength(kind, store, base, model_store):
    models, _ = model_store("sd1")
    path, plain = store(kind), outputs(models["text_encoder"], models["unet"])
    applied = apply_file(module_of(), path, base, 1.0, device=CPU)
    for strength in (1.0, -0.6):
        applied.set_multiplier(strength)
        found = outputs(base.texts[0].module, base.unet)
        assert_same(found, outputs(*meant(models, {path: strength})), plain)
    applied.set_multiplier(0.0)
    for one, other in zip(outputs(base.texts[0].module, base.unet), plain, strict=True):
        assert torch.equal(one, other)


@pytest.mark.repetitions(keep=3)
@pytest.mark.parametrize("kind", ["LoHa", "LoHa of convolutions", "LoKr", "LoKr of factors", "DoRA of LoHa", "full"])
def test_a_file_is_merged_as_its_formula_says(kind, store, base, model_store):
    models, _ = model_store("sd1")
    path = store(kind)
    merge_file(module_of(), path, 0.7, base)
    expected = outputs(*meant(models, {path: 0.7}))
    assert_same(outputs(base.texts[0].module, base.unet), expected, outputs(models["text_encoder"], models["unet"]))


@pytest.mark.parametrize(
    "kinds",
    [
        ("full", "LoHa"),
        ("DoRA", "LoKr"),
        *(
            pytest.param(kinds, marks=pytest.mark.slow)
            for kinds in (("LoHa", "full"), ("norms", "OFT"), ("full", "full"))
        ),
    ],
)
def test_changes_of_several_files_add_up(kinds, store, base, model_store, tmp_path):
    models, _ = model_store("sd1")
    paths = [store(kind) for kind in kinds]
    strengths = dict(zip(paths, (0.5, 1.0), strict=True)) if paths[0] != paths[1] else {paths[0]: 1.5}
    own = lora_of(models, tmp_path / "own.safetensors")
    for path, strength in zip(paths, (0.5, 1.0), strict=True):
        apply_file(module_of(), path, base, strength, device=CPU)
    apply_file(module_of("networks.lora"), own, base, 0.4, device=CPU)
    expected = outputs(*meant(models, strengths | {own: 0.4}))
    assert_same(outputs(base.texts[0].module, base.unet), expected, outputs(models["text_encoder"], models["unet"]))


# ---- the script ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["preset=full"], pytest.param(["preset=attn-mlp"], marks=pytest.mark.slow)])
def test_files_are_drawn_with_any_preset(draw, store, arguments):
    words = ["--prompt", "a cat", *LYCORIS, store("LoKr")]
    given = ["--network_args", *arguments] if arguments else []
    assert np.array_equal(draw(*words, *given)[0].pixels, draw(*words, "--network_mul", 1)[0].pixels)
    differ(draw(*words)[0].pixels, draw("--prompt", "a cat")[0].pixels)


def test_two_files_follow_the_strengths_of_each_prompt(draw, store, tmp_path):
    lines = ["a cat --am 0.7,0.4 --d 5", "a cat --am 0 --d 5", "a cat --am 0.7,0.4 --d 5", "a cat --am 0.7,0 --d 5"]
    (tmp_path / "p.txt").write_text("\n".join(lines), encoding="utf-8")
    modules = ["--network_module", "lycoris.kohya", "lycoris.kohya"]
    files = [store("LoHa"), store("DoRA")]
    shots = draw("--from_file", tmp_path / "p.txt", *modules, "--network_weights", *files)
    assert np.array_equal(shots[0].pixels, shots[2].pixels)
    same_pixels(shots[1].pixels, draw("--prompt", "a cat")[0].pixels)
    differ(shots[0].pixels, shots[1].pixels)
    (alone,) = draw("--prompt", "a cat", *LYCORIS, files[0], "--network_mul", 0.7)
    same_pixels(shots[3].pixels, alone.pixels)
    told = [network["strength"] for network in json.loads(shots[0].texts["generation"])["networks"]]
    assert told == [0.7, 0.4]


NAMES = {
    "without text_model": lambda name: name.replace("lora_te_text_model_", "lora_te_"),
    "numbered": lambda name: name.replace("lora_te_", "lora_te1_"),
    "both": lambda name: name.replace("lora_te_text_model_", "lora_te1_"),
}


@pytest.mark.repetitions(keep=1)
@pytest.mark.parametrize("how", NAMES)
def test_text_encoders_have_other_names_in_files_of_other_trainers(how, draw, store, tmp_path, caplog):
    renamed = {NAMES[how](name): tensor for name, tensor in load_file(store("LoHa")).items()}
    save_file(renamed, tmp_path / "other.safetensors")
    with caplog.at_level("WARNING"):
        (other,) = draw("--prompt", "a cat", *LYCORIS, tmp_path / "other.safetensors")
    assert np.array_equal(other.pixels, draw("--prompt", "a cat", *LYCORIS, store("LoHa"))[0].pixels)
    assert "does not take" not in caplog.text


@pytest.mark.repetitions(keep=2)
@pytest.mark.parametrize("kind", ["lora", "LoHa", "LoKr", "LoKr of factors", "GLoRA"])
def test_without_an_alpha_the_rank_is_meant(kind, store, base, model_store, tmp_path):
    weights = load_file(store(kind))
    bare = {name: tensor for name, tensor in weights.items() if not name.endswith(".alpha")}
    full = {name: torch.tensor(2.0) if name.endswith(".alpha") else tensor for name, tensor in weights.items()}
    save_file(bare, tmp_path / "bare.safetensors")
    save_file(full, tmp_path / "full.safetensors")
    models, _ = model_store("sd1")
    apply_file(module_of(), tmp_path / "bare.safetensors", base, 1.0, device=CPU)
    expected = outputs(*meant(models, {tmp_path / "full.safetensors": 1.0}))
    assert_same(outputs(base.texts[0].module, base.unet), expected, outputs(models["text_encoder"], models["unet"]))


# ---- nothing is left out in silence -------------------------------------------------------------------------


def write(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, path)
    return path


def test_tensors_that_a_module_does_not_take_are_told(draw, store, two, tmp_path, caplog):
    other = {
        f"{ATTENTION}.bias": torch.ones(3),
        "lora_unet_nowhere.w_norm": torch.ones(3),
        "lora_te_text_model_nowhere.lora_up.weight": torch.ones(2, 2),
    }
    path = write(tmp_path / "a.safetensors", load_file(store("LoKr")) | other)
    with caplog.at_level("WARNING"):
        draw("--prompt", "a cat", *LYCORIS, path)
    number = len(load_file(path))
    assert (
        f"a.safetensors: lycoris.kohya does not take 3 of {number} tensors (lora_te_text_model_nowhere" in caplog.text
    )


OF_NORMS = {f"lora_unet_conv_norm_out.{end}": torch.ones(32) for end in ("w_norm", "b_norm")}
OF_BIAS = {f"{ATTENTION}.bias": torch.ones(64)}
OF_SCALE = {f"{ATTENTION}.reference_scale": torch.ones(())}


@pytest.mark.parametrize(
    ("more", "how"), [(OF_NORMS, []), (OF_BIAS, ["--network_merge"]), (OF_SCALE, ["--network_pre_calc"])]
)
def test_tensors_beside_a_lora_are_told_once(draw, two, tmp_path, caplog, more, how):
    path = write(tmp_path / "a.safetensors", load_file(two[0][0]) | more)
    with caplog.at_level("WARNING"):
        draw("--prompt", "a cat", "--network_module", "networks.lora", "--network_weights", path, *how)
    said = [record.message for record in caplog.records if "does not draw" in record.message]
    assert len(said) == 1
    assert f"networks.lora does not draw {len(more)} of {len(load_file(path))} tensors ({min(more)}" in said[0]
    assert ("lycoris.kohya draws norms" in said[0]) == (more is OF_NORMS)


LAYER = {
    "lora_down.weight": torch.ones(2, 64) * 0.01,
    "lora_up.weight": torch.ones(64, 2) * 0.01,
    "alpha": torch.tensor(2.0),
}


def layer_of(module: str, **changed: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the tensors of a LoRA's module."""
    return {f"{module}.{end}": tensor.clone() for end, tensor in (LAYER | changed).items()}


UNKNOWN = [
    "lora_unet_down_blocks_0_motion_modules_0_temporal_transformer_proj_in",
    "lora_te2_text_model_encoder_layers_0_self_attn_q_proj",
    "lora_vae_encoder_mid_block_attentions_0_to_q",
    f"diffusion_model.{ATTENTION}",
]


@pytest.mark.parametrize("module", UNKNOWN)
@pytest.mark.parametrize("name", ["networks.lora", "networks.dylora"])
def test_modules_of_no_model_are_told_once(two, tmp_path, caplog, module, name):
    own = load_file(two[0][0])
    path = write(tmp_path / "a.safetensors", own | layer_of(module))
    number = len({tensor.partition(".")[0] for tensor in own})
    with caplog.at_level("WARNING"):
        check_files(NetworksConfig(network_module=(name,), network_weights=(path,)), ())
    told = f"{path}: 1 of {number + 1} modules are layers of no SD 1.x or 2.x model and are left out: {module}"
    assert [record.message for record in caplog.records] == [told]


@pytest.mark.parametrize("module", UNKNOWN[::2])
def test_a_file_of_unknown_modules_is_refused(tmp_path, module):
    path = write(tmp_path / "a.safetensors", layer_of(module))
    with pytest.raises(UserError, match="none of its 1 modules is a layer of SD 1.x"):
        check_files(NetworksConfig(network_module=("networks.lora",), network_weights=(path,)), ())


@pytest.mark.parametrize("how", [[], ["--network_merge"], ["--network_pre_calc"]])
def test_modules_that_the_model_lacks_are_told_once(draw, two, tmp_path, caplog, how):
    other = layer_of("lora_unet_conv_in") | layer_of(UNKNOWN[0])
    path = write(tmp_path / "a.safetensors", load_file(two[0][0]) | other)
    (tmp_path / "p.txt").write_text("a cat --am 1\na cat --am 0.5", encoding="utf-8")
    words = ["--network_module", "networks.lora", "--network_weights", path, "--steps", 1, *how]
    with caplog.at_level("WARNING"):
        draw("--from_file", tmp_path / "p.txt", *words)
    said = [record.message for record in caplog.records if "left out" in record.message]
    assert len(said) == 2
    assert f"left out: {UNKNOWN[0]}" in said[0]
    assert "modules used, 1 left out (such as lora_unet_conv_in)" in said[1]


DAMAGED = {
    "NaN": (layer_of(ATTENTION, **{"lora_up.weight": torch.full((64, 2), torch.nan)}), "lora_up.weight holds NaN"),
    "NaN beside": (layer_of(ATTENTION) | {"other.w_norm": torch.full((2,), torch.inf)}, "other.w_norm holds NaN"),
    "no dimensions": (layer_of(ATTENTION, **{"lora_up.weight": torch.ones(())}), "has the shape \\(\\), a matrix"),
    "a vector": ({f"{ATTENTION}.lokr_w1": torch.ones(4)}, "lokr_w1 has the shape \\(4,\\), a matrix is meant"),
    "twice": (
        layer_of("lora_te_text_model_encoder_layers_0_mlp_fc1")
        | layer_of("lora_te1_text_model_encoder_layers_0_mlp_fc1"),
        "has lora_te_text_model_encoder_layers_0_mlp_fc1.alpha twice \\(lora_te.*: save one adapter",
    ),
    "twice, without text_model": (
        layer_of("lora_te_text_model_encoder_layers_0_mlp_fc1") | layer_of("lora_te_encoder_layers_0_mlp_fc1"),
        "has lora_te_text_model_encoder_layers_0_mlp_fc1.alpha twice",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_files_of_foreign_modules_are_refused_before_models_are_loaded(tmp_path, damage):
    tensors, message = DAMAGED[damage]
    path = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(UserError, match=f"a.safetensors.*{message}"):
        check_files(NetworksConfig(network_module=("lycoris.kohya",), network_weights=(path,)), ())


@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "DoRA", "full", "OFT", "GLoRA"])
def test_the_module_that_draws_a_file_is_named(draw, store, kind):
    with pytest.raises(UserError, match="; --network_module lycoris.kohya draws what LyCORIS trained"):
        draw("--prompt", "a cat", "--network_module", "networks.lora", "--network_weights", store(kind))


PEFT = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
NOT_OF_LYCORIS = {
    "IA3": ({f"{ATTENTION}.weight": torch.ones(64), f"{ATTENTION}.on_input": torch.tensor(0)}, "is an IA3"),
    "LoKr of PEFT": ({f"{PEFT}.lokr_w1": torch.ones(4, 4), f"{PEFT}.lokr_w2": torch.ones(16, 16)}, "is a LoKr"),
    "DoRA of PEFT": (
        {
            f"{PEFT}.lora_A.weight": torch.ones(2, 64),
            f"{PEFT}.lora_B.weight": torch.ones(64, 2),
            f"{PEFT}.lora_magnitude_vector": torch.ones(64),
        },
        "is a DoRA",
    ),
    "LoHa of SimpleTuner": ({"lycoris_mid_block_attentions_0_proj_in.hada_w1_a": torch.ones(64, 2)}, "is a LoHa"),
}


@pytest.mark.parametrize("kind", NOT_OF_LYCORIS)
def test_no_module_is_named_for_files_that_it_does_not_draw(draw, lycoris, tmp_path, kind):
    tensors, message = NOT_OF_LYCORIS[kind]
    path = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(UserError, match=message) as error:
        check_files(NetworksConfig(network_module=("networks.lora",), network_weights=(path,)), ())
    assert "lycoris.kohya" not in str(error.value)
    with pytest.raises(UserError) as error:
        draw("--prompt", "a cat", *LYCORIS, path)
    assert "\n" not in str(error.value)
    assert "convert_lora" not in str(error.value)
    assert ("writes files of IA3, but reads none" in str(error.value)) is (kind == "IA3")


def test_cores_are_multiplied_in_by_the_module_of_the_suite(draw, store, tmp_path, caplog):
    edges = ("lora_unet_conv_in.", "lora_unet_conv_out.")  # networks.lora is over the blocks alone, as in sd-scripts
    inner = {name: tensor for name, tensor in load_file(store("Tucker")).items() if not name.startswith(edges)}
    (by_lycoris,) = draw("--prompt", "a cat", *LYCORIS, write(tmp_path / "inner.safetensors", inner))
    with caplog.at_level("WARNING"):
        (by_own,) = draw("--prompt", "a cat", "--network_module", "networks.lora", "--network_weights", store("Tucker"))
    same_pixels(by_own.pixels, by_lycoris.pixels)
    said = [record.message for record in caplog.records if "left out" in record.message]
    assert len(said) == 1
    assert "86 modules used, 2 left out (such as lora_unet_conv_in)" in said[0]


def test_a_file_of_which_nothing_is_taken_is_refused(draw, lycoris, tmp_path):
    stem = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    peft = {f"{stem}.lora_A.weight": torch.ones(2, 64), f"{stem}.lora_B.weight": torch.ones(64, 2)}
    with pytest.raises(UserError, match="takes none of its 2 tensors .*networks/convert_lora.py gives files of diff"):
        draw("--prompt", "a cat", *LYCORIS, write(tmp_path / "a.safetensors", peft))


def test_embeddings_in_a_network_file_are_words(draw, two, tmp_path, caplog):
    generator = torch.Generator().manual_seed(0)
    vectors = {word: torch.randn(count, 64, generator=generator) for word, count in (("zqx", 2), ("zqy", 1))}
    lora = load_file(two[0][0])
    bundled = {"bundle_emb.zqx.string_to_param.*": vectors["zqx"], "bundle_emb.zqy.clip_l": vectors["zqy"]}
    path = write(tmp_path / "a.safetensors", lora | bundled | {"bundle_emb.zqy.clip_g": torch.ones(1, 128)})
    assert {word: len(found[0]) for word, found in embeddings_of(path).items()} == {"zqx": 2, "zqy": 1}
    network = ["--network_module", "networks.lora", "--network_weights", path]
    prompt = ["--prompt", "a zqx cat zqy"]
    with caplog.at_level("WARNING"):
        draw(*prompt, *network)
    assert "a.safetensors holds embeddings, which are not used (zqx, zqy): name it in --textual" in caplog.text
    assert "does not draw" not in caplog.text
    caplog.clear()
    (found,) = draw(*prompt, *network, "--textual_inversion_embeddings", path)
    assert "holds embeddings" not in caplog.text
    alone = [write(tmp_path / f"{word}.safetensors", {"emb_params": tensor}) for word, tensor in vectors.items()]
    plain = ["--network_module", "networks.lora", "--network_weights", two[0][0]]
    (expected,) = draw(*prompt, *plain, "--textual_inversion_embeddings", *alone)
    assert np.array_equal(found.pixels, expected.pixels)
    with pytest.raises(UserError, match="the word 'zqx' is in the vocabulary: .*a.safetensors calls it so: leave one"):
        draw(*prompt, "--textual_inversion_embeddings", alone[0], path)


class Hooked:
    """A network that acts by a hook, with no strength; it has a tensor of the file."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {f"{ATTENTION}.alpha": torch.ones(())}

    def apply_to(self, text_encoder: Any, unet: Any, apply_text_encoder: bool, apply_unet: bool) -> None:
        unet.conv_out.register_forward_hook(lambda module, given, out: out)

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return []

    named_buffers = named_parameters

    def nothing(self, *args: Any) -> None:
        """Stand for what is called of a torch module."""

    load_state_dict = to = eval = requires_grad_ = nothing


class Failing(Hooked):
    """A network that takes a weight and replaces a forward, and then fails."""

    def apply_to(self, text_encoder: Any, unet: Any, apply_text_encoder: bool, apply_unet: bool) -> None:
        unet.conv_out._parameters["weight"] = None
        unet.conv_out.forward = unet.conv_in.forward = torch.nn.Identity().forward
        raise RuntimeError("a layer is missing")


def test_a_network_that_fails_leaves_the_models_as_they_were(base):
    unet = base.unet
    unet.conv_in.forward = before = unet.conv_in.forward  # as another network does
    weight, network = unet.conv_out.weight, cast("Any", Failing())
    with pytest.raises(RuntimeError, match="a layer is missing"):
        attached(network, models_for(base, is_foreign=True))
    assert unet.conv_out.weight is weight
    assert "forward" not in vars(unet.conv_out)
    assert vars(unet.conv_in)["forward"] is before


@pytest.mark.parametrize(
    ("made", "message"), [(None, "makes no network of"), (Hooked(), "has no strength \\(no set_multiplier\\)")]
)
def test_a_module_that_makes_nothing_of_use_is_told(base, two, monkeypatch, made, message):
    module = types.ModuleType("odd_network")
    vars(module)["create_network"] = lambda *args, **kwargs: made
    vars(module)["create_network_from_weights"] = lambda *args, **kwargs: (made, {})
    monkeypatch.setitem(sys.modules, "odd_network", module)
    with pytest.raises(UserError, match=message):
        apply_file(module_of("odd_network"), two[0][0], base, 1.0, device=CPU)
