"""What a file is by its content: a weight file in one of two formats, or something else, which is named.

The name of a file tells nothing certain: downloads are renamed, and what was downloaded may be an error page.
"""

from __future__ import annotations

import re
import tarfile
import zipfile
from pathlib import Path
from typing import Literal, NamedTuple

from library.errors import UserError

Format = Literal["safetensors", "pickle"]
SAFETENSORS: Format = "safetensors"
PICKLE: Format = "pickle"

HEAD_BYTES = 1024  # enough for every sign below
SHOWN_TEXT = 40  # characters of a text
NOT_DECODED = "\ufffd"
AGAIN = "copy or download it again"
ZIP, TAR = b"PK\x03\x04", b"ustar"
TAR_OFFSET = 257
TORCH_TAR = {"sys_info", "pickle", "storages", "tensors"}  # members of a file of torch before 0.1.10


class Sign(NamedTuple):
    """How a kind of file that is no weight file is recognised: a pattern at its beginning."""

    pattern: bytes
    kind: str
    advice: str = "give the weight file itself"


DOWNLOAD = "the download failed, perhaps for lack of a login or an accepted licence; download it again"
UNPACK = "unpack it and give the weight file in it"
OTHER_PROGRAM = "download it as .safetensors"
# In this order: a more general pattern comes later.
SIGNS = (
    Sign(rb"version https://git-lfs", "a pointer of Git LFS", "git lfs pull fetches the file itself"),
    Sign(
        rb"(?i)(\xef\xbb\xbf)?\s*(<!--.*?-->\s*)*<(!doctype html|html|head|body|title)\b", "a web page (HTML)", DOWNLOAD
    ),
    Sign(rb"(\xef\xbb\xbf)?\s*<\?xml", "an XML text", DOWNLOAD),
    Sign(rb"\[InternetShortcut\]|L\x00\x00\x00\x01\x14\x02\x00", "a shortcut to another place"),
    Sign(rb"\x89PNG\r\n", "a PNG picture"),
    Sign(rb"\xff\xd8\xff", "a JPEG picture"),
    Sign(rb"RIFF....WEBP", "a WebP picture"),
    Sign(rb"GIF8[79]a", "a GIF picture"),
    Sign(rb"%PDF-", "a PDF document"),
    Sign(rb"GGUF", "a GGUF file (of llama.cpp and its like)", OTHER_PROGRAM),
    Sign(rb"ggjt|tjgg|ggml|lmgg", "a GGML file", OTHER_PROGRAM),
    Sign(rb"\x08[\x01-\x20][\x12\x1a:B]", "an ONNX model", OTHER_PROGRAM),
    Sign(rb"\x89HDF\r\n", "an HDF5 file (of Keras and its like)", OTHER_PROGRAM),
    Sign(rb"\x93NUMPY", "a NumPy array", OTHER_PROGRAM),
    Sign(rb"(\xde..|[\x81-\x8f])[\xa1-\xbf][a-z]", "a file of Flax (msgpack)", OTHER_PROGRAM),
    Sign(rb"ftrt|ptrt", "a TensorRT engine", OTHER_PROGRAM),
    Sign(rb"\x1f\x8b", "a gzip archive", UNPACK),
    Sign(rb"BZh", "a bzip2 archive", UNPACK),
    Sign(rb"\xfd7zXZ\x00", "an xz archive", UNPACK),
    Sign(rb"\x28\xb5\x2f\xfd", "a Zstandard archive", UNPACK),
    Sign(rb"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    Sign(rb"Rar!\x1a\x07", "a RAR archive", UNPACK),
    Sign(rb"PK\x05\x06", "an empty zip archive", AGAIN),
    Sign(rb"\x00\x05\x16\x07", "what macOS stores beside a file (its name begins with ._)"),
    Sign(rb"MZ.\x00|\x7fELF", "a program"),
    Sign(rb"\x00{16}", "a file that begins with zeros", "its download did not finish; download it again"),
)


def weight_format(path: Path) -> Format:
    """Return the format of a weight file; raises UserError that tells what another file is."""
    head = first_bytes(path)
    if head[8:9] == b"{" and not head[:8].isascii():
        return SAFETENSORS
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return SAFETENSORS
    if head.startswith(ZIP):
        return zip_format(path)
    if head[TAR_OFFSET:].startswith(TAR):
        raise UserError(f"{path} {tar_kind(path)}")
    if re.match(rb"\x80[\x02-\x05]", head):
        return PICKLE
    raise UserError(f"{path} {other_kind(head)}")


def first_bytes(path: Path) -> bytes:
    """Return the beginning of a file; raises UserError for a folder, and for a file that cannot be read."""
    if path.is_dir():
        raise UserError(f"{path} is not a weight file, but a folder: give a file in it")
    try:
        with path.open("rb") as file:
            return file.read(HEAD_BYTES)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def zip_format(path: Path) -> Format:
    """Return the format of a zip archive, which is how torch saves; raises UserError for another archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        raise UserError(f"{path} is a zip archive, as torch writes, that is cut short or damaged; {AGAIN}") from None
    members = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in members:
        raise UserError(f"{path} is not a weight file, but a program of torch (TorchScript): {OTHER_PROGRAM}")
    if not names:
        raise UserError(f"{path} is not a weight file, but an empty zip archive: {AGAIN}")
    if "data.pkl" not in members:
        raise UserError(f"{path} is not a weight file, but a zip archive with {names[0]!r} in it: {UNPACK}")
    return PICKLE


def tar_kind(path: Path) -> str:
    """Return what a tar archive is."""
    try:
        with tarfile.open(path) as archive:
            names = {member.name.removeprefix("./") for member in archive}
    except (tarfile.TarError, OSError, EOFError):
        return f"is a tar archive that is cut short or damaged; {AGAIN}"
    if names >= TORCH_TAR:
        return (
            "is in the oldest format of torch (tar, before 2017), which cannot be read without running what is in it: "
            "convert it to .safetensors on a machine where you trust it"
        )
    return f"is not a weight file, but a tar archive: {UNPACK}"


def other_kind(head: bytes) -> str:
    """Return what a file is that begins so and is no weight file."""
    if not head:
        return f"is not a weight file: it is empty (0 bytes); {AGAIN}"
    for sign in SIGNS:
        if re.match(sign.pattern, head, re.DOTALL):
            return f"is not a weight file, but {sign.kind}: {sign.advice}"
    text = as_text(head)
    if text is not None:
        return f"is not a weight file, but a text that begins {text[:SHOWN_TEXT]!r}: give the weight file itself"
    return f"is not a weight file, or its header is damaged; {AGAIN}"


def as_text(head: bytes) -> str | None:
    """Return the beginning of a text without line breaks, or None for what is no text."""
    text = head.decode("utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig", "replace")
    words = " ".join(text.rstrip(NOT_DECODED).split())  # the last character may be cut
    return words if words and words.isprintable() and NOT_DECODED not in words else None
