"""Options of the base model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from library.config.kinds import read_path_text
from library.config.options import REQUIRED, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Base model."""

    pretrained_model_name_or_path: str = option(
        REQUIRED,
        "base model: an original-layout .safetensors or .ckpt file, or a Diffusers folder",
        missing="the base model: a file or a Diffusers folder",
        parse=read_path_text,
    )
    v2: bool = option(False, "the base model is SD 2.x; found out from the file, so giving it is only a check")
    v_parameterization: bool = option(False, "train with the v-prediction target")
    vae: Path | None = option(None, "VAE to use instead of the model's own: a file or a Diffusers folder")
    tokenizer_cache_dir: Path | None = option(None, "folder with tokenizers to use instead of the included one")
