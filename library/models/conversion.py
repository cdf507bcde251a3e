"""A base model in the other layout: which tensor of the result is made of which of the source, and the files around.

Nothing is built: both directions follow the names, so that a model of any size goes through one tensor at a time.
What the original layout has and Diffusers does not (the last block of SD 2.x's text encoder, a logit scale) is kept
in a file of the folder, so that the way there and back changes no bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from library.errors import UserError
from library.models import family as families
from library.models import keys
from library.models.family import SD2, ModelFamily, TextModel
from library.models.model_files import EXTRAS, ModelFiles, read_config, stored_configuration, tensor_name
from library.models.tokenizer import WINDOW, shipped_vocabulary

# Beginnings of names that a Diffusers folder does not keep: weights of the training, not of the model.
LEFT_OUT = ("model_ema.", f"{keys.VAE_PREFIX}loss.")
DIFFUSERS_VERSION = "0.30.0"  # the oldest that reads everything that is written here
V_BIAS = f"{keys.UNET_PREFIX}output_blocks.11.1.transformer_blocks.0.norm1.bias"
V_SPREAD = 0.09


@dataclasses.dataclass(frozen=True)
class Piece:
    """How a tensor of the result is made: of these tensors of the source, by this function."""

    sources: tuple[str, ...]
    make: Callable[..., torch.Tensor]
    shape: Callable[..., tuple[int, ...]]  # of the shapes of the sources


def as_is(name: str) -> Piece:
    """Return the piece that is a tensor of the source."""
    return Piece((name,), lambda tensor: tensor, lambda shape: shape)


def reshaped(name: str, shape: tuple[int, ...]) -> Piece:
    """Return the piece that is a tensor of the source in another shape."""
    return Piece((name,), lambda tensor: tensor.reshape(shape), lambda _: shape)


def transposed(name: str) -> Piece:
    """Return the piece that is a matrix of the source, transposed."""
    return Piece((name,), lambda tensor: tensor.T.contiguous(), lambda shape: shape[::-1])


def third(name: str, index: int) -> Piece:
    """Return the piece that is the first, second or last third of a tensor's rows."""
    return Piece((name,), lambda tensor: tensor.chunk(3)[index].contiguous(), lambda s: (s[0] // 3, *s[1:]))


def joined(names: tuple[str, ...]) -> Piece:
    """Return the piece that is several tensors of the source, one below the other."""
    return Piece(names, lambda *parts: torch.cat(parts), lambda *s: (sum(shape[0] for shape in s), *s[0][1:]))


def constant(tensor: torch.Tensor) -> Piece:
    """Return the piece that is always the same."""
    return Piece((), lambda: tensor, lambda: tuple(tensor.shape))


Plan = dict[str, Piece]  # name in the result -> its piece


# --------------------------------------------------------------------------------------------------------------
# Diffusers -> original
# --------------------------------------------------------------------------------------------------------------


def plan_to_original(model: ModelFiles) -> Plan:
    """Return the plan of an original-layout file of a Diffusers folder; raises UserError for names it does not know."""
    shapes, family = model.shapes, model.family
    unet = family.unet | read_config(model.path / "unet")
    with_attention = {at for at, kind in enumerate(unet["up_block_types"]) if "CrossAttn" in kind}
    unet_rule = keys.unet_rule(unet["layers_per_block"], frozenset(with_attention))
    plan: Plan = {}
    for name in own_names(model, "unet"):
        with naming(model.path, name):
            plan[keys.UNET_PREFIX + unet_rule(name)] = as_is(f"unet/{name}")
    if "vae" in model.parts:
        levels = len((family.vae | read_config(model.path / "vae"))["block_out_channels"])
        rule = keys.vae_rule(levels)
        for name in own_names(model, "vae"):
            source, shape = f"vae/{name}", shapes[f"vae/{name}"]
            is_matrix = ".attentions." in name and len(shape) == 2
            piece = reshaped(source, (*shape, 1, 1)) if is_matrix else as_is(source)
            plan[keys.VAE_PREFIX + rule(keys.vae_present_name(name))] = piece
    for text in family.text_models:
        plan |= text_to_original(model, text)
    extras = model.parts.get(EXTRAS, ())
    kept = {name: as_is(f"{EXTRAS}/{name}") for file in extras for name in file.shapes}
    # What the folder holds counts most, then what was kept of a checkpoint, then what is made up.
    return plan | {name: piece for name, piece in (filled(plan, shapes, family) | kept).items() if name not in plan}


def text_to_original(model: ModelFiles, text: TextModel) -> Plan:
    """Return the plan of a text encoder in the original layout."""
    thirds: dict[str, dict[int, str]] = {}
    plan: Plan = {}
    prefix = text.prefixes[0]
    for name in own_names(model, text.folder):
        source, canonical = f"{text.folder}/{name}", name.removeprefix("text_model.")
        if canonical.endswith("position_ids") and text.layout == "openclip":
            continue
        if text.layout == "clip":
            if canonical != "text_projection.weight":  # of a CLIP model with projection, which the family does not use
                plan[prefix + canonical] = as_is(source)
        elif canonical == "text_projection.weight":
            plan[f"{prefix}text_projection"] = transposed(source)
        else:
            with naming(model.path, name):
                index = keys.fused_slice(canonical)
                if index is None:
                    plan[prefix + keys.openclip_name(canonical)] = as_is(source)
                else:
                    thirds.setdefault(prefix + keys.openclip_name(canonical), {})[index] = source
    return plan | {name: joined(tuple(parts[index] for index in (0, 1, 2))) for name, parts in thirds.items()}


def filled(plan: Plan, shapes: families.Shapes, family: ModelFamily) -> Plan:
    """Return what original files of SD 2.x have besides, where the folder does not keep it: unused, but looked for.

    The last block is a copy of the one before; projection and scale are ones, as sd-scripts writes them.
    """
    if family is not SD2:
        return {}
    prefix = f"{SD2.text_models[0].prefixes[0]}"
    blocks = f"{prefix}transformer.resblocks."
    last = max((int(name[len(blocks) :].split(".")[0]) for name in plan if name.startswith(blocks)), default=0)
    copies = {
        f"{blocks}{last + 1}.{name.removeprefix(f'{blocks}{last}.')}": piece
        for name, piece in plan.items()
        if name.startswith(f"{blocks}{last}.")
    }
    if last + 1 > SD2.text_models[0].config["num_hidden_layers"]:
        copies = {}
    width = shapes[plan[f"{prefix}token_embedding.weight"].sources[0]][1]
    return copies | {
        f"{prefix}text_projection": constant(torch.ones(width, width)),
        f"{prefix}logit_scale": constant(torch.tensor(1)),
    }


# --------------------------------------------------------------------------------------------------------------
# Original -> Diffusers
# --------------------------------------------------------------------------------------------------------------


def plan_to_folder(model: ModelFiles) -> tuple[Plan, list[str]]:
    """Return the plan of a Diffusers folder (names as in `ModelFiles`), and the tensors that have no place there."""
    shapes, family = model.shapes, model.family
    unet = keys.without_prefix(shapes, keys.UNET_PREFIX)
    vae = keys.without_prefix(shapes, keys.VAE_PREFIX)
    config = folder_configs(model)
    with_attention = {at for at, kind in enumerate(config["unet"]["up_block_types"]) if "CrossAttn" in kind}
    unet_rule = keys.unet_rule(config["unet"]["layers_per_block"], frozenset(with_attention))
    plan: Plan = {}
    for name in keys.tensors(keys.unet_modules(len(config["unet"]["block_out_channels"]))):
        original = unet_rule(name)
        if original in unet:
            shape, source = unet[original], keys.UNET_PREFIX + original
            is_matrix = name.endswith(("proj_in.weight", "proj_out.weight")) and config["unet"]["use_linear_projection"]
            plan[f"unet/{name}"] = reshaped(source, shape[:2]) if is_matrix and len(shape) == 4 else as_is(source)
    if "vae" in config:
        sizes = config["vae"]
        levels = len(sizes["block_out_channels"])
        vae_rule = keys.vae_rule(levels)
        for name in keys.tensors(keys.vae_modules(levels, sizes["layers_per_block"])):
            original = vae_rule(name)
            if original in vae:
                shape, source = vae[original], keys.VAE_PREFIX + original
                is_matrix = ".attentions." in name and len(shape) == 4
                plan[f"vae/{name}"] = reshaped(source, shape[:2]) if is_matrix else as_is(source)
    for text in family.text_models:
        with whole(model.path, "text encoder", text.prefixes[0]):
            plan |= text_to_folder(shapes, text)
    check_complete(plan, model.path)
    used = {source for piece in plan.values() for source in piece.sources}
    return plan, [name for name in shapes if name not in used and not name.startswith(LEFT_OUT)]


def check_complete(plan: Plan, path: Path) -> None:
    """Raise UserError where a resnet, transformer or layer lacks a tensor that others of its kind in the part have."""
    found: dict[tuple[str, str], dict[str, set[str]]] = {}
    for name in plan:
        match = re.fullmatch(r"((\w+)/.*(resnets|attentions|transformer_blocks|layers)\.\d+)\.(.+)", name)
        if match is not None:
            found.setdefault((match[2], match[3]), {}).setdefault(match[1], set()).add(match[4])
    for containers in found.values():
        needed = {tensor for tensors in containers.values() for tensor in tensors if "shortcut" not in tensor}
        for container, tensors in containers.items():
            if needed - tensors:
                lacking = min(needed - tensors)
                raise UserError(f"{path} is not whole: {container}.{lacking} (as Diffusers names it) is missing")


def text_to_folder(shapes: families.Shapes, text: TextModel) -> Plan:
    """Return the plan of a text encoder in a Diffusers folder; raises KeyError for a projection that is not there."""
    prefix = keys.first_prefix(text.prefixes, shapes)
    if prefix is None:
        return {}
    own = keys.without_prefix(shapes, prefix)
    num_layers = families.text_sizes(text, own)["num_layers"]
    plan: Plan = {}
    for name in keys.tensors(keys.text_modules(num_layers)):
        target = f"{text.folder}/text_model.{name}"
        if text.layout == "clip":
            if name in own:
                plan[target] = as_is(prefix + name)
            continue
        with contextlib.suppress(KeyError):  # embeddings have no bias
            original, index = keys.openclip_name(name), keys.fused_slice(name)
            if original in own:
                source = prefix + original
                plan[target] = as_is(source) if index is None else third(source, index)
    if text.has_projection:
        for name in ("text_projection", "text_projection.weight"):  # OpenCLIP multiplies from the other side
            if name in own:
                piece = transposed(prefix + name) if name == "text_projection" else as_is(prefix + name)
                plan[f"{text.folder}/text_projection.weight"] = piece
        if f"{text.folder}/text_projection.weight" not in plan:
            raise KeyError("text_projection")
    return plan


def folder_configs(model: ModelFiles) -> dict[str, dict[str, Any]]:
    """Return the configuration of each part of the folder of an original-layout model, by its shapes."""
    shapes, family = model.shapes, model.family
    unet = keys.without_prefix(shapes, keys.UNET_PREFIX)
    vae = keys.without_prefix(shapes, keys.VAE_PREFIX)
    configs: dict[str, dict[str, Any]] = {}
    with whole(model.path, "U-Net", keys.UNET_PREFIX):
        configs["unet"] = {"_class_name": "UNet2DConditionModel"} | families.unet_config(family, unet)
    if vae:
        with whole(model.path, "VAE", keys.VAE_PREFIX):
            configs["vae"] = {"_class_name": "AutoencoderKL"} | families.vae_config(family, vae)
    for text in family.text_models:
        prefix = keys.first_prefix(text.prefixes, shapes)
        if prefix is None:
            raise UserError(f"{model.path} holds no text encoder (nothing under {text.prefixes[0]})")
        own = keys.without_prefix(shapes, prefix)
        with whole(model.path, "text encoder", prefix):
            sizes = families.text_encoder_config(text, **families.text_sizes(text, own))
        kind = "CLIPTextModelWithProjection" if text.has_projection else "CLIPTextModel"
        configs[text.folder] = {"architectures": [kind], "model_type": "clip_text_model"} | sizes
    metadata = model.parts[""][0].metadata
    configs = {part: config | stored_configuration(metadata, part) for part, config in configs.items()}
    check_groups(configs, model.path)
    return {part: config | {"_diffusers_version": DIFFUSERS_VERSION} for part, config in configs.items()}


def check_groups(configs: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Raise UserError for a model of unusual sizes whose other settings are therefore not known."""
    for part in ("unet", "vae"):
        config = configs.get(part, {})
        groups = config.get("norm_num_groups", 32)
        if any(channels % groups for channels in config.get("block_out_channels", ())):
            raise UserError(
                f"{path} is no Stable Diffusion of the usual sizes ({part}: {config['block_out_channels']} channels), "
                "and its groups and heads are not in the file; converting its folder to .safetensors keeps them"
            )


def unusual_configurations(model: ModelFiles) -> dict[str, dict[str, Any]]:
    """Return the configurations of a Diffusers folder that the shapes of its weights do not tell."""
    found = {}
    usual = {"unet": model.family.unet, "vae": model.family.vae}
    usual |= {text.folder: text.config for text in model.family.text_models}
    for part, expected in usual.items():
        if part not in model.parts:
            continue
        config = read_config(model.path / part)
        differs = any(key in config and as_tuple(config[key]) != as_tuple(value) for key, value in expected.items())
        if differs or config.get("norm_num_groups", 32) != 32:
            found[part] = {key: value for key, value in config.items() if not key.startswith(("_", "torch_dtype"))}
    return found


def as_tuple(value: Any) -> Any:
    """Return a list as a tuple, for JSON has no tuples."""
    return tuple(value) if isinstance(value, list) else value


@contextlib.contextmanager
def whole(path: Path, part: str, prefix: str) -> Iterator[None]:
    """Within it, a tensor that is looked for and not there becomes a UserError."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"{path} holds no whole {part}: {prefix}{error.args[0]} is missing") from None


@contextlib.contextmanager
def naming(path: Path, name: str) -> Iterator[None]:
    """Within it, a name that no rule knows becomes a UserError."""
    try:
        yield
    except KeyError:
        raise UserError(f"{path} holds {name}, which has no place in a checkpoint") from None


def own_names(model: ModelFiles, part: str) -> Iterator[str]:
    """Yield the names of a part's tensors without the part."""
    for file in model.parts.get(part, ()):
        yield from file.shapes


# --------------------------------------------------------------------------------------------------------------
# What stands beside the weights of a folder
# --------------------------------------------------------------------------------------------------------------


def predicts_v(model: ModelFiles, metadata: Mapping[str, str]) -> bool | None:
    """Return whether an original-layout model predicts v: what it says, else a guess for SD 2.x by a bias's spread.

    ComfyUI guesses so too. None for SD 1.x and SDXL that say nothing.
    """
    told = metadata.get("modelspec.prediction_type")
    if told is not None:
        return told == "v"
    if "v_pred" in model.shapes:
        return True
    if model.family is SD2 and V_BIAS in model.shapes:
        return bool(model.read(V_BIAS).float().std(unbiased=False) > V_SPREAD)
    return None


def write_surroundings(folder: Path, model: ModelFiles, *, v_prediction: bool) -> None:
    """Write configurations, scheduler, tokenizers and index of a Diffusers folder for an original-layout model."""
    configs = folder_configs(model)
    for part, config in configs.items():
        write_json(folder / part / "config.json", config)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config(v_prediction=v_prediction))
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if len(configs) > 3 else "StableDiffusionPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"] if "vae" in configs else [None, None],
    }
    for text in model.family.text_models:
        tokenizer = text.folder.replace("text_encoder", "tokenizer")
        index[text.folder] = ["transformers", configs[text.folder]["architectures"][0]]
        index[tokenizer] = ["transformers", "CLIPTokenizer"]
        write_tokenizer(folder / tokenizer, text.pad_token)
    if len(model.family.text_models) == 1:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    else:
        index |= {"force_zeros_for_empty_prompt": True}
    write_json(folder / "model_index.json", index)


