"""Conditioning, seeds and settings -> latents, by one call of a pipeline of diffusers; latents -> images.

The pipelines get no text encoder: conditioning comes from the caller. Each image has a generator of its own on the CPU,
from which all of its noise comes, so that its neighbours in a batch and the device change nothing.

Letters: B images, H and W their sides in pixels.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.config.samplers import SamplerName
from library.config.values import given
from library.models.base import BaseModel
from library.models.conditioning import Conditioning
from library.models.family import ModelFamily
from library.models.overflow import within_range
from library.sampling.float32 import Float32Port
from library.sampling.samplers import build_sampler

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.controlnets.controlnet import ControlNetModel
    from PIL.Image import Image

TIME_IDS = ("original_size", "crops_coords_top_left", "target_size")  # in the order of the U-Net's input


@dataclasses.dataclass(frozen=True)
class ControlInputs:
    """ControlNets with their control images: one list for each net, an image for each of the batch."""

    nets: Sequence[ControlNetModel]
    images: Sequence[Sequence[Image]]
    weights: Sequence[float]
    ends: Sequence[float]  # share of the steps after which each stops


@dataclasses.dataclass(frozen=True)
class PictureSizes:
    """What a model that takes sizes is told of an image, in pixels: how large it was, and where it was cut out.

    A side that is None is that of the image; of the negative prompt, that of the prompt.
    """

    original_width: int | None = None
    original_height: int | None = None
    original_width_negative: int | None = None
    original_height_negative: int | None = None
    crop_top: int = 0
    crop_left: int = 0

    def scaled(self, ratio: float) -> PictureSizes:
        """Return the sizes of a reduced image."""
        values: dict[str, Any] = {
            name: None if value is None else round(value * ratio) for name, value in vars(self).items()
        }
        return PictureSizes(**values)

    def resolved(self, width: int, height: int) -> PictureSizes:
        """Return the sizes of an image of a width and a height, with no side left open."""
        own_width, own_height = given(self.original_width, width), given(self.original_height, height)
        return dataclasses.replace(
            self,
            original_width=own_width,
            original_height=own_height,
            original_width_negative=given(self.original_width_negative, own_width),
            original_height_negative=given(self.original_height_negative, own_height),
        )

    def arguments(self, width: int, height: int) -> dict[str, tuple[int | None, ...]]:
        """Return the arguments of diffusers' pipelines for an image: pairs of height and width, or top and left."""
        sizes = self.resolved(width, height)
        common = {"crops_coords_top_left": (sizes.crop_top, sizes.crop_left), "target_size": (height, width)}
        return {
            "original_size": (sizes.original_height, sizes.original_width),
            "negative_original_size": (sizes.original_height_negative, sizes.original_width_negative),
            **common,
            **{f"negative_{name}": pair for name, pair in common.items()},
        }


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
    sizes: PictureSizes = PictureSizes()  # for a model that takes them

    @property
    def has_init(self) -> bool:
        """Whether sampling begins with images or their latents."""
        return self.init_images is not None or self.init_latents is not None


