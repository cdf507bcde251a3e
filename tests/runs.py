"""Runs of train_network.py from its command line, for tests."""

from __future__ import annotations

import torch
from safetensors import safe_open
from safetensors.torch import load_file

import train_network


def options(base, pictures, out, **more):
    """Return a command line; None leaves an option out, True makes it a switch."""
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
    } | more
    argv = []
    for name, value in values.items():
        if value is True:
            argv.append(f"--{name}")
        elif isinstance(value, list):
            argv += [f"--{name}", *map(str, value)]
        elif value is not None:
            argv += [f"--{name}", str(value)]
    return argv


def train(base, pictures, out, **more):
    assert train_network.main(options(base, pictures, out, **more)) == 0
    path = out / f"x.{more.get('save_model_as', 'safetensors')}"
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def same(one, other, tolerance=0.0):
    assert one.keys() == other.keys()
    size = max(float(tensor.abs().max()) for name, tensor in one.items() if "lora_up" in name)
    assert size > 0
    for name, tensor in one.items():
        if tolerance:
            torch.testing.assert_close(tensor, other[name], rtol=tolerance, atol=tolerance * size)
        else:
            assert torch.equal(tensor, other[name]), name
