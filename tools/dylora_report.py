"""Tell which rank of a DyLoRA file to take: loss, file size and pictures by rank.

python tools/dylora_report.py --model dylora.safetensors --pretrained_model_name_or_path base.safetensors
    --dataset_config data.toml --validation_split 0.2 --sample_prompts prompts.txt --save_to out/mine

measures the base model and every rank on the pictures that are held out (on all, where none are), each with the same
noise at the same timesteps, and writes out/mine-report.md, -report.json, -report.png and, with prompts, -ranks.png.
Give the options that the training had: what is held out, clip skip and the rest decide what is measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if __package__ in (None, ""):  # started as a script, from any folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.adapters.dylora import file_sizes, ranks_of
from library.config.command_line import parse
from library.config.dataset import DataConfig, DatasetOptions, SubsetOptions
from library.config.dataset_file import load_datasets
from library.config.loss import LossConfig
from library.config.model import ModelConfig
from library.config.options import REQUIRED, build, option, repeated
from library.config.preview import PreviewConfig, SamplerName
from library.config.train import TrainConfig, check
from library.config.training import PrecisionConfig, TextConfig, ValidationConfig
from library.data.records import TrainingSet, build_training_sets
from library.errors import Problems, UserError, shortened
from library.files import replacing
from library.logs import run_script
from library.sampling.prompts import Prompt, read_prompts
from library.weight_file import WeightFile, open_weights

if TYPE_CHECKING:
    from PIL import Image

    from library.models.base import BaseFiles
    from library.networks.trainable import TrainableNetwork
    from library.training.measure.picture_losses import Losses, Measurement
    from library.training.measure.rank_results import RankResults

logger = logging.getLogger(__name__)

FEW_PICTURES = 8
MOST_COLUMNS = 10  # of the contact sheet, the base model among them


# --------------------------------------------------------------------------------------------------------------
# Options
# --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilesConfig:
    """Files."""

    model: Path = option(
        REQUIRED, "DyLoRA file (.safetensors, .ckpt or .pt)", missing="the DyLoRA file", reads="a file"
    )
    unit: int | None = option(None, "smallest rank, and step to the next; unset: the unit of the training", minimum=1)
    save_to: Path | None = option(
        None, "beginning of the names of the files to write; unset: --model without its ending"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """What is measured and drawn."""

    timesteps: int = option(16, "timesteps at which each picture is measured, evenly spaced", minimum=1, maximum=998)
    draws: int = option(1, "noises for each picture and timestep", minimum=1)
    seed: int | None = option(
        None, "seed of the noise and of what is held out; unset: that of the training, which the file tells", minimum=0
    )
    max_validation_steps: int | None = repeated(ValidationConfig, "max_validation_steps")
    sample_prompts: Path | None = option(None, "prompts to draw with each rank (.txt, .toml or .json)")
    sample_sampler: SamplerName = repeated(PreviewConfig, "sample_sampler")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArithmeticConfig:
    """Precision."""

    mixed_precision: Literal["no", "fp16", "bf16"] = repeated(PrecisionConfig, "mixed_precision")
    no_half_vae: bool = repeated(PrecisionConfig, "no_half_vae")
    vae_batch_size: int = repeated(PrecisionConfig, "vae_batch_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Which file is measured, on what and how."""

    files: FilesConfig
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
        """The beginning of the names of all files that are written."""
        return self.files.save_to or self.files.model.with_suffix("")

    def path(self, ending: str) -> Path:
        """Return the path of one of the files."""
        return self.name.with_name(f"{self.name.name}-{ending}")


def as_training(config: ReportConfig) -> TrainConfig:
    """Return the configuration of a training with these options, of which the network is left open."""
    given = {
        "network_module": "networks.dylora",
        "output_dir": config.name.parent,
        "max_validation_steps": config.measure.max_validation_steps,
        "sample_prompts": config.measure.sample_prompts,
        "cache_latents": True,
        **vars(config.precision),
    }
    shared = {name: getattr(config, name) for name in ("model", "data", "dataset", "subset", "loss", "text")}
    return dataclasses.replace(build(TrainConfig, given, Problems()), **shared)


