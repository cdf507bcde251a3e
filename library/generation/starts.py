"""Pictures that drawing begins with: sources, masks and guides, read when their turn comes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image

from library.data import images
from library.errors import UserError
from library.files import PICTURE_SUFFIXES


@dataclasses.dataclass(frozen=True)
class PictureList:
    """The files of an option, taken one after the other and again from the first."""

    option: str
    files: tuple[Path, ...]

    def path_of(self, index: int) -> Path:
        """Return the file for a picture by its number in the run."""
        return self.files[index % len(self.files)]


def list_of(option: str, path: Path | None) -> PictureList | None:
    """Return the files that an option names: one, or those of a folder in order of their names."""
    if path is None:
        return None
    if path.is_dir():
        files = tuple(images.list_pictures(path))
        if not files:
            raise UserError(f"{option}: {path} holds no pictures ({', '.join(PICTURE_SUFFIXES)})")
        return PictureList(option, files)
    if not path.is_file():
        raise UserError(f"{option}: {path} is not a file or a folder")
    return PictureList(option, (path,))


def check_pictures(pictures: PictureList | None) -> None:
    """Raise UserError for a file that is no picture, by the beginnings of the files."""
    if pictures is not None:
        for path in pictures.files:
            try:
                images.read_size(path)
            except images.UnreadablePictureError as error:
                raise UserError(f"{pictures.option}: {path} cannot be read: {error}") from None


def load_picture(path: Path, mode: str = "RGB") -> Image.Image:
    """Return a picture in a mode, transparency laid on white; raises UserError for one that cannot be read."""
    try:
        return Image.fromarray(images.load_picture(path, transparency="white")).convert(mode)
    except images.UnreadablePictureError as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def floored(size: tuple[int, int]) -> tuple[int, int]:
    """Return a size with both sides cut to multiples of 8, which latents need."""
    return max(64, size[0] // 8 * 8), max(64, size[1] // 8 * 8)


def fitted(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return a picture of a size."""
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)


def canny(picture: Image.Image, low: int, high: int) -> Image.Image:
    """Return the edges of an RGB picture, white on black."""
    return Image.fromarray(images.canny(np.asarray(picture), low, high)).convert("RGB")


CANNY_THRESHOLDS = (63, 191)


def read_preparation(text: str) -> tuple[int, int] | None:
    """Return the thresholds of `canny_T1_T2`, None of `none`; raises UserError for anything else."""
    name, *numbers = text.split("_")
    if name == "none" and not numbers:
        return None
    if name != "canny" or len(numbers) > 2 or not all(number.isdigit() for number in numbers):
        raise UserError(f"--control_net_preps must be none, canny or canny_T1_T2, got {text!r}")
    given = [int(number) for number in numbers]
    return (*given, *CANNY_THRESHOLDS[len(given) :])  # type: ignore[return-value]
