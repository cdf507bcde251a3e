"""LoRA files over tiny models, and the changes that files mean, in float64, for tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from networks import lora
from networks.lora import LoRANetwork


def make_lora(
    models: Mapping[str, Any],
    path: Path,
    *,
    rank: int = 4,
    alpha: float = 3.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    keep: Callable[[str], bool] = lambda name: True,
    **arguments: Any,
) -> Path:
    """Write a LoRA file with random factors over tiny models."""
    torch.manual_seed(seed)
    network = lora.create_network(1.0, rank, alpha, None, models["text_encoder"], models["unet"], **arguments)
    for module in network.modules_in_order():
        torch.nn.init.normal_(module.lora_up.weight, std=0.05)
    weights = {name: tensor.to(dtype) for name, tensor in network.state_dict().items() if keep(name)}
    lora.write_weights(path, weights, {"ss_v2": "False"})
    return path


def deltas(path: Path) -> dict[str, torch.Tensor]:
    """Return module -> its change in float64, as a reader applies it."""
    weights = load_file(path)
    found = {}
    for name in weights:
        if name.endswith(".lora_down.weight"):
            module = name.removesuffix(".lora_down.weight")
            down, up = weights[name].double().flatten(1), weights[f"{module}.lora_up.weight"].double().flatten(1)
            alpha = weights.get(f"{module}.alpha", torch.tensor(float(down.shape[0])))
            found[module] = float(alpha) / down.shape[0] * up @ down
    return found


def weighted_sum(paths: Sequence[Path], ratios: Sequence[float]) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for path, ratio in zip(paths, ratios, strict=True):
        for module, delta in deltas(path).items():
            total[module] = total.get(module, torch.zeros(())) + ratio * delta
    return total


def assert_deltas(path: Path, expected: Mapping[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    found = deltas(path)
    assert found.keys() == expected.keys()
    for module, delta in expected.items():
        assert (found[module] - delta).norm() <= tolerance * delta.norm(), module


# ---- networks over the models of a family -------------------------------------------------------------------


def inputs(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return latents, timesteps and tokens."""
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(batch, 4, 16, 16, generator=generator)
    tokens = torch.randint(0, 49406, (batch, 77), generator=generator)
    return latents, torch.full((batch,), 500), tokens


@torch.no_grad()
def outputs(text_encoder: Any, unet: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the states of the text encoder, and what the U-Net makes of them."""
    latents, timesteps, tokens = inputs()
    hidden = text_encoder(tokens).last_hidden_state
    return hidden, unet(latents, timesteps, hidden).sample


def applied(text_encoder: Any, unet: Any, *, multiplier: float = 1.0, seed: int = 1, **args: Any) -> LoRANetwork:
    """Return a network over models, with weights that act."""
    network = lora.create_network(multiplier, 4, 2.0, None, text_encoder, unet, **args)
    network.apply_to(text_encoder, unet)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(network.named_parameters()):
            if "lora_up" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return network
