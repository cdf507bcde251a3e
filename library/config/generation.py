"""Options of gen_img_diffusers.py."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from library.config.hub_names import TakesModels
from library.config.model import ModelConfig
from library.config.network import NETWORK_MODULES
from library.config.options import REQUIRED, option, repeated
from library.config.samplers import SamplerName
from library.config.saving import ConsoleConfig
from library.config.training import PrecisionConfig
from library.config.values import MOST_PIXELS, parse_pair_lists

TWO_STAGES = ("highres_fix_scale",)
CONTROLLED = ("control_net_models",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig(TakesModels):
    """Model."""

    ckpt: Path = option(
        REQUIRED,
        "base model: .safetensors, .ckpt, Diffusers folder, or a pattern that matches one; or a repository of the "
        "Hugging Face Hub (OWNER/NAME)",
        missing="the base model: a file, a Diffusers folder, or OWNER/NAME of the Hugging Face Hub",
        hub="model",
    )
    v1: bool = option(False, "accepted: the model is an SD 1.x model; found out from the file")
    v2: bool = repeated(ModelConfig, "v2")
    sdxl: bool = option(False, "accepted: the model is an SDXL model; found out from the file")
    v_parameterization: bool = option(False, "the model predicts v; found out where its files say so")
    zero_terminal_snr: bool = option(
        False, "the model was trained with zero terminal SNR; found out where its files say so"
    )
    vae: Path | None = repeated(ModelConfig, "vae")
    tokenizer_cache_dir: Path | None = repeated(ModelConfig, "tokenizer_cache_dir")
    variant: str | None = repeated(ModelConfig, "variant")
    offline: bool = repeated(ModelConfig, "offline")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """Precision, speed and memory."""

    fp16: bool = option(False, "compute in float16")
    bf16: bool = option(False, "compute in bfloat16")
    no_half_vae: bool = repeated(PrecisionConfig, "no_half_vae", only_with=("fp16", "bf16"))
    xformers: bool = option(False, "attention of xformers; if it is not installed, torch's own with a warning")
    sdpa: bool = repeated(PrecisionConfig, "sdpa")
    opt_channels_last: bool = option(False, "channels-last memory format")
    vae_batch_size: float | None = option(
        None, "pictures in a call of the VAE; below 1 a share of --batch_size; unset: the whole batch", minimum=0
    )
    vae_slices: int | None = option(None, "accepted: the VAE then decodes in tiles", minimum=1)
    vae_tiling: bool = option(False, "the VAE works in tiles: less memory for large pictures")
    offload: bool = option(False, "keep each part of the model on the GPU only while it is used")
    device: str | None = option(None, "device, such as cuda:1 or cpu; unset: the GPU if there is one")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """Prompts."""

    prompt: str | None = option(None, "one prompt, with prompt options")
    from_file: Path | None = option(
        None, "file with a prompt on each line; # begins a comment; wins over --prompt", wins_over=("prompt",)
    )
    from_picture: tuple[Path, ...] | None = option(None, "generate pictures again from the metadata of their files")
    interactive: bool = option(False, "read prompts from the keyboard, one after the other")
    no_preview: bool = option(
        False, "accepted: no window is opened; the path of each picture is logged", only_with=("interactive",)
    )
    n_iter: int = option(1, "repeats of all prompts", minimum=1)
    shuffle_prompts: bool = option(False, "shuffle the prompts in each repeat", not_with=("interactive",))
    images_per_prompt: int = option(1, "pictures for each prompt", minimum=1)
    batch_size: int = option(1, "pictures generated at the same time; it does not change the pictures", minimum=1)
    max_embeddings_multiples: int | None = option(
        None, "most windows of 75 tokens for a prompt; the rest is cut with a warning; unset: 1", minimum=1, maximum=100
    )
    emb_normalize_mode: Literal["original", "abs", "none"] = option(
        "original", "after weighting, restore the mean (original), the mean of absolute values (abs), or nothing"
    )
    clip_skip: int | None = option(None, "use the n-th layer of the text encoder from its end", minimum=1, maximum=12)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawingConfig:
    """Size and sampling, unless set in the prompt."""

    W: int | None = option(
        None,
        "width in pixels, a multiple of 8; unset: 512, SDXL 1024, less if the model says so",
        minimum=64,
        maximum=MOST_PIXELS,
    )
    H: int | None = option(
        None,
        "height in pixels, a multiple of 8; unset: 512, SDXL 1024, less if the model says so",
        minimum=64,
        maximum=MOST_PIXELS,
    )
    steps: int = option(50, "steps", minimum=1, maximum=1000)
    scale: float = option(7.5, "guidance scale; up to 1 the negative prompt has no effect")
    sampler: SamplerName = option("ddim", "sampler")
    seed: int | None = option(
        None, "seed; of several pictures, the seed of their seeds; unset: random", minimum=0, maximum=2**63 - 1
    )
    iter_same_seed: bool = option(False, "one seed for all prompts of a repeat", not_with=("interactive",))
    original_width: int | None = option(
        None, "SDXL: width that the original picture is said to have; unset: --W", minimum=0, maximum=MOST_PIXELS
    )
    original_height: int | None = option(
        None, "SDXL: height that the original picture is said to have; unset: --H", minimum=0, maximum=MOST_PIXELS
    )
    original_width_negative: int | None = option(
        None, "the same for the negative prompt; unset: --original_width", minimum=0, maximum=MOST_PIXELS
    )
    original_height_negative: int | None = option(
        None, "the same for the negative prompt; unset: --original_height", minimum=0, maximum=MOST_PIXELS
    )
    crop_top: int = option(
        0, "SDXL: rows that are said to be cut off at the top of the picture", minimum=0, maximum=MOST_PIXELS
    )
    crop_left: int = option(0, "SDXL: columns that are said to be cut off at its left", minimum=0, maximum=MOST_PIXELS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworksConfig:
    """Networks."""

    network_module: tuple[str, ...] | None = option(
        None, "modules of the networks, such as networks.lora", known=NETWORK_MODULES
    )
    network_weights: tuple[Path, ...] | None = option(None, "file of each network")
    network_mul: tuple[float, ...] | None = option(None, "strength of each; unset: 1", only_with=("network_weights",))
    network_args: tuple[dict[str, str], ...] | None = option(
        None, "arguments of each", parse=parse_pair_lists, form="key=value;key=value for each network"
    )
    network_show_meta: bool = option(False, "log the metadata of the files", only_with=("network_weights",))
    network_merge: bool = option(
        False, "merge all networks into the model: faster, and --am has no effect", only_with=("network_weights",)
    )
    network_merge_n_models: int | None = option(
        None, "merge the first n networks only", minimum=1, only_with=("network_weights",), not_with=("network_merge",)
    )
    network_pre_calc: bool = option(
        False, "add the networks to the weights before each change of strength: faster", only_with=("network_weights",)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """Init images."""

    image_path: Path | None = option(None, "init image or folder of them (img2img)")
    mask_path: Path | None = option(None, "mask or folder of masks: white is generated anew (inpainting)")
    strength: float | None = option(
        None,
        "share of the init image to replace; unset: 0.8",
        minimum=0,
        maximum=1,
        only_with=("image_path", "highres_fix_scale"),
    )
    highres_fix_scale: float | None = option(None, "generate a picture of this scale first", minimum=0.05, maximum=1)
    highres_fix_steps: int = option(28, "steps of the first stage", minimum=1, maximum=1000, only_with=TWO_STAGES)
    highres_fix_strength: float | None = option(
        None,
        "strength of the first stage if it has an init image; unset: --strength",
        minimum=0,
        maximum=1,
        only_with=TWO_STAGES,
    )
    highres_fix_save_1st: bool = option(False, "also save the pictures of the first stage", only_with=TWO_STAGES)
    highres_fix_latents_upscaling: bool = option(False, "enlarge latents instead of pixels", only_with=TWO_STAGES)
    highres_fix_disable_control_net: bool = option(
        False, "use ControlNet in the first stage only", only_with=TWO_STAGES
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlConfig(TakesModels):
    """ControlNet and textual inversion."""

    control_net_models: tuple[Path, ...] | None = option(
        None, "ControlNets: files, folders, or OWNER/NAME", hub="control net"
    )
    control_net_preps: tuple[str, ...] | None = option(
        None, "preprocessing of control images: none, canny or canny_T1_T2", only_with=CONTROLLED
    )
    control_net_weights: tuple[float, ...] | None = option(
        None, "strength of each; unset: 1", aliases=("control_net_multipliers",), only_with=CONTROLLED
    )
    control_net_ratios: tuple[float, ...] | None = option(
        None, "share of the steps in which each is used; unset: 1", minimum=0, maximum=1, only_with=CONTROLLED
    )
    guide_image_path: tuple[Path, ...] | None = option(None, "control images or folders, one for each ControlNet")
    textual_inversion_embeddings: tuple[Path, ...] | None = option(None, "embedding files; their names are their words")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Results."""

    outdir: Path = option(Path("outputs"), "folder for the pictures")
    sequential_file_name: bool = option(False, "number the files instead of the date")
    use_original_file_name: bool = option(False, "name the files after their init images", only_with=("image_path",))
    grid: tuple[str, ...] | None = option(
        None, "all combinations on a contact sheet: axes such as seed=1,2,3 am=0,0.5,1 (columns, rows, sheets)"
    )
    html: bool = option(False, "write a page, gallery-DATE.html, with all pictures of the run and their prompts")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """A run of gen_img_diffusers.py."""

    checkpoint: CheckpointConfig
    prompts: PromptConfig
    drawing: DrawingConfig
    networks: NetworksConfig
    images: ImageConfig
    control: ControlConfig
    output: OutputConfig
    speed: SpeedConfig
    console: ConsoleConfig
