"""Captions -> the text conditioning of the U-Net. Each family names its function in `ENCODERS`.

Letters: B captions, K windows of 77 tokens for a caption, D width of the text encoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from library.models.loading import LoadedModels, text_model
from library.models.tokenizer import WINDOW

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

PER_WINDOW = WINDOW - 2  # tokens of a window without BOS and EOS


@dataclasses.dataclass(frozen=True)
class TextConditioning:
    """What the U-Net is told: hidden states, and for families that have them further tensors by name."""

    hidden: Tensor  # (B, 75 K + 2, D)
    added: dict[str, Tensor] | None = None

    def unet_arguments(self, dtype: torch.dtype) -> dict[str, object]:
        """Return the keyword arguments of diffusers' U-Net."""
        added = None if self.added is None else {name: tensor.to(dtype) for name, tensor in self.added.items()}
        return {"encoder_hidden_states": self.hidden.to(dtype), "added_cond_kwargs": added}


def encode_text(
    models: LoadedModels, captions: Sequence[str], *, max_tokens: int | None = None, clip_skip: int | None = None
) -> TextConditioning:
    """Return the conditioning of captions as the model's family makes it; max_tokens is 75 (None), 150 or 225."""
    return ENCODERS[models.family.name](models, captions, max_tokens or PER_WINDOW, clip_skip)


def encode_with_one_encoder(
    models: LoadedModels, captions: Sequence[str], max_tokens: int, clip_skip: int | None
) -> TextConditioning:
    """Return the conditioning of SD 1.x and SD 2.x: the states of their one text encoder."""
    tokens = tokenize(models.tokenizers[0], captions, max_tokens)
    return TextConditioning(encode_tokens(models.text_encoders[0], tokens, clip_skip))


# Name of a family -> its function: (models, captions, max_tokens, clip_skip) -> conditioning.
ENCODERS: dict[str, Callable[[LoadedModels, Sequence[str], int, int | None], TextConditioning]] = {
    "sd1": encode_with_one_encoder,
    "sd2": encode_with_one_encoder,
}


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str], max_tokens: int = PER_WINDOW) -> Tensor:
    """Return token ids (B, K, 77) with K = max_tokens / 75; each window has its own BOS and an end.

    The end of a window is the last id of the whole padded caption. Where padding is not EOS (OpenCLIP), a
    window whose text fills it, or that holds nothing, ends or begins with EOS.
    """
    length = max_tokens + 2
    ids = tokenizer(
        list(captions), truncation=True, padding="max_length", max_length=length, return_tensors="pt"
    ).input_ids
    if max_tokens == PER_WINDOW:
        return ids[:, None, :]
    windows = []
    for start in range(1, length - 1, PER_WINDOW):
        windows.append(torch.cat([ids[:, :1], ids[:, start : start + PER_WINDOW], ids[:, -1:]], dim=1))
    stacked = torch.stack(windows, dim=1)
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    assert bool((stacked[:, :, 0] == bos).all())
    if pad != eos:
        full = (stacked[:, :, -2] != eos) & (stacked[:, :, -2] != pad)
        stacked[:, :, -1] = torch.where(full, eos, stacked[:, :, -1])
        empty = stacked[:, :, 1] == pad
        stacked[:, :, 1] = torch.where(empty, eos, stacked[:, :, 1])
    return stacked


def num_cut_captions(tokenizer: CLIPTokenizer, captions: Sequence[str], max_tokens: int) -> int:
    """Return how many captions have more tokens than are used."""
    if not captions:
        return 0
    return sum(len(ids) - 2 > max_tokens for ids in tokenizer(list(captions)).input_ids)


def encode_tokens(encoder: nn.Module, tokens: Tensor, clip_skip: int | None = None) -> Tensor:
    """Return the hidden states (B, 75 K + 2, D) for token ids (B, K, 77) of SD 1.x and SD 2.x.

    clip_skip n takes the n-th layer from the end; the final layer norm follows in every case. Windows are
    encoded one by one and joined without their inner BOS and ends.
    """
    batch, windows, length = tokens.shape
    flat = tokens.reshape(batch * windows, length).to(encoder.device)
    if clip_skip is None or clip_skip == 1:
        hidden = encoder(flat).last_hidden_state
    else:
        output = encoder(flat, output_hidden_states=True)
        hidden = text_model(encoder).final_layer_norm(output.hidden_states[-clip_skip])
    hidden = hidden.unflatten(0, (batch, windows))  # (B, K, 77, D)
    if windows == 1:
        return hidden[:, 0]
    inner = hidden[:, :, 1:-1].flatten(1, 2)
    return torch.cat([hidden[:, 0, :1], inner, hidden[:, -1, -1:]], dim=1)
