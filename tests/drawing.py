"""Runs of gen_img_diffusers.py, and what diffusers' own pipelines draw of the same, for tests."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import pytest
import tiny
import torch
from loras import make_lora
from PIL import Image
from safetensors.torch import load_file, save_file

import gen_img_diffusers
from library.config.samplers import SAMPLER_NAMES, SamplerName
from library.generation import recipe, recorded
from library.models.base import BaseFiles, BaseModel
from library.models.precision import Types
from library.models.tokenizer import load_clip_tokenizer
from library.sampling.samplers import build_sampler

SAMPLERS = [name for name in SAMPLER_NAMES if not name.startswith("k_")]
SIZE = ["--W", 64, "--H", 64]
COMMON = ["--steps", 2, "--scale", 4, "--seed", 5, "--sequential_file_name"]
SETTINGS = {"width": 64, "height": 64, "num_inference_steps": 2, "guidance_scale": 4.0}
HIGHRES = ["--highres_fix_scale", 0.5, "--highres_fix_steps", 2, "--strength", 0.6, "--W", 128, "--H", 128]
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LONG = ", ".join(f"thing {index}" for index in range(40))  # two windows
CHANGED_BY = {"--textual_inversion_embeddings", "--opt_channels_last", "--vae_tiling", "--vae_slices", "--offload"}
LOADED: dict[Any, BaseModel] = {}  # models that runs do not change: loading is most of the time of a small picture


def slow(*values: object) -> Any:
    """Return a row of a table that the default run leaves out: another row shows the same."""
    return pytest.param(*values, marks=pytest.mark.slow)


class Shot(NamedTuple):
    """A picture that was written: its file, its pixels, what the file says."""

    path: Path
    pixels: np.ndarray
    texts: dict[str, str]


def shot(path: Path) -> Shot:
    with Image.open(path) as file:
        file.load()
        return Shot(path, np.asarray(file.convert("RGB")).astype(int), dict(recorded.read_texts(path)[0]))


class Drawing:
    """Runs of the script over tiny models, which write below a folder."""

    def __init__(self, model_store: tiny.ModelStore, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model_store, self.folder, self.monkeypatch = model_store, folder, monkeypatch
        self.load = recipe.load_base

    def _remembered(self, files: BaseFiles, types: Types, *, copied: bool) -> BaseModel:
        key = (files.checkpoint.path, files.vae.path, files.tokenizers, files.predicts_v, files.zero_snr, types)
        if key not in LOADED:
            LOADED[key] = self.load(files, types)
        found = LOADED[key]
        if not copied:
            return found
        texts = tuple(dataclasses.replace(text, module=copy.deepcopy(text.module)) for text in found.texts)
        return dataclasses.replace(found, unet=copy.deepcopy(found.unet), texts=texts)  # what networks change

    def __call__(
        self, *words: object, family: str = "sd1", layout: str = "folder", out: str = "o", sized: bool = True
    ) -> list[Shot]:
        """Return the new pictures of a run in order of their names, sheets left out."""
        folder = self.folder / out
        before = set(folder.rglob("*"))
        size = SIZE if sized else []
        argv = ["--ckpt", self.model_store(family)[1][layout], "--outdir", folder, *size, *COMMON, *words]
        remembered = functools.partial(self._remembered, copied="--network_module" in words)
        load = self.load if CHANGED_BY & set(words) else remembered
        self.monkeypatch.setattr(recipe, "load_base", load)
        assert gen_img_diffusers.main([str(word) for word in argv]) == 0
        new = sorted(path for path in set(folder.rglob("*")) - before if path.suffix in SUFFIXES)
        return [shot(path) for path in new if not path.name.startswith("grid")]


known_tokenizer = functools.cache(load_clip_tokenizer)


def pipe_of(
    models: dict[str, Any],
    kind: str = "",
    *,
    family: str = "sd1",
    sampler: SamplerName = "ddim",
    predicts_v: bool = False,
    zero_snr: bool = False,
    changed: bool = False,
    **more: Any,
) -> Any:
    """Return diffusers' own pipeline over tiny models, over copies where something is loaded into them."""
    rows = tiny.FAMILIES[family].text_models
    copied = copy.deepcopy if changed else lambda module: module
    tokenizer_of = load_clip_tokenizer if changed else known_tokenizer
    parts: dict[str, Any] = {
        "vae": models["vae"],
        "unet": copied(models["unet"]),
        "scheduler": build_sampler(sampler, predicts_v=predicts_v, zero_snr=zero_snr),
    }
    for row in rows:
        parts[row.folder] = copied(models[row.folder])
        parts[row.folder.replace("text_encoder", "tokenizer")] = tokenizer_of(pad_id=row.pad_id)
    parts |= (
        {"add_watermarker": False}
        if family == "sdxl"
        else {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    )
    pipe = getattr(diffusers, f"StableDiffusion{'XL' if family == 'sdxl' else ''}{kind}Pipeline")(**parts, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixels_of(pipe: Any, prompt: str = "a cat", seed: int = 5, **more: Any) -> np.ndarray:
    values = SETTINGS | {"negative_prompt": "dog", "generator": torch.Generator("cpu").manual_seed(seed)} | more
    return np.asarray(pipe(prompt, **values).images[0]).astype(int)


def same_pixels(one: np.ndarray, other: np.ndarray, most: int = 1) -> None:
    """Hold that two pictures are equal to rounding, and that they show something."""
    assert one.shape == other.shape
    assert one.std() > 5, "a picture without content would be equal to any other"
    assert np.abs(one - other).max() <= most


def differ(one: np.ndarray, other: np.ndarray) -> None:
    assert one.shape != other.shape or np.abs(one - other).max() > 3


def opened(path: Path, size: tuple[int, int] = (64, 64)) -> Image.Image:
    with Image.open(path) as file:
        picture = file.convert("RGB")
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)


def lora_of(models: dict[str, Any], path: Path, *, seed: int = 0, **arguments: Any) -> Path:
    """Write a LoRA file that changes pictures visibly; alphas differ from module to module."""
    make_lora(models, path, seed=seed, **(arguments or {"conv_dim": "2", "conv_alpha": "1.5"}))
    weights = load_file(path)
    for index, name in enumerate(sorted(name for name in weights if name.endswith(".alpha"))):
        weights[name] = weights[name] * (0.5 + index % 4)
    save_file(weights, path)
    return path
