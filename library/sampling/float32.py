"""Sampling in float32 around a U-Net of any type.

Pipelines of diffusers draw noise and keep latents in the type of the U-Net. In half precision each step of a sampler
then rounds the latents, and the CPU of torch before 2.13 draws other numbers than in float32, so that the picture of a
seed is another one. Behind a port only the U-Net itself computes in half precision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from diffusers.models.controlnets.controlnet import ControlNetModel
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel


class Float32Port(nn.Module):
    """A U-Net or ControlNet that takes and returns float32, and computes in a type of its own.

    All else that a pipeline asks of it is the module's, such as its configuration.
    """

    dtype = torch.float32

    def __init__(self, module: UNet2DConditionModel | ControlNetModel) -> None:
        super().__init__()
        self.module = module

    def forward(
        self, sample: Tensor, timestep: Tensor, added_cond_kwargs: dict[str, Tensor] | None = None, **inputs: Any
    ) -> Any:
        """Call the module. Timesteps and sizes stay as they are: half precision would make others of them."""
        own, inputs = self.module.dtype, inputs | {"sample": sample}

        def narrowed(value: Any) -> Any:
            return value.to(own) if isinstance(value, Tensor) and value.is_floating_point() else value

        results = self.module(timestep=timestep, added_cond_kwargs=added_cond_kwargs, **tree_map(narrowed, inputs))
        return tree_map(lambda value: value.float() if isinstance(value, Tensor) else value, results)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the module that the port itself lacks."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)
