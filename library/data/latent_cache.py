"""Cached latents: each picture is encoded once; entries can be kept on disk beside the pictures.

An entry has the moments (mean and log-variance) of the VAE's posterior, not one sample of it, so that training
samples the same latents with and without the cache. It is valid only for the same bytes of the picture file,
resize, crop, VAE weights and precision, whose hash it stores. Files of sd-scripts (`*_sd.npz`) have no such hash and
are not read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from library.data import images
from library.data.buckets import Placement
from library.data.picture_checks import raise_for_unreadable
from library.data.picture_index import DEFAULT_INDEX, PictureIndex
from library.data.records import Dataset, ImageRecord, all_records
from library.errors import UserError
from library.safetensors_io import read_header, read_tensors
from library.weight_file import write_weights

logger = logging.getLogger(__name__)

FORMAT_VERSION = "1"
PLAIN, MIRRORED, MASK = "moments", "moments_flipped", "mask"

Entry = dict[str, torch.Tensor]
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


@dataclasses.dataclass(frozen=True)
class Source:
    """The source of one entry: a record, its fingerprint, and whether it is encoded mirrored, too."""

    record: ImageRecord
    fingerprint: str
    mirrored: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors in the entry."""
        return PLAIN, *([MIRRORED] if self.mirrored else []), *([MASK] if self.record.mask else [])

    @property
    def file(self) -> Path:
        """The path of the entry on disk, from the names of picture and bucket."""
        width, height = self.record.placement.bucket
        return self.record.path.with_name(f"{self.record.path.name}.{width:04d}x{height:04d}.latents.safetensors")


@dataclasses.dataclass(frozen=True)
class LatentCache:
    """Moments of all pictures, by fingerprint."""

    entries: dict[str, Entry]
    fingerprints: dict[PixelsKey, str]

    def moments(self, record: ImageRecord, *, mirrored: bool) -> torch.Tensor:
        """Return the moments (8, H/8, W/8) of a record."""
        return self._entry(record)[MIRRORED if mirrored else PLAIN]

    def mask(self, record: ImageRecord, *, mirrored: bool) -> torch.Tensor:
        """Return the loss mask (H/8, W/8) of a record that has one."""
        mask = self._entry(record)[MASK]
        return mask.flip(-1) if mirrored else mask

    def _entry(self, record: ImageRecord) -> Entry:
        return self.entries[self.fingerprints[pixels_key(record)]]


def pixels_key(record: ImageRecord) -> PixelsKey:
    """Return a key that differs for records with different pixels or masks within a run."""
    return record.file, record.placement, record.subset.resize_interpolation, record.mask


def fingerprint(record: ImageRecord, hashes: Mapping[str, str], encoder: str) -> str:
    """Return the hash of everything that an entry depends on; encoder is the identity of one.

    hashes holds those of the files of picture and mask.
    """
    placement = record.placement
    parts: tuple[object, ...] = (
        FORMAT_VERSION,
        hashes[record.file],
        placement.resized,
        images.centre_frame(placement).corner,
        placement.bucket,
        record.subset.resize_interpolation,
        encoder,
    )
    if record.mask is not None:
        parts += (record.mask.key(hashes),)
    return hashlib.sha256(repr(parts).encode("utf-8")).hexdigest()


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
    after a barrier to read the others'. Raises UserError that lists all pictures that cannot be read, or that
    the VAE turns into NaN.
    """
    records = all_records(datasets)
    if on_disk:
        fingerprints = fingerprints_of(records, encoder, index)
    else:  # within a run the path identifies the file, so that no hash is needed
        fingerprints = {key: repr(key) for key in map(pixels_key, records)}
    sources = sources_of(records, fingerprints)
    entries: dict[str, Entry] = {}
    if on_disk:
        entries = read_entries(sources)
        logger.info("latents: %d of %d pictures are valid on disk", len(entries), len(sources))
    missing = [source for source in sources if source.fingerprint not in entries]
    for source, entry in _encode(missing[share[0] :: share[1]], encoder, batch_size):
        entries[source.fingerprint] = entry
        if on_disk:
            write_weights(source.file, entry, {"fingerprint": source.fingerprint})
    return LatentCache(entries, fingerprints)


def count_valid(datasets: Sequence[Dataset], encoder: Encoder, index: PictureIndex = DEFAULT_INDEX) -> tuple[int, int]:
    """Return (entries that are valid on disk, entries that a run uses)."""
    records = all_records(datasets)
    sources = sources_of(records, fingerprints_of(records, encoder, index))
    return len(read_entries(sources)), len(sources)


def fingerprints_of(
    records: Sequence[ImageRecord], encoder: Encoder, index: PictureIndex = DEFAULT_INDEX
) -> dict[PixelsKey, str]:
    """Return the fingerprints of all records; reads the files of pictures and masks that the index does not know."""
    hashes = index.digests({file for record in records for file in record.files})
    identity = encoder.identity()
    return {pixels_key(record): fingerprint(record, hashes, identity) for record in records}


def sources_of(records: Sequence[ImageRecord], fingerprints: Mapping[PixelsKey, str]) -> list[Source]:
    """Return one source for each distinct entry, sorted by bucket so that batches fill."""
    sources: dict[str, Source] = {}
    for record in records:
        key = fingerprints[pixels_key(record)]
        mirrored = record.subset.flip_aug or (key in sources and sources[key].mirrored)
        sources[key] = Source(record, key, mirrored)
    return sorted(sources.values(), key=lambda source: (source.record.placement.bucket, source.record.path))


def read_entries(sources: Sequence[Source]) -> dict[str, Entry]:
    """Return fingerprint -> entry for those that are valid on disk."""
    with images.reading_threads() as pool:
        entries = zip(sources, pool.map(read_entry, sources), strict=True)
        return {source.fingerprint: entry for source, entry in entries if entry is not None}


def read_entry(source: Source) -> Entry | None:
    """Return a valid entry from disk, or None where there is none, another's, or a damaged one."""
    if not source.file.exists():
        return None
    try:
        header = read_header(source.file)
        if header.metadata.get("fingerprint") != source.fingerprint or not set(source.names) <= set(header.tensors):
            return None
        return dict(read_tensors(source.file, header))
    except (UserError, OSError):
        return None


def _encode(sources: list[Source], encoder: Encoder, batch_size: int) -> Iterator[tuple[Source, Entry]]:
    """Yield (source, entry) for each source; pictures are decoded ahead in threads while the VAE works."""
    if not sources:
        return
    from tqdm import tqdm

    results: list[tuple[Path, images.UnreadablePictureError | None]] = []
    not_finite: list[Path] = []
    with (
        images.reading_threads() as pool,
        tqdm(total=len(sources), desc="caching latents", unit="picture") as bar,
    ):
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
