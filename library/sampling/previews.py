"""Previews of a training, as an iterator; the text conditioning is exactly the encoding that training uses."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch

from library.config.prompts import Prompt
from library.config.samplers import SamplerName
from library.config.values import LATENT_SCALE, LEAST_PIXELS, given
from library.models.base import BaseModel, TextEncoder
from library.models.conditioning import Conditioner, TextOptions, windows_needed
from library.sampling.pipelines import PipelineInputs, decode_latents, sample_latents

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_WINDOWS = 3


@dataclasses.dataclass(frozen=True)
class PreviewImage:
    """One preview."""

    index: int  # of the prompt
    prompt: Prompt
    seed: int
    image: Image


@torch.no_grad()
def generate_previews(
    base: BaseModel,
    conditioner: Conditioner,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    *,
    sampler: SamplerName,
    clip_skip: int | None = None,
    decoding: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
    on_step: Callable[[int, int], object] | None = None,
) -> Iterator[PreviewImage]:
    """Yield one preview for each prompt, generated with its seed; sampler serves prompts that name none.

    on_step is called after each step of a picture, with its number from 1 and the number of all.

    The models are used where and as they are, the VAE within decoding(); the caller sets autocast and evaluation mode.
    """
    for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        options = text_options(base.texts[0], prompt, clip_skip)
        both = conditioner.encode([prompt.prompt, prompt.negative_prompt], options)
        width, height = size_of(prompt, base)
        inputs = PipelineInputs(
            text=both.part(0, 1),
            negative=both.part(1, 2),
            seeds=[seed],
            width=width,
            height=height,
            steps=prompt.steps,
            scale=prompt.scale,
            sampler=prompt.sampler or sampler,
        )
        latents = sample_latents(base, inputs, on_step)
        with decoding():
            image = decode_latents(base, latents)[0]
        yield PreviewImage(index, prompt, seed, image)


def size_of(prompt: Prompt, base: BaseModel) -> tuple[int, int]:
    """Return the width and height of a preview in pixels; what the prompt leaves open is the side of the model."""
    side = side_of(base)
    return given(prompt.width, side), given(prompt.height, side)


def side_of(base: BaseModel) -> int:
    """Return the side in pixels of pictures that are asked for without a size: that of the family.

    A model that says of itself that it is made for smaller pictures has its own. SD 2.x for 768 pixels has 512, as in
    sd-scripts.
    """
    own = base.unet.config.get("sample_size")
    return min(base.family.side, max(LEAST_PIXELS, LATENT_SCALE * own)) if isinstance(own, int) else base.family.side


def text_options(encoder: TextEncoder, prompt: Prompt, clip_skip: int | None) -> TextOptions:
    """Return how the texts of a prompt are read: in as many windows as the longer of the two needs, up to 3.

    All tokenizers of a model split words alike, so that one text encoder speaks for all.
    """
    options = TextOptions(clip_skip=clip_skip)
    needed = windows_needed(encoder, [prompt.prompt, prompt.negative_prompt], options, MOST_WINDOWS)
    return options._replace(windows=needed)
