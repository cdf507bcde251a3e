"""Pictures within the page: small JPEGs, each encoded once in a process while its file stays as it is."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from library.html_page import data_url

PREVIEW_SIDE, EXAMPLE_SIDE = 512, 96  # longest side in pixels
QUALITY = 82
KEPT = 2048


class Thumbnail(NamedTuple):
    """A picture within the page."""

    url: str
    width: int
    height: int


def thumbnail(path: Path, side: int) -> Thumbnail | None:
    """Return a picture, reduced to a longest side; None if it is gone or cannot be read."""
    try:
        found = path.stat()
        return _encoded(path, found.st_mtime_ns, found.st_size, side)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        return None


@functools.lru_cache(maxsize=KEPT)
def _encoded(path: Path, modified: int, size: int, side: int) -> Thumbnail:
    del modified, size  # they are of the key: another file has others
    with Image.open(path) as picture:
        picture.draft("RGB", (side, side))
        reduced = picture.convert("RGB")
        reduced.thumbnail((side, side), Image.Resampling.LANCZOS)
    return Thumbnail(data_url(reduced, QUALITY), *reduced.size)
