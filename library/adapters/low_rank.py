"""Algebra of low-rank changes: sums, and the nearest change of a smaller rank, without the full matrix.

A change of a layer is scale * U D with U (up) of shape (out, R) and D (down) of shape (R, n); n is in, or in * kh * kw
for a convolution, row-major as in `weight.flatten(1)`. The layer's own shape is kept beside it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Change:
    """One module of a network: U (out, R) and D (R, n) as stored, their alpha, and the shape of D in its file."""

    up: Tensor
    down: Tensor
    alpha: float
    down_shape: tuple[int, ...]  # (R, in), or (R, in, kh, kw)

    @property
    def rank(self) -> int:
        """The rank R."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """alpha / R, which readers multiply by."""
        return self.alpha / self.rank

    @property
    def is_large_conv(self) -> bool:
        """Whether the layer is a convolution with a kernel larger than 1x1."""
        return len(self.down_shape) == 4 and self.down_shape[2:] != (1, 1)

    @property
    def layer_shape(self) -> tuple[int, int]:
        """(out, n), by which changes of the same layer are recognised, 2-D or 4-D."""
        return self.up.shape[0], self.down.shape[1]

    def delta(self) -> Tensor:
        """Return alpha / R * U D, (out, n), float32."""
        return (self.up.float() @ self.down.float()) * self.scale


def concatenated(parts: Sequence[tuple[float, Change]]) -> Change:
    """Return the weighted sum of changes exactly, its rank the sum of theirs and its alpha that rank.

    With c = ratio * alpha / R the columns sqrt|c| U and the rows sign(c) sqrt|c| D of all parts stand side by
    side: their product is the sum of c U D, and readers multiply it by alpha / rank = 1.
    """
    ups, downs = [], []
    for ratio, change in parts:
        strength = ratio * change.scale
        root = abs(strength) ** 0.5
        ups.append(change.up.float() * root)
        downs.append(change.down.float() * (root if strength >= 0 else -root))
    up, down = torch.cat(ups, dim=1), torch.cat(downs)
    first = parts[0][1]
    return Change(up, down, float(down.shape[0]), (down.shape[0], *first.down_shape[1:]))


def summed(parts: Sequence[tuple[float, Change]]) -> Change:
    """Return the sums of the factors of changes of one rank, with the strength that the ratios mean.

    U = sum of sqrt|c| U_i and D = sum of sign(c) sqrt|c| D_i with c = ratio * alpha / R: exact for one file, and
    for files with equal factors; otherwise products of one file's U with another's D come in.
    """
    return _folded(concatenated(parts), parts[0][1].rank)


def concatenated_as_sd_scripts(parts: Sequence[tuple[float, Change]]) -> Change:
    """Return the ranks side by side as sd-scripts has them: both factors take the ratio, alpha is the first one's."""
    base = parts[0][1]
    strengths = [math.sqrt(change.alpha / base.alpha) * ratio for ratio, change in parts]
    up = torch.cat([change.up.float() * abs(t) for t, (_, change) in zip(strengths, parts, strict=True)], dim=1)
    down = torch.cat([change.down.float() * t for t, (_, change) in zip(strengths, parts, strict=True)])
    return dataclasses.replace(base, up=up, down=down, down_shape=(down.shape[0], *base.down_shape[1:]))


def summed_as_sd_scripts(parts: Sequence[tuple[float, Change]]) -> Change:
    """Return the sums of the factors as sd-scripts makes them."""
    return dataclasses.replace(_folded(concatenated_as_sd_scripts(parts), parts[0][1].rank), alpha=parts[0][1].alpha)


def _folded(joined: Change, rank: int) -> Change:
    """Return a change whose groups of rank ranks are added up; its alpha is the rank."""
    up = joined.up.unflatten(1, (-1, rank)).sum(dim=1)
    down = joined.down.unflatten(0, (-1, rank)).sum(dim=0)
    return Change(up, down, float(rank), (rank, *joined.down_shape[1:]))


def mixed(change: Change, generator: torch.Generator) -> Change:
    """Return the same change with its ranks mixed by a random rotation, so that the parts cannot be told apart.

    For an orthogonal Q, (U Q)(Q^T D) = U D. Drawn from the Haar measure (QR of a Gaussian matrix with the signs of
    R's diagonal, Mezzadri 2007, arXiv math-ph/0609050), Q leaves nothing of the order or the borders of the parts,
    where a permutation leaves every single column as it was.
    """
    gaussian = torch.randn(change.rank, change.rank, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    q = q * r.diagonal().sign()
    up, down = change.up.double() @ q, q.T @ change.down.double()
    return dataclasses.replace(change, up=up.float(), down=down.float())


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """A singular value decomposition U diag(S) V of a sum of changes, S descending."""

    left: Tensor  # (out, p)
    values: Tensor  # (p,)
    right: Tensor  # (p, n)

    def energy(self, rank: int) -> float:
        """Return the share of the squared norm that the first rank values hold; 1 of nothing."""
        squares = self.values.double().square()
        total = float(squares.sum())
        return float(squares[:rank].sum()) / total if total > 0 else 1.0

    def truncated(self, rank: int, down_shape: tuple[int, ...]) -> Change:
        """Return the nearest change of a rank (Eckart and Young 1936), the values shared evenly by both factors.

        Alpha is the rank, so that readers multiply by 1.
        """
        rank = max(1, min(rank, len(self.values)))
        root = self.values[:rank].sqrt()
        up, down = self.left[:, :rank] * root, root[:, None] * self.right[:rank]
        return Change(up, down, float(rank), (rank, *down_shape[1:]))


def spectrum_of(change: Change) -> Spectrum:
    """Return the singular value decomposition of a change's delta, exact to rounding.

    With U = Qu Ru and D^T = Qd Rd (reduced QR) the delta is Qu (Ru Rd^T) Qd^T; only the core, at most R x R, is
    decomposed. In float64, for the core squares the range of the factors.
    """
    up, down = change.up.double() * change.scale, change.down.double()
    left, upper = torch.linalg.qr(up)  # (out, p), (p, R)
    right, lower = torch.linalg.qr(down.T)  # (n, q), (q, R)
    inner_left, values, inner_right = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return Spectrum((left @ inner_left).float(), values.float(), (inner_right @ right.T).float())