# --------------------------------------------------------------------------------------------------------------
# The script
# --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be done, once the options are found to be right."""

    config: ReportConfig
    training: TrainConfig
    file: WeightFile
    ranks: list[int]
    sets: list[TrainingSet]
    prompts: list[Prompt]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with a command line; return the exit code."""
    job = plan(parse(ReportConfig, argv, description=__doc__, rules=(check_model, check_training)))

    # Torch takes seconds to import; up to here every mistake has been answered at once.
    from library.training.measure.picture_losses import to_measure

    files = check_further(job)
    job = dataclasses.replace(job, sets=to_measure(job.sets))
    tell(job)
    report(job, files)
    return 0


def check_model(config: ReportConfig, problems: Problems) -> None:
    """Raise UserError for a file that is no DyLoRA."""
    if config.files.model.is_file():
        read_model(config.files)


def check_training(config: ReportConfig, problems: Problems) -> None:
    """Add to problems what would be wrong with the options in a training."""
    check(as_training(config), problems)


def plan(config: ReportConfig) -> Job:
    """Return what is to be done; raises UserError for what is wrong with the prompts and the pictures."""
    file, ranks = read_model(config.files)
    training = as_training(config)
    seed = seed_of(config.measure.seed, file.metadata)
    training = dataclasses.replace(training, run=dataclasses.replace(training.run, seed=seed))
    training = with_network(training, config.files.model, unit=ranks[0])
    problems = Problems()
    prompts = problems.run(read_prompts, config.measure.sample_prompts) if config.measure.sample_prompts else None
    sets = problems.run(load_sets, training, file.metadata)
    problems.raise_if_any()
    return Job(config, training, file, ranks, sets or [], prompts or [])


def read_model(files: FilesConfig) -> tuple[WeightFile, list[int]]:
    """Return the DyLoRA file, of which a safetensors file is not read yet, and its ranks."""
    file = open_weights(files.model)
    return file, ranks_of(file, files.unit)


def seed_of(given: int | None, metadata: Mapping[str, str]) -> int:
    """Return the seed: as given, else that with which the training held pictures out, else that of the training."""
    texts = (metadata.get(key, "") for key in ("ss_validation_seed", "ss_seed"))
    seed = given if given is not None else next((int(text) for text in texts if text.isdecimal()), 0)
    logger.info("seed of what is held out and of the noise: %d", seed)
    return seed


def with_network(training: TrainConfig, model: Path, *, unit: int) -> TrainConfig:
    """Return the configuration with the file as its network."""
    network = dataclasses.replace(
        training.network, network_weights=model, dim_from_weights=True, network_args={"unit": str(unit)}
    )
    return dataclasses.replace(training, network=network)


def load_sets(training: TrainConfig, metadata: Mapping[str, str]) -> list[TrainingSet]:
    """Return the datasets; warn where something else is held out than in the training."""
    sets = build_training_sets(
        load_datasets(training.data, training.dataset, training.subset),
        latents_cached=False,  # nothing is varied here, so nothing contradicts it
        masked_loss=training.loss.masked_loss,
        seed=training.run.seed,
    )
    number, then = sum(len(entry.held_out) for entry in sets), metadata.get("ss_num_validation_images")
    if then not in (None, str(number)):
        logger.warning("%d pictures are held out; in the training there were %s", number, then)
    if not number:
        logger.warning(
            "nothing is held out: pictures that were trained on make higher ranks look better than they are; "
            "--validation_split in the training and here holds some out"
        )
    return sets


def check_further(job: Job) -> BaseFiles:
    """Return what kind of model will be loaded; raises UserError for what shows with torch but without loading it."""
    from library.networks.modules import check_network
    from library.sampling.samplers import check_sampler
    from library.training.preparation import check_folder, checked_base

    training, problems = job.training, Problems()
    for name in {prompt.sample_sampler or job.config.measure.sample_sampler for prompt in job.prompts}:
        problems.run(check_sampler, name)
    problems.run(check_network, training.network)
    files = problems.run(checked_base, training.model, training.loss)
    problems.run(check_folder, "save_to", job.config.name.parent)
    problems.raise_if_any()
    assert files is not None  # else there was a problem
    return files


def tell(job: Job) -> None:
    """Tell in numbers what will be done; raises UserError for a single picture, from which no interval follows."""
    from library.training.preparation import build_validation

    requests = build_validation(job.training, job.sets, None).batches()
    samples = [sample for request in requests for sample in request.samples]
    number = len({job.sets[sample.dataset].held_out[sample.record].path for sample in samples})
    if number < 2:
        raise UserError(f"at least 2 pictures are needed to tell what is noise, got {number}")
    if number < FEW_PICTURES:
        logger.warning(
            "%d pictures leave wide intervals, within which small ranks lie: more pictures narrow them", number
        )
    timesteps, draws = job.config.measure.timesteps, job.config.measure.draws
    logger.info(
        "measures the base model and ranks %s on %d pictures x %d timesteps x %d noises: %d predictions",
        shortened(", ".join(map(str, job.ranks)), 60),
        len(samples),
        timesteps,
        draws,
        (len(job.ranks) + 1) * len(samples) * timesteps * draws,
    )
    if job.prompts:
        columns = min(MOST_COLUMNS, len(job.ranks) + 1)
        logger.info("draws %d prompts with %d of them", len(job.prompts), columns)


def report(job: Job, files: BaseFiles) -> None:
    """Measure, draw and write."""
    from library.networks.trainable import build_network
    from library.sampling.contact_sheet import save_sheet
    from library.training.measure.picture_losses import load_measurement
    from library.training.measure.rank_results import compare_ranks, draw_plot

    config, training = job.config, job.training
    measurement = load_measurement(
        training, job.sets, files, num_timesteps=config.measure.timesteps, draws=config.measure.draws
    )
    network = build_network(
        training.network,
        training.optimizer,
        measurement.base,
        checkpointing=False,
        device=measurement.runtime.device,
    )
    network.eval()
    losses = measure_ranks(measurement, network, job.ranks)
    results = compare_ranks(losses, file_sizes(job.file, job.ranks))
    write_results(config, measurement, results, losses)
    save_sheet(draw_plot(results), config.path("report.png"))
    logger.info("plot: %s", config.path("report.png"))
    if job.prompts:
        ranks = ranks_to_draw(job.ranks, {results.choice.rank, results.best.rank})
        save_sheet(draw_ranks(job, measurement, network, ranks), config.path("ranks.png"))
        logger.info("pictures: %s", config.path("ranks.png"))


# --------------------------------------------------------------------------------------------------------------
# Parts
# --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def at_rank(network: TrainableNetwork, rank: int) -> Iterator[None]:
    """Within it the network, which is in evaluation mode, has a rank; with 0 the models are without it."""
    if rank:
        network.set_rank(rank)
    with contextlib.nullcontext() if rank else network.absent():
        yield


def measure_ranks(measurement: Measurement, network: TrainableNetwork, ranks: Sequence[int]) -> dict[int, Losses]:
    """Return rank -> losses, of the base model and of every rank."""
    from tqdm import tqdm

    from library.training.measure.rank_results import BASE

    losses = {}
    for rank in tqdm([BASE, *ranks], desc="ranks", unit="rank"):
        with at_rank(network, rank):
            losses[rank] = measurement.losses(network, f"rank {rank}" if rank else "base model")
    return losses


def write_results(
    config: ReportConfig, measurement: Measurement, results: RankResults, losses: Mapping[int, Losses]
) -> None:
    """Write table and record, and show the table."""
    how = (
        f"Mean loss of {results.num_pictures} pictures at {measurement.num_timesteps} timesteps with "
        f"{measurement.draws} noises, with 95 % intervals (Student's t over the pictures). Differences are taken "
        "picture by picture with the same noise (paired t); each interval is for one comparison."
    )
    lines = [f"# Ranks of {config.files.model.name}", "", results.sentence(), "", *results.table(), "", how]
    with replacing(config.path("report.md")) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    record = results.record() | {
        "model": str(config.files.model),
        "base": config.model.pretrained_model_name_or_path,
        "seed": measurement.validation.seed,
        "draws": measurement.draws,
        "timesteps": measurement.timesteps,
        "losses": losses,  # rank -> picture -> loss at each timestep
    }
    with replacing(config.path("report.json")) as temporary:
        temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for line in (*results.table(), results.sentence()):
        logger.info("%s", line)
    logger.info("table: %s; every number: %s", config.path("report.md"), config.path("report.json"))


def ranks_to_draw(ranks: list[int], needed: set[int]) -> list[int]:
    """Return the ranks of the contact sheet: the base model, evenly chosen ranks, and those that are needed."""
    from library.training.measure.rank_results import BASE
    from library.training.record.preview import spread

    if len(ranks) < MOST_COLUMNS:
        return [BASE, *ranks]
    return [BASE, *sorted({*spread(ranks, MOST_COLUMNS - 1 - len(needed)), *needed})]


def draw_ranks(job: Job, measurement: Measurement, network: TrainableNetwork, ranks: list[int]) -> Image.Image:
    """Return the sheet with a row for each prompt and a column for each rank; the seeds are those of previews."""
    from tqdm import tqdm

    from library.models.conditioning import LiveConditioner
    from library.models.precision import move
    from library.randomness import seed_for
    from library.sampling.contact_sheet import draw_sheet
    from library.sampling.generate import generate

    base, runtime, prompts = measurement.base, measurement.runtime, job.prompts
    move(base.vae, runtime.device)
    conditioner = LiveConditioner(base.texts)
    own = [prompt.seed for prompt in prompts]
    common = [seed_for(job.training.run.seed, "preview", index) % 2**32 for index in range(len(prompts))]
    seeds = [number if seed is None else seed for seed, number in zip(own, common, strict=True)]
    sampler, clip_skip = job.config.measure.sample_sampler, job.config.text.clip_skip
    cells: list[list[Image.Image]] = [[] for _ in prompts]
    with tqdm(total=len(ranks) * len(prompts), desc="drawing", unit="picture") as bar:
        for rank in ranks:
            with at_rank(network, rank), runtime.types.autocast(runtime.device):
                for picture in generate(base, conditioner, prompts, seeds, sampler=sampler, clip_skip=clip_skip):
                    cells[picture.index].append(picture.image)
                    bar.update()
    labels = [f"rank {rank}" if rank else "base model" for rank in ranks]
    return draw_sheet(cells, [prompt.prompt for prompt in prompts], labels)


if __name__ == "__main__":
    run_script(main)
