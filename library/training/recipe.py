"""The training of a network, in order: check, load, encode, build, train, save. `run.loop` has the training itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from library.config.config_file import to_toml
from library.config.preview import PreviewConfig
from library.config.prompts import Prompt
from library.config.train import TrainConfig, warn_of_long_intervals, with_seed
from library.data.batches import BatchMaker, RunPlan, TaskMaker, make_loader
from library.data.latent_cache import LatentCache
from library.data.picture_index import index_for
from library.data.records import Dataset, subsets_of, verify_pictures
from library.diffusion.schedule import stable_diffusion_schedule
from library.models.base import BaseFiles, BaseModel
from library.models.latent_encoder import LatentEncoder
from library.models.precision import move
from library.networks.trainable import TrainableNetwork, build_network
from library.optim.flat import TrainedWeights
from library.optim.optimizers import CPU, OptimizerChoice, build_optimizer, choose_optimizer
from library.optim.schedulers import build_scheduler
from library.randomness import seed_for
from library.training.measure.validation import HeldOut, Validation, held_out, validation_seed
from library.training.page.recorder import Recorder, first_facts
from library.training.prepare.caches import cache_latents
from library.training.prepare.checks import check_before_loading, check_steps, options_for
from library.training.prepare.cut_texts import cut_captions, tell_long_prompts, warn_of_cut_captions
from library.training.prepare.placing import caption_options, enable_gradient_checkpointing, open_base
from library.training.prepare.plan import (
    choose_seed,
    find_resumed,
    num_workers,
    plan_steps,
    resume_plan,
    warn_of_split,
)
from library.training.prepare.speed import is_compiled
from library.training.prepare.texts import RunTexts, build_conditioner, tell_of_files, when_encoded
from library.training.record import report
from library.training.record.checkpoints import Checkpoints
from library.training.record.metadata import (
    BackgroundHashes,
    FileMetadata,
    files_to_hash,
    training_metadata,
)
from library.training.record.metrics import Metrics
from library.training.record.preview import Preview
from library.training.record.replaced import check_replaced
from library.training.record.run_files import RunFiles, epoch_interval
from library.training.record.run_lock import run_lock
from library.training.record.upload import Uploads, make_repository
from library.training.rehearse.dry_run import dry_run
from library.training.run.events import At, Event, Every, Needs, WithAny
from library.training.run.graphs import choose_passes
from library.training.run.interruption import StopRequest
from library.training.run.loop import run
from library.training.run.objective import Objective
from library.training.run.runtime import Runtime, broadcast_parameters, shared, start_runtime
from library.training.run.state import TrainState, begin, read_tensors
from library.training.run.step import OptimizerStep, Verdict


def train(
    config: TrainConfig,
    datasets: list[Dataset],
    prompts: list[Prompt],
    warnings: Sequence[str] = (),
    *,
    further_events: Sequence[Event] = (),
) -> Path:
    """Train a network as config says and return the path of its file; raises UserError for a user's mistake.

    warnings are those so far, for the page of the run; more can be added while it lasts. With --dry_run nothing is
    trained, and the path is that of the report. further_events come after those of `make_events` whenever both are due.
    Ctrl-C and SIGTERM raise KeyboardInterrupt: at once while the run is prepared,
    later after the step, with its state saved.
    """
    # Find whatever is wrong before anything large is loaded.
    choice = choose_optimizer(config.optimizer)
    files = check_before_loading(config, datasets, prompts, choice)
    config = options_for(config, files.checkpoint.family)
    check_replaced(config)
    report.describe_data(datasets)
    tell_of_files(config.precision, datasets)
    if config.run.dry_run or config.data.check_pictures or not config.precision.cache_latents:
        verify_pictures(datasets, index_for(config.data))
    if config.run.dry_run:
        return dry_run(config, datasets, prompts, choice=choice, files=files)

    with StopRequest() as stop:
        runtime = start_runtime(
            config.precision, config.logs, vae_overflows=files.vae_overflows, wait=config.run.ddp_timeout
        )
        if runtime.device != CPU:  # on which the optimizer was tried
            check_steps(config, choice, runtime.device)
        with run_lock(RunFiles(config.saving).lock, runtime):
            given = Given(config, datasets, prompts, warnings)
            prepare_and_run(given, choice, files, runtime=runtime, stop=stop, further_events=further_events)
    return RunFiles(config.saving).network


class Given(NamedTuple):
    """What a run is given."""

    config: TrainConfig
    datasets: list[Dataset]
    prompts: list[Prompt]
    warnings: Sequence[str]  # about them


def prepare_and_run(
    given: Given,
    choice: OptimizerChoice,
    files: BaseFiles,
    *,
    runtime: Runtime,
    stop: StopRequest,
    further_events: Sequence[Event],
) -> None:
    """Load, encode, build, train and save what was checked."""
    config, datasets, prompts, _ = given
    # Load the base model.
    resumed = find_resumed(config.state.resume, config.saving, config.hub, runtime)
    seed = shared(choose_seed(config.run.seed, resumed), runtime)
    warn_of_split(config.run.seed, seed, datasets, resumed)
    config = with_seed(config, seed)
    if runtime.is_main:
        make_repository(config.hub)
    base = open_base(files, config.network, config.precision, config.text.clip_skip, runtime)
    text = caption_options(config.text)

    # Plan the steps, and find the texts that are too long for them.
    plan = plan_steps(config.run, datasets, seed, rank=runtime.rank, num_processes=runtime.num_processes)
    plan = resume_plan(plan, config.state, config.saving, resumed)
    warn_of_long_intervals(config, subsets_of(datasets), steps=plan.num_steps, epochs=plan.num_epochs)
    warn_of_cut_captions(cut_captions(datasets, base.texts[0], text, plan.num_steps))
    tell_long_prompts(prompts, base.texts[0], text, config.text.clip_skip)

    # Build the network over the models; first, because a network module may refuse.
    network = make_network(config, seed, base, runtime)
    runtime = dataclasses.replace(runtime, types=runtime.types._replace(casts=not network.computes_in_half))

    # Encode pictures and captions; only then does the U-Net come to the device, beside what stays.
    encoder = LatentEncoder(base.vae, runtime.types.vae, config.precision.vae_batch_size)
    cache = encode_or_place(config, datasets, encoder, runtime)
    maker = BatchMaker(datasets, TaskMaker(seed, plan.num_steps, config.data.prior_loss_weight, cache))
    most = config.validation.max_validation_steps
    measured = held_out(datasets, validation_seed(config.dataset, seed), cache, config.data.prior_loss_weight, most)
    when = when_encoded(
        config.precision, datasets, base, text, runtime.types.unet, trains_text_encoder=network.trains_text_encoder
    )
    texts = RunTexts(plan, maker, measured, prompts, text)
    conditioner, text_events = build_conditioner(when, texts, base, network, runtime=runtime, stop=stop)
    move(base.unet, runtime.device)

    # Put together what a step needs.
    state = make_state(config, network, choice, plan, runtime)
    objective = Objective(
        base=base,
        network=network,
        encoder=encoder,
        conditioner=conditioner,
        text=text,
        schedule=stable_diffusion_schedule(zero_terminal_snr=base.zero_snr).to(runtime.device),
        loss=config.loss,
        types=runtime.types,
        device=runtime.device,
        seed=seed,
    )
    progress = begin(plan, resumed)
    step = OptimizerStep(
        objective,
        choose_passes(config.precision, objective, state, runtime.device),
        state,
        runtime,
        verdict=Verdict(config.run.on_nan, runtime.scaler, num_skipped=progress.num_skipped),
        seed=seed,
        max_grad_norm=config.optimizer.max_grad_norm,
        scale_weight_norms=config.network.scale_weight_norms,
    )
    if resumed is not None:
        state.restore(read_tensors(resumed))

    # Train and save.
    loader = make_loader(maker, plan, num_workers(config.run.max_data_loader_n_workers, is_cached=cache is not None))
    with Uploads(config.hub, is_main=runtime.is_main) as uploads:
        hashes = BackgroundHashes(files_to_hash(config.model, files.vae) if runtime.is_main else {}, stop)
        checkpoints = make_checkpoints(
            config, plan, base, state, optimizer=choice.record, hashes=hashes, uploads=uploads
        )
        events = make_events(
            config, prompts, plan, measured, objective=objective, checkpoints=checkpoints, runtime=runtime, stop=stop
        )
        told = page_events(given, plan, maker, events, checkpoints=checkpoints, runtime=runtime)
        # The captions of the next steps, which a stop leaves out, come after the files of the last one.
        events = [*events, *told, *text_events, *further_events]
        run(step, network, loader, plan=plan, progress=progress, events=events, runtime=runtime, stop=stop)


def encode_or_place(
    config: TrainConfig, datasets: list[Dataset], encoder: LatentEncoder, runtime: Runtime
) -> LatentCache | None:
    """Return the encoded pictures if the options ask for them; else None, with the VAE on the device for the steps."""
    if config.precision.cache_latents:
        return cache_latents(config.precision, datasets, encoder, runtime, index_for(config.data))
    move(encoder.vae, runtime.device)
    return None


def make_network(config: TrainConfig, seed: int, base: BaseModel, runtime: Runtime) -> TrainableNetwork:
    """Return the network over the models, the same on all processes, in the type in which it is trained."""
    torch.manual_seed(seed_for(seed, "network"))
    checkpointing = config.precision.gradient_checkpointing
    network = build_network(config.network, config.optimizer, base, checkpointing=checkpointing, device=runtime.device)
    for parameter in network.all_parameters():  # but no buffers, where alphas are
        parameter.data = parameter.data.to(runtime.types.adapter)
    broadcast_parameters(network.all_parameters(), runtime.num_processes)
    if checkpointing:
        enable_gradient_checkpointing(base, network)
    if is_compiled(base.unet):
        network.keep_shapes()
    return network


def make_state(
    config: TrainConfig,
    network: TrainableNetwork,
    choice: OptimizerChoice,
    plan: RunPlan,
    runtime: Runtime,
) -> TrainState:
    """Return what the steps change: the network with its optimizer and schedule; tell in numbers what is trained."""
    groups, names = network.groups(config.optimizer)
    weights = TrainedWeights(groups, runtime.types.unet if network.computes_in_half else None)
    network.compute_with(weights.copies)
    rate = config.optimizer.learning_rate
    optimizer = build_optimizer(choice, weights.groups(together=choice.elementwise), rate)
    report.describe_run(plan, network, names, RunFiles(config.saving).network)
    scheduler = build_scheduler(config.schedule, optimizer, plan.num_steps, rate)
    return TrainState(network, weights, optimizer, scheduler, runtime.scaler, tuple(names))


def make_checkpoints(
    config: TrainConfig,
    plan: RunPlan,
    base: BaseModel,
    state: TrainState,
    *,
    optimizer: str,
    hashes: BackgroundHashes,
    uploads: Uploads,
) -> Checkpoints:
    """Return what writes the run's networks and states; optimizer is what their metadata say of it."""
    saving, is_main, predicts_v = config.saving, plan.rank == 0, base.predicts_v
    started = training_metadata(
        config,
        plan,
        family=base.family,
        predicts_v=predicts_v,
        zero_snr=base.zero_snr,
        optimizer=optimizer,
        alphas=state.network.file_alphas(),
    )
    return Checkpoints(
        files=RunFiles(saving),
        state=state,
        # The last epoch ends with the run, which has a file of its own.
        due=Every(
            saving.save_every_n_steps,
            epoch_interval(saving, plan.num_epochs),
            (At.STOP, At.END),
            but_epoch=plan.num_epochs,
        ),
        keep=config.state,
        metadata=FileMetadata(
            config=config,
            family=base.family,
            predicts_v=predicts_v,
            resolution=plan.datasets[0].options.size,
            started=started,
            hashes=hashes,
        ),
        options=to_toml(config),
        uploads=uploads,
        uploads_states=config.hub.save_state_to_huggingface,
        steps_per_epoch=plan.steps_per_epoch,
        is_main=is_main,
    )


