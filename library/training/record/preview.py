"""Pictures during training: with which seeds, where they go, and the contact sheet over all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image

from library.config.prompts import Prompt
from library.config.samplers import SamplerName
from library.files import replacing
from library.models.precision import move
from library.randomness import seed_for
from library.sampling.contact_sheet import draw_sheet, save_sheet
from library.sampling.previews import PreviewImage, generate_previews
from library.training.record.run_files import RunFiles
from library.training.record.tracking import log_pictures
from library.training.run.events import At, Moment
from library.training.run.objective import Objective
from library.training.run.runtime import Runtime
from library.training.run.state import TrainState

Item = TypeVar("Item")

MOST_COLUMNS = 12  # of the contact sheet: first and last sampling, and evenly chosen ones between


@dataclasses.dataclass(frozen=True)
class Preview:
    """Generates pictures of the run's prompts; the seed of a prompt that names none is the same throughout the run."""

    sampler: SamplerName  # of prompts that name none
    prompts: Sequence[Prompt]
    files: RunFiles
    objective: Objective  # whose base model has the network in it
    state: TrainState
    runtime: Runtime

    def generate(self, moment: Moment) -> None:
        """Generate all prompts and bring the contact sheet up to date; the first process does, the others wait.

        No random state of the training is touched, because training seeds each micro-batch by its position.
        """
        if self.runtime.is_main:
            label = label_of(moment)
            with self.state.evaluation():
                paths = self._pictures(moment, label)
            moment.progress.columns.append((label, paths))
            self._update_sheet(moment.progress.columns)
            log_pictures(self.runtime.accelerator, paths, moment.progress.step)
        self.runtime.barrier()

    def _pictures(self, moment: Moment, label: str) -> list[Path]:
        from tqdm import tqdm

        base, runtime, clip_skip = self.objective.base, self.runtime, self.objective.text.clip_skip
        vae_device = base.vae.device
        move(base.vae, runtime.device)
        with runtime.types.autocast(runtime.device):
            seeds = preview_seeds(self.prompts, moment.progress.seed)
            pictures = generate_previews(
                base, self.objective.conditioner, self.prompts, seeds, sampler=self.sampler, clip_skip=clip_skip
            )
            paths = [
                self._save(picture, moment)
                for picture in tqdm(
                    pictures, total=len(self.prompts), desc=f"drawing ({label})", unit="picture", leave=False
                )
            ]
        move(base.vae, vae_device)
        if runtime.device.type == "cuda":
            torch.cuda.empty_cache()  # the VAE's activations are large, and training does not need them
        return paths

    def _save(self, picture: PreviewImage, moment: Moment) -> Path:
        progress = moment.progress
        count = f"{progress.step:06d}" if moment.at is At.STEP else f"e{progress.epoch:06d}"
        path = self.files.preview(count, picture.index, datetime.now().strftime("%Y%m%d%H%M%S"), picture.seed)
        with replacing(path) as temporary:
            picture.image.save(temporary, format="PNG")
        return path

    def _update_sheet(self, columns: list[tuple[str, list[Path]]]) -> None:
        chosen = spread(columns, MOST_COLUMNS)
        cells = [[_read(paths[row]) for _, paths in chosen] for row in range(len(self.prompts))]
        labels = [prompt.prompt for prompt in self.prompts]
        save_sheet(draw_sheet(cells, labels, [label for label, _ in chosen]), self.files.contact_sheet)


def label_of(moment: Moment) -> str:
    """Return what stands over a column of the contact sheet."""
    if moment.at is At.START:
        return "start"
    return f"step {moment.progress.step}" if moment.at is At.STEP else f"epoch {moment.progress.epoch}"


def preview_seeds(prompts: Sequence[Prompt], seed: int) -> list[int]:
    """Return the seed of each prompt: its own, or one that follows from the seed of the run."""
    return [
        seed_for(seed, "preview", index) % 2**32 if prompt.seed is None else prompt.seed
        for index, prompt in enumerate(prompts)
    ]


def _read(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


def spread(items: list[Item], most: int) -> list[Item]:
    """Return at most a number of items, evenly chosen, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]
