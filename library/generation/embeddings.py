"""Textual inversion: the words of embedding files, in prompts."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from library.errors import UserError
from library.file_kinds import PICKLE, weight_format
from library.networks.third_party import words_in
from library.pickles import load_pickle
from library.weight_file import EMBEDDING, read_weights

if TYPE_CHECKING:
    from library.models.base import TextEncoder, TextModule

logger = logging.getLogger(__name__)


def with_embeddings(encoder: TextEncoder, paths: Sequence[Path]) -> TextEncoder:
    """Return a text encoder that knows the words of textual inversion; a word of several vectors is expanded.

    A word is the name of its file, or what a LoRA file that brings embeddings along calls it. Raises UserError for a
    file that holds no embedding for this text encoder.
    """
    if not paths:
        return encoder
    from diffusers.loaders import TextualInversionLoaderMixin

    tokenizer: Any = encoder.tokenizer  # transformers and diffusers disagree on its type
    for path in paths:
        for word, vectors in embeddings_of(path).items():
            add_word(tokenizer, embedding_layer(encoder.module), word, vectors, path)
    mixin = TextualInversionLoaderMixin()
    return dataclasses.replace(encoder, expand=lambda text: mixin.maybe_convert_prompt(text, tokenizer))


def add_word(tokenizer: Any, layer: torch.nn.Embedding, word: str, vectors: torch.Tensor, path: Path) -> None:
    """Make vectors (N, D) of a file the meaning of a word; raises UserError for another width, or a known word."""
    width = layer.embedding_dim
    if vectors.shape[1] != width:
        raise UserError(
            f"--textual_inversion_embeddings: {path} has vectors of {vectors.shape[1]} numbers, this model {width}"
        )
    words = [word, *(f"{word}_{index}" for index in range(1, len(vectors)))]
    known = tokenizer.get_vocab()
    taken = next((word for word in words if word in known), None)
    if taken is not None:
        advice = f"rename {path}" if word == path.stem else f"{path} calls it so: leave one of the two out"
        raise UserError(f"--textual_inversion_embeddings: the word {taken!r} is in the vocabulary: {advice}")
    tokenizer.add_tokens(words)
    add_vectors(layer, tokenizer.convert_tokens_to_ids(words), vectors)
    logger.info("%s: %d vectors, in prompts as %r", path, len(vectors), word)


def embeddings_of(path: Path) -> dict[str, torch.Tensor]:
    """Return word -> vectors (N, D) of a file: one embedding under its name, or those that a LoRA file brings along.

    An embedding has `emb_params`, `string_to_param`, or one tensor.
    """
    content = load_pickle(path) if weight_format(path) == PICKLE else read_weights(path)
    if isinstance(content, dict) and (words := words_in([name for name in content if isinstance(name, str)])):
        return {word: vectors_of(parts_of(content, f"{EMBEDDING}{word}."), path) for word in words}
    if isinstance(content, dict) and isinstance(content.get("string_to_param"), dict):
        content = content["string_to_param"]
    return {path.stem: vectors_of(content if isinstance(content, dict) else {}, path)}


def parts_of(content: Mapping[str, Any], beginning: str) -> dict[str, Any]:
    """Return what follows a beginning in names; of embeddings for two text encoders that of the smaller one."""
    parts = {name.removeprefix(beginning): value for name, value in content.items() if name.startswith(beginning)}
    return {"clip_l": parts["clip_l"]} if "clip_l" in parts else parts


def vectors_of(content: Mapping[str, Any], path: Path) -> torch.Tensor:
    """Return the vectors (N, D) of an embedding, its first tensor; raises UserError where there are none."""
    tensors = [value for value in content.values() if torch.is_tensor(value)]
    if not tensors or tensors[0].ndim not in (1, 2):
        raise UserError(f"--textual_inversion_embeddings: {path} holds no embedding")
    vectors = tensors[0].detach().float()
    return vectors[None] if vectors.ndim == 1 else vectors


def embedding_layer(module: TextModule) -> torch.nn.Embedding:
    """Return the layer that holds the vectors of all tokens."""
    layer = module.get_input_embeddings()
    assert isinstance(layer, torch.nn.Embedding)
    return layer


@torch.no_grad()
def add_vectors(layer: torch.nn.Embedding, ids: Sequence[int], vectors: torch.Tensor) -> None:
    """Make vectors (N, D) the embeddings of N new token ids, which follow those that there are."""
    missing = max(ids) + 1 - layer.num_embeddings
    if missing > 0:
        zeros = layer.weight.new_zeros(missing, layer.embedding_dim)
        layer.weight = torch.nn.Parameter(torch.cat([layer.weight, zeros]), requires_grad=False)
        layer.num_embeddings += missing
    layer.weight[list(ids)] = vectors.to(layer.weight)
