"""A network over the models as the training has it: what a foreign one lacks or does in its own way is filled in."""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.config.network import NetworkConfig
from library.config.optimizer import OptimizerConfig
from library.errors import UserError, shortened
from library.files import replacing
from library.models.base import BaseModel
from library.networks.modules import ImportedModule, find_module, module_errors, text_encoder_for_networks
from library.networks.protocol import (
    Checkpoints,
    DescribesUnet,
    FollowsBatches,
    FollowsOptimizerSteps,
    Groups,
    HasDeltaNorms,
    HasMultiplier,
    HasRanks,
    HasRatesByTextEncoder,
    LimitsNorms,
    LoadsFiles,
    NamedGroups,
    Network,
    PreparesItself,
    Removable,
    TextEncoders,
    missing_methods,
)
from library.weight_file import open_weights

logger = logging.getLogger(__name__)

# What a network may keep account of once its gradients are final, and its means by their names in the log.
UPDATES = ("update_grad_norms", "update_norms")
NORMS = {
    "weight_norms": "norm/avg_key_norm",
    "grad_norms": "norm/avg_grad_norm",
    "combined_weight_norms": "norm/avg_combined_norm",
}


@dataclasses.dataclass
class TrainableNetwork:
    """A network applied to the models."""

    network: Network
    module: ImportedModule
    text_encoder: TextEncoders
    unet: nn.Module
    trains_text_encoder: bool
    trains_unet: bool

    # ---- what it is made of ---------------------------------------------------------------------------------

    def parameters(self) -> list[nn.Parameter]:
        """Return the trainable parameters."""
        return [parameter for parameter in self.network.get_trainable_params() if parameter.requires_grad]

    def all_parameters(self) -> list[nn.Parameter]:
        """Return all parameters, those that are not trained too."""
        return list(self.network.parameters())

    def modules(self) -> Iterator[nn.Module]:
        """Yield the network and all modules in it."""
        return self.network.modules()

    def kinds(self) -> collections.Counter[str]:
        """Return the number of modules of each class."""
        return collections.Counter(type(module).__name__ for module in self.network.children())

    def groups(self, config: OptimizerConfig) -> tuple[list[dict[str, Any]], list[str]]:
        """Return (parameter groups, their names) with the learning rates of the options; gradients are on then."""
        with module_errors(self.module.options, "prepare_optimizer_params"):
            groups, names = self._asked_for_groups(config)
            self.network.prepare_grad_etc(self.text_encoder, self.unet)
        if names is None or len(names) != len(groups):
            names = [f"group{index}" for index in range(len(groups))]
        trained = [[parameter for parameter in group["params"] if parameter.requires_grad] for group in groups]
        kept = [index for index, parameters in enumerate(trained) if parameters]
        if not kept:
            raise UserError("nothing is trained: the learning rate of every part is 0")
        return [groups[index] | {"params": trained[index]} for index in kept], [names[index] for index in kept]

    def _asked_for_groups(self, config: OptimizerConfig) -> tuple[list[dict[str, Any]], list[str] | None]:
        network, common = self.network, config.learning_rate
        rates = list(config.text_encoder_lr or [common])
        unet_rate = common if config.unet_lr is None else config.unet_lr
        result: Groups | NamedGroups
        if isinstance(network, HasRatesByTextEncoder):
            ask = network.prepare_optimizer_params_with_multiple_te_lrs
            result = ask(rates, unet_rate, common) if takes(ask, 3) else ask(rates, unet_rate)
        elif takes(network.prepare_optimizer_params, 3):
            result = network.prepare_optimizer_params(rates[0], unet_rate, common)
        else:  # older modules know no common rate
            result = network.prepare_optimizer_params(rates[0], unet_rate)
        groups, names = result if isinstance(result, tuple) else (result, None)
        return [group | {"params": list(group["params"])} for group in groups], list(names) if names else None

    # ---- in the course of the training ----------------------------------------------------------------------

    def train(self) -> None:
        """Go into training mode: dropouts act, a DyLoRA has the rank that was drawn."""
        self.network.train()

    def eval(self) -> None:
        """Go into evaluation mode: the network is what a reader of its file will have."""
        self.network.eval()

    def on_epoch_start(self) -> None:
        """Tell the network that an epoch begins; it goes into training mode."""
        self.network.on_epoch_start(self.text_encoder, self.unet)

    def on_optimizer_step(self, key: int) -> None:
        """Tell the network that a step begins, with a number that depends on seed and step alone."""
        if isinstance(self.network, FollowsOptimizerSteps):
            self.network.on_optimizer_step(key)

    def on_step_start(self) -> None:
        """Tell the network that a micro-batch begins, where it wants to know."""
        if isinstance(self.network, FollowsBatches):
            self.network.on_step_start(self.text_encoder, self.unet)

    def after_clipping(self) -> None:
        """Tell the network that its gradients are final, where it keeps account of them."""
        for name in UPDATES:
            getattr(self.network, name, lambda: None)()

    def norms(self) -> dict[str, float]:
        """Return the means of the norms that a network keeps, by their names in the log."""
        if not hasattr(self.network, "weight_norms"):
            return {}
        asked = {label: getattr(self.network, name, lambda: None)() for name, label in NORMS.items()}
        return {label: float(norms.mean()) for label, norms in asked.items() if norms is not None}

    def scale_norms(self, largest: float, device: torch.device) -> tuple[int, float, float] | None:
        """Scale changes down to a largest norm; return (number scaled, mean, largest), None if not offered."""
        if not isinstance(self.network, LimitsNorms):
            return None
        count, mean, greatest = self.network.apply_max_norm_regularization(largest, device)
        return int(count), float(mean), float(greatest)

    @contextlib.contextmanager
    def absent(self) -> Iterator[None]:
        """Within it the models are as they were without the network."""
        if not isinstance(self.network, HasMultiplier):
            raise UserError(f"diff_output_preservation: {self.module.name} cannot be switched off (no set_multiplier)")
        self.network.set_multiplier(0.0)
        try:
            yield
        finally:
            self.network.set_multiplier(1.0)

    def set_rank(self, rank: int) -> None:
        """Set the rank for evaluation of a network that has many; raises TypeError for one that has not."""
        if not isinstance(self.network, HasRanks):
            raise TypeError(f"the networks of {self.module.name} have one rank")
        self.network.set_rank(rank)

    def remove(self) -> None:
        """Detach from the models; raises TypeError for a network that cannot be."""
        if not isinstance(self.network, Removable):
            raise TypeError(f"the networks of {self.module.name} cannot be removed")
        self.network.remove()

    # ---- what it tells of itself, and its files -------------------------------------------------------------

    def describe_unet(self) -> list[tuple[str, int, float]]:
        """Return name, rank and weight of the rate of each module over the U-Net; empty where that is not told."""
        return self.network.describe_unet() if isinstance(self.network, DescribesUnet) else []

    def delta_norms(self) -> list[float]:
        """Return the norm of each module's change; empty for a network that does not tell."""
        return self.network.delta_norms().tolist() if isinstance(self.network, HasDeltaNorms) else []

    def save(self, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
        """Write the network's file, whole or not at all."""
        # Some multiply while they collect; in a file there is no graph to keep. All choose the format by the suffix.
        with replacing(path, suffix=path.suffix) as temporary, torch.no_grad():
            self.network.save_weights(str(temporary), dtype, dict(metadata))

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a state keeps of the network.

        Of a foreign one that is every tensor as it is: its own state_dict is the content of a file, where parts
        are left out, multiplied together or named in another way.
        """
        return all_tensors(self.network) if self.module.is_foreign else self.network.state_dict()

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what state_dict returned; raises RuntimeError where it is of another network."""
        if not self.module.is_foreign:
            self.network.load_state_dict(tensors)
            return
        own = all_tensors(self.network)
        for name in sorted(own.keys() ^ tensors.keys()):
            raise RuntimeError(f"{name} is in one of them only")
        # What a module derived from its alpha when it was made cannot be derived again.
        alphas = {name for name, _ in self.network.named_buffers() if name.endswith("alpha")}
        for name, tensor in tensors.items():
            if tensor.shape != own[name].shape or (name in alphas and not torch.equal(tensor, own[name].cpu())):
                raise RuntimeError(f"{name} is another")
            own[name].copy_(tensor)


def all_tensors(network: Network) -> dict[str, Tensor]:
    """Return every parameter and buffer by name, also those that a state_dict leaves out."""
    return {name: tensor.detach() for name, tensor in (*network.named_parameters(), *network.named_buffers())}


def takes(function: Callable[..., object], number: int) -> bool:
    """Return whether a function can be called with a number of arguments."""
    try:
        inspect.signature(function).bind(*range(number))
    except TypeError:
        return False
    return True


def build_network(
    config: NetworkConfig,
    optimizer: OptimizerConfig,
    base: BaseModel,
    *,
    checkpointing: bool,
    device: torch.device,
) -> TrainableNetwork:
    """Make the network over the models, apply it, and load --network_weights."""
    module, text_encoder = find_module(config), text_encoder_for_networks(base)
    if config.network_weights is not None and config.dim_from_weights:
        module.prepare_reading(base, text_encoder)
        with module_errors(config, "create_network_from_weights", config.network_weights):
            arguments = {"neuron_dropout": config.network_dropout} | module.arguments
            made, _ = module.read(config.network_weights, base, text_encoder, arguments=arguments)
    else:
        made = module.create(base, text_encoder)
    network = checked(made, config)
    trains_text_encoder, trains_unet = trained_parts(config, optimizer)
    with module_errors(config, "apply_to"):
        if isinstance(network, PreparesItself):
            options = dataclasses.asdict(optimizer) | dataclasses.asdict(config)
            network.prepare_network(argparse.Namespace(**options))
        network.apply_to(text_encoder, base.unet, trains_text_encoder, trains_unet)
        if config.network_weights is not None:
            with module_errors(config, "load_weights", config.network_weights):
                load_start(network, module, config.network_weights)
        if checkpointing and isinstance(network, Checkpoints):
            network.enable_gradient_checkpointing()
        network.to(device)
    if not any(True for _ in network.parameters()):
        raise UserError(f"--network_module {config.network_module}: the network has no parameters for what is trained")
    return TrainableNetwork(network, module, text_encoder, base.unet, trains_text_encoder, trains_unet)


def checked(network: Network | None, config: NetworkConfig) -> Network:
    """Return a network that can be trained, else raise UserError; warn of an option that it cannot honour."""
    name = config.network_module
    if network is None:
        raise UserError(f"--network_module {name} made no network")
    missing = missing_methods(network)
    if missing:
        raise UserError(f"--network_module {name}: its network has no {', '.join(missing)}, which training needs")
    if config.scale_weight_norms and not isinstance(network, LimitsNorms):
        logger.warning("--scale_weight_norms: %s does not offer it; norms are left as they are", name)
    return network


def load_start(network: Network, module: ImportedModule, path: Path) -> None:
    """Load --network_weights; of a foreign network that silently takes over nothing or a part, tell so."""
    if not isinstance(network, LoadsFiles):
        raise UserError(f"--network_weights: the network of {module.name} has no load_weights; leave the option out")
    before = [parameter.detach().clone() for parameter in network.parameters()]
    report = network.load_weights(str(path))
    logger.info("%s: %s", path, shortened(str(report or "loaded")))
    if not module.is_foreign:
        return
    is_same = all(torch.equal(old, new.detach()) for old, new in zip(before, network.parameters(), strict=True))
    if is_same and not module.options.dim_from_weights:
        raise UserError(
            f"--network_weights {path}: {module.name} took over nothing of it: the file is for another model or "
            " other --network_args, or the module cannot go on from its own files"
        )
    names = open_weights(path).shapes.keys()
    left = names - network.state_dict().keys()
    if left:
        logger.warning(
            "%s: %d of %d tensors have no place in the network, such as %s", path, len(left), len(names), min(left)
        )


def trained_parts(config: NetworkConfig, optimizer: OptimizerConfig) -> tuple[bool, bool]:
    """Return (text encoder is trained, U-Net is trained); a part whose learning rate is 0 is not."""
    text_rates: Sequence[float] = optimizer.text_encoder_lr or [optimizer.learning_rate]
    unet_rate = optimizer.learning_rate if optimizer.unet_lr is None else optimizer.unet_lr
    text_encoder = not config.network_train_unet_only and text_rates[0] > 0
    unet = not config.network_train_text_encoder_only and unet_rate > 0
    if not text_encoder and not unet:
        raise UserError("nothing is trained: the learning rate of what is left is 0")
    return text_encoder, unet
