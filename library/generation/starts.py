"""Pictures that drawing begins with: sources, masks and guides, read when their turn comes."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from library.errors import UserError

logger = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclasses.dataclass(frozen=True)
class PictureList:
    """The files of an option, taken one after the other and again from the first."""

    option: str
    files: tuple[Path, ...]

    def path_of(self, index: int) -> Path:
        """Return the file for a picture by its number in the run."""
        return self.files[index % len(self.files)]

    def load(self, index: int, mode: str = "RGB") -> Image.Image:
        """Return a picture as it is meant to be seen: turned, and without transparency, laid on white."""
        return load_picture(self.path_of(index), mode)


def list_of(option: str, path: Path | None) -> PictureList | None:
    """Return the files that an option names: one, or those of a folder in order of their names."""
    if path is None:
        return None
    if path.is_dir():
        files = tuple(sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES))
        if not files:
            raise UserError(f"{option}: {path} holds no pictures ({', '.join(SUFFIXES)})")
        return PictureList(option, files)
    if not path.is_file():
        raise UserError(f"{option}: {path} is not a file or a folder")
    return PictureList(option, (path,))


def check_pictures(pictures: PictureList | None) -> None:
    """Raise UserError for a file that is no picture, by the beginnings of the files."""
    for path in pictures.files if pictures else ():
        try:
            with Image.open(path):
                pass
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
            raise UserError(f"{pictures.option}: {path} is not a picture that can be read: {error}") from None


def load_picture(path: Path, mode: str = "RGB") -> Image.Image:
    """Return a picture in a mode; raises UserError for one that cannot be read."""
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            if "A" in picture.getbands() or "transparency" in picture.info:
                colours = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), colours)
            return picture.convert(mode)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} is not a picture that can be read: {error}") from None


def floored(size: tuple[int, int]) -> tuple[int, int]:
    """Return a size with both sides cut to multiples of 8, which latents need."""
    return max(64, size[0] // 8 * 8), max(64, size[1] // 8 * 8)


def fitted(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return a picture of a size."""
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)


def canny(picture: Image.Image, low: int, high: int) -> Image.Image:
    """Return the edges of a picture, white on black."""
    import cv2
    import numpy as np

    edges = cv2.Canny(cv2.cvtColor(np.asarray(picture.convert("RGB")), cv2.COLOR_RGB2GRAY), low, high)
    return Image.fromarray(edges).convert("RGB")


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
