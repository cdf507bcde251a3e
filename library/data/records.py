"""From datasets to records: which pictures there are, their captions, masks, buckets and repeats."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from library.config.dataset import DataConfig, DatasetConfig, DatasetOptions, SubsetOptions
from library.config.dataset_file import read_datasets
from library.config.kinds import why_not
from library.config.train import TrainConfig
from library.data import buckets
from library.data.buckets import Placement, Size
from library.data.captions import Caption
from library.data.faults import Faults, Notes
from library.data.images import Frame, Header, Mask, fit, fit_mask, load_picture
from library.data.picture_checks import check_mask, check_shape, decode_pictures, note_losses, read_headers
from library.data.picture_index import DEFAULT_INDEX, PictureIndex, index_for
from library.data.sources import Listed, list_subset
from library.data.surroundings import check_layout, note_unused
from library.errors import Problems, UserError
from library.files import PICTURE_SUFFIXES
from library.randomness import random_for

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class ImageRecord:
    """One picture of a dataset, placed in its bucket.

    There can be very many: what several have in common is one object, and the file is text, a third of a Path.
    """

    file: str
    size: Size
    caption: Caption
    repeats: int
    subset: SubsetOptions
    placement: Placement
    tags: tuple[str, ...] = ()  # texts of which tag statistics count the tags
    mask: Mask | None = None

    @property
    def path(self) -> Path:
        """The file of the picture."""
        return Path(self.file)

    @property
    def files(self) -> tuple[str, ...]:
        """The files that the pixels and the mask are read from."""
        return (self.file,) if self.mask is None else (self.file, self.mask.file)

    def read(self, frame: Frame) -> tuple[np.ndarray, np.ndarray | None]:
        """Return pixels of a frame, uint8 (H, W, 3), and its loss mask, float32 (H/8, W/8), or None.

        Raises UnreadablePictureError.
        """
        pixels = fit(load_picture(self.path), frame, self.subset.resize_interpolation)
        return pixels, None if self.mask is None else fit_mask(self.mask.load(), frame)


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

    @property
    def num_draws(self) -> int:
        """The number of samples in an epoch, of all kinds."""
        return sum(record.repeats for record in self.records)

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


def unvaried(records: Iterable[ImageRecord]) -> tuple[ImageRecord, ...]:
    """Return records for validation: one repeat, without augmentation of pictures and captions."""
    by_id: dict[int, SubsetOptions] = {}
    found = []
    for record in records:
        subset = record.subset
        if id(subset) not in by_id:
            by_id[id(subset)] = dataclasses.replace(
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
        found.append(dataclasses.replace(record, repeats=1, subset=by_id[id(subset)]))
    return tuple(found)


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
        index=index_for(data),
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
    configs: Sequence[DatasetConfig],
    *,
    latents_cached: bool,
    masked_loss: bool = False,
    seed: int | None = None,
    index: PictureIndex = DEFAULT_INDEX,
) -> list[Dataset]:
    """Return the datasets with their records; reads captions, headers that the index does not know, and pixels only if
    something is wrong.

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
    headers = check_pictures(configs, found, index, faults)
    note_losses(pictures, headers, notes)
    if not faults and not problems:  # else pictures could go unused because of them
        note_unused(subsets, pictures, notes)
    notes.log()
    faults.report(problems)
    problems.raise_if_any()

    held_out = split_validation(configs, found, seed)
    built = (build_dataset(config, of, headers, held_out) for config, of in zip(configs, found, strict=True))
    datasets = [dataset for dataset in built if dataset.all_records]
    if not any(dataset.num_images(is_reg=False) for dataset in datasets):
        sources = ", ".join(str(subset.source) for subset in subsets)
        if held_out:
            raise UserError(f"validation_split holds out all {len(held_out)} pictures in {sources}: lower it")
        raise UserError(f"no pictures ({', '.join(PICTURE_SUFFIXES)}) in {sources}")
    return datasets


def check_pictures(
    configs: Sequence[DatasetConfig],
    found: Sequence[Sequence[Sequence[Listed]]],
    index: PictureIndex,
    faults: Faults,
) -> dict[str, Header]:
    """Return the headers of all pictures and masks that can be read; what is wrong with the others is added to faults.

    Where anything is wrong, pictures are decoded as well, so that those that are cut short are in the same list.
    """

    def files() -> Iterator[str]:
        for of_dataset in found:
            for listed in chain.from_iterable(of_dataset):
                yield from listed.files

    headers = read_headers(files(), index, faults)
    for config, of_dataset in zip(configs, found, strict=True):
        place = placing(config.options)
        for listed in chain.from_iterable(of_dataset):
            if listed.file in headers:
                size = headers[listed.file].size
                check_shape(listed, size, place(size), faults)
                check_mask(listed, headers, faults)
    if faults:
        decode_pictures(headers, index, len(set(files())), faults)
    return headers


