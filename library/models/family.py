"""Model families: all differences between SD 1.x, SD 2.x and SDXL, as data.

Sizes are those of the published models; those of other checkpoints are read from their shapes. A new family needs an
instance here and its detection in `detect_family`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.config.values import LATENT_SCALE
from library.errors import UserError
from library.models import keys
from library.models.tokenizer import EOS_ID, WINDOW, ZERO_ID

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
    cached_as: str  # part of the name that the folder of its tokenizer has in caches of sd-scripts
    pad_id: int = EOS_ID
    layer: int = 1  # counted from the end: the U-Net was trained with its states
    has_final_norm: bool = True  # whether the final layer norm is applied to the states of any layer
    has_projection: bool = False  # a matrix on the pooled output, an input of the U-Net
    unused_layers: int = 0  # last layers of original files, which training did not use

    @property
    def tokenizer_folder(self) -> str:
        """The folder of its tokenizer in Diffusers folders."""
        return self.folder.replace("text_encoder", "tokenizer")


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
    version: str  # in the metadata of networks
    v_version: str  # the same of models that predict v
    epsilon_architecture: str
    v_architecture: str
    implementation: str = "diffusers"  # in the metadata of networks
    has_clip_skip: bool = True  # whether models are used with other layers of the text encoder than their own
    pipeline: str = "StableDiffusion"  # beginning of the names of its pipelines in diffusers
    has_checkpoint_paths: bool = False  # whether LoRA files name its U-Net's layers by checkpoints, not by diffusers
    marks_v: bool = False  # whether web UIs go by empty tensors in a file that predicts v

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
    def takes_sizes(self) -> bool:
        """Whether the U-Net is told the size of the original picture and where it was cut."""
        return "addition_time_embed_dim" in self.unet

    @property
    def text_widths(self) -> dict[str, int]:
        """Width of each text encoder, by folder."""
        return {text.folder: text.config["hidden_size"] for text in self.text_models}

    def base_version(self, *, predicts_v: bool) -> str:
        """Return `ss_base_model_version` of models that predict noise, or v."""
        return self.v_version if predicts_v else self.version

    def clip_skip(self, given: int | None) -> int | None:
        """Return the layer to use for a --clip_skip, counted from the end; None: the one of the published models."""
        return given if self.has_clip_skip else None

    def clip_skip_note(self, given: int) -> str:
        """Return what to tell of a --clip_skip that `clip_skip` leaves out."""
        return f"--clip_skip {given} has no effect: {self.title} models are always used with the same layer"

    def architecture(self, *, predicts_v: bool) -> str:
        """Return `modelspec.architecture` of models that predict noise, or v."""
        return self.v_architecture if predicts_v else self.epsilon_architecture


SGM_SINGLE = f"{keys.TEXT_PREFIX_XL}embedders.0.model."  # of SD 2.x in the layout of SDXL, and of SDXL's refiner
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
            cached_as="clip-vit-large",
        ),
    ),
    version="sd_v1",
    v_version="sd_v1_v",
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
            prefixes=(f"{keys.TEXT_PREFIX}model.", SGM_SINGLE),  # the latter in the layout of SDXL
            lora_prefix="lora_te_",
            config=clip_config(1024, 23, activation="gelu", projection=512, padding=0),
            cached_as="stable-diffusion-2",
            pad_id=ZERO_ID,
            unused_layers=1,
        ),
    ),
    version="sd_v2",
    v_version="sd_v2_v",
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
            cached_as="clip-vit-large",
            layer=2,
            has_final_norm=False,
        ),
        TextModel(
            folder="text_encoder_2",
            layout="openclip",
            prefixes=(f"{keys.TEXT_PREFIX_XL}embedders.1.model.",),
            lora_prefix="lora_te2_",
            config=clip_config(1280, 32, activation="gelu", projection=1280, padding=1),
            cached_as="clip-vit-bigg",
            pad_id=ZERO_ID,
            layer=2,
            has_final_norm=False,
            has_projection=True,
        ),
    ),
    version="sdxl_base_v1-0",
    v_version="sdxl_base_v1-0",
    epsilon_architecture="stable-diffusion-xl-v1-base",
    v_architecture="stable-diffusion-xl-v1-base",
    implementation="https://github.com/Stability-AI/generative-models",
    has_clip_skip=False,
    pipeline="StableDiffusionXL",
    has_checkpoint_paths=True,
    marks_v=True,
)
FAMILIES = (SD1, SD2, SDXL)
REFINER_WIDTH = SDXL.text_models[1].config["hidden_size"]  # of its only text encoder, the second of the base model
# Beginnings of names in the files of models with a transformer in place of the U-Net.
TRANSFORMERS = {
    "joint_blocks.": "an SD 3 model",
    "double_blocks.": "a model of the kind of Flux",
    "double_layers.": "an AuraFlow model",
    "cap_embedder.": "a model of the kind of Lumina 2",
    "img_in.": "a model of the kind of Qwen-Image",
}


def detect_family(shapes: Shapes, source: str) -> ModelFamily:
    """Return the family of an original-layout checkpoint from the names and shapes of its tensors."""
    if shapes.get(f"{SGM_SINGLE}ln_final.weight") == (REFINER_WIDTH,):
        raise UserError(f"{source} is an SDXL refiner, which is not supported; the base model is another file")
    for family in (SDXL, SD2, SD1):
        if any(name.startswith(text.prefixes) for text in family.text_models for name in shapes):
            return family
    if any(name.startswith((f"{keys.TEXT_PREFIX_XL}embedders.", f"{keys.UNET_PREFIX}label_emb.")) for name in shapes):
        return SDXL
    for name, shape in shapes.items():
        if name.startswith(keys.UNET_PREFIX) and name.endswith("attn2.to_k.weight"):
            return SD2 if shape[1] == SD2.context_width else SD1
    for name in shapes:
        for beginning, title in TRANSFORMERS.items():
            if name.removeprefix(keys.UNET_PREFIX).startswith(beginning):
                raise UserError(f"{source} is {title}, which is not supported: only SD 1.x, 2.x and XL are")
    raise UserError(
        f"{source} is not a Stable Diffusion checkpoint (1.x, 2.x or XL): it has no tensors under {keys.UNET_PREFIX} "
        f"(its first is {min(shapes, default='none')})"
    )


def check_flags(family: ModelFamily, source: Path, *, v1: bool = False, v2: bool = False, sdxl: bool = False) -> None:
    """Raise UserError for --v1, --v2 or --sdxl that was given with a model of another family."""
    for flag, given, expected in (("--v1", v1, SD1), ("--v2", v2, SD2), ("--sdxl", sdxl, SDXL)):
        if given and family is not expected:
            raise UserError(f"{flag} was given, but {source} is an {family.title} model: omit {flag}")


def detect_folder_family(unet_config: Mapping[str, Any], text_config: Mapping[str, Any]) -> ModelFamily:
    """Return the family of a Diffusers folder from its configurations."""
    width = unet_config.get("cross_attention_dim")
    if unet_config.get("addition_embed_type") == SDXL.unet["addition_embed_type"]:
        return SDXL
    for family in (SD1, SD2):
        if width == family.context_width:
            return family
    return SD2 if text_config.get("hidden_act") == SD2.text_models[0].config["hidden_act"] else SD1
