"""Make the twelve training pictures of a unicorn, a subject the pocket model has never seen.

python make_images.py                  writes images/01.png to images/12.png with their captions
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

from examples.pocket_model.glyphs import BACKGROUNDS, caption, draw

SUBJECT, SEED = "unicorn", 7


def main() -> int:
    """Draw each background twice, in other sizes and places, a quarter of the pictures mirrored."""
    numbers = random.Random(SEED)
    folder = FOLDER / "images"
    folder.mkdir(exist_ok=True)
    for number, background in enumerate([*BACKGROUNDS] * 2, start=1):
        offset = (numbers.randint(-6, 6), numbers.randint(-6, 6))
        picture = draw(SUBJECT, background, numbers.uniform(0.65, 0.85), offset, flip=number % 4 == 0)
        picture.save(folder / f"{number:02}.png", optimize=True)
        (folder / f"{number:02}.txt").write_text(caption(SUBJECT, background) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
