"""Cached latents: each picture is encoded once; entries can be kept on disk beside the pictures.

What is kept are the moments (mean and log-variance) of the VAE's posterior, not one sample of it, so that
training from the cache draws the same latents as training without. An entry is valid only for exactly the
bytes of the picture file, the resize, the crop, the VAE's weights and the precision it was made from: their
hash is stored in it. Files of sd-scripts (`*_sd.npz`) do not say what they were made from and are not read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from library.data import images
from library.data.records import NUM_THREADS, ImageRecord, TrainingSet, raise_for_unreadable
from library.errors import UserError
from library.files import file_sha256
from library.safetensors_io import read_header, read_tensors
from library.weight_file import write_weights

logger = logging.getLogger(__name__)

FORMAT_VERSION = "1"
PLAIN, MIRRORED, MASK = "moments", "moments_flipped", "mask"

Encode = Callable[[torch.Tensor], torch.Tensor]  # pixels (B, 3, H, W) in [-1, 1] -> moments (B, 8, H/8, W/8)
Entry = dict[str, torch.Tensor]
RecordKey = tuple[Path, tuple[int | str, ...]]
Loaded = tuple[np.ndarray, np.ndarray | None]  # pixels (H, W, 3) and mask (H/8, W/8) of a bucket's size


@dataclasses.dataclass(frozen=True)
class Source:
    """One entry to be made: a record, its fingerprint, and whether the mirrored picture is wanted, too."""

    record: ImageRecord
    fingerprint: str
    mirrored: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors in the entry."""
        return PLAIN, *([MIRRORED] if self.mirrored else []), *([MASK] if self.record.mask else [])

    @property
    def file(self) -> Path:
        """Where the entry lies on disk; the name tells the picture and the bucket."""
        width, height = self.record.placement.bucket
        return self.record.path.with_name(f"{self.record.path.name}.{width:04d}x{height:04d}.latents.safetensors")


@dataclasses.dataclass(frozen=True)
class LatentCache:
    """Moments of all pictures, by fingerprint."""

    entries: dict[str, Entry]
    fingerprints: dict[RecordKey, str]

    def moments(self, record: ImageRecord, *, mirrored: bool) -> torch.Tensor:
        """Return the moments (8, H/8, W/8) of a record."""
        return self._entry(record)[MIRRORED if mirrored else PLAIN]

    def mask(self, record: ImageRecord, *, mirrored: bool) -> torch.Tensor:
        """Return the loss mask (H/8, W/8) of a record that has one."""
        mask = self._entry(record)[MASK]
        return mask.flip(-1) if mirrored else mask

    def _entry(self, record: ImageRecord) -> Entry:
        return self.entries[self.fingerprints[record_key(record)]]


def record_key(record: ImageRecord) -> RecordKey:
    """Return what tells records with different pixels apart within a run."""
    placement, mask = record.placement, record.mask.describe() if record.mask else ""
    return record.path, (*placement.resized, *placement.bucket, record.subset.resize_interpolation or "", mask)


def fingerprint(record: ImageRecord, hashes: Mapping[Path, str], encoder: str) -> str:
    """Return the hash of everything that an entry depends on; encoder names VAE weights and precision.

    hashes holds those of the files of picture and mask.
    """
    placement = record.placement
    parts: tuple[object, ...] = (
        FORMAT_VERSION,
        hashes[record.path],
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
    sets: list[TrainingSet],
    encode: Encode,
    *,
    encoder: str,
    batch_size: int,
    on_disk: bool,
    share: tuple[int, int] = (0, 1),
) -> LatentCache:
    """Return the cache of all records, encoding what is not valid on disk.

    encoder identifies VAE weights and precision. share is (rank, processes): with entries on disk each
    process encodes its share and the caller calls again after a barrier to read the others'. Raises
    UserError that lists all pictures that cannot be read, or that the VAE turns into NaN.
    """
    sources, fingerprints = _sources(sets, encoder)
    entries: dict[str, Entry] = {}
    if on_disk:
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            entries = {
                source.fingerprint: entry
                for source, entry in zip(sources, pool.map(read_entry, sources), strict=True)
                if entry is not None
            }
        logger.info("latents: %d of %d pictures are valid on disk", len(entries), len(sources))
    missing = [source for source in sources if source.fingerprint not in entries]
    for source, entry in _encode(missing[share[0] :: share[1]], encode, batch_size):
        entries[source.fingerprint] = entry
        if on_disk:
            write_weights(source.file, entry, {"fingerprint": source.fingerprint})
    return LatentCache(entries, fingerprints)


