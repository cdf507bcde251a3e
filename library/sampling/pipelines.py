"""Conditioning, seeds and settings -> latents, by one call of a pipeline of diffusers; latents -> images.

The pipelines get no text encoder: conditioning comes from the caller. Each image has a generator of its own on the CPU,
from which all of its noise comes, so that its neighbours in a batch and the device change nothing.

Letters: B images, H and W their sides in pixels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.config.samplers import SamplerName
from library.models.base import BaseModel
from library.models.conditioning import Conditioning
from library.sampling.samplers import build_sampler

if TYPE_CHECKING:
    from diffusers.models.controlnets.controlnet import ControlNetModel
    from PIL.Image import Image


@dataclasses.dataclass(frozen=True)
class ControlInputs:
    """ControlNets with their control images: one list for each net, an image for each of the batch."""

    nets: Sequence[ControlNetModel]
    images: Sequence[Sequence[Image]]
    weights: Sequence[float]
    ends: Sequence[float]  # share of the steps after which each stops


@dataclasses.dataclass(frozen=True)
class PipelineInputs:
    """What a pipeline is called with. B images, sizes in pixels."""

    text: Conditioning
    negative: Conditioning  # with as many positions
    seeds: Sequence[int]
    width: int
    height: int
    steps: int
    scale: float
    sampler: SamplerName
    strength: float = 1.0  # of the change, where there are init images
    init_images: Sequence[Image] | None = None  # of that size
    init_latents: Tensor | None = None  # (B, 4, H/8, W/8), scaled; in the place of init_images
    masks: Sequence[Image] | None = None  # for init_images; white is changed
    control: ControlInputs | None = None

    @property
    def has_init(self) -> bool:
        """Whether sampling begins with images or their latents."""
        return self.init_images is not None or self.init_latents is not None


@torch.no_grad()
def sample_latents(base: BaseModel, inputs: PipelineInputs, on_step: Callable[[], object] | None = None) -> Tensor:
    """Return the latents (B, 4, H/8, W/8) of a batch, scaled as the U-Net sees them. The models stay where they are."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in inputs.seeds]
    arguments: dict[str, Any] = {
        "prompt_embeds": inputs.text.hidden.to(base.unet.device, base.unet.dtype),
        "negative_prompt_embeds": inputs.negative.hidden.to(base.unet.device, base.unet.dtype),
        "num_inference_steps": inputs.steps,
        "guidance_scale": inputs.scale,
        "generator": generators,
        "output_type": "latent",
        "return_dict": True,
    }
    if on_step is not None:
        arguments["callback_on_step_end"] = lambda pipeline, index, time, values: (on_step(), {})[1]
    if inputs.has_init:
        # Without a step pipelines fail, or return noise.
        has_no_step = int(inputs.steps * inputs.strength) == 0
        if inputs.masks is not None and inputs.init_images is not None and not has_no_step:
            arguments["image"] = list(inputs.init_images)
        else:
            arguments["image"] = latents_to_begin_with(base, inputs, generators)
            if has_no_step:
                return arguments["image"]
        arguments["strength"] = inputs.strength
    if inputs.masks is not None:
        arguments["mask_image"] = list(inputs.masks)
    if inputs.masks is not None or not inputs.has_init:
        arguments |= {"width": inputs.width, "height": inputs.height}
    if inputs.control is not None:
        arguments |= {
            "control_image" if inputs.has_init else "image": [control_pixels(row) for row in inputs.control.images],
            "controlnet_conditioning_scale": list(inputs.control.weights),
            "control_guidance_end": list(inputs.control.ends),
        }
    return pipeline_for(base, inputs)(**arguments).images


def latents_to_begin_with(base: BaseModel, inputs: PipelineInputs, generators: Sequence[torch.Generator]) -> Tensor:
    """Return the scaled latents (B, 4, H/8, W/8) that inputs begin with."""
    if inputs.init_latents is not None:
        return inputs.init_latents
    return encode_images(base, inputs.init_images or [], generators)


def pipeline_for(base: BaseModel, inputs: PipelineInputs) -> Any:
    """Return the pipeline for what a batch begins with, over the models as they are."""
    kind = "Inpaint" if inputs.masks is not None else "Img2Img" if inputs.has_init else ""
    parts = {
        "vae": base.vae,
        "unet": base.unet,
        "scheduler": build_sampler(inputs.sampler, predicts_v=base.predicts_v),
        "text_encoder": None,
        "tokenizer": None,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    if inputs.control is not None:
        from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel

        parts["controlnet"] = MultiControlNetModel(list(inputs.control.nets))
    pipeline = pipeline_class(kind, with_control=inputs.control is not None)(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@functools.cache
def pipeline_class(kind: str, *, with_control: bool) -> type[Any]:
    """Return diffusers' pipeline of a kind ("", "Img2Img", "Inpaint"), working where its U-Net is.

    Otherwise it works where its first part is, which need not be on the GPU while the U-Net is at work.
    """
    import diffusers

    base: Any = getattr(diffusers, f"StableDiffusion{'ControlNet' if with_control else ''}{kind}Pipeline")

    class Pipeline(base):
        @property
        def _execution_device(self) -> torch.device:
            return self.unet.device

        def _encode_vae_image(self, image: Tensor, generator: Any) -> Tensor:
            """Return the latents of images; the VAE may have another type than the U-Net."""
            return super()._encode_vae_image(image.to(self.vae.dtype), generator).to(image.dtype)

    return Pipeline


def control_pixels(images: Sequence[Image]) -> Tensor:
    """Return control images as a tensor (B, 3, H, W) from 0 to 1, the one form that all pipelines take of a batch."""
    from diffusers.image_processor import VaeImageProcessor

    return VaeImageProcessor(do_convert_rgb=True, do_normalize=False).preprocess(list(images))


@torch.no_grad()
def encode_images(base: BaseModel, images: Sequence[Image], generators: Sequence[torch.Generator]) -> Tensor:
    """Return the scaled latents (B, 4, H/8, W/8) of images, a sample of the posterior by each one's generator."""
    from diffusers.image_processor import VaeImageProcessor

    vae = base.vae
    pixels = VaeImageProcessor().preprocess(list(images)).to(vae.device, vae.dtype)
    samples = [
        vae.encode(pixels[index : index + 1]).latent_dist.sample(generator)
        for index, generator in enumerate(generators)
    ]
    return (torch.cat(samples) * vae.config["scaling_factor"]).to(base.unet.device, base.unet.dtype)


@torch.no_grad()
def decode_latents(base: BaseModel, latents: Tensor, at_once: int | None = None) -> list[Image]:
    """Return the images of scaled latents (B, 4, H/8, W/8), at_once of them in a call of the VAE."""
    from PIL import Image

    vae, images = base.vae, []
    for part in latents.split(at_once or len(latents)):
        with torch.autocast(latents.device.type, enabled=False):
            pixels = vae.decode((part / vae.config["scaling_factor"]).to(vae.device, vae.dtype)).sample
        values = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        images += [Image.fromarray(value) for value in values]
    return images
