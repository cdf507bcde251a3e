"""What a run needs before its first step: checks without loading, models in place, caches, the plan."""

from __future__ import annotations

import dataclasses
import logging
import random
import tempfile
from pathlib import Path

import torch
from torch import nn

from library.config.hub import parse_hub_state
from library.config.loss import LossConfig
from library.config.model import ModelConfig
from library.config.network import NetworkConfig
from library.config.saving import SavingConfig
from library.config.train import TrainConfig
from library.config.training import PrecisionConfig, TextConfig
from library.data.captions import possible_captions
from library.data.dataset import BatchMaker, RunPlan
from library.data.latent_cache import LatentCache, build_cache
from library.data.records import TrainingSet
from library.errors import Problems, UserError, shown
from library.models.attention import use_xformers
from library.models.base import BaseFiles, BaseModel, find_base, load_base, text_body
from library.models.conditioning import PER_WINDOW, Conditioner, LiveConditioner, TextOptions, remember, tokenize
from library.models.eight_bit import store_in_eight_bits
from library.models.latent_encoder import LatentEncoder
from library.models.precision import move
from library.networks.merging import merge_base_weights
from library.networks.modules import check_network
from library.networks.trainable import TrainableNetwork, trained_parts
from library.optim.optimizers import (
    OptimizerChoice,
    check_optimizer,
    warn_of_rates,
)
from library.optim.schedulers import check_scheduler
from library.sampling.generate import text_options
from library.sampling.prompts import Prompt
from library.sampling.samplers import check_sampler
from library.training.measure.validation import Validation
from library.training.record import run_files
from library.training.record.metadata import thumbnail
from library.training.record.tracking import check_trackers, tracker_names
from library.training.record.upload import fetch_state
from library.training.run.runtime import Runtime
from library.training.run.state import find_state, read_position

logger = logging.getLogger(__name__)

DOWNLOADED = "from_hub"  # folder in --output_dir for states from the hub


def check_before_loading(config: TrainConfig, prompts: list[Prompt], choice: OptimizerChoice) -> BaseFiles:
    """Return what kind of model will be loaded; raises UserError for everything that shows without loading it."""
    problems = Problems()
    problems.run(check_network, config.network)
    problems.run(trained_parts, config.network, config.optimizer)
    problems.run(check_steps, config, choice)
    warn_of_rates(choice, config.optimizer)
    if choice.is_schedule_free and (config.schedule.lr_scheduler != "constant" or config.schedule.lr_scheduler_type):
        logger.warning("%s needs no schedule; --lr_scheduler goes unused", choice.kind.__name__)
    if choice.sets_own_rate:
        logger.info("%s sets its own learning rate (relative_step); given rates are not used", choice.kind.__name__)
    problems.run(thumbnail, config.metadata)
    problems.run(check_trackers, config.logs)
    for name in {prompt.sample_sampler or config.preview.sample_sampler for prompt in prompts}:
        problems.run(check_sampler, name)
    files = problems.run(checked_base, config.model, config.loss)
    problems.raise_if_any()
    assert files is not None  # else there was a problem
    # Last, for it makes the folders.
    check_output(config.saving)
    if tracker_names(config.logs) and config.logs.logging_dir is not None:
        check_folder("logging_dir", config.logs.logging_dir)
    return files


def check_steps(config: TrainConfig, choice: OptimizerChoice) -> None:
    """Raise UserError for an optimizer or a schedule that refuses its arguments."""
    probe = check_optimizer(choice, config.optimizer.learning_rate)
    # How many steps epochs are is not known yet.
    num_steps = config.run.max_train_steps if config.run.max_train_epochs is None else 1
    check_scheduler(config.schedule, probe, config.optimizer.learning_rate, num_steps)


def checked_base(model: ModelConfig, loss: LossConfig) -> BaseFiles:
    """Return what kind of model will be loaded; raises UserError for one that does not go with the options."""
    files = find_base(model)
    check_prediction(loss, predicts_v=files.predicts_v)
    return files


