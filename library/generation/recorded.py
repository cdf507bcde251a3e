"""What an image's file says of how it was generated: by this suite, AUTOMATIC1111, Forge or sd-scripts."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.config.samplers import SAMPLER_NAMES, SamplerName
from library.errors import UserError
from library.generation import a1111
from library.generation.init_images import floored
from library.generation.requests import Request

KEY = "generation"
EXIF, USER_COMMENT, MAKER_NOTE = 0x8769, 0x9286, 0x927C
OURS = b'{"prompt": '  # with which the text `generation` begins
# Text in a file, with what it begins -> the program whose format it is, where that cannot be read.
OTHER_PROGRAMS = (
    ("workflow", "", "ComfyUI"),
    ("prompt", "{", "ComfyUI"),
    ("invokeai_metadata", "", "InvokeAI"),
    ("invokeai_graph", "", "InvokeAI"),
    ("sd-metadata", "", "InvokeAI"),
    ("fooocus_scheme", "", "Fooocus"),
    ("Software", "NovelAI", "NovelAI"),
)


@dataclasses.dataclass(frozen=True)
class RecordedNetwork:
    """A network of an image that was generated."""

    name: str  # of the file, or as it is called in the prompt
    digest: str = ""  # hash or its beginning; empty if it is not known
    strength: float | None = None


@dataclasses.dataclass(frozen=True)
class Recorded:
    """What a file says: the request, and with which model, networks and images it was generated, where it says that."""

    request: Request
    model_sha256: str | None = None
    networks: tuple[RecordedNetwork, ...] = ()
    begins_with: str | None = None
    mask: str | None = None
    embeddings: tuple[str, ...] = ()  # their words
    left: tuple[str, ...] = ()  # settings that change the image and are not used here


def read_recorded(path: Path) -> Recorded:
    """Return what a picture's file says; raises UserError for one that says nothing."""
    texts, size = read_texts(path)
    if KEY in texts:
        try:
            return from_json(json.loads(texts[KEY]))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(f"{path}: its text {KEY!r} is damaged: give the prompt by --prompt") from None
    if "parameters" in texts:
        return from_parameters(texts["parameters"], path, size)
    program = next(
        (name for key, start, name in OTHER_PROGRAMS if key in texts and texts[key].lstrip().startswith(start)), None
    )
    if program is not None:
        raise UserError(f"{path} is of {program}, whose records cannot be read here; give the prompt by --prompt")
    if "prompt" in texts:
        return from_short(texts, size, path)
    raise UserError(f"{path} does not say how it was drawn: it has no text 'parameters'; give the prompt by --prompt")


# --------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------


