"""Saves the networks and states of a run, and removes outdated ones."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path

from library.config.saving import StateConfig
from library.errors import UserError
from library.files import replacing
from library.training.record.metadata import FileMetadata
from library.training.record.run_files import RunFiles, state_folder
from library.training.record.upload import Uploads
from library.training.run.events import At, Every, Moment
from library.training.run.runtime import SAVE_DTYPES
from library.training.run.state import TrainState, write_state

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """Writes the files of networks and the folders of states, on the first process only."""

    files: RunFiles
    state: TrainState
    due: Every  # when networks are written
    keep: StateConfig  # which states are kept
    metadata: FileMetadata
    options: str  # all options of the run as TOML
    uploads: Uploads
    uploads_states: bool
    steps_per_epoch: int
    is_main: bool

    def write_options(self, moment: Moment) -> None:
        """Write all options of the run as a --config_file, beside its other files."""
        del moment
        if not self.is_main:
            return
        with replacing(self.files.options) as temporary:
            temporary.write_text(self.options, encoding="utf-8")
        logger.info("the options of this run are in %s", self.files.options)

    def write_network(self, moment: Moment) -> None:
        """Write the network with its metadata, and remove the file that is outdated by it."""
        if not self.is_main:
            return
        progress, saving = moment.progress, self.files.saving
        path = self.path_at(moment)
        if not self.state.weights.are_finite():
            raise UserError(
                f"after step {progress.step} the network has weights that are not finite, and {path.name} is not "
                "written; try a lower learning rate"
            )
        num_epochs = self.epochs_at(moment)
        with self.state.evaluation():
            self.state.network.save(path, SAVE_DTYPES[saving.save_precision], self.metadata.at(progress, num_epochs))
        self.uploads.add(path)
        old = self._outdated(moment, saving.save_last_n_steps, saving.save_last_n_epochs)
        if old is not None:
            self.uploads.after(lambda: old.unlink(missing_ok=True))

    def write_state(self, moment: Moment) -> None:
        """Write the state of the run, and remove the one that is outdated by it.

        All processes have the same state, so the first one writes it for all.
        """
        if not self.is_main:
            return
        folder = state_folder(self.path_at(moment))
        write_state(folder, self.state, moment.progress, self.options)
        if self.uploads_states:
            self.uploads.add(folder)
        old = self._outdated(
            moment,
            self.keep.save_last_n_steps_state or self.files.saving.save_last_n_steps,
            self.keep.save_last_n_epochs_state or self.files.saving.save_last_n_epochs,
        )
        if old is not None:
            self.uploads.after(lambda: shutil.rmtree(state_folder(old), ignore_errors=True))

    def epochs_at(self, moment: Moment) -> int:
        """Return the number of complete epochs; the run may end within its last one."""
        progress = moment.progress
        return progress.epoch if moment.at is At.END else progress.step // self.steps_per_epoch

    def path_at(self, moment: Moment) -> Path:
        """Return the path of the network that is saved at a moment."""
        if moment.at is At.END:
            return self.files.network
        if moment.at is At.EPOCH:
            return self.files.after_epoch(moment.progress.epoch)
        return self.files.after_step(moment.progress.step)

    def _outdated(self, moment: Moment, last_steps: int | None, last_epochs: int | None) -> Path | None:
        """Return the network file that is outdated by the one of this moment, or None.

        last_steps is a number of steps whose files are kept; last_epochs is a number of files.
        """
        if moment.at is At.STEP and last_steps is not None and self.due.steps is not None:
            old = (moment.progress.step - last_steps - 1) // self.due.steps * self.due.steps
            return self.files.after_step(old) if old > 0 else None
        if moment.at is At.EPOCH and last_epochs is not None and self.due.epochs is not None:
            old = moment.progress.epoch - self.due.epochs * last_epochs
            return self.files.after_epoch(old) if old > 0 else None
        return None
