"""Networks of files in the forward pass of the models, at strengths that can change at any time."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from library.errors import UserError, named
from library.models.base import BaseModel
from library.networks.fit import names_in
from library.networks.modules import ImportedModule
from library.networks.protocol import HasMultiplier, Network
from library.networks.third_party import LYCORIS_KINDS, MAGNITUDE, has_values_once_read
from library.networks.views import Models
from library.weight_file import EMBEDDING

logger = logging.getLogger(__name__)

Forward = Callable[..., Tensor]


@dataclasses.dataclass
class Blend:
    """The forward of a layer with a foreign network: what it gives without, and a share of the network's change.

    The change is that of the whole network at strength 1. Modules scale it by themselves, but not all of them
    linearly: with the DoRA of lycoris a strength of 0 is not the layer as it was.
    """

    plain: Forward  # of the layer alone
    changed: Forward  # of the layer with this network only
    before: Forward  # with the networks that were attached before
    strength: float = 1.0

    def __call__(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Return the output of the layer."""
        if self.strength == 1 and self.before is self.plain:
            return self.changed(x, *args, **kwargs)
        before = self.before(x, *args, **kwargs)
        if self.strength == 0:
            return before
        plain = before if self.before is self.plain else self.plain(x, *args, **kwargs)
        return before + self.strength * (self.changed(x, *args, **kwargs) - plain)


@dataclasses.dataclass(frozen=True)
class BlendedNetwork:
    """A foreign network of which every layer takes a share."""

    network: Network
    layers: tuple[Blend, ...]

    def set_multiplier(self, multiplier: float) -> None:
        """Make the network act with a strength."""
        for layer in self.layers:
            layer.strength = multiplier


def apply_file(
    module: ImportedModule,
    path: Path,
    base: BaseModel,
    multiplier: float,
    *,
    device: torch.device,
    weights: Mapping[str, Tensor] | None = None,
) -> HasMultiplier:
    """Make the network of a file act on the models, on the device where they will work; return its strength.

    weights are the tensors of the file, if they have been read already. Raises UserError for a file of which a foreign
    module takes nothing, and for a network without a strength; warns of the tensors that it does not take.
    """
    models = module.models(base)
    arguments = {"for_inference": True} | module.arguments
    made, tensors = module.read(path, base, models, weights=weights, arguments=arguments)
    if made is None:
        raise UserError(f"{module.name} makes no network of {path}")
    layers: tuple[Blend, ...] = ()
    if module.is_foreign:
        layers = attached(made, models)
        check_taken(made, tensors, path, module.name)
    else:
        made.apply_to(models.text_encoder, models.unet, True, True)
    if not has_values_once_read(module.name):
        made.load_state_dict(tensors, False)
    made.to(device, next(base.unet.parameters()).dtype)
    made.eval()
    made.requires_grad_(False)
    applied = BlendedNetwork(made, layers) if layers else made
    if not isinstance(applied, HasMultiplier):
        raise UserError(f"{path}: the network of {module.name} has no strength (no set_multiplier)")
    applied.set_multiplier(multiplier)
    return applied


def attached(network: Network, models: Models) -> tuple[Blend, ...]:
    """Attach a foreign network; return the blends of the layers whose forward it replaces, none if it works otherwise.

    It finds the layers without other networks, because some modules replace what others add. What it takes from a
    layer, as lycoris does with the weight of a full difference, is put back: the models and other networks read it.
    """
    encoder, unet = models.text_encoder, models.unet
    roots = [*(encoder if isinstance(encoder, list) else [encoder]), unet]
    leaves = [layer for root in roots for layer in root.modules() if not any(True for _ in layer.children())]
    kept = [(layer, layer.__dict__.pop("forward", None), dict(layer._parameters)) for layer in leaves]
    changed: dict[nn.Module, Forward] = {}
    try:
        network.apply_to(encoder, unet, True, True)  # lycoris has no defaults
        changed = {layer: layer.__dict__["forward"] for layer in leaves if "forward" in layer.__dict__}
    finally:
        blends = [restored(*row, changed.get(row[0])) for row in kept]
    return tuple(blend for blend in blends if blend is not None)


def restored(
    layer: nn.Module, before: Forward | None, parameters: Mapping[str, nn.Parameter | None], changed: Forward | None
) -> Blend | None:
    """Give a layer its own parameters and forward (None: that of its class) again, or a blend of that with changed."""
    layer.__dict__.pop("forward", None)
    for name, parameter in parameters.items():
        layer.register_parameter(name, parameter)
    plain = layer.forward
    blend = None if changed is None else Blend(plain, changed, before or plain)
    forward = before if blend is None else blend
    if forward is not None:
        layer.__dict__["forward"] = forward  # hides that of the class
    return blend


def check_taken(network: Network, tensors: Mapping[str, Tensor], path: Path, module: str) -> None:
    """Raise UserError for a file of which a network takes nothing; warn of the tensors that it does not take."""
    taken = names_in(network) & tensors.keys()
    left = {name for name in tensors.keys() - taken if not name.startswith(EMBEDDING)}
    if not taken:
        is_lora = not any(name.endswith(LYCORIS_KINDS) or MAGNITUDE in name for name in tensors)
        advice = "networks/convert_lora.py gives files of diffusers and PEFT the names that are read here"
        raise UserError(
            f"{path}: {module} takes none of its {len(tensors)} tensors ({named(sorted(tensors))}): it is for "
            f"another model or another module{f'; {advice}' if is_lora else ''}"
        )
    if left:
        logger.warning(
            "%s: %s does not take %d of %d tensors (%s): the picture is drawn without them; "
            "networks/check_lora_weights.py tells what the file holds",
            path,
            module,
            len(left),
            len(tensors),
            named(sorted(left)),
        )
