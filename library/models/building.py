"""Configurations of the parts of a checkpoint, from its shapes, and models built from them on the meta device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError, message_of
from library.models import keys
from library.models.checkpoint import UNET, VAE, WHOLE, Checkpoint, read_config, stored_configuration
from library.models.family import TEXT_HEAD_WIDTH, ModelFamily, Shapes, TextModel

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from torch import nn
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

NUM_GROUPS = 32  # of the group norms of published models


def config_of(checkpoint: Checkpoint, part: str) -> dict[str, Any]:
    """Return the Diffusers configuration of a part: of the folder, else from the shapes and the file's metadata.

    Raises UserError for a part that is missing or incomplete.
    """
    folder = checkpoint.folder_of(part)
    if folder is None and checkpoint.is_folder and part not in checkpoint.parts:
        folder = checkpoint.path / part
    if folder is not None:
        return read_config(folder)
    family = checkpoint.family
    if part == UNET:
        shapes = keys.without_prefix(checkpoint.shapes, keys.UNET_PREFIX)
        with refused(checkpoint.path, "U-Net", keys.UNET_PREFIX):
            config = unet_config(family, shapes)
    elif part == VAE:
        vae_prefix, vae = vae_shapes(checkpoint)
        with refused(checkpoint.path, "VAE", vae_prefix):
            config = vae_config(family, vae)
    else:
        text = family.text_model(part)
        prefix = keys.first_prefix(text.prefixes, checkpoint.shapes)
        if prefix is None:
            raise UserError(
                f"{checkpoint.path} has no text encoder (nothing under {text.prefixes[0]}); name a whole checkpoint"
            )
        with refused(checkpoint.path, "text encoder", prefix):
            config = text_config(text, keys.without_prefix(checkpoint.shapes, prefix))
    if WHOLE in checkpoint.parts:
        config |= stored_configuration(checkpoint.metadata, part)
    check_groups(config, part, checkpoint.path)
    return config


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
    num_blocks = len(family.unet["block_out_channels"])
    per_block = family.unet["layers_per_block"] + 1
    channels = tuple(
        shapes[f"input_blocks.{per_block * block + 1}.0.out_layers.3.weight"][0] for block in range(num_blocks)
    )
    context = next((shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")), None)
    if context is None:
        raise KeyError("input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight")
    heads = family.unet["attention_head_dim"]
    if family.unet_head_width is not None:
        heads = tuple(max(1, count // family.unet_head_width) for count in channels)
    added = shapes.get("label_emb.0.0.weight")
    found: dict[str, Any] = {
        "block_out_channels": channels,
        "cross_attention_dim": context,
        "attention_head_dim": heads,
        "in_channels": shapes["input_blocks.0.0.weight"][1],
    }
    if added is not None:
        found["projection_class_embeddings_input_dim"] = added[1]
    if "transformer_layers_per_block" in family.unet:
        starts = (f"input_blocks.{per_block * block + 1}.1.transformer_blocks." for block in range(num_blocks))
        found["transformer_layers_per_block"] = tuple(max(1, count(shapes, start, 4)) for start in starts)
    return family.unet | found


def vae_config(family: ModelFamily, shapes: Shapes) -> dict[str, Any]:
    """Return the VAE's Diffusers configuration for the tensors (names without prefix) of a checkpoint."""
    num_blocks = count(shapes, "encoder.down.", 2)
    if not num_blocks:
        raise KeyError("encoder.down")
    channels = tuple(shapes[f"encoder.down.{block}.block.0.conv2.weight"][0] for block in range(num_blocks))
    return family.vae | {
        "block_out_channels": channels,
        "layers_per_block": count(shapes, "encoder.down.0.block.", 4),
        "down_block_types": ("DownEncoderBlock2D",) * num_blocks,
        "up_block_types": ("UpDecoderBlock2D",) * num_blocks,
    }


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
    embedding, mlp, layers = {
        "clip": ("embeddings.token_embedding.weight", "encoder.layers.0.mlp.fc1.weight", "encoder.layers."),
        "openclip": ("token_embedding.weight", "transformer.resblocks.0.mlp.c_fc.weight", "transformer.resblocks."),
    }[text.layout]
    width, inner_width, num_layers = shapes[embedding][1], shapes[mlp][0], count(shapes, layers, 2)
    if num_layers != text.config["num_hidden_layers"]:  # some converters omit unused layers
        num_layers -= text.unused_layers
    return text_encoder_config(text, width=width, inner_width=inner_width, num_layers=num_layers)


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
        raise UserError(f"{source} describes no {part} that can be built: {message_of(error)}") from error


def build_part(checkpoint: Checkpoint, part: str) -> nn.Module:
    """Return the model of a part on the meta device; raises UserError if it cannot be built."""
    config = config_of(checkpoint, part)
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
    """Return a VAE on the meta device."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    with torch.device("meta"):
        return AutoencoderKL.from_config(dict(config))


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
