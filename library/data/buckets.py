"""Aspect-ratio buckets: candidate resolutions, which picture goes where, and how it is resized and cropped.

Widths and heights are in pixels. The tables are those of sd-scripts, number for number, so that a dataset is
bucketed as its owner knows it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

Size = tuple[int, int]  # (width, height)


@dataclasses.dataclass(frozen=True)
class Placement:
    """How a picture meets its bucket: resize to `resized`, then cut `bucket` out of it."""

    bucket: Size
    resized: Size

    @property
    def surplus(self) -> Size:
        """Pixels that the crop cuts away in each direction."""
        return self.resized[0] - self.bucket[0], self.resized[1] - self.bucket[1]


def bucket_resolutions(resolution: Size, *, shortest: int, longest: int, step: int) -> list[Size]:
    """Return the candidate resolutions, sorted: sides from shortest to longest, no area above resolution's.

    A square of step must fit into that area, which `library.config.dataset_file` requires.
    """
    area = resolution[0] * resolution[1]
    side = math.isqrt(area) // step * step
    found = {(side, side)}
    for width in range(shortest, longest + 1, step):
        height = min(longest, area // width // step * step)
        if height >= shortest:
            found |= {(width, height), (height, width)}
    return sorted(found)


def adjusted_range(shortest: int, longest: int, step: int) -> Size:
    """Return (shortest, longest) on multiples of step: the first rounded down, but not to 0, the second up."""
    return max(step, shortest // step * step), -(-longest // step) * step


def place(size: Size, candidates: Sequence[Size]) -> Placement:
    """Return the placement of a picture among candidate buckets: nearest aspect ratio, scaled to cover."""
    if size in candidates:
        bucket = size
    else:
        ratio = size[0] / size[1]
        bucket = min(candidates, key=lambda candidate: abs(candidate[0] / candidate[1] - ratio))
    return Placement(bucket, cover(size, bucket))


def cover(size: Size, bucket: Size) -> Size:
    """Return the size to which a picture is scaled, keeping its aspect ratio, to just cover the bucket."""
    width, height = size
    scale = bucket[1] / height if width / height > bucket[0] / bucket[1] else bucket[0] / width
    return int(width * scale + 0.5), int(height * scale + 0.5)


def place_without_upscale(size: Size, resolution: Size, step: int) -> Placement:
    """Return the placement of a picture that is never enlarged; the bucket is cut to multiples of step.

    A picture larger than resolution's area is scaled to that area, along the side that keeps its aspect
    ratio better. One with a side shorter than step is enlarged to have it, for there is no smaller bucket.
    The bucket's area is at most resolution's, into which a square of step must fit.
    """
    area = resolution[0] * resolution[1]
    resized = _shrunk_to_area(size, area, step) if size[0] * size[1] > area else size
    if min(resized) < step:
        resized = cover(size, (step, step))
    width, height = (side // step * step for side in resized)
    # Sides rounded up can exceed the area: then the longer one gives way.
    if width >= height:
        width = min(width, area // height // step * step)
    else:
        height = min(height, area // width // step * step)
    return Placement((width, height), resized)


def _shrunk_to_area(size: Size, area: int, step: int) -> Size:
    ratio = size[0] / size[1]
    ideal_width = math.sqrt(area * ratio)
    width = max(_floor_rounded(ideal_width, step), step)
    height_for_width = max(_floor_rounded(width / ratio, step), step)
    height = max(_floor_rounded(area / ideal_width, step), step)
    width_for_height = max(_floor_rounded(height * ratio, step), step)
    if abs(width / height_for_width - ratio) < abs(width_for_height / height - ratio):
        return width, int(width / ratio + 0.5)
    return int(height * ratio + 0.5), height


def _floor_rounded(value: float, step: int) -> int:
    return int(value + 0.5) // step * step


def mean_aspect_error(placements: Sequence[tuple[Size, Placement]]) -> float:
    """Return the mean absolute difference between the aspect ratios of pictures and of their buckets."""
    errors = [abs(size[0] / size[1] - placed.bucket[0] / placed.bucket[1]) for size, placed in placements]
    return sum(errors) / len(errors) if errors else 0.0
