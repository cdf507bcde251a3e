"""Configurations of the parts of a checkpoint, from its shapes, and models built from them on the meta device."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from library.errors import UserError, is_out_of_memory, message_of
from library.models import keys
from library.models.checkpoint import UNET, VAE, WHOLE, Checkpoint, read_config, stored_configuration
from library.models.family import TEXT_HEAD_WIDTH, ModelFamily, Shapes, TextModel
from library.models.structure import unet_structure

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from torch import nn
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

KINDS = {UNET: "UNet2DConditionModel", VAE: "AutoencoderKL"}  # in diffusers
NUM_GROUPS = 32  # of the group norms of published models


class TextNames(NamedTuple):
    """Names in a text encoder of an original file that tell its sizes, without the prefix of the part."""

    tokens: str
    positions: str
    mlp: str
    layers: str  # beginning of the names in its layers


TEXT_NAMES = {
    "clip": TextNames(
        "embeddings.token_embedding.weight",
        "embeddings.position_embedding.weight",
        "encoder.layers.0.mlp.fc1.weight",
        "encoder.layers.",
    ),
    "openclip": TextNames(
        "token_embedding.weight",
        "positional_embedding",
        "transformer.resblocks.0.mlp.c_fc.weight",
        "transformer.resblocks.",
    ),
}
PROJECTIONS = ("text_projection.weight", "text_projection.weight.weight")  # of linear layers
OPENCLIP_HEAD = ("text_projection", *PROJECTIONS, "logit_scale")  # behind the layers


def config_of(checkpoint: Checkpoint, part: str) -> dict[str, Any]:
    """Return the Diffusers configuration of a part: of the folder, else from the shapes and the file's metadata.

    Raises UserError for a part that is missing or incomplete.
    """
    folder = checkpoint.folder_of(part)
    if folder is None and checkpoint.is_folder and part not in checkpoint.parts:
        folder = checkpoint.path / part
    if folder is not None:
        return read_config(folder)
    stored = stored_configuration(checkpoint.metadata, part) if WHOLE in checkpoint.parts else {}
    try:
        config = detected_config(checkpoint, part)
    except UserError:
        if not stored:
            raise
        config = published_config(checkpoint.family, part)  # the metadata have all that differs
    config |= stored
    check_groups(config, part, checkpoint.path)
    return config


def published_config(family: ModelFamily, part: str) -> dict[str, Any]:
    """Return the Diffusers configuration of a part of the published models."""
    rows = {UNET: family.unet, VAE: family.vae} | {text.folder: text.config for text in family.text_models}
    return dict(rows[part])


def detected_config(checkpoint: Checkpoint, part: str) -> dict[str, Any]:
    """Return the Diffusers configuration of a part of a file from its names and shapes alone.

    What they do not tell is that of the published models. Raises UserError for a part that is missing or incomplete.
    """
    family = checkpoint.family
    if part == UNET:
        shapes = keys.without_prefix(checkpoint.shapes, keys.UNET_PREFIX)
        with refused(checkpoint.path, "U-Net", keys.UNET_PREFIX):
            return unet_config(family, shapes)
    if part == VAE:
        vae_prefix, vae = vae_shapes(checkpoint)
        with refused(checkpoint.path, "VAE", vae_prefix):
            return vae_config(family, vae)
    text = family.text_model(part)
    prefix = keys.first_prefix(text.prefixes, checkpoint.shapes)
    if prefix is None:
        raise UserError(
            f"{checkpoint.path} has no text encoder (nothing under {text.prefixes[0]}); name a whole checkpoint"
        )
    with refused(checkpoint.path, "text encoder", prefix):
        return text_config(text, keys.without_prefix(checkpoint.shapes, prefix))


@functools.cache
def defaults_of(part: str) -> Mapping[str, Any]:
    """Return the settings that diffusers or transformers takes for those that the configuration of a part lacks."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextConfig

    kinds = {UNET: UNet2DConditionModel, VAE: AutoencoderKL}
    if part not in kinds:
        return CLIPTextConfig().to_dict()
    return {name: parameter.default for name, parameter in inspect.signature(kinds[part]).parameters.items()}


