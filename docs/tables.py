"""Fill the tables of the documentation from the declarations of the options.

python docs/tables.py             rewrites what stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`
python docs/tables.py --check     changes nothing; exits with 1 where a page is out of date

English meanings are the help texts of the declarations. Japanese ones stand in `meanings-ja.toml`; a missing
or surplus one is an error. Nothing here imports torch.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

if TYPE_CHECKING:
    from library.config.options import Option

MEANINGS_FILE = FOLDER / "meanings-ja.toml"
Meanings = Mapping[str, Mapping[str, str]]  # kind -> name -> Japanese meaning
BLOCK = re.compile(r"(?s)<!-- (?P<name>[\w-]+):begin -->\n.*?<!-- (?P=name):end -->")
UNSET = "–"
LEVEL_LETTERS = {"general": "G", "datasets": "D", "subsets": "S"}

# Words of the tables: English, Japanese.
WORDS = {
    "option": ("option", "オプション"),
    "key": ("key", "キー"),
    "type": ("type", "型"),
    "default": ("default", "既定値"),
    "meaning": ("meaning", "意味"),
    "levels": ("levels", "書ける場所"),
    "command line": ("command line", "コマンドライン"),
    "effect": ("effect", "扱い"),
    "reason": ("reason", "理由"),
    "off": ("off", "オフ"),
    "refused": ("refused", "エラー"),
    "ignored": ("ignored", "警告して無視"),
    "one of": ("one of", "次のいずれか："),
}
TYPES_JA = {
    "flag": "フラグ",
    "bool": "真偽値",
    "int": "整数",
    "float": "数値",
    "str": "文字列",
    "path": "パス",
    "table": "テーブル",
    "int or int,int": "整数、または「整数,整数」",
    "int or [int, int]": "整数、または[整数, 整数]",
    "int or share": "整数、または割合",
    "float,float": "数値,数値",
    "[float, float]": "[数値, 数値]",
}
# Where the kind alone tells too little.
OWN_TYPES = {"face_crop_aug_range": "float,float", "lr_warmup_steps": "int or share", "lr_decay_steps": "int or share"}


# --------------------------------------------------------------------------------------------------------------
# Parts of a table
# --------------------------------------------------------------------------------------------------------------


def word(name: str, language: str) -> str:
    """Return a word of the tables in a language, "en" or "ja"."""
    return WORDS[name][language == "ja"]


def table(names: Sequence[str], rows: Iterable[Sequence[str]], language: str) -> str:
    """Return a Markdown table; names are words of the tables."""
    lines = [[word(name, language) for name in names], ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def code(text: str) -> str:
    """Return text as Markdown code."""
    return f"`{text}`"


def type_text(entry: Option, language: str, *, in_file: bool) -> str:
    """Return the type of an option with its range."""
    name = OWN_TYPES.get(entry.field, entry.kind.name)
    if in_file:
        name = {"flag": "bool", "int or int,int": "int or [int, int]", "float,float": "[float, float]"}.get(name, name)
    if language == "ja":
        name = f"{TYPES_JA[item]}のリスト" if (item := name.removeprefix("list of ")) != name else TYPES_JA[name]
    low, high = entry.spec.minimum, entry.spec.maximum
    if low is not None and high is not None:
        return f"{name} {low:g}–{high:g}"
    return f"{name} ≥ {low:g}" if low is not None else name


def default_text(entry: Option, language: str, *, in_file: bool) -> str:
    """Return the default of an option as users write it."""
    from library.config.options import format_default
    from library.config.toml_text import dump_value

    if entry.default is None:
        return UNSET
    if isinstance(entry.default, bool):
        return code(dump_value(entry.default)) if in_file else word("off", language)
    if isinstance(entry.default, str) and (in_file or not entry.default):
        return code(dump_value(entry.default))
    return code(format_default(entry.default))


def meaning_text(entry: Option, meaning: str, language: str) -> str:
    """Return the meaning of an option with its choices."""
    if not entry.kind.choices:
        return meaning
    choices = (code(choice) for choice in entry.choices)
    if language == "ja":
        return f"{meaning}（{word('one of', language)}{'、'.join(choices)}）"
    return f"{meaning} ({word('one of', language)} {', '.join(choices)})"


def english_meaning(entry: Option) -> str:
    """Return the help of an option, with the form of its values where that is more than its type tells."""
    is_list = entry.kind.name.startswith("list of")
    return f"{entry.spec.help} ({entry.spec.form})" if entry.spec.form and not is_list else entry.spec.help


# --------------------------------------------------------------------------------------------------------------
# Japanese meanings
# --------------------------------------------------------------------------------------------------------------


def read_meanings() -> Meanings:
    """Return the Japanese meanings by kind; ends the program where they do not fit the declarations."""
    from library.config import toml_text

    given = toml_text.load(MEANINGS_FILE)
    problems = []
    for kind, names in expected_meanings().items():
        known = given.get(kind, {})
        problems += [f"[{kind}] {name!r} is missing" for name in names if name not in known]
        problems += [f"[{kind}] {name!r} is not needed" for name in known if name not in names]
    if problems:
        raise SystemExit("\n".join(f"{MEANINGS_FILE.name}: {problem}" for problem in problems))
    return given


def expected_meanings() -> dict[str, set[str]]:
    """Return kind -> names for which there must be a Japanese text."""
    from library.config.dataset_file import ALL_KEYS, IGNORED
    from library.config.options import root_options, sections_of
    from library.config.retired import RETIRED
    from library.config.train import TrainConfig

    return {
        "sections": {name for name, _ in sections_of(TrainConfig)},
        "options": set(root_options(TrainConfig)),
        "dataset_keys": {key for key, entry in ALL_KEYS.items() if entry.spec.file_only},
        "retired": {entry.reason for entry in RETIRED.values()},
        "ignored_keys": set(IGNORED.values()),
    }


# --------------------------------------------------------------------------------------------------------------
# Blocks
# --------------------------------------------------------------------------------------------------------------


def options_block(language: str, meanings: Meanings) -> str:
    """Return the tables of all options of train_network.py, by section."""
    from library.config.options import section_options, sections_of
    from library.config.train import TrainConfig

    parts = []
    for name, section in sections_of(TrainConfig):
        title = meanings["sections"][name] if language == "ja" else (section.__doc__ or name).split("\n")[0].rstrip(".")
        rows = []
        for entry in section_options(section, name):
            if entry.spec.file_only:
                continue
            flags = ", ".join(code(f"--{flag}") for flag in (entry.flag, *entry.spec.aliases))
            meaning = meanings["options"][entry.flag] if language == "ja" else english_meaning(entry)
            rows.append(
                (
                    flags,
                    type_text(entry, language, in_file=False),
                    default_text(entry, language, in_file=False),
                    meaning_text(entry, meaning, language),
                )
            )
        parts.append(f"### {title}\n\n{table(('option', 'type', 'default', 'meaning'), rows, language)}")
    return "\n\n".join(parts)


def retired_block(language: str, meanings: Meanings) -> str:
    """Return the table of options of sd-scripts that the suite does not have."""
    from library.config.retired import RETIRED

    rows = [
        (
            code(f"--{entry.name}"),
            word("ignored" if entry.harmless else "refused", language),
            meanings["retired"][entry.reason] if language == "ja" else entry.reason,
        )
        for entry in RETIRED.values()
    ]
    return table(("option", "effect", "reason"), rows, language)


def dataset_block(section: type, language: str, meanings: Meanings) -> str:
    """Return the table of the dataset file's keys that a section declares."""
    from library.config.options import section_options

    rows = []
    for entry in section_options(section):
        japanese = meanings["dataset_keys" if entry.spec.file_only else "options"]
        meaning = japanese[entry.field if entry.spec.file_only else entry.flag] if language == "ja" else ""
        rows.append(
            (
                code(entry.field),
                type_text(entry, language, in_file=True),
                default_text(entry, language, in_file=True),
                " ".join(LEVEL_LETTERS[level] for level in entry.spec.levels),
                UNSET if entry.spec.file_only else code(f"--{entry.flag}"),
                meaning_text(entry, meaning or english_meaning(entry), language),
            )
        )
    return table(("key", "type", "default", "levels", "command line", "meaning"), rows, language)


