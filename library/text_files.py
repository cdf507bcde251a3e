"""Text files in UTF-8, and what another encoding probably is."""

from __future__ import annotations

import codecs
import functools
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from library.errors import UserError, quotes_hint


class UnreadableTextError(UserError):
    """A text file that cannot be read, and why; kind is what several such files are, and what to do."""

    def __init__(self, path: Path, text: str, *, reason: str, kind: str, encoding: str | None = None) -> None:
        super().__init__(f"{path} {text}")
        self.path, self.reason, self.kind = path, reason, kind
        self.encoding = encoding  # the one that the file is probably in


def read_text(file: Path | str) -> str:
    """Return the content of a UTF-8 file, without a byte order mark; every line break is one character.

    Raises UnreadableTextError.
    """
    try:
        with io.FileIO(file) as opened:  # for a small file it takes half the time of Path.read_bytes
            data = opened.read()
    except FileNotFoundError:
        path = Path(file)
        text = f"does not exist{quotes_hint(path)}"
        raise UnreadableTextError(path, text, reason="it is not there", kind="do not exist") from None
    except OSError as error:
        path = Path(file)
        text = f"cannot be read ({error.strerror}); mend its permissions"
        raise UnreadableTextError(
            path, text, reason=str(error.strerror), kind="cannot be read; mend their permissions"
        ) from None
    try:
        if b"\0" not in data:
            return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        reason = "it has zero bytes"
    except UnicodeDecodeError as error:
        reason = f"{error.reason} at byte {error.start}"
    encoding = probable_encoding(data)
    reason = f"probably {encoding}" if encoding else reason
    raise UnreadableTextError(
        Path(file),
        f"is not UTF-8 text ({reason}): save it as UTF-8",
        reason=reason,
        kind="are not UTF-8 text; save them as UTF-8",
        encoding=encoding,
    )


# --------------------------------------------------------------------------------------------------------------
# Other encodings
# --------------------------------------------------------------------------------------------------------------

MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before that of UTF-16, which begins it
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
PUNCTUATION = "\u3000-\u303f\uff00-\uff60\uffe0-\uffe6\u00b7\u2010-\u203b"
IDEOGRAPHS = "\u4e00-\u9fff"
KANA = "\u3041-\u30ff"
HANGUL = "\uac00-\ud7a3"


class Encoding(NamedTuple):
    """An encoding: its name, the codec, and what texts in it look like."""

    name: str
    codec: str
    fits: Callable[[bytes, str], bool]  # whether bytes, and what they decode to, are probably text


def _wide(letters: str) -> Callable[[bytes, str], bool]:
    """Return whether all characters beyond ASCII are among letters, and the second bytes are not all ASCII.

    In a text of single bytes, what looks like the second byte of a pair is usually the next ASCII letter.
    """
    allowed = re.compile(f"[\0-\x7f{letters}]+")

    def fits(data: bytes, text: str) -> bool:
        pairs = [character for character in text if ord(character) > 0x7F]
        num_high = sum(byte > 0x7F for byte in data)
        return allowed.fullmatch(text) is not None and num_high > len(pairs)

    return fits


def _single(letters: str, *runs: str) -> Callable[[bytes, str], bool]:
    """Return whether the characters beyond ASCII are letters in runs of some patterns, the first one occurring."""
    patterns, high = [re.compile(run.format(letters=letters)) for run in runs], re.compile(r"[^\0-\x7f]")

    def fits(data: bytes, text: str) -> bool:
        del data
        rest = functools.reduce(lambda rest, pattern: pattern.sub("", rest), patterns, text)
        return patterns[0].search(text) is not None and high.search(rest) is None

    return fits


ENCODINGS = (
    Encoding("cp932 (Shift JIS)", "cp932", _wide(PUNCTUATION + KANA + IDEOGRAPHS)),
    Encoding("EUC-JP", "euc_jp", _wide(PUNCTUATION + KANA + IDEOGRAPHS)),
    Encoding("GB2312 (GBK)", "gb2312", _wide(PUNCTUATION + IDEOGRAPHS)),
    Encoding("Big5", "big5", _wide(PUNCTUATION + IDEOGRAPHS)),
    Encoding("EUC-KR (cp949)", "euc_kr", _wide(PUNCTUATION + HANGUL)),
    # Letters with accents stand alone or in pairs; Cyrillic ones make up whole words.
    Encoding(
        "Windows-1252 (Latin-1)",
        "cp1252",
        _single("\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u00ff", r"(?<![{letters}])[{letters}]{{1,2}}(?![{letters}])"),
    ),
    Encoding(
        "Windows-1251",
        "cp1251",
        _single("\u0401\u0410-\u044f\u0451", r"\b[{letters}]{{3,}}\b", r"\b[{letters}]{{1,2}}\b"),
    ),
)


def probable_encoding(data: bytes) -> str | None:
    """Return the name of the encoding that a text which is not UTF-8 is probably in; None if several are possible."""
    for mark, name in MARKS.items():
        if data.startswith(mark):
            return name
    if b"\0" in data:
        zeros = (data[1::2].count(0), data[0::2].count(0))
        few, many = sorted(zeros)
        is_utf16 = len(data) % 2 == 0 and few == 0 and many > len(data) // 4
        return "UTF-16 without a byte order mark" if is_utf16 else None
    fitting = [encoding.name for encoding in ENCODINGS if _fits(data, encoding)]
    return fitting[0] if len(fitting) == 1 else None


def _fits(data: bytes, encoding: Encoding) -> bool:
    try:
        text = data.decode(encoding.codec)
    except UnicodeDecodeError:
        return False
    return encoding.fits(data, text)
