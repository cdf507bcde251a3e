"""Report what a network file holds: kind, models, modules, ranks, sizes, damage, and what programs do with it.

python networks/check_lora_weights.py lora.safetensors
python networks/check_lora_weights.py lora.safetensors --json > lora.json
"""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # started as a script, from any folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.command_line import parse
from library.config.options import REQUIRED, option
from library.errors import named
from library.logs import FAILURE, run_script

if TYPE_CHECKING:
    from torch import Tensor

    from library.adapters.low_rank import Change
    from library.models.family import ModelFamily

logger = logging.getLogger(__name__)

# Metadata in the report; tools/show_metadata.py shows all.
SHOWN = (
    "modelspec.title",
    "modelspec.architecture",
    "ss_base_model_version",
    "ss_sd_model_name",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
    "ss_steps",
    "ss_num_train_images",
    "ss_training_comment",
    "modelspec.merged_from",
)
# Part of a model, as `library/adapters/names.py` calls it -> its title; `text` is one of unknown number.
TITLES = {"unet": "U-Net", "text_encoder_2": "text encoder 2", "text_encoder": "text encoder", "text": "text encoder"}
OTHER = "other"
WIDTH = 90  # characters of a metadata text


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Report."""

    file: Path = option(
        REQUIRED, "network file (.safetensors, .ckpt or .pt)", positional=True, missing="the network", reads="a file"
    )
    show_all_keys: bool = option(False, "list the tensors: shape, mean and least of absolute values", aliases=("s",))
    json: bool = option(False, "write the report as one JSON object")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with a command line; return the exit code: 1 for a damaged file."""
    config = parse(CheckOptions, argv, description=__doc__)
    from library.parallel import one_thread

    with one_thread():
        report = report_of(config.file, with_tensors=config.show_all_keys)
    text = json.dumps(report, ensure_ascii=False, indent=2) if config.json else "\n".join(lines_of(report))
    sys.stdout.write(f"{text}\n")
    return FAILURE if report["damage"] else 0


def report_of(path: Path, *, with_tensors: bool) -> dict[str, Any]:
    """Return the report on a file, as an object for JSON."""
    from library.adapters import readers
    from library.adapters.lora_file import refuse_model, whole_changes
    from library.weight_file import data_sha256, open_weights

    file = open_weights(path)
    refuse_model(file)
    shapes, metadata = dict(file.shapes), dict(file.metadata)
    types = {str(dtype).removeprefix("torch.") for _, dtype, shape in file.infos() if len(shape) > 0}
    family = readers.detect(shapes, metadata)
    keys = readers.keys_of(shapes)
    tensors = dict(file.tensors(shapes))
    modules = whole_changes(path, metadata, tensors)
    damage = damage_of(tensors)
    alphas = {name: change.alpha for name, change in modules.items()}
    verdicts = {} if damage else dict(readers.verdicts(keys, family, alphas, metadata))
    claimed = metadata.get("sshs_model_hash")
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "kinds": counted(key.kind for key in keys),
        "models": family.title if family else None,
        "names": readers.dialect(shapes),
        "types": sorted(types),
        "parts": {title: part for title, part in summaries(modules, family) if part["modules"]},
        "unknown_modules": readers.unknown_modules(keys, family),
        "damage": damage,
        "readers": {name: verdict.line() for name, verdict in verdicts.items()},
        "read_from": readers.versions(),
        "metadata": {key: metadata[key] for key in SHOWN if metadata.get(key) not in (None, "", "None")},
        "hash_is_true": None if claimed is None else claimed == data_sha256(path),
        "tensors": [statistics_of(name, tensor) for name, tensor in tensors.items()] if with_tensors else None,
    }


def counted(values: Iterator[str]) -> dict[str, int]:
    """Return value -> how often it occurs, the most frequent first."""
    return dict(collections.Counter(values).most_common())


def titles_of(modules: Mapping[str, Change], family: ModelFamily | None) -> dict[str, str]:
    """Return the title of the part of a model that each module is in."""
    from library.adapters.lora_file import named_layers
    from library.adapters.names import BEGINNINGS, spelled

    layers = named_layers({name: change.down_shape for name, change in modules.items()}, family)
    parts = {name: layers[name].part if name in layers else spelled(name).part for name in modules}
    is_named = {name for name in modules if name in layers or name.startswith(BEGINNINGS)}
    return {name: TITLES[part] if name in is_named else OTHER for name, part in parts.items()}


