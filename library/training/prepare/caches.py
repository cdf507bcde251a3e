"""The cache of encoded pictures, filled before the first step."""

from __future__ import annotations

from library.config.training import PrecisionConfig
from library.data.latent_cache import LatentCache, build_cache
from library.data.records import Dataset
from library.models.latent_encoder import LatentEncoder
from library.models.precision import move
from library.training.prepare.placing import free_cache
from library.training.run.runtime import Runtime

ENCODED_AT_ONCE = 1  # pictures, where --vae_batch_size is not given


def cache_latents(
    precision: PrecisionConfig, datasets: list[Dataset], encoder: LatentEncoder, runtime: Runtime
) -> LatentCache:
    """Return the cache of all pictures; the processes share the encoding of entries on disk.

    The VAE is on the CPU afterwards, and the device has the memory again that it and its activations had.
    """
    on_disk = precision.cache_latents_to_disk
    move(encoder.vae, runtime.device)

    def build(share: tuple[int, int]) -> LatentCache:
        return build_cache(
            datasets, encoder, batch_size=precision.vae_batch_size or ENCODED_AT_ONCE, on_disk=on_disk, share=share
        )

    if on_disk and runtime.num_processes > 1:
        build((runtime.rank, runtime.num_processes))
        runtime.barrier()
    cache = build((0, 1))
    move(encoder.vae, "cpu")
    free_cache(runtime.device)
    return cache
