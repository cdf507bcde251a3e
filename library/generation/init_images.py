"""Images that generation begins with or is guided by: init images, masks and control images, read when needed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image

from library.config.kinds import why_not
from library.config.values import latent_side
from library.data import images
from library.data.listing import list_pictures
from library.errors import UserError
from library.files import PICTURE_SUFFIXES


@dataclasses.dataclass(frozen=True)
class ImageList:
    """The files of an option, taken one after the other and again from the first."""

    files: tuple[Path, ...]

    def path_of(self, index: int) -> Path:
        """Return the file for an image by its number in the run."""
        return self.files[index % len(self.files)]


def list_images(option: str, path: Path) -> ImageList:
    """Return the files that an option names: one, or those of a folder in order of their names."""
    if path.is_dir():
        files = tuple(list_pictures(path))
        if not files:
            raise UserError(f"{option}: {path} holds no pictures ({', '.join(PICTURE_SUFFIXES)})")
        return ImageList(files)
    if not path.is_file():
        raise UserError(f"{option}: {why_not(path, 'a file or a folder')}")
    return ImageList((path,))


def check_images(option: str, path: Path) -> None:
    """Raise UserError for a file, or one of a folder, that is no picture, by the beginnings of the files."""
    for file in list_images(option, path).files:
        try:
            images.read_size(file)
        except images.UnreadablePictureError as error:
            raise UserError(f"{option}: {file} cannot be read: {error}") from None


def load_image(path: Path, mode: str = "RGB") -> Image.Image:
    """Return an image in a mode, transparency laid on white; raises UserError for one that cannot be read."""
    try:
        return Image.fromarray(images.load_picture(path, transparency="white")).convert(mode)
    except images.UnreadablePictureError as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def floored(size: tuple[int, int]) -> tuple[int, int]:
    """Return a size with both sides cut to multiples of 8, which latents need."""
    return latent_side(size[0]), latent_side(size[1])


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return an image in a size."""
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def canny(image: Image.Image, low: int, high: int) -> Image.Image:
    """Return the edges of an RGB image, white on black."""
    return Image.fromarray(images.canny(np.asarray(image), low, high)).convert("RGB")


CANNY_THRESHOLDS = ("63", "191")


def read_preparation(text: str) -> tuple[int, int] | None:
    """Return the thresholds of `canny_T1_T2`, None of `none`; raises UserError for anything else."""
    name, *numbers = text.split("_")
    if name == "none" and not numbers:
        return None
    if name != "canny" or len(numbers) > 2 or not all(number.isdigit() for number in numbers):
        raise UserError(f"--control_net_preps must be none, canny or canny_T1_T2, got {text!r}")
    low, high = (*numbers, *CANNY_THRESHOLDS[len(numbers) :])
    return int(low), int(high)
