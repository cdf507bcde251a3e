"""Captions and prompts -> the text conditioning of the U-Net, for training and generation.

A text is split into windows of 75 tokens, each encoded separately between BOS and EOS. Optionally, brackets are
weights and BREAK begins a new window, as in web UIs. Training removes BOS and EOS between joined windows, as in
sd-scripts; generation keeps all 77 positions of every window, as in web UIs.

Letters: B texts, K windows of a text, D width of the hidden states.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from library.models.prompt_weights import parse_weights
from library.models.tokenizer import WINDOW

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

    from library.models.base import TextEncoder

PER_WINDOW = WINDOW - 2  # tokens of a window without BOS and EOS
BREAK = re.compile(r"\bBREAK\b")
LARGEST_SCALE = 10.0  # above it the mean of the weighted states is too close to zero for a division


@dataclasses.dataclass(frozen=True)
class Conditioning:
    """The text conditioning of the U-Net, for B texts."""

    hidden: Tensor  # (B, N, D): N = 75 K + 2, or 77 K with BOS and EOS of every window
    pooled: Tensor | None = None  # (B, P), of the text encoder with a projection

    def part(self, start: int, stop: int) -> Conditioning:
        """Return the conditioning of texts[start:stop]."""
        return Conditioning(self.hidden[start:stop], None if self.pooled is None else self.pooled[start:stop])

    def to(self, device: torch.device, dtype: torch.dtype) -> Conditioning:
        """Return the conditioning on a device, in a type."""
        return Conditioning(
            self.hidden.to(device, dtype), None if self.pooled is None else self.pooled.to(device, dtype)
        )

    def rows(self) -> list[Conditioning]:
        """Return the conditioning of each text."""
        return [self.part(index, index + 1) for index in range(len(self.hidden))]

    @staticmethod
    def stacked(rows: Sequence[Conditioning]) -> Conditioning:
        """Return the conditioning of several texts as one."""
        pooled = [row.pooled for row in rows if row.pooled is not None]
        return Conditioning(torch.cat([row.hidden for row in rows]), torch.cat(pooled) if pooled else None)

    def for_unet(self, sizes: Tensor) -> dict[str, Any]:
        """Return the keyword arguments of diffusers' U-Net; sizes (B, 6) are for one that takes a pooled output.

        They are where the conditioning is, and in float32: in half precision 1533 would become 1536, and with it
        another embedding.
        """
        added = None if self.pooled is None else {"text_embeds": self.pooled, "time_ids": sizes}
        return {"encoder_hidden_states": self.hidden, "added_cond_kwargs": added}


class TextOptions(NamedTuple):
    """How texts are read and their windows joined."""

    windows: int = 1  # for every text: shorter texts are padded, longer ones cut
    clip_skip: int | None = None
    # None: brackets are text. Otherwise they are weights, and the mean of a text's states (`original`), the mean of
    # their absolute values (`abs`) or nothing (`none`) is restored.
    weights: Literal["none", "original", "abs"] | None = None
    has_breaks: bool = False  # whether BREAK begins a new window
    keeps_ends: bool = False  # whether joined windows keep BOS and EOS between them

    @property
    def num_tokens(self) -> int:
        """Number of tokens of a text that are used."""
        return self.windows * PER_WINDOW


class Tokens(NamedTuple):
    """A whole text as token ids, with the weight of each, without BOS, EOS and the padding at the end."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    are_words: tuple[bool, ...]  # or else what fills a window before BREAK; its id can be that of a word, too

    @property
    def windows(self) -> int:
        """Number of windows that it needs."""
        return max(1, -(-len(self.ids) // PER_WINDOW))


class TokenWindows(NamedTuple):
    """Texts as the tensors that text encoders take."""

    ids: tuple[Tensor, ...]  # (B, K, 77) for each encoder
    weights: tuple[Tensor, ...]  # (B, N) of the positions of the conditioning, for each encoder; empty: none have any


class Conditioner(Protocol):
    """Computes or looks up the conditioning of texts: reads them as tensors, on the CPU, then turns these into it."""

    def read(self, texts: Sequence[str], options: TextOptions) -> TokenWindows | Conditioning:
        """Return texts as tensors on the CPU: what they are encoded from, or what is known of them already."""

    def encode(self, texts: Sequence[str], options: TextOptions) -> Conditioning:
        """Return the conditioning of texts."""


@dataclasses.dataclass(frozen=True)
class LiveConditioner:
    """Computes the conditioning with the text encoders; the states of several are concatenated along D."""

    encoders: tuple[TextEncoder, ...]

    def read(self, texts: Sequence[str], options: TextOptions) -> TokenWindows:
        """Return the tokens of texts for each encoder."""
        ids, weights = [], []
        for encoder in self.encoders:
            tokens = tokenize(encoder, texts, options)
            pairs = [windows_of(encoder.tokenizer, one, options.windows) for one in tokens]
            ids.append(torch.stack([of_text for of_text, _ in pairs]))
            if options.weights is not None:
                by_position = torch.stack([of_text for _, of_text in pairs])
                weights.append(joined(by_position, keeps_ends=options.keeps_ends))
        return TokenWindows(tuple(ids), tuple(weights))

    def encode(self, texts: Sequence[str], options: TextOptions) -> Conditioning:
        """Return the conditioning of texts; differentiable if gradients are on."""
        return encode_windows(self.encoders, self.read(texts, options), options)


def encode_windows(encoders: Sequence[TextEncoder], tokens: TokenWindows, options: TextOptions) -> Conditioning:
    """Return the conditioning of texts that were read with the same options; differentiable if gradients are on.

    The pooled output is that of the first window.
    """
    states, pooled = [], None
    for number, (encoder, ids) in enumerate(zip(encoders, tokens.ids, strict=True)):
        hidden, of_encoder = encoder.encode(ids.flatten(0, 1), options.clip_skip)
        hidden = joined(hidden.unflatten(0, ids.shape[:2]), keeps_ends=options.keeps_ends)
        if options.weights is not None:
            hidden = weighted(hidden, tokens.weights[number].to(hidden.device), options.weights)
        states.append(hidden)
        if of_encoder is not None and pooled is None:
            pooled = of_encoder.unflatten(0, ids.shape[:2])[:, 0]
    return Conditioning(states[0] if len(states) == 1 else torch.cat(states, dim=-1), pooled)


def tokenize(encoder: TextEncoder, texts: Sequence[str], options: TextOptions) -> list[Tokens]:
    """Return the tokens of texts, uncut; runs of equal weight are tokenized together, BREAK pads its window."""
    pieces: list[tuple[int, str, float, bool]] = []  # index of the text, words, weight, whether a window begins
    for number, text in enumerate(texts):
        for run, weight in parse_weights(text) if options.weights is not None else [(text, 1.0)]:
            for index, words in enumerate(BREAK.split(run) if options.has_breaks else [run]):
                pieces.append((number, encoder.expand(words), weight, index > 0))
    ids: list[list[int]] = [[] for _ in texts]
    weights: list[list[float]] = [[] for _ in texts]
    are_words: list[list[bool]] = [[] for _ in texts]
    encoded = (
        encoder.tokenizer([words for _, words, *_ in pieces], add_special_tokens=False, verbose=False).input_ids
        if pieces
        else []
    )
    for (number, _, weight, begins), own in zip(pieces, encoded, strict=True):
        padding = -len(ids[number]) % PER_WINDOW if begins else 0
        # The words of a window end with EOS, where the pooled output is taken.
        ends = [encoder.tokenizer.eos_token_id, *[encoder.tokenizer.pad_token_id] * (padding - 1)] if padding else []
        ids[number] += ends + own
        weights[number] += [1.0] * padding + [weight] * len(own)
        are_words[number] += [False] * padding + [True] * len(own)
    return [
        Tokens(tuple(own), tuple(its), tuple(kinds)) for own, its, kinds in zip(ids, weights, are_words, strict=True)
    ]


def windows_needed(encoder: TextEncoder, texts: Sequence[str], options: TextOptions, most: int) -> int:
    """Return the number of windows that the longest of the texts needs, at most `most`."""
    return min(most, max(tokens.windows for tokens in tokenize(encoder, texts, options)))


def windows_of(tokenizer: CLIPTokenizer, tokens: Tokens, windows: int) -> tuple[Tensor, Tensor]:
    """Return token ids (K, 77) and weights (K, 77) of a text in K windows; BOS, EOS and padding have the weight 1.

    Each window has its own BOS, and ends with the last id of the whole padded text. If padding is not EOS (OpenCLIP),
    a window whose last word is at its end ends with EOS, and one that begins without a word begins with EOS.
    """
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    length = windows * PER_WINDOW
    used = tokens.ids[:length]
    row = torch.tensor([*used, eos, *[pad] * (length - len(used))])
    ids = torch.cat([torch.full((windows, 1), bos), row[:-1].view(windows, -1), row[-1:].expand(windows, 1)], dim=1)
    if pad != eos and windows > 1:
        # The ids do not tell: that of the padding is also the word "!".
        are_words = torch.tensor([*tokens.are_words[:length], *[False] * (length - len(used))]).view(windows, -1)
        ids[:, -1] = torch.where(are_words[:, -1], eos, ids[:, -1])
        ids[:, 1] = torch.where(are_words[:, 0], ids[:, 1], eos)
    weights = torch.ones(windows, WINDOW)
    inner = torch.tensor([*tokens.weights[:length], *[1.0] * (length - len(used))])
    weights[:, 1:-1] = inner.view(windows, PER_WINDOW)
    return ids, weights


def joined(windows: Tensor, *, keeps_ends: bool) -> Tensor:
    """Return windows (B, K, 77, ...) joined: (B, 77 K, ...), or (B, 75 K + 2, ...) without inner BOS and EOS."""
    if windows.shape[1] == 1:
        return windows[:, 0]
    if keeps_ends:
        return windows.flatten(1, 2)
    return torch.cat([windows[:, 0, :1], windows[:, :, 1:-1].flatten(1, 2), windows[:, -1, -1:]], dim=1)


def weighted(hidden: Tensor, weights: Tensor, normalize: str) -> Tensor:
    """Return states (B, N, D) times the weights (B, N) of their positions, scaled back to their mean.

    normalize: `original` keeps the mean over positions and channels, `abs` that of absolute values, `none` neither.
    Texts without weights stay bit-identical. If the mean is too close to zero, the states are not scaled back.
    """
    result = hidden.float() * weights[..., None]
    if normalize != "none":
        measure = torch.abs if normalize == "abs" else torch.Tensor.float
        before, after = (measure(states.float()).mean(dim=(1, 2)) for states in (hidden, result))
        scale = before / after
        scale = torch.where(scale.isfinite() & (scale > 0) & (scale < LARGEST_SCALE), scale, 1.0)
        result = result * scale[:, None, None]
    is_plain = (weights == 1).all(dim=1)[:, None, None]
    return torch.where(is_plain, hidden, result.to(hidden.dtype))
