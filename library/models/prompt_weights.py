"""Attention weights in a prompt, as in web UIs: `(word:1.2)`, `(word)`, `[word]`."""

from __future__ import annotations

import re

STEP = 1.1  # factor of a pair of brackets
TOKENS = re.compile(r"\\[\\()\[\]]|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[()\[\]]|[^\\()\[\]:]+|.", re.DOTALL)


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    """Return (text, weight) for the runs of a prompt; adjacent runs of equal weight are joined.

    The weight of `(x)` is 1.1, of `[x]` 1 / 1.1, of `(x:1.3)` 1.3; nested brackets multiply. A bracket after a
    backslash is text. An unclosed bracket extends to the end, an unopened one is text.
    """
    runs: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # index of the first run inside each open bracket

    def close(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        runs[start:] = [(text, weight * factor) for text, weight in runs[start:]]

    for match in TOKENS.finditer(prompt):
        token, number = match[0], match[1]
        if token in opened:
            opened[token].append(len(runs))
        elif number is not None and opened["("]:
            close("(", float(number))
        elif token == ")" and opened["("]:
            close("(", STEP)
        elif token == "]" and opened["["]:
            close("[", 1 / STEP)
        else:
            runs.append((token[1:] if len(token) == 2 and token[0] == "\\" else token, 1.0))
    for bracket, factor in (("(", STEP), ("[", 1 / STEP)):
        while opened[bracket]:
            close(bracket, factor)
    return _joined(runs)


def _joined(runs: list[tuple[str, float]]) -> list[tuple[str, float]]:
    joined: list[tuple[str, float]] = []
    for text, weight in runs:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        else:
            joined.append((text, weight))
    return joined or [("", 1.0)]
