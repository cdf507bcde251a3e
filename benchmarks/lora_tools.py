"""Time and memory of the LoRA tools on full-size models, against their floors, alone and beside another program.

python benchmarks/lora_tools.py --folder FOLDER [--model sd15|sd21|sdxl] [--rank 32] [--load] [--naive]
python benchmarks/lora_tools.py --folder FOLDER --load --only "merge*" --repository ../other_checkout

Writes a random checkpoint (fp16), a tuned one and two LoRA files into the folder, if they are not there, and runs
each tool in a process of its own. The floor of what writes a checkpoint is loading and saving one with safetensors,
that of the others the same with their LoRA file; --naive also decomposes the full matrices, as sd-scripts does.

In each round every job runs once, and its floor right before it; quoted are medians, also of the ratios of both. With
--load each runs again while another program keeps every core busy. CPU seconds do not depend on other programs, as
times do. --repository runs the tools of another checkout, too, in the same rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

if TYPE_CHECKING:
    import torch

FAMILIES = {"sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl"}
FLOOR = """
import sys
from safetensors.torch import load_file, save_file
save_file(load_file(sys.argv[1]), sys.argv[2])
"""
NAIVE = """
import sys, torch
from safetensors.torch import load_file
files = [load_file(path) for path in sys.argv[1:]]
for name in [name for name in files[0] if name.endswith("lora_down.weight")]:
    up, down = name.replace("lora_down", "lora_up"), name
    delta = sum(file[up].float().flatten(1) @ file[down].float().flatten(1) for file in files)
    torch.linalg.svd(delta)
"""
MEASURED = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)
"""
BUSY = "while True: pass"


class Used(NamedTuple):
    """What a run of a script took."""

    seconds: float
    cpu: float  # seconds, of all threads
    peak: int  # bytes


class Job(NamedTuple):
    """A command, and the name of the job that is its floor."""

    argv: list[str]
    floor: str


