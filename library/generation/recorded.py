"""What an image's file says of how it was generated: by this suite, AUTOMATIC1111, Forge or sd-scripts."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from library.config.generation import DrawingConfig, ImageConfig, PromptConfig
from library.config.options import section_options
from library.config.prompts import SIZES
from library.config.samplers import SAMPLER_NAMES, SamplerName
from library.errors import Problems, UserError, shown
from library.generation import a1111
from library.generation.init_images import floored
from library.generation.requests import MOST_DRAWN_SEED, Request, check_side

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
OPTIONS = {
    option.field: option
    for section in (DrawingConfig, ImageConfig, PromptConfig)
    for option in section_options(section)
}
# Field of a request -> the option whose values it takes, its name in AUTOMATIC1111, and its name in sd-scripts.
NUMBERS = {
    "width": ("W", "", ""),
    "height": ("H", "", ""),
    "steps": ("steps", "Steps", "steps"),
    "scale": ("scale", "CFG scale", "scale"),
    "seed": ("seed", "Seed", "seed"),
    "strength": ("strength", "Denoising strength", ""),
    "clip_skip": ("clip_skip", "Clip skip", ""),
    **{name: (name, "", name.replace("_", "-")) for name in SIZES},
}
SIZE = re.compile(r"(\d+)x(\d+)")
DEFAULT_SCALE = 7.0  # of AUTOMATIC1111


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
    zero_snr: bool = False  # whether the model was taken to have zero terminal SNR
    networks: tuple[RecordedNetwork, ...] = ()
    begins_with: str | None = None
    mask: str | None = None
    embeddings: tuple[str, ...] = ()  # their words
    left: tuple[str, ...] = ()  # settings that change the image and are not used here
    told: tuple[str, ...] = ()  # what else is to be known of it, each a sentence


def read_recorded(path: Path, seed: int | None = None) -> Recorded:
    """Return what a picture's file says; raises UserError for one that says nothing, or what no run can have.

    seed is for a picture of which it is not known; None: a random one.
    """
    texts, size = read_texts(path)
    if KEY in texts:
        try:
            return from_json(json.loads(texts[KEY]), path)
        except UserError:  # which is a ValueError
            raise
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(f"{path}: its text {KEY!r} is damaged: give the prompt by --prompt") from None
    if "parameters" in texts:
        return from_parameters(texts["parameters"], path, size, seed)
    program = next(
        (name for key, start, name in OTHER_PROGRAMS if key in texts and texts[key].lstrip().startswith(start)), None
    )
    if program is not None:
        raise UserError(f"{path} is of {program}, whose records cannot be read here; give the prompt by --prompt")
    if "prompt" in texts:
        return from_short(texts, size, path, seed)
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


def number_of(field: str, value: Any, label: str) -> Any:
    """Return the number of a request's field in its type; raises UserError for one that its option does not take."""
    number = OPTIONS[NUMBERS[field][0]].read(value, label)
    if field in ("width", "height"):
        check_side(number, label)
    return number


def numbers_of(
    texts: Mapping[str, str], names: Mapping[str, str], path: Path, seed: int | None
) -> tuple[dict[str, Any], list[str]]:
    """Return the numbers of a request in texts, where names tell field -> key, and what is to be told of them.

    Raises UserError that names each setting that is no such number.
    """
    problems = Problems()
    found = {
        field: problems.run(number_of, field, texts[key], f"{path}: {key}")
        for field, key in names.items()
        if key in texts and texts[key] != "None"  # as sd-scripts writes sizes that were not given
    }
    problems.raise_if_any()
    if "seed" in found:
        return found, []
    found["seed"] = random.Random().randint(0, MOST_DRAWN_SEED) if seed is None else seed
    return found, [f"the seed of the picture is not recorded: it is drawn with {found['seed']}, and will differ"]


def from_json(table: Mapping[str, Any], path: Path) -> Recorded:
    """Return what the text `generation` says."""
    fields = {field.name for field in dataclasses.fields(Request)}
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in table.items() if key in fields
    }
    for field in NUMBERS.keys() & values.keys():
        if values[field] is not None:
            values[field] = number_of(field, values[field], f"{path}: its text {KEY!r}: {field}")
    if values.get("sampler") is not None:
        known_sampler(values["sampler"], path)
    networks = tuple(
        RecordedNetwork(network["file"], network["sha256"], float(network["strength"]))
        for network in table.get("networks", ())
    )
    return Recorded(
        Request(**values | {"multipliers": None}),  # they are the strengths of the networks
        model_sha256=table.get("model_sha256"),
        zero_snr=bool(table.get("zero_snr")),
        networks=networks,
        begins_with=table.get("begins_with"),
        mask=table.get("mask"),
    )


