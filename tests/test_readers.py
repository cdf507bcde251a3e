"""What is said of other programs: what was measured by running them, what their source says, and diffusers itself.

The tables below are of 2026-11-25. Counts of modules were measured by running ComfyUI a125cd84, a fork of AUTOMATIC1111
(lshqqytiger e61adddd), Forge dfdcbab6, InvokeAI 8e71a8a5, diffusers 0.42.1, sd-scripts 0.10.1 and stable-diffusion.cpp
0.4.7 on files of the suite and of LyCORIS 4.1.3; kinds are from the source of the same versions.
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Mapping

import pytest
import torch
from drawing import pipe_of
from safetensors.torch import save_file
from scripts import ROOT

from library.adapters import programs, readers
from library.adapters.layers import Layer, diffusers_word, layers_of, module_name, peft_name
from library.models import building
from library.models.checkpoint import UNET
from library.models.family import FAMILIES, SD1, SD2, SDXL
from networks import check_lora_weights, lora

TITLES = ["diffusers", *(program.title for program in programs.PROGRAMS)]
LORA = {".lora_down.weight": (2, 8), ".lora_up.weight": (8, 2), ".alpha": ()}
PEFT = {".lora_A.weight": (2, 8), ".lora_B.weight": (8, 2)}


# ---- names --------------------------------------------------------------------------------------------------


@functools.cache
def real_layers(family):
    """Return the layers that a LoRA with convolutions has over a model of the published sizes."""
    unet = building.build_unet(family.unet)
    targets = lora.find_targets(unet, "lora_unet", lora.UNET_CONTAINERS + lora.UNET_CONV_CONTAINERS)
    words = {diffusers_word(layer, family): layer for layer in layers_of(family)}
    text = [layer for layer in layers_of(family) if layer.part != UNET]
    return [*(words[target.name] for target in targets), *text]


def shape_for(layer, ending, family):
    """Return a shape as in a file: 4-D for SD 1.x's projections."""
    if ending == ".alpha":
        return ()
    is_projection = layer.path.endswith(("attentions.0.proj_in", "attentions.0.proj_out")) or (
        "attentions" in layer.path and layer.path.endswith(("proj_in", "proj_out"))
    )
    return (*(LORA | PEFT)[ending], *((1, 1) if family is SD1 and is_projection else ()))


def file_of(family, name_of, endings=LORA, only=lambda layer: True):
    """Return name -> shape for a file over all layers of a family, under the names that name_of gives."""
    layers = [layer for layer in real_layers(family) if only(layer)]
    return {name_of(layer) + ending: shape_for(layer, ending, family) for layer in layers for ending in endings}


def told(shapes, family, alphas=None):
    """Return program -> number of modules that it applies, or "refuses"."""
    keys = readers.keys_of(shapes)
    per_module = len(keys) // len({key.module for key in keys})
    return {
        title: "refuses" if verdict.refusal is not None else verdict.applied / per_module
        for title, verdict in readers.verdicts(keys, family, alphas or {}, {})
    }


def renamed(family, old, new):
    return lambda layer: module_name(layer, family).replace(old, new)


