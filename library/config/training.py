"""Options of the run: length, validation, precision and text."""

from __future__ import annotations

import dataclasses
from typing import Literal

from library.config.options import option

HELD_OUT = ("validation_split",)
BACKENDS = ("inductor", "cudagraphs", "aot_eager", "eager")


def read_backend(value: object) -> str | None:
    """Return the name of a compiler: "" for "no", which GUIs of sd-scripts write into their files; None if unset."""
    text = str(value).lower()
    if text == "no":
        return ""
    if text == "":
        return None
    if text not in BACKENDS:
        raise ValueError
    return text


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Length of the run."""

    max_train_steps: int = option(1600, "optimizer steps", minimum=1)
    max_train_epochs: int | None = option(
        None, "epochs; replaces --max_train_steps", minimum=1, wins_over=("max_train_steps",)
    )
    gradient_accumulation_steps: int = option(1, "batches in one optimizer step", minimum=1)
    dry_run: bool = option(
        False, "check everything, report what the run would do and need, and end", aliases=("debug_dataset",)
    )
    on_nan: Literal["stop", "skip"] = option(
        "stop", "what to do if a loss or gradient is not finite: end the run, or skip the step"
    )
    seed: int | None = option(None, "seed of everything random; unset: random, and recorded in the file", minimum=0)
    max_data_loader_n_workers: int = option(
        8, "most processes that load pictures; limited to the CPU's threads minus 1", minimum=0
    )
    ddp_timeout: int | None = option(
        None, "minutes that several processes wait for each other; unset or 0: 1440, a day", minimum=0
    )
    persistent_data_loader_workers: bool = option(False, "accepted; workers always persist for the whole run")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Validation."""

    validate_every_n_steps: int | None = option(
        None, "measure the loss on held-out pictures every n steps", minimum=1, only_with=HELD_OUT, interval="steps"
    )
    validate_every_n_epochs: int | None = option(
        None,
        "measure it every n epochs; unset: every epoch, if pictures are held out",
        minimum=1,
        only_with=HELD_OUT,
        interval="epochs",
    )
    max_validation_steps: int | None = option(None, "measure at most this many batches", minimum=1, only_with=HELD_OUT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Precision, memory and speed."""

    mixed_precision: Literal["no", "fp16", "bf16"] = option("no", "type of the base model and of its computations")
    no_half_vae: bool = option(
        False, "keep the VAE in float32", only_with=("mixed_precision=fp16", "mixed_precision=bf16")
    )
    full_fp16: bool = option(False, "also keep the adapter and its gradients in fp16; needs --mixed_precision fp16")
    full_bf16: bool = option(
        False, "also keep the adapter and its gradients in bf16; needs --mixed_precision bf16", excludes=("full_fp16",)
    )
    fp8_base: bool = option(False, "keep the weights of U-Net and text encoder in 8 bits (float8_e4m3fn)")
    fp8_base_unet: bool = option(
        False, "keep only the weights of the U-Net in 8 bits", not_with=("fp8_base",), excludes=("fp8_base",)
    )
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, slower")
    cuda_graphs: bool = option(
        False,
        "record forward and backward passes as CUDA graphs, one for each size of pictures: faster at small batches",
        only_with=("cache_latents", "cache_latents_to_disk"),
    )
    xformers: bool = option(False, "attention of xformers (CUDA); the default, torch's own, is as good")
    sdpa: bool = option(
        False, "attention of torch; the default", not_with=("xformers",), excludes=("xformers", "mem_eff_attn")
    )
    mem_eff_attn: bool = option(
        False,
        "accepted; torch's attention needs as little memory",
        not_with=("xformers",),
        excludes=("xformers",),
    )
    cache_latents: bool = option(False, "encode all pictures once, before training")
    cache_latents_to_disk: bool = option(
        False, "cache the encoded pictures on disk, beside the pictures; implies --cache_latents"
    )
    cache_text_encoder_outputs: bool = option(
        False, "encode all captions before training and keep the text encoders off the device; they cannot be trained"
    )
    cache_text_encoder_outputs_to_disk: bool = option(False, "implies --cache_text_encoder_outputs")
    vae_batch_size: int | None = option(
        None,
        "most pictures that the VAE encodes at the same time; unset: 1 before training, and a whole batch in a step",
        minimum=1,
    )
    opt_channels_last: bool = option(False, "channels-last memory format for U-Net and VAE")
    allow_tf32: bool = option(
        False, "float32 products with TF32, on GPUs that have it: faster, less exact", aliases=("cuda_allow_tf32",)
    )
    cudnn_benchmark: bool = option(
        False,
        "cuDNN tries its kernels for each new size and takes the fastest (CUDA)",
        aliases=("cuda_cudnn_benchmark",),
    )
    torch_compile: bool = option(False, "compile the U-Net: slow first steps, then faster ones")
    dynamo_backend: str | None = option(
        None,
        "compiler of --torch_compile; unset: inductor; no: none",
        parse=read_backend,
        form=f"one of {', '.join(BACKENDS)}, or no",
        known=(*BACKENDS, "no"),
        only_with=("torch_compile",),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Text."""

    clip_skip: int | None = option(None, "use the n-th layer from the end of the text encoder", minimum=1)
    weighted_captions: bool = option(False, "read (word:1.2), (word) and [word] in captions as weights")
    max_token_length: Literal[75, 150, 225] | None = option(None, "most tokens of a caption; unset: 75")