def check_output(saving: SavingConfig) -> None:
    """Make the output folder; raises UserError where the files of the run cannot be written to it."""
    check_folder("output_dir", saving.output_dir)
    final = run_files.final_file(saving)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=final.parent, prefix=f".{run_files.step_file(saving, 0).name}"):
            pass
    except OSError as error:
        raise UserError(
            f"--output_name: no file can have the name {shown(saving.output_name)} ({error.strerror}); take another"
        ) from None
    if final.is_dir():
        raise UserError(f"--output_name: {final}, the file to be written, is a folder; take another name")


def check_folder(option: str, folder: Path) -> None:
    """Make a folder; raises UserError where nothing can be written to it, which would show only in training."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"--{option}: nothing can be written to {folder} ({error.strerror}); name another folder"
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


def open_base(
    files: BaseFiles, network: NetworkConfig, precision: PrecisionConfig, clip_skip: int | None, runtime: Runtime
) -> BaseModel:
    """Return the base model of a run, with what is merged into it, where every step needs it; the VAE is on the CPU."""
    base = load_base(files, runtime.types)
    check_clip_skip(clip_skip, base)
    merge_base_weights(network, base)
    place_models(precision, base, runtime.device)
    return base


def place_models(precision: PrecisionConfig, base: BaseModel, device: torch.device) -> None:
    """Move what every step needs to the device, with the attention and the storage that were asked for."""
    if precision.xformers:
        use_xformers(device, base.unet, base.vae)
    in_eight_bits: list[nn.Module] = [base.unet] if precision.fp8_base or precision.fp8_base_unet else []
    if precision.fp8_base and not precision.fp8_base_unet:
        in_eight_bits += base.text_modules
    if in_eight_bits:
        saved = sum(store_in_eight_bits(model) for model in in_eight_bits)
        logger.info("weights in 8 bits: %.2f GB less", saved / 1e9)
    for model in (base.unet, *base.text_modules):
        model.to(device)


def caption_options(text: TextConfig) -> TextOptions:
    """Return how captions are read."""
    return TextOptions(
        windows=(text.max_token_length or PER_WINDOW) // PER_WINDOW,
        clip_skip=text.clip_skip,
        weights="none" if text.weighted_captions else None,
    )


def check_clip_skip(clip_skip: int | None, base: BaseModel) -> None:
    """Raise UserError for a --clip_skip beyond the layers of a text encoder."""
    layers = min(text.num_layers for text in base.texts)
    if (clip_skip or 1) > layers:
        raise UserError(f"--clip_skip must be at most {layers}, the layers of this text encoder, got {clip_skip}")


def warn_of_cut_captions(sets: list[TrainingSet], base: BaseModel, options: TextOptions) -> None:
    """Warn of captions longer than what the text encoder is given."""
    captions = sorted({line for entry in sets for record in entry.all_records for line in record.caption.split("\n")})
    number = sum(tokens.windows > options.windows for tokens in tokenize(base.texts[0], captions, options))
    if number:
        logger.warning(
            "%d captions have more than %d tokens and are cut; --max_token_length takes 150 or 225",
            number,
            options.num_tokens,
        )


def cache_latents(
    precision: PrecisionConfig, sets: list[TrainingSet], encoder: LatentEncoder, runtime: Runtime
) -> LatentCache:
    """Return the cache of all pictures; entries on disk are made by all processes together."""
    on_disk = precision.cache_latents_to_disk
    identity = encoder.identity() if on_disk else "in memory"
    move(encoder.vae, runtime.device)

    def build(share: tuple[int, int]) -> LatentCache:
        return build_cache(
            sets,
            lambda pixels: encoder.moments(pixels).cpu(),
            encoder=identity,
            batch_size=precision.vae_batch_size,
            on_disk=on_disk,
            share=share,
        )

    if on_disk and runtime.num_processes > 1:
        build((runtime.rank, runtime.num_processes))
        runtime.barrier()
    return build((0, 1))


LARGEST_MEMORY = 2 * 2**30  # bytes of text conditioning that are kept rather than computed in every step


def build_conditioner(
    sets: list[TrainingSet],
    prompts: list[Prompt],
    base: BaseModel,
    options: TextOptions,
    runtime: Runtime,
    *,
    trains_text_encoder: bool,
) -> Conditioner:
    """Return what gives captions and prompts their conditioning.

    Where no text can change, all are encoded now, and the text encoders' memory is released.
    """
    live = LiveConditioner(base.texts)
    captions = None if trains_text_encoder else all_captions(sets)
    if captions is None:
        return live
    width = base.unet.config["cross_attention_dim"]
    if len(captions) * (options.num_tokens + 2) * width * runtime.types.unet.itemsize > LARGEST_MEMORY:
        return live
    wanted = [(caption, options) for caption in captions]
    for prompt in prompts:
        of_prompt = text_options(base.texts[0], prompt, options.clip_skip)
        wanted += [(prompt.prompt, of_prompt), (prompt.negative_prompt, of_prompt)]
    with runtime.types.autocast(runtime.device):
        remembered = remember(live, wanted)
    for module in base.text_modules:
        module.to("meta")
    return remembered


def all_captions(sets: list[TrainingSet]) -> set[str] | None:
    """Return every text that a caption can be in the run, or None where captions change as they are drawn."""
    captions: set[str] = set()
    for record in (record for entry in sets for record in entry.all_records):
        possible = possible_captions(record.caption, record.subset)
        if possible is None:
            return None
        captions |= possible
    return captions


def build_validation(config: TrainConfig, sets: list[TrainingSet], cache: LatentCache | None) -> Validation | None:
    """Return what measures the loss on the pictures that are held out; None if there are none."""
    held_out = [TrainingSet(entry.options, entry.held_out) for entry in sets]
    if not any(entry.records for entry in held_out):
        if config.validation.validate_every_n_steps or config.validation.validate_every_n_epochs:
            logger.warning("nothing is held out to validate on: give --validation_split")
        return None
    given = config.dataset.validation_seed
    seed = config.run.seed if given is None else given
    # The number of steps serves the token warm-up only, which is off here.
    maker = BatchMaker(held_out, seed, 1, config.data.prior_loss_weight, cache)
    return Validation(config.validation, held_out, maker, seed)


def enable_gradient_checkpointing(base: BaseModel, network: TrainableNetwork) -> None:
    """Compute activations again in the backward pass; transformers does so only in training mode.

    Neither model has a dropout, so training mode changes nothing else.
    """
    base.unet.enable_gradient_checkpointing()
    base.unet.train()
    if network.trains_text_encoder:
        for encoder in base.text_modules:
            # Older transformers have only the second name; newer ones warn of it.
            enable = getattr(encoder, "activation_checkpointing_enable", None) or encoder.gradient_checkpointing_enable
            enable({"use_reentrant": False})
            text_body(encoder).train()


def find_resumed(config: TrainConfig, runtime: Runtime) -> Path | None:
    """Return the state to go on from; the first process downloads one that is on the hub."""
    if not config.hub.resume_from_huggingface:
        return find_state(config.state.resume, config.saving) if config.state.resume else None
    place = parse_hub_state(config.state.resume)
    folder = config.saving.output_dir / DOWNLOADED / place.name
    if runtime.is_main:
        fetch_state(place, config.hub, folder)
    runtime.barrier()
    return find_state(str(folder), config.saving)


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


def plan_run(
    config: TrainConfig, sets: list[TrainingSet], resumed: Path | None, *, rank: int, num_processes: int
) -> RunPlan:
    """Return the plan of the run for one process; --max_train_epochs takes the place of --max_train_steps."""
    plan = RunPlan(
        sets=sets,
        seed=config.run.seed,
        num_steps=config.run.max_train_steps,
        accumulation=config.run.gradient_accumulation_steps,
        rank=rank,
        num_processes=num_processes,
    )
    if config.run.max_train_epochs is not None:
        plan = dataclasses.replace(plan, num_steps=config.run.max_train_epochs * plan.steps_per_epoch)
    plan = dataclasses.replace(plan, start_step=start_step(config, resumed, plan.steps_per_epoch))
    # A run that was stopped between its last step and its file has only the file left to write.
    is_through = run_files.final_file(config.saving).exists()
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
