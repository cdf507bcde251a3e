"""The base model of a run, loaded, merged, on the device, with the chosen attention and storage."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import torch
from torch import nn

from library.config.network import NetworkConfig
from library.config.training import PrecisionConfig, TextConfig
from library.errors import UserError
from library.models.attention import use_xformers
from library.models.base import BaseFiles, BaseModel, load_base, text_body
from library.models.conditioning import PER_WINDOW, TextOptions
from library.models.eight_bit import store_in_eight_bits
from library.models.memory_format import use_channels_last
from library.models.precision import move
from library.networks.merging import merge_base_weights
from library.networks.trainable import TrainableNetwork
from library.training.prepare.speed import compile_unet, find_compiler, set_kernels
from library.training.run.runtime import Runtime

logger = logging.getLogger(__name__)


def open_base(
    files: BaseFiles, network: NetworkConfig, precision: PrecisionConfig, clip_skip: int | None, runtime: Runtime
) -> BaseModel:
    """Return the base model of a run with networks merged in, on the CPU: each part is moved when its work begins."""
    set_kernels(precision, network, runtime.device)
    compiler = find_compiler(precision, runtime.device)
    base = load_base(files, runtime.types)
    check_clip_skip(clip_skip, base)
    merge_base_weights(network, base)
    if precision.xformers:
        use_xformers(runtime.device, base.unet, base.vae)
    if precision.opt_channels_last:
        use_channels_last(base.unet, base.vae)
    store_models(precision, base)
    if compiler is not None:
        compile_unet(base.unet, compiler)
    return base


def store_models(precision: PrecisionConfig, base: BaseModel) -> None:
    """Give the models the storage of the options."""
    in_eight_bits: list[nn.Module] = [base.unet] if precision.fp8_base or precision.fp8_base_unet else []
    if precision.fp8_base and not precision.fp8_base_unet:
        in_eight_bits += base.text_modules
    if in_eight_bits:
        saved = sum(store_in_eight_bits(model) for model in in_eight_bits)
        logger.info("weights in 8 bits: %.2f GB less", saved / 1e9)


@contextlib.contextmanager
def unet_away(base: BaseModel, network: TrainableNetwork, device: torch.device) -> Iterator[None]:
    """Within it the U-Net is on the CPU, where the network leaves it whole; it returns to a device, bit for bit.

    A network whose parameters are part of the U-Net stays with it: the optimizer knows where they are.
    """
    own = {id(parameter) for parameter in network.all_parameters()}
    is_whole = not any(id(parameter) in own for parameter in base.unet.parameters())
    if is_whole:
        move(base.unet, "cpu")
    try:
        yield
    finally:
        move(base.unet, device)


def free_cache(device: torch.device) -> None:
    """Give back the memory that torch keeps on a device for tensors of sizes that do not come again soon."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def caption_options(text: TextConfig) -> TextOptions:
    """Return the options with which captions are encoded."""
    return TextOptions(
        windows=(text.max_token_length or PER_WINDOW) // PER_WINDOW,
        clip_skip=text.clip_skip,
        weights="none" if text.weighted_captions else None,
    )


def check_clip_skip(clip_skip: int | None, base: BaseModel) -> None:
    """Raise UserError for a --clip_skip above the number of layers of a text encoder."""
    layers = min(text.num_layers for text in base.texts)
    if (clip_skip or 1) > layers:
        raise UserError(f"--clip_skip must be at most {layers}, the layers of this text encoder, got {clip_skip}")


def enable_gradient_checkpointing(base: BaseModel, network: TrainableNetwork) -> None:
    """Make the models recompute activations in the backward pass, which transformers does only in training mode.

    Training mode has no other effect, because neither model has a dropout.
    """
    base.unet.enable_gradient_checkpointing()
    base.unet.train()
    if network.trains_text_encoder:
        for encoder in base.text_modules:
            # Older versions of transformers have only the second name; newer ones warn of it.
            names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
            enable = next(getattr(encoder, name) for name in names if hasattr(encoder, name))
            enable({"use_reentrant": False})
            text_body(encoder).train()