@torch.no_grad()
def sample_latents(
    base: BaseModel, inputs: PipelineInputs, on_step: Callable[[int, int], object] | None = None
) -> Tensor:
    """Return the latents (B, 4, H/8, W/8) of a batch in float32, scaled as the U-Net sees them.

    The models stay where they are, in their types.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in inputs.seeds]
    arguments: dict[str, Any] = {
        **text_arguments(inputs, base.unet.device),
        "num_inference_steps": inputs.steps,
        "guidance_scale": inputs.scale,
        "generator": generators,
        "output_type": "latent",
        "return_dict": True,
    }
    if on_step is not None:
        arguments["callback_on_step_end"] = lambda pipeline, index, time, values: (
            on_step(index + 1, pipeline.num_timesteps),
            {},
        )[1]
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
    pipeline = pipeline_for(base, inputs)
    known = inspect.signature(pipeline.__call__).parameters
    sizes = inputs.sizes.arguments(inputs.width, inputs.height)
    arguments |= {name: pair for name, pair in sizes.items() if name in known}
    return pipeline(**arguments).images


def text_arguments(inputs: PipelineInputs, device: torch.device) -> dict[str, Tensor]:
    """Return the conditioning of a batch as arguments; without the pooled output where the model has none.

    Pipelines keep latents in its type, which is float32.
    """
    arguments = {}
    for prefix, text in (("", inputs.text), ("negative_", inputs.negative)):
        arguments[f"{prefix}prompt_embeds"] = text.hidden.to(device, torch.float32)
        if text.pooled is not None:
            arguments[f"{prefix}pooled_prompt_embeds"] = text.pooled.to(device, torch.float32)
    return arguments


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
        "unet": Float32Port(base.unet),
        "scheduler": build_sampler(inputs.sampler, predicts_v=base.predicts_v, zero_snr=base.zero_snr),
        # Text encoders come before the pipeline, and results go to no further model.
        "requires_safety_checker": False,
        "add_watermarker": False,
    }
    if inputs.control is not None:
        from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel

        nets: list[Any] = [Float32Port(net) for net in inputs.control.nets]
        parts["controlnet"] = MultiControlNetModel(nets)
    chosen = pipeline_class(base.family, kind, with_control=inputs.control is not None)
    known = inspect.signature(chosen.__init__).parameters
    absent = {name: None for name, own in known.items() if own.default is own.empty and name != "self"}
    pipeline = chosen(**absent | {name: part for name, part in parts.items() if name in known})
    pipeline.set_progress_bar_config(disable=True)
    sizes = inputs.sizes.arguments(inputs.width, inputs.height)
    negative = [number for name in TIME_IDS for number in sizes[f"negative_{name}"]]
    pipeline.negative_time_ids = torch.tensor([negative], dtype=torch.float32)
    return pipeline


@functools.cache
def pipeline_class(family: ModelFamily, kind: str, *, with_control: bool) -> type[Any]:
    """Return diffusers' pipeline of a family and a kind ("", "Img2Img", "Inpaint"), working where its U-Net is.

    Otherwise it works where its first part is, which need not be on the GPU while the U-Net is at work.
    """
    import diffusers

    base: Any = getattr(diffusers, f"{family.pipeline}{'ControlNet' if with_control else ''}{kind}Pipeline")

    @functools.wraps(base, updated=())
    class Pipeline(base):
        @property
        def _execution_device(self) -> torch.device:
            return self.unet.device

        def _encode_vae_image(self, image: Tensor, generator: Sequence[torch.Generator]) -> Tensor:
            """Return the latents of images; the VAE keeps its type, which may be another than the U-Net's."""
            return encode_pixels(self.vae, image, generator).to(image.dtype)

        def _get_add_time_ids(self, *arguments: Any, **named: Any) -> Any:
            """Return the sizes as a tensor (1, 6), of some pipelines beside those of the negative prompt.

            They stay in float32: in half precision 1533 would become 1536, and with it another embedding. Not all
            pipelines know of other sizes for the negative prompt.
            """
            ids = super()._get_add_time_ids(*arguments, **named | {"dtype": torch.float32})
            return (ids[0], self.negative_time_ids) if isinstance(ids, tuple) else ids

    return Pipeline


def control_pixels(images: Sequence[Image]) -> Tensor:
    """Return control images as a tensor (B, 3, H, W) from 0 to 1, the one form that all pipelines take of a batch."""
    from diffusers.image_processor import VaeImageProcessor

    return VaeImageProcessor(do_convert_rgb=True, do_normalize=False).preprocess(list(images))


@torch.no_grad()
def encode_images(base: BaseModel, images: Sequence[Image], generators: Sequence[torch.Generator]) -> Tensor:
    """Return the scaled latents (B, 4, H/8, W/8) of images in float32, each a sample by its own generator."""
    from diffusers.image_processor import VaeImageProcessor

    pixels = VaeImageProcessor().preprocess(list(images)).to(base.vae.device)
    return encode_pixels(base.vae, pixels, generators).to(base.unet.device)


def encode_pixels(vae: AutoencoderKL, pixels: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Return the scaled latents (B, 4, H/8, W/8) in float32 of pixels (B, 3, H, W) in [-1, 1]."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    moments = within_range(vae, lambda part: vae.encode(part).latent_dist.parameters, pixels, at_once=1).float()
    samples = [
        DiagonalGaussianDistribution(moments[index : index + 1]).sample(generator)
        for index, generator in enumerate(generators)
    ]
    return torch.cat(samples) * vae.config["scaling_factor"]


@torch.no_grad()
def decode_latents(base: BaseModel, latents: Tensor, at_once: int | None = None) -> list[Image]:
    """Return the images of scaled latents (B, 4, H/8, W/8), at_once of them in a call of the VAE.

    An image for which the VAE overflows in fp16 is decoded in float32.
    """
    from PIL import Image

    vae, images = base.vae, []
    for part in latents.split(at_once or len(latents)):
        scaled = (part / vae.config["scaling_factor"]).to(vae.device)
        with torch.autocast(latents.device.type, enabled=False):
            pixels = within_range(vae, lambda rows: vae.decode(rows).sample, scaled)
        values = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        images += [Image.fromarray(value) for value in values]
    return images
