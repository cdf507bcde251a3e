"""The schedulers of diffusers that samplers are; `config/samplers.py` has the table."""

from __future__ import annotations

from typing import Any

from library.config.samplers import LMS, SAMPLERS, SamplerName
from library.errors import UserError


def build_sampler(name: SamplerName, *, predicts_v: bool) -> Any:
    """Return a fresh diffusers scheduler for a sampler's name."""
    import inspect

    import diffusers

    from library.diffusion.schedule import BETA_END, BETA_START, NUM_TIMESTEPS

    row = SAMPLERS[name]
    kind = getattr(diffusers, row.scheduler)
    wanted = {
        "num_train_timesteps": NUM_TIMESTEPS,
        "beta_start": BETA_START,
        "beta_end": BETA_END,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "prediction_type": "v_prediction" if predicts_v else "epsilon",
    } | row.settings
    known = inspect.signature(kind.__init__).parameters
    return kind(**{key: value for key, value in wanted.items() if key in known})


def check_sampler(name: SamplerName) -> None:
    """Raise UserError for a sampler whose package is missing."""
    if SAMPLERS[name] is LMS:
        import importlib.util

        if importlib.util.find_spec("scipy") is None:
            raise UserError(f"sampler {name} needs scipy: pip install scipy, or choose another, such as euler")
