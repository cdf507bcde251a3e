"""LoRA files of every trainer: read with the change that they mean, or refused by name; nothing is dropped in silence."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from drawing import pipe_of
from loras import deltas, make_lora
from safetensors.torch import load_file, save_file
from scripts import call
from tensors import Tensors
from tiny import original_names

from library.adapters.lora_file import read_lora
from library.errors import UserError
from library.models import layout
from library.models.family import FAMILIES, SD1, SD2, SDXL
from networks import (
    convert_lora,
    extract_lora_from_dylora,
    extract_lora_from_models,
    lora,
    merge_lora,
    resize_lora,
    svd_merge_lora,
)

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
QUERY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


def convert(source: Path, *argv: object) -> Path:
    target = source.with_name("converted.safetensors")
    call(convert_lora, "--model", source, "--save_to", target, *argv)
    return target


def assert_same(found: Tensors, expected: Tensors, tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for module, delta in expected.items():
        assert (found[module] - delta.double().flatten(1)).norm() <= tolerance * delta.double().norm(), module


def written(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def pair(rank: int = 2, rows: int = 96, columns: int = 96, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)


def kohya(module: str, down: torch.Tensor, up: torch.Tensor, alpha: float | None = None) -> dict[str, torch.Tensor]:
    alphas = {} if alpha is None else {f"{module}.alpha": torch.tensor(alpha)}
    return {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up} | alphas


def by_module(tensors: Tensors) -> dict[str, dict[str, torch.Tensor]]:
    """Return module -> ending -> tensor of a file in the names of sd-scripts."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, ending = name.partition(".")
        found.setdefault(module, {})[ending] = tensor
    return found


# ---- PEFT and diffusers ------------------------------------------------------------------------------------------


