"""Parts that time the steps of full-size models, beside the floor and peft, and with the options of speed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, ParamSpec

from benchmarks.card import floor, suite
from benchmarks.card.rows import (
    MEASURED,
    NotHere,
    Row,
    Value,
    attempt,
    compared,
    greatest_difference,
    is_out_of_memory,
)
from benchmarks.card.setting import (
    GIB,
    Setting,
    device_of,
    free,
    half_of,
    need_all,
    need_half,
    need_package,
)
from benchmarks.card.suite import Timed

P = ParamSpec("P")
BATCHES = {"sd1": (1, 4, 8), "sdxl": (1, 4)}
PEAK_SIDE = 8192  # of the matrices whose product shows what the card can do


class Mode(NamedTuple):
    """A way to train."""

    name: str
    options: dict[str, object]
    precision: str | None = None  # unset: the half precision that suits the card
    package: str | None = None  # needed
    needs_card: bool = False


MODES = (
    Mode("full", {"full_fp16": True}, precision="fp16"),
    Mode("full", {"full_bf16": True}, precision="bf16"),
    Mode("gradient checkpointing", {"gradient_checkpointing": True}),
    Mode("8-bit U-Net", {"fp8_base_unet": True, "network_train_unet_only": True}),
    Mode("AdamW8bit", {"optimizer_type": "AdamW8bit"}, package="bitsandbytes"),
    Mode("xformers", {"xformers": True}, package="xformers", needs_card=True),
    Mode("DyLoRA", {"network_module": "networks.dylora"}),
    Mode("U-Net only", {"network_train_unet_only": True}),
    Mode("pictures encoded in each step", {"cache_latents": None}),
)
# Modes that change torch for the whole process: a part of its own for each, with and without it.
SWITCHED = {
    "channels-last": Mode("channels last", {"opt_channels_last": True}),
    "cudnn": Mode("cudnn_benchmark", {"cudnn_benchmark": True}, needs_card=True),
    "tf32": Mode("TF32", {"allow_tf32": True}, precision="no", needs_card=True),
    "graphs": Mode("CUDA graphs", {"cuda_graphs": True}, needs_card=True),
    "compile": Mode("torch_compile", {"torch_compile": True}, package="triton", needs_card=True),
}


def batches_of(setting: Setting, family: str) -> tuple[int, ...]:
    """Return the batch sizes."""
    return (1,) if setting.tiny else BATCHES[family]


def measured(name: str, setting: Setting, measure: Callable[P, Row], *args: P.args, **kwargs: P.kwargs) -> Row:
    """Return the row of a measurement; what does not fit into the card's memory is no fault here."""

    def fitting() -> Row:
        free(setting)
        try:
            return measure(*args, **kwargs)
        except Exception as error:
            if is_out_of_memory(error):
                raise NotHere("it does not fit into the memory of the card") from None
            raise

    return attempt(name, fitting)


# ---- the plain step, the floor, and peft ---------------------------------------------------------------------------


def steps(setting: Setting, family: str) -> Iterator[Row]:
    """Time the step in each precision and batch size, with the floor and peft in the same process."""
    best = Peak()
    yield attempt("largest product of matrices", best.measure, setting)
    yield attempt("a random model", written, setting, family)
    only_half = setting.tiny or (setting.quick and family == "sdxl")
    precisions = [half_of(setting)] if only_half else ["bf16", "fp16", "no"]
    for precision, batch in itertools.product(precisions, batches_of(setting, family)):
        if setting.quick and precision != half_of(setting) and batch > 1:
            continue
        compared_here = Beside(setting, family, precision, batch, best)
        for kind, measure in compared_here.rows().items():
            yield measured(f"{precision}, {kind}, batch {batch}", setting, measure)


def written(setting: Setting, family: str) -> Row:
    """Write the model that the following rows load, if it is not there."""
    start = time.perf_counter()
    size = suite.full_model(setting, family).stat().st_size
    return Row("a random model", MEASURED, {"GiB": size / GIB, "s to write": time.perf_counter() - start})


class Beside:
    """The floor, our step and peft's for a precision and batch size."""

    def __init__(self, setting: Setting, family: str, precision: str, batch: int, best: Peak) -> None:
        self._setting, self._family, self._precision, self._batch = setting, family, precision, batch
        self._peak = best
        self._floor_seconds = self._floor_operations = 0.0  # 0 before they were measured, or if that failed

    def rows(self) -> dict[str, Callable[[], Row]]:
        """Return what measures each row, in the order in which they need each other."""
        return {"floor": self.of_floor, "ours": self.of_ours, "peft": self.of_peft}

    def of_floor(self) -> Row:
        """Time the floor, and count its operations."""
        need_half(self._setting, self._precision)
        step = floor.make_floor(self._work())
        timed = suite.timed_step(self._setting, repeated(step))
        self._floor_seconds, self._floor_operations = timed.seconds, counted_operations(step)
        values = self._columns(timed) | {"TFLOP a step": self._floor_operations / 1e12 or None}
        return Row(f"{self._precision}, floor", MEASURED, values)

    def of_ours(self) -> Row:
        """Time the training of the suite."""
        need_half(self._setting, self._precision)
        options = suite.full_training(
            self._setting, self._family, "timed", self._batch, mixed_precision=self._precision
        )
        timed = suite.timed_training(self._setting, options)
        return Row(f"{self._precision}, ours", MEASURED, self._columns(timed), left_out(timed))

    def of_peft(self) -> Row:
        """Time a step with peft."""
        need_half(self._setting, self._precision)
        need_package("peft")
        step = floor.make_peft(self._work())
        timed = suite.timed_step(self._setting, repeated(step))
        return Row(f"{self._precision}, peft", MEASURED, self._columns(timed))

    def _work(self) -> floor.Work:
        return work_of(self._setting, self._family, self._precision, self._batch)

    def _columns(self, timed: Timed) -> dict[str, Value]:
        """Return the columns of a row; the share of the peak counts the operations of the floor alone."""
        found = timed.values(self._batch)
        if self._floor_seconds:
            found["times floor"] = timed.seconds / self._floor_seconds
        if self._floor_operations and self._peak.flops and self._precision != "no":
            found["% of the card's peak"] = 100 * self._floor_operations / timed.seconds / self._peak.flops
        return found


