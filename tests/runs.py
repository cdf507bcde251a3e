"""Runs of train_network.py from its command line, for tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file
from tensors import Tensors, assert_same
from words import words

import train_network
from library.config.train import parse_train_config
from library.data.records import load_datasets
from library.errors import Problems

if TYPE_CHECKING:
    from library.training.run.progress import Progress

# Words for the options of a training that must be given, where it does not matter what they are.
NEEDED = ("--pretrained_model_name_or_path=m", "--network_module=networks.lora", "--output_dir=o")

# Options of a DyLoRA over linear layers, and over convolutions as well; options of a run in which it learns.
LIERLA: dict[str, object] = {
    "network_module": "networks.dylora",
    "network_dim": 8,
    "network_alpha": 4,
    "network_args": ["unit=2"],
}
C3LIER = LIERLA | {"network_args": ["unit=2", "conv_dim=8", "conv_alpha=4"]}
RATE = {"learning_rate": "3e-2", "max_train_steps": 6}

# Marks of tests that hold for every base model: they are called with one of SD 1.x and one of SDXL, which has two text
# encoders, a pooled output and sizes of pictures as conditioning. With the second mark the latter is slow.
ALSO_SDXL_SLOW = pytest.mark.parametrize("base", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)], indirect=True)

# Options whose place a dataset file takes.
BY_FILE: dict[str, object] = dict.fromkeys(
    ("train_data_dir", "enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_no_upscale", "resolution")
)


def options(base: Path | None, pictures: Path | None, out: Path | str | None, **more: object) -> list[str]:
    """Return the command line of a short run over a folder of pictures."""
    values = {
        "pretrained_model_name_or_path": base,
        "train_data_dir": pictures,
        "caption_extension": ".txt",
        "resolution": "96",
        "enable_bucket": True,
        "min_bucket_reso": 64,
        "max_bucket_reso": 128,
        "bucket_no_upscale": True,
        "output_dir": out,
        "output_name": "x",
        "network_module": "networks.lora",
        "learning_rate": "1e-2",
        "max_train_steps": 3,
        "max_data_loader_n_workers": 0,
        "seed": 7,
        "overwrite": True,  # tests compare runs of one name
    }
    return words(**values | more)


def train(base: Path, pictures: Path | None, out: Path, **more: object) -> dict[str, torch.Tensor]:
    """Train, and return the weights that were written."""
    assert train_network.main(options(base, pictures, out, **more)) == 0
    path = out / f"x.{more.get('save_model_as', 'safetensors')}"
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def train_with(argv: list[str], act: Callable[[Progress], object], *, after: int | None) -> None:
    """Train from a command line, and call act once a step and all that follows it are done; None: after each step."""
    from library.training.recipe import train
    from library.training.run.events import Event, Every, Moment

    problems = Problems()
    config = parse_train_config(argv, problems)
    problems.raise_if_any()

    def act_once(moment: Moment) -> None:
        if after in (moment.progress.step, None):
            act(moment.progress)

    event = Event("test", Every(1), act_once)
    train(config, load_datasets(config), train_network.load_prompts(config.preview), further_events=[event])


def train_killed(argv: list[str], *, after: int) -> None:
    """Train from a command line, and end as if the process were killed after a number of steps."""

    def kill(progress: Progress) -> None:
        raise MemoryError("killed")

    with pytest.raises(MemoryError, match="killed"):
        train_with(argv, kill, after=after)


def same(one: Tensors, other: Tensors, tolerance: float = 0.0) -> None:
    """Hold that two LoRA files are the same, to rounding where a tolerance is given, and that something was learned."""
    size = max(float(tensor.abs().max()) for name, tensor in one.items() if "lora_up" in name)
    assert size > 0
    if tolerance == 0:
        return assert_same(one, other)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=tolerance, atol=tolerance * size)
    return None
