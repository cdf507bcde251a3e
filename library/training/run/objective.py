"""From a batch to its loss. Everything random is a function of the batch's position, so nothing here keeps state."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from library.config.loss import LossConfig
from library.data.batches import Batch
from library.diffusion.losses import per_sample_loss, target_for, timestep_weights
from library.diffusion.noise import Key, perturbed_noise, sample_latents, sample_noise, sample_timesteps
from library.diffusion.schedule import NoiseSchedule
from library.models.base import BaseModel
from library.models.conditioning import Conditioner, Conditioning, TextOptions
from library.models.latent_encoder import LatentEncoder
from library.models.precision import Types
from library.networks.trainable import TrainableNetwork


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The inputs of the U-Net before noise is added; B pictures."""

    batch: Batch
    latents: Tensor  # (B, 4, H/8, W/8), scaled
    noise: Tensor  # (B, 4, H/8, W/8)
    text: Conditioning  # in the U-Net's type
    sizes: Tensor  # (B, 6), float32
    masks: Tensor | None  # (B, 1, H/8, W/8)
    weights: Tensor  # (B,)


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss of a run: base model with the network in it, encoders of its inputs, noise schedule, options."""

    base: BaseModel
    network: TrainableNetwork
    encoder: LatentEncoder
    conditioner: Conditioner
    text: TextOptions
    schedule: NoiseSchedule
    loss: LossConfig
    types: Types
    device: torch.device
    seed: int

    def training_loss(self, batch: Batch) -> Tensor:
        """Return the mean loss of a batch at timesteps sampled for it (0-D, float32)."""
        # Keyed by seed, epoch and sample, so that random numbers depend neither on the batch nor on the process.
        keys = [(self.seed, batch.epoch, *sample) for sample in batch.samples]
        timesteps = sample_timesteps(keys, *self.loss.timestep_range).to(self.device)
        return self.losses(self.prepare(batch, keys), keys, timesteps).mean()

    def prepare(self, batch: Batch, keys: Sequence[Key]) -> Prepared:
        """Return a batch as latents, noise and text conditioning; the random parts come from the keys."""
        latents = self._latents(batch, keys)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.network.trains_text_encoder):
            text = self._encode(batch.captions)
        # On the device once, for all timesteps at which the losses are measured.
        return Prepared(
            batch=batch,
            latents=latents,
            noise=sample_noise(latents, keys, self.loss),
            text=text,
            sizes=batch.sizes.to(self.device, torch.float32),
            masks=None if batch.masks is None else batch.masks.to(self.device),
            weights=batch.loss_weights.to(self.device),
        )

    def losses(self, prepared: Prepared, keys: Sequence[Key], timesteps: Tensor) -> Tensor:
        """Return the weighted loss of each sample at its timestep, (B,), float32."""
        options, schedule, predicts_v = self.loss, self.schedule, self.base.predicts_v
        latents, noise = prepared.latents, prepared.noise
        noisy = schedule.add_noise(latents, perturbed_noise(noise, keys, options), timesteps)
        prediction = self._predict(noisy, timesteps, prepared.text, prepared.sizes)
        target = target_for(latents, noise, timesteps, schedule, predicts_v=predicts_v)
        if bool(prepared.batch.preserved.any()):
            preserved = prepared.batch.preserved.to(target.device)[:, None, None, None]
            target = torch.where(preserved, self._base_prediction(noisy, timesteps, prepared), target)
        losses = per_sample_loss(prediction, target, timesteps, schedule, options, masks=prepared.masks)
        return losses * prepared.weights * timestep_weights(timesteps, schedule, options, predicts_v=predicts_v)

    def _encode(self, captions: Sequence[str]) -> Conditioning:
        with self.types.autocast(self.device):
            return self.conditioner.encode(captions, self.text).to(self.device, self.types.unet)

    def _predict(self, noisy: Tensor, timesteps: Tensor, text: Conditioning, sizes: Tensor) -> Tensor:
        """Return the U-Net's output, (B, 4, H/8, W/8)."""
        dtype = self.types.unet
        with self.types.autocast(self.device):
            return self.base.unet(noisy.to(dtype), timesteps, **text.for_unet(sizes)).sample

    @torch.no_grad()
    def _base_prediction(self, noisy: Tensor, timesteps: Tensor, prepared: Prepared) -> Tensor:
        """Return what the base model predicts without the network, (B, 4, H/8, W/8), float32."""
        with self.network.absent():
            text = self._encode(prepared.batch.captions) if self.network.trains_text_encoder else prepared.text
            return self._predict(noisy, timesteps, text, prepared.sizes).float()

    def _latents(self, batch: Batch, keys: Sequence[Key]) -> Tensor:
        """Return scaled latents (B, 4, H/8, W/8), float32: from the cache, or encoded now."""
        if batch.moments is not None:
            moments = batch.moments.to(self.device)
        else:
            assert batch.pixels is not None  # where there are no moments
            moments = self.encoder.moments(batch.pixels)
        return sample_latents(moments, keys) * self.encoder.scaling_factor
