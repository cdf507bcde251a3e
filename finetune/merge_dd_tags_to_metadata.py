"""Collect the tags of pictures from text files beside them into a metadata file.

python finetune/merge_dd_tags_to_metadata.py pictures metadata.json

reads pictures/a.txt for pictures/a.png, and so on. Existing entries of metadata.json and texts of other kinds are
kept; a picture without a .txt file is skipped. Training reads the file with --in_json, or as metadata_file.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a script, from any folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetune.merge_texts import merge_texts
from library.logs import run_script


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with a command line; return the exit code."""
    return merge_texts(argv, description=__doc__, key="tags", default_extension=".txt")


if __name__ == "__main__":
    run_script(main)
