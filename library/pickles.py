"""Pickles of torch: reading without running code, and writing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.files import replacing

if TYPE_CHECKING:
    import torch

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")


def load_pickle(path: Path) -> Any:
    """Return the content of a pickle of torch without running code; raises UserError for a damaged file."""
    import pickle
    import warnings

    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old formats, which are refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except pickle.UnpicklingError as error:
        found = _forbidden_global(str(error))
        raise UserError(
            f"{path} is refused: it contains more than weights{found}, and loading that could run code; "
            "convert it to .safetensors on a machine where you trust it"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # damaged pickles raise any exception
        raise UserError(
            f"{path} is not a weight file that torch can read, or it is damaged; copy or download it again"
        ) from error


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a .ckpt, .pt or .bin file, unwrapped from `state_dict`."""
    import torch

    content = load_pickle(path)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    entries = content.items() if isinstance(content, dict) else ()
    tensors = {name: value for name, value in entries if isinstance(name, str) and torch.is_tensor(value)}
    if not tensors:
        raise UserError(f"{path} has no weights")
    return tensors


def _forbidden_global(message: str) -> str:
    """Return " (NAME)" for the object named in torch's error message, or an empty text."""
    found = re.search(r"GLOBAL:? (?!loads)([\w.]+\w)|function ([\w.]+\w)", message)
    return f" ({found[1] or found[2]})" if found else ""


def write_pickle(path: Path, content: Mapping[str, Any]) -> None:
    """Write a table as a pickle of torch, completely or not at all."""
    import torch

    with replacing(path) as temporary:
        torch.save(dict(content), temporary)
