"""The part that trains under the memory limit of a smaller card, with the options that the documentation names."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.card import suite
from benchmarks.card.rows import FAILED, NOT_RUN, WITHIN, Row, Value, attempt, is_out_of_memory, told
from benchmarks.card.setting import GIB, Setting, forget_peak, free, half_of, peaks

if TYPE_CHECKING:
    from library.training.run.events import Event, Moment

OF_DRIVER = 0.7  # GiB that the driver takes beside torch's tensors


class Recipe(NamedTuple):
    """Options for a card of some GB."""

    gigabytes: int
    family: str
    options: dict[str, object]


OF_SD: dict[str, object] = {"gradient_checkpointing": True, "network_dim": 16}
OF_SDXL: dict[str, object] = {**OF_SD, "network_alpha": 8, "optimizer_type": "AdamW8bit"}
RECIPES = (
    Recipe(8, "sd1", OF_SD),
    Recipe(6, "sd1", {**OF_SD, "network_train_unet_only": True, "fp8_base_unet": True}),
    Recipe(8, "sdxl", OF_SDXL),
    Recipe(6, "sdxl", {**OF_SDXL, "fp8_base_unet": True}),
)


def recipes(setting: Setting) -> Iterator[Row]:
    """Train with each recipe, with a preview before and after, under its limit."""
    for recipe in RECIPES[:1] if setting.tiny else RECIPES:
        name = f"{recipe.family} on {recipe.gigabytes} GB"
        yield attempt(name, under_limit, setting, name, recipe)


def under_limit(setting: Setting, name: str, recipe: Recipe) -> Row:
    """Train under a limit; running out of memory is a fault here."""
    side = suite.TINY_SIDE if setting.tiny else suite.FULL_SIDE[recipe.family]
    prompts = setting.work / "preview-of-recipes.txt"
    prompts.write_text(f"a photo of noise --w {side} --h {side} --d 1 --s 4\n", encoding="utf-8")
    steps = setting.steps(8)
    given: dict[str, object] = {
        "mixed_precision": half_of(setting),
        "max_train_steps": steps,
        "sample_prompts": prompts,
        "sample_at_first": True,
        **recipe.options,
    }
    notes = []
    if given.get("optimizer_type") == "AdamW8bit" and importlib.util.find_spec("bitsandbytes") is None:
        given["optimizer_type"] = "AdamW"
        notes.append("AdamW, since bitsandbytes is not installed")
    options = suite.full_training(setting, recipe.family, f"recipe-{recipe.gigabytes}", 1, **given)
    free(setting)
    limit = limited(setting, recipe.gigabytes)
    if limit is None and setting.on_card:
        notes.append("no limit: the card is not larger")
    of_steps = PeakOfSteps(setting, steps)
    try:
        forget_peak(setting)
        losses = suite.train(setting, options, [of_steps.event()])
    except Exception as error:
        if is_out_of_memory(error):
            return Row(name, FAILED, peaks(setting), told(error))
        raise
    finally:
        limited(setting, None)
    values: dict[str, Value] = {"limit GiB": limit, "reserved GiB": peaks(setting)["reserved GiB"]}
    values |= {"steps": len(losses), "peak of steps GiB": of_steps.peak}
    values["the same, counted by --dry_run"] = counted(recipe, given, side) if setting.on_card else None
    verdict = WITHIN if setting.on_card else NOT_RUN
    notes += [] if setting.on_card else ["trained, but a limit of memory needs a card"]
    return Row(name, verdict, values, "; ".join(notes))


class PeakOfSteps:
    """The peak of memory in the steps after the first one, in which kernels are chosen, and before the last preview."""

    def __init__(self, setting: Setting, steps: int) -> None:
        self._setting, self._steps = setting, steps
        self.peak: float | None = None

    def event(self) -> Event:
        """Return what is to happen after each step."""
        from library.training.run.events import Event, Every, Needs

        return Event("peak", Every(1), self._note, Needs.NOTHING)

    def _note(self, moment: Moment) -> None:
        if moment.progress.step == 1:
            forget_peak(self._setting)
        elif moment.progress.step == self._steps:
            self.peak = peaks(self._setting)["peak GiB"]


def counted(recipe: Recipe, given: dict[str, Any], side: int) -> float:
    """Return the memory at the peak of a recipe's steps as it is counted on shapes, in GiB."""
    import full_size
    import tiny

    options = {name: value for name, value in given.items() if not name.startswith("sample_")}
    if recipe.family == "sdxl":
        options |= {"network_train_unet_only": True, "cache_text_encoder_outputs": True}
    stages = full_size.count(tiny.FAMILIES[recipe.family], side, **options)
    return next(stage.total for stage in stages if stage.title.startswith("training")) / GIB


def limited(setting: Setting, gigabytes: int | None) -> float | None:
    """Limit torch to the memory that a card of some GB leaves it, or lift it; return the limit in GiB, if any."""
    import torch

    if not setting.on_card:
        return None
    whole = torch.cuda.get_device_properties(0).total_memory / GIB
    wanted = whole if gigabytes is None else gigabytes - OF_DRIVER
    torch.cuda.set_per_process_memory_fraction(min(1.0, wanted / whole))
    return None if wanted >= whole else wanted
