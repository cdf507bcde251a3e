"""A network attached to the models for training; bridges what foreign networks lack or do differently."""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import inspect
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.config.network import NetworkConfig
from library.config.optimizer import OptimizerConfig
from library.config.values import written
from library.errors import UserError, shortened
from library.files import replacing
from library.models.base import BaseModel
from library.networks.fit import Fit, all_tensors, compare, counted
from library.networks.modules import ImportedModule, find_module, module_errors
from library.networks.parts import Trained, split_by_encoder, trained_parts
from library.networks.protocol import (
    Groups,
    HasMultiplier,
    NamedGroups,
    Network,
    ReadsFiles,
    missing_methods,
    optional_method,
)
from library.networks.views import Models, canonical_names
from library.safetensors_io import fitting
from library.weight_file import read_weights, write_weights

logger = logging.getLogger(__name__)

BYTES_OF_A_TENSOR = 200  # in a header of safetensors besides the name: type, shape, place
# Optional methods of foreign networks that record norms once the gradients are final, and the names in the log.
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
    models: Models
    trained: Trained

    @property
    def trains_text_encoder(self) -> bool:
        """Whether a text encoder is trained."""
        return any(self.trained.texts)

    @property
    def trains_unet(self) -> bool:
        """Whether the U-Net is trained."""
        return self.trained.unet

    @property
    def computes_in_half(self) -> bool:
        """Whether the network computes in the type of the models by itself; others need autocast for it."""
        return optional_method(self.network, "compute_with") is not None

    def compute_with(self, copies: Mapping[Tensor, Tensor]) -> None:
        """Compute with copies of the parameters, where the network offers it."""
        if compute_with := optional_method(self.network, "compute_with"):
            compute_with(copies)

    def keep_shapes(self) -> None:
        """Compute with the same shapes in every step."""
        if keep_shapes := optional_method(self.network, "keep_shapes"):
            keep_shapes()

    def parameters(self) -> list[nn.Parameter]:
        """Return the trainable parameters."""
        return [parameter for parameter in self.network.get_trainable_params() if parameter.requires_grad]

    def all_parameters(self) -> list[nn.Parameter]:
        """Return all parameters, including those that are not trained."""
        return list(self.network.parameters())

    def modules(self) -> Iterator[nn.Module]:
        """Yield the network and all modules in it."""
        return self.network.modules()

    def kinds(self) -> collections.Counter[str]:
        """Return the number of modules of each class."""
        return collections.Counter(type(module).__name__ for module in self.network.children())

    def groups(self, config: OptimizerConfig) -> tuple[list[dict[str, Any]], list[str]]:
        """Return (parameter groups, their names) with the learning rates of the options; turns gradients on."""
        with module_errors(self.module.options, "prepare_optimizer_params"):
            groups, names = self._groups_with_rates(config)
            self.network.prepare_grad_etc(self.models.text_encoder, self.models.unet)
        if names is None or len(names) != len(groups):
            names = [f"group{index}" for index in range(len(groups))]
        trained = [[parameter for parameter in group["params"] if parameter.requires_grad] for group in groups]
        kept = [index for index, parameters in enumerate(trained) if parameters]
        used = {id(parameter) for index in kept for parameter in trained[index]}
        for parameter in self.parameters():  # of parts with a learning rate of 0
            parameter.requires_grad_(id(parameter) in used)
        if not kept:
            raise UserError("nothing is trained: the learning rate of every part is 0")
        return [groups[index] | {"params": trained[index]} for index in kept], [names[index] for index in kept]

    def _groups_with_rates(self, config: OptimizerConfig) -> tuple[list[dict[str, Any]], list[str] | None]:
        network, common = self.network, config.learning_rate
        rates = config.text_rates(len(self.trained.texts))
        by_encoder = optional_method(network, "prepare_optimizer_params_with_multiple_te_lrs")
        prepare: Callable[..., Groups | NamedGroups] = by_encoder or network.prepare_optimizer_params
        arguments = (rates if by_encoder else max(rates), config.unet_rate, common)
        result = prepare(*arguments) if takes(prepare, 3) else prepare(*arguments[:2])  # older modules: no common rate
        made, named = result if isinstance(result, tuple) else (result, None)
        groups = [group | {"params": list(group["params"])} for group in made]
        names = list(named) if named else None
        if by_encoder or len(set(rates)) == 1 or not self.trains_text_encoder:
            return groups, names
        return split_by_encoder(groups, names, rates, network)

    def train(self) -> None:
        """Switch to training mode: dropout is on, a DyLoRA uses the sampled rank."""
        self.network.train()

    def eval(self) -> None:
        """Switch to evaluation mode: the network gives what its saved file will give."""
        self.network.eval()

    def on_epoch_start(self) -> None:
        """Announce a new epoch; the network switches to training mode."""
        self.network.on_epoch_start(self.models.text_encoder, self.models.unet)

    def on_optimizer_step(self, key: int) -> None:
        """Announce an optimizer step; key depends on seed and step alone."""
        if announce := optional_method(self.network, "on_optimizer_step"):
            announce(key)

    def on_step_start(self) -> None:
        """Announce a micro-batch."""
        if announce := optional_method(self.network, "on_step_start"):
            announce(self.models.text_encoder, self.models.unet)

    def after_clipping(self) -> None:
        """Let the network record the norms of its final gradients."""
        for name in UPDATES:
            getattr(self.network, name, lambda: None)()

    def norms(self) -> dict[str, float]:
        """Return name in the log -> mean of each norm that the network records."""
        if not hasattr(self.network, "weight_norms"):
            return {}
        asked = {label: getattr(self.network, name, lambda: None)() for name, label in NORMS.items()}
        return {label: float(norms.mean()) for label, norms in asked.items() if norms is not None}

    def scale_norms(self, largest: float, device: torch.device) -> tuple[int, float, float] | None:
        """Scale changes down to a largest norm; return (number scaled, mean, largest), None if not offered."""
        scale = optional_method(self.network, "apply_max_norm_regularization")
        if scale is None:
            return None
        count, mean, greatest = scale(largest, device)
        return int(count), float(mean), float(greatest)

    @contextlib.contextmanager
    def absent(self) -> Iterator[None]:
        """Within this context the network has no effect on the models."""
        if not isinstance(self.network, HasMultiplier):
            raise UserError(f"diff_output_preservation: {self.module.name} cannot be switched off (no set_multiplier)")
        self.network.set_multiplier(0.0)
        try:
            yield
        finally:
            self.network.set_multiplier(1.0)

    def set_rank(self, rank: int) -> None:
        """Set the rank that a network with many ranks is evaluated at; raises TypeError for any other network."""
        set_rank = optional_method(self.network, "set_rank")
        if set_rank is None:
            raise TypeError(f"the networks of {self.module.name} have one rank")
        set_rank(rank)

    def remove(self) -> None:
        """Detach from the models; raises TypeError for a network that cannot be detached."""
        remove = optional_method(self.network, "remove")
        if remove is None:
            raise TypeError(f"the networks of {self.module.name} cannot be removed")
        remove()

    def describe_unet(self) -> list[tuple[str, int, float]]:
        """Return name, rank and weight of the learning rate of each module over the U-Net; empty if not offered."""
        describe = optional_method(self.network, "describe_unet")
        return describe() if describe else []

    def file_alphas(self) -> dict[str, float]:
        """Return module -> alpha in the files of the network; of a foreign network those of its buffers."""
        if alphas := optional_method(self.network, "file_alphas"):
            return dict(alphas())
        return {
            name.removesuffix(".alpha"): float(tensor)
            for name, tensor in self.network.named_buffers()
            if name.endswith(".alpha") and tensor.numel() == 1 and not tensor.is_meta
        }

    def delta_norms(self) -> list[float]:
        """Return the Frobenius norm of each module's change; empty if not offered."""
        norms = optional_method(self.network, "delta_norms")
        return norms().tolist() if norms else []

    def changes(self) -> dict[str, float]:
        """Return module -> Frobenius norm of its change; empty if not offered."""
        norms = self.delta_norms()
        return dict(zip(self.file_alphas(), norms, strict=True)) if norms else {}

    def rank_norms(self) -> dict[int, float]:
        """Return rank -> Frobenius norm of the whole change at it; empty of a network with one rank."""
        norms = optional_method(self.network, "rank_norms")
        return norms() if norms else {}

    def save(self, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
        """Write the network's file, whole or not at all."""
        # A foreign module hands the metadata to the package safetensors, which writes no header that is too long.
        taken = sum(len(name) + BYTES_OF_A_TENSOR for name in all_tensors(self.network))
        # Some networks compute while they collect tensors, hence no_grad. All choose the format by the suffix.
        with replacing(path, suffix=path.suffix) as temporary, torch.no_grad():
            self.network.save_weights(str(temporary), dtype, fitting(metadata, taken))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the network's tensors for the state of a run.

        Those of a foreign network are its parameters and buffers: its own state_dict may be the content of a file,
        in which tensors are omitted, multiplied or renamed.
        """
        return all_tensors(self.network) if self.module.is_foreign else self.network.state_dict()

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Load what state_dict returned; raises RuntimeError if it is from another network."""
        if not self.module.is_foreign:
            self.network.load_state_dict(tensors)
            return
        own = all_tensors(self.network)
        for name in sorted(own.keys() ^ tensors.keys()):
            raise RuntimeError(f"{name} is in one of them only")
        # A module derives values from its alpha when it is created, and cannot derive them again.
        alphas = {name for name, _ in self.network.named_buffers() if name.endswith("alpha")}
        for name, tensor in tensors.items():
            if tensor.shape != own[name].shape or (name in alphas and not torch.equal(tensor, own[name].cpu())):
                raise RuntimeError(f"{name} is another")
            own[name].copy_(tensor)


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
    """Create the network, apply it to the models, and load --network_weights."""
    module, trained = find_module(config), trained_parts(config, optimizer, len(base.texts))
    models = module.models(base, without=trained.left_out)
    if config.network_weights is not None and config.dim_from_weights:
        with module_errors(config, "create_network_from_weights", config.network_weights):
            arguments = {"neuron_dropout": config.network_dropout} | module.arguments
            created, _ = module.read(config.network_weights, base, models, arguments=arguments)
    else:
        created = module.create(models)
    network = checked(created, config)
    with module_errors(config, "apply_to"):
        if prepare := optional_method(network, "prepare_network"):
            options = dataclasses.asdict(optimizer) | dataclasses.asdict(config)
            prepare(argparse.Namespace(**{name: written(value) for name, value in options.items()}))
        network.apply_to(models.text_encoder, models.unet, any(trained.texts), trained.unet)
        if config.network_weights is not None:
            with module_errors(config, "load_weights", config.network_weights):
                load_start(network, module, base, trained)
        if checkpointing and (enable := optional_method(network, "enable_gradient_checkpointing")):
            enable()
        network.to(device)
    if not any(True for _ in network.parameters()):
        raise UserError(f"--network_module {config.network_module}: the network has no parameters for what is trained")
    return TrainableNetwork(network, module, models, trained)


def checked(network: Network | None, config: NetworkConfig) -> Network:
    """Return the network if it can be trained, else raise UserError; warn of an option that it does not support."""
    name = config.network_module
    if network is None:
        raise UserError(f"--network_module {name} made no network")
    missing = missing_methods(network)
    if missing:
        raise UserError(f"--network_module {name}: its network has no {', '.join(missing)}, which training needs")
    if config.scale_weight_norms and optional_method(network, "apply_max_norm_regularization") is None:
        logger.warning("--scale_weight_norms: %s does not offer it; norms are left as they are", name)
    return network


def load_start(network: Network, module: ImportedModule, base: BaseModel, trained: Trained) -> None:
    """Load --network_weights; warn of what the file and the network do not share.

    Networks that take tensors get those that the suite read, as in generation; others read a file themselves: this
    one, or a copy with the names that they know. Raises UserError for a foreign network that silently loaded nothing;
    the suite's own raise ValueError.
    """
    path = module.options.network_weights
    assert path is not None  # else there is nothing to load
    load, load_tensors = optional_method(network, "load_weights"), optional_method(network, "load_tensors")
    before = [parameter.detach().clone() for parameter in network.parameters()]
    given = read_weights(path)
    weights = canonical_names(given, base, path)
    if load_tensors is not None:
        report = load_tensors(weights, str(path))
    elif load is not None and weights.keys() == given.keys():
        report = load(str(path))
    elif load is not None:
        with tempfile.TemporaryDirectory() as folder:
            renamed = Path(folder) / "renamed.safetensors"
            write_weights(renamed, weights)
            report = load(str(renamed))
    else:
        raise UserError(f"--network_weights: the network of {module.name} has no load_weights; leave the option out")
    is_same = all(torch.equal(old, new.detach()) for old, new in zip(before, network.parameters(), strict=True))
    if module.is_foreign and is_same and not module.options.dim_from_weights:
        raise UserError(
            f"--network_weights {path}: {module.name} loaded nothing of it: the file is for another model or "
            " other --network_args, or the module cannot go on from its own files"
        )
    warnings = misfits(compare(weights, network), module, trained)
    for text in warnings:
        logger.warning("%s: %s", path, text)
    if not warnings:
        logger.info("%s: %s", path, shortened(str(report or "loaded")))


def misfits(fit: Fit, module: ImportedModule, trained: Trained) -> list[str]:
    """Return what a file of --network_weights and the network do not share, with the way out."""
    options, texts = module.options, []
    remedy = "give the --network_args that the file was trained with"
    if not module.is_foreign:
        remedy += ", such as conv_dim and conv_alpha for its 3x3 convolutions"
    if isinstance(module.module, ReadsFiles) and not options.dim_from_weights:
        remedy += ", or --dim_from_weights, which takes modules and ranks from the file"
    untrained = [name for name in fit.left if not trained.has(name)]
    if untrained:
        texts.append(
            f"{counted(untrained, fit.modules)} are of a part that is not trained, and will not be in the new file"
        )
    left = [name for name in fit.left if trained.has(name)]
    if left and (module.is_foreign or not options.dim_from_weights):  # the suite's own have said so themselves
        texts.append(f"{counted(left, fit.modules)} have no place in the network and are left out: {remedy}")
    if fit.tensors:
        way = remedy if module.is_foreign else "train on with the --network_module that wrote the file"
        number = counted(fit.tensors, fit.all_tensors, "tensors")
        texts.append(f"{number} have no place in the modules of the network and are left out: {way}")
    if fit.fresh:
        texts.append(f"{counted(fit.fresh, fit.own, 'modules of the network')} are not in it and start fresh: {remedy}")
    return texts
