"""LoRA for Stable Diffusion, in one file that needs nothing else of the suite (standard library, torch, safetensors).

Copy this file into a project that uses diffusers and write:

    from networks.lora import create_network_from_weights
    from safetensors.torch import load_file

    network, weights = create_network_from_weights(0.8, None, pipe.vae, pipe.text_encoder, pipe.unet, load_file(path))
    network.apply_to(pipe.text_encoder, pipe.unet)
    network.load_state_dict(weights)
    network.to(device, dtype=torch.float16)
    network.set_multiplier(0.5)   # at any time
    network.remove()              # the models are as before apply_to

The changes of several networks on the same models add up. To write the change into the models' own weights, call
`network.merge_to(text_encoder, unet, weights)` instead of `apply_to` and `load_state_dict`.

A LoRA (arXiv 2106.09685) adds to a layer's output W x the term m * alpha / R * U D x, where D (down) has R rows
and U (up) starts at zero; m is the multiplier. LoRA-LierLa changes linear layers and 1x1 convolutions,
LoRA-C3Lier also 3x3 convolutions. Names, shapes and metadata of files are those of sd-scripts.

Letters of shapes: B batch, T tokens, R rank, H and W height and width.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import logging
import math
import os
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import load, load_file, save
from torch import Tensor, nn

logger = logging.getLogger(__name__)

DEFAULT_RANK = 4
PREFIX_UNET = "lora_unet"
PREFIX_TEXT_ENCODER = "lora_te"  # of a single encoder; two are numbered: lora_te1, lora_te2

# Names over SDXL's U-Net have the paths of its checkpoint, as in sd-scripts: beginning of the path in diffusers and in
# the checkpoint, whose number {} is a first number and the captured ones times their steps.
SGM_BLOCKS: tuple[tuple[str, str, int, tuple[int, ...]], ...] = (
    (r"down_blocks_(\d+)_resnets_(\d+)_", "input_blocks_{}_0_", 1, (3, 1)),
    (r"down_blocks_(\d+)_attentions_(\d+)_", "input_blocks_{}_1_", 1, (3, 1)),
    (r"down_blocks_(\d+)_downsamplers_0_conv$", "input_blocks_{}_0_op", 3, (3,)),
    (r"mid_block_resnets_(\d+)_", "middle_block_{}_", 0, (2,)),
    (r"mid_block_attentions_(\d+)_", "middle_block_{}_", 1, (1,)),
    (r"up_blocks_(\d+)_resnets_(\d+)_", "output_blocks_{}_0_", 0, (3, 1)),
    (r"up_blocks_(\d+)_attentions_(\d+)_", "output_blocks_{}_1_", 0, (3, 1)),
    (r"up_blocks_(\d+)_upsamplers_0_conv$", "output_blocks_{}_2_conv", 2, (3,)),
)
SGM_LAYERS = {  # in residual blocks; all others have the same names
    "norm1": "in_layers_0",
    "conv1": "in_layers_2",
    "time_emb_proj": "emb_layers_1",
    "norm2": "out_layers_0",
    "conv2": "out_layers_3",
    "conv_shortcut": "skip_connection",
}

# Containers by class name: every Linear and Conv2d inside one is a target.
UNET_CONTAINERS = ("Transformer2DModel",)
UNET_CONV_CONTAINERS = ("ResnetBlock2D", "Downsample2D", "Upsample2D")
TEXT_ENCODER_CONTAINERS = ("CLIPAttention", "CLIPSdpaAttention", "CLIPMLP")

MAX_HEADER_BYTES = 100_000_000  # the package safetensors reads no file with a longer header
# What the metadata of a file keep longest if they are too long, and what they lose first: it grows with the captions.
NEEDED_METADATA = ("ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha")
TABLES_OF_TAGS = ("ss_tag_frequency", "ss_datasets")

Module = nn.Module
Layer = nn.Linear | nn.Conv2d
Weights = Mapping[str, Tensor]
TextEncoders = Module | Sequence[Module] | None
AnyArgs = TypeVar("AnyArgs", bound="LoraArgs")
AnyNetwork = TypeVar("AnyNetwork", bound="LoRANetwork")


class Shape(NamedTuple):
    """Rank and alpha of one module; rank 0 means no module."""

    rank: int
    alpha: float


class Dropouts(NamedTuple):
    """Probabilities of the three dropouts, which apply only in training mode; 0 is off."""

    neuron: float = 0.0  # of each entry of the down layer's output
    rank: float = 0.0  # of each of the R ranks, per picture; the other ranks are scaled up
    module: float = 0.0  # of the whole module, per call


class Target(NamedTuple):
    """A layer that can get a module: its name in files, the layer, the class name of its container."""

    name: str
    layer: Layer
    container: str

    @property
    def is_large_conv(self) -> bool:
        """Whether the layer is a convolution with a kernel larger than 1x1."""
        return isinstance(self.layer, nn.Conv2d) and self.layer.kernel_size != (1, 1)


PLAIN_FORWARDS = (nn.Linear.forward, nn.Conv2d.forward)  # of layers that a change can be computed together with

# Returns rank and alpha of the module for a target, or None for no module.
ShapeRule = Callable[[Target], "Shape | None"]


# --------------------------------------------------------------------------------------------------------------
# One layer
# --------------------------------------------------------------------------------------------------------------


class LoRAModule(nn.Module):
    """The low-rank change of one linear layer or convolution.

    `lora_down.weight` is (R, in) or (R, in, kh, kw), `lora_up.weight` (out, R) or (out, R, 1, 1), `alpha` 0-D.
    """

    alpha: Tensor

    def __init__(
        self, lora_name: str, layer: Layer, shape: Shape, multiplier: float = 1.0, dropouts: Dropouts | None = None
    ) -> None:
        super().__init__()
        self.lora_name = lora_name
        self.lora_dim = shape.rank
        self.multiplier = multiplier
        self.dropouts = dropouts or Dropouts()
        self.enabled = True
        # In a list, so that torch does not register the layer as a child of this module.
        self.org_module_ref = [layer]
        self.org_forward: Callable[..., Tensor] = layer.forward
        self.is_applied = False
        self.is_conv = self.is_pointwise = False
        self.lora_down: Layer
        self.lora_up: Layer
        # What the change is computed with in place of the parameters (`LoRANetwork.compute_with`).
        self._computed: tuple[Tensor, Tensor] | None = None
        self._factors_made: tuple[tuple[int, int], Factors] | None = None  # of these copies, for (held, used) ranks
        self._num_held, self._num_used = 0, shape.rank
        if isinstance(layer, nn.Conv2d):
            geometry: dict[str, Any] = {
                key: getattr(layer, key) for key in ("kernel_size", "stride", "padding", "dilation")
            }
            self.is_conv = True
            is_plain = layer.padding == (0, 0) and layer.groups == 1
            self.is_pointwise = is_plain and layer.kernel_size == layer.stride == (1, 1)
            self.lora_down = nn.Conv2d(layer.in_channels, shape.rank, **geometry, bias=False)
            self.lora_up = nn.Conv2d(shape.rank, layer.out_channels, 1, bias=False)
        else:
            # Not from weight.shape: a quantised layer packs its weight.
            self.lora_down = nn.Linear(layer.in_features, shape.rank, bias=False)
            self.lora_up = nn.Linear(shape.rank, layer.out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_up.weight)
        self.register_buffer("alpha", torch.tensor(float(shape.alpha or shape.rank)))
        self._update_scale()

    def _update_scale(self) -> None:
        # Python numbers: reading alpha in each call waits for the GPU, and on the meta device it cannot be read.
        self.alpha_value = float(self.alpha)
        self.scale = self.alpha_value / self.lora_dim

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._update_scale()

    @property
    def org_module(self) -> Layer:
        """The layer that this module changes."""
        return self.org_module_ref[0]

    def use_ranks(self, num_used: int, num_held: int = 0) -> None:
        """Use only the first ranks, with the factor alpha / num_used; the first num_held of them get no gradient."""
        self._num_used, self._num_held = num_used, num_held

    def compute_with(self, down: Tensor, up: Tensor) -> None:
        """Compute with copies of the two weights, leaves whose gradients are added to the `grad` that they have."""
        self._computed = down, up
        self._factors_made = None

    # ---- attach, detach -------------------------------------------------------------------------------------

    def apply_to(self) -> None:
        """Replace the layer's forward by this module's; networks applied later wrap this one."""
        if self.is_applied:
            raise ValueError(f"{self.lora_name} is applied already")
        self.org_forward, self.is_applied = self.org_module.forward, True
        self.org_module.__dict__["forward"] = self.forward  # hides that of the class

    def remove(self) -> None:
        """Undo apply_to, whether or not other networks were applied since."""
        if not self.is_applied:
            return
        layer = self.org_module
        outer = owner(layer.forward)
        if outer is not self:
            while owner(outer.org_forward) is not self:
                outer = owner(outer.org_forward)
            outer.org_forward = self.org_forward
        elif owner(self.org_forward) is layer:
            del layer.__dict__["forward"]  # uncovers the forward of the class
        else:
            layer.__dict__["forward"] = self.org_forward
        self.is_applied = False

    # ---- forward --------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output plus the change; older diffusers pass further arguments to the layer."""
        scale = self.multiplier * self.alpha_value / self._num_used
        if scale == 0 or not self.enabled:
            return self.org_forward(x, *args, **kwargs)
        has_dropouts = self.training and any(self.dropouts)
        if not (args or kwargs or has_dropouts) and self._can_fuse(x):
            return self._fused(x, scale)
        base = self.org_forward(x, *args, **kwargs)
        if has_dropouts:
            return self._forward_with_dropouts(base, x, scale)
        down, up = self._factors(x.dtype)
        return self._add(base, self._down(x, down), up, scale)

    def _can_fuse(self, x: Tensor) -> bool:
        """Return whether layer and change can be computed as one: a plain frozen layer in the type of its input."""
        layer = self.org_module
        weight, down = layer.weight, self.lora_down.weight if self._computed is None else self._computed[0]
        return (
            (self.is_pointwise or not self.is_conv)
            and owner(self.org_forward) is layer
            and type(layer).forward in PLAIN_FORWARDS
            and x.dtype == weight.dtype == down.dtype
            and not weight.requires_grad
            and not torch.is_autocast_enabled(x.device.type)  # which may cast any operand
            and not torch.compiler.is_compiling()  # a compiler fuses the plain formula as it likes
        )

    def _fused(self, x: Tensor, scale: float) -> Tensor:
        ranks = self._num_held, self._num_used
        factors = self._factors_in_place(ranks)
        down = up = None
        if factors is None:
            down, up = self.lora_down.weight, self.lora_up.weight
        elif not x.requires_grad:  # then the weight ties the result to the graph
            down = self.lora_down.weight
        rest = (down, up, self.org_module, factors, ranks, scale)
        if not self.is_conv:
            return _Linear.apply(x, *rest)
        if x.is_contiguous():
            return _Pointwise.apply(x, *rest)
        return _Linear.apply(x.permute(0, 2, 3, 1), *rest).permute(0, 3, 1, 2)  # channels last, as most likely

    def _factors_in_place(self, ranks: tuple[int, int]) -> Factors | None:
        """Return the factors whose gradients are added in place, where there are any."""
        if self._computed is None:
            return None
        made = self._factors_made
        if made is None or made[0] != ranks:  # views are kept, because making them takes as long as a small product
            down, up = self._computed
            assert down.grad is not None and up.grad is not None  # see compute_with
            made = self._factors_made = ranks, factors_of(down, up, down.grad, up.grad, ranks)
        return made[1]

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return D (R, ...) and U (out, R, ...) of the ranks in use, in a type; held ranks are constants."""
        down, up = self._computed or (self.lora_down.weight, self.lora_up.weight)
        down, up = down[: self._num_used].to(dtype), up[:, : self._num_used].to(dtype)
        held = self._num_held
        if held:
            down = torch.cat([down[:held].detach(), down[held:]])
            up = torch.cat([up[:, :held].detach(), up[:, held:]], dim=1)
        return down, up

    def _down(self, x: Tensor, down: Tensor) -> Tensor:
        """Return D x: (..., in) -> (..., R), or (B, in, H, W) -> (B, R, H', W')."""
        if self.is_pointwise:
            return torch.bmm(down.flatten(1).expand(len(x), -1, -1), x.flatten(2)).unflatten(2, x.shape[2:])
        if isinstance(self.lora_down, nn.Conv2d):
            return self.lora_down._conv_forward(x, down, None)
        return F.linear(x, down)

    def _add(self, base: Tensor, hidden: Tensor, up: Tensor, scale: float) -> Tensor:
        """Return base + scale * U hidden as one fused multiply-add; the result is contiguous."""
        if self.is_conv:
            matrix = up.flatten(1).expand(len(base), -1, -1)
            return torch.baddbmm(base.flatten(2), matrix, hidden.flatten(2), alpha=scale).view(base.shape)
        return torch.addmm(base.flatten(0, -2), hidden.flatten(0, -2), up.t(), alpha=scale).view(base.shape)

    def _forward_with_dropouts(self, base: Tensor, x: Tensor, scale: float) -> Tensor:
        neuron, rank, module = self.dropouts
        if module and torch.rand(()) < module:
            return base
        down, up = self._factors(x.dtype)
        hidden = self._down(x, down)
        if neuron:
            hidden = F.dropout(hidden, neuron)
        if rank:
            axis = 1 if self.is_conv else hidden.ndim - 1
            mask_shape = [1] * hidden.ndim
            mask_shape[0], mask_shape[axis] = hidden.shape[0], self.lora_dim
            mask = torch.rand(hidden.shape[0], self.lora_dim, device=hidden.device) > rank
            hidden = hidden * mask.view(mask_shape)
            scale = scale / (1 - rank)
        return self._add(base, hidden, up, scale)

    # ---- the change as a matrix -----------------------------------------------------------------------------

    def delta_weight(self) -> Tensor:
        """Return multiplier * alpha / R * U D, float32, in the shape of the layer's weight."""
        down, up = self.lora_down.weight.float().flatten(1), self.lora_up.weight.float().flatten(1)
        delta = (up @ down) * (self.multiplier * self.scale)
        return delta.unflatten(1, self.lora_down.weight.shape[1:])

    def delta_norm(self) -> Tensor:
        """Return the Frobenius norm of alpha / R * U D (0-D), from R x R products only."""
        down, up = self.lora_down.weight.float().flatten(1), self.lora_up.weight.float().flatten(1)
        return ((up.T @ up) * (down @ down.T)).sum().clamp_min(0).sqrt() * abs(self.scale)

    @torch.no_grad()
    def merge_to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> None:
        """Add the change to the layer's weight: summed in float32, then in dtype (None: the weight's own)."""
        layer = self.org_module
        if not layer.weight.dtype.is_floating_point or layer.weight.element_size() < 2:
            raise ValueError(f"{self.lora_name}: a quantised weight ({layer.weight.dtype}) cannot be merged into")
        device = device or layer.weight.device
        merged = layer.weight.to(device, torch.float32) + self.delta_weight().to(device)
        layer.weight.data = merged.to(layer.weight.device, dtype or layer.weight.dtype)


