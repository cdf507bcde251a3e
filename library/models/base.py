"""Loads a base model of any family: finds its files, builds it on the meta device, and fills it tensor by tensor.

Loading needs little more memory than the weights in their final type, and only weights are read from pickles.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

import torch
from torch import Tensor, nn

from library.config.model import ModelConfig
from library.errors import UserError, message_of
from library.models import family as families
from library.models.building import build_part, config_of, defaults_of
from library.models.checkpoint import (
    UNET,
    VAE,
    Checkpoint,
    open_checkpoint,
    open_vae,
    stored_tokens,
)
from library.models.completeness import check_missing, check_surplus, diffusers_names
from library.models.family import ModelFamily, TextModel
from library.models.kinds import check_usable
from library.models.layout import plan_of_part
from library.models.precision import Types
from library.models.prediction import prediction_of, settled
from library.models.tokenizer import EOS_ID, VOCABULARY_SIZE, WINDOW, load_clip_tokenizer
from library.parallel import by_module
from library.weight_file import not_finite

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    TextModule: TypeAlias = CLIPTextModel | CLIPTextModelWithProjection

logger = logging.getLogger(__name__)

SIZES_TOLD = 6  # numbers that a U-Net with a pooled output as input is told of each picture: see `Conditioning`
TOKENIZER_FILES = ("vocab.json", "tokenizer.json")


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """A text encoder with its tokenizer and the settings of its family; D is its width."""

    row: TextModel
    tokenizer: CLIPTokenizer
    module: TextModule
    expand: Callable[[str], str] = str  # prompt -> prompt with the tokens of textual inversions

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return self.module.config.num_hidden_layers

    def encode(self, ids: Tensor, clip_skip: int | None) -> tuple[Tensor, Tensor | None]:
        """Return hidden states (N, 77, D) and pooled output (N, P) for token ids (N, 77).

        clip_skip n uses the n-th layer from the end; None uses the one that the family was trained with. The
        pooled output is the projected state of the first EOS after the final norm, or None for an encoder without
        projection.
        """
        layer, ids = clip_skip or self.row.layer, ids.to(self.module.device)
        if layer == 1 and self.row.has_final_norm:
            output = self.module(ids)
            hidden = output.last_hidden_state
        else:
            output = self.module(ids, output_hidden_states=True)
            hidden = output.hidden_states[-layer]
            if self.row.has_final_norm:
                hidden = text_body(self.module).get_submodule("final_layer_norm")(hidden)
        return hidden, self._pooled(output.last_hidden_state, ids) if self.row.has_projection else None

    def _pooled(self, states: Tensor, ids: Tensor) -> Tensor:
        """Return the projected states of the first EOS, (N, P), or of the end where there is none.

        transformers takes the largest id for EOS if the configuration says eos_token_id 2, as published ones do: the
        words of textual inversion have larger ones.
        """
        is_end = ids == EOS_ID
        is_end[:, -1] = True
        first = is_end.int().argmax(dim=1)
        projection = self.module.get_submodule("text_projection")
        return projection(states[torch.arange(len(ids), device=ids.device), first])


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """A base model in memory, frozen and in evaluation mode. Its modules change device and type in place."""

    family: ModelFamily
    predicts_v: bool
    zero_snr: bool  # whether the last timestep is pure noise
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    texts: tuple[TextEncoder, ...]

    @property
    def text_modules(self) -> list[nn.Module]:
        """The modules of the text encoders."""
        return [text.module for text in self.texts]


@dataclasses.dataclass(frozen=True)
class BaseFiles:
    """The files of a base model; nothing is loaded yet."""

    checkpoint: Checkpoint
    vae: Checkpoint  # the same, or that of --vae
    tokenizers: tuple[Path | None, ...]  # folder for each text encoder; None: the included vocabulary
    predicts_v: bool
    zero_snr: bool  # whether the last timestep is pure noise

    @functools.cached_property
    def vae_overflows(self) -> bool:
        """Whether the VAE overflows in fp16, by its configuration; a file has that of the published models."""
        # Configurations of SD 1.x and 2.x say so, too, where the default of diffusers was written into them.
        family = self.checkpoint.family
        return bool(family.vae.get("force_upcast")) and bool(config_of(self.vae, VAE).get("force_upcast", True))


def find_base(config: ModelConfig, *, zero_snr: bool = False) -> BaseFiles:
    """Return the files of the base model and what it predicts, from names and configurations alone.

    zero_snr: the last timestep is pure noise, whatever the files say. Raises UserError if there is no model, and for
        options that contradict the files.
    """
    path = Path(config.pretrained_model_name_or_path)
    checkpoint = open_checkpoint(path, variant=config.variant)
    family = checkpoint.family
    check_usable(checkpoint)
    families.check_flags(family, path, v2=config.v2)
    if family is families.SD2 and not config.v2:
        logger.info("%s is an SD 2.x model: --v2 is set", path)
    predicts_v, zero_snr = settled(
        prediction_of(checkpoint), path, predicts_v=config.v_parameterization, zero_snr=zero_snr
    )
    vae = checkpoint if config.vae is None else open_vae(config.vae, family)
    if config.vae is not None:
        check_scaling(config.vae, scaling_factor(vae), scaling_factor(checkpoint))
    return BaseFiles(
        checkpoint=checkpoint,
        vae=vae,
        tokenizers=tuple(find_tokenizer(text, path, config.tokenizer_cache_dir) for text in family.text_models),
        predicts_v=predicts_v,
        zero_snr=zero_snr,
    )


def scaling_factor(checkpoint: Checkpoint) -> float:
    """Return the factor between the latents of a model's VAE and those of its U-Net; without a VAE the family's."""
    with contextlib.suppress(UserError):
        return float({**defaults_of(VAE), **config_of(checkpoint, VAE)}["scaling_factor"])
    return float(checkpoint.family.vae["scaling_factor"])


def check_scaling(path: Path, found: float, needed: float) -> None:
    """Raise UserError for a VAE of another kind of models, by the factor in its configuration."""
    if not math.isclose(found, needed, rel_tol=1e-4):
        raise UserError(
            f"--vae: {path} has the scaling factor {found:g}, and the model needs one with {needed:g}: it belongs to "
            "another kind of model"
        )


def find_tokenizer(text: TextModel, model: Path, cache: Path | None) -> Path | None:
    """Return the tokenizer folder in --tokenizer_cache_dir, else that of the model, else None.

    In the cache that is the folder of the encoder's name, else the first: they differ only in padding.
    """
    folder = model / text.tokenizer_folder
    if cache is None:
        return folder if is_tokenizer(folder) else None
    places = [place for place in (cache, *sorted(cache.glob("*"))) if is_tokenizer(place)]
    if not places:
        raise UserError(f"--tokenizer_cache_dir: {cache} has no vocab.json or tokenizer.json")
    own = (place for place in places if place.name == text.tokenizer_folder or text.cached_as in place.name.lower())
    return next(own, places[0])


def is_tokenizer(folder: Path) -> bool:
    """Return whether a folder contains a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def load_base(files: BaseFiles, types: Types, *, filled: Collection[str] | None = None) -> BaseModel:
    """Return the base model on the CPU, with its parts in the types of the run.

    filled names the parts that are loaded (`unet`, `vae`, `text_encoder`, `text_encoder_2`), None for all; the others
    stay on the meta device, without memory. Raises UserError for parts that are missing or damaged.
    """
    checkpoint = files.checkpoint

    def part(name: str, dtype: torch.dtype) -> nn.Module:
        return load_part(checkpoint, name, dtype if filled is None or name in filled else None)

    texts = tuple(
        load_text(checkpoint, text, folder, cast("TextModule", part(text.folder, types.unet)))
        for text, folder in zip(checkpoint.family.text_models, files.tokenizers, strict=True)
    )
    unet = cast("UNet2DConditionModel", part(UNET, types.unet))
    check_fit(checkpoint.path, unet, texts)
    vae = load_part(files.vae, VAE, types.vae if filled is None or VAE in filled else None)
    checkpoint.close()  # with the weights of a pickle that no part uses
    files.vae.close()
    return BaseModel(checkpoint.family, files.predicts_v, files.zero_snr, unet, cast("AutoencoderKL", vae), texts)


