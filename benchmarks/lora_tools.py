"""Time and memory of the LoRA tools on full-size models, against their floors.

python benchmarks/lora_tools.py --folder FOLDER [--rank 32]

Writes a random SD 1.5 checkpoint (fp16) and two LoRA files into the folder, if they are not there, and times each
tool in a process of its own: merging into the checkpoint beside loading and saving it with safetensors.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

FLOOR = """
import sys
from safetensors.torch import load_file, save_file
save_file(load_file(sys.argv[1]), sys.argv[2])
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
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.make:
        make_files(args.folder, args.rank)
        return
    # In a process of its own, for a child begins with its parent's memory in its account.
    subprocess.run([sys.executable, *sys.argv, "--make"], check=True)
    files = file_names(args.folder, args.rank)
    (args.folder / "floor.py").write_text(FLOOR, encoding="utf-8")
    out = str(args.folder / "out.safetensors")
    base, one, two = (str(files[name]) for name in ("base", "one", "two"))
    merge = str(ROOT / "networks" / "merge_lora.py")
    jobs = {
        "load and save": [str(args.folder / "floor.py"), base, out],
        "merge one into the checkpoint": [
            *(merge, "--sd_model", base, "--save_to", out, "--save_precision", "fp16"),
            *("--models", one, "--ratios", "0.8"),
        ],
        "concatenate two": [merge, "--save_to", out, "--models", one, two, "--ratios", "0.8", "0.5", "--concat"],
        "concatenate and shuffle two": [
            *(merge, "--save_to", out, "--models", one, two, "--ratios", "0.8", "0.5", "--concat", "--shuffle"),
        ],
    }
    times: dict[str, list[tuple[float, int]]] = {name: [] for name in jobs}
    for _ in range(args.rounds):
        for name, argv in jobs.items():
            times[name].append(run(argv))
    floor = min(seconds for seconds, _ in times["load and save"])
    print(f"SD 1.5, fp16, {Path(base).stat().st_size / 1e9:.2f} GB; rank {args.rank}; shortest of {args.rounds} rounds")
    for name, found in times.items():
        seconds, peak = min(found)[0], max(size for _, size in found)
        print(f"{name:32} {seconds:6.2f} s  {seconds / floor:5.2f} x load and save  peak {peak / 1e9:.2f} GB")


def run(argv: list[str]) -> tuple[float, int]:
    """Return (seconds, peak bytes) of a script in a process of its own."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", MEASURED, *argv], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - start, int(done.stdout.split()[-1])


def file_names(folder: Path, rank: int) -> dict[str, Path]:
    """Return the files of the benchmark."""
    names = {"base": "base", "one": f"one-{rank}", "two": f"two-{rank}"}
    return {name: folder / f"{stem}.safetensors" for name, stem in names.items()}


def make_files(folder: Path, rank: int) -> None:
    """Write the files of the benchmark where they are not there."""
    import torch
    from safetensors.torch import save_file

    from library.models import family as families
    from library.models import keys, loading
    from networks import lora

    files = file_names(folder, rank)
    unet, encoder = (
        loading.build_unet(families.SD1.unet),
        loading.build_text_encoder(families.SD1.text_models[0].config),
    )
    vae = loading.build_vae(families.SD1.vae)
    generator = torch.Generator().manual_seed(0)
    if not files["base"].exists():
        names = keys.table(unet.state_dict(), loading.unet_rule_for(unet.config))
        shapes = {keys.UNET_PREFIX + names[name]: tensor.shape for name, tensor in unet.state_dict().items()}
        text = loading.canonical_text_state(encoder)
        shapes |= {families.SD1.text_models[0].prefixes[0] + name: tensor.shape for name, tensor in text.items()}
        vae_names = keys.table(vae.state_dict(), keys.vae_rule(4))
        shapes |= {keys.VAE_PREFIX + vae_names[name]: tensor.shape for name, tensor in vae.state_dict().items()}
        save_file(
            {name: torch.randn(shape, generator=generator).half() for name, shape in shapes.items()}, files["base"]
        )
    for name in ("one", "two"):
        if not files[name].exists():
            network = lora.create_network(1.0, rank, float(rank), None, encoder, unet)
            weights = {key: torch.randn(t.shape, generator=generator) * 0.01 for key, t in network.state_dict().items()}
            lora.write_weights(files[name], weights, {})


if __name__ == "__main__":
    main()
