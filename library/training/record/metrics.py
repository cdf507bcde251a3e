"""The metrics of a run: one line of JSON for each step and each validation, and the same values for the trackers."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from library.config.train import TrainConfig
from library.files import disk_errors, replacing
from library.training.charts.series import EPOCH_AVERAGE, row_in
from library.training.record.tracking import start_trackers
from library.training.run.events import At, Moment
from library.training.run.progress import mean

if TYPE_CHECKING:
    from accelerate import Accelerator


class Metrics:
    """Writes the metrics of a run to its file and to the trackers, on the first process only."""

    def __init__(self, path: Path, config: TrainConfig, accelerator: Accelerator) -> None:
        self._path, self._config, self._accelerator = path, config, accelerator
        self._epoch: list[float] = []  # losses of the epoch so far

    def log(self, moment: Moment) -> None:
        """Start the trackers, or write the values of a step or an epoch, depending on the moment."""
        if moment.at is At.START and self._accelerator.is_main_process:
            start_trackers(self._config, self._accelerator)
            cut_metrics(self._path, moment.progress.step)
        elif moment.at is At.STEP:
            self._log_step(moment)
        elif moment.at is At.EPOCH and self._epoch:
            self.write(moment.progress.step, {EPOCH_AVERAGE: mean(self._epoch)})
            self._epoch.clear()

    def end(self, moment: Moment) -> None:
        """End the trackers."""
        del moment
        self._accelerator.end_training()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write named values as of a number of steps."""
        if not self._accelerator.is_main_process:
            return
        with disk_errors(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        self._accelerator.log(values, step=step)

    def _log_step(self, moment: Moment) -> None:
        result, progress = moment.result, moment.progress
        assert result is not None  # every step has one
        self._epoch += result.losses
        values: dict[str, float] = {"left_out": 1}
        if result.losses:
            values = {"loss/current": result.losses[-1], "loss/average": progress.average_loss}
        if moment.seconds is not None:
            values |= {f"time/{name}": round(took, 6) for name, took in moment.seconds._asdict().items()}
        values |= {f"lr/{name}": rate for name, rate in result.rates.items()}
        values |= {f"lr/d*lr/{name}": rate for name, rate in result.adapted_rates.items()}
        self.write(result.step, values | result.norms)


def cut_metrics(path: Path, num_steps: int) -> None:
    """Remove lines after num_steps steps from a metrics file: the run starts or resumes there."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for line in lines if (row := row_in(line)) is not None and 0 < row["step"] <= num_steps]
        with replacing(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
