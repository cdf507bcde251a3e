"""Time and memory of the LoRA tools on full-size models, against their floors.

python benchmarks/lora_tools.py --folder FOLDER [--model sd15|sd21|sdxl] [--rank 32] [--naive]

Writes a random checkpoint (fp16), a tuned one and two LoRA files into the folder, if they are not there, and runs
each tool in a process of its own. The floor of what writes a checkpoint is loading and saving one with safetensors,
that of the others the same with their LoRA file; --naive also decomposes the full matrices, as sd-scripts does.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

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
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def main() -> None:
    """Run the script with the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", choices=FAMILIES, default="sd15")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
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
    jobs = jobs_of(files, args)
    times: dict[str, list[tuple[float, int]]] = {name: [] for name in jobs}
    for number in range(args.rounds):
        for name, (argv, _) in jobs.items():
            if number == 0 or not name.startswith("naive"):
                times[name].append(run(argv))
    size = files["base"].stat().st_size / 1e9
    print(f"{args.model}, fp16, {size:.2f} GB; rank {args.rank}; shortest of {args.rounds} rounds, greatest memory")
    for name, found in times.items():
        seconds, peak = min(found)[0], max(memory for _, memory in found)
        floor = min(times[jobs[name][1]])[0]
        print(f"{name:34} {seconds:7.2f} s {seconds / floor:6.2f} x {jobs[name][1]:20} peak {peak / 1e9:5.2f} GB")


def jobs_of(files: dict[str, Path], args: argparse.Namespace) -> dict[str, tuple[list[str], str]]:
    """Return job -> its command, and the job that is its floor."""
    out, lora_out = str(args.folder / "out.safetensors"), str(args.folder / "lora-out.safetensors")
    base, tuned, one, two = (str(files[name]) for name in ("base", "tuned", "one", "two"))
    floor, naive = str(args.folder / "floor.py"), str(args.folder / "naive.py")
    networks = ROOT / "networks"
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
            [str(ROOT / "tools" / "convert_diffusers20_original_sd.py"), base, out],
            checkpoint,
        ),
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
    return jobs


def run(argv: list[str]) -> tuple[float, int]:
    """Return (seconds, peak bytes) of a script in a process of its own."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", MEASURED, *argv], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - start, int(done.stdout.split()[-1])


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
