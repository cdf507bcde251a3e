"""What an image's file says of how it was generated.

Three texts: `parameters` as AUTOMATIC1111 writes and reads it, the short keys of sd-scripts, and `generation`, JSON
with all that is needed to generate the image again.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.config.hub_names import MODEL_SUFFIXES
from library.config.samplers import SAMPLERS
from library.generation.a1111 import (
    KARRAS_BY_ITSELF,
    NEGATIVE,
    NOISE_SCHEDULE,
    OTHER_NETWORKS,
    ZERO_SNR,
    number,
    quoted,
    tag_of,
    without_marks,
)
from library.generation.init_images import floored
from library.generation.recorded import KEY

if TYPE_CHECKING:
    from library.generation.jobs import Job

# Values with which a key of `generation` is left out; of any other key it is None.
DEFAULTS = {
    **{"max_windows": 1, "normalize": "original", "latents_upscaling": False},
    **{"crop_top": 0, "crop_left": 0, "zero_snr": False},
}


@dataclasses.dataclass(frozen=True)
class NetworkFacts:
    """A network of a run."""

    module: str
    file: str  # its name
    sha256: str
    merged: float | None  # its strength, where it is merged
    has_tag: bool  # whether AUTOMATIC1111 reads such a file, so that it can stand in the prompt


@dataclasses.dataclass(frozen=True)
class NetworkUse:
    """A network and the strength with which it acts on an image."""

    network: NetworkFacts
    strength: float

    @property
    def stem(self) -> str:
        """Its name in AUTOMATIC1111."""
        return Path(self.network.file).stem

    @property
    def tag(self) -> str | None:
        """Its text in a prompt of AUTOMATIC1111; None if it cannot be used there."""
        return tag_of(self.stem, self.strength) if self.network.has_tag else None


@dataclasses.dataclass(frozen=True)
class RunFacts:
    """What all images of a run have in common."""

    model: str  # name of the file or folder
    model_sha256: str
    vae: str | None
    networks: tuple[NetworkFacts, ...]
    dtype: str
    version: str
    zero_snr: bool


def texts_for(job: Job, facts: RunFacts) -> dict[str, str]:
    """Return key -> text for an image."""
    request, settings = job.request, job.settings
    networks = networks_of(facts, settings.multipliers)
    table = {
        "prompt": request.prompt,
        "seed": request.seed,
        "negative_prompt": request.negative_prompt,
        "width": settings.width,
        "height": settings.height,
        "steps": settings.steps,
        "scale": settings.scale,
        "sampler": settings.sampler,
        "strength": settings.strength if job.begins_with_image else None,
        "multipliers": request.multipliers,
        "clip_skip": settings.text.clip_skip,
        "max_windows": job.max_windows,
        "normalize": settings.text.weights,
        "highres": settings.highres,
        "latents_upscaling": settings.latents_upscaling,
        **({} if settings.sizes is None else vars(settings.sizes)),
        "model": facts.model,
        "model_sha256": facts.model_sha256,
        "zero_snr": facts.zero_snr,
        "vae": facts.vae,
        "networks": [
            {"module": use.network.module, "file": use.network.file, "sha256": use.network.sha256}
            | {"strength": use.strength}
            for use in networks
        ],
        "dtype": facts.dtype,
        "begins_with": job.init_image.name if job.init_image else None,
        "mask": job.mask.name if job.mask else None,
        "version": facts.version,
    }
    short = {
        "prompt": request.prompt,
        "negative-prompt": request.negative_prompt,
        "seed": str(request.seed),
        "sampler": settings.sampler,
        "steps": str(settings.steps),
        "scale": str(settings.scale),
    }
    if request.raw and request.raw != request.prompt:
        short["raw-prompt"] = request.raw
    if settings.sizes is not None:
        sizes = settings.sizes.resolved(settings.width, settings.height)
        short |= {name.replace("_", "-"): str(value) for name, value in vars(sizes).items()}
    said = {key: value for key, value in table.items() if value != DEFAULTS.get(key)}
    return {
        "parameters": parameters_text(job, facts, networks),
        **short,
        KEY: json.dumps(said, ensure_ascii=False),
    }


def networks_of(facts: RunFacts, multipliers: tuple[float, ...]) -> list[NetworkUse]:
    """Return the networks of an image with their strengths; multipliers are of those that are not merged."""
    left = iter(multipliers)
    return [NetworkUse(fact, next(left) if fact.merged is None else fact.merged) for fact in facts.networks]


def parameters_text(job: Job, facts: RunFacts, networks: list[NetworkUse]) -> str:
    """Return the text that AUTOMATIC1111 writes under `parameters`, and draws from where it is pasted there."""
    request = job.request
    tags = [use.tag for use in networks if use.tag is not None]
    lines = [" ".join([request.prompt, *tags]).strip()]
    if request.negative_prompt:
        lines.append(f"{NEGATIVE} {request.negative_prompt}")
    settings = sampling_settings(job) | {
        "Model hash": facts.model_sha256[:10],
        "Model": short_name(facts.model),
        **highres_settings(job),
    }
    if job.settings.text.clip_skip is not None:
        settings["Clip skip"] = job.settings.text.clip_skip
    if job.settings.text.weights == "none":
        settings["Emphasis"] = "No norm"
    if facts.zero_snr:
        settings[NOISE_SCHEDULE] = ZERO_SNR
    settings["RNG"] = "CPU"  # where the noise comes from, whatever the device
    if facts.vae is not None:
        settings["VAE"] = facts.vae
    if networks:
        settings["Lora hashes"] = ", ".join(f"{without_marks(use.stem)}: {use.network.sha256[:12]}" for use in networks)
    others = [use for use in networks if use.tag is None]
    if others:
        settings[OTHER_NETWORKS] = ", ".join(
            f"{without_marks(use.stem)} ({use.network.module}): {number(use.strength)}" for use in others
        )
    settings["Version"] = facts.version
    return "\n".join([*lines, ", ".join(f"{key}: {quoted(value)}" for key, value in settings.items())])


def short_name(model: str) -> str:
    """Return the name of a model without folders, and of a file without its ending; other names may have a dot."""
    path = Path(model)
    return path.stem if path.suffix.lower() in MODEL_SUFFIXES else path.name


def sampling_settings(job: Job) -> dict[str, Any]:
    """Return the settings of the sampling; of an image in two stages those of the first one."""
    used = job.settings
    steps, width, height = used.steps, used.width, used.height
    if used.highres is not None and job.init_image is None:
        ratio, steps = used.highres
        width, height = floored((round(width * ratio), round(height * ratio)))
    settings: dict[str, Any] = {"Steps": steps, "Sampler": SAMPLERS[used.sampler].title or used.sampler}
    if used.sampler in KARRAS_BY_ITSELF:
        settings["Schedule type"] = "Uniform"
    return settings | {"CFG scale": number(used.scale), "Seed": job.request.seed, "Size": f"{width}x{height}"}


def highres_settings(job: Job) -> dict[str, Any]:
    """Return the settings of an image that begins with another one, or of the second of two stages."""
    used = job.settings
    if not job.begins_with_image:
        return {}
    settings: dict[str, Any] = {"Denoising strength": number(used.strength)}
    if used.highres is not None and job.init_image is None:
        settings |= {
            "Hires resize": f"{used.width}x{used.height}",
            "Hires steps": used.steps,
            "Hires upscaler": "Latent (bicubic)" if used.latents_upscaling else "Lanczos",
        }
    return settings
