"""`--dry_run`: check everything and report what the run would do, without loading weights or making a step."""

from __future__ import annotations

import collections
import dataclasses
import logging
from pathlib import Path

import torch
from PIL import Image

from library.adapters.alphas import note_on_alphas
from library.adapters.blocks import BlockTable, table_of
from library.config.prompts import Prompt
from library.config.train import TrainConfig, warn_of_long_intervals
from library.config.training import RunConfig
from library.data import images
from library.data.batches import BatchMaker, RunPlan, TaskMaker, count_draws, num_batches
from library.data.latent_cache import Extent, extent
from library.data.picture_index import index_for
from library.data.records import Dataset, ImageRecord, all_records, subsets_of
from library.files import replacing
from library.models.base import BaseFiles, BaseModel, TextEncoder, load_base
from library.models.checkpoint import VAE
from library.models.conditioning import TextOptions, tokenize
from library.models.latent_encoder import LatentEncoder
from library.models.precision import Types, move
from library.models.text_cache import ENCODED_AT_ONCE
from library.networks.trainable import TrainableNetwork, build_network
from library.optim.optimizers import OptimizerChoice
from library.processes import find_launch
from library.sampling.contact_sheet import draw_sheet, save_sheet
from library.sampling.previews import size_of, text_options
from library.training.charts.block_chart import count_blocks, draw_blocks
from library.training.charts.style import save_figure
from library.training.prepare import caches
from library.training.prepare.cut_texts import cut_captions, tell_long_prompts, warn_of_cut_captions
from library.training.prepare.placing import (
    caption_options,
    check_clip_skip,
    enable_gradient_checkpointing,
    store_models,
)
from library.training.prepare.plan import choose_seed, plan_steps, resume_plan
from library.training.prepare.texts import When, bytes_kept, when_encoded
from library.training.record.run_files import RunFiles
from library.training.rehearse.memory import Pictures, Stage, Work, count_stages, state_bytes_per_parameter
from library.training.run.runtime import types_of_run
from library.training.run.state import find_state

logger = logging.getLogger(__name__)

MOST_CAPTIONS, MOST_CUT_CAPTIONS, MOST_PICTURES = 8, 8, 3  # on the screen; the file has all
SHEET_COLUMNS, MOST_SHEET_ROWS = 8, 12
GIGA = 1e9


@dataclasses.dataclass
class Report:
    """The lines of the report; some of them are logged, too."""

    lines: list[str] = dataclasses.field(default_factory=list)

    def say(self, text: str) -> None:
        """Add a line and log it."""
        self.lines.append(text)
        logger.info("%s", text)

    def say_some(self, lines: list[str], most: int) -> None:
        """Add lines and log the first ones."""
        for line in lines[:most]:
            self.say(line)
        self.lines += lines[most:]
        if len(lines) > most:
            logger.info("  ... and %d more", len(lines) - most)


