"""Samplers as rows: the name users know -> the scheduler of diffusers and its settings."""

from __future__ import annotations

from typing import Any

from library.errors import UserError

# clip_sample would cut latents to [-1, 1], which is for models of pixels.
DDIM = {"clip_sample": False, "set_alpha_to_one": False}

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", DDIM),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm_2": ("KDPM2DiscreteScheduler", {}),
    "dpm_2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmsolver": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmsingle": ("DPMSolverSinglestepScheduler", {}),
}
ROWS |= {f"k_{name}": ROWS[name] for name in ("lms", "euler", "euler_a", "dpm_2", "dpm_2_a")}


def build_sampler(name: str, *, predicts_v: bool) -> Any:
    """Return a fresh diffusers scheduler for a sampler's name."""
    import inspect

    import diffusers

    from library.diffusion.schedule import BETA_END, BETA_START, NUM_TIMESTEPS

    class_name, settings = ROWS[name]
    kind = getattr(diffusers, class_name)
    wanted = {
        "num_train_timesteps": NUM_TIMESTEPS,
        "beta_start": BETA_START,
        "beta_end": BETA_END,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "prediction_type": "v_prediction" if predicts_v else "epsilon",
    } | settings
    known = inspect.signature(kind.__init__).parameters
    return kind(**{key: value for key, value in wanted.items() if key in known})


def check_sampler(name: str) -> None:
    """Raise UserError for a sampler whose package is missing."""
    if ROWS[name][0] == "LMSDiscreteScheduler":
        import importlib.util

        if importlib.util.find_spec("scipy") is None:
            raise UserError(f"sampler {name} needs scipy: pip install scipy, or choose another, such as euler")
