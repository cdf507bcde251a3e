"""Checks that need torch but no model; they run before anything large is loaded."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from library.config.dataset_file import check_bucket_steps
from library.config.loss import LossConfig
from library.config.model import ModelConfig
from library.config.network import NetworkConfig
from library.config.prompts import Prompt
from library.config.samplers import SamplerName
from library.config.saving import SavingConfig
from library.config.train import TrainConfig
from library.config.training import PrecisionConfig
from library.data.latent_cache import check_folders
from library.data.records import Dataset
from library.errors import Problems, UserError, shown
from library.models.base import BaseFiles, find_base
from library.models.family import ModelFamily
from library.networks.modules import check_arguments, check_network
from library.networks.parts import trained_parts
from library.optim.optimizers import CPU, OptimizerChoice, StepError, check_optimizer, warn_of_rates
from library.optim.schedulers import check_scheduler
from library.sampling.samplers import check_sampler
from library.training.prepare.speed import graphs_obstacle
from library.training.record.metadata import thumbnail
from library.training.record.run_files import RunFiles
from library.training.record.tracking import check_trackers, tracker_names

logger = logging.getLogger(__name__)


def check_before_loading(
    config: TrainConfig, datasets: Sequence[Dataset], prompts: list[Prompt], choice: OptimizerChoice
) -> BaseFiles:
    """Return the files of the base model; raises UserError for all mistakes that can be found without loading it."""
    problems = Problems()
    problems.run(check_network, config.network)
    problems.run(check_steps_early, config, choice)
    warn_of_rates(choice, config.optimizer)
    if choice.is_schedule_free and (config.schedule.lr_scheduler != "constant" or config.schedule.lr_scheduler_type):
        logger.warning("%s needs no schedule; --lr_scheduler goes unused", choice.kind.__name__)
    if choice.sets_own_rate:
        logger.info("%s sets its own learning rate (relative_step); given rates are not used", choice.kind.__name__)
    problems.run(check_graphs, config.precision, config.network)
    if config.precision.cache_latents_to_disk:
        problems.run(check_folders, datasets)
    problems.run(thumbnail, config.metadata)
    problems.run(check_trackers, config.logs)
    files = check_base(
        problems, config.model, config.loss, datasets, prompts=prompts, sampler=config.preview.sample_sampler
    )
    rates, encoders = config.optimizer.text_encoder_lr or (), len(files.checkpoint.family.text_models)
    trained = problems.run(trained_parts, config.network, config.optimizer, encoders)
    if trained is not None:
        problems.run(check_text_cache, config.precision, trains_text_encoder=any(trained.texts))
    problems.run(check_arguments, config.network, files.checkpoint.family)
    problems.raise_if_any()
    if len(rates) > encoders:
        logger.warning("--text_encoder_lr has %d rates; the text encoders of the model: %d", len(rates), encoders)
    # Last, because it creates the folders.
    check_output(config.saving)
    if tracker_names(config.logs) and config.logs.logging_dir is not None:
        check_folder("logging_dir", config.logs.logging_dir)
    return files


def check_graphs(precision: PrecisionConfig, network: NetworkConfig) -> None:
    """Raise UserError for passes that are to be recorded and cannot be."""
    if precision.cuda_graphs and (obstacle := graphs_obstacle(precision, network)):
        raise UserError(f"--cuda_graphs does not go with {obstacle}; leave one of them out")


def check_text_cache(precision: PrecisionConfig, *, trains_text_encoder: bool) -> None:
    """Raise UserError for stored outputs of text encoders that are trained, which change with every step."""
    if precision.cache_text_encoder_outputs and trains_text_encoder:
        raise UserError(
            "--cache_text_encoder_outputs needs --network_train_unet_only: the outputs of text encoders that are "
            "trained change with every step"
        )


def check_steps_early(config: TrainConfig, choice: OptimizerChoice) -> None:
    """Raise UserError for an optimizer or a schedule that the CPU shows not to accept its arguments.

    Nothing touches a GPU before the runtime has given this process its own: each of several processes would take memory
    of the first one. An optimizer that works on GPUs only is tried when the run has its GPU.
    """
    try:
        check_steps(config, choice, CPU)
    except StepError as error:
        if not torch.accelerator.is_available():
            raise
        if config.run.dry_run:
            raise UserError(f"{error}; a dry run uses no GPU, so leave out --dry_run to try it there") from error


def check_steps(config: TrainConfig, choice: OptimizerChoice, device: torch.device) -> None:
    """Raise UserError for an optimizer or a schedule that refuses its arguments, or does not work on a device."""
    probe = check_optimizer(choice, config.optimizer.learning_rate, device)
    # The number of steps in an epoch is not known yet.
    num_steps = config.run.max_train_steps if config.run.max_train_epochs is None else 1
    check_scheduler(config.schedule, probe, config.optimizer.learning_rate, num_steps)


def check_base(
    problems: Problems,
    model: ModelConfig,
    loss: LossConfig,
    datasets: Sequence[Dataset],
    *,
    prompts: Sequence[Prompt],
    sampler: SamplerName,
) -> BaseFiles:
    """Return the files of the base model; raises UserError for all problems, including those found before.

    sampler is for prompts without their own.
    """
    for name in {prompt.sampler or sampler for prompt in prompts}:
        problems.run(check_sampler, name)
    files = problems.run(find_base, model, zero_snr=loss.zero_terminal_snr)
    if files is not None:
        problems.run(check_prediction, loss, predicts_v=files.predicts_v)
        check_sides(datasets, files.checkpoint.family, problems)
    problems.raise_if_any()
    assert files is not None  # else there was a problem
    return files


def options_for(config: TrainConfig, family: ModelFamily) -> TrainConfig:
    """Return the options of a run for a family: without a --clip_skip that has no effect, which is told."""
    given = config.text.clip_skip
    used = family.clip_skip(given)
    if given is None or used == given:
        return config
    logger.info("%s", family.clip_skip_note(given))
    return dataclasses.replace(config, text=dataclasses.replace(config.text, clip_skip=used))


def check_sides(datasets: Sequence[Dataset], family: ModelFamily, problems: Problems) -> None:
    """Add to problems the sides of buckets that the models of a family do not take."""
    for dataset in datasets:
        check_bucket_steps(dataset.options, dataset.place, family.step, f" for {family.title}", problems)


def check_output(saving: SavingConfig) -> None:
    """Create the output folder; raises UserError if the files of the run cannot be written to it."""
    files = RunFiles(saving)
    final = files.network
    check_folder("output_dir", saving.output_dir)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=final.parent, prefix=f".{files.after_step(0).name}"):
            pass
    except OSError as error:
        raise UserError(
            f"--output_name: no file can have the name {shown(saving.output_name)} ({error.strerror}); take another"
        ) from None
    if final.is_dir():
        raise UserError(f"--output_name: {final}, the file to be written, is a folder; take another name")


def check_folder(option: str, folder: Path) -> None:
    """Create a folder; raises UserError if nothing can be written to it, which would otherwise fail in training."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"--{option}: nothing can be written to {folder} ({error.strerror}); name another folder"
        ) from None


def check_prediction(loss: LossConfig, *, predicts_v: bool) -> None:
    """Raise UserError for a loss weighting of the other prediction type."""
    if loss.scale_v_pred_loss_like_noise_pred and not predicts_v:
        raise UserError("--scale_v_pred_loss_like_noise_pred needs --v_parameterization")
    if loss.v_pred_like_loss and predicts_v:
        raise UserError("--v_pred_like_loss is for models that predict noise; leave it out with --v_parameterization")
    if loss.zero_terminal_snr and not predicts_v:
        logger.warning(
            "--zero_terminal_snr without --v_parameterization: at the last timestep there is nothing to predict from, "
            "and previews are drawn with the usual schedule"
        )