def dry_run(
    config: TrainConfig, datasets: list[Dataset], prompts: list[Prompt], *, choice: OptimizerChoice, files: BaseFiles
) -> Path:
    """Report what the run would do; return the path of the full report. The contact sheet is beside it."""
    report, names = Report(), RunFiles(config.saving)
    is_here = not config.hub.resume_from_huggingface  # a dry run downloads nothing
    resumed = find_state(config.state.resume, config.saving) if config.state.resume and is_here else None
    seed = choose_seed(config.run.seed, resumed)
    plan = plan_steps(config.run, datasets, seed, num_processes=find_launch().size)
    plan = resume_plan(plan, config.state, config.saving, resumed)
    warn_of_long_intervals(config, subsets_of(datasets), steps=plan.num_steps, epochs=plan.num_epochs)
    types = types_of_run(config.precision, vae_overflows=files.vae_overflows)
    on_disk = config.precision.cache_latents_to_disk
    base = load_base(files, types, filled=(VAE,) if on_disk else ())
    take_types(base, types)
    store_models(config.precision, base)
    text = caption_options(config.text)
    check_clip_skip(text.clip_skip, base)

    report_steps(report, config.run, plan)
    report_pictures(report, datasets)
    report_captions(report, plan, base.texts[0], text)
    tell_long_prompts(prompts, base.texts[0], text, config.text.clip_skip)
    if config.precision.cache_latents:
        encoder = LatentEncoder(base.vae, types.vae) if on_disk else None
        report_latents(report, extent(datasets, types.vae, encoder, index_for(config.data)), on_disk=on_disk)
    network = report_network(report, config, base, types)
    if (note := note_on_alphas(network.file_alphas())) is not None:
        report.say(f"alphas: {note}")
    report_blocks(report, network, table_of(base.family), config.optimizer.unet_rate, names.block_chart)
    when = when_encoded(
        config.precision, datasets, base, text, types.unet, trains_text_encoder=network.trains_text_encoder
    )
    if when is not When.IN_STEPS:
        kept = bytes_kept(when, datasets, base, text, types.unet)
        report.say(f"captions are encoded {when.value}: at most {kept / GIGA:.2f} GB of main memory")
    stages = estimate_memory(config, datasets, prompts, base, network, when=when, choice=choice, types=types)
    report_memory(report, stages)
    save_sheet(draw_pictures(datasets), names.dry_run_pictures)
    path = names.dry_run_report
    with replacing(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in report.lines), encoding="utf-8")
    logger.info("all of this in full: %s; the pictures as they will be seen: %s", path, names.dry_run_pictures)
    return path


# --------------------------------------------------------------------------------------------------------------
# Parts of the report
# --------------------------------------------------------------------------------------------------------------


def report_steps(report: Report, run: RunConfig, plan: RunPlan) -> None:
    """Report how many steps the pictures give, with the arithmetic."""
    total = num_batches(plan.datasets)
    draws = sum(dataset.num_draws for dataset in plan.datasets)
    divisors = f" / {plan.num_processes} processes" if plan.num_processes > 1 else ""
    divisors += f" / {plan.accumulation} to a step" if plan.accumulation > 1 else ""
    report.say(f"an epoch: {draws} draws -> {total} batches{divisors} = {plan.steps_per_epoch} steps")
    by_epochs = run.max_train_epochs
    source = f"--max_train_epochs {by_epochs} x {plan.steps_per_epoch}" if by_epochs else "--max_train_steps"
    report.say(
        f"the run: {plan.num_steps} steps ({source}) = {plan.num_steps / plan.steps_per_epoch:.4g} epochs"
        + (f", {plan.start_step} of them made before" if plan.start_step else "")
    )


