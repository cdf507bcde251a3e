"""Algebra of low-rank changes without the full matrix: sums, and the nearest change of a smaller rank.

A change of a layer is scale * U D with U (up) of shape (out, R) and D (down) of shape (R, n); n is in, or in * kh * kw
for a convolution, row-major as in `weight.flatten(1)`. The shape of D in the file is kept beside it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

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
        """alpha / R, by which programs multiply."""
        return self.alpha / self.rank

    @property
    def is_large_conv(self) -> bool:
        """Whether the layer is a convolution with a kernel larger than 1x1."""
        return len(self.down_shape) == 4 and self.down_shape[2:] != (1, 1)

    @property
    def layer_shape(self) -> tuple[int, int]:
        """(out, n), the same for a layer whether its weights are 2-D or 4-D."""
        return self.up.shape[0], self.down.shape[1]

    def to(self, device: str) -> Change:
        """Return the change on a device."""
        return dataclasses.replace(self, up=self.up.to(device), down=self.down.to(device))

    def with_alpha(self, alpha: float) -> Change:
        """Return the same change with another alpha, the ratio of both multiplied into the factors.

        A power of two loses no bit: U is multiplied by it, or U and D by a part of it each if half precision would
        underflow. For any other ratio U becomes float32. Raises ValueError for an alpha of 0, with which a module
        changes nothing, unless it is the change's own.
        """
        if alpha == self.alpha:
            return self
        if alpha == 0:
            raise ValueError(f"a change with alpha {self.alpha:g} cannot have alpha 0, with which it changes nothing")
        ratio = self.alpha / alpha
        fraction, exponent = math.frexp(ratio)
        if fraction == 0.5:
            power = exponent - 1
            for first in (power, power // 2):
                second = power - first
                up, down = self.up * 2.0**first, self.down * 2.0**second
                if torch.equal(up * 2.0**-first, self.up) and torch.equal(down * 2.0**-second, self.down):
                    return dataclasses.replace(self, up=up, down=down, alpha=alpha)
        return dataclasses.replace(self, up=(self.up.double() * ratio).float(), alpha=alpha)

    def norm(self) -> float:
        """Return the Frobenius norm of the delta: ||U D||^2 is the sum over (U^T U) * (D D^T)."""
        up, down = self.up.double(), self.down.double()
        squared = ((up.T @ up) * (down @ down.T)).sum().clamp(min=0)  # NaN stays
        return abs(self.alpha) / self.rank * float(squared.sqrt())

    def delta(self) -> Tensor:
        """Return alpha / R * U D, (out, n), float32."""
        return (self.up.float() @ self.down.float()) * self.scale


def concatenated(parts: Sequence[tuple[float, Change]]) -> Change:
    """Return the exact weighted sum of changes; its rank is the sum of theirs, its alpha is that rank.

    With c = ratio * alpha / R the columns sqrt|c| U and the rows sign(c) sqrt|c| D of all parts are put side by
    side: their product is the sum of c U D, and alpha / rank is 1.
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
    """Return weighted sums of the factors of changes of one rank.

    With c = ratio * alpha / R and s = sum of |c|: U = sum of |c| U_i / sqrt s, D = sum of c D_i / sqrt s. For one
    file, and for files with equal factors, the product is the weighted sum; otherwise it also contains products of one
    file's U with another's D.
    """
    strengths = [ratio * change.scale for ratio, change in parts]
    root = math.sqrt(sum(map(abs, strengths))) or 1.0
    changes = [change for _, change in parts]
    up, down = torch.zeros_like(changes[0].up.float()), torch.zeros_like(changes[0].down.float())
    for c, change in zip(strengths, changes, strict=True):
        up, down = up + change.up.float() * (abs(c) / root), down + change.down.float() * (c / root)
    return Change(up, down, float(changes[0].rank), changes[0].down_shape)


def concatenated_as_sd_scripts(parts: Sequence[tuple[float, Change]]) -> Change:
    """Return the ranks side by side as in sd-scripts: the ratio multiplies both factors, alpha is that of the first."""
    base = parts[0][1]
    strengths = [math.sqrt(change.alpha / base.alpha) * ratio for ratio, change in parts]
    up = torch.cat([change.up.float() * abs(t) for t, (_, change) in zip(strengths, parts, strict=True)], dim=1)
    down = torch.cat([change.down.float() * t for t, (_, change) in zip(strengths, parts, strict=True)])
    return dataclasses.replace(base, up=up, down=down, down_shape=(down.shape[0], *base.down_shape[1:]))


