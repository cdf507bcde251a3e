"""Prompts -> the text conditioning of the U-Net, as web UIs and sd-scripts' generation have it.

Brackets weigh, BREAK begins a new window, and a prompt may fill several windows of 75 tokens, of which all 77
positions are kept. In training (`text_encoding.py`) the ends of inner windows are left out.

Letters: B prompts, K windows, D width of the text encoder.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.models.prompt_weights import parse_weights
from library.models.text_encoding import PER_WINDOW, cut_into_windows, encode_tokens

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

logger = logging.getLogger(__name__)

BREAK = re.compile(r"\bBREAK\b")


@dataclasses.dataclass(frozen=True)
class PromptTokens:
    """A prompt as token ids with their weights, without BOS, EOS and the padding at the end."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    lost: str = ""  # what was beyond the capacity, as text

    @property
    def num_windows(self) -> int:
        """How many windows of 75 tokens it takes."""
        return max(1, -(-len(self.ids) // PER_WINDOW))


@dataclasses.dataclass(frozen=True)
class PromptOptions:
    """How prompts are read: windows that one may fill, layer of the text encoder from its end, what follows weights."""

    max_windows: int = 1
    clip_skip: int | None = None
    normalize: str = "original"


def tokenize_prompt(tokenizer: CLIPTokenizer, prompt: str, max_windows: int, expand: Any = None) -> PromptTokens:
    """Return the tokens of a prompt; runs of equal weight are tokenized together, BREAK fills up its window.

    expand makes the words of embeddings of several vectors into their tokens, where there are some.
    """
    ids: list[int] = []
    weights: list[float] = []
    for text, weight in parse_weights(prompt):
        for index, piece in enumerate(BREAK.split(text)):
            if index:
                padding = -len(ids) % PER_WINDOW
                ids += [tokenizer.pad_token_id] * padding
                weights += [1.0] * padding
            own = tokenizer(expand(piece) if expand else piece, add_special_tokens=False).input_ids
            ids += own
            weights += [weight] * len(own)
    most = max_windows * PER_WINDOW
    lost = tokenizer.decode(ids[most:]) if len(ids) > most else ""
    return PromptTokens(tuple(ids[:most]), tuple(weights[:most]), lost)


def windows_of(tokenizer: CLIPTokenizer, tokens: PromptTokens, num_windows: int) -> tuple[Tensor, Tensor]:
    """Return token ids (K, 77) and weights (77 K) of a prompt in a number of windows; BOS, EOS, padding weigh 1."""
    padding = num_windows * PER_WINDOW - len(tokens.ids)
    row = [tokenizer.bos_token_id, *tokens.ids, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * padding]
    ids = cut_into_windows(tokenizer, torch.tensor([row]))[0]
    inner = torch.tensor([*tokens.weights, *[1.0] * padding]).view(num_windows, PER_WINDOW)
    ones = torch.ones(num_windows, 1)
    return ids, torch.cat([ones, inner, ones], dim=1).flatten()


@torch.no_grad()
def encode_prompts(
    tokenizer: CLIPTokenizer, encoder: torch.nn.Module, prompts: Sequence[PromptTokens], options: PromptOptions
) -> Tensor:
    """Return the conditioning (B, 77 K, D) of prompts; K is the most windows that one of them takes."""
    num_windows = max(prompt.num_windows for prompt in prompts)
    pairs = [windows_of(tokenizer, prompt, num_windows) for prompt in prompts]
    ids = torch.stack([ids for ids, _ in pairs])
    weights = torch.stack([weights for _, weights in pairs])
    windows = ids.flatten(0, 1)[:, None]  # each by itself, so that all 77 positions stay
    hidden = encode_tokens(encoder, windows, options.clip_skip).unflatten(0, ids.shape[:2]).flatten(1, 2)
    return weighted(hidden, weights, options.normalize)


def weighted(hidden: Tensor, weights: Tensor, normalize: str) -> Tensor:
    """Return states (B, N, D) times the weights (B, N) of their positions, brought back to their mean.

    normalize: `original` keeps the mean over positions and channels, `abs` that of absolute values, `none` nothing.
    Prompts without weights stay as they are to the bit. Where a mean is so small that the quotient means nothing,
    nothing is brought back.
    """
    result = hidden.float() * weights[..., None].to(hidden.device)
    if normalize != "none":
        measure = torch.abs if normalize == "abs" else torch.Tensor.float
        before, after = (measure(states.float()).mean(dim=(1, 2)) for states in (hidden, result))
        scale = before / after
        scale = torch.where(scale.isfinite() & (scale > 0) & (scale < MOST_SCALE), scale, 1.0)
        result = result * scale[:, None, None]
    is_plain = (weights == 1).all(dim=1)
    return torch.where(is_plain[:, None, None].to(hidden.device), hidden, result.to(hidden.dtype))


MOST_SCALE = 10.0  # beyond it the mean had come close to zero
