"""Train a LoRA-type network for SDXL.

accelerate launch sdxl_train_network.py --pretrained_model_name_or_path=sdxl.safetensors --dataset_config=data.toml
    --output_dir=output --output_name=mine --network_module=networks.lora --network_train_unet_only
    --learning_rate=1e-4 --max_train_steps=1000 --mixed_precision=bf16 --cache_latents --gradient_checkpointing

The same program as train_network.py, under the name that users of sd-scripts know: the kind of model is recognised.
"""

from __future__ import annotations

from collections.abc import Sequence

import train_network
from library.logs import run_script


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with a command line; return the exit code."""
    return train_network.main(argv, description=__doc__)


if __name__ == "__main__":
    run_script(main, train_network.LESS_MEMORY)
