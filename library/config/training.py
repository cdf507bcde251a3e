"""Options of the run: how long, how precisely, on what, and with which text handling."""

from __future__ import annotations

import dataclasses
from typing import Literal

from library.config.options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Length of the run."""

    max_train_steps: int = option(1600, "optimizer steps", minimum=1)
    max_train_epochs: int | None = option(None, "epochs; takes the place of --max_train_steps", minimum=1)
    gradient_accumulation_steps: int = option(1, "batches whose gradients make one step", minimum=1)
    dry_run: bool = option(
        False, "check everything, tell what the run would do and need, and end", aliases=("debug_dataset",)
    )
    on_nan: Literal["stop", "skip"] = option(
        "stop", "what to do about a loss or gradient that is no finite number: end the run, or leave out the step"
    )
    seed: int | None = option(None, "seed of everything random; unset: drawn, and recorded in the file", minimum=0)
    max_data_loader_n_workers: int = option(
        8, "most processes that load pictures; at most the CPU's threads less one", minimum=0
    )
    persistent_data_loader_workers: bool = option(False, "accepted; workers always live for the whole run")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Validation."""

    validate_every_n_steps: int | None = option(None, "measure the loss on what is held out every n steps", minimum=1)
    validate_every_n_epochs: int | None = option(
        None, "measure it every n epochs; unset: every epoch, where something is held out", minimum=1
    )
    max_validation_steps: int | None = option(None, "measure at most this many batches", minimum=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Precision, memory and speed."""

    mixed_precision: Literal["no", "fp16", "bf16"] = option("no", "type of the base model and of its arithmetic")
    no_half_vae: bool = option(False, "keep the VAE in float32")
    full_fp16: bool = option(False, "keep the adapter and its gradients in fp16, too; needs --mixed_precision fp16")
    full_bf16: bool = option(False, "keep the adapter and its gradients in bf16, too; needs --mixed_precision bf16")
    fp8_base: bool = option(False, "keep the weights of U-Net and text encoder in 8 bits (float8_e4m3fn)")
    fp8_base_unet: bool = option(False, "keep the weights of the U-Net alone in 8 bits")
    gradient_checkpointing: bool = option(False, "compute activations again in the backward pass: less memory, slower")
    xformers: bool = option(False, "attention of xformers (CUDA); the default, torch's own, is as good")
    sdpa: bool = option(False, "attention of torch; the default")
    mem_eff_attn: bool = option(False, "accepted; torch's attention is as sparing")
    cache_latents: bool = option(False, "encode all pictures once, before training")
    cache_latents_to_disk: bool = option(False, "keep the encoded pictures beside them; implies --cache_latents")
    vae_batch_size: int = option(1, "pictures that the VAE encodes at once", minimum=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Text."""

    clip_skip: int | None = option(None, "take the n-th layer from the end of the text encoder", minimum=1)
    weighted_captions: bool = option(False, "read (word:1.2), (word) and [word] in captions as weights")
    max_token_length: Literal[75, 150, 225] | None = option(None, "most tokens of a caption; unset: 75")
