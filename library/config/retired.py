"""Options of sd-scripts that the suite does not have, each with the reason shown to the user.

A harmless option can be omitted without loss: it is accepted with a warning. Any other ends the run, because without
it the result would not be what was asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Retired:
    """An option that the suite does not have."""

    name: str
    reason: str
    harmless: bool = False  # whether the run continues without it
    takes_value: bool = True
    neutral: tuple[object, ...] = ("", 0)  # values in a config file that mean "off"; 0 includes false
    elsewhere: bool = False  # an option of another script of sd-scripts, so no abbreviation means it


def _rows(reasons: Mapping[str, str], **same: Any) -> dict[str, Retired]:
    """Return name -> option; names with the same reason are separated by spaces, same are fields of all options."""
    return {name: Retired(name, reason, **same) for names, reason in reasons.items() for name in names.split()}


ADAPTER_FITS = "an adapter over a frozen base needs no sharding; several GPUs run through accelerate (DDP)"

NOT_FUSED = "it saves memory for the gradients of whole models; those of an adapter are small"

_HARMLESS_SWITCHES = {
    "lowram": "models always load straight into place, tensor by tensor",
    "highvram": "the device cache is never flushed during caching",
    "skip_cache_check": "checking a cache entry is quick, and stale latents are never used",
    "cache_info": "picture sizes are read from the headers, in parallel",
    "console_log_simple": "log lines are always plain",
    "disable_mmap_load_safetensors": "files are never memory-mapped",
    "fused_backward_pass": NOT_FUSED,
    "ddp_gradient_as_bucket_view ddp_static_graph": "gradients travel in one flat buffer already",
}
_REFUSED_SWITCHES = {
    "cpu_offload_checkpointing": "U-Nets have no such mode; --gradient_checkpointing is the option that saves memory",
    "deepspeed zero3_init_flag zero3_save_16bit_model fp16_master_weights_and_gradients": ADAPTER_FITS,
}
_REFUSED_VALUES = {
    "dataset_class": "a foreign dataset class cannot promise an order that is a function of seed and epoch",
    "zero_stage": ADAPTER_FITS,
    "offload_optimizer_device offload_optimizer_nvme_path offload_param_device offload_param_nvme_path": ADAPTER_FITS,
}
# Options of trainings of whole models, and one that a page of sd-scripts has by mistake.
_ELSEWHERE_HARMLESS_SWITCHES = {
    "train_text_encoder": "text encoders are trained unless --network_train_unet_only is given",
    "diffusers_xformers": "--xformers is the option",
}
_ELSEWHERE_HARMLESS_VALUES = {"fused_optimizer_groups": NOT_FUSED}
_ELSEWHERE_REFUSED_VALUES = {
    "text_encoder_lr1 text_encoder_lr2 learning_rate_te1 learning_rate_te2": (
        "the rates of both text encoders are one option, as in --text_encoder_lr 1e-5 1e-5"
    ),
    "learning_rate_te": "--text_encoder_lr is the option",
    "block_lr": "rates by block are --network_args down_lr_weight=..., mid_lr_weight=... and up_lr_weight=...",
}
RETIRED: dict[str, Retired] = (
    _rows(_HARMLESS_SWITCHES, harmless=True, takes_value=False)
    | _rows(_REFUSED_SWITCHES, takes_value=False)
    | _rows(_REFUSED_VALUES)
    | _rows(_ELSEWHERE_HARMLESS_SWITCHES, harmless=True, takes_value=False, elsewhere=True)
    | _rows(_ELSEWHERE_HARMLESS_VALUES, harmless=True, elsewhere=True)
    | _rows(_ELSEWHERE_REFUSED_VALUES, elsewhere=True, neutral=("",))  # a rate of 0 is not "off": it trains nothing
    # GUIs of sd-scripts write its defaults into their configuration files.
    | {"zero_stage": Retired("zero_stage", ADAPTER_FITS, neutral=(2, "", 0))}
)

# Keys that GUIs write into their files and that sd-scripts' trainings do not read, most of them of kohya_ss' GUI
# (kohya_gui/lora_gui.py, 2023 to 2025): the GUI computes other options from them, or starts the training with them.
_OF_GUIS = """
    epoch noise_offset_type stop_text_encoder_training stop_text_encoder_training_pct lowvram max_resolution use_wandb
    no_token_padding LoRA_type model_list sdxl additional_parameters num_processes num_machines multi_gpu gpu_ids
    num_cpu_threads_per_process main_process_port extra_accelerate_launch_args dynamo_mode dynamo_use_dynamic
    dynamo_use_fullgraph model_train_type enable_preview
"""
_OF_NETWORK_ARGS = "loraplus_lr_ratio loraplus_unet_lr_ratio loraplus_text_encoder_lr_ratio"
GUI_KEYS: dict[str, str] = dict.fromkeys(_OF_GUIS.split(), "") | dict.fromkeys(
    _OF_NETWORK_ARGS.split(), "is read in network_args"
)

# Those of gen_img_diffusers.py.
_NO_PIPELINE = "diffusers' pipelines have nothing of the kind"
_SMALL_FIRST = "not part of this suite: generate small pictures first with --highres_fix_scale"
_GENERATION_REFUSED = {
    "negative_scale": f"three-way guidance: {_NO_PIPELINE}; --scale and negative prompts are there",
    "clip_guidance_scale clip_image_guidance_scale vgg16_guidance_scale vgg16_guidance_layer": _NO_PIPELINE,
    "clip_vision_strength": "pictures as prompts need a further model, which is not part of this suite",
    "XTI_embeddings": "embeddings for single layers are read by no other program any more",
    "highres_fix_upscaler highres_fix_upscaler_args": "a foreign upscaler; pictures are enlarged with Lanczos",
    "control_net_lllite_models": "ControlNet-LLLite is not part of this suite; --control_net_models are ControlNets",
    "network_regional_mask_max_color_codes": "networks act on the whole picture; --mask_path is for inpainting",
    "from_module prompter_module_args": (
        "a foreign module that writes prompts; write its lines to a file and give --from_file"
    ),
    "pyramid_noise_prob pyramid_noise_discount_range noise_offset_prob noise_offset_range": (
        "noise of other kinds is for training"
    ),
    "ds_depth_1 ds_timesteps_1 ds_depth_2 ds_timesteps_2 ds_ratio": _SMALL_FIRST,
    "gradual_latent_timesteps gradual_latent_ratio gradual_latent_ratio_step": _SMALL_FIRST,
    "gradual_latent_every_n_steps gradual_latent_s_noise gradual_latent_unsharp_params": _SMALL_FIRST,
}
_GENERATION_HARMLESS_SWITCHES = {
    "diffusers_xformers": "--xformers is the option",
    "force_scheduler_zero_steps_offset": "the first step of img2img is the right one without it",
    "console_log_simple": "log lines are always plain",
}
GENERATION: dict[str, Retired] = _rows(_GENERATION_REFUSED) | _rows(
    _GENERATION_HARMLESS_SWITCHES, harmless=True, takes_value=False
)
