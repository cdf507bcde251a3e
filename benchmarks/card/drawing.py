"""The part that draws with a full-size model."""

from __future__ import annotations

import time
from collections.abc import Iterator

from benchmarks.card import suite
from benchmarks.card.rows import MEASURED, Row
from benchmarks.card.setting import Setting, forget_peak, half_of, peaks
from benchmarks.card.speed import measured


def drawing(setting: Setting, family: str) -> Iterator[Row]:
    """Draw with a full-size model: seconds a picture and memory."""
    half = half_of(setting)
    ways: dict[str, dict[str, object]] = {half: {}, f"{half}, batches of 4": {"batch_size": 4}}
    ways[f"{half}, --offload --vae_tiling"] = {"offload": True, "vae_tiling": True}
    for name, more in list(ways.items())[: 1 if setting.tiny else None]:
        yield measured(name, setting, drawn, setting, name, family, {half: True, **more})


def drawn(setting: Setting, name: str, family: str, more: dict[str, object]) -> Row:
    """Draw four pictures."""
    side = suite.TINY_SIDE if setting.tiny else suite.FULL_SIDE[family]
    options = {
        "ckpt": suite.full_model(setting, family),
        "prompt": "a photo of noise",
        "images_per_prompt": 4,
        "steps": setting.steps(20, tiny=2),
        "seed": 1,
        "W": side,
        "H": side,
        "outdir": setting.work / f"drawn-{family}",
        **more,
    }
    forget_peak(setting)
    start = time.perf_counter()
    found = suite.draw(setting, options)
    seconds = (time.perf_counter() - start) / len(found)
    return Row(name, MEASURED, {"s a picture, with loading": seconds, **peaks(setting)})
