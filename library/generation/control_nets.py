"""ControlNets, loaded from local files."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from library.errors import UserError, is_out_of_memory, message_of
from library.file_kinds import weight_format
from library.models.base import BaseModel
from library.models.checkpoint import choose_weights
from library.models.keys import CONTROL_NET_PREFIX, control_net_rule
from library.models.precision import move
from library.weight_file import open_weights

if TYPE_CHECKING:
    from diffusers.models.controlnets.controlnet import ControlNetModel


def load_control_nets(paths: Sequence[Path], base: BaseModel, device: torch.device) -> tuple[ControlNetModel, ...]:
    """Return the ControlNets of files or folders, in the U-Net's type, on a device."""
    nets = tuple(load_control_net(path, base) for path in paths)
    for net in nets:
        move(net, device)
    return nets


def load_control_net(path: Path, base: BaseModel) -> ControlNetModel:
    """Return a ControlNet from a Diffusers folder, or a file in either layout; raises UserError for another thing.

    A file is read with the sizes of the model's U-Net, so that nothing is looked for on the network.
    """
    from diffusers.models.controlnets.controlnet import ControlNetModel

    dtype = base.unet.dtype
    try:
        if path.is_dir():
            for name in (".safetensors", ".bin"):
                for part in path.glob(f"diffusion_pytorch_model*{name}"):
                    weight_format(part)  # which tells what else it is
            chosen = choose_weights([part.name for part in path.iterdir()], path.name) or ""
            variant = "fp16" if ".fp16." in chosen else None  # which diffusers reads only if it is named
            net = ControlNetModel.from_pretrained(path, torch_dtype=dtype, local_files_only=True, variant=variant)
            check_kind(net.config, base, path)
            return net
        with torch.device("meta"):  # of SDXL it would be 5 GB
            net = ControlNetModel.from_unet(base.unet, load_weights_from_unet=False)
        file = open_weights(path)
        names = diffusers_names(file.shapes, list(net.state_dict()), net.config["layers_per_block"])
        if not names:
            raise UserError(f"--control_net_models: {path} is no ControlNet")
        net.load_state_dict({names[name]: tensor.to(dtype) for name, tensor in file.tensors(names)}, assign=True)
        return net.eval()
    except UserError:
        raise
    except Exception as error:  # each library has its own
        if is_out_of_memory(error):
            raise
        raise UserError(f"--control_net_models: {path} cannot be read as a ControlNet: {message_of(error)}") from error


def diffusers_names(found: Collection[str], expected: Sequence[str], layers_per_block: int) -> dict[str, str]:
    """Return the names of a ControlNet's tensors in a file -> Diffusers names; empty for a file that is none.

    Files in the original layout may hold a whole model. A name that is not expected stays as it is.
    """
    if any(name.startswith("controlnet_cond_embedding.") for name in found):
        return {name: name for name in found}
    if not any("input_hint_block" in name for name in found):
        return {}
    prefix = CONTROL_NET_PREFIX if any(name.startswith(CONTROL_NET_PREFIX) for name in found) else ""
    rule = control_net_rule(layers_per_block)
    known = {prefix + rule(name): name for name in expected}
    return {name: known.get(name, name) for name in found if name.startswith(prefix)}


def check_kind(config: Mapping[str, Any], base: BaseModel, path: Path) -> None:
    """Raise UserError for a ControlNet of another kind of models, by its configuration."""
    for key in ("cross_attention_dim", "addition_embed_type"):
        if config.get(key) != base.unet.config.get(key):
            raise UserError(
                f"--control_net_models: {path} is for another kind of models than the model ({key} is "
                f"{config.get(key)}, not {base.unet.config.get(key)})"
            )
