"""Smaller copies: their sizes, and their pixels."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from library.data import images
from library.data.buckets import Size
from library.data.images import Frame
from library.data.resizing.picture import Picture


def reduced_size(size: Size, area: int) -> Size:
    """Return (width, height) of the same aspect ratio with at most the area, rounded down; never enlarged.

    The sides times sqrt(area / (width height)), in whole numbers: floor(sqrt(x)) is isqrt(floor(x)).
    """
    width, height = size
    if width * height <= area:
        return size
    return max(1, math.isqrt(width * area // height)), max(1, math.isqrt(height * area // width))


def middle_frame(size: Size, area: int, divisible_by: int) -> Frame:
    """Return how a picture is reduced to an area: its new size, and the middle of it whose sides are multiples."""
    width, height = reduced_size(size, area)
    right, below = width % divisible_by, height % divisible_by
    return Frame((width, height), (right // 2, below // 2), (width - right, height - below))


def reduce(picture: Picture, frame: Frame, interpolation: str) -> Image.Image:
    """Return the frame of a picture, turned upright."""
    width, height = frame.resized
    turned = picture.orientation in images.QUARTER_TURNS
    resizer = functools.partial(RESIZERS[interpolation], size=(height, width) if turned else (width, height))
    if frame.resized == picture.size:
        small = picture.pixels
    else:
        small = resize_by_opacity(picture.pixels, resizer) if picture.shines_through else resizer(picture.pixels)
    image = Image.fromarray(small)
    if picture.orientation in images.TURNS:  # last, for it takes time that grows with the area
        image = image.transpose(images.TURNS[picture.orientation])
    (left, top), (width, height) = frame.corner, frame.size
    return image.crop((left, top, left + width, top + height))


BAND = 16  # rows of the result that are made together: what is between them stays in the processor's cache


def area_mean(pixels: np.ndarray, size: Size) -> np.ndarray:
    """Return pixels (H, W, ...) at size (width, height), each the mean of the area that it covers, type as given.

    It is OpenCV's INTER_AREA to rounding. Where a row of the result is made of several whole rows and parts of two,
    to add up rows and then go along what is left takes a third of OpenCV's time.
    """
    import cv2

    (height, width), (small_width, small_height) = pixels.shape[:2], size
    has_whole_factor = height % small_height == 0 and width % small_width == 0  # OpenCV has a fast way for these
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
    """Return pixels at size (width, height) by OpenCV's Lanczos over 8 x 8 pixels."""
    import cv2

    return cv2.resize(pixels, size, interpolation=cv2.INTER_LANCZOS4)


# --interpolation -> function of pixels and size
RESIZERS = {"area": area_mean, "lanczos4": lanczos4} | {
    name: functools.partial(images.resize, interpolation=name) for name in ("cubic", "nearest", "linear", "box")
}


def resize_by_opacity(pixels: np.ndarray, resizer: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Return pixels (H, W, 2 or 4) resized so that colours count as much as they are seen.

    Else what lies unseen beneath transparent pixels would shine through at the edges. resizer takes float32 (H, W).
    """
    opacity = pixels[..., -1].astype(np.float32)
    small_opacity = resizer(opacity)
    planes = []
    for channel in range(pixels.shape[2] - 1):
        colour = pixels[..., channel].astype(np.float32)
        seen = resizer(colour * opacity) / np.maximum(small_opacity, 0.5)
        planes.append(np.where(small_opacity >= 0.5, seen, resizer(colour)))
    return np.clip(np.rint(np.stack([*planes, small_opacity], axis=-1)), 0, 255).astype(np.uint8)
