"""The layers that networks change: their names in every kind of file, their blocks, and their tensors in a base model.

A layer is identified by its part and its path in diffusers (`unet`, `mid_block.attentions.0.proj_in`). In files of the
suite its name is one word with a prefix (`lora_unet_mid_block_attentions_0_proj_in`), for SDXL's U-Net with the path in
the checkpoint (`lora_unet_middle_block_1_proj_in`); in files of diffusers and PEFT it is part and path.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from library.models import keys
from library.models.checkpoint import UNET, Checkpoint
from library.models.family import ModelFamily
from library.models.layout import TEXT_ROOT, Layout, Place, unet_rule

UNET_WORD = "lora_unet_"


class Inside(NamedTuple):
    """The layers of one sort by their paths in diffusers: of a U-Net, and within its blocks and those of encoders."""

    edges: Sequence[str]
    resnet: Sequence[str]
    attention: Sequence[str]
    transformer: Sequence[str]
    sampler: Sequence[str]
    text: Sequence[str]
    text_edges: Sequence[str] = ()


MATRICES = Inside(
    edges=("conv_in", "conv_out", *(f"{at}_embedding.linear_{n}" for at in ("time", "add") for n in (1, 2))),
    resnet=("conv1", "time_emb_proj", "conv2", "conv_shortcut"),
    attention=("proj_in", "proj_out"),
    transformer=(
        *(f"attn{n}.{layer}" for n in (1, 2) for layer in ("to_q", "to_k", "to_v", "to_out.0")),
        *("ff.net.0.proj", "ff.net.2"),
    ),
    sampler=("conv",),
    text=("mlp.fc1", "mlp.fc2", *(f"self_attn.{layer}_proj" for layer in ("q", "k", "v", "out"))),
)
NORMS = Inside(
    edges=("conv_norm_out",),
    resnet=("norm1", "norm2"),
    attention=("norm",),
    transformer=("norm1", "norm2", "norm3"),
    sampler=(),
    text=("layer_norm1", "layer_norm2"),
    text_edges=("final_layer_norm",),
)
MOST_TRANSFORMERS = 10  # in one attention of SDXL


class Block(NamedTuple):
    """A block of a base model, numbered as in checkpoints: `input_blocks.4` is in 4, `output_blocks.0` is out 0.

    text is all text encoders, first the embeddings of time and size, last the layers after the output blocks.
    """

    side: Literal["text", "first", "in", "middle", "out", "last"]
    number: int = 0

    @property
    def title(self) -> str:
        """The block of diffusers that contains it: down 1, middle, up 0."""
        stages = {"in": f"down {(self.number - 1) // 3}", "middle": "middle", "out": f"up {self.number // 3}"}
        return "edges" if self == Block("in") else stages.get(self.side, "edges")


# Pattern of a U-Net module after its prefix, with the path of diffusers or of checkpoints; its block if all captured
# numbers are 0; how much each captured number adds to the block's number.
BLOCKS: tuple[tuple[str, Block, tuple[int, ...]], ...] = (
    (r"down_blocks_(\d+)_(?:resnets|attentions)_(\d+)_", Block("in", 1), (3, 1)),
    (r"down_blocks_(\d+)_downsamplers_0_", Block("in", 3), (3,)),
    (r"mid_block_resnets_(\d+)_", Block("middle"), (2,)),
    (r"mid_block_attentions_0_", Block("middle", 1), ()),
    (r"up_blocks_(\d+)_(?:resnets|attentions)_(\d+)_", Block("out"), (3, 1)),
    (r"up_blocks_(\d+)_upsamplers_0_", Block("out", 2), (3,)),
    (r"input_blocks_(\d+)_", Block("in"), (1,)),
    (r"middle_block_(\d+)_", Block("middle"), (1,)),
    (r"output_blocks_(\d+)_", Block("out"), (1,)),
    (r"conv_in$", Block("in"), ()),
    (r"time_embed|label_emb|add_embedding_", Block("first"), ()),
    (r"out_|conv_norm_out$|conv_out$", Block("last"), ()),
)


def block_of(module: str) -> Block | None:
    """Return the block of a module by its name in one word (`lora_unet_...`); None for a name of no block."""
    if module.startswith("lora_te"):
        return Block("text")
    word = module.removeprefix(UNET_WORD)
    for pattern, first, steps in BLOCKS if word != module else ():
        match = re.match(pattern, word)
        if match:
            added = sum(int(number) * step for number, step in zip(match.groups(), steps, strict=True))
            return Block(first.side, first.number + added)
    return None


POINTWISE = re.compile(r".*\.(proj_in|proj_out|conv_shortcut)$")  # 1x1 convolutions, the first two in SD 1.x only
CONVOLUTION = re.compile(r"(.*\.)?(conv\d?|conv_in|conv_out|conv_shortcut)$")


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of a base model."""

    part: str  # a folder of a Diffusers model: unet, text_encoder or text_encoder_2
    path: str  # in diffusers; for a text encoder without `text_model.`

    @property
    def block(self) -> Block | None:
        """The block that it is in."""
        return block_of(UNET_WORD + self.path.replace(".", "_")) if self.part == UNET else Block("text")

    def kernel(self, family: ModelFamily) -> Literal["linear", "pointwise", "large"]:
        """Return whether it is linear, a 1x1 convolution, or a larger one, in models of a family."""
        if self.part == UNET and POINTWISE.match(self.path):
            is_linear = family.unet["use_linear_projection"] and "conv" not in self.path
            return "linear" if is_linear else "pointwise"
        return "large" if self.part == UNET and CONVOLUTION.match(self.path) else "linear"


