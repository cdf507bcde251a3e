"""Files for third-party modules: what lycoris needs to read those of any trainer, and what it would leave out."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from library.errors import UserError
from library.networks.protocol import NetworkModule
from library.weight_file import EMBEDDING, at_first_dot

# Attributes of lycoris' class of networks: which layers its networks take.
TARGETS = (
    "UNET_TARGET_REPLACE_MODULE",
    "UNET_TARGET_REPLACE_NAME",
    "TEXT_ENCODER_TARGET_REPLACE_MODULE",
    "TEXT_ENCODER_TARGET_REPLACE_NAME",
)
# Ending of a tensor's name -> axis along which it has the rank of its module.
RANK_AXES = {
    "lora_down.weight": 0,
    "hada_w1_b": 0,
    "lokr_w1_b": 0,
    "lokr_w2_b": 0,
    "a2.weight": 0,
}
# Ending of a tensor that is a factor of a module's whole change -> that of the one that has its rank.
FACTORS = {
    "hada_w1_a": ("hada_w1_b",),
    "lokr_w1": ("lokr_w2_b",),
    "lokr_w1_a": ("lokr_w1_b",),
}
# Packages whose networks have the values of a file as soon as it is read; lycoris would add differences twice.
READ_WITH_VALUES = ("lycoris",)
# Of files that lycoris.kohya reads: beginnings of all names, and endings by which it tells kinds other than LoRA.
LYCORIS_NAMES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
LYCORIS_KINDS = (".hada_w1_a", ".lokr_w1", ".lokr_w1_a", ".dora_scale", ".oft_blocks", ".a1.weight", ".diff")
LYCORIS_FAILS = (".on_input",)  # of IA3: lycoris writes such files and ends with a TypeError when it reads them (4.1.3)
MAGNITUDE = "lora_magnitude_vector"  # in names of PEFT's DoRA
# Endings of tensors that have two dimensions at least.
MATRICES = (
    *(f".lora_{part}.weight" for part in ("up", "down", "mid")),
    *(f".hada_w{n}_{side}" for n in (1, 2) for side in "ab"),
    *(f".lokr_w{n}{side}" for n in (1, 2) for side in ("", "_a", "_b")),
    *(f".{side}{n}.weight" for side in "ab" for n in (1, 2)),
    ".oft_blocks",
)


@contextlib.contextmanager
def no_layers_by_preset(module: NetworkModule) -> Iterator[None]:
    """Within this context lycoris takes no layers but those of a file.

    To read a file it makes a network of its preset, which is kept in a class, and then exchanges the modules. With its
    own default that fails, since it takes layers of the U-Net twice.
    """
    kind = getattr(module, "LycorisNetworkKohya", None)
    kept = {name: getattr(kind, name) for name in TARGETS if hasattr(kind, name)}
    for name in kept:
        setattr(kind, name, [])
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(kind, name, value)


def has_values_once_read(module: str) -> bool:
    """Return whether the networks of a module need not be given the tensors of the file that they were made from."""
    return module.partition(".")[0] in READ_WITH_VALUES


def check_matrices(shapes: Mapping[str, Collection[int]], path: Path) -> None:
    """Raise UserError for a matrix of a file that has fewer than two dimensions."""
    for name, shape in shapes.items():
        if name.endswith(MATRICES) and len(shape) < 2:
            raise UserError(f"{path} is damaged: {name} has the shape {tuple(shape)}, a matrix is meant")


def is_for_lycoris(names: Collection[str]) -> bool:
    """Return whether lycoris.kohya draws a file, by the names of its tensors, and it is no mere LoRA."""
    own = [name for name in names if not name.startswith(EMBEDDING)]
    return all(name.startswith(LYCORIS_NAMES) and not name.endswith(LYCORIS_FAILS) for name in own) and any(
        name.endswith(LYCORIS_KINDS) for name in own
    )


def with_alphas(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file with an alpha for each module: where there is none, the rank is meant."""
    alphas = {}
    for module, tensors in by_module(weights).items():
        ranks = [tensors[part].shape[axis] for part, axis in RANK_AXES.items() if part in tensors]
        alphas[f"{module}.alpha"] = torch.tensor(float(ranks[0] if ranks else 1))
    return alphas | dict(weights)


def with_alphas_folded(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of LoHa and LoKr modules with alpha / rank multiplied into a factor, all others unchanged.

    When it merges, lycoris takes alpha / rank of these twice (4.1.3); 1 can be taken twice.
    """
    folded = dict(weights)
    for module, tensors in by_module(weights).items():
        for factor, parts in FACTORS.items():
            rank = next((tensors[part].shape[0] for part in parts if part in tensors), None)
            if factor in tensors and rank is not None and "alpha" in tensors:
                scale = float(tensors["alpha"]) / rank
                folded[f"{module}.{factor}"] = tensors[factor].float() * scale
                folded[f"{module}.alpha"] = torch.tensor(float(rank))
                break
    return folded


def by_module(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return module -> the rest of a name -> tensor, without bundled embeddings."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        module, ending = at_first_dot(name)
        if ending and not name.startswith(EMBEDDING):
            modules.setdefault(module, {})[ending.removeprefix(".")] = tensor
    return modules


def words_in(names: Collection[str]) -> list[str]:
    """Return the words of the embeddings among the tensors of a file."""
    bundled = (name.removeprefix(EMBEDDING) for name in names if name.startswith(EMBEDDING))
    return sorted({word.partition(".")[0] for word in bundled})
