"""Requests -> jobs: every value that a request leaves open is looked up in the options of the run, once."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

from library.config.generation import DrawingConfig, ImageConfig, PromptConfig
from library.config.prompts import SIZES
from library.config.samplers import SamplerName
from library.config.values import given
from library.generation.init_images import ImageList, floored, load_image
from library.generation.networks import LoadedNetworks
from library.generation.requests import Request
from library.models.base import TextEncoder
from library.models.conditioning import TextOptions, tokenize
from library.models.family import ModelFamily
from library.sampling.pipelines import PictureSizes

logger = logging.getLogger(__name__)

DEFAULT_STRENGTH = 0.8


@dataclasses.dataclass(frozen=True)
class Settings:
    """What images must have in common to be generated in one batch. Sizes are in pixels, multiples of 8."""

    width: int
    height: int
    steps: int
    scale: float
    sampler: SamplerName
    text: TextOptions  # of prompt and negative prompt, in as many windows as the longer one needs
    multipliers: tuple[float, ...]  # of the networks that are not merged
    strength: float = 1.0  # of the change, where there is an image to begin with
    highres: tuple[float, int] | None = None  # ratio of the first size, steps of the first stage
    latents_upscaling: bool = False
    sizes: PictureSizes | None = None  # None: the model takes none


@dataclasses.dataclass(frozen=True)
class Job:
    """An image that is to be generated, with nothing left open."""

    number: int  # of the image in the run, from 0
    request: Request  # as it was asked for
    settings: Settings
    max_windows: int  # that the texts may fill
    init_image: Path | None = None
    mask: Path | None = None
    control_images: tuple[Path, ...] = ()

    @property
    def begins_with_image(self) -> bool:
        """Whether sampling begins with an image, one that was given or that of a first stage."""
        return self.init_image is not None or self.settings.highres is not None

    @property
    def batch_key(self) -> tuple[object, ...]:
        """What jobs must have in common to be generated in one batch."""
        return self.settings, self.init_image is None, self.mask is None


@dataclasses.dataclass(frozen=True)
class ImageLists:
    """The images of a run to begin with and to be guided by."""

    init_images: ImageList | None = None
    masks: ImageList | None = None
    control_images: tuple[ImageList, ...] = ()


@dataclasses.dataclass(frozen=True)
class JobMaker:
    """Makes the jobs of a run."""

    prompts: PromptConfig
    drawing: DrawingConfig
    images: ImageConfig
    lists: ImageLists
    networks: LoadedNetworks
    family: ModelFamily
    side: int  # of pictures that are asked for without a size
    encoder: TextEncoder  # any of the model: all its tokenizers split words alike

    def job_of(self, request: Request, number: int) -> Job:
        """Return the job of a request, the image of a number in the run."""
        lists = self.lists
        init_image = lists.init_images.path_of(number) if lists.init_images else None
        max_windows = request.max_windows or self.prompts.max_embeddings_multiples or 1
        return Job(
            number=number,
            request=request,
            settings=self._settings(request, init_image, max_windows),
            max_windows=max_windows,
            init_image=init_image,
            mask=lists.masks.path_of(number) if lists.masks else None,
            control_images=tuple(images.path_of(number) for images in lists.control_images),
        )

    def _settings(self, request: Request, init_image: Path | None, max_windows: int) -> Settings:
        drawing, images = self.drawing, self.images
        width, height = self._size(request, init_image)
        highres = request.highres
        if highres is None and images.highres_fix_scale is not None:
            highres = (images.highres_fix_scale, images.highres_fix_steps)
        strength = 1.0
        if init_image is not None or highres is not None:
            strength = given(request.strength, given(images.strength, DEFAULT_STRENGTH))
        return Settings(
            width=width,
            height=height,
            steps=given(request.steps, drawing.steps),
            scale=given(request.scale, drawing.scale),
            sampler=given(request.sampler, drawing.sampler),
            text=self._text_options(request, max_windows),
            multipliers=self.networks.multipliers(request.multipliers),
            strength=strength,
            highres=highres,
            latents_upscaling=highres is not None
            and (images.highres_fix_latents_upscaling or request.latents_upscaling),
            sizes=self._sizes(request),
        )

    def _sizes(self, request: Request) -> PictureSizes | None:
        """Return what the model is told of sizes: as asked for, or of the run; warns where it takes none."""
        sizes = PictureSizes(**{name: given(getattr(request, name), getattr(self.drawing, name)) for name in SIZES})
        if self.family.takes_sizes:
            return sizes
        if sizes != PictureSizes():
            warn_of_sizes(self.family.title)
        return None

    def _size(self, request: Request, init_image: Path | None) -> tuple[int, int]:
        """Return width and height: those asked for, of the run, of the image to begin with, or the model's."""
        width, height = given(request.width, self.drawing.W), given(request.height, self.drawing.H)
        if width is not None and height is not None:
            return width, height
        own = (self.side, self.side) if init_image is None else floored(load_image(init_image).size)
        return given(width, own[0]), given(height, own[1])

    def _clip_skip(self, request: Request) -> int | None:
        """Return the layer of the text encoder to use; tells where the family has one layer only."""
        asked = given(request.clip_skip, self.prompts.clip_skip)
        used = self.family.clip_skip(asked)
        if asked is not None and used != asked:
            tell_once(self.family.clip_skip_note(asked))
        return used

    def _text_options(self, request: Request, max_windows: int) -> TextOptions:
        """Return how the texts are read, in as many windows as they need; warns of text beyond max_windows."""
        options = TextOptions(
            clip_skip=self._clip_skip(request),
            weights=given(request.normalize, self.prompts.emb_normalize_mode),
            has_breaks=True,
            keeps_ends=True,
        )
        texts = tokenize(self.encoder, [request.prompt, request.negative_prompt], options)
        room = options._replace(windows=max_windows).num_tokens
        for title, tokens in zip(("prompt", "negative prompt"), texts, strict=True):
            if tokens.windows > max_windows:
                logger.warning(
                    "the %s is too long, this is left out: %r (--max_embeddings_multiples %d has room for more)",
                    title,
                    self.encoder.tokenizer.decode(list(tokens.ids[room:])),
                    max_windows + 1,
                )
        return options._replace(windows=min(max_windows, max(tokens.windows for tokens in texts)))


@functools.cache
def tell_once(text: str) -> None:
    """Log a text, once in a process."""
    logger.info("%s", text)


@functools.cache
def warn_of_sizes(title: str) -> None:
    """Warn of sizes for a model that takes none, once in a process."""
    logger.warning(
        "%s models are told no sizes of pictures: --original_width, --crop_top and the like (--ow, --ct in prompts) "
        "have no effect",
        title,
    )


def in_batch_order(jobs: Iterable[Job]) -> Iterator[Job]:
    """Yield jobs so that those that fit into one batch follow each other."""
    by_key: dict[tuple[object, ...], list[Job]] = {}
    for job in jobs:
        by_key.setdefault(job.batch_key, []).append(job)
    for group in by_key.values():
        yield from group


def batches(jobs: Iterable[Job], size: int) -> Iterator[list[Job]]:
    """Yield neighbours that fit into one batch, at most size of them."""
    batch: list[Job] = []
    for job in jobs:
        if batch and (len(batch) == size or batch[-1].batch_key != job.batch_key):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch
