"""Time what pictures cost a training: caching latents, loading in every step, the wait for the first step, memory.

Each variant is a process of its own that trains from the command line; the variants take turns, so that each
round compares like with like. Seconds a picture are the wait for the first step with all pictures less that
with one, over their number; steps a second come from the times in the metrics file; peak memory is the
operating system's figure for the process. In the timed variants the forward passes of the models and the
backward pass are timed inside the same steps: what is left of a step is not model arithmetic.

    python benchmarks/data_path.py                                    # pocket model, 60 photographs, 128 px
    python benchmarks/data_path.py --model some/model.safetensors --pictures some/folder --resolution 512
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
SIZES = ((1600, 1200), (1200, 1600), (1600, 1067))  # as cameras have them
TIMED = "--timed_run"  # how this script calls itself: a file for the seconds, then the options of the run


class Variant(NamedTuple):
    """One way to run; a fresh one begins without cache files, the next one on disk finds them."""

    name: str
    cache: str | None = None  # memory or disk
    workers: bool = False
    fresh: bool = False
    single: bool = False  # with one picture
    timed: bool = False


ONE, MEMORY, FIRST, VALID, PLAIN = "one picture", "in memory", "on disk, first time", "on disk, valid", "not cached"
VARIANTS = (
    Variant(ONE, "memory", single=True),
    Variant(MEMORY, "memory"),
    Variant(FIRST, "disk", fresh=True),
    Variant(VALID, "disk"),
    Variant(PLAIN),
    Variant(f"{PLAIN}, workers", workers=True),
    Variant(f"{MEMORY}, timed", "memory", timed=True),
    Variant(f"{PLAIN}, timed", timed=True),
)


class Result(NamedTuple):
    """What a run showed: seconds to its first step and of a step, GiB, CPU seconds, and seconds by part if timed."""

    first: float
    step: float
    peak: float
    cpu: float
    parts: dict[str, float]


def main() -> None:
    if sys.argv[1:2] == [TIMED]:
        timed_run(Path(sys.argv[2]), sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "pocket_model")
    parser.add_argument("--pictures", type=Path, help="folder of pictures; without it photographs are made up")
    parser.add_argument("--count", type=int, default=60, help="how many pictures")
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="OMP_NUM_THREADS of the runs")
    parser.add_argument("--options", nargs="*", default=[], help="further options of the runs, without their dashes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        originals = args.pictures or write_photographs(Path(folder) / "photographs", args.count)
        pictures = sorted(path for path in originals.iterdir() if path.suffix.lower() in SUFFIXES)[: args.count]
        results: dict[str, list[Result]] = {variant.name: [] for variant in VARIANTS}
        for number in range(args.rounds):
            for variant in VARIANTS:
                print(f"round {number + 1}: {variant.name}", file=sys.stderr)
                results[variant.name].append(run(variant, pictures, Path(folder), args))
    report(results, len(pictures), args)


# ---- one run ------------------------------------------------------------------------------------------------


def run(variant: Variant, pictures: list[Path], folder: Path, args: argparse.Namespace) -> Result:
    data, out = folder / (variant.cache or "none"), folder / "out"
    if variant.fresh or variant.single or not data.exists():
        shutil.rmtree(data, ignore_errors=True)
        copy(pictures[:1] if variant.single else pictures, data / "1_photograph")
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, str(ROOT / "train_network.py")]
    if variant.timed:
        command = [sys.executable, str(Path(__file__).resolve()), TIMED, str(folder / "parts.json")]
    result = measure([*command, *run_options(variant, data, out, args)], out / "x-metrics.jsonl", args)
    if variant.single:
        shutil.rmtree(data)
    if variant.timed:
        parts = json.loads((folder / "parts.json").read_text(encoding="utf-8"))
        result = result._replace(parts={name: seconds / (args.steps - 1) for name, seconds in parts.items()})
    return result


def copy(pictures: list[Path], folder: Path) -> None:
    folder.mkdir(parents=True)
    for path in pictures:
        shutil.copy2(path, folder)  # caches are written beside pictures: beside these, not the user's


def run_options(variant: Variant, data: Path, out: Path, args: argparse.Namespace) -> list[str]:
    caches = {"memory": ["--cache_latents"], "disk": ["--cache_latents_to_disk"], None: []}
    return [
        f"--pretrained_model_name_or_path={args.model}",
        f"--train_data_dir={data}",
        f"--output_dir={out}",
        "--output_name=x",
        f"--resolution={args.resolution}",
        "--enable_bucket",
        "--min_bucket_reso=64",
        f"--train_batch_size={args.batch_size}",
        "--network_module=networks.lora",
        "--network_dim=8",
        "--learning_rate=1e-4",
        f"--max_train_steps={args.steps}",
        f"--max_data_loader_n_workers={args.workers if variant.workers else 0}",
        "--seed=1",
        *caches[variant.cache],
        *(f"--{option}" for option in args.options),
    ]


def measure(command: list[str], metrics: Path, args: argparse.Namespace) -> Result:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    if args.threads:
        environment["OMP_NUM_THREADS"] = str(args.threads)
    with tempfile.TemporaryFile() as log:
        start = time.time()
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            sys.exit(log.read().decode(errors="replace")[-2000:])
    times = list(step_times(metrics))
    spans = [later - earlier for earlier, later in itertools.pairwise(times)]
    peak = usage.ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    return Result(times[0] - start, statistics.mean(spans), peak, usage.ru_utime + usage.ru_stime, {})


def step_times(metrics: Path) -> Iterator[float]:
    """Yield when each step ended."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    first: dict[int, float] = {}
    for line in lines:
        first.setdefault(line["step"], line["time"])
    yield from (first[step] for step in sorted(first) if step)


