"""The training of a network, in order: check, load, encode, build, train, save. `loop` has the training itself."""

from __future__ import annotations

import dataclasses
import logging
import random
import tempfile
from pathlib import Path
from typing import Any

import torch

from library.config.loss import LossConfig
from library.config.options import to_toml
from library.config.train import TrainConfig, with_seed
from library.data.dataset import BatchMaker, RunPlan, make_loader
from library.data.latent_cache import LatentCache, build_cache
from library.data.records import TrainingSet, verify_pictures
from library.diffusion.schedule import stable_diffusion_schedule
from library.errors import UserError
from library.models.loading import Detected, LoadedModels, detect, load_models, text_model
from library.models.text_encoding import PER_WINDOW, num_cut_captions
from library.optim.flat import flatten_groups
from library.optim.optimizers import OptimizerChoice, build_optimizer, check_optimizer, choose_optimizer
from library.optim.schedulers import build_scheduler, check_scheduler
from library.randomness import seed_for
from library.sampling.prompts import Prompt
from library.sampling.samplers import check_sampler
from library.training import checkpoints, report
from library.training.loop import BackgroundHashes, Trainer, encode_pixels
from library.training.metadata import thumbnail, training_metadata
from library.training.network_protocol import TrainableNetwork, build_network, check_network, trained_parts
from library.training.preview import Preview
from library.training.runtime import (
    Runtime,
    broadcast_parameters,
    shared,
    start_runtime,
    use_attention,
)
from library.training.state import find_state, read_position
from library.weights_io import open_weights, replacing, tensors_sha256

logger = logging.getLogger(__name__)


def train(config: TrainConfig, sets: list[TrainingSet], prompts: list[Prompt]) -> Path:
    """Train a network as config says and return the path of its file; raises UserError for a user's mistake."""
    # Find whatever is wrong before anything large is loaded.
    choice = choose_optimizer(config.optimizer)
    detected = check_before_loading(config, prompts, choice)
    resumed = find_state(config.state.resume, config.saving) if config.state.resume else None
    report.describe_data(sets)
    if not config.precision.cache_latents:
        verify_pictures(sets)

    # Load the base model.
    runtime = start_runtime(config.precision, config.logs)
    config = with_seed(config, shared(choose_seed(config, resumed), runtime))
    models = load_models(config.model, detected, dtype=runtime.dtype, vae_dtype=runtime.vae_dtype)
    del detected  # with what it holds of the file
    check_clip_skip(config, models)
    place_models(config, models, runtime)
    warn_of_cut_captions(config, sets, models)

    # Encode the pictures.
    cache = cache_latents(config, sets, models, runtime) if config.precision.cache_latents else None
    models.vae.to("cpu" if cache is not None else runtime.device)

    # Build the network over the models.
    torch.manual_seed(seed_for(config.run.seed, "network"))
    checkpointing = config.precision.gradient_checkpointing
    network = build_network(
        config.network, config.optimizer, models, checkpointing=checkpointing, device=runtime.device
    )
    broadcast_parameters(network.network.parameters(), runtime.num_processes)
    if checkpointing:
        enable_gradient_checkpointing(models, network)

    # Train and save.
    plan = plan_run(config, sets, runtime, resumed)
    preview = Preview(config.preview, config.saving, prompts, config.run.seed, config.text.clip_skip)
    trainer = build_trainer(config, runtime, models, network, choice=choice, plan=plan, preview=preview)
    if resumed is not None:
        trainer.resume(resumed)
    maker = BatchMaker(sets, config.run.seed, plan.num_steps, config.data.prior_loss_weight, cache)
    trainer.run(make_loader(maker, plan, num_workers(config, cache)))
    return finish(config, trainer)


def finish(config: TrainConfig, trainer: Trainer) -> Path:
    """Save the finished network, and a state if one is wanted; tell how it went and return the path of the file."""
    final = checkpoints.final_file(config.saving)
    trainer.save(final, epoch=trainer.plan.num_epochs)
    if config.state.save_state or config.state.save_state_on_train_end:
        trainer.save_state(final, trainer.plan.num_epochs)
    if trainer.runtime.is_main:
        report.describe_result(trainer.network, final)
        if trainer.preview.columns:
            logger.info("pictures: %s", trainer.preview.sheet)
    return final


# --------------------------------------------------------------------------------------------------------------
# Preparation
# --------------------------------------------------------------------------------------------------------------


