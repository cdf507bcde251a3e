"""Weights by block for merging (`--lbws`), with the slots of web UIs: text encoders, 12 blocks in, middle, 12 out.

Lists of 12 and 20 weights are for SDXL, of 17 and 26 for SD 1.x and 2.x; a slot that a list does not have weighs 1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from library.adapters.layers import block_of
from library.config.tool_files import MergedLoras
from library.errors import Problems, UserError

if TYPE_CHECKING:
    from library.models.family import ModelFamily

BASE, FIRST_IN, MIDDLE, FIRST_OUT, NUM_SLOTS = 0, 1, 13, 14, 26
# Number of weights -> the slots that they are for, in order.
SLOTS = {
    12: (BASE, 5, 6, 8, 9, MIDDLE, *range(14, 20)),
    17: (BASE, 2, 3, 5, 6, 8, 9, MIDDLE, *range(17, 26)),
    20: (BASE, *range(1, 10), MIDDLE, *range(14, 23)),
    26: tuple(range(NUM_SLOTS)),
}
FOR_SDXL = (12, 20)
# Side of a block -> its first slot; all blocks of the middle share one, the last layers have that of SDXL.
SIDES = {"text": BASE, "first": FIRST_IN, "in": FIRST_IN, "middle": MIDDLE, "out": FIRST_OUT, "last": 23}


def read_weights(text: str) -> tuple[float, ...]:
    """Return the weights of a JSON list; raises ValueError for anything else, and for a length that is not known."""
    try:
        numbers = json.loads(text)
    except ValueError:
        numbers = None
    if not isinstance(numbers, list) or not all(_is_finite(number) for number in numbers):
        raise ValueError(f"{text!r} is no JSON list of numbers, such as [1,0.5,...]")
    if len(numbers) not in SLOTS:
        raise ValueError(f"{len(numbers)} numbers; {', '.join(map(str, SLOTS))} are known")
    return tuple(float(number) for number in numbers)


def _is_finite(number: object) -> bool:
    # Python reads NaN in JSON.
    return isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)


def check_strengths(files: MergedLoras, problems: Problems) -> None:
    """Add to problems what is wrong with `--ratios` and `--lbws`."""
    files.check_ratios(problems)
    if files.lbws is None:
        return
    lists, num_models, lengths = files.lbws, len(files.models), set()
    for text in lists:
        try:
            lengths.add(len(read_weights(text)))
        except ValueError as error:
            problems.add(f"--lbws: {error}")
    if len(lists) != num_models:
        problems.add(f"--lbws must have a list for each of the {num_models} files of --models, got {len(lists)}")
    if len(lengths) > 1:
        problems.add(f"--lbws must be lists of one length, got {', '.join(map(str, sorted(lengths)))}")


def check_family(weights: Sequence[float], family: ModelFamily | None, path: Path) -> None:
    """Raise UserError for weights of SDXL's blocks if the file is for another model."""
    if len(weights) in FOR_SDXL and family is not None and family.name != "sdxl":
        others = ", ".join(str(number) for number in SLOTS if number not in FOR_SDXL)
        raise UserError(f"--lbws: {len(weights)} numbers are for SDXL, {path} is for {family.title}: give {others}")


def weight_of(module: str, weights: Sequence[float]) -> float:
    """Return the weight of a module by its name; 1 if no slot is for it."""
    block = block_of(module)
    if block is None:
        return 1.0
    slot = SIDES[block.side] + (0 if block.side == "middle" else block.number)
    slots = SLOTS[len(weights)]
    return weights[slots.index(slot)] if slot in slots else 1.0
