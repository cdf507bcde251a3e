"""LoRA files over every layer of a tiny SDXL model, in every naming, and where they act, for tests."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from tensors import Tensors

from library.models.base import text_body

UNET = "model.diffusion_model."
CLIP_L = "conditioner.embedders.0.transformer.text_model."
OPENCLIP = "conditioner.embedders.1.model."
OPENCLIP_WORDS = {"self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
Layer = tuple[str, str]  # a part of the model, a path in it
Place = tuple[str, int | None]  # a tensor of the checkpoint, and which third of it
Network = dict[Layer, tuple[torch.Tensor, torch.Tensor, float]]  # down, up, alpha


class Sdxl(NamedTuple):
    """Models, their files, the tensors of the checkpoint, and where the weight of each layer is in it."""

    models: dict[str, Any]
    paths: dict[str, Path]
    state: dict[str, torch.Tensor]
    places: dict[Layer, Place]


def read_sdxl(models: dict[str, Any], paths: dict[str, Path]) -> Sdxl:
    """Return the models with the place of every layer in their checkpoint, found by content."""
    state = load_file(paths["safetensors"])
    by_content = {
        tensor.numpy().tobytes(): name.removesuffix(".weight")
        for name, tensor in state.items()
        if name.startswith(UNET) and name.endswith(".weight") and tensor.ndim > 1
    }
    places: dict[Layer, Place] = {}
    for path, module in models["unet"].named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            places["unet", path] = (f"{by_content[module.weight.numpy().tobytes()]}.weight", None)
    assert len(places) == len(by_content)
    for part in ("text_encoder", "text_encoder_2"):
        for path, module in text_body(models[part]).named_modules():
            if isinstance(module, torch.nn.Linear):
                places[part, path] = (f"{CLIP_L}{path}.weight", None) if part == "text_encoder" else openclip(path)
    return Sdxl(models, paths, state, places)


def openclip(path: str) -> Place:
    """Return where a layer of the second text encoder stands: query, key and value are one tensor."""
    _, _, layer, rest = path.split(".", 3)
    block = f"{OPENCLIP}transformer.resblocks.{layer}."
    if rest in OPENCLIP_WORDS:
        return f"{block}{OPENCLIP_WORDS[rest]}.weight", None
    return f"{block}attn.in_proj_weight", "qkv".index(rest.removeprefix("self_attn.")[0])


def make_network(sdxl: Sdxl, seed: int = 0) -> Network:
    """Return layer -> (down, up, alpha): random, of ranks 2 to 4, with an alpha of its own each."""
    generator = torch.Generator().manual_seed(seed)
    network: Network = {}
    for at, (part, path) in enumerate(sdxl.places):
        weight = dict(text_body(sdxl.models[part]).named_modules())[path].weight
        rank = 2 + at % 3
        down = torch.randn((rank, *weight.shape[1:]), generator=generator) * 0.2
        up = torch.randn((weight.shape[0], rank, *(1 for _ in weight.shape[2:])), generator=generator) * 0.2
        network[part, path] = (down, up, 1.0 + at % 7)
    return network


def sgm_word(sdxl: Sdxl, part: str, path: str) -> str:
    return f"lora_unet_{sdxl.places[part, path][0].removeprefix(UNET).removesuffix('.weight').replace('.', '_')}"


def one_word(part: str, path: str) -> str:
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_text_model_", "text_encoder_2": "lora_te2_text_model_"}
    return prefix[part] + path.replace(".", "_")


def dotted(part: str, path: str) -> str:
    return f"{part}.{path}" if part == "unet" else f"{part}.text_model.{path}"


def write_network(sdxl: Sdxl, network: Network, path: Path, naming: str) -> Path:
    """Write a LoRA file in the naming `sgm`, `diffusers` or `peft`."""
    tensors: dict[str, torch.Tensor] = {}
    metadata: dict[str, Any] = {}
    for (part, layer), (down, up, alpha) in network.items():
        if naming == "peft":
            stem = dotted(part, layer)
            tensors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
            inner = stem.partition(".")[2]
            metadata.setdefault(f"{part}.alpha_pattern", {})[inner] = alpha
            metadata |= {f"{part}.r": 4, f"{part}.lora_alpha": 99.0}
        else:
            stem = sgm_word(sdxl, part, layer) if naming == "sgm" and part == "unet" else one_word(part, layer)
            tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(metadata)} if metadata else None)
    return path


def expected_state(sdxl: Sdxl, networks: Iterable[tuple[Network, Callable[[Layer], float]]]) -> dict[str, torch.Tensor]:
    """Return the checkpoint with networks, each with the strength of its layers, added in float64."""
    state = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in sdxl.state.items()}
    for network, strength in networks:
        for key, (down, up, alpha) in network.items():
            name, third = sdxl.places[key]
            delta = strength(key) * alpha / len(down) * (up.double().flatten(1) @ down.double().flatten(1))
            whole = state[name].clone()
            part = whole if third is None else whole.chunk(3)[third]
            part += delta.reshape(part.shape)
            state[name] = whole
    return state


def assert_is(found: Tensors, expected: Tensors, base: Tensors) -> int:
    """Hold that a merged checkpoint is what was expected in float64, and the rest equal to the bit; count what changed."""
    assert found.keys() == expected.keys()
    changed = 0
    for name, tensor in expected.items():
        if torch.equal(tensor, base[name].double() if tensor.is_floating_point() else base[name]):
            assert torch.equal(found[name], base[name]), name
        else:
            changed += 1
            torch.testing.assert_close(found[name].double(), tensor, rtol=1e-5, atol=1e-6, msg=name)
    return changed


# ---- blocks ----------------------------------------------------------------------------------------------------

INS, OUTS = [f"IN{n:02}" for n in range(12)], [f"OUT{n:02}" for n in range(12)]
WORDS = {
    12: "BASE IN04 IN05 IN07 IN08 MID OUT00 OUT01 OUT02 OUT03 OUT04 OUT05",
    17: "BASE IN01 IN02 IN04 IN05 IN07 IN08 MID OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11",
    20: "BASE IN00 IN01 IN02 IN03 IN04 IN05 IN06 IN07 IN08 MID OUT00 OUT01 OUT02 OUT03 OUT04 OUT05 OUT06 OUT07 OUT08",
    26: " ".join(["BASE", *INS, "MID", *OUTS]),
}
LISTS = {length: words.split() for length, words in WORDS.items()}


def block_weights(length: int) -> list[float]:
    """Return weights that tell the blocks apart, among them 0, 1 and a negative one."""
    return [0, 1, -0.5, *(round(0.1 * n, 1) for n in range(3, length))]


def sdxl_block(sdxl: Sdxl, key: Layer) -> str:
    """Return the block of an SDXL layer, by where it stands in the checkpoint."""
    if key[0] != "unet":
        return "BASE"
    name = sdxl.places[key][0].removeprefix(UNET)
    start, number = name.split(".")[:2]
    table = {"input_blocks": INS, "output_blocks": OUTS}
    if start in table:
        return table[start][int(number)]
    return {"middle_block": "MID", "out": "OUT09", "time_embed": "IN00", "label_emb": "IN00"}[start]


def sd_block(module: str) -> str:
    """Return the block of a module of SD 1.x or 2.x, by its name in diffusers' words."""
    if module.startswith("lora_te_"):
        return "BASE"
    if "_mid_block_" in module:
        return "MID"
    found = re.match(r"lora_unet_(down|up)_blocks_(\d)_([a-z]+)_(\d)", module)
    assert found
    side, block, kind, layer = found.groups()
    if kind.endswith("samplers"):
        return INS[3 * int(block) + 3] if side == "down" else OUTS[3 * int(block) + 2]
    return INS[3 * int(block) + int(layer) + 1] if side == "down" else OUTS[3 * int(block) + int(layer)]
