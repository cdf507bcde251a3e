"""Dynamic prompts: groups of variants in braces, of which a prompt takes one, several, or all in turn.

    {a|b|c}           one of them
    {2$$a|b|c}        two different ones, joined by ", "
    {1-2$$ and $$a|b} one or two, joined by " and "
    {e$$a|b|c}        all of them, one after the other; several such groups give all combinations
    {e$$2$$a|b|c}     all pairs of them, in the order in which they stand

Groups may stand in variants of others; `\\{` and `\\}` are braces themselves. Imports only the standard library.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import re
from collections.abc import Mapping

JOINER = ", "
COUNT = re.compile(r"(\d+)(?:-(\d+))?")


@dataclasses.dataclass(frozen=True)
class Group:
    """A group of variants: how many are taken, what joins them, whether all are enumerated."""

    variants: tuple[tuple[str | Group, ...], ...]
    least: int = 1
    most: int = 1
    joiner: str = JOINER
    is_enumerated: bool = False

    def selections(self) -> list[Parts]:
        """Return everything that can be taken of a group that is enumerated."""
        counts = range(self.least, self.most + 1)
        picked = [some for count in counts for some in itertools.combinations(self.variants, count)]
        return [tuple(piece for index, one in enumerate(some) for piece in self._joined(index, one)) for some in picked]

    def _joined(self, index: int, variant: Parts) -> Parts:
        return (self.joiner, *variant) if index else variant


Parts = tuple["str | Group", ...]


def expand(text: str, generator: random.Random, combination: int = 0) -> str:
    """Return a text with every group replaced by a choice of its variants.

    Of groups that are enumerated, combination says which: the last group changes fastest.
    """
    parts = parse(text)
    fixed: dict[int, Parts] = {}
    for group in reversed(_enumerated(parts)):
        selections = group.selections()
        combination, pick = divmod(combination, len(selections))
        fixed[id(group)] = selections[pick]
    return _chosen(parts, generator, fixed)


def num_combinations(text: str) -> int | None:
    """Return how many combinations the enumerated groups of a text have; None without such a group."""
    groups = _enumerated(parse(text))
    return math.prod(len(group.selections()) for group in groups) if groups else None


def parse(text: str) -> Parts:
    """Return the pieces of a text: texts and groups. A brace that has no partner is text."""
    parts, end = _parse_until(text, 0, "")
    assert end == len(text)
    return parts


def _parse_until(text: str, start: int, ends: str) -> tuple[Parts, int]:
    """Return the pieces from start to the first of ends outside of groups, or to the end of the text."""
    parts: list[str | Group] = []
    plain = ""
    at = start
    while at < len(text) and text[at] not in ends:
        if text[at] == "\\" and text[at + 1 : at + 2] in ("{", "}"):
            plain, at = plain + text[at + 1], at + 2
            continue
        group = _group_at(text, at) if text[at] == "{" else None
        if group is None:
            plain, at = plain + text[at], at + 1
            continue
        parts += [plain, group[0]] if plain else [group[0]]
        plain, at = "", group[1]
    return (*parts, plain) if plain else tuple(parts), at


def _group_at(text: str, start: int) -> tuple[Group, int] | None:
    """Return the group that begins at a brace, and where the text goes on; None where it does not end."""
    settings, at = _settings(text, start + 1)
    variants = []
    while True:
        variant, at = _parse_until(text, at, "|}")
        if at >= len(text):
            return None
        variants.append(variant)
        at += 1
        if text[at - 1] == "}":
            return _group(settings, tuple(variants)), at


def _settings(text: str, start: int) -> tuple[list[str], int]:
    """Return what stands before `$$` at the beginning of a group, and where the variants begin."""
    settings: list[str] = []
    while True:
        match = re.compile(r"([^{}|]*?)\$\$").match(text, start)
        if match is None:
            return settings, start
        settings.append(match[1])
        start = match.end()


def _group(settings: list[str], variants: tuple[Parts, ...]) -> Group:
    """Return a group by its settings: `e`, a number or range, a joiner, in this order, each optional."""
    left = list(settings)
    enumerated = bool(left) and left[0].strip().lower() == "e"
    if enumerated:
        left.pop(0)
    least = most = 1
    match = COUNT.fullmatch(left[0].strip()) if left else None
    if match:
        left.pop(0)
        least, most = sorted((int(match[1]), int(match[2] or match[1])))
    joiner = left[0] if left else JOINER
    return Group(variants, min(least, len(variants)), min(most, len(variants)), joiner, enumerated)


def _enumerated(parts: Parts) -> list[Group]:
    """Return the groups that are enumerated; those within other groups are not."""
    return [part for part in parts if isinstance(part, Group) and part.is_enumerated]


def _chosen(parts: Parts, generator: random.Random, fixed: Mapping[int, Parts]) -> str:
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif id(part) in fixed:
            texts.append(_chosen(fixed[id(part)], generator, fixed))
        else:
            number = generator.randint(part.least, part.most)
            picked = generator.sample(part.variants, number)
            texts.append(part.joiner.join(_chosen(variant, generator, fixed) for variant in picked))
    return "".join(texts)
