"""`--dry_run`: everything is checked, and what the run would do is told, without weights and without a step."""

from __future__ import annotations

import collections
import dataclasses
import logging
import os
from pathlib import Path

import torch
from PIL import Image

from library.config.train import TrainConfig
from library.data import images
from library.data.buckets import Size
from library.data.dataset import BatchMaker, RunPlan, num_batches, samples_by_bucket
from library.data.latent_cache import count_valid
from library.data.records import ImageRecord, TrainingSet
from library.files import replacing
from library.models.loading import Detected, LoadedModels, load_models
from library.models.text_encoding import PER_WINDOW, split_at_limit
from library.optim.optimizers import OptimizerChoice
from library.sampling.contact_sheet import draw_sheet, save_sheet
from library.training.charts.block_chart import draw_blocks
from library.training.network_protocol import TrainableNetwork, build_network
from library.training.preparation import (
    all_captions,
    check_clip_skip,
    choose_seed,
    enable_gradient_checkpointing,
    plan_run,
)
from library.training.rehearse.memory import MemoryEstimate, state_bytes_per_parameter, step_activations, weight_bytes
from library.training.run.runtime import DTYPES
from library.training.run.state import find_state
from library.weight_file import tensors_sha256

logger = logging.getLogger(__name__)

MOST_CAPTIONS, MOST_CUT_CAPTIONS, MOST_PICTURES = 8, 8, 3  # shown on the screen; the file has all
SHEET_COLUMNS, MOST_SHEET_ROWS = 8, 12
GIGA = 1e9


@dataclasses.dataclass
class Report:
    """Lines for the file, of which some are for the screen as well."""

    lines: list[str] = dataclasses.field(default_factory=list)

    def say(self, text: str) -> None:
        """Add a line and show it."""
        self.lines.append(text)
        logger.info("%s", text)

    def say_some(self, lines: list[str], most: int) -> None:
        """Add lines and show the first ones."""
        for line in lines[:most]:
            self.say(line)
        self.lines += lines[most:]
        if len(lines) > most:
            logger.info("  ... and %d more", len(lines) - most)


def dry_run(config: TrainConfig, sets: list[TrainingSet], *, choice: OptimizerChoice, detected: Detected) -> Path:
    """Tell what the run would do; return the path of the whole report, beside which the pictures' sheet lies."""
    report = Report()
    is_here = config.state.resume and not config.hub.resume_from_huggingface  # nothing is downloaded for a rehearsal
    resumed = find_state(config.state.resume, config.saving) if is_here else None
    seed = choose_seed(config, resumed)
    plan = plan_run(config, sets, resumed, rank=0, num_processes=int(os.environ.get("WORLD_SIZE", "1")))
    plan = dataclasses.replace(plan, seed=seed)
    dtype = DTYPES[config.precision.mixed_precision]
    vae_dtype = torch.float32 if config.precision.no_half_vae else dtype
    on_disk = config.precision.cache_latents_to_disk
    models = load_models(config.model, detected, dtype=None, vae_dtype=vae_dtype if on_disk else None)
    check_clip_skip(config, models)

    tell_steps(report, config, plan)
    tell_pictures(report, sets)
    tell_captions(report, config, plan, models)
    if on_disk:
        valid, total = count_valid(sets, f"{tensors_sha256(models.vae.state_dict())} {vae_dtype}")
        report.say(f"latents: {valid} of {total} are valid on disk, {total - valid} will be encoded")
    network = tell_network(report, config, models)
    blocks = network.describe_blocks()
    if blocks and network.trains_unet:
        chart = config.saving.output_dir / f"{config.saving.output_name or 'last'}-blocks.png"
        rate = config.optimizer.learning_rate if config.optimizer.unet_lr is None else config.optimizer.unet_lr
        save_sheet(draw_blocks(blocks, rate), chart)
        report.say(f"ranks and rates by block of the U-Net: {chart}")
    tell_memory(report, config, sets, models, network, choice=choice, dtype=dtype)
    sheet = config.saving.output_dir / f"{config.saving.output_name or 'last'}-pictures.png"
    save_sheet(draw_pictures(sets), sheet)
    path = sheet.with_name(f"{config.saving.output_name or 'last'}-dry_run.txt")
    with replacing(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in report.lines), encoding="utf-8")
    logger.info("all of this in full: %s; the pictures as they will be seen: %s", path, sheet)
    return path


# --------------------------------------------------------------------------------------------------------------
# Parts of the report
# --------------------------------------------------------------------------------------------------------------


