"""Parts that compare the card with the CPU, on models small enough for both."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from benchmarks.card import suite
from benchmarks.card.rows import MEASURED, NotHere, Row, Value, attempt, compared, greatest_difference, told
from benchmarks.card.setting import Setting, half_of, need_half
from benchmarks.card.suite import Started

# Greatest relative difference of a loss within 20 steps from those of the CPU in float32. On a CPU sums in another
# order change it by 4e-7, and bf16 by 5e-3 (1.7e-2 at 64 px); fp16 has eight times the precision of bf16, but
# its scaler leaves out the first steps.
TRACE_BOUNDS = {"no": 1e-4, "fp16": 4e-2, "bf16": 4e-2}
PRECISION_NAMES = {"no": "float32", "fp16": "fp16", "bf16": "bf16"}
PICTURE_BOUNDS = {"no": 0.5, "fp16": 2.0, "bf16": 6.0}  # mean difference of the 256 levels of a channel


def traces(setting: Setting) -> Iterator[Row]:
    """Compare the losses of trainings on the card with those on the CPU."""
    for family in suite.POCKET:
        on_cpu = suite.small_training(setting, family, f"{family}-cpu")
        started = Started(setting, "train_network.py", on_cpu, on_cpu=True)
        for precision, shown in PRECISION_NAMES.items():
            name = f"{family}, {shown} against the CPU in float32"
            yield attempt(name, trace, setting, name, family, precision, started)


def trace(setting: Setting, name: str, family: str, precision: str, started: Started) -> Row:
    """Compare a training with the one that was started on the CPU."""
    need_half(setting, precision)
    options = suite.small_training(setting, family, f"{family}-{precision}", mixed_precision=precision)
    found = suite.train(setting, options)
    started.wait()
    expected = suite.losses(started.options)
    values: dict[str, Value] = {
        "steps": len(found),
        "last loss": found[-1],
        "last loss on the CPU": expected[-1],
        "weights differ by": weight_difference(suite.network_file(options), suite.network_file(started.options)),
    }
    return compared(name, greatest_difference(found, expected), TRACE_BOUNDS[precision], values)


def weight_difference(one: Path, other: Path) -> float:
    """Return the norm of the difference of two networks over that of the second, over all that they add to weights."""
    changes, others = lora_changes(one), lora_changes(other)
    if changes.keys() != others.keys():
        raise ValueError(f"{one.name} and {other.name} have different modules")
    squares = [((changes[name] - others[name]).square().sum(), others[name].square().sum()) for name in others]
    apart, whole = (float(sum(parts)) for parts in zip(*squares, strict=True))
    return float((apart / whole) ** 0.5) if whole else float("inf")


def lora_changes(path: Path) -> dict:
    """Return module -> the matrix that a LoRA file adds, in float64; products do not depend on the signs of an SVD."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    found = {}
    for name in [name for name in tensors if name.endswith(".lora_down.weight")]:
        module = name.removesuffix(".lora_down.weight")
        down, up = tensors[name].double().flatten(1), tensors[f"{module}.lora_up.weight"].double().flatten(1)
        alpha = tensors.get(f"{module}.alpha")
        found[module] = up @ down * (1.0 if alpha is None else float(alpha) / down.shape[0])
    return found


# ---- states ------------------------------------------------------------------------------------------------------


def states(setting: Setting) -> Iterator[Row]:
    """Compare a training that was resumed with one that was not, to the byte, with deterministic kernels."""
    import torch

    precisions = ["no"] if setting.tiny else ["no", half_of(setting)] if setting.quick else ["no", "bf16", "fp16"]
    torch.backends.cudnn.deterministic = True
    # Not merely with warnings: attention then keeps a kernel that is not deterministic.
    torch.use_deterministic_algorithms(True)
    for precision in precisions:
        name = f"resumed after half of the steps, {PRECISION_NAMES[precision]}"
        yield attempt(name, resumed, setting, name, precision)


