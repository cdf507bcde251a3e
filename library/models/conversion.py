"""Converts base models: plan of the weights, and the configurations, scheduler, tokenizers and index around them.

The weights follow a plan of `layout.py`, one tensor at a time, for models of any size. Tensors that only the original
layout has (the last block of SD 2.x's text encoder, a logit scale) are kept in a file of the folder, so that
converting back restores every bit.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.models import keys
from library.models.base import diffusers_names
from library.models.building import NUM_GROUPS, build_part, config_of
from library.models.checkpoint import UNET, VAE, Checkpoint, read_config, tensor_name
from library.models.layout import Plan, plan_of_part, unplaced
from library.models.tokenizer import BOS_TOKEN, EOS_TOKEN, WINDOW, shipped_vocabulary

DIFFUSERS_VERSION = "0.30.0"  # the oldest version that reads these files


def parts_of(checkpoint: Checkpoint) -> list[str]:
    """Return the parts of an original-layout file as named in a folder; the VAE may be missing."""
    has_vae = keys.holds_vae(name for name in checkpoint.shapes if name.startswith(keys.VAE_PREFIX))
    return [UNET, *([VAE] if has_vae else []), *(text.folder for text in checkpoint.family.text_models)]


def plan_to_folder(checkpoint: Checkpoint) -> tuple[Plan, list[str]]:
    """Return the plan of a Diffusers folder (names as in `Checkpoint`), and the tensors without a place in it.

    Raises UserError for an incomplete part.
    """
    plan: Plan = {}
    for part in parts_of(checkpoint):
        model = build_part(checkpoint, part)
        names, state = diffusers_names(model), model.state_dict()
        own = plan_of_part(checkpoint, part, {name: tuple(state[inner].shape) for name, inner in names.items()})
        missing = sorted(names.keys() - own.keys())
        if missing:
            raise UserError(f"{checkpoint.path} is incomplete: {part}/{missing[0]} (as Diffusers names it) is missing")
        plan |= {tensor_name(part, name): piece for name, piece in own.items()}
    return plan, unplaced(checkpoint, plan)


def folder_configs(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Return the Diffusers configuration of each part of an original-layout file, from its shapes."""
    kinds: dict[str, dict[str, Any]] = {
        UNET: {"_class_name": "UNet2DConditionModel"},
        VAE: {"_class_name": "AutoencoderKL"},
    }
    for text in checkpoint.family.text_models:
        kind = "CLIPTextModelWithProjection" if text.has_projection else "CLIPTextModel"
        kinds[text.folder] = {"architectures": [kind], "model_type": "clip_text_model"}
    return {
        part: kinds[part] | config_of(checkpoint, part) | {"_diffusers_version": DIFFUSERS_VERSION}
        for part in parts_of(checkpoint)
    }


def unusual_configurations(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Return the configurations of a Diffusers folder that the shapes of its weights do not determine."""
    family, found = checkpoint.family, {}
    usual = {UNET: family.unet, VAE: family.vae} | {text.folder: text.config for text in family.text_models}
    for part, expected in usual.items():
        if part not in checkpoint.parts:
            continue
        config = read_config(checkpoint.path / part)
        differs = any(key in config and as_tuple(config[key]) != as_tuple(value) for key, value in expected.items())
        if differs or config.get("norm_num_groups", NUM_GROUPS) != NUM_GROUPS:
            found[part] = {key: value for key, value in config.items() if not key.startswith(("_", "torch_dtype"))}
    return found


def as_tuple(value: Any) -> Any:
    """Return a list as a tuple, since JSON has no tuples."""
    return tuple(value) if isinstance(value, list) else value


def write_surroundings(folder: Path, checkpoint: Checkpoint, *, v_prediction: bool) -> None:
    """Write configurations, scheduler, tokenizers and index of a Diffusers folder for an original-layout model."""
    configs = folder_configs(checkpoint)
    for part, config in configs.items():
        write_json(folder / part / "config.json", config)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config(v_prediction=v_prediction))
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if len(configs) > 3 else "StableDiffusionPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"] if "vae" in configs else [None, None],
    }
    for text in checkpoint.family.text_models:
        tokenizer = text.folder.replace("text_encoder", "tokenizer")
        index[text.folder] = ["transformers", configs[text.folder]["architectures"][0]]
        index[tokenizer] = ["transformers", "CLIPTokenizer"]
        write_tokenizer(folder / tokenizer, text.pad_token)
    if len(checkpoint.family.text_models) == 1:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    else:
        index |= {"force_zeros_for_empty_prompt": True}
    write_json(folder / "model_index.json", index)


def scheduler_config(*, v_prediction: bool) -> dict[str, Any]:
    """Return the noise schedule that all families were trained with, as the configuration of a DDIM scheduler."""
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_train_timesteps": 1000,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": "v_prediction" if v_prediction else "epsilon",
    }


def write_tokenizer(folder: Path, pad_token: str) -> None:
    """Write the CLIP tokenizer from the included vocabulary."""
    vocabulary, merges = vocabulary_files()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(vocabulary, encoding="utf-8")
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    special = {"bos_token": BOS_TOKEN, "eos_token": EOS_TOKEN, "unk_token": EOS_TOKEN, "pad_token": pad_token}
    write_json(folder / "special_tokens_map.json", special)
    more = {"tokenizer_class": "CLIPTokenizer", "model_max_length": WINDOW, "do_lower_case": True, "errors": "replace"}
    write_json(folder / "tokenizer_config.json", special | more)


@functools.cache
def vocabulary_files() -> tuple[str, str]:
    """Return the content of vocab.json and merges.txt; SDXL has them twice."""
    vocabulary, merges = shipped_vocabulary()
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    return json.dumps(vocabulary, ensure_ascii=False) + "\n", "\n".join(lines) + "\n"


def write_json(path: Path, table: Any) -> None:
    """Write a table as JSON in UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
