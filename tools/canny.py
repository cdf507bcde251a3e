"""Find the edges of a picture (Canny), white on black: a control image for ControlNet.

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
class CannyOptions:
    """Options."""

    input: Path = option(REQUIRED, "picture to read", missing="the picture to read", reads="a file")
    output: Path = option(
        REQUIRED,
        "picture to write; an existing one is replaced",
        form=", ".join(WRITTEN_FORMATS),
        missing="the picture to write",
    )
    thres1: int = option(32, "contrast at which an edge continues that began at a stronger place", minimum=0)
    thres2: int = option(224, "contrast at which an edge begins", minimum=0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with a command line; return the exit code."""
    config = parse(CannyOptions, argv, description=__doc__, rules=(check_output,))
    source, output = config.input, config.output

    from PIL import Image

    from library.data.images import UnreadablePictureError, canny, load_picture

    try:
        pixels = load_picture(source)
    except UnreadablePictureError as error:
        raise UserError(f"--input: {source} cannot be read: {error}") from None
    edges = Image.fromarray(canny(pixels, config.thres1, config.thres2))
    # Pillow writes paths in any script; OpenCV on Windows does not.
    with replacing(output) as temporary:
        edges.save(temporary, WRITTEN_FORMATS[output.suffix.lower()], quality=100)  # where the format has one
    logger.info("saved %s", output)
    return 0


def check_output(config: CannyOptions, problems: Problems) -> None:
    """Add to problems an --output of another format, or one that would replace the picture to read."""
    source, output = config.input, config.output
    if output.suffix.lower() not in WRITTEN_FORMATS:
        problems.add(f"--output must end in {', '.join(WRITTEN_FORMATS)}, got {output}")
    if source.exists() and output.exists() and output.samefile(source):
        problems.add(f"--output {output} is the picture to be read: take another name")


if __name__ == "__main__":
    run_script(main)
