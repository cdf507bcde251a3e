"""Shared by `merge_captions_to_metadata.py` and `merge_dd_tags_to_metadata.py`: text files into a metadata file."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.metadata_files import Entries, check_json_path, read_metadata, write_metadata
from library.config.command_line import parse
from library.config.options import REQUIRED, option
from library.config.values import parse_extension
from library.errors import MOST_NAMED, Problems, UserError, named
from library.logs import FAILURE
from library.progress import Bar

if TYPE_CHECKING:
    from library.data.caption_files import CaptionFile

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFiles:
    """Files."""

    train_data_dir: Path = option(REQUIRED, "folder of the pictures", positional=True, reads="a folder")
    out_json: Path = option(REQUIRED, "metadata file to write; its existing entries are kept", positional=True)
    in_json: Path | None = option(None, "metadata file whose entries are kept, instead of those of out_json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamesConfig:
    """Names."""

    full_path: bool = option(False, "name pictures by their full path, not by the file name without extension")
    recursive: bool = option(False, "read sub-folders too; needs --full_path")
    debug: bool = option(False, "log every text that is read")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextsConfig:
    """Texts."""

    caption_extension: str | None = option(
        None,
        "extension of the text files; unset: .caption for captions, .txt for tags",
        aliases=("caption_extention",),  # as sd-scripts wrote it once
        parse=parse_extension,
        form="an extension such as .txt",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """All options."""

    files: TextFiles
    names: NamesConfig
    texts: TextsConfig


def merge_texts(argv: Sequence[str] | None, *, description: str | None, key: str, default_extension: str) -> int:
    """Put the texts of all pictures into the metadata file under a key; return the exit code."""
    config = parse(MergeConfig, argv, description=description, rules=(check_options,))
    files, names, extension = config.files, config.names, config.texts.caption_extension or default_extension
    base = files.in_json or (files.out_json if files.out_json.is_file() else None)
    entries = {} if base is None else read_metadata(base)
    pictures = list_all(files.train_data_dir, recursive=names.recursive)
    if not names.full_path:
        check_stems(pictures, files.train_data_dir)
    by_name = {name_in(entries, picture, full_path=names.full_path): picture for picture in pictures}
    found, damaged = read_texts(pictures, extension)
    log_skipped(found, damaged, extension)
    # Lines that are not blank are kept as lines: training uses the first, or with wildcards a random one.
    texts = {
        name: "\n".join(found[picture].lines)
        for name, picture in by_name.items()
        if picture in found and found[picture].name is not None
    }
    if not texts:
        raise UserError(
            f"none of the {len(pictures)} pictures of {files.train_data_dir} has a {extension} file that can be read: "
            "--caption_extension sets which files to read"
        )
    if names.debug:
        for name, text in texts.items():
            logger.info("%s: %s", name, text)
    write_metadata(files.out_json, entries | {name: entries.get(name, {}) | {key: texts[name]} for name in texts})
    logger.info("%s: %d of %d pictures have %s", files.out_json, len(texts), len(pictures), key)
    return FAILURE if damaged else 0


def check_options(config: MergeConfig, problems: Problems) -> None:
    """Add to problems bad names of metadata files, and options under which pictures could have the same name."""
    problems.run(check_json_path, config.files.out_json, "out_json", exists=False)
    if config.files.in_json is not None:
        problems.run(check_json_path, config.files.in_json, "--in_json", exists=True)
    if config.names.recursive and not config.names.full_path:
        problems.add("--recursive needs --full_path: pictures of several folders can have the same name")


def list_all(folder: Path, *, recursive: bool) -> list[Path]:
    """Return the pictures of a folder, of its sub-folders too if asked, sorted by path; raises UserError for none."""
    from library.data.listing import list_pictures

    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())] if recursive else [folder]
    pictures = sorted(picture for each in folders for picture in list_pictures(each))
    if not pictures:
        raise UserError(f"train_data_dir: {folder} has no pictures; --recursive looks into sub-folders")
    return pictures


def check_stems(pictures: Sequence[Path], folder: Path) -> None:
    """Raise UserError for pictures that training would not find by their names without extension."""
    from library.data.sources import Folders, find_picture

    lost, folders = [], Folders()
    for picture in pictures:
        found = find_picture(picture.stem, folder, folders)
        if found is None or not found.samefile(picture):
            lost.append(picture.name if found is None else f"{picture.name} and {found.name}")
    if lost:
        raise UserError(
            f"{len(lost)} of {len(pictures)} pictures cannot be told from others by their names without extension "
            f"({named(lost)}): rename them, or name pictures by their paths with --full_path"
        )


def name_in(entries: Entries, picture: Path, *, full_path: bool) -> str:
    """Return the name of a picture's entry, with or without extension; if it has none, the usual name."""
    # Without `..`, so that a picture has one name; symbolic links are not resolved.
    whole = os.path.abspath(picture) if full_path else picture.name  # noqa: PTH100
    usual = whole if full_path else picture.stem
    return next((name for name in (whole, str(Path(whole).with_suffix(""))) if name in entries), usual)


def read_texts(pictures: Sequence[Path], extension: str) -> tuple[dict[Path, CaptionFile], list[str]]:
    """Return picture -> its text file, and what is wrong with the files that cannot be read."""

    from library.data.caption_files import read_caption

    found, damaged = {}, []
    for picture in Bar(pictures, total=len(pictures), desc="texts", unit="file"):
        try:
            found[picture] = read_caption(picture, extension)
        except UserError as error:
            damaged.append(str(error))
    return found, damaged


def log_skipped(found: Mapping[Path, CaptionFile], damaged: Sequence[str], extension: str) -> None:
    """Log the pictures without text, with the files beside them that could hold it, and the files not readable."""
    from library.data.caption_files import other_files, remedies
    from library.data.listing import files_of

    missing = [picture for picture, file in found.items() if file.name is None]
    if missing:
        others: dict[str, list[Path]] = {}
        within: dict[Path, dict[str, CaptionFile]] = {picture.parent: {} for picture in missing}
        for picture, file in found.items():
            if picture.parent in within:
                within[picture.parent][picture.name] = file
        for folder, files in within.items():
            for ending, names in other_files(files, folder, files_of(folder), extension).items():
                others.setdefault(ending, []).extend(folder / name for name in names)
        way = f"rename these to {extension}" if any(file.lines for file in found.values()) else "--caption_extension {}"
        logger.warning(
            "%d pictures have no %s file (%s): they are skipped%s",
            len(missing),
            extension,
            named([picture.name for picture in missing]),
            remedies(others, missing, way),
        )
    for message in damaged[:MOST_NAMED]:
        logger.error("%s", message)
    if len(damaged) > MOST_NAMED:
        logger.error("and %d more files that cannot be read", len(damaged) - MOST_NAMED)
