"""From datasets to records: which pictures there are, their captions, masks, buckets and repeats."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from library.config.dataset import DatasetConfig, DatasetOptions, SubsetOptions
from library.config.dataset_file import load_datasets
from library.config.train import TrainConfig
from library.data import buckets
from library.data.buckets import Placement, Size
from library.data.images import Mask, UnreadablePictureError, load_picture, read_size
from library.data.sources import MOST_NAMED, Listed, find_masks, list_subset
from library.errors import UserError
from library.files import PICTURE_SUFFIXES
from library.randomness import random_for

logger = logging.getLogger(__name__)
T = TypeVar("T")

NUM_THREADS = 8  # for reading headers and files: mostly waiting for the disk
LEAST_SIDE = 8  # pixels of a picture: one latent
MOST_TIMES_BUCKET = 32  # a resized picture's area, in areas of its bucket
SAME_RATIO = 0.01  # by which the aspect ratios of a picture and its mask may differ


@dataclasses.dataclass(frozen=True)
class ImageRecord:
    """One picture of a dataset, placed in its bucket."""

    path: Path
    size: Size
    caption: str
    repeats: int
    subset: SubsetOptions
    placement: Placement
    tags: str = ""  # what tag statistics count
    mask: Mask | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that the pixels and the mask are read from."""
        return (self.path,) if self.mask is None else (self.path, self.mask.path)


@dataclasses.dataclass(frozen=True)
class TrainingSet:
    """One dataset, ready to be drawn from: its options, its records, and those held out for validation."""

    options: DatasetOptions
    records: tuple[ImageRecord, ...]
    held_out: tuple[ImageRecord, ...] = ()

    @property
    def all_records(self) -> tuple[ImageRecord, ...]:
        """All pictures, trained on or held out."""
        return self.records + self.held_out

    def num_images(self, *, is_reg: bool) -> int:
        """Return the number of draws in an epoch, repeats included."""
        return sum(record.repeats for record in self.records if record.subset.is_reg == is_reg)


def load_sets(config: TrainConfig) -> list[TrainingSet]:
    """Return the pictures to train on; none where it is open which, as `check` tells."""
    data = config.data
    if data.dataset_config is not None:
        is_told = data.dataset_config.is_file()
    else:
        folder = data.train_data_dir or (data.in_json and data.in_json.parent)
        is_told = folder is not None and folder.is_dir() and config.dataset.resolution is not None
    if not is_told:
        return []
    return build_training_sets(
        load_datasets(data, config.dataset, config.subset),
        latents_cached=config.precision.cache_latents,
        masked_loss=config.loss.masked_loss,
        seed=config.run.seed,
    )


def build_training_sets(
    datasets: list[DatasetConfig], *, latents_cached: bool, masked_loss: bool = False, seed: int | None = None
) -> list[TrainingSet]:
    """Return the datasets with their records; reads headers and captions, no pixels.

    seed serves datasets that hold pictures out and have no validation_seed. Raises UserError that lists folders
    that are not there, pictures whose header cannot be read, and options that contradict each other.
    """
    subsets = [subset for dataset in datasets for subset in dataset.subsets]
    problems = [problem for subset in subsets for problem in subset_problems(subset, latents_cached, masked_loss)]
    if masked_loss and not any(subset.alpha_mask or subset.conditioning_data_dir for subset in subsets):
        problems.append("--masked_loss needs masks: conditioning_data_dir of a subset, or --alpha_mask")
    if problems:
        raise UserError("\n".join(problems))
    listed = [[list_subset(subset) for subset in dataset.subsets] for dataset in datasets]
    masks = [[find_masks(entries) for entries in found] for found in listed]
    pictures = {entry.path for found in listed for entries in found for entry in entries}
    sizes = read_sizes(pictures | {mask.path for found in masks for of_subset in found for mask in of_subset.values()})
    held_out = split_validation(datasets, listed, seed)
    sets = [
        _build(dataset, found, masks=found_masks, sizes=sizes, held_out=held_out)
        for dataset, found, found_masks in zip(datasets, listed, masks, strict=True)
    ]
    sets = [entry for entry in sets if entry.all_records]
    if not any(entry.num_images(is_reg=False) for entry in sets):
        sources = ", ".join(str(subset.source) for subset in subsets)
        if held_out:
            raise UserError(f"validation_split holds out all {len(held_out)} pictures in {sources}: lower it")
        raise UserError(f"no pictures ({', '.join(PICTURE_SUFFIXES)}) in {sources}")
    return sets


