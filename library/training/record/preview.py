"""Previews during training: their seeds, their files, and the contact sheet of all of them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

import torch
from PIL import Image

from library.config.prompts import Prompt
from library.config.samplers import SamplerName
from library.files import replacing
from library.models.base import BaseModel
from library.models.memory import bytes_to_decode
from library.models.precision import move
from library.networks.trainable import TrainableNetwork
from library.progress import Bar, step_shown_on
from library.randomness import seed_for
from library.sampling.contact_sheet import draw_sheet, part_title, save_sheet, spread
from library.sampling.previews import PreviewImage, generate_previews, size_of
from library.training.prepare.placing import free_cache, unet_away
from library.training.prepare.speed import uncompiled
from library.training.record.run_files import RunFiles
from library.training.record.tracking import log_pictures
from library.training.run.events import At, Moment
from library.training.run.interruption import StopRequest
from library.training.run.objective import Objective
from library.training.run.runtime import Runtime
from library.training.run.state import TrainState

logger = logging.getLogger(__name__)

SPARE = 5e8  # bytes that kernels and the gaps between allocations take besides what is counted
MOST_COLUMNS = 12  # of the contact sheet: the first and the last previews, and evenly spaced ones between them


@dataclasses.dataclass(frozen=True)
class Preview:
    """Generates previews of the run's prompts; a prompt without a seed has the same one throughout the run."""

    sampler: SamplerName  # for prompts without their own
    prompts: Sequence[Prompt]
    files: RunFiles
    objective: Objective  # whose base model has the network in it
    state: TrainState
    runtime: Runtime
    stop: StopRequest
    counts_epochs: bool  # in names and labels; else steps

    def generate(self, moment: Moment) -> None:
        """Generate all prompts and update the contact sheet on the first process; the others wait.

        This does not change the training, because each micro-batch is seeded by its position. A stop leaves out the
        rest of the pictures.
        """
        if self.runtime.is_main:
            label, paths = self.label_of(moment), list[Path]()
            device, types = self.runtime.device, self.runtime.types
            with self.state.evaluation(), types.autocast(device), uncompiled(self.objective.base.unet):
                is_complete = self.stop.cut_short(lambda: self._draw(moment, label, paths))
            if not is_complete:
                logger.warning("previews (%s): %d of %d, because of the stop", label, len(paths), len(self.prompts))
            if paths:
                moment.progress.columns.append((label, paths))
                self._update_sheet(moment.progress.columns)
                log_pictures(self.runtime.accelerator, paths, moment.progress.step)
        self.runtime.barrier()

    def label_of(self, moment: Moment) -> str:
        """Return the label of a column of the contact sheet."""
        if moment.at is At.START:
            return "start"
        return f"epoch {moment.progress.epoch}" if self.counts_epochs else f"step {moment.progress.step}"

    def _draw(self, moment: Moment, label: str, paths: list[Path]) -> None:
        """Generate all prompts, and add each file to paths once it is written."""

        base, conditioner, clip_skip = self.objective.base, self.objective.conditioner, self.objective.text.clip_skip
        seeds = preview_seeds(self.prompts, moment.progress.seed)
        decoding = Decoding(base, self.state.network, self.prompts, self.runtime.device)
        bar: Bar[None] = Bar(total=len(self.prompts), desc=f"generating ({label})", unit="picture", leave=False)
        with bar:
            for picture in generate_previews(
                base,
                conditioner,
                self.prompts,
                seeds,
                sampler=self.sampler,
                clip_skip=clip_skip,
                decoding=decoding,
                on_step=step_shown_on(bar),
            ):
                paths.append(self._save(picture, moment))
                bar.update()

    def _save(self, picture: PreviewImage, moment: Moment) -> Path:
        progress = moment.progress
        by_epoch = self.counts_epochs or moment.at is At.START
        count = f"e{progress.epoch:06d}" if by_epoch else f"{progress.step:06d}"
        path = self.files.preview(count, picture.index, datetime.now().strftime("%Y%m%d%H%M%S"), picture.seed)
        with replacing(path) as temporary:
            picture.image.save(temporary, format="PNG")
        return path

    def _update_sheet(self, columns: list[tuple[str, list[Path]]]) -> None:
        chosen = spread(columns, MOST_COLUMNS)
        cells = [[_read(paths, row) for _, paths in chosen] for row in range(len(self.prompts))]
        labels = [prompt.prompt for prompt in self.prompts]
        title = part_title(len(chosen), len(columns), "preview")
        save_sheet(draw_sheet(cells, labels, [label for label, _ in chosen], title=title), self.files.contact_sheet)


@dataclasses.dataclass(frozen=True)
class Decoding:
    """The context in which pictures of prompts are decoded: the VAE is on a device, and there is room for its work.

    The VAE's activations at 1024 x 1024 are half as large as the U-Net of SDXL. If they do not fit beside it, the U-Net
    waits on the CPU, which changes no bit of a picture, while decoding in tiles would.
    """

    base: BaseModel
    network: TrainableNetwork
    prompts: Sequence[Prompt]
    device: torch.device

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        vae, before = self.base.vae, self.base.vae.device
        with unet_away(self.base, self.network, self.device) if self._is_short() else contextlib.nullcontext():
            move(vae, self.device)
            try:
                yield
            finally:
                move(vae, before)
                free_cache(self.device)  # the VAE's activations are large, and the U-Net does not need them

    def _is_short(self) -> bool:
        free = free_memory(self.device)
        return free is not None and free < self._needed + SPARE

    @functools.cached_property
    def _needed(self) -> int:
        sizes = [size_of(prompt, self.base) for prompt in self.prompts]
        return bytes_to_decode(self.base.vae, max(sizes, key=math.prod))


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that can be had on a GPU of its own memory; None for another device, or where it is unknown.

    These are what the GPU has left, or what a limit of torch leaves, and what torch reserved and does not use.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    index = torch.cuda.current_device() if device.index is None else device.index  # the next call takes no other form
    allowed = int(torch.cuda.get_per_process_memory_fraction(index) * total)
    return min(free, allowed - reserved) + reserved - torch.cuda.memory_allocated(device)


def preview_seeds(prompts: Sequence[Prompt], seed: int) -> list[int]:
    """Return the seed of each prompt: its own, or one derived from the seed of the run."""
    return [
        seed_for(seed, "preview", index) % 2**32 if prompt.seed is None else prompt.seed
        for index, prompt in enumerate(prompts)
    ]


def _read(paths: Sequence[Path], row: int) -> Image.Image | None:
    """Return a preview; None if it was removed, or its prompt came later than the column."""
    if row >= len(paths) or not paths[row].is_file():
        return None
    with Image.open(paths[row]) as picture:
        return picture.convert("RGB")
