"""The parts of the models that a network trains, and a learning rate for each text encoder."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from library.config.network import NetworkConfig
from library.config.optimizer import OptimizerConfig
from library.errors import UserError
from library.networks.protocol import Network

logger = logging.getLogger(__name__)


class Trained(NamedTuple):
    """Which parts of the models are trained."""

    texts: tuple[bool, ...]  # each text encoder
    unet: bool

    @property
    def left_out(self) -> list[int]:
        """The text encoders that get no modules beside another that does, by number from 0."""
        return [number for number, is_on in enumerate(self.texts) if not is_on and any(self.texts)]

    def has(self, module: str) -> bool:
        """Return whether the part is trained that a module of a file is for, by its name."""
        number = encoder_of(module)
        return self.unet if number is None else number < len(self.texts) and self.texts[number]


def trained_parts(config: NetworkConfig, optimizer: OptimizerConfig, num_encoders: int) -> Trained:
    """Return which parts of a model with so many text encoders are trained: not those with a learning rate of 0.

    Raises UserError if that is none.
    """
    trained = Trained(
        tuple(rate > 0 and not config.network_train_unet_only for rate in optimizer.text_rates(num_encoders)),
        not config.network_train_text_encoder_only and optimizer.unet_rate > 0,
    )
    if not any(trained.texts) and not trained.unet:
        raise UserError(
            "nothing is trained: the learning rate of what is left is 0; give --unet_lr or --text_encoder_lr another"
        )
    return trained


def encoder_of(module: str) -> int | None:
    """Return the number of the text encoder, from 0, that a module of a file is for; None for the U-Net."""
    match = re.match(r"(?:lora|lycoris)_te(\d?)", module)
    return int(match[1] or 1) - 1 if match else None


def split_by_encoder(
    groups: Sequence[dict[str, Any]], names: Sequence[str] | None, rates: Sequence[float], network: Network
) -> tuple[list[dict[str, Any]], list[str] | None]:
    """Return groups and names so that each text encoder has its rate; groups have the largest of them.

    For foreign networks that know a single rate; warns if their parameters do not tell the encoders apart.
    """
    encoders = {id(parameter): encoder_of(name) for name, parameter in network.named_parameters()}
    if all(number is None for number in encoders.values()):
        logger.warning("--text_encoder_lr: this network takes one rate for all text encoders: %g", max(rates))
    split, labels = [], []
    for index, group in enumerate(groups):
        parts: dict[int | None, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            parts.setdefault(encoders[id(parameter)], []).append(parameter)
        for number, parameters in parts.items():
            rate = {} if number is None or "lr" not in group else {"lr": group["lr"] * rates[number] / max(rates)}
            split.append(group | {"params": parameters} | rate)
            labels.append("" if names is None else names[index] if number is None else f"{names[index]} {number + 1}")
    return split, None if names is None else labels
