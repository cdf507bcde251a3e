"""Draw the edges of a picture (Canny), white on black: a control picture for ControlNet.

python tools/canny.py --input photo.jpg --output edges.png --thres1 32 --thres2 224
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a script, from any folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.command_line import parse
from library.config.options import REQUIRED, option
from library.errors import Problems, UserError
from library.files import WRITTEN_FORMATS, replacing
from library.logs import run_script

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilesConfig:
    """Files."""

    input: Path = option(REQUIRED, "picture to read", missing="the picture to read", reads="a file")
    output: Path = option(
        REQUIRED,
        "picture to write; one that is there is replaced",
        form=", ".join(WRITTEN_FORMATS),
        missing="the picture to write",
    )


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
    config = parse(CannyConfig, argv, description=__doc__, rules=(check_format, check_names))
    source, output = config.files.input, config.files.output

    from PIL import Image

    from library.data.images import UnreadablePictureError, canny, load_picture

    try:
        pixels = load_picture(source)
    except UnreadablePictureError as error:
        raise UserError(f"--input: {source} cannot be read: {error}") from None
    edges = Image.fromarray(canny(pixels, config.edges.thres1, config.edges.thres2))
    # Pillow opens paths of any script, which OpenCV on Windows does not.
    with replacing(output) as temporary:
        edges.save(temporary, WRITTEN_FORMATS[output.suffix.lower()], quality=100)  # for the formats that have one
    logger.info("saved %s", output)
    return 0


def check_format(config: CannyConfig, problems: Problems) -> None:
    """Raise UserError for an --output of another format."""
    if config.files.output.suffix.lower() not in WRITTEN_FORMATS:
        raise UserError(f"--output must end in {', '.join(WRITTEN_FORMATS)}, got {config.files.output}")


def check_names(config: CannyConfig, problems: Problems) -> None:
    """Raise UserError where the picture that is read would be replaced."""
    files = config.files
    if files.input.exists() and files.output.exists() and files.output.samefile(files.input):
        raise UserError(f"--output {files.output} is the picture to be read: take another name")


if __name__ == "__main__":
    run_script(main)