def peft_model(model: torch.nn.Module, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    return get_peft_model(copy.deepcopy(model), LoraConfig(init_lora_weights=False, **options))


def peft_deltas(model: Any, prefix: str, start: str = "base_model.model.") -> dict[str, torch.Tensor]:
    return {
        prefix + name.removeprefix(start).replace(".", "_"): layer.get_delta_weight("default").detach()
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


PEFT_OPTIONS: tuple[dict[str, Any], ...] = (
    {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION},
    {"r": 4, "lora_alpha": 6, "target_modules": [*ATTENTION, "conv1"], "rank_pattern": {"to_q": 2, "conv1": 3}},
    {"r": 4, "lora_alpha": 4, "target_modules": ATTENTION, "use_rslora": True, "alpha_pattern": {"attn2.to_k": 9}},
)


@pytest.mark.parametrize("options", PEFT_OPTIONS)
def test_an_adapter_of_peft_has_the_change_of_peft(model_store, tmp_path, options):
    models, _ = model_store("sd1")
    model = peft_model(models["unet"], **options)
    model.save_pretrained(tmp_path)
    found = deltas(convert(tmp_path / "adapter_model.safetensors"))
    expected = peft_deltas(model, "lora_unet_")
    assert len(found) >= 128
    assert_same(found, expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers for it
def test_an_adapter_of_a_text_encoder_is_merged_where_it_belongs(model_store, tmp_path):
    models, paths = model_store("sd1")
    model = peft_model(models["text_encoder"], r=3, lora_alpha=5, target_modules=["q_proj", "fc2"])
    model.save_pretrained(tmp_path)
    file, out = tmp_path / "adapter_model.safetensors", tmp_path / "merged.safetensors"
    call(merge_lora, "--sd_model", paths["safetensors"], "--models", file, "--ratios", 0.5, "--save_to", out)
    before, after = load_file(paths["safetensors"]), load_file(out)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {name.partition("encoder_")[2]: delta for name, delta in peft_deltas(model, "").items()}
    assert len(changed) == len(expected) == 6
    for name in changed:
        delta = expected[name.partition("encoder.")[2].removesuffix(".weight").replace(".", "_")].double()
        torch.testing.assert_close(after[name].double(), before[name].double() + 0.5 * delta, rtol=1e-5, atol=1e-5)


def test_an_adapter_of_the_second_text_encoder_is_known_by_its_width(tmp_path):
    down, up = pair(2, 1280, 1280)
    module = "base_model.model.text_model.encoder.layers.30.self_attn.q_proj"
    file = written(
        tmp_path / "adapter_model.safetensors", {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    )
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 2}', encoding="utf-8")
    assert deltas(convert(file)).keys() == {"lora_te2_text_model_encoder_layers_30_self_attn_q_proj"}


CONFIGS = [
    (None, "whose alphas are in adapter_config.json: put that file beside it"),
    ('{"peft_type": "LOHA", "alpha": 1}', "peft_type is LOHA"),
    ('{"peft_type": "LORA", "lora_alpha": 1, "use_dora": true}', "use_dora is set"),
    ('{"peft_type": "LORA", "lora_alpha": 1, "init_lora_weights": "pissa_niter_4"}', "changes the base model, too"),
    ('{"peft_type": "LORA", "lora_alpha": "much"}', "the alphas cannot be read"),
    ('{"peft_type": "LORA", "lora_alpha": 1, "alpha_pattern": {"(": 1}}', "the alphas cannot be read"),
    ("[]", "is no JSON object"),
    ("<html>", "is no JSON object"),
]


@pytest.mark.parametrize(("config", "reason"), CONFIGS)
def test_an_adapter_of_peft_that_is_no_plain_lora_is_refused(tmp_path, config, reason):
    down, up = pair()
    module = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    file = written(
        tmp_path / "adapter_model.safetensors", {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    )
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(config, encoding="utf-8")
    with pytest.raises(UserError, match=reason):
        convert(file)


def test_a_unet_that_diffusers_saved_alone_is_read_with_its_alphas(model_store, tmp_path):
    from peft import LoraConfig

    unet = copy.deepcopy(model_store("sd1")[0]["unet"])
    torch.manual_seed(2)
    options = LoraConfig(r=4, lora_alpha=6, target_modules=[*ATTENTION, "proj_in"], init_lora_weights=False)
    options.alpha_pattern = {"to_k": 2, r"down_blocks\.0\..*\.to_v": 16}
    unet.add_adapter(options)
    unet.save_lora_adapter(tmp_path)
    found = deltas(convert(tmp_path / "pytorch_lora_weights.safetensors"))
    assert_same(found, peft_deltas(unet, "lora_unet_"))


def test_what_diffusers_writes_for_web_uis_is_read(model_store, tmp_path):
    from diffusers.utils import convert_state_dict_to_kohya
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    models, _ = model_store("sd1")
    state: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {}
    for part, targets, prefix in (
        ("unet", ATTENTION, "lora_unet_"),
        ("text_encoder", ["q_proj", "fc1"], "lora_te_text_model_"),
    ):
        model = copy.deepcopy(models[part])
        torch.manual_seed(3)
        model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False))
        state |= {f"{part}.{name}": tensor for name, tensor in get_peft_model_state_dict(model).items()}
        expected |= peft_deltas(model, prefix)
    file = written(tmp_path / "web.safetensors", convert_state_dict_to_kohya(state))
    assert any(name.startswith("lora_te1_") for name in load_file(file))
    assert_same(
        deltas(convert(file)), {name.replace("text_model_text_model", "text_model"): d for name, d in expected.items()}
    )
    text, unet = copy.deepcopy(models["text_encoder"]), copy.deepcopy(models["unet"])
    network, _ = lora.create_network_from_weights(1.0, str(file), None, text, unet)
    assert len(network.modules_in_order()) == len(expected)
    assert network.load_weights(file) == f"{len(expected)} modules loaded"


# ---- names of other programs -------------------------------------------------------------------------------------

Naming = Callable[[str, str], str]  # part, path in diffusers -> name of the module


def checkpoint_paths(models: Mapping[str, Any], family_name: str) -> dict[str, str]:
    """Return path in diffusers -> path in checkpoints, of the U-Net."""
    family = next(family for family in FAMILIES if family.name == family_name)
    names = original_names(layout.unet_rule(family, dict(models["unet"].config)), models["unet"].state_dict())
    return {name.removesuffix(".weight"): own.removesuffix(".weight") for name, own in names.items()}


def old_word(path: str) -> str:
    """Return the path of a layer as diffusers named it in 2023."""
    for layer, old in (("to_out.0", "to_out"), ("out_proj", "to_out"), ("q_proj", "to_q"), ("k_proj", "to_k")):
        path = path.replace(f"attn1.{layer}", f"attn1.{old}").replace(f"self_attn.{layer}", f"self_attn.{old}")
    return path.replace("v_proj", "to_v").replace("attn2.to_out.0", "attn2.to_out")


def with_processor(part: str, path: str) -> str:
    path = old_word(path)
    return f"{part}.{path}" if part != "unet" else "unet." + path.replace(".to_", ".processor.to_")


STYLES: dict[str, tuple[Naming, tuple[str, str]]] = {
    "diffusers": (lambda part, path: f"{part}.{path}", (".lora_A.weight", ".lora_B.weight")),
    "named adapter": (lambda part, path: f"{part}.{path}", (".lora_A.my style.weight", ".lora_B.my style.weight")),
    "lora layers": (lambda part, path: f"{part}.{path}", (".lora.down.weight", ".lora.up.weight")),
    "old script": (lambda part, path: f"{part}.base_model.model.{path}", (".lora_A.weight", ".lora_B.weight")),
    "processors": (with_processor, ("_lora.down.weight", "_lora.up.weight")),
    "lycoris": (lambda part, path: f"lycoris_{path.replace('.', '_')}", (".lora_down.weight", ".lora_up.weight")),
}


def layers_for(models: Mapping[str, Any], style: str) -> dict[tuple[str, str], torch.Tensor]:
    """Return (part, path) -> weight of the layers that a style can name."""
    unet = dict(models["unet"].named_modules())
    inside = (".attentions.",) if style != "processors" else (".to_",)
    found = {
        ("unet", path): layer.weight
        for path, layer in unet.items()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and all(part in path for part in inside)
    }
    for path, layer in models["text_encoder"].named_modules():
        if isinstance(layer, torch.nn.Linear):
            found["text_encoder", path.removeprefix("text_model.")] = layer.weight
    return found


@pytest.mark.parametrize("style", STYLES)
def test_the_names_of_every_program_are_read(model_store, tmp_path, style):
    models, _ = model_store("sd1")
    naming, endings = STYLES[style]
    tensors: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {}
    for at, ((part, path), weight) in enumerate(layers_for(models, style).items()):
        down, up = pair(2, weight.shape[0], weight[0].numel(), at)
        in_file = path if part == "unet" or style in ("old script", "lycoris") else f"text_model.{path}"
        stem, down_shape = naming(part, in_file), (2, *weight.shape[1:])
        tensors |= {stem + endings[0]: down.reshape(down_shape), stem + endings[1]: up}
        name = f"lora_unet_{path}" if part == "unet" else f"lora_te_text_model_{path}"
        expected[name.replace(".", "_")] = up @ down
    if style == "old script":
        (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 2}', encoding="utf-8")
    assert_same(deltas(convert(written(tmp_path / "a.safetensors", tensors))), expected)


@pytest.mark.repetitions(keep=1)
@pytest.mark.parametrize(
    ("family_name", "encoders"),
    [("sd1", ("clip_l",)), ("sd2", ("clip_h",)), ("sdxl", ("clip_l", "clip_g"))],
)
def test_names_of_comfyui_and_of_checkpoints_are_read(model_store, tmp_path, family_name, encoders):
    """`diffusion_model.input_blocks.1.1.proj_in.lora_up.weight`, and the same in one word after lora_unet_."""
    models, _ = model_store(family_name)
    family = next(family for family in FAMILIES if family.name == family_name)
    generic: dict[str, torch.Tensor] = {}
    words: dict[str, torch.Tensor] = {}
    paths = checkpoint_paths(models, family_name)
    for at, (path, layer) in enumerate(models["unet"].named_modules()):
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            down, up = pair(2, layer.weight.shape[0], layer.weight[0].numel(), at)
            down, alpha = down.reshape(2, *layer.weight.shape[1:]), torch.tensor(3.0)
            for stem, tensors in (
                (f"diffusion_model.{paths[path]}", generic),
                (f"lora_unet_{paths[path].replace('.', '_')}", words),
            ):
                tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": alpha}
    for at, (name, text) in enumerate(zip(encoders, family.text_models, strict=True)):
        path = "encoder.layers.1.self_attn.out_proj"
        down, up = pair(2, seed=500 + at)
        generic |= {
            f"text_encoders.{name}.transformer.text_model.{path}.lora_A.weight": down,
            f"text_encoders.{name}.transformer.text_model.{path}.lora_B.weight": up,
        }
        words |= kohya(f"{text.lora_prefix}text_model_{path.replace('.', '_')}", down, up)
    first = written(tmp_path / "generic.safetensors", generic)
    second = written(tmp_path / "words.safetensors", words, {"ss_base_model_version": family.version})
    one, other = read_lora(first), read_lora(second)
    assert one.changes.keys() == other.changes.keys()
    assert len(one.changes) == len([name for name in words if name.endswith("lora_up.weight")])
    assert other.family is family
    assert not one.extra and not other.extra
    assert_same(deltas(convert(first)), deltas(convert(second)))


def test_the_text_encoder_tells_the_family_of_checkpoint_names(tmp_path):
    unet = kohya("lora_unet_input_blocks_4_1_proj_in", torch.randn(4, 640, 1, 1), torch.randn(640, 4, 1, 1), 4.0)
    for width, prefix, family in (
        (768, "lora_te_", SD1),
        (1024, "lora_te_", SD2),
        (1024, "lora_te1_", SD2),
        (768, "lora_te1_", SDXL),
    ):
        text = kohya(f"{prefix}text_model_encoder_layers_0_mlp_fc1", *pair(4, 4 * width, width))
        file = read_lora(written(tmp_path / "a.safetensors", unet | text))
        assert file.family is family, (width, prefix)
        name = (
            "lora_unet_input_blocks_4_1_proj_in" if family is SDXL else "lora_unet_down_blocks_1_attentions_0_proj_in"
        )
        assert name in file.changes


@pytest.mark.parametrize(
    ("metadata", "family"),
    [
        ({"ss_base_model_version": "sd_v1"}, SD1),
        ({"modelspec.architecture": "stable-diffusion-v1/lora"}, SD1),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, SD2),
        ({"ss_v2": "True"}, SD2),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, SDXL),
        ({}, SDXL),
    ],
)
def test_metadata_tell_the_family_where_shapes_do_not(tmp_path, metadata, family):
    tensors = kohya("lora_unet_input_blocks_4_0_in_layers_2", torch.randn(4, 320, 3, 3), torch.randn(640, 4, 1, 1))
    file = written(tmp_path / "a.safetensors", tensors, metadata)
    assert read_lora(file).family is family
    words = load_file(convert(file, "--to", "kohya_diffusers"))
    assert "lora_unet_down_blocks_1_resnets_0_conv1.lora_down.weight" in words


