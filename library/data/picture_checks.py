"""Checks of the pictures and masks of a run: headers, sizes, shapes, and what training would not use of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from library.data.buckets import Placement, Size
from library.data.faults import Faults, Notes
from library.data.images import Header, UnreadablePictureError, load_picture, read_all, read_header
from library.data.picture_kinds import LOSSES
from library.data.sources import Listed
from library.errors import named

T = TypeVar("T")

LEAST_SIDE = 8  # pixels of a picture: one latent
MOST_TIMES_BUCKET = 32  # a resized picture's area, in areas of its bucket
SAME_RATIO = 0.01  # by which the aspect ratios of a picture and its mask may differ


def read_headers(files: Collection[Path], faults: Faults) -> dict[Path, Header]:
    """Return the headers of pictures and masks; those that cannot be read are added to faults."""
    results = read_all(files, functools.partial(_attempt, read_header))
    add_unreadable(results.items(), len(files), faults)
    return {path: header for path, header in results.items() if isinstance(header, Header)}


def decode_pictures(files: Collection[Path], total: int, faults: Faults) -> None:
    """Decode pictures and masks, and add those that are damaged to faults; total is the number of all of the run."""
    results = read_all(files, functools.partial(_attempt, _decode), "checking pictures")
    add_unreadable(results.items(), total, faults)


def _decode(path: Path) -> Size:
    height, width = load_picture(path).shape[:2]  # not the pixels, which would all stay in memory
    return width, height


def _attempt(read: Callable[[Path], T], path: Path) -> T | UnreadablePictureError:
    try:
        return read(path)
    except UnreadablePictureError as error:
        return error


def add_unreadable(results: Iterable[tuple[Path, object]], total: int, faults: Faults) -> None:
    """Add the pictures to faults whose result is an UnreadablePictureError."""
    for path, result in results:
        if isinstance(result, UnreadablePictureError):
            faults.add(f"of {total} pictures cannot be read; mend or remove them", path, str(result))


def raise_for_unreadable(results: Collection[tuple[Path, object]]) -> None:
    """Raise UserError that lists the pictures whose result is an UnreadablePictureError."""
    faults = Faults()
    add_unreadable(results, len(results), faults)
    faults.raise_if_any()


def check_shape(listed: Listed, size: Size, placement: Placement, faults: Faults) -> None:
    """Add a picture to faults that is so small or so narrow that covering its bucket would enlarge it too much."""
    detail = "{}x{}".format(*size)
    if min(size) < LEAST_SIDE:
        faults.add(f"pictures have a side of less than {LEAST_SIDE} pixels; remove them", listed.path, detail)
    elif math.prod(placement.resized) > MOST_TIMES_BUCKET * math.prod(placement.bucket):
        faults.add("pictures are too long and narrow; crop or remove them", listed.path, detail)


def check_mask(listed: Listed, sizes: Mapping[Path, Size], faults: Faults) -> None:
    """Add the mask of a picture to faults if it has another shape."""
    if listed.mask is not None and listed.mask.path in sizes:
        (width, height), (mask_width, mask_height) = sizes[listed.path], sizes[listed.mask.path]
        if abs(mask_width / mask_height * height / width - 1) > SAME_RATIO:
            detail = f"{mask_width}x{mask_height}, the picture is {width}x{height}"
            faults.add("masks have another aspect ratio than their picture", listed.mask.path, detail)


def note_losses(pictures: Iterable[Listed], headers: Mapping[Path, Header], notes: Notes) -> None:
    """Note how many pictures lose their movement, depth, profile or transparency, with the first names."""
    by_path = {listed.path: listed for listed in pictures if listed.path in headers}
    for loss, text in LOSSES.items():
        paths = [path for path, listed in by_path.items() if loss in headers[path].losses]
        if loss == "alpha":  # which is used where it is the mask
            paths = [path for path in paths if not is_own_mask(by_path[path])]
        if paths:
            notes.warn(f"{len(paths)} {text}: {named([path.name for path in paths])}")


def is_own_mask(listed: Listed) -> bool:
    """Return whether the transparency of a picture weights its loss."""
    return listed.mask is not None and listed.mask.channel == "alpha"
