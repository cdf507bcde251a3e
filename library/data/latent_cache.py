"""Cached latents: each picture is encoded once; entries can be kept on disk beside the pictures.

An entry has the moments (mean and log-variance) of the VAE's posterior, not one sample of it, so that training
samples the same latents with and without the cache. It is valid only for the same bytes of the picture file,
resize, crop, VAE weights and precision, whose hash it stores. Files of sd-scripts (`*_sd.npz`) have no such hash and
are not read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import math
import os
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch

from library.config.values import LATENT_SCALE
from library.data import images
from library.data.buckets import Placement
from library.data.picture_checks import raise_for_unreadable
from library.data.picture_index import DEFAULT_INDEX, PictureIndex
from library.data.records import Dataset, ImageRecord, all_records
from library.errors import UserError, message_of, named
from library.progress import Bar
from library.safetensors_io import Header, read_header, read_tensors
from library.weight_file import write_weights
from library.words import counted

logger = logging.getLogger(__name__)

FORMAT_VERSION = "1"
PLAIN, MIRRORED, MASK = "moments", "moments_flipped", "mask"
NUM_MOMENTS, MASK_BYTES = 8, 4  # for each latent pixel
SUFFIX = ".latents.safetensors"
ENTRY = re.compile(rf"(.+\.\d+x\d+)(?:\.\w+)?{re.escape(SUFFIX)}")
STORED_ELSEWHERE = "use a copy of the folder, or train with --cache_latents alone, which stores nothing"
VARIANT_DIGITS = 8
MOST_ATTEMPTS = 5  # to read an entry that another run replaces
CHECKED_AT_ONCE = 1000  # entries; each that waits for its thread takes memory

Entry = dict[str, torch.Tensor]
Stamp = tuple[int, int, int]
PixelsKey = tuple[str, Placement, str | None, images.Mask | None]
Loaded = tuple[np.ndarray, np.ndarray | None]  # pixels (H, W, 3) and mask (H/8, W/8) of a bucket's size


class Encoder(Protocol):
    """Encodes pictures as latents: `library.models.latent_encoder.LatentEncoder`."""

    def identity(self) -> str:
        """Return what the moments of a picture depend on: the weights and their type."""
        ...

    def moments(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return mean and log-variance of the posterior, (B, 8, H/8, W/8), for pixels (B, 3, H, W) in [-1, 1]."""
        ...


class Latents(NamedTuple):
    """What a batch takes of an entry."""

    moments: torch.Tensor  # (8, H/8, W/8)
    mask: torch.Tensor | None  # (H/8, W/8)


class LatentCache(Protocol):
    """Moments and masks of all pictures."""

    def read(self, record: ImageRecord, *, mirrored: bool) -> Latents:
        """Return moments and mask of a record; raises UserError if they are no longer there."""
        ...


