"""The ranks of a DyLoRA file, and the tensors of each."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from library.adapters.names import DOWN, Shapes, kind_of, refused_kind, roles_of
from library.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from library.weight_file import WeightFile


def full_rank(shapes: Shapes, path: Path) -> int:
    """Return the rank of a file by the shapes of its tensors; raises UserError if it is not a DyLoRA."""
    other = next(
        (name for name in shapes if refused_kind(name, shapes[name]) is not None or kind_of(name) == "Tucker"), None
    )
    if other is not None:
        raise UserError(f"--model: {path} is no DyLoRA: {other} is of a {kind_of(other)} network")
    ranks = {shapes[name][0] for _, role, name in roles_of(shapes) if role == "down"}
    if not ranks:
        raise UserError(f"--model: {path} is no LoRA file: it has no tensor named ...{DOWN}")
    if len(ranks) > 1:
        raise UserError(f"--model: {path} has modules of the ranks {sorted(ranks)}; a DyLoRA has one rank")
    return ranks.pop()


def ranks_of(file: WeightFile, unit: int | None) -> list[int]:
    """Return the ranks unit, 2 unit, ... up to the full one; if unit is None, with the unit in the metadata.

    Raises UserError for a file that is not a DyLoRA, without a unit, or with a unit that does not divide its rank.
    """
    full = full_rank(file.shapes, file.path)
    try:
        unit = unit or int(json.loads(file.metadata["ss_network_args"])["unit"])
    except (KeyError, ValueError, TypeError):
        raise UserError("--unit is missing, and the metadata of the file do not have it: give --unit") from None
    if full % unit:
        divisors = ", ".join(str(number) for number in range(1, full + 1) if full % number == 0)
        raise UserError(f"--unit {unit} does not divide the rank of {file.path}, {full}; these do: {divisors}")
    return list(range(unit, full + 1, unit))


def truncated_to(rank: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file with the first rank rows of down and columns of up matrices; others unchanged."""
    part = dict(tensors)
    for _, role, name in roles_of(tensors):
        if role != "alpha":
            part[name] = (part[name][:rank] if role == "down" else part[name][:, :rank]).contiguous()
    return part


def with_alphas_of_sd_scripts(tensors: Mapping[str, Tensor], rank: int, full: int) -> dict[str, Tensor]:
    """Return the tensors of a rank with the alpha for the scale with which sd-scripts trains it.

    alpha_b / b = alpha / R * sqrt(R / b), for rank b of R.
    """
    share = math.sqrt(rank / full)
    alphas = {name for _, role, name in roles_of(tensors) if role == "alpha"}
    return {
        name: (tensor.float() * share).to(tensor.dtype) if name in alphas else tensor
        for name, tensor in tensors.items()
    }


def file_sizes(file: WeightFile, ranks: Sequence[int]) -> dict[int, int]:
    """Return rank -> bytes of its file, up to a few bytes of the header; the last rank is the full one."""
    matrices = {name for _, role, name in roles_of(file.shapes) if role != "alpha"}
    size = sum(math.prod(shape) * dtype.itemsize for name, dtype, shape in file.infos() if name in matrices)
    whole = file.path.stat().st_size
    return {rank: whole - round(size * (1 - rank / ranks[-1])) for rank in ranks}
