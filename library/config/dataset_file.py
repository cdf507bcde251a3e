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
from library.config.dataset import LEAST_STEP, MEGAPIXEL, DataConfig, DatasetConfig, DatasetOptions, SubsetOptions
from library.config.options import Option, nearest, section_options
from library.config.values import LATENT_SCALE
from library.errors import Problems, UserError, shown

logger = logging.getLogger(__name__)


# Keys of sd-scripts that have no effect.
IGNORED = {"cache_info": "picture sizes are read from the headers, in parallel"}

DATASET_KEYS = {key.field: key for key in section_options(DatasetOptions)}
SUBSET_KEYS = {key.field: key for key in section_options(SubsetOptions)}
ALL_KEYS = DATASET_KEYS | SUBSET_KEYS
# Keys with another name on the command line, by that name.
COMMAND_LINE_NAMES = {
    name: key for key in ALL_KEYS.values() for name in (key.flag, *key.spec.aliases) if name not in ALL_KEYS
}


def read_datasets(data: DataConfig, dataset: DatasetOptions, subset: SubsetOptions) -> list[DatasetConfig]:
    """Return the datasets of a run with all values looked up; dataset and subset hold the command line's values.

    Raises UserError for all that is wrong in them, and if there is nothing to train on.
    """
    problems = Problems()
    if data.dataset_config is not None:
        datasets = problems.run(read_dataset_file, data.dataset_config, dataset, subset, problems) or []
    else:
        datasets = [DatasetConfig(options=dataset, subsets=tuple(folder_subsets(data, subset)))]
    for found in datasets:
        check_dataset(found.options, found.place, problems)
    problems.raise_if_any()
    datasets = [dataclasses.replace(found, subsets=_usable_subsets(found.subsets)) for found in datasets]
    datasets = [found for found in datasets if found.subsets]
    if all(used.is_reg for found in datasets for used in found.subsets):
        source = data.dataset_config or f"{data.train_data_dir} (sub-folders are named like 10_name)"
        raise UserError(f"no subset to train on in {source}: one is needed with num_repeats of 1 or more, not is_reg")
    return datasets


def read_dataset_file(
    path: Path, dataset: DatasetOptions, subset: SubsetOptions, problems: Problems
) -> list[DatasetConfig]:
    """Return the datasets of a definition file; dataset and subset supply the values that it omits.

    Adds to problems unknown keys and what cannot be read; raises UserError for a file without datasets.
    """
    table = _load(path)
    if "datasets" not in table and {"pretrained_model_name_or_path", "output_dir", "network_module"} & set(table):
        raise UserError(f"--dataset_config: {path} is a configuration file; give it as --config_file")
    for key in [key for key in table if key not in ("datasets", "general")]:
        known = COMMAND_LINE_NAMES.get(key) or ALL_KEYS.get(key)
        if known is not None:
            levels = ", ".join(f"[{level}]" for level in known.spec.levels)
            name = key if key == known.field else f"{key} is {known.field} in a dataset file, and"
            problems.add(f"{path}: {name} does not belong here: it is set in {levels}")
        else:
            problems.add(f"{path}: {key} is not known{nearest(key, ('datasets', 'general'))}")
    general = _expect_table(table.get("general", {}), f"{path}: general")
    of_all = _read_keys(general, "general", f"{path}: general", problems)
    tables = table.get("datasets", [])
    if not isinstance(tables, list) or not tables:
        raise UserError(f"{path}: no [[datasets]] table, so there is nothing to train on")
    read = [
        problems.run(_read_dataset, each, of_all, (dataset, subset), f"{path}: datasets[{index}]", problems)
        for index, each in enumerate(tables)
    ]
    return [found for found in read if found is not None]


def _load(path: Path) -> dict[str, Any]:
    suffix = path.suffix.lower()
    if suffix == ".toml":
        return toml_text.load(path)
    if suffix == ".json":
        return _expect_table(toml_text.load_json(path), str(path))
    raise UserError(f"--dataset_config must be a .toml or .json file, got {str(path)!r}")


