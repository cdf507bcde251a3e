"""Make the training pictures of a style that the pocket model has never seen: cyanotypes, blue prints on paper.

python make_images.py                  writes images/01.png to images/24.png with their captions
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
from PIL import Image

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

from examples.pocket_model.glyphs import BACKGROUNDS, SUBJECTS, caption, draw

UNSEEN = ("fox", "mushroom")  # left to draw in the style after the training
TONES = ((8, 30, 92), (52, 116, 196), (242, 243, 230))  # RGB of shadows, of middle tones and of the paper
SEED = 3
MARGIN = 8  # pixels of paper at each side of the print


def cyanotype(picture: Image.Image) -> Image.Image:
    """Return an RGB picture as a print: its lightness as tones of blue, on a sheet with a margin."""
    light = np.clip((np.asarray(picture.convert("L"), np.float32) / 255 - 0.1) / 0.85, 0, 1) ** 1.5  # deep shadows
    channels = [np.interp(light, (0, 0.5, 1), tones) for tones in zip(*TONES, strict=True)]
    printed = Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))
    inner = (picture.width - 2 * MARGIN, picture.height - 2 * MARGIN)
    sheet = Image.new("RGB", picture.size, TONES[-1])
    sheet.paste(printed.resize(inner, Image.Resampling.LANCZOS), (MARGIN, MARGIN))
    return sheet


def main() -> int:
    """Print each subject once, on each background four times, in other sizes and places."""
    numbers = random.Random(SEED)
    folder = FOLDER / "images"
    folder.mkdir(exist_ok=True)
    backgrounds = [*BACKGROUNDS] * 4
    subjects = [subject for subject in SUBJECTS if subject not in UNSEEN]
    for number, (subject, background) in enumerate(zip(subjects, backgrounds, strict=True), start=1):
        offset = (numbers.randint(-6, 6), numbers.randint(-6, 6))
        red, green, blue = (
            255 - (255 - value) // 3 for value in BACKGROUNDS[background]
        )  # pale, so that subjects stand out
        picture = draw(subject, (red, green, blue), numbers.uniform(0.65, 0.85), offset)
        cyanotype(picture).save(folder / f"{number:02}.png", optimize=True)
        (folder / f"{number:02}.txt").write_text(caption(subject, background) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
