"""Options of saved networks, states, metadata and logs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from library.config.kinds import read_path_text
from library.config.options import REQUIRED, option
from library.config.values import parse_text

UNRECORDED = ("save_model_as=ckpt", "save_model_as=pt")  # these have no metadata
NO_METADATA = ("no_metadata", *UNRECORDED)
TRACKED = ("logging_dir", "log_with")
BY_WANDB = ("log_with=wandb", "log_with=all")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavingConfig:
    """Saving."""

    output_dir: Path = option(
        REQUIRED, "folder for all files of the run; created if missing", missing="the folder to write to"
    )
    output_name: str | None = option(None, 'name of the files, without extension; unset: "last"')
    overwrite: bool = option(False, "replace networks of another run that have this output name")
    save_model_as: Literal["safetensors", "ckpt", "pt"] = option("safetensors", "format of the files")
    save_precision: Literal["float", "fp16", "bf16"] | None = option(None, "type of saved weights; unset: as trained")
    save_every_n_epochs: int | None = option(None, "save after every n-th epoch", minimum=1, interval="epochs")
    save_every_n_steps: int | None = option(None, "save after every n-th step", minimum=1, interval="steps")
    save_n_epoch_ratio: int | None = option(
        None, "save about n times in all, at epoch ends", minimum=1, wins_over=("save_every_n_epochs",)
    )
    save_last_n_epochs: int | None = option(
        None,
        "keep only the last n epoch saves",
        minimum=1,
        only_with=("save_every_n_epochs", "save_n_epoch_ratio"),
        twin="save_last_n_steps",
    )
    save_last_n_steps: int | None = option(
        None,
        "keep only the step saves of the last n steps",
        minimum=1,
        only_with=("save_every_n_steps",),
        twin="save_last_n_epochs",
    )
    no_report: bool = option(False, "write no page of the run (-report.html) and no record for it (-run.json)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateConfig:
    """State and resuming."""

    save_state: bool = option(False, "with every save and at the end, write a state for --resume")
    save_state_on_train_end: bool = option(False, "write a state at the end only")
    save_last_n_epochs_state: int | None = option(
        None,
        "keep only the last n epoch states; unset: --save_last_n_epochs",
        minimum=1,
        only_with=("save_state",),
    )
    save_last_n_steps_state: int | None = option(
        None,
        "keep only the step states of the last n steps; unset: --save_last_n_steps",
        minimum=1,
        only_with=("save_state",),
    )
    resume: str | None = option(
        None,
        'state folder to resume from, or "auto": the latest state of this output name',
        parse=read_path_text,
    )
    initial_epoch: int | None = option(None, "epoch (from 1) to start at, without training the earlier ones", minimum=1)
    initial_step: int | None = option(
        None, "the same as a step; wins over the epoch", minimum=0, wins_over=("initial_epoch",)
    )
    skip_until_initial_step: bool = option(
        False, "accepted; the data always continue from that point", only_with=("initial_step", "initial_epoch")
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetadataConfig:
    """Metadata in the saved file."""

    no_metadata: bool = option(False, "omit all ss_* values that readers do not need")
    training_comment: str | None = option(None, "free text for ss_training_comment", not_with=NO_METADATA)
    metadata_title: str | None = option(None, "title; unset: --output_name", not_with=UNRECORDED)
    metadata_author: str | None = option(None, "author", not_with=UNRECORDED)
    metadata_description: str | None = option(None, "description", not_with=UNRECORDED)
    metadata_license: str | None = option(None, "licence", not_with=UNRECORDED)
    metadata_tags: str | None = option(None, "tags, separated by commas", not_with=UNRECORDED)
    metadata_usage_hint: str | None = option(None, "usage hint", not_with=UNRECORDED)
    metadata_thumbnail: str | None = option(
        None, "thumbnail: a data URL, or a picture file to embed", not_with=UNRECORDED
    )
    metadata_merged_from: str | None = option(None, "what the model was merged from", not_with=UNRECORDED)
    metadata_trigger_phrase: str | None = option(None, "words that trigger the subject", not_with=UNRECORDED)
    metadata_preprocessor: str | None = option(None, "preprocessor", not_with=UNRECORDED)
    metadata_is_negative_embedding: str | None = option(None, "whether it is a negative embedding", not_with=UNRECORDED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConsoleConfig:
    """Lines on the console."""

    console_log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] | None = option(
        None, "lowest level of the log lines that are shown; unset: INFO"
    )
    console_log_file: Path | None = option(None, "write the log lines to this file instead of the console")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoggingConfig(ConsoleConfig):
    """Logs."""

    logging_dir: Path | None = option(None, "folder for the logs of TensorBoard and wandb")
    log_with: Literal["tensorboard", "wandb", "all"] | None = option(
        None, "where to log; unset: TensorBoard if --logging_dir is given"
    )
    log_prefix: str | None = option(None, "text before the date in the name of the log folder", only_with=TRACKED)
    log_tracker_name: str | None = option(
        None, "name of the tracker, the project of wandb; unset: network_train", only_with=TRACKED
    )
    log_tracker_config: Path | None = option(
        None, "TOML file with arguments for the trackers, in the tables [tensorboard] and [wandb]", only_with=TRACKED
    )
    log_config: bool = option(False, "also log the options to the trackers, except paths and keys", only_with=TRACKED)
    wandb_run_name: str | None = option(
        None, "name of the run in wandb; unset: chosen by wandb", parse=parse_text, only_with=BY_WANDB
    )
    wandb_api_key: str | None = option(
        None,
        "key of wandb; unset: WANDB_API_KEY, or the login of this machine",
        parse=parse_text,
        secret=True,
        only_with=BY_WANDB,
    )
