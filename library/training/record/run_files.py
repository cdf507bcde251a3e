"""Names of the files of a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from library.config.saving import SavingConfig


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """Where each file of a run is written."""

    saving: SavingConfig

    @property
    def folder(self) -> Path:
        """Folder of all files."""
        return self.saving.output_dir

    @property
    def network(self) -> Path:
        """The finished network."""
        return self._network(self._name)

    @property
    def options(self) -> Path:
        """Record of the run's options."""
        return self._beside("options.toml")

    @property
    def metrics(self) -> Path:
        """Losses, learning rates and norms: a JSON object on each line."""
        return self._beside("metrics.jsonl")

    @property
    def loss_curve(self) -> Path:
        """Plot of the loss."""
        return self._beside("loss.png")

    @property
    def contact_sheet(self) -> Path:
        """All previews on one picture."""
        return self._beside("sheet.png")

    @property
    def dry_run_report(self) -> Path:
        """What a dry run says."""
        return self._beside("dry_run.txt")

    @property
    def dry_run_pictures(self) -> Path:
        """Sheet of the training pictures that a dry run makes."""
        return self._beside("pictures.png")

    @property
    def block_chart(self) -> Path:
        """Chart of ranks and rates by block that a dry run makes."""
        return self._beside("blocks.png")

    def after_epoch(self, epoch: int) -> Path:
        """Return the path of the network after an epoch (from 1)."""
        return self._network(f"{self.saving.output_name or 'epoch'}-{epoch:06d}")

    def after_step(self, step: int) -> Path:
        """Return the path of the network after a number of steps."""
        return self._network(f"{self.saving.output_name or 'at'}-step{step:08d}")

    def preview(self, moment: str, prompt: int, date: str, seed: int) -> Path:
        """Return the path of a preview; moment is a number of steps, or e and a number of epochs."""
        name = f"{self.saving.output_name}_" if self.saving.output_name else ""
        return self.folder / "sample" / f"{name}{moment}_{prompt:02d}_{date}_{seed}.png"

    @property
    def _name(self) -> str:
        return self.saving.output_name or "last"

    def _network(self, stem: str) -> Path:
        return self.folder / f"{stem}.{self.saving.save_model_as}"

    def _beside(self, ending: str) -> Path:
        return self.folder / f"{self._name}-{ending}"


def state_folder(network: Path) -> Path:
    """Return the folder of the state that belongs to a saved network."""
    return network.with_name(f"{network.stem}-state")


def epoch_interval(saving: SavingConfig, num_epochs: int) -> int | None:
    """Return every how many epochs to save; --save_n_epoch_ratio asks for that many files."""
    if saving.save_n_epoch_ratio is not None:
        return max(1, num_epochs // saving.save_n_epoch_ratio)
    return saving.save_every_n_epochs
