"""Put the captions of pictures into a metadata file, from text files beside them.

python finetune/merge_captions_to_metadata.py pictures metadata.json

reads pictures/a.caption for pictures/a.png, and so on. Entries and texts of other kinds that metadata.json has already
are kept; a picture without a .caption file is passed over. Training takes the file with --in_json, or as metadata_file.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a script, from any folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetune.merge_texts import RULES, MergeConfig, extension_option, merge_texts
from library.config.command_line import parse
from library.logs import run_script


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextsConfig:
    """Texts."""

    caption_extension: str = extension_option(".caption")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(MergeConfig):
    """Which texts go where."""

    texts: TextsConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with a command line; return the exit code."""
    config = parse(Config, argv, description=__doc__, rules=RULES)
    return merge_texts(config.files, config.names, config.texts.caption_extension, key="caption")


if __name__ == "__main__":
    run_script(main)