def read_texts(path: Path) -> tuple[Mapping[str, str], tuple[int, int]]:
    """Return the texts of a picture, and its size.

    They are the text chunks of a PNG file; in the EXIF data of other formats the user comment is `parameters`, the
    note of the maker `generation`, and ComfyUI has `workflow:` and `prompt:` before its own.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            picture.load()
            texts = {key: value for key, value in picture.info.items() if isinstance(value, str)}
            exif = picture.getexif()
            own = dict(exif.get_ifd(EXIF))
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} is not a picture that can be read: {error}") from None
    comment, note = own.get(USER_COMMENT), own.get(MAKER_NOTE)
    if isinstance(comment, bytes | str) and "parameters" not in texts:
        texts["parameters"] = comment if isinstance(comment, str) else comment_text(comment)
    if isinstance(note, bytes) and note.startswith(OURS):
        texts.setdefault(KEY, note.decode("utf-8", "replace"))
    for value in exif.values():
        match = re.match(r"(?i)(workflow|prompt):\s*(?=\{)", value) if isinstance(value, str) else None
        if match is not None:
            texts.setdefault(match[1].lower(), value[match.end() :])
    if not texts.get("parameters", "-").strip():
        del texts["parameters"]
    return texts, picture.size


def comment_text(comment: bytes) -> str:
    """Return the text of an EXIF user comment: after 8 bytes that name its encoding, of which programs differ.

    UNICODE is UTF-16 with either end first, in some files UTF-8; all others are read as UTF-8.
    """
    kind, content = comment[:8], comment[8:]
    if not kind.startswith((b"UNICODE", b"ASCII", b"JIS", b"\0")):
        return comment.decode("utf-8", "replace")
    if not kind.startswith(b"UNICODE"):
        return content.decode("utf-8", "replace").strip("\0")
    if content[:2] in (b"\xfe\xff", b"\xff\xfe"):
        return content.decode("utf-16", "replace").strip("\0")
    if b"\0" not in content.rstrip(b"\0"):  # settings are in ASCII, of which UTF-16 has half as zeros
        return content.decode("utf-8", "replace").strip("\0")
    candidates = [content.decode(encoding, "replace").strip("\0") for encoding in ("utf-16-be", "utf-16-le")]
    return max(candidates, key=lambda text: sum(map(str.isascii, text)))


# --------------------------------------------------------------------------------------------------------------
# Formats
# --------------------------------------------------------------------------------------------------------------


def from_json(table: Mapping[str, Any]) -> Recorded:
    """Return what the text `generation` says."""
    fields = {field.name for field in dataclasses.fields(Request)}
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in table.items() if key in fields
    }
    networks = tuple(
        RecordedNetwork(network["file"], network["sha256"], float(network["strength"]))
        for network in table.get("networks", ())
    )
    return Recorded(
        Request(**values | {"multipliers": None}),  # they are the strengths of the networks
        model_sha256=table.get("model_sha256"),
        networks=networks,
        begins_with=table.get("begins_with"),
        mask=table.get("mask"),
    )


def from_parameters(text: str, path: Path, size: tuple[int, int]) -> Recorded:
    """Return what AUTOMATIC1111's text says; size is that of the picture."""
    parts = a1111.parts_of(text)
    if parts is None:
        raise UserError(f"{path}: its text 'parameters' has no settings; give the prompt by --prompt")
    settings = parts.settings
    sampler, schedule = sampler_of(settings, path)
    prompt, tags, rest = a1111.without_tags(parts.prompt)
    negative, more_tags, more_rest = a1111.without_tags(parts.negative_prompt, (*a1111.NETWORK_TAGS, "hypernet"))
    sides = floored(size)
    try:
        networks = networks_of([*tags, *more_tags], settings)
        if "Size" in settings:
            sides = (int(settings["Size"].split("x")[0]), int(settings["Size"].split("x")[1]))
        request = Request(
            prompt=prompt,
            negative_prompt=negative,
            seed=int(settings["Seed"]),
            width=sides[0],
            height=sides[1],
            steps=int(settings["Steps"]),
            scale=float(settings.get("CFG scale", 7)),
            sampler=sampler,
            strength=float(settings["Denoising strength"]) if "Denoising strength" in settings else None,
            clip_skip=int(settings["Clip skip"]) if "Clip skip" in settings else None,
            normalize="none" if settings.get("Emphasis") == "No norm" else None,
        )
    except (KeyError, ValueError, IndexError):
        raise UserError(f"{path}: its text 'parameters' cannot be read; give the prompt by --prompt") from None
    return Recorded(
        request,
        model_sha256=settings.get("Model hash"),
        networks=networks,
        embeddings=tuple(name for name, _ in a1111.pairs_of(settings.get("TI hashes", ""))),
        left=(*schedule, *a1111.not_used(settings | parts.further), *rest, *more_rest),
    )


def networks_of(tags: list[a1111.NetworkTag], settings: Mapping[str, str]) -> tuple[RecordedNetwork, ...]:
    """Return the networks of an image: those in its prompt, and those of other modules in its settings.

    A network that the prompt names twice acts with both strengths. Earlier versions of the suite have the strengths in
    a setting; of a network that only has a hash the strength is not known.
    """
    digests = dict(a1111.pairs_of(settings.get("Lora hashes", "")))
    strengths: dict[str, float | None] = {}
    for tag in tags:
        strengths[tag.name] = (strengths.get(tag.name) or 0.0) + tag.strength
    for key in ("Lora strengths", a1111.OTHER_NETWORKS):
        for name, word in a1111.pairs_of(settings.get(key, "")):
            strengths.setdefault(re.sub(r" \([\w.]+\)$", "", name), float(word))
    known = {plain(name) for name in strengths}
    strengths |= {name: None for name in digests if plain(name) not in known}
    by_name = {plain(name): digest for name, digest in digests.items()}
    return tuple(RecordedNetwork(name, by_name.get(plain(name), ""), strength) for name, strength in strengths.items())


def plain(name: str) -> str:
    """Return a name as it is compared: beside a hash it stands without marks, and letters may be of either case."""
    return a1111.without_marks(name).lower()


def sampler_of(settings: Mapping[str, str], path: Path) -> tuple[SamplerName, list[str]]:
    """Return our name of the sampler, and the schedule if it is another; raises UserError for an unknown sampler."""
    word = settings.get("Sampler", "")
    name, schedule = a1111.sampler_of(word, settings.get("Schedule type", ""))
    return name or known_sampler(word, path), schedule


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


def known_sampler(name: str, path: Path) -> SamplerName:
    """Return the name of a sampler; raises UserError for one that the suite does not have."""
    for known in SAMPLER_NAMES:
        if known == name:
            return known
    raise UserError(f"{path} was drawn with the sampler {name!r}, which is not here; give the prompt by --prompt")
