"""Parts that time the steps of full-size models, beside the floor and peft, and with the options of speed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

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
    Setting,
    device_of,
    free,
    half_of,
    need_half,
    need_package,
)
from benchmarks.card.suite import Timed

BATCHES = {"sd1": (1, 4, 8), "sdxl": (1, 4)}
PEAK_SIDE = 8192  # of the matrices whose product shows what the card can do


class Mode(NamedTuple):
    """A way to train."""

    name: str
    options: dict[str, object]
    precision: str | None = None  # unset: the half precision that suits the card
    package: str | None = None  # needed


MODES = (
    Mode("full", {"full_fp16": True}, precision="fp16"),
    Mode("full", {"full_bf16": True}, precision="bf16"),
    Mode("gradient checkpointing", {"gradient_checkpointing": True}),
    Mode("8-bit U-Net", {"fp8_base_unet": True, "network_train_unet_only": True}),
    Mode("AdamW8bit", {"optimizer_type": "AdamW8bit"}, package="bitsandbytes"),
    Mode("xformers", {"xformers": True}, package="xformers"),
    Mode("DyLoRA", {"network_module": "networks.dylora"}),
    Mode("U-Net only", {"network_train_unet_only": True}),
    Mode("pictures encoded in each step", {"cache_latents": None}),
)
# Modes that change torch for the whole process: a part of its own for each, with and without it.
SWITCHED = {
    "channels-last": Mode("channels last", {"opt_channels_last": True}),
    "cudnn": Mode("cudnn_benchmark", {"cudnn_benchmark": True}),
    "tf32": Mode("TF32", {"allow_tf32": True}, precision="no"),
    "graphs": Mode("CUDA graphs", {"cuda_graphs": True}),
    "compile": Mode("torch_compile", {"torch_compile": True}),
}


def batches_of(setting: Setting, family: str) -> tuple[int, ...]:
    """Return the batch sizes."""
    return (1,) if setting.tiny else BATCHES[family]


def measured(setting: Setting, name: str, measure: Callable[[], Row]) -> Row:
    """Return the row of a measurement; what does not fit into the card's memory is no fault here."""

    def fitting() -> Row:
        free(setting)
        try:
            return measure()
        except Exception as error:
            if is_out_of_memory(error):
                raise NotHere("it does not fit into the memory of the card") from None
            raise

    return attempt(name, fitting)


# ---- the plain step, the floor, and peft ---------------------------------------------------------------------------


def steps(setting: Setting, family: str) -> Iterator[Row]:
    """Time the step in each precision and batch size, with the floor and peft in the same process."""
    best = Peak()
    if family == "sd1" or setting.on_card:
        yield attempt("largest product of matrices", lambda: best.measure(setting))
    precisions = [half_of(setting)] if setting.tiny or family == "sdxl" else ["bf16", "fp16", "no"]
    for precision, batch in itertools.product(precisions, batches_of(setting, family)):
        if setting.quick and precision != half_of(setting) and batch > 1:
            continue
        yield from beside(setting, family, precision, batch, best)


def beside(setting: Setting, family: str, precision: str, batch: int, best: Peak) -> Iterator[Row]:
    """Time the floor, our step and peft's for a precision and batch size."""
    floors: dict[str, float] = {}

    def columns(timed: Timed) -> dict[str, Value]:
        found = timed.values(batch)
        if "seconds" in floors:
            found["times floor"] = timed.seconds / floors["seconds"]
        if "FLOP" in floors and best.flops:
            found["% of the card's peak"] = 100 * floors["FLOP"] / timed.seconds / best.flops
        return found

    def of_floor() -> Row:
        need_half(setting, precision)
        step = floor.make_floor(work_of(setting, family, precision, batch))
        timed = suite.timed_step(setting, repeated(step))
        floors["seconds"] = timed.seconds
        counted = counted_operations(step)
        if counted and precision != "no":
            floors["FLOP"] = counted
        row = columns(timed) | {"TFLOP a step": counted / 1e12 if counted else None}
        return Row(f"{precision}, floor", MEASURED, row)

    def of_ours() -> Row:
        need_half(setting, precision)
        options = suite.full_training(setting, family, "timed", batch, mixed_precision=precision)
        timed = suite.timed_training(setting, options)
        return Row(f"{precision}, ours", MEASURED, columns(timed), left_out(timed))

    def of_peft() -> Row:
        need_half(setting, precision)
        need_package("peft")
        step = floor.make_peft(work_of(setting, family, precision, batch))
        return Row(f"{precision}, peft", MEASURED, columns(suite.timed_step(setting, repeated(step))))

    for name, measure in {"floor": of_floor, "ours": of_ours, "peft": of_peft}.items():
        yield measured(setting, f"{precision}, {name}, batch {batch}", measure)


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
    chosen = MODES[2:4] if setting.tiny else MODES
    batches = batches_of(setting, family)[: 1 if setting.quick else None]
    for batch, mode in itertools.product(batches, chosen):
        if family == "sdxl" and mode.name == "U-Net only":
            continue  # as in all rows of SDXL

        def of_mode(batch: int = batch, mode: Mode = mode) -> Row:
            return Row(name, MEASURED, timed_mode(setting, family, batch, mode, mode.options).values(batch))

        name = f"{mode.precision or half_of(setting)}, {mode.name}"
        yield measured(setting, name, of_mode)


def timed_mode(setting: Setting, family: str, batch: int, mode: Mode, options: dict[str, object]) -> Timed:
    """Time a mode, or with no options the plain run that it is compared with."""
    precision = mode.precision or half_of(setting)
    need_half(setting, precision)
    if mode.package:
        need_package(mode.package)
    if mode.name == "xformers" and not setting.on_card:
        raise NotHere("it needs a card")
    more = {"mixed_precision": precision, **options}
    if family == "sdxl" and "cache_latents" in options:
        more["cache_latents"] = None
    return suite.timed_training(setting, suite.full_training(setting, family, "timed", batch, **more))


def switched(setting: Setting, family: str, mode: Mode) -> Iterator[Row]:
    """Time steps without and with an option that changes torch, and compare their losses."""
    for batch in batches_of(setting, family)[: 1 if setting.quick else None]:
        plain: list[Timed] = []

        def without(batch: int = batch, plain: list[Timed] = plain) -> Row:
            suite.need_options(train_config(), mode.options)  # before the plain run is made in vain
            plain.append(timed_mode(setting, family, batch, mode, {}))
            return Row("without", MEASURED, plain[0].values(batch))

        def with_it(batch: int = batch, plain: list[Timed] = plain) -> Row:
            timed = timed_mode(setting, family, batch, mode, mode.options)
            values = timed.values(batch)
            if not plain:
                return Row(mode.name, MEASURED, values)
            values["times without"] = timed.seconds / plain[0].seconds
            return compared(mode.name, greatest_difference(timed.losses, plain[0].losses), SWITCH_BOUND, values)

        yield measured(setting, "without", without)
        yield measured(setting, mode.name, with_it)


SWITCH_BOUND = 5e-2  # of losses with and without a switch: another order of sums, in half precision


def train_config() -> type:
    """Return the options of a training."""
    from library.config.train import TrainConfig

    return TrainConfig