@pytest.mark.parametrize(
    ("module", "family"),
    [
        ("lora_unet_output_blocks_8_1_proj_in", None),  # SD 1.x or 2.x
        ("lora_unet_output_blocks_0_1_proj_in", SDXL),
        ("lora_unet_add_embedding_linear_1", SDXL),
        ("lora_unet_down_blocks_3_resnets_0_conv1", None),
        ("lora_te_text_model_encoder_layers_20_mlp_fc2", SD2),
        ("text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc2", SDXL),
    ],
)
def test_names_tell_the_family(tmp_path, module, family):
    assert read_lora(written(tmp_path / "a.safetensors", kohya(module, *pair()))).family is family


# ---- kernels of SD 2.x -------------------------------------------------------------------------------------------


def as_sd_scripts(models: Mapping[str, Any], path: Path, **options: Any) -> Path:
    """Write a LoRA of SD 2.x with kernels of 1x1 for the projections, as sd-scripts does for a checkpoint."""
    tensors = load_file(make_lora(models, path, **options))
    for name, tensor in tensors.items():
        if "_proj_in.lora_" in name or "_proj_out.lora_" in name:
            tensors[name] = tensor[:, :, None, None]
    return written(path, tensors, {"ss_base_model_version": "sd_v2"})


def test_kernels_of_linear_layers_are_flattened_by_every_tool(model_store, tmp_path):
    models, _ = model_store("sd2")
    file = as_sd_scripts(models, tmp_path / "a.safetensors", conv_dim="2")
    out = tmp_path / "out.safetensors"
    one = ["--models", file, "--ratios", 1, "--save_to", out]
    for script, argv in (
        (merge_lora, one),
        (merge_lora, [*one, "--concat"]),
        (svd_merge_lora, [*one, "--new_rank", 4]),
        (resize_lora, ["--model", file, "--save_to", out, "--new_rank", 4]),
        (convert_lora, ["--model", file, "--save_to", out]),
    ):
        call(script, *argv)
        tensors = load_file(out)
        matrices = {name: tensor.ndim for name, tensor in tensors.items() if name.endswith(".weight")}
        assert {number for name, number in matrices.items() if "_attentions_" in name} == {2}
        assert {number for name, number in matrices.items() if "_conv" in name} == {4}
        assert_same(deltas(out), deltas(file), 1e-5)


