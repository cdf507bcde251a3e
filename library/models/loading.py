"""Base models from disk: an original-layout file or a Diffusers folder -> LoadedModels.

Models are built without memory and filled tensor by tensor, so that loading needs little more than the
weights in their final type. Nothing is downloaded, and of pickles only weights are read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from library.config.model import ModelConfig
from library.errors import UserError, told
from library.models import family as families
from library.models import keys
from library.models.family import ModelFamily
from library.models.model_files import (
    TEXT_FILES,
    UNET_FILES,
    check_stem,
    folder_kind,
    read_config,
    stored_configuration,
    weight_files,
)
from library.models.tokenizer import load_clip_tokenizer
from library.weight_file import WeightFile, check_finite, open_weights

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("vocab.json", "tokenizer.json")


@dataclasses.dataclass
class LoadedModels:
    """A base model in memory: frozen, in evaluation mode, on the CPU."""

    family: ModelFamily
    tokenizers: list[CLIPTokenizer]
    text_encoders: list[nn.Module]
    unet: nn.Module
    vae: nn.Module
    predicts_v: bool
    # Conditioning of all texts of a run, where it cannot change: see text_encoding.remember_texts.
    text_memory: dict[Any, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Detected:
    """What a model's headers and configurations tell before it is loaded."""

    family: ModelFamily
    predicts_v: bool | None  # None where the file does not say
    file: WeightFile | None  # None for a folder


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Where a tensor of a file goes: a name of the model, and which third of a fused tensor."""

    name: str
    third: int | None = None


# --------------------------------------------------------------------------------------------------------------
# Detection
# --------------------------------------------------------------------------------------------------------------


def detect(config: ModelConfig) -> Detected:
    """Return what kind of model the path holds; raises UserError for --v2 against the file, or no model."""
    path = Path(config.pretrained_model_name_or_path)
    if path.is_file():
        file = open_weights(path)
        found = Detected(families.detect_family(file.shapes, str(path)), None, file)
        check_stem(file)
    else:
        found = Detected(*folder_kind(path), None)
    if found.family not in families.TRAINED:
        raise UserError(f"{path} is an {found.family.title} model; this version trains SD 1.x and SD 2.x")
    families.check_flags(found.family, path, v2=config.v2)
    if found.family is families.SD2 and not config.v2:
        logger.info("%s is an SD 2.x model: --v2 is set", path)
    if found.predicts_v and not config.v_parameterization:
        logger.info("%s predicts v, says its scheduler: --v_parameterization is set", path)
    if config.v_parameterization and found.predicts_v is False:
        logger.warning("--v_parameterization was given, but the scheduler of %s says epsilon; v is trained", path)
    return dataclasses.replace(found, predicts_v=config.v_parameterization or bool(found.predicts_v))


@contextlib.contextmanager
def building(source: Path, part: str, prefix: str = "") -> Iterator[None]:
    """Within it a model is built from sizes of a file: what diffusers or transformers refuse becomes a UserError."""
    try:
        yield
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{source} holds no whole {part}: {prefix}{error.args[0]} is missing") from None
    except Exception as error:  # each library has its own
        raise UserError(f"{source} describes no {part} that can be built: {told(error)}") from error


# --------------------------------------------------------------------------------------------------------------
# Loading
# --------------------------------------------------------------------------------------------------------------


def load_models(
    config: ModelConfig, detected: Detected, *, dtype: torch.dtype | None, vae_dtype: torch.dtype | None
) -> LoadedModels:
    """Return the base model with U-Net and text encoder in dtype, the VAE in vae_dtype; None leaves out the weights."""
    path = Path(config.pretrained_model_name_or_path)
    parts = ("unet", "text_encoder") if config.vae else ("unet", "text_encoder", "vae")
    if detected.file is not None:
        loaded = {
            part: ORIGINAL_LOADERS[part](detected.file, detected.family, vae_dtype if part == "vae" else dtype)
            for part in parts
        }
    else:
        loaded = {part: _load_folder_part(path / part, part, vae_dtype if part == "vae" else dtype) for part in parts}
    vae = load_vae(config.vae, detected.family, vae_dtype) if config.vae else loaded["vae"]
    return LoadedModels(
        family=detected.family,
        tokenizers=[load_tokenizer(config, path, detected.family)],
        text_encoders=[loaded["text_encoder"]],
        unet=loaded["unet"],
        vae=vae,
        predicts_v=bool(detected.predicts_v),
    )


def load_vae_alone(config: ModelConfig, detected: Detected, dtype: torch.dtype) -> nn.Module:
    """Return the VAE of a model, or the one of --vae, without the rest."""
    if config.vae is not None:
        return load_vae(config.vae, detected.family, dtype)
    if detected.file is not None:
        return load_original_vae(detected.file, detected.family, dtype)
    return _load_folder_part(Path(config.pretrained_model_name_or_path) / "vae", "vae", dtype)


def load_tokenizer(config: ModelConfig, path: Path, family: ModelFamily) -> CLIPTokenizer:
    """Return the tokenizer from --tokenizer_cache_dir, the model's folder, or the suite; the first that is there."""
    places = []
    if config.tokenizer_cache_dir is not None:
        places = [config.tokenizer_cache_dir, *sorted(config.tokenizer_cache_dir.glob("*"))]
        places = [place for place in places if _is_tokenizer(place)]
        if not places:
            raise UserError(
                f"--tokenizer_cache_dir: {config.tokenizer_cache_dir} holds no vocab.json or tokenizer.json"
            )
        same_family = [place for place in places if ("stable-diffusion-2" in place.name) == (family is families.SD2)]
        places = same_family or places
    places.append(path / "tokenizer")
    folder = next((place for place in places if _is_tokenizer(place)), None)
    try:
        return load_clip_tokenizer(folder, pad_token=family.text_models[0].pad_token)
    except Exception as error:  # transformers raises anything for a damaged one
        raise UserError(f"tokenizer in {folder} cannot be read: {told(error)}") from error


