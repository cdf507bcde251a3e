"""Model families: everything in which SD 1.x, SD 2.x (and later SDXL) differ, as data in one place.

Sizes here are those of the published models; a checkpoint of other sizes takes them from its shapes. Adding
a family means adding an instance, its detection in `detect_family`, and its text encoding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.models.tokenizer import EOS_TOKEN, WINDOW

Shapes = Mapping[str, tuple[int, ...]]

UNET_BASE: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
}
VAE_CONFIG: dict[str, Any] = {
    "sample_size": 512,
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
TEXT_BASE: dict[str, Any] = {
    "vocab_size": 49408,
    "max_position_embeddings": WINDOW,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
}


@dataclasses.dataclass(frozen=True)
class ModelFamily:
    """One generation of Stable Diffusion."""

    name: str
    title: str
    context_width: int
    unet: dict[str, Any]
    unet_head_width: int | None  # channels of an attention head; None: as many heads in every block
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    text_layout: str  # in original files: "clip" or "openclip"
    text_prefixes: tuple[str, ...]  # in original files, in order of search
    pad_token: str
    base_version: str  # ss_base_model_version; v-prediction appends "_v"
    architecture: str  # modelspec.architecture
    architecture_v: str  # the same for v-prediction


SD1 = ModelFamily(
    name="sd1",
    title="SD 1.x",
    context_width=768,
    unet=UNET_BASE | {"attention_head_dim": 8, "cross_attention_dim": 768, "use_linear_projection": False},
    unet_head_width=None,
    vae=VAE_CONFIG,
    text_encoder=TEXT_BASE
    | {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "hidden_act": "quick_gelu",
        "projection_dim": 768,
        "pad_token_id": 49407,
    },
    text_layout="clip",
    text_prefixes=("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."),
    pad_token=EOS_TOKEN,
    base_version="sd_v1",
    architecture="stable-diffusion-v1",
    architecture_v="stable-diffusion-v1",
)
SD2 = ModelFamily(
    name="sd2",
    title="SD 2.x",
    context_width=1024,
    unet=UNET_BASE
    | {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True},
    unet_head_width=64,
    vae=VAE_CONFIG,
    text_encoder=TEXT_BASE
    | {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,  # the file has 24; the last one was not used in training
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "projection_dim": 512,
        "pad_token_id": 0,
    },
    text_layout="openclip",
    text_prefixes=("cond_stage_model.model.",),
    pad_token="!",
    base_version="sd_v2",
    architecture="stable-diffusion-v2-512",
    architecture_v="stable-diffusion-v2-768-v",
)

TEXT_HEAD_WIDTH = 64  # channels of an attention head in every CLIP text encoder of these families


def detect_family(shapes: Shapes, source: str) -> ModelFamily:
    """Return the family of an original-layout checkpoint from the names and shapes of its tensors."""
    if any(name.startswith("conditioner.embedders.") for name in shapes):
        raise UserError(f"{source} is an SDXL model; this version trains SD 1.x and SD 2.x")
    for family in (SD2, SD1):
        if any(name.startswith(family.text_prefixes) for name in shapes):
            return family
    for name, shape in shapes.items():
        if name.startswith("model.diffusion_model.") and name.endswith("attn2.to_k.weight"):
            return SD2 if shape[1] == SD2.context_width else SD1
    raise UserError(
        f"{source} is no Stable Diffusion 1.x or 2.x checkpoint: it has no tensors under model.diffusion_model. "
        f"(its first is {min(shapes, default='none')})"
    )


OTHER_INPUTS = ((5, "a depth model"), (8, "an editing model"), (9, "an inpainting model"))


def check_channels(channels: Any, source: Path) -> None:
    """Raise UserError for a U-Net that takes more than latents, by its input channels; None is not known."""
    if channels in (None, UNET_BASE["in_channels"]):
        return
    kind = next((title for number, title in OTHER_INPUTS if number == channels), "another kind of model")
    raise UserError(f"{source} is {kind}: its U-Net takes {channels} channels, and only those that take 4 are trained")


def detect_folder_family(unet_config: Mapping[str, Any], text_config: Mapping[str, Any]) -> ModelFamily:
    """Return the family of a Diffusers folder from its configurations."""
    width = unet_config.get("cross_attention_dim")
    for family in (SD1, SD2):
        if width == family.context_width:
            return family
    return SD2 if text_config.get("hidden_act") == SD2.text_encoder["hidden_act"] else SD1


# --------------------------------------------------------------------------------------------------------------
# Configurations of a checkpoint, from its shapes
# --------------------------------------------------------------------------------------------------------------


def unet_config(family: ModelFamily, shapes: Shapes) -> dict[str, Any]:
    """Return the U-Net's Diffusers configuration for the tensors (names without prefix) of a checkpoint."""
    num_blocks = len(family.unet["block_out_channels"])
    per_block = family.unet["layers_per_block"] + 1
    channels = tuple(
        shapes[f"input_blocks.{per_block * block + 1}.0.out_layers.3.weight"][0] for block in range(num_blocks)
    )
    context = shapes["input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"][1]
    heads = family.unet["attention_head_dim"]
    if family.unet_head_width is not None:
        heads = tuple(max(1, count // family.unet_head_width) for count in channels)
    return family.unet | {
        "block_out_channels": channels,
        "cross_attention_dim": context,
        "attention_head_dim": heads,
        "in_channels": shapes["input_blocks.0.0.weight"][1],
    }


def vae_config(family: ModelFamily, shapes: Shapes) -> dict[str, Any]:
    """Return the VAE's Diffusers configuration for the tensors (names without prefix) of a checkpoint."""
    num_blocks = len({name.split(".")[2] for name in shapes if name.startswith("encoder.down.")})
    if not num_blocks:
        raise KeyError("encoder.down")
    layers = len({name.split(".")[4] for name in shapes if name.startswith("encoder.down.0.block.")})
    channels = tuple(shapes[f"encoder.down.{block}.block.0.conv2.weight"][0] for block in range(num_blocks))
    return family.vae | {
        "block_out_channels": channels,
        "layers_per_block": layers,
        "down_block_types": ("DownEncoderBlock2D",) * num_blocks,
        "up_block_types": ("UpDecoderBlock2D",) * num_blocks,
    }


def text_encoder_config(family: ModelFamily, *, width: int, inner_width: int, num_layers: int) -> dict[str, Any]:
    """Return the text encoder's configuration for its sizes: hidden width, width inside the MLP, layers."""
    return family.text_encoder | {
        "hidden_size": width,
        "intermediate_size": inner_width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": max(1, width // TEXT_HEAD_WIDTH),
        "projection_dim": min(family.text_encoder["projection_dim"], width),
    }
