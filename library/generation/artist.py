"""From requests to pictures: what is encoded, which requests are drawn together, the two stages of a large picture."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image

from library.config.generation import GenerateConfig
from library.generation.networks import DrawnNetworks
from library.generation.starts import PictureList, canny, fitted, floored, load_picture
from library.models.base import BaseModel
from library.models.conditioning import Conditioning, LiveConditioner, TextOptions, tokenize
from library.sampling.draw import Batch, Controls, decode, draw_latents
from library.sampling.requests import DEFAULT_SIDE, Request

logger = logging.getLogger(__name__)

DEFAULT_STRENGTH = 0.8
NEVER = 1e-6  # share of the steps in which a ControlNet of ratio 0 acts: none of them; diffusers refuses 0


@dataclasses.dataclass(frozen=True)
class Job:
    """A request with everything looked up: sizes, tokens, pictures to begin with."""

    number: int  # of the picture in the run, from 0
    request: Request
    options: TextOptions  # of prompt and negative prompt, in as many windows as the longer one needs
    multipliers: tuple[float, ...]
    start: Path | None = None
    mask: Path | None = None
    guides: tuple[Path, ...] = ()

    @property
    def key(self) -> tuple[object, ...]:
        """What jobs must have in common to be drawn together."""
        request = self.request
        return (
            (request.width, request.height, request.steps, request.scale, request.sampler, request.strength),
            (request.highres, request.latents_upscaling, self.options, self.multipliers),
            (self.start is None, self.mask is None),
        )


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A finished picture; stage is 0 or 1 where a picture is drawn in two stages, None otherwise."""

    job: Job
    image: Image.Image
    stage: int | None = None


