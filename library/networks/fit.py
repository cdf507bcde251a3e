"""Which tensors of a file have a place in a network, by their names: `MODULE.rest`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from library.errors import named
from library.networks.protocol import Network
from library.weight_file import at_first_dot


class Fit(NamedTuple):
    """What a file and a network do not share; lists of names are sorted."""

    modules: int  # of the file
    all_tensors: int  # of the file
    own: int  # modules of the network
    left: list[str]  # modules of the file that the network does not have
    tensors: list[str]  # tensors of the file in modules that the network has, but without them
    fresh: list[str]  # modules of the network that the file does not have


def compare(names: Iterable[str], network: Network) -> Fit:
    """Return how the names of a file's tensors fit a network."""
    given = set(names)
    own = names_in(network)
    trained = {name for name, _ in network.named_parameters()}
    of_file, of_network = modules_of(given), modules_of(own)
    return Fit(
        modules=len(of_file),
        all_tensors=len(given),
        own=len(modules_of(trained)),
        left=sorted(of_file - of_network),
        tensors=sorted(name for name in given - own if at_first_dot(name)[0] in of_network),
        fresh=sorted(modules_of(trained) - of_file),
    )


@torch.no_grad()  # some networks compute while they collect tensors
def names_in(network: Network) -> set[str]:
    """Return the names that the tensors of a network have, in it or in its files.

    A foreign state_dict can be the content of a file, in which tensors are omitted or renamed.
    """
    return network.state_dict().keys() | all_tensors(network).keys()


def all_tensors(network: Network) -> dict[str, Tensor]:
    """Return every parameter and buffer by name, including those that a state_dict omits."""
    return {name: tensor.detach() for name, tensor in (*network.named_parameters(), *network.named_buffers())}


def modules_of(tensors: Iterable[str]) -> set[str]:
    """Return the modules that tensors belong to."""
    return {at_first_dot(name)[0] for name in tensors}


def counted(names: Collection[str], of: int, kind: str = "modules") -> str:
    """Return in words how many of a number the names are, and the first of them."""
    return f"{len(names)} of {of} {kind} ({named(sorted(names))})"