class Source(NamedTuple):
    """The source of one entry: a record, and whether it is encoded mirrored, too."""

    record: ImageRecord
    mirrored: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors in the entry."""
        return PLAIN, *([MIRRORED] if self.mirrored else []), *([MASK] if self.record.mask else [])


# --------------------------------------------------------------------------------------------------------------
# Where entries are
# --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MemoryCache:
    """Entries in memory. Within a run the path identifies the file, so that no hash is needed."""

    entries: dict[PixelsKey, Entry]

    def read(self, record: ImageRecord, *, mirrored: bool) -> Latents:
        """Return moments and mask of a record."""
        return latents_in(self.entries[pixels_key(record)], mirrored=mirrored)


class Identity(NamedTuple):
    """What identifies an entry on disk."""

    fingerprint: str  # the hash of everything that it depends on
    variant: str  # the hash of all that but the picture itself, short, for the name of the file


@dataclasses.dataclass(frozen=True)
class DiskCache:
    """Entries on disk, read whenever they are needed: in memory are only the digests of the pictures.

    Entries of one picture for different models or options have different names, so that runs at the same time, and
    subsets of a run, do not replace each other's.
    """

    digests: dict[str, str]  # of the files of pictures and masks
    encoder: str  # the identity of one

    def read(self, record: ImageRecord, *, mirrored: bool) -> Latents:
        """Return moments and mask of a record; raises UserError if the entry is gone, another's or damaged."""
        source = Source(record, mirrored)
        names = {*source.names} - ({PLAIN} if mirrored else set())
        for _ in range(MOST_ATTEMPTS):
            found = self.find(source)
            if found is None:
                break
            file, stamp, header = found
            with contextlib.suppress(UserError, OSError):
                entry = dict(read_tensors(file, header, names))
                if stamp_of(file) == stamp:  # else another run replaced the file after its header was read
                    return latents_in(entry, mirrored=mirrored)
        own, _ = self._files(record, self.identify(record))
        raise UserError(
            f"the cached latents of {record.path} are gone or damaged ({own.name}): something changed the file or the "
            "picture during the run. Start it again, with --resume if it saved a state; what is missing is encoded anew"
        )

    def identify(self, record: ImageRecord) -> Identity:
        """Return what identifies the entry of a record."""
        placement, digest = record.placement, self.digests[record.file]
        further: tuple[object, ...] = (
            placement.resized,
            images.centre_frame(placement).corner,
            placement.bucket,
            record.subset.resize_interpolation,
            self.encoder,
        )
        if record.mask is not None:
            further += (record.mask.key(self.digests),)
        return Identity(hash_of(FORMAT_VERSION, digest, *further), hash_of(*further)[:VARIANT_DIGITS])

    def key(self, record: ImageRecord) -> Hashable:
        """Return a key that differs for records with different entries; equal pictures have one each, beside them."""
        return record.path, self.identify(record).fingerprint

    def find(self, source: Source) -> tuple[Path, Stamp, Header] | None:
        """Return file, stamp and header of a valid entry; None where there is none, another's, or a damaged one."""
        identity = self.identify(source.record)
        for file in self._files(source.record, identity):
            with contextlib.suppress(UserError, OSError):  # such as the one that there is no file
                stamp, header = stamp_of(file), read_header(file)
                is_ours = header.metadata.get("fingerprint") == identity.fingerprint
                if is_ours and set(source.names) <= set(header.tensors):
                    return file, stamp, header
        return None

    def write(self, source: Source, entry: Entry) -> None:
        """Write an entry, unless another run has written it in the meantime; raises UserError if that fails."""
        if self.find(source) is None:
            identity = self.identify(source.record)
            file, _ = self._files(source.record, identity)
            try:
                write_weights(file, entry, {"fingerprint": identity.fingerprint})
            except OSError as error:
                raise UserError(f"{message_of(error)}; {STORED_ELSEWHERE}") from error

    def missing(self, sources: Sequence[Source]) -> list[Source]:
        """Return the sources without a valid entry; reads the headers of entries, not their tensors."""
        found: list[Source] = []
        with images.reading_threads() as pool:
            for start in range(0, len(sources), CHECKED_AT_ONCE):
                part = sources[start : start + CHECKED_AT_ONCE]
                are_there = pool.map(lambda source: self.find(source) is not None, part)
                found += [source for source, is_there in zip(part, are_there, strict=True) if not is_there]
        return found

    def _files(self, record: ImageRecord, identity: Identity) -> tuple[Path, Path]:
        """Return the path of an entry, and the one that former versions gave it, which serves as well."""
        start = sized_name(record)
        return record.path.with_name(f"{start}.{identity.variant}{SUFFIX}"), record.path.with_name(start + SUFFIX)


def check_folders(datasets: Sequence[Dataset]) -> None:
    """Raise UserError for folders in which no entry can be written, with pictures that have none in their size.

    Whether an entry is valid shows when the VAE is known. A folder that cannot be listed is not judged.
    """
    folders: dict[Path, list[ImageRecord]] = {}
    for record in all_records(datasets):
        folders.setdefault(record.path.parent, []).append(record)
    lacking = {}
    for folder, records in folders.items():
        if os.access(folder, os.W_OK | os.X_OK) or not os.access(folder, os.R_OK):
            continue
        there = {found[1] for path in folder.iterdir() if (found := ENTRY.fullmatch(path.name))}
        if missing := sum(sized_name(record) not in there for record in records):
            lacking[str(folder)] = missing
    if lacking:
        number = counted(sum(lacking.values()), "picture")
        raise UserError(
            f"latents cannot be stored: nothing can be written to {named(list(lacking))}, with {number} without "
            f"latents; {STORED_ELSEWHERE}"
        )


