"""What clamping the factors costs: relative error of svd_merge_lora with and without, against the exact sum.

python benchmarks/svd_clamping.py --models A.safetensors B.safetensors [--rank 8]

Take trained files: clamping cuts what stands out, and in random numbers nothing does.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def main() -> None:
    """Run the script with the command line."""
    from library.adapters.lora_file import read_lora
    from library.adapters.low_rank import clamped, concatenated, spectrum_of

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, nargs=2, required=True)
    parser.add_argument("--rank", type=int, default=8)
    args = parser.parse_args()
    one, two = map(read_lora, args.models)
    lost = {"none": 0.0, "0.99": 0.0}
    total = 0.0
    for name, change in one.changes.items():
        exact = concatenated([(0.8, change), (0.5, two.changes[name])])
        nearest = spectrum_of(exact).truncated(args.rank, exact.down_shape)
        delta = exact.delta()
        total += float(delta.square().sum())
        for title, result in (("none", nearest), ("0.99", clamped(nearest, 0.99))):
            lost[title] += float((result.delta() - delta).square().sum())
    for title, squared in lost.items():
        print(f"clamping {title}: relative error {(squared / total) ** 0.5:.4f}")


if __name__ == "__main__":
    main()
