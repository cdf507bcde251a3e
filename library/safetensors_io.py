"""Reads and writes safetensors files tensor by tensor.

Tensors are read into their own memory instead of being mapped: mapped pages count as used memory until the end, and
torch has other code paths for parameters that are not aligned to 64 bytes, whose outputs differ in the last bits.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError, shortened
from library.file_kinds import AGAIN, SAFETENSORS, weight_format
from library.files import replacing, send_to_disk

if TYPE_CHECKING:
    import io

    import torch

logger = logging.getLogger(__name__)

READ_AT_ONCE = 2**22  # bytes of a tensor that is converted while it is read: the cache of a core holds them
WRITTEN_AT_ONCE = 2**18  # bytes; Linux takes two to five times as long for a tensor in one piece
SENT_AT_ONCE = 2**26  # bytes after which the disk is told to begin, so that little is left to wait for at the end
MAX_HEADER_BYTES = 100_000_000  # the package safetensors reads no file with a longer header
# What the metadata of a file keep longest if they are too long, and what they lose first: it grows with the captions.
NEEDED_METADATA = ("ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha")
TABLES_OF_TAGS = ("ss_tag_frequency", "ss_datasets")
# Names in files -> names of torch, in the order of the package safetensors: wide types first, so that all are aligned.
DTYPE_NAMES = {
    "I64": "int64",
    "F64": "float64",
    "F32": "float32",
    "I32": "int32",
    "BF16": "bfloat16",
    "F16": "float16",
    "I16": "int16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """The place of a tensor in a safetensors file; start and end are offsets from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class Header:
    """Header of a safetensors file: tensors by name, metadata, and the offset of the data."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int


def read_header(path: Path) -> Header:
    """Return the header of a safetensors file, of any length; raises UserError for a damaged or another file."""
    if weight_format(path) != SAFETENSORS:
        raise UserError(f"{path} is a pickle of torch, a .safetensors file is needed")
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            start = 8 + length
            if start > size:
                raise UserError(f"{path} is cut short, or its header is damaged; {AGAIN}")
            table = json.loads(file.read(length))
        metadata = dict(table.pop("__metadata__", None) or {})
        tensors = {name: _tensor_info(entry, start) for name, entry in table.items()}
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path} is not a safetensors file, or its header is damaged; {AGAIN}") from None
    end = max((info.end for info in tensors.values()), default=start)
    if size < end:
        raise UserError(f"{path} is cut short: it has {size:,} bytes of {end:,}; copy it again")
    if size > end:
        raise UserError(f"{path} is damaged: {size - end:,} bytes follow its last tensor; copy it again")
    return Header(tensors, metadata, start)


def _tensor_info(entry: dict[str, Any], data_start: int) -> TensorInfo:
    dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    are_counts = all(isinstance(number, int) and number >= 0 for number in (*shape, start, end))
    if not are_counts or not isinstance(dtype, str):
        raise ValueError("no header of a tensor")
    return TensorInfo(dtype, shape, data_start + start, data_start + end)


def read_tensors(
    path: Path, header: Header | None = None, names: Collection[str] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of a safetensors file in the order of the data, each in its own memory.

    names limits what is read; None reads all.
    """
    import torch

    header = header or read_header(path)
    wanted = header.tensors if names is None else [name for name in names if name in header.tensors]
    with path.open("rb", buffering=0) as file:
        for name in sorted(wanted, key=lambda name: header.tensors[name].start):
            info = header.tensors[name]
            dtype = checked_type(info, name, path)
            tensor = torch.empty(info.shape, dtype=dtype)
            file.seek(info.start)
            _fill(tensor, file)
            yield name, tensor


