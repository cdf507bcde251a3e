"""How much memory a run will need, stage by stage, measured with tensors that have shapes and no contents.

Torch's FakeTensorMode runs the models on shapes, forward and backward, with gradient checkpointing and attention
kernels; the tensors that exist at each operation are added up. A GPU's context and the gaps between allocations
(some 0.5 to 1 GB in total) are not included.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from library.data.buckets import Size
from library.models.base import BaseModel
from library.models.conditioning import PER_WINDOW, Conditioning, joined
from library.models.memory import PeakMemory, decode, empty_latents, weight_bytes, weights_of
from library.models.precision import Types
from library.models.tokenizer import WINDOW
from library.networks.trainable import TrainableNetwork
from library.optim.flat import type_of_masters
from library.optim.optimizers import OptimizerChoice, build_optimizer

PROBE_SIDE = 128  # of the matrix to measure an optimizer's state; 8-bit ones keep smaller matrices in 32 bits
CPU = torch.device("cpu")
GUIDED = 2  # rows of a guided step: with the prompt, and with the negative prompt


@dataclasses.dataclass(frozen=True)
class Stage:
    """What is on the device in a stage of a run, in bytes: models and network by part, and the peak of the rest."""

    title: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Pictures that a model works on at the same time."""

    size: Size
    number: int
    windows: int = 1  # of 77 tokens, of a caption or prompt

    def pixels(self) -> int:
        """Return how many pixels all of them have."""
        return math.prod(self.size) * self.number

    def __str__(self) -> str:
        return "{}x{}".format(*self.size) + (f" in batches of {self.number}" if self.number > 1 else "")


@dataclasses.dataclass(frozen=True)
class Work:
    """The stages of a run, each with what it works on at most at a time; None for a stage that it does not have."""

    training: Pictures
    encoding: Pictures  # by the VAE
    is_cached: bool  # whether all pictures are encoded before training
    texts: int | None  # that are encoded at a time, before training; None: in the steps
    previews: Pictures | None


def state_bytes_per_parameter(choice: OptimizerChoice, learning_rate: float, adapter: torch.dtype) -> float:
    """Return the bytes of an optimizer's state for each trained parameter of a type."""
    probe = nn.Parameter(torch.zeros(PROBE_SIDE, PROBE_SIDE, dtype=type_of_masters(adapter)))
    optimizer = build_optimizer(choice, [{"params": [probe], "lr": learning_rate}], learning_rate)
    probe.grad = torch.ones_like(probe)
    optimizer.step()
    tensors = [value for value in optimizer.state[probe].values() if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in tensors) / probe.numel()


# --------------------------------------------------------------------------------------------------------------
# Stages
# --------------------------------------------------------------------------------------------------------------


def count_stages(
    base: BaseModel, network: TrainableNetwork, work: Work, types: Types, *, state_bytes: float
) -> list[Stage]:
    """Return the stages of a run in their order; state_bytes are those of the optimizer for each trained parameter.

    The weights of base and network are on the meta device, in the types of the run. They are replaced by fake ones, so
    that the models are unusable afterwards.
    """
    trained = [parameter for parameter in network.all_parameters() if parameter.requires_grad]
    types = types._replace(casts=not network.computes_in_half)
    # `optim.flat`: in the type of the optimizer, and where the computations have another one, in that, too.
    number, masters = sum(parameter.numel() for parameter in trained), type_of_masters(types.adapter)
    learned_bytes = number * sum({dtype: dtype.itemsize for dtype in (masters, types.unet)}.values())
    sizes = {
        "U-Net": weight_bytes(base.unet),
        "text encoders": weight_bytes(*base.text_modules),
        "VAE": weight_bytes(base.vae),
        "network": learned_bytes + sum(p.nbytes for p in network.all_parameters() if not p.requires_grad),
        "gradients": learned_bytes,
        "optimizer": round(state_bytes * number),
    }
    learned = ["network", "gradients", "optimizer"]
    stays = ([] if work.is_cached else ["VAE"]) + ([] if work.texts is not None else ["text encoders"])

    def stage(title: str, names: Iterable[str], activations: int) -> Stage:
        return Stage(title, {name: sizes[name] for name in names} | {"activations": activations})

    with fake_weights([base.unet, *base.text_modules, base.vae], network, types.unet) as peak_of:
        encoding = peak_of(lambda: encode_pictures(base, work.encoding))
        step = peak_of(lambda: make_step(base, network, types, work.training))
        stages = []
        if work.is_cached:
            stages.append(stage(f"encoding pictures, {work.encoding}", ["VAE", "network"], encoding))
        if work.texts is not None:
            number, windows = work.texts, work.training.windows
            states = peak_of(lambda: encode_texts(base, types, number, windows))
            stages.append(stage("encoding captions", [*stays, "text encoders", "network"], states))
        activations = step if work.is_cached else max(encoding, step)
        stages.append(stage(f"training, {work.training}", ["U-Net", *stays, *learned], activations))
        if (drawn := work.previews) is not None:
            guided = peak_of(lambda: denoise(base, types, drawn))
            stages.append(stage(f"drawing previews, {drawn}", ["U-Net", *stays, *learned], guided))
            decoding = peak_of(lambda: decode(base.vae, drawn.size))
            others = [name for name in stays if name != "VAE"]
            stages.append(stage(f"decoding previews, {drawn}", ["VAE", *others, *learned], decoding))
    return stages


@contextlib.contextmanager
def fake_weights(
    models: Iterable[nn.Module], network: TrainableNetwork, computed: torch.dtype
) -> Iterator[Callable[[Callable[[], object]], int]]:
    """Replace weights on the meta device by fake ones; yields what measures the peak of a function, in bytes.

    computed is the type of the computations.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    modules = [*(module for model in models for module in model.modules()), *network.modules()]
    copies: dict[Tensor, Tensor] = {}
    gradients: list[Tensor] = []

    def peak_of(function: Callable[[], object]) -> int:
        with PeakMemory() as memory:
            memory.ignore([*weights_of(modules), *copies.values(), *gradients])
            function()
        return memory.peak

    with FakeTensorMode(allow_non_fake_inputs=True):
        _make_fake(modules)
        copies.update({parameter: _empty(parameter, computed) for parameter in network.parameters()})
        for copy in copies.values():
            gradients.append(_empty(copy, computed))
            copy.requires_grad_().grad = gradients[-1]
        network.compute_with(copies)
        yield peak_of


def make_step(base: BaseModel, network: TrainableNetwork, types: Types, pictures: Pictures) -> None:
    """Run the U-Net, and text encoders that are trained, forward and backward."""
    number, windows = pictures.number, pictures.windows
    with _norms_of_cuda(base, types):
        with types.autocast(CPU):
            text = _empty_texts(base, types, number, windows)
            if network.trains_text_encoder:
                text = _encoded_texts(base, number, windows)
            prediction = _predict(base, types, pictures.size, text)
        prediction.float().square().mean().backward()


@torch.no_grad()
def encode_pictures(base: BaseModel, pictures: Pictures) -> Tensor:
    """Return the moments of the VAE for empty pictures."""
    width, height = pictures.size
    pixels = torch.empty(pictures.number, 3, height, width)
    return base.vae.encode(pixels.to(base.vae.dtype)).latent_dist.parameters


@torch.no_grad()
def encode_texts(base: BaseModel, types: Types, number: int, windows: int) -> Conditioning:
    """Return the conditioning of empty texts."""
    with _norms_of_cuda(base, types), types.autocast(CPU):
        return _encoded_texts(base, number, windows)


@torch.no_grad()
def denoise(base: BaseModel, types: Types, pictures: Pictures) -> Tensor:
    """Return the U-Net's output in a step of a sampler with guidance."""
    with _norms_of_cuda(base, types), types.autocast(CPU):
        rows = GUIDED * pictures.number
        return _predict(base, types, pictures.size, _empty_texts(base, types, rows, pictures.windows))


def _empty_texts(base: BaseModel, types: Types, number: int, windows: int) -> Conditioning:
    widths = [text.module.config.projection_dim or 0 for text in base.texts if text.row.has_projection]
    return Conditioning(
        torch.empty(number, windows * PER_WINDOW + 2, base.unet.config["cross_attention_dim"], dtype=types.unet),
        torch.empty(number, widths[0], dtype=types.unet) if widths else None,
    )


def _encoded_texts(base: BaseModel, number: int, windows: int) -> Conditioning:
    ids = torch.zeros(number * windows, WINDOW, dtype=torch.int64)
    parts = [encoder.encode(ids, None) for encoder in base.texts]
    states = [joined(hidden.unflatten(0, (number, windows)), keeps_ends=False) for hidden, _ in parts]
    pooled = next((pooled for _, pooled in parts if pooled is not None), None)
    return Conditioning(torch.cat(states, dim=-1), None if pooled is None else pooled[::windows])


def _predict(base: BaseModel, types: Types, size: Size, text: Conditioning) -> Tensor:
    number = len(text.hidden)
    given = text.to(text.hidden.device, types.unet).for_unet(torch.zeros(number, 6))
    latents, timesteps = empty_latents(size, number, types.unet), torch.zeros(number, dtype=torch.int64)
    return base.unet(latents, timesteps, **given).sample


@contextlib.contextmanager
def _norms_of_cuda(base: BaseModel, types: Types) -> Iterator[None]:
    """Let norms compute in float32, as autocast does on CUDA; here the rules of the CPU apply, where it does not."""
    models = [base.unet, *base.text_modules] if types.casts and types.unet is not torch.float32 else []
    norms = [
        module for model in models for module in model.modules() if isinstance(module, nn.GroupNorm | nn.LayerNorm)
    ]
    for norm in norms:
        vars(norm)["forward"] = functools.partial(_in_float32, norm)  # hides the method of its class
    try:
        yield
    finally:
        for norm in norms:
            del vars(norm)["forward"]


def _in_float32(norm: nn.GroupNorm | nn.LayerNorm, x: Tensor) -> Tensor:
    weight, bias = (None if part is None else part.float() for part in (norm.weight, norm.bias))
    with torch.autocast("cpu", enabled=False):
        if isinstance(norm, nn.GroupNorm):
            return nn.functional.group_norm(x.float(), norm.num_groups, weight, bias, norm.eps)
        return nn.functional.layer_norm(x.float(), norm.normalized_shape, weight, bias, norm.eps)


def _empty(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(tensor.shape, dtype=dtype)


def _make_fake(modules: Iterable[nn.Module]) -> None:
    """Replace weights on the meta device by fake ones on the CPU, so that the CPU's kernels are measured.

    Those that are trained get their gradients at once, as they have them in a run after its first step.
    """
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = nn.Parameter(
                    torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=parameter.requires_grad
                )
                fake.grad = torch.empty_like(fake) if fake.requires_grad else None
                module._parameters[name] = fake
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