def sized_name(record: ImageRecord) -> str:
    """Return the beginning of the names of a record's entries: the picture and its size."""
    width, height = record.placement.bucket
    return f"{record.path.name}.{width:04d}x{height:04d}"


def stamp_of(file: Path) -> Stamp:
    """Return what changes when a file is replaced by another."""
    status = file.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def latents_in(entry: Entry, *, mirrored: bool) -> Latents:
    """Return what a batch takes of an entry, for the picture as it is or for its mirror image."""
    mask = entry.get(MASK)
    return Latents(entry[MIRRORED if mirrored else PLAIN], mask.flip(-1) if mirrored and mask is not None else mask)


def pixels_key(record: ImageRecord) -> PixelsKey:
    """Return a key that differs for records with different pixels or masks within a run."""
    return record.file, record.placement, record.subset.resize_interpolation, record.mask


def hash_of(*parts: object) -> str:
    """Return the SHA-256 of values, 64 hex digits."""
    return hashlib.sha256(repr(parts).encode("utf-8")).hexdigest()


# --------------------------------------------------------------------------------------------------------------
# Filling
# --------------------------------------------------------------------------------------------------------------


def build_cache(
    datasets: Sequence[Dataset],
    encoder: Encoder,
    *,
    batch_size: int,
    on_disk: bool,
    share: tuple[int, int] = (0, 1),
    index: PictureIndex = DEFAULT_INDEX,
) -> LatentCache:
    """Return the cache of all records, encoding what is not valid on disk.

    share is (rank, processes): with entries on disk each process encodes its share and the caller calls again
    after a barrier, which encodes what another process left out. Raises UserError that lists all pictures that cannot
    be read, or that the VAE turns into NaN.
    """
    if not on_disk:
        entries = _encode(by_bucket(sources_of(datasets, pixels_key)), encoder, batch_size)
        return MemoryCache({pixels_key(source.record): entry for source, entry in entries})
    cache = open_cache(datasets, encoder, index)
    sources = sources_of(datasets, cache.key)
    missing = cache.missing(sources)
    logger.info("latents: %d of %d pictures are valid on disk", len(sources) - len(missing), len(sources))
    for source, entry in _encode(by_bucket(missing)[share[0] :: share[1]], encoder, batch_size):
        cache.write(source, entry)
    return cache


class Extent(NamedTuple):
    """How many entries a run uses, how many of them are to be encoded, and the bytes of all."""

    entries: int
    missing: int
    size: int


def extent(
    datasets: Sequence[Dataset],
    dtype: torch.dtype,
    encoder: Encoder | None = None,
    index: PictureIndex = DEFAULT_INDEX,
) -> Extent:
    """Return what a cache with moments of a type will take: in memory, or with an encoder on disk."""
    if encoder is None:
        sources = sources_of(datasets, pixels_key)
        missing = len(sources)
    else:
        cache = open_cache(datasets, encoder, index)
        sources = sources_of(datasets, cache.key)
        missing = len(cache.missing(sources))
    return Extent(len(sources), missing, sum(bytes_of_entry(source, dtype) for source in sources))


def bytes_of_entry(source: Source, dtype: torch.dtype) -> int:
    """Return the size of the tensors of an entry with moments of a type."""
    numbers = {PLAIN: NUM_MOMENTS * dtype.itemsize, MIRRORED: NUM_MOMENTS * dtype.itemsize, MASK: MASK_BYTES}
    return math.prod(source.record.placement.bucket) // LATENT_SCALE**2 * sum(numbers[name] for name in source.names)


