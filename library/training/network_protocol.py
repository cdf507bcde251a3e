"""The border with network modules: ours and third parties' (lycoris.kohya, ...) are called the same way.

`TrainableNetwork` has what the recipe needs; what a foreign network lacks or does in its own way is filled
in here, so that the recipe never asks.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from library.config.network import NetworkConfig
from library.config.optimizer import OptimizerConfig
from library.config.values import split_pairs
from library.errors import UserError
from library.models.loading import LoadedModels
from library.weights_io import open_weights, replacing

logger = logging.getLogger(__name__)


class CanonicalTextEncoder(nn.Module):
    """A text encoder under the module path that files name: `text_model.…`, whichever transformers made it."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.text_model = encoder


@dataclasses.dataclass
class TrainableNetwork:
    """A network applied to the models, with what the recipe calls."""

    network: nn.Module
    text_encoder: nn.Module | list[nn.Module]  # as network modules get it
    unet: nn.Module
    trains_text_encoder: bool
    trains_unet: bool

    def parameters(self) -> list[nn.Parameter]:
        """Return the trainable parameters."""
        return [parameter for parameter in self.network.get_trainable_params() if parameter.requires_grad]

    def groups(self, config: OptimizerConfig) -> tuple[list[dict[str, Any]], list[str]]:
        """Return (parameter groups, their names) with the learning rates of the options."""
        rates = list(config.text_encoder_lr or [config.learning_rate])
        unet_rate = config.learning_rate if config.unet_lr is None else config.unet_lr
        several = getattr(self.network, "prepare_optimizer_params_with_multiple_te_lrs", None)
        if several is not None:
            result = several(rates, unet_rate, config.learning_rate)
        else:
            result = self.network.prepare_optimizer_params(rates[0], unet_rate, config.learning_rate)
        groups, names = result if isinstance(result, tuple) else (result, None)
        groups = [group | {"params": list(group["params"])} for group in groups]
        if not groups:
            raise UserError("nothing is trained: the learning rate of every part is 0")
        return groups, list(names or [f"group{index}" for index in range(len(groups))])

    def on_epoch_start(self) -> None:
        """Tell the network that an epoch begins; it goes into training mode."""
        self.network.on_epoch_start(self.text_encoder, self.unet)

    def on_step_start(self) -> None:
        """Tell the network that a micro-batch begins, where it wants to know."""
        if hasattr(self.network, "on_step_start"):
            self.network.on_step_start(self.text_encoder, self.unet)

    def scale_norms(self, largest: float, device: torch.device) -> tuple[int, float, float] | None:
        """Scale changes down to a largest norm; return (number scaled, mean, largest), None if not offered."""
        scale = getattr(self.network, "apply_max_norm_regularization", None)
        return None if scale is None else scale(largest, device)

    def delta_norms(self) -> list[float]:
        """Return the norm of each module's change; empty for a network that does not tell."""
        norms = getattr(self.network, "delta_norms", None)
        return [] if norms is None else norms().tolist()

    def save(self, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
        """Write the network's file, whole or not at all."""
        with replacing(path) as temporary:
            self.network.save_weights(str(temporary), dtype, dict(metadata))


def find_module(name: str) -> ModuleType:
    """Return the network module of a name; raises UserError if there is none."""
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"--network_module {name}: {error}; networks.lora trains a LoRA") from None
    if not hasattr(module, "create_network"):
        raise UserError(f"--network_module {name} is no network module: it has no create_network")
    return module


def check_network(config: NetworkConfig) -> None:
    """Raise UserError for a module that is none, or arguments that a module of ours does not know."""
    module = find_module(config.network_module)
    if hasattr(module, "read_network_args"):
        _ask(config, lambda: module.read_network_args(split_pairs(config.network_args)))
    for path in (config.network_weights, *(config.base_weights or ())):
        if path is not None:
            open_weights(path)


def network_arguments(config: NetworkConfig) -> dict[str, Any]:
    """Return the keyword arguments of create_network: --network_args as texts, and the dropouts."""
    arguments: dict[str, Any] = dict(split_pairs(config.network_args))
    arguments.setdefault("dropout", config.network_dropout)
    return arguments


