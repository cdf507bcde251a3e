"""What an image's file says of how it was generated, written and read.

Three texts: `parameters` as AUTOMATIC1111 writes and reads it, the short keys of sd-scripts, and `generation`, JSON
with all that is needed to generate the image again.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.config.samplers import SAMPLER_NAMES, SAMPLERS, SamplerName
from library.errors import UserError
from library.generation.init_images import floored
from library.generation.requests import Request

if TYPE_CHECKING:
    from library.generation.jobs import Job

logger = logging.getLogger(__name__)

KEY = "generation"
# AUTOMATIC1111's names of samplers -> ours, without the k_ of the older ones.
SAMPLER_OF_TITLE = {row.title: name for name, row in reversed(SAMPLERS.items()) if row.title is not None}
# Values with which a key of `generation` is left out; of any other key it is None.
DEFAULTS = {"max_windows": 1, "normalize": "original", "latents_upscaling": False}


@dataclasses.dataclass(frozen=True)
class RunFacts:
    """What all images of a run have in common."""

    model: str  # name of the file or folder
    model_sha256: str
    vae: str | None
    networks: tuple[tuple[str, str, str, float | None], ...]  # module, file, SHA-256, strength where it is merged
    dtype: str
    version: str


def texts_for(job: Job, facts: RunFacts) -> dict[str, str]:
    """Return key -> text for an image."""
    request, settings = job.request, job.settings
    networks = networks_of(facts, settings.multipliers)
    table = {
        "prompt": request.prompt,
        "seed": request.seed,
        "negative_prompt": request.negative_prompt,
        "width": settings.width,
        "height": settings.height,
        "steps": settings.steps,
        "scale": settings.scale,
        "sampler": settings.sampler,
        "strength": settings.strength if job.begins_with_image else None,
        "multipliers": request.multipliers,
        "clip_skip": settings.text.clip_skip,
        "max_windows": job.max_windows,
        "normalize": settings.text.weights,
        "highres": settings.highres,
        "latents_upscaling": settings.latents_upscaling,
        "model": facts.model,
        "model_sha256": facts.model_sha256,
        "vae": facts.vae,
        "networks": networks,
        "dtype": facts.dtype,
        "begins_with": job.init_image.name if job.init_image else None,
        "mask": job.mask.name if job.mask else None,
        "version": facts.version,
    }
    short = {
        "prompt": request.prompt,
        "negative-prompt": request.negative_prompt,
        "seed": str(request.seed),
        "sampler": settings.sampler,
        "steps": str(settings.steps),
        "scale": str(settings.scale),
    }
    if request.raw and request.raw != request.prompt:
        short["raw-prompt"] = request.raw
    said = {key: value for key, value in table.items() if value != DEFAULTS.get(key)}
    return {
        "parameters": parameters_text(job, facts, networks),
        **short,
        KEY: json.dumps(said, ensure_ascii=False),
    }


def networks_of(facts: RunFacts, multipliers: tuple[float, ...]) -> list[dict[str, Any]]:
    """Return the networks of an image with their strengths; multipliers are of those that are not merged."""
    left = iter(multipliers)
    return [
        {"module": module, "file": name, "sha256": digest, "strength": next(left) if merged is None else merged}
        for module, name, digest, merged in facts.networks
    ]


def parameters_text(job: Job, facts: RunFacts, networks: list[dict[str, Any]]) -> str:
    """Return the text that AUTOMATIC1111 writes under `parameters`."""
    request, used = job.request, job.settings
    settings: dict[str, Any] = {
        "Steps": used.steps,
        "Sampler": SAMPLERS[used.sampler].title or used.sampler,
        "CFG scale": f"{used.scale:g}",
        "Seed": request.seed,
        "Size": f"{used.width}x{used.height}",
        "Model hash": facts.model_sha256[:10],
        "Model": Path(facts.model).stem,
    }
    if job.begins_with_image:
        settings["Denoising strength"] = f"{used.strength:g}"
    if used.text.clip_skip is not None:
        settings["Clip skip"] = used.text.clip_skip
    if networks:
        pairs = ", ".join(f"{Path(network['file']).stem}: {network['sha256'][:12]}" for network in networks)
        settings["Lora hashes"] = pairs
        strengths = ", ".join(f"{Path(network['file']).stem}: {network['strength']:g}" for network in networks)
        settings["Lora strengths"] = strengths
    settings["Version"] = facts.version
    lines = [request.prompt]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    return "\n".join([*lines, ", ".join(f"{key}: {quoted(value)}" for key, value in settings.items())])


def quoted(value: object) -> str:
    """Return a setting as AUTOMATIC1111 writes it: in quotes where it has what separates settings."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\n]", text) else text


def unquoted(text: str) -> str:
    """Return what a setting says."""
    try:
        return str(json.loads(text)) if text.startswith('"') else text.strip()
    except ValueError:
        return text.strip(' "')


# --------------------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Recorded:
    """What a file says: the request, and with which model, networks and images it was generated, where it says that."""

    request: Request
    model_sha256: str | None = None
    networks: tuple[tuple[str, str], ...] = ()  # name of the file and SHA-256, which may be its beginning
    strengths: tuple[float, ...] = ()  # of these networks, where the file has them
    begins_with: str | None = None
    mask: str | None = None


