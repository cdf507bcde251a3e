"""Merges networks from files into the weights of the models."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from library.config.network import NetworkConfig
from library.errors import UserError
from library.models.base import BaseModel
from library.networks.fit import compare, counted
from library.networks.modules import ImportedModule, find_module, module_errors
from library.networks.protocol import optional_method
from library.networks.third_party import with_alphas_folded
from library.weight_file import read_weights

logger = logging.getLogger(__name__)


def merge_base_weights(config: NetworkConfig, base: BaseModel) -> None:
    """Merge each file of --base_weights into the models, with its multiplier."""
    if not config.base_weights:
        return
    multipliers = list(config.base_weights_multiplier or ())
    for index, path in enumerate(config.base_weights):
        multiplier = multipliers[index] if index < len(multipliers) else 1.0
        with module_errors(config, "merge_to", path):
            merge_file(find_module(config), path, multiplier, base)
        logger.info("%s is merged into the base with multiplier %g", path, multiplier)


def merge_file(
    module: ImportedModule,
    path: Path,
    multiplier: float,
    base: BaseModel,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Merge a file into the models; weights are its tensors, if they have been read already."""

    def merge(multiplier: float) -> None:
        models, parameter = module.models(base), next(base.unet.parameters())
        network, tensors = module.read(
            path, base, models, multiplier=multiplier, weights=weights, arguments={"for_inference": True}
        )
        merge_to = optional_method(network, "merge_to")
        if merge_to is None:
            raise UserError(f"{path}: the network of {module.name} has no merge_to, which merging needs")
        if module.is_foreign and network is not None:  # the suite's own warn of it themselves
            fit = compare(tensors, network)
            for names, number, kind in ((fit.left, fit.modules, "modules"), (fit.tensors, fit.all_tensors, "tensors")):
                if names:
                    text = "%s: %s have no place in these models and are left out"
                    logger.warning(text, path, counted(names, number, kind))
        merge_to(models.text_encoder, models.unet, tensors, parameter.dtype, parameter.device)

    if not module.is_foreign:
        merge(multiplier)
        return
    weights = with_alphas_folded(read_weights(path) if weights is None else weights)
    # Every module merges at full strength, but lycoris ignores the multiplier, so it is applied here.
    bases = nn.ModuleList([*base.text_modules, base.unet])
    before = {name: parameter.detach().clone() for name, parameter in bases.named_parameters()}
    with torch.no_grad():
        merge(1.0)
        after = dict(bases.requires_grad_(False).named_parameters())
        if all(name in before and torch.equal(before[name], parameter) for name, parameter in after.items()):
            raise UserError(f"--base_weights {path} changes nothing: it is for another model or another module")
        if multiplier != 1:
            for name, parameter in after.items():
                old = before.get(name, torch.zeros_like(parameter))
                parameter.copy_(torch.lerp(old.float(), parameter.float(), multiplier))
