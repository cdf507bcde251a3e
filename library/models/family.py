"""Model families: all differences between SD 1.x, SD 2.x and SDXL, as data.

Sizes are those of the published models; those of other checkpoints are read from their shapes. A new family needs an
instance here and its detection in `detect_family`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from library.config.values import LATENT_SCALE
from library.errors import UserError
from library.models import keys
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
TEXT_HEAD_WIDTH = 64  # channels of an attention head in the text encoders of all families


def clip_config(width: int, layers: int, *, activation: str, projection: int, padding: int) -> dict[str, Any]:
    """Return the configuration of a text encoder; padding is the id of the padding token."""
    return {
        "vocab_size": 49408,
        "max_position_embeddings": WINDOW,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // TEXT_HEAD_WIDTH,
        "hidden_act": activation,
        "projection_dim": projection,
        "pad_token_id": padding,
    }


@dataclasses.dataclass(frozen=True, eq=False)  # compared by identity, so hashable
class TextModel:
    """A text encoder of a family: its names in files, and its configuration."""

    folder: str  # in Diffusers folders, and prefix of its modules in PEFT's names
    layout: str  # in original files: "clip" or "openclip"
    prefixes: tuple[str, ...]  # in original files, in the order of search
    lora_prefix: str  # of its modules in LoRA files
    config: dict[str, Any]
    pad_token: str = EOS_TOKEN
    layer: int = 1  # counted from the end: the U-Net was trained with its states
    has_final_norm: bool = True  # whether the final layer norm is applied to the states of any layer
    has_projection: bool = False  # a matrix on the pooled output, an input of the U-Net
    unused_layers: int = 0  # last layers of original files, which training did not use


@dataclasses.dataclass(frozen=True, eq=False)  # compared by identity, so hashable
class ModelFamily:
    """One generation of Stable Diffusion."""

    name: str
    title: str
    context_width: int
    unet: dict[str, Any]
    unet_head_width: int | None  # channels of an attention head; None: the same number of heads in every block
    vae: dict[str, Any]
    text_models: tuple[TextModel, ...]
    version: str
    epsilon_architecture: str
    v_architecture: str

    def text_model(self, folder: str) -> TextModel:
        """Return the text encoder with a folder name."""
        return next(text for text in self.text_models if text.folder == folder)

    @property
    def side(self) -> int:
        """Side of the squares that the published models draw, in pixels."""
        return LATENT_SCALE * self.unet["sample_size"]

    @property
    def step(self) -> int:
        """Pixels of which a side must be a multiple, since each block of the U-Net but the last halves it."""
        return LATENT_SCALE * 2 ** (len(self.unet["block_out_channels"]) - 1)

    @property
    def text_widths(self) -> dict[str, int]:
        """Width of each text encoder, by folder."""
        return {text.folder: text.config["hidden_size"] for text in self.text_models}

    def base_version(self, *, predicts_v: bool) -> str:
        """Return `ss_base_model_version` of models that predict noise, or v."""
        return f"{self.version}_v" if predicts_v else self.version

    def architecture(self, *, predicts_v: bool) -> str:
        """Return `modelspec.architecture` of models that predict noise, or v."""
        return self.v_architecture if predicts_v else self.epsilon_architecture


CLIP_L = clip_config(768, 12, activation="quick_gelu", projection=768, padding=49407)
SD1 = ModelFamily(
    name="sd1",
    title="SD 1.x",
    context_width=768,
    unet=UNET_BASE | {"attention_head_dim": 8, "cross_attention_dim": 768, "use_linear_projection": False},
    unet_head_width=None,
    vae=VAE_CONFIG,
    text_models=(
        TextModel(
            folder="text_encoder",
            layout="clip",
            # Some files lack `text_model`.
            prefixes=tuple(f"{keys.TEXT_PREFIX}transformer.{inner}" for inner in ("text_model.", "")),
            lora_prefix="lora_te_",
            config=CLIP_L,
        ),
    ),
    version="sd_v1",
    epsilon_architecture="stable-diffusion-v1",
    v_architecture="stable-diffusion-v1",
)
SD2 = ModelFamily(
    name="sd2",
    title="SD 2.x",
    context_width=1024,
    unet=UNET_BASE
    | {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True},
    unet_head_width=64,
    vae=VAE_CONFIG,
    text_models=(
        TextModel(
            folder="text_encoder",
            layout="openclip",
            prefixes=(f"{keys.TEXT_PREFIX}model.",),
            lora_prefix="lora_te_",
            config=clip_config(1024, 23, activation="gelu", projection=512, padding=0),
            pad_token="!",
            unused_layers=1,
        ),
    ),
    version="sd_v2",
    epsilon_architecture="stable-diffusion-v2-512",
    v_architecture="stable-diffusion-v2-768-v",
)
SDXL = ModelFamily(
    name="sdxl",
    title="SDXL",
    context_width=2048,
    unet=UNET_BASE
    | {
        "sample_size": 128,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    unet_head_width=64,
    vae=VAE_CONFIG | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
    text_models=(
        TextModel(
            folder="text_encoder",
            layout="clip",
            prefixes=(f"{keys.TEXT_PREFIX_XL}embedders.0.transformer.text_model.",),
            lora_prefix="lora_te1_",
            config=CLIP_L,
            layer=2,
            has_final_norm=False,
        ),
        TextModel(
            folder="text_encoder_2",
            layout="openclip",
            prefixes=(f"{keys.TEXT_PREFIX_XL}embedders.1.model.",),
            lora_prefix="lora_te2_",
            config=clip_config(1280, 32, activation="gelu", projection=1280, padding=1),
            pad_token="!",
            layer=2,
            has_final_norm=False,
            has_projection=True,
        ),
    ),
    version="sdxl_base_v1-0",
    epsilon_architecture="stable-diffusion-xl-v1-base",
    v_architecture="stable-diffusion-xl-v1-base",
)
FAMILIES = (SD1, SD2, SDXL)


def detect_family(shapes: Shapes, source: str) -> ModelFamily:
    """Return the family of an original-layout checkpoint from the names and shapes of its tensors."""
    if any(name.startswith(f"{keys.TEXT_PREFIX_XL}embedders.0.model.") for name in shapes):
        raise UserError(f"{source} is an SDXL refiner, which is not supported; the base model is another file")
    for family in (SDXL, SD2, SD1):
        if any(name.startswith(text.prefixes) for text in family.text_models for name in shapes):
            return family
    if any(name.startswith((f"{keys.TEXT_PREFIX_XL}embedders.", f"{keys.UNET_PREFIX}label_emb.")) for name in shapes):
        return SDXL
    for name, shape in shapes.items():
        if name.startswith(keys.UNET_PREFIX) and name.endswith("attn2.to_k.weight"):
            return SD2 if shape[1] == SD2.context_width else SD1
    raise UserError(
        f"{source} is not a Stable Diffusion checkpoint (1.x, 2.x or XL): it has no tensors under {keys.UNET_PREFIX} "
        f"(its first is {min(shapes, default='none')})"
    )


def check_flags(family: ModelFamily, source: Path, *, v1: bool = False, v2: bool = False, sdxl: bool = False) -> None:
    """Raise UserError for --v1, --v2 or --sdxl that was given with a model of another family."""
    for flag, given, expected in (("--v1", v1, SD1), ("--v2", v2, SD2), ("--sdxl", sdxl, SDXL)):
        if given and family is not expected:
            raise UserError(f"{flag} was given, but {source} is an {family.title} model: omit {flag}")


class UnetInput(NamedTuple):
    """A kind of U-Net by its input."""

    title: str
    pipeline: str | None  # end of the name of its pipeline in diffusers; None: folders of it are not written


INPUTS: dict[int, UnetInput] = {
    4: UnetInput("a model that takes latents", "Pipeline"),
    5: UnetInput("a depth model", None),  # its pipeline needs the depth estimator
    8: UnetInput("an editing model", "InstructPix2PixPipeline"),
    9: UnetInput("an inpainting model", "InpaintPipeline"),
}
UNKNOWN_INPUT = UnetInput("another kind of model", None)


def check_channels(channels: Any, source: Path) -> None:
    """Raise UserError for a U-Net with inputs besides latents, by its number of input channels; None: unknown."""
    if channels in (None, UNET_BASE["in_channels"]):
        return
    raise UserError(
        f"{source} is {input_of(channels).title}: its U-Net takes {channels} channels, and only those that take 4 "
        "can be used for training and generation"
    )


def input_of(channels: Any) -> UnetInput:
    """Return the kind of a U-Net with a number of input channels."""
    return INPUTS.get(channels, UNKNOWN_INPUT) if isinstance(channels, int) else UNKNOWN_INPUT


def pipeline_name(family: ModelFamily, channels: int, source: Path) -> str:
    """Return the pipeline of diffusers for a U-Net with a number of input channels.

    Raises UserError for kinds whose folders need more than this suite writes.
    """
    kind = input_of(channels)
    if kind.pipeline is None:
        known = ", ".join(str(number) for number, row in INPUTS.items() if row.pipeline)
        raise UserError(
            f"{source} is {kind.title}: its U-Net takes {channels} channels, and a Diffusers folder of it needs more "
            f"than the parts that are converted; those that take {known} are converted"
        )
    start = "StableDiffusionXL" if family is SDXL else "StableDiffusion"
    return start + kind.pipeline


def detect_folder_family(unet_config: Mapping[str, Any], text_config: Mapping[str, Any]) -> ModelFamily:
    """Return the family of a Diffusers folder from its configurations."""
    width = unet_config.get("cross_attention_dim")
    if unet_config.get("addition_embed_type") == SDXL.unet["addition_embed_type"]:
        return SDXL
    for family in (SD1, SD2):
        if width == family.context_width:
            return family
    return SD2 if text_config.get("hidden_act") == SD2.text_models[0].config["hidden_act"] else SD1
