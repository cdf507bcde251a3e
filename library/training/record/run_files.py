"""Names of the files of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from glob import escape
from pathlib import Path

from library.config.saving import SavingConfig

UNNAMED = "last"  # in place of --output_name


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """The path of each file that a run writes; dry_run_report, dry_run_pictures and block_chart are of --dry_run."""

    saving: SavingConfig

    @property
    def network(self) -> Path:
        """The finished network."""
        return self._network(self.name)

    @property
    def options(self) -> Path:
        return self._beside("options.toml")

    @property
    def lock(self) -> Path:
        """The lock of the output name, only while the run lasts."""
        return self._beside("run.lock")

    @property
    def metrics(self) -> Path:
        return self._beside("metrics.jsonl")

    @property
    def record(self) -> Path:
        """What the run knows that is in no other file."""
        return self._beside("run.json")

    @property
    def page(self) -> Path:
        return self._beside("report.html")

    @property
    def loss_curve(self) -> Path:
        return self._beside("loss.png")

    @property
    def contact_sheet(self) -> Path:
        return self._beside("sheet.png")

    @property
    def dry_run_report(self) -> Path:
        return self._beside("dry_run.txt")

    @property
    def dry_run_pictures(self) -> Path:
        return self._beside("pictures.png")

    @property
    def block_chart(self) -> Path:
        return self._beside("blocks.png")

    def after_epoch(self, epoch: int) -> Path:
        """Return the path of the network after an epoch (from 1)."""
        return self._network(f"{self.saving.output_name or 'epoch'}-{epoch:06d}")

    def after_step(self, step: int) -> Path:
        """Return the path of the network after a number of steps."""
        return self._network(f"{self.saving.output_name or 'at'}-step{step:08d}")

    def all_networks(self) -> Iterator[Path]:
        """Yield the saved networks that are on the disk."""
        if self.network.is_file():
            yield self.network
        yield from self.of_epochs()
        yield from self.of_steps()

    def of_epochs(self) -> list[Path]:
        """Return the networks after epochs that are on the disk."""
        return self._numbered(f"{self.saving.output_name or 'epoch'}-", 6)

    def of_steps(self) -> list[Path]:
        """Return the networks after steps that are on the disk."""
        return self._numbered(f"{self.saving.output_name or 'at'}-step", 8)

    def preview(self, moment: str, prompt: int, date: str, seed: int) -> Path:
        """Return the path of a preview; moment is a number of steps, or "e" and a number of epochs."""
        name = f"{self.saving.output_name}_" if self.saving.output_name else ""
        return self.saving.output_dir / "sample" / f"{name}{moment}_{prompt:02d}_{date}_{seed}.png"

    @property
    def name(self) -> str:
        """The beginning of the names."""
        return self.saving.output_name or UNNAMED

    def _numbered(self, start: str, digits: int) -> list[Path]:
        return sorted(self.saving.output_dir.glob(f"{escape(start)}{'[0-9]' * digits}.{self.saving.save_model_as}"))

    def _network(self, stem: str) -> Path:
        return self.saving.output_dir / f"{stem}.{self.saving.save_model_as}"

    def _beside(self, ending: str) -> Path:
        return self.saving.output_dir / f"{self.name}-{ending}"


def state_folder(network: Path) -> Path:
    """Return the folder of the state that belongs to a saved network."""
    return network.with_name(f"{network.stem}-state")


def epoch_interval(saving: SavingConfig, num_epochs: int) -> int | None:
    """Return the number of epochs from one save to the next; --save_n_epoch_ratio is the number of saves."""
    if saving.save_n_epoch_ratio is not None:
        return max(1, num_epochs // saving.save_n_epoch_ratio)
    return saving.save_every_n_epochs
