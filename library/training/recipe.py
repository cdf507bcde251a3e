"""The training of a network, in order: check, load, encode, build, train, save. `loop` has the training itself."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from library.config.config_file import to_toml
from library.config.train import TrainConfig, with_seed
from library.data.dataset import BatchMaker, RunPlan, make_loader
from library.data.records import TrainingSet, verify_pictures
from library.diffusion.schedule import stable_diffusion_schedule
from library.files import replacing
from library.models.base import BaseModel
from library.models.latent_encoder import LatentEncoder
from library.models.precision import move
from library.networks.trainable import build_network
from library.optim.flat import flatten_groups
from library.optim.optimizers import (
    OptimizerChoice,
    build_optimizer,
    choose_optimizer,
)
from library.optim.schedulers import build_scheduler
from library.randomness import seed_for
from library.sampling.prompts import Prompt
from library.training.charts.loss_curve import draw_loss_curve
from library.training.measure.validation import Validation
from library.training.preparation import (
    build_conditioner,
    build_validation,
    cache_latents,
    caption_options,
    check_before_loading,
    choose_seed,
    enable_gradient_checkpointing,
    find_resumed,
    num_workers,
    open_base,
    plan_run,
    warn_of_cut_captions,
)
from library.training.record import report, run_files
from library.training.record.metadata import training_metadata
from library.training.record.preview import Preview
from library.training.record.upload import Uploads, make_repository
from library.training.rehearse.dry_run import dry_run
from library.training.run.loop import BackgroundHashes, Trainer
from library.training.run.objective import Objective
from library.training.run.runtime import (
    Runtime,
    broadcast_parameters,
    shared,
    start_runtime,
)

logger = logging.getLogger(__name__)


def train(config: TrainConfig, sets: list[TrainingSet], prompts: list[Prompt]) -> Path:
    """Train a network as config says and return the path of its file; raises UserError for a user's mistake.

    With --dry_run nothing is trained, and the path is that of the report.
    """
    # Find whatever is wrong before anything large is loaded.
    choice = choose_optimizer(config.optimizer)
    files = check_before_loading(config, prompts, choice)
    report.describe_data(sets)
    if config.run.dry_run or not config.precision.cache_latents:
        verify_pictures(sets)
    if config.run.dry_run:
        return dry_run(config, sets, choice=choice, files=files)

    # Load the base model.
    runtime = start_runtime(config.precision, config.logs)
    resumed = find_resumed(config, runtime)
    config = with_seed(config, shared(choose_seed(config, resumed), runtime))
    if runtime.is_main:
        make_repository(config.hub)
    base = open_base(files, config.network, config.precision, config.text.clip_skip, runtime)
    del files  # with what it holds of a pickle
    text = caption_options(config.text)
    warn_of_cut_captions(sets, base, text)

    # Build the network over the models; first, because a network module may refuse.
    torch.manual_seed(seed_for(config.run.seed, "network"))
    checkpointing = config.precision.gradient_checkpointing
    network = build_network(config.network, config.optimizer, base, checkpointing=checkpointing, device=runtime.device)
    for parameter in network.all_parameters():  # but no buffers, where alphas are
        parameter.data = parameter.data.to(runtime.types.adapter)
    broadcast_parameters(network.all_parameters(), runtime.num_processes)
    if checkpointing:
        enable_gradient_checkpointing(base, network)

    # Encode pictures, and captions that cannot change.
    encoder = LatentEncoder(base.vae, runtime.types.vae)
    cache = cache_latents(config.precision, sets, encoder, runtime) if config.precision.cache_latents else None
    move(base.vae, "cpu" if cache is not None else runtime.device)
    conditioner = build_conditioner(sets, prompts, base, text, runtime, trains_text_encoder=network.trains_text_encoder)

    # Train and save.
    plan = plan_run(config, sets, resumed, rank=runtime.rank, num_processes=runtime.num_processes)
    preview = Preview(config.preview, config.saving, prompts, config.run.seed, config.text.clip_skip)
    validation = build_validation(config, sets, cache)
    objective = Objective(
        base=base,
        network=network,
        encoder=encoder,
        conditioner=conditioner,
        text=text,
        schedule=stable_diffusion_schedule(zero_terminal_snr=config.loss.zero_terminal_snr).to(runtime.device),
        loss=config.loss,
        types=runtime.types,
        device=runtime.device,
        seed=config.run.seed,
        vae_batch_size=config.precision.vae_batch_size,
    )
    trainer = build_trainer(
        config, runtime, objective, choice=choice, plan=plan, preview=preview, validation=validation
    )
    if resumed is not None:
        trainer.resume(resumed)
    if runtime.is_main:
        write_options(config)
    maker = BatchMaker(sets, config.run.seed, plan.num_steps, config.data.prior_loss_weight, cache)
    with trainer.uploads:
        trainer.run(make_loader(maker, plan, num_workers(config, cache)))
        return finish(config, trainer)


def finish(config: TrainConfig, trainer: Trainer) -> Path:
    """Save the finished network, and a state if one is wanted; tell how it went and return the path of the file."""
    final = run_files.final_file(config.saving)
    trainer.save(final, epoch=trainer.plan.num_epochs)
    if config.state.save_state or config.state.save_state_on_train_end:
        trainer.save_state(final, trainer.plan.num_epochs)
    if trainer.runtime.is_main:
        report.describe_result(trainer.network, final)
        if trainer.preview.columns:
            logger.info("pictures: %s", trainer.preview.sheet)
        curve = run_files.loss_curve_file(config.saving)
        if draw_loss_curve(run_files.metrics_file(config.saving), curve):
            logger.info("course of the loss: %s", curve)
    return final


def write_options(config: TrainConfig) -> None:
    """Write all options of the run beside its files, as a --config_file that repeats it."""
    path = run_files.options_file(config.saving)
    with replacing(path) as temporary:
        temporary.write_text(to_toml(config), encoding="utf-8")
    logger.info("the options of this run are in %s", path)


def build_trainer(
    config: TrainConfig,
    runtime: Runtime,
    objective: Objective,
    *,
    choice: OptimizerChoice,
    plan: RunPlan,
    preview: Preview,
    validation: Validation | None,
) -> Trainer:
    """Return the loop with its optimizer and schedule; tell in numbers what it will do."""
    network = objective.network
    groups, names = network.groups(config.optimizer)
    if choice.elementwise:
        groups = flatten_groups(groups)
    rate = config.optimizer.learning_rate
    optimizer = build_optimizer(choice, groups, rate)
    report.describe_run(config, plan, network, names, run_files.final_file(config.saving))
    trainer = Trainer(
        config=config,
        runtime=runtime,
        objective=objective,
        network=network,
        optimizer=optimizer,
        scheduler=build_scheduler(config.schedule, optimizer, plan.num_steps, rate),
        group_names=names,
        plan=plan,
        preview=preview,
        validation=validation,
        metadata=describe(config, plan.sets, objective.base, choice, plan),
        hashes=BackgroundHashes(config, is_needed=runtime.is_main),
        uploads=Uploads(config.hub, is_main=runtime.is_main),
        is_flat=choice.elementwise,
    )
    trainer.prepare()
    return trainer


def describe(
    config: TrainConfig, sets: list[TrainingSet], base: BaseModel, choice: OptimizerChoice, plan: RunPlan
) -> dict[str, Any]:
    """Return the metadata that is known when training starts."""
    return training_metadata(
        config,
        sets,
        family=base.family,
        predicts_v=base.predicts_v,
        optimizer=choice.record,
        num_processes=plan.num_processes,
        numbers={
            "max_train_steps": plan.num_steps,
            "num_epochs": plan.num_epochs,
            "num_batches_per_epoch": plan.batches_per_epoch,
        },
    )
