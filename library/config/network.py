"""Options of the network that is trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from library.config.options import REQUIRED, option
from library.config.values import parse_pairs

NETWORK_MODULES = ("networks.lora", "networks.dylora", "lycoris.kohya")  # that are named; any other one can be given


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Network."""

    network_module: str = option(
        REQUIRED,
        "module of the network: networks.lora, lycoris.kohya, ...",
        missing="networks.lora trains a LoRA",
        known=NETWORK_MODULES,
    )
    network_dim: int | None = option(None, "rank; unset: chosen by the module (4)", aliases=("networkdim",), minimum=1)
    network_alpha: float = option(1.0, "alpha; the adapter is scaled by alpha / rank", minimum=0)
    network_dropout: float | None = option(None, "dropout on the output of the down layers", minimum=0, maximum=1)
    network_args: dict[str, str] | None = option(
        None, "further arguments of the module, each key=value", parse=parse_pairs, form="a list of key=value"
    )
    network_weights: Path | None = option(None, "adapter file to start from")
    dim_from_weights: bool = option(
        False, "take ranks and alphas from --network_weights", wins_over=("network_dim", "network_alpha")
    )
    network_train_unet_only: bool = option(
        False, "train only the U-Net's adapter", excludes=("network_train_text_encoder_only",)
    )
    network_train_text_encoder_only: bool = option(False, "train only the text encoder's adapter")
    scale_weight_norms: float | None = option(None, "scale the change of a module down to this norm", minimum=0)
    base_weights: tuple[Path, ...] | None = option(None, "adapter files merged into the base before training")
    base_weights_multiplier: tuple[float, ...] | None = option(
        None, "strengths of --base_weights; unset: 1", only_with=("base_weights",)
    )
