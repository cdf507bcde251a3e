"""LoRA for Stable Diffusion, in one file that stands alone (standard library, torch, safetensors).

Copy this file into a project that uses diffusers and write:

    from networks.lora import create_network_from_weights
    from safetensors.torch import load_file

    network, weights = create_network_from_weights(0.8, None, pipe.vae, pipe.text_encoder, pipe.unet, load_file(path))
    network.apply_to(pipe.text_encoder, pipe.unet)
    network.load_state_dict(weights)
    network.to(device, dtype=torch.float16)
    network.set_multiplier(0.5)   # at any time
    network.remove()              # the models are as they were

Several networks on the same models add up. `network.merge_to(text_encoder, unet, weights)` instead of
`apply_to` and `load_state_dict` writes the change into the models' own weights.

A LoRA (arXiv 2106.09685) adds to a layer's output W x the term m * alpha / R * U D x, where D (down) has R rows
and U (up) starts at zero; m is the multiplier. LoRA-LierLa acts on linear layers and 1x1 convolutions,
LoRA-C3Lier also on 3x3 convolutions. Names, shapes and metadata of files are those of sd-scripts.

Letters of shapes: B batch, T tokens, R rank, H and W height and width.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger(__name__)

DEFAULT_RANK = 4
PREFIX_UNET = "lora_unet"
PREFIX_TEXT_ENCODER = "lora_te"  # one encoder; two are numbered: lora_te1, lora_te2

# Containers by class name: every Linear and Conv2d inside one is a target.
UNET_CONTAINERS = ("Transformer2DModel",)
UNET_CONV_CONTAINERS = ("ResnetBlock2D", "Downsample2D", "Upsample2D")
TEXT_ENCODER_CONTAINERS = ("CLIPAttention", "CLIPSdpaAttention", "CLIPMLP")

Module = nn.Module
Weights = Mapping[str, Tensor]


class Shape(NamedTuple):
    """Rank and alpha of one module."""

    rank: int
    alpha: float


class Dropouts(NamedTuple):
    """Probabilities of the three dropouts, which act only in training mode; 0 is off."""

    neuron: float = 0.0  # of each entry of the down layer's output
    rank: float = 0.0  # of each of the R ranks, per picture; the rest is scaled up
    module: float = 0.0  # of the whole module, per call


class Target(NamedTuple):
    """A layer that can get a module: its name in files, the layer, the class name of its container."""

    name: str
    layer: Module
    container: str


# A shape rule says what a target gets: rank and alpha, or None for no module there.
ShapeRule = Callable[[Target], "Shape | None"]


# --------------------------------------------------------------------------------------------------------------
# One layer
# --------------------------------------------------------------------------------------------------------------


class LoRAModule(nn.Module):
    """The low-rank change of one linear layer or convolution.

    `lora_down.weight` is (R, in) or (R, in, kh, kw), `lora_up.weight` (out, R) or (out, R, 1, 1), `alpha` 0-D.
    """

    def __init__(
        self, lora_name: str, layer: Module, shape: Shape, multiplier: float = 1.0, dropouts: Dropouts | None = None
    ) -> None:
        super().__init__()
        self.lora_name = lora_name
        self.lora_dim = shape.rank
        self.multiplier = multiplier
        self.dropouts = dropouts or Dropouts()
        self.enabled = True
        self.is_conv = isinstance(layer, nn.Conv2d)
        # A list hides the layer from torch, so that it is no child and no part of the state dict.
        self.org_module_ref = [layer]
        self.org_forward: Callable[..., Tensor] | None = None
        if self.is_conv:
            self.lora_down: Module = nn.Conv2d(
                layer.in_channels,
                shape.rank,
                layer.kernel_size,
                layer.stride,
                layer.padding,
                layer.dilation,
                bias=False,
            )
            self.lora_up: Module = nn.Conv2d(shape.rank, layer.out_channels, 1, bias=False)
        else:
            # Not weight.shape, which a quantised layer packs.
            self.lora_down = nn.Linear(layer.in_features, shape.rank, bias=False)
            self.lora_up = nn.Linear(shape.rank, layer.out_features, bias=False)
        self.is_pointwise = self.is_conv and layer.kernel_size == (1, 1) and layer.stride == (1, 1)
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_up.weight)
        self.register_buffer("alpha", torch.tensor(float(shape.alpha or shape.rank)))
        self._update_scale()

    def _update_scale(self) -> None:
        self.scale = float(self.alpha) / self.lora_dim  # a number: reading alpha in each call would wait for the GPU

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._update_scale()

    @property
    def org_module(self) -> Module:
        """The layer that this module changes."""
        return self.org_module_ref[0]

    # ---- attach, detach -------------------------------------------------------------------------------------

    def apply_to(self) -> None:
        """Take the place of the layer's forward; networks applied later wrap this one."""
        if self.org_forward is not None:
            raise ValueError(f"{self.lora_name} is applied already")
        self.org_forward = self.org_module.forward
        self.org_module.forward = self.forward

    def remove(self) -> None:
        """Undo apply_to, whether or not other networks were applied since."""
        if self.org_forward is None:
            return
        layer = self.org_module
        outer = getattr(layer.forward, "__self__", None)
        if outer is self:
            layer.forward = self.org_forward
            if getattr(layer.forward, "__self__", None) is layer:
                del layer.forward  # the class's own forward shows again
        else:
            while outer.org_forward.__self__ is not self:
                outer = outer.org_forward.__self__
            outer.org_forward = self.org_forward
        self.org_forward = None

    # ---- forward --------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output plus the change; older diffusers pass further arguments to the layer."""
        base = self.org_forward(x, *args, **kwargs)
        scale = self.multiplier * self.scale
        if scale == 0 or not self.enabled:
            return base
        if self.training and any(self.dropouts):
            return self._forward_with_dropouts(base, x, scale)
        return self._add(base, self._down(x), scale)

    def _down(self, x: Tensor) -> Tensor:
        """Return D x: (..., in) -> (..., R), or (B, in, H, W) -> (B, R, H', W')."""
        weight = self._down_weight()
        if not self.is_conv:
            return F.linear(x, weight)
        if self.is_pointwise:
            return torch.bmm(weight.flatten(1).expand(len(x), -1, -1), x.flatten(2)).unflatten(2, x.shape[2:])
        return self.lora_down._conv_forward(x, weight, None)

    def _add(self, base: Tensor, hidden: Tensor, scale: float) -> Tensor:
        """Return base + scale * U hidden as one fused multiply-add; the result is contiguous."""
        weight = self._up_weight()
        if not self.is_conv and hidden.ndim == 3:  # (B, T, R): no reshaping, which would cost as much as the product
            return torch.baddbmm(base, hidden, weight.t().expand(len(base), -1, -1), alpha=scale)
        if not self.is_conv:
            rows = torch.addmm(base.flatten(0, -2), hidden.flatten(0, -2), weight.t(), alpha=scale)
            return rows.view(base.shape)
        up = weight.flatten(1).expand(len(base), -1, -1)
        return torch.baddbmm(base.flatten(2), up, hidden.flatten(2), alpha=scale).view(base.shape)

    def _down_weight(self) -> Tensor:
        return self.lora_down.weight

    def _up_weight(self) -> Tensor:
        return self.lora_up.weight

    def _forward_with_dropouts(self, base: Tensor, x: Tensor, scale: float) -> Tensor:
        neuron, rank, module = self.dropouts
        if module and torch.rand(()) < module:
            return base
        hidden = self._down(x)
        if neuron:
            hidden = F.dropout(hidden, neuron)
        if rank:
            axis = 1 if self.is_conv else hidden.ndim - 1
            mask_shape = [1] * hidden.ndim
            mask_shape[0], mask_shape[axis] = hidden.shape[0], self.lora_dim
            mask = torch.rand(hidden.shape[0], self.lora_dim, device=hidden.device) > rank
            hidden = hidden * mask.view(mask_shape)
            scale = scale / (1 - rank)
        return self._add(base, hidden, scale)

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


