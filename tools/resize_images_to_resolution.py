"""Copy a folder of pictures, with smaller copies of each beside it.

python tools/resize_images_to_resolution.py pictures pictures_in_sizes --max_resolution 512x512,256x256

writes, for pictures/photo.png, an exact copy of it, photo+512x512.jpg and photo+256x256.jpg. A size stands for its
area: copies keep the aspect ratio and are never larger than the picture. Each is made from the picture itself.
Other files and subfolders are copied too; captions go with each size with --copy_associated_files.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import functools
import hashlib
import io
import logging
import math
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from pathlib import Path
from typing import Any, Literal, NamedTuple

if __package__ in (None, ""):  # started as a script, from any folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image, ImageCms

from library.config.options import option, parse
from library.data import images
from library.data.buckets import Size
from library.errors import UserError, told
from library.files import PICTURE_SUFFIXES
from library.logs import run_script

logger = logging.getLogger(__name__)

CACHES = (".npz", ".safetensors")  # latents and text encodings: those of a picture are not those of its smaller copy
MOST_NAMED = 5
MOST_BYTES = 4 * 2**30  # of all pictures in work at one time; a larger one is in work alone
BYTES_PER_PIXEL = 12  # at most, while a picture is in work: as decoded, as an array, parts of it in float32
# Where one write is refused for these, all will be.
HOPELESS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoldersConfig:
    """Folders."""

    src_img_folder: Path | None = option(None, "folder of the pictures, with its subfolders", positional=True)
    dst_img_folder: Path | None = option(None, "folder to write; it is made if it is not there", positional=True)


def read_resolutions(text: str) -> str:
    """Return the text of --max_resolution if it can be read; raises ValueError."""
    targets(text)
    return text


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizesConfig:
    """Sizes."""

    max_resolution: str = option(
        "512x512,384x384,256x256,128x128",
        "sizes of the copies, with commas between; what counts is the area",
        parse=read_resolutions,
        form="sizes such as 512x512,256x256",
    )
    divisible_by: int = option(1, "cut the margins of copies so that both sides are multiples of this", minimum=1)
    interpolation: Literal["area", "cubic", "lanczos4", "nearest", "linear", "box"] = option(
        "area", "how pictures are reduced"
    )
    skip_small: bool = option(False, "write no copy of pictures that are no larger than its size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilesConfig:
    """Files."""

    save_as_png: bool = option(False, "write copies as PNG; else as JPEG of quality 100")
    full_chroma: bool = option(False, "keep the full resolution of colour in JPEG (4:4:4); else half of it (4:2:0)")
    copy_associated_files: bool = option(False, "copy captions and other files named as a picture for each size")
    skip_existing: bool = option(False, "leave files as they are that are in the destination already")
    overwrite: bool = option(False, "replace files that are in the destination already")
    num_workers: int | None = option(None, "pictures in work at one time; unset: one per core", minimum=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResizeConfig:
    """What is copied in which sizes."""

    folders: FoldersConfig
    sizes: SizesConfig
    files: FilesConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with a command line; return the exit code, 1 if a file had to be left out."""
    return resize_folder(parse(ResizeConfig, argv, description=__doc__))


def resize_folder(config: ResizeConfig) -> int:
    """Write the copies; return 0, or 1 if a file had to be left out. Raises UserError before anything is written."""
    check(config)
    listing = list_files(config.folders.src_img_folder)
    tasks = make_tasks(listing.files, config)
    check_names(tasks)
    there = existing(tasks)
    check_existing(there, config.files)
    if config.files.skip_existing:
        tasks = [rest for rest in (without(task, there) for task in tasks) if rest.outputs]
    start = time.perf_counter()
    outcomes = [*listing.left_out, *carry_out(tasks, config)]
    return report(outcomes, config, len(there) if config.files.skip_existing else 0, time.perf_counter() - start)


# --------------------------------------------------------------------------------------------------------------
# What is asked for
# --------------------------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """A size that copies are made in: its name, and its area in pixels."""

    name: str
    area: int


