"""One call of a sampler: conditioning, seeds and settings -> latents, by diffusers' pipelines; latents -> pictures.

The pipelines get no text encoder: conditioning comes from the caller. Each picture has a generator of its own on
the CPU, from which all of its noise comes, so that its neighbours in a batch and the device change nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.models.base import BaseModel
from library.models.conditioning import Conditioning
from library.sampling.samplers import build_sampler

if TYPE_CHECKING:
    from diffusers.models.controlnets.controlnet import ControlNetModel
    from PIL.Image import Image


@dataclasses.dataclass(frozen=True)
class Controls:
    """ControlNets with their guide pictures (one list for each net, a picture for each of the batch)."""

    nets: Sequence[ControlNetModel]
    guides: Sequence[Sequence[Image]]
    weights: Sequence[float]
    ends: Sequence[float]  # share of the steps after which each stops


@dataclasses.dataclass(frozen=True)
class Batch:
    """Pictures that are drawn together. B pictures, sizes in pixels."""

    text: Conditioning
    negative: Conditioning  # with as many positions
    seeds: Sequence[int]
    width: int
    height: int
    steps: int
    scale: float
    sampler: str
    strength: float = 1.0  # of the change, where there are pictures to begin with
    starts: Sequence[Image] | Tensor | None = None  # pictures of that size, or latents (B, 4, H/8, W/8)
    masks: Sequence[Image] | None = None  # white is drawn anew
    controls: Controls | None = None


@torch.no_grad()
def draw_latents(base: BaseModel, batch: Batch, on_step: Callable[[], None] | None = None) -> Tensor:
    """Return the latents (B, 4, H/8, W/8) of a batch, scaled as the U-Net sees them. The models stay where they are."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in batch.seeds]
    arguments: dict[str, Any] = {
        "prompt_embeds": batch.text.hidden.to(base.unet.device, base.unet.dtype),
        "negative_prompt_embeds": batch.negative.hidden.to(base.unet.device, base.unet.dtype),
        "num_inference_steps": batch.steps,
        "guidance_scale": batch.scale,
        "generator": generators,
        "output_type": "latent",
        "return_dict": True,
    }
    if on_step is not None:
        arguments["callback_on_step_end"] = lambda pipeline, index, time, values: (on_step(), {})[1]
    guides = None if batch.controls is None else [guide_pixels(pictures) for pictures in batch.controls.guides]
    if batch.starts is None:
        arguments |= {"width": batch.width, "height": batch.height}
        arguments |= {} if guides is None else {"image": guides}
    else:
        starts = batch.starts
        is_kept = int(batch.steps * batch.strength) == 0  # no step is left: pipelines fail, or return noise
        if is_kept or batch.masks is None:
            latents = starts if isinstance(starts, Tensor) else encode_pictures(base, starts, generators)
            if is_kept:
                return latents
            arguments["image"] = latents
        else:
            arguments["image"] = list(starts)
        arguments["strength"] = batch.strength
        arguments |= {} if guides is None else {"control_image": guides}
    if batch.masks is not None:
        arguments |= {"mask_image": list(batch.masks), "width": batch.width, "height": batch.height}
    if batch.controls is not None:
        arguments |= {
            "controlnet_conditioning_scale": list(batch.controls.weights),
            "control_guidance_end": list(batch.controls.ends),
        }
    return pipeline_for(base, batch)(**arguments).images


def pipeline_for(base: BaseModel, batch: Batch) -> Any:
    """Return the pipeline for what a batch begins with, over the models as they are."""
    kind = "Inpaint" if batch.masks is not None else "Img2Img" if batch.starts is not None else ""
    parts = {
        "vae": base.vae,
        "unet": base.unet,
        "scheduler": build_sampler(batch.sampler, predicts_v=base.predicts_v),
        "text_encoder": None,
        "tokenizer": None,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    if batch.controls is not None:
        from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel

        parts["controlnet"] = MultiControlNetModel(list(batch.controls.nets))
    pipeline = pipeline_class(kind, with_controls=batch.controls is not None)(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@functools.cache
def pipeline_class(kind: str, *, with_controls: bool) -> type:
    """Return diffusers' pipeline of a kind ("", "Img2Img", "Inpaint"), working where its U-Net is.

    Otherwise it works where its first part is, which need not be on the GPU while the U-Net is at work.
    """
    import diffusers

    name = f"StableDiffusion{'ControlNet' if with_controls else ''}{kind}Pipeline"
    kind_of_diffusers = getattr(diffusers, name)

    class Pipeline(kind_of_diffusers):  # type: ignore[misc, valid-type]
        @property
        def _execution_device(self) -> torch.device:
            return self.unet.device

        def _encode_vae_image(self, image: Tensor, generator: Any) -> Tensor:
            """Return the latents of pictures; the VAE may have another type than the U-Net."""
            return super()._encode_vae_image(image.to(self.vae.dtype), generator).to(image.dtype)

    return Pipeline


def guide_pixels(pictures: Sequence[Image]) -> Tensor:
    """Return guide pictures as a tensor (B, 3, H, W) from 0 to 1, the one form that all pipelines take of a batch."""
    from diffusers.image_processor import VaeImageProcessor

    return VaeImageProcessor(do_convert_rgb=True, do_normalize=False).preprocess(list(pictures))


@torch.no_grad()
def encode_pictures(base: BaseModel, pictures: Sequence[Image], generators: Sequence[torch.Generator]) -> Tensor:
    """Return the scaled latents (B, 4, H/8, W/8) of pictures, a sample of the posterior by each one's generator."""
    from diffusers.image_processor import VaeImageProcessor

    vae = base.vae
    pixels = VaeImageProcessor().preprocess(list(pictures)).to(vae.device, vae.dtype)
    samples = [
        vae.encode(pixels[index : index + 1]).latent_dist.sample(generator)
        for index, generator in enumerate(generators)
    ]
    return (torch.cat(samples) * vae.config["scaling_factor"]).to(base.unet.device, base.unet.dtype)


@torch.no_grad()
def decode(base: BaseModel, latents: Tensor, at_once: int | None = None) -> list[Image]:
    """Return the pictures of scaled latents (B, 4, H/8, W/8), at_once of them in a call of the VAE."""
    from PIL import Image

    vae, pictures = base.vae, []
    for part in latents.split(at_once or len(latents)):
        with torch.autocast(latents.device.type, enabled=False):
            pixels = vae.decode((part / vae.config["scaling_factor"]).to(vae.device, vae.dtype)).sample
        values = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        pictures += [Image.fromarray(value) for value in values]
    return pictures