def report_pictures(report: Report, datasets: list[Dataset]) -> None:
    """Report each dataset's buckets, how their pictures are resized and cropped, and which are held out."""
    for index, dataset in enumerate(datasets):
        width, height = dataset.options.size
        report.say(f"dataset {index + 1}, {width}x{height}, batches of {dataset.options.batch_size}:")
        for bucket, draws in count_draws(dataset).items():
            batches = -(-draws // dataset.options.batch_size)
            records = [record for record in dataset.records if record.placement.bucket == bucket]
            name = "x".join(map(str, bucket))
            report.say(f"  {name}: {len(records)} pictures, {draws} draws, {batches} batches")
            report.say_some([f"    {describe_picture(record)}" for record in records], MOST_PICTURES)
        regularisation = [record for record in dataset.records if record.subset.is_reg]
        if regularisation:
            report.say(f"  {len(regularisation)} of them for regularisation, loss times --prior_loss_weight")
        if dataset.held_out:
            report.say(f"  {len(dataset.held_out)} further pictures are held out for validation:")
            report.say_some([f"    {describe_picture(record)}" for record in dataset.held_out], MOST_PICTURES)


def report_blocks(report: Report, network: TrainableNetwork, table: BlockTable, rate: float, path: Path) -> None:
    """Draw the blocks of the U-Net, if it is trained by a network that describes them; rate is before the schedule."""
    blocks = count_blocks(network.describe_unet(), table)
    if blocks and network.trains_unet:
        save_figure(draw_blocks(blocks, table, rate), path)
        report.say(f"ranks and rates by block of the U-Net: {path}")


def describe_picture(record: ImageRecord) -> str:
    """Return one line about a picture: how it is resized and cropped, and its repeats and mask."""
    placement = record.placement
    size, resized = ("x".join(map(str, pair)) for pair in (record.size, placement.resized))
    steps = [size] if size == resized else [size, f"resized to {resized}"]
    if any(placement.surplus):
        steps.append("cut by {}x{}".format(*placement.surplus))
    notes = [f"{record.repeats} times"] if record.repeats != 1 else []
    notes += ["regularisation"] if record.subset.is_reg else []
    notes += [f"mask {record.mask.describe()}"] if record.mask else []
    return f"{record.path}: {', '.join(steps + notes)}"


def report_captions(report: Report, plan: RunPlan, encoder: TextEncoder, options: TextOptions) -> None:
    """Report the captions of the first epoch with their numbers of tokens, and those that are cut."""
    # Captions need neither the weight of a loss nor a cache.
    maker = BatchMaker(plan.datasets, TaskMaker(plan.seed, plan.num_steps, 1.0, None))
    epoch = plan.start_step // plan.steps_per_epoch + 1
    fed = []
    for request in plan.requests(epoch):
        for sample, caption in zip(request.samples, maker.captions(request), strict=True):
            name = plan.datasets[sample.dataset].records[sample.record].path.name
            (tokens,) = tokenize(encoder, [caption], options)
            fed.append(f"  {len(tokens.ids):4d} tokens  {name}: {caption!r}")
    report.say(f"captions of epoch {epoch} in the order of training:")
    report.say_some(fed, MOST_CAPTIONS)
    cut = cut_captions(plan.datasets, encoder, options, plan.num_steps)
    report.lines += warn_of_cut_captions(cut)
    report.say_some([f"  {text.describe()}" for text in cut], MOST_CUT_CAPTIONS)


def report_latents(report: Report, cache: Extent, *, on_disk: bool) -> None:
    """Report what the cache of latents takes, and how many are encoded for it."""
    size = f"{cache.size / GIGA:.2f} GB"
    if on_disk:
        valid = cache.entries - cache.missing
        report.say(f"latents: {valid} of {cache.entries} are valid on disk, {cache.missing} will be encoded")
        report.say(f"  all take {size} beside the pictures; a run reads them when they are needed")
    else:
        report.say(f"latents: {size} of main memory; --cache_latents_to_disk needs none")


def report_network(report: Report, config: TrainConfig, base: BaseModel, types: Types) -> TrainableNetwork:
    """Report modules, parameters and learning rates; return the network over models without weights."""
    checkpointing = config.precision.gradient_checkpointing
    network = build_network(
        config.network, config.optimizer, base, checkpointing=checkpointing, device=torch.device("meta")
    )
    for parameter in network.all_parameters():
        parameter.data = parameter.data.to(types.adapter)
    if checkpointing:
        enable_gradient_checkpointing(base, network)
    groups, names = network.groups(config.optimizer)
    kinds = ", ".join(f"{number} {kind}" for kind, number in network.kinds().items())
    report.say(f"adapter ({config.network.network_module}): {kinds}")
    for group, name in zip(groups, names, strict=True):
        number = sum(parameter.numel() for parameter in group["params"])
        rate = group.get("lr", config.optimizer.learning_rate)
        report.say(f"  {name}: {number:,} parameters, learning rate {rate:g}")
    return network


def report_memory(report: Report, stages: list[Stage]) -> None:
    """Report how much memory each stage of the run will need, by part, and which stage needs the most."""
    largest = max(stages, key=lambda stage: stage.total)
    report.say(
        f"memory on the device: {largest.total / GIGA:.2f} GB ({largest.title}) and what the GPU needs for itself "
        "(0.5 to 1 GB); by stage:"
    )
    for stage in stages:
        parts = ", ".join(f"{name} {size / GIGA:.2f}" for name, size in stage.parts.items())
        report.say(f"  {stage.title}: {stage.total / GIGA:.2f} GB: {parts}")


def estimate_memory(
    config: TrainConfig,
    datasets: list[Dataset],
    prompts: list[Prompt],
    base: BaseModel,
    network: TrainableNetwork,
    *,
    when: When,
    choice: OptimizerChoice,
    types: Types,
) -> list[Stage]:
    """Return the stages of the run; models and network are on the meta device and unusable afterwards."""
    logger.info("counting memory ...")  # takes a while
    move(base.vae, "meta")
    precision, options = config.precision, caption_options(config.text)
    training = dataclasses.replace(largest_batch(datasets), windows=options.windows)
    most = precision.vae_batch_size  # pictures that the VAE encodes at a time
    in_steps = dataclasses.replace(training, number=min(training.number, most or training.number))
    at_once = {When.IN_STEPS: None, When.ONCE: ENCODED_AT_ONCE, When.AHEAD: training.number}
    work = Work(
        training=training,
        encoding=largest_encoded(datasets, most or caches.ENCODED_AT_ONCE) if precision.cache_latents else in_steps,
        is_cached=precision.cache_latents,
        texts=at_once[when],
        previews=largest_preview(prompts, base),
    )
    rate = config.optimizer.learning_rate
    state_bytes = state_bytes_per_parameter(choice, rate, types.adapter)
    return count_stages(base, network, work, types, state_bytes=state_bytes)


def take_types(base: BaseModel, types: Types) -> None:
    """Give weights without contents the types that they will have in the run."""
    for part, dtype in ((base.unet, types.unet), (base.vae, types.vae), *((t, types.unet) for t in base.text_modules)):
        for parameter in part.parameters():
            parameter.data = parameter.data.to(dtype)


def largest_batch(datasets: list[Dataset]) -> Pictures:
    """Return the batch of a step with the most pixels."""
    found = [
        Pictures(bucket, min(draws, dataset.options.batch_size))
        for dataset in datasets
        for bucket, draws in count_draws(dataset).items()
    ]
    return max(found, key=Pictures.pixels)


def largest_encoded(datasets: list[Dataset], batch_size: int) -> Pictures:
    """Return the most pixels that the VAE encodes at a time before training, batch_size pictures at most."""
    numbers = collections.Counter(record.placement.bucket for record in all_records(datasets))
    return max((Pictures(bucket, min(number, batch_size)) for bucket, number in numbers.items()), key=Pictures.pixels)


def largest_preview(prompts: list[Prompt], base: BaseModel) -> Pictures | None:
    """Return the preview with the most pixels, with the windows of the longest prompt; None without prompts."""
    if not prompts:
        return None
    windows = max(text_options(base.texts[0], prompt, None).windows for prompt in prompts)
    return max((Pictures(size_of(prompt, base), 1, windows) for prompt in prompts), key=Pictures.pixels)


def draw_pictures(datasets: list[Dataset]) -> Image.Image:
    """Return a sheet of the first pictures of each bucket, resized and cropped as in training."""
    rows: dict[str, list[ImageRecord]] = {}
    for index, dataset in enumerate(datasets):
        for record in sorted(dataset.records, key=lambda record: record.placement.bucket):
            label = "{}x{}\ndataset {}".format(*record.placement.bucket, index + 1)
            rows.setdefault(label, []).append(record)
    labels = list(rows)[:MOST_SHEET_ROWS]
    titles = [f"{label}\n{shown_of(len(rows[label]), SHEET_COLUMNS)}" for label in labels]
    title = shown_of(len(rows), MOST_SHEET_ROWS, "buckets") if len(rows) > MOST_SHEET_ROWS else ""
    shown = [[_as_trained(record) for record in rows[label][:SHEET_COLUMNS]] for label in labels]
    width = max(len(row) for row in shown)
    cells = [[*row, *[None] * (width - len(row))] for row in shown]
    return draw_sheet(cells, titles, [""] * width, title=title)


def shown_of(number: int, most: int, things: str = "pictures") -> str:
    """Return how many of a number of things are shown on a sheet that has room for so many."""
    return f"{most} of {number} {things}" if number > most else f"{number} {things}"


def _as_trained(record: ImageRecord) -> Image.Image:
    frame = images.centre_frame(record.placement)
    return Image.fromarray(images.fit(images.load_picture(record.path), frame, record.subset.resize_interpolation))