def read_recorded(path: Path) -> Recorded:
    """Return what a picture's file says; raises UserError for one that says nothing."""
    texts, size = read_texts(path)
    if KEY in texts:
        try:
            return from_json(json.loads(texts[KEY]))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(f"{path}: its text {KEY!r} is damaged: give the prompt by --prompt") from None
    if "parameters" in texts:
        return from_parameters(texts["parameters"], path)
    if "prompt" in texts:
        return from_short(texts, size, path)
    raise UserError(f"{path} does not say how it was drawn: it has no text 'parameters'; give the prompt by --prompt")


def read_texts(path: Path) -> tuple[Mapping[str, str], tuple[int, int]]:
    """Return the texts of a PNG file, of JPEG and WebP the user comment as `parameters`; and the picture's size."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            picture.load()
            texts = {key: value for key, value in picture.info.items() if isinstance(value, str)}
            comment = picture.getexif().get_ifd(0x8769).get(0x9286)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} is not a picture that can be read: {error}") from None
    if isinstance(comment, bytes) and "parameters" not in texts:
        texts["parameters"] = comment[8:].decode("utf-16-be" if comment[:7] == b"UNICODE" else "utf-8", "replace")
    return texts, picture.size


def from_json(table: Mapping[str, Any]) -> Recorded:
    """Return what the text `generation` says."""
    fields = {field.name for field in dataclasses.fields(Request)}
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in table.items() if key in fields
    }
    networks = tuple((network["file"], network["sha256"]) for network in table.get("networks", ()))
    strengths = tuple(float(network["strength"]) for network in table.get("networks", ()))
    values["multipliers"] = strengths or None
    began = (table.get("begins_with"), table.get("mask"))
    return Recorded(Request(**values), table.get("model_sha256"), networks, strengths, *began)


def from_parameters(text: str, path: Path) -> Recorded:
    """Return what AUTOMATIC1111's text says."""
    *lines, last = text.strip().split("\n")
    settings = {key.strip(): unquoted(value) for key, value in SETTING.findall(last)}
    if "Steps" not in settings:
        raise UserError(f"{path}: its text 'parameters' has no settings; give the prompt by --prompt")
    prompt, _, negative = "\n".join(["", *lines]).partition("\nNegative prompt:")
    strengths = tuple(float(text) for _, text in pairs_of(settings.get("Lora strengths", "")))
    sampler = sampler_named(settings.get("Sampler", ""), settings.get("Schedule type", ""), path)
    try:
        width, height = (int(side) for side in settings.get("Size", "512x512").split("x"))
        request = Request(
            prompt=prompt.strip(),
            negative_prompt=negative.strip(),
            seed=int(settings["Seed"]),
            width=width,
            height=height,
            steps=int(settings["Steps"]),
            scale=float(settings.get("CFG scale", 7)),
            sampler=sampler,
            strength=float(settings["Denoising strength"]) if "Denoising strength" in settings else None,
            clip_skip=int(settings["Clip skip"]) if "Clip skip" in settings else None,
            multipliers=strengths or None,
        )
    except (KeyError, ValueError):
        raise UserError(f"{path}: its text 'parameters' cannot be read; give the prompt by --prompt") from None
    return Recorded(request, settings.get("Model hash"), pairs_of(settings.get("Lora hashes", "")), strengths)


def pairs_of(text: str) -> tuple[tuple[str, str], ...]:
    """Return name and value of `name: value, name: value`."""
    return tuple((name.strip(), value.strip()) for name, value in PAIR.findall(text))


PAIR = re.compile(r"(.+?):\s*([^\s:,]+)(?:,|$)")  # a name may have commas
SETTING = re.compile(r'\s*(\w[\w /-]*):\s*("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')


def from_short(texts: Mapping[str, str], size: tuple[int, int], path: Path) -> Recorded:
    """Return what the keys of sd-scripts say; the size is that of the picture."""
    try:
        request = Request(
            prompt=texts["prompt"],
            negative_prompt=texts.get("negative-prompt", ""),
            seed=int(texts["seed"]),
            width=floored(size)[0],
            height=floored(size)[1],
            steps=int(texts["steps"]),
            scale=float(texts["scale"]),
            sampler=known_sampler(texts["sampler"], path),
        )
    except (KeyError, ValueError):
        raise UserError(f"{path}: what it says of itself cannot be read; give the prompt by --prompt") from None
    return Recorded(request)


def sampler_named(word: str, schedule: str, path: Path) -> SamplerName:
    """Return our name for a sampler in AUTOMATIC1111's words; older ones have the schedule in the sampler's name."""
    if word.endswith(" Karras"):
        word, schedule = word.removesuffix(" Karras"), "Karras"
    if schedule not in ("", "Automatic"):
        logger.warning("%s: the schedule %s is not here; that of the sampler %s is taken", path, schedule, word)
    return known_sampler(SAMPLER_OF_TITLE.get(word, word), path)


def known_sampler(name: str, path: Path) -> SamplerName:
    """Return the name of a sampler; raises UserError for one that the suite does not have."""
    for known in SAMPLER_NAMES:
        if known == name:
            return known
    raise UserError(f"{path} was drawn with the sampler {name!r}, which is not here; give the prompt by --prompt")
