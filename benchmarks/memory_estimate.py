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
    import torch

    from library.models.base import BaseModel
    from library.networks.trainable import TrainableNetwork

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def main() -> None:
    """Run the script with the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
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


def parts(args: argparse.Namespace, device: str) -> tuple[BaseModel, TrainableNetwork, torch.dtype]:
    """Return (base, network, dtype) with weights on a device."""
    import tiny
    import torch

    from library.config.options import build
    from library.config.train import TrainConfig
    from library.models import building
    from library.models import family as families
    from library.models.base import BaseModel, TextEncoder
    from library.models.tokenizer import load_clip_tokenizer
    from library.networks.trainable import build_network
    from library.training.prepare.placing import enable_gradient_checkpointing

    unet = building.build_unet(families.SD1.unet)
    encoder = building.build_text_encoder(families.SD1.text_models[0].config)
    dtype = getattr(torch, DTYPES[args.dtype])
    if device == "cpu":
        unet, encoder = tiny.materialise(unet, 0).to(dtype), tiny.materialise(encoder, 1).to(dtype)
    for model in (unet, encoder):
        model.requires_grad_(False).eval()
    text = TextEncoder(families.SD1.text_models[0], load_clip_tokenizer(), encoder)
    vae = building.build_vae(families.SD1.vae)
    base = BaseModel(families.SD1, predicts_v=False, unet=unet, vae=vae, texts=(text,))
    unused = {"pretrained_model_name_or_path": "built above", "output_dir": Path()}
    config = build(TrainConfig, {**unused, "network_module": "networks.lora", "network_dim": args.rank, "seed": 1})
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
    return base, network, dtype


def counted(args: argparse.Namespace) -> int:
    """Return the bytes of activations and gradients that are counted."""
    from library.training.rehearse.memory import step_activations

    base, network, dtype = parts(args, "meta")
    size = (args.resolution, args.resolution)
    activations = step_activations(base, network, dtype, size=size, batch=args.batch_size, windows=1)
    return activations + 4 * sum(parameter.numel() for parameter in network.parameters())


def measured(args: argparse.Namespace) -> int:
    """Return by how many bytes the process's peak grows in a step."""
    import gc

    from library.training.rehearse.memory import _make_step

    base, network, dtype = parts(args, "cpu")
    _make_step(base, network, dtype, size=(64, 64), batch=1, windows=1)  # libraries take memory once
    for parameter in network.all_parameters():
        parameter.grad = None
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak so far is forgotten
    before = _status("VmRSS")
    _make_step(base, network, dtype, size=(args.resolution, args.resolution), batch=args.batch_size, windows=1)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """Return a line of the process's status, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


PARTS = {"counted": counted, "measured": measured}

if __name__ == "__main__":
    main()
