"""The loop of a training: from a batch to its loss, from losses to a step, and what happens between steps.

The path from latents to loss is `batch_loss`; a step is `Trainer.step`. Everything that a batch needs is a
function of its position, so nothing here keeps random state.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from library.config.options import to_toml
from library.config.train import TrainConfig
from library.data.dataset import Batch, BatchRequest, RunPlan
from library.diffusion.losses import per_sample_loss, target_for, timestep_weights
from library.diffusion.noise import draw_noise, draw_timesteps, perturbed_noise, sample_latents
from library.diffusion.schedule import NoiseSchedule
from library.errors import UserError
from library.models.loading import LoadedModels
from library.models.text_encoding import encode_text
from library.optim.optimizers import current_rates
from library.training import checkpoints, state
from library.training.interruption import StopRequest
from library.training.metadata import file_metadata
from library.training.network_protocol import TrainableNetwork
from library.training.preview import Preview
from library.training.runtime import SAVE_DTYPES, Runtime, average_gradients, seed_micro_batch
from library.weights_io import file_legacy_hash, file_sha256, replacing

logger = logging.getLogger(__name__)


def batch_loss(
    batch: Batch,
    models: LoadedModels,
    schedule: NoiseSchedule,
    config: TrainConfig,
    runtime: Runtime,
    *,
    train_text: bool,
) -> Tensor:
    """Return the mean loss of one batch (0-D, float32)."""
    # Keyed by seed, epoch and sample: neither the batch nor the process it falls to changes what is drawn.
    keys = [(config.run.seed, batch.epoch, *sample) for sample in batch.samples]
    latents = batch_latents(batch, keys, models, config, runtime)  # (B, 4, H/8, W/8)
    noise = draw_noise(latents, keys, config.loss)
    timesteps = draw_timesteps(keys, *config.loss.timestep_range).to(runtime.device)
    noisy = schedule.add_noise(latents, perturbed_noise(noise, keys, config.loss), timesteps)

    with runtime.autocast():
        with torch.set_grad_enabled(train_text):
            limits = {"max_tokens": config.text.max_token_length, "clip_skip": config.text.clip_skip}
            text = encode_text(models, batch.captions, **limits)
        prediction = models.unet(noisy.to(runtime.dtype), timesteps, **text.unet_arguments(runtime.dtype)).sample

    target = target_for(latents, noise, timesteps, schedule, predicts_v=models.predicts_v)
    losses = per_sample_loss(prediction, target, timesteps, schedule, config.loss)  # (B,)
    losses = losses * batch.loss_weights.to(runtime.device)
    losses = losses * timestep_weights(timesteps, schedule, config.loss, predicts_v=models.predicts_v)
    return losses.mean()


def batch_latents(batch: Batch, keys: list, models: LoadedModels, config: TrainConfig, runtime: Runtime) -> Tensor:
    """Return scaled latents (B, 4, H/8, W/8), float32: from the cache, or encoded now."""
    if batch.moments is not None:
        moments = batch.moments.to(runtime.device)
    else:
        parts = batch.pixels.split(config.precision.vae_batch_size)
        moments = torch.cat([encode_pixels(models, runtime, part) for part in parts])
    return sample_latents(moments, keys) * models.vae.config.scaling_factor


@torch.no_grad()
def encode_pixels(models: LoadedModels, runtime: Runtime, pixels: Tensor) -> Tensor:
    """Return the moments (B, 8, H/8, W/8) of pixels (B, 3, H, W) in [-1, 1], in the VAE's type on its device."""
    return models.vae.encode(pixels.to(runtime.device, runtime.vae_dtype)).latent_dist.parameters