def main() -> None:
    """Run the script with the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", choices=FAMILIES, default="sd15")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--load", action="store_true", help="run each job again beside a program on every core")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="jobs whose names match, such as 'merge*'")
    parser.add_argument("--repository", type=Path, help="another checkout whose tools are run, too")
    parser.add_argument("--naive", action="store_true", help="also decompose the full matrices: minutes")
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    files = file_names(args.folder, args.model, args.rank)
    if args.make:
        make_files(files, FAMILIES[args.model], args.rank)
        return
    # In a process of its own, for a child begins with its parent's memory in its account.
    subprocess.run([sys.executable, *sys.argv, "--make"], check=True)
    for name, text in (("floor", FLOOR), ("naive", NAIVE)):
        (args.folder / f"{name}.py").write_text(text, encoding="utf-8")
    jobs = jobs_of(files, args, ROOT)
    if args.repository is not None:
        others = jobs_of(files, args, args.repository.resolve())
        jobs |= {f"{name}, other": job for name, job in others.items() if job.floor != name}
    chosen = {name: job for name, job in jobs.items() if fnmatch.fnmatch(name, args.only)}
    size = files["base"].stat().st_size / 1e9
    print(f"{args.model}, fp16, {size:.2f} GB; rank {args.rank}; {args.rounds} rounds, {os.cpu_count()} cores; medians")
    for is_busy in (False, True) if args.load else (False,):
        print("beside a program on every core" if is_busy else "alone")
        with busy_cores(os.cpu_count() or 1 if is_busy else 0):
            for line in lines_of(jobs, measured(jobs, chosen, args.rounds)):
                print(line, flush=True)


@contextlib.contextmanager
def busy_cores(number: int) -> Iterator[None]:
    """Keep some cores busy with processes of Python."""
    programs = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(number)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def measured(jobs: dict[str, Job], chosen: Collection[str], rounds: int) -> dict[str, list[tuple[Used, Used]]]:
    """Return job -> what it took in each round, and what its floor took right before."""
    found: dict[str, list[tuple[Used, Used]]] = {name: [] for name in chosen}
    for number in range(rounds):
        for name in chosen:
            if number == 0 or not name.startswith("naive"):
                floor = run(jobs[jobs[name].floor].argv)
                found[name].append((floor if jobs[name].floor == name else run(jobs[name].argv), floor))
    return found


def lines_of(jobs: dict[str, Job], found: dict[str, list[tuple[Used, Used]]]) -> Iterator[str]:
    """Yield a line for each job: seconds, ratio to its floor, CPU seconds, peak of the memory."""
    for name, rounds in found.items():
        seconds = statistics.median(used.seconds for used, _ in rounds)
        ratio = statistics.median(used.seconds / floor.seconds for used, floor in rounds)
        cpu = statistics.median(used.cpu for used, _ in rounds)
        cpu_ratio = statistics.median(used.cpu / floor.cpu for used, floor in rounds)
        peak = max(used.peak for used, _ in rounds) / 1e9
        yield (
            f"{name:38} {seconds:7.2f} s {ratio:6.2f} x {jobs[name].floor:20} "
            f"CPU {cpu:6.2f} s {cpu_ratio:6.2f} x  peak {peak:5.2f} GB"
        )


def jobs_of(files: dict[str, Path], args: argparse.Namespace, root: Path) -> dict[str, Job]:
    """Return job -> its command and its floor, for the tools of a checkout."""
    out, lora_out = str(args.folder / "out.safetensors"), str(args.folder / "lora-out.safetensors")
    base, tuned, one, two = (str(files[name]) for name in ("base", "tuned", "one", "two"))
    floor, naive = str(args.folder / "floor.py"), str(args.folder / "naive.py")
    networks, tools = root / "networks", root / "tools"
    merge, svd = str(networks / "merge_lora.py"), str(networks / "svd_merge_lora.py")
    half, both = ["--save_precision", "fp16"], ["--models", one, two, "--ratios", "0.8", "0.5"]
    checkpoint, lora = "load, save checkpoint", "load, save LoRA"
    rank = ["--new_rank", str(args.rank)]
    extract = [str(networks / "extract_lora_from_models.py"), "--model_org", base, "--model_tuned", tuned]
    jobs = {
        checkpoint: ([floor, base, out], checkpoint),
        "merge one into the checkpoint": (
            [merge, "--sd_model", base, "--save_to", out, *half, "--models", one, "--ratios", "0.8"],
            checkpoint,
        ),
        "merge two into the checkpoint": ([merge, "--sd_model", base, "--save_to", out, *half, *both], checkpoint),
        "extract": ([*extract, "--save_to", lora_out, "--dim", str(args.rank), *half], checkpoint),
        "extract --exact": ([*extract, "--save_to", lora_out, "--dim", str(args.rank), *half, "--exact"], checkpoint),
        "convert to the same layout": (
            [str(tools / "convert_diffusers20_original_sd.py"), base, out],
            checkpoint,
        ),
        "models": ([str(tools / "merge_models.py"), "--models", base, tuned, "--output", out], checkpoint),
        lora: ([floor, one, lora_out], lora),
        "merge two, --concat": ([merge, "--save_to", lora_out, *both, "--concat"], lora),
        "merge two, --concat --shuffle": ([merge, "--save_to", lora_out, *both, "--concat", "--shuffle"], lora),
        "svd_merge two": ([svd, "--save_to", lora_out, *both, *rank], lora),
        "resize to 8": (
            [str(networks / "resize_lora.py"), "--model", one, "--save_to", lora_out, "--new_rank", "8"],
            lora,
        ),
        "convert to diffusers": (
            [str(networks / "convert_lora.py"), "--model", one, "--save_to", lora_out, "--to", "diffusers"],
            lora,
        ),
    }
    if args.naive:
        name = "naive full matrices of two"
        jobs |= {name: ([naive, one, two], lora)}
        jobs["svd_merge two"] = (jobs["svd_merge two"][0], name)
    return {name: Job(*job) for name, job in jobs.items()}


def run(argv: list[str]) -> Used:
    """Return what a script takes in a process of its own."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", MEASURED, *argv], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    cpu, peak = done.stdout.split()[-2:]
    return Used(time.perf_counter() - start, float(cpu), int(peak))


