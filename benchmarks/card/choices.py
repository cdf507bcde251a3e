"""Parts that train a pocket model with each option, and compare it with the run without the option."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.card import suite
from benchmarks.card.correctness import PRECISION_NAMES, TRACE_BOUNDS
from benchmarks.card.rows import DIFFERS, WITHIN, Row, Value, attempt, compared, greatest_difference
from benchmarks.card.setting import Setting, need_all
from benchmarks.card.suite import Started


class Choice(NamedTuple):
    """An option of the training, and how far its losses may be from those of the run without it."""

    name: str
    options: dict[str, object]
    bound: float | None = None  # None: another training, whose losses are only to be finite
    package: str | None = None  # needed
    precision: str | None = None  # unset: the half precision that suits the card
    needs_card: bool = False


PREVIEWS: dict[str, object] = {"sample_at_first": True, "sample_every_n_steps": 10}
CHOICES = (
    Choice("8-bit base, with previews", {"fp8_base": True, **PREVIEWS}, bound=0.1),
    Choice("8-bit U-Net", {"fp8_base_unet": True, "network_train_unet_only": True}),
    Choice("full_fp16", {"full_fp16": True}, bound=0.1, precision="fp16"),
    Choice("full_bf16", {"full_bf16": True}, bound=0.1, precision="bf16"),
    Choice("previews", PREVIEWS, bound=TRACE_BOUNDS["bf16"]),
    Choice("gradient checkpointing", {"gradient_checkpointing": True}, bound=TRACE_BOUNDS["bf16"]),
    Choice("gradient checkpointing, fp16", {"gradient_checkpointing": True}, TRACE_BOUNDS["fp16"], precision="fp16"),
    Choice("pictures encoded in each step", {"cache_latents": None, "vae_batch_size": 2}, TRACE_BOUNDS["bf16"]),
    Choice("xformers", {"xformers": True}, TRACE_BOUNDS["bf16"], package="xformers", needs_card=True),
    Choice("AdamW8bit", {"optimizer_type": "AdamW8bit"}, bound=0.1, package="bitsandbytes"),
    Choice("PagedAdamW8bit", {"optimizer_type": "PagedAdamW8bit"}, bound=0.1, package="bitsandbytes", needs_card=True),
    Choice("PagedAdamW", {"optimizer_type": "PagedAdamW"}, bound=0.1, package="bitsandbytes", needs_card=True),
    Choice("Lion8bit", {"optimizer_type": "Lion8bit", "learning_rate": "1e-4"}, package="bitsandbytes"),
    Choice("SGDNesterov8bit", {"optimizer_type": "SGDNesterov8bit"}, package="bitsandbytes"),
    Choice("full_fp16, AdamW8bit", {"full_fp16": True, "optimizer_type": "AdamW8bit"}, 0.1, "bitsandbytes", "fp16"),
    Choice("AdaFactor", {"optimizer_type": "AdaFactor"}),
    Choice("DyLoRA", {"network_module": "networks.dylora"}),
    Choice(
        "DyLoRA, unit=2, convolutions", {"network_module": "networks.dylora", "network_args": ["unit=2", "conv_dim=4"]}
    ),
    Choice(
        "LyCORIS",
        {"network_module": "lycoris.kohya", "network_args": ["algo=loha", "preset=attn-mlp"]},
        package="lycoris",
    ),
    Choice(
        "noise options",
        {"noise_offset": 0.05, "adaptive_noise_scale": 0.01, "ip_noise_gamma": 0.1, "min_snr_gamma": 5},
    ),
    Choice("weighted captions, validation", {"weighted_captions": True, "validation_split": 0.2}),
    Choice("dropouts", {"network_dropout": 0.1, "network_args": ["rank_dropout=0.1", "module_dropout=0.1"]}),
    Choice("accumulated steps", {"gradient_accumulation_steps": 2, "scale_weight_norms": 1}),
)
IN_TINY = ("8-bit base, with previews", "full_fp16", "gradient checkpointing", "AdamW8bit", "xformers")
# Options that change torch for the whole process; each has one of its own.
SWITCHES = (
    Choice("channels last", {"opt_channels_last": True}, bound=TRACE_BOUNDS["bf16"]),
    Choice("cudnn_benchmark", {"cudnn_benchmark": True}, bound=TRACE_BOUNDS["bf16"], needs_card=True),
    Choice("TF32", {"allow_tf32": True}, bound=1e-2, precision="no", needs_card=True),
    Choice("CUDA graphs", {"cuda_graphs": True}, bound=TRACE_BOUNDS["bf16"], needs_card=True),
)
COMPILE = (Choice("torch_compile", {"torch_compile": True}, TRACE_BOUNDS["bf16"], "triton", needs_card=True),)


def options(setting: Setting) -> Iterator[Row]:
    """Train with each option."""
    chosen = [choice for choice in CHOICES if not setting.tiny or choice.name in IN_TINY]
    return with_choices(setting, chosen, alone=False)


def switches(setting: Setting) -> Iterator[Row]:
    """Train with each option that changes torch."""
    return with_choices(setting, SWITCHES, alone=True)


def compiled(setting: Setting) -> Iterator[Row]:
    """Train with compiled models."""
    return with_choices(setting, COMPILE, alone=True)


def with_choices(setting: Setting, choices: Sequence[Choice], *, alone: bool) -> Iterator[Row]:
    """Train a pocket model with each option; alone: in a process of its own."""
    plain: dict[str, list[float]] = {}
    for number, choice in enumerate(choices):
        yield attempt(choice.name, with_choice, setting, choice, f"choice-{number}", plain, alone=alone)


def with_choice(setting: Setting, choice: Choice, name: str, plain: dict[str, list[float]], *, alone: bool) -> Row:
    """Train with an option. plain has precision -> losses without options, and gets those that it lacks."""
    precision = need_all(setting, choice.precision, choice.package, card=choice.needs_card)
    wants_previews = "sample_at_first" in choice.options
    more: dict[str, object] = {
        "mixed_precision": precision,
        "sample_prompts": previews(setting) if wants_previews else None,
    }
    given = suite.small_training(setting, "sd1", name, **{**more, **choice.options})
    if alone:
        Started(setting, "train_network.py", given, on_cpu=False).wait()
        found = suite.losses(given)
    else:
        found = suite.train(setting, given)
    if choice.bound is None:
        return finite(choice.name, found, precision)
    if precision not in plain:
        without = suite.small_training(setting, "sd1", f"plain-{precision}", mixed_precision=precision)
        plain[precision] = suite.train(setting, without)
    difference = greatest_difference(found, plain[precision])
    return compared(choice.name, difference, choice.bound, trace_values(found, precision))


def trace_values(found: list[float], precision: str) -> dict[str, Value]:
    """Return the columns of a training."""
    return {"precision": PRECISION_NAMES[precision], "steps": len(found), "last loss": found[-1]}


def finite(name: str, found: list[float], precision: str) -> Row:
    """Return the row of a training whose losses are to be numbers."""
    verdict = WITHIN if all(map(math.isfinite, found)) else DIFFERS
    return Row(name, verdict, trace_values(found, precision), "bound: all losses are finite")


def previews(setting: Setting) -> Path:
    """Return a file of prompts for previews."""
    path = setting.work / "previews.txt"
    side = suite.TINY_SIDE if setting.tiny else 128
    path.write_text(f"a fox on a blue background --w {side} --h {side} --d 1 --s 4\n", encoding="utf-8")
    return path
