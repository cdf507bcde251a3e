"""Compare the ranks of a DyLoRA file to choose one: loss, file size and pictures by rank.

python tools/dylora_report.py --model dylora.safetensors --pretrained_model_name_or_path base.safetensors
    --dataset_config data.toml --validation_split 0.2 --sample_prompts prompts.txt --save_to out/mine

measures the base model and every rank on the held-out pictures (on all, if none are held out), each with the same noise
at the same timesteps, and writes out/mine-report.md, -report.json, -report.png and, with prompts, -ranks.png. Give the
options of the training: the measured loss depends on held-out pictures, clip skip and the rest.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if __package__ in (None, ""):  # started as a script, from any folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.adapters.dylora import file_sizes, ranks_of
from library.config.command_line import parse
from library.config.dataset import DataConfig, DatasetOptions, SubsetOptions
from library.config.loss import LossConfig
from library.config.model import ModelConfig
from library.config.options import REQUIRED, build, option, repeated
from library.config.preview import PreviewConfig, SamplerName
from library.config.prompts import Prompt, read_prompts
from library.config.train import TrainConfig, check
from library.config.training import PrecisionConfig, TextConfig, ValidationConfig
from library.data.records import Dataset, build_datasets, find_datasets
from library.errors import LessMemory, Problems, UserError, shortened
from library.logs import run_script
from library.weight_file import WeightFile, open_weights
from library.words import counted

if TYPE_CHECKING:
    from library.models.base import BaseFiles

logger = logging.getLogger(__name__)

LESS_MEMORY = LessMemory("use --mixed_precision fp16 or bf16, or lower --train_batch_size or --resolution")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportFiles:
    """Files."""

    model: Path = option(
        REQUIRED, "DyLoRA file (.safetensors, .ckpt or .pt)", missing="the DyLoRA file", reads="a file"
    )
    unit: int | None = option(None, "smallest rank, and step to the next; unset: the unit of the training", minimum=1)
    save_to: Path | None = option(
        None, "beginning of the names of the files to write; unset: --model without its extension"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """Measurement and pictures."""

    timesteps: int = option(16, "timesteps at which each picture is measured, evenly spaced", minimum=1, maximum=998)
    draws: int = option(1, "noises for each picture and timestep", minimum=1)
    seed: int | None = option(
        None,
        "seed of the noise and of the split; unset: that of the training, from the metadata",
        minimum=0,
    )
    max_validation_steps: int | None = repeated(ValidationConfig, "max_validation_steps")
    sample_prompts: Path | None = option(None, "prompts for pictures of each rank (.txt, .toml or .json)")
    sample_sampler: SamplerName = repeated(PreviewConfig, "sample_sampler", only_with=("sample_prompts",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArithmeticConfig:
    """Precision."""

    mixed_precision: Literal["no", "fp16", "bf16"] = repeated(PrecisionConfig, "mixed_precision")
    no_half_vae: bool = repeated(PrecisionConfig, "no_half_vae")
    vae_batch_size: int | None = repeated(PrecisionConfig, "vae_batch_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """All options."""

    files: ReportFiles
    measure: MeasureConfig
    model: ModelConfig
    data: DataConfig
    dataset: DatasetOptions
    subset: SubsetOptions
    loss: LossConfig
    text: TextConfig
    precision: ArithmeticConfig

    @property
    def name(self) -> Path:
        """The beginning of the names of all files to write."""
        return self.files.save_to or self.files.model.with_suffix("")

    def path(self, ending: str) -> Path:
        """Return the path of the file to write with an ending."""
        return self.name.with_name(f"{self.name.name}-{ending}")


def as_training(config: ReportConfig) -> TrainConfig:
    """Return the configuration of a training with these options, still without the file as its network."""
    given = {
        "network_module": "networks.dylora",
        "output_dir": config.name.parent,
        "max_validation_steps": config.measure.max_validation_steps,
        "sample_prompts": config.measure.sample_prompts,
        "sample_at_first": config.measure.sample_prompts is not None,  # pictures are wanted where prompts are given
        "cache_latents": True,
        **vars(config.precision),
    }
    shared = {name: getattr(config, name) for name in ("model", "data", "dataset", "subset", "loss", "text")}
    return dataclasses.replace(build(TrainConfig, given, Problems()), **shared)


@dataclasses.dataclass(frozen=True)
class Job:
    """The inputs of the report, checked."""

    config: ReportConfig
    training: TrainConfig
    seed: int
    file: WeightFile
    ranks: list[int]
    datasets: list[Dataset]
    prompts: list[Prompt]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with a command line; return the exit code."""
    from library.models.hub import fetch_models, locate_models

    rules = (check_model, check_training)
    job = plan(parse(ReportConfig, argv, description=__doc__, locate=locate_models, rules=rules))
    fetch_models(job.config)

    # Importing torch takes seconds; most mistakes were reported before.
    from library.training.measure.picture_losses import to_measure

    files = check_with_torch(job)
    job = dataclasses.replace(job, datasets=to_measure(job.datasets))
    log_plan(job)
    report(job, files)
    return 0