def subset_problems(subset: SubsetOptions, latents_cached: bool, masked_loss: bool) -> list[str]:
    """Return what is wrong with the options of a subset; warn of what goes unused."""
    problems = []
    if subset.image_dir is not None and not subset.image_dir.is_dir():
        problems.append(f"image_dir {subset.image_dir} is not a folder")
    if subset.metadata_file is not None and not subset.metadata_file.is_file():
        problems.append(f"metadata_file {subset.metadata_file} is not a file")
    for name in ("color_aug", "random_crop"):
        if latents_cached and getattr(subset, name):
            problems.append(f"{name} of {subset.source} needs pixels in every step: leave out it or --cache_latents")
    if latents_cached and subset.face_crop_aug_range:
        logger.warning("face_crop_aug_range of %s goes unused: the latents are cached", subset.source)
    folder = subset.conditioning_data_dir
    if folder is not None and not masked_loss:
        problems.append(f"conditioning_data_dir {folder} holds masks for the loss: add --masked_loss")
    if folder is not None and not folder.is_dir():
        problems.append(f"conditioning_data_dir {folder} is not a folder")
    return problems


def split_validation(datasets: list[DatasetConfig], listed: list[list[list[Listed]]], seed: int | None) -> set[Path]:
    """Return the pictures that are held out, as whole paths: of each subset its share, chosen by a shuffle of its own.

    A picture that one subset holds out is trained on in none. Regularisation pictures are never held out.
    """
    held_out: set[Path] = set()
    for dataset, found in zip(datasets, listed, strict=True):
        chosen = dataset.options.validation_seed if dataset.options.validation_seed is not None else seed or 0
        for entries in found:
            paths = sorted({entry.path.resolve() for entry in entries if not entry.subset.is_reg})
            share = entries[0].subset.validation_split if paths else 0
            number = round(len(paths) * share)
            if share and not number:
                logger.warning("validation_split %g of %d pictures is none: nothing is held out", share, len(paths))
            random_for(chosen, "validation").shuffle(paths)
            held_out.update(paths[len(paths) - number :])
    return held_out


def read_sizes(paths: set[Path]) -> dict[Path, Size]:
    """Return path -> (width, height) from the headers; raises UserError that lists all that fail."""
    ordered = sorted(paths)
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        results = list(pool.map(lambda path: _or_error(read_size, path), ordered))
    return dict(zip(ordered, raise_for_unreadable(ordered, results), strict=True))


def verify_pictures(sets: list[TrainingSet]) -> None:
    """Decode every picture and mask once, so that one that cannot be read is reported before training starts."""
    from tqdm import tqdm

    records = [record for entry in sets for record in entry.all_records]
    paths = sorted({path for record in records for path in record.files})
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        checks = pool.map(lambda path: _or_error(lambda p: load_picture(p).shape, path), paths)
        results = list(tqdm(checks, total=len(paths), desc="checking pictures", unit="picture"))
    raise_for_unreadable(paths, results)


def _or_error(read: Callable[[Path], T], path: Path) -> T | UnreadablePictureError:
    try:
        return read(path)
    except UnreadablePictureError as error:
        return error


def raise_for_unreadable(paths: Sequence[Path], results: Sequence[T | UnreadablePictureError]) -> list[T]:
    """Return results, or raise one UserError that lists every path whose result is an UnreadablePictureError."""
    read, failed = [], []
    for path, result in zip(paths, results, strict=True):
        if isinstance(result, UnreadablePictureError):
            failed.append(f"  {path}: {result}")
        else:
            read.append(result)
    if failed:
        raise UserError(
            "\n".join([f"{len(failed)} of {len(paths)} pictures cannot be read; mend or remove them:", *failed])
        )
    return read


