"""One declaration per option: a frozen dataclass field is parser, TOML key, check, help and record.

A section is a frozen keyword-only dataclass whose fields are made with `option`; a root is a dataclass of
sections. `parse` reads a root from the command line and `--config_file`; values from both pass through the
same conversion. Parser defaults are suppressed, so that parsing yields only what was given and
"defaults < TOML < command line" is one dict union. Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from library.config import toml_text
from library.config.retired import RETIRED, Retired
from library.errors import UserError, shown

Root = TypeVar("Root")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """What an option declares besides its name, type and default."""

    help: str
    flag: str | None = None  # name on the command line, where it differs from the field's
    aliases: tuple[str, ...] = ()
    positional: bool = False  # given by its place, without a name: required
    parse: Callable[[Any], Any] | None = None  # own reading of a text or TOML value; raises ValueError
    form: str | None = None  # how a value looks, in words, for the error and the help
    minimum: float | None = None
    maximum: float | None = None
    secret: bool = False  # a key or a token: neither recorded nor shown
    file_only: bool = False  # a key of the dataset file, not a command line option
    levels: tuple[str, ...] = ()  # where the dataset file takes it: "general", "datasets", "subsets"


def option(default: Any, help: str, **spec: Any) -> Any:
    """Return a dataclass field that is an option; spec holds the other fields of `Spec`."""
    return dataclasses.field(default=default, metadata={"spec": Spec(help=help, **spec)})


@dataclasses.dataclass(frozen=True)
class Option:
    """One option, resolved: where it lives, its kind and how a value is read."""

    section: str
    field: str
    flag: str
    kind: Kind
    default: Any
    spec: Spec

    @property
    def label(self) -> str:
        """The name as it stands in help and messages."""
        return self.flag if self.spec.positional else f"--{self.flag}"

    def read(self, value: Any, label: str) -> Any:
        """Return value (a text, or a TOML value) in the option's type; UserError names it by label."""
        form = self.spec.form or self.kind.form
        try:
            result = (self.spec.parse or self.kind.read)(value)
        except (ValueError, OverflowError) as error:  # the latter for a whole number that no float can hold
            detail = f" ({error})" if str(error) and self.spec.parse else ""
            got = "something else" if self.spec.secret else shown(value)
            raise UserError(f"{label} must be {form}, got {got}{detail}") from None
        for number in result if isinstance(result, tuple) else (result,):
            self._check_range(number, label)
        return result

    def _check_range(self, number: Any, label: str) -> None:
        if not isinstance(number, int | float) or isinstance(number, bool):
            return
        if self.spec.minimum is not None and not number >= self.spec.minimum:
            raise UserError(f"{label} must be at least {self.spec.minimum}, got {shown(number)}")
        if self.spec.maximum is not None and not number <= self.spec.maximum:
            raise UserError(f"{label} must be at most {self.spec.maximum}, got {shown(number)}")
        if isinstance(number, float) and not math.isfinite(number):
            raise UserError(f"{label} must be a finite number, got {number}")


# --------------------------------------------------------------------------------------------------------------
# Kinds: how the values of a type are read
# --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Kind:
    """How values of one Python type are read from the command line and from TOML."""

    name: str  # for tables: "int", "flag", "list of str"
    form: str  # for messages: "a whole number"
    nargs: str | int | None  # as argparse has it; 0 is a switch
    read: Callable[[Any], Any]


def read_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def read_int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError
    return int(value)


def read_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    return float(value)


def read_str(value: Any) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ValueError
    value.encode("utf-8")  # half a surrogate pair, as JSON can have it, could not be written to the record of the run
    return value


def read_choice(value: Any, *, choices: tuple[Any, ...]) -> Any:
    for choice in choices:
        if type(value) is type(choice) and value == choice:
            return choice
        if isinstance(value, str) and value == str(choice):
            return choice
    raise ValueError


def read_many(value: Any, *, item: Kind) -> tuple[Any, ...]:
    values = value if isinstance(value, list | tuple) else [value]
    read = (item.read(entry) for entry in values)
    return tuple(entry for entry in read if entry is not None)


SIMPLE_KINDS = {
    bool: Kind("flag", "true or false", 0, read_bool),
    int: Kind("int", "a whole number", None, read_int),
    float: Kind("float", "a number", None, read_float),
    str: Kind("str", "a text", None, read_str),
    # GUIs write "" for a path that is not set.
    Path: Kind("path", "a path", None, lambda value: Path(read_str(value)) if value != "" else None),
    dict: Kind("table", "a table", None, lambda value: _expect(value, dict)),
}


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError
    return value


