"""Clean the captions and tags that captioners and taggers wrote into a metadata file.

python finetune/clean_captions_and_tags.py metadata.json clean.json --debug

The rules for tags are EMOTICON, RATING and CONTRADICTIONS below, those for captions CAPTION_REPLACEMENTS, which
--replacements replaces by your own table.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a script, from any folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetune.metadata_files import Entries, check_json_path, read_metadata, write_metadata
from library.config.command_line import parse
from library.config.options import REQUIRED, option
from library.config.toml_text import load_json
from library.errors import Problems, UserError, shown
from library.logs import run_script

logger = logging.getLogger(__name__)

# Faces such as ^_^, ||_|| and (o)_(o): their underscores are mouths.
EMOTICON = re.compile(r"._.|\W{2,3}_\W{2,3}|\W\w\W_\W\w\W")
# Taggers append a rating to the tags; no prompt would contain it.
RATING = re.compile(r"rating\b.*")
# Kinds of tags of which a person has one: with several people and several tags of a kind, it is open whose they are.
SEVERAL_PEOPLE = re.compile(r"(?:\d+\+?|multiple )(?:girls|boys|others)")
CONTRADICTIONS = {
    "length of hair": r"(?:(?:very|absurdly) )?(?:short|medium|long) hair",
    "kind of hair": r"(?!(?:short|medium|long) )[\w-]+ hair",
    "haircut": r"(?:bob|bowl|hime|pixie) cut",
    "hairstyle": r"ahoge|sidelocks|two side up|(?:[\w-]+ ){0,2}(?:braids?|buns?|ponytail|twintails)",
    "eyes": r"[\w-]+ eyes",
    "sleeves": r"[\w-]+ sleeves|sleeveless",
}
# Whole words -> their replacement; applied until nothing changes.
CAPTION_REPLACEMENTS = {
    # One word for one thing, so that it is learned as one. Words that fit any person stay.
    "woman": "girl",
    "women": "girls",
    "lady": "girl",
    "ladies": "girls",
    "female": "girl",
    "females": "girls",
    "female character": "girl",
    "female characters": "girls",
    # Words that are true of nearly every picture of a set distinguish none.
    "anime anime": "anime",
    "an anime girl": "a girl",
    "anime girl": "girl",
    "anime girls": "girls",
    "an animated girl": "a girl",
    "animated girl": "girl",
    "cartoon girl": "girl",
    "cartoon girls": "girls",
    "young girl": "girl",
    "young girls": "girls",
    "cute girl": "girl",
    "pretty girl": "girl",
    "beautiful girl": "girl",
    # Words without meaning for the picture.
    "a picture of": "",
    "an image of": "",
    "a drawing of": "",
    "an illustration of": "",
    "there is": "",
    "that is wearing": "wearing",
    "who is wearing": "wearing",
    "and is wearing": "wearing",
}
MOST_ROUNDS, MOST_LETTERS = 50, 100_000  # replacements beyond these are taken as endless


@dataclasses.dataclass(frozen=True, kw_only=True)
class CleanOptions:
    """Options."""

    in_json: Path = option(REQUIRED, "metadata file to read", positional=True)
    out_json: Path = option(REQUIRED, "metadata file to write; may be in_json", positional=True)
    replacements: Path | None = option(
        None, "JSON object of words -> words for captions, instead of the built-in one; {} leaves captions unchanged"
    )
    debug: bool = option(False, "log every text that changes")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with a command line; return the exit code."""
    config = parse(CleanOptions, argv, description=__doc__, rules=(check_files,))
    replacements = config.replacements
    table = CAPTION_REPLACEMENTS if replacements is None else read_replacements(replacements)
    entries = read_metadata(config.in_json)
    cleaned = {name: clean_entry(values, table) for name, values in entries.items()}
    log_changes(entries, cleaned, debug=config.debug)
    write_metadata(config.out_json, cleaned)
    return 0


