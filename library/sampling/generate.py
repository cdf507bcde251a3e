"""Previews of prompts, as an iterator that training drains.

The text conditioning is exactly the encoding that training uses; `draw.py` does the sampling.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from library.models.base import BaseModel, TextEncoder
from library.models.conditioning import Conditioner, TextOptions, windows_needed
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
    base: BaseModel,
    conditioner: Conditioner,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    *,
    sampler: str,
    clip_skip: int | None = None,
) -> Iterator[Picture]:
    """Yield one picture for each prompt, drawn with its seed; sampler serves prompts that name none.

    The models are used where and as they are; the caller sets autocast and evaluation mode.
    """
    for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        options = text_options(base.texts[0], prompt, clip_skip)
        both = conditioner.encode([prompt.prompt, prompt.negative_prompt], options)
        batch = Batch(
            text=both.part(0, 1),
            negative=both.part(1, 2),
            seeds=[seed],
            width=prompt.width,
            height=prompt.height,
            steps=prompt.sample_steps,
            scale=prompt.scale,
            sampler=prompt.sample_sampler or sampler,
        )
        yield Picture(index, prompt, seed, decode(base, draw_latents(base, batch))[0])


def text_options(encoder: TextEncoder, prompt: Prompt, clip_skip: int | None) -> TextOptions:
    """Return how the texts of a prompt are read: in as many windows as the longer of the two needs, up to 3.

    All tokenizers of a model split words alike, so that one text encoder speaks for all.
    """
    options = TextOptions(clip_skip=clip_skip)
    needed = windows_needed(encoder, [prompt.prompt, prompt.negative_prompt], options, MOST_WINDOWS)
    return options._replace(windows=needed)