def kind_of(annotation: Any) -> Kind:
    """Return the kind for a type annotation: bool, int, float, str, Path, Literal, tuple[T, ...], X | None."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return kind_of(next(argument for argument in arguments if argument is not type(None)))
    if origin is Literal:
        words = ", ".join(str(choice) for choice in arguments)
        name = type(arguments[0]).__name__
        return Kind(name, f"one of {words}", None, functools.partial(read_choice, choices=arguments))
    if origin is tuple:
        item = kind_of(arguments[0])
        if arguments[-1] is not Ellipsis:  # a pair, written as one word
            return Kind(f"{item.name} or {item.name},{item.name}", "a pair", None, read_str)
        return Kind(f"list of {item.name}", f"a list of {item.name}", "*", functools.partial(read_many, item=item))
    return SIMPLE_KINDS[annotation]


# --------------------------------------------------------------------------------------------------------------
# Tables of options
# --------------------------------------------------------------------------------------------------------------


@functools.cache
def section_options(section: type, section_name: str = "") -> tuple[Option, ...]:
    """Return the options that a section declares, in order."""
    hints = typing.get_type_hints(section)
    found = []
    for field in dataclasses.fields(section):
        spec: Spec | None = field.metadata.get("spec")
        if spec is None:
            continue
        default = None if field.default is dataclasses.MISSING else field.default
        kind = kind_of(hints[field.name])
        found.append(Option(section_name, field.name, spec.flag or field.name, kind, default, spec))
    return tuple(found)


@functools.cache
def sections_of(root: type) -> tuple[tuple[str, type], ...]:
    """Return (name, section class) of each section of a root."""
    hints = typing.get_type_hints(root)
    return tuple((field.name, hints[field.name]) for field in dataclasses.fields(root))


@functools.cache
def root_options(root: type) -> dict[str, Option]:
    """Return flag -> option for everything that the command line of a root takes."""
    options = [
        entry
        for name, section in sections_of(root)
        for entry in section_options(section, name)
        if not entry.spec.file_only
    ]
    table = {entry.flag: entry for entry in options}
    assert len(table) == len(options), "two sections declare the same flag"
    return table


# --------------------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------------------


# What begins with a minus and is no option; argparse's own knows no exponents.
NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)


def build_parser(root: type, description: str | None) -> argparse.ArgumentParser:
    """Return the parser of a root; it yields texts, and only for what was given."""
    positionals = [entry.flag for entry in root_options(root).values() if entry.spec.positional]
    parser = _Parser(
        description=description,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,  # see with_whole_names
        formatter_class=_Formatter,
        usage=" ".join(["%(prog)s [options]", *positionals]),
    )
    parser._negative_number_matcher = NEGATIVE_NUMBER
    for name, section in sections_of(root):
        group = parser.add_argument_group((section.__doc__ or name).split("\n")[0].rstrip("."))
        for entry in section_options(section, name):
            if not entry.spec.file_only:
                _add_argument(group, entry)
    return parser


def _add_argument(group: argparse._ArgumentGroup, entry: Option) -> None:
    short = [name for name in entry.spec.aliases if len(name) == 1]  # -s; the option itself may be --W
    names = [f"{'-' if name in short else '--'}{name}" for name in (entry.flag, *entry.spec.aliases)]
    text = help_text(entry).replace("%", "%%")
    if entry.spec.positional:
        group.add_argument(entry.flag, help=text)
    elif entry.kind.nargs == 0:
        group.add_argument(*names, dest=entry.flag, action="store_true", help=text)
    else:
        metavar = entry.kind.name.removeprefix("list of ").split()[0].upper()
        group.add_argument(*names, dest=entry.flag, nargs=entry.kind.nargs, metavar=metavar, help=text)


def help_text(entry: Option) -> str:
    """Return the help of an option with the form of its value and its default."""
    form = entry.spec.form or (entry.kind.form if entry.kind.form.startswith("one of") else "")
    has_default = entry.default is not None and entry.default is not False and entry.default != ""
    return (
        entry.spec.help
        + (f" ({form})" if form else "")
        + (f" [{format_default(entry.default)}]" if has_default else "")
    )


def format_default(value: Any) -> str:
    """Return a default as users write it on the command line."""
    if isinstance(value, tuple):
        return " ".join(format_default(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def parse(
    root: type[Root],
    argv: Sequence[str] | None = None,
    *,
    description: str | None = None,
    retired: Mapping[str, Retired] = RETIRED,
) -> Root:
    """Return the configuration that a command line stands for: defaults < --config_file < command line.

    retired are the options of sd-scripts' script that this one does not have. Raises UserError for everything a user
    can get wrong; exits with 0 after --help.
    """
    return build(root, given_options(root, argv, description=description, retired=retired))


def given_options(
    root: type,
    argv: Sequence[str] | None,
    *,
    description: str | None = None,
    retired: Mapping[str, Retired] = RETIRED,
) -> dict[str, Any]:
    """Return flag -> typed value for the options that were given, on the command line or in --config_file.

    With --output_config the file is the one to be written, so it is not read.
    """
    options = root_options(root)
    words = with_whole_names(sys.argv[1:] if argv is None else argv, options, retired)
    known, unknown = build_parser(root, description).parse_known_args(words)
    ignored = _explain_unknown(unknown, options, retired)
    given = {flag: options[flag].read(value, options[flag].label) for flag, value in vars(known).items()}
    if given.get("config_file") is not None and not given.get("output_config"):
        given = read_config_file(given["config_file"], options) | given
    for row in ignored:
        _warn(f"--{row.name} is ignored: {row.reason}")
    return given


def with_whole_names(
    words: Sequence[str], options: Mapping[str, Option], retired: Mapping[str, Retired] = RETIRED
) -> list[str]:
    """Return the words of a command line with the beginning of an option's name replaced by the name.

    sd-scripts takes any beginning that fits one option only; so does this, with a warning, because a later
    version may have a second option that it fits.
    """
    named = [entry for entry in options.values() if not entry.spec.positional]
    names = [alias for entry in named for alias in (entry.flag, *entry.spec.aliases)]
    names += [*retired, "help"]
    return [_with_whole_name(word, names) if word.startswith("--") and word != "--" else word for word in words]


def _with_whole_name(word: str, names: Sequence[str]) -> str:
    name, sign, value = word.removeprefix("--").partition("=")
    fitting = [] if name in names else [candidate for candidate in names if candidate.startswith(name)]
    if len(fitting) > 1:
        raise UserError(f"--{name} is not known; it could be --{', --'.join(fitting)}")
    if fitting:
        _warn(f"--{name} is read as --{fitting[0]}; write it in full")
    return f"--{fitting[0] if fitting else name}{sign}{value}"


def build(root: type[Root], given: Mapping[str, Any]) -> Root:
    """Return the root with its sections filled from flag -> value."""
    sections = {}
    for name, section in sections_of(root):
        values = {entry.field: given[entry.flag] for entry in section_options(section) if entry.flag in given}
        sections[name] = section(**values)
    return root(**sections)


def _explain_unknown(
    words: Sequence[str], options: Mapping[str, Option], retired: Mapping[str, Retired]
) -> list[Retired]:
    """Return the retired options among words that do no harm; raise for anything else that is not known."""
    ignored = []
    expects_value = False
    for word in words:
        if word.startswith("-"):
            name, _, value = word.lstrip("-").partition("=")
            row = retired.get(name)
            if row is None or not row.harmless:
                raise UserError(unknown_message(f"--{name}", name, options, retired))
            ignored.append(row)
            expects_value = row.takes_value and not value
        elif expects_value:
            expects_value = False
        else:
            raise UserError(f"unexpected argument {word!r}: give it with its option, and quotes round spaces")
    return ignored


def unknown_message(label: str, name: str, known: Mapping[str, Any], retired: Mapping[str, Retired] = RETIRED) -> str:
    """Return the line for a name that is no option: why it was retired, or the nearest known name."""
    if name in retired:
        return f"{label} is not available: {retired[name].reason}"
    return f"{label} is not known{nearest(name, known)}"


def nearest(name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    """Return "; did you mean X?" for the nearest of the known names, or nothing."""
    candidates = [candidate for candidate in known if candidate.startswith(name)] if len(name) > 3 else []
    candidates = candidates or difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {candidates[0]}?" if candidates else ""


def _warn(message: str) -> None:
    import logging

    logging.getLogger(__name__).warning(message)


# --------------------------------------------------------------------------------------------------------------
# TOML
# --------------------------------------------------------------------------------------------------------------


def read_config_file(path: Path, options: Mapping[str, Option]) -> dict[str, Any]:
    """Return flag -> typed value from a TOML file; its sections only group, a later duplicate wins."""
    path = with_toml_suffix(path)
    values: dict[str, Any] = {}
    names = {alias: entry for entry in options.values() for alias in (entry.flag, *entry.spec.aliases)}
    for key, value in _flat(toml_text.load(path)):
        if key in values and values[key] != value:
            is_secret = key in names and names[key].spec.secret
            _warn(f"{path}: {key} is given twice; the later value {'' if is_secret else f'{value!r} '}counts")
        values[key] = value
    given = {}
    for key, value in values.items():
        if key in RETIRED and value in RETIRED[key].neutral:
            continue  # it is off, as it is here
        if key in RETIRED and RETIRED[key].harmless:
            _warn(f"{path}: {key} is ignored: {RETIRED[key].reason}")
        elif key not in names:
            raise UserError(unknown_message(f"{path}: {key}", key, names))
        else:
            given[names[key].flag] = names[key].read(value, f"{path}: {key}")
    return given


def with_toml_suffix(path: Path) -> Path:
    """Return the path with `.toml` appended where it is missing, as --config_file is read."""
    return path if path.suffix.lower() == ".toml" else Path(f"{path}.toml")


def _flat(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from value.items()
        else:
            yield key, value


def changed_options(config: Any) -> dict[str, dict[str, Any]]:
    """Return section title -> flag -> value for every option that differs from its default."""
    changed: dict[str, dict[str, Any]] = {}
    for name, section_class in sections_of(type(config)):
        section = getattr(config, name)
        for entry in section_options(section_class, name):
            value = getattr(section, entry.field)
            is_recorded = not (entry.spec.file_only or entry.spec.secret or entry.flag in NOT_RECORDED)
            if value != entry.default and is_recorded:
                changed.setdefault(name, {})[entry.flag] = value
    return changed


NOT_RECORDED = {"config_file", "output_config"}


def to_toml(config: Any) -> str:
    """Return a config file that repeats this configuration."""
    return toml_text.dump(changed_options(config))
