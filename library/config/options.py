"""Declares an option once, as a dataclass field, for parser, TOML key, checks, help and record.

A section is a frozen keyword-only dataclass with fields from `option`; a root is a dataclass of sections.
`command_line.parse` reads a root from the command line and `--config_file`; values from both are read by
`Option.read`. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, TypeVar

from library.config.kinds import Kind, is_there, kind_of, why_not
from library.config.retired import RETIRED, Retired
from library.errors import Problems, UserError, quotes_hint, shown

Root = TypeVar("Root")
# What a model on the hub is for, which decides the files that are needed.
Role = Literal["model", "vae", "control net", "checkpoint", "surroundings"]

REQUIRED: Final = dataclasses.MISSING  # default of an option that must be given


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """What an option declares besides its name, type and default."""

    help: str
    flag: str | None = None  # name on the command line, if it differs from the field's
    aliases: tuple[str, ...] = ()
    positional: bool = False  # given by position, without a name
    missing: str | None = None  # description of a required option in the message that it is missing; unset: help
    reads: Literal["a file", "a folder", "a file or a folder"] | None = None  # what must be at the path
    hub: Role | None = None  # what it may name on the Hugging Face Hub; `library.models.hub` also checks the path then
    parse: Callable[[Any], Any] | None = None  # parser of a text or TOML value; raises ValueError
    form: str | None = None  # description of a valid value, for the error and the help
    known: tuple[str, ...] = ()  # values of a text that are known by name, among others that it can have
    minimum: float | None = None
    maximum: float | None = None
    secret: bool = False  # a key or a token: never recorded or shown
    file_only: bool = False  # a key of the dataset file, not a command line option
    levels: tuple[str, ...] = ()  # tables of the dataset file: "general", "datasets", "subsets"
    # Conditions are names of options, or "name=value"; `library.config.effects` reports what is given in vain.
    only_with: tuple[str, ...] = ()  # the option has no effect unless one of these holds
    not_with: tuple[str, ...] = ()  # the option has no effect if one of these holds
    twin: str | None = None  # the option that does the same under other conditions
    wins_over: tuple[str, ...] = ()  # options that are not used if this one is given
    excludes: tuple[str, ...] = ()  # options that cannot be given with this one
    interval: Literal["steps", "epochs"] | None = None  # something happens whenever so many are done


def option(default: Any, help: str, **spec: Any) -> Any:
    """Return a dataclass field for an option, REQUIRED or with a default; spec has the other fields of `Spec`."""
    return dataclasses.field(default=default, metadata={"spec": Spec(help=help, **spec)})


# Options that the dataset file takes too, by the tables in which they are keys.
for_all = functools.partial(option, levels=("general", "datasets", "subsets"))
for_datasets = functools.partial(option, levels=("general", "datasets"))
for_subsets = functools.partial(option, levels=("subsets",))


def repeated(section: type, name: str, **changes: Any) -> Any:
    """Return a dataclass field with the default and the declaration of an option of another section.

    Its conditions are left out, since they name options of the other script; changes are fields of `Spec`.
    """
    field = next(field for field in dataclasses.fields(section) if field.name == name)
    spec = dataclasses.replace(field.metadata["spec"], only_with=(), not_with=(), wins_over=(), excludes=(), twin=None)
    return dataclasses.field(default=field.default, metadata={"spec": dataclasses.replace(spec, **changes)})


@dataclasses.dataclass(frozen=True)
class Option:
    """One option with its section and the kind of its values."""

    section: str
    field: str
    flag: str
    kind: Kind
    default: Any  # None for a required option
    is_required: bool
    spec: Spec

    @property
    def label(self) -> str:
        """The name in help and messages."""
        return self.flag if self.spec.positional or self.spec.file_only else f"--{self.flag}"

    def read(self, value: Any, label: str) -> Any:
        """Return a text or TOML value in the option's type; raises UserError, in which label names the option."""
        form = self.spec.form or self.kind.form
        try:
            result = (self.spec.parse or self.kind.read)(value)
        except (ValueError, OverflowError) as error:  # OverflowError: a whole number that is too large for a float
            detail = f" ({error})" if str(error) and (self.spec.parse or self.kind.says_why) else ""
            got = "something else" if self.spec.secret else shown(value)
            near = nearest(str(value), self.choices) if self.choices else ""
            raise UserError(f"{label} must be {form}, got {got}{detail}{near}") from None
        if self.spec.hub is not None:
            result = _with_local_paths(value, result)
        for number in result if isinstance(result, tuple) else (result,):
            self._check_range(number, label)
        return result

    @property
    def choices(self) -> tuple[str, ...]:
        """The values that are known by name, as they are written; empty where there are none."""
        return tuple(map(str, self.kind.choices)) or self.spec.known

    @property
    def missing_message(self) -> str:
        """The message for a required option that was not given."""
        return f"{self.label} is missing: {self.spec.missing or self.spec.help}"

    def check_given(self, value: Any, problems: Problems) -> None:
        """Add to problems if a required value is missing (None if not given) or if its path does not exist."""
        if self.is_required and value in (None, "", ()):
            problems.add(self.missing_message)
        elif self.spec.reads is not None and value is not None and self.spec.hub is None:
            for path in value if isinstance(value, tuple) else (value,):
                if not is_there(path, self.spec.reads):
                    why = why_not(path, self.spec.reads)
                    problems.add(f"{self.label}: {why}{quotes_hint(path)}{folder_hint(path)}")

    def _check_range(self, number: Any, label: str) -> None:
        if not isinstance(number, int | float) or isinstance(number, bool):
            return
        if self.spec.minimum is not None and not number >= self.spec.minimum:
            raise UserError(f"{label} must be at least {self.spec.minimum}, got {shown(number)}")
        if self.spec.maximum is not None and not number <= self.spec.maximum:
            raise UserError(f"{label} must be at most {self.spec.maximum}, got {shown(number)}")
        if isinstance(number, float) and not math.isfinite(number):
            raise UserError(f"{label} must be a finite number, got {number}")


