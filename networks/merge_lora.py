"""Merge LoRA files into a base model, or into one LoRA file: SD 1.x, SD 2.x and SDXL.

python networks/merge_lora.py --sd_model model.safetensors --save_to merged.safetensors
    --models a.safetensors b.safetensors --ratios 0.8 0.5
python networks/merge_lora.py --save_to both.safetensors --models a.safetensors b.safetensors --ratios 0.8 0.5 --concat

Merged into a model, the sum is exact in float32. Merged into one LoRA, it is exact with --concat, for any ranks and
ratios; without it factors of equal ranks are added, as in sd-scripts, which is right only for files of one training.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # started as a script, from any folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config import tool_files
from library.config.hub_names import TakesModels
from library.config.model import ModelConfig
from library.config.options import REQUIRED, option, repeated
from library.config.tool_files import MergedLoras, Precision
from library.errors import Problems, UserError
from library.logs import run_script
from library.progress import Bar

if TYPE_CHECKING:
    import torch

    from library.adapters.low_rank import Change
    from library.adapters.merging import Weighted
    from library.models.checkpoint import Checkpoint

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeFiles(MergedLoras, TakesModels):
    """Files."""

    sd_model: Path | None = option(
        None,
        "base model to merge into: a checkpoint, a Diffusers folder, or OWNER/NAME of the Hugging Face Hub; unset: the "
        "LoRA files become one",
        hub="model",
    )
    save_to: Path = option(
        REQUIRED,
        "what to write: a .safetensors or .ckpt file, or a folder if the model is one",
        missing="the file or folder to write",
    )
    v2: bool = option(False, "check that the model is SD 2.x; the kind is detected")
    offline: bool = repeated(ModelConfig, "offline")

    def check_save_to(self, problems: Problems) -> None:
        """Add to problems what is wrong with --save_to."""
        tool_files.check_output("--save_to", self.save_to, problems, folder=self.is_folder("sd_model"))
        tool_files.check_apart("--save_to", self.save_to, (self.sd_model, *self.models))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Merging."""

    precision: Precision = option("float", "accepted; sums are always computed in float32")
    save_precision: Precision | None = option(None, "type of what is written; unset: --precision")
    concat: bool = option(False, "put the ranks of all LoRA files side by side: exact, for any ranks")
    shuffle: bool = option(False, "with --concat: mix the ranks by a random rotation, which hides the parts")
    reference_scale: bool = option(False, "the numbers of sd-scripts, which squares ratios and weakens --concat")
    allow_unmatched: bool = option(False, "skip modules of a LoRA file that are not in the model")
    seed: int | None = option(None, "seed of --shuffle; unset: a new one", minimum=0, only_with=("shuffle",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """All options."""

    files: MergeFiles
    merge: MergeOptions


def main(argv: Sequence[str] | None = None, description: str | None = __doc__) -> int:
    """Run the script with a command line; return the exit code."""
    from library.models.hub import parse_with_models

    config = parse_with_models(MergeConfig, argv, description=description, rules=(check_files, check_kind))
    from library.parallel import one_thread

    with one_thread():
        run(config)
    return 0


def run(config: MergeConfig) -> None:
    """Read the files, merge them, and write the result."""
    from library.adapters.merging import read_weighted
    from library.models.checkpoint import open_checkpoint

    problems, path = Problems(), config.files.sd_model
    model = None if path is None else problems.run(open_checkpoint, path)
    check_readable(config.files.models, problems)
    problems.raise_if_any()
    weighted = read_weighted(config.files)
    if model is not None:
        merge_into_model(model, config, weighted)
    else:
        merge_into_lora(config, weighted)
    logger.info("saved %s", config.files.save_to)


def check_files(config: MergeConfig, problems: Problems) -> None:
    """Add to problems what is wrong with the files and their strengths."""
    from library.adapters.layer_weights import check_strengths

    problems.run(config.files.check_save_to, problems)
    problems.run(check_strengths, config.files, problems)


def check_kind(config: MergeConfig, problems: Problems) -> None:
    """Add to problems options that do not fit the kind of file that is written."""
    merge = config.merge
    if config.files.sd_model is not None and (merge.concat or merge.shuffle):
        problems.add("--concat and --shuffle are for merging into a LoRA file: leave out these two, or --sd_model")
    if merge.shuffle and not merge.concat:
        problems.add("--shuffle needs --concat")


def check_readable(models: Sequence[Path], problems: Problems) -> None:
    """Add to problems the files that are no LoRA, or that cannot be read; no numbers are read of safetensors."""
    from library.adapters.lora_file import check_lora

    for path in models:
        problems.run(check_lora, path)


def merge_into_model(model: Checkpoint, config: MergeConfig, files: Sequence[Weighted]) -> None:
    """Write the base model with the changes of all files added, tensor by tensor."""
    from library.adapters.merging import Merge, additions_by_tensor, write_merged
    from library.adapters.metadata import architecture
    from library.models.family import check_flags

    check_flags(model.family, model.path, v2=config.files.v2)
    additions = additions_by_tensor(model, files, allow_unmatched=config.merge.allow_unmatched)
    own = {} if model.is_folder else dict(model.metadata)
    named = config.files.hub_model("sd_model")
    base = own.get("modelspec.title") or (model.path.stem if named is None or named.is_file else named.title)
    metadata = origin(config, files, base=base)
    if metadata and not model.is_folder:
        metadata |= architecture(model.family, own, is_network=False)
    write_merged(model, Merge(additions, written_type(config), metadata), config.files.save_to)


def merge_into_lora(config: MergeConfig, files: Sequence[Weighted]) -> None:
    """Write one LoRA file with the changes of all files."""
    import torch

    from library.adapters.alphas import with_one_alpha
    from library.adapters.lora_file import to_state_dict, with_own_text_names
    from library.adapters.low_rank import SUMS, mixed
    from library.adapters.merging import merged_vectors, parts_by_module
    from library.adapters.metadata import architecture, network_metadata
    from library.files import disk_errors
    from library.parallel import by_module
    from networks.lora import write_weights

    merge = config.merge
    parts = parts_by_module(files, allow_unmatched=merge.allow_unmatched)
    check_factors(parts, merge)
    sums = by_module(SUMS[merge.concat, merge.reference_scale], parts.values())
    changes = dict(zip(parts, Bar(sums, desc="merging", total=len(parts), unit="module"), strict=True))
    if merge.shuffle:
        generator = torch.Generator()
        generator.seed() if merge.seed is None else generator.manual_seed(merge.seed)
        changes = {name: mixed(change, generator) for name, change in changes.items()}
    changes = with_one_alpha(changes, config.files.save_to)
    ranks = {change.rank for change in changes.values()}
    logger.info("%d modules of rank %s", len(changes), " to ".join(map(str, sorted({min(ranks), max(ranks)}))))
    first = files[0].file
    metadata = network_metadata(
        [weighted.file for weighted in files], ranks, {change.alpha for change in changes.values()}
    )
    if provenance := origin(config, files):
        metadata |= provenance | architecture(first.family, first.metadata, is_network=True)
    with disk_errors(config.files.save_to):
        dtype = written_type(config)
        vectors = {name: values.to(dtype) for name, values in merged_vectors(files).items()}
        tensors = with_own_text_names(to_state_dict(changes, dtype) | vectors, [each.file for each in files])
        write_weights(config.files.save_to, tensors, metadata)


def check_factors(parts: Mapping[str, list[tuple[float, Change]]], merge: MergeOptions) -> None:
    """Raise UserError for factors that the options cannot join."""
    for name, same in parts.items():
        ranks = [change.rank for _, change in same]
        if not merge.concat and len(set(ranks)) > 1:
            raise UserError(
                f"{name} has the ranks {', '.join(map(str, ranks))} in the files: merge with --concat, "
                "or with networks/svd_merge_lora.py"
            )
        if merge.reference_scale and any(change.alpha <= 0 for _, change in same):
            raise UserError(f"{name} has an alpha of 0 or less, which --reference_scale cannot work with")


def origin(config: MergeConfig, files: Sequence[Weighted], *, base: str | None = None) -> dict[str, str]:
    """Return metadata that name the merged files; none with --no_metadata."""
    from library.adapters.metadata import merged_metadata

    if config.files.no_metadata:
        return {}
    merge = config.merge
    operation = "merge" if base else "concat" if merge.concat else "sum of factors"
    settings = {
        "lbws": config.files.lbws,
        "reference_scale": True if merge.reference_scale else None,
        "shuffled": True if merge.shuffle else None,
    }
    return merged_metadata(config.files.save_to, operation, files, base=base, settings=settings)


def written_type(config: MergeConfig) -> torch.dtype:
    """Return the type of the tensors to write."""
    return tool_files.dtype_named(config.merge.save_precision or config.merge.precision)


if __name__ == "__main__":
    run_script(main)