def tell_steps(report: Report, config: TrainConfig, plan: RunPlan) -> None:
    """Tell how pictures become steps, with the arithmetic."""
    total = num_batches(plan.sets)
    draws = sum(record.repeats for entry in plan.sets for record in entry.records)
    divisors = f" / {plan.num_processes} processes" if plan.num_processes > 1 else ""
    divisors += f" / {plan.accumulation} to a step" if plan.accumulation > 1 else ""
    report.say(f"an epoch: {draws} draws -> {total} batches{divisors} = {plan.steps_per_epoch} steps")
    by_epochs = config.run.max_train_epochs
    source = f"--max_train_epochs {by_epochs} x {plan.steps_per_epoch}" if by_epochs else "--max_train_steps"
    report.say(
        f"the run: {plan.num_steps} steps ({source}) = {plan.num_steps / plan.steps_per_epoch:.4g} epochs"
        + (f", {plan.start_step} of them made before" if plan.start_step else "")
    )


def tell_pictures(report: Report, sets: list[TrainingSet]) -> None:
    """Tell each dataset's buckets with the pictures in them, how each is fitted, and which regularisation is used."""
    for index, entry in enumerate(sets):
        width, height = entry.options.resolution
        report.say(f"dataset {index + 1}, {width}x{height}, batches of {entry.options.batch_size}:")
        for bucket, samples in sorted(samples_by_bucket(entry, index).items()):
            batches = -(-len(samples) // entry.options.batch_size)
            records = [record for record in entry.records if record.placement.bucket == bucket]
            name = "x".join(map(str, bucket))
            report.say(f"  {name}: {len(records)} pictures, {len(samples)} draws, {batches} batches")
            report.say_some([f"    {describe_picture(record)}" for record in records], MOST_PICTURES)
        regularisation = [record for record in entry.records if record.subset.is_reg]
        if regularisation:
            report.say(f"  {len(regularisation)} of them for regularisation, loss times --prior_loss_weight")
        if entry.held_out:
            report.say(f"  {len(entry.held_out)} further pictures are held out for validation:")
            report.say_some([f"    {describe_picture(record)}" for record in entry.held_out], MOST_PICTURES)


def describe_picture(record: ImageRecord) -> str:
    """Return what happens to a picture, in a line."""
    placement = record.placement
    size, resized = ("x".join(map(str, pair)) for pair in (record.size, placement.resized))
    steps = [size] if size == resized else [size, f"resized to {resized}"]
    if any(placement.surplus):
        steps.append("cut by {}x{}".format(*placement.surplus))
    notes = [f"{record.repeats} times"] if record.repeats != 1 else []
    notes += ["regularisation"] if record.subset.is_reg else []
    notes += [f"mask {'its transparency' if record.mask == record.path else record.mask}"] if record.mask else []
    return f"{record.path}: {', '.join(steps + notes)}"


def tell_captions(report: Report, config: TrainConfig, plan: RunPlan, models: LoadedModels) -> None:
    """Tell the first captions as they will be fed, with their numbers of tokens, and those that are cut."""
    limit = config.text.max_token_length or PER_WINDOW
    tokenizer = models.tokenizers[0]
    maker = BatchMaker(plan.sets, plan.seed, plan.num_steps, config.data.prior_loss_weight, None)
    epoch = plan.start_step // plan.steps_per_epoch + 1
    fed = []
    for request in plan.requests(epoch):
        for sample, caption in zip(request.samples, maker.captions(request), strict=True):
            name = plan.sets[sample.dataset].records[sample.record].path.name
            tokens, _ = split_at_limit(tokenizer, caption, limit)
            fed.append(f"  {tokens:4d} tokens  {name}: {caption!r}")
    report.say(f"captions of epoch {epoch} in the order of training:")
    report.say_some(fed, MOST_CAPTIONS)
    cut = []
    lines = {line for entry in plan.sets for record in entry.all_records for line in record.caption.split("\n")}
    for caption in sorted(lines):
        tokens, rest = split_at_limit(tokenizer, caption, limit)
        if tokens > limit:
            cut.append(f"  {tokens} tokens, without {rest!r}: {caption!r}")
    if cut:
        report.say(f"{len(cut)} captions have more than {limit} tokens and are cut:")
        report.say_some(cut, MOST_CUT_CAPTIONS)


def tell_network(report: Report, config: TrainConfig, models: LoadedModels) -> TrainableNetwork:
    """Tell modules, parameters and learning rates; return the network over the empty models."""
    checkpointing = config.precision.gradient_checkpointing
    network = build_network(
        config.network, config.optimizer, models, checkpointing=checkpointing, device=torch.device("meta")
    )
    if checkpointing:
        enable_gradient_checkpointing(models, network)
    groups, names = network.groups(config.optimizer)
    modules = collections.Counter(type(module).__name__ for module in network.network.children())
    kinds = ", ".join(f"{number} {kind}" for kind, number in modules.items())
    report.say(f"adapter ({config.network.network_module}): {kinds}")
    for group, name in zip(groups, names, strict=True):
        number = sum(parameter.numel() for parameter in group["params"])
        rate = group.get("lr", config.optimizer.learning_rate)
        report.say(f"  {name}: {number:,} parameters, learning rate {rate:g}")
    return network


def tell_memory(
    report: Report,
    config: TrainConfig,
    sets: list[TrainingSet],
    models: LoadedModels,
    network: TrainableNetwork,
    *,
    choice: OptimizerChoice,
    dtype: torch.dtype,
) -> None:
    """Tell what the training will hold in memory, by part."""
    estimate = estimate_memory(config, sets, models, network, choice=choice, dtype=dtype)
    parts = ((field.name.replace("_", " "), getattr(estimate, field.name)) for field in dataclasses.fields(estimate))
    report.say(f"memory on the device: {estimate.total / GIGA:.2f} GB and what the GPU needs for itself (0.5 to 1 GB)")
    report.say("  " + ", ".join(f"{name} {size / GIGA:.2f}" for name, size in parts))


def estimate_memory(
    config: TrainConfig,
    sets: list[TrainingSet],
    models: LoadedModels,
    network: TrainableNetwork,
    *,
    choice: OptimizerChoice,
    dtype: torch.dtype,
) -> MemoryEstimate:
    """Return what the training will hold; models and network are on the meta device, and of no use afterwards."""
    precision = config.precision
    adapter_dtype = dtype if precision.full_fp16 or precision.full_bf16 else torch.float32
    trained = sum(parameter.numel() for parameter in network.parameters())
    keeps_text = network.trains_text_encoder or all_captions(sets) is None
    fp8_text = precision.fp8_base and not precision.fp8_base_unet
    # Taken before the step below makes the models fake.
    unet = weight_bytes(models.unet, dtype, in_eight_bits=precision.fp8_base or precision.fp8_base_unet)
    text = sum(weight_bytes(encoder, dtype, in_eight_bits=fp8_text) for encoder in models.text_encoders)
    vae = 0 if precision.cache_latents else weight_bytes(models.vae, torch.float32 if precision.no_half_vae else dtype)
    size, batch = largest_batch(sets)
    windows = (config.text.max_token_length or PER_WINDOW) // PER_WINDOW
    return MemoryEstimate(
        unet=unet,
        text_encoder=text if keeps_text else 0,
        vae=vae,
        adapter=sum(parameter.numel() for parameter in network.network.parameters()) * adapter_dtype.itemsize,
        gradients=trained * adapter_dtype.itemsize,
        optimizer=int(trained * state_bytes_per_parameter(choice, config.optimizer.learning_rate)),
        activations=step_activations(models, network, dtype, size=size, batch=batch, windows=windows),
    )


def largest_batch(sets: list[TrainingSet]) -> tuple[Size, int]:
    """Return (size, pictures) of the batch with most pixels."""
    found = [
        (bucket, min(len(samples), entry.options.batch_size))
        for index, entry in enumerate(sets)
        for bucket, samples in samples_by_bucket(entry, index).items()
    ]
    return max(found, key=lambda pair: pair[0][0] * pair[0][1] * pair[1])


def draw_pictures(sets: list[TrainingSet]) -> Image.Image:
    """Return a sheet with the first pictures of each bucket, as training sees them."""
    rows = [
        (f"{'x'.join(map(str, bucket))}\ndataset {index + 1}", [entry.records[n] for n in numbers])
        for index, entry in enumerate(sets)
        for bucket, numbers in sorted(_records_by_bucket(entry, index).items())
    ][:MOST_SHEET_ROWS]
    cells = [[_as_seen(record) for record in records[:SHEET_COLUMNS]] for _, records in rows]
    width = max(len(row) for row in cells)
    cells = [row + [None] * (width - len(row)) for row in cells]
    return draw_sheet(cells, [label for label, _ in rows], [""] * width)


def _records_by_bucket(entry: TrainingSet, index: int) -> dict[Size, list[int]]:
    return {
        bucket: sorted({sample.record for sample in samples})
        for bucket, samples in samples_by_bucket(entry, index).items()
    }


def _as_seen(record: ImageRecord) -> Image.Image:
    frame = images.centre_frame(record.placement)
    return Image.fromarray(images.fit(images.load_picture(record.path), frame, record.subset.resize_interpolation))
