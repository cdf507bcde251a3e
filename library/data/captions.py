"""Caption rules: from the texts of a caption to the text of one sample. Each rule is a small function.

The order is that of sd-scripts: prefix and suffix, dropout, wildcards, tags (kept, warmed up, shuffled,
dropped), secondary separator. All randomness comes from the generator that is passed in.

A caption is a tuple of texts, at least one. With wildcards each sample takes one of them, without them the first.
"""

from __future__ import annotations

import functools
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

from library.config.dataset import SubsetOptions

Caption = tuple[str, ...]


class Moment(NamedTuple):
    """When a caption is sampled: epoch (from 1), optimizer step (from 0), steps of the whole run."""

    epoch: int
    step: int
    num_steps: int


class Chance(Protocol):
    """What samples are drawn with: a random generator, or `LongestDraw`."""

    def random(self) -> float: ...

    def choice(self, seq: Sequence[str], /) -> str: ...

    def shuffle(self, x: list[str], /) -> None: ...


# --------------------------------------------------------------------------------------------------------------
# The rules in order
# --------------------------------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """One rule as it applies to a caption: (text, moment, generator) -> text."""

    apply: Callable[[str, Moment, Chance], str]
    varies: bool  # whether the result depends on the moment or on chance


def caption_rules(caption: Caption, options: SubsetOptions) -> list[Rule]:
    """Return the rules that make the text of a sample, in order; the first one takes it from the caption."""
    texts = with_affixes(caption, options)
    rules = [Rule(lambda *_: texts[0], False)]
    if options.enable_wildcard:
        rules = [Rule(lambda _, moment, rng: sample_wildcards(texts, rng), has_choices(caption))]
    if options.shuffle_caption or options.token_warmup_step > 0 or options.caption_tag_dropout_rate > 0:
        rules.append(Rule(lambda text, moment, rng: sample_tags(text, options, moment, rng), True))
    elif options.keep_tokens_separator:
        rules.append(Rule(lambda text, *_: without_markers(text, options), False))
    if options.secondary_separator:
        secondary, separator = options.secondary_separator, options.caption_separator
        rules.append(Rule(lambda text, *_: text.replace(secondary, separator), False))
    return rules


def sample_caption(caption: Caption, options: SubsetOptions, moment: Moment, rng: Chance) -> str:
    """Return the text of one sample of a picture."""
    if rng.random() < dropout_rate(options, moment.epoch):
        return ""
    return _apply(caption_rules(caption, options), moment, rng)


def possible_captions(caption: Caption, options: SubsetOptions) -> set[str] | None:
    """Return all texts that samples of a caption can have in a run, or None where rules make many of it."""
    rules = caption_rules(caption, options)
    if any(rule.varies for rule in rules):
        return None
    text = _apply(rules, Moment(1, 0, 1), random.Random(0))
    epochs = (1, options.caption_dropout_every_n_epochs)
    return {text, ""} if any(dropout_rate(options, epoch) > 0 for epoch in epochs) else {text}


def _apply(rules: Sequence[Rule], moment: Moment, rng: Chance) -> str:
    return functools.reduce(lambda text, rule: rule.apply(text, moment, rng), rules, "")


class LongestDraw:
    """In the place of a random generator: nothing is dropped unless it always is, and choices are the longest."""

    def __init__(self, measure: Callable[[str], int]) -> None:
        self.measure = measure  # words -> number of tokens

    def random(self) -> float:
        """Return the largest number that a generator can return."""
        return math.nextafter(1.0, 0.0)

    def choice(self, seq: Sequence[str], /) -> str:
        """Return the part with the most tokens."""
        return max(seq, key=self.measure)

    def shuffle(self, x: list[str], /) -> None:
        """Put a tag last whose end would be one token with the comma after it; nothing else depends on the order."""
        ends = [index for index, tag in enumerate(x) if tag and not tag[-1].isalnum()]
        if ends:
            last = max(ends, key=lambda index: self.measure(x[index]) - self.measure(f"{x[index]},"))
            x.append(x.pop(last))


def longest_samples(
    caption: Caption, options: SubsetOptions, num_steps: int, measure: Callable[[str], int]
) -> list[str]:
    """Return the sample with the most tokens that a run can draw of each text of a caption."""
    last = Moment(1, num_steps - 1, num_steps)  # the token warm-up shows most at the end
    texts = caption if options.enable_wildcard else caption[:1]
    return [sample_caption((text,), options, last, LongestDraw(measure)) for text in texts]


def order_varies(caption: Caption, options: SubsetOptions) -> bool:
    """Return whether samples of a caption have their tags in another order each time."""
    moves = options.shuffle_caption and options.caption_tag_dropout_rate < 1
    return moves and any(len(split_tags(text, options)[1]) > 1 for text in with_affixes(caption, options))


