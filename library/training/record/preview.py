"""Pictures during training: when, with which seeds, where they go, and the contact sheet over all of them."""

from __future__ import annotations

import dataclasses
import logging
from datetime import datetime
from pathlib import Path

import torch
from PIL import Image

from library.config.preview import PreviewConfig
from library.config.saving import SavingConfig
from library.files import replacing
from library.models.precision import move
from library.randomness import seed_for
from library.sampling.contact_sheet import draw_sheet, save_sheet
from library.sampling.generate import Picture, generate
from library.sampling.prompts import Prompt
from library.training.run.objective import Objective
from library.training.run.runtime import Runtime

logger = logging.getLogger(__name__)

MOST_COLUMNS = 12  # of the contact sheet: first and last sampling, and evenly chosen ones between


@dataclasses.dataclass
class Preview:
    """Draws the prompts of a run; the seed of a prompt that names none is the same throughout the run."""

    config: PreviewConfig
    saving: SavingConfig
    prompts: list[Prompt]
    seed: int
    clip_skip: int | None
    columns: list[tuple[str, list[Path]]] = dataclasses.field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Folder of the single pictures."""
        return self.saving.output_dir / "sample"

    @property
    def sheet(self) -> Path:
        """Path of the contact sheet."""
        return self.saving.output_dir / f"{self.saving.output_name or 'last'}-sheet.png"

    def due_at_step(self, step: int) -> bool:
        """Return whether pictures are drawn after a step; 0 is before the first."""
        if step == 0:
            return self.config.sample_at_first
        interval = None if self.config.sample_every_n_epochs else self.config.sample_every_n_steps
        return interval is not None and step % interval == 0

    def due_at_epoch(self, epoch: int) -> bool:
        """Return whether pictures are drawn after an epoch."""
        interval = self.config.sample_every_n_epochs
        return interval is not None and epoch % interval == 0

    def draw(self, objective: Objective, runtime: Runtime, *, suffix: str, label: str) -> None:
        """Draw all prompts and bring the contact sheet up to date; the caller has put the network in evaluation mode.

        suffix goes into the names of the files, label over the column of the sheet. No random state of the
        training is touched, because training seeds each micro-batch by its position.
        """
        from tqdm import tqdm

        seeds = [self._seed_of(index) for index in range(len(self.prompts))]
        base = objective.base
        vae_device = base.vae.device
        move(base.vae, runtime.device)
        paths = []
        with runtime.types.autocast(runtime.device):
            pictures = generate(
                base,
                objective.conditioner,
                self.prompts,
                seeds,
                sampler=self.config.sample_sampler,
                clip_skip=self.clip_skip,
            )
            for picture in tqdm(
                pictures, total=len(self.prompts), desc=f"drawing ({label})", unit="picture", leave=False
            ):
                paths.append(self._save(picture, suffix))
        move(base.vae, vae_device)
        if runtime.device.type == "cuda":
            torch.cuda.empty_cache()  # the VAE's activations are large, and training does not need them
        self.columns.append((label, paths))
        self._update_sheet()

    def _seed_of(self, index: int) -> int:
        own = self.prompts[index].seed
        return own if own is not None else seed_for(self.seed, "preview", index) % 2**32

    def _save(self, picture: Picture, suffix: str) -> Path:
        name = f"{self.saving.output_name}_" if self.saving.output_name else ""
        date = datetime.now().strftime("%Y%m%d%H%M%S")
        path = self.folder / f"{name}{suffix}_{picture.index:02d}_{date}_{picture.seed}.png"
        with replacing(path) as temporary:
            picture.image.save(temporary, format="PNG")
        return path

    def _update_sheet(self) -> None:
        chosen = spread(self.columns, MOST_COLUMNS)
        cells = [[_read(paths[row]) for _, paths in chosen] for row in range(len(self.prompts))]
        labels = [prompt.prompt for prompt in self.prompts]
        save_sheet(draw_sheet(cells, labels, [label for label, _ in chosen]), self.sheet)


def _read(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


def spread(items: list, most: int) -> list:
    """Return at most a number of items, evenly chosen, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]
