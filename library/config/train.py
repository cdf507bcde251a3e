"""The configuration of a training run: all sections, and the rules between options."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

from library.config.dataset import DataConfig, DatasetOptions, SubsetOptions
from library.config.loss import LossConfig
from library.config.model import ModelConfig
from library.config.network import NetworkConfig
from library.config.optimizer import POLYNOMIAL_END, OptimizerConfig, ScheduleConfig
from library.config.options import build, given_options, option, to_toml, with_toml_suffix
from library.config.preview import PreviewConfig
from library.config.saving import LoggingConfig, MetadataConfig, SavingConfig, StateConfig
from library.config.training import PrecisionConfig, RunConfig, TextConfig
from library.errors import UserError

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
    saving: SavingConfig
    state: StateConfig
    preview: PreviewConfig
    metadata: MetadataConfig
    logs: LoggingConfig
    file: FileConfig


def parse_train_config(argv: Sequence[str] | None = None, *, description: str | None = None) -> TrainConfig:
    """Return the complete, checked configuration of a run; raises UserError for a user's mistake.

    With --output_config it is returned as given, since nothing will be run.
    """
    given = given_options(TrainConfig, argv, description=description)
    config = build(TrainConfig, given)
    if config.file.output_config:
        return config
    config = resolve(config)
    check(config)
    if "learning_rate" not in given and falls_back_on_learning_rate(config):
        logger.warning("--learning_rate is not given: 2e-06 is the default, 1e-4 to 1e-3 suits a LoRA")
    return config


def falls_back_on_learning_rate(config: TrainConfig) -> bool:
    """Return whether a part is trained at --learning_rate, by an optimizer that does not find its own."""
    optimizer, network = config.optimizer, config.network
    if optimizer.optimizer_type.lower().rpartition(".")[2].startswith(("adafactor", "prodigy", "dadapt")):
        return False
    unet = optimizer.unet_lr is None and not network.network_train_text_encoder_only
    return unet or (not optimizer.text_encoder_lr and not network.network_train_unet_only)


def write_config_file(config: TrainConfig) -> Path:
    """Write the options of config to its --config_file and return the path; never overwrites."""
    if config.file.config_file is None:
        raise UserError("--output_config needs --config_file, the name of the file to write")
    path = with_toml_suffix(config.file.config_file)
    if path.exists():
        raise UserError(f"--output_config does not overwrite {path}: remove it or name another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_toml(config), encoding="utf-8")
    return path


def resolve(config: TrainConfig) -> TrainConfig:
    """Return config with everything that one option implies for another; each change is logged."""
    changes = []
    if config.precision.cache_latents_to_disk and not config.precision.cache_latents:
        changes.append(("precision", "cache_latents", True, "--cache_latents_to_disk implies it"))
    if config.optimizer.use_8bit_adam:
        if config.optimizer.optimizer_type.lower() not in ("adamw", "adamw8bit"):
            raise UserError(f"--use_8bit_adam contradicts --optimizer_type {config.optimizer.optimizer_type}: give one")
        changes.append(("optimizer", "optimizer_type", "AdamW8bit", "--use_8bit_adam stands for it"))
    for name in ("sample_every_n_steps", "sample_every_n_epochs"):
        interval = getattr(config.preview, name)
        if interval is not None and interval <= 0:
            changes.append(("preview", name, None, f"{interval} is no interval"))
    for section, field, value, why in changes:
        logger.info("--%s is set to %s: %s", field, value, why)
        changed = dataclasses.replace(getattr(config, section), **{field: value})
        config = dataclasses.replace(config, **{section: changed})
    return config


def with_seed(config: TrainConfig, seed: int) -> TrainConfig:
    """Return config with a seed, which the options may leave open."""
    return dataclasses.replace(config, run=dataclasses.replace(config.run, seed=seed))


def check(config: TrainConfig) -> None:
    """Raise UserError for options that are missing, contradict each other, or name files that are not there."""
    _check_required(config)
    _check_conflicts(config)
    _check_files(config)


def _check_required(config: TrainConfig) -> None:
    required = {
        "pretrained_model_name_or_path": config.model.pretrained_model_name_or_path,
        "network_module": config.network.network_module,
        "output_dir": config.saving.output_dir,
    }
    meanings = {
        "pretrained_model_name_or_path": "the base model: a file or a Diffusers folder",
        "network_module": "networks.lora trains a LoRA",
        "output_dir": "the folder to write to",
    }
    for name, value in required.items():
        if not value:
            raise UserError(f"--{name} is missing: {meanings[name]}")
    if config.data.dataset_config is None and config.data.train_data_dir is None:
        raise UserError("no training data: give --dataset_config, or --train_data_dir with N_name folders")
    if config.data.dataset_config is None and config.dataset.resolution is None:
        raise UserError("--resolution is missing: the training size in pixels, such as 512 or 512,768")


def _check_conflicts(config: TrainConfig) -> None:
    network, preview = config.network, config.preview
    _check_schedule(config.schedule, config.optimizer)
    if network.network_train_unet_only and network.network_train_text_encoder_only:
        raise UserError(
            "--network_train_unet_only and --network_train_text_encoder_only leave nothing to train: give one"
        )
    if network.dim_from_weights and network.network_weights is None:
        raise UserError("--dim_from_weights needs --network_weights, the file to take ranks from")
    if network.dim_from_weights and network.network_dim is not None:
        logger.warning("--network_dim is ignored: --dim_from_weights takes the ranks of %s", network.network_weights)
    draws = preview.sample_every_n_steps or preview.sample_every_n_epochs or preview.sample_at_first
    if draws and preview.sample_prompts is None:
        raise UserError("previews are asked for, but --sample_prompts, the file with their prompts, is missing")
    if config.logs.log_with and config.logs.logging_dir is None:
        raise UserError("--log_with tensorboard needs --logging_dir, the folder for the logs")
    _check_noise(config.loss)
    if len(network.base_weights_multiplier or ()) > len(network.base_weights or ()):
        raise UserError("--base_weights_multiplier has more numbers than --base_weights has files")


def _check_noise(loss: LossConfig) -> None:
    if loss.adaptive_noise_scale is not None and loss.noise_offset is None:
        raise UserError("--adaptive_noise_scale needs --noise_offset, to which it adds")
    lowest, limit = loss.timestep_range
    if lowest >= limit:
        raise UserError(f"--min_timestep {lowest} must be below --max_timestep {limit}")


def _check_schedule(schedule: ScheduleConfig, optimizer: OptimizerConfig) -> None:
    if schedule.lr_scheduler == "constant" and not schedule.lr_scheduler_type and schedule.lr_warmup_steps:
        raise UserError("--lr_scheduler constant has no warm-up: use constant_with_warmup, or --lr_warmup_steps 0")
    if schedule.lr_warmup_steps and (schedule.lr_scheduler_type or schedule.lr_scheduler == "piecewise_constant"):
        raise UserError(f"--lr_warmup_steps does not go with {_schedule_option(schedule)}, which has no warm-up")
    if schedule.lr_scheduler == "polynomial" and optimizer.learning_rate <= POLYNOMIAL_END:
        raise UserError(f"--lr_scheduler polynomial falls to {POLYNOMIAL_END:g}: --learning_rate must be above that")
    if schedule.lr_scheduler == "cosine_with_min_lr" and schedule.lr_scheduler_min_lr_ratio is None:
        raise UserError("--lr_scheduler cosine_with_min_lr needs --lr_scheduler_min_lr_ratio")


def _schedule_option(schedule: ScheduleConfig) -> str:
    if schedule.lr_scheduler_type:
        return f"--lr_scheduler_type {schedule.lr_scheduler_type}"
    return f"--lr_scheduler {schedule.lr_scheduler}"


def _check_files(config: TrainConfig) -> None:
    paths = {
        "vae": config.model.vae,
        "tokenizer_cache_dir": config.model.tokenizer_cache_dir,
        "dataset_config": config.data.dataset_config,
        "train_data_dir": None if config.data.dataset_config else config.data.train_data_dir,
        "reg_data_dir": None if config.data.dataset_config else config.data.reg_data_dir,
        "network_weights": config.network.network_weights,
        "sample_prompts": config.preview.sample_prompts,
    }
    for name, path in paths.items():
        if path is not None and not path.exists():
            raise UserError(f"--{name}: {path} does not exist")
        if path is not None and name.endswith("_data_dir") and not path.is_dir():
            raise UserError(f"--{name}: {path} is a file; name the folder above the N_name folders")
    for path in config.network.base_weights or ():
        if not path.exists():
            raise UserError(f"--base_weights: {path} does not exist")
    model = Path(config.model.pretrained_model_name_or_path or "")
    if not model.exists():
        raise UserError(
            f"--pretrained_model_name_or_path: {model} does not exist here, and nothing is downloaded: "
            "name a .safetensors or .ckpt file or a Diffusers folder"
        )
    output = config.saving.output_dir
    if output is not None and output.exists() and not output.is_dir():
        raise UserError(f"--output_dir: {output} is a file, not a folder")