def vae_shapes(checkpoint: Checkpoint) -> tuple[str, Shapes]:
    """Return (prefix, original names without it -> shapes) of the VAE in a file of either layout."""
    if WHOLE not in checkpoint.parts:  # a file in Diffusers names
        shapes = {name.removeprefix(f"{VAE}/"): shape for name, shape in checkpoint.shapes.items()}
        rule = keys.vae_rule(count(shapes, "encoder.down_blocks.", 2))
        return "", {rule(name): shape for name, shape in shapes.items()}
    if not keys.holds_vae(checkpoint.shapes):
        raise UserError(f"{checkpoint.path} has no VAE: name one with --vae")
    prefix = keys.VAE_PREFIX if any(name.startswith(keys.VAE_PREFIX) for name in checkpoint.shapes) else ""
    return prefix, keys.without_prefix(checkpoint.shapes, prefix)


def check_groups(config: Mapping[str, Any], part: str, path: Path) -> None:
    """Raise UserError for a model of unusual sizes, since its other settings are unknown."""
    groups = config.get("norm_num_groups", NUM_GROUPS)
    if any(channels % groups for channels in config.get("block_out_channels", ())):
        raise UserError(
            f"{path} is not a Stable Diffusion model of the usual sizes ({part}: {config['block_out_channels']} "
            "channels), and its groups and heads are not in the file; converting its folder to .safetensors keeps them"
        )