def left_out(timed: Timed) -> str:
    """Return a note on steps that changed nothing because a number was not finite."""
    number = sum(loss == float("inf") for loss in timed.losses)
    return f"{number} steps were left out" if number else ""


def repeated(step: Callable[[], object]) -> Iterator[object]:
    """Yield the results of a step that is made again and again."""
    while True:
        yield step()


def work_of(setting: Setting, family: str, precision: str, batch: int) -> floor.Work:
    """Return what a step of the floor works on, loaded onto the device."""
    from library.config.model import ModelConfig
    from library.models.base import find_base, load_base
    from library.models.precision import move, types_of

    model = ModelConfig(pretrained_model_name_or_path=str(suite.full_model(setting, family)))
    base = load_base(find_base(model), types_of(precision))
    move(base.unet, device_of(setting))
    text: Any = None
    if family != "sdxl":
        text = base.texts[0].module
        move(text, device_of(setting))
    side = suite.TINY_SIDE if setting.tiny else suite.FULL_SIDE[family]
    return floor.Work(base.unet, text, batch, side // 8, 4 if setting.tiny else suite.RANK)


def counted_operations(step: Callable[[], object]) -> float:
    """Return the floating-point operations of a step, as torch counts them for products, convolutions and attention."""
    try:
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            step()
        return float(counter.get_total_flops())
    except Exception as error:
        if is_out_of_memory(error):
            raise
        print(f"operations were not counted: {error}")
        return 0.0


class Peak:
    """What the card can do in half precision."""

    def __init__(self) -> None:
        self.flops = 0.0  # a second; 0 before it was measured

    def measure(self, setting: Setting) -> Row:
        """Time a large product; return the row."""
        import torch

        side = 256 if setting.tiny else PEAK_SIDE
        name = half_of(setting)
        dtype = torch.bfloat16 if name == "bf16" else torch.float16
        one, other = (torch.randn(side, side, device=setting.device).to(dtype) for _ in range(2))
        out = torch.empty_like(one)
        seconds = suite.timed_step(setting, repeated(lambda: torch.mm(one, other, out=out))).seconds
        self.flops = 2 * side**3 / seconds
        return Row(f"{name}, product of {side} x {side} matrices", MEASURED, {"TFLOP/s": self.flops / 1e12})


# ---- other modes -------------------------------------------------------------------------------------------------


def modes(setting: Setting, family: str) -> Iterator[Row]:
    """Time the step with the options that trade speed, memory and precision."""
    chosen = MODES[2:3] if setting.tiny else MODES
    batches = batches_of(setting, family)[: 1 if setting.quick else None]
    for batch, mode in itertools.product(batches, chosen):
        if family == "sdxl" and mode.name == "U-Net only":
            continue  # as in all rows of SDXL

        name = f"{mode.precision or half_of(setting)}, {mode.name}"
        yield measured(name, setting, mode_row, setting, name, family, batch, mode)


def mode_row(setting: Setting, name: str, family: str, batch: int, mode: Mode) -> Row:
    """Time a mode."""
    return Row(name, MEASURED, timed_mode(setting, family, batch, mode, mode.options).values(batch))


def timed_mode(setting: Setting, family: str, batch: int, mode: Mode, options: dict[str, object]) -> Timed:
    """Time a mode, or with no options the plain run that it is compared with."""
    precision = need_all(setting, mode.precision, mode.package, card=mode.needs_card)
    more = {"mixed_precision": precision, **options}
    if family == "sdxl" and "cache_latents" in options:
        more["cache_latents"] = None
    return suite.timed_training(setting, suite.full_training(setting, family, "timed", batch, **more))


def switched(setting: Setting, family: str, mode: Mode) -> Iterator[Row]:
    """Time steps without and with an option that changes torch, and compare their losses."""
    for batch in batches_of(setting, family)[: 1 if setting.quick else None]:
        found: list[Timed] = []
        yield measured("without", setting, without_switch, setting, family, batch, mode, found)
        yield measured(mode.name, setting, with_switch, setting, family, batch, mode, found)


def without_switch(setting: Setting, family: str, batch: int, mode: Mode, found: list[Timed]) -> Row:
    """Time the plain run, and add it to what was found."""
    suite.need_options(train_config(), mode.options)  # else it would be made in vain
    found.append(timed_mode(setting, family, batch, mode, {}))
    return Row("without", MEASURED, found[0].values(batch))


def with_switch(setting: Setting, family: str, batch: int, mode: Mode, found: list[Timed]) -> Row:
    """Time the run with the option, and compare it with the plain one."""
    timed = timed_mode(setting, family, batch, mode, mode.options)
    values = timed.values(batch)
    if not found:
        return Row(mode.name, MEASURED, values)
    values["times without"] = timed.seconds / found[0].seconds
    return compared(mode.name, greatest_difference(timed.losses, found[0].losses), SWITCH_BOUND, values)


SWITCH_BOUND = 5e-2  # of losses with and without a switch: another order of sums, in half precision


def train_config() -> type:
    """Return the options of a training."""
    from library.config.train import TrainConfig

    return TrainConfig
