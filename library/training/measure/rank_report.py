"""The report on the ranks of a DyLoRA: measurements, files and pictures of every rank."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from library.config.prompts import Prompt
from library.config.samplers import SamplerName
from library.files import replacing
from library.models.conditioning import LiveConditioner
from library.networks.trainable import TrainableNetwork
from library.progress import Bar
from library.sampling.contact_sheet import draw_sheet, spread
from library.sampling.previews import generate_previews
from library.training.measure.picture_losses import Losses, Measurement
from library.training.measure.rank_results import BASE, RankResults, name_of
from library.training.record.preview import Decoding, preview_seeds
from library.words import counted

logger = logging.getLogger(__name__)

MOST_COLUMNS = 10  # of the contact sheet, the base model among them


@contextlib.contextmanager
def at_rank(network: TrainableNetwork, rank: int) -> Iterator[None]:
    """Within it the network, in evaluation mode, has a rank; with BASE the models are without the network."""
    if rank == BASE:
        with network.absent():
            yield
    else:
        network.set_rank(rank)
        yield


def measure_ranks(measurement: Measurement, network: TrainableNetwork, ranks: Sequence[int]) -> dict[int, Losses]:
    """Return rank -> losses of every rank, and of the base model as BASE."""
    losses = {}
    for rank in Bar([BASE, *ranks], total=len(ranks) + 1, desc="ranks", unit="rank"):
        with at_rank(network, rank):
            losses[rank] = measurement.losses(network, name_of(rank))
    return losses


def write_table(path: Path, title: str, results: RankResults, measurement: Measurement) -> None:
    """Write the recommended rank, the table and the method as Markdown."""
    how = (
        f"Mean loss of {counted(results.num_pictures, 'picture')} at {counted(len(measurement.timesteps), 'timestep')} "
        f"with {counted(measurement.draws, 'noise')}, with 95 % intervals (Student's t over the pictures). Differences "
        "are taken picture by picture with the same noise (paired t); each interval is for one comparison. A rank is "
        "as good as the best if the interval of its difference contains 0."
    )
    cautions = [f"Caution: {results.caution}.", ""] if results.caution else []
    lines = [title, "", results.sentence(), "", *cautions, *results.table(), "", how]
    with replacing(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_record(
    path: Path, source: Mapping[str, Any], results: RankResults, measurement: Measurement, losses: Mapping[int, Losses]
) -> None:
    """Write all numbers as JSON; source names the measured file and its base model."""
    record = results.record() | {
        **source,
        "seed": measurement.pictures.seed,
        "draws": measurement.draws,
        "timesteps": measurement.timesteps,
        "losses": losses,  # rank -> picture -> loss at each timestep
    }
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def ranks_to_draw(ranks: list[int], needed: set[int]) -> list[int]:
    """Return the ranks of the contact sheet: BASE, evenly spaced ranks, and the needed ones."""
    if len(ranks) < MOST_COLUMNS:
        return [BASE, *ranks]
    return [BASE, *sorted({*spread(ranks, MOST_COLUMNS - 1 - len(needed)), *needed})]


def draw_ranks(
    measurement: Measurement,
    network: TrainableNetwork,
    ranks: list[int],
    prompts: Sequence[Prompt],
    *,
    seed: int,
    sampler: SamplerName,
    title: str,
) -> Image.Image:
    """Return a contact sheet with a row for each prompt and a column for each rank.

    seed is that of the run, from which those of prompts follow as in previews; sampler is for prompts without one.
    """
    base, runtime = measurement.base, measurement.runtime
    conditioner, clip_skip = LiveConditioner(base.texts), measurement.text.clip_skip
    seeds, decoding = preview_seeds(prompts, seed), Decoding(base, network, prompts, runtime.device)
    cells: list[list[Image.Image | None]] = [[] for _ in prompts]
    bar: Bar[None] = Bar(total=len(ranks) * len(prompts), desc="generating", unit="picture")
    with bar:
        for rank in ranks:
            with at_rank(network, rank), runtime.types.autocast(runtime.device):
                for picture in generate_previews(
                    base, conditioner, prompts, seeds, sampler=sampler, clip_skip=clip_skip, decoding=decoding
                ):
                    cells[picture.index].append(picture.image)
                    bar.update()
    return draw_sheet(cells, [prompt.prompt for prompt in prompts], [name_of(rank) for rank in ranks], title=title)