def dataset_keys_block(language: str, meanings: Meanings) -> str:
    """Return the keys of datasets."""
    from library.config.dataset import DatasetOptions

    return dataset_block(DatasetOptions, language, meanings)


def subset_keys_block(language: str, meanings: Meanings) -> str:
    """Return the keys of subsets."""
    from library.config.dataset import SubsetOptions

    return dataset_block(SubsetOptions, language, meanings)


def ignored_keys_block(language: str, meanings: Meanings) -> str:
    """Return the table of the keys of sd-scripts that change nothing here."""
    from library.config.dataset_file import IGNORED

    rows = [[f"`{key}`", meanings["ignored_keys"][text] if language == "ja" else text] for key, text in IGNORED.items()]
    return table(["key", "reason"], rows, language)


BLOCKS: dict[str, Callable[[str, Meanings], str]] = {
    "options": options_block,
    "retired": retired_block,
    "dataset-keys": dataset_keys_block,
    "subset-keys": subset_keys_block,
    "ignored-keys": ignored_keys_block,
}


# --------------------------------------------------------------------------------------------------------------
# Pages
# --------------------------------------------------------------------------------------------------------------


def pages() -> list[Path]:
    """Return the pages of this folder."""
    return sorted(FOLDER.glob("*.md"))


def filled(page: Path, meanings: Meanings) -> str:
    """Return the text of a page with its tables as they should be; `-ja` in the name tells the language."""
    language = "ja" if page.stem.endswith("-ja") else "en"

    def fill(found: re.Match[str]) -> str:
        name = found["name"]
        return f"<!-- {name}:begin -->\n\n{BLOCKS[name](language, meanings)}\n\n<!-- {name}:end -->"

    return BLOCK.sub(fill, page.read_text(encoding="utf-8"))


def outdated() -> dict[Path, str]:
    """Return page -> new text for the pages whose tables are out of date."""
    meanings = read_meanings()
    texts = {page: filled(page, meanings) for page in pages()}
    return {page: text for page, text in texts.items() if text != page.read_text(encoding="utf-8")}


def main(arguments: Sequence[str]) -> int:
    """Rewrite the pages, or with --check only tell which are out of date."""
    if list(arguments) not in ([], ["--check"]):
        sys.stderr.write("usage: python docs/tables.py [--check]\n")
        return 2
    changes = outdated()
    for page, text in changes.items():
        if arguments:
            sys.stdout.write(f"{page.name} is out of date: run python docs/tables.py\n")
        else:
            page.write_text(text, encoding="utf-8", newline="\n")
            sys.stdout.write(f"{page.name} is rewritten\n")
    return 1 if arguments and changes else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
