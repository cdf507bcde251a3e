"""Checks of the pictures and masks of a run: headers, sizes, shapes, and what training would not use of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from library.data.buckets import Placement, Size
from library.data.faults import Faults, Notes
from library.data.images import Header, UnreadablePictureError
from library.data.picture_index import PictureIndex
from library.data.picture_kinds import LOSSES
from library.data.sources import Listed
from library.errors import named

LEAST_SIDE = 8  # pixels of a picture: one latent
MOST_TIMES_BUCKET = 32  # a resized picture's area, in areas of its bucket
SAME_RATIO = 0.01  # by which the aspect ratios of a picture and its mask may differ


def read_headers(files: Iterable[str], index: PictureIndex, faults: Faults) -> dict[str, Header]:
    """Return the headers of pictures and masks; those that cannot be read are added to faults."""
    headers, bad = index.headers(files)
    add_unreadable(sorted(bad.items()), len(headers) + len(bad), faults)
    return headers


def decode_pictures(files: Collection[str], index: PictureIndex, total: int, faults: Faults) -> None:
    """Decode pictures and masks, and add those that are damaged to faults; total is the number of all of the run."""
    add_unreadable(sorted(index.damaged(files, "checking pictures").items()), total, faults)


def add_unreadable(results: Iterable[tuple[Path | str, object]], total: int, faults: Faults) -> None:
    """Add the pictures to faults whose result is an UnreadablePictureError."""
    for path, result in results:
        if isinstance(result, UnreadablePictureError):
            faults.add(f"of {total} pictures cannot be read; mend or remove them", path, str(result))


def raise_for_unreadable(results: Collection[tuple[Path | str, object]]) -> None:
    """Raise UserError that lists the pictures whose result is an UnreadablePictureError."""
    faults = Faults()
    add_unreadable(results, len(results), faults)
    faults.raise_if_any()


def check_shape(listed: Listed, size: Size, placement: Placement, faults: Faults) -> None:
    """Add a picture to faults that is so small or so narrow that covering its bucket would enlarge it too much."""
    detail = "{}x{}".format(*size)
    if min(size) < LEAST_SIDE:
        faults.add(f"pictures have a side of less than {LEAST_SIDE} pixels; remove them", listed.file, detail)
    elif math.prod(placement.resized) > MOST_TIMES_BUCKET * math.prod(placement.bucket):
        faults.add("pictures are too long and narrow; crop or remove them", listed.file, detail)


def check_mask(listed: Listed, headers: Mapping[str, Header], faults: Faults) -> None:
    """Add the mask of a picture to faults if it has another shape."""
    if listed.mask is not None and listed.mask.file in headers:
        (width, height), (mask_width, mask_height) = headers[listed.file].size, headers[listed.mask.file].size
        if abs(mask_width / mask_height * height / width - 1) > SAME_RATIO:
            detail = f"{mask_width}x{mask_height}, the picture is {width}x{height}"
            faults.add("masks have another aspect ratio than their picture", listed.mask.file, detail)


def note_losses(pictures: Iterable[Listed], headers: Mapping[str, Header], notes: Notes) -> None:
    """Note how many pictures lose their movement, depth, profile or transparency, with the first names."""
    losing = {listed.file: listed for listed in pictures if listed.file in headers and headers[listed.file].losses}
    for loss, text in LOSSES.items():
        files = [file for file in losing if loss in headers[file].losses]
        if loss == "alpha":  # which is used where it is the mask
            files = [file for file in files if not is_own_mask(losing[file])]
        if files:
            notes.warn(f"{len(files)} {text}: {named([Path(file).name for file in files])}")


def is_own_mask(listed: Listed) -> bool:
    """Return whether the transparency of a picture weights its loss."""
    return listed.mask is not None and listed.mask.channel == "alpha"
