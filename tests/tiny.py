"""Tiny models with the structure of the real ones, written in every layout, for tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file

from library.config.model import ModelConfig
from library.models import building, keys, layout
from library.models import family as families
from library.models.base import BaseModel, find_base, load_base, text_body
from library.models.family import ModelFamily
from library.models.precision import types_of

Model = TypeVar("Model", bound=torch.nn.Module)
Models = dict[str, Any]  # U-Net, VAE and text encoders, of diffusers and transformers
ModelStore = Callable[[str], tuple[Models, dict[str, Path]]]

FAMILIES = {"sd1": families.SD1, "sd2": families.SD2, "sdxl": families.SDXL}
CHANNELS = {families.SD1: (32, 64, 96, 96), families.SD2: (64, 128, 192, 192), families.SDXL: (64, 128, 128)}
TEXT_WIDTHS = {families.SD1: (64,), families.SD2: (64,), families.SDXL: (64, 128)}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def unet_config(family: ModelFamily) -> dict:
    channels, widths = CHANNELS[family], TEXT_WIDTHS[family]
    heads = 8 if family is families.SD1 else tuple(count // 64 for count in channels)
    config = family.unet | {"block_out_channels": channels, "attention_head_dim": heads}
    config |= {"cross_attention_dim": sum(widths)}
    if family is families.SDXL:
        times = 6 * config["addition_time_embed_dim"]  # sizes, crops and targets
        config |= {
            "transformer_layers_per_block": (1, 2, 3),
            "projection_class_embeddings_input_dim": times + widths[-1],
        }
    return config


def text_config(family: ModelFamily, index: int = 0) -> dict:
    width = TEXT_WIDTHS[family][index]
    return building.text_encoder_config(
        family.text_models[index], width=width, inner_width=2 * width, num_layers=3 - index
    )


def vae_config(family: ModelFamily) -> dict:
    return family.vae | {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1, "sample_size": 64}


def materialise(model: Model, seed: int) -> Model:
    """Return a model from the meta device with random weights that keep activations in range."""
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = torch.ones_like(parameter) if name.endswith("weight") else torch.zeros_like(parameter)
        else:
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
            parameter.data = torch.randn(parameter.shape, generator=generator) * fan_in**-0.5
    for module in model.modules():
        if torch.is_tensor(getattr(module, "position_ids", None)):
            module.position_ids = torch.arange(77).expand(1, -1).clone()
    return model.requires_grad_(False).eval()


def make_models(family_name: str, seed: int = 0) -> Models:
    """Return U-Net, VAE and text encoders of a tiny model, under the names of a Diffusers folder."""
    family = FAMILIES[family_name]
    models: Models = {
        "unet": materialise(building.build_unet(unet_config(family)), seed),
        "vae": materialise(building.build_vae(vae_config(family)), seed + 1),
    }
    for index, text in enumerate(family.text_models):
        encoder = building.build_text_encoder(text_config(family, index), has_projection=text.has_projection)
        models[text.folder] = materialise(encoder, seed + 2 + index)
    return models


def load(path: Path | str, **options: Any) -> BaseModel:
    """Return a base model in float32, as training and generation open it."""
    return load_base(find_base(ModelConfig(pretrained_model_name_or_path=str(path), **options)), types_of("no"))


def original_names(rule: layout.Rule, names: Iterable[str]) -> dict[str, str]:
    """Return Diffusers name -> name in original files without the prefix of the part."""
    prefixes = (keys.UNET_PREFIX, keys.VAE_PREFIX)
    found = {name: next(rule(name)).name for name in names}
    return {name: own.removeprefix(prefixes[0]).removeprefix(prefixes[1]) for name, own in found.items()}


def body_state(encoder: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of a text encoder without its projection, by their names below `text_model`."""
    state = text_body(encoder).state_dict()
    return {name: tensor for name, tensor in state.items() if not name.endswith("position_ids")}


