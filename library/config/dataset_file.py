"""Reads the datasets of a run from `--dataset_config` (TOML or JSON) or from the folder layout `N_name`.

A value is looked up in the subset, its dataset, `[general]`, then on the command line. Keys and types are those
declared in `library.config.dataset`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.config import toml_text
from library.config.dataset import DataConfig, DatasetConfig, DatasetOptions, SubsetOptions
from library.config.options import Option, nearest, section_options
from library.errors import Problems, UserError, shown

logger = logging.getLogger(__name__)

# Keys of sd-scripts that have no effect.
IGNORED = {"cache_info": "picture sizes are read from the headers, in parallel"}

DATASET_KEYS = {key.field: key for key in section_options(DatasetOptions)}
SUBSET_KEYS = {key.field: key for key in section_options(SubsetOptions)}
ALL_KEYS = DATASET_KEYS | SUBSET_KEYS


def read_datasets(data: DataConfig, dataset: DatasetOptions, subset: SubsetOptions) -> list[DatasetConfig]:
    """Return the datasets of a run with all values looked up; dataset and subset hold the command line's values.

    Raises UserError if there is nothing to train on.
    """
    if data.dataset_config is not None:
        for name in ("train_data_dir", "reg_data_dir", "in_json"):
            if getattr(data, name) is not None:
                logger.warning("--%s is ignored: --dataset_config says where the pictures are", name)
        datasets = read_dataset_file(data.dataset_config, dataset, subset)
    else:
        datasets = [DatasetConfig(options=dataset, subsets=tuple(folder_subsets(data, subset)))]
    datasets = [dataclasses.replace(found, subsets=_usable_subsets(found.subsets)) for found in datasets]
    datasets = [found for found in datasets if found.subsets]
    if all(used.is_reg for found in datasets for used in found.subsets):
        source = data.dataset_config or f"{data.train_data_dir} (sub-folders are named like 10_name)"
        raise UserError(f"no subset to train on in {source}: one is needed with num_repeats of 1 or more, not is_reg")
    problems = Problems()
    for found in datasets:
        check_dataset(found.options, problems)
    problems.raise_if_any()
    return datasets


def read_dataset_file(path: Path, dataset: DatasetOptions, subset: SubsetOptions) -> list[DatasetConfig]:
    """Return the datasets of a definition file; dataset and subset supply the values that it omits."""
    table = _load(path)
    for key in [key for key in table if key not in ("datasets", "general")]:
        raise UserError(f"{path}: {key} is not known{nearest(key, ('datasets', 'general'))}")
    general = _expect_table(table.get("general", {}), f"{path}: general")
    _read_keys(general, "general", f"{path}: general")
    tables = table.get("datasets", [])
    if not isinstance(tables, list) or not tables:
        raise UserError(f"{path}: no [[datasets]] table, so there is nothing to train on")
    return [
        _read_dataset(each, general, dataset, subset, f"{path}: datasets[{index}]") for index, each in enumerate(tables)
    ]


def _load(path: Path) -> dict[str, Any]:
    suffix = path.suffix.lower()
    if suffix == ".toml":
        return toml_text.load(path)
    if suffix == ".json":
        return _expect_table(toml_text.load_json(path), str(path))
    raise UserError(f"--dataset_config must be a .toml or .json file, got {str(path)!r}")


def _read_dataset(
    value: Any, general: dict[str, Any], dataset: DatasetOptions, subset: SubsetOptions, place: str
) -> DatasetConfig:
    table = _expect_table(value, place)
    subset_tables = table.get("subsets", [])
    if not isinstance(subset_tables, list):
        raise UserError(f"{place}.subsets must be an array of tables, got {shown(subset_tables)}")
    own = _read_keys({key: value for key, value in table.items() if key != "subsets"}, "datasets", place)
    shared = _read_keys(general, "general", "general") | own
    options = dataclasses.replace(dataset, **{key: value for key, value in shared.items() if key in DATASET_KEYS})
    inherited = {key: value for key, value in shared.items() if key in SUBSET_KEYS}
    subsets = []
    for index, each in enumerate(subset_tables):
        where = f"{place}.subsets[{index}]"
        values = inherited | _read_keys(_expect_table(each, where), "subsets", where)
        if values.get("image_dir") is None and values.get("metadata_file") is None:
            raise UserError(f"{where}.image_dir is missing: the folder of the pictures")
        subsets.append(dataclasses.replace(subset, **values))
    return DatasetConfig(options=options, subsets=tuple(subsets))


def _read_keys(table: Mapping[str, Any], level: str, place: str) -> dict[str, Any]:
    """Return field -> typed value of the keys in a table; raises UserError for a key that does not belong there."""
    values = {}
    for key, value in table.items():
        if key in IGNORED:
            logger.warning("%s.%s is ignored: %s", place, key, IGNORED[key])
            continue
        values[key] = _known_key(key, level, place).read(value, f"{place}.{key}")
    return values


def _known_key(key: str, level: str, place: str) -> Option:
    option = ALL_KEYS.get(key)
    if option is None:
        known = [name for name, other in ALL_KEYS.items() if level in other.spec.levels]
        raise UserError(f"{place}.{key} is not known{nearest(key, known)}")
    if level not in option.spec.levels:
        levels = ", ".join(f"[{name}]" for name in option.spec.levels)
        raise UserError(f"{place}.{key} does not belong here: it is set in {levels}")
    return option


def _expect_table(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{place} must be a table, got {shown(value)}")
    return value


def folder_subsets(data: DataConfig, subset: SubsetOptions) -> list[SubsetOptions]:
    """Return a subset for each sub-folder `N_name` (N repeats, class token name), sorted by name.

    With --in_json the only subset is that of the pictures listed in the file.
    """
    if data.in_json is not None:
        if data.reg_data_dir is not None:
            logger.warning("--reg_data_dir is ignored: --in_json lists the pictures")
        return [dataclasses.replace(subset, image_dir=data.train_data_dir, metadata_file=data.in_json)]
    return [
        dataclasses.replace(
            subset,
            image_dir=folder,
            num_repeats=repeats,
            class_tokens=tokens,
            is_reg=is_reg,
            conditioning_data_dir=None if is_reg else _folder_of_masks(subset.conditioning_data_dir, folder),
        )
        for parent, is_reg in ((data.train_data_dir, False), (data.reg_data_dir, True))
        if parent is not None and parent.is_dir()
        for folder, repeats, tokens in _numbered_folders(parent)
    ]


def _folder_of_masks(parent: Path | None, folder: Path) -> Path | None:
    """Return the folder of a sub-folder's masks: the one of the same name, else the parent itself."""
    return parent / folder.name if parent is not None and (parent / folder.name).is_dir() else parent