@functools.cache
def layers_of(family: ModelFamily) -> tuple[Layer, ...]:
    """Return all linear layers and convolutions that models of a family may have."""
    return tuple(_layers_in(family, MATRICES))


@functools.cache
def norms_of(family: ModelFamily) -> tuple[Layer, ...]:
    """Return all normalisations that models of a family may have, some of which LyCORIS trains."""
    return tuple(_layers_in(family, NORMS))


def _layers_in(family: ModelFamily, inside: Inside) -> Iterator[Layer]:
    yield from (Layer(UNET, path) for path in _unet_paths(len(family.unet["block_out_channels"]), inside))
    for text in family.text_models:
        for index in range(text.config["num_hidden_layers"]):
            yield from (Layer(text.folder, f"encoder.layers.{index}.{layer}") for layer in inside.text)
        yield from (Layer(text.folder, layer) for layer in inside.text_edges)


def _unet_paths(num_blocks: int, inside: Inside) -> Iterator[str]:
    yield from inside.edges
    sides = [(f"{side}_blocks.{index}", 3, 3) for side in ("down", "up") for index in range(num_blocks)]
    for block, resnets, attentions in [*sides, ("mid_block", 2, 1)]:
        yield from (f"{block}.resnets.{index}.{layer}" for index in range(resnets) for layer in inside.resnet)
        for attention in (f"{block}.attentions.{index}" for index in range(attentions)):
            yield from (f"{attention}.{layer}" for layer in inside.attention)
            for depth in range(MOST_TRANSFORMERS):
                yield from (f"{attention}.transformer_blocks.{depth}.{layer}" for layer in inside.transformer)
        if block != "mid_block":
            sampler = "downsamplers" if block.startswith("down") else "upsamplers"
            yield from (f"{block}.{sampler}.0.{layer}" for layer in inside.sampler)


# --------------------------------------------------------------------------------------------------------------
# Names in files of networks
# --------------------------------------------------------------------------------------------------------------


def module_name(layer: Layer, family: ModelFamily) -> str:
    """Return the name in files of the suite and of sd-scripts."""
    by_checkpoint = family.has_checkpoint_paths and layer.part == UNET
    return _checkpoint_word(layer, family) if by_checkpoint else diffusers_word(layer, family)