def owner(forward: Callable[..., Tensor]) -> Any:
    """Return the object of a bound method, None for a function."""
    return getattr(forward, "__self__", None)


# --------------------------------------------------------------------------------------------------------------
# A layer and its change as one operation
# --------------------------------------------------------------------------------------------------------------
#
# Autograd would keep and add up each product by itself. Here the output is written once, the gradient of the input has
# no second copy, and gradients of the factors are added in place where they belong. A step launches about half as many
# operations. `LoRAModule._add` has the plain formula.


class Factors(NamedTuple):
    """D and U of the ranks in use, as matrices; and what the gradients of the ranks that are not held are added to."""

    down: Tensor  # (R, in)
    up: Tensor  # (out, R)
    held: int
    of_down: Tensor  # (R - held, in)
    of_up: Tensor  # (out, R - held)


def factors_of(down: Tensor, up: Tensor, of_down: Tensor, of_up: Tensor, ranks: tuple[int, int]) -> Factors:
    """Return views of two weights and their gradients; ranks: (held, used), how many get no gradient, and are used."""
    held, used = ranks
    down, up, of_down, of_up = (tensor.detach().flatten(1) for tensor in (down, up, of_down, of_up))
    return Factors(down[:used], up[:, :used], held, of_down[held:used], of_up[:, held:used])


