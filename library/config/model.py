"""Options of the base model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from library.config.hub_names import TakesModels
from library.config.kinds import read_path_text
from library.config.options import REQUIRED, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(TakesModels):
    """Base model."""

    pretrained_model_name_or_path: str = option(
        REQUIRED,
        "base model: an original-layout .safetensors or .ckpt file, a Diffusers folder, or a repository of the "
        "Hugging Face Hub (OWNER/NAME)",
        missing="the base model: a file, a Diffusers folder, or OWNER/NAME of the Hugging Face Hub",
        parse=read_path_text,
        hub="model",
    )
    v2: bool = option(False, "the base model is SD 2.x; found out from the file, so giving it is only a check")
    v_parameterization: bool = option(False, "train with the v-prediction target")
    vae: Path | None = option(
        None, "VAE to use instead of the model's own: a file, a Diffusers folder, or OWNER/NAME", hub="vae"
    )
    tokenizer_cache_dir: Path | None = option(None, "folder with tokenizers to use instead of the included one")
    variant: str | None = option(
        None,
        "weights to take from a Diffusers folder or repository, such as fp16; unset: the full ones if there are any",
    )
    offline: bool = option(False, "download no models: those that are named must be on this disk, or in the cache")