def _with_local_paths(value: Any, result: Any) -> Any:
    """Return paths in full if they were given as `./a/b`: a `Path` keeps no dot, and could be a name on the hub."""
    if isinstance(result, tuple):
        texts = value if isinstance(value, list | tuple) and len(value) == len(result) else result
        return tuple(itertools.starmap(_with_local_paths, zip(texts, result, strict=True)))
    is_local = isinstance(result, Path) and isinstance(value, str) and value.startswith(("./", ".\\"))
    return Path.cwd() / result if is_local else result


@functools.cache
def section_options(section: type, section_name: str = "") -> tuple[Option, ...]:
    """Return the options that a section declares, in order."""
    hints = typing.get_type_hints(section)
    found = []
    for field in dataclasses.fields(section):
        spec: Spec | None = field.metadata.get("spec")
        if spec is None:
            continue
        is_required = field.default is REQUIRED
        default = None if is_required else field.default
        kind = kind_of(hints[field.name])
        found.append(Option(section_name, field.name, spec.flag or field.name, kind, default, is_required, spec))
    return tuple(found)


@functools.cache
def sections_of(root: type) -> tuple[tuple[str, type], ...]:
    """Return (name, section class) of each section of a root; a section can be a root by itself, without a name."""
    if section_options(root):
        return (("", root),)
    hints = typing.get_type_hints(root)
    return tuple((field.name, hints[field.name]) for field in dataclasses.fields(root))


@functools.cache
def root_options(root: type) -> dict[str, Option]:
    """Return flag -> option for all options on the command line of a root."""
    return {flag: entry for flag, entry in all_options(root).items() if not entry.spec.file_only}


@functools.cache
def all_options(root: type) -> dict[str, Option]:
    """Return flag -> option for all options of a root, also those that only the dataset file has."""
    options = [entry for name, section in sections_of(root) for entry in section_options(section, name)]
    table = {entry.flag: entry for entry in options}
    assert len(table) == len(options), "two sections declare the same flag"
    return table


def folder_hint(path: Path) -> str:
    """Return which file of a folder that PEFT wrote is meant; "" for any other path."""
    return "; name adapter_model.safetensors in it" if (path / "adapter_model.safetensors").is_file() else ""


