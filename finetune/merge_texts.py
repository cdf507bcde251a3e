"""What `merge_captions_to_metadata.py` and `merge_dd_tags_to_metadata.py` share: text files into a metadata file."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.metadata_files import Entries, check_json_path, read_metadata, write_metadata
from library.config.options import REQUIRED, option
from library.config.values import parse_extension
from library.errors import Problems, UserError
from library.logs import FAILURE

logger = logging.getLogger(__name__)

MOST_NAMED = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilesConfig:
    """Files."""

    train_data_dir: Path = option(REQUIRED, "folder of the pictures", positional=True, reads="a folder")
    out_json: Path = option(REQUIRED, "metadata file to write; entries that it has are kept", positional=True)
    in_json: Path | None = option(None, "metadata file whose entries are kept, in place of those of out_json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamesConfig:
    """Names."""

    full_path: bool = option(False, "name pictures by their whole path, not by the file name without extension")
    recursive: bool = option(False, "read sub-folders too; needs --full_path")
    debug: bool = option(False, "tell every text that is read")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Which texts go where; a script adds the section of its texts."""

    files: FilesConfig
    names: NamesConfig


def extension_option(default: str) -> Any:
    """Return the option --caption_extension with a default."""
    return option(
        default,
        "extension of the text files",
        aliases=("caption_extention",),  # as sd-scripts wrote it once
        parse=parse_extension,
        form="an extension such as .txt",
    )


def merge_texts(files: FilesConfig, names: NamesConfig, extension: str, key: str) -> int:
    """Put the texts of all pictures into the metadata file under a key; return the exit code."""
    entries = read_metadata(base) if (base := base_file(files)) is not None else {}
    pictures = list_all(files.train_data_dir, recursive=names.recursive)
    named = named_pictures(pictures, files.train_data_dir, entries, full_path=names.full_path)
    texts, missing, damaged = read_texts(named, extension)
    log_left_out(missing, damaged, extension)
    if not texts:
        raise UserError(
            f"none of the {len(pictures)} pictures of {files.train_data_dir} has a {extension} file that can be read: "
            "--caption_extension says which files to take"
        )
    if names.debug:
        for name, text in texts.items():
            logger.info("%s: %s", name, text)
    write_metadata(files.out_json, merged(entries, texts, key))
    logger.info("%s: %d of %d pictures have %s", files.out_json, len(texts), len(pictures), key)
    return FAILURE if damaged else 0


def check_out_json(config: MergeConfig, problems: Problems) -> None:
    """Raise UserError for an out_json that is no name of a metadata file."""
    check_json_path(config.files.out_json, "out_json", exists=False)


def check_in_json(config: MergeConfig, problems: Problems) -> None:
    """Raise UserError for an --in_json that is no metadata file."""
    if config.files.in_json is not None:
        check_json_path(config.files.in_json, "--in_json", exists=True)


def check_names(config: MergeConfig, problems: Problems) -> None:
    """Raise UserError for names that would not tell pictures apart."""
    if config.names.recursive and not config.names.full_path:
        raise UserError("--recursive needs --full_path: pictures of several folders can have the same name")


RULES = (check_out_json, check_in_json, check_names)


def base_file(files: FilesConfig) -> Path | None:
    """Return the metadata file whose entries are kept, or None where there is none yet."""
    return files.in_json or (files.out_json if files.out_json.is_file() else None)


def list_all(folder: Path, *, recursive: bool) -> list[Path]:
    """Return the pictures of a folder, of its sub-folders too if asked, sorted by path; raises UserError for none."""
    from library.data.images import list_pictures

    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())] if recursive else [folder]
    pictures = sorted(picture for each in folders for picture in list_pictures(each))
    if not pictures:
        raise UserError(f"train_data_dir: {folder} has no pictures; --recursive looks into sub-folders")
    return pictures


def named_pictures(pictures: Sequence[Path], folder: Path, entries: Entries, *, full_path: bool) -> dict[str, Path]:
    """Return name in the metadata file -> picture; raises UserError where training would find another by a name."""
    if not full_path:
        check_stems(pictures, folder)
    return {name_in(entries, picture, full_path=full_path): picture for picture in pictures}


def check_stems(pictures: Sequence[Path], folder: Path) -> None:
    """Raise UserError for pictures whose names without extension lead training to another one, or to none."""
    from library.data.sources import find_picture

    lost = []
    for picture in pictures:
        found = find_picture(picture.stem, folder)
        if found is None or not found.samefile(picture):
            lost.append(picture.name if found is None else f"{picture.name} and {found.name}")
    if lost:
        raise UserError(
            f"{len(lost)} of {len(pictures)} pictures cannot be told from others by their names without extension "
            f"({', '.join(lost[:MOST_NAMED])}): rename them, or name pictures by their paths with --full_path"
        )


def name_in(entries: Entries, picture: Path, *, full_path: bool) -> str:
    """Return the name under which a picture has an entry, with extension or without, else the usual one."""
    # Without `..`, so that a picture has one name; links stay as the user wrote them.
    whole = os.path.abspath(picture) if full_path else picture.name  # noqa: PTH100
    usual = whole if full_path else picture.stem
    return next((name for name in (whole, str(Path(whole).with_suffix(""))) if name in entries), usual)


def read_texts(named: Mapping[str, Path], extension: str) -> tuple[dict[str, str], list[Path], list[str]]:
    """Return name -> text, the pictures that have no text file, and what is wrong with files that cannot be read.

    Lines that are not blank are kept as lines: training takes the first, or with wildcards draws one.
    """
    from tqdm import tqdm

    from library.data.captions import read_caption

    texts, missing, damaged = {}, [], []
    for name, picture in tqdm(named.items(), desc="texts", unit="file"):
        try:
            lines = read_caption(picture, extension)
        except UserError as error:
            damaged.append(str(error))
            continue
        if lines is None:
            missing.append(picture)
        else:
            texts[name] = "\n".join(lines)
    return texts, missing, damaged


def log_left_out(missing: Sequence[Path], damaged: Sequence[str], extension: str) -> None:
    """Log the pictures without text, and the files that cannot be read."""
    if missing:
        names = ", ".join(path.name for path in missing[:MOST_NAMED])
        logger.warning("%d pictures have no %s file (%s): they are passed over", len(missing), extension, names)
    for message in damaged[:MOST_NAMED]:
        logger.error("%s", message)
    if len(damaged) > MOST_NAMED:
        logger.error("and %d more files that cannot be read", len(damaged) - MOST_NAMED)


def merged(entries: Entries, texts: Mapping[str, str], key: str) -> Entries:
    """Return the entries with the texts under a key; what else is said of a picture stays."""
    return entries | {name: entries.get(name, {}) | {key: text} for name, text in texts.items()}
