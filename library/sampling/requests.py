"""What is to be drawn: prompt lines with options -> requests, one for each picture. Imports no torch.

A line is checked whole before anything is loaded. Its groups of variants are chosen by the seed of each picture,
so that a picture can be had again by its seed.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from library.config import toml_text
from library.config.generation import DrawingConfig, GenerateConfig, PromptConfig
from library.config.options import nearest, read_float, read_int
from library.config.values import MOST_PIXELS
from library.errors import UserError, shown
from library.files import WRITTEN_FORMATS
from library.sampling import dynamic_prompts
from library.sampling.prompts import check_sampler_name
from library.sampling.samplers import check_sampler

DEFAULT_SIDE = 512
MOST_SEED = 2**31 - 1  # of those that are drawn, as in sd-scripts


@dataclasses.dataclass(frozen=True)
class Line:
    """A prompt line: its text with groups of variants, and what its options say."""

    text: str
    options: Mapping[str, Any]
    place: str  # for messages: file and number


@dataclasses.dataclass(frozen=True)
class Request:
    """One picture to draw. Sizes are in pixels, multiples of 8; None is left to what the run has."""

    prompt: str
    seed: int
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    steps: int = 50
    scale: float = 7.5
    sampler: str = "ddim"
    strength: float | None = None
    multipliers: tuple[float, ...] | None = None
    file_name: str | None = None
    raw: str = ""  # the line as it was given
    clip_skip: int | None = None
    max_windows: int | None = None
    normalize: str | None = None
    highres: tuple[float, int] | None = None  # ratio of the first size, steps of the first stage
    latents_upscaling: bool | None = None


# --------------------------------------------------------------------------------------------------------------
# Options of a line
# --------------------------------------------------------------------------------------------------------------


def _side(text: str) -> int:
    pixels = read_int(text)
    if not 64 <= pixels <= MOST_PIXELS or pixels % 8:
        raise ValueError
    return pixels


def _scale(text: str) -> float:
    value = read_float(text)
    if not -1e6 < value < 1e6:
        raise ValueError
    return value


def _strength(text: str) -> float:
    value = read_float(text)
    if not 0 <= value <= 1:
        raise ValueError
    return value


def _seeds(text: str) -> tuple[int, ...]:
    seeds = tuple(read_int(word) for word in text.split(","))
    if not all(0 <= seed < 2**63 for seed in seeds):
        raise ValueError
    return seeds


def _multipliers(text: str) -> tuple[float, ...]:
    return tuple(_scale(word) for word in text.split(","))


def _file_name(text: str) -> str:
    if not text or Path(text).suffix.lower() not in PICTURE_SUFFIXES:
        raise ValueError
    if Path(text).is_absolute() or ".." in Path(text).parts:
        raise ValueError
    return text


def _sampler(text: str) -> str:
    check_sampler(check_sampler_name(text))
    return text


PICTURE_SUFFIXES = tuple(suffix for suffix in WRITTEN_FORMATS if suffix != ".bmp")  # which cannot hold texts
SIDE_FORM = f"a multiple of 8 from 64 to {MOST_PIXELS}"
# Option of a line -> (field, reading, how a value looks).
OPTIONS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "n": ("negative_prompt", str, "a text"),
    "w": ("width", _side, SIDE_FORM),
    "h": ("height", _side, SIDE_FORM),
    "s": ("steps", lambda text: min(1000, max(1, read_int(text))), "a whole number"),
    "d": ("seeds", _seeds, "seeds from 0 on, with commas between"),
    "l": ("scale", _scale, "a number"),
    "t": ("strength", _strength, "a number from 0 to 1"),
    "am": ("multipliers", _multipliers, "numbers with commas between"),
    "f": ("file_name", _file_name, f"a name below --outdir that ends in {', '.join(PICTURE_SUFFIXES)}"),
    "ss": ("sampler", _sampler, "a sampler"),
}
# Options of a line in sd-scripts -> why they are not here.
_SHRINK = "Deep Shrink is not part of this suite: draw small first with --highres_fix_scale"
_GRADUAL = "Gradual Latent is not part of this suite: draw small first with --highres_fix_scale"
RETIRED_OPTIONS = {
    "nl": "three-way guidance is not part of diffusers' pipelines; --n and --l are",
    "c": "CLIP guidance is not part of this suite",
    **dict.fromkeys(("dsd1", "dst1", "dsd2", "dst2", "dsr"), _SHRINK),
    **dict.fromkeys(("glt", "glr", "gls", "gle", "glsn", "glus"), _GRADUAL),
    **dict.fromkeys(("ow", "oh", "nw", "nh", "ct", "cl"), "it is for SDXL, which this script does not draw with"),
}


def parse_line(line: str, place: str) -> Line:
    """Return a line such as `a {red|blue} cat --w 512 --d 1,2 --n blurry`; raises UserError with its place."""
    text, *words = re.split(r"\s--", f" {line.strip()}")
    options: dict[str, Any] = {}
    for word in words:
        name, _, value = word.strip().partition(" ")
        name, value = name.lower(), value.strip()
        if name in RETIRED_OPTIONS:
            raise UserError(f"{place}: --{name} is not supported: {RETIRED_OPTIONS[name]}")
        if name not in OPTIONS:
            known = " ".join(f"--{known}" for known in OPTIONS)
            raise UserError(f"{place}: --{name} is not known{nearest(name, OPTIONS)} (known: {known})")
        field, reading, form = OPTIONS[name]
        try:
            options[field] = reading(value)
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
        except ValueError:
            raise UserError(f"{place}: --{name} must be {form}, got {shown(value)}") from None
    return Line(text.strip(), options, place)


def read_lines(path: Path) -> list[Line]:
    """Return the lines of a prompt file; raises UserError that names all lines that cannot be read."""
    lines, problems = [], []
    for number, text in enumerate(toml_text.read_text(path).splitlines(), 1):
        if text.strip() and not text.startswith("#"):
            try:
                lines.append(parse_line(text, f"{path}:{number}"))
            except UserError as error:
                problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    if not lines:
        raise UserError(f"--from_file: {path} has no prompts")
    return lines


# --------------------------------------------------------------------------------------------------------------
# Requests
# --------------------------------------------------------------------------------------------------------------


class Seeds:
    """The seeds of a run, in the order in which pictures ask for them; the same list as in sd-scripts.

    With one picture only, its seed is the seed of the run; with several, theirs are drawn from it.
    """

    def __init__(self, seed: int | None, num_pictures: int | None) -> None:
        self.generator = random.Random(seed)
        self.only = seed if num_pictures == 1 else None

    def next(self) -> int:
        """Return the next seed."""
        return self.generator.randint(0, MOST_SEED) if self.only is None else self.only


def requests_of(config: GenerateConfig, lines: Sequence[Line], seeds: Seeds) -> Iterator[Request]:
    """Yield a request for each picture of one repeat of the lines."""
    same = seeds.next() if config.drawing.iter_same_seed else None
    for line in lines:
        own = line.options.get("seeds", ())
        for index in range(pictures_of(line, config.prompts)):
            drawn = seeds.next() if same is None else same
            seed = own[min(index, len(own) - 1)] if own else drawn
            yield request_of(line, index, seed, config.drawing)


def pictures_of(line: Line, prompts: PromptConfig) -> int:
    """Return how many pictures a line makes in one repeat: one for each combination, where it has such groups."""
    return dynamic_prompts.num_combinations(line.text) or prompts.images_per_prompt


def num_pictures(lines: Sequence[Line], prompts: PromptConfig) -> int:
    """Return how many pictures the lines make in all repeats."""
    return prompts.n_iter * sum(pictures_of(line, prompts) for line in lines)


def request_of(line: Line, index: int, seed: int, drawing: DrawingConfig) -> Request:
    """Return the request of a line's picture; its seed chooses variants, also in the negative prompt."""
    generator = random.Random(seed)
    options = {name: value for name, value in line.options.items() if name != "seeds"}
    prompt = dynamic_prompts.expand(line.text, generator, index)
    negative = dynamic_prompts.expand(options.pop("negative_prompt", ""), generator)
    defaults = {
        "width": drawing.W,
        "height": drawing.H,
        "steps": drawing.steps,
        "scale": drawing.scale,
        "sampler": drawing.sampler,
    }
    return Request(prompt=prompt, negative_prompt=negative, seed=seed, raw=line.text, **(defaults | options))
