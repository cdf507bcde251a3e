"""Original checkpoint names <-> Diffusers names, with one rule for each part of a model.

A rule maps a Diffusers name to the name in an original-layout file. Applied to all names of a model it gives the
table for loading and for saving.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

# Prefixes of the names in original files: U-Net, VAE, text encoders (of SD 1.x and 2.x, of SDXL).
UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_PREFIX, TEXT_PREFIX_XL = TEXT_PREFIXES = ("cond_stage_model.", "conditioner.")

UNET_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
IN_RESNET = re.compile(rf"^((?:input_blocks|middle_block|output_blocks)[.\d]*\.)({'|'.join(UNET_RESNET)})\.")
VAE_NAMES = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
    "mid_block.attentions.0.to_q": "mid.attn_1.q",
    "mid_block.attentions.0.to_k": "mid.attn_1.k",
    "mid_block.attentions.0.to_v": "mid.attn_1.v",
    "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
}
# Diffusers before 0.17 wrote the VAE's attention under these names.
VAE_OLD_DIFFUSERS = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
OPENCLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
OPENCLIP_TOP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
FUSED = re.compile(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)")


def without_prefix(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the names with a prefix, under the names without it."""
    return {name[len(prefix) :]: shape for name, shape in shapes.items() if name.startswith(prefix)}


def first_prefix(prefixes: Iterable[str], names: Iterable[str]) -> str | None:
    """Return the first of the prefixes that some name has."""
    return next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in names)), None)


def block_bounds(layers_per_block: int | Sequence[int], block: int, *, upwards: bool = False) -> tuple[int, int]:
    """Return the number of stages of one side of a U-Net before a block, and up to its end.

    A block has a stage for each layer and one more: a sampler, or in up blocks another layer.
    """
    if isinstance(layers_per_block, int):
        return (layers_per_block + 1) * block, (layers_per_block + 1) * (block + 1)
    stages = [layers + 1 for layers in (reversed(layers_per_block) if upwards else layers_per_block)]
    return sum(stages[:block]), sum(stages[: block + 1])


CONTROL_NET_PREFIX = "control_model."
# Beginnings of the names of a ControlNet beside those of a U-Net, as patterns -> original ones.
CONTROL_NET = {
    r"controlnet_down_blocks\.(\d+)\.": r"zero_convs.\1.0.",
    r"controlnet_mid_block\.": "middle_block_out.0.",
    r"controlnet_cond_embedding\.conv_in\.": "input_hint_block.0.",
    r"controlnet_cond_embedding\.conv_out\.": "input_hint_block.14.",
}


def unet_rule(
    layers_per_block: int | Sequence[int], upsampler_beside_attention: frozenset[int]
) -> Callable[[str], str]:
    """Return the rule of a U-Net with so many resnets in each down block, or in all of them.

    The set has the up blocks whose upsampler follows an attention.
    """

    def rule(name: str) -> str:
        for ours, original in UNET_TOP.items():
            if name.startswith(f"{ours}."):
                return _with_resnet_names(original + name[len(ours) :])
        match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
        if match is None:
            raise KeyError(name)
        side, block, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        start, end = block_bounds(layers_per_block, block, upwards=side == "up")
        if kind == "downsamplers":
            return f"input_blocks.{end}.0.{rest.replace('conv', 'op', 1)}"
        if kind == "upsamplers":
            position = 1 + (block in upsampler_beside_attention)
            return f"output_blocks.{end - 1}.{position}.{rest}"
        stage = f"input_blocks.{start + layer + 1}" if side == "down" else f"output_blocks.{start + layer}"
        return _with_resnet_names(f"{stage}.{int(kind == 'attentions')}.{rest}")

    return rule


def control_net_rule(layers_per_block: int) -> Callable[[str], str]:
    """Return the rule of a ControlNet, which is the first half of a U-Net and some convolutions."""
    unet = unet_rule(layers_per_block, frozenset())

    def rule(name: str) -> str:
        for ours, original in CONTROL_NET.items():
            if found := re.match(ours, name):
                return found.expand(original) + name[found.end() :]
        if found := re.match(r"controlnet_cond_embedding\.blocks\.(\d+)\.", name):
            return f"input_hint_block.{2 * int(found[1]) + 2}.{name[found.end() :]}"
        return unet(name)

    return rule


def _with_resnet_names(name: str) -> str:
    return IN_RESNET.sub(lambda match: f"{match[1]}{UNET_RESNET[match[2]]}.", name)


def vae_rule(num_blocks: int) -> Callable[[str], str]:
    """Return the rule of a VAE with num_blocks levels; the original numbers the levels of the decoder in reverse."""

    def rule(name: str) -> str:
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
        name = re.sub(r"down_blocks\.(\d+)\.", r"down.\1.", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda match: f"up.{num_blocks - 1 - int(match[1])}.block.", name)
        name = re.sub(r"up_blocks\.(\d+)\.", lambda match: f"up.{num_blocks - 1 - int(match[1])}.", name)
        for ours, original in VAE_NAMES.items():
            name = re.sub(rf"(^|\.){re.escape(ours)}\.", rf"\g<1>{original}.", name)
        return name

    return rule


def vae_old_diffusers_name(name: str) -> str:
    """Return the name before Diffusers 0.17 for a present name of the VAE."""
    return _with_attention_names(name, VAE_OLD_DIFFUSERS)


def vae_present_name(name: str) -> str:
    """Return the present name for a name of the VAE in any version of Diffusers."""
    return _with_attention_names(name, {old: present for present, old in VAE_OLD_DIFFUSERS.items()})


def _with_attention_names(name: str, renames: Mapping[str, str]) -> str:
    head, separator, tail = name.partition("mid_block.attentions.0.")
    layer, dot, kind = tail.rpartition(".")
    return f"{head}{separator}{renames.get(layer, layer)}{dot}{kind}" if separator else name


def openclip_name(name: str) -> str:
    """Return the OpenCLIP name for a name of the text model without `text_model.`.

    Query, key and value are fused in `attn.in_proj_weight` and `attn.in_proj_bias`; `fused_slice` returns the third.
    """
    if name in OPENCLIP_TOP:
        return OPENCLIP_TOP[name]
    fused = FUSED.fullmatch(name)
    if fused:
        return f"transformer.resblocks.{fused[1]}.attn.in_proj_{fused[3]}"
    for ours, original in OPENCLIP_LAYER.items():
        match = re.fullmatch(rf"encoder\.layers\.(\d+)\.{re.escape(ours)}\.(\w+)", name)
        if match:
            return f"transformer.resblocks.{match[1]}.{original}.{match[2]}"
    raise KeyError(name)


def fused_slice(name: str) -> int | None:
    """Return 0, 1 or 2 for query, key or value of a text model: the third of the fused tensor's rows."""
    fused = FUSED.fullmatch(name)
    return "qkv".index(fused[2]) if fused else None


def holds_vae(names: Iterable[str]) -> bool:
    """Return whether some of the names are those of a VAE, in a separate file or in a whole model."""
    starts = ("encoder.down.", "encoder.down_blocks.", f"{VAE_PREFIX}encoder.down.")
    return any(name.startswith(starts) for name in names)