@dataclasses.dataclass
class Artist:
    """Draws jobs with the models of a run."""

    config: GenerateConfig
    base: BaseModel
    networks: DrawnNetworks
    device: torch.device
    starts: PictureList | None = None
    masks: PictureList | None = None
    guides: tuple[PictureList, ...] = ()
    nets: tuple[torch.nn.Module, ...] = ()

    # ---- looking up -----------------------------------------------------------------------------------------

    def job_of(self, request: Request, number: int) -> Job:
        """Return the job of a request, the picture of a number in the run."""
        prompts = self.config.prompts
        options = TextOptions(
            windows=request.max_windows or prompts.max_embeddings_multiples or 1,
            clip_skip=prompts.clip_skip if request.clip_skip is None else request.clip_skip,
            weights=request.normalize or prompts.emb_normalize_mode,
            has_breaks=True,
            keeps_ends=True,
        )
        start = self.starts.path_of(number) if self.starts else None
        return Job(
            number=number,
            request=self._complete(request, options, start),
            options=options._replace(windows=self._windows_of(request, options)),
            multipliers=self.networks.multipliers(request.multipliers),
            start=start,
            mask=self.masks.path_of(number) if self.masks else None,
            guides=tuple(guides.path_of(number) for guides in self.guides),
        )

    def _windows_of(self, request: Request, options: TextOptions) -> int:
        """Return how many windows prompt and negative prompt need; warns of what is beyond those there may be."""
        encoder = self.base.texts[0]  # all tokenizers of a model split words alike
        texts = tokenize(encoder, [request.prompt, request.negative_prompt], options)
        for title, tokens in zip(("prompt", "negative prompt"), texts, strict=True):
            if tokens.windows > options.windows:
                logger.warning(
                    "the %s is too long, this is left out: %r (--max_embeddings_multiples %d has room for more)",
                    title,
                    encoder.tokenizer.decode(tokens.ids[options.num_tokens :]),
                    options.windows + 1,
                )
        return min(options.windows, max(tokens.windows for tokens in texts))

    def _complete(self, request: Request, options: TextOptions, start: Path | None) -> Request:
        """Return a request with the values of the run where it has none."""
        images = self.config.images
        highres = request.highres
        if highres is None and images.highres_fix_scale is not None:
            highres = (images.highres_fix_scale, images.highres_fix_steps)
        strength = request.strength if request.strength is not None else images.strength
        size = request.width, request.height
        if start is not None and None in size:
            own = floored(load_picture(start).size)
            size = size[0] or own[0], size[1] or own[1]
        has_strength = start is not None or highres is not None
        return dataclasses.replace(
            request,
            width=size[0] or DEFAULT_SIDE,
            height=size[1] or DEFAULT_SIDE,
            strength=(DEFAULT_STRENGTH if strength is None else strength) if has_strength else None,
            highres=highres,
            latents_upscaling=(images.highres_fix_latents_upscaling or request.latents_upscaling) if highres else None,
            clip_skip=options.clip_skip,
            max_windows=options.windows if options.windows > 1 else None,
            normalize=options.weights if options.weights != "original" else None,
        )

    # ---- drawing --------------------------------------------------------------------------------------------

    def draw(self, jobs: Sequence[Job], on_step: Callable[[], None] | None = None) -> Iterator[Drawn]:
        """Yield the pictures of jobs that have one key, in their order; first those of a first stage."""
        first = jobs[0]
        self.networks.set(first.multipliers)
        text, negative = self._encode(jobs)
        request, seeds = first.request, [job.request.seed for job in jobs]
        batch = Batch(
            text=text,
            negative=negative,
            seeds=seeds,
            width=request.width,
            height=request.height,
            steps=request.steps,
            scale=request.scale,
            sampler=request.sampler,
            strength=1.0 if request.strength is None else request.strength,
        )
        if request.highres is not None:
            batch = yield from self._first_stage(jobs, batch, on_step)
        else:
            batch = self._with_starts(jobs, batch)
        yield from self._finished(jobs, batch, on_step, stage=None if request.highres is None else 1)

    def _first_stage(self, jobs: Sequence[Job], batch: Batch, on_step: Callable[[], None] | None) -> Iterator[Drawn]:
        """Yield the small pictures where they are wanted; return the batch that begins with them, enlarged."""
        images, request = self.config.images, jobs[0].request
        ratio, steps = request.highres
        size = floored((round(request.width * ratio), round(request.height * ratio)))
        small = dataclasses.replace(batch, width=size[0], height=size[1], steps=steps)
        small = self._with_starts(jobs, small)
        if images.highres_fix_strength is not None:
            small = dataclasses.replace(small, strength=images.highres_fix_strength)
        with self._at_work(self.base.unet, self.base.vae):
            latents = draw_latents(self.base, small, on_step)
        pictures = None
        if images.highres_fix_save_1st or not request.latents_upscaling:
            pictures = self._decode(latents)
        if images.highres_fix_save_1st:
            yield from (Drawn(job, picture, 0) for job, picture in zip(jobs, pictures, strict=True))
        if request.latents_upscaling:
            larger = (request.height // 8, request.width // 8)
            starts = torch.nn.functional.interpolate(latents.float(), larger, mode="bicubic").to(latents.dtype)
        else:
            starts = [fitted(picture, (request.width, request.height)) for picture in pictures]
        controls = None if images.highres_fix_disable_control_net else self._controls(jobs, batch.width, batch.height)
        seeds = [seed + 1 for seed in batch.seeds]
        return dataclasses.replace(batch, starts=starts, seeds=seeds, controls=controls)

    def _finished(
        self, jobs: Sequence[Job], batch: Batch, on_step: Callable[[], None] | None, *, stage: int | None
    ) -> Iterator[Drawn]:
        with self._at_work(self.base.unet, *([] if batch.starts is None else [self.base.vae])):
            latents = draw_latents(self.base, batch, on_step)
        for index, (job, picture) in enumerate(zip(jobs, self._decode(latents), strict=True)):
            image = picture
            if batch.masks is not None:  # what the mask keeps is kept to the bit
                image = Image.composite(picture, batch.starts[index], batch.masks[index])
            yield Drawn(job, image, stage)

    def _with_starts(self, jobs: Sequence[Job], batch: Batch) -> Batch:
        """Return the batch with the pictures that its jobs begin with and are guided by, in its size."""
        size = (batch.width, batch.height)
        batch = dataclasses.replace(batch, controls=self._controls(jobs, *size))
        if jobs[0].start is None:
            return batch
        starts = [fitted(load_picture(job.start), size) for job in jobs]
        masks = None
        if jobs[0].mask is not None:
            masks = [fitted(load_picture(job.mask, "L"), size) for job in jobs]
        return dataclasses.replace(batch, starts=starts, masks=masks)

    def _controls(self, jobs: Sequence[Job], width: int, height: int) -> Controls | None:
        if not self.nets:
            return None
        control = self.config.control
        weights, ratios = control.control_net_weights or (), control.control_net_ratios or ()
        preparations = control.control_net_preps or ()
        guides = []
        for index in range(len(self.nets)):
            pictures = [fitted(load_picture(job.guides[index]), (width, height)) for job in jobs]
            thresholds = thresholds_of(preparations[index]) if index < len(preparations) else None
            guides.append([picture if thresholds is None else canny(picture, *thresholds) for picture in pictures])
        return Controls(
            nets=self.nets,
            guides=guides,
            weights=[weights[index] if index < len(weights) else 1.0 for index in range(len(self.nets))],
            ends=[max(ratios[index], NEVER) if index < len(ratios) else 1.0 for index in range(len(self.nets))],
        )

    @torch.no_grad()
    def _encode(self, jobs: Sequence[Job]) -> tuple[Conditioning, Conditioning]:
        """Return the conditioning of prompts and negative prompts."""
        texts = [*(job.request.prompt for job in jobs), *(job.request.negative_prompt for job in jobs)]
        with self._at_work(*self.base.text_modules):
            both = LiveConditioner(self.base.texts).encode(texts, jobs[0].options)
        return both.part(0, len(jobs)), both.part(len(jobs), len(texts))

    def _decode(self, latents: torch.Tensor) -> list[Image.Image]:
        with self._at_work(self.base.vae):
            return decode(self.base, latents, self._vae_batch(len(latents)))

    def _vae_batch(self, size: int) -> int:
        """Return how many pictures the VAE takes at one time."""
        given = self.config.speed.vae_batch_size
        if given is None:
            return size
        return max(1, int(given if given >= 1 else given * size))

    @contextlib.contextmanager
    def _at_work(self, *modules: torch.nn.Module) -> Iterator[None]:
        """Have parts of the model on the device within it; with --offload only then."""
        if not self.config.speed.offload:
            yield
            return
        for module in modules:
            module.to(self.device)
        try:
            yield
        finally:
            for module in modules:
                module.to("cpu")


def thresholds_of(text: str) -> tuple[int, int] | None:
    """Return the thresholds of a preparation, None where there is none."""
    from library.generation.starts import read_preparation

    return read_preparation(text)


def batches(jobs: Iterator[Job], size: int) -> Iterator[list[Job]]:
    """Yield jobs in groups of at most a size that are drawn together: neighbours with the same key."""
    group: list[Job] = []
    for job in jobs:
        if group and (len(group) == size or group[-1].key != job.key):
            yield group
            group = []
        group.append(job)
    if group:
        yield group
