"""Pictures to copy: reading them with opacity and colour profile, making smaller copies, writing."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageFile

from library.data import images
from library.data.buckets import Size
from library.data.images import Frame
from library.data.picture_kinds import moves
from library.errors import message_of

# Warnings after a run about copies that lose something of their picture: kind -> text before the pictures' names.
NOTICES = {
    "alpha": "copies of transparent pictures are laid on white, for JPEG has no transparency; --save_as_png keeps it",
    "depth": "copies of gray pictures of more than 8 bits have 8",
    "CMYK": "copies of CMYK pictures are in sRGB",
    "profile": "copies are without the colour profile, which is not for their picture's kind of pixels",
    "frames": "copies of moving pictures show the first frame",
}
# (format, mode) -> how OpenCV reads it: the same pixels as Pillow's, without copies on the way.
OPENCV_FLAGS = {
    ("JPEG", "RGB"): "IMREAD_COLOR",
    ("MPO", "RGB"): "IMREAD_COLOR",
    ("JPEG", "L"): "IMREAD_GRAYSCALE",
    ("PNG", "RGB"): "IMREAD_COLOR",
    ("PNG", "RGBA"): "IMREAD_UNCHANGED",
    ("PNG", "L"): "IMREAD_GRAYSCALE",
}


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture as stored in its file, before its orientation is applied."""

    pixels: np.ndarray  # uint8: gray (H, W), with opacity (H, W, 2); RGB (H, W, 3), with opacity (H, W, 4)
    orientation: int  # EXIF
    profile: bytes | None
    format: str
    notices: tuple[str, ...]  # keys of NOTICES

    @property
    def size(self) -> Size:
        """(width, height) as displayed."""
        height, width = self.pixels.shape[:2]
        return (height, width) if self.orientation in images.QUARTER_TURNS else (width, height)

    @functools.cached_property
    def is_transparent(self) -> bool:
        """Whether any pixel is not fully opaque."""
        return self.pixels.ndim == 3 and self.pixels.shape[2] in {2, 4} and int(self.pixels[..., -1].min()) < 255

    def is_as_written(self, format: str) -> bool:
        """Return whether a copy of the same size in a format may be a copy of the file."""
        return self.format == format and self.orientation not in images.TURNS and not self.notices


def read_picture(path: Path) -> Picture:
    """Return the picture of a file; raises UnreadablePictureError."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as picture:
            format = picture.format or ""
            if picture.mode.startswith(("I", "F")):
                gray = images.load_picture(path)[..., 0]  # scaled to 8 bits, with its orientation applied
                return with_profile(Picture(gray, 1, None, format, ("depth",)), picture)
            orientation = images.orientation_of(picture)
            if picture.mode == "CMYK":
                return Picture(np.asarray(from_cmyk(picture)), orientation, None, format, ("CMYK",))
            notices = ("frames",) if moves(picture) else ()
            return with_profile(Picture(decoded(picture, data), orientation, None, format, notices), picture)
    except images.UnreadablePictureError:
        raise
    except Exception as error:  # noqa: BLE001 (decoders raise whatever a damaged file leads them to)
        raise images.UnreadablePictureError(message_of(error)) from None


def with_profile(picture: Picture, file: Image.Image) -> Picture:
    """Return a picture with the colour profile of its file if that fits its pixels; gray becomes RGB for it."""
    profile = file.info.get("icc_profile")
    if not profile:
        return picture
    space, pixels = profile[16:20], picture.pixels
    is_gray = pixels.ndim == 2 or pixels.shape[2] == 2
    if is_gray and space == b"RGB ":
        pixels = np.stack([pixels] * 3, axis=2) if pixels.ndim == 2 else pixels[..., [0, 0, 0, 1]]
    elif space != (b"GRAY" if is_gray else b"RGB "):
        return dataclasses.replace(picture, notices=(*picture.notices, "profile"))
    return dataclasses.replace(picture, pixels=pixels, profile=profile)


def decoded(picture: ImageFile.ImageFile, data: bytes) -> np.ndarray:
    """Return the pixels of an opened picture in the shape that `Picture` describes; data is the content of its file."""
    import cv2

    if is_plain(picture):
        flag = getattr(cv2, OPENCV_FLAGS[picture.format or "", picture.mode]) | cv2.IMREAD_IGNORE_ORIENTATION
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
        if pixels is not None:  # else it is damaged, and Pillow raises the reason
            swap = {"RGB": cv2.COLOR_BGR2RGB, "RGBA": cv2.COLOR_BGRA2RGBA}.get(picture.mode)
            return pixels if swap is None else cv2.cvtColor(pixels, swap, dst=pixels)
    colours = "L" if picture.mode in ("1", "L", "LA", "La") else "RGB"
    mode = f"{colours}A" if picture.has_transparency_data else colours
    return np.asarray(picture if picture.mode == mode else picture.convert(mode))


def is_plain(picture: ImageFile.ImageFile) -> bool:
    """Return whether OpenCV decodes the same pixels as Pillow: one frame, 8 bits, no transparent colour."""
    if (picture.format, picture.mode) not in OPENCV_FLAGS or moves(picture):
        return False
    return picture.format != "PNG" or (picture.tile[0][3] == picture.mode and "transparency" not in picture.info)


def from_cmyk(picture: Image.Image) -> Image.Image:
    """Return a CMYK picture in sRGB, converted with its colour profile if that is valid."""
    profile = picture.info.get("icc_profile")
    if profile:
        with contextlib.suppress(ImageCms.PyCMSError):
            srgb = ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(picture, io.BytesIO(profile), srgb, outputMode="RGB")
            if converted is not None:  # None is for a conversion in place
                return converted
    return picture.convert("RGB")


@dataclasses.dataclass(frozen=True)
class OutputFormat:
    """The format of the copies: its name and the writer's options in Pillow."""

    name: str
    options: dict[str, Any]

    def write(self, image: Image.Image, profile: bytes | None, path: Path) -> None:
        """Write a picture with a colour profile to path."""
        if self.name == "JPEG":
            image = images.on_white(image)
        image.save(path, self.name, icc_profile=profile, **self.options)


