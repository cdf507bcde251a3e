"""Where a LoRA module acts in a checkpoint of the original layout: which tensor, and which third of a fused one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from library.models import keys

Shapes = Mapping[str, Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Place:
    """A tensor of a checkpoint; third is 0, 1 or 2 for query, key or value where the three are one tensor."""

    key: str
    third: int | None = None


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """A text encoder in checkpoints: prefix of its modules in LoRA files, prefix of its tensors, their layout."""

    lora_prefix: str
    prefix: str
    is_openclip: bool


# Family -> its text encoders; files of SD 1.x leave out `text_model` now and then.
TEXT_ENCODERS = {
    "SD 1.x": (
        TextEncoder("lora_te_text_model_", "cond_stage_model.transformer.text_model.", False),
        TextEncoder("lora_te_text_model_", "cond_stage_model.transformer.", False),
    ),
    "SD 2.x": (TextEncoder("lora_te_text_model_", "cond_stage_model.model.", True),),
    "SDXL": (
        TextEncoder("lora_te1_text_model_", "conditioner.embedders.0.transformer.text_model.", False),
        TextEncoder("lora_te2_text_model_", "conditioner.embedders.1.model.", True),
    ),
}
TEXT_LAYERS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
    "mlp.fc1",
    "mlp.fc2",
)
# Layers of a U-Net in diffusers' names, below a block.
RESNET = ("conv1", "conv2", "time_emb_proj", "conv_shortcut")
ATTENTION = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")
TRANSFORMER = (*ATTENTION, *(name.replace("attn1", "attn2") for name in ATTENTION), "ff.net.0.proj", "ff.net.2")
MOST_TRANSFORMERS = 10  # in one attention of SDXL
UP_BLOCKS_WITH_ATTENTION = {"SD 1.x": (1, 2, 3), "SD 2.x": (1, 2, 3), "SDXL": (0, 1)}


def places(shapes: Shapes, family: str) -> dict[str, Place]:
    """Return module name -> its place, for every layer of a checkpoint with tensors of such shapes."""
    return dict(_unet_places(shapes, family)) | dict(_text_places(shapes, family))


def _unet_places(shapes: Shapes, family: str) -> Iterator[tuple[str, Place]]:
    rule = keys.unet_rule(2, frozenset(UP_BLOCKS_WITH_ATTENTION[family]))
    for name in unet_layers():
        key = f"{keys.UNET_PREFIX}{rule(f'{name}.weight')}"
        if key in shapes:
            yield f"lora_unet_{name.replace('.', '_')}", Place(key)
            if family == "SDXL":  # whose files are named after the checkpoint
                yield f"lora_unet_{key[len(keys.UNET_PREFIX) : -len('.weight')].replace('.', '_')}", Place(key)


def unet_layers() -> Iterator[str]:
    """Yield the diffusers names of all layers that a U-Net of Stable Diffusion may have."""
    sides = [(f"{side}_blocks.{index}", 3, 3) for side in ("down", "up") for index in range(4)]
    for block, resnets, attentions in [*sides, ("mid_block", 2, 1)]:
        yield from (f"{block}.resnets.{index}.{layer}" for index in range(resnets) for layer in RESNET)
        for index in range(attentions):
            attention = f"{block}.attentions.{index}"
            yield from (f"{attention}.{layer}" for layer in ("proj_in", "proj_out"))
            for depth in range(MOST_TRANSFORMERS):
                yield from (f"{attention}.transformer_blocks.{depth}.{layer}" for layer in TRANSFORMER)
        if block != "mid_block":
            yield f"{block}.{'downsamplers' if block.startswith('down') else 'upsamplers'}.0.conv"


def _text_places(shapes: Shapes, family: str) -> Iterator[tuple[str, Place]]:
    for encoder in TEXT_ENCODERS[family]:
        for name in _text_layers():
            fused = keys.fused_slice(f"{name}.weight") if encoder.is_openclip else None
            original = keys.openclip_name(f"{name}.weight") if encoder.is_openclip else f"{name}.weight"
            if encoder.prefix + original in shapes:
                yield encoder.lora_prefix + name.replace(".", "_"), Place(encoder.prefix + original, fused)


def _text_layers() -> Iterator[str]:
    for index in range(32):  # the deepest, OpenCLIP bigG
        yield from (f"encoder.layers.{index}.{layer}" for layer in TEXT_LAYERS)