def targets(text: str) -> list[Target]:
    """Return the sizes that a text such as "512x512,256x256" names; raises ValueError."""
    names = [part.strip() for part in text.split(",")]
    matches = [re.fullmatch("([1-9][0-9]*)x([1-9][0-9]*)", name) for name in names]
    for name, match in zip(names, matches, strict=True):
        if match is None:
            raise ValueError(f"{name!r} is none")
        if names.count(name) > 1:
            raise ValueError(f"{name} is given twice")
    return [Target(match[0], int(match[1]) * int(match[2])) for match in matches]


def check(config: ResizeConfig) -> None:
    """Raise UserError for options and folders that do not fit."""
    source, destination = config.folders.src_img_folder, config.folders.dst_img_folder
    if source is None or not source.is_dir():
        raise UserError(f"src_img_folder: {source or repr('')} is no folder; give the folder of the pictures")
    if destination is None or (destination.exists() and not destination.is_dir()):
        raise UserError(f"dst_img_folder: {destination or repr('')} is no folder; give the folder to write")
    if lies_in(destination, source) or lies_in(source, destination):
        raise UserError(
            f"dst_img_folder {destination} and src_img_folder {source} must be two folders, neither of them in the "
            "other: copies would mix with pictures"
        )
    if config.files.skip_existing and config.files.overwrite:
        raise UserError("--skip_existing and --overwrite exclude each other: leave one out")


def lies_in(path: Path, folder: Path) -> bool:
    """Tell whether path is folder or in it, links and the case of letters notwithstanding."""
    path = path.resolve()
    return any(parent.exists() and parent.samefile(folder) for parent in (path, *path.parents) if folder.exists())


# --------------------------------------------------------------------------------------------------------------
# The plan: which files are written, from what
# --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a file: how many files of which kind were written, and what has to be said of it."""

    source: Path
    written: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    notices: tuple[str, ...] = ()  # keys of NOTICES
    error: str | None = None


class Listing(NamedTuple):
    """The files of a folder, and what is in it besides."""

    files: list[Path]
    left_out: list[Outcome]


class Copy(NamedTuple):
    """A file that is copied byte for byte: an "original", an "associated" file of one size, or an "other" file."""

    source: Path
    path: Path
    kind: str
    target: Target | None = None


class Reduced(NamedTuple):
    """A copy in a size that is to be made."""

    target: Target
    path: Path


@dataclasses.dataclass(frozen=True)
class Task:
    """What is written for one file; without `reduced` it need not be a picture."""

    source: Path
    copies: tuple[Copy, ...]
    reduced: tuple[Reduced, ...] = ()

    @property
    def outputs(self) -> list[Path]:
        """The files to be written."""
        return [entry.path for entry in (*self.copies, *self.reduced)]


def list_files(source: Path) -> Listing:
    """Return all files in a folder and its subfolders, in order; raises UserError if there is no picture."""
    files, left_out = [], []
    for folder, subfolders, names in os.walk(source, onerror=_unreadable_folder):
        for name in subfolders:
            if (Path(folder) / name).is_symlink():  # it may lead back to here
                left_out.append(Outcome(Path(folder) / name, error="a link to a folder; copy what it links to"))
        for path in (Path(folder) / name for name in names):
            if path.is_file():
                files.append(path)
            else:
                left_out.append(Outcome(path, error="neither a file nor a folder"))
    if not any(is_picture(path) for path in files):
        kinds = ", ".join(PICTURE_SUFFIXES)
        raise UserError(f"src_img_folder: {source} has no pictures ({kinds}); give the folder of the pictures")
    return Listing(sorted(files), left_out)


