"""The files around the weights of a Diffusers folder: configurations, scheduler, tokenizers and index."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.models.building import KINDS, config_of
from library.models.checkpoint import Checkpoint
from library.models.completeness import parts_of
from library.models.kinds import input_channels, pipeline_name
from library.models.tokenizer import (
    BOS_TOKEN,
    EOS_TOKEN,
    VOCABULARY_SIZE,
    WINDOW,
    added_in_order,
    shipped_vocabulary,
)

DIFFUSERS_VERSION = "0.30.0"  # the oldest version that reads these files


def folder_configs(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Return the Diffusers configuration of each part of an original-layout file, from its shapes."""
    kinds: dict[str, dict[str, Any]] = {part: {"_class_name": kind} for part, kind in KINDS.items()}
    for text in checkpoint.family.text_models:
        kind = "CLIPTextModelWithProjection" if text.has_projection else "CLIPTextModel"
        kinds[text.folder] = {"architectures": [kind], "model_type": "clip_text_model"}
    return {
        part: kinds[part] | config_of(checkpoint, part) | {"_diffusers_version": DIFFUSERS_VERSION}
        for part in parts_of(checkpoint)
    }


def write_surroundings(
    folder: Path,
    checkpoint: Checkpoint,
    *,
    tokens: Mapping[str, Mapping[str, int]],
    v_prediction: bool,
    zero_snr: bool,
) -> None:
    """Write configurations, scheduler, tokenizers and index of a Diffusers folder for an original-layout model.

    tokens are those of each text encoder beyond CLIP's vocabulary, with their ids.

    Raises UserError for a kind of model that needs more than these.
    """
    pipeline = pipeline_name(checkpoint.family, input_channels(checkpoint), checkpoint.path)
    configs = folder_configs(checkpoint)
    for part, config in configs.items():
        write_json(folder / part / "config.json", config)
    write_json(
        folder / "scheduler" / "scheduler_config.json", scheduler_config(v_prediction=v_prediction, zero_snr=zero_snr)
    )
    index: dict[str, Any] = {
        "_class_name": pipeline,
        "_diffusers_version": DIFFUSERS_VERSION,
        "scheduler": ["diffusers", "DDIMScheduler"],
        **{part: ["diffusers", kind] if part in configs else [None, None] for part, kind in KINDS.items()},
    }
    for text in checkpoint.family.text_models:
        index[text.folder] = ["transformers", configs[text.folder]["architectures"][0]]
        index[text.tokenizer_folder] = ["transformers", "CLIPTokenizer"]
        write_tokenizer(
            folder / text.tokenizer_folder,
            text.pad_id,
            length=min(WINDOW, configs[text.folder]["max_position_embeddings"]),
            added=tokens.get(text.folder, {}),
        )
    if len(checkpoint.family.text_models) == 1:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    else:
        index |= {"force_zeros_for_empty_prompt": True}
    write_json(folder / "model_index.json", index)


def scheduler_config(*, v_prediction: bool, zero_snr: bool) -> dict[str, Any]:
    """Return the noise schedule that all families were trained with, as the configuration of a DDIM scheduler.

    zero_snr: its end is rescaled to pure noise, where generation has to begin.
    """
    rescaled = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if zero_snr else {}
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
        **rescaled,
    }


def write_tokenizer(folder: Path, pad_id: int, *, length: int = WINDOW, added: Mapping[str, int]) -> None:
    """Write the CLIP tokenizer from the included vocabulary, for texts of a length, with added tokens and their ids.

    Its padding token is the one with an id, as in the published folders.
    """
    vocabulary, merges = vocabulary_files()
    pad_token = next(token for token, number in shipped_vocabulary()[0].items() if number == pad_id)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(vocabulary, encoding="utf-8")
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    special = {"bos_token": BOS_TOKEN, "eos_token": EOS_TOKEN, "unk_token": EOS_TOKEN, "pad_token": pad_token}
    write_json(folder / "special_tokens_map.json", special)
    more = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True, "errors": "replace"}
    write_json(folder / "tokenizer_config.json", special | more)
    if added:  # in order and without gaps: transformers counts them instead of reading their ids
        ids = {token: VOCABULARY_SIZE + at for at, token in enumerate(added_in_order(added))}
        write_json(folder / "added_tokens.json", ids)


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
