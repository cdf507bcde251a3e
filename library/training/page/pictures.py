"""Pictures within the page: small JPEGs, each encoded once in a process while its file stays as it is."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

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


def link_to(path: Path, folder: Path) -> str:
    """Return the address of a file for a page in a folder: relative, so that both can be moved together."""
    try:
        relative = os.path.relpath(path.absolute(), folder.absolute())
    except ValueError:  # on another drive of Windows
        return path.absolute().as_uri()
    return quote(relative.replace(os.sep, "/"), errors="surrogateescape")
