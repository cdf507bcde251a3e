"""Runs of tools/resize_images_to_resolution.py over made pictures, for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tools import resize_images_to_resolution as tool


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Return a picture of random pixels, uint8 (H, W, C), or (H, W) without channels."""
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth(width: int, height: int) -> np.ndarray:
    """Return a picture whose four corners differ, uint8 (H, W, 3)."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return np.rint(np.stack([250 * x, 250 * y, 125 * (x + y)], axis=-1)).astype(np.uint8)


def run(folders: tuple[Path, Path], *words: object) -> int:
    return tool.main([str(folders[0]), str(folders[1]), *map(str, words)])


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
