"""Tiny models, and what the converter makes of them, for tests."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import torch
from safetensors.torch import load_file
from scripts import call

from library.models import family as families
from tools import convert_diffusers20_original_sd as tool

CHANNELS = {families.SD2: (64, 64, 128, 128), families.SDXL: (64, 64, 128)}  # to write less
convert = functools.partial(call, tool)


class Converted(NamedTuple):
    """A family's models, no two tensors of which are alike; their files, and what is made of each."""

    name: str
    unet: dict[str, Any]
    models: tiny.Models
    checkpoint: Path
    folder: Path
    made_folder: Path
    made_checkpoint: Path


def make_converted(name: str, root: Path) -> Converted:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "CHANNELS", tiny.CHANNELS | CHANNELS)
        models, unet = tiny.make_models(name, seed=7), tiny.unet_config(tiny.FAMILIES[name])
    generator = torch.Generator().manual_seed(1)
    for parameter in itertools.chain(*(model.parameters() for model in models.values())):
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.01  # norms too
    checkpoint = tiny.write_checkpoint(models, name, root / "model.safetensors")
    folder = tiny.write_folder(models, name, root / "folder")
    convert(checkpoint, root / "made")
    convert(folder, root / "made.safetensors")
    return Converted(name, unet, models, checkpoint, folder, root / "made", root / "made.safetensors")


def read(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint."""
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)["state_dict"]
