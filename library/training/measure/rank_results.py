"""What the losses of a DyLoRA's ranks say: which rank to take, as a sentence, a table and a plot."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageDraw

from library.sampling.contact_sheet import BACKGROUND, INK, label_font
from library.training.measure.picture_losses import Interval, Losses, interval, paired, picture_means

BASE = 0  # in place of a rank: the base model without the adapter
WIDTH, HEIGHT = 960, 540
LEFT, RIGHT, TOP, BOTTOM = 92, 28, 44, 62
LINE_COLOUR, CHOICE_COLOUR, BASE_COLOUR, GRID_COLOUR = "#2b5fb3", "#c4462b", "#7a7a7a", "#e4e4e4"
NUM_TICKS = 5
MOST_LABELS = 16  # of the plot's ranks


@dataclasses.dataclass(frozen=True)
class RankResult:
    """One rank, or the base model."""

    rank: int
    size: int  # of its file, in bytes
    loss: Interval  # over the pictures
    to_best: Interval  # the loss less that of the best rank, picture by picture
    gain: float | None  # share of what the best rank gains over the base model; None where that is nothing

    @property
    def name(self) -> str:
        """What it is called in table and plot."""
        return f"rank {self.rank}" if self.rank else "base model"

    @property
    def is_within_noise(self) -> bool:
        """Whether the interval of the difference to the best reaches 0."""
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
        """The rank with the lowest loss."""
        return min(self.ranks, key=lambda row: row.loss.mean)

    @property
    def choice(self) -> RankResult:
        """The smallest rank within the noise of the best."""
        return next(row for row in self.ranks if row.is_within_noise)

    def sentence(self) -> str:
        """Return which rank to take and why, in one sentence."""
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
        lines = ["| | file | loss | less the best | within its noise | of the gain |", "|---|---|---|---|---|---|"]
        for row in self.rows:
            size = megabytes(row.size) if row.rank else ""
            gain = "" if row.gain is None else f"{row.gain:.1%}"
            difference = "" if row is self.best else str(row.to_best)
            verdict = "best" if row is self.best else "yes" if row.is_within_noise else "no"
            lines.append(f"| {row.name} | {size} | {row.loss} | {difference} | {verdict} | {gain} |")
        return lines

    def record(self) -> dict[str, Any]:
        """Return everything as JSON has it."""
        return {
            "choice": self.choice.rank,
            "best": self.best.rank,
            "sentence": self.sentence(),
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
    """Return the results of ranks, of which one is BASE, from their losses and the sizes of their files."""
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


def megabytes(size: int) -> str:
    """Return a size as people read it."""
    return f"{size / 1e6:.2f} MB"


# --------------------------------------------------------------------------------------------------------------
# Plot
# --------------------------------------------------------------------------------------------------------------


def draw_plot(results: RankResults) -> Image.Image:
    """Return the loss by rank; the bars are the intervals of the difference to the best, which decide."""
    axes = _axes_for(results)
    picture = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    pen = ImageDraw.Draw(picture)
    _draw_grid(pen, axes, results)
    _draw_base(pen, axes, results.rows[0])
    places = [axes.place(row.rank, row.loss.mean) for row in results.ranks]
    if len(places) > 1:
        pen.line(places, fill=LINE_COLOUR, width=3, joint="curve")
    for row, (x, y) in zip(results.ranks, places, strict=True):
        colour = CHOICE_COLOUR if row is results.choice else LINE_COLOUR
        ends = [axes.place(row.rank, row.loss.mean + sign * row.to_best.half)[1] for sign in (1, -1)]
        pen.line([(x, ends[0]), (x, ends[1])], fill=colour, width=2)
        for end in ends:
            pen.line([(x - 6, end), (x + 6, end)], fill=colour, width=2)
        pen.ellipse([x - 5, y - 5, x + 5, y + 5], fill=colour)
    font = label_font(13)
    choice = f"red: rank {results.choice.rank}, the one to take"
    pen.text((LEFT, 17), choice, fill=CHOICE_COLOUR, font=font, anchor="lm")
    legend = "bars: 95 % interval of the difference to the best rank, same pictures and noise"
    pen.text((WIDTH - RIGHT, 17), legend, fill=INK, font=font, anchor="rm")
    return picture


@dataclasses.dataclass(frozen=True)
class _Axes:
    last: int
    low: float
    high: float

    def place(self, rank: float, loss: float) -> tuple[float, float]:
        share = (min(max(loss, self.low), self.high) - self.low) / (self.high - self.low)
        return LEFT + rank / self.last * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _axes_for(results: RankResults) -> _Axes:
    """Return axes over all ranks; the base model is inside only where it does not press the ranks together."""
    low = min(row.loss.mean - row.to_best.half for row in results.ranks)
    high = max(row.loss.mean + row.to_best.half for row in results.ranks)
    base = results.rows[0].loss.mean
    if abs(base - (low + high) / 2) < 2 * (high - low):
        low, high = min(low, base), max(high, base)
    margin = (high - low) * 0.1 or abs(high) * 0.01 or 1.0
    return _Axes(results.ranks[-1].rank, low - margin, high + margin)


def _draw_grid(pen: ImageDraw.ImageDraw, axes: _Axes, results: RankResults) -> None:
    font = label_font(13)
    for index in range(NUM_TICKS + 1):
        loss = axes.low + (axes.high - axes.low) * index / NUM_TICKS
        _, y = axes.place(0, loss)
        pen.line([(LEFT, y), (WIDTH - RIGHT, y)], fill=GRID_COLOUR)
        pen.text((LEFT - 8, y), f"{loss:.5g}", fill=INK, font=font, anchor="rm")
    every = -(-len(results.ranks) // MOST_LABELS)
    for row in results.ranks[::-1][::every]:
        x, _ = axes.place(row.rank, axes.low)
        pen.text((x, HEIGHT - BOTTOM + 8), str(row.rank), fill=INK, font=font, anchor="mt")
        pen.text((x, HEIGHT - BOTTOM + 26), f"{row.size / 1e6:.3g}", fill=BASE_COLOUR, font=font, anchor="mt")
    pen.text((LEFT - 8, TOP - 14), "loss", fill=INK, font=font, anchor="rb")
    pen.text((LEFT - 8, HEIGHT - BOTTOM + 8), "rank", fill=INK, font=font, anchor="rt")
    pen.text((LEFT - 8, HEIGHT - BOTTOM + 26), "file, MB", fill=BASE_COLOUR, font=font, anchor="rt")


def _draw_base(pen: ImageDraw.ImageDraw, axes: _Axes, base: RankResult) -> None:
    """Draw the loss of the base model as a line, or at the edge a note of how far off it is."""
    _, y = axes.place(0, base.loss.mean)
    is_inside = axes.low < base.loss.mean < axes.high
    for x in range(LEFT, WIDTH - RIGHT, 12) if is_inside else ():
        pen.line([(x, y), (x + 6, y)], fill=BASE_COLOUR, width=2)
    text = f"base model {base.loss.mean:.5g}" + ("" if is_inside else ", beyond this edge")
    inwards = 6 if base.loss.mean >= axes.high else -6
    anchor = "rt" if inwards > 0 else "rb"
    pen.text((WIDTH - RIGHT, y + inwards), text, fill=BASE_COLOUR, font=label_font(13), anchor=anchor)