def count_valid(sets: list[TrainingSet], encoder: str) -> tuple[int, int]:
    """Return (entries that are valid on disk, entries that a run uses)."""
    sources, _ = _sources(sets, encoder)
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return sum(entry is not None for entry in pool.map(read_entry, sources)), len(sources)


def _sources(sets: list[TrainingSet], encoder: str) -> tuple[list[Source], dict[RecordKey, str]]:
    """Return one source for each distinct entry, sorted by bucket so that batches fill, and record -> fingerprint."""
    records = [record for entry in sets for record in entry.all_records]
    paths = sorted({path for record in records for path in record.files})
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        hashes = dict(zip(paths, pool.map(file_sha256, paths), strict=True))
    fingerprints = {record_key(record): fingerprint(record, hashes, encoder) for record in records}
    sources: dict[str, Source] = {}
    for record in records:
        key = fingerprints[record_key(record)]
        mirrored = record.subset.flip_aug or (key in sources and sources[key].mirrored)
        sources[key] = Source(record, key, mirrored)
    ordered = sorted(sources.values(), key=lambda source: (source.record.placement.bucket, source.record.path))
    return ordered, fingerprints


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


def _encode(sources: list[Source], encode: Encode, batch_size: int) -> Iterator[tuple[Source, Entry]]:
    """Yield (source, entry) for each source; pictures are decoded ahead in threads while the VAE works."""
    if not sources:
        return
    from tqdm import tqdm

    results: list[Loaded | images.UnreadablePictureError] = []
    not_finite: list[Path] = []
    with (
        ThreadPoolExecutor(NUM_THREADS) as pool,
        tqdm(total=len(sources), desc="caching latents", unit="picture") as bar,
    ):
        batches = list(_batches(sources, batch_size))
        ahead = [pool.map(_load, batch) for batch in batches[:2]]
        for index, batch in enumerate(batches):
            if index + 2 < len(batches):
                ahead.append(pool.map(_load, batches[index + 2]))
            loaded = list(ahead.pop(0))
            results += loaded
            readable = [
                (source, *layers)
                for source, layers in zip(batch, loaded, strict=True)
                if not isinstance(layers, images.UnreadablePictureError)
            ]
            for source, entry in _encode_batch(readable, encode):
                if all(bool(torch.isfinite(tensor).all()) for tensor in entry.values()):
                    yield source, entry
                else:
                    not_finite.append(source.record.path)
            bar.update(len(batch))
    raise_for_unreadable([source.record.path for source in sources], results)
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
    record = source.record
    try:
        frame = images.centre_frame(record.placement)
        pixels = images.fit(images.load_picture(record.path), frame, record.subset.resize_interpolation)
        return pixels, None if record.mask is None else images.fit_mask(record.mask.load(), frame)
    except images.UnreadablePictureError as error:
        return error


def _encode_batch(
    loaded: list[tuple[Source, np.ndarray, np.ndarray | None]], encode: Encode
) -> Iterator[tuple[Source, Entry]]:
    if not loaded:
        return
    plain = encode(torch.stack([images.to_tensor(pixels) for _, pixels, _ in loaded]))
    wanted = [index for index, (source, _, _) in enumerate(loaded) if source.mirrored]
    if wanted:
        flipped = encode(torch.stack([images.to_tensor(loaded[index][1][:, ::-1]) for index in wanted]))
    for index, (source, _, mask) in enumerate(loaded):
        entry = {PLAIN: plain[index].clone()}
        if source.mirrored:
            entry[MIRRORED] = flipped[wanted.index(index)].clone()
        if mask is not None:
            entry[MASK] = torch.from_numpy(mask)
        yield source, entry
