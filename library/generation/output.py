"""Where pictures go: names that never meet a file, formats, and what the files say."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from PIL import Image, PngImagePlugin

from library.config.generation import OutputConfig
from library.files import WRITTEN_FORMATS, replacing
from library.generation.artist import Drawn

NUMBERED = re.compile(r"im_(?:[01])?(\d{6})\.png")


@dataclasses.dataclass
class Writer:
    """Writes the pictures of a run."""

    options: OutputConfig
    taken: int = 0  # the last number that the folder had

    def __post_init__(self) -> None:
        """Go on after the numbers that the folder has."""
        names = [path.name for path in self.options.outdir.iterdir()] if self.options.outdir.is_dir() else []
        self.taken = max((int(match[1]) for match in map(NUMBERED.fullmatch, names) if match), default=0)

    def write(self, drawn: Drawn, index: int, texts: Mapping[str, str]) -> Path:
        """Write a picture, the index-th of its batch; return where."""
        path = unused(self.options.outdir / self.name_of(drawn, index))
        save(drawn.image, path, texts)
        return path

    def name_of(self, drawn: Drawn, index: int) -> str:
        """Return the name of a picture's file, as sd-scripts has it."""
        stage = "" if drawn.stage is None else str(drawn.stage)
        request = drawn.job.request
        if request.file_name:
            return request.file_name
        if self.options.use_original_file_name and drawn.job.start is not None:
            return f"{drawn.job.start.stem}.png"
        if self.options.sequential_file_name:
            return f"im_{stage}{self.taken + drawn.job.number + 1:06d}.png"  # both stages have one number
        return f"im_{datetime.now().strftime('%Y%m%d%H%M%S')}_{stage}{index:03d}_{request.seed}.png"


def unused(path: Path) -> Path:
    """Return the path, with a number after its name where there is such a file."""
    found, number = path, 1
    while found.exists():
        found = path.with_name(f"{path.stem}-{number}{path.suffix}")
        number += 1
    return found


def save(image: Image.Image, path: Path, texts: Mapping[str, str]) -> None:
    """Write a picture with its texts: PNG as text chunks, JPEG and WebP as the user comment of EXIF."""
    kind = WRITTEN_FORMATS[path.suffix.lower()]
    with replacing(path) as temporary:
        if kind == "PNG":
            info = PngImagePlugin.PngInfo()
            for key, text in texts.items():
                info.add_itxt(key, text)
            image.save(temporary, kind, pnginfo=info)
        else:
            exif = Image.Exif()
            comment = b"UNICODE\0" + texts.get("parameters", "").encode("utf-16-be")
            exif.get_ifd(0x8769)[0x9286] = comment
            image.save(temporary, kind, quality=100, subsampling=0, exif=exif.tobytes())
