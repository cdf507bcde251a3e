"""Samplers as rows: the name of the options, the scheduler of diffusers with its settings, AUTOMATIC1111's name."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

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

# Without clip_sample=False latents would be cut to [-1, 1], which is for models of pixels.
DDIM = {"clip_sample": False, "set_alpha_to_one": False}


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A scheduler of diffusers."""

    scheduler: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    title: str | None = None  # in AUTOMATIC1111; None: it has none, and the name of the options is written


LMS = Sampler("LMSDiscreteScheduler", title="LMS")
EULER = Sampler("EulerDiscreteScheduler", title="Euler")
EULER_A = Sampler("EulerAncestralDiscreteScheduler", title="Euler a")
DPM_2 = Sampler("KDPM2DiscreteScheduler", title="DPM2")
DPM_2_A = Sampler("KDPM2AncestralDiscreteScheduler", title="DPM2 a")
MULTISTEP = "DPMSolverMultistepScheduler"
SAMPLERS: dict[SamplerName, Sampler] = {
    "ddim": Sampler("DDIMScheduler", DDIM, "DDIM"),
    "pndm": Sampler("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}, "PLMS"),
    "lms": LMS,
    "euler": EULER,
    "euler_a": EULER_A,
    "heun": Sampler("HeunDiscreteScheduler", title="Heun"),
    "dpm_2": DPM_2,
    "dpm_2_a": DPM_2_A,
    "dpmsolver": Sampler(MULTISTEP, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    "dpmsolver++": Sampler(MULTISTEP, {"algorithm_type": "dpmsolver++"}, "DPM++ 2M"),
    "dpmsingle": Sampler("DPMSolverSinglestepScheduler"),
    "k_lms": LMS,
    "k_euler": EULER,
    "k_euler_a": EULER_A,
    "k_dpm_2": DPM_2,
    "k_dpm_2_a": DPM_2_A,
}
