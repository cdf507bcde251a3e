"""The table of parts of a report, in the order of their importance."""

from __future__ import annotations

import functools

from benchmarks.card import choices, correctness, drawing, machine, memory, others, speed, traced
from benchmarks.card.running import Part

NAMES = {"sd1": ("sd15", "SD 1.5 at 512 px"), "sdxl": ("sdxl", "SDXL at 1024 px")}
STEPS, MODES, TRACE, DRAW = (
    {family: functools.partial(function, family=family) for family in NAMES}
    for function in (speed.steps, speed.modes, traced.traced, drawing.drawing)
)


def switched(family: str, name: str, limit: float, quick_limit: float) -> Part:
    """Return the part of an option that changes torch."""
    short, long = NAMES[family]
    mode = speed.SWITCHED[name]
    find = functools.partial(speed.switched, family=family, mode=mode)
    return Part(f"{short}-{name}", f"{long}: with and without {mode.name}", find, limit, quick_limit)


# Variables that NVIDIA's libraries read when they are loaded.
WHOLE_FLOAT32 = {"NVIDIA_TF32_OVERRIDE": "0"}
DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}

MACHINE = Part("machine", "Machine", machine.machine, 120)
# Comparisons of small models, which leave room for others.
comparison = functools.partial(Part, quick_limit=200, beside_others=True)
PARTS = (
    comparison("traces", "Losses on the card and on the CPU", correctness.traces, 600, variables=WHOLE_FLOAT32),
    comparison("options", "Options of the training", choices.options, 900),
    comparison("resume", "Resumed trainings", correctness.states, 300, variables=DETERMINISTIC),
    comparison("pictures", "Pictures on the card and on the CPU", correctness.pictures, 400, variables=WHOLE_FLOAT32),
    comparison("switches", "Options that change torch", choices.switches, 400),
    comparison("tools", "Tools on the card and on the CPU", others.tools, 300, variables=WHOLE_FLOAT32),
    Part("sd15", "SD 1.5 at 512 px: speed and memory", STEPS["sd1"], 1200, 200),
    Part("sdxl", "SDXL at 1024 px: speed and memory", STEPS["sdxl"], 1200, 240),
    Part("sd15-trace", "SD 1.5: what a step asks of the card", TRACE["sd1"], 300, 90),
    Part("memory", "Recipes for smaller cards, under a limit of memory", memory.recipes, 900, 150),
    switched("sd1", "graphs", 300, 90),
    Part("ranks", "Two processes", others.ranks, 300, 90, WHOLE_FLOAT32),
    Part("sd15-modes", "SD 1.5 at 512 px: other modes", MODES["sd1"], 1200, 120),
    Part("sdxl-modes", "SDXL at 1024 px: other modes", MODES["sdxl"], 1200, 150),
    switched("sd1", "tf32", 300, 90),
    switched("sd1", "channels-last", 300, 90),
    switched("sd1", "cudnn", 300, 90),
    Part("sd15-draw", "SD 1.5 at 512 px: pictures", DRAW["sd1"], 300, 90),
    Part("sdxl-draw", "SDXL at 1024 px: pictures", DRAW["sdxl"], 600, 90),
    switched("sd1", "compile", 900, 180),
    Part("compile", "Compiled models", choices.compiled, 900, 180),
    switched("sdxl", "graphs", 600, 90),
    switched("sdxl", "channels-last", 600, 90),
    switched("sdxl", "cudnn", 600, 90),
    switched("sdxl", "compile", 1200, 180),
    Part("sdxl-trace", "SDXL: what a step asks of the card", TRACE["sdxl"], 300, 90),
)
BY_NAME = {part.name: part for part in (MACHINE, *PARTS)}