@dataclasses.dataclass
class Trainer:
    """The loop: what it works with, and where it is."""

    config: TrainConfig
    runtime: Runtime
    models: LoadedModels
    network: TrainableNetwork
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler | None
    group_names: list[str]
    plan: RunPlan
    schedule: NoiseSchedule
    preview: Preview
    metadata: dict[str, Any]
    hashes: BackgroundHashes
    is_flat: bool  # whether gradients are views of flat ones, to be zeroed in place
    num_done: int = 0  # optimizer steps

    def resume(self, folder: Path) -> None:
        """Take over the state of a run that stopped; the plan begins where it was."""
        position = state.read_position(folder)
        state.restore(state.read_tensors(folder), *self._parts())
        self._losses.extend(position.losses)
        there = [entry for entry in position.columns if all(Path(file).is_file() for file in entry[1])]
        self.preview.columns = [(label, [Path(file) for file in files]) for label, files in there]

    def _parts(self) -> tuple:
        return self.network.network, self.optimizer, self.scheduler, self.runtime.scaler

    def prepare(self) -> None:
        """Collect what the steps use again and again."""
        self.num_done = self.plan.start_step
        self._losses: deque[float] = deque(maxlen=self.plan.batches_per_epoch)
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    def run(self, loader: torch.utils.data.DataLoader) -> None:
        """Train from the first step to the last, with files and pictures on the way; prepare comes before."""
        if self.runtime.is_main and self.config.logs.logging_dir is not None:
            self.runtime.accelerator.init_trackers(self.config.logs.log_tracker_name or "network_train")
        if self.runtime.is_main:
            cut_metrics(checkpoints.metrics_file(self.config.saving), self.num_done)
        self.network.on_epoch_start()
        self._draw_if(not self.num_done and self.preview.due_at_step(0), suffix="e000000", label="start")
        batches = zip(iter(self.plan), loader, strict=True)
        bar = tqdm(
            total=self.plan.num_steps,
            initial=self.num_done,
            desc="steps",
            disable=not self.runtime.is_main,
            smoothing=0.1,
        )
        with bar, StopRequest() as self._stop:
            for epoch, in_epoch in itertools.groupby(batches, key=lambda pair: pair[0].epoch):
                self._run_epoch(epoch, in_epoch, bar)
        self.runtime.accelerator.end_training()

    def _run_epoch(self, epoch: int, batches: Iterator[tuple[BatchRequest, Batch]], bar: tqdm) -> None:
        self.network.on_epoch_start()
        losses: list[float] = []
        for step, group in itertools.groupby(batches, key=lambda pair: pair[0].step):
            losses += self.step(step, [batch for _, batch in group])
            bar.update()
            bar.set_postfix(avr_loss=f"{sum(self._losses) / len(self._losses):.4g}", refresh=False)
            self._after_step(epoch)
            if self.num_done % self.plan.steps_per_epoch:
                self._stop_if_asked(epoch)
        self._log({"loss/epoch_average": sum(losses) / len(losses)})
        self._after_epoch(epoch)
        self._stop_if_asked(epoch)  # an epoch that is through has its file and its pictures first

    def step(self, step: int, batches: list[Batch]) -> list[float]:
        """Make one optimizer step from the mean gradient of some micro-batches; return their losses."""
        losses = []
        for index, batch in enumerate(batches):
            seed_micro_batch(self.config.run.seed, step, index, self.runtime.rank)
            self.network.on_step_start()
            loss = batch_loss(
                batch,
                self.models,
                self.schedule,
                self.config,
                self.runtime,
                train_text=self.network.trains_text_encoder,
            )
            self.runtime.scaler.scale(loss / len(batches)).backward()
            losses.append(loss.detach())
        # One wait for the device in a step; before the update, so that what is not finite never enters a weight.
        values = torch.stack(losses).tolist()
        check_finite(values, batches, step)

        average_gradients(self._parameters, self.runtime.num_processes)
        advanced = self._update()
        rates = current_rates(self.optimizer)
        if advanced and self.scheduler is not None:
            self.scheduler.step()
        if self.config.network.scale_weight_norms:
            self._scale_norms()
        self.num_done += 1
        self._losses.extend(values)
        self._log_step(values, rates)
        return values

    def _update(self) -> bool:
        """Clip and apply the gradients; return False where the scaler found an overflow and left the step out."""
        scaler, scale = self.runtime.scaler, self.runtime.scaler.get_scale()
        scaler.unscale_(self.optimizer)
        if self.config.optimizer.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self._parameters, self.config.optimizer.max_grad_norm, foreach=True)
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad(set_to_none=not self.is_flat)
        return scaler.get_scale() >= scale

    def _scale_norms(self) -> None:
        result = self.network.scale_norms(self.config.network.scale_weight_norms, self.runtime.device)
        if result is not None:
            names = ("max_norm/keys_scaled", "norm/avg_key_norm", "max_norm/max_key_norm")
            self._log(dict(zip(names, result, strict=True)))

    # ---- between steps --------------------------------------------------------------------------------------

    def _after_step(self, epoch: int) -> None:
        done, saving = self.num_done, self.config.saving
        self._draw_if(self.preview.due_at_step(done), suffix=f"{done:06d}", label=f"step {done}")
        if checkpoints.saves_step(saving, done):
            path = checkpoints.step_file(saving, done)
            self.save(path, epoch=epoch - 1)
            self._remove(checkpoints.outdated_step_file(saving, done, saving.save_last_n_steps))
            if self.config.state.save_state:
                keep = self.config.state.save_last_n_steps_state or saving.save_last_n_steps
                self.save_state(path, epoch)
                self._remove_state(checkpoints.outdated_step_file(saving, done, keep))

    def _after_epoch(self, epoch: int) -> None:
        saving, num_epochs = self.config.saving, self.plan.num_epochs
        if checkpoints.saves_epoch(saving, epoch, num_epochs):
            path = checkpoints.epoch_file(saving, epoch)
            self.save(path, epoch=epoch)
            self._remove(checkpoints.outdated_epoch_file(saving, epoch, num_epochs, saving.save_last_n_epochs))
        self._draw_if(self.preview.due_at_epoch(epoch), suffix=f"e{epoch:06d}", label=f"epoch {epoch}")
        if checkpoints.saves_epoch(saving, epoch, num_epochs) and self.config.state.save_state:
            keep = self.config.state.save_last_n_epochs_state or saving.save_last_n_epochs
            self.save_state(path, epoch)  # after the pictures, which it knows of
            self._remove_state(checkpoints.outdated_epoch_file(saving, epoch, num_epochs, keep))

    def _draw_if(self, is_due: bool, *, suffix: str, label: str) -> None:
        if is_due and self.runtime.is_main:
            self.preview.draw(self.models, self.network, self.runtime, suffix=suffix, label=label)
        if is_due:
            self.runtime.barrier()

    def save(self, path: Path, *, epoch: int) -> None:
        """Write the network's file with its metadata."""
        if not self.runtime.is_main:
            return
        metadata = file_metadata(
            self.metadata | self.hashes.values(),
            self.config,
            self.models.family,
            predicts_v=self.models.predicts_v,
            resolution=self.plan.sets[0].options.resolution,
            step=self.num_done,
            epoch=epoch,
        )
        self.network.save(path, SAVE_DTYPES[self.config.saving.save_precision], metadata)

    def save_state(self, file: Path, epoch: int) -> None:
        """Write the state that belongs to a saved file; the processes agree in everything, so the first one does."""
        if self.runtime.is_main:
            position = state.Position(
                current_step=self.num_done,
                current_epoch=epoch,
                seed=self.config.run.seed,
                losses=tuple(self._losses),
                columns=tuple((label, tuple(map(str, files))) for label, files in self.preview.columns),
            )
            state.write_state(
                checkpoints.state_folder(file), state.collect(*self._parts()), position, to_toml(self.config)
            )

    def _remove_state(self, file: Path | None) -> None:
        if file is not None and self.runtime.is_main:
            shutil.rmtree(checkpoints.state_folder(file), ignore_errors=True)

    def _remove(self, path: Path | None) -> None:
        if path is not None and self.runtime.is_main:
            path.unlink(missing_ok=True)

    def _stop_if_asked(self, epoch: int) -> None:
        """Save and raise KeyboardInterrupt if a signal came; a run that is through just ends."""
        if not self._stop.asked(self.runtime) or self.num_done >= self.plan.num_steps:
            return
        path = checkpoints.step_file(self.config.saving, self.num_done)
        self.save(path, epoch=epoch - 1)
        self.save_state(path, epoch)
        logger.warning("stopped after step %d: what was learned is in %s", self.num_done, path)
        logger.warning("the same command with this goes on: --resume %s", checkpoints.state_folder(path))
        raise KeyboardInterrupt

    # ---- logs -----------------------------------------------------------------------------------------------

    def _log_step(self, losses: list[float], rates: list[float]) -> None:
        values = {"loss/current": losses[-1], "loss/average": sum(self._losses) / len(self._losses)}
        named = zip(self.group_names, rates, strict=True)
        self._log(values | {f"lr/{name}": rate for name, rate in named})

    def _log(self, values: dict[str, float]) -> None:
        if not self.runtime.is_main:
            return
        with checkpoints.metrics_file(self.config.saving).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.num_done, "time": round(time.time(), 3), **values}) + "\n")
        if self.config.logs.logging_dir is not None:
            self.runtime.accelerator.log(values, step=self.num_done)