def read_pieces(path: Path, info: TensorInfo, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Yield the numbers of a tensor of a file, flat, some at a time, each time in the same memory."""
    import torch

    left = math.prod(info.shape)
    memory = torch.empty(min(left, READ_AT_ONCE // dtype.itemsize), dtype=dtype)
    with path.open("rb", buffering=0) as file:
        file.seek(info.start)
        while left:
            piece = memory[:left]
            _fill(piece, file)
            yield piece
            left -= len(piece)


def _fill(tensor: torch.Tensor, file: io.FileIO) -> None:
    """Fill a tensor with the next bytes of a file."""
    buffer = bytes_of(tensor) if tensor.numel() else memoryview(b"")
    while buffer:
        buffer = buffer[file.readinto(buffer) :]


def dtype_of(info: TensorInfo, name: str, path: Path) -> torch.dtype:
    """Return the type of a tensor in a file; raises UserError for one that is not supported."""
    import torch

    if info.dtype not in DTYPE_NAMES:
        raise UserError(f"{path}: {name} has the type {info.dtype}, which is not supported")
    return getattr(torch, DTYPE_NAMES[info.dtype])


def checked_type(info: TensorInfo, name: str, path: Path) -> torch.dtype:
    """Return the type of a tensor in a file, as `dtype_of`; raises UserError also if its shape needs other bytes."""
    dtype = dtype_of(info, name, path)
    needed = math.prod(info.shape) * dtype.itemsize
    if needed != info.end - info.start:
        raise UserError(f"{path}: {name} has {info.end - info.start} bytes, its shape needs {needed}")
    return dtype


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a tensor; it must be contiguous, on the CPU, and not empty."""
    import torch

    return tensor.view(-1).view(torch.uint8).numpy().data


def write_stream(
    path: Path,
    infos: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file tensor by tensor, to limit the memory.

    infos is name -> (type, shape) of all tensors, in the order in which tensors yields them. Tensors that are computed
    come from `parallel.in_order`, which makes the next ones while this one is written.
    """
    header = _header_bytes(infos, metadata)
    with replacing(path) as temporary, temporary.open("wb", buffering=0) as file:
        _write(file, header)
        on_its_way = 0  # bytes that the system was told to write to the disk
        for (name, (dtype, shape)), (given, tensor) in zip(infos.items(), tensors, strict=True):
            assert (name, dtype, shape) == (given, tensor.dtype, tuple(tensor.shape))
            _write(file, bytes_of(tensor.contiguous()) if tensor.numel() else b"")
            if file.tell() - on_its_way >= SENT_AT_ONCE:
                send_to_disk(file, on_its_way)
                on_its_way = file.tell()


def _header_bytes(
    infos: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None
) -> bytes:
    """Return the header after its length, padded so that the data begin at a multiple of 8."""
    import torch

    names_of_types = {getattr(torch, python): name for name, python in DTYPE_NAMES.items()}
    table: dict[str, Any] = {}
    start = 0
    for name, (dtype, shape) in infos.items():
        end = start + math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": names_of_types[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    if metadata:
        kept = fitting(metadata, len(_json_bytes({"__metadata__": {}} | table)))
        table = {"__metadata__": kept} | table
    text = _json_bytes(table)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _json_bytes(table: Mapping[str, Any]) -> bytes:
    """Return a table as JSON; characters that UTF-8 does not have, as in some names of files, become "?"."""
    return json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def fitting(metadata: Mapping[str, Any], taken: int) -> dict[str, str]:
    """Return the metadata, as text, that fit into a header with a number of other bytes, and log what is left out.

    Entries that readers need are kept first, then short ones; tables of tags are kept last. The same rule is in
    `networks/lora.py`, which stands alone.
    """
    texts = {str(key): text if isinstance(text, str) else str(text) for key, text in metadata.items()}
    room = MAX_HEADER_BYTES - taken
    if 8 * len(texts) + 6 * sum(len(key) + len(text) for key, text in texts.items()) <= room:
        return texts  # a character has at most six bytes in JSON

    def rank(key: str) -> tuple[bool, bool, int]:
        return key not in NEEDED_METADATA, key in TABLES_OF_TAGS, sizes[key]

    sizes = {key: len(_json_bytes({key: text})) for key, text in texts.items()}
    left_out = {}
    for key in sorted(texts, key=rank):
        if sizes[key] <= room:
            room -= sizes[key]
        else:
            left_out[key] = sizes[key]
    if left_out:
        logger.warning(
            "the metadata are too long for a file that can be read (%s bytes of header); left out: %s",
            f"{MAX_HEADER_BYTES:,}",
            ", ".join(f"{shortened(key, 60)} ({size:,} bytes)" for key, size in left_out.items()),
        )
    return {key: text for key, text in texts.items() if key not in left_out}


def _write(file: io.FileIO, data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest[:WRITTEN_AT_ONCE]) :]
