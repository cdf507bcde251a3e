"""Pictures: read from any file, resized, cropped, and varied in colour.

A picture is uint8 RGB (H, W, 3). EXIF orientation is applied both to sizes and to pixels, and 16-bit gray is scaled
to 8 bits. This is the one reader of pictures: for training, for generation, and for the scripts in `tools/`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from library.config.values import LATENT_SCALE
from library.data.buckets import Placement, Size
from library.data.picture_kinds import Loss, losses_of

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

NUM_THREADS = 8  # for reading headers and files: mostly waiting for the disk
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


class Header(NamedTuple):
    """What the header of a picture says: (width, height) as displayed, and what of it training does not use."""

    size: Size
    losses: frozenset[Loss]


def read_size(path: Path) -> Size:
    """Return (width, height) as displayed, from the header; raises UnreadablePictureError."""
    return read_header(path).size


def read_header(path: Path) -> Header:
    """Return the header of a picture, without reading pixels; raises UnreadablePictureError."""
    try:
        with _open(path) as picture:
            turned = orientation_of(picture) in QUARTER_TURNS
            width, height = picture.size
            losses = losses_of(picture)
    except (OSError, ValueError, SyntaxError) as error:
        raise UnreadablePictureError(_reason(path, error)) from None
    return Header((height, width) if turned else (width, height), losses)


@contextlib.contextmanager
def reading_threads() -> Iterator[ThreadPoolExecutor]:
    """Yield a pool of threads that read files; after an error or Ctrl-C, files that are not begun are not read."""
    pool = ThreadPoolExecutor(NUM_THREADS)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def load_picture(path: Path, transparency: Literal["drop", "white"] = "drop") -> np.ndarray:
    """Return the pixels of a picture, uint8 (H, W, 3); raises UnreadablePictureError.

    transparency: "drop" keeps the colours beneath transparent pixels, "white" lays the picture on white.
    """
    return _load(path, _to_rgb if transparency == "drop" else lambda picture: _to_rgb(on_white(picture)))


def load_alpha(path: Path) -> np.ndarray:
    """Return the opacity of a picture, uint8 (H, W), 255 where it has none; raises UnreadablePictureError."""
    return _load(path, lambda picture: picture.convert("RGBA").getchannel("A"))


def load_red(path: Path) -> np.ndarray:
    """Return the red channel of a picture, uint8 (H, W); raises UnreadablePictureError."""
    return _load(path, lambda picture: _to_rgb(picture).getchannel("R"))


def _load(path: Path, convert: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    try:
        with _open(path) as picture:
            orientation = orientation_of(picture)
            pixels = convert(picture)
            return np.asarray(pixels.transpose(TURNS[orientation]) if orientation in TURNS else pixels)
    except (OSError, ValueError, SyntaxError) as error:
        raise UnreadablePictureError(_reason(path, error)) from None


def _open(path: Path) -> Image.Image:
    if path.suffix.lower() == ".jxl":
        with contextlib.suppress(ImportError):
            import pillow_jxl  # noqa: F401 (importing it makes Pillow read JPEG XL)
    return Image.open(path)


def orientation_of(picture: Image.Image) -> int:
    """Return the EXIF orientation (1 to 8) in the header of an opened picture, without reading pixels.

    An EXIF chunk after the pixels of a PNG does not count: Pillow's getexif decodes the whole file to find it.
    """
    if picture.format == "PNG" and "exif" not in picture.info:
        return 1
    return picture.getexif().get(ORIENTATION_TAG, 1)


def on_white(picture: Image.Image) -> Image.Image:
    """Return a picture with transparency laid on white, in mode L or RGB; any other as it is."""
    if "transparency" in picture.info and picture.mode in ("1", "L", "RGB", "P"):
        picture = picture.convert("RGBA")
    if picture.mode not in ("LA", "PA", "RGBA"):
        return picture
    mode = "L" if picture.mode == "LA" else "RGB"
    laid = Image.new(mode, picture.size, "white")
    laid.paste(picture.convert(mode), mask=picture.getchannel("A"))
    return laid


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


@dataclasses.dataclass(frozen=True, slots=True)
class Mask:
    """The weights of a picture's loss: its own opacity ("alpha"), or the red channel of another file."""

    file: str
    channel: Literal["alpha", "red"]

    @property
    def path(self) -> Path:
        """The file that the weights are read from."""
        return Path(self.file)

    def load(self) -> np.ndarray:
        """Return the weights, uint8 (H, W); raises UnreadablePictureError."""
        return load_alpha(self.path) if self.channel == "alpha" else load_red(self.path)

    def describe(self) -> str:
        """Return what the weights are, for a report."""
        return "its transparency" if self.channel == "alpha" else self.file

    def key(self, hashes: Mapping[str, str]) -> str:
        """Return the part of a cache fingerprint that identifies the mask; hashes are those of files."""
        return "alpha" if self.channel == "alpha" else hashes[self.file]


