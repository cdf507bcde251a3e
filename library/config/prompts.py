"""Prompts with options: in a line, such as `a cat --w 512 --d 1`, or as a table in TOML or JSON.

`PromptLine` declares every option once, for the lines of gen_img_diffusers.py, for the axes of its --grid, and for the
previews of a training, which take those of `PREVIEW_KEYS`.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from library.config import toml_text
from library.config.kinds import read_float, read_int
from library.config.options import REQUIRED, Option, option, section_options, unknown_message
from library.config.retired import Retired
from library.config.samplers import SamplerName
from library.config.values import MOST_PIXELS, MOST_SEED, latent_side
from library.errors import Problems, UserError, shown

logger = logging.getLogger(__name__)


def _without_reason(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a reading whose ValueError has no text: what int() and float() say of a word is not for users."""

    def parse(value: Any) -> Any:
        try:
            return read(value)
        except ValueError:
            raise ValueError from None

    return parse


@_without_reason
def parse_step_count(value: Any) -> int:
    """Return a number of steps, brought into 1 to 1000 as sd-scripts does."""
    return min(1000, max(1, read_int(value)))


@_without_reason
def parse_whole_numbers(value: Any) -> tuple[int, ...]:
    """Return whole numbers from a text with commas between them, a list, or one number."""
    return tuple(read_int(item) for item in _items(value))


@_without_reason
def parse_numbers(value: Any) -> tuple[float, ...]:
    """Return numbers from a text with commas between them, a list, or one number."""
    return tuple(read_float(item) for item in _items(value))


def _items(value: Any) -> Sequence[Any]:
    return value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptLine:
    """A prompt with its options as they were given; None where an option was not."""

    prompt: str = option(REQUIRED, "what the image shows", file_only=True)
    negative_prompt: str | None = option(None, "what the image does not show", flag="n")
    width: int | None = option(None, "width in pixels", flag="w", minimum=1, maximum=MOST_PIXELS)
    height: int | None = option(None, "height in pixels", flag="h", minimum=1, maximum=MOST_PIXELS)
    steps: int | None = option(None, "steps of the sampler", flag="s", parse=parse_step_count, form="a whole number")
    seeds: tuple[int, ...] | None = option(
        None,
        "seeds, one for each image; the last is for all that are left",
        flag="d",
        parse=parse_whole_numbers,
        form="seeds from 0 on, with commas between",
        minimum=0,
        maximum=MOST_SEED,
    )
    scale: float | None = option(None, "guidance scale", flag="l")
    strength: float | None = option(None, "how much of an image is changed", flag="t", minimum=0, maximum=1)
    multipliers: tuple[float, ...] | None = option(
        None,
        "strengths of the networks; the last is for all that are left",
        flag="am",
        parse=parse_numbers,
        form="numbers with commas between",
    )
    file_name: str | None = option(None, "name of the file", flag="f")
    sampler: SamplerName | None = option(None, "sampler", flag="ss")
    original_width: int | None = option(None, "SDXL: original width", flag="ow", minimum=0, maximum=MOST_PIXELS)
    original_height: int | None = option(None, "SDXL: original height", flag="oh", minimum=0, maximum=MOST_PIXELS)
    original_width_negative: int | None = option(
        None, "SDXL: original width for the negative prompt", flag="nw", minimum=0, maximum=MOST_PIXELS
    )
    original_height_negative: int | None = option(
        None, "SDXL: original height for the negative prompt", flag="nh", minimum=0, maximum=MOST_PIXELS
    )
    crop_top: int | None = option(None, "SDXL: rows cut off at the top", flag="ct", minimum=0, maximum=MOST_PIXELS)
    crop_left: int | None = option(None, "SDXL: columns cut off at the left", flag="cl", minimum=0, maximum=MOST_PIXELS)
    place: str = ""  # for messages: file and number