def summaries(modules: Mapping[str, Change], family: ModelFamily | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each part of a model with a summary of its modules."""
    titles = titles_of(modules, family)
    for title in dict.fromkeys((*TITLES.values(), OTHER)):
        own = {name: change for name, change in modules.items() if titles[name] == title}
        norms = {name: change.norm() for name, change in own.items()}
        summary = {
            "modules": len(own),
            "ranks": counted(str(change.rank) for change in own.values()),
            "alphas": counted(f"{change.alpha:g}" for change in own.values()),
            "mean_norm": sum(norms.values()) / max(1, len(norms)),
            "largest": max(norms, key=norms.__getitem__) if norms else None,
            "largest_norm": max(norms.values(), default=0.0),
            "without_effect": sum(norm == 0 for norm in norms.values()),
        }
        yield title, summary


def damage_of(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the damage: numbers that are not finite, matrices without their partner, of no or another rank."""
    from library.adapters.names import roles_of
    from library.adapters.readers import pairs_of
    from library.weight_file import is_finite

    found = [f"{name} holds NaN or infinity" for name, tensor in tensors.items() if not is_finite(tensor)]
    paired = pairs_of(tensors)
    found += [
        f"{name} has no partner" for stem, role, name in roles_of(tensors) if role != "alpha" and stem not in paired
    ]
    ranks: dict[str, set[int]] = {}
    for stem, role, name in roles_of(tensors):
        shape = tuple(tensors[name].shape)
        if role == "alpha" and tensors[name].numel() != 1:
            found.append(f"{name} has the shape {shape}, one number is meant")
        elif role != "alpha" and (len(shape) < 2 or not tensors[name].numel()):
            found.append(f"{name} has the shape {shape}, which no matrix has")
        elif role != "alpha" and stem in paired:
            ranks.setdefault(stem, set()).add(shape[0 if role == "down" else 1])
    unequal = [(stem, sorted(sizes)) for stem, sizes in ranks.items() if len(sizes) > 1]
    return found + [f"{stem}: the matrices have the ranks {sizes}" for stem, sizes in unequal]


def statistics_of(name: str, tensor: Tensor) -> dict[str, Any]:
    """Return name, shape, and mean and least of the absolute values of a tensor."""
    values = tensor.double().abs()
    mean, least = (float(values.mean()), float(values.min())) if values.numel() else (None, None)
    return {"name": name, "shape": list(tensor.shape), "mean": mean, "least": least}


def lines_of(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the report as text."""
    kinds = ", ".join(f"{kind} ({count} tensors)" for kind, count in report["kinds"].items())
    yield f"{report['file']}: {report['bytes'] / 1e6:.1f} MB, {', '.join(report['types'])}"
    yield f"kind     {kinds}"
    yield f"models   {report['models'] or 'not told by the modules'}; names of {report['names']}"
    if report["parts"]:
        yield ""
        yield f"{'part':<15} {'modules':>7}  {'rank':<14} {'alpha':<14} {'mean norm':>9}  largest"
    for title, part in report["parts"].items():
        ranks, alphas = several(part["ranks"]), several(part["alphas"])
        largest = f"{part['largest_norm']:.3g} {part['largest']}"
        yield f"{title:<15} {part['modules']:>7}  {ranks:<14} {alphas:<14} {part['mean_norm']:>9.3g}  {largest}"
        if part["without_effect"]:
            yield f"{'':<15} {part['without_effect']:>7}  change nothing"
    if report["unknown_modules"]:
        names = report["unknown_modules"]
        yield f"unknown  {len(names)} modules: {named(names)}"
    yield ""
    yield from (f"DAMAGE   {text}" for text in report["damage"][:10])
    yield from (f"{name:<20} {verdict}" for name, verdict in report["readers"].items())
    if report["readers"]:
        versions = ", ".join(f"{program} {version}" for program, version in report["read_from"].items())
        yield f"{'as of':<20} {versions}"
    if report["metadata"]:
        yield ""
    for key, text in report["metadata"].items():
        yield f"{key:<24} {text if len(text) <= WIDTH else text[: WIDTH - 3] + '...'}"
    if report["hash_is_true"] is not None:
        yield f"{'sshs_model_hash':<24} {'true' if report['hash_is_true'] else 'WRONG: not that of this data'}"
    for tensor in report["tensors"] or ():
        shape = "-".join(map(str, tensor["shape"])) or "number"
        mean, least = ("-" if tensor[key] is None else f"{tensor[key]:.6g}" for key in ("mean", "least"))
        yield f"{tensor['name']:<110} {shape:<16} {mean} {least}"


def several(counts: Mapping[str, int]) -> str:
    """Return the two most frequent values as text."""
    if len(counts) == 1:
        return next(iter(counts))
    shown = ", ".join(list(counts)[:2])
    return shown if len(counts) == 2 else f"{shown}, ..."


if __name__ == "__main__":
    run_script(main)
