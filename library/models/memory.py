"""How much memory the work of models needs: the tensors that exist at each operation, added up.

In torch's FakeTensorMode models run on shapes, so that nothing is computed.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from library.config.values import LATENT_SCALE

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all tensors created within it: those alive now, and the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Do not count tensors that existed before."""
        for tensor in tensors:
            self._known[tensor.untyped_storage()._cdata] = 0

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = storage.nbytes()
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.alive -= self._known.pop(key, 0)


def weight_bytes(*models: nn.Module) -> int:
    """Return the bytes of models' weights as they are, which may be on the meta device."""
    return sum(parameter.nbytes for model in models for parameter in model.parameters())


def weights_of(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """Yield the parameters, their gradients and the buffers of modules, without those of their submodules."""
    for module in modules:
        for parameter in module.parameters(recurse=False):
            yield from (parameter,) if parameter.grad is None else (parameter, parameter.grad)
        yield from module.buffers(recurse=False)


def empty_latents(size: tuple[int, int], number: int, dtype: torch.dtype) -> Tensor:
    """Return latents (number, 4, H/8, W/8) without values, for pictures of size (width, height)."""
    width, height = size
    return torch.empty(number, 4, height // LATENT_SCALE, width // LATENT_SCALE, dtype=dtype)


@torch.no_grad()
def decode(vae: AutoencoderKL, size: tuple[int, int]) -> Tensor:
    """Return the VAE's picture of empty latents."""
    return vae.decode(empty_latents(size, 1, vae.dtype)).sample


def bytes_to_decode(vae: AutoencoderKL, size: tuple[int, int]) -> int:
    """Return the bytes that a VAE with real weights needs to decode a picture, with the weights."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(vae.device), PeakMemory() as memory:
        memory.ignore(weights_of(vae.modules()))
        decode(vae, size)
    return memory.peak + weight_bytes(vae)
