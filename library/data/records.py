"""From datasets to records: which pictures there are, their captions, masks, buckets and repeats."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from library.config.dataset import DataConfig, DatasetConfig, DatasetOptions, SubsetOptions
from library.config.dataset_file import read_datasets
from library.config.train import TrainConfig
from library.data import buckets
from library.data.buckets import Placement, Size
from library.data.captions import Caption
from library.data.faults import Faults, Notes
from library.data.images import Frame, Header, Mask, fit, fit_mask, load_picture
from library.data.picture_checks import check_mask, check_shape, decode_pictures, note_losses, read_headers
from library.data.sources import Listed, list_subset
from library.data.surroundings import check_layout, note_unused
from library.errors import Problems, UserError
from library.files import PICTURE_SUFFIXES
from library.randomness import random_for

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ImageRecord:
    """One picture of a dataset, placed in its bucket."""

    path: Path
    size: Size
    caption: Caption
    repeats: int
    subset: SubsetOptions
    placement: Placement
    tags: tuple[str, ...] = ()  # texts of which tag statistics count the tags
    mask: Mask | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that the pixels and the mask are read from."""
        return (self.path,) if self.mask is None else (self.path, self.mask.path)

    def read(self, frame: Frame) -> tuple[np.ndarray, np.ndarray | None]:
        """Return pixels of a frame, uint8 (H, W, 3), and its loss mask, float32 (H/8, W/8), or None.

        Raises UnreadablePictureError.
        """
        pixels = fit(load_picture(self.path), frame, self.subset.resize_interpolation)
        return pixels, None if self.mask is None else fit_mask(self.mask.load(), frame)

    def unvaried(self) -> ImageRecord:
        """Return the record for validation: one repeat, without augmentation of picture and caption."""
        subset = dataclasses.replace(
            self.subset,
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
        return dataclasses.replace(self, repeats=1, subset=subset)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One dataset, ready to be sampled: its options, its records, and those held out for validation."""

    options: DatasetOptions
    records: tuple[ImageRecord, ...]
    held_out: tuple[ImageRecord, ...] = ()
    place: str = ""  # in the dataset file, for messages; empty if the options are the command line's

    @property
    def all_records(self) -> tuple[ImageRecord, ...]:
        """All pictures, trained on or held out."""
        return self.records + self.held_out

    @property
    def validation(self) -> Dataset:
        """The held-out pictures as a dataset."""
        return Dataset(self.options, self.held_out, place=self.place)

    def num_images(self, *, is_reg: bool) -> int:
        """Return the number of samples in an epoch, repeats included."""
        return sum(record.repeats for record in self.records if record.subset.is_reg == is_reg)


def all_records(datasets: Sequence[Dataset]) -> list[ImageRecord]:
    """Return all pictures of all datasets, trained on or held out."""
    return [record for dataset in datasets for record in dataset.all_records]


def subsets_of(datasets: Sequence[Dataset]) -> list[tuple[DatasetOptions, SubsetOptions]]:
    """Return every subset that has pictures, with the options of its dataset."""
    return [
        (dataset.options, subset)
        for dataset in datasets
        for subset in {id(record.subset): record.subset for record in dataset.all_records}.values()
    ]


def load_datasets(config: TrainConfig) -> list[Dataset]:
    """Return the datasets; [] if the options do not say which, which `check` reports."""
    data = config.data
    if data.dataset_config is not None:
        is_known = data.dataset_config.is_file()
    else:
        folder = data.train_data_dir or (data.in_json and data.in_json.parent)
        is_known = folder is not None and folder.is_dir() and config.dataset.resolution is not None
    if not is_known:
        return []
    return build_datasets(
        find_datasets(data, config.dataset, config.subset),
        latents_cached=config.precision.cache_latents,
        masked_loss=config.loss.masked_loss,
        seed=config.run.seed,
    )


def find_datasets(data: DataConfig, dataset: DatasetOptions, subset: SubsetOptions) -> list[DatasetConfig]:
    """Return the datasets of a run with all values looked up; raises UserError if there is nothing to train on."""
    if data.dataset_config is None and data.in_json is None:
        problems, notes = Problems(), Notes()
        check_layout(data, problems, notes)
        notes.log()
        problems.raise_if_any()
    return read_datasets(data, dataset, subset)


def build_datasets(
    configs: Sequence[DatasetConfig], *, latents_cached: bool, masked_loss: bool = False, seed: int | None = None
) -> list[Dataset]:
    """Return the datasets with their records; reads headers and captions, and pixels only if something is wrong.

    seed is for datasets without a validation_seed. Raises UserError that lists all missing folders, options that
    contradict each other, and pictures, masks and captions that cannot be used.
    """
    subsets = [subset for config in configs for subset in config.subsets]
    problems, faults, notes = Problems(), Faults(), Notes()
    for subset in subsets:
        check_subset(subset, problems, latents_cached=latents_cached, masked_loss=masked_loss)
    if masked_loss and not any(subset.alpha_mask or subset.conditioning_data_dir for subset in subsets):
        problems.add("--masked_loss needs masks: conditioning_data_dir of a subset, or --alpha_mask")
    found = [
        [
            (problems.run(list_subset, subset, faults, notes) or []) if is_there(subset) else []
            for subset in config.subsets
        ]
        for config in configs
    ]
    pictures = [listed for of_dataset in found for of_subset in of_dataset for listed in of_subset]
    headers = check_pictures(configs, found, faults)
    note_losses(pictures, headers, notes)
    if not faults and not problems:  # else pictures could go unused because of them
        note_unused(subsets, pictures, notes)
    notes.log()
    faults.report(problems)
    problems.raise_if_any()

    sizes = {path: header.size for path, header in headers.items()}
    held_out = split_validation(configs, found, seed)
    built = (build_dataset(config, of, sizes, held_out) for config, of in zip(configs, found, strict=True))
    datasets = [dataset for dataset in built if dataset.all_records]
    if not any(dataset.num_images(is_reg=False) for dataset in datasets):
        sources = ", ".join(str(subset.source) for subset in subsets)
        if held_out:
            raise UserError(f"validation_split holds out all {len(held_out)} pictures in {sources}: lower it")
        raise UserError(f"no pictures ({', '.join(PICTURE_SUFFIXES)}) in {sources}")
    return datasets


def check_pictures(
    configs: Sequence[DatasetConfig], found: Sequence[Sequence[Sequence[Listed]]], faults: Faults
) -> dict[Path, Header]:
    """Return the headers of all pictures and masks that can be read; what is wrong with the others is added to faults.

    Where anything is wrong, pictures are decoded as well, so that those that are cut short are in the same list.
    """
    files = {path for of_dataset in found for listed in chain.from_iterable(of_dataset) for path in listed.files}
    headers = read_headers(files, faults)
    sizes = {path: header.size for path, header in headers.items()}
    for config, of_dataset in zip(configs, found, strict=True):
        for listed in chain.from_iterable(of_dataset):
            if listed.path in sizes:
                check_shape(listed, sizes[listed.path], place_picture(sizes[listed.path], config.options), faults)
                check_mask(listed, sizes, faults)
    if faults:
        decode_pictures(headers, len(files), faults)
    return headers


def is_there(subset: SubsetOptions) -> bool:
    """Return whether the folder or the metadata file of a subset, and the folder of its masks, can be read."""
    folders = [folder for folder in (subset.image_dir, subset.conditioning_data_dir) if folder is not None]
    file = subset.metadata_file
    return all(folder.is_dir() for folder in folders) and (file is None or file.is_file())


def check_subset(subset: SubsetOptions, problems: Problems, *, latents_cached: bool, masked_loss: bool) -> None:
    """Add what is wrong with the options of a subset to problems; warn of unused options."""
    if subset.image_dir is not None and not subset.image_dir.is_dir():
        problems.add(f"image_dir {subset.image_dir} is not a folder")
    if subset.metadata_file is not None and not subset.metadata_file.is_file():
        problems.add(f"metadata_file {subset.metadata_file} is not a file")
    for name in ("color_aug", "random_crop"):
        if latents_cached and getattr(subset, name):
            problems.add(
                f"{name} of {subset.source} needs pixels in every step, and --cache_latents keeps none: "
                "leave out one of the two"
            )
    if latents_cached and subset.face_crop_aug_range:
        logger.warning("face_crop_aug_range of %s goes unused: the latents are cached", subset.source)
    folder = subset.conditioning_data_dir
    if folder is not None and not masked_loss:
        problems.add(f"conditioning_data_dir {folder} holds masks for the loss: add --masked_loss")
    if folder is not None and not folder.is_dir():
        problems.add(f"conditioning_data_dir {folder} is not a folder")


def split_validation(
    configs: Sequence[DatasetConfig], found: Sequence[Sequence[Sequence[Listed]]], seed: int | None
) -> set[Path]:
    """Return the resolved paths of the held-out pictures: a share of each subset, chosen at random.

    found holds the pictures by dataset and subset. A picture that one subset holds out is trained on in none.
    Regularisation pictures are never held out.
    """
    held_out: set[Path] = set()
    for config, of_dataset in zip(configs, found, strict=True):
        chosen = config.options.validation_seed if config.options.validation_seed is not None else seed or 0
        for subset, listed in zip(config.subsets, of_dataset, strict=True):
            if not subset.is_reg:
                held_out |= share_of({picture.path.resolve() for picture in listed}, subset.validation_split, chosen)
    return held_out


def share_of(paths: set[Path], share: float, seed: int) -> set[Path]:
    """Return a share (0 to 1) of the paths, which depends only on the seed; warns if the share rounds to none."""
    number = round(len(paths) * share)
    if paths and share and not number:
        logger.warning("validation_split %g of %d pictures is none: nothing is held out", share, len(paths))
    shuffled = sorted(paths)
    random_for(seed, "validation").shuffle(shuffled)
    return set(shuffled[len(paths) - number :])


def verify_pictures(datasets: Sequence[Dataset]) -> None:
    """Decode every picture and mask once, so that one that cannot be read is reported before training starts."""
    faults = Faults()
    files = {path for record in all_records(datasets) for path in record.files}
    decode_pictures(files, len(files), faults)
    faults.raise_if_any()


def build_dataset(
    config: DatasetConfig, found: Sequence[Sequence[Listed]], sizes: Mapping[Path, Size], held_out: set[Path]
) -> Dataset:
    """Return the dataset of the pictures in each subset; sizes are (width, height) of pictures and masks."""
    pictures = [listed for listed in chain.from_iterable(found) if not listed.subset.is_reg]
    regularisation = [listed for listed in chain.from_iterable(found) if listed.subset.is_reg]
    trained = [(listed, listed.subset.num_repeats) for listed in pictures if listed.path.resolve() not in held_out]
    trained += regularisation_repeats(regularisation, sum(repeats for _, repeats in trained))
    split = [listed for listed in pictures if listed.subset.validation_split and listed.path.resolve() in held_out]
    records = tuple(record_of(listed, repeats, sizes, config.options) for listed, repeats in trained)
    validation = tuple(record_of(listed, 1, sizes, config.options).unvaried() for listed in split)
    return Dataset(config.options, records, validation, config.place)


def record_of(listed: Listed, repeats: int, sizes: Mapping[Path, Size], options: DatasetOptions) -> ImageRecord:
    """Return the record of a listed picture, placed in its bucket."""
    path, subset, caption, tags, mask = listed
    placement = place_picture(sizes[path], options)
    return ImageRecord(path, sizes[path], caption, repeats, subset, placement, tags, mask)


def regularisation_repeats(found: Sequence[Listed], num_training: int) -> list[tuple[Listed, int]]:
    """Return the regularisation pictures in use with their repeats.

    They are used in order, with their own repeats, until there are as many as training pictures; the others are
    unused. If there are too few, they get one more repeat each, in turn.
    """
    repeats = [0] * len(found)
    count = 0
    for index, listed in enumerate(found):
        if count >= num_training:
            logger.warning("%d regularisation pictures go unused: there are enough", len(found) - index)
            break
        repeats[index] = listed.subset.num_repeats
        count += repeats[index]
    for index in range(num_training - count if found else 0):
        repeats[index % len(found)] += 1
    return [(listed, number) for listed, number in zip(found, repeats, strict=True) if number]


def place_picture(size: Size, options: DatasetOptions) -> Placement:
    """Return the placement of a picture of a size with the options of its dataset."""
    if not options.enable_bucket:
        return buckets.place(size, [options.size])
    if options.bucket_no_upscale:
        return buckets.place_without_upscale(size, options.size, options.bucket_reso_steps)
    return buckets.place(size, candidates(options))


def candidates(options: DatasetOptions) -> list[Size]:
    """Return the bucket resolutions of a dataset."""
    step = options.bucket_reso_steps
    shortest, longest = buckets.adjusted_range(options.min_bucket_reso, options.longest_side, step)
    return buckets.bucket_resolutions(options.size, shortest=shortest, longest=longest, step=step)