def text_encoder_targets(text_encoder: Module, prefix: str) -> Iterator[Target]:
    """Yield the targets of a CLIP text encoder under their canonical names.

    Files say `text_model`; from transformers 5.6 on, CLIPTextModel has no such level.
    """
    if not hasattr(text_encoder, "text_model"):
        prefix = f"{prefix}.text_model"
    yield from find_targets(text_encoder, prefix, TEXT_ENCODER_CONTAINERS)


def text_encoder_prefixes(number: int) -> list[str]:
    """Return the name prefix of each text encoder; only two or more are numbered."""
    return [PREFIX_TEXT_ENCODER] if number == 1 else [f"{PREFIX_TEXT_ENCODER}{index + 1}" for index in range(number)]


# --------------------------------------------------------------------------------------------------------------
# The network
# --------------------------------------------------------------------------------------------------------------


class LoRANetwork(nn.Module):
    """All LoRA modules over one set of models; its state dict is the content of a file."""

    module_class = LoRAModule

    def __init__(
        self,
        text_encoder: Module | Sequence[Module],
        unet: Module,
        rule: ShapeRule,
        *,
        multiplier: float = 1.0,
        dropouts: Dropouts | None = None,
    ) -> None:
        super().__init__()
        self.multiplier = multiplier
        self.blocks: Any = None  # networks.block_weights.BlockPlan, where shapes or rates go by block
        self.set_loraplus_lr_ratio(None, None, None)
        encoders = as_list(text_encoder)

        def build(targets: Iterable[Target]) -> list[LoRAModule]:
            shaped = ((target, rule(target)) for target in targets)
            return [self.module_class(t.name, t.layer, shape, multiplier, dropouts) for t, shape in shaped if shape]

        self._text_encoder_parts = [
            build(text_encoder_targets(encoder, prefix))
            for encoder, prefix in zip(encoders, text_encoder_prefixes(len(encoders)), strict=True)
        ]
        self._unet_part = build(find_targets(unet, PREFIX_UNET, UNET_CONTAINERS + UNET_CONV_CONTAINERS))
        for module in self.modules_in_order():
            self.add_module(module.lora_name, module)

    @property
    def text_encoder_loras(self) -> list[LoRAModule]:
        """Modules over the text encoders."""
        return [module for part in self._text_encoder_parts for module in part]

    @property
    def unet_loras(self) -> list[LoRAModule]:
        """Modules over the U-Net."""
        return list(self._unet_part)

    def modules_in_order(self) -> list[LoRAModule]:
        """Return all modules, text encoders first."""
        return self.text_encoder_loras + self.unet_loras

    # ---- attach, detach, merge ------------------------------------------------------------------------------

    def apply_to(
        self,
        text_encoder: Module | Sequence[Module],
        unet: Module,
        apply_text_encoder: bool = True,
        apply_unet: bool = True,
    ) -> None:
        """Attach to the models the network was made for; modules of a part that is not applied are dropped."""
        del text_encoder, unet  # part of the interface; the modules know their layers
        if not apply_text_encoder:
            self._drop(self.text_encoder_loras)
            self._text_encoder_parts = [[] for _ in self._text_encoder_parts]
        if not apply_unet:
            self._drop(self.unet_loras)
            self._unet_part = []
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
        text_encoder: Module | Sequence[Module],
        unet: Module,
        weights_sd: Weights | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Load weights_sd, if given, and add the changes to the models' weights; for a network not applied."""
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
        """Return whether merge_to is offered."""
        return True

    # ---- training -------------------------------------------------------------------------------------------

    def prepare_optimizer_params(
        self, text_encoder_lr: float | None, unet_lr: float | None, default_lr: float | None = None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Return (parameter groups, their names); a part whose rate is 0 gets no group."""
        rates = [text_encoder_lr] if text_encoder_lr is not None else []
        return self.prepare_optimizer_params_with_multiple_te_lrs(rates, unet_lr, default_lr)

    def prepare_optimizer_params_with_multiple_te_lrs(
        self, text_encoder_lrs: Sequence[float] | None, unet_lr: float | None, default_lr: float | None = None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Return the same with one rate for each text encoder; the last one given serves the rest."""
        rates = list(text_encoder_lrs or [default_lr])
        parts = [part for part in self._text_encoder_parts if part]
        if len(rates) == 1 or len(parts) <= 1:
            named = [("textencoder", self.text_encoder_loras, rates[0])]
        else:
            named = [
                (f"textencoder {index + 1}", part, rates[min(index, len(rates) - 1)])
                for index, part in enumerate(parts)
            ]
        named += self._unet_groups(unet_lr if unet_lr is not None else default_lr)
        groups, names = [], []
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

    def _unet_groups(self, rate: float | None) -> list[tuple[str, list[LoRAModule], float | None]]:
        """Return (name, modules, rate) of the U-Net's groups: one, or one for each rate that blocks have."""
        if self.blocks is None or not self.blocks.has_weights or rate is None:
            return [("unet", self.unet_loras, rate)]
        from networks.block_weights import name_blocks

        by_weight: dict[float, dict[int, list[LoRAModule]]] = {}
        for module in self.unet_loras:
            index = self.blocks.table.index_of(module.lora_name)
            by_weight.setdefault(self.blocks.weights[index], {}).setdefault(index, []).append(module)
        groups = sorted(by_weight.items(), key=lambda pair: min(pair[1]))
        return [
            (name_blocks(list(found)), [module for index in sorted(found) for module in found[index]], rate * weight)
            for weight, found in groups
        ]

    def set_loraplus_lr_ratio(self, common: float | None, unet: float | None, text_encoder: float | None) -> None:
        """Let the up matrices learn at a multiple of the rate (LoRA+, arXiv 2402.12354); None or 0 is off."""
        self._unet_ratio = unet or common or None
        self._text_encoder_ratio = text_encoder or common or None

    def enable_gradient_checkpointing(self) -> None:
        """Nothing to do: a change is computed again together with its layer."""

    def prepare_grad_etc(self, text_encoder: Any, unet: Any) -> None:
        """Make all parameters trainable."""
        del text_encoder, unet
        self.requires_grad_(True)

    def on_epoch_start(self, text_encoder: Any, unet: Any) -> None:
        """Switch dropouts on."""
        del text_encoder, unet
        self.train()

    def get_trainable_params(self) -> Iterator[nn.Parameter]:
        """Return the parameters whose gradients are clipped."""
        return self.parameters()

    @torch.no_grad()
    def apply_max_norm_regularization(self, max_norm: float, device: Any = None) -> tuple[int, float, float]:
        """Scale down each change whose norm exceeds max_norm; return (number scaled, mean norm, largest norm).

        Both factors are scaled by the same root, as in sd-scripts. One transfer from the device in all.
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

    def describe_blocks(self) -> list[dict[str, Any]]:
        """Return for each block of the U-Net its index, weight of the learning rate, ranks and number of modules."""
        from networks.block_weights import SD

        table = SD if self.blocks is None else self.blocks.table
        weights = [1.0] * table.count if self.blocks is None else self.blocks.weights
        rows = [{"index": index, "weight": weight, "ranks": [], "count": 0} for index, weight in enumerate(weights)]
        for module in self.unet_loras:
            row = rows[table.index_of(module.lora_name)]
            row["ranks"] = sorted({*row["ranks"], module.lora_dim})
            row["count"] += 1
        return rows

    @torch.no_grad()
    def delta_norms(self) -> Tensor:
        """Return the Frobenius norm of each module's change, (modules,), multiplier left out."""
        return torch.stack([module.delta_norm() for module in self.modules_in_order()])

    # ---- files ----------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: Weights, strict: bool = True, assign: bool = False) -> Any:
        """Load the content of a file: alphas left out are filled in, linear and 1x1 weights fit either layer."""
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
        """Load a file; return what of it and of the network did not find its counterpart.

        Raises ValueError if nothing matches, or ranks differ.
        """
        weights = read_weights(Path(file))
        own, given = {name.split(".")[0] for name in self.state_dict()}, {name.split(".")[0] for name in weights}
        if not own & given:
            raise ValueError(f"{file}: none of its {len(given)} modules belongs to this network{_example(given)}")
        self._check_ranks(weights, file)
        self.load_state_dict(weights, strict=False)
        notes = [f"{len(own & given)} modules loaded"]
        if given - own:
            notes.append(f"{len(given - own)} modules of the file left out{_example(given - own)}")
        if own - given:
            notes.append(f"{len(own - given)} modules of the network start fresh{_example(own - given)}")
        return "; ".join(notes)

    def _check_ranks(self, weights: Weights, file: str | Path) -> None:
        for module in self.modules_in_order():
            down = weights.get(f"{module.lora_name}.lora_down.weight")
            if down is not None and down.shape[0] != module.lora_dim:
                raise ValueError(
                    f"{file}: {module.lora_name} has rank {down.shape[0]}, this network {module.lora_dim}: "
                    "give the same dimensions, or take them from the file (--dim_from_weights)"
                )

    def save_weights(self, file: str | Path, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """Write the network to file in dtype (None: as it is), with metadata where the format has it."""
        weights = {name: cast_for_file(name, tensor, dtype) for name, tensor in self.state_dict().items()}
        write_weights(Path(file), weights, metadata)


def as_list(text_encoder: Module | Sequence[Module] | None) -> list[Module]:
    """Return the text encoders as a list, whether one, several or none were given."""
    if text_encoder is None:
        return []
    return list(text_encoder) if isinstance(text_encoder, list | tuple) else [text_encoder]


def _example(names: Iterable[str]) -> str:
    return f" (such as {min(names)})"


# --------------------------------------------------------------------------------------------------------------
# Entry points that trainers and pipelines call by name
# --------------------------------------------------------------------------------------------------------------


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: Any,
    text_encoder: Module | Sequence[Module],
    unet: Module,
    neuron_dropout: float | None = None,
    **network_args: Any,
) -> LoRANetwork:
    """Return a fresh network: LoRA-LierLa, or with conv_dim in network_args LoRA-C3Lier.

    network_args come as texts from `--network_args key=value`. Raises ValueError for unknown or bad ones.
    """
    del vae
    given = read_network_args(network_args)
    linear = Shape(network_dim or DEFAULT_RANK, 1.0 if network_alpha is None else network_alpha)
    dropouts = Dropouts(neuron_dropout or 0.0, given["rank_dropout"], given["module_dropout"])
    blocks = plan_of_blocks(given, linear)
    rule = uniform_rule(given, linear) if blocks is None else block_rule(blocks, linear)
    network = LoRANetwork(text_encoder, unet, rule, multiplier=multiplier, dropouts=dropouts)
    network.blocks = blocks
    network.set_loraplus_lr_ratio(*(given[key] for key in LORAPLUS_ARGS))
    return network


def uniform_rule(given: Mapping[str, Any], linear: Shape) -> ShapeRule:
    """Return the rule that gives all targets the same rank, and 3x3 convolutions that of conv_dim, if any."""
    conv = Shape(given["conv_dim"], given["conv_alpha"]) if given["conv_dim"] else None

    def rule(target: Target) -> Shape | None:
        if is_large_conv(target):
            return conv
        return linear if conv or target.container not in UNET_CONV_CONTAINERS else None

    return rule


def plan_of_blocks(given: Mapping[str, Any], linear: Shape) -> Any:
    """Return the plan by block that network_args ask for, or None; it needs networks/block_weights.py."""
    if all(given[key] is None for key in BLOCK_ARGS):
        return None
    from networks.block_weights import SD, plan_blocks

    return plan_blocks(
        given,
        table=SD,
        rank=linear.rank,
        alpha=linear.alpha,
        conv_rank=given["conv_dim"],
        conv_alpha=given["conv_alpha"],
    )


def block_rule(blocks: Any, linear: Shape) -> ShapeRule:
    """Return the rule that gives a target of the U-Net the rank of its block; text encoders get the common one."""

    def rule(target: Target) -> Shape | None:
        if not target.name.startswith(PREFIX_UNET):
            return linear
        if target.container in UNET_CONV_CONTAINERS and not blocks.has_conv:
            return None
        shape = blocks.shape_of(target.name)
        rank, alpha = (shape.conv_rank, shape.conv_alpha) if is_large_conv(target) else (shape.rank, shape.alpha)
        return Shape(rank, alpha) if rank else None

    return rule


def is_large_conv(target: Target) -> bool:
    """Return whether a target is a convolution with a kernel larger than 1x1."""
    return isinstance(target.layer, nn.Conv2d) and target.layer.kernel_size != (1, 1)


def check_network_args(network_dim: int | None, network_args: Mapping[str, str], *, from_file: bool) -> None:
    """Raise ValueError for arguments that are unknown or cannot be read, before there are models."""
    del network_dim, from_file
    read_network_args(network_args)


def create_network_from_weights(
    multiplier: float,
    file: str | Path | None,
    vae: Any,
    text_encoder: Module | Sequence[Module],
    unet: Module,
    weights_sd: Weights | None = None,
    for_inference: bool = False,
    neuron_dropout: float | None = None,
    **network_args: Any,
) -> tuple[LoRANetwork, Weights]:
    """Return (network, weights): a network with the modules, ranks and alphas of a file, values not yet loaded.

    The file is read only if weights_sd is None. Raises ValueError if nothing in it matches the models; what
    is left over is logged.
    """
    del vae, for_inference
    weights = read_weights(Path(file)) if weights_sd is None else weights_sd
    given = read_network_args(network_args)
    for key in ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas"):
        if given[key] is not None:
            raise ValueError(f"network_args: {key} does not go with a network made from a file, which has its own")
    shapes = shapes_in(weights)

    def rule(target: Target) -> Shape | None:
        return shapes.get(target.name)

    dropouts = Dropouts(neuron_dropout or 0.0, given["rank_dropout"], given["module_dropout"])
    network = LoRANetwork(text_encoder, unet, rule, multiplier=multiplier, dropouts=dropouts)
    network.blocks = plan_of_blocks(given, Shape(DEFAULT_RANK, 1.0))
    network.set_loraplus_lr_ratio(*(given[key] for key in LORAPLUS_ARGS))
    matched = {module.lora_name for module in network.modules_in_order()}
    unmatched = {name.split(".")[0] for name in weights} - matched
    source = file or "the weights"
    if not matched:
        raise ValueError(
            f"{source}: none of the {len(unmatched)} modules is in these models{_example(unmatched or {'-'})}"
        )
    if unmatched:
        logger.warning("%s: %d modules used, %d left out%s", source, len(matched), len(unmatched), _example(unmatched))
    return network, weights


def shapes_in(weights: Weights) -> dict[str, Shape]:
    """Return module name -> rank and alpha in a file; alpha is the rank where it is left out."""
    ranks = {name.split(".")[0]: tensor.shape[0] for name, tensor in weights.items() if ".lora_down." in name}
    alphas = {name.split(".")[0]: float(tensor) for name, tensor in weights.items() if name.endswith(".alpha")}
    return {name: Shape(rank, alphas.get(name, rank)) for name, rank in ranks.items()}


# network_args: key -> (reading, default). `dropout` is for other modules: here it is --network_dropout.
NETWORK_ARGS: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "conv_dim": (int, None),
    "conv_alpha": (float, 1.0),
    "rank_dropout": (float, 0.0),
    "module_dropout": (float, 0.0),
    "loraplus_lr_ratio": (float, None),
    "loraplus_unet_lr_ratio": (float, None),
    "loraplus_text_encoder_lr_ratio": (float, None),
    "dropout": (lambda text: None if text in (None, "None") else float(text), None),
    # By block of the U-Net, read by networks/block_weights.py.
    "down_lr_weight": (str, None),
    "mid_lr_weight": (str, None),
    "up_lr_weight": (str, None),
    "block_lr_zero_threshold": (str, None),
    "block_dims": (str, None),
    "block_alphas": (str, None),
    "conv_block_dims": (str, None),
    "conv_block_alphas": (str, None),
}
BLOCK_ARGS = tuple(key for key, (reading, _) in NETWORK_ARGS.items() if reading is str)


