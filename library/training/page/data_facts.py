"""What the page tells of the pictures of a run, from its datasets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from library.data.batches import BatchMaker, RunPlan, count_draws
from library.data.captions import tag_counts
from library.data.records import Dataset, ImageRecord
from library.sampling.contact_sheet import spread
from library.training.page.facts import Bucket, DataFacts, Fed
from library.training.page.old_runs import MOST_BUCKETS, Tags, most_frequent

MOST_EXAMPLES = 6
MOST_CAPTIONS = 24


def describe_dataset(dataset: Dataset, folder: Path) -> DataFacts:
    """Return the facts of a dataset; folder is that of the run."""
    by_bucket: dict[tuple[int, int], list[ImageRecord]] = {}
    for record in dataset.records:
        by_bucket.setdefault(record.placement.bucket, []).append(record)
    draws = Counter(count_draws(dataset)).most_common(MOST_BUCKETS)
    regularisation = sum(record.subset.is_reg for record in dataset.records)
    return DataFacts(
        size=dataset.options.size,
        batch_size=dataset.options.batch_size,
        pictures=len(dataset.records) - regularisation,
        regularisation=regularisation,
        held_out=len(dataset.held_out),
        has_buckets=dataset.options.enable_bucket,
        buckets=tuple(
            Bucket(
                width=size[0],
                height=size[1],
                draws=number,
                pictures=len(by_bucket[size]),
                examples=tuple(relative(record.path, folder) for record in spread(by_bucket[size], MOST_EXAMPLES)),
            )
            for size, number in sorted(draws)
        ),
    )


def describe_tags(datasets: Iterable[Dataset]) -> Tags:
    """Return the most frequent tags of the captions."""
    texts = (text for dataset in datasets for record in dataset.records for text in record.tags)
    return most_frequent(tag_counts(texts))


def captions_of(plan: RunPlan, maker: BatchMaker, folder: Path) -> tuple[Fed, ...]:
    """Return the first captions of the first epoch that this process trains on."""
    found: list[Fed] = []
    for request in plan.requests(plan.start_step // plan.steps_per_epoch + 1):
        records = maker.task(request).records
        found += [
            Fed(picture=relative(record.path, folder), caption=caption)
            for record, caption in zip(records, maker.captions(request), strict=True)
        ]
        if len(found) >= MOST_CAPTIONS:
            break
    return tuple(found[:MOST_CAPTIONS])


def relative(path: Path, folder: Path) -> str:
    """Return a path as the record has it: from the folder of the run if it is in that, else whole."""
    whole, root = path.absolute(), folder.absolute()
    return (whole.relative_to(root) if whole.is_relative_to(root) else whole).as_posix()
