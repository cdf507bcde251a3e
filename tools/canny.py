"""Draw the edges of a picture (Canny), white on black: a control picture for ControlNet.

python tools/canny.py --input photo.jpg --output edges.png --thres1 32 --thres2 224
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # started as a script, from any folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.options import option, parse
from library.errors import Problems, UserError
from library.logs import run_script

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

FORMATS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilesConfig:
    """Files."""

    input: Path | None = option(None, "picture to read")
    output: Path | None = option(None, "picture to write; one that is there is replaced", form=", ".join(FORMATS))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EdgesConfig:
    """Edges."""

    thres1: int = option(32, "contrast from which an edge goes on that began at a stronger place", minimum=0)
    thres2: int = option(224, "contrast at which an edge begins", minimum=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CannyConfig:
    """Which edges of which picture."""

    files: FilesConfig
    edges: EdgesConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with a command line; return the exit code."""
    config = parse(CannyConfig, argv, description=__doc__)
    check_files(config.files)

    from PIL import Image

    from library.data.images import UnreadablePictureError, load_picture
    from library.files import replacing

    try:
        pixels = load_picture(config.files.input)
    except UnreadablePictureError as error:
        raise UserError(f"--input: {config.files.input} cannot be read: {error}") from None
    edges = Image.fromarray(edges_of(pixels, config.edges.thres1, config.edges.thres2))
    # Pillow opens paths of any script, which OpenCV on Windows does not.
    with replacing(config.files.output, suffix=config.files.output.suffix) as temporary:
        edges.save(temporary, quality=100)  # for the formats that have one
    logger.info("saved %s", config.files.output)
    return 0


def check_files(files: FilesConfig) -> None:
    """Raise UserError for files that are missing or cannot be written so."""
    problems = Problems()
    with problems:
        if files.input is None:
            raise UserError("--input is missing: the picture to read")
        if not files.input.is_file():
            raise UserError(f"--input: {files.input} is not a file")
    with problems:
        if files.output is None:
            raise UserError("--output is missing: the picture to write")
        if files.output.suffix.lower() not in FORMATS:
            raise UserError(f"--output must end in {', '.join(FORMATS)}, got {files.output}")
        if files.input is not None and files.output.exists() and files.output.samefile(files.input):
            raise UserError(f"--output {files.output} is the picture to be read: take another name")
    problems.raise_if_any()


def edges_of(pixels: np.ndarray, low: int, high: int) -> np.ndarray:
    """Return the edges of RGB pixels (H, W, 3) as uint8 (H, W): 255 on an edge, else 0."""
    import cv2

    return cv2.Canny(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), low, high)


if __name__ == "__main__":
    run_script(main)
