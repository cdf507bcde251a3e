"""Where a report is made, and the few calls to a card that its parts need."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.card.rows import NotHere

if TYPE_CHECKING:
    import torch

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where and how thoroughly a report is made."""

    device: str  # "cuda" or "cpu"
    tiny: bool  # tiny models and few steps, which show that the report itself works
    quick: bool
    work: Path  # folder of the models, pictures and outputs

    @property
    def on_card(self) -> bool:
        return self.device != "cpu"

    def folder(self, name: str) -> Path:
        """Return a folder in the working folder, which is there afterwards."""
        path = self.work / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def steps(self, full: int, tiny: int = 3) -> int:
        """Return a number of steps."""
        return tiny if self.tiny else full


def need_half(setting: Setting, precision: str) -> None:
    """Raise NotHere for a precision that the device does not have."""
    if precision == "fp16" and not setting.on_card:
        raise NotHere("fp16 needs a GPU: on a CPU the run would be in float32")
    if precision == "bf16" and setting.on_card and not has_bf16():
        raise NotHere("this card has no bfloat16 of its own")


def has_bf16() -> bool:
    """Return whether the card computes in bfloat16 without emulation."""
    import torch

    try:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    except TypeError:  # a torch without the argument
        return torch.cuda.get_device_capability()[0] >= 8


def half_of(setting: Setting) -> str:
    """Return the half precision that suits the device."""
    return "bf16" if not setting.on_card or has_bf16() else "fp16"


def need_card(setting: Setting) -> None:
    """Raise NotHere without a card."""
    if not setting.on_card:
        raise NotHere("it needs a card")


def need_package(name: str) -> None:
    """Raise NotHere for a package that is not installed."""
    if importlib.util.find_spec(name) is None:
        raise NotHere(f"{name} is not installed")


def need_all(setting: Setting, precision: str | None, package: str | None, *, card: bool) -> str:
    """Return the precision of a run, unset the half precision that suits; raise NotHere for what it lacks."""
    precision = precision or half_of(setting)
    need_half(setting, precision)
    if card:
        need_card(setting)
    if package:
        need_package(package)
    return precision


def wait_for_device(setting: Setting) -> None:
    """Wait until the device has done all its work, so that a clock can be read."""
    import torch

    if setting.on_card:
        torch.cuda.synchronize()


def forget_peak(setting: Setting) -> None:
    """Begin to measure the peak of memory anew."""
    import torch

    if setting.on_card:
        torch.cuda.reset_peak_memory_stats()


def peaks(setting: Setting) -> dict[str, float | None]:
    """Return the greatest memory of tensors, and of what torch reserved for them, since it was begun anew."""
    import torch

    if not setting.on_card:
        return {"peak GiB": None, "reserved GiB": None}
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {"peak GiB": allocated / GIB, "reserved GiB": reserved / GIB}


def free(setting: Setting) -> None:
    """Give back the memory of what is no longer used."""
    import torch

    gc.collect()
    if setting.on_card:
        torch.cuda.empty_cache()


def device_of(setting: Setting) -> torch.device:
    """Return the device as torch names it."""
    import torch

    return torch.device(setting.device)
