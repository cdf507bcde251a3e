"""Caption rules: from the text in the file to the text of one draw. Each rule is a small function.

The order is that of sd-scripts: prefix and suffix, dropout, wildcards, tags (kept, warmed up, shuffled,
dropped), secondary separator. All randomness comes from the generator that is passed in.
"""

from __future__ import annotations

import dataclasses
import random
import re
from pathlib import Path

from library.config.dataset import SubsetOptions
from library.errors import UserError


@dataclasses.dataclass(frozen=True)
class Moment:
    """When a caption is drawn: epoch (from 1), optimizer step (from 0), steps of the whole run."""

    epoch: int
    step: int
    num_steps: int


def read_caption(picture: Path, options: SubsetOptions) -> str:
    """Return the caption of a picture: its caption file, else the class token, else nothing.

    The first line counts, or with wildcards every line that is not blank. Raises UserError for a file that
    is not UTF-8.
    """
    for path in caption_files(picture, options.caption_extension):
        if not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8"
            ) from None
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); mend its permissions") from None
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return "\n".join(lines) if options.enable_wildcard else "".join(lines[:1])
    return options.class_tokens or ""


def caption_files(picture: Path, extension: str) -> list[Path]:
    """Return the files that may hold a picture's caption; a face crop `name_x_y_w_h` may use that of `name`."""
    stems = [picture.stem]
    parts = picture.stem.split("_")
    if len(parts) >= 5 and all(part.isdecimal() for part in parts[-4:]):
        stems.append("_".join(parts[:-4]))
    return [picture.with_name(stem + extension) for stem in stems]


def draw_caption(caption: str, options: SubsetOptions, moment: Moment, rng: random.Random) -> str:
    """Return the caption of one draw of a picture."""
    if is_dropped(options, moment, rng):
        return ""
    caption = with_affixes(caption, options)
    caption = draw_wildcards(caption, rng) if options.enable_wildcard else caption.split("\n")[0]
    if options.shuffle_caption or options.token_warmup_step > 0 or options.caption_tag_dropout_rate > 0:
        caption = draw_tags(caption, options, moment, rng)
    elif options.keep_tokens_separator:
        caption = without_markers(caption, options)
    if options.secondary_separator:
        caption = caption.replace(options.secondary_separator, options.caption_separator)
    return caption


def possible_captions(caption: str, options: SubsetOptions) -> set[str] | None:
    """Return all texts that a caption can be in a run, or None where rules make many of it."""
    varies = options.shuffle_caption or options.token_warmup_step > 0 or options.caption_tag_dropout_rate > 0
    affixed = with_affixes(caption, options)
    has_choices = "\n" in affixed or WILDCARD.search(affixed) is not None
    if varies or (options.enable_wildcard and has_choices):
        return None
    undropped = dataclasses.replace(options, caption_dropout_rate=0.0, caption_dropout_every_n_epochs=0)
    text = draw_caption(caption, undropped, Moment(1, 0, 1), random.Random(0))
    is_droppable = options.caption_dropout_rate > 0 or options.caption_dropout_every_n_epochs > 0
    return {text, ""} if is_droppable else {text}


def with_affixes(caption: str, options: SubsetOptions) -> str:
    """Return the caption with prefix and suffix on each of its lines."""
    before = f"{options.caption_prefix} " if options.caption_prefix else ""
    after = f" {options.caption_suffix}" if options.caption_suffix else ""
    return "\n".join(f"{before}{line}{after}" for line in caption.split("\n"))


def is_dropped(options: SubsetOptions, moment: Moment, rng: random.Random) -> bool:
    """Return whether the whole caption is left out in this draw."""
    by_chance = rng.random() < options.caption_dropout_rate
    every = options.caption_dropout_every_n_epochs
    return by_chance or (every > 0 and moment.epoch % every == 0)


WILDCARD = re.compile(r"\{([^{}]+)\}")
OPEN_BRACE, CLOSED_BRACE = "\ue000", "\ue001"  # private-use characters stand for {{ and }} meanwhile


def draw_wildcards(caption: str, rng: random.Random) -> str:
    """Return one line of the caption with each {a|b|c} replaced by one of its parts; {{ and }} are literal."""
    line = rng.choice(caption.split("\n"))
    line = line.replace("{{", OPEN_BRACE).replace("}}", CLOSED_BRACE)
    line = WILDCARD.sub(lambda match: rng.choice(match[1].split("|")), line)
    return line.replace(OPEN_BRACE, "{").replace(CLOSED_BRACE, "}")


def draw_tags(caption: str, options: SubsetOptions, moment: Moment, rng: random.Random) -> str:
    """Return the caption with its flexible tags warmed up, shuffled and dropped, joined by comma and space."""
    fixed, flexible, ending = split_tags(caption, options)
    flexible = flexible[: num_warm_tags(len(flexible), options, moment)]
    if options.shuffle_caption:
        rng.shuffle(flexible)
    if options.caption_tag_dropout_rate > 0:
        flexible = [tag for tag in flexible if rng.random() >= options.caption_tag_dropout_rate]
    return ", ".join(fixed + flexible + ending)


def split_tags(caption: str, options: SubsetOptions) -> tuple[list[str], list[str], list[str]]:
    """Return (fixed, flexible, fixed ending) tags, by the separator for kept tags or by their number."""
    separator, marker = options.caption_separator, options.keep_tokens_separator
    if marker and marker in caption:
        parts = [[tag.strip() for tag in part.split(separator)] for part in caption.split(marker, 2)]
        fixed, flexible, *ending = [[tag for tag in part if tag] for part in parts]
        return fixed, flexible, ending[0] if ending else []
    tags = [tag.strip() for tag in caption.strip().split(separator)]
    return tags[: options.keep_tokens], tags[options.keep_tokens :], []


def num_warm_tags(num_tags: int, options: SubsetOptions, moment: Moment) -> int:
    """Return how many of the flexible tags the warm-up shows at this step."""
    steps = options.token_warmup_step
    if 0 < steps < 1:
        steps = int(steps * moment.num_steps)
    if steps < 1 or moment.step >= steps:
        return num_tags
    least = min(options.token_warmup_min, num_tags)
    return int(moment.step * (num_tags - least) / steps) + least


def without_markers(caption: str, options: SubsetOptions) -> str:
    """Return the caption with the text that marks kept tags taken out; the marker is never part of a prompt."""
    if options.keep_tokens_separator not in caption:
        return caption
    return ", ".join(tag for part in split_tags(caption, options) for tag in part)


def tag_counts(captions: list[str]) -> dict[str, int]:
    """Return how often each lower-cased, comma-separated tag occurs."""
    counts: dict[str, int] = {}
    for caption in captions:
        for tag in caption.replace("\n", ",").split(","):
            name = tag.strip().lower()
            if name:
                counts[name] = counts.get(name, 0) + 1
    return counts
