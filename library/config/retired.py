"""Options of sd-scripts that the suite does not have, each with the reason that a user is told.

A harmless one can be left out without loss: it is accepted with a warning. Any other ends the run, because
going on without it would do something else than was asked for.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Retired:
    """One option: its name, why it is gone, whether to go on without it, whether it takes a value, what is off."""

    name: str
    reason: str
    harmless: bool = False
    takes_value: bool = True
    neutral: tuple[object, ...] = ("", 0)  # values in a config file that mean "off"; 0 stands for false, too


LATER = "it is planned, but not in this version"
ADAPTER_FITS = "an adapter over a frozen base needs no sharding; several GPUs run through accelerate (DDP)"
SDXL = "SDXL is not trained by this version"

_HARMLESS_SWITCHES = {
    "lowram": "models always load straight into place, tensor by tensor",
    "highvram": "the device cache is never flushed during caching",
    "skip_cache_check": "checking a cache entry is quick, and stale latents are never used",
    "cache_info": "picture sizes are read from the headers, in parallel",
    "console_log_simple": "log lines are always plain",
    "log_config": "the options of a run are written to OUTPUT_NAME-options.toml",
    "async_upload": "nothing is uploaded",
    "torch_compile": "the run is not compiled; the result is the same",
    "disable_mmap_load_safetensors": "files are never memory-mapped",
    "ddp_gradient_as_bucket_view": "gradients travel in one flat buffer already",
    "ddp_static_graph": "gradients travel in one flat buffer already",
}
_HARMLESS_VALUES = {
    "console_log_file": "redirect the output of the shell instead",
    "ddp_timeout": "torch's own is kept",
    "dynamo_backend": "the run is not compiled; the result is the same",
    "wandb_run_name": "wandb logging is planned, but not in this version",
    "log_tracker_config": "TensorBoard needs none",
    "console_log_level": "information, warnings and errors are always shown",
    "wandb_api_key": "wandb logging is planned, but not in this version",
}
_REFUSED_SWITCHES = {
    "alpha_mask": LATER,
    "masked_loss": LATER,
    "debug_dataset": LATER,
    "weighted_captions": LATER,
    "full_fp16": LATER,
    "full_bf16": LATER,
    "fp8_base": LATER,
    "fp8_base_unet": LATER,
    "save_state_to_huggingface": LATER,
    "resume_from_huggingface": LATER,
    "fused_backward_pass": "it fuses the optimizer into the backward pass of whole models; an adapter gains nothing",
    "cpu_offload_checkpointing": "the U-Net of SD 1.x and 2.x has no such mode",
    "deepspeed": ADAPTER_FITS,
    "zero3_init_flag": ADAPTER_FITS,
    "zero3_save_16bit_model": ADAPTER_FITS,
    "fp16_master_weights_and_gradients": ADAPTER_FITS,
    "cache_text_encoder_outputs": SDXL,
    "cache_text_encoder_outputs_to_disk": SDXL,
    "use_lion_optimizer": "use --optimizer_type Lion",
}
_REFUSED_VALUES = {
    "in_json": LATER,
    "face_crop_aug_range": LATER,
    "conditioning_data_dir": LATER,
    "dataset_class": "a foreign dataset class cannot promise an order that is a function of seed and epoch",
    "validation_split": LATER,
    "validation_seed": LATER,
    "validate_every_n_steps": LATER,
    "validate_every_n_epochs": LATER,
    "max_validation_steps": LATER,
    "huggingface_repo_id": LATER,
    "huggingface_repo_type": LATER,
    "huggingface_path_in_repo": LATER,
    "huggingface_token": LATER,
    "huggingface_repo_visibility": LATER,
    "zero_stage": ADAPTER_FITS,
    "offload_optimizer_device": ADAPTER_FITS,
    "offload_optimizer_nvme_path": ADAPTER_FITS,
    "offload_param_device": ADAPTER_FITS,
    "offload_param_nvme_path": ADAPTER_FITS,
}


# Defaults of sd-scripts that configuration files of its GUIs write out.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "zero_stage": (2, "", 0),
}


def _rows() -> list[Retired]:
    return [
        *(Retired(name, reason, harmless=True, takes_value=False) for name, reason in _HARMLESS_SWITCHES.items()),
        *(Retired(name, reason, harmless=True) for name, reason in _HARMLESS_VALUES.items()),
        *(Retired(name, reason, takes_value=False) for name, reason in _REFUSED_SWITCHES.items()),
        *(Retired(name, reason, neutral=NEUTRAL.get(name, ("", 0))) for name, reason in _REFUSED_VALUES.items()),
    ]


RETIRED: dict[str, Retired] = {row.name: row for row in _rows()}
