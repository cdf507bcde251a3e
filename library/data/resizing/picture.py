"""Pictures as they are copied: read with their opacity and colour profile, and written."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageFile

from library.data import images
from library.data.buckets import Size
from library.errors import message_of

# What is said at the end where copies could not keep all: kind -> words before the number and names of the pictures.
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
    """A picture as it is stored; its orientation has yet to be applied."""

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
    def shines_through(self) -> bool:
        """Whether some of it is not opaque."""
        return self.pixels.ndim == 3 and self.pixels.shape[2] in {2, 4} and int(self.pixels[..., -1].min()) < 255

    def is_as_written(self, format: str) -> bool:
        """Tell whether its file could stand for a copy of its own size in a format."""
        return self.format == format and self.orientation not in images.TURNS and not self.notices


def read_picture(path: Path) -> Picture:
    """Return a picture; raises UnreadablePictureError."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as picture:
            format = picture.format or ""
            if picture.mode.startswith(("I", "F")):
                gray = images.load_picture(path)[..., 0]  # scaled to 8 bits, and turned upright
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
    """Return a picture with the colour profile of its file, if it is for such pixels; gray ones are made RGB for it."""
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
    """Return the pixels of a picture whose file has these data, in a form of `Picture`."""
    import cv2

    if is_plain(picture):
        flag = getattr(cv2, OPENCV_FLAGS[picture.format or "", picture.mode]) | cv2.IMREAD_IGNORE_ORIENTATION
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
        if pixels is not None:  # else it is damaged, and Pillow tells how
            swap = {"RGB": cv2.COLOR_BGR2RGB, "RGBA": cv2.COLOR_BGRA2RGBA}.get(picture.mode)
            return pixels if swap is None else cv2.cvtColor(pixels, swap, dst=pixels)
    colours = "L" if picture.mode in ("1", "L", "LA", "La") else "RGB"
    mode = f"{colours}A" if picture.has_transparency_data else colours
    return np.asarray(picture if picture.mode == mode else picture.convert(mode))


def is_plain(picture: ImageFile.ImageFile) -> bool:
    """Tell whether OpenCV reads the same pixels as Pillow: a still picture, of 8 bits, without a transparent colour."""
    if (picture.format, picture.mode) not in OPENCV_FLAGS or moves(picture):
        return False
    return picture.format != "PNG" or (picture.tile[0][3] == picture.mode and "transparency" not in picture.info)


def moves(picture: Image.Image) -> bool:
    """Tell whether a file has several frames; an MPO is a photograph with its preview."""
    return getattr(picture, "is_animated", False) and picture.format != "MPO"


def from_cmyk(picture: Image.Image) -> Image.Image:
    """Return a CMYK picture in sRGB, by its colour profile if it can be used."""
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
    """A format that copies are written in: Pillow's name and options of its writer."""

    name: str
    options: dict[str, Any]

    def write(self, image: Image.Image, profile: bytes | None, path: Path) -> None:
        """Write a picture with its colour profile."""
        if self.name == "JPEG":
            image = images.on_white(image)
        image.save(path, self.name, icc_profile=profile, **self.options)
