"""The required and the optional methods of network modules and of their networks, as types.

mypy checks those of the suite. Foreign ones (lycoris.kohya, ...) are checked at run time: `missing_methods` for
the required methods of a network, `optional_method` and `isinstance` for the optional ones. Arguments are passed by
position, so a module can name its parameters freely.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from argparse import Namespace

TextEncoders: TypeAlias = nn.Module | list[nn.Module]  # one text encoder, or a list of several
Groups: TypeAlias = Iterable[dict[str, Any]]  # parameter groups of an optimizer
NamedGroups: TypeAlias = tuple[Groups, Sequence[str] | None]


class TorchModule(Protocol):
    """The part of torch.nn.Module that is used; every network is one."""

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
    """The modules that are trained, attached to one set of models."""

    def apply_to(
        self, text_encoder: TextEncoders, unet: nn.Module, apply_text_encoder: bool, apply_unet: bool, /
    ) -> object:
        """Attach to the models; a part that is not applied is not trained."""

    def prepare_optimizer_params(
        self, text_encoder_lr: float, unet_lr: float, learning_rate: float = 0.0, /
    ) -> Groups | NamedGroups:
        """Return parameter groups, optionally with their names; older modules take no learning_rate."""

    def prepare_grad_etc(self, text_encoder: TextEncoders, unet: nn.Module, /) -> object:
        """Turn on the gradients of the trained parameters."""

    def on_epoch_start(self, text_encoder: TextEncoders, unet: nn.Module, /) -> object:
        """Switch to training mode."""

    def get_trainable_params(self) -> Iterable[nn.Parameter]:
        """Return the parameters whose gradients are clipped."""

    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: dict[str, str], /) -> object:
        """Write a file, with the tensors in dtype; None keeps their type."""


def missing_methods(network: object) -> list[str]:
    """Return the names of the methods of Network that an object lacks."""
    return [name for name in vars(Network) if not name.startswith("_") and not hasattr(network, name)]


class OptionalMethods(Protocol):
    """What only some networks offer; `optional_method` looks one up."""

    def prepare_network(self, args: Namespace, /) -> object:
        """Read the options of the run; called before apply_to."""

    def load_weights(self, file: str, /) -> object:
        """Load a file that the network wrote."""

    def load_tensors(self, weights: Mapping[str, Tensor], file: str, /) -> object:
        """Load the tensors of such a file, as `load_weights` does; file is its name in messages."""

    def enable_gradient_checkpointing(self) -> object:
        """Adapt to gradient checkpointing, which is on."""

    def prepare_optimizer_params_with_multiple_te_lrs(
        self, text_encoder_lrs: list[float], unet_lr: float, learning_rate: float = 0.0, /
    ) -> Groups | NamedGroups:
        """Return parameter groups with a learning rate for each text encoder."""

    def compute_with(self, copies: Mapping[Tensor, Tensor], /) -> object:
        """Compute with copies of the trained parameters, in the type of the models, and add gradients to theirs.

        A network that offers this needs no autocast.
        """

    def keep_shapes(self) -> object:
        """Compute with tensors of the same shapes in every step, for compiled or recorded ones."""

    def on_optimizer_step(self, key: int, /) -> object:
        """Prepare for an optimizer step; key depends on seed and step alone."""

    def on_step_start(self, text_encoder: TextEncoders, unet: nn.Module, /) -> object:
        """Prepare for a micro-batch."""

    def apply_max_norm_regularization(
        self, max_norm: float, device: torch.device, /
    ) -> tuple[int | Tensor, float | Tensor, float | Tensor]:
        """Scale changes down to a largest norm; return (number scaled, mean norm, largest norm)."""

    def describe_unet(self) -> list[tuple[str, int, float]]:
        """Return name, rank and weight of the learning rate of each module over the U-Net."""

    def file_alphas(self) -> dict[str, float]:
        """Return module -> alpha in the files that the network writes, in the order of `delta_norms`."""

    def delta_norms(self) -> Tensor:
        """Return the Frobenius norm of each module's change, (modules,)."""

    def rank_norms(self) -> dict[int, float]:
        """Return rank -> Frobenius norm of the change of all modules together, of a network with many ranks."""

    def set_rank(self, rank: int, /) -> object:
        """Use a rank up to the network's own."""

    def remove(self) -> object:
        """Detach from the models, which are then as before."""

    def merge_to(
        self,
        text_encoder: TextEncoders,
        unet: nn.Module,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device,
        /,
    ) -> object:
        """Add the tensors of a file to the weights of the models."""


def optional_method(network: object, name: str) -> Callable[..., Any] | None:
    """Return a method of OptionalMethods, or None if a network lacks it."""
    assert name in vars(OptionalMethods), name
    return getattr(network, name, None)


@runtime_checkable
class HasMultiplier(Protocol):
    """A network with a strength that can change at any time; 0 leaves the models as they were."""

    def set_multiplier(self, multiplier: float, /) -> object: ...


@runtime_checkable
class NetworkModule(Protocol):
    """A Python module that creates networks, as named by `--network_module`."""

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
        """Return a new network; network_args are texts."""


@runtime_checkable
class ReadsFiles(Protocol):
    """A network module that creates networks from files."""

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
        """Return (network, tensors of the file); the tensors are not loaded into the network yet."""


@runtime_checkable
class ChecksArguments(Protocol):
    """A network module that can check its arguments before a model is loaded."""

    def check_network_args(
        self, network_dim: int | None, network_args: Mapping[str, str], /, *, from_file: bool, is_sgm: bool | None
    ) -> object:
        """Raise ValueError for unknown or unreadable arguments; with from_file the ranks come from a file.

        is_sgm tells whether they are for a U-Net with the names of checkpoints (SDXL); None: not known yet.
        """
