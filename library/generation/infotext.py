"""What a picture's file says of how it was drawn, written and read.

Three texts: `parameters` as AUTOMATIC1111 writes and reads it, the short keys of sd-scripts, and `generation`, JSON
with all that is needed to draw the picture again.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.sampling.requests import Request

KEY = "generation"
# Samplers in AUTOMATIC1111's words; names that it has not are written as they are.
SAMPLER_WORDS = {
    "ddim": "DDIM",
    "pndm": "PLMS",
    "lms": "LMS",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "dpm_2": "DPM2",
    "dpm_2_a": "DPM2 a",
    "dpmsolver++": "DPM++ 2M",
}
SAMPLERS = {word: name for name, word in SAMPLER_WORDS.items()}
# Fields of a request that are written only where they are set.
OPTIONAL = ("strength", "multipliers", "clip_skip", "max_windows", "normalize", "highres", "latents_upscaling")


@dataclasses.dataclass(frozen=True)
class RunFacts:
    """What all pictures of a run have in common."""

    model: str  # name of the file or folder
    model_sha256: str
    vae: str | None
    networks: tuple[tuple[str, str, str, float | None], ...]  # module, file, SHA-256, strength where it is merged
    dtype: str
    version: str


def texts_for(
    request: Request, facts: RunFacts, multipliers: tuple[float, ...], *, begins_with: str | None
) -> dict[str, str]:
    """Return key -> text for a picture; multipliers are those of the networks that are not merged."""
    networks = networks_of(facts, multipliers)
    table = {
        name: value
        for name, value in dataclasses.asdict(request).items()
        if name not in ("raw", "file_name") and (name not in OPTIONAL or value is not None)
    }
    table |= {
        "model": facts.model,
        "model_sha256": facts.model_sha256,
        "vae": facts.vae,
        "networks": networks,
        "dtype": facts.dtype,
        "begins_with": begins_with,
        "version": facts.version,
    }
    short = {
        "prompt": request.prompt,
        "negative-prompt": request.negative_prompt,
        "seed": str(request.seed),
        "sampler": request.sampler,
        "steps": str(request.steps),
        "scale": str(request.scale),
    }
    if request.raw and request.raw != request.prompt:
        short["raw-prompt"] = request.raw
    generation = json.dumps({key: value for key, value in table.items() if value is not None}, ensure_ascii=False)
    return {"parameters": parameters_text(request, facts, networks), **short, KEY: generation}


def networks_of(facts: RunFacts, multipliers: tuple[float, ...]) -> list[dict[str, Any]]:
    """Return the networks of a picture with their strengths."""
    left = iter(multipliers)
    return [
        {"module": module, "file": name, "sha256": digest, "strength": next(left) if merged is None else merged}
        for module, name, digest, merged in facts.networks
    ]


def parameters_text(request: Request, facts: RunFacts, networks: list[dict[str, Any]]) -> str:
    """Return the text that AUTOMATIC1111 writes under `parameters`."""
    settings: dict[str, Any] = {
        "Steps": request.steps,
        "Sampler": SAMPLER_WORDS.get(request.sampler.removeprefix("k_"), request.sampler),
        "CFG scale": f"{request.scale:g}",
        "Seed": request.seed,
        "Size": f"{request.width}x{request.height}",
        "Model hash": facts.model_sha256[:10],
        "Model": Path(facts.model).stem,
    }
    if request.strength is not None:
        settings["Denoising strength"] = f"{request.strength:g}"
    if request.clip_skip is not None:
        settings["Clip skip"] = request.clip_skip
    if networks:
        pairs = ", ".join(f"{Path(network['file']).stem}: {network['sha256'][:12]}" for network in networks)
        settings["Lora hashes"] = json.dumps(pairs, ensure_ascii=False)
        strengths = ", ".join(f"{Path(network['file']).stem}: {network['strength']:g}" for network in networks)
        settings["Lora strengths"] = json.dumps(strengths, ensure_ascii=False)
    settings["Version"] = facts.version
    lines = [request.prompt]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    return "\n".join([*lines, ", ".join(f"{key}: {value}" for key, value in settings.items())])


# --------------------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Recorded:
    """What a file says: the request, and which model, networks and picture it was drawn with, where it says that."""

    request: Request
    model_sha256: str | None = None
    networks: tuple[tuple[str, str], ...] = ()  # name of the file and SHA-256, which may be its beginning
    begins_with: str | None = None


def read_recorded(path: Path) -> Recorded:
    """Return what a picture's file says; raises UserError for one that says nothing."""
    texts = read_texts(path)
    if KEY in texts:
        try:
            return from_json(json.loads(texts[KEY]))
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path}: its text {KEY!r} is damaged: give the prompt by --prompt") from None
    if "parameters" in texts:
        return from_parameters(texts["parameters"], path)
    if "prompt" in texts:
        return from_short(texts, path)
    raise UserError(f"{path} does not say how it was drawn: it has no text 'parameters'; give the prompt by --prompt")


