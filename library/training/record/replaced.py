"""Files of another run that a run would replace: found before the training, by the record beside them."""

from __future__ import annotations

import logging
from datetime import datetime
from pathlib import Path
from typing import Any

from library.config import toml_text
from library.config.config_file import changed_options
from library.config.saving import SavingConfig
from library.config.toml_text import dump_value
from library.config.train import TrainConfig
from library.errors import UserError, named
from library.training.record.run_files import RunFiles

logger = logging.getLogger(__name__)

# Sections of which nothing changes what is learned.
OTHER_SECTIONS = {"saving", "state", "hub", "preview", "metadata", "validation", "logs", "file"}
# Options of other sections that change only the speed, the memory, or where files are looked for.
NO_MATTER = {
    *("dry_run", "offline", "skip_cache_check", "check_pictures", "cache_latents", "cache_latents_to_disk"),
    *("vae_batch_size", "max_data_loader_n_workers", "persistent_data_loader_workers", "ddp_timeout"),
}


def check_replaced(config: TrainConfig) -> None:
    """Raise UserError if networks of another run have the names of this one's; a dry run only warns.

    The same command again is no other run: it replaces its files, as in sd-scripts. Nor is a run that goes on from a
    state.
    """
    if config.saving.overwrite or config.state.resume:
        return
    found, record = replaced_files(config.saving), RunFiles(config.saving).options
    if not found:
        return
    differing = differences(config, record)
    if differing == []:
        return
    made = datetime.fromtimestamp(found[0].stat().st_mtime).isoformat(" ", "minutes")
    more = f" and {len(found) - 1} more of its files" if len(found) > 1 else ""
    if differing is None:
        why = f"without a record of how it was made ({record.name})"
    else:
        why = f"of a run with other options ({named([f'--{flag}' for flag in differing])})"
    text = f"{found[0]}{more}, of {made}, {why}, would be replaced: take another --output_name, or give --overwrite"
    if not config.run.dry_run:
        raise UserError(text)
    logger.warning("%s", text)


def replaced_files(saving: SavingConfig) -> list[Path]:
    """Return the networks that are there under the names of those that a run will write."""
    files = RunFiles(saving)
    found = [files.network] if files.network.is_file() else []
    if saving.save_every_n_epochs is not None or saving.save_n_epoch_ratio is not None:
        found += files.of_epochs()
    if saving.save_every_n_steps is not None:
        found += files.of_steps()
    return found


def differences(config: TrainConfig, record: Path) -> list[str] | None:
    """Return the options that matter and differ from those of a record; None if it is not there or unreadable."""
    try:
        recorded = of_learning(toml_text.load(record), config)
    except UserError:
        return None
    own = of_learning(changed_options(config), config)
    return [flag for flag in own | recorded if own.get(flag) != recorded.get(flag)]


def of_learning(sections: dict[str, Any], config: TrainConfig) -> dict[str, str]:
    """Return flag -> value as TOML of the options that change what is learned."""
    chosen = {"seed": config.run.seed, "validation_seed": config.dataset.validation_seed}  # if not given
    left_out = NO_MATTER | {flag for flag, value in chosen.items() if value is None}
    return {
        flag: dump_value(value)
        for name, values in sections.items()
        if name not in OTHER_SECTIONS and isinstance(values, dict)
        for flag, value in values.items()
        if flag not in left_out
    }