def diffusers_word(layer: Layer, family: ModelFamily) -> str:
    """Return the name in one word with the path of diffusers, also for SDXL's U-Net."""
    path = layer.path if layer.part == UNET else f"text_model.{layer.path}"
    return _prefix(layer, family) + path.replace(".", "_")


def peft_name(layer: Layer) -> str:
    """Return the name in files of diffusers and PEFT."""
    return f"{layer.part}.{layer.path}" if layer.part == UNET else f"{layer.part}.text_model.{layer.path}"


def _checkpoint_word(layer: Layer, family: ModelFamily) -> str:
    name = next(unet_rule(family, {})(f"{layer.path}.")).name.removeprefix(keys.UNET_PREFIX)
    return UNET_WORD + name.removesuffix(".").replace(".", "_")


def _prefix(layer: Layer, family: ModelFamily) -> str:
    words = {text.folder: text.lora_prefix for text in family.text_models}
    return UNET_WORD if layer.part == UNET else words[layer.part]


@functools.cache
def layers_by_name(family: ModelFamily) -> Mapping[str, Layer]:
    """Return name in any kind of file -> layer."""
    names: dict[str, Layer] = {}
    for layer in layers_of(family):
        names[diffusers_word(layer, family)] = names[peft_name(layer)] = layer
        if layer.part == UNET:
            names[_checkpoint_word(layer, family)] = layer
        else:  # without text_model, as since transformers 5.6
            names[_prefix(layer, family) + layer.path.replace(".", "_")] = layer
            names[f"{layer.part}.{layer.path}"] = layer
    return names


# End of a path -> the same in files of old diffusers: of the U-Net, of text encoders.
OLD_WORDS = (
    ("to_out_0", "to_out"),
    ("self_attn_q_proj", "self_attn_to_q"),
    ("self_attn_k_proj", "self_attn_to_k"),
    ("self_attn_v_proj", "self_attn_to_v"),
    ("self_attn_out_proj", "self_attn_to_out"),
    ("self_attn_out_proj", "self_attn_to_out_0"),
)


@functools.cache
def layers_by_word(family: ModelFamily) -> Mapping[tuple[str, str], Layer]:
    """Return (part, path with underscores as any program writes it) -> linear layer or convolution."""
    return _by_word(layers_of(family), family)


@functools.cache
def norms_by_word(family: ModelFamily) -> Mapping[tuple[str, str], Layer]:
    """Return the same for normalisations."""
    return _by_word(norms_of(family), family)


def _by_word(layers: Sequence[Layer], family: ModelFamily) -> Mapping[tuple[str, str], Layer]:
    words: dict[tuple[str, str], Layer] = {}
    for layer in layers:
        for word in _words(layer, family):
            words[layer.part, word] = layer
            for present, old in OLD_WORDS:
                if word.endswith(present):
                    words[layer.part, word.removesuffix(present) + old] = layer
    return words


def _words(layer: Layer, family: ModelFamily) -> tuple[str, str]:
    word = layer.path.replace(".", "_")
    if layer.part == UNET:
        return word, _checkpoint_word(layer, family).removeprefix(UNET_WORD)
    return word, f"text_model_{word}"


# --------------------------------------------------------------------------------------------------------------
# Places in base models
# --------------------------------------------------------------------------------------------------------------


def places(model: Checkpoint) -> dict[Layer, Place]:
    """Return the place of the weight of every linear layer and convolution that a model has."""
    layout = Layout(model)
    found = {layer: place_of(layout, layer, "weight") for layer in layers_of(model.family)}
    return {layer: place for layer, place in found.items() if place is not None}


def place_of(layout: Layout, layer: Layer, kind: Literal["weight", "bias"]) -> Place | None:
    """Return the place of the weight or bias of any layer in a model, None if it has none."""
    root = "" if layer.part == UNET else TEXT_ROOT
    return layout.find(layer.part, f"{root}{layer.path}.{kind}")