def check_files(config: CleanOptions, problems: Problems) -> None:
    """Add to problems what is wrong with in_json and out_json."""
    problems.run(check_json_path, config.in_json, "in_json", exists=True)
    problems.run(check_json_path, config.out_json, "out_json", exists=False)


def read_replacements(path: Path) -> dict[str, str]:
    """Return the replacements in a JSON file; raises UserError for a damaged file, or one of another form."""
    try:
        table = load_json(path)
    except UserError as error:
        raise UserError(f"--replacements: {error}") from None
    is_table = isinstance(table, dict) and all(words.strip() and isinstance(text, str) for words, text in table.items())
    if not is_table:
        raise UserError(f'--replacements: {path} must be an object such as {{"woman": "girl"}}, got {shown(table)}')
    return {" ".join(words.casefold().split()): text for words, text in table.items()}


def clean_entry(values: Mapping[str, Any], replacements: Mapping[str, str]) -> dict[str, Any]:
    """Return an entry with caption and tags cleaned; other values are unchanged."""
    cleaned = dict(values)
    if values.get("tags"):
        cleaned["tags"] = "\n".join(clean_tags(line) for line in values["tags"].split("\n"))
    if values.get("caption"):
        cleaned["caption"] = "\n".join(clean_caption(line, replacements) for line in values["caption"].split("\n"))
    return cleaned


def log_changes(before: Entries, after: Entries, *, debug: bool) -> None:
    """Log how many texts changed, and each change if debug."""
    changed = [
        (name, values[key], after[name][key])
        for name, values in before.items()
        for key in ("caption", "tags")
        if values.get(key) and values[key] != after[name][key]
    ]
    if debug:
        for name, old, new in changed:
            logger.info("%s: %s\n  -> %s", name, old, new)
    logger.info("%d texts of %d pictures changed", len(changed), len(before))


def clean_tags(text: str) -> str:
    """Return a line of tags after all rules, in their order."""
    tags = [tag.strip() for tag in text.split(",") if tag.strip()]
    # Spaces for underscores, except in emoticons.
    tags = [tag if EMOTICON.fullmatch(tag) else " ".join(tag.replace("_", " ").split()) or tag for tag in tags]
    tags = without_contradictions([tag for tag in tags if not RATING.fullmatch(tag)])
    # Without single words that a longer tag ends with: shirt beside white shirt.
    last_words = {tag.rsplit(" ", 1)[1] for tag in tags if " " in tag}
    return ", ".join(tag for tag in tags if tag not in last_words)


def without_contradictions(tags: Sequence[str]) -> list[str]:
    """Return the tags; if there are several people, without kinds of which there are several tags."""
    if not any(SEVERAL_PEOPLE.fullmatch(tag) for tag in tags):
        return list(tags)
    kept = list(tags)
    for pattern in CONTRADICTIONS.values():
        of_kind = {tag for tag in tags if re.fullmatch(pattern, tag)}
        if len(of_kind) > 1:
            kept = [tag for tag in kept if tag not in of_kind]
    return kept


def clean_caption(text: str, replacements: Mapping[str, str]) -> str:
    """Return a line of a caption with whole words replaced until nothing changes; raises UserError if it never ends."""
    if not replacements:
        return text
    longest_first = sorted(replacements, key=len, reverse=True)
    pattern = re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, longest_first))})(?![\w-])", re.IGNORECASE)
    cleaned = " ".join(text.split())
    for _ in range(MOST_ROUNDS):
        former = cleaned
        cleaned = " ".join(pattern.sub(lambda match: replacement(match[0], replacements), former).split())
        if cleaned == former:
            return cleaned
        if len(cleaned) > MOST_LETTERS:
            break
    raise UserError(f"--replacements never come to an end: {shown(text)} became {shown(cleaned)}")


def replacement(found: str, replacements: Mapping[str, str]) -> str:
    """Return the replacement of words, with a capital letter if they have one."""
    text = replacements.get(found.casefold(), found)  # a few letters match others that are not their capitals
    return text[:1].upper() + text[1:] if found[0].isupper() else text


if __name__ == "__main__":
    run_script(main)