def build_network(
    config: NetworkConfig,
    optimizer: OptimizerConfig,
    models: LoadedModels,
    *,
    checkpointing: bool,
    device: torch.device,
) -> TrainableNetwork:
    """Merge --base_weights into the models, make the network, apply it, and load --network_weights."""
    module = find_module(config.network_module)
    encoders = [_canonical(encoder) for encoder in models.text_encoders]
    text_encoder = encoders[0] if len(encoders) == 1 else encoders
    unet = models.unet
    merge_base_weights(module, config, models, text_encoder)

    network = _ask(config, lambda: _create(module, config, models, text_encoder))
    if network is None:
        raise UserError(f"--network_module {config.network_module} made no network")
    trains_text_encoder, trains_unet = trained_parts(config, optimizer)
    if hasattr(network, "prepare_network"):
        network.prepare_network(argparse.Namespace(**dataclasses.asdict(config)))
    network.apply_to(text_encoder, unet, trains_text_encoder, trains_unet)
    if config.network_weights is not None:
        logger.info(
            "%s: %s", config.network_weights, _ask(config, lambda: network.load_weights(str(config.network_weights)))
        )
    if checkpointing:
        network.enable_gradient_checkpointing()
    network.to(device)
    network.prepare_grad_etc(text_encoder, unet)
    if not any(True for _ in network.parameters()):
        raise UserError(f"--network_module {config.network_module}: the network has no parameters for what is trained")
    return TrainableNetwork(network, text_encoder, unet, trains_text_encoder, trains_unet)


def _canonical(encoder: nn.Module) -> nn.Module:
    return encoder if hasattr(encoder, "text_model") else CanonicalTextEncoder(encoder)


def _create(module: ModuleType, config: NetworkConfig, models: LoadedModels, text_encoder: Any) -> nn.Module | None:
    arguments = network_arguments(config)
    if config.dim_from_weights:
        network, _ = module.create_network_from_weights(
            1.0,
            str(config.network_weights),
            models.vae,
            text_encoder,
            models.unet,
            None,
            neuron_dropout=config.network_dropout,
            **split_pairs(config.network_args),
        )
        return network
    return module.create_network(
        1.0,
        config.network_dim,
        config.network_alpha,
        models.vae,
        text_encoder,
        models.unet,
        neuron_dropout=config.network_dropout,
        **arguments,
    )


def _ask(config: NetworkConfig, call: Callable[[], Any]) -> Any:
    """Return what a network module answers; its ValueError is the user's mistake, in its own words."""
    try:
        return call()
    except ValueError as error:
        raise UserError(f"--network_module {config.network_module}: {error}") from None


def trained_parts(config: NetworkConfig, optimizer: OptimizerConfig) -> tuple[bool, bool]:
    """Return (text encoder is trained, U-Net is trained); a part whose learning rate is 0 is not."""
    text_rates: Sequence[float] = optimizer.text_encoder_lr or [optimizer.learning_rate]
    unet_rate = optimizer.learning_rate if optimizer.unet_lr is None else optimizer.unet_lr
    text_encoder = not config.network_train_unet_only and text_rates[0] > 0
    unet = not config.network_train_text_encoder_only and unet_rate > 0
    if not text_encoder and not unet:
        raise UserError("nothing is trained: the learning rate of what is left is 0")
    return text_encoder, unet


def merge_base_weights(module: ModuleType, config: NetworkConfig, models: LoadedModels, text_encoder: Any) -> None:
    """Merge each file of --base_weights into the models, with its multiplier."""
    multipliers = list(config.base_weights_multiplier or ())
    for index, path in enumerate(config.base_weights or ()):
        multiplier = multipliers[index] if index < len(multipliers) else 1.0
        _ask(config, functools.partial(_merge, module, path, multiplier, models, text_encoder))
        logger.info("%s is merged into the base with multiplier %g", path, multiplier)


def _merge(module: ModuleType, path: Path, multiplier: float, models: LoadedModels, text_encoder: Any) -> None:
    network, weights = module.create_network_from_weights(
        multiplier, str(path), models.vae, text_encoder, models.unet, for_inference=True
    )
    network.merge_to(text_encoder, models.unet, weights, next(models.unet.parameters()).dtype, "cpu")
