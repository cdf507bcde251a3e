"""Kinds of models beside the usual ones: which folders of them are written, and which can be used.

The tools convert and merge most of them; training and generation refuse those that need other inputs or another
noise schedule.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from library.errors import UserError
from library.models import keys
from library.models.checkpoint import UNET, WHOLE, Checkpoint, read_config, scheduler_of
from library.models.family import UNET_BASE, ModelFamily
from library.models.prediction import KNOWN

# Tensors of models that were trained on another noise schedule, with preconditioning (Karras et al. 2022).
EDM_TENSORS = {
    "edm_mean": "an EDM model such as Playground v2.5",
    "edm_std": "an EDM model such as Playground v2.5",
    "edm_vpred.sigma_max": "a CosXL model",
}
# Beginnings of the names of diffusers' schedulers for models on other noise schedules.
SCHEDULERS = {"EDM": "an EDM model such as Playground v2.5", "FlowMatch": "a flow-matching model"}


class UnetInput(NamedTuple):
    """A kind of U-Net by its input."""

    title: str
    pipeline: str | None  # end of the name of its pipeline in diffusers; None: folders of it are not written


INPUTS: dict[int, UnetInput] = {
    4: UnetInput("a model that takes latents", "Pipeline"),
    5: UnetInput("a depth model", None),  # its pipeline needs the depth estimator
    8: UnetInput("an editing model", "InstructPix2PixPipeline"),
    9: UnetInput("an inpainting model", "InpaintPipeline"),
}
UNKNOWN_INPUT = UnetInput("another kind of model", None)


def check_channels(channels: Any, source: Path) -> None:
    """Raise UserError for a U-Net with inputs besides latents, by its number of input channels; None: unknown."""
    if channels in (None, UNET_BASE["in_channels"]):
        return
    raise UserError(
        f"{source} is {input_of(channels).title}: its U-Net takes {channels} channels, and only those that take 4 "
        "can be used for training and generation"
    )


def input_of(channels: Any) -> UnetInput:
    """Return the kind of a U-Net with a number of input channels."""
    return INPUTS.get(channels, UNKNOWN_INPUT) if isinstance(channels, int) else UNKNOWN_INPUT


def pipeline_name(family: ModelFamily, channels: int, source: Path) -> str:
    """Return the pipeline of diffusers for a U-Net with a number of input channels.

    Raises UserError for kinds whose folders need more than this suite writes.
    """
    kind = input_of(channels)
    if kind.pipeline is None:
        known = ", ".join(str(number) for number, row in INPUTS.items() if row.pipeline)
        raise UserError(
            f"{source} is {kind.title}: its U-Net takes {channels} channels, and a Diffusers folder of it needs more "
            f"than the parts that are converted; those that take {known} are converted"
        )
    return family.pipeline + kind.pipeline


def check_usable(checkpoint: Checkpoint) -> None:
    """Raise UserError for a model that can be neither trained nor used for generation, by names and configurations."""
    path = checkpoint.path
    check_channels(input_channels(checkpoint), path)
    kind = schedule_kind(checkpoint)
    if kind is not None:
        raise UserError(
            f"{path} is {kind}: only models on the noise schedule of Stable Diffusion can be used for training and "
            "generation"
        )
    for text in checkpoint.family.text_models if checkpoint.is_folder else ():
        found = read_config(path / text.folder).get("model_type", "clip_text_model")
        if not str(found).startswith("clip"):
            raise UserError(f"{path}: its {text.folder} is a {found}, and only CLIP can be used")


def schedule_kind(checkpoint: Checkpoint) -> str | None:
    """Return what a model on another noise schedule is; None for one on the usual one, or if nothing tells."""
    if not checkpoint.is_folder:
        names = checkpoint.parts[WHOLE].shapes
        return next((f"{title} (by its tensor {name})" for name, title in EDM_TENSORS.items() if name in names), None)
    scheduler = scheduler_of(checkpoint.path) or {}
    name, prediction = str(scheduler.get("_class_name")), scheduler.get("prediction_type", "epsilon")
    for beginning, title in SCHEDULERS.items():
        if name.startswith(beginning):
            return f"{title} (by its scheduler {name})"
    return None if prediction in KNOWN else f"a model that predicts {prediction} (by its scheduler)"


def input_channels(checkpoint: Checkpoint) -> Any:
    """Return how many channels the U-Net takes: of the folder's configuration, or of a file's tensor; None: unknown."""
    if checkpoint.is_folder:
        return read_config(checkpoint.path / UNET).get("in_channels")
    first = checkpoint.parts[WHOLE].shapes.get(f"{keys.UNET_PREFIX}input_blocks.0.0.weight", ())
    return first[1] if len(first) == 4 else None
