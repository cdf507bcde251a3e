"""Jobs -> images: texts are encoded, jobs that fit together are sampled in one batch, large images in two stages."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image

from library.config.generation import ControlConfig, ImageConfig, SpeedConfig
from library.generation.init_images import canny, floored, load_image, read_preparation, resized
from library.generation.jobs import Job, batches
from library.generation.networks import LoadedNetworks
from library.models.base import BaseModel
from library.models.conditioning import LiveConditioner
from library.sampling.pipelines import ControlInputs, PictureSizes, PipelineInputs, decode_latents, sample_latents

if TYPE_CHECKING:
    from diffusers.models.controlnets.controlnet import ControlNetModel

NEVER = 1e-6  # share of the steps in which a ControlNet of ratio 0 acts: none of them; diffusers refuses 0


@dataclasses.dataclass(frozen=True)
class GeneratedImage:
    """A finished image."""

    job: Job
    image: Image.Image
    index: int  # in its batch
    stage: int | None = None  # 0 or 1 of an image in two stages

    @property
    def is_final(self) -> bool:
        """Whether this is the image that was asked for, rather than that of a first stage."""
        return self.stage != 0


@dataclasses.dataclass(frozen=True)
class ImageGenerator:
    """Generates images with the models of a run."""

    images: ImageConfig
    control: ControlConfig
    speed: SpeedConfig
    base: BaseModel
    networks: LoadedNetworks
    device: torch.device
    control_nets: tuple[ControlNetModel, ...] = ()

    def generate(
        self, jobs: Iterable[Job], batch_size: int, on_step: Callable[[int, int], object] | None = None
    ) -> Iterator[GeneratedImage]:
        """Yield the images of jobs in their order; those of the first stage, where they are wanted, before the others.

        on_step is called after each step of a batch, with its number from 1 and the number of all.
        """
        for batch in batches(jobs, batch_size):
            yield from self._generate_batch(batch, on_step)

    def _generate_batch(
        self, jobs: Sequence[Job], on_step: Callable[[int, int], object] | None
    ) -> Iterator[GeneratedImage]:
        settings = jobs[0].settings
        self.networks.set(settings.multipliers)
        inputs = self._encoded(jobs)
        if settings.highres is None:
            inputs = self._with_images(jobs, inputs)
        else:
            ratio, steps = settings.highres
            width, height = floored((round(inputs.width * ratio), round(inputs.height * ratio)))
            sizes = inputs.sizes.scaled(ratio)
            small = dataclasses.replace(inputs, width=width, height=height, steps=steps, sizes=sizes)
            small = self._with_images(jobs, small)
            if self.images.highres_fix_strength is not None:
                small = dataclasses.replace(small, strength=self.images.highres_fix_strength)
            latents = self._sample(small, on_step)
            images: list[Image.Image] = []
            if self.images.highres_fix_save_1st or not settings.latents_upscaling:
                images = self._decode(latents)
            if self.images.highres_fix_save_1st:
                for index, (job, image) in enumerate(zip(jobs, images, strict=True)):
                    yield GeneratedImage(job, image, index, stage=0)
            inputs = self._second_stage(jobs, inputs, latents, images)
        stage = None if settings.highres is None else 1
        for index, (job, decoded) in enumerate(zip(jobs, self._decode(self._sample(inputs, on_step)), strict=True)):
            image = decoded
            if inputs.masks is not None and inputs.init_images is not None:  # what the mask keeps is kept to the bit
                image = Image.composite(decoded, inputs.init_images[index], inputs.masks[index])
            yield GeneratedImage(job, image, index, stage)

    def _encoded(self, jobs: Sequence[Job]) -> PipelineInputs:
        """Return the inputs of a batch with the conditioning of its prompts, and without images."""
        settings = jobs[0].settings
        texts = [*(job.request.prompt for job in jobs), *(job.request.negative_prompt for job in jobs)]
        with self._on_device(*self.base.text_modules), torch.no_grad():
            both = LiveConditioner(self.base.texts).encode(texts, settings.text)
        return PipelineInputs(
            text=both.part(0, len(jobs)),
            negative=both.part(len(jobs), len(texts)),
            seeds=[job.request.seed for job in jobs],
            width=settings.width,
            height=settings.height,
            steps=settings.steps,
            scale=settings.scale,
            sampler=settings.sampler,
            strength=settings.strength,
            sizes=settings.sizes or PictureSizes(),
        )

    def _with_images(self, jobs: Sequence[Job], inputs: PipelineInputs) -> PipelineInputs:
        """Return the inputs with the images that their jobs begin with and are guided by, in their size."""
        size = (inputs.width, inputs.height)
        inits = [resized(load_image(job.init_image), size) for job in jobs if job.init_image is not None]
        masks = [resized(load_image(job.mask, "L"), size) for job in jobs if job.mask is not None]
        return dataclasses.replace(
            inputs,
            init_images=inits or None,
            masks=masks if inits and masks else None,
            control=self._control(jobs, size),
        )

    def _second_stage(
        self, jobs: Sequence[Job], inputs: PipelineInputs, latents: torch.Tensor, images: Sequence[Image.Image]
    ) -> PipelineInputs:
        """Return the inputs that begin with the latents or the images of the first stage, enlarged."""
        size = (inputs.width, inputs.height)
        without_control = self.images.highres_fix_disable_control_net
        inputs = dataclasses.replace(
            inputs,
            seeds=[seed + 1 for seed in inputs.seeds],
            control=None if without_control else self._control(jobs, size),
        )
        if not jobs[0].settings.latents_upscaling:
            return dataclasses.replace(inputs, init_images=[resized(image, size) for image in images])
        larger = torch.nn.functional.interpolate(latents, (size[1] // 8, size[0] // 8), mode="bicubic")
        return dataclasses.replace(inputs, init_latents=larger)

    def _control(self, jobs: Sequence[Job], size: tuple[int, int]) -> ControlInputs | None:
        if not self.control_nets:
            return None
        number = range(len(self.control_nets))
        weights, ratios = self.control.control_net_weights or (), self.control.control_net_ratios or ()
        preparations = self.control.control_net_preps or ()
        rows = []
        for index in number:
            images = [resized(load_image(job.control_images[index]), size) for job in jobs]
            thresholds = read_preparation(preparations[index]) if index < len(preparations) else None
            rows.append([image if thresholds is None else canny(image, *thresholds) for image in images])
        return ControlInputs(
            nets=self.control_nets,
            images=rows,
            weights=[weights[index] if index < len(weights) else 1.0 for index in number],
            ends=[max(ratios[index], NEVER) if index < len(ratios) else 1.0 for index in number],
        )

    def _sample(self, inputs: PipelineInputs, on_step: Callable[[int, int], object] | None) -> torch.Tensor:
        with self._on_device(self.base.unet, *([self.base.vae] if inputs.has_init else [])):
            return sample_latents(self.base, inputs, on_step)

    def _decode(self, latents: torch.Tensor) -> list[Image.Image]:
        given = self.speed.vae_batch_size
        share = given if given is None or given >= 1 else given * len(latents)
        with self._on_device(self.base.vae):
            return decode_latents(self.base, latents, None if share is None else max(1, int(share)))

    @contextlib.contextmanager
    def _on_device(self, *modules: torch.nn.Module) -> Iterator[None]:
        """Have parts of the model on the device within it; with --offload only then."""
        if not self.speed.offload:
            yield
            return
        for module in modules:
            module.to(self.device)
        try:
            yield
        finally:
            for module in modules:
                module.to("cpu")