# --------------------------------------------------------------------------------------------------------------
# Smaller copies
# --------------------------------------------------------------------------------------------------------------


def reduced_size(size: Size, area: int) -> Size:
    """Return (width, height) of the same aspect ratio with at most the area, rounded down; never enlarged.

    The sides times sqrt(area / (width height)), in whole numbers: floor(sqrt(x)) is isqrt(floor(x)). Where a side would
    be less than a pixel it is one, and the other is at most the area.
    """
    width, height = size
    if width * height <= area:
        return size
    small_width, small_height = math.isqrt(width * area // height), math.isqrt(height * area // width)
    if small_width == 0:
        return 1, min(small_height, area)
    return (small_width, small_height) if small_height else (min(small_width, area), 1)


def middle_frame(size: Size, area: int, divisible_by: int) -> Frame:
    """Return the frame of a picture reduced to an area, cropped in the middle to multiples of divisible_by."""
    width, height = reduced_size(size, area)
    right, below = width % divisible_by, height % divisible_by
    return Frame((width, height), (right // 2, below // 2), (width - right, height - below))


def reduce(picture: Picture, frame: Frame, interpolation: str) -> Image.Image:
    """Return a frame of a picture with its orientation applied."""
    width, height = frame.resized
    turned = picture.orientation in images.QUARTER_TURNS
    resizer = functools.partial(RESIZERS[interpolation], size=(height, width) if turned else (width, height))
    if frame.resized == picture.size:
        small = picture.pixels
    else:
        small = resize_by_opacity(picture.pixels, resizer) if picture.is_transparent else resizer(picture.pixels)
    image = Image.fromarray(small)
    if picture.orientation in images.TURNS:  # last, on the smaller picture, because its time grows with the area
        image = image.transpose(images.TURNS[picture.orientation])
    (left, top), (width, height) = frame.corner, frame.size
    return image.crop((left, top, left + width, top + height))


BAND = 16  # rows of the result computed together, so that intermediate results stay in the processor's cache


def area_mean(pixels: np.ndarray, size: Size) -> np.ndarray:
    """Return pixels (H, W, ...) at size (width, height), each the mean of the area that it covers, in the same dtype.

    Equal to OpenCV's INTER_AREA up to rounding. Adding up the rows first takes a third of OpenCV's time.
    """
    import cv2

    (height, width), (small_width, small_height) = pixels.shape[:2], size
    has_whole_factor = height % small_height == 0 and width % small_width == 0  # OpenCV is fast for these
    if has_whole_factor or height < 2 * small_height:
        return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    rows = pixels.reshape(height, -1)
    edges = np.arange(small_height + 1) * height  # in units of 1 / small_height rows
    starts = edges // small_height
    above = (edges % small_height / small_height).astype(np.float32)[:, None]  # share of row starts[k] above edge k
    cut = np.minimum(starts, height - 1)
    means = np.empty((small_height, small_width, *pixels.shape[2:]), np.float32)
    for top in range(0, small_height, BAND):
        count = min(BAND, small_height - top)
        sums = np.empty((count, rows.shape[1]), np.float32)
        for index in range(count):
            whole = rows[starts[top + index] : starts[top + index + 1]]
            cv2.reduce(whole, 0, cv2.REDUCE_SUM, sums[index : index + 1], cv2.CV_32F)
        parts = rows[cut[top : top + count + 1]] * above[top : top + count + 1]
        sums += parts[1:]
        sums -= parts[:-1]
        band = cv2.resize(sums.reshape(count, *pixels.shape[1:]), (small_width, count), interpolation=cv2.INTER_AREA)
        means[top : top + count] = band.reshape(count, *means.shape[1:])
    means *= small_height / height
    return np.rint(means).astype(np.uint8) if pixels.dtype == np.uint8 else means


def lanczos4(pixels: np.ndarray, size: Size) -> np.ndarray:
    """Return pixels at size (width, height), by OpenCV's Lanczos over 8 x 8 pixels."""
    import cv2

    return cv2.resize(pixels, size, interpolation=cv2.INTER_LANCZOS4)


# --interpolation -> function of pixels and size
RESIZERS = {"area": area_mean, "lanczos4": lanczos4} | {
    name: functools.partial(images.resize, interpolation=name) for name in ("cubic", "nearest", "linear", "box")
}


def resize_by_opacity(pixels: np.ndarray, resizer: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Return pixels (H, W, 2 or 4) resized with colours weighted by their opacity; resizer takes float32 (H, W).

    Without the weights, colours of transparent pixels would show at the edges.
    """
    opacity = pixels[..., -1].astype(np.float32)
    small_opacity = resizer(opacity)
    planes = []
    for channel in range(pixels.shape[2] - 1):
        colour = pixels[..., channel].astype(np.float32)
        weighted = resizer(colour * opacity) / np.maximum(small_opacity, 0.5)
        planes.append(np.where(small_opacity >= 0.5, weighted, resizer(colour)))
    return np.clip(np.rint(np.stack([*planes, small_opacity], axis=-1)), 0, 255).astype(np.uint8)
