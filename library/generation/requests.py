"""Prompt lines -> requests, one for each image. Imports no torch.

A line is checked whole before anything is loaded. Its groups of variants are chosen by the seed of each image, so that
an image can be made again by its seed.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from library.config.generation import DrawingConfig, GenerateConfig, PromptConfig
from library.config.prompts import OPTIONS, SIZES, PromptLine, parse_line, parse_lines
from library.config.samplers import SamplerName
from library.config.values import LEAST_PIXELS
from library.errors import UserError, shown
from library.files import WRITTEN_FORMATS
from library.generation import dynamic_prompts
from library.sampling.samplers import check_sampler

MOST_DRAWN_SEED = 2**31 - 1  # as in sd-scripts
WITH_TEXTS = tuple(suffix for suffix in WRITTEN_FORMATS if suffix != ".bmp")  # formats that can hold texts


@dataclasses.dataclass(frozen=True)
class Request:
    """One image as it is asked for; None leaves a value to the run. Sizes are in pixels, multiples of 8.

    `clip_skip` to `latents_upscaling` come only from the file of an image that is generated again.
    """

    prompt: str
    seed: int
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    scale: float | None = None
    sampler: SamplerName | None = None
    strength: float | None = None
    multipliers: tuple[float, ...] | None = None
    original_width: int | None = None
    original_height: int | None = None
    original_width_negative: int | None = None
    original_height_negative: int | None = None
    crop_top: int | None = None
    crop_left: int | None = None
    clip_skip: int | None = None
    max_windows: int | None = None
    normalize: Literal["none", "original", "abs"] | None = None
    highres: tuple[float, int] | None = None  # ratio of the first size, steps of the first stage
    latents_upscaling: bool = False
    file_name: str | None = None
    raw: str = ""  # the prompt as it was given, with its groups of variants


# --------------------------------------------------------------------------------------------------------------
# Lines
# --------------------------------------------------------------------------------------------------------------


def read_line(text: str, place: str) -> PromptLine:
    """Return a line such as `a {red|blue} cat --w 512 --d 1,2 --n blurry`; raises UserError with its place."""
    line = parse_line(text, place)
    for field, check in CHECKS.items():
        if getattr(line, field) is not None:
            check(getattr(line, field), f"{place}: {OPTIONS[field].label}")
    return line


def read_lines(path: Path) -> list[PromptLine]:
    """Return the lines of a prompt file; raises UserError that names all lines that cannot be read."""
    lines = parse_lines(path, read_line)
    if not lines:
        raise UserError(f"--from_file: {path} has no prompts")
    return lines


def check_side(pixels: int, label: str) -> None:
    """Raise UserError for a side that latents cannot have."""
    if pixels < LEAST_PIXELS:
        raise UserError(f"{label} must be at least {LEAST_PIXELS}, got {pixels}")
    if pixels % 8:
        floor = pixels // 8 * 8
        raise UserError(f"{label} must be a multiple of 8, got {pixels}; the next are {floor} and {floor + 8}")


def _check_file_name(name: str, label: str) -> None:
    path = Path(name)
    if path.suffix.lower() not in WITH_TEXTS or path.is_absolute() or ".." in path.parts:
        raise UserError(
            f"{label} must be a name below --outdir that ends in {', '.join(WITH_TEXTS)}, got {shown(name)}"
        )


def _check_sampler(name: SamplerName, label: str) -> None:
    try:
        check_sampler(name)
    except UserError as error:
        raise UserError(f"{label}: {error}") from None


# Field of a line -> what its value must be besides what every prompt's must; raises UserError with a label.
CHECKS: dict[str, Callable[[Any, str], None]] = {
    "width": check_side,
    "height": check_side,
    "file_name": _check_file_name,
    "sampler": _check_sampler,
}


# --------------------------------------------------------------------------------------------------------------
# Requests
# --------------------------------------------------------------------------------------------------------------


class Seeds:
    """The seeds of a run, in the order in which images ask for them; the same list as in sd-scripts.

    With one image only, its seed is the seed of the run; with several, theirs are drawn from it.
    """

    def __init__(self, seed: int | None, num_images: int | None) -> None:
        self.generator = random.Random(seed)
        self.only = seed if num_images == 1 else None

    def next(self) -> int:
        """Return the next seed."""
        return self.generator.randint(0, MOST_DRAWN_SEED) if self.only is None else self.only


def all_requests(config: GenerateConfig, lines: Sequence[PromptLine]) -> Iterator[Request]:
    """Yield the requests of all repeats of the lines."""
    seeds = Seeds(config.drawing.seed, num_images(lines, config.prompts))
    order = random.Random(config.drawing.seed)
    for _ in range(config.prompts.n_iter):
        shuffled = order.sample(lines, len(lines)) if config.prompts.shuffle_prompts else lines
        yield from requests_of(config.prompts, config.drawing, shuffled, seeds)


def requests_of(
    prompts: PromptConfig, drawing: DrawingConfig, lines: Sequence[PromptLine], seeds: Seeds
) -> Iterator[Request]:
    """Yield a request for each image of one repeat of the lines."""
    same = seeds.next() if drawing.iter_same_seed else None
    for line in lines:
        own = line.seeds or ()
        for index in range(images_of(line, prompts)):
            drawn = seeds.next() if same is None else same
            yield request_of(line, index, own[min(index, len(own) - 1)] if own else drawn)


def images_of(line: PromptLine, prompts: PromptConfig) -> int:
    """Return how many images a line makes in one repeat: one for each combination, where it has such groups."""
    return dynamic_prompts.num_combinations(line.prompt) or prompts.images_per_prompt


def num_images(lines: Sequence[PromptLine], prompts: PromptConfig) -> int:
    """Return how many images the lines make in all repeats."""
    return prompts.n_iter * sum(images_of(line, prompts) for line in lines)


def request_of(line: PromptLine, index: int, seed: int) -> Request:
    """Return the request of a line's image; its seed chooses variants, also in the negative prompt."""
    generator = random.Random(seed)
    return Request(
        prompt=dynamic_prompts.expand(line.prompt, generator, index),
        seed=seed,
        negative_prompt=dynamic_prompts.expand(line.negative_prompt or "", generator),
        width=line.width,
        height=line.height,
        steps=line.steps,
        scale=line.scale,
        sampler=line.sampler,
        strength=line.strength,
        multipliers=line.multipliers,
        file_name=line.file_name,
        raw=line.prompt,
        **{name: getattr(line, name) for name in SIZES},
    )