class _Linear(torch.autograd.Function):
    """x W^T + b + s x D^T U^T for x (..., in), in N rows, and W (out, in), or that of a 1x1 convolution.

    Gradients are added to what factors say. Without factors they are returned for down and up, the two weights.
    Otherwise these only tie the result to the graph, where x does not.
    """

    @staticmethod
    def forward(
        context: Any,
        x: Tensor,
        down: Tensor | None,
        up: Tensor | None,
        layer: Layer,
        factors: Factors | None,
        ranks: tuple[int, int],
        scale: float,
    ) -> Tensor:
        context.given = down, up, layer, factors, ranks, scale
        used = factors or _detached(down, up, ranks)
        rows, weight = x.reshape(-1, x.shape[-1]), _matrix(layer)
        hidden = torch.mm(rows, used.down.t())
        output = x.new_empty(*x.shape[:-1], len(weight))  # no view, which could not be changed in place later
        product = output.view(-1, len(weight))
        if layer.bias is None:
            torch.mm(rows, weight.t(), out=product)
        else:
            torch.addmm(layer.bias, rows, weight.t(), out=product)
        product.addmm_(hidden, used.up.t(), alpha=scale)
        context.save_for_backward(x, hidden)
        return output

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Any, ...]:
        down, up, layer, factors, ranks, scale = context.given
        x, hidden = context.saved_tensors
        of_down = of_up = of_x = None
        if factors is None:
            of_down, of_up = torch.zeros_like(down), torch.zeros_like(up)
            factors = factors_of(down, up, of_down, of_up, ranks)
        rows = gradient.reshape(-1, gradient.shape[-1])
        of_hidden = of_trained = torch.mm(rows, factors.up)  # (N, R), without s
        if factors.held:
            of_trained, hidden = of_hidden[:, factors.held :], hidden[:, factors.held :]
        factors.of_down.addmm_(of_trained.t(), x.reshape(-1, x.shape[-1]), alpha=scale)
        factors.of_up.addmm_(rows.t(), hidden, alpha=scale)
        if context.needs_input_grad[0]:
            of_x = torch.mm(rows, _matrix(layer)).addmm_(of_hidden, factors.down, alpha=scale).view(x.shape)
        return of_x, of_down, of_up, None, None, None, None


def _matrix(layer: Layer) -> Tensor:
    weight = layer.weight
    return weight if weight.ndim == 2 else weight.flatten(1)