def open_cache(datasets: Sequence[Dataset], encoder: Encoder, index: PictureIndex) -> DiskCache:
    """Return the cache on disk; reads the files of pictures and masks that the index does not know."""
    files = {file for record in all_records(datasets) for file in record.files}
    return DiskCache(index.digests(files), encoder.identity())


def sources_of(datasets: Sequence[Dataset], key: Callable[[ImageRecord], Hashable]) -> list[Source]:
    """Return one source for each distinct key of a record."""
    sources: dict[Hashable, Source] = {}
    for record in all_records(datasets):
        identity = key(record)
        mirrored = record.subset.flip_aug or (identity in sources and sources[identity].mirrored)
        sources[identity] = Source(record, mirrored)
    return list(sources.values())


def by_bucket(sources: Sequence[Source]) -> list[Source]:
    """Return sources sorted by bucket, so that batches fill."""
    return sorted(sources, key=lambda source: (source.record.placement.bucket, source.record.path))


def _encode(sources: list[Source], encoder: Encoder, batch_size: int) -> Iterator[tuple[Source, Entry]]:
    """Yield (source, entry) for each source; pictures are decoded ahead in threads while the VAE works."""
    if not sources:
        return

    results: list[tuple[Path, images.UnreadablePictureError | None]] = []
    not_finite: list[Path] = []
    bar: Bar[None] = Bar(total=len(sources), desc="caching latents", unit="picture")
    with images.reading_threads() as pool, bar:
        batches = list(_batches(sources, batch_size))
        ahead = [pool.map(_load, batch) for batch in batches[:2]]
        for index, batch in enumerate(batches):
            if index + 2 < len(batches):
                ahead.append(pool.map(_load, batches[index + 2]))
            loaded = list(zip(batch, ahead.pop(0), strict=True))
            results += [
                (source.record.path, layers if isinstance(layers, images.UnreadablePictureError) else None)
                for source, layers in loaded  # not the pixels, which would all stay in memory
            ]
            readable = [
                (source, *layers) for source, layers in loaded if not isinstance(layers, images.UnreadablePictureError)
            ]
            for source, entry in _encode_batch(readable, encoder):
                if all(bool(torch.isfinite(tensor).all()) for tensor in entry.values()):
                    yield source, entry
                else:
                    not_finite.append(source.record.path)
            bar.update(len(batch))
    raise_for_unreadable(results)
    if not_finite:
        names = ", ".join(str(path) for path in not_finite)
        raise UserError(f"the VAE gives NaN for {names}, in float32, too: its file is damaged; name another with --vae")


def _batches(sources: list[Source], batch_size: int) -> Iterator[list[Source]]:
    start = 0
    while start < len(sources):
        bucket = sources[start].record.placement.bucket
        batch = [source for source in sources[start : start + batch_size] if source.record.placement.bucket == bucket]
        yield batch
        start += len(batch)


def _load(source: Source) -> Loaded | images.UnreadablePictureError:
    """Return pixels and mask of a source in its bucket, or why its picture or mask cannot be read."""
    try:
        return source.record.read(images.centre_frame(source.record.placement))
    except images.UnreadablePictureError as error:
        return error


def _encode_batch(
    loaded: list[tuple[Source, np.ndarray, np.ndarray | None]], encoder: Encoder
) -> Iterator[tuple[Source, Entry]]:
    if not loaded:
        return
    plain = encoder.moments(torch.stack([images.to_tensor(pixels) for _, pixels, _ in loaded])).cpu()
    wanted = [index for index, (source, _, _) in enumerate(loaded) if source.mirrored]
    if wanted:
        mirrored = [images.to_tensor(loaded[index][1][:, ::-1]) for index in wanted]
        flipped = encoder.moments(torch.stack(mirrored)).cpu()
    for index, (source, _, mask) in enumerate(loaded):
        entry = {PLAIN: plain[index].clone()}
        if source.mirrored:
            entry[MIRRORED] = flipped[wanted.index(index)].clone()
        if mask is not None:
            entry[MASK] = torch.from_numpy(mask)
        yield source, entry
