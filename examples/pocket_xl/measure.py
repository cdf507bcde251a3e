"""Measure how far the pocket XL model's pictures follow the size conditioning.

    python measure.py                      the model in this folder
    python measure.py --model FOLDER       another one

Every subject is drawn from the same noise with several original sizes and cuts. Whether subjects and backgrounds are
right is measured by ../pocket_model/measure.py --model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

import numpy as np
from PIL import Image

from examples.pocket_model.build import JITTER
from examples.pocket_model.glyphs import BACKGROUNDS, SIZE, SUBJECTS, background_colour
from examples.pocket_model.measure import Drawing, compact, draw_all, load_pipeline

SMALL = (16, 12, 8)  # pixels of a side of blurred originals
BLURRED = 0.7  # a picture counts as blurred if its detail is below this part of the plain picture's
CUT = 24  # pixels
TOLERANCE = 2 * JITTER  # pixels, by which two training pictures of a caption may differ
CUTS = ((0, CUT), (CUT, 0), (CUT, CUT))  # top, left
SHOWN = ("fox", "car", "sunflower", "donut")


def detail(picture: Image.Image) -> float:
    """Return the mean squared difference (0..1 per channel) of neighbouring pixels, large where edges are sharp."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float64) / 255
    return float(np.square(np.diff(pixels, axis=0)).mean() + np.square(np.diff(pixels, axis=1)).mean())


def centre(picture: Image.Image) -> np.ndarray:
    """Return row and column (2,) of the mean of the pixels that differ from the background."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float64) / 255
    differs = np.abs(pixels - background_colour(picture)).max(axis=-1) > 0.15
    return np.argwhere(differs).mean(axis=0)


def shares_blurred(plain: Sequence[Drawing], small: Sequence[Drawing]) -> tuple[float, float]:
    """Return the mean of the part of the detail that is left, and the share of pictures that are blurred."""
    left = np.array([detail(new.picture) / detail(old.picture) for old, new in zip(plain, small, strict=True)])
    return float(left.mean()), float((left < BLURRED).mean())


def shares_moved(
    plain: Sequence[Drawing], cut: Sequence[Drawing], corner: tuple[int, int]
) -> tuple[list[float], float]:
    """Return the mean move in rows and columns, and the share of pictures that moved as the corner says."""
    moves = np.array([centre(new.picture) - centre(old.picture) for old, new in zip(plain, cut, strict=True)])
    right = (np.abs(moves + corner) <= TOLERANCE).all(axis=1)
    return moves.mean(axis=0).tolist(), float(right.mean())


def share_right(drawings: Sequence[Drawing]) -> float:
    return sum(drawing.seen_subject == drawing.subject for drawing in drawings) / len(drawings)


def main(argv: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", type=Path, default=FOLDER, help="Diffusers folder (default: here)")
    options.add_argument("--count", type=int, default=1, help="pictures of each subject")
    options.add_argument("--steps", type=int, default=30)
    options.add_argument("--guidance", type=float, default=3.0)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--sheet", type=Path, help="where a sheet of some subjects is written (default: nowhere)")
    args = options.parse_args(argv)

    names = [*BACKGROUNDS]
    requests = [
        (subject, names[(row + turn) % len(names)])
        for turn in range(args.count)
        for row, subject in enumerate(SUBJECTS)
    ]
    pipeline = load_pipeline(args.model)

    def drawn(**sizes: tuple[int, int]) -> list[Drawing]:
        numbers = {"steps": args.steps, "guidance": args.guidance, "seed": args.seed}
        return draw_all(pipeline, requests, **numbers, sizes=sizes)

    plain = drawn()
    rows = [plain]
    print(f"{len(requests)} pictures each; plain: {share_right(plain):.3f} right")
    for side in SMALL:
        rows.append(drawn(original_size=(side, side)))
        left, blurred = shares_blurred(plain, rows[-1])
        print(f"original {side:3}: detail {left:.2f}, blurred {blurred:.3f}, right {share_right(rows[-1]):.3f}")
    for corner in CUTS:
        rows.append(drawn(crops_coords_top_left=corner))
        (down, across), moved = shares_moved(plain, rows[-1], corner)
        asked = f"as asked {moved:.3f}, right {share_right(rows[-1]):.3f}"
        print(f"cut at {corner}: moved by ({down:.1f}, {across:.1f}), {asked}")
    if args.sheet:
        sheet = Image.new("RGB", (len(rows) * SIZE, len(SHOWN) * SIZE))
        for column, drawings in enumerate(rows):
            for row, subject in enumerate(SHOWN):
                picture = next(drawing.picture for drawing in drawings if drawing.subject == subject)
                sheet.paste(picture, (column * SIZE, row * SIZE))
        compact(sheet).save(args.sheet, optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
