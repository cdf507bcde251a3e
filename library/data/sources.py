"""The sources of pictures: folders with caption files, and metadata files that list pictures with captions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from library.config.dataset import BY_TAGS, SubsetOptions
from library.config.kinds import read_str
from library.data.caption_files import NO_FILE, CaptionFile, note_captions, read_captions
from library.data.captions import SEPARATORS, Caption, other_separator
from library.data.faults import Faults, Notes
from library.data.images import Mask
from library.data.listing import beginning_of, files_of, names_in, pictures_of, split_name, stem_of
from library.errors import UserError, named, shown
from library.files import PICTURE_SUFFIXES
from library.text_files import UnreadableTextError, read_text

Row = tuple[str, Caption, tuple[str, ...]]  # file of the picture, caption, texts of tags


class Listed(NamedTuple):
    """One picture of a subset with its caption; tag statistics count the tags in the texts of tags."""

    file: str
    subset: SubsetOptions
    caption: Caption
    tags: tuple[str, ...]
    mask: Mask | None

    @property
    def files(self) -> tuple[str, ...]:
        """The files of picture and mask."""
        return (self.file,) if self.mask is None else (self.file, self.mask.file)


def list_subset(subset: SubsetOptions, faults: Faults, notes: Notes) -> list[Listed]:
    """Return the pictures of a subset, sorted by path; those that cannot be used are added to faults.

    Raises UserError for a folder or metadata file that cannot be used at all.
    """
    if subset.metadata_file is not None:
        captions = sorted(read_metadata(subset.metadata_file, subset, faults, notes), key=lambda row: Path(row[0]))
    else:
        captions = list_folder(subset, faults, notes)
    if not captions and not faults:
        notes.warn(f"{subset.source} has no pictures; it is skipped{without_regularisation(subset)}")
    for line in describe_separators(captions, subset):
        notes.warn(line)
    masks = find_masks(subset, [file for file, _, _ in captions], faults)
    return [Listed(file, subset, caption, tags, masks.get(file)) for file, caption, tags in captions]


def without_regularisation(subset: SubsetOptions) -> str:
    """Return what it means for the training that a subset has no pictures."""
    return ", and the training goes on without regularisation by it" if subset.is_reg else ""


def list_folder(subset: SubsetOptions, faults: Faults, notes: Notes) -> list[Row]:
    """Return (picture, caption, tags) for the pictures in a subset's folder."""
    names, beginning = names_in(subset.folder), beginning_of(subset.folder)
    pictures = pictures_of(names)
    found: dict[str, CaptionFile] = {}
    for picture, file in zip(
        pictures, read_captions(subset.folder, pictures, names, subset.caption_extension), strict=True
    ):
        if isinstance(file, UnreadableTextError):
            faults.add(f"caption files {file.kind}", file.path, file.reason)
            found[picture] = CaptionFile(file.path.name, ("",))  # so that what is wrong with the picture is found, too
        else:
            found[picture] = file
    note_captions(found, names, subset, notes)
    none = caption_from(NO_FILE, subset)  # one object for all pictures
    captions = ((name, none if file is NO_FILE else caption_from(file, subset)) for name, file in found.items())
    return [(beginning + name, caption, caption) for name, caption in captions]


def caption_from(file: CaptionFile, subset: SubsetOptions) -> Caption:
    """Return the caption in a caption file, or without one the class token, else ("",).

    Of a file the first line counts, or with wildcards every line that is not blank.
    """
    if file.name is None:
        return tuple((subset.class_tokens or "").split("\n"))
    return tuple(file.lines if subset.enable_wildcard else file.lines[:1]) or ("",)


