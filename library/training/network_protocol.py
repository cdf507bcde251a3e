"""The border with network modules: ours and third parties' (lycoris.kohya, ...) are called the same way.

`TrainableNetwork` has what the recipe needs; what a foreign network lacks or does in its own way is filled
in here, so that the recipe never asks.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import inspect
import logging
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from library.config.network import NetworkConfig
from library.config.optimizer import OptimizerConfig
from library.config.values import written
from library.errors import UserError, shortened
from library.files import replacing
from library.models.base import BaseModel
from library.weight_file import check_adapter, open_weights

logger = logging.getLogger(__name__)

# What every network has. The rest is called where it is there.
REQUIRED_METHODS = (
    "apply_to",
    "prepare_optimizer_params",
    "prepare_grad_etc",
    "on_epoch_start",
    "get_trainable_params",
    "save_weights",
)
NORMS = {
    "weight_norms": "norm/avg_key_norm",
    "grad_norms": "norm/avg_grad_norm",
    "combined_weight_norms": "norm/avg_combined_norm",
}

PACKAGES = {"lycoris": "lycoris-lora"}  # of foreign modules whose package has another name
# What to do about failures that are known: first part of the module's name, part of the message, advice.
HINTS = (
    (
        "lycoris",
        "duplicated lora name",
        "its default preset takes layers of the U-Net twice; add preset=attn-mlp to --network_args",
    ),
)


class CanonicalTextEncoder(nn.Module):
    """A text encoder under the module path that files name: `text_model.…`, whichever transformers made it."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.text_model = encoder


