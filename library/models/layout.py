"""Maps tensors of the Diffusers model to tensors of a checkpoint, or to parts of them, as a plan.

Loading fills empty modules by a plan, and converting writes files by it; merging and extracting look up single layers.
The naming rules are in `keys.py`. Tensors are named as in Diffusers folders: those of a text encoder begin with
`text_model.`, and its projection is `text_projection.weight`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from library.errors import UserError
from library.models import keys
from library.models.checkpoint import (
    EXTRAS,
    UNET,
    VAE,
    Checkpoint,
    names_in,
    read_config,
    split_name,
    stored_configuration,
    tensor_name,
)
from library.models.family import SD2, ModelFamily, Shapes, TextModel
from library.models.structure import unet_structure

if TYPE_CHECKING:
    import torch

TEXT_ROOT, PROJECTION, POSITION_IDS = "text_model.", "text_projection.weight", "position_ids"
# Prefixes of names that a Diffusers folder does not keep: weights used only in training.
TRAINING_ONLY = ("model_ema.", f"{keys.VAE_PREFIX}loss.")

Shape = tuple[int, ...]
Infos: TypeAlias = "Mapping[str, tuple[torch.dtype, Shape]]"  # name -> type and shape


class Place(NamedTuple):
    """A tensor of a checkpoint, or a part of it: third 0, 1, 2 of its rows is query, key, value of a fused one."""

    name: str
    third: int | None = None
    is_transposed: bool = False

    def part_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this part of a tensor."""
        part = tensor if self.third is None else tensor.chunk(3)[self.third]
        return part.T if self.is_transposed else part

    def shape_of(self, shape: Shape) -> Shape:
        """Return the shape of this part, for the shape of the tensor."""
        part = shape if self.third is None else (shape[0] // 3, *shape[1:])
        return part[::-1] if self.is_transposed else part


Rule = Callable[[str], Iterator[Place]]  # Diffusers name -> possible places in an original file, the usual one first


@dataclasses.dataclass(frozen=True)
class Piece:
    """How a tensor of a result is made: from the parts at some places, concatenated and reshaped; or a constant."""

    places: tuple[Place, ...]
    shape: Shape
    constant: torch.Tensor | None = None

    def make(self, *tensors: torch.Tensor) -> torch.Tensor:
        """Return the tensor, made from the tensors at the places."""
        import torch

        if self.constant is not None:
            return self.constant
        parts = [place.part_of(tensor) for place, tensor in zip(self.places, tensors, strict=True)]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole.reshape(self.shape).contiguous()


Plan = dict[str, Piece]  # name in the result -> its piece


class Content(NamedTuple):
    """What a file will contain: how its tensors are made, and their types and shapes."""

    plan: Plan
    infos: Infos


@dataclasses.dataclass(frozen=True)
class Layout:
    """The places of Diffusers names in one checkpoint."""

    checkpoint: Checkpoint

    def find(self, part: str, name: str) -> Place | None:
        """Return the place of a tensor of a part, or None."""
        has = self.checkpoint.shape_of
        return next((place for place in self.candidates(part, name) if has(place.name) is not None), None)

    def candidates(self, part: str, name: str) -> Iterator[Place]:
        """Yield the possible places of a tensor of a part, the usual one first."""
        if part in self.checkpoint.parts:
            names = (name, name.removeprefix(TEXT_ROOT), keys.vae_old_diffusers_name(name))
            yield from (Place(tensor_name(part, candidate)) for candidate in dict.fromkeys(names))
            return
        try:
            yield from self.rules[part](name)
        except KeyError:  # the name has no place
            return

    @functools.cached_property
    def rules(self) -> dict[str, Rule]:
        """The naming rule of each part in original-layout files, for the structure of this model."""
        family = self.checkpoint.family
        rules = {UNET: unet_rule(family, self._settings(UNET)), VAE: vae_rule(self._num_vae_levels())}
        return rules | {text.folder: text_rule(text) for text in family.text_models}

    def _settings(self, part: str) -> Mapping[str, object]:
        folder = self.checkpoint.folder_of(part)
        if folder is not None:
            return read_config(folder)
        if self.checkpoint.is_folder:
            return {}
        found: dict[str, object] = {}
        if part == UNET:
            with contextlib.suppress(KeyError):  # a file with a gap has the places of the published models
                found = unet_structure(keys.without_prefix(self.checkpoint.shapes, keys.UNET_PREFIX)).settings()
        return found | stored_configuration(self.checkpoint.metadata, part)

    def _num_vae_levels(self) -> int:
        if not self.checkpoint.is_folder:
            names = {name.removeprefix(keys.VAE_PREFIX) for name in self.checkpoint.shapes}
            return len({name.split(".")[2] for name in names if name.startswith("encoder.down.")})
        settings = self.checkpoint.family.vae | dict(self._settings(VAE))
        return len(settings["block_out_channels"])


def unet_rule(family: ModelFamily, settings: Mapping[str, object]) -> Rule:
    """Return the rule of a U-Net; settings override the configuration of the family."""
    config = family.unet | dict(settings)
    with_attention = frozenset(at for at, kind in enumerate(config["up_block_types"]) if "CrossAttn" in kind)
    rule = keys.unet_rule(config["layers_per_block"], with_attention)
    return lambda name: iter((Place(keys.UNET_PREFIX + rule(name)),))


def vae_rule(num_levels: int) -> Rule:
    """Return the rule of a VAE; in a separate file its names have no prefix."""
    rule = keys.vae_rule(num_levels)
    return lambda name: (Place(prefix + rule(keys.vae_present_name(name))) for prefix in (keys.VAE_PREFIX, ""))


def text_rule(text: TextModel) -> Rule:
    """Return the rule of a text encoder; OpenCLIP fuses query, key and value, and transposes the projection."""

    def places(name: str) -> Iterator[Place]:
        own = name.removeprefix(TEXT_ROOT)
        if text.layout == "openclip" and own.endswith(POSITION_IDS):  # not stored by OpenCLIP
            return
        for prefix in text.prefixes:
            if text.layout == "clip":
                if own != PROJECTION:  # a projection, which the family does not use
                    yield Place(prefix + own)
            elif own == PROJECTION:
                yield Place(f"{prefix}text_projection", is_transposed=True)
                yield Place(f"{prefix}{PROJECTION}")  # of a linear layer, as it is
                yield Place(f"{prefix}{PROJECTION}.weight")  # the same in Playground v2
            else:
                yield Place(prefix + keys.openclip_name(own), keys.fused_slice(own))

    return places


def plan_of_part(checkpoint: Checkpoint, part: str, shapes: Shapes) -> Plan:
    """Return Diffusers name -> piece for the tensors of a part, by name and shape; those without a place are omitted.

    A linear layer and a 1x1 convolution can replace each other. Raises UserError for other differences of shape.
    """
    layout, plan = Layout(checkpoint), {}
    for name, shape in shapes.items():
        place = layout.find(part, name)
        whole = None if place is None else checkpoint.shape_of(place.name)
        if place is None or whole is None:
            continue
        found = place.shape_of(whole)
        if [size for size in found if size != 1] != [size for size in shape if size != 1]:
            raise UserError(f"{checkpoint.path}: {place.name} has the shape {found}, {shape} is needed")
        plan[name] = Piece((place,), shape)
    return plan


def plan_to_original(checkpoint: Checkpoint, whole: Plan) -> Plan:
    """Return the plan of an original-layout file from a Diffusers folder and the plan of all its tensors.

    Raises UserError for a tensor that has no place in such a file.
    """
    layout, shapes = Layout(checkpoint), checkpoint.shapes
    sources = {name: piece.places[0].name for name, piece in whole.items()} | position_ids(checkpoint)
    thirds: dict[str, dict[int, Place]] = {}
    plan: Plan = {}
    for whole_name, source in sources.items():
        part, name = split_name(whole_name)
        try:
            place = next(layout.rules[part](name), None)
        except KeyError:
            raise UserError(f"{checkpoint.path} has {part}/{name}, without a place in a checkpoint") from None
        if place is None:
            continue
        if place.third is not None:
            thirds.setdefault(place.name, {})[place.third] = Place(source)
            continue
        shape = place.shape_of(shapes[source])
        if part == VAE and ".attentions." in name and len(shape) == 2:
            shape = (*shape, 1, 1)
        plan[place.name] = Piece((Place(source, is_transposed=place.is_transposed),), shape)
    for name, parts in thirds.items():
        places = tuple(parts[index] for index in range(3))
        rows, *rest = zip(*(shapes[place.name] for place in places), strict=True)
        plan[name] = Piece(places, (sum(rows), *(sizes[0] for sizes in rest)))
    kept = {
        name: Piece((Place(f"{EXTRAS}/{name}"),), shapes[f"{EXTRAS}/{name}"]) for name in names_in(checkpoint, EXTRAS)
    }
    # Tensors of the folder take precedence over those kept from a checkpoint, and these over placeholders.
    more = placeholders(plan, checkpoint.family) | kept
    return plan | {name: piece for name, piece in more.items() if name not in plan}


def position_ids(checkpoint: Checkpoint) -> dict[str, str]:
    """Return Diffusers name -> name in a folder of the indices that older versions of transformers stored."""
    return {
        tensor_name(part, TEXT_ROOT + name.removeprefix(TEXT_ROOT)): tensor_name(part, name)
        for part in (text.folder for text in checkpoint.family.text_models)
        for name in names_in(checkpoint, part)
        if name.endswith(POSITION_IDS)
    }


def placeholders(plan: Plan, family: ModelFamily) -> Plan:
    """Return the unused tensors that readers of original SD 2.x files expect.

    The last block is a copy of the one before; projection and scale are ones, as in files of sd-scripts.
    """
    import torch

    if family is not SD2:
        return {}
    text = SD2.text_models[0]
    prefix = text.prefixes[0]
    blocks = f"{prefix}transformer.resblocks."
    last = max((int(name[len(blocks) :].split(".")[0]) for name in plan if name.startswith(blocks)), default=0)
    copies = {
        f"{blocks}{last + 1}.{name.removeprefix(f'{blocks}{last}.')}": piece
        for name, piece in plan.items()
        if name.startswith(f"{blocks}{last}.") and last + 1 <= text.config["num_hidden_layers"]
    }
    width = plan[f"{prefix}token_embedding.weight"].shape[1]
    return copies | {
        f"{prefix}text_projection": Piece((), (width, width), torch.ones(width, width)),
        f"{prefix}logit_scale": Piece((), (), torch.tensor(1)),
    }


def copy_plan(checkpoint: Checkpoint) -> Plan:
    """Return the plan that keeps every tensor and its name."""
    return {name: Piece((Place(name),), shape) for name, shape in checkpoint.shapes.items()}


def unplaced(checkpoint: Checkpoint, plan: Plan) -> list[str]:
    """Return the tensors of a model that a plan does not use."""
    used = {place.name for piece in plan.values() for place in piece.places}
    return [name for name in checkpoint.shapes if name not in used]


def planned_infos(
    plan: Plan, checkpoint: Checkpoint, dtype: torch.dtype | None
) -> dict[str, tuple[torch.dtype, Shape]]:
    """Return type and shape of each tensor of a plan; dtype None keeps the types of the source."""
    import torch

    types = {name: own for name, own, _ in checkpoint.infos()}
    found = {}
    for name, piece in plan.items():
        sources = [types[place.name] for place in piece.places] or [piece.make().dtype]
        own = functools.reduce(torch.promote_types, sources)  # the parts of a joined tensor may differ
        found[name] = (dtype if dtype is not None and own.is_floating_point else own, piece.shape)
    return found


def planned_tensor(piece: Piece, checkpoint: Checkpoint, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor of a plan in a type."""
    return piece.make(*(checkpoint.read(place.name) for place in piece.places)).to(dtype)
