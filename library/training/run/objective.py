"""From a batch to its loss. Everything drawn is a function of the batch's position, so nothing here keeps state."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from library.config.train import TrainConfig
from library.data.dataset import Batch
from library.diffusion.losses import per_sample_loss, target_for, timestep_weights
from library.diffusion.noise import Key, draw_noise, draw_timesteps, perturbed_noise, sample_latents
from library.diffusion.schedule import NoiseSchedule
from library.models.loading import LoadedModels
from library.models.text_encoding import TextConditioning, encode_text
from library.training.network_protocol import TrainableNetwork
from library.training.run.runtime import Runtime

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What the U-Net is trained on, before noise is mixed in; B pictures."""

    batch: Batch
    latents: Tensor  # (B, 4, H/8, W/8), scaled
    noise: Tensor  # (B, 4, H/8, W/8)
    text: TextConditioning
    masks: Tensor | None  # (B, 1, H/8, W/8)
    weights: Tensor  # (B,)


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss of a run: the models with the network in them, the noise schedule, the options."""

    config: TrainConfig
    models: LoadedModels
    schedule: NoiseSchedule
    runtime: Runtime
    network: TrainableNetwork

    def training_loss(self, batch: Batch) -> Tensor:
        """Return the mean loss of a batch at timesteps drawn for it (0-D, float32)."""
        # Keyed by seed, epoch and sample: neither the batch nor the process it falls to changes what is drawn.
        keys = [(self.config.run.seed, batch.epoch, *sample) for sample in batch.samples]
        timesteps = draw_timesteps(keys, *self.config.loss.timestep_range).to(self.runtime.device)
        return self.losses(self.prepare(batch, keys), keys, timesteps).mean()

    def prepare(self, batch: Batch, keys: Sequence[Key]) -> Prepared:
        """Return a batch as latents, noise and text conditioning; the random parts come from the keys."""
        latents = self._latents(batch, keys)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.network.trains_text_encoder):
            text = self._encode(batch.captions)
        device = self.runtime.device
        return Prepared(
            batch=batch,
            latents=latents,
            noise=draw_noise(latents, keys, self.config.loss),
            text=text,
            masks=None if batch.masks is None else batch.masks.to(device),
            weights=batch.loss_weights.to(device),
        )

    def losses(self, prepared: Prepared, keys: Sequence[Key], timesteps: Tensor) -> Tensor:
        """Return the weighted loss of each sample at its timestep, (B,), float32."""
        config, schedule, predicts_v = self.config.loss, self.schedule, self.models.predicts_v
        latents, noise = prepared.latents, prepared.noise
        noisy = schedule.add_noise(latents, perturbed_noise(noise, keys, config), timesteps)
        prediction = self._predict(noisy, timesteps, prepared.text)
        target = target_for(latents, noise, timesteps, schedule, predicts_v=predicts_v)
        if bool(prepared.batch.preserved.any()):
            preserved = prepared.batch.preserved.to(target.device)[:, None, None, None]
            target = torch.where(preserved, self._base_prediction(noisy, timesteps, prepared.batch), target)
        losses = per_sample_loss(prediction, target, timesteps, schedule, config, masks=prepared.masks)
        return losses * prepared.weights * timestep_weights(timesteps, schedule, config, predicts_v=predicts_v)

    def _encode(self, captions: Sequence[str]) -> TextConditioning:
        text = self.config.text
        with self.runtime.autocast():
            return encode_text(
                self.models,
                captions,
                max_tokens=text.max_token_length,
                clip_skip=text.clip_skip,
                weighted=text.weighted_captions,
            )

    def _predict(self, noisy: Tensor, timesteps: Tensor, text: TextConditioning) -> Tensor:
        """Return the U-Net's output, (B, 4, H/8, W/8)."""
        dtype = self.runtime.dtype
        with self.runtime.autocast():
            return self.models.unet(
                noisy.to(dtype), timesteps, **text.unet_arguments(self.runtime.device, dtype)
            ).sample

    @torch.no_grad()
    def _base_prediction(self, noisy: Tensor, timesteps: Tensor, batch: Batch) -> Tensor:
        """Return what the base model predicts without the network, (B, 4, H/8, W/8), float32."""
        with self.network.absent():
            return self._predict(noisy, timesteps, self._encode(batch.captions)).float()

    def _latents(self, batch: Batch, keys: Sequence[Key]) -> Tensor:
        """Return scaled latents (B, 4, H/8, W/8), float32: from the cache, or encoded now."""
        if batch.moments is not None:
            moments = batch.moments.to(self.runtime.device)
        else:
            parts = batch.pixels.split(self.config.precision.vae_batch_size)
            moments = torch.cat([encode_pixels(self.models, self.runtime, part) for part in parts])
        return sample_latents(moments, keys) * self.models.vae.config.scaling_factor


@torch.no_grad()
def encode_pixels(models: LoadedModels, runtime: Runtime, pixels: Tensor) -> Tensor:
    """Return the moments (B, 8, H/8, W/8) of pixels (B, 3, H, W) in [-1, 1], in the VAE's type on its device.

    A picture for which the VAE overflows in half precision is encoded in float32. What is not finite even so
    is returned as it is.
    """
    vae = models.vae
    pixels = pixels.to(runtime.device)
    moments = vae.encode(pixels.to(runtime.vae_dtype)).latent_dist.parameters
    overflowed = ~torch.isfinite(moments).flatten(1).all(dim=1)
    if runtime.vae_dtype is not torch.float32 and bool(overflowed.any()):
        logger.warning("the VAE overflows in half precision and is run in float32: --no_half_vae does so at once")
        vae.to(torch.float32)
        moments[overflowed] = vae.encode(pixels[overflowed].float()).latent_dist.parameters.to(moments.dtype)
        vae.to(runtime.vae_dtype)  # its weights were of this type, so nothing is lost
    return moments
