"""Copy a folder of pictures, with smaller copies of each beside it.

python tools/resize_images_to_resolution.py pictures pictures_in_sizes --max_resolution 512x512,256x256

writes, for pictures/photo.png, an exact copy of it, photo+512x512.jpg and photo+256x256.jpg. Of a size only the area
counts: copies keep the aspect ratio and are never larger than the picture. Each is computed from the picture itself.
Other files and subfolders are copied too; with --copy_associated_files captions are copied for each size.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import sys
import time
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Literal

if __package__ in (None, ""):  # started as a script, from any folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.command_line import parse
from library.config.kinds import why_not
from library.config.options import REQUIRED, option
from library.data.resizing import plan
from library.data.resizing.picture import NOTICES, OutputFormat
from library.data.resizing.plan import Copy, Target
from library.data.resizing.work import Making, Outcome, carry_out
from library.errors import Problems, UserError, named
from library.logs import run_script

logger = logging.getLogger(__name__)

CAPTIONS = (".txt", ".caption")  # extensions


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoldersConfig:
    """Folders."""

    src_img_folder: Path = option(REQUIRED, "folder of the pictures, with its subfolders", positional=True)
    dst_img_folder: Path = option(REQUIRED, "folder to write; created if it does not exist", positional=True)


def read_resolutions(text: str) -> str:
    """Return the text of --max_resolution if it can be read; raises ValueError."""
    plan.targets(text)
    return text


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizesConfig:
    """Sizes."""

    max_resolution: str = option(
        "512x512,384x384,256x256,128x128",
        "sizes of the copies, separated by commas; only the area counts",
        parse=read_resolutions,
        form="sizes such as 512x512,256x256",
    )
    divisible_by: int = option(1, "crop the margins of copies so that both sides are multiples of this", minimum=1)
    interpolation: Literal["area", "cubic", "lanczos4", "nearest", "linear", "box"] = option(
        "area", "how pictures are reduced"
    )
    skip_small: bool = option(False, "write no copy of a picture that is no larger than the size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CopyOptions:
    """Files."""

    save_as_png: bool = option(False, "write copies as PNG; else as JPEG of quality 100")
    full_chroma: bool = option(
        False,
        "keep the full resolution of colour in JPEG (4:4:4); else half of it (4:2:0)",
        not_with=("save_as_png",),
    )
    copy_associated_files: bool = option(False, "copy captions and other files named as a picture for each size")
    skip_existing: bool = option(False, "keep files that already exist in the destination")
    overwrite: bool = option(False, "replace files that already exist in the destination")
    num_workers: int | None = option(None, "pictures processed at the same time; unset: one per core", minimum=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResizeConfig:
    """All options."""

    folders: FoldersConfig
    sizes: SizesConfig
    files: CopyOptions


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with a command line; return the exit code, 1 if a file had to be skipped."""
    config = parse(ResizeConfig, argv, description=__doc__, rules=(check_options,))
    source, destination = config.folders.src_img_folder, config.folders.dst_img_folder
    files, targets = config.files, plan.targets(config.sizes.max_resolution)
    listing = plan.list_files(source)
    layout = plan.Layout(
        source=source,
        destination=destination,
        targets=targets,
        suffix=".png" if files.save_as_png else ".jpg",
        has_companions=files.copy_associated_files,
    )
    tasks = plan.make_tasks(listing.files, layout)
    plan.check_names(tasks)
    existing = plan.existing(tasks)
    check_existing(existing, files)
    if files.skip_existing:
        tasks = [rest for rest in (plan.without(task, existing) for task in tasks) if rest.outputs]
    making = Making(
        format=output_format(files),
        interpolation=config.sizes.interpolation,
        divisible_by=config.sizes.divisible_by,
        skip_small=config.sizes.skip_small,
    )
    start = time.perf_counter()
    outcomes = [Outcome(path, error=why) for path, why in listing.left_out.items()]
    outcomes += carry_out(tasks, making, destination, files.num_workers)
    num_kept = len(existing) if files.skip_existing else 0
    return report(outcomes, targets, destination, num_kept, time.perf_counter() - start)


