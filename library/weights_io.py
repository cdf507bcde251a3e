"""Weight files: safetensors and pickles in, safetensors and pickles out, and their hashes.

Files are read tensor by tensor into fresh memory instead of being mapped: mapped pages count as used memory
until the end, and parameters that are not aligned to 64 bytes take other code paths in torch, which makes
bit-equal weights give unequal outputs. Everything is written to a temporary name and renamed.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError, told

if TYPE_CHECKING:
    import torch

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
MAX_HEADER_BYTES = 100 * 2**20
DTYPE_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in a safetensors file; start and end are offsets from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class Header:
    """Header of a safetensors file: tensors by name, metadata, and the offset at which data begins."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int


def read_header(path: Path) -> Header:
    """Return the header of a safetensors file; raises UserError for a file that is damaged or of another kind."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= MAX_HEADER_BYTES:
                raise ValueError("no header")
            table = json.loads(file.read(length))
        metadata = dict(table.pop("__metadata__", None) or {})
        start = 8 + length
        tensors = {name: _tensor_info(entry, start) for name, entry in table.items()}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"{path} is not a safetensors file, or its header is damaged; copy or download it again"
        ) from None
    end = max((info.end for info in tensors.values()), default=start)
    size = path.stat().st_size
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
    """Yield (name, tensor) of a safetensors file in the order of the data, each in memory of its own.

    names limits what is read; None reads all.
    """
    import torch

    header = header or read_header(path)
    wanted = header.tensors if names is None else [name for name in names if name in header.tensors]
    with path.open("rb", buffering=0) as file:
        for name in sorted(wanted, key=lambda name: header.tensors[name].start):
            info = header.tensors[name]
            if info.dtype not in DTYPE_NAMES:
                raise UserError(f"{path}: {name} has the type {info.dtype}, which is not read here")
            dtype = getattr(torch, DTYPE_NAMES[info.dtype])
            needed = math.prod(info.shape) * dtype.itemsize
            if needed != info.end - info.start:
                raise UserError(f"{path}: {name} has {info.end - info.start} bytes, its shape needs {needed}")
            tensor = torch.empty(info.shape, dtype=dtype)
            if needed:
                buffer = memoryview(tensor.view(-1).view(torch.uint8).numpy())
                file.seek(info.start)
                while buffer:
                    buffer = buffer[file.readinto(buffer) :]
            yield name, tensor


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """A weight file of either kind: the shapes at once, the tensors one by one."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    content: Header | dict[str, torch.Tensor]

    @property
    def metadata(self) -> Mapping[str, str]:
        """The metadata; none in a pickle."""
        return self.content.metadata if isinstance(self.content, Header) else {}

    def infos(self) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Yield name, type and shape of each tensor, in the order in which `tensors` yields them."""
        import torch

        if isinstance(self.content, Header):
            for name, info in sorted(self.content.tensors.items(), key=lambda entry: entry[1].start):
                yield name, getattr(torch, DTYPE_NAMES[info.dtype]), info.shape
        else:
            for name, tensor in self.content.items():
                yield name, tensor.dtype, tuple(tensor.shape)

    def tensor(self, name: str) -> torch.Tensor:
        """Return one tensor, in memory of its own; a pickle keeps it."""
        if isinstance(self.content, Header):
            return next(read_tensors(self.path, self.content, (name,)))[1]
        return self.content[name].clone()

    def tensors(self, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) for those of names that the file has, each in memory of its own.

        A pickle lets go of what it yields, so that it is not held twice; it can be read only once.
        """
        if isinstance(self.content, Header):
            yield from read_tensors(self.path, self.content, names)
            return
        for name in [name for name in self.content if name in names]:
            yield name, self.content.pop(name).clone()


def open_weights(path: Path) -> WeightFile:
    """Open a weight file; of safetensors only the header is read, a pickle is read whole."""
    if path.suffix.lower() in PICKLE_SUFFIXES:
        tensors = read_pickle(path)
        return WeightFile(path, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, tensors)
    header = read_header(path)
    return WeightFile(path, {name: info.shape for name, info in header.tensors.items()}, header)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a weight file: safetensors, or a pickle, of which only weights are read."""
    if path.suffix.lower() in PICKLE_SUFFIXES:
        return read_pickle(path)
    return dict(read_tensors(path))


def load_pickle(path: Path) -> Any:
    """Return what a pickle of torch holds; code is never run, and damage is a UserError."""
    import pickle
    import warnings

    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old formats, on the way to being refused
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except pickle.UnpicklingError as error:
        found = _forbidden_global(str(error))
        raise UserError(
            f"{path} is refused: it carries more than weights{found}, and loading that could run code; "
            "convert it to .safetensors where you trust it"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # damaged pickles raise anything
        raise UserError(
            f"{path} is not a weight file that torch can read, or it is damaged; copy or download it again"
        ) from error


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a .ckpt, .pt or .bin file, unwrapped from `state_dict`."""
    import torch

    content = load_pickle(path)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    entries = content.items() if isinstance(content, dict) else ()
    tensors = {name: value for name, value in entries if isinstance(name, str) and torch.is_tensor(value)}
    if not tensors:
        raise UserError(f"{path} holds no weights")
    return tensors


def _forbidden_global(message: str) -> str:
    """Return " (NAME)" for the object that torch names in its refusal, where it names one."""
    found = re.search(r"GLOBAL:? (?!loads)([\w.]+\w)|function ([\w.]+\w)", message)
    return f" ({found[1] or found[2]})" if found else ""


