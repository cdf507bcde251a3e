"""Previews of prompts, as an iterator that training drains.

The text conditioning is exactly the encoding that training uses; `draw.py` does the sampling.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from library.models.loading import LoadedModels
from library.models.text_encoding import PER_WINDOW, TextOptions, encode_text
from library.sampling.draw import Batch, decode, draw_latents
from library.sampling.prompts import Prompt

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_WINDOWS = 3


@dataclasses.dataclass(frozen=True)
class Picture:
    """One drawn picture."""

    index: int  # of the prompt
    prompt: Prompt
    seed: int
    image: Image


@torch.no_grad()
def generate(
    models: LoadedModels, prompts: Sequence[Prompt], seeds: Sequence[int], *, sampler: str, clip_skip: int | None = None
) -> Iterator[Picture]:
    """Yield one picture for each prompt, drawn with its seed; sampler serves prompts that name none.

    The models are used where and as they are; the caller sets autocast and evaluation mode.
    """
    for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        text, negative = encode_pair(models, prompt, clip_skip)
        batch = Batch(
            text=text,
            negative=negative,
            seeds=[seed],
            width=prompt.width,
            height=prompt.height,
            steps=prompt.sample_steps,
            scale=prompt.scale,
            sampler=prompt.sample_sampler or sampler,
        )
        yield Picture(index, prompt, seed, decode(models, draw_latents(models, batch))[0])


def encode_pair(models: LoadedModels, prompt: Prompt, clip_skip: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the conditioning of prompt and negative prompt, both (1, 75 K + 2, D) with the same K up to 3."""
    texts = [prompt.prompt, prompt.negative_prompt]
    hidden = encode_text(models, texts, **text_options(models, prompt, clip_skip)._asdict()).hidden
    return hidden[:1], hidden[1:]


def text_options(models: LoadedModels, prompt: Prompt, clip_skip: int | None) -> TextOptions:
    """Return how the texts of a prompt are read: as many windows as the longer of the two needs, up to 3."""
    longest = max(len(ids) - 2 for ids in models.tokenizers[0]([prompt.prompt, prompt.negative_prompt]).input_ids)
    windows = min(MOST_WINDOWS, max(1, -(-longest // PER_WINDOW)))
    return TextOptions(windows * PER_WINDOW, clip_skip, weighted=False)
