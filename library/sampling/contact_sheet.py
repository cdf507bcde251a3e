"""Contact sheets: many pictures on one, with labelled rows and columns."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from PIL import Image, ImageDraw, ImageFont

from library.files import replacing
from library.words import counted

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
CELL = 256  # longest side of a picture on the sheet, in pixels
LABEL_HEIGHT, LABEL_WIDTH, GAP = 24, 200, 4
BACKGROUND, INK = "white", "black"
# The first that is installed; the last resorts have no Japanese.
FONTS = ("NotoSansCJK-Regular.ttc", "YuGothM.ttc", "msgothic.ttc", "Hiragino Sans GB.ttc", "ipag.ttf", "DejaVuSans.ttf")
# For texts with characters that this one lacks.
OTHER_FONTS = (
    *("meiryo.ttc", "YuGothR.ttc", "msyh.ttc", "malgun.ttf"),  # Windows
    *("NotoSansCJKjp-Regular.otf", "NotoSansJP-Regular.otf", "NotoSansJP-Regular.ttf", "NotoSerifCJK-Regular.ttc"),
    *("ipaexg.ttf", "fonts-japanese-gothic.ttf", "TakaoGothic.ttf", "VL-Gothic-Regular.ttf"),
    *("DroidSansFallbackFull.ttf", "DroidSansFallback.ttf", "wqy-microhei.ttc", "wqy-zenhei.ttc", "unifont.ttf"),
    *("Arial Unicode.ttf", "AppleSDGothicNeo.ttc"),  # macOS
)
NO_CHARACTER = "\U0010ffff"  # is drawn as every character that a font lacks


def draw_sheet(
    cells: Sequence[Sequence[Image.Image | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    cell: int = CELL,
    title: str = "",
) -> Image.Image:
    """Return a sheet of cells[row][column]; None leaves a cell empty. cell is the longest side of a picture on it."""
    size = max((max(picture.size) for row in cells for picture in row if picture), default=cell)
    side = min(size, cell)
    step = side + GAP
    sheet = Image.new("RGB", (LABEL_WIDTH + step * len(columns), LABEL_HEIGHT + step * len(rows)), BACKGROUND)
    pen, fonts = ImageDraw.Draw(sheet), LabelFonts(13)
    if title:
        font = fonts.of(title)
        pen.text((6, LABEL_HEIGHT // 2), wrap(title, font, LABEL_WIDTH - 12, max_lines=1)[0], INK, font, anchor="lm")
    for column, label in enumerate(columns):
        middle = LABEL_WIDTH + column * step + side // 2
        pen.text((middle, LABEL_HEIGHT // 2), label, fill=INK, font=fonts.of(label), anchor="mm")
    for row, label in enumerate(rows):
        top, font = LABEL_HEIGHT + row * step, fonts.of(label)
        text = "\n".join(wrap(label, font, LABEL_WIDTH - 12, max_lines=side // 16))
        pen.multiline_text((6, top + side // 2), text, fill=INK, font=font, anchor="lm", spacing=2)
        for column, picture in enumerate(cells[row]):
            if picture is not None:
                small = picture.copy()
                small.thumbnail((side, side))
                sheet.paste(small, (LABEL_WIDTH + column * step, top))
    return sheet


def part_title(shown: int, total: int, noun: str) -> str:
    """Return the title of a sheet that shows only some of the things of a kind: 12 of 40 previews; "" if it has all."""
    return f"{shown} of {counted(total, noun)}" if shown < total else ""


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Write a sheet as PNG, whole or not at all."""
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")


class LabelFonts:
    """The fonts of the labels on a sheet: the usual one, and others for texts with characters that it lacks."""

    def __init__(self, size: int) -> None:
        self.size, self.usual = size, label_font(size)

    @functools.cached_property
    def others(self) -> list[Font]:
        """The other fonts that are installed."""
        return list(installed((*FONTS, *OTHER_FONTS), self.size))

    def of(self, text: str) -> Font:
        """Return the font that lacks the fewest characters of a text, the usual one if it lacks none."""
        if not lacking(text, self.usual):
            return self.usual
        font = min((self.usual, *self.others), key=lambda font: len(lacking(text, font)))
        if lacking(text, font):
            warn_of_boxes()
        return font


def label_font(size: int) -> Font:
    """Return a font for labels."""
    return next(installed(FONTS, size), None) or ImageFont.load_default(size)


def installed(names: Sequence[str], size: int) -> Iterator[Font]:
    """Yield the fonts that are in the folders of the system, by their file names."""
    for name in names:
        try:
            yield ImageFont.truetype(name, size)
        except OSError:
            continue


def lacking(text: str, font: Font) -> set[str]:
    """Return the characters of a text for which a font has no picture; ASCII is in all fonts."""
    rest = {character for character in text if not character.isascii() and not character.isspace()}
    box = picture_of(NO_CHARACTER, font) if rest else None
    return {character for character in rest if picture_of(character, font) == box}


def picture_of(character: str, font: Font) -> tuple[tuple[int, int], bytes]:
    """Return size and pixels of a character."""
    mask = font.getmask(character)
    return mask.size, bytes(mask)


@functools.cache
def warn_of_boxes() -> None:
    """Warn of characters that are drawn as boxes, once in a process."""
    logger.warning(
        "sheets of pictures show boxes in the place of some characters, for no font that is looked for has them: "
        "install one, for Japanese, Chinese and Korean the package fonts-noto-cjk (Debian, Ubuntu) or "
        "google-noto-sans-cjk-fonts (Fedora); on Windows, the Japanese supplemental fonts"
    )


def wrap(text: str, font: Font, width: int, *, max_lines: int) -> list[str]:
    """Return text in lines of at most width pixels, broken at spaces where there are some."""
    lines = [""]
    for word in text.replace("\n", " ").split(" "):
        for piece in [word] if font.getlength(word) <= width else list(word):
            joined = f"{lines[-1]} {piece}".strip() if piece == word else lines[-1] + piece
            if font.getlength(joined) <= width:
                lines[-1] = joined
            else:
                lines.append(piece)
    return lines if len(lines) <= max_lines else [*lines[: max_lines - 1], lines[max_lines - 1] + " …"]


def spread(items: list[Item], most: int) -> list[Item]:
    """Return at most `most` evenly spaced items, with the first and the last."""
    if len(items) <= most:
        return items
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]