def check_fit(source: Path, unet: UNet2DConditionModel, texts: Sequence[TextEncoder]) -> None:
    """Raise UserError for text encoders whose outputs the U-Net does not take."""
    sizes = unet.config
    states = sum(text.module.config.hidden_size for text in texts)
    pooled = sum(int(text.module.config.projection_dim or 0) for text in texts if text.row.has_projection)
    of_sizes = SIZES_TOLD * sizes["addition_time_embed_dim"] if pooled else 0
    for kind, made, taken in (
        ("states", states, sizes["cross_attention_dim"]),
        ("pooled outputs", pooled, (sizes["projection_class_embeddings_input_dim"] or of_sizes) - of_sizes),
    ):
        if made != taken:
            raise UserError(f"{source}: its text encoders make {kind} of width {made}, its U-Net takes {taken}")


def load_vae(files: BaseFiles, types: Types) -> AutoencoderKL:
    """Return only the VAE of a base model."""
    return cast("AutoencoderKL", load_part(files.vae, VAE, types.vae))


def load_text(checkpoint: Checkpoint, text: TextModel, folder: Path | None, module: TextModule) -> TextEncoder:
    """Return a text encoder with the tokenizer in a folder, or the included one with the tokens in the file's metadata.

    Raises UserError for an encoder that is too small for its tokens.
    """
    sizes = module.config
    for size, needed, unit in (
        (sizes.max_position_embeddings, WINDOW, "positions"),
        (sizes.vocab_size, VOCABULARY_SIZE, "tokens"),
    ):
        if size < needed:
            raise UserError(f"{checkpoint.path}: its {text.folder} has {size} {unit}, {needed} are needed")
    stored = {} if checkpoint.is_folder else stored_tokens(checkpoint.metadata, text.folder)
    added = {token: number for token, number in stored.items() if VOCABULARY_SIZE <= number < sizes.vocab_size}
    return TextEncoder(text, load_tokenizer(folder, text, added), module)