# --------------------------------------------------------------------------------------------------------------
# The files
# --------------------------------------------------------------------------------------------------------------


def file_names(folder: Path, model: str, rank: int) -> dict[str, Path]:
    """Return the files of the benchmark."""
    names = {"base": "base", "tuned": "tuned", "one": f"one-{rank}", "two": f"two-{rank}"}
    return {name: folder / f"{model}-{stem}.safetensors" for name, stem in names.items()}


def make_files(files: dict[str, Path], family_name: str, rank: int) -> None:
    """Write the files of the benchmark where they are not there."""
    import tiny
    import torch

    from library.models import building
    from library.safetensors_io import write_stream

    family = tiny.FAMILIES[family_name]
    if not files["base"].exists():
        models: tiny.Models = {"unet": building.build_unet(family.unet), "vae": building.build_vae(family.vae)}
        for text in family.text_models:
            models[text.folder] = building.build_text_encoder(text.config, has_projection=text.has_projection)
        shapes = {name: tuple(t.shape) for name, t in tiny.original_state(models, family_name).items() if t.ndim}
        generator = torch.Generator().manual_seed(0)
        infos = {name: (torch.float16, shape) for name, shape in shapes.items()}
        tensors = ((name, (torch.randn(shape, generator=generator) * 0.03).half()) for name, shape in shapes.items())
        write_stream(files["base"], infos, tensors)
    for seed, name in enumerate(("one", "two")):
        if not files[name].exists():
            write_lora(files["base"], files[name], rank, seed)
    if not files["tuned"].exists():
        write_tuned(files["base"], files["tuned"])


def write_lora(base: Path, path: Path, rank: int, seed: int) -> None:
    """Write a random LoRA of all attention layers of a checkpoint."""
    import torch

    from library.adapters import layers
    from library.adapters.lora_file import to_state_dict
    from library.adapters.low_rank import Change
    from library.models.checkpoint import open_checkpoint
    from networks import lora

    model, generator = open_checkpoint(base), torch.Generator().manual_seed(seed)
    shapes, changes = model.shapes, {}
    for layer, place in layers.places(model).items():
        if layer.part != layers.UNET or ".attentions." in layer.path:
            shape = place.shape_of(shapes[place.name])
            up, down = (torch.randn(size, generator=generator) * 0.01 for size in ((shape[0], rank), (rank, shape[1])))
            down_shape = (rank, *shape[1:])
            changes[layers.module_name(layer, model.family)] = Change(up, down, float(rank), down_shape)
    lora.write_weights(path, to_state_dict(changes, torch.float16), {})


def write_tuned(base: Path, path: Path) -> None:
    """Write a checkpoint as training might leave it: each matrix changed by a falling spectrum over noise."""
    import torch

    from library.safetensors_io import write_stream
    from library.weight_file import open_weights

    file, generator = open_weights(base), torch.Generator().manual_seed(7)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in file.tensors(file.shapes):
            if tensor.ndim > 1 and not name.startswith("first_stage_model."):
                rows = tensor.float().flatten(1)
                size = min(64, *rows.shape)
                strengths = torch.arange(1, size + 1) ** -1.0
                left = torch.randn(rows.shape[0], size, generator=generator) * strengths
                change = left @ torch.randn(size, rows.shape[1], generator=generator)
                noise = torch.randn(rows.shape, generator=generator)
                yield name, (rows + 1e-3 * change + 2e-4 * noise).reshape(tensor.shape).half()
            else:
                yield name, tensor

    infos = {name: (torch.float16, shape) for name, shape in file.shapes.items()}
    order = [name for name, _, _ in file.infos()]
    write_stream(path, {name: infos[name] for name in order}, tensors())


if __name__ == "__main__":
    main()
