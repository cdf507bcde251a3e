"""Generate pictures with SDXL and networks trained on it.

python sdxl_gen_img.py --ckpt sdxl.safetensors --prompt "a photo of a cat --n blurry"
    --network_module networks.lora --network_weights mine.safetensors --network_mul 0.8
    --images_per_prompt 8 --steps 30 --sampler euler_a --fp16 --outdir outputs

The same program as gen_img_diffusers.py, under a name that users of sd-scripts know: the kind of model is recognised.
"""

from __future__ import annotations

from collections.abc import Sequence

import gen_img_diffusers
from library.logs import run_script


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with a command line; return the exit code."""
    return gen_img_diffusers.main(argv, description=__doc__)


if __name__ == "__main__":
    run_script(main, gen_img_diffusers.LESS_MEMORY)