def canny(pixels: np.ndarray, low: int, high: int) -> np.ndarray:
    """Return the edges of RGB pixels (H, W, 3) as uint8 (H, W): 255 on an edge, else 0.

    An edge begins where the contrast is at least high, and goes on while it is at least low.
    """
    import cv2

    return cv2.Canny(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), low, high)


# --------------------------------------------------------------------------------------------------------------
# From a picture to the pixels of its bucket
# --------------------------------------------------------------------------------------------------------------


class Frame(NamedTuple):
    """How a picture is resized and then cropped: a window of a size, with its corner at (left, top)."""

    resized: Size
    corner: Size
    size: Size

    def cut(self, pixels: np.ndarray) -> np.ndarray:
        """Return the window of resized pixels (H, W, ...)."""
        (left, top), (width, height) = self.corner, self.size
        return pixels[top : top + height, left : left + width]


def size_conditioning(size: Size, frame: Frame, *, mirrored: bool) -> tuple[int, ...]:
    """Return what SDXL is told of a picture of a size in a frame, in pixels (arXiv 2307.01952, section 2.2).

    The six numbers are height and width of the picture, top and left of the frame in the resized picture as it is seen,
    mirrored or not, and height and width of the frame.
    """
    (left, top), (width, height) = frame.corner, frame.size
    if mirrored:
        left = frame.resized[0] - left - width
    return size[1], size[0], top, left, height, width


def centre_frame(placement: Placement) -> Frame:
    """Return the frame in the middle of a picture."""
    return Frame(placement.resized, (placement.surplus[0] // 2, placement.surplus[1] // 2), placement.bucket)


def random_frame(placement: Placement, rng: random.Random) -> Frame:
    """Return a frame at a random place of a picture."""
    corner = rng.randint(0, placement.surplus[0]), rng.randint(0, placement.surplus[1])
    return Frame(placement.resized, corner, placement.bucket)


class Face(NamedTuple):
    """A face in a picture: centre and size in pixels."""

    x: int  # 0 where no face was found
    y: int
    width: int
    height: int


def face_in_name(stem: str) -> tuple[str, Face] | None:
    """Return (NAME, face) of a file name without extension, NAME_x_y_w_h, of a face crop; None for another name."""
    name, *numbers = stem.rsplit("_", 4)
    if len(numbers) < 4 or not all(number.isdecimal() for number in numbers):
        return None
    x, y, width, height = map(int, numbers)
    return name, Face(x, y, width, height)


SMALLEST_SHIFTED_FACE = 40  # pixels; a smaller one stays in the middle of its crop


def face_frame(
    size: Size, face: Face, target: Size, times: tuple[float, float], *, anywhere: bool, rng: random.Random
) -> Frame:
    """Return a frame of the target size round a face, between `times[0]` and `times[1]` times as large as the face.

    The picture is enlarged only if it would not fill the frame. The face is in the middle, shifted by up to a
    twentieth of it if the two times differ, or shifted further at random with `anywhere`; the frame stays within the
    picture.
    """
    cover = max(target[0] / size[0], target[1] / size[1])
    face_side = max(face.width, face.height)
    low, high = times
    smallest = max(cover, min(1.0, min(target) / (face_side * high)))
    largest = max(smallest, min(1.0, min(target) / (face_side * low)))
    scale = rng.uniform(smallest, largest)
    resized = max(target[0], int(size[0] * scale + 0.5)), max(target[1], int(size[1] * scale + 0.5))
    side = int(face_side * scale + 0.5)
    corner = []
    for position, length, window in zip((face.x, face.y), resized, target, strict=True):
        centre = int(position * scale + 0.5)
        if anywhere:
            reach = max(length - centre, centre)  # the sum of two random numbers favours the middle
            centre += rng.randint(0, reach) + rng.randint(0, reach) - reach
        elif low != high and side > min(target) // 10 and side >= SMALLEST_SHIFTED_FACE:
            centre += rng.randint(-(side // 20), side // 20)
        corner.append(min(max(0, centre - window // 2), length - window))
    return Frame(resized, (corner[0], corner[1]), target)


def fit(pixels: np.ndarray, frame: Frame, interpolation: str | None) -> np.ndarray:
    """Return the pixels of a frame, uint8 (height, width, 3)."""
    return frame.cut(resize(pixels, frame.resized, interpolation))


def fit_mask(mask: np.ndarray, frame: Frame) -> np.ndarray:
    """Return the mean weight over each latent's pixels, float32 (height / 8, width / 8) in [0, 1].

    mask is uint8 (H, W) of the picture, or of any size with its aspect ratio.
    """
    height, width = mask.shape
    shrinks = frame.resized[0] <= width and frame.resized[1] <= height
    fitted = frame.cut(resize(mask, frame.resized, "area" if shrinks else "linear")).astype(np.float32) / 255
    rows, columns = fitted.shape[0] // LATENT_SCALE, fitted.shape[1] // LATENT_SCALE
    return fitted.reshape(rows, LATENT_SCALE, columns, LATENT_SCALE).mean(axis=(1, 3))


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
    """Return the pixels, a third of the time with hue shifted by up to 8 of 180 degrees, or gamma 0.95-1.05."""
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