def read_texts(path: Path) -> Mapping[str, str]:
    """Return the texts of a PNG file; of JPEG and WebP the user comment as `parameters`."""
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
    return texts


def from_json(table: Mapping[str, Any]) -> Recorded:
    """Return what the text `generation` says."""
    fields = {field.name for field in dataclasses.fields(Request)}
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items() if key in fields}
    networks = tuple((network["file"], network["sha256"]) for network in table.get("networks", ()))
    if table.get("networks") and "multipliers" not in values:
        values["multipliers"] = tuple(network["strength"] for network in table["networks"])
    return Recorded(Request(**values), table.get("model_sha256"), networks, table.get("begins_with"))


def from_parameters(text: str, path: Path) -> Recorded:
    """Return what AUTOMATIC1111's text says."""
    *lines, last = text.strip().split("\n")
    settings = {key.strip(): value.strip(' "') for key, value in SETTING.findall(last)}
    if "Steps" not in settings:
        raise UserError(f"{path}: its text 'parameters' has no settings; give the prompt by --prompt")
    whole = "\n".join(lines)
    prompt, _, negative = whole.partition("Negative prompt:")
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
            sampler=sampler_named(settings.get("Sampler", ""), path),
            strength=float(settings["Denoising strength"]) if "Denoising strength" in settings else None,
            clip_skip=int(settings["Clip skip"]) if "Clip skip" in settings else None,
        )
    except (KeyError, ValueError):
        raise UserError(f"{path}: its text 'parameters' cannot be read; give the prompt by --prompt") from None
    networks = tuple(
        tuple(part.strip() for part in pair.rpartition(":")[::2])
        for pair in settings.get("Lora hashes", "").split(",")
        if ":" in pair
    )
    return Recorded(request, settings.get("Model hash"), networks)


SETTING = re.compile(r'\s*([\w ]+):\s*("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')


def from_short(texts: Mapping[str, str], path: Path) -> Recorded:
    """Return what the keys of sd-scripts say."""
    try:
        request = Request(
            prompt=texts["prompt"],
            negative_prompt=texts.get("negative-prompt", ""),
            seed=int(texts["seed"]),
            steps=int(texts["steps"]),
            scale=float(texts["scale"]),
            sampler=texts["sampler"],
        )
    except (KeyError, ValueError):
        raise UserError(f"{path}: what it says of itself cannot be read; give the prompt by --prompt") from None
    return Recorded(request)


def sampler_named(word: str, path: Path) -> str:
    """Return our name for a sampler in AUTOMATIC1111's words."""
    from library.sampling.prompts import SAMPLER_NAMES

    name = SAMPLERS.get(word, word)
    if name not in SAMPLER_NAMES:
        raise UserError(f"{path} was drawn with the sampler {word!r}, which is not here; give the prompt by --prompt")
    return name
