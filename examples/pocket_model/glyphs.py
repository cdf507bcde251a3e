"""The glyphs the pocket model was trained on, and a judge that names the glyph in a picture.

`glyphs.png` is a sheet of RGBA cells in the order of SUBJECTS and then HELD_OUT, so neither drawing
training pictures nor judging results needs the font. Only numpy and Pillow are used. Letters in
shapes: N templates, G side of the judged grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 128  # pixels of a side of every picture
CELL = 112  # pixels of a side of a cell of the sheet; a glyph's longer side fills it
COLUMNS = 8
SHEET = Path(__file__).with_name("glyphs.png")

# name -> code point in Noto Color Emoji
SUBJECTS = {
    "fox": 0x1F98A,
    "panda": 0x1F43C,
    "frog": 0x1F438,
    "pig": 0x1F437,
    "lion": 0x1F981,
    "koala": 0x1F428,
    "penguin": 0x1F427,
    "turtle": 0x1F422,
    "fish": 0x1F420,
    "mushroom": 0x1F344,
    "sunflower": 0x1F33B,
    "cactus": 0x1F335,
    "tulip": 0x1F337,
    "tree": 0x1F332,
    "strawberry": 0x1F353,
    "pizza": 0x1F355,
    "lemon": 0x1F34B,
    "watermelon": 0x1F349,
    "carrot": 0x1F955,
    "donut": 0x1F369,
    "cupcake": 0x1F9C1,
    "heart": 0x2764,
    "star": 0x2B50,
    "balloon": 0x1F388,
    "moon": 0x1F319,
    "car": 0x1F697,
}
# Never seen by the base model: subjects for trying LoRA training.
HELD_OUT = {"unicorn": 0x1F984, "robot": 0x1F916, "snowman": 0x26C4}
BACKGROUNDS = {
    "white": (250, 250, 250),
    "blue": (130, 185, 250),
    "green": (150, 220, 150),
    "yellow": (255, 235, 130),
    "pink": (255, 170, 190),
    "purple": (190, 150, 240),
}

JUDGED_SCALES = (0.60, 0.65, 0.70, 0.75, 0.80, 0.86)
JUDGED_SIDE = 32  # G
BORDER = 6  # pixels at the edge of a picture that count as background


def caption(subject: str, background: str) -> str:
    """Return the caption of a picture, exactly as the pocket model learned it."""
    return f"a {subject} on a {background} background"


def draw(
    subject: str,
    background: str | tuple[int, int, int],
    scale: float = 0.75,
    offset: tuple[int, int] = (0, 0),
    *,
    flip: bool = False,
) -> Image.Image:
    """Return a 128x128 RGB picture of a subject on a flat background.

    background is a name of BACKGROUNDS or an RGB triple; scale is the glyph's longer side as a part of
    the picture's; offset moves it from the centre, in pixels to the right and down.
    """
    colour = BACKGROUNDS[background] if isinstance(background, str) else background
    picture = Image.new("RGB", (SIZE, SIZE), colour)
    layer = place(glyph(subject), scale, offset, flip=flip)
    picture.paste(layer, (0, 0), layer)
    return picture


def place(cell: Image.Image, scale: float, offset: tuple[int, int] = (0, 0), *, flip: bool = False) -> Image.Image:
    """Return an RGBA glyph scaled and moved on a transparent 128x128 canvas."""
    longest = scale * SIZE / max(cell.size)
    size = (max(1, round(cell.width * longest)), max(1, round(cell.height * longest)))
    cell = cell.resize(size, Image.Resampling.LANCZOS)
    if flip:
        cell = cell.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    canvas = Image.new("RGBA", (SIZE, SIZE))
    canvas.paste(cell, ((SIZE - size[0]) // 2 + offset[0], (SIZE - size[1]) // 2 + offset[1]))
    return canvas


@cache
def glyph(subject: str) -> Image.Image:
    """Return the glyph of a subject, cut to its outline, as RGBA."""
    names = [*SUBJECTS, *HELD_OUT]
    if subject not in names:
        raise ValueError(f"the sheet has no glyph {subject!r}, only {', '.join(names)}")
    row, column = divmod(names.index(subject), COLUMNS)
    with Image.open(SHEET) as sheet:
        cell = sheet.convert("RGBA").crop((column * CELL, row * CELL, (column + 1) * CELL, (row + 1) * CELL))
    return cell.crop(cell.getbbox())


def save_sheet(cells: Sequence[Image.Image], path: Path = SHEET) -> None:
    """Write RGBA glyphs, given in the order of SUBJECTS and then HELD_OUT, as the sheet."""
    rows = -(-len(cells) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * CELL, rows * CELL))
    for index, cell in enumerate(cells):
        row, column = divmod(index, COLUMNS)
        factor = CELL / max(cell.size)
        small = cell.resize((round(cell.width * factor), round(cell.height * factor)), Image.Resampling.LANCZOS)
        corner = (column * CELL + (CELL - small.width) // 2, row * CELL + (CELL - small.height) // 2)
        sheet.paste(small, corner)
    sheet.save(path, optimize=True)


def background_colour(picture: Image.Image | np.ndarray) -> np.ndarray:
    """Return the flat background of a picture as RGB in 0..1 (3,): the median of its border."""
    pixels = _pixels(picture, SIZE)
    inner = np.ones((SIZE, SIZE), dtype=bool)
    inner[BORDER:-BORDER, BORDER:-BORDER] = False
    return np.median(pixels[inner], axis=0)


def nearest_background(picture: Image.Image | np.ndarray) -> tuple[str, float]:
    """Return the name of BACKGROUNDS nearest to a picture's border, and its distance in RGB (0..1 per channel)."""
    colours = np.array(list(BACKGROUNDS.values()), dtype=np.float32) / 255  # (colours, 3)
    distances = np.linalg.norm(colours - background_colour(picture), axis=1)
    best = int(distances.argmin())
    return list(BACKGROUNDS)[best], float(distances[best])


