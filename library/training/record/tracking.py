"""TensorBoard and wandb: which of them a run logs to, their arguments, and the options they record."""

from __future__ import annotations

import importlib.metadata
import inspect
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.config import toml_text
from library.config.options import nearest, section_options, sections_of
from library.config.saving import LoggingConfig
from library.config.train import TrainConfig
from library.config.values import written
from library.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

OLDEST_WANDB = (0, 31)  # older ones cannot be asked for a login without asking the user
OURS = {"wandb": "project", "tensorboard": "log_dir"}  # the argument that --log_tracker_name stands for


def tracker_names(logs: LoggingConfig) -> list[str]:
    """Return where a run logs to; wandb first, because it can fail."""
    if logs.log_with == "all":
        return ["wandb", "tensorboard"]
    return [logs.log_with] if logs.log_with else ["tensorboard"] if logs.logging_dir else []


def check_trackers(logs: LoggingConfig) -> None:
    """Raise UserError for a tracker whose package is missing, and for arguments that it does not know."""
    for name in tracker_names(logs):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise UserError(f"logging to {name} needs its package: pip install {name}") from None
        if name == "wandb" and tuple(int(part) for part in version.split(".")[:2]) < OLDEST_WANDB:
            oldest = ".".join(map(str, OLDEST_WANDB))
            raise UserError(f"--log_with {logs.log_with} needs wandb {oldest} or newer, not {version}: update it")
    tracker_arguments(logs)


def tracker_arguments(logs: LoggingConfig) -> dict[str, dict[str, Any]]:
    """Return name of a tracker -> arguments from --log_tracker_config, checked."""
    path = logs.log_tracker_config
    if path is None:
        return {}
    given = toml_text.load(path)
    for name, table in given.items():
        if name not in OURS or not isinstance(table, dict):
            raise UserError(f"{path}: {name} is not known: the tables are [{'], ['.join(sorted(OURS))}]")
        if name in tracker_names(logs):
            _check_arguments(path, name, table)
    return given


def _check_arguments(path: Path, name: str, table: dict[str, Any]) -> None:
    known = [word for word in inspect.signature(_maker(name)).parameters if word not in ("self", OURS[name])]
    for word in table:
        if word == OURS[name]:
            raise UserError(f"{path}: {name}.{word} is not taken: give --log_tracker_name")
        if word not in known:
            raise UserError(f"{path}: {name}.{word} is not known{nearest(word, known)}")


def _maker(name: str) -> Callable[..., Any]:
    if name == "wandb":
        import wandb

        return wandb.init
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter


def start_trackers(config: TrainConfig, accelerator: Accelerator) -> None:
    """Begin the logs of a run; the first process calls this."""
    names, project = tracker_names(config.logs), config.logs.log_tracker_name or "network_train"
    options = loggable_options(config) if config.logs.log_config else None
    arguments = tracker_arguments(config.logs)
    if "wandb" not in names:
        accelerator.init_trackers(project, options, arguments)
        return

    import wandb

    arguments["wandb"] = wandb_arguments(config, arguments.get("wandb", {}))
    try:
        accelerator.init_trackers(project, options, arguments)
    except wandb.Error as error:
        logger.warning("wandb does not answer (%s): the run is logged offline", str(error).splitlines()[0])
        accelerator.trackers.clear()
        arguments["wandb"]["mode"] = "offline"
        accelerator.init_trackers(project, options, arguments)
    settings = accelerator.get_tracker("wandb", unwrap=True).settings
    if settings.mode == "offline":
        logger.info("wandb logs offline; this sends the run later: wandb sync %s", settings.sync_dir)


def wandb_arguments(config: TrainConfig, table: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of wandb.init; without a key or a login the run is logged offline, and nobody is asked."""
    import wandb

    logs = config.logs
    if logs.wandb_api_key is not None:
        os.environ["WANDB_API_KEY"] = logs.wandb_api_key  # wandb.login would write it to a file
    folder = logs.logging_dir or config.saving.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    arguments = {"dir": str(folder)} | table
    if logs.wandb_run_name is not None:
        arguments["name"] = logs.wandb_run_name
    # What wandb collects by itself holds the command line, with the keys on it.
    arguments["settings"] = {"x_disable_meta": True} | table.get("settings", {})
    wants_network = table.get("mode", os.environ.get("WANDB_MODE", "online")) in ("online", "shared")
    if wants_network and not wandb.login(prompt=False, verify=False):
        logger.info("wandb has no key: give --wandb_api_key or WANDB_API_KEY, or run wandb login")
        arguments["mode"] = "offline"
    return arguments


def loggable_options(config: TrainConfig) -> dict[str, bool | int | float | str]:
    """Return flag -> value for all options that are set, but for keys and whatever may be a path."""
    values = {}
    for name, section_class in sections_of(TrainConfig):
        for entry in section_options(section_class, name):
            value = written(getattr(getattr(config, name), entry.field))
            if value is not None and not entry.spec.secret and not entry.spec.file_only and not _has_path(value):
                values[entry.flag] = value if isinstance(value, bool | int | float | str) else str(value)
    return values


def _has_path(value: Any) -> bool:
    if isinstance(value, tuple):
        return any(_has_path(item) for item in value)
    if isinstance(value, Path):
        return True
    return isinstance(value, str) and ("/" in value or "\\" in value)


def log_pictures(accelerator: Accelerator, files: list[Path], step: int) -> None:
    """Show pictures in wandb, each prompt under a name of its own; the other trackers get none."""
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            for index, file in enumerate(files):
                tracker.log_images({f"sample_{index}": [str(file)]}, step=step)