def scheduler_config(*, v_prediction: bool) -> dict[str, Any]:
    """Return the noise schedule that all families were trained with, as the configuration of a DDIM scheduler."""
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_train_timesteps": 1000,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": "v_prediction" if v_prediction else "epsilon",
    }


def write_tokenizer(folder: Path, pad_token: str) -> None:
    """Write the CLIP tokenizer from the shipped vocabulary."""
    vocabulary, merges = vocabulary_files()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(vocabulary, encoding="utf-8")
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = pad_token
    write_json(folder / "special_tokens_map.json", special)
    more = {"tokenizer_class": "CLIPTokenizer", "model_max_length": WINDOW, "do_lower_case": True, "errors": "replace"}
    write_json(folder / "tokenizer_config.json", special | more)


@functools.cache
def vocabulary_files() -> tuple[str, str]:
    """Return what vocab.json and merges.txt hold; a model of SDXL has them twice."""
    vocabulary, merges = shipped_vocabulary()
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    return json.dumps(vocabulary, ensure_ascii=False) + "\n", "\n".join(lines) + "\n"


def write_json(path: Path, table: Any) -> None:
    """Write a table as JSON in UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------------------------------------------
# Reading by a plan
# --------------------------------------------------------------------------------------------------------------


def infos_of(
    plan: Plan, model: ModelFiles, dtype: torch.dtype | None
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return type and shape of each tensor of a plan; dtype None keeps those of the source."""
    sources = {
        tensor_name(part, name): (own, shape)
        for part, files in model.parts.items()
        for file in files
        for name, own, shape in file.infos()
    }
    found = {}
    for name, piece in plan.items():
        types = [sources[source][0] for source in piece.sources] or [piece.make().dtype]
        own = functools.reduce(torch.promote_types, types)  # the parts of a joined tensor may differ
        shape = piece.shape(*(sources[source][1] for source in piece.sources))
        found[name] = (dtype if dtype is not None and own.is_floating_point else own, shape)
    return found


def tensors_of(
    plan: Plan, model: ModelFiles, infos: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and tensor by a plan, each made when it is asked for."""
    for name, piece in plan.items():
        yield name, piece.make(*(model.read(source) for source in piece.sources)).to(infos[name][0])
