"""Encode the pictures of a training beforehand; the training finds the latents beside the pictures.

python tools/cache_latents.py --config_file examples/unicorn/train.toml
accelerate launch tools/cache_latents.py --pretrained_model_name_or_path model.safetensors
    --dataset_config pictures.toml --vae_batch_size 4 --mixed_precision fp16

Takes the command line of the training and ignores options that do not concern latents. Only the VAE is loaded.
Options that change latents (--vae, --resolution, buckets, --no_half_vae, --mixed_precision) must be the training's.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a script, from any folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.train import check, parse_train_config
from library.errors import LessMemory, Problems, named
from library.logs import run_script
from library.processes import check_launch

logger = logging.getLogger(__name__)

LESS_MEMORY = LessMemory("lower --vae_batch_size or --resolution, or use --mixed_precision fp16 or bf16")
CACHING = {
    "cache_latents": True,
    "cache_latents_to_disk": True,
    # Required for a training, not used here.
    "network_module": "networks.lora",
    "output_dir": Path(),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with a command line; return the exit code."""
    problems = Problems()
    config = parse_train_config(argv, problems, description=__doc__, fixed=CACHING)
    problems.run(check_launch)
    from library.data.records import all_records, load_datasets  # reads pictures; --help does not
    from library.models.hub import fetch_models, locate_models

    config = locate_models(config, problems)
    check(config, problems)
    datasets = problems.run(load_datasets, config) or []
    problems.raise_if_any()
    fetch_models(config)

    # Importing torch takes seconds; mistakes were reported before.
    from library.data.latent_cache import SUFFIX, check_folders, extent
    from library.data.picture_index import index_for
    from library.models.base import find_base, load_vae
    from library.models.latent_encoder import LatentEncoder
    from library.training.prepare.caches import cache_latents
    from library.training.prepare.checks import check_sides
    from library.training.run.runtime import start_runtime

    files = find_base(config.model)
    check_sides(datasets, files.checkpoint.family, problems)
    problems.run(check_folders, datasets)
    problems.raise_if_any()
    runtime = start_runtime(config.precision, config.logs, vae_overflows=files.vae_overflows)
    encoder = LatentEncoder(load_vae(files, runtime.types), runtime.types.vae)
    before = extent(datasets, runtime.types.vae, encoder, index_for(config.data))
    cache_latents(config.precision, datasets, encoder, runtime, index_for(config.data))
    folders = sorted({str(record.path.parent) for record in all_records(datasets)})
    logger.info(
        "%d latents were written, %d were there: %.1f MB in files *%s beside the pictures, in %s",
        *(before.missing, before.entries - before.missing, before.size / 1e6, SUFFIX, named(folders)),
    )
    return 0


if __name__ == "__main__":
    run_script(main, LESS_MEMORY)