def check_before_loading(config: TrainConfig, prompts: list[Prompt], choice: OptimizerChoice) -> Detected:
    """Return what kind of model will be loaded; raises UserError for everything that shows without loading it."""
    check_network(config.network)
    trained_parts(config.network, config.optimizer)
    probe = check_optimizer(choice, config.optimizer.learning_rate)
    check_scheduler(config.schedule, probe, config.optimizer.learning_rate)
    if choice.sets_own_rate:
        logger.info("%s sets its own learning rate (relative_step); given rates are not used", choice.kind.__name__)
    thumbnail(config.metadata)
    for prompt in prompts:
        check_sampler(prompt.sample_sampler or config.preview.sample_sampler)
    detected = detect(config.model)
    check_prediction(config.loss, predicts_v=bool(detected.predicts_v))
    if config.model.vae is not None and config.model.vae.is_file():
        open_weights(config.model.vae)
    check_output(config.saving.output_dir)
    return detected


def write_options(config: TrainConfig) -> None:
    """Write all options of the run beside its files, as a --config_file that repeats it."""
    path = checkpoints.options_file(config.saving)
    with replacing(path) as temporary:
        temporary.write_text(to_toml(config), encoding="utf-8")
    logger.info("the options of this run are in %s", path)


def check_output(folder: Path) -> None:
    """Make the output folder; raises UserError where nothing can be written, which would show only after training."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"--output_dir: nothing can be written to {folder} ({error.strerror}); name another folder"
        ) from None


def check_prediction(loss: LossConfig, *, predicts_v: bool) -> None:
    """Raise UserError for a weighting that belongs to the other kind of prediction."""
    if loss.scale_v_pred_loss_like_noise_pred and not predicts_v:
        raise UserError("--scale_v_pred_loss_like_noise_pred needs --v_parameterization")
    if loss.v_pred_like_loss and predicts_v:
        raise UserError("--v_pred_like_loss is for models that predict noise; leave it out with --v_parameterization")
    if loss.zero_terminal_snr and not predicts_v:
        logger.warning(
            "--zero_terminal_snr without --v_parameterization: at the last timestep there is nothing to predict from"
        )


def place_models(config: TrainConfig, models: LoadedModels, runtime: Runtime) -> None:
    """Move what every step needs to the device, with the attention that was asked for."""
    use_attention(config.precision, models.unet, models.vae, runtime.device)
    for model in (models.unet, *models.text_encoders):
        model.to(runtime.device)


def build_trainer(
    config: TrainConfig,
    runtime: Runtime,
    models: LoadedModels,
    network: TrainableNetwork,
    *,
    choice: OptimizerChoice,
    plan: RunPlan,
    preview: Preview,
) -> Trainer:
    """Return the loop with its optimizer and schedule; tell in numbers what it will do."""
    groups, names = network.groups(config.optimizer)
    if choice.elementwise:
        groups = flatten_groups(groups)
    rate = config.optimizer.learning_rate
    optimizer = build_optimizer(choice, groups, rate)
    report.describe_run(config, plan, network, names, checkpoints.final_file(config.saving))
    if runtime.is_main:
        write_options(config)
    trainer = Trainer(
        config=config,
        runtime=runtime,
        models=models,
        network=network,
        optimizer=optimizer,
        scheduler=build_scheduler(config.schedule, optimizer, plan.num_steps, rate),
        group_names=names,
        plan=plan,
        schedule=stable_diffusion_schedule(zero_terminal_snr=config.loss.zero_terminal_snr).to(runtime.device),
        preview=preview,
        metadata=describe(config, plan.sets, models, choice, plan),
        hashes=BackgroundHashes(config, is_needed=runtime.is_main),
        is_flat=choice.elementwise,
    )
    trainer.prepare()
    return trainer


def check_clip_skip(config: TrainConfig, models: LoadedModels) -> None:
    """Raise UserError for a --clip_skip beyond the layers of the text encoder."""
    layers = len(text_model(models.text_encoders[0]).encoder.layers)
    if (config.text.clip_skip or 1) > layers:
        raise UserError(
            f"--clip_skip must be at most {layers}, the layers of this text encoder, got {config.text.clip_skip}"
        )


def warn_of_cut_captions(config: TrainConfig, sets: list[TrainingSet], models: LoadedModels) -> None:
    """Warn of captions longer than what the text encoder is given."""
    limit = config.text.max_token_length or PER_WINDOW
    captions = sorted({line for entry in sets for record in entry.records for line in record.caption.split("\n")})
    number = num_cut_captions(models.tokenizers[0], captions, limit)
    if number:
        logger.warning(
            "%d captions have more than %d tokens and are cut; --max_token_length takes 150 or 225", number, limit
        )


def cache_latents(config: TrainConfig, sets: list[TrainingSet], models: LoadedModels, runtime: Runtime) -> LatentCache:
    """Return the cache of all pictures; entries on disk are made by all processes together."""
    on_disk = config.precision.cache_latents_to_disk
    weights = tensors_sha256(models.vae.state_dict()) if on_disk else "in memory"
    models.vae.to(runtime.device)

    def build(share: tuple[int, int]) -> LatentCache:
        return build_cache(
            sets,
            lambda pixels: encode_pixels(models, runtime, pixels).cpu(),
            encoder=f"{weights} {runtime.vae_dtype}",
            batch_size=config.precision.vae_batch_size,
            on_disk=on_disk,
            share=share,
        )

    if on_disk and runtime.num_processes > 1:
        build((runtime.rank, runtime.num_processes))
        runtime.barrier()
    return build((0, 1))


def enable_gradient_checkpointing(models: LoadedModels, network: TrainableNetwork) -> None:
    """Compute activations again in the backward pass; transformers does so only in training mode.

    Neither model has a dropout, so training mode changes nothing else.
    """
    models.unet.enable_gradient_checkpointing()
    models.unet.train()
    if network.trains_text_encoder:
        for encoder in models.text_encoders:
            # Older transformers have only the second name; newer ones warn of it.
            enable = getattr(encoder, "activation_checkpointing_enable", None) or encoder.gradient_checkpointing_enable
            enable({"use_reentrant": False})
            text_model(encoder).train()


def choose_seed(config: TrainConfig, resumed: Path | None) -> int:
    """Return the seed of the options, else of the state that is resumed, else a new one."""
    if resumed is not None:
        seed = read_position(resumed).seed
        if config.run.seed not in (None, seed):
            logger.warning("--seed %d is not that of the state, %d: the run goes on otherwise", config.run.seed, seed)
        return seed if config.run.seed is None else config.run.seed
    return random.SystemRandom().randrange(2**32) if config.run.seed is None else config.run.seed


def start_step(config: TrainConfig, resumed: Path | None, steps_per_epoch: int) -> int:
    """Return how many steps were made before this run begins."""
    if config.state.initial_step is not None:
        return config.state.initial_step
    if config.state.initial_epoch is not None:
        return (config.state.initial_epoch - 1) * steps_per_epoch
    if config.state.resume and resumed is None:
        logger.info("--resume auto: no state of %s yet; the run begins", config.saving.output_name or "this name")
    return 0 if resumed is None else read_position(resumed).current_step


def plan_run(config: TrainConfig, sets: list[TrainingSet], runtime: Runtime, resumed: Path | None) -> RunPlan:
    """Return the plan of the run for this process; --max_train_epochs takes the place of --max_train_steps."""
    plan = RunPlan(
        sets=sets,
        seed=config.run.seed,
        num_steps=config.run.max_train_steps,
        accumulation=config.run.gradient_accumulation_steps,
        rank=runtime.rank,
        num_processes=runtime.num_processes,
    )
    if config.run.max_train_epochs is not None:
        plan = dataclasses.replace(plan, num_steps=config.run.max_train_epochs * plan.steps_per_epoch)
    plan = dataclasses.replace(plan, start_step=start_step(config, resumed, plan.steps_per_epoch))
    # A run that was stopped between its last step and its file has only the file left to write.
    is_through = checkpoints.final_file(config.saving).exists()
    if plan.start_step > plan.num_steps or (plan.start_step == plan.num_steps and is_through):
        raise UserError(
            f"nothing is left to train: {plan.start_step} steps are made, and {plan.num_steps} are asked for"
        )
    if plan.start_step:
        logger.info(
            "goes on after step %d of %d%s", plan.start_step, plan.num_steps, f" from {resumed}" if resumed else ""
        )
    return plan


def num_workers(config: TrainConfig, cache: LatentCache | None) -> int:
    """Return how many processes load pictures; cached latents need none."""
    import os

    return 0 if cache is not None else min(config.run.max_data_loader_n_workers, max(0, (os.cpu_count() or 1) - 1))


def describe(
    config: TrainConfig, sets: list[TrainingSet], models: LoadedModels, choice: OptimizerChoice, plan: RunPlan
) -> dict[str, Any]:
    """Return the metadata that is known when training starts."""
    return training_metadata(
        config,
        sets,
        family=models.family,
        predicts_v=models.predicts_v,
        optimizer=choice.record,
        num_processes=plan.num_processes,
        numbers={
            "max_train_steps": plan.num_steps,
            "num_epochs": plan.num_epochs,
            "num_batches_per_epoch": plan.batches_per_epoch,
        },
    )
