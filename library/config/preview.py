"""Options of the pictures generated during training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal, get_args

from library.config.options import option

SamplerName = Literal[
    "ddim",
    "pndm",
    "lms",
    "euler",
    "euler_a",
    "heun",
    "dpm_2",
    "dpm_2_a",
    "dpmsolver",
    "dpmsolver++",
    "dpmsingle",
    "k_lms",
    "k_euler",
    "k_euler_a",
    "k_dpm_2",
    "k_dpm_2_a",
]
SAMPLER_NAMES: tuple[SamplerName, ...] = get_args(SamplerName)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """Previews."""

    sample_prompts: Path | None = option(None, "prompts of the previews (.txt, .toml or .json)")
    sample_every_n_steps: int | None = option(None, "generate after every n-th step")
    sample_every_n_epochs: int | None = option(None, "generate after every n-th epoch; wins over steps")
    sample_at_first: bool = option(False, "also generate before the first step")
    sample_sampler: SamplerName = option("ddim", "sampler of prompts without their own")
