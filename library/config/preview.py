"""Options of the pictures generated during training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from library.config.options import option
from library.config.samplers import SamplerName

MOMENTS = ("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """Previews."""

    sample_prompts: Path | None = option(None, "prompts of the previews (.txt, .toml or .json)", only_with=MOMENTS)
    sample_every_n_steps: int | None = option(None, "generate after every n-th step", interval="steps")
    sample_every_n_epochs: int | None = option(
        None, "generate after every n-th epoch; wins over steps", wins_over=("sample_every_n_steps",), interval="epochs"
    )
    sample_at_first: bool = option(False, "also generate before the first step")
    sample_sampler: SamplerName = option("ddim", "sampler of prompts without their own", only_with=MOMENTS)

    @property
    def are_wanted(self) -> bool:
        """Whether there is a moment at which previews are generated."""
        return bool(self.sample_every_n_steps or self.sample_every_n_epochs or self.sample_at_first)
