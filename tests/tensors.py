"""Files of tensors, read and compared, for tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

Tensors = Mapping[str, torch.Tensor]


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of all parts of a Diffusers folder, as part/name."""
    return {
        f"{path.parent.name}/{name}": tensor
        for path in sorted(folder.glob("*/*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def assert_same(found: Tensors, expected: Tensors) -> None:
    """Hold that two tables of tensors are the same: names, types, shapes, bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def opened(path: Path) -> Image.Image:
    """Return a picture whose file is closed again."""
    with Image.open(path) as file:
        file.load()
    return file
