"""Train a LoRA-type network for Stable Diffusion 1.x, 2.x or XL.

accelerate launch train_network.py --pretrained_model_name_or_path=model.safetensors --dataset_config=data.toml
    --output_dir=output --output_name=mine --network_module=networks.lora --learning_rate=1e-4
    --max_train_steps=400 --mixed_precision=fp16 --cache_latents --gradient_checkpointing

python train_network.py --config_file=examples/unicorn/train.toml
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from library.config.preview import PreviewConfig
from library.config.prompts import Prompt, read_prompts
from library.config.train import TrainConfig, check, parse_train_config, warn_of_idle_options, write_config_file
from library.errors import LessMemory, Problems
from library.logs import choose_log_lines, kept_warnings, run_script
from library.processes import check_launch

logger = logging.getLogger(__name__)

LESS_MEMORY = LessMemory(
    "add --gradient_checkpointing and --cache_latents, use --mixed_precision fp16, or lower --train_batch_size or "
    "--resolution",
    "lower --network_dim, --resolution or --train_batch_size",
)


def main(argv: Sequence[str] | None = None, *, description: str | None = __doc__) -> int:
    """Run the script with a command line; return the exit code."""
    with kept_warnings() as warnings:
        return check_and_train(argv, description, warnings)


def check_and_train(argv: Sequence[str] | None, description: str | None, warnings: Sequence[str]) -> int:
    """Read and check the options, then train; warnings are those so far, for the page of the run."""
    problems = Problems()
    config = parse_train_config(argv, problems, description=description, when_read=choose_logs)
    if config.file.output_config:
        logger.info("wrote %s", write_config_file(config))
        return 0
    problems.run(check_launch)
    from library.data.records import load_datasets, subsets_of  # these read pictures; --help does not
    from library.models.hub import fetch_models, locate_models

    config = locate_models(config, problems)
    check(config, problems)
    prompts = problems.run(load_prompts, config.preview) or []
    datasets = problems.run(load_datasets, config) or []
    problems.raise_if_any()
    warn_of_idle_options(config, subsets_of(datasets))
    fetch_models(config)

    # Torch takes seconds to import, so all mistakes are reported before.
    from library.training.recipe import train

    train(config, datasets, prompts, warnings)
    return 0


def choose_logs(config: TrainConfig) -> None:
    """Configure the log lines by the options."""
    choose_log_lines(config.logs.console_log_level, config.logs.console_log_file)


def load_prompts(preview: PreviewConfig) -> list[Prompt]:
    """Return the prompts of the previews, if there are to be any; empty without a file, which `check` reports."""
    path = preview.sample_prompts
    return read_prompts(path) if preview.are_wanted and path is not None and path.is_file() else []


if __name__ == "__main__":
    run_script(main, LESS_MEMORY)
