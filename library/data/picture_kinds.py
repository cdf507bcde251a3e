"""What of a picture is lost when it is read as 8-bit RGB, found in its header."""

from __future__ import annotations

import functools
import io
from typing import Literal

import numpy as np
from PIL import Image, ImageCms

Loss = Literal["frames", "CMYK", "profile", "depth", "alpha"]
# Kind -> what is said of pictures of that kind, after their number.
LOSSES: dict[Loss, str] = {
    "frames": "pictures move, and only their first frame is used",
    "CMYK": "pictures are in CMYK, and are converted to RGB without their colour profile",
    "profile": "pictures have a colour profile other than sRGB, which is not applied: their colours change",
    "depth": "pictures have more than 8 bits for a colour, and are reduced to 8 bits",
    "alpha": (
        "pictures can be transparent, which is not used: the colours beneath transparent areas are learned; "
        "lay them on a background, or mask the loss with --alpha_mask"
    ),
}
# Colours of which a profile shows at least one otherwise than sRGB, where it matters.
PATCHES = np.array([[r, g, b] for r in (0, 128, 255) for g in (0, 128, 255) for b in (0, 128, 255)], np.uint8)
LEAST_DIFFERENCE = 10  # of 255, in one channel: more than profiles of sRGB differ among themselves


def losses_of(picture: Image.Image) -> frozenset[Loss]:
    """Return what of an opened picture is lost, without reading pixels."""
    mode, found = picture.mode, set[Loss]()
    if moves(picture):
        found.add("frames")
    if mode == "CMYK":
        found.add("CMYK")
    elif changes_colours(picture.info.get("icc_profile") or b"", "L" if mode in ("1", "L", "LA") else "RGB"):
        found.add("profile")
    if mode.startswith(("I", "F")) or (picture.format == "PNG" and _raw_mode(picture).endswith(";16B")):
        found.add("depth")
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
        found.add("alpha")
    return frozenset(found)


def moves(picture: Image.Image) -> bool:
    """Return whether a file has several frames; an MPO is a photograph with its preview."""
    return getattr(picture, "is_animated", False) and picture.format != "MPO"


def _raw_mode(picture: Image.Image) -> str:
    """Return how the pixels of a PNG are stored, as Pillow calls it."""
    tiles = getattr(picture, "tile", None)
    return str(tiles[0][3]) if tiles else ""


@functools.lru_cache(maxsize=256)  # most pictures of a folder have the same profile
def changes_colours(profile: bytes, mode: Literal["L", "RGB"]) -> bool:
    """Return whether colours in a profile differ visibly from the same values in sRGB; False for an invalid one."""
    if not profile:
        return False
    patches = Image.fromarray(PATCHES[None]).convert(mode)
    try:
        srgb = ImageCms.createProfile("sRGB")
        shown = ImageCms.profileToProfile(patches, io.BytesIO(profile), srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ImportError):  # the last one where Pillow has no colour management
        return False
    differences = np.asarray(shown).astype(int) - np.asarray(patches.convert("RGB"))
    return int(np.abs(differences).max()) > LEAST_DIFFERENCE
