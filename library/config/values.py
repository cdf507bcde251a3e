"""Parsers of option values with a syntax of their own. Each raises ValueError with the reason."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any, TypeVar

Value = TypeVar("Value")

MOST_PIXELS = 16384  # of a side; far beyond what these models generate, and such a picture still fits in memory
LEAST_PIXELS = 64  # of a side
LATENT_SCALE = 8  # pixels to a side of one latent
MOST_SEED = 2**63 - 1  # that torch takes


def given(value: Value | None, default: Value) -> Value:
    """Return the value, or the default where there is none."""
    return default if value is None else value


def latent_side(pixels: int) -> int:
    """Return a side cut to a multiple of 8, which latents need, and at least 64."""
    return max(LEAST_PIXELS, pixels // LATENT_SCALE * LATENT_SCALE)


def parse_text(value: Any) -> str | None:
    """Return a text; None for "", which GUIs write for unset."""
    if not isinstance(value, str):
        raise ValueError
    return value.strip() or None


def parse_resolution(value: Any) -> tuple[int, int]:
    """Return (width, height) in pixels from 512, "512", "512,768" or [512, 768]."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    if any(isinstance(part, bool) or not isinstance(part, int | str) for part in parts) or len(parts) not in (1, 2):
        raise ValueError
    try:
        width, height = int(parts[0]), int(parts[-1])
    except ValueError:
        raise ValueError from None
    if width < 64 or height < 64:
        raise ValueError("a side is less than 64 pixels")
    if width > MOST_PIXELS or height > MOST_PIXELS:
        raise ValueError(f"a side is more than {MOST_PIXELS} pixels")
    return width, height


def parse_steps(value: Any) -> int | float:
    """Return a whole number of steps, or a share of all steps (below 1) from 0.1 or "10%"."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    text = str(value).strip()
    number = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    if not 0 <= number < math.inf or (number >= 1 and (text.endswith("%") or number != int(number))):
        raise ValueError
    return int(number) if number >= 1 or number == 0 else number


def parse_pairs(value: Any) -> dict[str, str]:
    """Return key -> text for a list of key=value, split at the first "=".

    Commas and spaces between pairs separate them, also within one text: `nesterov=False, momentum=0.9`. Brackets hold
    together what a shell or a GUI split at spaces: `betas=(0.9,` and `0.99)`.
    """
    words = value if isinstance(value, list | tuple) else [value]
    pairs: dict[str, str] = {}
    for pair in _split_pairs(words):
        key, sign, text = pair.partition("=")
        if not sign or not key.strip():
            raise ValueError(f"{pair!r} has no key and value")
        if key.strip() in pairs and pairs[key.strip()] != text.strip():
            raise ValueError(f"{key.strip()} is given twice")
        pairs[key.strip()] = text.strip()
    return pairs


OPENING, CLOSING = "([{", ")]}"
NEXT_PAIR = re.compile(r"(?:\s*,\s*|\s+)(?=[A-Za-z_][\w.]*\s*=(?!=))")


def _split_pairs(words: Iterable[Any]) -> list[str]:
    """Return the pairs in words, without the commas between them; raises ValueError for a word that is no text."""
    pairs: list[str] = []
    is_open = False
    for word in words:
        if not isinstance(word, str):
            raise ValueError(f"{word!r} has no key and value")
        text = f"{pairs.pop()} {word}" if is_open else word
        start = 0
        for found in NEXT_PAIR.finditer(text):
            before = text[start : found.start()]
            if found.start() >= start and not _depth(before) and not any(before.count(quote) % 2 for quote in "\"'"):
                pairs.append(text[start : found.start()])
                start = found.end()
        pairs.append(text[start:])
        is_open = _depth(pairs[-1]) > 0
    stripped = [re.sub(r"[\s,]+$", "", pair) for pair in pairs]
    return [pair for pair in stripped if pair]


def _depth(text: str) -> int:
    """Return how many brackets are open at the end of a text; those in quotes do not count."""
    bare = re.sub(r"'[^']*'|\"[^\"]*\"", "", text)
    return sum(bare.count(bracket) for bracket in OPENING) - sum(bare.count(bracket) for bracket in CLOSING)


def parse_pair_lists(value: Any) -> tuple[dict[str, str], ...]:
    """Return key -> text for each of several texts key=value;key=value."""
    texts = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError
    return tuple(parse_pairs([pair for pair in text.split(";") if pair.strip()]) for text in texts)


def written(value: Any) -> Any:
    """Return a value as options are written: a dict as the texts key=value, any other value unchanged."""
    return tuple(f"{key}={text}" for key, text in value.items()) if isinstance(value, dict) else value


def parse_range(value: Any) -> tuple[float, float] | None:
    """Return (low, high) from "2.0,4.0" or [2.0, 4.0]; None for "", which GUIs write for unset."""
    if value == "":
        return None
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or len(parts) != 2:
        raise ValueError
    if any(isinstance(part, bool) or not isinstance(part, int | float | str) for part in parts):
        raise ValueError
    low, high = float(parts[0]), float(parts[1])
    if not 0 < low <= high:
        raise ValueError("the first must be above 0 and at most the second")
    return low, high


def parse_extension(value: Any) -> str:
    """Return a file extension with its leading dot."""
    if not isinstance(value, str) or not value or set(value) & set("/\\\0"):
        raise ValueError
    return value if value.startswith(".") else f".{value}"


def parse_separator(value: Any) -> str:
    """Return a separator of at least one character."""
    if not isinstance(value, str) or not value:
        raise ValueError
    return value