def _numbered_folders(parent: Path) -> list[tuple[Path, int, str]]:
    found = []
    try:
        folders = sorted(path for path in parent.iterdir() if path.is_dir())
    except OSError as error:
        raise UserError(f"{parent} cannot be read ({error.strerror}); mend its permissions") from None
    for folder in folders:
        number, _, tokens = folder.name.partition("_")
        if number.isascii() and number.lstrip("-").isdigit():
            found.append((folder, SUBSET_KEYS["num_repeats"].read(number, f"{folder}: num_repeats"), tokens))
        else:
            logger.warning("%s is skipped: its name does not start with a number of repeats, as in 10_name", folder)
    return found


def _usable_subsets(subsets: tuple[SubsetOptions, ...]) -> tuple[SubsetOptions, ...]:
    usable: list[SubsetOptions] = []
    for subset in subsets:
        if subset.num_repeats < 1:
            logger.warning("%s is skipped: num_repeats is %d", subset.source, subset.num_repeats)
        elif any(subset.source == other.source for other in usable):
            logger.warning("%s is in one dataset twice; only the first is used", subset.source)
        else:
            usable.append(subset)
    return tuple(usable)


def check_dataset(options: DatasetOptions, problems: Problems) -> None:
    """Add wrong resolutions and bucket sizes of a dataset to problems."""
    if options.network_multiplier != 1.0:
        logger.warning(
            "network_multiplier %g has no effect, as in sd-scripts: the loss is measured at full strength",
            options.network_multiplier,
        )
    if options.resolution is None:
        problems.add("resolution is missing: give it in [general], [[datasets]] or as --resolution")
    elif options.enable_bucket:
        _check_buckets(options, problems)
    elif options.resolution[0] % 8 or options.resolution[1] % 8:
        problems.add(f"resolution must be a multiple of 8 without buckets, got {options.resolution}")


def _check_buckets(options: DatasetOptions, problems: Problems) -> None:
    shortest, longest = min(options.size), max(options.size)
    if options.bucket_reso_steps % 64:
        problems.add(f"bucket_reso_steps must be a multiple of 64, got {options.bucket_reso_steps}")
    if options.bucket_reso_steps**2 > shortest * longest:
        step = options.bucket_reso_steps
        problems.add(f"bucket_reso_steps {step} leaves no bucket in {shortest}x{longest}; lower it")
    if options.bucket_no_upscale:
        return  # the range has no effect
    if options.min_bucket_reso > shortest:
        problems.add(f"min_bucket_reso {options.min_bucket_reso} is more than the resolution's shorter side {shortest}")
    if options.max_bucket_reso < longest:
        problems.add(f"max_bucket_reso {options.max_bucket_reso} is less than the resolution's longer side {longest}")
