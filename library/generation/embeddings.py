"""Textual inversion: the words of embedding files, in prompts."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
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


def with_embeddings(encoders: tuple[TextEncoder, ...], paths: Sequence[Path]) -> tuple[TextEncoder, ...]:
    """Return text encoders that know the words of textual inversion; a word of several vectors is expanded.

    A word is the name of its file, or what a LoRA file that brings embeddings along calls it. Raises UserError for a
    file that lacks an embedding for one of the text encoders.
    """
    if not paths:
        return encoders
    for path in paths:
        for word, tensors in embeddings_of(path).items():
            parts = fitting(tensors, [embedding_layer(encoder.module).embedding_dim for encoder in encoders], path)
            for encoder, vectors in zip(encoders, parts, strict=True):
                add_word(encoder.tokenizer, embedding_layer(encoder.module), word, vectors, path)
            logger.info("%s: %d vectors, in prompts as %r", path, len(parts[0]), word)
    return tuple(dataclasses.replace(encoder, expand=expansion(encoder.tokenizer)) for encoder in encoders)


def expansion(tokenizer: Any) -> Callable[[str], str]:  # transformers and diffusers disagree on its type
    """Return what writes the tokens of words of several vectors out in a prompt."""
    from diffusers.loaders import TextualInversionLoaderMixin

    mixin = TextualInversionLoaderMixin()
    return lambda text: mixin.maybe_convert_prompt(text, tokenizer)


def fitting(tensors: Sequence[torch.Tensor], widths: Sequence[int], path: Path) -> list[torch.Tensor]:
    """Return the vectors (N, D) of an embedding for each text encoder, by their widths D.

    Raises UserError where there are none for one of them, or not as many for all.
    """
    by_width = {tensor.shape[1]: tensor for tensor in reversed(tensors)}
    if not by_width.keys() >= set(widths):
        raise UserError(
            f"--textual_inversion_embeddings: {path} has vectors of {numbers(by_width)} numbers, this model "
            f"{numbers(widths)}"
        )
    if others := by_width.keys() - set(widths):
        logger.warning("%s: its vectors of %s numbers are for another model and are not used", path, numbers(others))
    found = [by_width[width] for width in widths]
    if len({len(vectors) for vectors in found}) > 1:
        counts = numbers([len(vectors) for vectors in found])
        raise UserError(
            f"--textual_inversion_embeddings: {path} has {counts} vectors for the text encoders: as many are meant"
        )
    return found


def numbers(values: Iterable[int]) -> str:
    """Return numbers for a message."""
    return " and ".join(map(str, values))


def add_word(tokenizer: Any, layer: torch.nn.Embedding, word: str, vectors: torch.Tensor, path: Path) -> None:
    """Make vectors (N, D) of a file the meaning of a word; raises UserError for a word that is known."""
    words = [word, *(f"{word}_{index}" for index in range(1, len(vectors)))]
    known = tokenizer.get_vocab()
    taken = next((word for word in words if word in known), None)
    if taken is not None:
        advice = f"rename {path}" if word == path.stem else f"{path} calls it so: leave one of the two out"
        raise UserError(f"--textual_inversion_embeddings: the word {taken!r} is in the vocabulary: {advice}")
    tokenizer.add_tokens(words)
    add_vectors(layer, tokenizer.convert_tokens_to_ids(words), vectors)


def embeddings_of(path: Path) -> dict[str, list[torch.Tensor]]:
    """Return word -> tensors (N, D) of a file: one embedding under its name, or those that a LoRA file brings along.

    An embedding has `emb_params`, `string_to_param`, one tensor, or `clip_l` and `clip_g` for SDXL's text encoders.
    """
    content = load_pickle(path) if weight_format(path) == PICKLE else read_weights(path)
    if isinstance(content, dict) and (words := words_in([name for name in content if isinstance(name, str)])):
        return {word: vectors_of(parts_of(content, f"{EMBEDDING}{word}."), path) for word in words}
    if isinstance(content, dict) and isinstance(content.get("string_to_param"), dict):
        content = content["string_to_param"]
    return {path.stem: vectors_of(content if isinstance(content, dict) else {}, path)}


def parts_of(content: Mapping[str, Any], beginning: str) -> dict[str, Any]:
    """Return what follows a beginning in names."""
    return {name.removeprefix(beginning): value for name, value in content.items() if name.startswith(beginning)}


def vectors_of(content: Mapping[str, Any], path: Path) -> list[torch.Tensor]:
    """Return the tensors (N, D) of an embedding; raises UserError where there are none."""
    tensors = [value.detach().float() for value in content.values() if torch.is_tensor(value)]
    if not tensors or tensors[0].ndim not in (1, 2):
        raise UserError(f"--textual_inversion_embeddings: {path} holds no embedding")
    return [tensor[None] if tensor.ndim == 1 else tensor for tensor in tensors if tensor.ndim in (1, 2)]


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
