"""The text in which AUTOMATIC1111 and Forge record an image: prompts, networks in them, settings, further lines.

Facts are from AUTOMATIC1111 1.10.1: `modules/infotext_utils.py`, `modules/extra_networks.py`, `modules/processing.py`
and `extensions-builtin/Lora/extra_networks_lora.py`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from library.config.samplers import SAMPLER_NAMES, SAMPLERS, SamplerName
from library.errors import shortened

# Their names of samplers in small letters -> ours, without the k_ of the older ones.
SAMPLER_OF_TITLE = {row.title.lower(): name for name, row in reversed(SAMPLERS.items()) if row.title is not None}
SCHEDULES = ("Karras", "Exponential", "Polyexponential", "SGM Uniform")  # that older names of samplers end in
# Schedules that are ours, and the samplers whose automatic schedule is another.
SAME_SCHEDULES = ("", "Automatic", "Uniform")
KARRAS_BY_ITSELF: tuple[SamplerName, ...] = ("dpmsolver++",)
EMPHASIS = {"Original": "original", "No norm": "none"}

NOISE_SCHEDULE, ZERO_SNR = "Noise Schedule", "Zero Terminal SNR"  # a setting, and its value that is not the default

# Settings that are used, and those that say nothing of how the image was drawn.
USED = frozenset(
    {"Steps", "Sampler", "Schedule type", "CFG scale", "Seed", "Size", "Model", "Model hash", "Clip skip", "VAE"}
    | {NOISE_SCHEDULE, "VAE hash", "Denoising strength", "Lora hashes", "Lora strengths", "TI hashes"}
)
SILENT = frozenset(
    {"Version", "User", "Hashes", "LoRA hashes", "Batch size", "Batch pos", "Template", "Negative Template"}
    | {"Wildcard prompt", "Wildcard negative prompt", "Civitai resources", "Civitai metadata", "Created Date"}
    | {"Time taken", "App", "Parser", "Mask hash", "Init image hash"}
)
# Settings that change nothing with these values.
NEUTRAL = {"RNG": ("CPU",), "ENSD": ("0",), "Variation seed strength": ("0", "0.0"), "Emphasis": tuple(EMPHASIS)}

OTHER_NETWORKS = "Networks of other modules"
NEGATIVE = "Negative prompt:"
NETWORK_TAGS = ("lora", "lyco")
TAG_KINDS = (*NETWORK_TAGS, "hypernet")
TAG = re.compile(r"<(\w+):([^>]+)>")
NO_TAG = re.compile(r"[:=<>]")  # what a name cannot have in a tag
PAIR = re.compile(r"(.+?):\s*([^\s:,]+)(?:,|$)")  # a name may have commas
# Words that change during the sampling: [dog:cat:0.5], [cat:10], [dog::0.5], [dog|cat]; prompts that are joined: AND.
CHANGING = re.compile(r"(?<!\\)\[(?:[^\[\]]*:\s*\d*\.?\d+\s*|[^\[\]]*\|[^\[\]]*)\]")
JOINING = re.compile(r"\bAND\b")
SETTING = re.compile(r'[ \t]*(?P<key>\w[\w /().-]*):[ \t]*(?P<value>"(?:\\.|[^"\\])*"|[^,\n]*)[ \t]*(?P<end>,|\n|\Z)')
NO_SETTING = re.compile(r"[^,\n]*(?P<end>,|\n|\Z)")
LEAST_SETTINGS = 3  # of a line of settings
MOST_SHOWN = 40  # characters of a value in a message


# --------------------------------------------------------------------------------------------------------------
# Lines and settings
# --------------------------------------------------------------------------------------------------------------


class Parts(NamedTuple):
    """A text in its parts; further are the settings in lines after those of the image."""

    prompt: str
    negative_prompt: str
    settings: dict[str, str]
    further: dict[str, str]


def parts_of(text: str) -> Parts | None:
    """Return the parts of a text; None where it has no settings.

    They begin with a line of at least three settings, Steps among them; what extensions write may follow, as rest of a
    value in quotes or in lines of their own.
    """
    lines = text.replace("\r\n", "\n").strip().split("\n")
    found = [(index, *settings_at("\n".join(lines[index:]))) for index, line in enumerate(lines) if "Steps:" in line]
    found = [entry for entry in found if is_of_image(entry[1])]
    first = [entry for entry in found if lines[entry[0]].startswith("Steps:")]
    if not found:
        return None
    index, settings, rest = (first or found)[-1]
    before = "\n".join(["", *lines[:index]])
    prompt, _, negative = before.partition(f"\n{NEGATIVE}")
    further: dict[str, str] = {}
    for line in rest.split("\n"):
        further = settings_at(line)[0] | further
    return Parts(prompt.strip(), negative.strip(), settings, further)


def is_of_image(settings: Mapping[str, str]) -> bool:
    """Return whether settings are those of an image."""
    return "Steps" in settings and (len(settings) >= LEAST_SETTINGS or "Seed" in settings)


def settings_at(text: str) -> tuple[dict[str, str], str]:
    """Return the settings with which a text begins, and what follows in the next lines."""
    settings: dict[str, str] = {}
    at = 0
    while at < len(text):
        if match := SETTING.match(text, at):
            settings[match["key"].strip()] = unquoted(match["value"])
        match = match or NO_SETTING.match(text, at)
        assert match is not None  # the second one matches anything
        at = match.end()
        if match["end"] != ",":
            break
    return settings, text[at:]


def quoted(value: object) -> str:
    """Return a setting as it is written: in quotes where it has what separates settings."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\n]", text) else text


