"""ControlNets and textual inversion, loaded from local files."""

from __future__ import annotations

import dataclasses
import json
import logging
import tempfile
from pathlib import Path

import torch

from library.config.generation import ControlConfig
from library.errors import UserError, message_of
from library.models.base import BaseModel, TextEncoder
from library.weight_file import open_weights, read_weights

logger = logging.getLogger(__name__)


def load_control_nets(config: ControlConfig, base: BaseModel, device: torch.device) -> tuple[torch.nn.Module, ...]:
    """Return the ControlNets of a run, in the U-Net's type."""
    return tuple(load_control_net(path, base).to(device) for path in config.control_net_models or ())


def load_control_net(path: Path, base: BaseModel) -> torch.nn.Module:
    """Return a ControlNet from a Diffusers folder, or a file in either layout; raises UserError for another thing.

    A file is read with the sizes of the model's U-Net, so that nothing is looked for on the network.
    """
    from diffusers import ControlNetModel

    dtype = base.unet.dtype
    try:
        if path.is_dir():
            return ControlNetModel.from_pretrained(path, torch_dtype=dtype, local_files_only=True)
        config = dict(ControlNetModel.from_unet(base.unet, load_weights_from_unet=False).config)
        names = open_weights(path).shapes
        if any(name.startswith("controlnet_cond_embedding.") for name in names):
            net = ControlNetModel.from_config(config)
            net.load_state_dict(read_weights(path))
            return net.to(dtype)
        if not any("input_hint_block" in name for name in names):
            raise UserError(f"--control_net_models: {path} is no ControlNet")
        with tempfile.TemporaryDirectory() as folder:
            text = json.dumps({key: value for key, value in config.items() if not key.startswith("_")})
            (Path(folder) / "config.json").write_text(text, encoding="utf-8")
            return ControlNetModel.from_single_file(str(path), config=folder, torch_dtype=dtype, local_files_only=True)
    except UserError:
        raise
    except Exception as error:  # each library has its own
        raise UserError(f"--control_net_models: {path} cannot be read as a ControlNet: {message_of(error)}") from error


def with_embeddings(config: ControlConfig, encoder: TextEncoder) -> TextEncoder:
    """Return a text encoder that knows the words of textual inversion; a word of several vectors is expanded.

    A word is the name of its file. Raises UserError for a file that holds no embedding for this text encoder.
    """
    if not config.textual_inversion_embeddings:
        return encoder
    from diffusers.loaders import TextualInversionLoaderMixin

    tokenizer, module = encoder.tokenizer, encoder.module
    width = module.get_input_embeddings().weight.shape[1]
    for path in config.textual_inversion_embeddings:
        vectors = embedding_of(path)
        if vectors.shape[1] != width:
            raise UserError(
                f"--textual_inversion_embeddings: {path} has vectors of {vectors.shape[1]} numbers, this model {width}"
            )
        words = [path.stem, *(f"{path.stem}_{index}" for index in range(1, len(vectors)))]
        known = tokenizer.get_vocab()
        taken = next((word for word in words if word in known), None)
        if taken is not None:
            raise UserError(f"--textual_inversion_embeddings: the word {taken!r} is in the vocabulary: rename {path}")
        tokenizer.add_tokens(words)
        add_vectors(module, tokenizer.convert_tokens_to_ids(words), vectors)
        logger.info("%s: %d vectors, in prompts as %r", path, len(vectors), path.stem)
    mixin = TextualInversionLoaderMixin()
    return dataclasses.replace(encoder, expand=lambda text: mixin.maybe_convert_prompt(text, tokenizer))


def embedding_of(path: Path) -> torch.Tensor:
    """Return the vectors (N, D) of an embedding file: `emb_params`, `string_to_param`, or its only tensor."""
    from library.pickles import PICKLE_SUFFIXES, load_pickle

    content = load_pickle(path) if path.suffix.lower() in PICKLE_SUFFIXES else read_weights(path)
    if isinstance(content, dict) and isinstance(content.get("string_to_param"), dict):
        content = content["string_to_param"]
    tensors = [value for value in content.values() if torch.is_tensor(value)] if isinstance(content, dict) else []
    if not tensors or tensors[0].ndim not in (1, 2):
        raise UserError(f"--textual_inversion_embeddings: {path} holds no embedding")
    vectors = tensors[0].detach().float()
    return vectors[None] if vectors.ndim == 1 else vectors


@torch.no_grad()
def add_vectors(encoder: torch.nn.Module, ids: list[int], vectors: torch.Tensor) -> None:
    """Make vectors the embeddings of new token ids, which follow those that there are."""
    layer = encoder.get_input_embeddings()
    missing = max(ids) + 1 - layer.weight.shape[0]
    if missing > 0:
        layer.weight = torch.nn.Parameter(
            torch.cat([layer.weight, layer.weight.new_zeros(missing, layer.weight.shape[1])]), requires_grad=False
        )
        layer.num_embeddings += missing
    layer.weight[ids] = vectors.to(layer.weight)
