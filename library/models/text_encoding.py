"""Captions -> the text conditioning of the U-Net. Each family names its function in `ENCODERS`.

Letters: B captions, K windows of 77 tokens for a caption, D width of the text encoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from library.models.loading import LoadedModels, text_model
from library.models.prompt_weights import parse_weights
from library.models.tokenizer import WINDOW

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

PER_WINDOW = WINDOW - 2  # tokens of a window without BOS and EOS


@dataclasses.dataclass(frozen=True)
class TextConditioning:
    """What the U-Net is told: hidden states, and for families that have them further tensors by name."""

    hidden: Tensor  # (B, 75 K + 2, D)
    added: dict[str, Tensor] | None = None

    def rows(self) -> list[TextConditioning]:
        """Return the conditioning of each caption by itself, on the CPU."""
        added = self.added or {}
        return [
            TextConditioning(
                self.hidden[index : index + 1].cpu(),
                {name: tensor[index : index + 1].cpu() for name, tensor in added.items()} or None,
            )
            for index in range(len(self.hidden))
        ]

    @staticmethod
    def stacked(rows: Sequence[TextConditioning]) -> TextConditioning:
        """Return the conditioning of several captions as one."""
        names = rows[0].added or {}
        added = {name: torch.cat([row.added[name] for row in rows]) for name in names}
        return TextConditioning(torch.cat([row.hidden for row in rows]), added or None)

    def unet_arguments(self, device: torch.device, dtype: torch.dtype) -> dict[str, object]:
        """Return the keyword arguments of diffusers' U-Net."""
        added = None if self.added is None else {name: part.to(device, dtype) for name, part in self.added.items()}
        return {"encoder_hidden_states": self.hidden.to(device, dtype), "added_cond_kwargs": added}


class TextOptions(NamedTuple):
    """How captions are read: most tokens (a multiple of 75), layer from the end, whether brackets are weights."""

    max_tokens: int
    clip_skip: int | None
    weighted: bool


def encode_text(
    models: LoadedModels,
    captions: Sequence[str],
    *,
    max_tokens: int | None = None,
    clip_skip: int | None = None,
    weighted: bool = False,
) -> TextConditioning:
    """Return the conditioning of captions as the model's family makes it; max_tokens is 75 (None), 150 or 225.

    What `remember_texts` encoded is looked up.
    """
    options = TextOptions(max_tokens or PER_WINDOW, clip_skip, weighted)
    if models.text_memory is not None:
        return TextConditioning.stacked([models.text_memory[caption, options] for caption in captions])
    return ENCODERS[models.family.name](models, captions, options)


def encode_with_one_encoder(models: LoadedModels, captions: Sequence[str], options: TextOptions) -> TextConditioning:
    """Return the conditioning of SD 1.x and SD 2.x: the states of their one text encoder, times the weights."""
    if not options.weighted:
        tokens = tokenize(models.tokenizers[0], captions, options.max_tokens)
        return TextConditioning(encode_tokens(models.text_encoders[0], tokens, options.clip_skip))
    tokens, weights = tokenize_weighted(models.tokenizers[0], captions, options.max_tokens)
    hidden = encode_tokens(models.text_encoders[0], tokens, options.clip_skip)
    return TextConditioning(hidden * weights[..., None].to(hidden))


# Name of a family -> its function: (models, captions, options) -> conditioning.
ENCODERS: dict[str, Callable[[LoadedModels, Sequence[str], TextOptions], TextConditioning]] = {
    "sd1": encode_with_one_encoder,
    "sd2": encode_with_one_encoder,
}

ENCODED_AT_ONCE = 16  # captions


@torch.no_grad()
def remember_texts(models: LoadedModels, wanted: Iterable[tuple[str, TextOptions]]) -> None:
    """Encode all texts that will ever be asked for, keep their conditioning, and give up the text encoders' memory."""
    memory: dict[tuple[str, TextOptions], TextConditioning] = {}
    by_options: dict[TextOptions, list[str]] = {}
    for caption, options in sorted(set(wanted), key=repr):
        by_options.setdefault(options, []).append(caption)
    total = sum(len(captions) for captions in by_options.values())
    with tqdm(total=total, desc="encoding captions", unit="caption") as bar:
        for options, captions in by_options.items():
            for start in range(0, len(captions), ENCODED_AT_ONCE):
                part = captions[start : start + ENCODED_AT_ONCE]
                encoded = ENCODERS[models.family.name](models, part, options)
                memory |= {(text, options): row for text, row in zip(part, encoded.rows(), strict=True)}
                bar.update(len(part))
    models.text_memory = memory
    for encoder in models.text_encoders:
        encoder.to("meta")


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str], max_tokens: int = PER_WINDOW) -> Tensor:
    """Return token ids (B, K, 77) with K = max_tokens / 75; each window has its own BOS and an end.

    The end of a window is the last id of the whole padded caption. Where padding is not EOS (OpenCLIP), a
    window whose text fills it, or that holds nothing, ends or begins with EOS.
    """
    length = max_tokens + 2
    ids = tokenizer(
        list(captions), truncation=True, padding="max_length", max_length=length, return_tensors="pt"
    ).input_ids
    return cut_into_windows(tokenizer, ids)


def tokenize_weighted(
    tokenizer: CLIPTokenizer, captions: Sequence[str], max_tokens: int = PER_WINDOW
) -> tuple[Tensor, Tensor]:
    """Return (token ids (B, K, 77), weights (B, 75 K + 2) of the hidden states); brackets in captions are weights.

    Each run of equal weight is tokenized by itself; BOS, EOS and padding weigh 1.
    """
    rows, weights = [], []
    for caption in captions:
        runs = [
            (tokenizer(text, add_special_tokens=False).input_ids, weight) for text, weight in parse_weights(caption)
        ]
        ids = [token for tokens, _ in runs for token in tokens][:max_tokens]
        factors = [weight for tokens, weight in runs for _ in tokens][:max_tokens]
        padding = max_tokens - len(ids)
        rows.append([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * padding])
        weights.append([1.0, *factors, *[1.0] * (padding + 1)])
    return cut_into_windows(tokenizer, torch.tensor(rows)), torch.tensor(weights)


def cut_into_windows(tokenizer: CLIPTokenizer, ids: Tensor) -> Tensor:
    """Return padded token ids (B, 75 K + 2) as windows (B, K, 77)."""
    length = ids.shape[1]
    if length == WINDOW:
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


def split_at_limit(tokenizer: CLIPTokenizer, caption: str, max_tokens: int) -> tuple[int, str]:
    """Return (number of a caption's tokens, the text that is beyond max_tokens)."""
    ids = tokenizer(caption).input_ids[1:-1]
    return len(ids), tokenizer.decode(ids[max_tokens:])


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