def from_parameters(text: str, path: Path, size: tuple[int, int], seed: int | None) -> Recorded:
    """Return what AUTOMATIC1111's text says; size is that of the picture, seed for one of which it is not known."""
    parts = a1111.parts_of(text)
    if parts is None:
        raise UserError(f"{path}: its text 'parameters' has no settings; give the prompt by --prompt")
    settings = parts.settings
    sampler, schedule = sampler_of(settings, path)
    prompt, tags, rest = a1111.without_tags(parts.prompt)
    negative, _, _ = a1111.without_tags(parts.negative_prompt, a1111.TAG_KINDS)
    words = [f"{word} (read as words)" for word in a1111.only_words_here(prompt, negative)]
    numbers, told = numbers_of(settings, {field: row[1] for field, row in NUMBERS.items() if row[1]}, path, seed)
    width, height = size_of(settings["Size"], path) if "Size" in settings else floored(size)
    return Recorded(
        Request(
            prompt=prompt,
            negative_prompt=negative,
            width=width,
            height=height,
            sampler=sampler,
            normalize="none" if settings.get("Emphasis") == "No norm" else None,
            **{"scale": DEFAULT_SCALE} | numbers,
        ),
        model_sha256=settings.get("Model hash"),
        zero_snr=settings.get(a1111.NOISE_SCHEDULE) == a1111.ZERO_SNR,
        networks=networks_of(tags, settings, path),
        embeddings=tuple(name for name, _ in a1111.pairs_of(settings.get("TI hashes", ""))),
        left=(*schedule, *a1111.not_used(settings | parts.further), *rest, *words),
        told=(*told, *told_of_tags(tags, parts.negative_prompt)),
    )


def size_of(text: str, path: Path) -> tuple[int, int]:
    """Return width and height of `512x768`; raises UserError for sides that latents cannot have."""
    match = SIZE.fullmatch(text)
    if match is None:
        raise UserError(f"{path}: Size must be widthxheight in pixels, such as 512x768, got {shown(text)}")
    problems = Problems()
    sides: dict[str, Any] = {
        field: problems.run(number_of, field, side, f"{path}: Size: {text}: the {field}")
        for field, side in zip(("width", "height"), match.groups(), strict=True)
    }
    problems.raise_if_any()
    return sides["width"], sides["height"]


def told_of_tags(tags: Sequence[a1111.NetworkTag], negative_prompt: str) -> list[str]:
    """Return what is to be told of the networks in prompts: those named twice, and those in the negative prompt."""
    told = []
    for name, strengths in strengths_of(tags).items():
        if len(strengths) > 1:
            told.append(
                f"the prompt names the network {name} {len(strengths)} times: it is drawn with its last strength "
                f"({a1111.number(strengths[-1])}) each time, as AUTOMATIC1111 does"
            )
    lost = a1111.tags_in(negative_prompt)
    if lost:
        told.append(f"{', '.join(lost)} in the negative prompt is left out: networks stand in the prompt alone")
    return told


def strengths_of(tags: Sequence[a1111.NetworkTag]) -> dict[str, list[float]]:
    """Return network -> its strengths in the tags of a prompt, in order."""
    return {tag.name: [other.strength for other in tags if other.name == tag.name] for tag in tags}


def networks_of(
    tags: Sequence[a1111.NetworkTag], settings: Mapping[str, str], path: Path
) -> tuple[RecordedNetwork, ...]:
    """Return the networks of an image: those in its prompt, and those of other modules in its settings.

    AUTOMATIC1111 keeps one object for a network and adds it once for each tag, with the strength that it was given
    last. Earlier versions of the suite have the strengths in a setting; of a network that only has a hash the strength
    is not known.
    """
    digests = dict(a1111.pairs_of(settings.get("Lora hashes", "")))
    strengths: dict[str, float | None] = {name: len(given) * given[-1] for name, given in strengths_of(tags).items()}
    for key in ("Lora strengths", a1111.OTHER_NETWORKS):
        for name, word in a1111.pairs_of(settings.get(key, "")):
            try:
                strengths.setdefault(re.sub(r" \([\w.]+\)$", "", name), float(word))
            except ValueError:
                raise UserError(f"{path}: {key}: the strength of {name} must be a number, got {shown(word)}") from None
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


def from_short(texts: Mapping[str, str], size: tuple[int, int], path: Path, seed: int | None) -> Recorded:
    """Return what the keys of sd-scripts say; size is that of the picture, seed for one of which it is not known."""
    numbers, told = numbers_of(texts, {field: row[2] for field, row in NUMBERS.items() if row[2]}, path, seed)
    request = Request(
        prompt=texts["prompt"],
        negative_prompt=texts.get("negative-prompt", ""),
        width=floored(size)[0],
        height=floored(size)[1],
        sampler=known_sampler(texts["sampler"], path) if "sampler" in texts else None,
        **numbers,
    )
    missing = [key for key in ("steps", "scale", "sampler") if key not in texts]
    told += [f"{', '.join(missing)} is not recorded: that of the options is taken"] if missing else []
    return Recorded(request, told=tuple(told))


def known_sampler(name: str, path: Path) -> SamplerName:
    """Return the name of a sampler; raises UserError for one that the suite does not have."""
    for known in SAMPLER_NAMES:
        if known == name:
            return known
    raise UserError(f"{path} was drawn with the sampler {name!r}, which is not here; give the prompt by --prompt")
