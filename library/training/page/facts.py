"""NAME-run.json: what a run knows that is in none of its other files.

Paths of pictures and files are relative to the folder of the run where they are in it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal

from library.config.toml_text import load_json
from library.errors import UserError, message_of
from library.files import replacing

FORMAT_VERSION = 1
WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
State = Literal["running", "stopped", "finished", "failed", "unknown"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """The previews of one moment."""

    label: str
    step: int
    pictures: tuple[str, ...]  # one for each prompt, in their order


@dataclasses.dataclass(frozen=True, kw_only=True)
class Save:
    """A network that was saved."""

    file: str
    step: int
    epoch: int  # complete ones
    norms_by_block: dict[str, float] = dataclasses.field(default_factory=dict)  # Frobenius norm of the change
    norms_by_kind: dict[str, float] = dataclasses.field(default_factory=dict)
    norms_by_rank: dict[str, float] = dataclasses.field(default_factory=dict)  # of a DyLoRA


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bucket:
    """The pictures of a dataset that are trained on in one size."""

    width: int
    height: int
    draws: int  # of an epoch
    pictures: int
    examples: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataFacts:
    """A dataset."""

    size: tuple[int, int]  # in pixels, of the training
    batch_size: int
    pictures: int  # without those for regularisation
    regularisation: int
    held_out: int
    has_buckets: bool
    buckets: tuple[Bucket, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fed:
    """A caption as it is fed to the text encoder, and its picture."""

    picture: str
    caption: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """The most memory that was taken, in bytes."""

    process: int | None = None
    device: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """All of the record. What an older run, which has none, does not tell is None or empty."""

    version: int = FORMAT_VERSION
    state: State = "unknown"
    error: str | None = None  # what ended the run
    began: float | None = None  # seconds since 1970; of a resumed run, when it was resumed
    first_step: int = 0  # that were made before
    seconds_before: float = 0.0  # that they took
    updated: float | None = None  # seconds since 1970
    step: int = 0
    epoch: int = 0
    steps: int | None = None  # of the whole run
    epochs: int | None = None
    steps_per_epoch: int | None = None
    batches_to_a_step: int = 1  # of one process
    processes: int = 1
    parameters: int | None = None
    best: tuple[float, int] | None = None  # lowest validation loss, and its step
    prompts: tuple[str, ...] = ()
    columns: tuple[Column, ...] = ()
    saves: tuple[Save, ...] = ()
    datasets: tuple[DataFacts, ...] = ()
    tags: tuple[tuple[str, int], ...] = ()  # the most frequent ones
    num_tags: int = 0  # of all
    captions: tuple[Fed, ...] = ()  # the first ones of an epoch
    warnings: tuple[str, ...] = ()
    memory: Memory = Memory()
    device: str | None = None
    versions: dict[str, str] = dataclasses.field(default_factory=dict)


def write_facts(path: Path, facts: Facts) -> None:
    """Write the record, whole or not at all."""
    with replacing(path) as temporary:
        text = json.dumps(dataclasses.asdict(facts), indent=1, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8", errors="replace")


def read_facts(path: Path) -> Facts:
    """Return the record; raises UserError for a file of another kind or version, or a damaged one."""
    record = load_json(path)
    if not isinstance(record, dict) or not isinstance(record.get("version"), int):
        raise UserError(f"{path} is no record of a run: it has no version")
    if record["version"] != FORMAT_VERSION:
        raise UserError(f"{path} was written by another version of the suite, in the format {record['version']}")
    try:
        return _typed(Facts, record)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{path} is damaged: {message_of(error)}") from None


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _typed(kind: Any, value: Any) -> Any:
    """Return a value of JSON as one of a type; raises ValueError, TypeError or KeyError."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return kind(**{name: _typed(_hints(kind)[name], item) for name, item in value.items()})
    if origin is tuple:
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        return tuple(_typed(one, item) for one, item in zip(kinds, value, strict=True))
    if origin is dict:
        return {str(name): _typed(inner[1], item) for name, item in value.items()}
    if origin is types.UnionType:
        return None if value is None else _typed(inner[0], value)
    # Whole numbers are numbers, and truth values are none, whatever Python says.
    if value not in inner if origin is Literal else type(value) not in ((int, float) if kind is float else (kind,)):
        raise ValueError(f"{value!r:.60} is not {WORDS.get(kind) or f'one of {list(inner)}'}")
    return value