def describe_separators(rows: Sequence[Row], subset: SubsetOptions) -> Iterator[str]:
    """Yield warnings about captions that the rules for tags take for a single tag, since others separate them."""
    rules = [name for name in BY_TAGS if getattr(subset, name)]
    if not rules:
        return
    texts = ((file, tags if any(tags) else caption) for file, caption, tags in rows)
    own = subset.caption_separator
    by_other: dict[str, list[str]] = {}
    has_own = False
    for file, caption in texts:
        other = other_separator(caption, subset)
        if other is not None:
            by_other.setdefault(other, []).append(Path(file).name)
        has_own = has_own or any(own in text for text in caption)
    is_mixed = len(by_other) > 1 or has_own
    for other, pictures in by_other.items():
        option = f"--caption_separator {SEPARATORS[other]}, or caption_separator in the dataset file, separates them"
        yield (
            f"{subset.source}: {len(pictures)} of {len(rows)} captions have no {shown(own)} but {shown(other)}, so "
            f"that each is a single tag for {' and '.join(rules)}: {named(pictures)}; "
            f"{f'write {shown(own)} in these' if is_mixed else option}"
        )


# --------------------------------------------------------------------------------------------------------------
# Metadata files
# --------------------------------------------------------------------------------------------------------------


def read_metadata(file: Path, subset: SubsetOptions, faults: Faults, notes: Notes) -> list[Row]:
    """Return (picture, caption, tags) for the pictures that a metadata file lists; the tags as lines.

    A `.json` file is an object of picture -> {"caption", "tags"}, a `.jsonl` file has an object with
    "image_path", "caption" and "tags" on each line. A picture is a path, absolute or below image_dir; its
    extension may be missing. Missing pictures are added to faults. Raises UserError for a damaged file.
    """
    found: dict[str, Row] = {}
    again: list[str] = []
    longer: list[str] = []
    entries = read_entries(file, faults, again)
    missing = f"of {len(entries)} pictures of {file} are not there; they are looked for in {subset.folder}"
    folders = Folders()
    for name, values in entries:
        path = find_picture(name, subset.folder, folders)
        if path is None:
            faults.add(missing, name)
            continue
        picture = str(path)
        if picture in found:
            again.append(name)
        found[picture] = (picture, joined_caption(values, subset), tuple(values["tags"].split("\n")))
        if not subset.enable_wildcard and len(values["caption"].strip().splitlines()) > 1:
            longer.append(path.name)
    for line in describe_entries(list(found.values()), subset, again=again, longer=longer):
        notes.warn(f"{file}: {line}")
    return list(found.values())


def describe_entries(
    found: Sequence[Row], subset: SubsetOptions, *, again: Sequence[str], longer: Sequence[str]
) -> Iterator[str]:
    """Yield warnings about the entries of a metadata file: names listed twice, several lines, no text."""
    if again:
        yield f"{len(again)} pictures are listed twice, and the last entry counts: {named(again)}"
    if longer:
        yield (
            f"{len(longer)} captions have several lines, of which only the first is used: {named(longer)}; "
            "--enable_wildcard takes one at random"
        )
    empty = [Path(picture) for picture, caption, _ in found if not any(caption)]
    if empty:
        ends = {subset.caption_extension, ".caption", ".txt"}
        files = [path for path in empty if any(path.with_name(f"{path.stem}{end}").is_file() for end in ends)]
        beside = (
            f"; {len(files)} of them have a caption file, which is not read: "
            "finetune/merge_captions_to_metadata.py takes it into the metadata file"
        )
        yield (
            f"{len(empty)} of {len(found)} pictures have neither caption nor tags: "
            f"{named([path.name for path in empty])}{beside if files else ''}"
        )


