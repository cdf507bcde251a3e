"""Pictures as people have them: read from any file, resized, cropped, mirrored, varied in colour.

A picture is uint8 RGB (H, W, 3). EXIF orientation is applied both to sizes and to pixels, transparency is
dropped to the colours beneath it, 16-bit gray is scaled to 8 bits.
"""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from library.data.buckets import Placement, Size

if TYPE_CHECKING:
    import torch

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl")
ORIENTATION_TAG = 0x0112  # EXIF
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
QUARTER_TURNS = (5, 6, 7, 8)  # width and height change places
Image.MAX_IMAGE_PIXELS = None  # these are the user's own pictures, not an attack


class UnreadablePictureError(Exception):
    """A picture that cannot be read; the message is the reason."""


def list_pictures(folder: Path) -> list[Path]:
    """Return the pictures directly in a folder, sorted by path."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS and path.is_file())


def read_size(path: Path) -> Size:
    """Return (width, height) as displayed, from the header; raises UnreadablePictureError."""
    try:
        with _open(path) as picture:
            turned = _orientation(picture) in QUARTER_TURNS
            width, height = picture.size
    except (OSError, ValueError, SyntaxError) as error:
        raise UnreadablePictureError(_reason(path, error)) from None
    return (height, width) if turned else (width, height)


def load_picture(path: Path) -> np.ndarray:
    """Return the pixels of a picture, uint8 (H, W, 3); raises UnreadablePictureError."""
    try:
        with _open(path) as picture:
            orientation = _orientation(picture)
            pixels = _to_rgb(picture)
            return np.asarray(pixels.transpose(TURNS[orientation]) if orientation in TURNS else pixels)
    except (OSError, ValueError, SyntaxError) as error:
        raise UnreadablePictureError(_reason(path, error)) from None


def _open(path: Path) -> Image.Image:
    if path.suffix.lower() == ".jxl":
        with contextlib.suppress(ImportError):
            import pillow_jxl  # noqa: F401 (importing it makes Pillow read JPEG XL)
    return Image.open(path)


def _orientation(picture: Image.Image) -> int:
    """Return the EXIF orientation as the header tells it, without reading pixels.

    Pillow's getexif reads a whole PNG to find a tag that may stand at its end.
    """
    if picture.format == "PNG" and "exif" not in picture.info:
        return 1
    return picture.getexif().get(ORIENTATION_TAG, 1)


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I") or picture.mode == "F":  # 16-bit gray; convert() would clip it to white
        values = np.asarray(picture).astype(np.float64)
        scale = 257.0 if values.max(initial=0.0) > 255 else 1.0
        return Image.fromarray(np.clip(np.rint(values / scale), 0, 255).astype(np.uint8)).convert("RGB")
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return picture.convert("RGB")


def _reason(path: Path, error: Exception) -> str:
    if path.suffix.lower() == ".jxl" and isinstance(error, OSError):
        return "JPEG XL needs a plug-in: pip install pillow-jxl-plugin, or convert the picture"
    if path.exists() and path.stat().st_size == 0:
        return "the file is empty"
    return "not a picture that can be read" if isinstance(error, Image.UnidentifiedImageError) else str(error)


# --------------------------------------------------------------------------------------------------------------
# From a picture to the pixels of its bucket
# --------------------------------------------------------------------------------------------------------------


def fit(pixels: np.ndarray, placement: Placement, offset: Size, interpolation: str | None) -> np.ndarray:
    """Return the pixels resized and cut to the bucket, uint8 (bucket height, bucket width, 3).

    offset is the corner (left, top) of the crop within the resized picture.
    """
    pixels = resize(pixels, placement.resized, interpolation)
    (left, top), (width, height) = offset, placement.bucket
    return pixels[top : top + height, left : left + width]


def centre_offset(placement: Placement) -> Size:
    """Return the corner of a crop from the middle."""
    return placement.surplus[0] // 2, placement.surplus[1] // 2


def random_offset(placement: Placement, rng: random.Random) -> Size:
    """Return the corner of a crop from anywhere."""
    return rng.randint(0, placement.surplus[0]), rng.randint(0, placement.surplus[1])


PIL_FILTERS = {"lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX}


def resize(pixels: np.ndarray, size: Size, interpolation: str | None = None) -> np.ndarray:
    """Return the pixels at size (width, height): by area to shrink, Lanczos to enlarge, or as named."""
    height, width = pixels.shape[:2]
    if (width, height) == size:
        return pixels
    if interpolation is None:
        interpolation = "area" if size[0] <= width and size[1] <= height else "lanczos"
    if interpolation in PIL_FILTERS:
        return np.asarray(Image.fromarray(pixels).resize(size, PIL_FILTERS[interpolation]))
    import cv2

    methods = {
        "area": cv2.INTER_AREA,
        "nearest": cv2.INTER_NEAREST_EXACT,
        "bilinear": cv2.INTER_LINEAR,
        "linear": cv2.INTER_LINEAR,
        "bicubic": cv2.INTER_CUBIC,
        "cubic": cv2.INTER_CUBIC,
    }
    return cv2.resize(pixels, size, interpolation=methods[interpolation])


def vary_colour(pixels: np.ndarray, rng: random.Random) -> np.ndarray:
    """Return the pixels, in a third of the draws with hue shifted by up to 8 degrees of 180, or gamma 0.95-1.05."""
    if rng.random() > 0.33:
        return pixels
    if rng.random() > 0.5:
        import cv2

        hsv = cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(np.int32) + round(rng.uniform(-8.0, 8.0))) % 180
        return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    gamma = rng.uniform(0.95, 1.05)
    return np.clip(pixels.astype(np.float32) ** gamma, 0, 255).astype(np.uint8)


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """Return the pixels as the VAE takes them: float32 (3, H, W) in [-1, 1]."""
    import torch

    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float().div_(127.5).sub_(1.0)
