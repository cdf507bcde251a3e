"""Writes files and folders completely or not at all; hashes files.

A file is written under a temporary name in the folder of the target and renamed when it is complete. No reader sees an
incomplete file, and a killed process leaves the former file unchanged.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import io

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl")  # of pictures that are read
# Of pictures that are written: suffix -> Pillow's name of the format.
WRITTEN_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}
HASHED_AT_ONCE = 2**20  # bytes


@contextlib.contextmanager
def replacing(path: Path, *, suffix: str = "", durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the folder of path, which replaces path if the block succeeds.

    suffix ends the temporary name, for writers that choose the format by it. Without `durable`, for files that the next
    run can create again, the data are not synced to disk, and the temporary name is the same in every process, so that
    the next run replaces the file of a killed one. Raises OSError as in `disk_errors`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    own = f"{secrets.token_hex(8)}." if durable else ""  # containers on one drive number their processes alike
    temporary = _temporary(path, f"{own}tmp{suffix}")
    try:
        with disk_errors(path):
            yield temporary
            if durable:
                _wait_for_disk(temporary)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside path, which replaces path if the block succeeds.

    An existing folder must be empty unless `replace` is true. Raises OSError as in `disk_errors`.
    """
    target = path.resolve()  # a link is kept, and its target is replaced
    temporary, former = (_temporary(target, f"{os.getpid()}.{ending}") for ending in ("tmp", "old"))
    try:
        with disk_errors(path):
            for folder in (temporary, former):  # of a killed process with the same id
                shutil.rmtree(folder, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _wait_for_disk(file)
            if target.exists() and replace:
                target.rename(former)
            elif target.exists():
                target.rmdir()
            temporary.rename(target)
            shutil.rmtree(former, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary(path: Path, ending: str) -> Path:
    """Return a hidden path beside path, with a short name even if that of path has the maximal length."""
    digest = hashlib.blake2b(os.fsencode(path.name), digest_size=8).hexdigest()
    return path.with_name(f".{digest}.{ending}")


def _wait_for_disk(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def send_to_disk(file: io.FileIO, start: int) -> None:
    """Let the system begin to write a file from an offset on to the disk, without waiting; for Linux."""
    if hasattr(os, "posix_fadvise"):
        # It means that the bytes are not needed again. Linux writes such bytes, and forgets them if they are written.
        with contextlib.suppress(OSError):
            os.posix_fadvise(file.fileno(), start, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn write errors of any library into an OSError that names the file."""
    try:
        yield
    except Exception as error:
        reason = _refusal(error)
        if reason is None:
            raise
        refused = OSError(f"{path} could not be written: {reason}; what was saved before is unchanged")
        refused.errno = getattr(error, "errno", None)
        raise refused from error


def _refusal(error: Exception) -> str | None:
    """Return why writing failed, or None for an error of another kind."""
    if isinstance(error, OSError):
        return error.strerror
    text = str(error)
    if type(error).__name__ == "SafetensorError" and "I/O error: " in text:
        return text.split("I/O error: ")[1]
    if isinstance(error, RuntimeError) and "inline_container" in text:  # the writer of torch gives no reason
        return "the disk is full or not writable"
    return None


def file_sha256(path: Path, start: int = 0) -> str:
    """Return the SHA-256 of a file from an offset to its end, 64 hex digits; reads the file in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        while block := file.read(HASHED_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()