# ---- a run that times its model -----------------------------------------------------------------------------


def timed_run(file: Path, argv: list[str]) -> None:
    """Train with clocks around forward and backward; write the seconds of each in all steps after the first."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextModel

    import train_network

    seconds = dict.fromkeys(("text encoder", "U-Net", "VAE", "backward"), 0.0)
    after_first: dict[str, float] = {}

    def clocked(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = now()
            result = call(*args, **kwargs)
            seconds[name] += now() - start
            if name == "backward" and not after_first:
                after_first.update(seconds)
            return result

        return timed

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    for name, kind, method in (
        ("text encoder", CLIPTextModel, "forward"),
        ("U-Net", UNet2DConditionModel, "forward"),
        ("VAE", AutoencoderKL, "encode"),
        ("backward", torch.Tensor, "backward"),
    ):
        setattr(kind, method, clocked(name, getattr(kind, method)))
    train_network.main(argv)
    file.write_text(json.dumps({name: seconds[name] - after_first[name] for name in seconds}), encoding="utf-8")


# ---- the report ---------------------------------------------------------------------------------------------


def report(results: dict[str, list[Result]], count: int, args: argparse.Namespace) -> None:
    print(
        f"{args.model.name}, {count} pictures at {args.resolution} px, batch {args.batch_size}, {args.steps} steps, "
        f"{args.rounds} rounds, {os.cpu_count()} CPUs, threads {args.threads or 'as they are'}; medians"
    )
    print(f"{'':22}{'first step':>12}{'steps/s':>10}{'to memory':>11}{'GiB':>7}{'CPU s':>8}")
    for name, runs in results.items():
        ratio = median(in_memory.step / run.step for in_memory, run in zip(results[MEMORY], runs, strict=True))
        print(
            f"{name:22}{median(run.first for run in runs):10.2f} s{1 / median(run.step for run in runs):10.2f}"
            f"{ratio:10.3f}x{median(run.peak for run in runs):7.2f}{median(run.cpu for run in runs):8.1f}"
        )
    if count > 1:
        # The shortest of the rounds: whatever else the machine does makes a start only longer.
        shortest = {name: min(run.first for run in runs) for name, runs in results.items()}
        waits = {name: shortest[name] - shortest[ONE] for name in (MEMORY, FIRST, VALID, PLAIN)}
        print(f"until the first step, a picture (shortest start, with one picture: {shortest[ONE]:.2f} s):")
        for name, wait in waits.items():
            print(
                f"  {name:20}{wait / (count - 1) * 1000:8.1f} ms   {wait / waits[FIRST]:6.3f} of the first time on disk"
                f"{cpu_a_picture(name, results, count)}"
            )
    for name in (MEMORY, PLAIN):
        describe_step(name, results[f"{name}, timed"])


def cpu_a_picture(name: str, results: dict[str, list[Result]], count: int) -> str:
    """Return the CPU time of caching a picture, which other work on the machine disturbs less."""
    if name == PLAIN:  # its steps differ from those with one cached picture
        return ""
    values = [(run.cpu - one.cpu) / (count - 1) for one, run in zip(results[ONE], results[name], strict=True)]
    return f"   {median(values) * 1000:6.1f} ms CPU"


def describe_step(name: str, runs: list[Result]) -> None:
    shares = [1 - sum(run.parts.values()) / run.step for run in runs]
    parts = {part: median(run.parts[part] for run in runs) for part in runs[0].parts}
    listed = ", ".join(f"{part} {seconds * 1000:.1f}" for part, seconds in parts.items() if seconds)
    print(
        f"a step, {name}: {median(run.step for run in runs) * 1000:.1f} ms, of it {listed} ms; "
        f"{median(shares):.1%} is not model arithmetic ({min(shares):.1%} to {max(shares):.1%})"
    )


def median(values: Iterator[float] | list[float]) -> float:
    return statistics.median(values)


def write_photographs(folder: Path, number: int) -> Path:
    """Write pictures with the sizes, the detail and the file sizes of photographs."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(number):
        width, height = SIZES[index % len(SIZES)]
        small = Image.fromarray(rng.integers(0, 255, (height // 25, width // 25, 3), dtype=np.uint8))
        picture = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
        grain = rng.standard_normal((height, width, 1), dtype=np.float32) * 6
        grainy = Image.fromarray((picture + grain).clip(0, 255).astype(np.uint8))
        grainy.save(folder / f"{index:03d}.jpg", quality=90)
    return folder


if __name__ == "__main__":
    main()