# What models that take sizes are told of an image, in prompts and in the options of a run.
SIZES = (
    *("original_width", "original_height", "original_width_negative", "original_height_negative"),
    *("crop_top", "crop_left"),
)
OPTIONS: Mapping[str, Option] = {entry.field: entry for entry in section_options(PromptLine)}
LINE_OPTIONS: Mapping[str, Option] = {entry.flag: entry for entry in OPTIONS.values() if not entry.spec.file_only}
# What a preview takes: key in TOML and JSON -> option.
PREVIEW_KEYS: Mapping[str, Option] = {
    "prompt": OPTIONS["prompt"],
    "negative_prompt": OPTIONS["negative_prompt"],
    "width": OPTIONS["width"],
    "height": OPTIONS["height"],
    "seed": OPTIONS["seeds"],
    "sample_steps": OPTIONS["steps"],
    "scale": OPTIONS["scale"],
    "sample_sampler": OPTIONS["sampler"],
}
PREVIEW_OPTIONS = {flag: entry for flag, entry in LINE_OPTIONS.items() if entry in PREVIEW_KEYS.values()}

_SHRINK = "Deep Shrink is not part of this suite: draw small first with --highres_fix_scale"
_GRADUAL = "Gradual Latent is not part of this suite: draw small first with --highres_fix_scale"
_OTHER_MODELS = ("g", "guidance_scale", "ctr", "cfg_trunc_ratio", "rcfg", "renorm_cfg", "fs", "flow_shift")
RETIRED_OPTIONS = {
    **{
        name: Retired(name, reason)
        for name, reason in {
            "nl": "three-way guidance is not part of diffusers' pipelines; --n and --l are",
            "c": "CLIP guidance is not part of this suite",
            **dict.fromkeys(("dsd1", "dst1", "dsd2", "dst2", "dsr"), _SHRINK),
            **dict.fromkeys(("glt", "glr", "gls", "gle", "glsn", "glus"), _GRADUAL),
        }.items()
    },
    **{name: Retired(name, "it is for other models", harmless=True) for name in _OTHER_MODELS},
    **{name: Retired(name, "ControlNets are not trained", harmless=True) for name in ("cn", "controlnet_image")},
    "enum": Retired("enum", "prompts are numbered by themselves", harmless=True),
}


def parse_line(line: str, place: str, options: Mapping[str, Option] = LINE_OPTIONS) -> PromptLine:
    """Return the prompt and the options of a line; of an option that stands twice, the last.

    place names the line in messages. Raises UserError for what cannot be read and for an option that is not among
    the options.
    """
    text, *words = re.split(r"\s--", f" {line.strip()}")
    pairs = [(name.lower(), value.strip()) for name, value in (_name_and_value(word) for word in words)]
    read = PromptLine(prompt=text.strip(), place=place, **_read(pairs, options, place, "--"))
    for found in ONE_DASH.finditer(f"{read.prompt}\n{read.negative_prompt or ''}"):
        if found[2].lower() in options:
            logger.warning("%s: %s is read as part of the prompt: write --%s, with two dashes", place, *found.groups())
    return read


# A hyphen, or dashes that a word processor or a Japanese keyboard makes of two.
ONE_DASH = re.compile(r"(?<!\S)((?:-|[\u2010-\u2015\u2212\uff0d\u30fc]{1,2})(\w+))(?=\s+\S)")


def _name_and_value(word: str) -> tuple[str, str]:
    name, *value = word.split(maxsplit=1) or [""]
    return name, value[0] if value else ""


def parse_lines(path: Path, parse: Callable[[str, str], PromptLine] = parse_line) -> list[PromptLine]:
    """Return the lines of a file without empty ones and comments; raises one UserError for all that cannot be read."""
    lines, problems = [], Problems()
    for number, text in enumerate(toml_text.read_text(path).splitlines(), 1):
        if text.strip() and not text.strip().startswith("#"):
            lines.append(problems.run(parse, text, f"{path}:{number}"))
    problems.raise_if_any()
    return [line for line in lines if line is not None]


