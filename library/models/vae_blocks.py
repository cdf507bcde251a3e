"""Residual blocks of the VAE without copies that only gradients need.

At full resolution a VAE's activations are the largest tensors of a run, and a block of diffusers holds five of them at
a time: its input, both summands, their sum, and its quotient by one. With changes in place it holds three. The numbers
are the same to the bit.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from diffusers.models.resnet import ResnetBlock2D


def change_in_place(vae: nn.Module) -> None:
    """Let the residual blocks of a VAE overwrite their intermediate results; it has no gradients afterwards."""
    from diffusers.models.resnet import ResnetBlock2D

    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            # Those of a VAE have no timestep, and neither scale their output nor drop anything.
            assert module.time_emb_proj is None and module.output_scale_factor == 1 and module.dropout.p == 0
            setattr(module, "forward", functools.partial(_forward, module))  # noqa: B010 (mypy refuses assignments)


def _forward(block: ResnetBlock2D, x: Tensor, temb: None = None) -> Tensor:
    """Return x (B, C, H, W) plus two convolutions of it, each after norm and SiLU: (B, C', H, W). No timestep."""
    del temb
    change = x
    for norm, convolution in ((block.norm1, block.conv1), (block.norm2, block.conv2)):
        change = norm(change)  # a statement each, so that what came before is free
        change = functional.silu(change, inplace=True)
        change = convolution(change)
    return change.add_(x if block.conv_shortcut is None else block.conv_shortcut(x))
