"""The memory of runs with models of the published sizes, counted on shapes; for tests and benchmarks."""

from __future__ import annotations

from library.config.options import build
from library.config.train import TrainConfig
from library.errors import Problems
from library.models import building
from library.models.base import BaseModel, TextEncoder
from library.models.family import ModelFamily
from library.models.text_cache import ENCODED_AT_ONCE
from library.models.tokenizer import load_clip_tokenizer
from library.optim.optimizers import choose_optimizer
from library.training.prepare import caches
from library.training.prepare.placing import store_models
from library.training.rehearse.dry_run import Report, report_network, take_types
from library.training.rehearse.memory import Pictures, Stage, Work, count_stages, state_bytes_per_parameter
from library.training.run.runtime import types_of_run


def empty_base(family: ModelFamily) -> BaseModel:
    """Return a base model of the published sizes on the meta device."""
    texts = tuple(
        TextEncoder(
            row,
            load_clip_tokenizer(),
            building.build_text_encoder(row.config, has_projection=row.has_projection).requires_grad_(False).eval(),
        )
        for row in family.text_models
    )
    unet, vae = building.build_unet(family.unet), building.build_vae(family.vae)
    return BaseModel(family, False, False, unet.requires_grad_(False).eval(), vae.requires_grad_(False).eval(), texts)


def count(family: ModelFamily, side: int, batch: int = 1, **options: object) -> list[Stage]:
    """Return the stages of a run with options over square pictures in batches, with previews of the same size.

    Captions do not vary.
    """
    given: dict[str, object] = {"network_module": "networks.lora", "mixed_precision": "bf16", "cache_latents": True}
    config = build(TrainConfig, given | options, Problems())
    types = types_of_run(config.precision, vae_overflows=bool(family.vae.get("force_upcast")))
    base = empty_base(family)
    take_types(base, types)
    store_models(config.precision, base)
    network = report_network(Report(), config, base, types)
    size = (side, side)
    work = Work(
        training=Pictures(size, batch),
        encoding=Pictures(size, config.precision.vae_batch_size or caches.ENCODED_AT_ONCE),
        is_cached=config.precision.cache_latents,
        texts=None if network.trains_text_encoder else ENCODED_AT_ONCE,
        previews=Pictures(size, 1),
    )
    choice = choose_optimizer(config.optimizer)
    state_bytes = state_bytes_per_parameter(choice, config.optimizer.learning_rate, types.adapter)
    return count_stages(base, network, work, types, state_bytes=state_bytes)
