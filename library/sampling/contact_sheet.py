"""Contact sheets: many pictures on one, with labelled rows and columns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from library.files import replacing

CELL = 256  # longest side of a picture on the sheet, in pixels
LABEL_HEIGHT, LABEL_WIDTH, GAP = 24, 200, 4
BACKGROUND, INK = "white", "black"
# The first that is installed; the last resort has no Japanese.
FONTS = ("NotoSansCJK-Regular.ttc", "YuGothM.ttc", "msgothic.ttc", "Hiragino Sans GB.ttc", "ipag.ttf", "DejaVuSans.ttf")


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
    pen, font = ImageDraw.Draw(sheet), label_font(13)
    if title:
        pen.text((6, LABEL_HEIGHT // 2), wrap(title, font, LABEL_WIDTH - 12, max_lines=1)[0], INK, font, anchor="lm")
    for column, label in enumerate(columns):
        pen.text((LABEL_WIDTH + column * step + side // 2, LABEL_HEIGHT // 2), label, fill=INK, font=font, anchor="mm")
    for row, label in enumerate(rows):
        top = LABEL_HEIGHT + row * step
        text = "\n".join(wrap(label, font, LABEL_WIDTH - 12, max_lines=side // 16))
        pen.multiline_text((6, top + side // 2), text, fill=INK, font=font, anchor="lm", spacing=2)
        for column, picture in enumerate(cells[row]):
            if picture is not None:
                small = picture.copy()
                small.thumbnail((side, side))
                sheet.paste(small, (LABEL_WIDTH + column * step, top))
    return sheet


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Write a sheet as PNG, whole or not at all."""
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")


def label_font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Return a font for labels."""
    for name in FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int, *, max_lines: int) -> list[str]:
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