def resumed(setting: Setting, name: str, precision: str) -> Row:
    """Compare a whole training with one that goes on from a state after half of its steps."""
    need_half(setting, precision)
    steps = setting.steps(10, tiny=2)
    common = {"mixed_precision": precision, "network_dropout": 0.1, "max_train_steps": steps}
    whole, half, rest = (
        suite.small_training(setting, "sd1", f"{kind}-{precision}", **common) for kind in ("whole", "half", "rest")
    )
    deterministic_training(setting, whole)
    suite.train(setting, half | {"save_state": True, "save_every_n_steps": steps // 2})
    state = suite.network_file(half).with_name(f"half-{precision}-step{steps // 2:08d}-state")
    suite.train(setting, rest | {"resume": state})
    return compared(name, tensors_differ(suite.network_file(rest), suite.network_file(whole)), 0, {"steps": steps})


def deterministic_training(setting: Setting, options: suite.Options) -> None:
    """Train; raises NotHere if torch has no deterministic kernel for an operation."""
    try:
        suite.train(setting, options)
    except RuntimeError as error:
        if "deterministic" in str(error):
            raise NotHere(f"torch has no deterministic kernel for a part of the step: {told(error)}") from None
        raise


def tensors_differ(one: Path, other: Path) -> float:
    """Return the greatest absolute difference of the tensors of two files; infinite where their names differ."""
    import torch
    from safetensors.torch import load_file

    first, second = load_file(one), load_file(other)
    if first.keys() != second.keys():
        return float("inf")
    pairs = [(tensor, second[name]) for name, tensor in first.items()]
    return max(0.0 if torch.equal(a, b) else float((a.double() - b.double()).abs().max()) or 1.0 for a, b in pairs)


# ---- pictures ----------------------------------------------------------------------------------------------------


def pictures(setting: Setting) -> Iterator[Row]:
    """Compare pictures drawn on the card with those of the CPU."""
    for family in ("sd1",) if setting.tiny else tuple(suite.POCKET):
        network = suite.small_training(setting, family, f"{family}-drawn", learning_rate="3e-3")
        drawing = {
            "ckpt": suite.POCKET[family],
            "from_file": prompts(setting),
            "steps": setting.steps(20, tiny=4),
            "seed": 3,
            "W": suite.TINY_SIDE if setting.tiny else 128,
            "H": suite.TINY_SIDE if setting.tiny else 128,
            "scale": 3,
            "network_module": "networks.lora",
            "network_weights": suite.network_file(network),
        }
        name = f"{family}, the network to draw with"
        yield attempt(name, network_to_draw_with, setting, name, network)
        for sampler in ("ddim",) if setting.tiny else ("ddim", "euler_a"):
            yield from drawn(setting, family, drawing | {"sampler": sampler})


def network_to_draw_with(setting: Setting, name: str, options: suite.Options) -> Row:
    """Train a network on the card."""
    return Row(name, MEASURED, {"last loss": suite.train(setting, options)[-1]})


def drawn(setting: Setting, family: str, drawing: dict[str, object]) -> Iterator[Row]:
    """Compare the pictures of a sampler in each precision."""
    sampler = drawing["sampler"]
    outdir = setting.work / f"{family}-{sampler}-cpu"
    shutil.rmtree(outdir, ignore_errors=True)
    on_cpu = drawing | {"outdir": outdir, "sequential_file_name": True}
    started = Started(setting, "gen_img_diffusers.py", on_cpu, on_cpu=True)
    for precision, shown in PRECISION_NAMES.items():
        name = f"{family}, {sampler}, {shown} against the CPU in float32, levels on average"
        yield attempt(name, drawn_alike, setting, name, precision, drawing, started)


def drawn_alike(setting: Setting, name: str, precision: str, drawing: dict[str, object], started: Started) -> Row:
    """Compare pictures with those that are drawn on the CPU."""
    need_half(setting, precision)
    out = Path(f"{started.options['outdir']}-{precision}")
    found = suite.draw(setting, {**drawing, "outdir": out, **({} if precision == "no" else {precision: True})})
    started.wait()
    mean, most = level_differences(found, sorted(Path(str(started.options["outdir"])).glob("*.png")))
    values: dict[str, Value] = {"pictures": len(found), "greatest difference of a pixel (of 255)": most}
    return compared(name, mean, PICTURE_BOUNDS[precision], values)


def prompts(setting: Setting) -> Path:
    """Return a file of prompts."""
    path = setting.work / "prompts.txt"
    lines = ["a fox on a blue background --d 1", "a unicorn on a green background --d 2"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def level_differences(found: list[Path], expected: list[Path]) -> tuple[float, int]:
    """Return (mean, greatest) difference of the levels (0 to 255) of pictures."""
    import numpy as np
    from PIL import Image

    if len(found) != len(expected) or not found:
        return float("inf"), 255
    pairs = [
        [np.asarray(Image.open(path).convert("RGB"), dtype=np.int16) for path in pair]
        for pair in zip(found, expected, strict=True)
    ]
    apart = np.stack([np.abs(one - other) for one, other in pairs])
    return float(apart.mean()), int(apart.max())
