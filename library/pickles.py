"""Pickles of torch: reading without running code, and writing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError, is_out_of_memory
from library.file_kinds import AGAIN, PICKLE, weight_format
from library.files import replacing
from library.pickle_names import InertArray, is_of_weights, names_in, stand_in_for, stand_ins

if TYPE_CHECKING:
    import torch

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")  # of files that are written
MOST_NAMED = 3


def load_pickle(path: Path, *, needs_all: bool = False) -> Any:
    """Return the content of a pickle of torch without running code; raises UserError for any other file.

    Harmless objects beside the weights (see `pickle_names`) are replaced by inert ones; with `needs_all` they are
    refused.
    """
    import warnings

    import torch

    if weight_format(path) != PICKLE:
        raise UserError(f"{path} is a safetensors file, a pickle of torch is needed")
    names = names_in(path)
    inert = [] if needs_all else stand_ins(names)
    try:
        with warnings.catch_warnings(), path.open("rb") as file, torch.serialization.safe_globals(inert):
            warnings.simplefilter("ignore")  # about old formats, which are refused below
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles raise any exception
        if is_out_of_memory(error):
            raise
        strange = sorted(name for name in names if not is_of_weights(name) and not (inert and stand_in_for(name)))
        raise UserError(f"{path} {refusal(strange)}") from error


def refusal(strange: list[str]) -> str:
    """Return why a pickle is not read, in which these names are neither of weights nor harmless."""
    if not strange:
        return f"is damaged or cut short, or a pickle that torch did not write; {AGAIN}"
    more = ", ..." if len(strange) > MOST_NAMED else ""
    return (
        f"is refused: it contains more than weights ({', '.join(strange[:MOST_NAMED])}{more}), and loading that could "
        "run code; convert it to .safetensors on a machine where you trust it"
    )


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a pickle, unwrapped from `state_dict`."""
    import torch

    content = load_pickle(path)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    entries = list(content.items()) if isinstance(content, dict) else []
    array = next((name for name, value in entries if isinstance(value, InertArray)), None)
    if array is not None:
        raise UserError(f"{path}: {array} is an array of NumPy, not a tensor; save it as a tensor of torch")
    tensors = {name: value for name, value in entries if isinstance(name, str) and torch.is_tensor(value)}
    if not tensors:
        where = next(iter(_places_of_tensors(content, ())), None)
        if where is not None:
            raise UserError(f"{path} has its weights under {'/'.join(where)}, where nothing reads them: save that part")
        raise UserError(f"{path} has no weights")
    return tensors


def _places_of_tensors(content: Any, place: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yield the keys that lead to tables of tensors in nested tables."""
    import torch

    if isinstance(content, dict):
        if place and any(torch.is_tensor(value) for value in content.values()):
            yield place
        for key, value in content.items():
            yield from _places_of_tensors(value, (*place, str(key)))


def write_pickle(path: Path, content: Mapping[str, Any]) -> None:
    """Write a table as a pickle of torch, completely or not at all."""
    import torch

    with replacing(path) as temporary:
        torch.save(dict(content), temporary)