def _is_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def load_original_unet(file: WeightFile, family: ModelFamily, dtype: torch.dtype | None) -> nn.Module:
    """Return the U-Net of an original-layout file."""
    with building(file.path, "U-Net", keys.UNET_PREFIX):
        config = families.unet_config(family, keys.without_prefix(file.shapes, keys.UNET_PREFIX))
        config |= stored_configuration(file.metadata, "unet")
        unet = build_unet(config)
    table = keys.table(unet.state_dict(), unet_rule_for(config))
    return _fill(unet, {keys.UNET_PREFIX + original: [Wanted(name)] for name, original in table.items()}, [file], dtype)


def unet_rule_for(config: Mapping[str, Any]) -> Any:
    """Return the naming rule of a U-Net with this Diffusers configuration."""
    with_attention = {index for index, kind in enumerate(config["up_block_types"]) if "CrossAttn" in kind}
    return keys.unet_rule(config["layers_per_block"], frozenset(with_attention))


def load_original_vae(file: WeightFile, family: ModelFamily, dtype: torch.dtype | None) -> nn.Module:
    """Return the VAE of an original-layout file: a whole checkpoint, or a VAE by itself without prefix."""
    prefix = keys.VAE_PREFIX if any(name.startswith(keys.VAE_PREFIX) for name in file.shapes) else ""
    if not _holds_vae(file.shapes):
        raise UserError(f"{file.path} holds no VAE: name one with --vae")
    with building(file.path, "VAE", prefix):
        config = families.vae_config(family, keys.without_prefix(file.shapes, prefix))
        config |= stored_configuration(file.metadata, "vae")
        vae = build_vae(config)
    table = keys.table(vae.state_dict(), keys.vae_rule(len(config["block_out_channels"])))
    return _fill(vae, {prefix + original: [Wanted(name)] for name, original in table.items()}, [file], dtype)