def test_diffusers_loads_what_is_converted_from_sd_scripts(model_store, tmp_path):
    models, _ = model_store("sd2")
    file = as_sd_scripts(models, tmp_path / "a.safetensors", alpha=4.0, conv_dim="4", conv_alpha="4")
    folder = tmp_path / "peft"
    call(convert_lora, "--model", file, "--to", "diffusers", "--save_to", folder / "pytorch_lora_weights.safetensors")
    made = {**copy.deepcopy(dict(models))}
    pipe = pipe_of(made, family="sd2")
    pipe.load_lora_weights(folder, adapter_name="default")
    found = peft_deltas(made["unet"], "lora_unet_") | peft_deltas(made["text_encoder"], "lora_te_text_model_")
    expected = deltas(file)
    assert found.keys() == {name.replace("text_model_text_model", "text_model") for name in expected}
    for name, delta in found.items():
        torch.testing.assert_close(delta.double().flatten(1), expected[name], rtol=1e-5, atol=1e-6)


def test_matrices_of_convolutions_get_their_kernel(tmp_path):
    """Some trainers write 2-D factors for the projections of SD 1.x, which diffusers refuses."""
    attention = kohya("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k", *pair(2, 96, 768))
    file = written(tmp_path / "a.safetensors", attention | kohya("lora_unet_mid_block_attentions_0_proj_in", *pair()))
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(convert(file)).items()}
    assert shapes["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"] == (2, 96, 1, 1)
    assert shapes["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"] == (96, 2, 1, 1)
    wrong = kohya(QUERY, torch.randn(2, 96, 3, 3), torch.randn(96, 2, 1, 1))
    with pytest.raises(UserError, match="its layer has no kernel"):
        convert(written(tmp_path / "b.safetensors", attention | wrong))


