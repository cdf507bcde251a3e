"""How well the memory that a dry run tells agrees with what a process takes.

python benchmarks/memory_estimate.py [--resolution 256] [--batch_size 1] [--checkpointing] [--dtype bf16]

Counts one step of a full-size SD 1.5 with a LoRA on empty tensors, then makes it in a child process with real
ones (random weights, on the CPU) and prints the growth of the process's peak memory beside the count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from library.models.base import BaseModel
    from library.models.precision import Types
    from library.networks.trainable import TrainableNetwork

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
TYPES = {"fp32": "no", "bf16": "bf16"}


def main() -> None:
    """Run the script with the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--dtype", choices=TYPES, default="fp32")
    parser.add_argument("--part", choices=["counted", "measured"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(PARTS[args.part](args)))
        return
    found = {}
    for part in PARTS:
        done = subprocess.run([sys.executable, *sys.argv, "--part", part], capture_output=True, text=True, check=True)
        found[part] = json.loads(done.stdout.splitlines()[-1])
    ratio = found["counted"] / found["measured"]
    checkpointing = ", gradient checkpointing" if args.checkpointing else ""
    print(f"SD 1.5, {args.resolution} px, batch {args.batch_size}, rank {args.rank}, {args.dtype}{checkpointing}")
    print(f"counted {found['counted'] / 1e9:.3f} GB, measured {found['measured'] / 1e9:.3f} GB, ratio {ratio:.3f}")


def parts(args: argparse.Namespace, device: str) -> tuple[BaseModel, TrainableNetwork, Types]:
    """Return (base, network, types) with weights on a device."""
    import full_size
    import tiny
    import torch

    from library.config.options import build
    from library.config.train import TrainConfig
    from library.errors import Problems
    from library.models import family as families
    from library.models.precision import types_of
    from library.networks.trainable import build_network
    from library.training.prepare.placing import enable_gradient_checkpointing
    from library.training.rehearse.dry_run import take_types

    base, types = full_size.empty_base(families.SD1), types_of(TYPES[args.dtype])
    if device == "cpu":
        for seed, model in enumerate((base.unet, *base.text_modules)):
            tiny.materialise(model, seed)
    take_types(base, types)
    given = {"network_module": "networks.lora", "network_dim": args.rank, "seed": 1}
    config = build(TrainConfig, given, Problems())  # neither a model nor a folder is needed
    network = build_network(
        config.network,
        config.optimizer,
        base,
        checkpointing=args.checkpointing,
        device=torch.device(device),
    )
    network.groups(config.optimizer)
    if args.checkpointing:
        enable_gradient_checkpointing(base, network)
    return base, network, types


def counted(args: argparse.Namespace) -> int:
    """Return the bytes of activations that are counted."""
    from library.training.rehearse import memory

    base, network, types = parts(args, "meta")
    pictures = memory.Pictures((args.resolution, args.resolution), args.batch_size)
    with memory.fake_weights([base.unet, *base.text_modules], network, types.unet) as peak_of:
        return peak_of(lambda: memory.make_step(base, network, types, pictures))


def measured(args: argparse.Namespace) -> int:
    """Return by how many bytes the process's peak grows in a step."""
    import gc

    from library.training.rehearse.memory import Pictures, make_step

    base, network, types = parts(args, "cpu")
    make_step(base, network, types, Pictures((64, 64), 1))  # libraries take memory once; gradients stay
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak so far is forgotten
    before = _status("VmRSS")
    make_step(base, network, types, Pictures((args.resolution, args.resolution), args.batch_size))
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """Return a line of the process's status, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


PARTS = {"counted": counted, "measured": measured}

if __name__ == "__main__":
    main()
