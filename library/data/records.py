"""From folders to records: which pictures there are, their captions, buckets and repeats."""

from __future__ import annotations

import dataclasses
import logging
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from library.config.dataset import DatasetConfig, DatasetOptions, SubsetOptions
from library.data import buckets
from library.data.buckets import Placement, Size
from library.data.captions import read_caption
from library.data.images import UnreadablePictureError, list_pictures, load_picture, read_size
from library.errors import UserError

logger = logging.getLogger(__name__)

NUM_THREADS = 8  # for reading headers and files: mostly waiting for the disk
MOST_TIMES_BUCKET = 32  # a resized picture's area, in areas of its bucket
MOST_NAMED = 5  # pictures named in a warning


@dataclasses.dataclass(frozen=True)
class ImageRecord:
    """One picture of a dataset, placed in its bucket."""

    path: Path
    size: Size
    caption: str
    repeats: int
    subset: SubsetOptions
    placement: Placement


@dataclasses.dataclass(frozen=True)
class TrainingSet:
    """One dataset, ready to be drawn from: its options and its records."""

    options: DatasetOptions
    records: tuple[ImageRecord, ...]

    def num_images(self, *, is_reg: bool) -> int:
        """Return the number of draws in an epoch, repeats included."""
        return sum(record.repeats for record in self.records if record.subset.is_reg == is_reg)


@dataclasses.dataclass(frozen=True)
class _Found:
    path: Path
    size: Size
    subset: SubsetOptions


def build_training_sets(datasets: list[DatasetConfig], *, latents_cached: bool) -> list[TrainingSet]:
    """Return the datasets with their records; reads headers and captions, no pixels.

    Raises UserError for folders that are not there, pictures whose header cannot be read, and options that
    cached latents cannot honour.
    """
    subsets = [subset for dataset in datasets for subset in dataset.subsets]
    for subset in subsets:
        _check_subset(subset, latents_cached=latents_cached)
    sizes = read_sizes({path for subset in subsets for path in list_pictures(subset.image_dir)})
    sets = [_build(dataset, sizes) for dataset in datasets]
    sets = [entry for entry in sets if entry.records]
    if not any(entry.num_images(is_reg=False) for entry in sets):
        raise UserError(f"no pictures in {', '.join(str(subset.image_dir) for subset in subsets)}")
    return sets


def _check_subset(subset: SubsetOptions, *, latents_cached: bool) -> None:
    if not subset.image_dir.is_dir():
        raise UserError(f"image_dir {subset.image_dir} is not a folder")
    for name in ("color_aug", "random_crop"):
        if latents_cached and getattr(subset, name):
            raise UserError(f"{name} of {subset.image_dir} needs pixels in every step: leave out it or --cache_latents")


def read_sizes(paths: set[Path]) -> dict[Path, Size]:
    """Return path -> (width, height) from the headers; raises UserError that lists all that fail."""
    ordered = sorted(paths)
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        results = list(pool.map(lambda path: _or_error(read_size, path), ordered))
    return dict(zip(ordered, raise_for_unreadable(ordered, results), strict=True))


def verify_pictures(sets: list[TrainingSet]) -> None:
    """Decode every picture once, so that one that cannot be read is told before training, not in its midst."""
    from tqdm import tqdm

    paths = sorted({record.path for entry in sets for record in entry.records})
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        checks = pool.map(lambda path: _or_error(lambda p: load_picture(p).shape, path), paths)
        results = list(tqdm(checks, total=len(paths), desc="checking pictures", unit="picture"))
    raise_for_unreadable(paths, results)


def _or_error(read: object, path: Path) -> object:
    try:
        return read(path)
    except UnreadablePictureError as error:
        return error


def raise_for_unreadable(paths: list[Path], results: list) -> list:
    """Return results, or raise one UserError that lists every path whose result is an UnreadablePictureError."""
    failed = [
        f"  {path}: {result}" for path, result in zip(paths, results, strict=True) if isinstance(result, Exception)
    ]
    if failed:
        raise UserError(
            "\n".join([f"{len(failed)} of {len(paths)} pictures cannot be read; mend or remove them:", *failed])
        )
    return results


def _build(dataset: DatasetConfig, sizes: dict[Path, Size]) -> TrainingSet:
    found = [
        _Found(path, sizes[path], subset) for subset in dataset.subsets for path in list_pictures(subset.image_dir)
    ]
    for subset in dataset.subsets:
        if not any(entry.subset is subset for entry in found):
            logger.warning("%s has no pictures; it is skipped", subset.image_dir)
    training = [(entry, entry.subset.num_repeats) for entry in found if not entry.subset.is_reg]
    num_training = sum(repeats for _, repeats in training)
    regularisation = regularisation_repeats([entry for entry in found if entry.subset.is_reg], num_training)
    records = []
    for entry, repeats in training + regularisation:
        caption = read_caption(entry.path, entry.subset)
        placement = place_picture(entry.size, dataset.options)
        records.append(ImageRecord(entry.path, entry.size, caption, repeats, entry.subset, placement))
    _check_shapes(records)
    _warn_without_caption([record for record in records if not record.caption])
    return TrainingSet(dataset.options, tuple(records))


def _check_shapes(records: list[ImageRecord]) -> None:
    """Raise UserError for pictures so long that covering a bucket would blow them up beyond measure."""
    extreme = [
        f"  {record.path}: {record.size[0]}x{record.size[1]}"
        for record in records
        if math.prod(record.placement.resized) > MOST_TIMES_BUCKET * math.prod(record.placement.bucket)
    ]
    if extreme:
        raise UserError("\n".join([f"{len(extreme)} pictures are too long and narrow; crop or remove them:", *extreme]))


def regularisation_repeats(found: list[_Found], num_training: int) -> list[tuple[_Found, int]]:
    """Return the regularisation pictures in use with their repeats.

    Each is taken with its own repeats, in order, until there are as many as training pictures; if they are
    too few, they get one more repeat each, in turn. The rest goes unused.
    """
    repeats = [0] * len(found)
    count = 0
    for index, entry in enumerate(found):
        if count >= num_training:
            logger.warning("%d regularisation pictures go unused: there are enough", len(found) - index)
            break
        repeats[index] = entry.subset.num_repeats
        count += repeats[index]
    position = 0
    while found and count < num_training:
        repeats[position % len(found)] += 1
        count, position = count + 1, position + 1
    return [(entry, number) for entry, number in zip(found, repeats, strict=True) if number]


def place_picture(size: Size, options: DatasetOptions) -> Placement:
    """Return where a picture of a size goes under the options of its dataset."""
    if not options.enable_bucket:
        return buckets.place(size, [options.resolution])
    if options.bucket_no_upscale:
        return buckets.place_without_upscale(size, options.resolution, options.bucket_reso_steps)
    return buckets.place(size, candidates(options))


def candidates(options: DatasetOptions) -> list[Size]:
    """Return the bucket resolutions of a dataset."""
    step = options.bucket_reso_steps
    shortest, longest = buckets.adjusted_range(options.min_bucket_reso, options.max_bucket_reso, step)
    return buckets.bucket_resolutions(options.resolution, shortest=shortest, longest=longest, step=step)


def _warn_without_caption(records: list[ImageRecord]) -> None:
    if records:
        names = ", ".join(record.path.name for record in records[:MOST_NAMED])
        more = f" and {len(records) - MOST_NAMED} more" if len(records) > MOST_NAMED else ""
        logger.warning(
            "%d pictures have an empty caption (no caption file, no class token): %s%s", len(records), names, more
        )
