"""Prompt files for previews: lines with options, TOML or JSON -> prompts. Imports neither torch nor diffusers."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from library.config import toml_text
from library.config.options import nearest, read_float, read_int, read_str
from library.config.preview import SamplerName
from library.config.values import MOST_PIXELS
from library.errors import UserError, shown

logger = logging.getLogger(__name__)

SAMPLER_NAMES = get_args(SamplerName)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One picture to draw. Sizes are in pixels, multiples of 8."""

    prompt: str
    negative_prompt: str = ""
    width: int = 512
    height: int = 512
    seed: int | None = None
    sample_steps: int = 30
    scale: float = 7.5
    sample_sampler: str | None = None


# Option of a line -> field. Those of other model families are accepted and do nothing here.
LINE_OPTIONS = {
    "w": "width",
    "h": "height",
    "d": "seed",
    "s": "sample_steps",
    "l": "scale",
    "n": "negative_prompt",
    "ss": "sample_sampler",
}
UNUSED = {
    "g",
    "ctr",
    "rcfg",
    "fs",
    "cn",
    "guidance_scale",
    "cfg_trunc_ratio",
    "renorm_cfg",
    "flow_shift",
    "controlnet_image",
    "enum",
}


def _side(value: Any) -> int:
    pixels = max(64, read_int(value) // 8 * 8)
    if pixels > MOST_PIXELS:
        raise ValueError
    return pixels


def _seed(value: Any) -> int:
    seed = read_int(value)
    if not -(2**63) <= seed < 2**63:  # what torch takes
        raise ValueError
    return seed


def _scale(value: Any) -> float:
    scale = read_float(value)
    if not math.isfinite(scale):
        raise ValueError
    return scale


def check_sampler_name(value: Any) -> str:
    """Return the name of a sampler; raises UserError for one that is not known."""
    if value not in SAMPLER_NAMES:
        raise UserError(
            f"sampler {shown(value)} is not known{nearest(str(value), SAMPLER_NAMES)} "
            f"(known: {', '.join(SAMPLER_NAMES)})"
        )
    return value


SIDE_FORM = f"a whole number of pixels, at most {MOST_PIXELS}"
# Key -> how its value is read, and how it looks.
READ: dict[str, tuple[Callable[[Any], Any], str]] = {
    "prompt": (read_str, "a text"),
    "negative_prompt": (read_str, "a text"),
    "width": (_side, SIDE_FORM),
    "height": (_side, SIDE_FORM),
    "seed": (_seed, "a whole number of at most 63 bits"),
    "sample_steps": (lambda value: min(1000, max(1, read_int(value))), "a whole number"),
    "scale": (_scale, "a finite number"),
    "sample_sampler": (check_sampler_name, "a sampler"),
}


def read_prompts(path: Path) -> list[Prompt]:
    """Return the prompts of a .txt, .toml or .json file; raises UserError that names file and place."""
    suffix = path.suffix.lower()
    readers = {".txt": _read_lines, ".toml": _read_toml, ".json": _read_json}
    if suffix not in readers:
        raise UserError(f"--sample_prompts must be a .txt, .toml or .json file, got {str(path)!r}")
    prompts = list(readers[suffix](path))
    if not prompts:
        raise UserError(f"--sample_prompts: {path} has no prompts")
    return prompts


def _read_lines(path: Path) -> Iterable[Prompt]:
    for number, line in enumerate(toml_text.read_text(path).splitlines(), 1):
        if line.strip() and not line.strip().startswith("#"):
            yield parse_line(line, f"{path}:{number}")


def parse_line(line: str, place: str) -> Prompt:
    """Return the prompt of a line such as `a cat --w 512 --h 768 --d 1 --s 20 --l 7 --n blurry`."""
    text, *words = re.split(r"\s--", f" {line.strip()}")
    values = {"prompt": text.strip()}
    for word in words:
        name, _, value = word.strip().partition(" ")
        name = name.lower()
        if name in UNUSED:
            logger.warning("%s: --%s is for other models and is not used", place, name)
        elif name not in LINE_OPTIONS:
            raise UserError(f"{place}: --{name} is not known{nearest(name, LINE_OPTIONS)} (known: {_known()})")
        else:
            values[LINE_OPTIONS[name]] = value.strip()
    return _build(values, place)


def _known() -> str:
    return " ".join(f"--{name}" for name in LINE_OPTIONS)


def _read_toml(path: Path) -> Iterable[Prompt]:
    table = toml_text.load(path).get("prompt")
    if not isinstance(table, dict):
        raise UserError(f"{path} has no [prompt] table")
    defaults = {key: value for key, value in table.items() if key != "subset"}
    subsets = table.get("subset", [{}])
    if not isinstance(subsets, list) or not all(isinstance(subset, dict) for subset in subsets):
        raise UserError(f"{path}: prompt.subset must be an array of tables, written [[prompt.subset]]")
    for index, subset in enumerate(subsets):
        yield _build(defaults | subset, f"{path}: prompt.subset[{index}]")


def _read_json(path: Path) -> Iterable[Prompt]:
    entries = toml_text.load_json(path)
    if not isinstance(entries, list):
        raise UserError(f"{path} must hold a list of texts or objects, got {shown(entries)}")
    for index, entry in enumerate(entries):
        place = f"{path}[{index}]"
        if not isinstance(entry, str | dict):
            raise UserError(f"{place} must be a text or an object, got {shown(entry)}")
        yield parse_line(entry, place) if isinstance(entry, str) else _build(entry, place)


def _build(values: Mapping[str, Any], place: str) -> Prompt:
    read = {}
    for key, value in values.items():
        if key in UNUSED or value is None:  # null in JSON is what was left out
            continue
        if key not in READ:
            raise UserError(f"{place}: {key} is not known{nearest(key, READ)}")
        reader, form = READ[key]
        try:
            read[key] = reader(value)
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
        except ValueError:
            raise UserError(f"{place}: {key} must be {form}, got {shown(value)}") from None
    if "prompt" not in read:
        raise UserError(f"{place}: prompt is missing")
    return Prompt(**read)
