"""From a batch to its loss. Everything random is a function of the batch's position, so nothing here keeps state.

First all tensors of a batch are made on the CPU (`Objective.draw`) and sent to the device; the loss then reads nothing
that is not there, so that the host does not wait for the device, and the same work can be recorded and repeated.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from library.config.loss import LossConfig
from library.config.values import LATENT_SCALE
from library.data.batches import Batch
from library.diffusion.losses import LossTables, loss_tables, per_sample_loss, target_for
from library.diffusion.noise import (
    Key,
    latents_of,
    perturbation,
    posterior_noise,
    reads_latents,
    sample_noise,
    sample_timesteps,
)
from library.diffusion.schedule import NoiseSchedule
from library.models.base import BaseModel
from library.models.conditioning import Conditioner, Conditioning, TextOptions, TokenWindows, encode_windows
from library.models.latent_encoder import LatentEncoder
from library.models.precision import Types
from library.models.sending import sent
from library.networks.trainable import TrainableNetwork

LATENT_CHANNELS = 4


class Pictures(NamedTuple):
    """The pictures of a batch, (B, ...): moments of the VAE (8, H/8, W/8), or pixels (3, H, W) in [-1, 1]."""

    moments: Tensor | None
    pixels: Tensor | None


class Inputs(NamedTuple):
    """What the losses of B pictures are computed from; only tensors, here or on the device."""

    pictures: Pictures
    unit: Tensor  # (B, 4, H/8, W/8), which samples the posterior
    noise: Tensor | None  # (B, 4, H/8, W/8); None if it depends on latents that are not known yet
    perturbation: Tensor | None  # (B, 4, H/8, W/8), further noise of the U-Net's input
    text: TokenWindows | Conditioning
    sizes: Tensor  # (B, 6), float32
    masks: Tensor | None  # (B, 1, H/8, W/8)
    weights: Tensor  # (B,)
    preserved: Tensor | None  # (B, 1, 1, 1), bool: whose target is the base model's own prediction; None: nobody's


class StepInputs(NamedTuple):
    """The inputs of a training loss, and the timesteps that were sampled for it, (B,)."""

    inputs: Inputs
    timesteps: Tensor


class Prepared(NamedTuple):
    """The inputs of the U-Net before noise is added, on the device; B pictures."""

    latents: Tensor  # (B, 4, H/8, W/8), scaled
    noise: Tensor  # (B, 4, H/8, W/8), of the target
    input_noise: Tensor  # (B, 4, H/8, W/8), of the U-Net's input
    text: Conditioning  # in the U-Net's type


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

    @functools.cached_property
    def _tables(self) -> LossTables:
        return loss_tables(self.schedule, self.loss, predicts_v=self.base.predicts_v)

    # ---- on the CPU -----------------------------------------------------------------------------------------

    def draw_step(self, batch: Batch) -> StepInputs:
        """Return all that the training loss of a batch is computed from, under way to the device."""
        # Keyed by seed, epoch and sample, so that random numbers depend neither on the batch nor on the process.
        keys = [(self.seed, batch.epoch, *sample) for sample in batch.samples]
        timesteps = sample_timesteps(keys, *self.loss.timestep_range)
        return StepInputs(self.draw(batch, keys), sent(timesteps, self.device))

    def draw(self, batch: Batch, keys: Sequence[Key]) -> Inputs:
        """Return the inputs of a batch under way to the device; the random ones come from the keys."""
        shape = (LATENT_CHANNELS, *_latent_size(batch))
        unit = posterior_noise(shape, keys)
        noise = None
        if not reads_latents(self.loss):
            noise = sample_noise(shape, keys, self.loss, None)
        elif batch.moments is not None:
            noise = sample_noise(shape, keys, self.loss, self._scaled(batch.moments, unit))
        inputs = Inputs(
            pictures=Pictures(batch.moments, batch.pixels),
            unit=unit,
            noise=noise,
            perturbation=perturbation(shape, keys, self.loss),
            text=self.conditioner.read(batch.captions, self.text),
            sizes=batch.sizes.float(),
            masks=batch.masks,
            weights=batch.loss_weights,
            preserved=batch.preserved[:, None, None, None] if bool(batch.preserved.any()) else None,
        )
        sent_inputs = sent(inputs, self.device)
        if noise is not None:
            return sent_inputs
        # The only one that waits for the device: the offset of the noise follows latents that are encoded there.
        moments = self._moments(sent_inputs.pictures)
        latents = self._scaled(moments, sent_inputs.unit).cpu()
        noise = sent(sample_noise(shape, keys, self.loss, latents), self.device)
        return sent_inputs._replace(noise=noise, pictures=Pictures(moments, None))

    # ---- on the device --------------------------------------------------------------------------------------

    def training_loss(self, step: StepInputs) -> Tensor:
        """Return the mean loss of a batch at timesteps sampled for it (0-D, float32)."""
        return self.losses(step.inputs, self.prepare(step.inputs), step.timesteps).mean()

    def prepare(self, inputs: Inputs) -> Prepared:
        """Return latents, noise and text conditioning, once for all timesteps at which losses are measured."""
        latents = self._scaled(self._moments(inputs.pictures), inputs.unit)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.network.trains_text_encoder):
            text = self._encode(inputs.text)
        noise = inputs.noise
        assert noise is not None  # `draw` has sampled it
        further = inputs.perturbation
        return Prepared(latents, noise, noise if further is None else noise + further, text)

    def losses(self, inputs: Inputs, prepared: Prepared, timesteps: Tensor) -> Tensor:
        """Return the weighted loss of each sample at its timestep, (B,), float32."""
        latents, noise, predicts_v, tables = prepared.latents, prepared.noise, self.base.predicts_v, self._tables
        noisy = self.schedule.add_noise(latents, prepared.input_noise, timesteps)
        prediction = self._predict(noisy, timesteps, prepared.text, inputs.sizes)
        target = target_for(latents, noise, timesteps, self.schedule, predicts_v=predicts_v)
        if inputs.preserved is not None:
            own = self._base_prediction(noisy, timesteps, inputs, prepared)
            target = torch.where(inputs.preserved, own, target)
        thresholds = None if tables.thresholds is None else tables.thresholds[timesteps]
        losses = per_sample_loss(prediction, target, self.loss.loss_type, thresholds, masks=inputs.masks)
        losses = losses * inputs.weights
        return losses if tables.weights is None else losses * tables.weights[timesteps]

    def _encode(self, text: TokenWindows | Conditioning) -> Conditioning:
        if isinstance(text, TokenWindows):
            with self.types.autocast(self.device):
                text = encode_windows(self.base.texts, text, self.text)
        return text.to(self.device, self.types.unet)

    def _predict(self, noisy: Tensor, timesteps: Tensor, text: Conditioning, sizes: Tensor) -> Tensor:
        """Return the U-Net's output, (B, 4, H/8, W/8)."""
        dtype = self.types.unet
        with self.types.autocast(self.device):
            return self.base.unet(noisy.to(dtype), timesteps, **text.for_unet(sizes)).sample

    @torch.no_grad()
    def _base_prediction(self, noisy: Tensor, timesteps: Tensor, inputs: Inputs, prepared: Prepared) -> Tensor:
        """Return what the base model predicts without the network, (B, 4, H/8, W/8), float32."""
        with self.network.absent():
            text = self._encode(inputs.text) if self.network.trains_text_encoder else prepared.text
            return self._predict(noisy, timesteps, text, inputs.sizes).float()

    def _moments(self, pictures: Pictures) -> Tensor:
        """Return mean and log-variance of the latents, (B, 8, H/8, W/8): from the cache, or encoded now."""
        if pictures.moments is not None:
            return pictures.moments
        assert pictures.pixels is not None  # where there are no moments
        return self.encoder.moments(pictures.pixels)

    def _scaled(self, moments: Tensor, unit: Tensor) -> Tensor:
        """Return scaled latents (B, 4, H/8, W/8), float32."""
        return latents_of(moments, unit) * self.encoder.scaling_factor


def _latent_size(batch: Batch) -> tuple[int, int]:
    """Return height and width of the latents of a batch."""
    if batch.moments is not None:
        return batch.moments.shape[2], batch.moments.shape[3]
    assert batch.pixels is not None  # where there are no moments
    return batch.pixels.shape[2] // LATENT_SCALE, batch.pixels.shape[3] // LATENT_SCALE
