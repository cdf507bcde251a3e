"""What is remembered of pictures between runs, so that a run opens no picture that has not changed.

Each folder of pictures has one hidden file with facts about the files in it: what their headers say, their digests, and
that they could be decoded. A fact counts as long as the stamp of the file is the same: its size, its number in the file
system (inode), the time of its last change (mtime) and that of the last change of anything about it (ctime; on Windows
the time when it was created, which some programs set). So a file which another one of the same size and mtime replaces
is seen, and a copy of a folder, whose files all have new ones, is read once more. Names are relative to the folder.

The file is a database of SQLite with a rollback journal, because the write-ahead log of SQLite works neither on network
drives nor in folders that are read-only. Each row has a checksum, so that no accident makes a wrong fact. It is only a
cache: where it cannot be read or written, the run goes on without it, and says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from library.config.dataset import DataConfig
from library.data.images import Header, UnreadablePictureError, load_picture, read_header, reading_threads
from library.data.picture_kinds import LOSSES
from library.files import file_sha256
from library.progress import Bar

if TYPE_CHECKING:
    import sqlite3

logger = logging.getLogger(__name__)

K = TypeVar("K", str, Path)
T = TypeVar("T")

INDEX_FILE = ".sd-index.sqlite"
APPLICATION = 0x53444958  # "SDIX": what SQLite stores in the file to tell whose it is
VERSION = 1  # of the table and of what the facts say
SETTLED = 2_000_000_000  # nanoseconds: no file system counts in longer steps
WAITED = 10.0  # seconds for another process that writes
WRITTEN_AT_ONCE = 1000  # facts: what a killed run loses

# Which facts count: those of files with the same stamp, all without a look at the files, none.
Checks = Literal["changed", "none", "all"]


@dataclasses.dataclass(frozen=True)
class Kind(Generic[T]):
    """A kind of facts: its name in the index, how a fact is read from a file, and how it is stored as text."""

    name: str
    read: Callable[[Path], T]
    to_text: Callable[[T], str]
    from_text: Callable[[str], T]


def header_to_text(header: Header) -> str:
    """Return a header as it is stored: width, height, and what of the picture is lost."""
    return " ".join([*map(str, header.size), *sorted(header.losses)])


def header_from_text(text: str) -> Header:
    """Return the header that is stored as a text."""
    width, height, *losses = text.split()
    return Header((int(width), int(height)), frozenset(loss for loss in LOSSES if loss in losses))


def decode(path: Path) -> None:
    """Decode a picture; raises UnreadablePictureError. The pixels are not returned: they would all stay in memory."""
    load_picture(path)


HEADER = Kind("header", read_header, header_to_text, header_from_text)
DIGEST = Kind("sha256", file_sha256, str, str)
DECODED = Kind("decoded", decode, lambda _: "", lambda _: None)


@dataclasses.dataclass(frozen=True)
class PictureIndex:
    """Facts about pictures, remembered or read; keys of the results are the paths as they are given."""

    checks: Checks = "changed"

    def headers(self, files: Iterable[K]) -> tuple[dict[K, Header], dict[K, UnreadablePictureError]]:
        """Return the headers of files, and why others cannot be read."""
        return self._facts(HEADER, files)

    def digests(self, files: Iterable[K]) -> dict[K, str]:
        """Return the SHA-256 of each file, 64 hex digits; raises OSError for a file that cannot be read."""
        return self._facts(DIGEST, files)[0]

    def damaged(self, files: Iterable[K], progress: str | None = None) -> dict[K, UnreadablePictureError]:
        """Return why some of the files cannot be decoded as pictures.

        progress is the title of a progress bar over those that are read.
        """
        return self._facts(DECODED, files, progress)[1]

    def _facts(
        self, kind: Kind[T], files: Iterable[K], progress: str | None = None
    ) -> tuple[dict[K, T], dict[K, UnreadablePictureError]]:
        folders: dict[str, dict[str, K]] = {}
        for file in files:
            folder, name = os.path.split(file)
            folders.setdefault(folder, {})[name] = file
        found: dict[K, T] = {}
        bad: dict[K, UnreadablePictureError] = {}
        missing: dict[str, dict[str, bytes]] = {}  # folder -> name -> stamp
        failures: dict[str, str] = {}
        for folder, names in folders.items():
            stamps = None if self.checks == "none" else stamps_of(folder, names)
            known = [] if self.checks == "all" else recall(folder, kind, names, stamps, failures)
            found.update((names[name], fact) for name, fact in known)
            others = [name for name, file in names.items() if file not in found]
            if others:
                missing[folder] = (
                    stamps_of(folder, others) if stamps is None else {name: stamps[name] for name in others}
                )
        for (folder, name), fact in read_facts(kind, missing, failures, progress):
            if isinstance(fact, UnreadablePictureError):
                bad[folders[folder][name]] = fact
            else:
                found[folders[folder][name]] = fact
        if failures:
            folder, reason = next(iter(failures.items()))
            further = f" and {len(failures) - 1} more folders" if len(failures) > 1 else ""
            logger.info("nothing is remembered of the pictures in %s%s: %s", folder, further, reason)
        return found, bad


DEFAULT_INDEX = PictureIndex()


def index_for(data: DataConfig) -> PictureIndex:
    """Return the index of a run, which believes what the options say."""
    return PictureIndex("all" if data.check_pictures else "none" if data.skip_cache_check else "changed")


def read_facts(
    kind: Kind[T], missing: Mapping[str, Mapping[str, bytes]], failures: dict[str, str], progress: str | None
) -> Iterator[tuple[tuple[str, str], T | UnreadablePictureError]]:
    """Read facts about files (folder -> name -> stamp) and remember them; yield ((folder, name), fact) of each."""

    def read(path: Path) -> T | UnreadablePictureError:
        try:
            return kind.read(path)
        except UnreadablePictureError as error:
            return error

    shared: dict[str, T] = {}  # equal facts are one object
    total = sum(map(len, missing.values()))
    bar: Bar[None] = Bar(total=total, desc=progress or "", unit="picture", disable=progress is None or not total)
    with reading_threads() as pool, bar:
        for folder, stamps in missing.items():
            names = list(stamps)
            for start in range(0, len(names), WRITTEN_AT_ONCE):
                part = names[start : start + WRITTEN_AT_ONCE]
                fresh = []
                for name, fact in zip(part, pool.map(read, [Path(folder, name) for name in part]), strict=True):
                    if isinstance(fact, UnreadablePictureError):
                        yield (folder, name), fact
                    else:
                        text = kind.to_text(fact)
                        yield (folder, name), shared.setdefault(text, fact)
                        fresh += [(name, stamps[name], text)] if stamps[name] else []
                    bar.update()
                remember(folder, kind.name, fresh, failures)


# --------------------------------------------------------------------------------------------------------------
# Stamps of files
# --------------------------------------------------------------------------------------------------------------


def stamps_of(folder: str, names: Iterable[str]) -> dict[str, bytes]:
    """Return name -> stamp of files in a folder, b"" for one that has just been changed or is not there."""
    now = time.time_ns()
    found = dict.fromkeys(names, b"")
    with contextlib.suppress(OSError), os.scandir(folder or os.curdir) as entries:  # on Windows it has the stamps
        for entry in entries:
            if entry.name in found:
                with contextlib.suppress(OSError):
                    found[entry.name] = stamp_of(entry.stat(), now)
    return found


def stamp_of(status: os.stat_result, now: int) -> bytes:
    """Return the stamp of a file, b"" if it was changed so recently that a later change could have the same one.

    now is the time in nanoseconds.
    """
    mtime, ctime = status.st_mtime_ns, status.st_ctime_ns
    if abs(now - mtime) < SETTLED or abs(now - ctime) < SETTLED:
        return b""
    return hashlib.blake2b(b"%d %d %d %d" % (status.st_size, mtime, ctime, status.st_ino), digest_size=8).digest()


# --------------------------------------------------------------------------------------------------------------
# The file
# --------------------------------------------------------------------------------------------------------------

TABLE = """
    CREATE TABLE IF NOT EXISTS facts (
        kind TEXT, name BLOB, stamp BLOB, text TEXT, checksum INTEGER, PRIMARY KEY (kind, name)
    ) WITHOUT ROWID
