"""Shared parts of the tests: tiny models on disk, and no way to the network."""

from __future__ import annotations

import copy
import functools
import logging
import os
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from library.logs import QUIET  # noqa: E402

os.environ["HF_HUB_OFFLINE"] = "1"
for quiet in QUIET:  # as in the scripts: matplotlib tells when it looks for fonts for the first time
    logging.getLogger(quiet).setLevel(logging.ERROR)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads would only wait for each other


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config, items):
    """Make slow tests of the repetitions of a property, but for as many as its mark keeps, spread over all.

    A test that is named on the command line stays as it is.
    """
    if any("::" in argument for argument in config.args):
        return
    groups: dict[tuple[Path, str], list[tuple[pytest.Item, int]]] = {}
    for item in items:
        if mark := item.get_closest_marker("repetitions"):
            groups.setdefault((item.path, item.originalname), []).append((item, mark.kwargs["keep"]))
    for pairs in groups.values():
        found, (keep, *_) = zip(*pairs, strict=True)
        quick = [item for item in found if not item.get_closest_marker("slow")]
        kept = {round(index * (len(quick) - 1) / max(1, keep - 1)) for index in range(keep)}
        for index, item in enumerate(quick):
            if index not in kept:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """Fail a test that reaches for anything beyond this machine."""
    connect = socket.socket.connect

    def local_only(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a connection to {address} was tried")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


@pytest.fixture(scope="session", params=["sd1", "sd2"])
def family_name(request):
    return request.param


@pytest.fixture(scope="session")
def model_store(tmp_path_factory):
    """Return family name -> (models, {layout: path}), each made once."""
    import tiny
    import torch

    made = {}

    def get(name):
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            models = tiny.make_models(name)
            paths = {
                "folder": tiny.write_folder(models, name, root / "folder"),
                "safetensors": tiny.write_checkpoint(models, name, root / "model.safetensors", ema=True),
                "ckpt": tiny.write_checkpoint(models, name, root / "model.ckpt"),
                "fp16": tiny.write_checkpoint(models, name, root / "fp16.safetensors", torch.float16),
            }
            made[name] = (models, paths)
        return made[name]

    return get


@pytest.fixture
def fresh_models(model_store, family_name):
    """Return copies of a tiny model's text encoder and U-Net."""
    made, _ = model_store(family_name)
    return copy.deepcopy(made["text_encoder"]), copy.deepcopy(made["unet"])


@pytest.fixture
def pictures(tmp_path):
    """Return a folder in the N_name layout, with four pictures of two shapes."""
    folder = tmp_path / "train" / "1_sks dog"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index, size in enumerate([(64, 64), (64, 64), (64, 128), (64, 128)]):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a dog, tag{index}, x", encoding="utf-8")
    return folder.parent


@pytest.fixture
def base(model_store, request):
    """Return the file of a tiny model: of SD 1.x, or of the family that a mark of `runs` names."""
    return model_store(getattr(request, "param", "sd1"))[1]["safetensors"]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Return a hub on this machine, in place of the one on the network, with an empty cache."""
    from fake_hub import FakeHub
    from huggingface_hub import constants

    hub = FakeHub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield hub
    hub.close()


# ---- gen_img_diffusers.py -----------------------------------------------------------------------------------


@pytest.fixture
def draw(model_store, tmp_path, monkeypatch):
    """Return what runs the script and returns its new pictures."""
    from drawing import Drawing

    return Drawing(model_store, tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def two(model_store, tmp_path_factory):
    """Return two LoRA files, and the words that name them."""
    from drawing import lora_of

    models, _ = model_store("sd1")
    folder = tmp_path_factory.mktemp("two")
    files = [lora_of(models, folder / f"net{index}.safetensors", seed=index) for index in range(2)]
    return files, ["--network_module", "networks.lora", "networks.lora", "--network_weights", *files]


@pytest.fixture
def source(tmp_path):
    """Return a picture to begin with."""
    pixels = np.random.default_rng(3).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC).save(tmp_path / "source.png")
    return tmp_path / "source.png"


@pytest.fixture
def mask(tmp_path):
    """Return a mask of which the right half is drawn anew."""
    Image.fromarray(np.repeat(np.repeat([[0, 255]], 64, 0), 32, 1).astype(np.uint8)).save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


# ---- train_network.py ---------------------------------------------------------------------------------------


@pytest.fixture
def refused(base, pictures, tmp_path, monkeypatch, capsys):
    """Return what starts a training with bad input and checks all that holds for a refusal."""
    from refusals import Refused

    return Refused(base, pictures, tmp_path, monkeypatch, capsys)


@pytest.fixture
def run(base, pictures, tmp_path):
    """Return what trains for two steps with cached latents, into a folder of a name, and returns the weights.

    With killed_after it returns nothing: the run ends as if it were killed after so many steps.
    """
    from runs import options, train, train_killed

    def train_into(out="o", *, killed_after=None, **more):
        more = {"cache_latents": True, "max_train_steps": 2} | more
        if killed_after is not None:
            return train_killed(options(base, pictures, tmp_path / out, **more), after=killed_after)
        return train(base, pictures, tmp_path / out, **more)

    return train_into


# ---- converted models ---------------------------------------------------------------------------------------


@pytest.fixture
def tidy(tmp_path):
    """Leave nothing of the hundreds of megabytes behind that a test writes."""
    yield
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """Return family name -> its models and what the converter makes of them, each once."""
    from conversions import make_converted

    return functools.cache(lambda name: make_converted(name, tmp_path_factory.mktemp(name)))


@pytest.fixture
def folders(tmp_path):
    """Return a folder to read pictures from, and one to write to, which is not there."""
    (tmp_path / "src").mkdir()
    return tmp_path / "src", tmp_path / "dst"
