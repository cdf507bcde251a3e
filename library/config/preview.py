"""Options of the pictures generated during training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from library.config.options import option
from library.config.samplers import SamplerName


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """Previews."""

    sample_prompts: Path | None = option(None, "prompts of the previews (.txt, .toml or .json)")
    sample_every_n_steps: int | None = option(None, "generate after every n-th step")
    sample_every_n_epochs: int | None = option(None, "generate after every n-th epoch; wins over steps")
    sample_at_first: bool = option(False, "also generate before the first step")
    sample_sampler: SamplerName = option("ddim", "sampler of prompts without their own")