# What a file is named by, family, modules in it -> modules that programs apply where that is not all.
NAMES = [
    ("as written", SD1, lambda layer: module_name(layer, SD1), LORA, 350, {}),
    ("as written", SD2, lambda layer: module_name(layer, SD2), LORA, 416, {}),
    ("as written", SDXL, lambda layer: module_name(layer, SDXL), LORA, 1052, {}),
    (
        "kohya_diffusers",
        SDXL,
        lambda layer: diffusers_word(layer, SDXL),
        LORA,
        1052,
        {"AUTOMATIC1111": 1051, "sd-scripts": 264},
    ),
    *(
        (
            "PEFT",
            family,
            peft_name,
            PEFT,
            modules,
            {
                "AUTOMATIC1111": 0,
                "Forge": "refuses",
                "ComfyUI": modules - attentions,
                "InvokeAI": "refuses",
                "sd-scripts": 0,
                "stable-diffusion.cpp": modules - text,
            },
        )
        for family, modules, attentions, text in ((SD1, 350, 128, 72), (SD2, 416, 128, 138), (SDXL, 1052, 560, 264))
    ),
    (
        "text encoders without text_model",
        SD1,
        renamed(SD1, "lora_te_text_model_", "lora_te_"),
        LORA,
        350,
        dict.fromkeys(("AUTOMATIC1111", "ComfyUI", "InvokeAI", "sd-scripts", "stable-diffusion.cpp"), 278)
        | {"Forge": "refuses"},
    ),
    ("te1", SD1, renamed(SD1, "lora_te_", "lora_te1_"), LORA, 350, {"InvokeAI": 278, "sd-scripts": 278}),
    (
        "te1",
        SD2,
        renamed(SD2, "lora_te_", "lora_te1_"),
        LORA,
        416,
        {"AUTOMATIC1111": 278, "InvokeAI": 278, "sd-scripts": 278},
    ),
    (
        "te of SDXL",
        SDXL,
        renamed(SDXL, "lora_te1_", "lora_te_"),
        LORA,
        1052,
        {"AUTOMATIC1111": 980, "InvokeAI": "refuses", "sd-scripts": 980},
    ),
]


@pytest.mark.parametrize(
    ("name_of", "family", "endings", "modules", "less"),
    [(name_of, family, endings, modules, less) for _, family, name_of, endings, modules, less in NAMES],
    ids=[f"{name}, {family.name}" for name, family, *_ in NAMES],
)
def test_the_names_that_programs_read(name_of, family, endings, modules, less):
    shapes = file_of(family, name_of, endings)
    assert len(shapes) == modules * len(endings)
    assert told(shapes, family) == dict.fromkeys(TITLES, modules) | less


def test_names_of_the_checkpoints_blocks_in_sd1():
    """sd-scripts has them for SDXL only; A1111, Forge and ComfyUI compare with the checkpoint's own names."""
    words = {fields["word"]: fields["block_word"] for fields in programs.layers_spelled(SD1)}
    unet = file_of(SD1, lambda layer: f"lora_unet_{words[layer.path.replace('.', '_')]}", only=lambda x: x.part == UNET)
    whole = dict.fromkeys(("AUTOMATIC1111", "Forge", "ComfyUI", "stable-diffusion.cpp"), 278)
    assert told(unet, SD1) == whole | {"diffusers": "refuses", "InvokeAI": 0, "sd-scripts": 0}


def test_both_kinds_of_blocks_in_one_file_of_sdxl():
    shapes = file_of(SDXL, lambda layer: module_name(layer, SDXL))
    other = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    shapes |= {other + ending: shape for ending, shape in LORA.items()}
    found = told(shapes, SDXL)
    assert found["InvokeAI"] == "refuses"
    assert found["diffusers"] == 1 + 264, "it drops the names of the checkpoint"
    assert found["ComfyUI"] == 1053
    assert found["sd-scripts"] == 1052


def test_openclip_in_automatic1111_needs_the_whole_attention():
    for family, prefix, applies in ((SD1, "lora_te_", 1), (SD2, "lora_te_", 0), (SDXL, "lora_te2_", 0)):
        name = f"{prefix}text_model_encoder_layers_0_self_attn_"
        one = {f"{name}q_proj{ending}": shape for ending, shape in LORA.items()}
        assert told(one, family)["AUTOMATIC1111"] == applies
        four = {f"{name}{x}_proj{end}": shape for x in ("q", "k", "v", "out") for end, shape in LORA.items()}
        assert told(four, family)["AUTOMATIC1111"] == 4


def test_forge_refuses_more_than_twelve_unmatched_tensors():
    rest = file_of(SD1, lambda layer: module_name(layer, SD1), only=lambda layer: layer.part != UNET)
    for odd, refuses in (({f"odd.{n}": (1,) for n in range(12)}, False), ({f"odd.{n}": (1,) for n in range(13)}, True)):
        verdict = dict(readers.verdicts(readers.keys_of(rest | odd), SD1, {}, {}))["Forge"]
        assert (verdict.refusal is not None) == refuses
        assert refuses or (verdict.applied, len(verdict.skipped)) == (216, 12)