class _Pointwise(torch.autograd.Function):
    """The same for a 1x1 convolution of x (B, in, H, W), without a change of the layout."""

    @staticmethod
    def forward(
        context: Any,
        x: Tensor,
        down: Tensor | None,
        up: Tensor | None,
        layer: Layer,
        factors: Factors | None,
        ranks: tuple[int, int],
        scale: float,
    ) -> Tensor:
        context.given = down, up, layer, factors, ranks, scale
        used = factors or _detached(down, up, ranks)
        hidden = torch.bmm(_each(used.down, x), x.flatten(2))  # (B, R, H W)
        output = F.conv2d(x, layer.weight, layer.bias).contiguous()
        output.flatten(2).baddbmm_(_each(used.up, x), hidden, alpha=scale)
        context.save_for_backward(x, hidden)
        return output

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Any, ...]:
        down, up, layer, factors, ranks, scale = context.given
        x, hidden = context.saved_tensors
        of_down = of_up = of_x = None
        if factors is None:
            of_down, of_up = torch.zeros_like(down), torch.zeros_like(up)
            factors = factors_of(down, up, of_down, of_up, ranks)
        pixels = gradient.flatten(2)  # (B, out, H W)
        of_hidden = torch.bmm(_each(factors.up.t(), x), pixels)  # (B, R, H W), without s
        held = factors.held
        for one, of_output, of_one, its_hidden in zip(x.flatten(2), pixels, of_hidden, hidden, strict=True):
            factors.of_down.addmm_(of_one[held:], one.t(), alpha=scale)
            factors.of_up.addmm_(of_output, its_hidden[held:].t(), alpha=scale)
        if context.needs_input_grad[0]:
            of_x = torch.bmm(_each(layer.weight.flatten(1).t(), x), pixels)
            of_x = of_x.baddbmm_(_each(factors.down.t(), x), of_hidden, alpha=scale).view(x.shape)
        return of_x, of_down, of_up, None, None, None, None


def _detached(down: Tensor | None, up: Tensor | None, ranks: tuple[int, int]) -> Factors:
    """Return the factors for a forward pass, where there are none with gradients."""
    assert down is not None and up is not None  # see _Linear
    return factors_of(down, up, down, up, ranks)


def _each(matrix: Tensor, x: Tensor) -> Tensor:
    """Return a matrix for each of the B pictures of x, (B, rows, columns), without a copy."""
    return matrix.expand(len(x), -1, -1)


# --------------------------------------------------------------------------------------------------------------
# Targets and their names
# --------------------------------------------------------------------------------------------------------------


def find_targets(model: Module, prefix: str, containers: Sequence[str]) -> Iterator[Target]:
    """Yield each Linear and Conv2d inside a container of a model."""
    for path, module in model.named_modules():
        container = next((base.__name__ for base in type(module).__mro__ if base.__name__ in containers), None)
        if container is None:
            continue
        for inner, layer in module.named_modules(prefix=path):
            if isinstance(layer, nn.Linear | nn.Conv2d):
                yield Target(f"{prefix}.{inner}".replace(".", "_"), layer, container)


def has_sgm_names(unet: Module) -> bool:
    """Return whether modules over a U-Net are named by the checkpoint: SDXL's, which alone embeds sizes."""
    return hasattr(unet, "add_embedding")


def sgm_name(module: str) -> str:
    """Return the name of a module over SDXL's U-Net by the checkpoint; of other modules the same name."""
    path = module.removeprefix(f"{PREFIX_UNET}_")
    for pattern, start, first, steps in SGM_BLOCKS if path != module else ():
        if match := re.match(pattern, path):
            number = first + sum(int(text) * step for text, step in zip(match.groups(), steps, strict=True))
            layer = path[match.end() :]
            return f"{PREFIX_UNET}_{start.format(number)}{SGM_LAYERS.get(layer, layer)}"
    return module


def unet_targets(unet: Module) -> Iterator[Target]:
    """Yield the targets of a U-Net under their names in files."""
    renamed = sgm_name if has_sgm_names(unet) else str
    for target in find_targets(unet, PREFIX_UNET, UNET_CONTAINERS + UNET_CONV_CONTAINERS):
        yield target._replace(name=renamed(target.name))


def text_encoder_targets(text_encoder: Module, prefix: str) -> Iterator[Target]:
    """Yield the targets of a CLIP text encoder under their canonical names.

    Names in files contain `text_model`; since transformers 5.6 CLIPTextModel has no such level.
    """
    if not hasattr(text_encoder, "text_model"):
        prefix = f"{prefix}.text_model"
    yield from find_targets(text_encoder, prefix, TEXT_ENCODER_CONTAINERS)


# --------------------------------------------------------------------------------------------------------------
# Ranks, alphas and learning rates
# --------------------------------------------------------------------------------------------------------------


class RateGroup(NamedTuple):
    """Modules of the U-Net with one learning rate: weight times that of the U-Net."""

    name: str
    modules: Sequence[LoRAModule]
    weight: float = 1.0


class Blocks:
    """Ranks, alphas and learning rates over the blocks of a U-Net: here the same in all.

    The subclass in networks/block_weights.py has different ones.
    """

    def for_unet(self, *, is_sgm: bool) -> Blocks:
        """Return the same for SDXL's blocks or for those of others; raises ValueError for numbers that do not fit."""
        del is_sgm
        return self

    def rule(self, linear: Shape, conv: Shape) -> ShapeRule:
        """Return the rule for all targets; conv is the shape for 3x3 convolutions, whose rank may be 0."""

        def rule(target: Target) -> Shape | None:
            if target.is_large_conv:
                return conv
            return linear if conv.rank or target.container not in UNET_CONV_CONTAINERS else None

        return rule

    def groups(self, modules: Sequence[LoRAModule]) -> list[RateGroup]:
        """Return the modules of the U-Net by their learning rate."""
        return [RateGroup("unet", modules)]

    def check_from_file(self) -> None:
        """Raise ValueError if ranks or alphas are given, because a network from a file has those of the file."""


def reading(kind: type[int] | type[float], form: str, least: float, below: float = math.inf) -> dict[str, Any]:
    """Return how an argument is read, as metadata of its field: a number from least to below, and that in words."""

    def read(text: Any) -> int | float:
        number = kind(text)
        if not least <= number < below:
            raise ValueError
        return number

    return {"read": read, "form": form}


POSITIVE = reading(int, "a whole number of at least 1", 1)
FINITE = reading(float, "a finite number of at least 0", 0)
PROBABILITY = reading(float, "a number of at least 0 and below 1", 0, 1)
SWITCHES = {"true": True, "1": True, "false": False, "0": False}
SWITCH = {"read": lambda text: SWITCHES[str(text).lower()], "form": "True or False"}
UNUSED = {"read": lambda text: None if text in (None, "None") else float(text), "form": "a number"}


@dataclasses.dataclass(frozen=True)
class LoraArgs:
    """The arguments of `--network_args key=value`."""

    conv_dim: int | None = dataclasses.field(default=None, metadata=POSITIVE)  # of 3x3 convolutions; None: no modules
    conv_alpha: float = dataclasses.field(default=1.0, metadata=FINITE)
    rank_dropout: float = dataclasses.field(default=0.0, metadata=PROBABILITY)
    module_dropout: float = dataclasses.field(default=0.0, metadata=PROBABILITY)
    loraplus_lr_ratio: float | None = dataclasses.field(default=None, metadata=FINITE)
    loraplus_unet_lr_ratio: float | None = dataclasses.field(default=None, metadata=FINITE)
    loraplus_text_encoder_lr_ratio: float | None = dataclasses.field(default=None, metadata=FINITE)
    # Files have one alpha for all modules, as diffusers reads them; the network keeps its own.
    one_alpha: bool = dataclasses.field(default=False, metadata=SWITCH)
    dropout: float | None = dataclasses.field(default=None, metadata=UNUSED)  # for other modules' --network_dropout
    blocks: Blocks = dataclasses.field(default_factory=Blocks)

    def for_unet(self: AnyArgs, *, is_sgm: bool) -> AnyArgs:
        """Return the same for SDXL's U-Net or for others; raises ValueError for numbers by block that do not fit."""
        return dataclasses.replace(self, blocks=self.blocks.for_unet(is_sgm=is_sgm))


