"""Throughput and memory of tools/resize_images_to_resolution.py beside a plain single-threaded OpenCV loop.

python benchmarks/resize_images.py [--pictures FOLDER]

Without a folder, noisy pictures of the size of photographs are made. Both write the same files: the picture as it is
and a JPEG of quality 100 in each size. Each run is a process of its own, by turns; the times are of the whole process.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "resize_images_to_resolution.py"
SIZES = "512x512,384x384,256x256,128x128"
LOOP = """
import math, pathlib, shutil, sys
import cv2
cv2.setNumThreads(1)
source, destination = map(pathlib.Path, sys.argv[1:3])
destination.mkdir()
for path in sorted(source.iterdir()):
    shutil.copyfile(path, destination / path.name)
    picture = cv2.imread(str(path))
    height, width = picture.shape[:2]
    for name in sys.argv[3].split(","):
        w, h = map(int, name.split("x"))
        scale = min(1, math.sqrt(w * h / (width * height)))
        small = cv2.resize(picture, (int(width * scale), int(height * scale)), interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(destination / f"{path.stem}+{name}.jpg"), small, [cv2.IMWRITE_JPEG_QUALITY, 100])
"""
MEASURED = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def main() -> None:
    """Run the script with the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, help="folder of pictures; unset: made for the run")
    parser.add_argument("--count", type=int, default=40, help="how many pictures are made")
    parser.add_argument("--size", type=int, nargs=2, default=(3600, 2400), help="width and height of those made")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        make_pictures(args.make, args.count, tuple(args.size))
        return
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        source = args.pictures or base / "pictures"
        if not args.pictures:  # in a process of its own, for a child begins with its parent's memory in its account
            subprocess.run([sys.executable, *sys.argv, "--make", source], check=True)
        number = sum(1 for path in source.iterdir() if path.is_file())
        (base / "loop.py").write_text(LOOP, encoding="utf-8")
        jobs = {
            "plain OpenCV loop": [base / "loop.py", source, base / "out", SIZES],
            "resize_images_to_resolution": [TOOL, source, base / "out", "--max_resolution", SIZES],
        }
        found: dict[str, list[tuple[float, int]]] = {name: [] for name in jobs}
        for _ in range(args.rounds):
            for name, argv in jobs.items():
                found[name].append(run(argv))
                shutil.rmtree(base / "out")
    times = {name: statistics.median(seconds for seconds, _ in runs) for name, runs in found.items()}
    print(f"{number} pictures, sizes {SIZES}, {len(os.sched_getaffinity(0))} cores; median of {args.rounds} rounds")
    for name, seconds in times.items():
        speed, ratio = number / seconds, times["plain OpenCV loop"] / seconds
        peak = max(size for _, size in found[name])
        print(f"{name:30} {seconds:6.2f} s  {speed:6.1f} pictures/s  {ratio:5.2f} x  peak {peak / 1e6:.0f} MB")


def run(argv: list[object]) -> tuple[float, int]:
    """Return (seconds, peak bytes) of a script in a process of its own."""
    start = time.perf_counter()
    command = [sys.executable, "-c", MEASURED, *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - start, int(done.stdout.split()[-1])


def make_pictures(folder: Path, count: int, size: tuple[int, int]) -> Path:
    """Write JPEG pictures of a size (width, height) with smooth colours and the noise of a camera."""
    import cv2

    folder.mkdir()
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 5, (size[1], size[0], 3)).astype(np.float32)
    for index in range(count):
        colours = rng.uniform(20, 235, (24, 36, 3)).astype(np.float32)
        picture = cv2.resize(colours, size, interpolation=cv2.INTER_CUBIC) + np.roll(noise, 97 * index, axis=0)
        pixels = np.clip(picture, 0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / f"{index:03d}.jpg"), pixels, [cv2.IMWRITE_JPEG_QUALITY, 92])
    return folder


if __name__ == "__main__":
    main()