@dataclasses.dataclass(frozen=True)
class Given:
    """The options that a user gave: those that could be read, and the messages about the others."""

    values: dict[str, Any]  # flag -> typed value
    unreadable: dict[str, str]  # flag -> what was reported of it
    sources: dict[str, str]  # flag -> where its value comes from: "command line", or the path of a file

    @classmethod
    def of(
        cls, texts: Mapping[str, tuple[Any, str]], options: Mapping[str, Option], problems: Problems, *, source: str
    ) -> Given:
        """Read flag -> (text or TOML value, label for messages); what cannot be read is added to problems."""
        given = cls({}, {}, dict.fromkeys(texts, source))
        for flag, (value, label) in texts.items():
            try:
                given.values[flag] = options[flag].read(value, label)
            except UserError as error:
                given.unreadable[flag] = str(error)
                problems.add(*error.lines)
        return given


def build(
    root: type[Root],
    given: Mapping[str, Any],
    problems: Problems | None = None,
    unreadable: Mapping[str, str] | None = None,
) -> Root:
    """Return the root with its sections filled from flag -> value; None means "not given".

    Raises UserError for missing required options and for paths that do not exist. With problems they are added there
    instead, so that further checks can run and all mistakes are reported together. Reading a missing value from such
    a root raises UserError, and so does a value that could not be read: unreadable is flag -> the message that
    problems has about it.
    """
    found = Problems() if problems is None else problems
    kind: type = root
    sections = {name: _build_section(section, given, found, unreadable or {}) for name, section in sections_of(kind)}
    if problems is None:
        found.raise_if_any()
    return sections[""] if "" in sections else root(**sections)


def _build_section(section: type, given: Mapping[str, Any], problems: Problems, unreadable: Mapping[str, str]) -> Any:
    options = section_options(section)
    values = {entry.field: given[entry.flag] for entry in options if given.get(entry.flag) is not None}
    absent = {entry.field: unreadable[entry.flag] for entry in options if entry.flag in unreadable}
    for entry in options:
        if entry.field not in absent:
            entry.check_given(values.get(entry.field), problems)
            if entry.is_required and not values.get(entry.field):
                absent[entry.field] = entry.missing_message
    if not absent:
        return section(**values)
    incomplete = type(section.__name__, (section,), {name: _Absent(message) for name, message in absent.items()})
    instance: Any = object.__new__(incomplete)
    vars(instance).update({entry.field: entry.default for entry in options if entry.field not in absent} | values)
    return instance


class _Absent:
    """The value of an option that is missing or could not be read: reading it raises the message about that."""

    def __init__(self, message: str) -> None:
        self.message = message

    def __get__(self, instance: object, owner: type) -> NoReturn:
        raise UserError(self.message)


def flag_values(config: object) -> dict[str, Any]:
    """Return flag -> value of a configuration that `build` returned whole."""
    kind: type = type(config)
    return {
        entry.flag: getattr(getattr(config, name) if name else config, entry.field)
        for name, section in sections_of(kind)
        for entry in section_options(section, name)
    }


def unknown_message(label: str, name: str, known: Mapping[str, Any], retired: Mapping[str, Retired] = RETIRED) -> str:
    """Return the message for an unknown option: why it was retired, or the nearest known name."""
    if name in retired:
        return f"{label} is not available: {retired[name].reason}"
    return f"{label} is not known{nearest(name, known)}"


def nearest(name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    """Return "; did you mean X?" for the nearest of the known names, whatever their case, or an empty text."""
    spelled = {candidate.casefold(): candidate for candidate in reversed(list(known))}
    word = name.casefold()
    found = [candidate for candidate in map(str.casefold, known) if candidate.startswith(word)] if len(word) > 3 else []
    found = found or difflib.get_close_matches(word, list(spelled), n=1, cutoff=0.6)
    return f"; did you mean {spelled[found[0]]}?" if found else ""


def help_text(entry: Option) -> str:
    """Return the help of an option, with the form of its value and its default."""
    form = entry.spec.form or (entry.kind.form if entry.kind.form.startswith("one of") else "")
    has_default = entry.default not in (None, "", ()) and entry.default is not False
    return (
        entry.spec.help
        + (f" ({form})" if form else "")
        + (f" [{format_default(entry.default)}]" if has_default else "")
    )


def format_default(value: Any) -> str:
    """Return a default as it is written on the command line."""
    if isinstance(value, tuple):
        return " ".join(format_default(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