def read_network_args(given: Mapping[str, Any], kind: type[AnyArgs]) -> AnyArgs:
    """Return the network_args as values of a kind; raises ValueError for an unknown key or a bad value."""
    known = {field.name: field.metadata for field in dataclasses.fields(kind) if field.metadata}
    values: dict[str, Any] = {}
    for key in (key for key in known if key in given):
        try:
            values[key] = known[key]["read"](given[key])
        except (ValueError, KeyError):
            raise ValueError(f"network_args: {key} must be {known[key]['form']}, got {given[key]!r}") from None
    others = {key: given[key] for key in given if key not in known}
    if others:
        values["blocks"] = read_blocks(others, values.get("conv_dim"), list(known))
    return kind(**values)


def read_blocks(given: Mapping[str, Any], conv_dim: int | None, known: Sequence[str]) -> Blocks:
    """Return the arguments by block as values; raises ValueError for others, and if this file is used alone."""
    try:
        from networks.block_weights import ARGUMENTS, read_plan
    except ImportError as error:
        raise ValueError(f"network_args: {', '.join(given)}: not known without networks/block_weights.py") from error
    for key in given:
        if key not in ARGUMENTS:
            near = difflib.get_close_matches(key, [*known, *ARGUMENTS], n=1)
            raise ValueError(f"network_args: {key} is not known{f'; did you mean {near[0]}?' if near else ''}")
    return read_plan(given, conv_dim) or Blocks()


# --------------------------------------------------------------------------------------------------------------
# The network
# --------------------------------------------------------------------------------------------------------------


