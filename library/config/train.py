"""The configuration of a training run: all sections, and the checks of options that depend on each other."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from library.config.command_line import given_options
from library.config.config_file import to_toml, with_toml_suffix
from library.config.dataset import DataConfig, DatasetOptions, SubsetOptions
from library.config.effects import given_as, idle_in_all, idle_options, long_intervals
from library.config.hub import STATE_FORM, HubConfig, parse_hub_state
from library.config.loss import LossConfig
from library.config.model import ModelConfig
from library.config.network import NetworkConfig
from library.config.optimizer import POLYNOMIAL_END, OptimizerConfig, ScheduleConfig
from library.config.options import all_options, build, flag_values, option, root_options
from library.config.preview import PreviewConfig
from library.config.printed import Implied
from library.config.saving import LoggingConfig, MetadataConfig, SavingConfig, StateConfig
from library.config.training import PrecisionConfig, RunConfig, TextConfig, ValidationConfig
from library.config.values import written
from library.errors import Problems, UserError, quotes_hint

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileConfig:
    """Options in a file."""

    config_file: Path | None = option(None, "TOML file with options; those on the command line win")
    output_config: bool = option(False, "write the options as TOML to --config_file and end")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that determines a training run."""

    model: ModelConfig
    data: DataConfig
    dataset: DatasetOptions
    subset: SubsetOptions
    network: NetworkConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    loss: LossConfig
    run: RunConfig
    precision: PrecisionConfig
    text: TextConfig
    validation: ValidationConfig
    saving: SavingConfig
    state: StateConfig
    hub: HubConfig
    preview: PreviewConfig
    metadata: MetadataConfig
    logs: LoggingConfig
    file: FileConfig