# ---- nothing is dropped in silence -------------------------------------------------------------------------------

CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
NORM = "lora_unet_down_blocks_0_attentions_0_norm"


def tucker(rows: int = 32, columns: int = 32, rank: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {
        f"{CONV}.lora_down.weight": torch.randn(rank, columns, 1, 1, generator=generator),
        f"{CONV}.lora_mid.weight": torch.randn(rank, rank, 3, 3, generator=generator),
        f"{CONV}.lora_up.weight": torch.randn(rows, rank, 1, 1, generator=generator),
        f"{CONV}.alpha": torch.tensor(2.0),
    }


def test_a_core_and_a_factor_are_multiplied_in(model_store, tmp_path):
    models, paths = model_store("sd1")
    parts = tucker()
    up, mid, down = (parts[f"{CONV}.lora_{role}.weight"].double() for role in ("up", "mid", "down"))
    delta = 2 / 3 * 1.5 * torch.einsum("orxy,rshw,sizz->oihw", up, mid, down)
    file = written(tmp_path / "a.safetensors", parts | {f"{CONV}.scalar": torch.tensor(1.5)})
    out = tmp_path / "out.safetensors"
    for script, argv in (
        (convert_lora, ["--model", file]),
        (resize_lora, ["--model", file, "--new_rank", 3]),
        (merge_lora, ["--models", file, "--ratios", 1, "--concat"]),
        (svd_merge_lora, ["--models", file, "--ratios", 1, "--new_rank", 3]),
    ):
        call(script, *argv, "--save_to", out)
        assert not any("mid" in name or "scalar" in name for name in load_file(out))
        assert_same(deltas(out), {CONV: delta}, 1e-5)
    call(merge_lora, "--sd_model", paths["safetensors"], "--models", file, "--ratios", 1, "--save_to", out)
    before, after = load_file(paths["safetensors"]), load_file(out)
    name = f"model.diffusion_model.{checkpoint_paths(models, 'sd1')['down_blocks.0.resnets.0.conv1']}.weight"
    torch.testing.assert_close(after[name].double(), before[name].double() + delta, rtol=1e-5, atol=1e-5)
    assert sum(not torch.equal(before[name], after[name]) for name in before) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({f"{CONV}.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "lora_mid"),
        ({f"{CONV}.lora_mid.weight": torch.ones(3, 3)}, "lora_mid"),
        ({f"{CONV}.scalar": torch.ones(2)}, "one number is meant"),
    ],
)
def test_damaged_cores_are_refused(tmp_path, change, reason):
    with pytest.raises(UserError, match=reason):
        convert(written(tmp_path / "a.safetensors", tucker() | change))


def norms() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    names = [f"{NORM}.w_norm", f"{NORM}.b_norm", "lora_te_text_model_final_layer_norm.diff", f"{CONV}.diff_b"]
    sizes = [32, 32, 64, 32]
    return {name: torch.randn(size, generator=generator) for name, size in zip(names, sizes, strict=True)}


def test_norms_and_biases_are_merged_into_a_model(model_store, tmp_path):
    models, paths = model_store("sd1")
    file, out = written(tmp_path / "a.safetensors", tucker() | norms()), tmp_path / "out"
    call(merge_lora, "--sd_model", paths["folder"], "--models", file, "--ratios", 0.5, "--save_to", out)
    unet = load_file(out / "unet/diffusion_pytorch_model.safetensors")
    text = load_file(out / "text_encoder/model.safetensors")
    before = models["unet"].state_dict()
    for name, added in (("weight", "w_norm"), ("bias", "b_norm")):
        own = f"down_blocks.0.attentions.0.norm.{name}"
        torch.testing.assert_close(unet[own], before[own] + 0.5 * norms()[f"{NORM}.{added}"])
    own = "down_blocks.0.resnets.0.conv1.bias"
    torch.testing.assert_close(unet[own], before[own] + 0.5 * norms()[f"{CONV}.diff_b"])
    final = text["text_model.final_layer_norm.weight"]
    torch.testing.assert_close(final, 1 + 0.5 * norms()["lora_te_text_model_final_layer_norm.diff"])


def test_norms_and_biases_are_merged_into_a_lora_and_carried_over(tmp_path):
    first = written(tmp_path / "a.safetensors", tucker() | norms())
    second = written(tmp_path / "b.safetensors", tucker() | {f"{NORM}.w_norm": torch.ones(32)})
    out = tmp_path / "out.safetensors"
    both = ["--models", first, second, "--ratios", 0.5, -2, "--save_to", out]
    ways: list[tuple[Any, list[Any]]] = [(merge_lora, ["--concat"]), (merge_lora, []), (svd_merge_lora, [])]
    for script, argv in ways:
        call(script, *both, *argv)
        found = load_file(out)
        torch.testing.assert_close(found[f"{NORM}.w_norm"], 0.5 * norms()[f"{NORM}.w_norm"] - 2)
        torch.testing.assert_close(found[f"{NORM}.b_norm"], 0.5 * norms()[f"{NORM}.b_norm"])
    emb = {"bundle_emb.cat.string_to_param.*": torch.randn(2, 64)}
    third = written(tmp_path / "c.safetensors", tucker() | norms() | emb)
    ways = [(resize_lora, ["--new_rank", 2]), (convert_lora, [])]
    for script, argv in ways:
        call(script, "--model", third, "--save_to", out, *argv)
        found = load_file(out)
        assert all(torch.equal(found[name], tensor) for name, tensor in (norms() | emb).items())
    with pytest.raises(UserError, match=r"bundle_emb\.cat"):
        call(merge_lora, *both[:1], third, "--ratios", 1, "--save_to", out)
    wrong = written(tmp_path / "d.safetensors", tucker() | {f"{NORM}.w_norm": torch.ones(64)})
    with pytest.raises(UserError, match="has different sizes in the files"):
        call(merge_lora, "--models", first, wrong, "--ratios", 1, 1, "--save_to", out)
    with pytest.raises(UserError, match=r"are not in files of diffusers \(lora_"):
        call(convert_lora, "--model", first, "--to", "diffusers", "--save_to", out)


def test_norms_of_sdxl_follow_the_names_of_their_file(tmp_path):
    """A file with both kinds of names would lose one in diffusers."""
    attention = kohya("lora_unet_mid_block_attentions_0_transformer_blocks_9_attn2_to_k", *pair(2, 96, 2048))
    norm = {"lora_unet_mid_block_attentions_0_norm.w_norm": torch.randn(96)}
    file = written(tmp_path / "a.safetensors", attention | norm)
    assert "lora_unet_middle_block_1_norm.w_norm" in load_file(convert(file))
    assert norm.keys() <= load_file(convert(file, "--to", "kohya_diffusers")).keys()


STRANGE: dict[str, dict[str, tuple[str, ...]]] = {
    "unknown layer": {
        "lora_unet_down_blocks_0_motion_modules_0_proj_in": ("lora_down.weight", "lora_up.weight", "alpha")
    },
    "bias of PEFT": {"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k": ("lora_B.bias",)},
    "norm without place": {"lora_unet_down_blocks_0_attentions_0_norm7": ("w_norm",)},
    "scale of a norm": {"lora_unet_down_blocks_0_attentions_0_norm": ("diff_c",)},
    "alpha alone": {"lora_unet_mid_block_attentions_0_proj_out": ("alpha",)},
    "projection": {"lora_te_text_projection": ("lora_down.weight", "lora_up.weight")},
    "custom diffusion": {
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_custom_diffusion": ("weight",)
    },
}


@pytest.mark.parametrize("kind", STRANGE)
def test_what_has_no_name_is_refused_by_every_tool(model_store, tmp_path, kind):
    [(stem, endings)] = STRANGE[kind].items()
    odd = {f"{stem}.{ending}": torch.ones(8, 8) if "weight" in ending else torch.tensor(1.0) for ending in endings}
    tensors = kohya(QUERY, *pair())
    file, out = written(tmp_path / "a.safetensors", tensors | odd), tmp_path / "out.safetensors"
    base = model_store("sd1")[1]["safetensors"]
    one = ["--models", file, "--ratios", 1, "--save_to", out]
    runs: list[tuple[Any, list[Any]]] = [
        (merge_lora, one),
        (merge_lora, [*one, "--concat"]),
        (merge_lora, [*one, "--sd_model", base]),
        (svd_merge_lora, one),
        (resize_lora, ["--model", file, "--save_to", out]),
        (convert_lora, ["--model", file, "--save_to", out]),
        (convert_lora, ["--model", file, "--save_to", out, "--to", "diffusers"]),
    ]
    for script, argv in runs:
        with pytest.raises(UserError, match=stem.replace(".", r"\.")):
            call(script, *argv)
        assert not out.exists()
    call(convert_lora, "--model", file, "--save_to", out, "--allow_unmatched")
    assert load_file(out).keys() == {*tensors, f"{QUERY}.alpha"}


def test_two_changes_of_a_module_are_refused(tmp_path):
    down, up = pair()
    one = {f"unet.mid_block.attentions.0.proj_in.lora_{m}.one.weight": t for m, t in (("A", down), ("B", up))}
    two = {name.replace(".one.", ".two."): tensor for name, tensor in one.items()}
    other = kohya("lora_unet_mid_block_attentions_0_proj_in", down, up)
    for more in (two, other):
        with pytest.raises(UserError, match="twice"):
            convert(written(tmp_path / "a.safetensors", one | more))


def test_metadata_without_alphas_mean_the_rank(tmp_path):
    file = written(
        tmp_path / "a.safetensors", kohya("unet.conv_in", *pair()), {"lora_adapter_metadata": '{"unet.r": 2}'}
    )
    assert read_lora(file).changes["lora_unet_conv_in"].alpha == 2


def test_a_module_with_half_a_change_is_refused(tmp_path):
    for missing, left in (("lora_up", "lora_down"), ("lora_down", "lora_up")):
        tensors = kohya(QUERY, *pair()) | kohya(CONV, torch.randn(2, 32, 3, 3), torch.randn(32, 2, 1, 1))
        del tensors[f"{CONV}.{missing}.weight"]
        with pytest.raises(UserError, match=f"{CONV}.{left}.weight has no"):
            convert(written(tmp_path / "a.safetensors", tensors))


def test_nothing_changed_is_a_failure_of_every_script(model_store, tmp_path):
    """A LoRA of another kind of model is refused also where skipping is allowed."""
    base, out = model_store("sd1")[1]["safetensors"], tmp_path / "out.safetensors"
    flux = written(tmp_path / "a.safetensors", kohya("lora_unet_double_blocks_0_img_attn_qkv", *pair()))
    runs: tuple[tuple[Any, list[Any]], ...] = (
        (merge_lora, ["--models", flux, "--ratios", 1, "--allow_unmatched"]),
        (merge_lora, ["--models", flux, "--ratios", 1, "--allow_unmatched", "--sd_model", base]),
        (svd_merge_lora, ["--models", flux, "--ratios", 1, "--allow_unmatched"]),
        (resize_lora, ["--model", flux]),
        (convert_lora, ["--model", flux, "--allow_unmatched"]),
    )
    for script, argv in runs:
        with pytest.raises(UserError, match="none of its 1 modules is a layer of SD 1.x, SD 2.x or SDXL"):
            call(script, *argv, "--save_to", out)
    absent = written(
        tmp_path / "b.safetensors", kohya("lora_unet_mid_block_attentions_0_transformer_blocks_7_ff_net_2", *pair())
    )
    both = ["--sd_model", base, "--save_to", out, "--allow_unmatched", "--models"]
    with pytest.raises(UserError, match="is for SDXL"):
        call(merge_lora, *both, absent, "--ratios", 1)
    far = written(tmp_path / "c.safetensors", kohya("lora_te_text_model_encoder_layers_9_mlp_fc2", *pair()))
    with pytest.raises(UserError, match="none of its 1 modules is in"):
        call(merge_lora, *both, far, "--ratios", 1)
    assert not out.exists()


def test_a_network_module_names_the_converter(fresh_models, tmp_path):
    text, unet = fresh_models
    file = written(tmp_path / "a.safetensors", {"unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.ones(2, 8)})
    with pytest.raises(ValueError, match="convert_lora.py converts files of diffusers, PEFT and ComfyUI"):
        lora.create_network_from_weights(1.0, str(file), None, text, unet)
    network = lora.create_network(1.0, 2, 1.0, None, text, unet)
    with pytest.raises(ValueError, match="convert_lora.py converts files of diffusers, PEFT and ComfyUI"):
        network.load_weights(file)


def test_a_dylora_is_not_split_out_of_another_network(tmp_path):
    file = written(tmp_path / "a.safetensors", tucker())
    with pytest.raises(UserError, match="is no DyLoRA: .*lora_mid.weight is of a Tucker network"):
        call(extract_lora_from_dylora, "--model", file, "--save_to", tmp_path / "b.safetensors", "--unit", 1)


def test_other_kinds_are_refused_by_their_names(tmp_path):
    module = "diffusion_model.middle_block.1.proj_in"
    for ending, kind in (
        ("diff", "full differences"),
        ("lokr_w1", "a LoKr"),
        ("dora_scale", "a DoRA"),
        ("lora_E", "an AdaLoRA"),
        ("b1.weight", "a GLoRA"),
    ):
        tensors = kohya(QUERY, *pair()) | {f"{module}.{ending}": torch.ones(96, 96)}
        with pytest.raises(UserError, match=kind):
            convert(written(tmp_path / "a.safetensors", tensors))
    config = json.dumps({"unet.peft_type": "LORA", "unet.lora_alpha": 1, "unet.use_dora": True})
    file = written(tmp_path / "b.safetensors", kohya("unet.conv_in", *pair()), {"lora_adapter_metadata": config})
    with pytest.raises(UserError, match=r"unet\.use_dora is set"):
        convert(file)


def test_extracting_names_what_a_lora_cannot_hold(model_store, tmp_path, caplog):
    models, paths = model_store("sd1")
    names = checkpoint_paths(models, "sd1")
    state = load_file(paths["safetensors"])
    changed = {
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q": "weight",
        "mid_block.attentions.0.transformer_blocks.0.norm1": "bias",
        "mid_block.resnets.0.conv1": "weight",
        "conv_in": "weight",  # in no block, so that no option extracts it
    }
    for path, kind in changed.items():
        state[f"model.diffusion_model.{names.get(path, path)}.{kind}"] += 0.5
    tuned, out = written(tmp_path / "tuned.safetensors", state), tmp_path / "out.safetensors"
    argv = ["--model_org", paths["safetensors"], "--model_tuned", tuned, "--save_to", out, "--dim", 2]
    call(extract_lora_from_models, *argv)
    told = "conv_in.weight, unet.mid_block.resnets.0.conv1.weight, unet.mid_block.attentions.0.transformer_blocks.0.norm1.bias"
    assert f"not in the LoRA: 3 other tensors differ (unet.{told}); --conv_dim extracts 1" in caplog.text
    caplog.clear()
    call(extract_lora_from_models, *argv, "--conv_dim", 2)
    assert "2 other tensors differ" in caplog.text
    assert "--conv_dim" not in caplog.text