def load_original_text_encoder(file: WeightFile, family: ModelFamily, dtype: torch.dtype | None) -> nn.Module:
    """Return the text encoder of an original-layout file."""
    text = family.text_models[0]
    prefix = keys.first_prefix(text.prefixes, file.shapes)
    if prefix is None:
        raise UserError(
            f"{file.path} holds no text encoder (nothing under {text.prefixes[0]}); name a whole checkpoint"
        )
    shapes = keys.without_prefix(file.shapes, prefix)
    openclip = text.layout == "openclip"
    with building(file.path, "text encoder", prefix):
        config = families.text_encoder_config(text, **families.text_sizes(text, shapes))
        encoder = build_text_encoder(config | stored_configuration(file.metadata, text.folder))
    places: dict[str, list[Wanted]] = {}
    for name in canonical_text_state(encoder):
        original = keys.openclip_name(name) if openclip else name
        places.setdefault(prefix + original, []).append(Wanted(name, keys.fused_slice(name) if openclip else None))
    return _fill(encoder, places, [file], dtype)


ORIGINAL_LOADERS = {
    "unet": load_original_unet,
    "text_encoder": load_original_text_encoder,
    "vae": load_original_vae,
}


def check_vae(path: Path) -> None:
    """Raise UserError for a --vae that is none, as far as names and configuration tell."""
    if path.is_dir():
        read_config(_vae_folder(path))
    elif not _holds_vae(open_weights(path).shapes):
        raise UserError(f"--vae: {path} holds no VAE; name a file or a Diffusers folder that does")


def _holds_vae(shapes: families.Shapes) -> bool:
    names = ("encoder.down.", "encoder.down_blocks.", f"{keys.VAE_PREFIX}encoder.down.")
    return any(name.startswith(names) for name in shapes)


def _vae_folder(path: Path) -> Path:
    return path if (path / "config.json").is_file() else path / "vae"


def load_vae(path: Path, family: ModelFamily, dtype: torch.dtype | None) -> nn.Module:
    """Return the VAE that --vae names: a Diffusers folder (or its parent), or a file in either layout."""
    if path.is_dir():
        return _load_folder_part(_vae_folder(path), "vae", dtype)
    file = open_weights(path)
    if any(name.startswith("encoder.down_blocks.") for name in file.shapes):
        return _load_diffusers_vae_file(file, family, dtype)
    return load_original_vae(file, family, dtype)


def _load_diffusers_vae_file(file: WeightFile, family: ModelFamily, dtype: torch.dtype | None) -> nn.Module:
    """Return a VAE from a weight file in Diffusers names without its configuration."""
    original_shapes = {
        keys.vae_rule(families.count(file.shapes, "encoder.down_blocks.", 2))(name): shape
        for name, shape in file.shapes.items()
    }
    with building(file.path, "VAE"):
        vae = build_vae(families.vae_config(family, original_shapes))
    return _fill(vae, _vae_folder_places(vae, file.shapes), [file], dtype)


def _load_folder_part(folder: Path, part: str, dtype: torch.dtype | None) -> nn.Module:
    """Return one part of a Diffusers folder."""
    config = read_config(folder)
    files = [open_weights(path) for path in weight_files(folder, TEXT_FILES if part == "text_encoder" else UNET_FILES)]
    shapes = {name: shape for file in files for name, shape in file.shapes.items()}
    with building(folder / "config.json", part):
        model = BUILDERS[part](config)
    if part == "text_encoder":
        nested = any(name.startswith("text_model.") for name in shapes)
        places = {f"text_model.{name}" if nested else name: [Wanted(name)] for name in canonical_text_state(model)}
    elif part == "vae":
        places = _vae_folder_places(model, shapes)
    else:
        places = {name: [Wanted(name)] for name in model.state_dict()}
    return _fill(model, places, files, dtype)