def text_state(encoder: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a text encoder as transformers 4 named them."""
    state = {f"text_model.{name}": tensor for name, tensor in body_state(encoder).items()}
    if hasattr(encoder, "text_projection"):
        state["text_projection.weight"] = encoder.text_projection.weight
    return state


def write_folder(models: Models, family_name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a Diffusers folder with text-encoder names as transformers 4 wrote them."""
    family = FAMILIES[family_name]
    for part in ("unet", "vae"):
        models[part].to(dtype).save_pretrained(folder / part)
        models[part].to(torch.float32)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER), encoding="utf-8")
    index: dict[str, Any] = {
        "_class_name": f"StableDiffusion{'XL' if family is families.SDXL else ''}Pipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "feature_extractor": [None, None],
    }
    index |= (
        {"image_encoder": [None, None], "force_zeros_for_empty_prompt": True}
        if family is families.SDXL
        else {"safety_checker": [None, None], "requires_safety_checker": False}
    )
    for at, text in enumerate(family.text_models):
        kind = "CLIPTextModelWithProjection" if text.has_projection else "CLIPTextModel"
        index |= {text.folder: ["transformers", kind], text.folder.replace("text_encoder", "tokenizer"): [None, None]}
        (folder / text.folder).mkdir(parents=True)
        state = {name: tensor.to(dtype) for name, tensor in text_state(models[text.folder]).items()}
        save_file(state, folder / text.folder / "model.safetensors", metadata={"format": "pt"})
        config = text_config(family, at) | {"architectures": [kind], "model_type": "clip_text_model"}
        (folder / text.folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def original_state(models: Models, family_name: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a tiny model in the original layout."""
    family = FAMILIES[family_name]
    unet, vae = models["unet"].state_dict(), models["vae"].state_dict()
    unet_rule, vae_rule = layout.unet_rule(family, dict(models["unet"].config)), layout.vae_rule(4)
    state = {next(unet_rule(name)).name: tensor for name, tensor in unet.items()}
    for name, tensor in vae.items():
        is_attention = ".attentions." in name and tensor.ndim == 2
        state[next(vae_rule(name)).name] = tensor[:, :, None, None] if is_attention else tensor
    for text in family.text_models:
        encoder, prefix = models[text.folder], text.prefixes[0]
        own = body_state(encoder)
        if text.layout == "clip":
            state |= {prefix + name: tensor for name, tensor in own.items()}
            state[prefix + "embeddings.position_ids"] = torch.arange(77)[None]
        else:
            own = openclip_state(own, num_unused=text.unused_layers)
            width = own["token_embedding.weight"].shape[1]
            own["logit_scale"] = torch.tensor(4.6)
            own["text_projection"] = (
                encoder.text_projection.weight.T  # OpenCLIP multiplies from the other side
                if text.has_projection
                else torch.arange(width * width).reshape(width, width) / width**2
            )
            state |= {prefix + name: tensor for name, tensor in own.items()}
    return {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}


def openclip_state(text: dict[str, torch.Tensor], num_unused: int) -> dict[str, torch.Tensor]:
    """Return a text encoder in OpenCLIP names: query, key and value fused, and unused blocks at the end."""
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in text.items():
        parts.setdefault(keys.openclip_name(name), {})[keys.fused_slice(name) or 0] = tensor
    state = {name: torch.cat([thirds[index] for index in sorted(thirds)]) for name, thirds in parts.items()}
    last = max(int(name.split(".")[2]) for name in state if name.startswith("transformer.resblocks."))
    for name in [name for name in state if name.startswith(f"transformer.resblocks.{last}.")]:
        for more in range(1, num_unused + 1):
            state[name.replace(f".{last}.", f".{last + more}.", 1)] = state[name] * (1 + more / 2)
    return state


def write_checkpoint(
    models: Models, family_name: str, path: Path, dtype: torch.dtype = torch.float32, *, ema: bool = False
) -> Path:
    """Write an original-layout file; the suffix chooses safetensors or pickle."""
    state = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in original_state(models, family_name).items()
    }
    if ema:
        state |= {f"model_ema.{name.replace('.', '')}": tensor * 2 for name, tensor in list(state.items())[:20]}
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 1, "global_step": 10}, path)
    return path
