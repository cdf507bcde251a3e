"""Compares the tensors of a model, on disk or to be written, with those that its configurations build."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from library.errors import UserError, named
from library.models import keys
from library.models.building import build_part
from library.models.checkpoint import UNET, VAE, WHOLE, Checkpoint, tensor_name
from library.models.layout import TEXT_ROOT, TRAINING_ONLY, Layout, Plan, plan_of_part

# Beginnings of the names of layers, in original-layout files without the prefix of the part, and in Diffusers' names.
LAYERS = {
    UNET: re.compile(
        r"(input_blocks|middle_block|output_blocks|out|time_embed|label_emb|down_blocks|mid_block|up_blocks|conv_in|"
        r"conv_out|conv_norm_out|time_embedding|add_embedding|class_embedding)\."
    ),
    VAE: re.compile(r"(encoder|decoder|quant_conv|post_quant_conv)\."),
}
TEXT_LAYER = re.compile(r"(?:text_model\.)?(?:encoder\.layers|transformer\.resblocks)\.(\d+)\.")


def parts_of(checkpoint: Checkpoint) -> list[str]:
    """Return the parts of a model as named in a folder; the VAE may be missing."""
    own = (name for name in checkpoint.shapes if name.startswith(keys.VAE_PREFIX)) if WHOLE in checkpoint.parts else ()
    has_vae = VAE in checkpoint.parts or any(not name.startswith(TRAINING_ONLY) for name in own)
    return [UNET, *([VAE] if has_vae else []), *(text.folder for text in checkpoint.family.text_models)]


def diffusers_names(model: nn.Module) -> dict[str, str]:
    """Return name in Diffusers folders -> name in a module, for all tensors that are in files.

    Since transformers 5.6, CLIPTextModel has no submodule `text_model`.
    """
    from transformers import CLIPTextModel

    root = TEXT_ROOT if isinstance(model, CLIPTextModel) and not hasattr(model, "text_model") else ""
    return {f"{root}{name}": name for name in model.state_dict() if not name.endswith("position_ids")}


def whole_plan(checkpoint: Checkpoint) -> Plan:
    """Return Diffusers name (with the part) -> piece for all tensors that the parts of a model build.

    Raises UserError, with their names, for tensors that are missing, of another shape, or those of layers that the
    parts do not have.
    """
    plan: Plan = {}
    for part in parts_of(checkpoint):
        model = build_part(checkpoint, part)
        names, state = diffusers_names(model), model.state_dict()
        own = plan_of_part(checkpoint, part, {name: tuple(state[inner].shape) for name, inner in names.items()})
        check_missing(checkpoint, part, [name for name in names if name not in own])
        check_surplus(checkpoint, part, own)
        plan |= {tensor_name(part, name): piece for name, piece in own.items()}
    return plan


def check_missing(checkpoint: Checkpoint, part: str, missing: list[str]) -> None:
    """Raise UserError for tensors of a part that a model lacks, by their Diffusers names."""
    if not missing:
        return
    one, verb = ("it", "is") if len(missing) == 1 else ("the first", "are")
    place = None if part in checkpoint.parts else next(Layout(checkpoint).candidates(part, missing[0]), None)
    own = f" (as Diffusers names tensors; in the file {one} would be {place.name})" if place is not None else ""
    names = named([tensor_name(part, name) for name in missing])
    raise UserError(f"{checkpoint.path} is incomplete: {names} {verb} missing{own}")


def check_surplus(checkpoint: Checkpoint, part: str, plan: Plan) -> None:
    """Raise UserError for tensors of layers that the plan of a part does not use: without them it is another model.

    The last layers of OpenCLIP in original-layout files, which training did not use, are none of them.
    """
    used = {place.name for piece in plan.values() for place in piece.places}
    pattern = LAYERS.get(part, TEXT_LAYER)
    matches = {name: pattern.match(own) for own, name in own_names(checkpoint, part).items() if name not in used}
    surplus = [name for name, match in matches.items() if match and part in LAYERS]
    if part not in LAYERS:
        text = checkpoint.family.text_model(part)
        layers = {int(match[1]) for match in map(TEXT_LAYER.match, plan) if match}
        known = len(layers) + (0 if part in checkpoint.parts else text.unused_layers)
        surplus = [name for name, match in matches.items() if match and int(match[1]) >= known]
    if surplus:
        source = "configuration of its {} describes" if part in checkpoint.parts else "other tensors of its {} describe"
        raise UserError(f"{checkpoint.path} has {named(surplus)}, but the {source.format(part)} no such layers")


def own_names(checkpoint: Checkpoint, part: str) -> dict[str, str]:
    """Return name in a part -> name in the model, for all tensors of the part."""
    if part in checkpoint.parts:
        return {name: tensor_name(part, name) for name in checkpoint.parts[part].shapes}
    prefixes = {UNET: (keys.UNET_PREFIX,), VAE: (keys.VAE_PREFIX, "")}
    prefixes |= {text.folder: text.prefixes for text in checkpoint.family.text_models}
    prefix = keys.first_prefix(prefixes[part], checkpoint.shapes)
    names = checkpoint.shapes if prefix is not None else ()
    return {name[len(prefix or "") :]: name for name in names if name.startswith(prefix or "")}


def check_result(result: Checkpoint, source: Checkpoint, plan: Plan) -> None:
    """Raise UserError if a model that is to be written would not be opened as the one that it is made of.

    plan is the source's. Result and source may differ only in axes of one element: linear layers and 1x1 convolutions.
    """
    try:
        found = whole_plan(result)
        difference = first_difference(shapes_of(found), shapes_of(plan))
        if difference is not None:
            raise UserError(f"{result.path} would be read without {difference}, or with another shape of it")
    except UserError as error:
        raise UserError(f"{source.path} cannot be written to {result.path}, which would be wrong: {error}") from None


def shapes_of(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Return name -> sizes other than one."""
    return {name: tuple(size for size in piece.shape if size != 1) for name, piece in plan.items()}


def first_difference(one: dict[str, tuple[int, ...]], other: dict[str, tuple[int, ...]]) -> str | None:
    """Return the first name whose shapes differ in two tables, or that is in one only."""
    names: Iterable[str] = sorted(one.keys() | other.keys())
    return next((name for name in names if one.get(name) != other.get(name)), None)
