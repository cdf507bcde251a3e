"""Options of the scripts that choose ranks."""

from __future__ import annotations

import dataclasses
from typing import Literal

from library.config.options import option
from library.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankOptions:
    """Ranks."""

    new_rank: int = option(4, "rank of the LoRA to write; with --dynamic_method the largest", minimum=1)
    new_conv_rank: int | None = option(
        None, "the same for convolutions with kernels larger than 1x1; unset: --new_rank", minimum=1
    )
    dynamic_method: Literal["sv_ratio", "sv_fro", "sv_cumulative"] | None = option(
        None, "choose the rank of each module by its singular values: ratio to the largest, Frobenius norm, sum"
    )
    dynamic_param: float | None = option(None, "target of --dynamic_method: above 1 for sv_ratio, else up to 1")

    def rank_of(self, *, is_large_conv: bool) -> int:
        """Return the rank for a kind of module."""
        return self.new_conv_rank if is_large_conv and self.new_conv_rank is not None else self.new_rank


def check_ranks(options: RankOptions) -> None:
    """Raise UserError for a --dynamic_method without target, a target without method, or one out of range."""
    method, target = options.dynamic_method, options.dynamic_param
    if method is None and target is not None:
        raise UserError(f"--dynamic_param {target:g} needs --dynamic_method: sv_ratio, sv_fro or sv_cumulative")
    if method is not None and target is None:
        raise UserError(f"--dynamic_method {method} needs --dynamic_param: its target")
    if method == "sv_ratio" and target is not None and not target > 1:
        raise UserError(f"--dynamic_param must be above 1 for sv_ratio, got {target:g}")
    if method != "sv_ratio" and target is not None and not 0 < target <= 1:
        raise UserError(f"--dynamic_param must be above 0 and at most 1 for {method}, got {target:g}")


def check_quantile(quantile: float | None) -> None:
    """Raise UserError for a --clamp_quantile outside of (0, 1]."""
    if quantile is not None and not 0 < quantile <= 1:
        raise UserError(f"--clamp_quantile must be above 0 and at most 1, got {quantile:g}")
