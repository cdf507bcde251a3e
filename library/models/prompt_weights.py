"""Attention weights in a prompt: `(word:1.2)`, `(word)`, `[word]`, as users know them from web UIs."""

from __future__ import annotations

import re

STEP = 1.1  # what a pair of brackets multiplies by, or divides by
TOKENS = re.compile(r"\\[\\()\[\]]|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[()\[\]]|[^\\()\[\]:]+|.", re.DOTALL)


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    """Return (text, weight) for the runs of a prompt, neighbours of equal weight joined.

    `(x)` weighs 1.1, `[x]` 1 / 1.1, `(x:1.3)` 1.3; nested brackets multiply; a backslash makes a bracket
    literal; a bracket that is not closed reaches to the end, one that was not opened is text.
    """
    runs: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # number of the first run inside each open bracket

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
