"""Reads options from a command line: parser, abbreviations, unknown options.

The parser has no defaults, so parsing yields only the given options, and "defaults < TOML < command line" is one
dict union.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from library.config.config_file import read_config_file
from library.config.effects import nearer_wins, warn_of_idle, without_losers
from library.config.options import (
    Given,
    Option,
    build,
    help_text,
    root_options,
    section_options,
    sections_of,
    unknown_message,
)
from library.config.printed import Implied, options_text
from library.config.retired import RETIRED, Retired
from library.errors import Problems, UserError, shown

logger = logging.getLogger(__name__)

Root = TypeVar("Root")

# What is asked of a script instead of its work, besides --help: name, and its line in the help.
PRINT, PRINT_HELP = "print_options", "print the options that hold and where each comes from, and end"
COMMAND_LINE, FIXED = "command line", "set by the script"  # sources of values

DASHES = re.compile(r"^[\u2010-\u2015\u2212\uff0d\u30fc]+")  # of word processors and Japanese keyboards
# Numbers that are not options; the pattern of argparse has no exponents.
NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)


def build_parser(root: type, description: str | None, *, complete: bool = True) -> argparse.ArgumentParser:
    """Return the parser of a root; it yields texts, and only for the given options.

    complete: whether arguments without a name must be there.
    """
    positionals = [entry.flag for entry in root_options(root).values() if entry.spec.positional]
    parser = _Parser(
        description=description,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,  # see with_whole_names
        formatter_class=_Formatter,
        usage=" ".join(["%(prog)s [options]", *positionals]),
    )
    parser._negative_number_matcher = NEGATIVE_NUMBER
    parser.add_argument(f"--{PRINT}", action="store_true", help=PRINT_HELP)
    for name, section in sections_of(root):
        group = parser.add_argument_group((section.__doc__ or name).split("\n")[0].rstrip("."))
        for entry in section_options(section, name):
            if not entry.spec.file_only:
                _add_argument(group, entry, complete=complete)
    return parser


def spellings(entry: Option) -> list[str]:
    """Return the names of an option on the command line, with their hyphens."""
    short = [name for name in entry.spec.aliases if len(name) == 1]  # such as -s; the option itself may be --W
    return [f"{'-' if name in short else '--'}{name}" for name in (entry.flag, *entry.spec.aliases)]


def _add_argument(group: argparse._ArgumentGroup, entry: Option, *, complete: bool) -> None:
    names = spellings(entry)
    text = help_text(entry).replace("%", "%%")
    if entry.spec.positional:
        # Of one value; several may be none in any case.
        group.add_argument(entry.flag, nargs=entry.kind.nargs if complete else entry.kind.nargs or "?", help=text)
    elif entry.kind.nargs == 0:
        group.add_argument(*names, dest=entry.flag, action="store_true", help=text)
    else:
        metavar = entry.kind.name.removeprefix("list of ").split()[0].upper()
        group.add_argument(*names, dest=entry.flag, nargs=entry.kind.nargs, metavar=metavar, help=text)


def parse(
    root: type[Root],
    argv: Sequence[str] | None = None,
    *,
    description: str | None = None,
    retired: Mapping[str, Retired] = RETIRED,
    locate: Callable[[Root, Problems], Root] | None = None,
    rules: Sequence[Callable[[Root, Problems], None]] = (),
) -> Root:
    """Return the configuration of a command line: defaults < --config_file < command line.

    retired are the options that only the script of sd-scripts has. locate replaces names by paths. rules check options
    that depend on each other. Both add to problems or raise UserError. Raises one UserError for all mistakes; exits as
    `given_options` does.
    """
    problems = Problems()
    given = given_options(root, argv, problems, description=description, retired=retired)
    config = build(root, given.values, problems, given.unreadable)
    if locate is not None:
        config = problems.run(locate, config, problems) or config
    for rule in rules:
        problems.run(rule, config, problems)
    problems.raise_if_any()
    warn_of_idle(config)
    return config


def given_options(
    root: type,
    argv: Sequence[str] | None,
    problems: Problems,
    *,
    description: str | None = None,
    retired: Mapping[str, Retired] = RETIRED,
    fixed: Mapping[str, Any] | None = None,
    implied: Callable[[Any], Iterable[Implied]] | None = None,
) -> Given:
    """Return the options given on the command line or in --config_file; adds to problems what cannot be read.

    An option on the command line wins over the file, also over options that it excludes. With --output_config the file
    is the output, so it is not read. fixed are values that the script sets in place of the user.

    Exits with 0 after --help, and after --print_options, which shows also what implied says of a configuration; raises
    UserError where there are problems to tell instead.
    """
    options = root_options(root)
    words = with_whole_names(sys.argv[1:] if argv is None else argv, options, retired)
    is_asked = f"--{PRINT}" in words
    known, unknown = build_parser(root, description, complete=not is_asked).parse_known_args(words)
    explain_unknown(unknown, options, retired, problems)
    vars(known).pop(PRINT, None)
    texts = {flag: (value, options[flag].label) for flag, value in vars(known).items()}
    given = Given.of(texts, options, problems, source=COMMAND_LINE)
    path = given.values.get("config_file")
    if path is not None and not given.values.get("output_config"):
        file = problems.run(read_config_file, path, options, problems)
        if file is None:  # a file of which nothing can be read: all its options would be reported as missing
            problems.raise_if_any()
            raise AssertionError
        values = nearer_wins(given.values, file.values, options, near="the command line", far=str(path))
        unreadable = {flag: text for flag, text in file.unreadable.items() if flag not in given.values}
        given = Given(values, unreadable | given.unreadable, file.sources | given.sources)
    values = without_losers(given.values, options) | dict(fixed or {})
    sources = given.sources | dict.fromkeys(fixed or {}, FIXED)
    given = Given(values, given.unreadable, {flag: sources[flag] for flag in values})
    if is_asked:
        problems.raise_if_any()
        config: object = build(root, given.values, Problems())  # what is missing is shown as such
        sys.stdout.write(options_text(config, given, implied(config) if implied else ()))
        raise SystemExit(0)
    return given


def with_whole_names(
    words: Sequence[str], options: Mapping[str, Option], retired: Mapping[str, Retired] = RETIRED
) -> list[str]:
    """Return the words of a command line with abbreviated option names written in full.

    As in sd-scripts, an abbreviation is allowed if it fits only one option; `explain_unknown` reports any other. It is
    logged as a warning, because a later version may have a second option that it fits.
    """
    named = [entry for entry in options.values() if not entry.spec.positional]
    names = [alias for entry in named for alias in (entry.flag, *entry.spec.aliases)]
    names += [*(name for name, row in retired.items() if not row.elsewhere), "help", PRINT]
    return [_with_whole_name(word, names) if word.startswith("--") and word != "--" else word for word in words]


def _with_whole_name(word: str, names: Sequence[str]) -> str:
    name, sign, value = word.removeprefix("--").partition("=")
    fitting = [] if name in names else [candidate for candidate in names if candidate.startswith(name)]
    if len(fitting) != 1:
        return word
    logger.warning("--%s is read as --%s; write it in full", name, fitting[0])
    return f"--{fitting[0]}{sign}{value}"


def advice_on(word: str) -> str:
    """Return what to do about a word that belongs to no option."""
    if word in ("\\", "^", "`"):
        return "it continues a line only at the very end of the line, and only in the shell that knows it"
    if DASHES.match(word):
        return f"options begin with two hyphens: --{DASHES.sub('', word)}"
    return "put it after its option, with quotes around spaces"


def explain_unknown(
    words: Sequence[str], options: Mapping[str, Option], retired: Mapping[str, Retired], problems: Problems
) -> None:
    """Warn of harmless retired options among unknown words, and add everything else to problems."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            problems.add(f"unexpected argument {shown(word)}: {advice_on(word)}")
            continue
        name, sign, value = word.lstrip("-").partition("=")
        row = retired.get(name)
        most = 0 if sign or (row is not None and not row.takes_value) else 1 if row is not None else len(rest)
        while most and rest and not rest[0].startswith("-"):  # the values of the unknown option are no mistakes too
            value, most = rest.pop(0), most - 1
        if row is None or not row.harmless:
            fitting = [candidate for candidate in options if candidate.startswith(name)] if name else []
            could_be = f"--{name} is not known; it could be --{', --'.join(fitting)}" if len(fitting) > 1 else None
            problems.add(could_be or unknown_message(f"--{name}", name, options, retired))
        elif not value or value not in map(str, row.neutral):
            logger.warning("--%s is ignored: %s", name, row.reason)