"""


WRONG_VALUES = (AttributeError, TypeError, ValueError)  # of reading a row whose values are of other kinds
# Beginnings of SQLite's messages about a file that it can read, and that is not as it was written.
OTHER_TABLE = ("no such", "table facts has", "Could not decode", "unsupported file format")


class UnusableIndexError(Exception):
    """An index that is not ours; the message is the reason."""


def recall(
    folder: str,
    kind: Kind[T],
    names: Collection[str],
    stamps: Mapping[str, bytes] | None,
    failures: dict[str, str],
) -> list[tuple[str, T]]:
    """Return (name, fact) of the facts of a kind that are remembered of files in a folder; equal ones are one object.

    They are those of files with the given stamps, or without stamps all. Why there is no index is added to failures.
    """

    def read(index: sqlite3.Connection) -> list[tuple[str, T]]:
        found: list[tuple[str, T]] = []
        if identity_of(index) != (APPLICATION, VERSION):
            return found
        facts: dict[str, T] = {}
        for encoded, stamp, text, checksum in index.execute(
            "SELECT name, stamp, text, checksum FROM facts WHERE kind = ?", (kind.name,)
        ):
            name = os.fsdecode(encoded)
            is_known = name in names and (stamps is None or stamps[name] == stamp)
            if is_known and checksum == checksum_of(kind.name, encoded, stamp, text):
                if text not in facts:
                    facts[text] = kind.from_text(text)
                found.append((name, facts[text]))
        return found

    return use_index(folder, read, failures) or [] if Path(folder, INDEX_FILE).is_file() else []


def remember(folder: str, kind: str, facts: Sequence[tuple[str, bytes, str]], failures: dict[str, str]) -> None:
    """Store facts (name, stamp, text) of a kind about files in a folder, all of them or none.

    If that fails, the reason is added to failures; a folder that is in them is left out.
    """

    def write(index: sqlite3.Connection) -> None:
        index.execute("BEGIN IMMEDIATE")
        if identity_of(index) != (APPLICATION, VERSION):
            index.execute("DROP TABLE IF EXISTS facts")  # of another version
            index.execute(f"PRAGMA application_id = {APPLICATION}")
            index.execute(f"PRAGMA user_version = {VERSION}")
        index.execute(TABLE)
        encoded = [(os.fsencode(name), stamp, text) for name, stamp, text in facts]
        rows = [(kind, *fact, checksum_of(kind, *fact)) for fact in encoded]
        index.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?, ?, ?, ?)", rows)
        index.execute("COMMIT")

    if facts and folder not in failures:
        use_index(folder, write, failures)


def use_index(folder: str, work: Callable[[sqlite3.Connection], T], failures: dict[str, str]) -> T | None:
    """Return what a function returns for the database of a folder; None, with the reason in failures, if it fails.

    The first function that writes creates the file. One that is damaged is removed.
    """
    path = Path(folder, INDEX_FILE)
    try:
        import sqlite3
    except ImportError as error:  # Python was built without it
        failures[folder] = str(error)
        return None
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=WAITED, isolation_level=None)) as index:
            index.execute("PRAGMA synchronous = OFF")  # a power cut may damage the file, which the checksums tell
            return work(index)
    except (sqlite3.Error, UnusableIndexError, *WRONG_VALUES) as error:
        # A lock, a full disk, no permission; but not a table that is missing or another.
        is_refused = isinstance(error, sqlite3.OperationalError) and not str(error).startswith(OTHER_TABLE)
        if is_refused or isinstance(error, UnusableIndexError):
            failures[folder] = str(error)
            return None
        logger.warning("%s is damaged (%s); it is made anew", path, error)
        try:
            path.unlink(missing_ok=True)
            path.with_name(f"{INDEX_FILE}-journal").unlink(missing_ok=True)
        except OSError as refusal:
            failures[folder] = str(refusal)
    return None


def identity_of(index: sqlite3.Connection) -> tuple[int, int]:
    """Return whose database it is, and its version: (0, 0) for an empty one; raises UnusableIndexError."""
    owner, version = (index.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
    if owner != APPLICATION and index.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
        raise UnusableIndexError(f"{INDEX_FILE} is a database of another program")
    return owner, version


def checksum_of(kind: str, name: bytes, stamp: bytes, text: str) -> int:
    """Return the checksum of a row."""
    return zlib.crc32(b"%b\0%b\0%b\0%b" % (kind.encode(), name, stamp, text.encode()))