def check_adapter(path: Path) -> None:
    """Raise UserError for an adapter that cannot be read, holds nothing, or has numbers that are not finite.

    Network modules read it again by themselves, by the suffix and with the package safetensors, which is stricter
    than what is here.
    """
    from safetensors import SafetensorError, safe_open

    if path.suffix.lower() not in (".safetensors", *PICKLE_SUFFIXES):
        raise UserError(f"{path} must be a .safetensors, .ckpt or .pt file: the ending tells how it is read")
    weights = read_weights(path)
    if not weights:
        raise UserError(f"{path} holds no weights")
    for name, tensor in weights.items():
        check_finite(tensor, name, path)
    if path.suffix.lower() == ".safetensors":
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError as error:
            raise UserError(f"{path} is damaged: {told(error)}; copy or download it again") from None


def check_finite(tensor: torch.Tensor, name: str, path: Path) -> None:
    """Raise UserError for a tensor of a file with a number that is NaN or infinite."""
    if not is_finite(tensor):
        raise UserError(f"{path}: {name} holds NaN or infinity: take another copy")


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether no number of a tensor is NaN or infinite.

    One pass over the memory, 0.1 s for 2 GB; `isfinite` would make a tensor of it and take thirty times as long.
    """
    import torch

    if not tensor.is_floating_point() or not tensor.numel():
        return True
    values = tensor if tensor.itemsize > 1 else tensor.float()  # 8-bit numbers cannot be compared
    return bool(torch.isfinite(torch.stack(values.aminmax())).all())  # NaN is both least and greatest


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a weight file; a pickle has none."""
    return {} if path.suffix.lower() in PICKLE_SUFFIXES else read_header(path).metadata


# --------------------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of path; when the block ends well it takes the place of path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")  # the suffix tells writers the format
    try:
        with disk_errors(path):
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn whatever says that the disk refuses into one OSError that names the file to be written."""
    try:
        yield
    except Exception as error:
        reason = refusal(error)
        if reason is None:
            raise
        raise OSError(f"{path} could not be written: {reason}; what was saved before is whole") from error


def refusal(error: Exception) -> str | None:
    """Return why the disk refuses to write, or None where an error is about something else."""
    if isinstance(error, OSError):
        return error.strerror
    text = str(error)
    if type(error).__name__ == "SafetensorError" and "I/O error: " in text:
        return text.split("I/O error: ")[1]
    if isinstance(error, RuntimeError) and "inline_container" in text:  # torch's writer does not tell why
        return "the disk is full or refuses it"
    return None


def write_weights(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to path, as a pickled dict for the suffixes of pickles, else as safetensors with metadata."""
    import torch
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        if path.suffix.lower() in PICKLE_SUFFIXES:
            torch.save(tensors, temporary)
        else:
            save_file(tensors, temporary, metadata=dict(metadata) if metadata else None)


def write_pickle(path: Path, content: Mapping[str, Any]) -> None:
    """Write a table as a pickle of torch, by way of a temporary name."""
    import torch

    with replacing(path) as temporary:
        torch.save(dict(content), temporary)


def write_stream(
    path: Path,
    infos: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file tensor by tensor, so that never more than one is in memory.

    infos tells name -> type and shape of all of them, in the order in which tensors yields them.
    """
    import torch

    names_of_types = {getattr(torch, python): name for name, python in DTYPE_NAMES.items()}
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, (dtype, shape) in infos.items():
        end = start + math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": names_of_types[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    header = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    header += b" " * (-len(header) % 8)
    with replacing(path) as temporary, temporary.open("wb", buffering=0) as file, _Writer(file) as writer:
        writer.write(len(header).to_bytes(8, "little") + header)
        for (name, (dtype, shape)), (given, tensor) in zip(infos.items(), tensors, strict=True):
            assert (name, dtype, shape) == (given, tensor.dtype, tuple(tensor.shape))
            if tensor.numel():
                writer.write(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))


class _Writer:
    """Writes to a file in a thread of its own, so that the next tensor is made meanwhile; at most one waits."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.pool = concurrent.futures.ThreadPoolExecutor(1)
        self.pending: list[concurrent.futures.Future[None]] = []

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            self._wait_for(0)

    def write(self, data: bytes | memoryview) -> None:
        """Take data to be written; raises the OSError of what was taken before."""
        self._wait_for(1)
        self.pending.append(self.pool.submit(self._write, memoryview(data)))

    def _wait_for(self, most: int) -> None:
        while len(self.pending) > most:
            self.pending.pop(0).result()

    def _write(self, data: memoryview) -> None:
        while data:
            data = data[self.file.write(data) :]


# --------------------------------------------------------------------------------------------------------------
# Hashes
# --------------------------------------------------------------------------------------------------------------

LEGACY_OFFSET, LEGACY_BYTES = 0x100000, 0x10000


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a whole file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:  # Python 3.10
    digest = hashlib.sha256()
    for chunk in iter(lambda: file.read(2**20), b""):
        digest.update(chunk)
    return digest.hexdigest()


def data_sha256(path: Path) -> str:
    """Return the SHA-256 of a safetensors file without its header, which metadata do not change; of others, of all."""
    if path.suffix.lower() in PICKLE_SUFFIXES:
        return file_sha256(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(read_header(path).data_start)
        for chunk in iter(lambda: file.read(2**20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def file_legacy_hash(path: Path) -> str:
    """Return the short hash of old web UIs: 8 hex digits over 64 KiB from the first MiB on."""
    with path.open("rb") as file:
        file.seek(LEGACY_OFFSET)
        return hashlib.sha256(file.read(LEGACY_BYTES)).hexdigest()[:8]


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a SHA-256 over names, types, shapes and bytes of tensors, in order of their names."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if math.prod(tensor.shape):
            digest.update(tensor.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