def summed_as_sd_scripts(parts: Sequence[tuple[float, Change]]) -> Change:
    """Return the sums of the factors as in sd-scripts."""
    joined, first = concatenated_as_sd_scripts(parts), parts[0][1]
    up = joined.up.unflatten(1, (-1, first.rank)).sum(dim=1)
    down = joined.down.unflatten(0, (-1, first.rank)).sum(dim=0)
    return Change(up, down, first.alpha, (first.rank, *joined.down_shape[1:]))


# (ranks side by side, numbers of sd-scripts) -> how changes are summed.
SUMS: dict[tuple[bool, bool], Callable[[Sequence[tuple[float, Change]]], Change]] = {
    (False, False): summed,
    (True, False): concatenated,
    (False, True): summed_as_sd_scripts,
    (True, True): concatenated_as_sd_scripts,
}


def mixed(change: Change, generator: torch.Generator) -> Change:
    """Return the same change with its ranks mixed by a random rotation, so that the parts cannot be recognised.

    For an orthogonal Q, (U Q)(Q^T D) = U D. Q is sampled from the Haar measure (QR of a Gaussian matrix with the signs
    of R's diagonal, Mezzadri 2007, arXiv math-ph/0609050); it hides order and borders of the parts. A permutation
    would leave every column unchanged.
    """
    gaussian = torch.randn(change.rank, change.rank, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    q = q * r.diagonal().sign()
    up, down = change.up.double() @ q, q.T @ change.down.double()
    return dataclasses.replace(change, up=up.float(), down=down.float())


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """A singular value decomposition U diag(S) V of a change, S descending: whole, or its leading values."""

    left: Tensor  # (out, p)
    values: Tensor  # (p,)
    right: Tensor  # (p, n)
    total: float  # squared Frobenius norm of the whole

    def kept(self, rank: int) -> float:
        """Return the squared norm of the first rank values."""
        return float(self.values[:rank].double().square().sum())

    def energy(self, rank: int) -> float:
        """Return the share of the first rank values in the squared norm; 1 if that is 0."""
        return min(1.0, self.kept(rank) / self.total) if self.total > 0 else 1.0

    @property
    def numerical_rank(self) -> int:
        """The number of values above the rounding of float32, at least 1."""
        return max(1, int((self.values > self.values[0] * torch.finfo(torch.float32).eps).sum()))

    def truncated(self, rank: int, down_shape: tuple[int, ...]) -> Change:
        """Return the nearest change of a rank (Eckart and Young 1936), with the root of the values in each factor.

        The rank is at most the numerical one. Alpha is the rank, so that alpha / rank is 1.
        """
        rank = max(1, min(rank, self.numerical_rank))
        root = self.values[:rank].sqrt()
        up, down = self.left[:, :rank] * root, root[:, None] * self.right[:rank]
        return Change(up, down, float(rank), (rank, *down_shape[1:]))


def spectrum_of(change: Change) -> Spectrum:
    """Return the singular value decomposition of a change's delta, exact to rounding.

    With U = Qu Ru and D^T = Qd Rd (reduced QR) the delta is Qu (Ru Rd^T) Qd^T; only the core, at most R x R, is
    decomposed. In float64, because the core squares the range of the factors.
    """
    up, down = change.up.double() * change.scale, change.down.double()
    left, upper = torch.linalg.qr(up)  # (out, p), (p, R)
    right, lower = torch.linalg.qr(down.T)  # (n, q), (q, R)
    inner_left, values, inner_right = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    # If parts cancel each other, only rounding errors remain.
    values = values * (values > torch.finfo(torch.float32).eps * up.norm() * down.norm())
    total = float(values.square().sum())
    return Spectrum((left @ inner_left).float(), values.float(), (inner_right @ right.T).float(), total)


OVERSAMPLING = 8  # columns of a block besides the rank asked for
MOST_BLOCKS = 24
GAIN = 5e-4  # the iteration ends with a block that adds a smaller share to the energy
WIDEST = 12  # with fewer blocks in the short side the whole matrix is decomposed, which is as fast


def nearest_spectrum(matrix: Tensor, rank: int, generator: torch.Generator) -> Spectrum:
    """Return the `rank` leading values of a matrix (out, n), float32, and their vectors without a full decomposition.

    Block Krylov iteration (Musco and Musco 2015, arXiv:1504.05477): orthonormal blocks X, A^T A X, (A^T A)^2 X, ...
    of a random start span the space in which the matrix is decomposed. On flat spectra it converges where subspace
    iteration stays some percent below. Blocks are added until the energy of the leading values grows no more. generator
    is on the CPU, so that the start does not depend on the device.
    """
    block = rank + OVERSAMPLING
    short = min(matrix.shape)
    if WIDEST * block >= short:
        return exact_spectrum(matrix)
    is_wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if is_wide else matrix  # (m, n), m >= n
    basis = torch.linalg.qr(torch.randn(short, block, generator=generator).to(matrix.device))[0]  # (n, columns)
    images = tall @ basis  # (m, columns)
    gram = _gram(images, images)
    energy = 0.0
    while True:
        found = float(torch.linalg.eigvalsh(gram)[-rank:].sum())
        if found <= energy * (1 + GAIN) or basis.shape[1] + block > min(short, MOST_BLOCKS * block):
            break
        energy = found
        new = tall.T @ images[:, -block:]
        for _ in range(2):  # once is not enough in float32
            new = torch.linalg.qr(new - basis @ (basis.T @ new))[0]
        image = tall @ new
        side = _gram(images, image)
        gram = torch.cat([torch.cat([gram, side], dim=1), torch.cat([side.T, _gram(image, image)], dim=1)])
        basis, images = torch.cat([basis, new], dim=1), torch.cat([images, image], dim=1)
    inner = torch.linalg.eigh(gram)[1].flip(1)[:, :rank].float()
    return _spectrum_by(matrix, basis @ inner, is_wide=is_wide)


def exact_spectrum(matrix: Tensor) -> Spectrum:
    """Return all singular values of a matrix (out, n), float32, with their vectors.

    From the eigenvectors of the smaller Gram matrix in float64, several times as fast as a decomposition of the
    matrix itself; values are exact to 1e-8 of the largest.
    """
    is_wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if is_wide else matrix
    vectors = torch.linalg.eigh(_gram(tall, tall))[1].flip(1).float()
    return _spectrum_by(matrix, vectors, is_wide=is_wide)


def _gram(left: Tensor, right: Tensor) -> Tensor:
    """Return L^T R in float64."""
    wide = left.double()
    return wide.T @ (wide if right is left else right.double())


def _spectrum_by(matrix: Tensor, vectors: Tensor, *, is_wide: bool) -> Spectrum:
    """Return the spectrum of a matrix by the singular vectors of its short side, one in each column."""
    images = (matrix.T if is_wide else matrix) @ vectors
    values = images.norm(dim=0)
    long = images / values.clamp(min=torch.finfo(torch.float32).tiny)
    left, right = (vectors, long) if is_wide else (long, vectors)
    return Spectrum(left, values, right.T, float(matrix.norm()) ** 2)


def clamped(change: Change, quantile: float) -> Change:
    """Return a change with both factors cut at a quantile of the absolute values of their numbers.

    sd-scripts takes the quantile of the signed numbers, which depends on the arbitrary signs of singular vectors.
    """
    values = torch.cat([change.up.flatten(), change.down.flatten()]).abs()
    limit = values.kthvalue(max(1, math.ceil(quantile * len(values)))).values
    return dataclasses.replace(change, up=change.up.clamp(-limit, limit), down=change.down.clamp(-limit, limit))


def rank_to_keep(values: Tensor, most: int, method: str | None, target: float | None) -> int:
    """Return the rank of a module by its singular values: most, or up to most as many as a method needs for its target.

    sv_ratio keeps the values above the largest / target, sv_cumulative the fewest whose sum is the share target of all,
    sv_fro the fewest whose Frobenius norm is. sd-scripts' resize keeps one more by each.
    """
    if method is None or target is None or float(values[0]) <= 1e-12:
        return most
    if method == "sv_ratio":
        rank = int((values > values[0] / target).sum())
    else:
        sums = values.double().cumsum(0) if method == "sv_cumulative" else values.double().square().cumsum(0)
        share = target if method == "sv_cumulative" else target**2
        rank = int((sums >= sums[-1] * share * (1 - 1e-12)).nonzero()[0]) + 1
    return max(1, min(most, rank))
