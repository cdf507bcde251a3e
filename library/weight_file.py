"""Weight files, safetensors or pickle: tensors, metadata, hashes, and checks."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from library import scaled_weights
from library.errors import UserError, message_of
from library.file_kinds import PICKLE, SAFETENSORS, weight_format
from library.files import file_sha256
from library.pickles import PICKLE_SUFFIXES, read_pickle, write_pickle
from library.safetensors_io import (
    DTYPE_NAMES,
    Header,
    bytes_of,
    checked_type,
    dtype_of,
    read_header,
    read_pieces,
    read_tensors,
    write_stream,
)

if TYPE_CHECKING:
    import torch

LEGACY_OFFSET, LEGACY_BYTES = 0x100000, 0x10000
# Beginning of the names of embeddings in the file of a network, before their words; web UIs read them with it.
EMBEDDING = "bundle_emb."


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """An open weight file: its shapes, and its tensors one by one.

    A weight stored in 8 bits with a scale beside it is their product, in float32; the scales are no tensors of their
    own.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    content: Header | dict[str, torch.Tensor]
    scales: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)  # by weight

    @property
    def metadata(self) -> Mapping[str, str]:
        """The metadata, except those of the scales; none in a pickle."""
        if not isinstance(self.content, Header):
            return {}
        return {key: text for key, text in self.content.metadata.items() if key != scaled_weights.METADATA}

    def infos(self) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Yield name, type and shape of each tensor, in the order in which `tensors` yields them."""
        import torch

        for name, dtype, shape in self._stored():
            if name in self.shapes:
                yield name, getattr(torch, scaled_weights.SHOWN_AS) if name in self.scales else dtype, shape

    def _stored(self) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
        if isinstance(self.content, Header):
            for name, info in sorted(self.content.tensors.items(), key=lambda entry: entry[1].start):
                yield name, dtype_of(info, name, self.path), info.shape
        else:
            for name, tensor in self.content.items():
                yield name, tensor.dtype, tuple(tensor.shape)

    def tensor(self, name: str) -> torch.Tensor:
        """Return one tensor, in its own memory; it can be read again."""
        if isinstance(self.content, Header):
            return self._meant(*next(read_tensors(self.path, self.content, (name,))))
        return self._meant(name, self.content[name].clone())

    def take(self, name: str) -> torch.Tensor:
        """Return one tensor, in its own memory; a pickle releases it, so it can be read only once."""
        if isinstance(self.content, Header):
            return self.tensor(name)
        return self._meant(name, self.content.pop(name).clone())

    def take_as(self, name: str, dtype: torch.dtype) -> tuple[torch.Tensor, bool]:
        """Return one tensor in a type, as `take` does, and whether all its numbers in the file are finite.

        A tensor of another type is converted while it is read, so that it is never in memory in both.
        """
        import torch

        info = self.content.tensors[name] if isinstance(self.content, Header) and name not in self.scales else None
        stored = None if info is None else checked_type(info, name, self.path)
        if info is None or stored is None or stored == dtype:
            tensor = self.take(name)
            return tensor.to(dtype), is_finite(tensor)
        result = torch.empty(info.shape, dtype=dtype)
        rest, all_finite = result.view(-1), True
        for piece in read_pieces(self.path, info, stored):
            all_finite = all_finite and is_finite(piece)
            rest[: len(piece)] = piece
            rest = rest[len(piece) :]
        return result, all_finite

    def tensors(self, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) for the names that the file has, each in its own memory.

        A pickle releases each tensor that it yields, so it can be read only once.
        """
        wanted = self.shapes.keys() & names
        if isinstance(self.content, Header):
            for name, tensor in read_tensors(self.path, self.content, wanted):
                yield name, self._meant(name, tensor)
            return
        for name in [name for name in self.content if name in wanted]:
            yield name, self.take(name)

    def _meant(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        return scaled_weights.product(stored, self.scales[name]) if name in self.scales else stored


def open_weights(path: Path) -> WeightFile:
    """Open a weight file of either format, whatever its name; of safetensors only the header is read.

    Raises UserError that tells what another file is, and for weights in formats that are not read.
    """
    content = read_pickle(path) if weight_format(path) == PICKLE else read_header(path)
    if isinstance(content, Header):
        file = WeightFile(path, {name: info.shape for name, info in content.tensors.items()}, content)
    else:
        file = WeightFile(path, {name: tuple(tensor.shape) for name, tensor in content.items()}, content)
    scaled_weights.check_metadata(path, content.metadata if isinstance(content, Header) else {})
    if any(map(scaled_weights.is_marked, file.shapes)):
        file = with_scales(file)
    scaled_weights.check_whole_numbers(path, {name: kind for name, kind in types_in(file) if name not in file.scales})
    return file


def types_in(file: WeightFile) -> Iterator[tuple[str, str]]:
    """Yield name and type of each tensor as it is stored, as torch names it; "" for a type that is not supported."""
    if isinstance(file.content, Header):
        for name, info in file.content.tensors.items():
            yield name, DTYPE_NAMES.get(info.dtype, "")
    else:
        for name, tensor in file.content.items():
            yield name, str(tensor.dtype).removeprefix("torch.")


def with_scales(file: WeightFile) -> WeightFile:
    """Return a file whose weights in 8 bits are multiplied by the scales beside them."""
    infos = {name: (kind, file.shapes[name]) for name, kind in types_in(file)}
    scales = scaled_weights.scales_of(file.path, infos)
    for name, (kind, _) in infos.items():
        if scaled_weights.last_part(name) != scaled_weights.SETTINGS:
            continue
        if kind != "uint8":
            raise UserError(f"{file.path}: {name} is of the type {kind}, bytes are meant: {scaled_weights.ADVICE}")
        scaled_weights.check_settings(file.path, name, bytes(file.tensor(name).flatten().tolist()))
    shapes = {name: shape for name, shape in file.shapes.items() if not scaled_weights.is_helper(name)}
    return WeightFile(file.path, shapes, file.content, {weight: file.tensor(scale) for weight, scale in scales.items()})


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a weight file of either format."""
    file = open_weights(path)
    return dict(file.tensors(file.shapes))


def at_first_dot(name: str) -> tuple[str, str]:
    """Return (module, ending) of a tensor of a network whose module ends at the first dot; the dot is of the ending."""
    module, dot, rest = name.partition(".")
    return module, dot + rest


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a weight file; a pickle has none."""
    return {} if weight_format(path) == PICKLE else read_header(path).metadata


def write_weights(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to path: as a pickle if the suffix is that of one, else as safetensors with metadata."""
    import torch

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if path.suffix.lower() in PICKLE_SUFFIXES:
        write_pickle(path, tensors)
        return
    order = [getattr(torch, name) for name in DTYPE_NAMES.values()]
    laid_out = sorted(tensors.items(), key=lambda entry: (order.index(entry[1].dtype), entry[0]))
    infos = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in laid_out}
    write_stream(path, infos, laid_out, metadata)


def check_adapter(path: Path) -> None:
    """Raise UserError for an adapter that cannot be read, is empty, or has numbers that are not finite."""
    weights = read_weights(path)
    if not weights:
        raise UserError(f"{path} has no weights")
    for name, tensor in weights.items():
        check_finite(tensor, name, path)


def check_name(path: Path) -> None:
    """Raise UserError for a weight file that a foreign module cannot read.

    Those go by the suffix, and use the package safetensors, which is stricter than `read_header`.
    """
    from safetensors import SafetensorError, safe_open

    found = weight_format(path)
    if (path.suffix.lower() == ".safetensors") != (found == SAFETENSORS):
        suffix = ".safetensors" if found == SAFETENSORS else ".pt"
        raise UserError(
            f"{path} is a {found} file under another name, and the network module goes by the name: end it in {suffix}"
        )
    try:
        if found == SAFETENSORS:
            with safe_open(path, "pt"):
                pass
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read by the package safetensors: {message_of(error)}") from None


def check_finite(tensor: torch.Tensor, name: str, path: Path) -> None:
    """Raise UserError for a tensor of a file with a number that is NaN or infinite."""
    if not is_finite(tensor):
        raise not_finite(name, path)


def not_finite(name: str, path: Path) -> UserError:
    """Return the error for a tensor of a file with a number that is NaN or infinite."""
    return UserError(f"{path}: {name} holds NaN or infinity: take another copy")


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether no number of a tensor is NaN or infinite.

    One pass over the memory, 0.1 s for 2 GB; `isfinite` creates a tensor and takes thirty times as long.
    """
    import torch

    if not tensor.is_floating_point() or not tensor.numel():
        return True
    values = tensor if tensor.itemsize > 1 else tensor.float()  # 8-bit numbers cannot be compared
    return bool(torch.isfinite(torch.stack(values.aminmax())).all())  # NaN is both minimum and maximum


def data_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, for safetensors without the header, so that metadata do not change it."""
    return file_sha256(path, 0 if weight_format(path) == PICKLE else read_header(path).data_start)


def file_legacy_hash(path: Path) -> str:
    """Return the short hash of old web UIs: 8 hex digits over 64 KiB after the first MiB."""
    with path.open("rb") as file:
        file.seek(LEGACY_OFFSET)
        return hashlib.sha256(file.read(LEGACY_BYTES)).hexdigest()[:8]


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a SHA-256 over names, types, shapes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if math.prod(tensor.shape):
            digest.update(bytes_of(tensor))
    return digest.hexdigest()