def nearest_glyph(picture: Image.Image | np.ndarray) -> tuple[str, float]:
    """Return the subject a picture shows, and the mean squared difference (0..1 per channel) to it.

    Every glyph, also mirrored, is laid on the picture's own background in each of JUDGED_SCALES and at every
    offset of the 32x32 grid; the least difference wins. With Q the picture less its background b,
    and a template P of premultiplied colours p and coverage c, the difference |Q - (p - c b)|^2 at all offsets
    is |Q|^2 + |p - c b|^2 - 2 corr(Q, p - c b), and the correlation is one product of spectra.
    """
    names, spectra, coverage_spectra, moments = _templates()
    background = background_colour(picture)
    rest = _pixels(picture, JUDGED_SIDE) - background  # (G, G, 3)
    rest_spectra = np.fft.rfft2(rest.transpose(2, 0, 1))  # (3, G, G/2+1)
    product = np.einsum("nchw,chw->nhw", spectra, rest_spectra)
    product -= coverage_spectra * np.einsum("chw,c->hw", rest_spectra, background)
    correlation = np.fft.irfft2(product, s=(JUDGED_SIDE, JUDGED_SIDE)).max(axis=(1, 2))  # (N,)
    energy = moments[:, 0] - 2 * moments[:, 1:4] @ background + moments[:, 4] * (background @ background)
    distances = (np.square(rest).sum() + energy - 2 * correlation) / (3 * JUDGED_SIDE**2)
    best = int(distances.argmin())
    return names[best], max(0.0, float(distances[best]))


def score(pictures: Sequence[Image.Image | np.ndarray], names: Sequence[str]) -> float:
    """Return the share of pictures whose nearest glyph is the one named at the same place of names."""
    if len(pictures) != len(names) or not names:
        raise ValueError(f"score needs one name for each picture, got {len(pictures)} pictures and {len(names)} names")
    return sum(nearest_glyph(picture)[0] == name for picture, name in zip(pictures, names, strict=True)) / len(names)


@cache
def _templates() -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Return names (N), conjugate spectra of colours (N, 3, G, G/2+1) and coverage (N, G, G/2+1), moments (N, 5).

    The moments are the sums of p.p, of p c for each channel, and of c c.
    """
    names, colours, coverages = [], [], []
    for name in (*SUBJECTS, *HELD_OUT):
        for scale in JUDGED_SCALES:
            for flip in (False, True):
                layer = np.asarray(place(glyph(name), scale, flip=flip), dtype=np.float32) / 255
                layer = np.concatenate([layer[..., :3] * layer[..., 3:], layer[..., 3:]], axis=-1)
                small = _shrink(layer, JUDGED_SIDE)
                names.append(name)
                colours.append(small[..., :3].transpose(2, 0, 1))
                coverages.append(small[..., 3])
    colour, coverage = np.stack(colours), np.stack(coverages)
    moments = np.concatenate(
        [
            np.square(colour).sum(axis=(1, 2, 3))[:, None],
            np.einsum("nchw,nhw->nc", colour, coverage),
            np.square(coverage).sum(axis=(1, 2))[:, None],
        ],
        axis=1,
    )
    return names, np.fft.rfft2(colour).conj(), np.fft.rfft2(coverage).conj(), moments


def _pixels(picture: Image.Image | np.ndarray, side: int) -> np.ndarray:
    """Return a picture, or an array (H, W, 3) of bytes or of floats in 0..1, as (side, side, 3) floats in 0..1."""
    if isinstance(picture, np.ndarray):
        as_bytes = picture if picture.dtype == np.uint8 else (picture.clip(0, 1) * 255).round().astype(np.uint8)
        picture = Image.fromarray(as_bytes)
    picture = picture.convert("RGB")
    if picture.size != (SIZE, SIZE):
        picture = picture.resize((SIZE, SIZE), Image.Resampling.BOX)
    return _shrink(np.asarray(picture, dtype=np.float32) / 255, side)


def _shrink(pixels: np.ndarray, side: int) -> np.ndarray:
    """Return (H, W, C) averaged over blocks to (side, side, C); H and W are multiples of side."""
    block = pixels.shape[0] // side
    return pixels.reshape(side, block, side, block, -1).mean(axis=(1, 3))