LORAPLUS_ARGS = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")


def read_network_args(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return key -> typed value of all network_args; raises ValueError for an unknown key or a bad value."""
    values = {key: default for key, (_, default) in NETWORK_ARGS.items()}
    for key, text in given.items():
        if key not in NETWORK_ARGS:
            near = difflib.get_close_matches(key, NETWORK_ARGS, n=1)
            raise ValueError(f"network_args: {key} is not known{f'; did you mean {near[0]}?' if near else ''}")
        try:
            values[key] = NETWORK_ARGS[key][0](text)
        except ValueError:
            raise ValueError(f"network_args: {key} must be a number, got {text!r}") from None
    for key in ("rank_dropout", "module_dropout"):
        if not 0 <= values[key] < 1:
            raise ValueError(f"network_args: {key} must be at least 0 and below 1, got {values[key]:g}")
    if values["conv_dim"] is not None and values["conv_dim"] < 1:
        raise ValueError(f"network_args: conv_dim must be at least 1, got {values['conv_dim']}")
    for key in ("conv_alpha", *LORAPLUS_ARGS):
        if values[key] is not None and not 0 <= values[key] < math.inf:
            raise ValueError(f"network_args: {key} must be a finite number of at least 0, got {values[key]:g}")
    plan_of_blocks(values, Shape(DEFAULT_RANK, 1.0))  # refuses what cannot be read
    return values


# --------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------


def read_weights(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file, or of a pickle, of which only weights are read."""
    if file.suffix.lower() == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    weights = torch.load(file, map_location="cpu", weights_only=True)
    return weights.get("state_dict", weights)


def cast_for_file(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a tensor as it is saved: in dtype, but an alpha that dtype would round keeps its float32."""
    tensor = tensor.detach().cpu()
    cast = tensor if dtype is None else tensor.to(dtype)
    if name.endswith(".alpha") and float(cast) != float(tensor):
        cast = tensor
    return cast.contiguous()


def write_weights(file: Path, weights: Weights, metadata: Mapping[str, str] | None) -> None:
    """Write weights to file by way of a temporary name; a .safetensors file gets metadata and hashes."""
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


# In the order in which safetensors lays them out: wide types first, so that every tensor is aligned.
TYPE_NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def serialise(weights: Weights, metadata: dict[str, str]) -> Iterator[bytes | memoryview]:
    """Yield the parts of a safetensors file with metadata and the two hashes that web UIs know a network by.

    `sshs_model_hash` is a SHA-256 of the data alone; `sshs_legacy_hash` the first 8 digits of one over 64 KiB
    from the first MiB of the file as it is with the ss_* metadata only. No tensor is copied.
    """
    order = {dtype: index for index, dtype in enumerate(TYPE_NAMES)}
    tensors = sorted(weights.items(), key=lambda entry: (order[entry[1].dtype], entry[0]))
    flat = (tensor.detach().cpu().contiguous().reshape(-1) for _, tensor in tensors)
    parts = [memoryview(tensor.view(torch.uint8).numpy()) for tensor in flat]
    training = {key: text for key, text in metadata.items() if key.startswith("ss_")}
    whole, legacy, position = hashlib.sha256(), hashlib.sha256(), 0
    for part in parts:
        whole.update(part)
    for part in (file_header(tensors, training), *parts):
        legacy.update(part[max(0, 0x100000 - position) : max(0, 0x110000 - position)])
        position += len(part)
    hashes = {"sshs_model_hash": whole.hexdigest(), "sshs_legacy_hash": legacy.hexdigest()[:8]}
    yield file_header(tensors, metadata | hashes)
    yield from parts


def file_header(tensors: Sequence[tuple[str, Tensor]], metadata: Mapping[str, str]) -> bytes:
    """Return the header of a safetensors file with its length, padded so that data begin at a multiple of 8."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, tensor in tensors:
        end = start + tensor.numel() * tensor.element_size()
        table[name] = {"dtype": TYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