def parse_train_config(
    argv: Sequence[str] | None,
    problems: Problems,
    *,
    description: str | None = None,
    when_read: Callable[[TrainConfig], None] | None = None,
    fixed: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """Return the complete configuration of a run.

    Missing and unknown options and what cannot be read are added to problems (see `build`); `check` finds the options
    that do not fit together. With --output_config
    the options are returned as given, since nothing will be run. when_read is called with the options as given, before
    anything is logged. fixed are values that a script sets in place of the user.
    """
    given = given_options(TrainConfig, argv, problems, description=description, fixed=fixed, implied=implied_options)
    values = given.values
    if values.get("output_config"):
        problems.raise_if_any()
        return build(TrainConfig, values, Problems())
    config = build(TrainConfig, values, problems, given.unreadable)
    if when_read is not None:
        problems.run(when_read, config)
    config = problems.run(resolve, config) or config
    if not problems and not fixed and "learning_rate" not in values and falls_back_on_learning_rate(config):
        logger.warning("--learning_rate is not given: 2e-06 is the default, 1e-4 to 1e-3 suits a LoRA")
    return config


def falls_back_on_learning_rate(config: TrainConfig) -> bool:
    """Return whether a part is trained at --learning_rate, by an optimizer that does not estimate the rate."""
    optimizer, network = config.optimizer, config.network
    if optimizer.optimizer_type.lower().rpartition(".")[2].startswith(("adafactor", "prodigy", "dadapt")):
        return False
    unet = optimizer.unet_lr is None and not network.network_train_text_encoder_only
    return unet or (not optimizer.text_encoder_lr and not network.network_train_unet_only)


def write_config_file(config: TrainConfig) -> Path:
    """Write the options to --config_file and return the path; raises UserError if the file exists."""
    if config.file.config_file is None:
        raise UserError("--output_config needs --config_file, the name of the file to write")
    path = with_toml_suffix(config.file.config_file)
    if path.exists():
        raise UserError(f"--output_config does not overwrite {path}: remove it or name another file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(to_toml(config), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output_config: {path} cannot be written ({error.strerror})") from None
    return path


OLD_SPELLINGS = {"use_8bit_adam": "AdamW8bit", "use_lion_optimizer": "Lion"}


def resolve(config: TrainConfig) -> TrainConfig:
    """Return config with the options that others imply; each change is logged."""
    for change in implied_options(config):
        text = "unset" if change.value is None else f"set to {change.value}"
        logger.info("--%s is %s: %s", change.field, text, change.why)
        changed = dataclasses.replace(getattr(config, change.section), **{change.field: change.value})
        config = dataclasses.replace(config, **{change.section: changed})
    return config


def implied_options(config: TrainConfig) -> list[Implied]:
    """Return what given options imply of others; raises UserError for one that contradicts what it implies."""
    changes = []
    for name in ("cache_latents", "cache_text_encoder_outputs"):
        if getattr(config.precision, f"{name}_to_disk") and not getattr(config.precision, name):
            changes.append(Implied("precision", name, True, f"--{name}_to_disk implies it"))
    for flag, name in OLD_SPELLINGS.items():
        given = config.optimizer.optimizer_type.lower()
        if getattr(config.optimizer, flag):
            if given not in ("adamw", name.lower()):
                raise UserError(f"--{flag} contradicts --optimizer_type {config.optimizer.optimizer_type}: give one")
            changes.append(Implied("optimizer", "optimizer_type", name, f"--{flag} stands for it"))
    for name in ("sample_every_n_steps", "sample_every_n_epochs"):
        interval = getattr(config.preview, name)
        if interval is not None and interval <= 0:
            changes.append(Implied("preview", name, None, f"{interval} is no interval"))
    return changes


def with_seed(config: TrainConfig, seed: int) -> TrainConfig:
    """Return config with the seed of the run.

    Without --seed the validation split has the seed 0; it is recorded as such, so that the record repeats the split.
    """
    dataset = config.dataset
    if config.run.seed is None and dataset.validation_seed is None:
        dataset = dataclasses.replace(dataset, validation_seed=0)
    return dataclasses.replace(config, run=dataclasses.replace(config.run, seed=seed), dataset=dataset)


def check(config: TrainConfig, problems: Problems) -> None:
    """Add to problems every option that contradicts another or names a missing file."""
    problems.run(_check_data, config.data, config.dataset, problems)
    problems.run(_check_network, config.network, problems)
    problems.run(_check_schedule, config.schedule, config.optimizer, problems)
    problems.run(_check_noise, config.loss, problems)
    problems.run(_check_precision, config.precision, problems)
    problems.run(_check_logs, config.logs, problems)
    problems.run(_check_hub, config.hub, config.state, problems, names_models=bool(config.model.from_hub))
    problems.run(_check_previews, config.preview, problems)
    problems.run(_check_paths, config, problems)
    problems.run(_check_output, config.saving)


def _check_logs(logs: LoggingConfig, problems: Problems) -> None:
    if logs.log_with in ("tensorboard", "all") and logs.logging_dir is None:
        problems.add(f"--log_with {logs.log_with} needs --logging_dir, the folder for the logs")


def _check_previews(preview: PreviewConfig, problems: Problems) -> None:
    if preview.are_wanted and preview.sample_prompts is None:
        problems.add("previews are asked for, but --sample_prompts, the file with their prompts, is missing")


def warn_of_idle_options(config: TrainConfig, placed: Sequence[tuple[DatasetOptions, SubsetOptions]]) -> None:
    """Warn of options that were given in vain; placed are all subsets with the options of their dataset."""
    known = all_options(TrainConfig)
    own = {flag: entry for flag, entry in known.items() if entry.section in ("dataset", "subset")}
    values = flag_values(config)
    places = [values | flag_values(dataset) | flag_values(subset) for dataset, subset in placed]
    everywhere = values | {flag: [place[flag] for place in places] for flag in own}
    of_run = [entry for flag, entry in known.items() if flag not in own]
    for text in idle_options(of_run, everywhere, known) + idle_in_all(list(own.values()), places, known):
        logger.warning("%s", text)
    for flag, entry in own.items() if config.data.dataset_config is not None else ():
        value = values.get(flag)
        if value != entry.default and value not in everywhere[flag]:
            logger.warning("%s is not used: %s sets another value", given_as(entry, value), config.data.dataset_config)


def warn_of_long_intervals(
    config: TrainConfig, placed: Sequence[tuple[DatasetOptions, SubsetOptions]], *, steps: int, epochs: int
) -> None:
    """Warn of intervals that are longer than the run of so many steps and epochs.

    placed are all subsets with the options of their dataset.
    """
    every = flag_values(config) | {
        flag: value
        for dataset, subset in placed
        for flag, value in (flag_values(dataset) | flag_values(subset)).items()
        if value
    }
    for text in long_intervals(root_options(TrainConfig).values(), every, steps=steps, epochs=epochs):
        logger.warning("%s", text)


def _check_data(data: DataConfig, dataset: DatasetOptions, problems: Problems) -> None:
    if data.dataset_config is None and data.train_data_dir is None and data.in_json is None:
        problems.add("no training data: give --dataset_config, or --train_data_dir with N_name folders")
    if data.dataset_config is None and dataset.resolution is None:
        problems.add("--resolution is missing: the training size in pixels, such as 512 or 512,768")


def _check_network(network: NetworkConfig, problems: Problems) -> None:
    if network.network_train_unet_only and network.network_train_text_encoder_only:
        problems.add("--network_train_unet_only and --network_train_text_encoder_only leave nothing to train: give one")
    if network.dim_from_weights and network.network_weights is None:
        problems.add("--dim_from_weights needs --network_weights, the file to take ranks from")
    if len(network.base_weights_multiplier or ()) > len(network.base_weights or ()):
        problems.add("--base_weights_multiplier has more numbers than --base_weights has files")


def _check_noise(loss: LossConfig, problems: Problems) -> None:
    if loss.adaptive_noise_scale is not None and loss.noise_offset is None:
        problems.add("--adaptive_noise_scale needs --noise_offset, to which it adds")
    lowest, limit = loss.timestep_range
    if lowest >= limit:
        problems.add(f"--min_timestep {lowest} must be below --max_timestep {limit}")


def _check_precision(precision: PrecisionConfig, problems: Problems) -> None:
    for name in ("fp16", "bf16"):
        if getattr(precision, f"full_{name}") and precision.mixed_precision != name:
            problems.add(f"--full_{name} needs --mixed_precision {name}, got {precision.mixed_precision}")


def _check_hub(hub: HubConfig, state: StateConfig, problems: Problems, *, names_models: bool) -> None:
    reading = {"resume_from_huggingface"}
    if hub.resume_from_huggingface or names_models:
        reading.add("huggingface_token")
    given = [name for name, value in vars(hub).items() if value and name not in reading]
    if given and hub.huggingface_repo_id is None:
        problems.add(f"--{given[0]} needs --huggingface_repo_id, the repository to upload to")
    if hub.save_state_to_huggingface and not (state.save_state or state.save_state_on_train_end):
        problems.add("--save_state_to_huggingface needs --save_state or --save_state_on_train_end")
    if hub.resume_from_huggingface:
        try:
            parse_hub_state(state.resume or "")
        except ValueError:
            problems.add(f"--resume_from_huggingface: --resume must be {STATE_FORM}, got {state.resume!r}")


def _check_schedule(schedule: ScheduleConfig, optimizer: OptimizerConfig, problems: Problems) -> None:
    if schedule.lr_scheduler == "constant" and not schedule.lr_scheduler_type and schedule.lr_warmup_steps:
        problems.add("--lr_scheduler constant has no warm-up: use constant_with_warmup, or --lr_warmup_steps 0")
    if schedule.lr_warmup_steps and (schedule.lr_scheduler_type or schedule.lr_scheduler == "piecewise_constant"):
        kind = "lr_scheduler_type" if schedule.lr_scheduler_type else "lr_scheduler"
        problems.add(f"--lr_warmup_steps does not go with --{kind} {getattr(schedule, kind)}, which has no warm-up")
    if schedule.lr_scheduler == "polynomial" and optimizer.learning_rate <= POLYNOMIAL_END:
        problems.add(f"--lr_scheduler polynomial falls to {POLYNOMIAL_END:g}: --learning_rate must be above that")
    takes_arguments = schedule.lr_scheduler_type or schedule.lr_scheduler == "piecewise_constant"
    if schedule.lr_scheduler_args and not takes_arguments:
        problems.add(
            f"--lr_scheduler {schedule.lr_scheduler} takes no --lr_scheduler_args: they are for --lr_scheduler_type "
            f"and piecewise_constant, got {' '.join(written(schedule.lr_scheduler_args))}"
        )
    if schedule.lr_scheduler == "cosine_with_min_lr" and schedule.lr_scheduler_min_lr_ratio is None:
        problems.add("--lr_scheduler cosine_with_min_lr needs --lr_scheduler_min_lr_ratio")


def _check_paths(config: TrainConfig, problems: Problems) -> None:
    by_file = config.data.dataset_config is not None  # the folders are not used then
    paths = {
        "tokenizer_cache_dir": config.model.tokenizer_cache_dir,
        "dataset_config": config.data.dataset_config,
        "train_data_dir": None if by_file else config.data.train_data_dir,
        "reg_data_dir": None if by_file else config.data.reg_data_dir,
        "in_json": None if by_file else config.data.in_json,
        "network_weights": config.network.network_weights,
        "sample_prompts": config.preview.sample_prompts if config.preview.are_wanted else None,
        "log_tracker_config": config.logs.log_tracker_config,
    }
    named = [(name, path) for name, path in paths.items() if path is not None]
    for name, path in [*named, *(("base_weights", path) for path in config.network.base_weights or ())]:
        if not _exists(path):
            problems.add(f"--{name}: {path} does not exist{quotes_hint(path)}")
        elif name in MUST_BE_FILES and path.is_dir():
            problems.add(f"--{name}: {path} is a folder; name a file")
        elif name.endswith("_data_dir") and not path.is_dir():
            problems.add(f"--{name}: {path} is a file; name the folder above the N_name folders")


def _check_output(saving: SavingConfig) -> None:
    if _exists(saving.output_dir) and not saving.output_dir.is_dir():
        raise UserError(f"--output_dir: {saving.output_dir} is a file, not a folder")


MUST_BE_FILES = ("dataset_config", "network_weights", "base_weights", "sample_prompts", "log_tracker_config")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long
        return False
