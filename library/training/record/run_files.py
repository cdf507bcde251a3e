"""Files of a run: their names, when they are written, and which old ones go."""

from __future__ import annotations

from pathlib import Path

from library.config.saving import SavingConfig


def final_file(config: SavingConfig) -> Path:
    """Return the path of the finished network."""
    return _file(config, config.output_name or "last")


def state_folder(file: Path) -> Path:
    """Return the folder of the state that belongs to a saved file."""
    return file.with_name(f"{file.stem}-state")


def options_file(config: SavingConfig) -> Path:
    """Return the path of the record of the run's options."""
    return config.output_dir / f"{config.output_name or 'last'}-options.toml"


def loss_curve_file(config: SavingConfig) -> Path:
    """Return the path of the picture of the loss."""
    return config.output_dir / f"{config.output_name or 'last'}-loss.png"


def metrics_file(config: SavingConfig) -> Path:
    """Return the path of the run's metrics: a JSON object on each line."""
    return config.output_dir / f"{config.output_name or 'last'}-metrics.jsonl"


def epoch_file(config: SavingConfig, epoch: int) -> Path:
    """Return the path of the network after an epoch (from 1)."""
    return _file(config, f"{config.output_name or 'epoch'}-{epoch:06d}")


def step_file(config: SavingConfig, step: int) -> Path:
    """Return the path of the network after a number of steps."""
    return _file(config, f"{config.output_name or 'at'}-step{step:08d}")


def _file(config: SavingConfig, stem: str) -> Path:
    return config.output_dir / f"{stem}.{config.save_model_as}"


def epoch_interval(config: SavingConfig, num_epochs: int) -> int | None:
    """Return every how many epochs to save; --save_n_epoch_ratio asks for that many files."""
    if config.save_n_epoch_ratio is not None:
        return max(1, num_epochs // config.save_n_epoch_ratio)
    return config.save_every_n_epochs


def saves_epoch(config: SavingConfig, epoch: int, num_epochs: int) -> bool:
    """Return whether an epoch ends with a file of its own; the last one is the finished network."""
    interval = epoch_interval(config, num_epochs)
    return interval is not None and epoch % interval == 0 and epoch < num_epochs


def saves_step(config: SavingConfig, step: int) -> bool:
    """Return whether a file is written after this step."""
    return config.save_every_n_steps is not None and step % config.save_every_n_steps == 0


def outdated_epoch_file(config: SavingConfig, epoch: int, num_epochs: int, keep: int | None) -> Path | None:
    """Return the file of the epoch that goes once this one is written, where the last keep ones are kept."""
    if keep is None:
        return None
    old = epoch - epoch_interval(config, num_epochs) * keep
    return epoch_file(config, old) if old > 0 else None


def outdated_step_file(config: SavingConfig, step: int, keep: int | None) -> Path | None:
    """Return the file of the step that goes once this one is written, where those of the last keep steps are kept."""
    if keep is None:
        return None
    old = (step - keep - 1) // config.save_every_n_steps * config.save_every_n_steps
    return step_file(config, old) if old > 0 else None
