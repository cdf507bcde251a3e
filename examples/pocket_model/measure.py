"""Draw every subject with a pocket model and let the nearest glyph judge the pictures.

    python measure.py                      the model in this folder
    python measure.py --model FOLDER       ../pocket_xl, or another one, say with a merged LoRA

Prints a line for each subject and one for all of them, and writes a labelled contact sheet.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

import torch
from PIL import Image, ImageDraw

from examples.pocket_model.glyphs import BACKGROUNDS, SIZE, SUBJECTS, caption, nearest_background, nearest_glyph

BATCH = 13  # pictures drawn at once
LABEL = 14  # pixels of height under a picture
SHEET_COLORS = 192


@dataclass(frozen=True)
class Drawing:
    """A picture with what was asked for and what the judge saw."""

    subject: str
    background: str
    picture: Image.Image
    seen_subject: str
    distance: float
    seen_background: str


def load_pipeline(model: Path) -> Any:
    """Return the pipeline that the folder names, in fp32 with the sampler that the figures are for."""
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    pipeline = DiffusionPipeline.from_pretrained(str(model), dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_all(
    pipeline: Callable[..., Any],
    requests: Sequence[tuple[str, str]],
    *,
    steps: int,
    guidance: float,
    seed: int,
    sizes: dict[str, tuple[int, int]] | None = None,
) -> list[Drawing]:
    """Return a drawing for each (subject, background); number n is drawn from seed + n, whatever the batch.

    sizes are original_size and crops_coords_top_left of an SDXL pipeline, which draws plain pictures without them.
    """
    drawings = []
    for start in range(0, len(requests), BATCH):
        part = requests[start : start + BATCH]
        pictures = pipeline(
            [caption(*request) for request in part],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed + start + index) for index in range(len(part))],
            **(sizes or {}),
        ).images
        drawings += [judge(*request, picture) for request, picture in zip(part, pictures, strict=True)]
    return drawings


def judge(subject: str, background: str, picture: Image.Image) -> Drawing:
    return Drawing(subject, background, picture, *nearest_glyph(picture), nearest_background(picture)[0])


def report(drawings: Sequence[Drawing]) -> None:
    """Print how often subject and background were right, for each subject and in all."""
    print(f"{'subject':12} {'right':>6} {'ground':>6} {'distance':>8}  taken for")
    for subject in dict.fromkeys(drawing.subject for drawing in drawings):
        own = [drawing for drawing in drawings if drawing.subject == subject]
        others = sorted({drawing.seen_subject for drawing in own} - {subject})
        print(f"{subject:12} {shares(own)}  {', '.join(others)}")
    print(f"{'all':12} {shares(drawings)}")


def shares(drawings: Sequence[Drawing]) -> str:
    """Return the shares of right subjects and of right backgrounds, and the mean distance, as columns."""
    count = len(drawings)
    subject = sum(drawing.seen_subject == drawing.subject for drawing in drawings) / count
    background = sum(drawing.seen_background == drawing.background for drawing in drawings) / count
    return f"{subject:6.3f} {background:6.3f} {sum(drawing.distance for drawing in drawings) / count:8.4f}"


def contact_sheet(drawings: Sequence[Drawing], columns: int) -> Image.Image:
    """Return the drawings as cells of 128 pixels with their captions; a wrong subject's label is red."""
    rows = -(-len(drawings) // columns)
    sheet = Image.new("RGB", (columns * SIZE, rows * (SIZE + LABEL)), "white")
    pen = ImageDraw.Draw(sheet)
    for index, drawing in enumerate(drawings):
        row, column = divmod(index, columns)
        x, y = column * SIZE, row * (SIZE + LABEL)
        sheet.paste(drawing.picture, (x, y))
        colour = "black" if drawing.seen_subject == drawing.subject else "red"
        pen.text((x + 3, y + SIZE + 1), f"{drawing.subject}, {drawing.background}", fill=colour)
    return compact(sheet)


def compact(sheet: Image.Image) -> Image.Image:
    """Return a picture with few colours, a small file."""
    return sheet.quantize(SHEET_COLORS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)


def main(argv: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", type=Path, default=FOLDER, help="Diffusers folder (default: here)")
    options.add_argument("--count", type=int, default=len(BACKGROUNDS), help="pictures of each subject")
    options.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=[*SUBJECTS])
    options.add_argument("--steps", type=int, default=30)
    options.add_argument("--guidance", type=float, default=3.0)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--sheet", type=Path, help="where the contact sheet is written (default: nowhere)")
    options.add_argument("--shown", type=int, default=1, help="pictures of each subject on the contact sheet")
    args = options.parse_args(argv)

    names = [*BACKGROUNDS]
    requests = [
        (subject, names[(row + turn) % len(names)])
        for turn in range(args.count)
        for row, subject in enumerate(args.subjects)
    ]
    start_seconds = time.time()
    pipeline = load_pipeline(args.model)
    drawings = draw_all(pipeline, requests, steps=args.steps, guidance=args.guidance, seed=args.seed)
    print(f"{len(drawings)} pictures in {time.time() - start_seconds:.0f} s")
    report(sorted(drawings, key=lambda drawing: args.subjects.index(drawing.subject)))
    if args.sheet:
        shown = drawings[: args.shown * len(args.subjects)]
        contact_sheet(shown, columns=min(13, len(args.subjects))).save(args.sheet, optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
