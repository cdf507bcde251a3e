"""ControlNets, loaded from local files."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from library.errors import UserError, message_of
from library.file_kinds import weight_format
from library.models.base import BaseModel
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
            return ControlNetModel.from_pretrained(path, torch_dtype=dtype, local_files_only=True)
        config = dict(ControlNetModel.from_unet(base.unet, load_weights_from_unet=False).config)
        file = open_weights(path)
        names = file.shapes
        if any(name.startswith("controlnet_cond_embedding.") for name in names):
            net = ControlNetModel.from_config(config)
            net.load_state_dict(dict(file.tensors(names)))
            return net.to(dtype)
        if not any("input_hint_block" in name for name in names):
            raise UserError(f"--control_net_models: {path} is no ControlNet")
        with tempfile.TemporaryDirectory() as folder:
            text = json.dumps({key: value for key, value in config.items() if not key.startswith("_")})
            (Path(folder) / "config.json").write_text(text, encoding="utf-8")
            # Tensors, because diffusers would read the file by its name, and no weights with scales.
            state: Any = dict(file.tensors(names))  # a table is taken, too, but not in the type of the argument
            return ControlNetModel.from_single_file(state, config=folder, torch_dtype=dtype, local_files_only=True)
    except UserError:
        raise
    except Exception as error:  # each library has its own
        raise UserError(f"--control_net_models: {path} cannot be read as a ControlNet: {message_of(error)}") from error