def make_events(
    config: TrainConfig,
    prompts: list[Prompt],
    plan: RunPlan,
    measured: HeldOut | None,
    *,
    objective: Objective,
    checkpoints: Checkpoints,
    runtime: Runtime,
    stop: StopRequest,
) -> list[Event]:
    """Return what happens besides the steps, in the order in which it happens at each moment."""
    files, state, given = checkpoints.files, checkpoints.state, config.preview
    metrics = Metrics(files.metrics, config, runtime.accelerator)
    by_epochs = given.sample_every_n_epochs is not None
    preview = Preview(given.sample_sampler, prompts, files, objective, state, runtime, stop, counts_epochs=by_epochs)
    outcome = report.Outcome(config, prompts, plan, state.network, is_main=runtime.is_main)
    validation: list[Event] = []
    if measured is not None:
        options = config.validation
        due = Every(options.validate_every_n_steps, options.validate_every_n_epochs or 1, (At.END,), once_a_step=True)
        measuring = Validation(due, measured, objective, state, metrics, runtime, stop)
        validation = [Event("validation", measuring.due, measuring.log)]
    final = (At.END,) if config.state.save_state_on_train_end else ()
    states = checkpoints.due if config.state.save_state else Every(once=(At.STOP, *final))
    return [
        Event("options", Every(once=(At.START,)), checkpoints.write_options),
        Event("metrics", Every(1, 1, (At.START,)), metrics.log, Needs.RESULTS),
        *validation,  # before the network's file, which holds the lowest loss so far
        Event("network", checkpoints.due, checkpoints.write_network),
        Event("preview", preview_times(given, is_resumed=plan.start_step > 0), preview.generate),
        Event("state", states, checkpoints.write_state),
        Event("outcome", Every(once=(At.STOP, At.END)), outcome.log),
        Event("trackers", Every(once=(At.END,)), metrics.end),
        Event("uploads", Every(once=(At.STOP,)), lambda moment: checkpoints.uploads.wait()),
    ]


def page_events(
    given: Given,
    plan: RunPlan,
    maker: BatchMaker,
    events: Sequence[Event],
    *,
    checkpoints: Checkpoints,
    runtime: Runtime,
) -> list[Event]:
    """Return what writes the page of the run: at the start and the end, and after each event that it tells of."""
    if given.config.saving.no_report or not runtime.is_main:
        return []
    facts = first_facts(checkpoints, plan, maker, given.prompts, runtime.device)
    told = [event.due for event in events if event.name in ("validation", "network", "preview")]
    due = WithAny((Every(once=(At.START, At.STOP, At.END, At.ERROR)), *told))
    return [Event("page", due, Recorder(facts, checkpoints, runtime.device, given.warnings).write)]


def preview_times(given: PreviewConfig, *, is_resumed: bool) -> Every:
    """Return when previews are generated: by epochs or by steps, and where there are any, also at the end."""
    steps = None if given.sample_every_n_epochs else given.sample_every_n_steps
    first = (At.START,) if given.sample_at_first and not is_resumed else ()
    last = (At.END,) if given.sample_at_first or given.sample_every_n_epochs or steps else ()
    return Every(steps, given.sample_every_n_epochs, (*first, *last), once_a_step=True)