def _read_dataset(
    value: Any,
    of_all: dict[str, Any],
    defaults: tuple[DatasetOptions, SubsetOptions],
    place: str,
    problems: Problems,
) -> DatasetConfig:
    dataset, subset = defaults
    table = _expect_table(value, place)
    subset_tables = table.get("subsets", [])
    if not isinstance(subset_tables, list):
        raise UserError(f"{place}.subsets must be an array of tables, got {shown(subset_tables)}")
    own = {key: value for key, value in table.items() if key != "subsets"}
    shared = of_all | _read_keys(own, "datasets", place, problems)
    options = dataclasses.replace(dataset, **{key: value for key, value in shared.items() if key in DATASET_KEYS})
    inherited = {key: value for key, value in shared.items() if key in SUBSET_KEYS}
    subsets = []
    for index, each in enumerate(subset_tables):
        where = f"{place}.subsets[{index}]"
        table = problems.run(_expect_table, each, where) or {}
        values = inherited | _read_keys(table, "subsets", where, problems)
        if values.get("image_dir") is not None or values.get("metadata_file") is not None:
            subsets.append(dataclasses.replace(subset, **values))
        elif not {"image_dir", "metadata_file"} & set(table):  # else it was there, and could not be read
            problems.add(f"{where}.image_dir is missing: the folder of the pictures")
    return DatasetConfig(options=options, subsets=tuple(subsets), place=place)


def _read_keys(table: Mapping[str, Any], level: str, place: str, problems: Problems) -> dict[str, Any]:
    """Return field -> typed value of the keys in a table; adds to problems the keys that do not belong there."""
    values = {}
    for key, value in table.items():
        if key in IGNORED:
            logger.warning("%s.%s is ignored: %s", place, key, IGNORED[key])
            continue
        try:
            values[key] = _known_key(key, level, place).read(value, f"{place}.{key}")
        except UserError as error:
            problems.add(*error.lines)
    return values


def _known_key(key: str, level: str, place: str) -> Option:
    option = ALL_KEYS.get(key)
    if option is None:
        if key in COMMAND_LINE_NAMES:
            raise UserError(f"{place}.{key} is not known: it is {COMMAND_LINE_NAMES[key].field} in a dataset file")
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


def is_numbered(folder: Path) -> bool:
    """Return whether a folder is named like 10_name."""
    number = folder.name.partition("_")[0]
    return number.isascii() and number.lstrip("-").isdigit()


def _numbered_folders(parent: Path) -> list[tuple[Path, int, str]]:
    found = []
    try:
        folders = sorted(path for path in parent.iterdir() if path.is_dir())
    except OSError as error:
        raise UserError(f"{parent} cannot be read ({error.strerror}); mend its permissions") from None
    for folder in folders:
        number, _, tokens = folder.name.partition("_")
        if is_numbered(folder):
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


def check_dataset(options: DatasetOptions, place: str, problems: Problems) -> None:
    """Add wrong resolutions and bucket sizes of a dataset to problems; place is that of its `DatasetConfig`."""
    if options.network_multiplier != 1.0:
        logger.warning(
            "network_multiplier %g has no effect, as in sd-scripts: the loss is measured at full strength",
            options.network_multiplier,
        )
    if options.resolution is None:
        problems.add("resolution is missing: give it in [general], [[datasets]] or as --resolution")
    elif options.enable_bucket:
        _check_buckets(options, place, problems)
    elif options.resolution[0] % LATENT_SCALE or options.resolution[1] % LATENT_SCALE:
        label, size = _label("resolution", place), options.resolution
        problems.add(f"{label} must be a multiple of {LATENT_SCALE} without buckets, got {size}")


def check_bucket_steps(options: DatasetOptions, place: str, step: int, models: str, problems: Problems) -> None:
    """Add to problems sides of buckets that some models do not take, which need multiples of a step in pixels."""
    if options.enable_bucket and options.bucket_reso_steps % step:
        label, given = _label("bucket_reso_steps", place), options.bucket_reso_steps
        problems.add(f"{label} must be a multiple of {step}{models}, got {given}")


def _check_buckets(options: DatasetOptions, place: str, problems: Problems) -> None:
    shortest, longest, step = min(options.size), max(options.size), options.bucket_reso_steps
    check_bucket_steps(options, place, LEAST_STEP, "", problems)
    if step**2 > shortest * longest:
        label = _label("bucket_reso_steps", place)
        problems.add(f"{label} {step} leaves no bucket in {shortest}x{longest}; lower it")
    if options.bucket_no_upscale:
        return  # the range has no effect
    if options.min_bucket_reso > shortest:
        label, given = _label("min_bucket_reso", place), options.min_bucket_reso
        problems.add(f"{label} {given} is more than the resolution's shorter side {shortest}")
    if options.longest_side < longest:
        label, given = _label("max_bucket_reso", place), options.longest_side
        problems.add(f"{label} {given} is less than the resolution's longer side {longest}")
    elif options.max_bucket_reso is None and shortest * longest >= MEGAPIXEL:
        label = _label("max_bucket_reso", place)
        logger.info("%s is not given: it is %d, as the resolution has a megapixel", label, options.longest_side)


def _label(key: str, place: str) -> str:
    """Return a key of a dataset for messages; place is that of its `DatasetConfig`."""
    return f"{place}.{key}" if place else f"--{key}"
