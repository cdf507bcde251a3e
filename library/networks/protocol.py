"""What a network module and its network must have, and what they may have besides, as types.

Ours hold it by type check. A foreign one (lycoris.kohya, ...) is asked at run time: `missing_methods` for what
every network has, `isinstance` with one of the small classes for what only some offer. Arguments of methods go by
position, so that their names are free.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from argparse import Namespace

TextEncoders: TypeAlias = nn.Module | list[nn.Module]  # as network modules get them: one by itself, several in a list
Groups: TypeAlias = Iterable[dict[str, Any]]  # parameter groups of an optimizer
NamedGroups: TypeAlias = tuple[Groups, Sequence[str] | None]


class TorchModule(Protocol):
    """What is used of torch.nn.Module, which every network is."""

    training: bool

    def parameters(self) -> Iterator[nn.Parameter]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def named_buffers(self) -> Iterator[tuple[str, Tensor]]: ...
    def children(self) -> Iterator[nn.Module]: ...
    def modules(self) -> Iterator[nn.Module]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, /) -> object: ...
    def to(self, device: torch.device, dtype: torch.dtype | None = None, /) -> object: ...
    def train(self) -> object: ...
    def eval(self) -> object: ...
    def requires_grad_(self, requires_grad: bool, /) -> object: ...


class Network(TorchModule, Protocol):
    """The modules that are trained, over one set of models."""

    def apply_to(
        self, text_encoder: TextEncoders, unet: nn.Module, apply_text_encoder: bool, apply_unet: bool, /
    ) -> object:
        """Attach to the models the network was made for; a part that is not applied is not trained."""

    def prepare_optimizer_params(
        self, text_encoder_lr: float, unet_lr: float, learning_rate: float = 0.0, /
    ) -> Groups | NamedGroups:
        """Return parameter groups with their rates, and perhaps their names; older modules take no learning_rate."""

    def prepare_grad_etc(self, text_encoder: TextEncoders, unet: nn.Module, /) -> object:
        """Make trainable what is trained."""

    def on_epoch_start(self, text_encoder: TextEncoders, unet: nn.Module, /) -> object:
        """Go into training mode."""

    def get_trainable_params(self) -> Iterable[nn.Parameter]:
        """Return the parameters whose gradients are clipped."""

    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: dict[str, str], /) -> object:
        """Write a file in dtype (None: as it is)."""


def missing_methods(network: object) -> list[str]:
    """Return the names of the methods of Network that an object lacks."""
    return [name for name in vars(Network) if not name.startswith("_") and not hasattr(network, name)]


# --------------------------------------------------------------------------------------------------------------
# What only some networks offer
# --------------------------------------------------------------------------------------------------------------


@runtime_checkable
class PreparesItself(Protocol):
    """Reads the options of the run before it is applied."""

    def prepare_network(self, args: Namespace, /) -> object: ...


@runtime_checkable
class LoadsFiles(Protocol):
    """Goes on from its own file."""

    def load_weights(self, file: str, /) -> object: ...


@runtime_checkable
class Checkpoints(Protocol):
    """Has to know of gradient checkpointing."""

    def enable_gradient_checkpointing(self) -> object: ...


@runtime_checkable
class HasRatesByTextEncoder(Protocol):
    """Takes a learning rate for each text encoder."""

    def prepare_optimizer_params_with_multiple_te_lrs(
        self, text_encoder_lrs: list[float], unet_lr: float, learning_rate: float = 0.0, /
    ) -> Groups | NamedGroups: ...


@runtime_checkable
class FollowsOptimizerSteps(Protocol):
    """Has to know that an optimizer step begins; key depends on seed and step alone."""

    def on_optimizer_step(self, key: int, /) -> object: ...


@runtime_checkable
class FollowsBatches(Protocol):
    """Has to know that a micro-batch begins."""

    def on_step_start(self, text_encoder: TextEncoders, unet: nn.Module, /) -> object: ...


@runtime_checkable
class HasMultiplier(Protocol):
    """Has a strength that can change at any time; 0 leaves the models as they were."""

    def set_multiplier(self, multiplier: float, /) -> object: ...


@runtime_checkable
class LimitsNorms(Protocol):
    """Scales changes down to a largest norm; returns (number scaled, mean norm, largest norm)."""

    def apply_max_norm_regularization(
        self, max_norm: float, device: torch.device, /
    ) -> tuple[int | Tensor, float | Tensor, float | Tensor]: ...


@runtime_checkable
class DescribesUnet(Protocol):
    """Tells name, rank and weight of the learning rate of each module over the U-Net."""

    def describe_unet(self) -> list[tuple[str, int, float]]: ...


@runtime_checkable
class HasDeltaNorms(Protocol):
    """Tells the Frobenius norm of each module's change, (modules,)."""

    def delta_norms(self) -> Tensor: ...


@runtime_checkable
class HasRanks(Protocol):
    """Acts with any rank up to its own."""

    def set_rank(self, rank: int, /) -> object: ...


@runtime_checkable
class Removable(Protocol):
    """Can be detached from the models, which are then as before."""

    def remove(self) -> object: ...


@runtime_checkable
class Mergeable(Protocol):
    """Can be added to the weights of the models."""

    def merge_to(
        self,
        text_encoder: TextEncoders,
        unet: nn.Module,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device,
        /,
    ) -> object: ...


# --------------------------------------------------------------------------------------------------------------
# Modules
# --------------------------------------------------------------------------------------------------------------


@runtime_checkable
class NetworkModule(Protocol):
    """A Python module that makes networks: what `--network_module` names."""

    def create_network(
        self,
        multiplier: float,
        network_dim: int | None,
        network_alpha: float | None,
        vae: nn.Module,
        text_encoder: TextEncoders,
        unet: nn.Module,
        neuron_dropout: float | None = None,
        **network_args: Any,
    ) -> Network | None:
        """Return a fresh network; network_args are texts."""


@runtime_checkable
class ReadsFiles(Protocol):
    """A network module that makes networks from files."""

    def create_network_from_weights(
        self,
        multiplier: float,
        file: str,
        vae: nn.Module,
        text_encoder: TextEncoders,
        unet: nn.Module,
        weights_sd: Mapping[str, Tensor] | None = None,
        for_inference: bool = False,
        **network_args: Any,
    ) -> tuple[Network | None, Mapping[str, Tensor]]:
        """Return (network, tensors of the file); the tensors are not in the network yet."""


@runtime_checkable
class ChecksArguments(Protocol):
    """A network module that can say what is wrong with its arguments before there are models."""

    def check_network_args(
        self, network_dim: int | None, network_args: Mapping[str, str], /, *, from_file: bool
    ) -> object:
        """Raise ValueError for arguments that it does not know or cannot read; a file's ranks are its own."""