class LoRANetwork(nn.Module):
    """All LoRA modules of one set of models; its state dict is the content of a file."""

    module_class: type[LoRAModule] = LoRAModule

    def __init__(
        self,
        text_encoder: TextEncoders,
        unet: Module,
        rule: ShapeRule,
        args: LoraArgs,
        *,
        multiplier: float = 1.0,
        neuron_dropout: float | None = None,
    ) -> None:
        super().__init__()
        self.multiplier = multiplier
        self.blocks, self.one_alpha = args.blocks, args.one_alpha
        self._has_sgm_names = has_sgm_names(unet)
        self.set_loraplus_lr_ratio(
            args.loraplus_lr_ratio, args.loraplus_unet_lr_ratio, args.loraplus_text_encoder_lr_ratio
        )
        dropouts = Dropouts(neuron_dropout or 0.0, args.rank_dropout, args.module_dropout)
        encoders = [text_encoder] if isinstance(text_encoder, Module) else list(text_encoder or [])
        numbered = [f"{PREFIX_TEXT_ENCODER}{number}" for number in range(1, len(encoders) + 1)]
        prefixes = [PREFIX_TEXT_ENCODER] if len(encoders) == 1 else numbered

        def build(targets: Iterable[Target]) -> list[LoRAModule]:
            shaped = ((target, rule(target)) for target in targets)
            return [
                self.module_class(target.name, target.layer, shape, multiplier, dropouts)
                for target, shape in shaped
                if shape is not None and shape.rank
            ]

        self._text_encoder_parts = [
            build(text_encoder_targets(encoder, prefix)) for encoder, prefix in zip(encoders, prefixes, strict=True)
        ]
        self.unet_loras = build(unet_targets(unet))
        for module in self.modules_in_order():
            self.add_module(module.lora_name, module)

    # ---- from arguments or a file ---------------------------------------------------------------------------

    @classmethod
    def read_args(cls, network_args: Mapping[str, Any], shapes: Iterable[Shape]) -> LoraArgs:
        """Return the network_args as values; raises ValueError for any that are unknown, bad, or do not fit the shapes.

        shapes are those of the network's linear layers, as far as they are known.
        """
        del shapes
        return read_network_args(network_args, LoraArgs)

    @classmethod
    def check_network_args(
        cls,
        network_dim: int | None,
        network_args: Mapping[str, Any],
        *,
        from_file: bool = False,
        is_sgm: bool | None = None,
    ) -> None:
        """Raise ValueError for network_args that create_network would refuse; a file's ranks are not known yet.

        is_sgm says whether they are for SDXL's U-Net, None that it is not known.
        """
        args = cls.read_args(network_args, [] if from_file else [Shape(network_dim or DEFAULT_RANK, 1.0)])
        if is_sgm is not None:
            args.for_unet(is_sgm=is_sgm)

    @classmethod
    def create_network(
        cls: type[AnyNetwork],
        multiplier: float,
        network_dim: int | None,
        network_alpha: float | None,
        vae: Any,
        text_encoder: TextEncoders,
        unet: Module,
        neuron_dropout: float | None = None,
        **network_args: Any,
    ) -> AnyNetwork:
        """Return a new network: LoRA-LierLa, or with conv_dim in network_args LoRA-C3Lier.

        network_args are the texts of `--network_args key=value`. Raises ValueError for unknown or bad ones.
        """
        del vae
        linear = Shape(network_dim or DEFAULT_RANK, 1.0 if network_alpha is None else network_alpha)
        args = cls.read_args(network_args, [linear]).for_unet(is_sgm=has_sgm_names(unet))
        rule = args.blocks.rule(linear, Shape(args.conv_dim or 0, args.conv_alpha))
        return cls(text_encoder, unet, rule, args, multiplier=multiplier, neuron_dropout=neuron_dropout)

    @classmethod
    def create_network_from_weights(
        cls: type[AnyNetwork],
        multiplier: float,
        file: str | Path | None,
        vae: Any,
        text_encoder: TextEncoders,
        unet: Module,
        weights_sd: Weights | None = None,
        for_inference: bool = False,
        neuron_dropout: float | None = None,
        **network_args: Any,
    ) -> tuple[AnyNetwork, Weights]:
        """Return (network, weights): a network with the modules, ranks and alphas of a file, values not yet loaded.

        The file is read only if weights_sd is None. Raises ValueError if nothing in it matches the models; the number
        of modules that do not match is logged.
        """
        del vae, for_inference
        weights = read_weights(Path(file or "")) if weights_sd is None else weights_sd
        num_encoders = 1 if isinstance(text_encoder, Module) else len(text_encoder or ())
        weights = with_own_names(weights, num_encoders, is_sgm=has_sgm_names(unet))
        shapes = shapes_in(weights)
        args = cls.read_args(network_args, shapes.values()).for_unet(is_sgm=has_sgm_names(unet))
        args.blocks.check_from_file()

        def rule(target: Target) -> Shape | None:
            return shapes.get(target.name)

        network = cls(text_encoder, unet, rule, args, multiplier=multiplier, neuron_dropout=neuron_dropout)
        matched = {module.lora_name for module in network.modules_in_order()}
        unmatched = {name.split(".")[0] for name in weights} - matched
        source = file or "the weights"
        example = _example(unmatched or {"-"})
        if not matched:
            raise ValueError(
                f"{source}: none of the {len(unmatched)} modules is in these models{example}{advice(weights)}"
            )
        if unmatched:
            logger.warning("%s: %d modules used, %d left out%s", source, len(matched), len(unmatched), example)
        return network, weights

    # ---- modules --------------------------------------------------------------------------------------------

    @property
    def text_encoder_loras(self) -> list[LoRAModule]:
        """Modules of the text encoders."""
        return [module for part in self._text_encoder_parts for module in part]

    def modules_in_order(self) -> list[LoRAModule]:
        """Return all modules, text encoders first."""
        return self.text_encoder_loras + self.unet_loras

    # ---- attach, detach, merge ------------------------------------------------------------------------------

    def apply_to(
        self,
        text_encoder: TextEncoders,
        unet: Module,
        apply_text_encoder: bool = True,
        apply_unet: bool = True,
    ) -> None:
        """Attach to the models that the network was created for; modules of a part that is not applied are dropped."""
        del text_encoder, unet  # part of the interface; the modules know their layers
        if not apply_text_encoder:
            self._drop(self.text_encoder_loras)
            self._text_encoder_parts = []
        if not apply_unet:
            self._drop(self.unet_loras)
            self.unet_loras = []
        for module in self.modules_in_order():
            module.apply_to()

    def _drop(self, modules: Iterable[LoRAModule]) -> None:
        for module in modules:
            delattr(self, module.lora_name)

    def remove(self) -> None:
        """Detach from the models, which are then bit for bit as before apply_to."""
        for module in self.modules_in_order():
            module.remove()

    def merge_to(
        self,
        text_encoder: TextEncoders,
        unet: Module,
        weights_sd: Weights | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Load weights_sd, if given, and add the changes to the models' weights; the network must not be applied."""
        del text_encoder, unet
        if weights_sd is not None:
            self.load_state_dict(weights_sd, strict=False)
        for module in self.modules_in_order():
            module.merge_to(dtype, device)

    def set_multiplier(self, multiplier: float) -> None:
        """Set the strength of the whole network."""
        self.multiplier = multiplier
        for module in self.modules_in_order():
            module.multiplier = multiplier

    def set_enabled(self, is_enabled: bool) -> None:
        """Switch the network on or off without detaching it."""
        for module in self.modules_in_order():
            module.enabled = is_enabled

    def is_mergeable(self) -> bool:
        """Return whether the network has merge_to; pipelines ask for it."""
        return True

    # ---- training -------------------------------------------------------------------------------------------

    def prepare_optimizer_params(
        self, text_encoder_lr: float | None, unet_lr: float | None, default_lr: float | None = None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Return (parameter groups, their names); a part whose learning rate is 0 has no group."""
        rates = None if text_encoder_lr is None else [text_encoder_lr]
        return self.prepare_optimizer_params_with_multiple_te_lrs(rates, unet_lr, default_lr)

    def prepare_optimizer_params_with_multiple_te_lrs(
        self, text_encoder_lrs: Sequence[float] | None, unet_lr: float | None, default_lr: float | None = None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Return the same with one learning rate for each text encoder; the last one is used for further encoders."""
        rates: Sequence[float | None] = text_encoder_lrs or [default_lr]
        parts = self._text_encoder_parts
        named: list[tuple[str, Sequence[LoRAModule], float | None]]
        named = [("textencoder", self.text_encoder_loras, rates[0])]
        if len(rates) > 1 and len(parts) > 1:
            last = len(rates) - 1
            named = [(f"textencoder {index + 1}", part, rates[min(index, last)]) for index, part in enumerate(parts)]
        unet_rate = unet_lr if unet_lr is not None else default_lr
        if unet_rate is None:
            named.append(("unet", self.unet_loras, None))
        else:
            by_rate = self.blocks.groups(self.unet_loras)
            named += [(group.name, group.modules, unet_rate * group.weight) for group in by_rate]
        groups: list[dict[str, Any]] = []
        names: list[str] = []
        for name, modules, rate in named:
            if not modules or rate == 0:
                continue
            ratio = self._unet_ratio if name.startswith("unet") else self._text_encoder_ratio
            downs = [module.lora_down.weight for module in modules]
            ups = [module.lora_up.weight for module in modules]
            if ratio is None or rate is None:
                split = [(name, [weight for pair in zip(downs, ups, strict=True) for weight in pair], rate)]
            else:
                split = [(name, downs, rate), (f"{name} plus", ups, rate * ratio)]
            for group_name, parameters, group_rate in split:
                groups.append({"params": parameters} | ({} if group_rate is None else {"lr": group_rate}))
                names.append(group_name)
        return groups, names

    def set_loraplus_lr_ratio(self, common: float | None, unet: float | None, text_encoder: float | None) -> None:
        """Multiply the learning rate of the up matrices by a ratio (LoRA+, arXiv 2402.12354); None or 0 is off."""
        self._unet_ratio = unet or common or None
        self._text_encoder_ratio = text_encoder or common or None

    def enable_gradient_checkpointing(self) -> None:
        """Do nothing: a change is recomputed together with its layer."""

    def compute_with(self, copies: Mapping[Tensor, Tensor]) -> None:
        """Compute with copies of the parameters, in the type of the models; gradients are added to those of the copies.

        Without it, and for parameters without a copy, weights are cast in each call.
        """
        for module in self.modules_in_order():
            down, up = copies.get(module.lora_down.weight), copies.get(module.lora_up.weight)
            if down is not None and up is not None:
                module.compute_with(down, up)

    def prepare_grad_etc(self, text_encoder: Any, unet: Any) -> None:
        """Make all parameters trainable."""
        del text_encoder, unet
        self.requires_grad_(True)

    def on_epoch_start(self, text_encoder: Any, unet: Any) -> None:
        """Switch to training mode, which has dropouts."""
        del text_encoder, unet
        self.train()

    def get_trainable_params(self) -> Iterator[nn.Parameter]:
        """Return the parameters whose gradients are clipped."""
        return self.parameters()

    @torch.no_grad()
    def apply_max_norm_regularization(self, max_norm: float, device: Any = None) -> tuple[int, float, float]:
        """Scale down each change whose norm exceeds max_norm; return (number scaled, mean norm, largest norm).

        Both factors are scaled by the same root, as in sd-scripts. The device is synchronised once.
        """
        del device
        modules = self.modules_in_order()
        norms = self.delta_norms()
        ratios = torch.where(norms > max_norm, max_norm / norms, 1.0)
        for module, ratio in zip(modules, ratios.sqrt(), strict=True):
            module.lora_up.weight.mul_(ratio)
            module.lora_down.weight.mul_(ratio)
        scaled = norms * ratios
        count, mean, largest = torch.stack([(ratios < 1).sum().float(), scaled.mean(), scaled.max()]).tolist()
        return int(count), mean, largest

    def describe_unet(self) -> list[tuple[str, int, float]]:
        """Return name, rank and weight of the learning rate of each module of the U-Net."""
        groups = self.blocks.groups(self.unet_loras)
        return [(module.lora_name, module.lora_dim, group.weight) for group in groups for module in group.modules]

    @torch.no_grad()
    def delta_norms(self) -> Tensor:
        """Return the Frobenius norm of each module's change without the multiplier, (modules,)."""
        return torch.stack([module.delta_norm() for module in self.modules_in_order()])

    # ---- files ----------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: Weights, strict: bool = True, assign: bool = False) -> Any:
        """Load the tensors of a file; missing alphas are filled in, linear and 1x1 weights fit each other's layers.

        Raises ValueError for a tensor of another size.
        """
        return super().load_state_dict(self._fitted(state_dict), strict, assign)

    def _fitted(self, weights: Weights) -> dict[str, Tensor]:
        fitted = dict(weights)
        for name, own in self.state_dict().items():
            given = fitted.get(name)
            if given is None and name.endswith(".alpha") and f"{name[:-6]}.lora_down.weight" in fitted:
                fitted[name] = torch.tensor(float(fitted[f"{name[:-6]}.lora_down.weight"].shape[0]))
            elif given is not None and given.numel() != own.numel():
                raise ValueError(
                    f"{name} has the shape {tuple(given.shape)}, this network needs {tuple(own.shape)}: "
                    "the file is for another model or has other ranks"
                )
            elif given is not None and given.shape != own.shape:
                fitted[name] = given.reshape(own.shape)
        return fitted

    def load_weights(self, file: str | Path) -> str:
        """Load a file; return and raise as `load_tensors` does."""
        return self.load_tensors(read_weights(Path(file)), str(file))

    def load_tensors(self, weights: Weights, file: str) -> str:
        """Load the tensors of a file; return in words how many modules were loaded and which have no counterpart.

        Alphas become those of the file; with one_alpha those of the network stay, and up matrices are scaled to match.
        Raises ValueError if nothing matches, or ranks differ; file is its name in the message.
        """
        weights = with_own_names(weights, len(self._text_encoder_parts), is_sgm=self._has_sgm_names)
        own, given = {name.split(".")[0] for name in self.state_dict()}, {name.split(".")[0] for name in weights}
        if not own & given:
            raise ValueError(
                f"{file}: none of its {len(given)} modules belongs to this network{_example(given)}{advice(weights)}"
            )
        for module in self.modules_in_order():
            down = weights.get(f"{module.lora_name}.lora_down.weight")
            if down is not None and down.shape[0] != module.lora_dim:
                raise ValueError(
                    f"{file}: {module.lora_name} has rank {down.shape[0]}, this network {module.lora_dim}: "
                    "give the same dimensions, or take them from the file (--dim_from_weights)"
                )
        self.load_state_dict(rescaled(weights, self.alphas()) if self.one_alpha else weights, strict=False)
        notes = [f"{len(own & given)} modules loaded"]
        if given - own:
            notes.append(f"{len(given - own)} modules of the file left out{_example(given - own)}")
        if own - given:
            notes.append(f"{len(own - given)} modules of the network start fresh{_example(own - given)}")
        return "; ".join(notes)

    def save_weights(self, file: str | Path, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """Write the network to file in dtype (None: unchanged); a .safetensors file also gets the metadata."""
        own = self.state_dict()
        written = rescaled(own, self.file_alphas()) if self.one_alpha else own
        weights = {name: cast_for_file(name, tensor, dtype or own[name].dtype) for name, tensor in written.items()}
        write_weights(Path(file), weights, metadata)

    def alphas(self) -> dict[str, float]:
        """Return module -> alpha."""
        return {module.lora_name: module.alpha_value for module in self.modules_in_order()}

    def file_alphas(self) -> dict[str, float]:
        """Return module -> alpha in the files of this network: with one_alpha the largest for all.

        The largest, so that up matrices only become smaller and half precision does not overflow.
        """
        alphas = self.alphas()
        return dict.fromkeys(alphas, max(alphas.values(), key=abs)) if self.one_alpha and alphas else alphas


def _example(names: Iterable[str]) -> str:
    return f" (such as {min(names)})"


# --------------------------------------------------------------------------------------------------------------
# Entry points that trainers and pipelines call by name
# --------------------------------------------------------------------------------------------------------------

create_network = LoRANetwork.create_network
create_network_from_weights = LoRANetwork.create_network_from_weights
check_network_args = LoRANetwork.check_network_args


# --------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------


def read_weights(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file in the format safetensors, or of a pickle, of which nothing but tensors is loaded.

    The content shows the format, since files are renamed. Raises ValueError for a pickle with anything else in it, for
    what is no weight file, and for weights in 8 bits with a scale beside them.
    """
    with file.open("rb") as source:
        length, start = int.from_bytes(source.read(8), "little"), source.read(1)
        if start != b"{":
            source.seek(0)
            try:
                found = torch.load(source, map_location="cpu", weights_only=True)
                return found.get("state_dict", found)
            except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError):
                raise ValueError(f"{file} is no weight file, or holds more than tensors: convert it") from None
        if length <= MAX_HEADER_BYTES:
            weights = load_file(file)
        else:  # written by an older version: without its metadata the package reads it, too
            source.seek(8)
            tensors = json.loads(source.read(length))
            tensors.pop("__metadata__", None)
            weights = load(file_header(tensors, {}) + source.read())
    scaled = next((name for name in weights if name.endswith(("weight_scale", "scale_weight"))), None)
    if scaled is not None:
        raise ValueError(f"{file} holds weights in 8 bits with a scale ({scaled}): networks/convert_lora.py reads them")
    return weights


def with_own_names(weights: Weights, num_encoders: int, *, is_sgm: bool) -> dict[str, Tensor]:
    """Return the tensors of a file with the names of this file; is_sgm is for a U-Net with the names of checkpoints.

    diffusers numbers a single encoder, too, and with transformers since 5.6 trainers omit `text_model`. Some trainers
    name the U-Net of SDXL by the paths of diffusers. Raises ValueError for a file that has a tensor under two names.
    """
    found: dict[str, str] = {}
    for name in weights:
        module, dot, rest = name.partition(".")
        if num_encoders == 1:
            module = re.sub(rf"^{PREFIX_TEXT_ENCODER}1_", f"{PREFIX_TEXT_ENCODER}_", module)
        module = re.sub(rf"^({PREFIX_TEXT_ENCODER}\d?)_(?=encoder_layers_|final_layer_norm)", r"\1_text_model_", module)
        own = f"{sgm_name(module) if is_sgm else module}{dot}{rest}"
        first = found.setdefault(own, name)
        if first != name:
            raise ValueError(f"the file has {own} twice ({first} and {name}): save one adapter")
    return {own: weights[name] for own, name in found.items()}


def advice(weights: Weights) -> str:
    """Return what to do with a file that has no names of sd-scripts."""
    if any(name.startswith((PREFIX_UNET, PREFIX_TEXT_ENCODER)) for name in weights):
        return ""
    return "; networks/convert_lora.py converts files of diffusers, PEFT and ComfyUI"


def shapes_in(weights: Weights) -> dict[str, Shape]:
    """Return module name -> rank and alpha in a file; a missing alpha is the rank."""
    ranks = {name.split(".")[0]: tensor.shape[0] for name, tensor in weights.items() if ".lora_down." in name}
    alphas = {name.split(".")[0]: float(tensor) for name, tensor in weights.items() if name.endswith(".alpha")}
    return {name: Shape(rank, alphas.get(name, rank)) for name, rank in ranks.items()}


def rescaled(weights: Weights, alphas: Mapping[str, float]) -> dict[str, Tensor]:
    """Return the tensors of the same changes with other alphas; modules that alphas do not have keep theirs.

    Up matrices whose alpha changes are multiplied by the ratio, and are float64 on the CPU.
    """
    result = dict(weights)
    for name, shape in shapes_in(weights).items():
        alpha, up = alphas.get(name, shape.alpha), f"{name}.lora_up.weight"
        if alpha != shape.alpha and up in weights:
            if alpha == 0:
                raise ValueError(f"{name}: no matrices have the same effect with alpha 0")
            result[up] = weights[up].detach().cpu().double() * (shape.alpha / alpha)
            result[f"{name}.alpha"] = torch.tensor(alpha)
    return result


def cast_for_file(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a tensor in the dtype of the file; an alpha that dtype would round stays in float32."""
    tensor = tensor.detach().cpu()
    cast = tensor if dtype is None else tensor.to(dtype)
    if name.endswith(".alpha") and float(cast) != float(tensor):
        cast = tensor
    return cast.contiguous()


def write_weights(file: Path, weights: Weights, metadata: Mapping[str, str] | None) -> None:
    """Write weights to a temporary file that then replaces file; a .safetensors file gets metadata and hashes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        if file.suffix.lower() == ".safetensors":
            with temporary.open("wb") as target:
                target.writelines(serialise(weights, dict(metadata or {})))
        else:
            torch.save(dict(weights), temporary)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def serialise(weights: Weights, metadata: dict[str, str]) -> tuple[bytes, memoryview]:
    """Return header and data of a safetensors file with metadata and the two hashes by which web UIs know a network.

    `sshs_model_hash` is the SHA-256 of the data alone; `sshs_legacy_hash` has the first 8 digits of the SHA-256 of
    64 KiB, from the first MiB on, of the file with no metadata but ss_*. Metadata that are too long to be read again
    are left out, with a warning.
    """
    # Cloned, because safetensors refuses tensors that share memory.
    content = memoryview(save({name: tensor.detach().cpu().clone() for name, tensor in weights.items()}))
    start = 8 + int.from_bytes(content[:8], "little")
    tensors, data = json.loads(bytes(content[8:start])), content[start:]
    hashes = {"sshs_model_hash": hashlib.sha256(data).hexdigest(), "sshs_legacy_hash": "0" * 8}
    others = {key: text for key, text in metadata.items() if key not in hashes}
    metadata = fitting(others, len(file_header(tensors, hashes)))
    header = file_header(tensors, {key: text for key, text in metadata.items() if key.startswith("ss_")})
    legacy = hashlib.sha256(header[0x100000:0x110000])
    legacy.update(data[max(0, 0x100000 - len(header)) : max(0, 0x110000 - len(header))])
    return file_header(tensors, metadata | hashes | {"sshs_legacy_hash": legacy.hexdigest()[:8]}), data


def fitting(metadata: Mapping[str, Any], taken: int) -> dict[str, str]:
    """Return the metadata, as text, that fit into a header with a number of other bytes, and log what is left out.

    Entries that readers need are kept first, then short ones; tables of tags are kept last.
    """
    texts = {str(key): text if isinstance(text, str) else str(text) for key, text in metadata.items()}
    room = MAX_HEADER_BYTES - taken
    if 8 * len(texts) + 6 * sum(len(key) + len(text) for key, text in texts.items()) <= room:
        return texts  # a character has at most six bytes in JSON

    def rank(key: str) -> tuple[bool, bool, int]:
        return key not in NEEDED_METADATA, key in TABLES_OF_TAGS, sizes[key]

    sizes = {key: len(json_bytes({key: text})) for key, text in texts.items()}
    left_out = {}
    for key in sorted(texts, key=rank):
        if sizes[key] <= room:
            room -= sizes[key]
        else:
            left_out[key] = sizes[key]
    if left_out:
        logger.warning(
            "the metadata are too long for a file that can be read (%s bytes of header); left out: %s",
            f"{MAX_HEADER_BYTES:,}",
            ", ".join(f"{key[:60]} ({size:,} bytes)" for key, size in left_out.items()),
        )
    return {key: text for key, text in texts.items() if key not in left_out}


def file_header(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """Return the header of a safetensors file with metadata in their order, which the package safetensors shuffles."""
    text = json_bytes({"__metadata__": metadata, **tensors} if metadata else tensors)
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def json_bytes(table: Mapping[str, Any]) -> bytes:
    """Return a table as JSON; characters that UTF-8 does not have, as in some names of files, become "?"."""
    return json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