def _read(given: Iterable[tuple[str, Any]], known: Mapping[str, Option], place: str, prefix: str) -> dict[str, Any]:
    """Return field -> value of options by their names; without those that are ignored or null."""
    values = {}
    for name, value in given:
        label = f"{place}: {prefix}{name}"
        if name in RETIRED_OPTIONS and RETIRED_OPTIONS[name].harmless:
            logger.warning("%s is ignored: %s", label, RETIRED_OPTIONS[name].reason)
        elif prefix and name not in known and name in LINE_OPTIONS:
            raise UserError(f"{label} is an option of gen_img_diffusers.py, which previews do not have: leave it out")
        elif name not in known:
            names = "" if name in RETIRED_OPTIONS else f" (known: {' '.join(prefix + entry for entry in known)})"
            raise UserError(unknown_message(label, name, known, RETIRED_OPTIONS) + names)
        elif value is not None:
            values[known[name].field] = known[name].read(value, label)
    return values


# --------------------------------------------------------------------------------------------------------------
# Previews
# --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The prompt of a preview. Sizes are in pixels, multiples of 8; None: the side of the model's family."""

    prompt: str
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    seed: int | None = None  # None: the run has one for it
    steps: int = 30
    scale: float = 7.5
    sampler: SamplerName | None = None  # None: that of --sample_sampler


def read_prompts(path: Path) -> list[Prompt]:
    """Return the prompts of a .txt, .toml or .json file; raises UserError that names file and place."""
    suffix = path.suffix.lower()
    readers = {".txt": _read_text, ".toml": _read_toml, ".json": _read_json}
    if suffix not in readers:
        raise UserError(f"--sample_prompts must be a .txt, .toml or .json file, got {str(path)!r}")
    prompts = [preview_of(line) for line in readers[suffix](path)]
    if not prompts:
        raise UserError(f"--sample_prompts: {path} has no prompts")
    return prompts


def parse_preview(line: str, place: str) -> PromptLine:
    """Return the prompt and the options of a preview's line; raises UserError as `parse_line` does."""
    return parse_line(line, place, PREVIEW_OPTIONS)


def preview_of(line: PromptLine) -> Prompt:
    """Return the prompt of a preview; sizes are rounded down, as sd-scripts does.

    Raises UserError where there are several seeds, for a preview is one image.
    """
    values = {name: value for name, value in vars(line).items() if value is not None and name != "place"}
    for side in {"width", "height"} & values.keys():
        values[side] = latent_side(values[side])
    seeds = values.pop("seeds", ())
    if len(seeds) > 1:
        raise UserError(f"{line.place}: a preview is one image and has one seed, got {shown(seeds)}")
    return Prompt(seed=seeds[0] if seeds else None, **values)


def _read_text(path: Path) -> list[PromptLine]:
    return parse_lines(path, parse_preview)


def _read_toml(path: Path) -> list[PromptLine]:
    table = toml_text.load(path).get("prompt")
    if not isinstance(table, dict):
        raise UserError(f"{path} has no [prompt] table")
    defaults = {key: value for key, value in table.items() if key != "subset"}
    subsets = table.get("subset", [{}])
    if not isinstance(subsets, list) or not all(isinstance(subset, dict) for subset in subsets):
        raise UserError(f"{path}: prompt.subset must be an array of tables, written [[prompt.subset]]")
    return [_of_table(defaults | subset, f"{path}: prompt.subset[{index}]") for index, subset in enumerate(subsets)]


def _read_json(path: Path) -> list[PromptLine]:
    entries = toml_text.load_json(path)
    if not isinstance(entries, list):
        raise UserError(f"{path} must hold a list of texts or objects, got {shown(entries)}")
    lines = []
    for index, entry in enumerate(entries):
        place = f"{path}[{index}]"
        if not isinstance(entry, str | dict):
            raise UserError(f"{place} must be a text or an object, got {shown(entry)}")
        lines.append(parse_preview(entry, place) if isinstance(entry, str) else _of_table(entry, place))
    return lines


def _of_table(table: Mapping[str, Any], place: str) -> PromptLine:
    values = _read(table.items(), PREVIEW_KEYS, place, "")
    if "prompt" not in values:
        raise UserError(f"{place}: prompt is missing")
    return PromptLine(place=place, **values)
