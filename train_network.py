"""Train a LoRA-type network for Stable Diffusion 1.x or 2.x.

accelerate launch train_network.py --pretrained_model_name_or_path=model.safetensors --dataset_config=data.toml
    --output_dir=output --output_name=mine --network_module=networks.lora --learning_rate=1e-4
    --max_train_steps=400 --mixed_precision=fp16 --cache_latents --gradient_checkpointing

python train_network.py --config_file=examples/unicorn/train.toml
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from library.config.dataset_file import load_datasets
from library.config.train import parse_train_config, write_config_file
from library.logs import run_script
from library.sampling.prompts import read_prompts

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with a command line; return the exit code."""
    config = parse_train_config(argv, description=__doc__)
    if config.file.output_config:
        logger.info("wrote %s", write_config_file(config))
        return 0
    datasets = load_datasets(config.data, config.dataset, config.subset)
    prompts = read_prompts(config.preview.sample_prompts) if config.preview.sample_prompts else []

    # Torch takes seconds to import; up to here every mistake has been answered at once.
    from library.data.records import build_training_sets
    from library.training.recipe import train

    train(config, build_training_sets(datasets, latents_cached=config.precision.cache_latents), prompts)
    return 0


if __name__ == "__main__":
    run_script(main)
