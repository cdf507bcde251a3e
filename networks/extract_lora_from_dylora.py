"""Extract every rank of a DyLoRA file: each becomes an ordinary LoRA file.

python networks/extract_lora_from_dylora.py --model dylora.safetensors --save_to out/split.safetensors --unit 4

writes out/split-0004.safetensors, out/split-0008.safetensors, ... up to the rank of the file. Alpha is unchanged:
the scale of a reader, alpha / b, is the one with which rank b was trained.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a script, from any folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.command_line import parse
from library.config.options import REQUIRED, option
from library.errors import Problems, UserError
from library.logs import run_script
from library.progress import Bar

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """Options."""

    model: Path = option(
        REQUIRED, "DyLoRA file (.safetensors, .ckpt or .pt)", missing="the DyLoRA file", reads="a file"
    )
    save_to: Path = option(
        REQUIRED,
        "name of the files to write; the rank is inserted before the extension",
        missing="the name of the files to write, such as out/split.safetensors",
    )
    unit: int | None = option(None, "smallest rank, and step to the next; unset: the unit of the training", minimum=1)
    sd_scripts_alpha: bool = option(
        False, "for files trained by sd-scripts: write the alpha with which each rank was trained there"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with a command line; return the exit code."""
    config = parse(SplitOptions, argv, description=__doc__, rules=(check_save_to,))
    from library.parallel import one_thread

    with one_thread():
        run(config)
    return 0


def run(config: SplitOptions) -> None:
    """Read the file, and write those of its ranks."""

    from library.adapters.dylora import ranks_of, truncated_to, with_alphas_of_sd_scripts
    from library.weight_file import open_weights
    from networks.lora import write_weights

    file = open_weights(config.model)
    ranks = ranks_of(file, config.unit)
    weights, full = dict(file.tensors(file.shapes)), ranks[-1]
    warn_of_scale(file.metadata, config)
    for rank in Bar(ranks, total=len(ranks), desc="ranks", unit="file"):
        part = truncated_to(rank, weights)
        if config.sd_scripts_alpha:
            part = with_alphas_of_sd_scripts(part, rank, full)
        path = config.save_to.with_stem(f"{config.save_to.stem}-{rank:04d}")  # as sd-scripts names it
        write_weights(path, part, metadata_of(file.metadata, rank, full))
        logger.info("rank %d: %s", rank, path)


def check_save_to(config: SplitOptions, problems: Problems) -> None:
    """Raise UserError for a --save_to of another format."""
    if config.save_to.suffix.lower() not in (".safetensors", ".ckpt", ".pt"):
        raise UserError(f"--save_to must end in .safetensors, .ckpt or .pt, got {config.save_to}")


def warn_of_scale(metadata: Mapping[str, str], options: SplitOptions) -> None:
    """Warn of a file trained by sd-scripts, which uses another scale, if the options do not correct it."""
    by_sd_scripts = metadata.get("modelspec.implementation_version", "").startswith("sd-scripts/")
    if by_sd_scripts and not options.sd_scripts_alpha:
        logger.warning(
            "this file was trained by sd-scripts, which trains rank b with alpha / sqrt(R b): with its alpha a reader "
            "applies lower ranks more strongly than they were trained; --sd_scripts_alpha writes the matching one"
        )
    if options.sd_scripts_alpha and metadata and not by_sd_scripts:
        logger.warning("--sd_scripts_alpha: the metadata do not say that sd-scripts trained this file")


def metadata_of(metadata: Mapping[str, str], rank: int, full: int) -> dict[str, str]:
    """Return the metadata of the file of a rank, without hashes, which write_weights adds."""
    from library.adapters.metadata import commented

    if not metadata:
        return {}
    return commented(metadata, f"rank {rank} of a DyLoRA of rank {full}") | {"ss_network_dim": str(rank)}


if __name__ == "__main__":
    run_script(main)
