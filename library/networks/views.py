"""The models as network modules take them, and the names that files have for the layers in them.

Modules written for sd-scripts name what they train by the paths of layers in the models that they are given. Those of
diffusers and transformers differ from them in places, so foreign modules are given trees with the same layers under the
paths of sd-scripts.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

from torch import nn

from library.errors import UserError
from library.models import keys
from library.models.base import BaseModel
from library.models.layout import unet_rule
from library.networks.protocol import TextEncoders

Value = TypeVar("Value")

UNET_WORD, SECOND_TEXT = "lora_unet_", "lora_te2_"  # beginnings of names of modules
# Classes of the tree over a U-Net by those of diffusers: presets of lycoris name containers by their class.
CLASSES = {"Attention": "CrossAttention", "UNet2DConditionModel": "SdxlUNet2DConditionModel"}


class Models(NamedTuple):
    """The models of a base model in the form that network modules take."""

    vae: nn.Module
    text_encoder: TextEncoders  # one alone, several in a list
    unet: nn.Module


class CanonicalTextEncoder(nn.Module):
    """A text encoder under the module path used in files, `text_model.…`, for every version of transformers."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.text_model = encoder


def models_for(base: BaseModel, *, is_foreign: bool, without: Collection[int] = ()) -> Models:
    """Return the models for a network module; text encoders with these numbers, from 0, are there without layers.

    So the others keep their numbers. The suite's own modules know the names of files, and get the U-Net itself; foreign
    ones get trees of layers, in which they find no configurations.
    """
    encoders = [
        nn.Module() if number in without else with_text_model(encoder)
        for number, encoder in enumerate(base.text_modules)
    ]
    unet = checkpoint_tree(base) if is_foreign and base.family.has_checkpoint_paths else base.unet
    return Models(base.vae, encoders[0] if len(encoders) == 1 else encoders, unet)


def with_text_model(encoder: nn.Module) -> nn.Module:
    """Return a text encoder, or a container of it, that has its layers in `text_model`."""
    return encoder if hasattr(encoder, "text_model") else CanonicalTextEncoder(encoder)


def checkpoint_tree(base: BaseModel) -> nn.Module:
    """Return a tree with the very layers of a U-Net under their paths in checkpoints.

    Its containers have the class names that they have in sd-scripts; it computes nothing.
    """
    root = container(base.unet)
    for path, module in checkpoint_paths(base):
        node, *names = root, *path.split(".")
        for name in names[:-1]:
            if name not in node._modules:
                node.add_module(name, nn.Module())
            node = node.get_submodule(name)
        node.add_module(names[-1], container(module) if any(True for _ in module.children()) else module)
    return root


def container(module: nn.Module) -> nn.Module:
    """Return an empty container in place of a module."""
    name = type(module).__name__
    return type(CLASSES.get(name, name), (nn.Module,), {})()


def checkpoint_paths(base: BaseModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield the path in checkpoints of each module of the U-Net that has one there, containers first."""
    rule = unet_rule(base.family, base.unet.config)
    for path, module in base.unet.named_modules():
        try:
            place = next(rule(f"{path}.*"))  # rules are for the tensors of modules
        except KeyError:
            continue
        yield place.name.removeprefix(keys.UNET_PREFIX).removesuffix(".*"), module


def unet_names(base: BaseModel) -> dict[str, str]:
    """Return name of a module by diffusers -> by checkpoints; {} for families whose files have the first."""
    if not base.family.has_checkpoint_paths:
        return {}
    paths = {module: path for path, module in checkpoint_paths(base)}
    named = {path: paths[module] for path, module in base.unet.named_modules() if module in paths}
    return {UNET_WORD + path.replace(".", "_"): UNET_WORD + new.replace(".", "_") for path, new in named.items()}


def canonical_names(weights: Mapping[str, Value], base: BaseModel, source: Path | None = None) -> dict[str, Value]:
    """Return the tensors of a file under the names that modules have over a base model of the suite.

    source is the file in messages. Raises UserError for a file that has a module under two names.
    """
    return with_canonical_names(weights, source, is_alone=len(base.texts) == 1, unet=unet_names(base))


def with_canonical_names(
    weights: Mapping[str, Value], source: Path | None, *, is_alone: bool, unet: Mapping[str, str]
) -> dict[str, Value]:
    """Return the tensors of a file, or their shapes, under the names over one text encoder, or over several.

    Trainers with transformers from 5.6 on leave `text_model` out; some number a text encoder that is alone. unet has
    other names of modules of the U-Net.
    """
    found: dict[str, str] = {}
    for name in weights:
        module, dot, rest = name.partition(".")
        new = re.sub(r"^lora_te1_", "lora_te_", module) if is_alone else module
        new = re.sub(r"^(lora_te\d?)_(?=encoder_layers_|final_layer_norm)", r"\1_text_model_", new)
        new = f"{unet.get(new, new)}{dot}{rest}"
        first = found.setdefault(new, name)
        if first != name:
            raise UserError(f"{source or 'the file'} has {new} twice ({first} and {name}): save one adapter")
    return {new: weights[name] for new, name in found.items()}