def lengths_vary(caption: Caption, options: SubsetOptions) -> bool:
    """Return whether samples of a caption have different numbers of tags, or words that are chosen."""
    drops = 0 < options.caption_tag_dropout_rate < 1 or options.token_warmup_step > 0
    return drops or (options.enable_wildcard and has_choices(caption))


def has_choices(caption: Caption) -> bool:
    """Return whether wildcards leave more than one sample of a caption."""
    return len(caption) > 1 or WILDCARD.search(caption[0]) is not None


def dropout_rate(options: SubsetOptions, epoch: int) -> float:
    """Return the probability with which the whole caption is left out in an epoch (from 1)."""
    every = options.caption_dropout_every_n_epochs
    return 1.0 if every > 0 and epoch % every == 0 else options.caption_dropout_rate


def with_affixes(caption: Caption, options: SubsetOptions) -> Caption:
    """Return the caption with prefix and suffix on each of its texts."""
    before = f"{options.caption_prefix} " if options.caption_prefix else ""
    after = f" {options.caption_suffix}" if options.caption_suffix else ""
    return tuple(f"{before}{text}{after}" for text in caption)


WILDCARD = re.compile(r"\{([^{}]+)\}")
OPEN_BRACE, CLOSED_BRACE = "\ue000", "\ue001"  # private-use characters stand for {{ and }} meanwhile


def sample_wildcards(caption: Caption, rng: Chance) -> str:
    """Return one text of the caption with each {a|b|c} replaced by one of its parts; {{ and }} are literal."""
    text = rng.choice(caption).replace("{{", OPEN_BRACE).replace("}}", CLOSED_BRACE)
    text = WILDCARD.sub(lambda match: rng.choice(match[1].split("|")), text)
    return text.replace(OPEN_BRACE, "{").replace(CLOSED_BRACE, "}")


def sample_tags(text: str, options: SubsetOptions, moment: Moment, rng: Chance) -> str:
    """Return the text with its flexible tags warmed up, shuffled and dropped, joined by comma and space."""
    fixed, flexible, ending = split_tags(text, options)
    flexible = flexible[: num_warm_tags(len(flexible), options, moment)]
    if options.shuffle_caption:
        rng.shuffle(flexible)
    if options.caption_tag_dropout_rate > 0:
        flexible = [tag for tag in flexible if rng.random() >= options.caption_tag_dropout_rate]
    return ", ".join(fixed + flexible + ending)


def split_tags(text: str, options: SubsetOptions) -> tuple[list[str], list[str], list[str]]:
    """Return (fixed, flexible, fixed ending) tags, by the separator for kept tags or by their number."""
    separator, marker = options.caption_separator, options.keep_tokens_separator
    if marker and marker in text:
        parts = [[tag.strip() for tag in part.split(separator)] for part in text.split(marker, 2)]
        fixed, flexible, *ending = [[tag for tag in part if tag] for part in parts]
        return fixed, flexible, ending[0] if ending else []
    tags = [tag.strip() for tag in text.strip().split(separator)]
    return tags[: options.keep_tokens], tags[options.keep_tokens :], []


# What else separates tags -> how it is written on a command line.
SEPARATORS = {",": '","', "\u3001": "\u3001", "\uff0c": "\uff0c", ";": '";"', "\uff1b": "\uff1b"}


def other_separator(caption: Caption, options: SubsetOptions) -> str | None:
    """Return what separates the tags of a caption that does not have the separator of the options; None if nothing."""
    text = "\n".join(caption if options.enable_wildcard else caption[:1])
    for mark in (options.keep_tokens_separator, options.secondary_separator):
        text = text.replace(mark, "") if mark else text
    if options.caption_separator in text:
        return None
    most = max(SEPARATORS, key=text.count)
    return most if most in text else None


def num_warm_tags(num_tags: int, options: SubsetOptions, moment: Moment) -> int:
    """Return how many of the flexible tags the warm-up shows at this step."""
    steps = options.token_warmup_step
    if 0 < steps < 1:
        steps = int(steps * moment.num_steps)
    if steps < 1 or moment.step >= steps:
        return num_tags
    least = min(options.token_warmup_min, num_tags)
    return int(moment.step * (num_tags - least) / steps) + least


def without_markers(text: str, options: SubsetOptions) -> str:
    """Return the text without the separator that marks kept tags, which is never part of a prompt."""
    if options.keep_tokens_separator not in text:
        return text
    return ", ".join(tag for part in split_tags(text, options) for tag in part)


def tag_counts(texts: Iterable[str]) -> dict[str, int]:
    """Return how often each lower-cased, comma-separated tag occurs."""
    names = (tag.strip().lower() for text in texts for tag in text.split(","))
    return dict(Counter(name for name in names if name))
