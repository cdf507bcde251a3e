"""The facts of a run without a record: from the metadata of a network that it saved, and the names of its previews."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from library.training.page.facts import Bucket, Column, DataFacts, Facts

MOST_BUCKETS, MOST_TAGS = 40, 60

Tags = tuple[tuple[tuple[str, int], ...], int]  # the most frequent ones with their numbers, and how many there are


def facts_in(metadata: Mapping[str, str]) -> Facts:
    """Return what the metadata of the last saved network tell of its run; nothing of what they say otherwise."""
    try:
        tags, number = tags_in(metadata)
        best = metadata.get("ss_best_validation_loss")
        steps, per_epoch = whole(metadata.get("ss_max_train_steps")), whole(metadata.get("ss_num_batches_per_epoch"))
        to_a_step = whole(metadata.get("ss_gradient_accumulation_steps")) or 1
        return Facts(
            step=whole(metadata.get("ss_steps")) or 0,
            epoch=whole(metadata.get("ss_epoch")) or 0,
            steps=steps,
            epochs=whole(metadata.get("ss_num_epochs")),
            steps_per_epoch=None if per_epoch is None else -(-per_epoch // to_a_step),
            batches_to_a_step=to_a_step,
            best=None if best is None else (float(best), int(metadata["ss_best_validation_step"])),
            datasets=datasets_in(metadata),
            tags=tags,
            num_tags=number,
        )
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return Facts()


def whole(text: str | None) -> int | None:
    """Return a number of the metadata; None if it is unknown."""
    return int(text) if text is not None and text.isdecimal() else None


def most_frequent(counts: Mapping[str, int]) -> Tags:
    """Return the most frequent of some tags, and how many there are."""
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return tuple(ordered[:MOST_TAGS]), len(counts)


def datasets_in(metadata: Mapping[str, str]) -> tuple[DataFacts, ...]:
    """Return the facts of the datasets that the metadata of a network tell of; raises ValueError, or as `dict`."""
    if "ss_datasets" in metadata:
        described = json.loads(metadata["ss_datasets"])
        held_out = [int(metadata.get("ss_num_validation_images", 0)) if len(described) == 1 else 0] * len(described)
        return tuple(_dataset_in(entry, number) for entry, number in zip(described, held_out, strict=True))
    if "ss_bucket_info" not in metadata:
        return ()
    size = metadata["ss_resolution"].strip("()").split(",")
    entry = {
        "resolution": [int(part) for part in (size * 2)[:2]],
        "batch_size_per_device": int(metadata["ss_batch_size_per_device"]),
        "num_train_images": int(metadata["ss_num_train_images"]),
        "num_reg_images": int(metadata["ss_num_reg_images"]),
        "bucket_info": json.loads(metadata["ss_bucket_info"]),
    }
    return (_dataset_in(entry, int(metadata.get("ss_num_validation_images", 0))),)


def _dataset_in(entry: Mapping[str, Any], held_out: int) -> DataFacts:
    info = entry["bucket_info"] or {"buckets": {}}
    buckets = [(*bucket["resolution"], int(bucket["count"])) for bucket in info["buckets"].values()]
    return DataFacts(
        size=(int(entry["resolution"][0]), int(entry["resolution"][1])),
        batch_size=int(entry["batch_size_per_device"]),
        pictures=sum(subset["img_count"] for subset in entry.get("subsets", ())) or int(entry["num_train_images"]),
        regularisation=int(entry["num_reg_images"]),
        held_out=held_out,
        has_buckets=bool(buckets),
        buckets=tuple(
            Bucket(width=int(width), height=int(height), draws=draws, pictures=draws)
            for width, height, draws in itertools.islice(buckets, MOST_BUCKETS)
        ),
    )


def tags_in(metadata: Mapping[str, str]) -> Tags:
    """Return the most frequent tags in the metadata of a network; raises ValueError, or as `dict`."""
    total: Counter[str] = Counter()
    for counts in json.loads(metadata.get("ss_tag_frequency", "{}")).values():
        total.update({str(tag): int(number) for tag, number in counts.items()})
    return most_frequent(total)


PREVIEW = re.compile(r"(?P<moment>e?\d{6,})_(?P<index>\d{2,})_(?P<date>\d{14})_\d+\.png")


def columns_in(folder: Path, name: str | None, steps_per_epoch: int | None) -> tuple[Column, ...]:
    """Return the previews in the folder `sample` of a run, of each moment and prompt the last one; name is the run's.

    Without the steps of an epoch the moments are numbered by epochs.
    """
    prefix = f"{name}_" if name else ""
    found: dict[str, dict[int, str]] = {}
    for path in _sorted_by_date(folder.glob("sample/*.png"), prefix):
        match = PREVIEW.fullmatch(path.name.removeprefix(prefix))
        if match is not None and path.name.startswith(prefix):
            found.setdefault(match["moment"], {})[int(match["index"])] = f"sample/{path.name}"
    columns = []
    for moment, pictures in found.items():
        number, by_epoch = int(moment.removeprefix("e")), moment.startswith("e")
        label = "start" if moment == "e000000" else f"epoch {number}" if by_epoch else f"step {number}"
        step = number * (steps_per_epoch or 1) if by_epoch else number
        rows = tuple(pictures.get(index, "") for index in range(max(pictures) + 1))
        columns.append(Column(label=label, step=step, pictures=rows))
    return tuple(sorted(columns, key=lambda column: column.step))


def _sorted_by_date(paths: Iterable[Path], prefix: str) -> list[Path]:
    return sorted(paths, key=lambda path: path.name.removeprefix(prefix).split("_")[2:3])
