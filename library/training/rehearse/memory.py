"""How much memory a run will need, measured in one step with tensors that have shapes and no contents.

Torch's FakeTensorMode runs the real forward and backward pass on shapes, with gradient checkpointing and attention
kernels; the tensors that exist at each operation are added up. A GPU's context and the gaps between allocations
(some 0.5 to 1 GB in total) are not included.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from library.config.values import LATENT_SCALE
from library.data.buckets import Size
from library.models.base import BaseModel
from library.models.eight_bit import STORAGE
from library.models.tokenizer import WINDOW
from library.networks.trainable import TrainableNetwork
from library.optim.optimizers import OptimizerChoice, build_optimizer

PROBE_SIDE = 128  # of the matrix to measure an optimizer's state; 8-bit ones keep smaller matrices in 32 bits


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of each part of a run."""

    unet: int
    text_encoder: int
    vae: int  # 0 if latents are cached, because it leaves the device
    adapter: int
    gradients: int
    optimizer: int
    activations: int  # the peak over forward and backward pass of the largest batch

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


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


def weight_bytes(model: nn.Module, dtype: torch.dtype, *, in_eight_bits: bool = False) -> int:
    """Return the bytes of a model's weights in a dtype; with in_eight_bits, linear layers and convolutions have 8."""
    total = sum(parameter.numel() * dtype.itemsize for parameter in model.parameters())
    if in_eight_bits:
        layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        total -= sum(layer.weight.numel() * (dtype.itemsize - STORAGE.itemsize) for layer in layers)
    return total


def state_bytes_per_parameter(choice: OptimizerChoice, learning_rate: float) -> float:
    """Return the bytes of an optimizer's state for each trained parameter."""
    probe = nn.Parameter(torch.zeros(PROBE_SIDE, PROBE_SIDE))
    optimizer = build_optimizer(choice, [{"params": [probe], "lr": learning_rate}], learning_rate)
    probe.grad = torch.ones_like(probe)
    optimizer.step()
    tensors = [value for value in optimizer.state[probe].values() if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / probe.numel()


def step_activations(
    base: BaseModel, network: TrainableNetwork, dtype: torch.dtype, *, size: Size, batch: int, windows: int
) -> int:
    """Return the peak bytes of a forward and backward pass without weights and gradients.

    The batch has pictures of size (width, height) and captions of a number of windows of 77 tokens. base and network
    are on the meta device; their weights are replaced by fake ones, so they are unusable afterwards.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        modules = [module for part in (base.unet, *base.text_modules) for module in part.modules()]
        _make_fake(modules, dtype)
        _make_fake(network.modules(), torch.float32)
        with PeakMemory() as memory:
            memory.ignore(weights_of([*modules, *network.modules()]))
            _make_step(base, network, dtype, size=size, batch=batch, windows=windows)
    trained = sum(p.numel() * p.element_size() for p in network.all_parameters() if p.requires_grad)
    return max(0, memory.peak - trained)


def _make_step(
    base: BaseModel, network: TrainableNetwork, dtype: torch.dtype, *, size: Size, batch: int, windows: int
) -> None:
    """Run text encoder and U-Net forward and backward."""
    width, height = size
    is_half = dtype is not torch.float32
    with (
        torch.autocast("cpu", dtype, enabled=is_half),
        _norms_in_float32([base.unet, *base.text_modules], is_half),
    ):
        if network.trains_text_encoder:
            tokens = torch.zeros(batch * windows, WINDOW, dtype=torch.int64)
            hidden = base.text_modules[0](tokens).last_hidden_state.unflatten(0, (batch, windows)).flatten(1, 2)
        else:
            hidden = torch.empty(batch, windows * WINDOW, base.unet.config["cross_attention_dim"], dtype=dtype)
        latents = torch.empty(batch, 4, height // LATENT_SCALE, width // LATENT_SCALE, dtype=dtype)
        timesteps = torch.zeros(batch, dtype=torch.int64)
        prediction = base.unet(latents, timesteps, encoder_hidden_states=hidden).sample
        prediction.float().square().mean().backward()


@contextlib.contextmanager
def _norms_in_float32(models: list[nn.Module], is_half: bool) -> Iterator[None]:
    """Let norms compute in float32, as autocast does on CUDA; here the rules of the CPU apply, where it does not."""
    norms = [
        module for model in models for module in model.modules() if isinstance(module, nn.GroupNorm | nn.LayerNorm)
    ]
    for norm in norms if is_half else ():
        vars(norm)["forward"] = functools.partial(_in_float32, norm)  # hides the method of its class
    try:
        yield
    finally:
        for norm in norms if is_half else ():
            del vars(norm)["forward"]


def _in_float32(norm: nn.GroupNorm | nn.LayerNorm, x: Tensor) -> Tensor:
    weight, bias = (None if part is None else part.float() for part in (norm.weight, norm.bias))
    with torch.autocast("cpu", enabled=False):
        if isinstance(norm, nn.GroupNorm):
            return nn.functional.group_norm(x.float(), norm.num_groups, weight, bias, norm.eps)
        return nn.functional.layer_norm(x.float(), norm.normalized_shape, weight, bias, norm.eps)


def weights_of(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """Yield the parameters and buffers of modules, without those of their submodules."""
    for module in modules:
        yield from (*module.parameters(recurse=False), *module.buffers(recurse=False))


def _make_fake(modules: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """Replace weights on the meta device by fake ones on the CPU, so that the CPU's kernels are measured."""
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=dtype)
                module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