@dataclasses.dataclass
class TrainableNetwork:
    """A network applied to the models, with what the recipe calls."""

    network: nn.Module
    options: NetworkConfig
    text_encoder: nn.Module | list[nn.Module]  # as network modules get it
    unet: nn.Module
    trains_text_encoder: bool
    trains_unet: bool

    def parameters(self) -> list[nn.Parameter]:
        """Return the trainable parameters."""
        return [parameter for parameter in self.network.get_trainable_params() if parameter.requires_grad]

    def groups(self, config: OptimizerConfig) -> tuple[list[dict[str, Any]], list[str]]:
        """Return (parameter groups, their names) with the learning rates of the options; gradients are on then."""
        with module_errors(self.options, "prepare_optimizer_params"):
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
        rates = list(config.text_encoder_lr or [config.learning_rate])
        unet_rate = config.learning_rate if config.unet_lr is None else config.unet_lr
        ask = getattr(self.network, "prepare_optimizer_params_with_multiple_te_lrs", None)
        arguments = (rates if ask else rates[0], unet_rate, config.learning_rate)
        ask = ask or self.network.prepare_optimizer_params
        result = ask(*arguments) if takes(ask, 3) else ask(*arguments[:2])  # older modules know no common rate
        groups, names = result if isinstance(result, tuple) else (result, None)
        return [group | {"params": list(group["params"])} for group in groups], names and list(names)

    def on_epoch_start(self) -> None:
        """Tell the network that an epoch begins; it goes into training mode."""
        self.network.on_epoch_start(self.text_encoder, self.unet)

    def on_optimizer_step(self, key: int) -> None:
        """Tell the network that a step begins, with a number that depends on seed and step alone."""
        if hasattr(self.network, "on_optimizer_step"):
            self.network.on_optimizer_step(key)

    def on_step_start(self) -> None:
        """Tell the network that a micro-batch begins, where it wants to know."""
        if hasattr(self.network, "on_step_start"):
            self.network.on_step_start(self.text_encoder, self.unet)

    def after_clipping(self) -> None:
        """Tell the network that its gradients are final, where it keeps account of them."""
        for name in ("update_grad_norms", "update_norms"):
            if hasattr(self.network, name):
                getattr(self.network, name)()

    def norms(self) -> dict[str, float]:
        """Return the means of the norms that a network keeps, by their names in the log."""
        if not hasattr(self.network, "weight_norms"):
            return {}
        asked = {label: getattr(self.network, name)() for name, label in NORMS.items() if hasattr(self.network, name)}
        return {label: float(norms.mean()) for label, norms in asked.items() if norms is not None}

    @contextlib.contextmanager
    def absent(self) -> Iterator[None]:
        """Within it the models are as they were without the network."""
        if not hasattr(self.network, "set_multiplier"):
            raise UserError(
                f"diff_output_preservation: {self.options.network_module} cannot be switched off (no set_multiplier)"
            )
        self.network.set_multiplier(0.0)
        try:
            yield
        finally:
            self.network.set_multiplier(1.0)

    def scale_norms(self, largest: float, device: torch.device) -> tuple[int, float, float] | None:
        """Scale changes down to a largest norm; return (number scaled, mean, largest), None if not offered."""
        scale = getattr(self.network, "apply_max_norm_regularization", None)
        if scale is None:
            return None
        count, mean, greatest = scale(largest, device)  # numbers, or tensors of one
        return int(count), float(mean), float(greatest)

    def describe_blocks(self) -> list[dict[str, Any]]:
        """Return rank, rate and modules of each block of the U-Net; empty for a network that does not tell."""
        describe = getattr(self.network, "describe_blocks", None)
        return [] if describe is None else describe()

    def delta_norms(self) -> list[float]:
        """Return the norm of each module's change; empty for a network that does not tell."""
        norms = getattr(self.network, "delta_norms", None)
        return [] if norms is None else norms().tolist()

    def save(self, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
        """Write the network's file, whole or not at all."""
        # Some multiply while they collect; in a file there is no graph to keep. All choose the format by the suffix.
        with replacing(path, suffix=path.suffix) as temporary, torch.no_grad():
            self.network.save_weights(str(temporary), dtype, dict(metadata))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return what a state keeps of the network.

        Of a foreign one that is every tensor as it is: its own state_dict is the content of a file, where parts
        are left out, multiplied together or named in another way.
        """
        return all_tensors(self.network) if is_foreign(self.options) else self.network.state_dict()

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over what state_dict returned; raises RuntimeError where it is of another network."""
        if not is_foreign(self.options):
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


def all_tensors(network: nn.Module) -> dict[str, torch.Tensor]:
    """Return every parameter and buffer by name, also those that a state_dict leaves out."""
    return {name: tensor.detach() for name, tensor in (*network.named_parameters(), *network.named_buffers())}


def takes(function: Any, number: int) -> bool:
    """Return whether a function can be called with a number of arguments."""
    try:
        inspect.signature(function).bind(*range(number))
    except TypeError:
        return False
    return True


# --------------------------------------------------------------------------------------------------------------
# Modules
# --------------------------------------------------------------------------------------------------------------


def is_foreign(config: NetworkConfig) -> bool:
    """Return whether the network module is a third party's."""
    return not config.network_module.startswith("networks.")


def find_module(config: NetworkConfig) -> ModuleType:
    """Return the network module of the options; raises UserError if there is none."""
    name = config.network_module
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        package = PACKAGES.get((error.name or "").split(".")[0])
        advice = f"pip install {package}" if package else "networks.lora trains a LoRA"
        raise UserError(f"--network_module {name}: {error}; {advice}") from None
    except Exception as error:
        if not is_foreign(config):
            raise
        raise UserError(failure(config, "import", error)) from error
    if not hasattr(module, "create_network"):
        raise UserError(f"--network_module {name} is no network module: it has no create_network")
    return module


@contextlib.contextmanager
def module_errors(config: NetworkConfig, doing: str, file: Path | None = None) -> Iterator[None]:
    """Turn what a network module raises into a UserError.

    Of a module of ours that is a ValueError, in its own words; anything else is a mistake of ours and shows. What
    a foreign module means by an exception is not known: it is told with its place and with what was asked for.
    """
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if is_foreign(config):
            raise UserError(failure(config, doing, error)) from error
        if isinstance(error, ValueError):
            place = "" if file is None or str(file) in str(error) else f"{file}: "
            raise UserError(f"--network_module {config.network_module}: {place}{error}") from None
        raise


def failure(config: NetworkConfig, doing: str, error: Exception) -> str:
    """Return in a line what a foreign module could not do, where, with which arguments, and what may help."""
    package = config.network_module.split(".")[0]
    frames = traceback.extract_tb(error.__traceback__)
    # Of the frames that are the module's own the last one; below it are torch and the like.
    own = [frame for frame in frames if package in Path(frame.filename).with_suffix("").parts]
    place = (own or frames)[-1]
    message = " ".join(str(error).split()) or place.line or "no message"
    arguments = " ".join(written(config.network_args or {})) or "none"
    advice = [text for first, part, text in HINTS if package == first and part in message]
    return (
        f"--network_module {config.network_module} failed in {doing}: {type(error).__name__}: {shortened(message)} "
        f"({Path(place.filename).name}:{place.lineno}); --network_args: {arguments}; "
        f"{advice[0] if advice else 'see the documentation of the module'}"
    )


def check_network(config: NetworkConfig) -> None:
    """Raise UserError for a module that is none, arguments that one of ours does not know, or damaged adapters."""
    module = find_module(config)
    if hasattr(module, "read_network_args"):
        with module_errors(config, "read_network_args"):
            given = module.read_network_args(config.network_args or {})
            if hasattr(module, "check_ranks") and not config.dim_from_weights:
                module.check_ranks(config.network_dim or module.DEFAULT_RANK, given)
    needs_files = {"--base_weights": config.base_weights, "--dim_from_weights": config.dim_from_weights}
    for option, given in needs_files.items():
        if given and not hasattr(module, "create_network_from_weights"):
            raise UserError(f"{option}: {config.network_module} has no create_network_from_weights; leave {option} out")
    for path in (config.network_weights, *(config.base_weights or ())):
        if path is not None:
            check_adapter(path)


def network_arguments(config: NetworkConfig) -> dict[str, Any]:
    """Return the keyword arguments of create_network: --network_args as texts, and the dropouts."""
    return {"dropout": config.network_dropout} | (config.network_args or {})


def build_network(
    config: NetworkConfig,
    optimizer: OptimizerConfig,
    models: BaseModel,
    *,
    checkpointing: bool,
    device: torch.device,
) -> TrainableNetwork:
    """Make the network over the models, apply it, and load --network_weights."""
    module = find_module(config)
    text_encoder, unet = text_encoder_for_networks(models), models.unet
    if config.dim_from_weights:
        _prepare_making_from_files(module, config, models)
        network = _create_from_weights(module, config, models, text_encoder)
    else:
        network = _create(module, config, models, text_encoder)
    check_methods(network, config)
    trains_text_encoder, trains_unet = trained_parts(config, optimizer)
    with module_errors(config, "apply_to"):
        if hasattr(network, "prepare_network"):
            options = dataclasses.asdict(optimizer) | dataclasses.asdict(config)
            network.prepare_network(argparse.Namespace(**options))
        network.apply_to(text_encoder, unet, trains_text_encoder, trains_unet)
        if config.network_weights is not None:
            with module_errors(config, "load_weights", config.network_weights):
                load_start(network, config)
        if checkpointing and hasattr(network, "enable_gradient_checkpointing"):
            network.enable_gradient_checkpointing()
        network.to(device)
    if not any(True for _ in network.parameters()):
        raise UserError(f"--network_module {config.network_module}: the network has no parameters for what is trained")
    return TrainableNetwork(network, config, text_encoder, unet, trains_text_encoder, trains_unet)


def text_encoder_for_networks(models: BaseModel) -> nn.Module | list[nn.Module]:
    """Return the text encoders as network modules get them: one by itself, several in a list."""
    encoders = [
        encoder if hasattr(encoder, "text_model") else CanonicalTextEncoder(encoder) for encoder in models.text_modules
    ]
    return encoders[0] if len(encoders) == 1 else encoders


def _prepare_making_from_files(module: ModuleType, config: NetworkConfig, models: BaseModel) -> None:
    """Let lycoris know its preset: it keeps it in a class, where only create_network puts it."""
    if is_foreign(config):
        _create(module, config, models, text_encoder_for_networks(models))


def _create(module: ModuleType, config: NetworkConfig, models: BaseModel, text_encoder: Any) -> nn.Module | None:
    with module_errors(config, "create_network"):
        return module.create_network(
            1.0,
            config.network_dim,
            config.network_alpha,
            models.vae,
            text_encoder,
            models.unet,
            neuron_dropout=config.network_dropout,
            **network_arguments(config),
        )


def _create_from_weights(
    module: ModuleType, config: NetworkConfig, models: BaseModel, text_encoder: Any
) -> nn.Module | None:
    with module_errors(config, "create_network_from_weights", config.network_weights):
        network, _ = module.create_network_from_weights(
            1.0,
            str(config.network_weights),
            models.vae,
            text_encoder,
            models.unet,
            None,
            neuron_dropout=config.network_dropout,
            **(config.network_args or {}),
        )
    return network


def check_methods(network: nn.Module | None, config: NetworkConfig) -> None:
    """Raise UserError for a network that cannot be trained; warn of an option that it cannot honour."""
    name = config.network_module
    if network is None:
        raise UserError(f"--network_module {name} made no network")
    missing = [method for method in REQUIRED_METHODS if not hasattr(network, method)]
    if missing:
        raise UserError(f"--network_module {name}: its network has no {', '.join(missing)}, which training needs")
    if config.scale_weight_norms and not hasattr(network, "apply_max_norm_regularization"):
        logger.warning("--scale_weight_norms: %s does not offer it; norms are left as they are", name)


def load_start(network: nn.Module, config: NetworkConfig) -> None:
    """Load --network_weights; of a foreign network that silently takes over nothing or a part, tell so."""
    path = config.network_weights
    before = [parameter.detach().clone() for parameter in network.parameters()]
    report = network.load_weights(str(path))
    logger.info("%s: %s", path, shortened(str(report or "loaded")))
    if not is_foreign(config):
        return
    is_same = all(torch.equal(old, new.detach()) for old, new in zip(before, network.parameters(), strict=True))
    if is_same and not config.dim_from_weights:
        raise UserError(
            f"--network_weights {path}: {config.network_module} took over nothing of it: the file is for another model "
            "or other --network_args, or the module cannot go on from its own files"
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


def merge_base_weights(config: NetworkConfig, models: BaseModel) -> None:
    """Merge each file of --base_weights into the models, with its multiplier."""
    if not config.base_weights:
        return
    multipliers = list(config.base_weights_multiplier or ())
    for index, path in enumerate(config.base_weights):
        multiplier = multipliers[index] if index < len(multipliers) else 1.0
        with module_errors(config, "merge_to", path):
            merge_file(config, path, multiplier, models)
        logger.info("%s is merged into the base with multiplier %g", path, multiplier)


def merge_file(
    config: NetworkConfig,
    path: Path,
    multiplier: float,
    models: BaseModel,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Merge a file into the models; weights are its tensors, where they have been read."""
    module, text_encoder = find_module(config), text_encoder_for_networks(models)
    _prepare_making_from_files(module, config, models)
    if is_foreign(config):
        _merge_foreign(module, path, multiplier, models, text_encoder)
    else:
        _merge(module, path, multiplier, models, text_encoder, weights=weights)


def _merge(
    module: ModuleType,
    path: Path,
    multiplier: float,
    models: BaseModel,
    text_encoder: Any,
    *,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    network, weights = module.create_network_from_weights(
        multiplier, str(path), models.vae, text_encoder, models.unet, weights, for_inference=True
    )
    network.merge_to(text_encoder, models.unet, weights, next(models.unet.parameters()).dtype, models.unet.device)


@torch.no_grad()
def _merge_foreign(module: ModuleType, path: Path, multiplier: float, models: BaseModel, text_encoder: Any) -> None:
    """Merge at full strength, which every module does, and apply the multiplier here: lycoris drops it."""
    bases = nn.ModuleList([*models.text_modules, models.unet])
    before = {name: parameter.clone() for name, parameter in bases.named_parameters()}
    _merge(module, path, 1.0, models, text_encoder)
    after = dict(bases.requires_grad_(False).named_parameters())
    if all(name in before and torch.equal(before[name], parameter) for name, parameter in after.items()):
        raise UserError(f"--base_weights {path} changes nothing: it is for another model or another module")
    if multiplier != 1:
        for name, parameter in after.items():
            old = before.get(name, torch.zeros_like(parameter))
            parameter.copy_(torch.lerp(old.float(), parameter.float(), multiplier))
