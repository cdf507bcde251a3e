"""Reads options from TOML files and writes them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from library.config import toml_text
from library.config.options import Given, Option, section_options, sections_of, unknown_message
from library.config.retired import GUI_KEYS, RETIRED
from library.config.values import written
from library.errors import Problems, UserError

logger = logging.getLogger(__name__)

NOT_RECORDED = {"config_file", "output_config", "overwrite"}


def read_config_file(path: Path, options: Mapping[str, Option], problems: Problems) -> Given:
    """Return the options in a TOML file; its tables only group keys, and a later duplicate wins.

    Empty texts and lists are unset, as GUIs write them. Adds to problems unknown keys and what cannot be read; raises
    UserError for a file that is no TOML.
    """
    path = with_toml_suffix(path)
    names = {alias: entry for entry in options.values() for alias in (entry.flag, *entry.spec.aliases)}
    values = _load(path, {alias for alias, entry in names.items() if entry.spec.secret})
    of_gui = [key for key, value in values.items() if key in GUI_KEYS and value not in (0, "", [])]
    if of_gui:
        keys = ", ".join(f"{key} ({GUI_KEYS[key]})" if GUI_KEYS[key] else key for key in of_gui)
        logger.warning("%s: keys of GUIs that a training does not read: %s", path, keys)
    texts = {}
    for key, value in values.items():
        if key in GUI_KEYS or (key in RETIRED and value in RETIRED[key].neutral):
            continue
        if key in RETIRED and RETIRED[key].harmless:
            logger.warning("%s: %s is ignored: %s", path, key, RETIRED[key].reason)
        elif key not in names:
            problems.add(unknown_message(f"{path}: {key}", key, names))
        elif value not in ("", []) and not _is_off(value, names[key]):
            texts[names[key].flag] = (value, f"{path}: {key}")
    return Given.of(texts, options, problems, source=str(path))


def _load(path: Path, secrets: Collection[str]) -> dict[str, Any]:
    """Return key -> value; secrets are keys whose values are not shown. Raises UserError for a file of another kind."""
    table = toml_text.load(path)
    if isinstance(table.get("datasets"), list):
        raise UserError(f"--config_file: {path} is a dataset file; give it as --dataset_config")
    values: dict[str, Any] = {}
    for key, value in _flat(table):
        if key in values and values[key] != value:
            later = "the later value" if key in secrets else f"the later value {value!r}"
            logger.warning("%s: %s is given twice; %s is used", path, key, later)
        values[key] = value
    return values


def _is_off(value: Any, entry: Option) -> bool:
    """Return whether a value is the 0 that GUIs write for an interval or a length that is not set."""
    return value == 0 and entry.default is None and entry.spec.minimum == 1


def with_toml_suffix(path: Path) -> Path:
    """Return the path of --config_file, with `.toml` appended if it is missing; raises UserError for a .json file."""
    if path.suffix.lower() == ".json":
        raise UserError(f"--config_file is a TOML file, got {path}: kohya_ss' GUI writes one beside its .json")
    return path if path.suffix.lower() == ".toml" else Path(f"{path}.toml")


def _flat(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from value.items()
        else:
            yield key, value


def changed_options(config: object) -> dict[str, dict[str, Any]]:
    """Return section -> flag -> value for every option that differs from its default."""
    changed: dict[str, dict[str, Any]] = {}
    root: type = type(config)
    for name, section_class in sections_of(root):
        section = getattr(config, name)
        for entry in section_options(section_class, name):
            value = section.pinned(entry.field) if entry.spec.hub else vars(section).get(entry.field)
            is_recorded = not (entry.spec.file_only or entry.spec.secret or entry.flag in NOT_RECORDED)
            if value != entry.default and is_recorded:
                changed.setdefault(name, {})[entry.flag] = written(value)
    return changed


def to_toml(config: object) -> str:
    """Return a config file that repeats this configuration."""
    return toml_text.dump(changed_options(config))