def check_options(config: ResizeConfig, problems: Problems) -> None:
    """Add to problems what is wrong with the two folders, and options that exclude each other."""
    source, destination = config.folders.src_img_folder, config.folders.dst_img_folder
    if not source.is_dir():
        problems.add(f"src_img_folder: {why_not(source, 'a folder')}; give the folder of the pictures")
    if destination.exists() and not destination.is_dir():
        problems.add(f"dst_img_folder: {destination} is no folder; give the folder to write")
    if source.is_dir() and (lies_in(destination, source) or lies_in(source, destination)):
        problems.add(
            f"dst_img_folder {destination} and src_img_folder {source} must be two folders, neither of them in the "
            "other: copies would mix with pictures"
        )
    if config.files.skip_existing and config.files.overwrite:
        problems.add("--skip_existing and --overwrite exclude each other: leave one out")


def lies_in(path: Path, folder: Path) -> bool:
    """Return whether path is folder or in it, whatever links and upper or lower case it is written with."""
    path = path.resolve()
    return any(parent.exists() and parent.samefile(folder) for parent in (path, *path.parents) if folder.exists())


def check_existing(existing: set[Path], files: CopyOptions) -> None:
    """Raise UserError if files would be replaced without --overwrite."""
    if existing and not (files.skip_existing or files.overwrite):
        names = named([str(path) for path in sorted(existing)])
        raise UserError(
            f"dst_img_folder has files of these names already: {names}; --skip_existing keeps them, --overwrite "
            "replaces them"
        )


def output_format(files: CopyOptions) -> OutputFormat:
    """Return the format of the copies."""
    if files.save_as_png:
        return OutputFormat("PNG", {})
    return OutputFormat("JPEG", {"quality": 100, "subsampling": "4:4:4" if files.full_chroma else "4:2:0"})


def report(
    outcomes: Sequence[Outcome], targets: Sequence[Target], destination: Path, num_kept: int, seconds: float
) -> int:
    """Log the numbers of files written and skipped, and why; return the exit code."""
    outcomes = sorted(outcomes, key=lambda outcome: outcome.source)
    for notice, words in NOTICES.items():
        sources = [str(outcome.source) for outcome in outcomes if notice in outcome.notices]
        if sources:
            logger.warning("%s: %d (%s)", words, len(sources), named(sources))
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    for outcome in failed:
        logger.error("%s was left out: %s", outcome.source, outcome.error)
    logger.info("%s: %s", destination, summary(outcomes, targets, num_kept))
    logger.info("%d left out; %.1f s", len(failed), seconds)
    return 1 if failed else 0


def summary(outcomes: Sequence[Outcome], targets: Sequence[Target], num_kept: int) -> str:
    """Return the numbers of files written, of each kind of which there are any."""
    copied = collections.Counter(copy.kind for outcome in outcomes for copy in outcome.copied)
    pictures = {copy.path.with_suffix("") for outcome in outcomes for copy in outcome.copied if copy.kind == "original"}
    reduced = collections.Counter(entry.target for outcome in outcomes for entry in outcome.reduced)
    num_unreduced = sum(outcome.num_unreduced for outcome in outcomes)
    captions = sum(is_caption(copy, pictures) for outcome in outcomes for copy in outcome.copied)
    rows = [
        (copied["original"], f"pictures{' and their captions' if captions else ''} as they are"),
        *((reduced[target], f"in {target.name}") for target in targets),
        (num_unreduced, "of these copies no smaller than their picture (--skip_small leaves them out)"),
        (sum(outcome.num_too_small for outcome in outcomes), "copies not made, as no smaller than their picture"),
        (copied["associated"], "files that belong to copies"),
        (copied["other"] - captions, "other files"),
        (num_kept, "files were there already"),
    ]
    return ", ".join(f"{count} {words}" for count, words in rows if count) or "nothing to do"


def is_caption(copy: Copy, pictures: Set[Path]) -> bool:
    """Return whether a copied file is the caption of one of the pictures, named without their extensions."""
    return copy.kind == "other" and copy.path.suffix in CAPTIONS and copy.path.with_suffix("") in pictures


if __name__ == "__main__":
    run_script(main)
