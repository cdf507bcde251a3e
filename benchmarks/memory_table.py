"""Print which options fit on which GPU: the largest stage of each run with models of the published sizes, counted.

python benchmarks/memory_table.py [--family sdxl] [--all]

Nothing is loaded and no GPU is needed. To each figure a GPU adds 0.5 to 1 GB for itself. --all prints every stage.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

SMALL = {"gradient_checkpointing": True, "optimizer_type": "AdamW8bit"}
UNET_ONLY = SMALL | {"network_train_unet_only": True}
# Side, batch size, options besides --mixed_precision bf16 --cache_latents.
ROWS: dict[str, list[tuple[int, int, dict[str, object]]]] = {
    "sdxl": [
        (768, 1, UNET_ONLY | {"network_dim": 8, "fp8_base": True}),
        (1024, 1, UNET_ONLY | {"network_dim": 4, "fp8_base": True}),
        (1024, 1, UNET_ONLY | {"network_dim": 4, "fp8_base": True, "no_half_vae": True}),
        (1024, 1, UNET_ONLY | {"network_dim": 16, "fp8_base": True}),
        (1024, 1, UNET_ONLY | {"network_dim": 4}),
        (1024, 1, UNET_ONLY | {"network_dim": 4, "no_half_vae": True}),
        (1024, 1, UNET_ONLY | {"network_dim": 16}),
        (1024, 1, UNET_ONLY | {"network_dim": 32}),
        (1024, 2, UNET_ONLY | {"network_dim": 32, "fp8_base": True}),
        (1024, 2, UNET_ONLY | {"network_dim": 32}),
        (1024, 4, UNET_ONLY | {"network_dim": 32}),
        (1024, 1, SMALL | {"network_dim": 32, "fp8_base": True}),
        (1024, 1, SMALL | {"network_dim": 8}),
        (1024, 1, SMALL | {"network_dim": 32}),
        (1024, 4, SMALL | {"network_dim": 8}),
        (1024, 1, {"network_dim": 32, "network_train_unet_only": True, "optimizer_type": "AdamW8bit"}),
        (1024, 1, {"network_dim": 32, "gradient_checkpointing": True}),
        (1024, 4, {"network_dim": 32, "gradient_checkpointing": True}),
        (1024, 8, {"network_dim": 32, "gradient_checkpointing": True}),
        (1024, 1, {"network_dim": 32}),
    ],
    "sd1": [
        (512, 1, UNET_ONLY | {"network_dim": 4, "fp8_base": True}),
        (512, 1, UNET_ONLY | {"network_dim": 4}),
        (512, 1, {"network_dim": 32, "gradient_checkpointing": True}),
        (512, 4, {"network_dim": 32, "gradient_checkpointing": True}),
        (512, 1, {"network_dim": 32}),
        (768, 1, {"network_dim": 32, "gradient_checkpointing": True}),
    ],
}


def main() -> None:
    """Run the script with the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=ROWS, default="sdxl")
    parser.add_argument("--all", action="store_true")
    args = parser.parse_args()
    logging.disable()
    import full_size

    from library.models import family as families

    family = {"sdxl": families.SDXL, "sd1": families.SD1}[args.family]
    print("| GB | pictures | batch | options | largest stage | seconds |\n|---|---|---|---|---|---|", flush=True)
    for side, batch, options in ROWS[args.family]:
        start = time.perf_counter()
        stages = full_size.count(family, side, batch, **options)
        seconds = time.perf_counter() - start
        largest = max(stages, key=lambda stage: stage.total)
        given = " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in options.items())
        what = largest.title.split(",")[0]
        print(f"| {largest.total / 1e9:.1f} | {side} | {batch} | {given} | {what} | {seconds:.0f} |", flush=True)
        for stage in stages if args.all else ():
            parts = ", ".join(f"{name} {size / 1e9:.3f}" for name, size in stage.parts.items())
            print(f"    {stage.total / 1e9:.3f} {stage.title}: {parts}", flush=True)


if __name__ == "__main__":
    main()
