"""Time and memory of a training with many pictures: what grows with their number, and how fast.

For each number of pictures a folder of small JPEGs with captions is made, and `train_network.py` trains a tiny model on
it with latents cached on disk: first without a cache (cold), then, the same command twice more, with one (warm; the
first of the two remembers what was written a moment ago, the second shows what every later run does). Seconds to the
first step and of a step come from the metrics of the run, peak memory is the operating system's figure for the process.
Everything is deleted at the end.

    python benchmarks/scale.py                              # 1,000 and 10,000 pictures, a quarter of an hour
    python benchmarks/scale.py --largest                    # 100,000 as well: over an hour, 2 GB of disk
    python benchmarks/scale.py --tree ../other --numbers 100 1000   # of another checkout
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
SIDE = 64  # pixels
SHAPES = ((64, 64), (96, 64), (64, 96))  # of pictures, for a few buckets
NUMBERS, LARGEST = (1_000, 10_000), 100_000
MOST_BYTES = 1024  # of memory that a picture may add to a warm run


class Run(NamedTuple):
    """What a run took: seconds to its first step and of a step, peak memory in bytes."""

    first: float
    step: float
    peak: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers", type=int, nargs="+", default=NUMBERS, help="numbers of pictures")
    parser.add_argument("--largest", action="store_true", help=f"{LARGEST:,} pictures as well")
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout whose train_network.py runs")
    parser.add_argument("--model", type=Path, help="a base model; without one a tiny one is made")
    parser.add_argument("--repeats", type=int, default=1, help="repeats of each picture in an epoch")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the pictures are made; a temporary folder without it")
    parser.add_argument("--options", nargs="*", default=[], help="further options of the runs, without their dashes")
    args = parser.parse_args()
    results: dict[int, dict[str, Run]] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        model = args.model or write_model(Path(folder))
        for number in sorted({*args.numbers, *([LARGEST] if args.largest else [])}):
            results[number] = measure(number, model, Path(folder) / str(number), args)
            for name, run in results[number].items():
                print(
                    f"{number:9,} pictures  {name:6} {run.first:8.1f} s to the first step  {run.step * 1000:7.1f} ms a "
                    f"step  {run.peak / 2**20:7.0f} MiB",
                    flush=True,
                )
    for fewer, more in itertools.pairwise(results):
        describe_growth(fewer, more, results[fewer], results[more])


def describe_growth(fewer: int, more: int, before: dict[str, Run], after: dict[str, Run]) -> None:
    """Print what further pictures cost: each of them, and in proportion to their number."""
    print(f"from {fewer:,} to {more:,} pictures, {more / fewer:g} times as many:")
    for name, run in after.items():
        former = before[name]
        added = more - fewer
        print(
            f"  {name:6} start {run.first / former.first:5.2f} times, {(run.first - former.first) / added * 1000:7.3f} "
            f"ms a picture; step {run.step / former.step:4.2f} times; memory {(run.peak - former.peak) / added:7.0f} "
            "bytes a picture"
        )
    growth = (after["warm"].peak - before["warm"].peak) / (more - fewer)
    print(f"  memory of the warm run: {'within' if growth <= MOST_BYTES else 'ABOVE'} {MOST_BYTES} bytes a picture")


def measure(number: int, model: Path, folder: Path, args: argparse.Namespace) -> dict[str, Run]:
    """Return the runs with a number of pictures; the folder is deleted afterwards."""
    write_pictures(folder / "data" / f"{args.repeats}_picture", number)
    time.sleep(3)  # of files that have just been changed nothing is remembered
    try:
        found = {name: train(model, folder, args) for name in ("cold", "second", "warm")}
    finally:
        shutil.rmtree(folder)
    return found


def train(model: Path, folder: Path, args: argparse.Namespace) -> Run:
    """Train on the pictures in a folder, and return what it took."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = [
        sys.executable,
        str(args.tree / "train_network.py"),
        f"--pretrained_model_name_or_path={model}",
        f"--train_data_dir={folder / 'data'}",
        f"--output_dir={out}",
        "--output_name=x",
        "--caption_extension=.txt",
        f"--resolution={SIDE}",
        "--enable_bucket",
        "--min_bucket_reso=64",
        "--max_bucket_reso=128",
        f"--train_batch_size={args.batch_size}",
        "--network_module=networks.lora",
        "--network_dim=4",
        "--learning_rate=1e-4",
        "--cache_latents",
        "--cache_latents_to_disk",
        "--vae_batch_size=16",
        f"--max_train_steps={args.steps}",
        "--seed=1",
        *(f"--{option}" for option in args.options),
    ]
    log = folder / "log.txt"
    with log.open("wb") as output:
        start = time.time()
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(log.read_text(encoding="utf-8", errors="replace")[-2000:])
    times = step_times(out / "x-metrics.jsonl")
    spans = [later - earlier for earlier, later in itertools.pairwise(times)]
    return Run(times[0] - start, statistics.median(spans), usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def step_times(metrics: Path) -> list[float]:
    """Return when each step was written."""
    first: dict[int, float] = {}
    for line in map(json.loads, metrics.read_text(encoding="utf-8").splitlines()):
        first.setdefault(line["step"], line["time"])
    return [first[step] for step in sorted(first) if step]


def write_model(folder: Path) -> Path:
    """Write a tiny model as a Diffusers folder."""
    import tiny

    return tiny.write_folder(tiny.make_models("sd1"), "sd1", folder / "model")


def write_pictures(folder: Path, number: int) -> None:
    """Write small JPEGs, no two the same, with captions."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    rng = np.random.default_rng(number)
    for index in range(number):
        small = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
        picture = small.resize(SHAPES[index % len(SHAPES)], Image.Resampling.BILINEAR)
        picture.save(folder / f"picture_{index:06d}.jpg", quality=80, comment=str(index))
        (folder / f"picture_{index:06d}.txt").write_text(f"a picture, number {index}, small", encoding="utf-8")


if __name__ == "__main__":
    main()
