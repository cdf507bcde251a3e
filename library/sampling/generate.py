"""Pictures from prompts, as an iterator: previews in training drain it, and generation scripts can.

Diffusers' pipeline runs the sampling; the text conditioning is ours, so that a preview sees exactly the
encoding that training uses. Each picture has a generator of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from library.models.loading import LoadedModels
from library.models.text_encoding import PER_WINDOW, TextOptions, encode_text
from library.sampling.prompts import Prompt
from library.sampling.samplers import build_sampler

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
    from diffusers import StableDiffusionPipeline

    for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        pipeline = StableDiffusionPipeline(
            vae=models.vae,
            text_encoder=None,
            tokenizer=None,
            unet=models.unet,
            scheduler=build_sampler(prompt.sample_sampler or sampler, predicts_v=models.predicts_v),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        text, negative = encode_pair(models, prompt, clip_skip)
        latents = pipeline(
            prompt_embeds=text,
            negative_prompt_embeds=negative,
            width=prompt.width,
            height=prompt.height,
            num_inference_steps=prompt.sample_steps,
            guidance_scale=prompt.scale,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="latent",
        ).images
        yield Picture(index, prompt, seed, decode(models, latents)[0])


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


def decode(models: LoadedModels, latents: torch.Tensor) -> list[Image]:
    """Return the pictures of scaled latents (B, 4, H/8, W/8)."""
    from PIL import Image

    vae = models.vae
    with torch.autocast(latents.device.type, enabled=False):
        pixels = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample
    values = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(value) for value in values]