def read_entries(path: Path, faults: Faults, again: list[str]) -> list[tuple[str, dict[str, str]]]:
    """Return (picture name, {"caption", "tags"} as texts) in order.

    Names that occur twice are added to again, and entries that cannot be used to faults.
    """
    try:
        text = read_text(path)
        table = _by_line(path, text, faults, again) if path.suffix.lower() == ".jsonl" else _object(text, again)
    except UnreadableTextError as error:
        raise UserError(f"metadata_file {error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"metadata_file {path} cannot be read: {error}") from None
    if not isinstance(table, dict):
        raise UserError(f"metadata_file {path} must be an object of picture names, got {type(table).__name__}")
    entries, kind = [], f"entries of metadata_file {path} must have texts as caption and tags"
    for name, values in table.items():
        try:
            entries.append((name, {key: read_str(values.get(key) or "") for key in ("caption", "tags")}))
        except (AttributeError, ValueError):
            faults.add(kind, name, f"got {shown(values)}")
    return entries


def _object(text: str, again: list[str]) -> Any:
    """Return the value of a JSON text; adds keys of its outermost object that occur twice to again."""
    last: list[tuple[str, Any]] = []

    def keep(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        last[:] = pairs  # the outermost object is complete last
        return dict(pairs)

    value = json.loads(text, object_pairs_hook=keep)
    if isinstance(value, dict):
        again += [name for name, number in Counter(name for name, _ in last).items() if number > 1]
    return value


def _by_line(path: Path, text: str, faults: Faults, again: list[str]) -> dict[str, Any]:
    kind = f'lines of metadata_file {path} must be objects with a text as "image_path"'
    table: dict[str, Any] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            faults.add(kind, f"line {number}", str(error))
            continue
        if not isinstance(row, dict) or not isinstance(row.get("image_path"), str):
            faults.add(kind, f"line {number}", f"got {shown(row)}")
            continue
        if row["image_path"] in table:
            again.append(row["image_path"])
        table[row["image_path"]] = row
    return table


ENDINGS = ("", *(ending for extension in PICTURE_SUFFIXES for ending in (extension, extension.upper())))


class Folders:
    """Remembers which files are in the folders of pictures, so that each is listed once."""

    def __init__(self) -> None:
        self._files: dict[Path, frozenset[str]] = {}

    def names(self, folder: Path) -> frozenset[str]:
        """Return the names of the files in a folder; none of one that cannot be read."""
        if folder not in self._files:
            self._files[folder] = frozenset(files_of(folder))
        return self._files[folder]


def find_picture(name: str, folder: Path, folders: Folders) -> Path | None:
    """Return the file of a picture's name, with or without extension, or None; folder is that of relative names."""
    path = folder / name
    names = folders.names(path.parent)
    for ending in ENDINGS:
        if f"{path.name}{ending}" in names:
            return path.with_name(f"{path.name}{ending}")
    try:  # a drive can take upper and lower case for the same
        return next((file for ending in ENDINGS if (file := Path(f"{path}{ending}")).is_file()), None)
    except OSError:  # a name that is too long
        return None


def joined_caption(values: Mapping[str, str], subset: SubsetOptions) -> Caption:
    """Return caption and tags as one caption; with wildcards the tags follow each line of the caption."""
    caption, tags, separator = values["caption"].strip(), values["tags"].strip(), subset.caption_separator
    if not subset.enable_wildcard:
        return tuple(separator.join(part for part in (caption.split("\n")[0], tags) if part).split("\n"))
    tags = separator.join(line.strip() for line in tags.splitlines() if line.strip())
    lines = [line.strip() for line in caption.splitlines() if line.strip()] or [""]
    return tuple(separator.join(part for part in (line, tags) if part) for line in lines)


# --------------------------------------------------------------------------------------------------------------
# Masks
# --------------------------------------------------------------------------------------------------------------


def find_masks(subset: SubsetOptions, pictures: Sequence[str], faults: Faults) -> dict[str, Mask]:
    """Return file of a picture -> its loss mask: its own opacity, or the picture of its name in the masks' folder.

    Pictures without a mask are added to faults.
    """
    folder = subset.conditioning_data_dir
    if folder is None or not pictures:
        return {picture: Mask(picture, "alpha") for picture in pictures} if subset.alpha_mask else {}
    by_stem = masks_by_stem(folder)
    missing = f"of {len(pictures)} pictures have no mask of their name in conditioning_data_dir {folder}"
    stems = {picture: stem_of(picture) for picture in pictures}
    for picture, stem in stems.items():
        if stem not in by_stem:
            faults.add(missing, picture)
    beginning = beginning_of(folder)
    return {picture: Mask(beginning + by_stem[stem], "red") for picture, stem in stems.items() if stem in by_stem}


def masks_by_stem(folder: Path) -> dict[str, str]:
    """Return the names of the masks in a folder by those without extension; the last of several with one name."""
    return {split_name(name)[0]: name for name in pictures_of(names_in(folder))}