def check_model(config: ReportConfig, problems: Problems) -> None:
    """Raise UserError for a file that is not a DyLoRA."""
    if config.files.model.is_file():
        read_model(config.files)


def check_training(config: ReportConfig, problems: Problems) -> None:
    """Add to problems what is wrong with the options for a training."""
    check(as_training(config), problems)


def plan(config: ReportConfig) -> Job:
    """Return the inputs of the report; raises UserError for bad prompts or pictures."""
    file, ranks = read_model(config.files)
    training = as_training(config)
    seed = seed_of(config.measure.seed, file.metadata)
    network = dataclasses.replace(
        training.network,
        network_weights=config.files.model,
        dim_from_weights=True,
        network_args={"unit": str(ranks[0])},
    )
    training = dataclasses.replace(training, run=dataclasses.replace(training.run, seed=seed), network=network)
    problems = Problems()
    prompts = problems.run(read_prompts, config.measure.sample_prompts) if config.measure.sample_prompts else None
    datasets = problems.run(load_datasets, training, file.metadata)
    problems.raise_if_any()
    return Job(config, training, seed, file, ranks, datasets or [], prompts or [])


def read_model(files: ReportFiles) -> tuple[WeightFile, list[int]]:
    """Return the opened DyLoRA file and its ranks; of a safetensors file only the header is read."""
    file = open_weights(files.model)
    return file, ranks_of(file, files.unit)


def seed_of(given: int | None, metadata: Mapping[str, str]) -> int:
    """Return the given seed, else the seed of the validation split of the training, else that of the training."""
    texts = (metadata.get(key, "") for key in ("ss_validation_seed", "ss_seed"))
    seed = given if given is not None else next((int(text) for text in texts if text.isdecimal()), 0)
    logger.info("seed of the held-out pictures and of the noise: %d", seed)
    return seed


def load_datasets(training: TrainConfig, metadata: Mapping[str, str]) -> list[Dataset]:
    """Return the datasets; warn if the number of held-out pictures differs from the training."""
    datasets = build_datasets(
        find_datasets(training.data, training.dataset, training.subset),
        latents_cached=False,  # pictures are not augmented here
        masked_loss=training.loss.masked_loss,
        seed=training.run.seed,
    )
    number, then = sum(len(dataset.held_out) for dataset in datasets), metadata.get("ss_num_validation_images")
    if then not in (None, str(number)):
        logger.warning("%d pictures are held out; in the training there were %s", number, then)
    if not number:
        logger.warning(
            "no pictures are held out: on pictures of the training higher ranks look better than they are; "
            "--validation_split, in the training and here, holds some out"
        )
    return datasets