def cut_metrics(path: Path, num_done: int) -> None:
    """Keep of a metrics file what was before the run begins or goes on: lines of up to num_done steps."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.endswith("}") and 0 < json.loads(line)["step"] <= num_done]
        with replacing(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def check_finite(losses: list[float], batches: list[Batch], step: int) -> None:
    """Raise UserError that names step and pictures where a loss is not a finite number."""
    for loss, batch in zip(losses, batches, strict=True):
        if not abs(loss) < float("inf"):
            names = ", ".join(batch.names)
            raise UserError(
                f"the loss became {loss} in step {step + 1} with {names}: nothing was overwritten; "
                "try a lower learning rate, --no_half_vae, or bf16 in place of fp16"
            )


class BackgroundHashes:
    """Hashes of the base model's files, computed while training goes on; the first save waits for them.

    Only the process that saves needs them.
    """

    def __init__(self, config: TrainConfig, *, is_needed: bool) -> None:
        files = {"sd_model": Path(config.model.pretrained_model_name_or_path), "vae": config.model.vae}
        self._files = files if is_needed else {}
        self._values: dict[str, str] = {}
        self._thread = threading.Thread(target=self._compute, daemon=True)
        self._thread.start()

    def _compute(self) -> None:
        for name, path in self._files.items():
            if path is not None and path.is_file():
                self._values[f"ss_{name}_hash"] = file_legacy_hash(path)
                self._values[f"ss_new_{name}_hash"] = file_sha256(path)

    def values(self) -> dict[str, str]:
        """Return the ss_*_hash values."""
        self._thread.join()
        return self._values