def is_there(subset: SubsetOptions) -> bool:
    """Return whether the folder or the metadata file of a subset, and the folder of its masks, can be read."""
    folders = [folder for folder in (subset.image_dir, subset.conditioning_data_dir) if folder is not None]
    file = subset.metadata_file
    return all(folder.is_dir() for folder in folders) and (file is None or file.is_file())


def check_subset(subset: SubsetOptions, problems: Problems, *, latents_cached: bool, masked_loss: bool) -> None:
    """Add what is wrong with the options of a subset to problems; warn of unused options."""
    if subset.image_dir is not None and not subset.image_dir.is_dir():
        problems.add(f"image_dir {why_not(subset.image_dir, 'a folder')}")
    if subset.metadata_file is not None and not subset.metadata_file.is_file():
        problems.add(f"metadata_file {why_not(subset.metadata_file, 'a file')}")
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
        problems.add(f"conditioning_data_dir {why_not(folder, 'a folder')}")


def split_validation(
    configs: Sequence[DatasetConfig], found: Sequence[Sequence[Sequence[Listed]]], seed: int | None
) -> set[str]:
    """Return the real paths of the held-out pictures: a share of each subset, chosen at random.

    found holds the pictures by dataset and subset. A picture that one subset holds out is trained on in none.
    Regularisation pictures are never held out.
    """
    held_out: set[str] = set()
    for config, of_dataset in zip(configs, found, strict=True):
        chosen = config.options.validation_seed if config.options.validation_seed is not None else seed or 0
        for subset, listed in zip(config.subsets, of_dataset, strict=True):
            if subset.validation_split and not subset.is_reg:
                held_out |= share_of({real_file(picture.file) for picture in listed}, subset.validation_split, chosen)
    return held_out


def real_file(file: str) -> str:
    """Return the absolute path of a file, without symbolic links."""
    path = Path(file)
    return str(path.resolve() if path.is_symlink() else real_folder(path.parent) / path.name)


@functools.lru_cache(maxsize=1024)
def real_folder(folder: Path) -> Path:
    """Return the absolute path of a folder, without symbolic links."""
    return folder.resolve()


def share_of(files: set[str], share: float, seed: int) -> set[str]:
    """Return a share (0 to 1) of the files, which depends only on the seed; warns if the share rounds to none."""
    number = round(len(files) * share)
    if files and share and not number:
        logger.warning("validation_split %g of %d pictures is none: nothing is held out", share, len(files))
    shuffled = sorted(files, key=Path)
    random_for(seed, "validation").shuffle(shuffled)
    return set(shuffled[len(files) - number :])


def verify_pictures(datasets: Sequence[Dataset], index: PictureIndex = DEFAULT_INDEX) -> None:
    """Decode every picture and mask that the index does not know as readable, so that one that is damaged is reported
    before training starts.
    """
    faults = Faults()
    files = {file for record in all_records(datasets) for file in record.files}
    decode_pictures(files, index, len(files), faults)
    faults.raise_if_any()


def build_dataset(
    config: DatasetConfig, found: Sequence[Sequence[Listed]], headers: Mapping[str, Header], held_out: set[str]
) -> Dataset:
    """Return the dataset of the pictures in each subset; held_out holds real paths."""
    pictures = [listed for listed in chain.from_iterable(found) if not listed.subset.is_reg]
    regularisation = [listed for listed in chain.from_iterable(found) if listed.subset.is_reg]
    measured = {listed.file for listed in pictures if real_file(listed.file) in held_out} if held_out else set[str]()
    trained = [(listed, listed.subset.num_repeats) for listed in pictures if listed.file not in measured]
    trained += regularisation_repeats(regularisation, sum(repeats for _, repeats in trained))
    split = [listed for listed in pictures if listed.subset.validation_split and listed.file in measured]
    place = placing(config.options)

    def record_of(listed: Listed, repeats: int) -> ImageRecord:
        file, subset, caption, tags, mask = listed
        size = headers[file].size
        return ImageRecord(file, size, caption, repeats, subset, place(size), tags, mask)

    records = tuple(record_of(listed, repeats) for listed, repeats in trained)
    validation = unvaried(record_of(listed, 1) for listed in split)
    return Dataset(config.options, records, validation, config.place)


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


def placing(options: DatasetOptions) -> Callable[[Size], Placement]:
    """Return a function from the size of a picture to its placement in a dataset; equal ones are one object."""
    if options.enable_bucket and options.bucket_no_upscale:
        return functools.cache(
            lambda size: buckets.place_without_upscale(size, options.size, options.bucket_reso_steps)
        )
    sizes = candidates(options) if options.enable_bucket else [options.size]
    return functools.cache(lambda size: buckets.place(size, sizes))


def candidates(options: DatasetOptions) -> list[Size]:
    """Return the bucket resolutions of a dataset."""
    step = options.bucket_reso_steps
    shortest, longest = buckets.adjusted_range(options.min_bucket_reso, options.longest_side, step)
    return buckets.bucket_resolutions(options.size, shortest=shortest, longest=longest, step=step)