def _unreadable_folder(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be read ({error.strerror}); mend its permissions")


def is_picture(path: Path) -> bool:
    """Tell from its name whether a file is a picture."""
    return path.suffix.lower() in PICTURE_SUFFIXES


def make_tasks(files: Iterable[Path], config: ResizeConfig) -> list[Task]:
    """Return what is to be written for each of the files."""
    sizes, suffix = targets(config.sizes.max_resolution), ".png" if config.files.save_as_png else ".jpg"
    companions = collections.defaultdict(list)  # picture's path without its extension -> files that go with it
    if config.files.copy_associated_files:
        for path in files:
            if path.suffix and path.suffix.lower() not in (*PICTURE_SUFFIXES, *CACHES):
                companions[path.with_suffix("")].append(path)

    tasks = []
    for path in files:
        place = config.folders.dst_img_folder / path.relative_to(config.folders.src_img_folder)
        if not is_picture(path):
            tasks.append(Task(path, (Copy(path, place, "other"),)))
            continue
        copies = [Copy(path, place, "original")]
        for target in sizes:
            for other in companions[path.with_suffix("")]:
                copies.append(Copy(other, sized_name(place, target, other.suffix), "associated", target))
        reduced = tuple(Reduced(target, sized_name(place, target, suffix)) for target in sizes)
        tasks.append(Task(path, tuple(copies), reduced))
    return tasks


def sized_name(path: Path, target: Target, suffix: str) -> Path:
    """Return the path of what belongs to a picture in a size, such as photo+512x512.jpg."""
    return path.with_name(f"{path.stem}+{target.name}{suffix}")


def check_names(tasks: Iterable[Task]) -> None:
    """Raise UserError where two files would be written to one name."""
    # Where the system does not tell them apart, PHOTO and photo are one name.
    same = str.lower if sys.platform in ("win32", "darwin") else str
    origins: dict[str, Path] = {}
    clashes: dict[tuple[Path, Path], Path] = {}
    for task in tasks:
        for path in task.outputs:
            other = origins.setdefault(same(str(path)), task.source)
            if other != task.source:
                clashes.setdefault((other, task.source), path)
    if clashes:
        lines = [f"{one} and {two} would both be written to {path.name}" for (one, two), path in clashes.items()]
        raise UserError(f"{named(lines, '; ')}: rename one of the two")


def existing(tasks: Iterable[Task]) -> set[Path]:
    """Return which of the files to be written are there; one that is empty, as after a power cut, is not."""
    return {path for task in tasks for path in task.outputs if os.path.lexists(path) and not is_empty(path)}


def is_empty(path: Path) -> bool:
    """Tell whether path is a file without content."""
    return path.is_file() and path.stat().st_size == 0


def check_existing(there: set[Path], files: FilesConfig) -> None:
    """Raise UserError if files would be written over unasked."""
    if there and not (files.skip_existing or files.overwrite):
        names = named([str(path) for path in sorted(there)])
        raise UserError(
            f"dst_img_folder has files of these names already: {names}; --skip_existing leaves them, --overwrite "
            "replaces them"
        )


def without(task: Task, there: set[Path]) -> Task:
    """Return what is left of a task when some of its files are there."""
    return keeping(task, lambda entry: entry.path not in there)


def without_larger(task: Task, area: int) -> Task:
    """Return a task without the copies in sizes that a picture of an area in pixels does not exceed."""
    return keeping(task, lambda entry: entry.target is None or entry.target.area < area)


def keeping(task: Task, keeps: Callable[[Copy | Reduced], bool]) -> Task:
    """Return a task with those of its files that are to be kept."""
    return Task(task.source, tuple(filter(keeps, task.copies)), tuple(filter(keeps, task.reduced)))


def named(names: Sequence[str], separator: str = ", ") -> str:
    """Return the first few names, and how many more there are."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return separator.join(names[:MOST_NAMED]) + more


# --------------------------------------------------------------------------------------------------------------
# The work
# --------------------------------------------------------------------------------------------------------------


def carry_out(tasks: Sequence[Task], config: ResizeConfig) -> list[Outcome]:
    """Do all tasks, as many at one time as there are workers; raises OSError where the disk is full.

    The workers are threads: reading, resizing and writing of pictures are done outside the interpreter's lock,
    and threads start at once and share the bound on memory.
    """
    import cv2
    from tqdm import tqdm

    Image.init()  # now, for all formats: two threads that do it at one time see half of them
    gate = MemoryGate(MOST_BYTES)
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # each worker has a core; threads within threads would wait for each other
    try:
        work = functools.partial(carry_out_one, config=config, gate=gate)
        # The longest work first: at the end no worker waits for another.
        ordered = sorted(tasks, key=lambda task: task.source.stat().st_size if task.reduced else 0, reverse=True)
        results = in_parallel(work, ordered, config.files.num_workers or available_cores())
        return list(tqdm(results, total=len(tasks), desc="resizing", unit="file"))
    finally:
        cv2.setNumThreads(threads)


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_parallel(function: Callable[[Any], Any], items: Iterable[Any], workers: int) -> Iterator[Any]:
    """Yield function(item) for all items, as they become ready; few are begun ahead, so that stopping is quick."""
    waiting: set[Future] = set()
    pool = ThreadPoolExecutor(workers)
    try:
        for item in items:
            waiting.add(pool.submit(function, item))
            if len(waiting) > 2 * workers:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        yield from (future.result() for future in as_completed(waiting))
    finally:
        pool.shutdown(cancel_futures=True)


class MemoryGate:
    """Lets work on pictures begin while all in work need no more than `most` bytes together."""

    def __init__(self, most: int) -> None:
        self.most = self.free = most
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def holding(self, size: Size) -> Iterator[None]:
        """Wait until there is room for a picture of size (width, height), and take it meanwhile."""
        need = min(size[0] * size[1] * BYTES_PER_PIXEL, self.most)
        with self.changed:
            self.changed.wait_for(lambda: self.free >= need)
            self.free -= need
        try:
            yield
        finally:
            with self.changed:
                self.free += need
                self.changed.notify_all()


def carry_out_one(task: Task, *, config: ResizeConfig, gate: MemoryGate) -> Outcome:
    """Write the files of a task; what is wrong with its source is told in the outcome.

    Raises OSError where the disk would refuse everything else as well.
    """
    written: collections.Counter[str] = collections.Counter()
    notices: tuple[str, ...] = ()
    error = None
    as_png = config.files.save_as_png
    try:
        if task.reduced:
            size = images.read_size(task.source)
            with gate.holding(size):
                picture = read_picture(task.source)
                notices = (*picture.notices, *(["alpha"] if picture.shines_through and not as_png else []))
                if config.sizes.skip_small:
                    whole, task = task, without_larger(task, size[0] * size[1])
                    written["left out as small"] = len(whole.reduced) - len(task.reduced)
                for kind in write_reduced(picture, task, config):
                    written[kind] += 1
        for entry in task.copies:
            copy_file(entry.source, entry.path)
            written[entry.kind] += 1
    except (images.UnreadablePictureError, TooNarrowError) as problem:
        error = str(problem)
    except OSError as problem:
        if problem.errno in HOPELESS:
            raise OSError(
                f"{config.folders.dst_img_folder} cannot be written: {problem.strerror}; what was written before is "
                "whole, and --skip_existing goes on from there"
            ) from problem
        error = f"it could not be copied: {problem.strerror or problem}"
    return Outcome(task.source, written, notices, error)


class TooNarrowError(Exception):
    """A picture of which the cut to multiples would leave nothing; the message says at what size."""


def write_reduced(picture: Picture, task: Task, config: ResizeConfig) -> Iterator[str]:
    """Write the copies of a picture in the sizes; yield the name of the size after each, and whether it kept its own.

    Raises TooNarrowError before the first one.
    """
    divisor, kind = config.sizes.divisible_by, output_format(config.files)
    frames = [frame(picture.size, entry.target.area, divisor) for entry in task.reduced]
    for entry, (size, box) in zip(task.reduced, frames, strict=True):
        if 0 in box.size:
            narrow = f"at {entry.target.name} it is {size[0]}x{size[1]}"
            raise TooNarrowError(f"{narrow}, too narrow for --divisible_by {divisor}")
    for entry, (size, box) in zip(task.reduced, frames, strict=True):
        if box.size == picture.size and picture.is_as_written(kind.name):
            copy_file(task.source, entry.path)  # to write the same pixels anew would lose quality
        else:
            with replacing(entry.path) as temporary:
                kind.write(reduce(picture, size, box, config.sizes.interpolation), picture.profile, temporary)
        yield entry.target.name
        if size == picture.size:
            yield "not reduced"


# --------------------------------------------------------------------------------------------------------------
# Sizes
# --------------------------------------------------------------------------------------------------------------


class Box(NamedTuple):
    """A part of a picture: its left upper corner and its sides, in pixels."""

    left: int
    top: int
    width: int
    height: int

    @property
    def size(self) -> Size:
        """(width, height)."""
        return self.width, self.height


def reduced_size(size: Size, area: int) -> Size:
    """Return (width, height) of the same aspect ratio with at most the area, rounded down; never enlarged.

    The sides times sqrt(area / (width height)), in whole numbers: floor(sqrt(x)) is isqrt(floor(x)).
    """
    width, height = size
    if width * height <= area:
        return size
    return max(1, math.isqrt(width * area // height)), max(1, math.isqrt(height * area // width))


def frame(size: Size, area: int, divisible_by: int) -> tuple[Size, Box]:
    """Return the size to which a picture is reduced, and the middle of it whose sides are multiples."""
    width, height = reduced_size(size, area)
    right, below = width % divisible_by, height % divisible_by
    return (width, height), Box(right // 2, below // 2, width - right, height - below)


# --------------------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------------------

# What is said at the end where copies could not keep all: kind -> words before the number and names of the pictures.
NOTICES = {
    "alpha": "copies of transparent pictures are laid on white, for JPEG has no transparency; --save_as_png keeps it",
    "depth": "copies of gray pictures of more than 8 bits have 8",
    "CMYK": "copies of CMYK pictures are in sRGB",
    "profile": "copies are without the colour profile, which is not for their picture's kind of pixels",
    "frames": "copies of moving pictures show the first frame",
}
# (format, mode) -> how OpenCV reads it: the same pixels as Pillow's, without copies on the way.
OPENCV_FLAGS = {
    ("JPEG", "RGB"): "IMREAD_COLOR",
    ("MPO", "RGB"): "IMREAD_COLOR",
    ("JPEG", "L"): "IMREAD_GRAYSCALE",
    ("PNG", "RGB"): "IMREAD_COLOR",
    ("PNG", "RGBA"): "IMREAD_UNCHANGED",
    ("PNG", "L"): "IMREAD_GRAYSCALE",
}


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture as it is stored; its orientation has yet to be applied."""

    pixels: np.ndarray  # uint8: gray (H, W), with opacity (H, W, 2); RGB (H, W, 3), with opacity (H, W, 4)
    orientation: int  # EXIF
    profile: bytes | None
    format: str
    notices: tuple[str, ...]  # keys of NOTICES

    @property
    def size(self) -> Size:
        """(width, height) as displayed."""
        height, width = self.pixels.shape[:2]
        return (height, width) if self.orientation in images.QUARTER_TURNS else (width, height)

    @functools.cached_property
    def shines_through(self) -> bool:
        """Whether some of it is not opaque."""
        return self.pixels.ndim == 3 and self.pixels.shape[2] in {2, 4} and int(self.pixels[..., -1].min()) < 255

    def is_as_written(self, format: str) -> bool:
        """Tell whether its file could stand for a copy of its own size in a format."""
        return self.format == format and self.orientation not in images.TURNS and not self.notices


def read_picture(path: Path) -> Picture:
    """Return a picture; raises UnreadablePictureError."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as picture:
            if picture.mode.startswith(("I", "F")):
                gray = images.load_picture(path)[..., 0]  # scaled to 8 bits as in training, and turned upright
                return with_profile(Picture(gray, 1, None, picture.format, ("depth",)), picture)
            # As in training, what stands after the pixels of a PNG does not count: to find it takes a decoding.
            looks = picture.format != "PNG" or "exif" in picture.info
            orientation = picture.getexif().get(images.ORIENTATION_TAG, 1) if looks else 1
            if picture.mode == "CMYK":
                return Picture(np.asarray(from_cmyk(picture)), orientation, None, picture.format, ("CMYK",))
            notices = ("frames",) if moves(picture) else ()
            return with_profile(Picture(decoded(picture, data), orientation, None, picture.format, notices), picture)
    except images.UnreadablePictureError:
        raise
    except Exception as error:  # noqa: BLE001 (decoders raise whatever a damaged file leads them to)
        raise images.UnreadablePictureError(told(error)) from None


def with_profile(picture: Picture, file: Image.Image) -> Picture:
    """Return a picture with the colour profile of its file, if it is for such pixels; gray ones are made RGB for it."""
    profile = file.info.get("icc_profile")
    if not profile:
        return picture
    space, pixels = profile[16:20], picture.pixels
    is_gray = pixels.ndim == 2 or pixels.shape[2] == 2
    if is_gray and space == b"RGB ":
        pixels = np.stack([pixels] * 3, axis=2) if pixels.ndim == 2 else pixels[..., [0, 0, 0, 1]]
    elif space != (b"GRAY" if is_gray else b"RGB "):
        return dataclasses.replace(picture, notices=(*picture.notices, "profile"))
    return dataclasses.replace(picture, pixels=pixels, profile=profile)


def decoded(picture: Image.Image, data: bytes) -> np.ndarray:
    """Return the pixels of a picture whose file has these data, in a form of `Picture`."""
    import cv2

    if is_plain(picture):
        flag = getattr(cv2, OPENCV_FLAGS[picture.format, picture.mode]) | cv2.IMREAD_IGNORE_ORIENTATION
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
        if pixels is not None:  # else it is damaged, and Pillow tells how
            swap = {"RGB": cv2.COLOR_BGR2RGB, "RGBA": cv2.COLOR_BGRA2RGBA}.get(picture.mode)
            return pixels if swap is None else cv2.cvtColor(pixels, swap, dst=pixels)
    colours = "L" if picture.mode in ("1", "L", "LA", "La") else "RGB"
    mode = f"{colours}A" if picture.has_transparency_data else colours
    return np.asarray(picture if picture.mode == mode else picture.convert(mode))


def is_plain(picture: Image.Image) -> bool:
    """Tell whether OpenCV reads the same pixels as Pillow: a still picture, of 8 bits, without a transparent colour."""
    if (picture.format, picture.mode) not in OPENCV_FLAGS or moves(picture):
        return False
    return picture.format != "PNG" or (picture.tile[0][3] == picture.mode and "transparency" not in picture.info)


def moves(picture: Image.Image) -> bool:
    """Tell whether a file has several frames; an MPO is a photograph with its preview."""
    return getattr(picture, "is_animated", False) and picture.format != "MPO"


def from_cmyk(picture: Image.Image) -> Image.Image:
    """Return a CMYK picture in sRGB, by its colour profile if it can be used."""
    profile = picture.info.get("icc_profile")
    if profile:
        with contextlib.suppress(ImageCms.PyCMSError):
            srgb = ImageCms.createProfile("sRGB")
            return ImageCms.profileToProfile(picture, io.BytesIO(profile), srgb, outputMode="RGB")
    return picture.convert("RGB")


# --------------------------------------------------------------------------------------------------------------
# Reducing
# --------------------------------------------------------------------------------------------------------------


def reduce(picture: Picture, size: Size, box: Box, interpolation: str) -> Image.Image:
    """Return the part of the picture at a size (width, height) as displayed, turned upright."""
    turned = picture.orientation in images.QUARTER_TURNS
    resizer = functools.partial(RESIZERS[interpolation], size=size[::-1] if turned else size)
    if size == picture.size:
        small = picture.pixels
    else:
        small = resize_by_opacity(picture.pixels, resizer) if picture.shines_through else resizer(picture.pixels)
    image = Image.fromarray(small)
    if picture.orientation in images.TURNS:  # last, for it takes time that grows with the area
        image = image.transpose(images.TURNS[picture.orientation])
    return image.crop((box.left, box.top, box.left + box.width, box.top + box.height))


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


# --------------------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class OutputFormat:
    """A format that copies are written in: Pillow's name and options of its writer."""

    name: str
    options: dict[str, Any]

    def write(self, image: Image.Image, profile: bytes | None, path: Path) -> None:
        """Write a picture with its colour profile."""
        if self.name == "JPEG":
            image = on_white(image)
        image.save(path, self.name, icc_profile=profile, **self.options)


def output_format(files: FilesConfig) -> OutputFormat:
    """Return the format that the options ask for."""
    if files.save_as_png:
        return OutputFormat("PNG", {})
    return OutputFormat("JPEG", {"quality": 100, "subsampling": "4:4:4" if files.full_chroma else "4:2:0"})


def on_white(image: Image.Image) -> Image.Image:
    """Return a picture without transparency, L or RGB, as it is seen on white."""
    if image.mode not in ("LA", "RGBA"):
        return image
    pixels = np.asarray(image).astype(np.float32)
    opacity = pixels[..., -1:] / 255
    laid = np.rint(pixels[..., :-1] * opacity + 255 * (1 - opacity)).astype(np.uint8)
    return Image.fromarray(laid if image.mode == "RGBA" else laid[..., 0])


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of path; when the block ends well it takes the place of path.

    Its name is no picture's, so that what a killed run leaves is not trained on, and the same each time, so that
    the next run replaces it; and it is short where the name of path is as long as names may be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.blake2b(os.fsencode(path.name), digest_size=8).hexdigest()
    temporary = path.with_name(f".{digest}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def copy_file(source: Path, path: Path) -> None:
    """Copy a file byte for byte, with its time of change."""
    with replacing(path) as temporary:
        shutil.copyfile(source, temporary)
        status = source.stat()
        os.utime(temporary, ns=(status.st_atime_ns, status.st_mtime_ns))


# --------------------------------------------------------------------------------------------------------------
# The report
# --------------------------------------------------------------------------------------------------------------


def report(outcomes: Sequence[Outcome], config: ResizeConfig, num_there: int, seconds: float) -> int:
    """Tell what was done, in numbers, and which files were left out; return the exit code."""
    outcomes = sorted(outcomes, key=lambda outcome: outcome.source)
    for notice, words in NOTICES.items():
        sources = [str(outcome.source) for outcome in outcomes if notice in outcome.notices]
        if sources:
            logger.warning("%s: %d (%s)", words, len(sources), named(sources))
    written = sum((outcome.written for outcome in outcomes), collections.Counter())
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    for outcome in failed:
        logger.error("%s was left out: %s", outcome.source, outcome.error)
    logger.info("%s: %s", config.folders.dst_img_folder, summary(written, config.sizes, num_there))
    logger.info("%d left out; %.1f s", len(failed), seconds)
    return 1 if failed else 0


def summary(written: collections.Counter[str], sizes: SizesConfig, num_there: int) -> str:
    """Return what was written, in numbers; what is not there is not named."""
    rows = [
        (written["original"], "pictures as they are"),
        *((written[target.name], f"in {target.name}") for target in targets(sizes.max_resolution)),
        (written["not reduced"], "of these copies no smaller than their picture (--skip_small leaves them out)"),
        (written["left out as small"], "copies not made, as no smaller than their picture"),
        (written["associated"], "files that belong to copies"),
        (written["other"], "other files"),
        (num_there, "files were there already"),
    ]
    return ", ".join(f"{count} {words}" for count, words in rows if count) or "nothing to do"


if __name__ == "__main__":
    run_script(main)