def load_tokenizer(folder: Path | None, text: TextModel, added: Mapping[str, int] | None = None) -> CLIPTokenizer:
    """Return the tokenizer in a folder, or the included one with added tokens, for a text encoder."""
    try:
        return load_clip_tokenizer(folder, pad_id=text.pad_id, added=added)
    except Exception as error:  # transformers raises any exception for a damaged tokenizer
        raise UserError(f"tokenizer in {folder} cannot be read: {message_of(error)}") from error


def load_part(checkpoint: Checkpoint, part: str, dtype: torch.dtype | None) -> nn.Module:
    """Return a part of a model in a type, frozen; without a dtype it stays on the meta device."""
    model = build_part(checkpoint, part)
    if dtype is not None:
        fill(model, part, checkpoint, dtype)
    if part in checkpoint.parts:
        checkpoint.parts[part].close()
    return model.requires_grad_(False).eval()


def fill(model: nn.Module, part: str, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Load the weights into an empty model; each tensor is read once, and no memory is shared with the file."""

    def read(source: str) -> Tensor:
        tensor, all_finite = checkpoint.take_as(source, dtype)
        if not all_finite:
            raise not_finite(source.removeprefix(f"{part}/"), checkpoint.path)
        return tensor

    def needed(source: str) -> int:
        return dtype.itemsize * math.prod(checkpoint.shape_of(source) or ())

    names = diffusers_names(model)  # Diffusers name -> name in the module
    expected = model.state_dict()
    plan = plan_of_part(checkpoint, part, {name: tuple(expected[own].shape) for name, own in names.items()})
    check_missing(checkpoint, part, [name for name in names if name not in plan])
    check_surplus(checkpoint, part, plan)
    targets: dict[str, list[str]] = {}  # name in the checkpoint -> Diffusers names
    for name, piece in plan.items():
        targets.setdefault(piece.places[0].name, []).append(name)
    state: dict[str, Tensor] = {}
    sources = checkpoint.in_order(targets)
    for source, tensor in zip(sources, by_module(read, sources, size=needed), strict=True):
        for name in targets[source]:
            state[names[name]] = plan[name].make(tensor)
    model.load_state_dict(state, strict=False, assign=True)
    restore_position_ids(model)


def text_body(module: nn.Module) -> nn.Module:
    """Return the module of embeddings and layers; since transformers 5.6 it is CLIPTextModel itself."""
    return getattr(module, "text_model", module)


def restore_position_ids(model: nn.Module) -> None:
    """Fill the only buffer that is not in files; every other tensor must have been loaded."""
    for module in model.modules():
        buffer = getattr(module, "position_ids", None)
        if isinstance(buffer, Tensor) and buffer.is_meta:
            module.position_ids = torch.arange(buffer.shape[-1]).expand(buffer.shape).clone()
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not left, f"not filled: {left[:5]}"
