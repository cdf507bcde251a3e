"""The losses of a DyLoRA's ranks compared: the recommended rank, as a sentence and a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from library.training.measure.picture_losses import Interval, Losses, interval, paired, picture_means
from library.words import counted

BASE = 0  # the rank that means the base model without the adapter
FEW_PICTURES = 8  # fewer give wide intervals, and the choice depends on which pictures they are
# Titles of the table's columns.
TITLES = ("", "file size", "loss", "loss above the best", "as good as the best?", "share of the best improvement")


@dataclasses.dataclass(frozen=True)
class RankResult:
    """One rank, or the base model."""

    rank: int
    size: int  # of its file, in bytes
    loss: Interval  # over the pictures
    to_best: Interval  # the loss less that of the best rank, picture by picture
    gain: float | None  # share of the best rank's gain over the base model; None if that has none

    @property
    def name(self) -> str:
        return name_of(self.rank)

    @property
    def is_within_noise(self) -> bool:
        """Whether the interval of the difference to the best rank includes 0."""
        return self.to_best.mean <= self.to_best.half


@dataclasses.dataclass(frozen=True)
class RankResults:
    """All ranks in order, the base model first."""

    rows: list[RankResult]
    num_pictures: int

    @property
    def ranks(self) -> list[RankResult]:
        """All but the base model."""
        return [row for row in self.rows if row.rank]

    @property
    def best(self) -> RankResult:
        return min(self.ranks, key=lambda row: row.loss.mean)

    @property
    def choice(self) -> RankResult:
        """The smallest rank within the noise of the best."""
        return next(row for row in self.ranks if row.is_within_noise)

    @property
    def caution(self) -> str:
        """What speaks against trusting the choice; empty if nothing does."""
        return caution_of(self.num_pictures)

    def sentence(self) -> str:
        """Return the recommended rank and the reason, in one sentence."""
        base, best, choice = self.rows[0], self.best, self.choice
        if choice is best:
            why = "it has the lowest loss, and every smaller rank loses more than the noise"
            if best is self.ranks[0]:
                why = "the smallest one has the lowest loss"
        else:
            why = (
                f"it is the smallest whose loss is within the noise of the best, rank {best.rank} "
                f"(difference {choice.to_best}; {megabytes(choice.size)} against {megabytes(best.size)})"
            )
        doubt = "; but the base model is within that noise, too: nothing shows that the training helped"
        return f"Take rank {choice.rank}: {why}{doubt if base.is_within_noise else ''}."

    def table(self) -> list[str]:
        """Return the lines of a Markdown table."""
        lines = [f"| {' | '.join(TITLES)} |".replace("|  |", "| |"), "|---" * len(TITLES) + "|"]
        for row in self.rows:
            size = megabytes(row.size) if row.rank else ""
            gain = "" if row.gain is None else f"{row.gain:.1%}"
            difference = "" if row is self.best else str(row.to_best)
            verdict = "best" if row is self.best else "yes" if row.is_within_noise else "no"
            lines.append(f"| {row.name} | {size} | {row.loss} | {difference} | {verdict} | {gain} |")
        return lines

    def record(self) -> dict[str, Any]:
        """Return all results as values for JSON."""
        return {
            "choice": self.choice.rank,
            "best": self.best.rank,
            "sentence": self.sentence(),
            "caution": self.caution,
            "pictures": self.num_pictures,
            "ranks": [
                {
                    "rank": row.rank,
                    "bytes": row.size,
                    "loss": row.loss.mean,
                    "loss_95": row.loss.half,
                    "less_best": row.to_best.mean,
                    "less_best_95": row.to_best.half,
                    "within_noise": row.is_within_noise,
                    "gain": row.gain,
                }
                for row in self.rows
            ],
        }


def compare_ranks(losses: Mapping[int, Losses], sizes: Mapping[int, int]) -> RankResults:
    """Return the results from rank -> losses, with BASE among the ranks, and rank -> bytes of its file."""
    means = {rank: interval(picture_means(found)) for rank, found in losses.items()}
    best = min((rank for rank in means if rank != BASE), key=lambda rank: means[rank].mean)
    whole = means[BASE].mean - means[best].mean
    return RankResults(
        rows=[
            RankResult(
                rank=rank,
                size=sizes.get(rank, 0),
                loss=means[rank],
                to_best=paired(losses[rank], losses[best]),
                gain=(means[BASE].mean - means[rank].mean) / whole if whole > 0 else None,
            )
            for rank in sorted(losses)
        ],
        num_pictures=len(losses[BASE]),
    )


def caution_of(num_pictures: int) -> str:
    """Return the caution that a number of measured pictures calls for; empty if there are enough."""
    if num_pictures >= FEW_PICTURES:
        return ""
    few = counted(num_pictures, "picture")
    return f"{few} are few to choose a rank by, others may give another one: measure {FEW_PICTURES} or more"


def megabytes(size: int) -> str:
    """Return a number of bytes as text in MB."""
    return f"{size / 1e6:.2f} MB"


def name_of(rank: int) -> str:
    """Return the name of a rank, or of the base model."""
    return "base model" if rank == BASE else f"rank {rank}"