def _vae_folder_places(vae: nn.Module, shapes: families.Shapes) -> dict[str, list[Wanted]]:
    return {name if name in shapes else keys.vae_old_diffusers_name(name): [Wanted(name)] for name in vae.state_dict()}


# --------------------------------------------------------------------------------------------------------------
# Building and filling
# --------------------------------------------------------------------------------------------------------------


def build_unet(config: Mapping[str, Any]) -> nn.Module:
    """Return a U-Net without memory (on the meta device)."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel.from_config(dict(config))


def build_vae(config: Mapping[str, Any]) -> nn.Module:
    """Return a VAE without memory (on the meta device)."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        return AutoencoderKL.from_config(dict(config))


def build_text_encoder(config: Mapping[str, Any], *, has_projection: bool = False) -> nn.Module:
    """Return a text encoder without memory (on the meta device); has_projection: with a matrix on the pooled output."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    known = {key: value for key, value in config.items() if key not in ("architectures", "dtype", "torch_dtype")}
    kind = CLIPTextModelWithProjection if has_projection else CLIPTextModel
    with torch.device("meta"):
        return kind(CLIPTextConfig(**known))


BUILDERS = {"unet": build_unet, "text_encoder": build_text_encoder, "vae": build_vae}


def text_model(encoder: nn.Module) -> nn.Module:
    """Return the module that holds embeddings and layers; from transformers 5.6 on it is CLIPTextModel itself."""
    return encoder.text_model if hasattr(encoder, "text_model") else encoder


def canonical_text_state(encoder: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state of a text encoder under names without `text_model.`, whichever transformers made it."""
    return {
        name: tensor for name, tensor in text_model(encoder).state_dict().items() if not name.endswith("position_ids")
    }


def _fill(
    model: nn.Module, places: dict[str, list[Wanted]], files: list[WeightFile], dtype: torch.dtype | None
) -> nn.Module:
    """Fill a model on the meta device from files (name in the file -> names in the model) and freeze it.

    Without a dtype it stays empty.
    """
    if dtype is None:
        return model.requires_grad_(False).eval()
    holder = text_model(model)
    expected = holder.state_dict()
    state: dict[str, torch.Tensor] = {}
    for file in files:
        for name, tensor in file.tensors(places):
            check_finite(tensor, name, file.path)
            for wanted in places[name]:
                part = tensor if wanted.third is None else tensor.chunk(3)[wanted.third]
                state[wanted.name] = _fitted(part, expected[wanted.name], name, file).to(dtype)
    missing = [name for name, wants in places.items() if any(want.name not in state for want in wants)]
    if missing:
        paths = ", ".join(str(file.path) for file in files)
        raise UserError(
            f"{paths}: {len(missing)} tensors of the {type(model).__name__} are missing (such as {missing[0]})"
        )
    holder.load_state_dict(state, strict=False, assign=True)
    _restore_position_ids(holder)
    return model.requires_grad_(False).eval()


def _fitted(tensor: torch.Tensor, expected: torch.Tensor, name: str, file: WeightFile) -> torch.Tensor:
    """Return the tensor in the expected shape: linear layers and 1x1 convolutions stand for each other."""
    if [size for size in tensor.shape if size != 1] != [size for size in expected.shape if size != 1]:
        raise UserError(f"{file.path}: {name} has the shape {tuple(tensor.shape)}, {tuple(expected.shape)} is needed")
    return tensor.reshape(expected.shape)


def _restore_position_ids(holder: nn.Module) -> None:
    """Fill the one buffer that files do not hold; everything else must have been filled."""
    for module in holder.modules():
        buffer = getattr(module, "position_ids", None)
        if torch.is_tensor(buffer) and buffer.is_meta:
            module.position_ids = torch.arange(buffer.shape[-1]).expand(buffer.shape).clone()
    left = [name for name, tensor in [*holder.named_parameters(), *holder.named_buffers()] if tensor.is_meta]
    assert not left, f"not filled: {left[:5]}"
