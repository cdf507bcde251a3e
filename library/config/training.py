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
    seed: int | None = option(None, "seed of everything random; unset: drawn, and recorded in the file", minimum=0)
    max_data_loader_n_workers: int = option(
        8, "most processes that load pictures; at most the CPU's threads less one", minimum=0
    )
    persistent_data_loader_workers: bool = option(False, "accepted; workers always live for the whole run")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Precision, memory and speed."""

    mixed_precision: Literal["no", "fp16", "bf16"] = option("no", "type of the base model and of its arithmetic")
    no_half_vae: bool = option(False, "keep the VAE in float32")
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
    max_token_length: Literal[75, 150, 225] | None = option(None, "most tokens of a caption; unset: 75")