def unquoted(text: str) -> str:
    """Return what a setting says; some extensions leave line breaks in quotes as they are."""
    try:
        return str(json.loads(text, strict=False)) if text.startswith('"') else text.strip()
    except ValueError:
        return text.strip(' "')


def pairs_of(text: str) -> tuple[tuple[str, str], ...]:
    """Return name and value of `name: value, name: value`."""
    return tuple((name.strip(), value.strip()) for name, value in PAIR.findall(text))


def number(value: float) -> str:
    """Return a number as short as it can be without being another one."""
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))


def not_used(settings: Mapping[str, str]) -> list[str]:
    """Return the settings that change an image there and are not used here, as `key: value`."""
    return [
        f"{key}: {shortened(' '.join(value.split()), MOST_SHOWN)}"
        for key, value in settings.items()
        if key not in USED | SILENT and key != OTHER_NETWORKS and value not in NEUTRAL.get(key, ())
    ]


def sampler_of(word: str, schedule: str) -> tuple[SamplerName | None, list[str]]:
    """Return our name of a sampler, None if it is not here, and the schedule if it is another than ours.

    Older programs have the schedule in the sampler's name.
    """
    for ending in SCHEDULES:
        if word.endswith(f" {ending}"):
            word, schedule = word.removesuffix(f" {ending}"), ending
    wanted = SAMPLER_OF_TITLE.get(word.lower(), word)
    name = next((known for known in SAMPLER_NAMES if known == wanted), None)
    if schedule == "Automatic" and name in KARRAS_BY_ITSELF:
        return name, ["Schedule type: Automatic, which is Karras there"]
    return name, [] if schedule in SAME_SCHEDULES else [f"Schedule type: {schedule}"]


# --------------------------------------------------------------------------------------------------------------
# Networks in prompts
# --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class NetworkTag:
    """A network in a prompt, as `<lora:name:0.8>`."""

    name: str
    strength: float


def tag_of(name: str, strength: float) -> str | None:
    """Return the tag of a network; None for a name that cannot stand in one."""
    return None if NO_TAG.search(name) else f"<lora:{name}:{number(strength)}>"


def without_marks(name: str) -> str:
    """Return a name as it stands beside a hash, without what separates them."""
    return name.replace(":", "").replace(",", "")


def tags_in(text: str) -> list[str]:
    """Return the tags of networks in a prompt, as they stand in it."""
    return [match[0] for match in TAG.finditer(text) if match[1].lower() in TAG_KINDS]


def only_words_here(prompt: str, negative_prompt: str) -> list[str]:
    """Return what AUTOMATIC1111 does not read as mere words in prompts without tags, and this suite does.

    It joins prompts by AND, but not in the negative one.
    """
    found = [*CHANGING.findall(prompt), *CHANGING.findall(negative_prompt), *JOINING.findall(prompt)]
    return list(dict.fromkeys(found))


def without_tags(prompt: str, kinds: Iterable[str] | None = None) -> tuple[str, list[NetworkTag], list[str]]:
    """Return a prompt without tags, the networks that they name, and what of them is not used.

    kinds limits which tags are taken out; None takes all, as AUTOMATIC1111 does.
    """
    tags: list[NetworkTag] = []
    left: list[str] = []

    def taken(match: re.Match[str]) -> str:
        kind = match[1].lower()
        if kinds is not None and kind not in kinds:
            return match[0]
        tag, rest = network_tag(match[2]) if kind in NETWORK_TAGS else (None, match[0])
        if tag is not None:
            tags.append(tag)
        if rest:
            left.append(rest if rest == match[0] else f"{rest} of {match[0]}")
        return ""

    text = TAG.sub(taken, prompt)
    return text.strip(), tags, left


def network_tag(text: str) -> tuple[NetworkTag | None, str]:
    """Return the network of `name:text encoder:U-Net:...`, and what of it is not used.

    A network has one strength here, that of the U-Net.
    """
    items = text.split(":")
    named = dict(item.split("=", 1) for item in items[1:] if "=" in item)
    name, *numbers = [items[0], *(item for item in items[1:] if "=" not in item)]
    try:
        both = [float(word) for word in numbers[:2]] or [1.0]
        encoder = float(named.pop("te", both[0]))
        unet = float(named.pop("unet", both[-1] if len(both) > 1 else encoder))
        if not math.isfinite(encoder + unet):
            raise ValueError
    except ValueError:
        return None, f"<lora:{text}>"
    rest = [f"{key}={value}" for key, value in named.items()] + numbers[2:]
    if encoder != unet:
        rest.insert(0, f"the strength {number(encoder)} for the text encoder")
    return NetworkTag(name.strip(), unet), ", ".join(rest)
