"""Where images go: names that never meet a file, formats, the texts in the files, and the page of a run."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import re
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from PIL import Image, PngImagePlugin

from library.config.generation import OutputConfig
from library.errors import named
from library.files import WRITTEN_FORMATS, replacing
from library.generation.gallery import write_gallery
from library.generation.image_generator import GeneratedImage
from library.generation.infotext import RunFacts, texts_for
from library.generation.recorded import EXIF, KEY, MAKER_NOTE, USER_COMMENT
from library.words import counted, duration

logger = logging.getLogger(__name__)

NUMBERED = re.compile(r"im_(?:[01])?(\d{6})(?:_.*)?\.png")

LONGEST_TITLE = 80  # letters of a title in the name of a file


@dataclasses.dataclass
class Writer:
    """Writes the images of a run, and at its end the page of --html."""

    options: OutputConfig
    facts: concurrent.futures.Future[RunFacts]
    last_number: int = 0  # that the folder had
    begun: float = dataclasses.field(default_factory=time.monotonic)
    written: list[str] = dataclasses.field(default_factory=list)  # each picture with its seed, for the last line
    entries: list[tuple[Path, Image.Image, str]] = dataclasses.field(default_factory=list)  # of the page

    def __post_init__(self) -> None:
        """Go on after the numbers that the folder has."""
        names = [path.name for path in self.options.outdir.iterdir()] if self.options.outdir.is_dir() else []
        self.last_number = max((int(match[1]) for match in map(NUMBERED.fullmatch, names) if match), default=0)

    def write(self, generated: GeneratedImage, title: str = "") -> Path:
        """Write an image with its texts; return where. title is a part of its name that tells it from others."""
        texts = texts_for(generated.job, self.facts.result())
        path = unused(self.options.outdir / self.name_of(generated, title))
        save(generated.image, path, texts)
        self.written.append(f"{path.name} (seed {generated.job.request.seed})")
        if self.options.html:
            self.entries.append((path, generated.image, texts["parameters"]))
        return path

    def name_of(self, generated: GeneratedImage, title: str) -> str:
        """Return the name of an image's file, as sd-scripts has it, with its title in a grid."""
        job = generated.job
        stage = "" if generated.stage is None else str(generated.stage)
        if job.request.file_name:
            return job.request.file_name
        if self.options.use_original_file_name and job.init_image is not None:
            return f"{job.init_image.stem}.png"
        title = f"_{in_name(title)}" if title else ""
        if self.options.sequential_file_name:
            return f"im_{stage}{self.last_number + job.number + 1:06d}{title}.png"  # both stages have one number
        date = datetime.now().strftime("%Y%m%d%H%M%S")
        return f"im_{date}_{stage}{generated.index:03d}_{job.request.seed}{title}.png"

    def close(self) -> None:
        """Write the page of the run, and tell what was drawn."""
        if self.written:
            passed = duration(time.monotonic() - self.begun)
            number = counted(len(self.written), "picture")
            logger.info("%s in %s, in %s: %s", number, passed, self.options.outdir, named(self.written))
        if self.entries:
            path = unused(self.options.outdir / f"gallery-{datetime.now().strftime('%Y%m%d%H%M%S')}.html")
            write_gallery(path, self.entries, f"{len(self.entries)} pictures, {self.facts.result().model}")
            logger.info("gallery: %s", path)


def in_name(text: str) -> str:
    """Return a text as it can be a part of the name of a file."""
    return re.sub(r"[^\w.,+=-]+", "-", text).strip("-")[:LONGEST_TITLE]


def unused(path: Path) -> Path:
    """Return the path, with a number after its name where there is such a file."""
    found, number = path, 1
    while found.exists():
        found = path.with_name(f"{path.stem}-{number}{path.suffix}")
        number += 1
    return found


def save(image: Image.Image, path: Path, texts: Mapping[str, str]) -> None:
    """Write a picture with its texts: PNG as text chunks; of JPEG and WebP see `read_texts`."""
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
            exif.get_ifd(EXIF)[USER_COMMENT] = comment
            if KEY in texts:
                exif.get_ifd(EXIF)[MAKER_NOTE] = texts[KEY].encode("utf-8")
            image.save(temporary, kind, quality=100, subsampling=0, exif=exif.tobytes())