def unet_config(family: ModelFamily, shapes: Shapes) -> dict[str, Any]:
    """Return the U-Net's Diffusers configuration for the tensors (names without prefix) of a checkpoint."""
    found = unet_structure(shapes).settings()
    starts = [keys.block_bounds(found["layers_per_block"], at)[0] for at in range(len(found["down_block_types"]))]
    channels = tuple(shapes[f"input_blocks.{start + 1}.0.out_layers.3.weight"][0] for start in starts)
    context = next((shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")), None)
    if context is None:
        raise KeyError("input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight")
    heads = family.unet["attention_head_dim"]
    if family.unet_head_width is not None:
        heads = tuple(max(1, count // family.unet_head_width) for count in channels)
    projection = next((shape for name, shape in shapes.items() if name.endswith(".1.proj_in.weight")), ())
    time_width = size_in(shapes, "time_embed.0.weight", 0, 4 * channels[0])
    found |= {
        "block_out_channels": channels,
        "cross_attention_dim": context,
        "attention_head_dim": heads,
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": size_in(shapes, "out.2.weight", 0, family.unet["out_channels"]),
        # Files of SD 2.x may have 1x1 convolutions in their place, which compute the same.
        "use_linear_projection": family.unet["use_linear_projection"] or len(projection) == 2,
        "time_embedding_dim": time_width if time_width != 4 * channels[0] else None,
    }
    if "addition_embed_type" in family.unet:
        usual = family.unet["projection_class_embeddings_input_dim"]
        found["projection_class_embeddings_input_dim"] = size_in(shapes, "label_emb.0.0.weight", 1, usual)
    usual_settings = {**defaults_of(UNET), **family.unet}
    return family.unet | {key: value for key, value in found.items() if value != usual_settings[key]}


def vae_config(family: ModelFamily, shapes: Shapes) -> dict[str, Any]:
    """Return the VAE's Diffusers configuration for the tensors (names without prefix) of a checkpoint."""
    num_blocks = count(shapes, "encoder.down.", 2)
    if not num_blocks:
        raise KeyError("encoder.down")
    channels = tuple(shapes[f"encoder.down.{block}.block.0.conv2.weight"][0] for block in range(num_blocks))
    has_attention = any(name.startswith(("encoder.mid.attn_1.", "decoder.mid.attn_1.")) for name in shapes)
    found: dict[str, Any] = {
        "in_channels": size_in(shapes, "encoder.conv_in.weight", 1, family.vae["in_channels"]),
        "out_channels": size_in(shapes, "decoder.conv_out.weight", 0, family.vae["out_channels"]),
        "latent_channels": size_in(shapes, "decoder.conv_in.weight", 1, family.vae["latent_channels"]),
        "block_out_channels": channels,
        "layers_per_block": count(shapes, "encoder.down.0.block.", 4),
        "down_block_types": ("DownEncoderBlock2D",) * num_blocks,
        "up_block_types": ("UpDecoderBlock2D",) * num_blocks,
    }
    return family.vae | found | ({} if has_attention else {"mid_block_add_attention": False})


def text_encoder_config(text: TextModel, *, width: int, inner_width: int, num_layers: int) -> dict[str, Any]:
    """Return a text encoder's configuration for hidden width, width inside the MLP, and number of layers."""
    return text.config | {
        "hidden_size": width,
        "intermediate_size": inner_width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": max(1, width // TEXT_HEAD_WIDTH),
        "projection_dim": min(text.config["projection_dim"], width),
    }


def text_config(text: TextModel, shapes: Shapes) -> dict[str, Any]:
    """Return a text encoder's configuration for the tensors (names without prefix) of an original file."""
    names = TEXT_NAMES[text.layout]
    width, inner_width = shapes[names.tokens][1], shapes[names.mlp][0]
    config = text_encoder_config(
        text, width=width, inner_width=inner_width, num_layers=used_layers(text, shapes, names.layers)
    )
    usual = text.config["max_position_embeddings"]
    config |= {
        "vocab_size": shapes[names.tokens][0],
        "max_position_embeddings": size_in(shapes, names.positions, 0, usual),
    }
    if text.has_projection:
        turned = size_in(shapes, "text_projection", 1, config["projection_dim"])  # OpenCLIP's own is transposed
        config["projection_dim"] = next((shapes[name][0] for name in PROJECTIONS if shapes.get(name)), turned)
    return config


def used_layers(text: TextModel, shapes: Shapes, layers: str) -> int:
    """Return the number of layers of a text encoder without those at the end that training did not use.

    Some converters cut these off. They also omit what OpenCLIP has behind the layers, so that tells which files have
    them, if the number of layers does not.
    """
    found = count(shapes, layers, layers.count("."))
    published = text.config["num_hidden_layers"]
    is_whole = found == published + text.unused_layers or any(name in shapes for name in OPENCLIP_HEAD)
    return found - text.unused_layers if is_whole and found != published else found


def size_in(shapes: Shapes, name: str, axis: int, otherwise: int) -> int:
    """Return a size of a tensor; if it is missing or has no such axis, another number.

    Building and filling the model then names the tensor.
    """
    shape = shapes.get(name, ())
    return shape[axis] if axis < len(shape) else otherwise


def count(shapes: Shapes, prefix: str, position: int) -> int:
    """Return the number of different words at a position of the dotted names that begin with a prefix."""
    return len({name.split(".")[position] for name in shapes if name.startswith(prefix)})


@contextlib.contextmanager
def refused(source: Path, part: str, prefix: str = "") -> Iterator[None]:
    """Turn missing tensors of a file and configurations that cannot be built into a UserError."""
    try:
        yield
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{source} has an incomplete {part}: {prefix}{error.args[0]} is missing") from None
    except Exception as error:  # of diffusers and transformers
        if is_out_of_memory(error):
            raise
        raise UserError(f"{source} describes no {part} that can be built: {message_of(error)}") from error


def build_part(checkpoint: Checkpoint, part: str) -> nn.Module:
    """Return the model of a part on the meta device; raises UserError if it cannot be built."""
    config = config_of(checkpoint, part)
    kind, needed = config.get("_class_name"), KINDS.get(part)
    if kind is not None and needed is not None and kind != needed:
        raise UserError(f"{checkpoint.path}: its {part} is of the kind {kind}, and only {needed} is read")
    folder = checkpoint.folder_of(part)
    source = checkpoint.path if folder is None else folder / "config.json"
    with refused(source, {UNET: "U-Net", VAE: "VAE"}.get(part, "text encoder") if folder is None else part):
        if part == UNET:
            return build_unet(config)
        if part == VAE:
            return build_vae(config)
        return build_text_encoder(config, has_projection=checkpoint.family.text_model(part).has_projection)


def build_unet(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """Return a U-Net on the meta device."""
    import torch
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel.from_config(dict(config))


def build_vae(config: Mapping[str, Any]) -> AutoencoderKL:
    """Return a VAE on the meta device, for use without gradients."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    from library.models.vae_blocks import change_in_place

    with torch.device("meta"):
        vae = AutoencoderKL.from_config(dict(config))
    change_in_place(vae)
    return vae


def build_text_encoder(
    config: Mapping[str, Any], *, has_projection: bool = False
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """Return a text encoder on the meta device; has_projection: with a matrix on the pooled output."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    known = {key: value for key, value in config.items() if key not in ("architectures", "dtype", "torch_dtype")}
    kind = CLIPTextModelWithProjection if has_projection else CLIPTextModel
    with torch.device("meta"):
        return kind(CLIPTextConfig(**known))
