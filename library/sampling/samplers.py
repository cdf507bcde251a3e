"""The schedulers of diffusers that samplers are; `config/samplers.py` has the table."""

from __future__ import annotations

import functools
import inspect
import logging
from typing import Any

from library.config.samplers import LMS, SAMPLERS, SamplerName
from library.errors import UserError

logger = logging.getLogger(__name__)

ZERO_SNR = "rescale_betas_zero_snr"  # parameter of the schedulers that know it


def build_sampler(name: SamplerName, *, predicts_v: bool, zero_snr: bool) -> Any:
    """Return a fresh diffusers scheduler for a sampler's name; zero_snr: the last timestep is pure noise.

    Samplers that do not know such a schedule have the usual one, with a warning, and so have models that predict
    noise: from pure noise no picture follows, and the sampler would divide by zero.
    """
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
    if zero_snr and predicts_v:
        warn_of_schedule(name)
        # Only with this spacing the first step is the last timestep, from which such a model makes its pictures.
        wanted |= {ZERO_SNR: True, "timestep_spacing": "trailing"} if knows_zero_snr(name) else {}
    return kind(**{key: value for key, value in wanted.items() if key in known})


def knows_zero_snr(name: SamplerName) -> bool:
    """Return whether a sampler can begin with pure noise at the last timestep."""
    import diffusers

    return ZERO_SNR in inspect.signature(getattr(diffusers, SAMPLERS[name].scheduler).__init__).parameters


@functools.cache
def warn_of_schedule(name: SamplerName) -> None:
    """Warn of a sampler for a model with zero terminal SNR that does not know it, once in a process."""
    if not knows_zero_snr(name):
        known = [other for other in SAMPLERS if not other.startswith("k_") and knows_zero_snr(other)]
        logger.warning(
            "the model has zero terminal SNR, which the sampler %s does not know: its pictures are grayer than they "
            "should be; %s do",
            name,
            ", ".join(known),
        )


def check_sampler(name: SamplerName) -> None:
    """Raise UserError for a sampler whose package is missing."""
    if SAMPLERS[name] is LMS:
        import importlib.util

        if importlib.util.find_spec("scipy") is None:
            raise UserError(f"sampler {name} needs scipy: pip install scipy, or choose another, such as euler")