def check_with_torch(job: Job) -> BaseFiles:
    """Return the base model before it is loaded; raises UserError for mistakes that only torch shows."""
    from library.networks.modules import check_network
    from library.training.prepare.checks import check_base, check_folder

    problems = Problems()
    problems.run(check_network, job.training.network)
    problems.run(check_folder, "save_to", job.config.name.parent)
    sampler = job.config.measure.sample_sampler
    training = job.training
    return check_base(problems, training.model, training.loss, job.datasets, prompts=job.prompts, sampler=sampler)


def log_plan(job: Job) -> None:
    """Log the numbers of measurements; raises UserError for a single picture, which gives no interval."""
    from library.training.measure.picture_losses import pictures_of
    from library.training.measure.rank_report import MOST_COLUMNS
    from library.training.measure.rank_results import caution_of

    pictures = pictures_of(job.training, job.datasets, job.seed, None)
    samples = [sample for request in pictures.requests for sample in request.samples]
    number = len({job.datasets[sample.dataset].held_out[sample.record].path for sample in samples})
    if number < 2:
        raise UserError(f"at least 2 pictures are needed for intervals of the loss, got {number}")
    if caution := caution_of(number):
        logger.warning("%s", caution)
    timesteps, draws = job.config.measure.timesteps, job.config.measure.draws
    logger.info(
        "measuring the base model and ranks %s on %s x %s x %s: %s",
        shortened(", ".join(map(str, job.ranks)), 60),
        counted(len(samples), "picture"),
        counted(timesteps, "timestep"),
        counted(draws, "noise"),
        counted((len(job.ranks) + 1) * len(samples) * timesteps * draws, "prediction"),
    )
    if job.prompts:
        columns = min(MOST_COLUMNS, len(job.ranks) + 1)
        logger.info(
            "generating %s with %d of these %d", counted(len(job.prompts), "prompt"), columns, len(job.ranks) + 1
        )


def report(job: Job, files: BaseFiles) -> None:
    """Measure, generate and write the files of the report."""
    from library.networks.trainable import build_network
    from library.sampling.contact_sheet import part_title, save_sheet
    from library.training.charts.rank_plot import draw_ranks
    from library.training.charts.style import save_figure
    from library.training.measure import rank_report
    from library.training.measure.picture_losses import load_measurement
    from library.training.measure.rank_results import compare_ranks

    config, training = job.config, job.training
    measurement = load_measurement(
        training, job.datasets, files, seed=job.seed, num_timesteps=config.measure.timesteps, draws=config.measure.draws
    )
    base, device = measurement.base, measurement.runtime.device
    network = build_network(training.network, training.optimizer, base, checkpointing=False, device=device)
    network.eval()
    losses = rank_report.measure_ranks(measurement, network, job.ranks)
    results = compare_ranks(losses, file_sizes(job.file, job.ranks))
    table, record = config.path("report.md"), config.path("report.json")
    rank_report.write_table(table, f"# Ranks of {job.file.path.name}", results, measurement)
    source = {"model": str(job.file.path), "base": config.model.pinned("pretrained_model_name_or_path")}
    rank_report.write_record(record, source, results, measurement, losses)
    for line in (*results.table(), results.sentence()):
        logger.info("%s", line)
    if results.caution:
        logger.warning("%s", results.caution)
    logger.info("table: %s; every number: %s", table, record)
    save_figure(draw_ranks(results), config.path("report.png"))
    logger.info("plot: %s", config.path("report.png"))
    if job.prompts:
        ranks = rank_report.ranks_to_draw(job.ranks, {results.choice.rank, results.best.rank})
        sampler = config.measure.sample_sampler
        title = part_title(len(ranks) - 1, len(job.ranks), "rank")
        sheet = rank_report.draw_ranks(
            measurement, network, ranks, job.prompts, seed=job.seed, sampler=sampler, title=title
        )
        save_sheet(sheet, config.path("ranks.png"))
        logger.info("pictures: %s", config.path("ranks.png"))


if __name__ == "__main__":
    run_script(main, LESS_MEMORY)
