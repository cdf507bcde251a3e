"""Encoding once, before the first step: pictures, and captions that do not vary."""

from __future__ import annotations

from library.config.prompts import Prompt
from library.config.training import PrecisionConfig
from library.data.captions import possible_captions
from library.data.latent_cache import LatentCache, build_cache
from library.data.records import Dataset, all_records
from library.models.base import BaseModel
from library.models.conditioning import Conditioner, LiveConditioner, TextOptions, remember
from library.models.latent_encoder import LatentEncoder
from library.models.precision import move
from library.sampling.previews import text_options
from library.training.run.runtime import Runtime

LARGEST_MEMORY = 2 * 2**30  # bytes of text conditioning that are stored; more is computed in every step


def cache_latents(
    precision: PrecisionConfig, datasets: list[Dataset], encoder: LatentEncoder, runtime: Runtime
) -> LatentCache:
    """Return the cache of all pictures; the processes share the encoding of entries on disk."""
    on_disk = precision.cache_latents_to_disk
    move(encoder.vae, runtime.device)

    def build(share: tuple[int, int]) -> LatentCache:
        return build_cache(datasets, encoder, batch_size=precision.vae_batch_size, on_disk=on_disk, share=share)

    if on_disk and runtime.num_processes > 1:
        build((runtime.rank, runtime.num_processes))
        runtime.barrier()
    return build((0, 1))


def build_conditioner(
    datasets: list[Dataset],
    prompts: list[Prompt],
    base: BaseModel,
    options: TextOptions,
    runtime: Runtime,
    *,
    trains_text_encoder: bool,
) -> Conditioner:
    """Return the conditioner of captions and prompts; the text encoders come to the device.

    If no caption varies, all texts are encoded now, and the text encoders' memory is released.
    """
    for module in base.text_modules:
        move(module, runtime.device)
    live = LiveConditioner(base.texts)
    captions = None if trains_text_encoder else all_captions(datasets)
    if captions is None:
        return live
    width = base.unet.config["cross_attention_dim"]
    if len(captions) * (options.num_tokens + 2) * width * runtime.types.unet.itemsize > LARGEST_MEMORY:
        return live
    wanted = [(caption, options) for caption in captions]
    for prompt in prompts:
        of_prompt = text_options(base.texts[0], prompt, options.clip_skip)
        wanted += [(prompt.prompt, of_prompt), (prompt.negative_prompt, of_prompt)]
    with runtime.types.autocast(runtime.device):
        remembered = remember(live, wanted)
    for module in base.text_modules:
        module.to("meta")
    return remembered


def all_captions(datasets: list[Dataset]) -> set[str] | None:
    """Return every text of a caption in the run, or None if captions vary randomly."""
    captions: set[str] = set()
    for record in all_records(datasets):
        possible = possible_captions(record.caption, record.subset)
        if possible is None:
            return None
        captions |= possible
    return captions