def _build(
    dataset: DatasetConfig,
    found: list[list[Listed]],
    *,
    masks: list[dict[Path, Mask]],
    sizes: dict[Path, Size],
    held_out: set[Path],
) -> TrainingSet:
    for subset, entries in zip(dataset.subsets, found, strict=True):
        if not entries:
            logger.warning("%s has no pictures; it is skipped", subset.source)
    listed = [entry for entries in found for entry in entries]
    mask_of = {
        (subset.source, path): mask
        for subset, of_subset in zip(dataset.subsets, masks, strict=True)
        for path, mask in of_subset.items()
    }
    training = [entry for entry in listed if not entry.subset.is_reg and entry.path.resolve() not in held_out]
    num_training = sum(entry.subset.num_repeats for entry in training)
    regularisation = regularisation_repeats([entry for entry in listed if entry.subset.is_reg], num_training)

    def record(entry: Listed, repeats: int, subset: SubsetOptions) -> ImageRecord:
        size = sizes[entry.path]
        placement = place_picture(size, dataset.options)
        mask = mask_of.get((entry.subset.source, entry.path))
        return ImageRecord(entry.path, size, entry.caption, repeats, subset, placement, entry.tags, mask)

    repeated = [(entry, entry.subset.num_repeats) for entry in training] + regularisation
    records = [record(entry, repeats, entry.subset) for entry, repeats in repeated]
    validation = [
        record(entry, 1, as_they_are(entry.subset))
        for entry in listed
        if entry.path.resolve() in held_out and entry.subset.validation_split and not entry.subset.is_reg
    ]
    _check_shapes(records + validation)
    _check_masks(records + validation, sizes)
    _warn_without_caption([entry for entry in records if not entry.caption])
    return TrainingSet(dataset.options, tuple(records), tuple(validation))


def as_they_are(subset: SubsetOptions) -> SubsetOptions:
    """Return the options for validation: pictures and captions are not varied."""
    return dataclasses.replace(
        subset,
        num_repeats=1,
        flip_aug=False,
        color_aug=False,
        random_crop=False,
        face_crop_aug_range=None,
        shuffle_caption=False,
        caption_dropout_rate=0.0,
        caption_dropout_every_n_epochs=0,
        caption_tag_dropout_rate=0.0,
        token_warmup_step=0.0,
    )


def _check_masks(records: list[ImageRecord], sizes: dict[Path, Size]) -> None:
    """Raise UserError for masks of another shape than their picture."""
    others = []
    for record in records:
        if record.mask is not None:
            (width, height), mask = record.size, sizes[record.mask.path]
            if abs(mask[0] / mask[1] * height / width - 1) > SAME_RATIO:
                others.append(f"  {record.mask.path}: {mask[0]}x{mask[1]}, the picture is {width}x{height}")
    if others:
        raise UserError("\n".join([f"{len(others)} masks have another aspect ratio than their picture:", *others]))


def _check_shapes(records: list[ImageRecord]) -> None:
    """Raise UserError for pictures so small or so long that covering a bucket would blow them up beyond measure."""
    small = [
        f"  {record.path}: {record.size[0]}x{record.size[1]}" for record in records if min(record.size) < LEAST_SIDE
    ]
    if small:
        raise UserError(
            "\n".join([f"{len(small)} pictures have a side of less than {LEAST_SIDE} pixels; remove them:", *small])
        )
    extreme = [
        f"  {record.path}: {record.size[0]}x{record.size[1]}"
        for record in records
        if math.prod(record.placement.resized) > MOST_TIMES_BUCKET * math.prod(record.placement.bucket)
    ]
    if extreme:
        raise UserError("\n".join([f"{len(extreme)} pictures are too long and narrow; crop or remove them:", *extreme]))


def regularisation_repeats(found: list[Listed], num_training: int) -> list[tuple[Listed, int]]:
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