# ---- kinds --------------------------------------------------------------------------------------------------

CONV = "lora_unet_mid_block_resnets_0_conv1"
NORM = "lora_unet_mid_block_resnets_0_norm1"
WHOLE, NOTHING, REFUSES = "applies", "skips", "refuses"
A1111, FORGE, COMFY, INVOKE, SDS, CPP = TITLES[1:]


def of(module, **shapes):
    return {f"{module}.{name.replace('__', '.')}": shape for name, shape in shapes.items()}


WHOLE_LORA = {"lora_down__weight": (2, 8, 3, 3), "lora_up__weight": (8, 2, 1, 1), "alpha": ()}
LOKR = of(CONV, lokr_w1=(2, 2), lokr_w2=(4, 4, 3, 3), alpha=())
PAIR = of(CONV, **WHOLE_LORA)
# Kind -> tensors beside a whole LoRA module; programs that apply all of them, that skip all, that refuse the file; for
# the rest the number that they skip. diffusers refuses all kinds but the first two.
KINDS: dict[str, tuple[Mapping[str, tuple[int, ...]], list[str], dict[str, int], list[str]]] = {
    "LoRA": (PAIR, [A1111, FORGE, COMFY, INVOKE, SDS, CPP], {}, []),
    "DoRA": (PAIR | of(CONV, dora_scale=(1, 8, 1, 1)), [A1111, FORGE, COMFY, INVOKE], {SDS: 1, CPP: 1}, []),
    "Tucker": (PAIR | of(CONV, lora_mid__weight=(2, 2, 3, 3)), [A1111, FORGE, COMFY, INVOKE, CPP], {}, [SDS]),
    "LoHa": (
        of(CONV, hada_w1_a=(8, 2), hada_w1_b=(2, 8), hada_w2_a=(8, 2), hada_w2_b=(2, 8), alpha=()),
        [A1111, FORGE, COMFY, INVOKE, CPP],
        {SDS: 5},
        [],
    ),
    "LoHa, Tucker": (
        of(CONV, hada_w1_a=(2, 8), hada_w1_b=(2, 8), hada_w2_a=(2, 8), hada_w2_b=(2, 8), alpha=())
        | of(CONV, hada_t1=(2, 2, 3, 3), hada_t2=(2, 2, 3, 3)),
        [A1111, FORGE, COMFY, INVOKE, CPP],
        {SDS: 7},
        [],
    ),
    "LoKr": (LOKR, [A1111, FORGE, COMFY, INVOKE, CPP], {SDS: 3}, []),
    "LoKr, factors": (
        of(CONV, lokr_w1_a=(2, 1), lokr_w1_b=(1, 2), lokr_w2_a=(4, 2), lokr_w2_b=(2, 4), alpha=()),
        [A1111, FORGE, COMFY, INVOKE, CPP],
        {SDS: 5},
        [],
    ),
    "LoKr, Tucker": (
        of(CONV, lokr_w1=(2, 2), lokr_w2_a=(2, 4), lokr_w2_b=(2, 4), lokr_t2=(2, 2, 3, 3), alpha=()),
        [A1111, FORGE, COMFY, INVOKE],
        {SDS: 5, CPP: 1},
        [],
    ),
    "GLoRA": (
        of(CONV, a1__weight=(8, 2), a2__weight=(2, 8), b1__weight=(8, 2), b2__weight=(2, 8), alpha=()),
        [A1111, FORGE, COMFY],
        {SDS: 5, CPP: 5},
        [INVOKE],
    ),
    "difference": (of(CONV, diff=(8, 8, 3, 3)), [A1111, FORGE, COMFY, INVOKE, CPP], {SDS: 1}, []),
    "difference with bias": (
        of(CONV, diff=(8, 8, 3, 3), diff_b=(8,)),
        [A1111, FORGE, COMFY, INVOKE, CPP],
        {SDS: 2},
        [],
    ),
    "bias alone": (of(CONV, diff_b=(8,)), [FORGE, COMFY, CPP], {SDS: 1}, [A1111, INVOKE]),
    "bias beside LoRA": (PAIR | of(CONV, diff_b=(8,)), [FORGE, COMFY, CPP], {A1111: 1, INVOKE: 1, SDS: 1}, []),
    "norm": (of(NORM, w_norm=(8,), b_norm=(8,)), [A1111, FORGE, COMFY, INVOKE], {SDS: 2, CPP: 2}, []),
    "norm without bias": (of(NORM, w_norm=(8,)), [FORGE, COMFY, INVOKE], {SDS: 1, CPP: 1}, [A1111]),
    "norm with bias alone": (of(NORM, b_norm=(8,)), [], {FORGE: 1, COMFY: 1, SDS: 1, CPP: 1}, [A1111, INVOKE]),
    "OFT": (of(CONV, oft_blocks=(2, 4, 4), alpha=()), [A1111, COMFY], {FORGE: 2, SDS: 2, CPP: 2}, [INVOKE]),
    "OFT of old LyCORIS": (of(CONV, oft_diag=(2, 4, 4)), [A1111], {FORGE: 1, COMFY: 1, SDS: 1, CPP: 1}, [INVOKE]),
    "BOFT": (
        of(CONV, oft_blocks=(2, 2, 4, 4), rescale=(8, 1, 1, 1), alpha=()),
        [A1111, COMFY],
        {FORGE: 3, SDS: 3, CPP: 3},
        [INVOKE],
    ),
    "IA3": (of(CONV, weight=(8,), on_input=()), [A1111, INVOKE], {FORGE: 2, COMFY: 2, SDS: 2, CPP: 2}, []),
    "bundled embedding": (
        {"bundle_emb.unicorn.string_to_param.*": (2, 768)},
        [A1111],
        {FORGE: 1, COMFY: 1, INVOKE: 1, SDS: 1, CPP: 1},
        [],
    ),
    "something else": (of(CONV, strange=(3,)), [], {FORGE: 1, COMFY: 1, SDS: 1, CPP: 1}, [A1111, INVOKE]),
    "a layer that no model has": (
        of("lora_unet_nowhere", **{"lora_down__weight": (2, 8), "lora_up__weight": (8, 2), "alpha": ()}),
        [],
        {A1111: 3, FORGE: 3, COMFY: 3, INVOKE: 3, SDS: 3, CPP: 3},
        [],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_kinds_that_programs_read(kind):
    shapes, whole, less, refuses = KINDS[kind]
    base = of("lora_te_text_model_encoder_layers_0_mlp_fc1", **{"lora_down__weight": (2, 8), "lora_up__weight": (8, 2)})
    keys = readers.keys_of(base | shapes)
    found = dict(readers.verdicts(keys, SD1, {}, {}))
    for title in whole:
        assert (found[title].refusal, found[title].skipped) == (None, ()), title
    for title, number in less.items():
        assert found[title].refusal is None, title
        assert len(found[title].skipped) == number, title
        assert set(found[title].skipped) <= shapes.keys(), title
    for title in refuses:
        assert found[title].refusal is not None, title
    assert {*whole, *less, *refuses} == set(TITLES[1:]), "a statement on each program"
    may_load = kind in ("LoRA", "DoRA", "a layer that no model has")
    assert (found["diffusers"].refusal is None) == (may_load and kind != "a layer that no model has")


def test_norms_of_text_encoders_and_of_the_last_layer():
    """ComfyUI has names for the six matrices of a text encoder's layers only; A1111 none for conv_norm_out."""
    text = of("lora_te_text_model_encoder_layers_0_layer_norm1", w_norm=(8,), b_norm=(8,))
    last = of("lora_unet_conv_norm_out", w_norm=(8,), b_norm=(8,))
    for shapes, skipping in ((text, {FORGE, COMFY}), (last, {A1111})):
        found = dict(readers.verdicts(readers.keys_of(shapes), SD1, {}, {}))
        assert {title for title in (A1111, FORGE, COMFY, INVOKE) if found[title].skipped} == skipping


# ---- diffusers, run -----------------------------------------------------------------------------------------

ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
RESNET, TEXT = "mid_block.resnets.0.conv1", "encoder.layers.0.mlp.fc1"
WORD = {path: path.replace(".", "_") for path in (ATTENTION, RESNET, TEXT)}
A_B, WORDS = (".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight", ".alpha")


@pytest.fixture(scope="module")
def tiny(model_store):
    return model_store("sd1")[0]


def module_of(models, name, path, endings=WORDS):
    """Return the tensors of a module for a layer of tiny models."""
    layers = dict(models["unet"].named_modules()) | {
        name.removeprefix("text_model."): module for name, module in models["text_encoder"].named_modules()
    }
    weight = layers[path].weight
    down = torch.randn(2, *weight.shape[1:])
    up = torch.randn(weight.shape[0], 2, *(1 for _ in weight.shape[2:]))
    return {name + ending: tensor for ending, tensor in zip(endings, (down, up, torch.tensor(1.0)), strict=False)}


# Tensors of a file as (name, layer whose shapes they have, endings), or a name with a tensor.
FILES = {
    "words": [(f"lora_unet_{WORD[RESNET]}", RESNET), (f"lora_te_text_model_{WORD[TEXT]}", TEXT)],
    "te1": [(f"lora_te1_text_model_{WORD[TEXT]}", TEXT)],
    "te2": [(f"lora_te2_text_model_{WORD[TEXT]}", TEXT), (f"lora_unet_{WORD[RESNET]}", RESNET)],
    "no text_model": [(f"lora_te_{WORD[TEXT]}", TEXT)],
    "text attention without outputs": [
        ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", TEXT.replace("mlp.fc1", "self_attn.q_proj"))
    ],
    "nowhere": [("lora_unet_nowhere", RESNET)],
    "nowhere beside a word": [("lora_unet_nowhere", RESNET), (f"lora_unet_{WORD[ATTENTION]}", ATTENTION)],
    "checkpoint's word": [("lora_unet_middle_block_0_in_layers_2", RESNET)],
    "lycoris": [(f"lycoris_{WORD[ATTENTION]}", ATTENTION)],
    "word of PEFT": [(f"lora_unet_{WORD[ATTENTION]}", ATTENTION, A_B)],
    "paths": [(f"unet.{ATTENTION}", ATTENTION, A_B)],
    "paths with alpha": [(f"unet.{ATTENTION}", ATTENTION, (*A_B, ".alpha"))],
    "paths of sd-scripts": [(f"unet.{ATTENTION}", ATTENTION, WORDS[:2])],
    "paths of diffusers": [(f"unet.{ATTENTION}", ATTENTION, (".lora.down.weight", ".lora.up.weight"))],
    "processors": [
        ("unet." + ATTENTION.replace(".to_q", ".processor.to_q"), ATTENTION, ("_lora.down.weight", "_lora.up.weight"))
    ],
    "adapter's name": [(f"unet.{ATTENTION}", ATTENTION, (".lora_A.default.weight", ".lora_B.default.weight"))],
    "paths without part": [(ATTENTION, ATTENTION, A_B)],
    "paths of PEFT": [(f"base_model.model.{ATTENTION}", ATTENTION, A_B)],
    "paths of PEFT with part": [(f"unet.base_model.model.{ATTENTION}", ATTENTION, A_B)],
    "paths of ComfyUI": [("diffusion_model.middle_block.0.in_layers.2", RESNET, A_B)],
    "text path": [(f"text_encoder.text_model.{TEXT}", TEXT, A_B)],
    "text path of old diffusers": [
        (f"text_encoder.text_model.{TEXT}", TEXT, (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"))
    ],
    "text attention": [
        (
            "text_encoder.text_model." + TEXT.replace("mlp.fc1", "self_attn.v_proj"),
            TEXT.replace("mlp.fc1", "self_attn.v_proj"),
            A_B,
        ),
        (f"text_encoder.text_model.{TEXT}", TEXT, A_B),
    ],
    "word beside a path": [(f"lora_unet_{WORD[RESNET]}", RESNET), (f"unet.{ATTENTION}", ATTENTION, A_B)],
    "stray alpha": [(f"lora_unet_{WORD[RESNET]}", RESNET), (f"lora_unet_{WORD[ATTENTION]}.alpha", torch.tensor(1.0))],
    "stray alpha beside a path": [
        (f"unet.{ATTENTION}", ATTENTION, A_B),
        (f"lora_unet_{WORD[RESNET]}.alpha", torch.tensor(1.0)),
    ],
    "two alphas": [(f"lora_unet_{WORD[RESNET]}", RESNET), (f"lora_unet_{WORD[RESNET]}.alpha", torch.ones(2))],
    "a foreign tensor": [(f"lora_unet_{WORD[RESNET]}", RESNET), ("emp", torch.ones(1))],
    "embedding": [(f"lora_unet_{WORD[RESNET]}", RESNET), ("bundle_emb.x.string_to_param.*", torch.ones(1, 8))],
    "DoRA of LyCORIS": [
        (f"lora_unet_{WORD[RESNET]}", RESNET),
        (f"lora_unet_{WORD[RESNET]}.dora_scale", torch.ones(1, 96)),
    ],
    "DoRA of PEFT": [
        (f"unet.{ATTENTION}", ATTENTION, A_B),
        (f"unet.{ATTENTION}.lora_magnitude_vector", torch.ones(96)),
    ],
    "scale": [(f"lora_unet_{WORD[RESNET]}", RESNET), (f"lora_unet_{WORD[RESNET]}.scale", torch.tensor(1.0))],
    "norm": [(f"lora_unet_{WORD[RESNET]}", RESNET), ("lora_unet_conv_norm_out.w_norm", torch.ones(32))],
    "LoKr in paths": [
        (f"unet.{ATTENTION}.lokr_w1", torch.ones(2, 2)),
        (f"unet.{ATTENTION}.lokr_w2", torch.ones(48, 48)),
    ],
}


@pytest.mark.repetitions(keep=12)
@pytest.mark.parametrize("given", FILES.values(), ids=FILES)
def test_what_is_said_of_diffusers_is_what_diffusers_does(tiny, tmp_path, given):
    torch.manual_seed(0)
    weights: dict[str, torch.Tensor] = {}
    for name, value, *endings in given:
        weights |= {name: value} if isinstance(value, torch.Tensor) else module_of(tiny, name, value, *endings)
    save_file(weights, tmp_path / "a.safetensors")
    keys = readers.keys_of({name: tuple(tensor.shape) for name, tensor in weights.items()})
    verdict = dict(readers.verdicts(keys, SD1, {}, {}))["diffusers"]
    text, unet = copy.deepcopy(tiny["text_encoder"]), copy.deepcopy(tiny["unet"])
    try:
        pipe_of(tiny | {"text_encoder": text, "unet": unet}).load_lora_weights(tmp_path, weight_name="a.safetensors")
    except Exception:  # noqa: BLE001 - whatever it raises
        assert verdict.refusal is not None
        return
    found = 0
    for model in (text, unet):
        for module in model.modules():
            for layer in getattr(module, "lora_B", {}).values():
                found += not layer.weight.is_meta and bool(layer.weight.any())
    assert verdict.refusal is None
    skipped = set(verdict.skipped)
    assert found == sum(
        "up" in name or "lora_B" in name for name in weights if name not in skipped and "lora" in name.split(".", 1)[-1]
    )


# ---- any tensor ---------------------------------------------------------------------------------------------

STRANGE = {
    "IA3": {"lora_te_text_model_encoder_layers_0_mlp_fc1.on_input": torch.tensor(True)},
    "a bias": {"lora_te_text_model_encoder_layers_0_mlp_fc1.bias": torch.ones(5)},
    "a number": {"lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": torch.tensor(1.0)},
    "empty": {
        "lora_unet_conv_in.lora_down.weight": torch.ones(0, 4),
        "lora_unet_conv_in.lora_up.weight": torch.ones(4, 0),
    },
    "1-D matrices": {"unet.a.lora_A.weight": torch.ones(3), "unet.a.lora_B.weight": torch.ones(3)},
    "odd names": {
        "": torch.ones(1),
        ".": torch.ones(1),
        "..": torch.ones(2),
        ".alpha": torch.ones(1),
        "日本 語": torch.ones(1),
    },
    "5-D": {
        "lora_unet_conv_in.lora_down.weight": torch.ones(1, 1, 1, 1, 1),
        "lora_unet_conv_in.lora_up.weight": torch.ones(2, 1),
    },
    "8 bits": {
        "lora_unet_conv_in.lora_down.weight": torch.ones(2, 2).to(torch.float8_e4m3fn),
        "a.b": torch.ones(2).to(torch.float8_e5m2),
    },
    "whole numbers": {
        "lora_unet_conv_in.alpha": torch.tensor(3),
        "lora_unet_conv_in.lora_down.weight": torch.ones(2, 2, dtype=torch.int16),
        "lora_unet_conv_in.lora_up.weight": torch.ones(2, 2, dtype=torch.int16),
    },
}


@pytest.mark.parametrize("weights", STRANGE.values(), ids=STRANGE)
@pytest.mark.parametrize("form", [[], ["--json"], ["--show_all_keys"]])
def test_any_tensor_can_be_reported(tmp_path, capsys, weights, form):
    save_file(weights, tmp_path / "a.safetensors")
    assert check_lora_weights.main([str(tmp_path / "a.safetensors"), *form]) in (0, 1)
    assert "Traceback" not in capsys.readouterr().err


def test_any_name_and_shape_gets_a_verdict_from_every_program():
    rng = random.Random(0)
    pieces = [
        "lora_unet_",
        "lora_te_",
        "conv_in",
        "unet",
        "mid_block",
        ".",
        ".weight",
        ".alpha",
        ".lora_up.weight",
        "_lora.up.weight",
        ".lora_A",
        ".default",
        ".hada_w1_a",
        ".oft_blocks",
        ".on_input",
        "bundle_emb.",
        ".w_norm",
        ".a1.weight",
        "é",
    ]
    for _ in range(500):
        names = {"".join(rng.choices(pieces, k=rng.randint(0, 5))) for _ in range(rng.randint(1, 5))}
        shapes = {name: tuple(rng.choices((0, 1, 2, 768), k=rng.randint(0, 5))) for name in names}
        family = rng.choice([None, *FAMILIES])
        keys = readers.keys_of(shapes)
        readers.detect(shapes, {})
        found = dict(readers.verdicts(keys, family, {}, {}))
        assert list(found) == TITLES
        for verdict in found.values():
            assert verdict.line()
            assert verdict.refusal is not None or verdict.applied + len(verdict.skipped) == len(shapes)


def test_every_row_names_its_source():
    for program in programs.PROGRAMS:
        assert program.sources
        for source in program.sources:
            assert all((source.version, source.file)) and source.date >= "2026-11-25"
    assert readers.versions().keys() == set(TITLES)


def test_an_alpha_counts_as_misread_where_it_is_missing():
    names = [module_name(Layer(UNET, f"mid_block.resnets.{index}.conv1"), SD1) for index in (0, 1)]
    shapes = {f"{name}{ending}": shape for name in names for ending, shape in LORA.items()}
    del shapes[f"{names[1]}.alpha"]
    keys = readers.keys_of(shapes)
    assert "one alpha" in dict(readers.verdicts(keys, SD1, {names[0]: 1.0, names[1]: 2.0}, {}))["diffusers"].line()
    assert dict(readers.verdicts(keys, SD1, dict.fromkeys(names, 2.0), {}))["diffusers"].is_whole


OTHER_ALPHAS = {"lora_adapter_metadata": '{"lora_alpha": 1, "r": 4}'}


@pytest.mark.parametrize(
    ("settings", "is_hidden"),
    [
        ('{"unet.lora_alpha": 1, "unet.r": 4}', True),
        ('{"lora_alpha": 1, "r": 4}', True),  # of a part that was saved alone
        ('{"lora_alpha": 4, "r": 4, "alpha_pattern": {"conv1": 1}, "rank_pattern": {}}', True),
        ('{"lora_alpha": 4, "r": 4, "alpha_pattern": null}', False),
        ('{"text_encoder.lora_alpha": 8, "text_encoder.r": 8}', False),
        ('{"no_lora_alpha": 8}', False),
        *((text, False) for text in ("{", "[1]", "1", "null", '"lora_alpha"')),
    ],
)
def test_alphas_in_the_metadata_are_seen_in_any_form(settings, is_hidden):
    assert readers.has_alphas_of_peft({"lora_adapter_metadata": settings}) == is_hidden


def test_only_a_file_that_is_read_wholly_counts_as_read():
    whole = of("lora_unet_mid_block_resnets_1_conv1", **WHOLE_LORA)
    embedding = {"bundle_emb.word.string_to_param.*": (1, 8)}
    unread = of("lora_unet_conv_norm_out", w_norm=(8,), b_norm=(8,))  # though the name begins as it knows
    paths = {f"unet.mid_block.resnets.1.conv1{ending}": shape for ending, shape in PEFT.items()}
    given = [(whole, {}), (whole | embedding, {}), (whole | unread, {}), (paths, {}), (whole, OTHER_ALPHAS)]
    assert [readers.reads_wholly(A1111, *file) for file in given] == [True, True, False, False, False]


# ---- the pages ----------------------------------------------------------------------------------------------

DOCS = ROOT / "docs"
SIGNS = {"✓": WHOLE, "–": NOTHING, "✗": REFUSES}
# Rows of the table of kinds in the order of the pages.
ON_PAGES = (
    "LoRA, DoRA, Tucker, LoHa, LoKr, GLoRA, difference, bias beside LoRA, norm, OFT, BOFT, IA3, bundled embedding"
)


def table_under(page, first_cell):
    """Return the rows of the table of a page whose heading begins with a cell."""
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first_cell} |"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows[0], rows[2:]


@pytest.mark.parametrize(
    ("page", "first"), [("lora_in_your_project.md", "tensors"), ("lora_in_your_project-ja.md", "テンソル")]
)
def test_the_table_of_kinds_on_the_page_is_what_the_check_says(page, first):
    heading, rows = table_under(page, first)
    assert heading[1:] == TITLES
    assert len(rows) == len(ON_PAGES.split(", "))
    for kind, (_, *signs) in zip(ON_PAGES.split(", "), rows, strict=True):
        shapes = KINDS[kind][0]
        plain = PAIR if set(PAIR) < set(shapes) else {}  # what the kind adds to a LoRA
        keys = readers.keys_of(of("lora_unet_mid_block_resnets_1_conv1", **WHOLE_LORA) | shapes)
        for (title, verdict), sign in zip(readers.verdicts(keys, SD1, {}, {}), signs, strict=True):
            added = set(shapes) - set(plain)
            does = WHOLE if not added & set(verdict.skipped) else NOTHING
            assert SIGNS[sign] == (REFUSES if verdict.refusal is not None else does), (kind, title)


@pytest.mark.parametrize("page", ["lora_in_your_project.md", "lora_in_your_project-ja.md"])
def test_the_table_of_programs_has_the_versions_of_the_rows(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    for title, versions in readers.versions().items():
        line = next(line for line in text.splitlines() if line.startswith(f"| {title} |") and "2026-11-25" in line)
        numbers = [part.replace(" (PyPI)", "").split()[-1] for part in versions.split(", ")]
        assert all(number in line for number in numbers if number != "master"), title
