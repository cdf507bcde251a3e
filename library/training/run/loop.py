"""The loop of a training: from losses to a step, and what happens between steps.

A step is `Trainer.step`; the path from a batch to its loss is in `objective`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import math
import shutil
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from library.config.config_file import to_toml
from library.config.train import TrainConfig
from library.data.dataset import Batch, BatchRequest, RunPlan
from library.errors import UserError
from library.files import disk_errors, file_sha256, replacing
from library.networks.trainable import TrainableNetwork
from library.optim.optimizers import adapted_rates, averaged_weights, current_rates
from library.randomness import seed_for
from library.training.measure.validation import Validation
from library.training.record import run_files
from library.training.record.metadata import file_metadata
from library.training.record.preview import Preview
from library.training.record.tracking import log_pictures, start_trackers
from library.training.record.upload import Uploads
from library.training.run import state
from library.training.run.interruption import StopRequest
from library.training.run.objective import Objective
from library.training.run.runtime import SAVE_DTYPES, Runtime, average_gradients, seed_micro_batch
from library.weight_file import file_legacy_hash

logger = logging.getLogger(__name__)


MOST_LEFT_OUT = 10  # steps in a row that are not finite before a run with --on_nan skip gives up


@dataclasses.dataclass
class Trainer:
    """The loop: what it works with, and where it is."""

    config: TrainConfig
    runtime: Runtime
    objective: Objective
    network: TrainableNetwork
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler | None
    group_names: list[str]
    plan: RunPlan
    preview: Preview
    validation: Validation | None
    metadata: dict[str, Any]
    hashes: BackgroundHashes
    uploads: Uploads
    is_flat: bool  # whether gradients are views of flat ones, to be zeroed in place
    num_done: int = 0  # optimizer steps
    best: tuple[float, int] | None = None  # lowest loss of the validation, and the step of it

    def resume(self, folder: Path) -> None:
        """Take over the state of a run that stopped; the plan begins where it was."""
        position = state.read_position(folder)
        state.restore(state.read_tensors(folder), *self._parts())
        self._losses.extend(position.losses)
        self.best = position.best
        there = [entry for entry in position.columns if all(Path(file).is_file() for file in entry[1])]
        self.preview.columns = [(label, [Path(file) for file in files]) for label, files in there]

    def _parts(self) -> tuple:
        return self.network, self.optimizer, self.scheduler, self.runtime.scaler

    def prepare(self) -> None:
        """Collect what the steps use again and again."""
        self.num_done = self.plan.start_step
        self._left_out = 0  # steps that were not finite, in a row
        self._losses: deque[float] = deque(maxlen=self.plan.batches_per_epoch)
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    def run(self, loader: torch.utils.data.DataLoader) -> None:
        """Train from the first step to the last, with files and pictures on the way; prepare comes before."""
        if self.runtime.is_main:
            start_trackers(self.config, self.runtime.accelerator)
            cut_metrics(run_files.metrics_file(self.config.saving), self.num_done)
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
            bar.set_postfix(avr_loss=f"{mean(self._losses):.4g}", refresh=False)
            self._after_step(epoch)
            if self.num_done % self.plan.steps_per_epoch:
                self._stop_if_asked(epoch)
        if losses:
            self._log({"loss/epoch_average": mean(losses)})
        self._after_epoch(epoch)
        self._stop_if_asked(epoch)  # an epoch that is through has its file and its pictures first

    def step(self, step: int, batches: list[Batch]) -> list[float]:
        """Make one optimizer step from the mean gradient of some micro-batches; return their losses."""
        losses = []
        self.network.on_optimizer_step(seed_for(self.config.run.seed, "step", step))
        for index, batch in enumerate(batches):
            seed_micro_batch(self.config.run.seed, step, index, self.runtime.rank)
            self.network.on_step_start()
            loss = self.objective.training_loss(batch)
            self.runtime.scaler.scale(loss / len(batches)).backward()
            losses.append(loss.detach())
        average_gradients(self._parameters, self.runtime.num_processes)
        norm = self._clip()
        # One wait for the device in a step; before the update, so that what is not finite never enters a weight.
        *values, size = torch.stack([*losses, norm]).tolist()
        problem = self._not_finite(values, size, batches)
        advanced = self._update() if problem is None else self._leave_out(problem)
        rates = current_rates(self.optimizer)
        if advanced and self.scheduler is not None:
            self.scheduler.step()
        norms = self._scale_norms() if self.config.network.scale_weight_norms else self.network.norms()
        self.num_done += 1
        values = [value for value in values if math.isfinite(value)]  # of a step that was left out
        self._losses.extend(values)
        self._log_step(values, rates, norms)
        return values

    def _clip(self) -> Tensor:
        """Clip the gradients to --max_grad_norm; return their norm before (0-D)."""
        self.runtime.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None], foreach=True)
        if self.config.optimizer.max_grad_norm:
            limit = self.config.optimizer.max_grad_norm
            torch.nn.utils.clip_grads_with_norm_(self._parameters, limit, norm, foreach=True)
        self.network.after_clipping()
        return norm.float()

    def _not_finite(self, losses: list[float], norm: float, batches: list[Batch]) -> str | None:
        """Return what is not a finite number and with which pictures, or None.

        A gradient that overflows under a scaler is the scaler's business: it leaves the step out.
        """
        bad = [(loss, batch) for loss, batch in zip(losses, batches, strict=True) if not math.isfinite(loss)]
        if bad:
            return f"the loss became {bad[0][0]} in step {self.num_done + 1} with {described(bad[0][1])}"
        if not math.isfinite(norm) and not self.runtime.scaler.is_enabled():
            pictures = "; ".join(described(batch) for batch in batches)
            return f"the gradient became {norm} in step {self.num_done + 1} with {pictures}"
        return None

    def _update(self) -> bool:
        """Apply the gradients; return False where the scaler found an overflow and left the step out."""
        self._left_out = 0
        scaler, scale = self.runtime.scaler, self.runtime.scaler.get_scale()
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad(set_to_none=not self.is_flat)
        return scaler.get_scale() >= scale

    def _leave_out(self, problem: str) -> bool:
        """Drop the gradients of a step that is not finite, or end the run, as --on_nan says; return False."""
        if self.config.run.on_nan == "stop":
            raise UserError(
                f"{problem}: nothing was overwritten; try a lower learning rate, --no_half_vae, bf16 in place of "
                "fp16, or --on_nan skip"
            )
        self._left_out += 1
        if self._left_out >= MOST_LEFT_OUT:
            raise UserError(
                f"{problem}, as in the {MOST_LEFT_OUT - 1} steps before: the run does not come back from it"
            )
        logger.warning("%s; the step is left out", problem)
        self.runtime.scaler.update()
        self.optimizer.zero_grad(set_to_none=not self.is_flat)
        return False

    def _scale_norms(self) -> dict[str, float]:
        result = self.network.scale_norms(self.config.network.scale_weight_norms, self.runtime.device)
        names = ("max_norm/keys_scaled", "norm/avg_key_norm", "max_norm/max_key_norm")
        return {} if result is None else dict(zip(names, result, strict=True))

    # ---- between steps --------------------------------------------------------------------------------------

    def _after_step(self, epoch: int) -> None:
        done, saving = self.num_done, self.config.saving
        if self.validation is not None and self.validation.due_at_step(done):
            self._validate("step")
        self._draw_if(self.preview.due_at_step(done), suffix=f"{done:06d}", label=f"step {done}")
        if run_files.saves_step(saving, done):
            path = run_files.step_file(saving, done)
            self.save(path, epoch=epoch - 1)
            self._remove(run_files.outdated_step_file(saving, done, saving.save_last_n_steps))
            if self.config.state.save_state:
                keep = self.config.state.save_last_n_steps_state or saving.save_last_n_steps
                self.save_state(path, epoch)
                self._remove_state(run_files.outdated_step_file(saving, done, keep))

    def _after_epoch(self, epoch: int) -> None:
        saving, num_epochs = self.config.saving, self.plan.num_epochs
        if self.validation is not None and self.validation.due_at_epoch(epoch):
            self._validate("epoch")
        if run_files.saves_epoch(saving, epoch, num_epochs):
            path = run_files.epoch_file(saving, epoch)
            self.save(path, epoch=epoch)
            self._remove(run_files.outdated_epoch_file(saving, epoch, num_epochs, saving.save_last_n_epochs))
        self._draw_if(self.preview.due_at_epoch(epoch), suffix=f"e{epoch:06d}", label=f"epoch {epoch}")
        if run_files.saves_epoch(saving, epoch, num_epochs) and self.config.state.save_state:
            keep = self.config.state.save_last_n_epochs_state or saving.save_last_n_epochs
            self.save_state(path, epoch)  # after the pictures, which it knows of
            self._remove_state(run_files.outdated_epoch_file(saving, epoch, num_epochs, keep))

    def _draw_if(self, is_due: bool, *, suffix: str, label: str) -> None:
        if is_due and self.runtime.is_main:
            with self._evaluation():
                self.preview.draw(self.objective, self.runtime, suffix=suffix, label=label)
            log_pictures(self.runtime.accelerator, self.preview.columns[-1][1], self.num_done)
        if is_due:
            self.runtime.barrier()

    @contextlib.contextmanager
    def _evaluation(self) -> Iterator[None]:
        """Within it the network is what a reader of its file will have: no dropouts, averaged weights."""
        self.network.eval()
        with averaged_weights(self.optimizer):
            yield
        self.network.train()

    def _validate(self, kind: str) -> None:
        """Measure the loss on what is held out; kind is "step" or "epoch"."""
        with self._evaluation():
            loss = self.validation.measure(self.objective, self.runtime)
        if self.best is None or loss < self.best[0]:
            self.best = (loss, self.num_done)
        logger.info("validation after step %d: %.4g (lowest: %.4g, step %d)", self.num_done, loss, *self.best)
        self._log(
            {f"loss/validation/{kind}_average": loss, f"loss/validation/{kind}_divergence": loss - mean(self._losses)}
        )

    def save(self, path: Path, *, epoch: int) -> None:
        """Write the network's file with its metadata."""
        if not self.runtime.is_main:
            return
        best = dict(zip(("ss_best_validation_loss", "ss_best_validation_step"), self.best or (), strict=False))
        metadata = file_metadata(
            self.metadata | self.hashes.values() | best,
            self.config,
            self.objective.base.family,
            predicts_v=self.objective.base.predicts_v,
            resolution=self.plan.sets[0].options.resolution,
            step=self.num_done,
            epoch=epoch,
        )
        with self._evaluation():
            self.network.save(path, SAVE_DTYPES[self.config.saving.save_precision], metadata)
        self.uploads.add(path)

    def save_state(self, file: Path, epoch: int) -> None:
        """Write the state that belongs to a saved file; the processes agree in everything, so the first one does."""
        if self.runtime.is_main:
            position = state.Position(
                current_step=self.num_done,
                current_epoch=epoch,
                seed=self.config.run.seed,
                losses=tuple(self._losses),
                best=self.best,
                columns=tuple((label, tuple(map(str, files))) for label, files in self.preview.columns),
            )
            state.write_state(
                run_files.state_folder(file), state.collect(*self._parts()), position, to_toml(self.config)
            )
            if self.config.hub.save_state_to_huggingface:
                self.uploads.add(run_files.state_folder(file))

    def _remove_state(self, file: Path | None) -> None:
        if file is not None and self.runtime.is_main:
            self.uploads.after(lambda: shutil.rmtree(run_files.state_folder(file), ignore_errors=True))

    def _remove(self, path: Path | None) -> None:
        if path is not None and self.runtime.is_main:
            self.uploads.after(lambda: path.unlink(missing_ok=True))

    def _stop_if_asked(self, epoch: int) -> None:
        """Save and raise KeyboardInterrupt if a signal came; a run that is through just ends."""
        if not self._stop.asked(self.runtime) or self.num_done >= self.plan.num_steps:
            return
        path = run_files.step_file(self.config.saving, self.num_done)
        self.save(path, epoch=epoch - 1)
        self.save_state(path, epoch)
        logger.warning("stopped after step %d: what was learned is in %s", self.num_done, path)
        logger.warning("the same command with this goes on: --resume %s", run_files.state_folder(path))
        self.uploads.wait()
        raise KeyboardInterrupt

    # ---- logs -----------------------------------------------------------------------------------------------

    def _log_step(self, losses: list[float], rates: list[float], norms: dict[str, float]) -> None:
        values = {"loss/current": losses[-1], "loss/average": mean(self._losses)} if losses else {"left_out": 1}
        values |= {f"lr/{name}": rate for name, rate in zip(self.group_names, rates, strict=True)}
        adapted = adapted_rates(self.optimizer)
        values |= {f"lr/d*lr/{name}": rate for name, rate in zip(self.group_names, adapted, strict=False)}
        self._log(values | norms)

    def _log(self, values: dict[str, float]) -> None:
        if not self.runtime.is_main:
            return
        path = run_files.metrics_file(self.config.saving)
        with disk_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.num_done, "time": round(time.time(), 3), **values}) + "\n")
        self.runtime.accelerator.log(values, step=self.num_done)


def cut_metrics(path: Path, num_done: int) -> None:
    """Keep of a metrics file what was before the run begins or goes on: lines of up to num_done steps."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.endswith("}") and 0 < json.loads(line)["step"] <= num_done]
        with replacing(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def mean(values: Collection[float]) -> float:
    """Return the mean; NaN of nothing, as when all steps were left out."""
    return sum(values) / len(values) if values else math.nan


def described(batch: Batch) -> str:
    """Return the pictures of a batch with their captions, for a message."""
    pairs = zip(batch.names, batch.captions, strict=True)
    return ", ".join(f"{name} ({caption!r})" for name, caption in pairs)


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
