"""Merge LoRA files into an SDXL model, or into one LoRA file.

python networks/sdxl_merge_lora.py --sd_model sdxl.safetensors --save_to merged.safetensors
    --models a.safetensors b.safetensors --ratios 0.8 0.5 --save_precision fp16

The same program as merge_lora.py, under the name that users of sd-scripts know: the kind of model is recognised.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a script, from any folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.logs import run_script
from networks import merge_lora


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with a command line; return the exit code."""
    return merge_lora.main(argv, description=__doc__)


if __name__ == "__main__":
    run_script(main)
