"""Converts base models: what is written, and the checks that it will be read as the model that it is made of.

The weights follow a plan of `layout.py`, one tensor at a time, for models of any size. Tensors that only the original
layout has (the last block of SD 2.x's text encoder, a logit scale) are kept in a file of the folder, so that
converting back restores every bit. The files around the weights are in `surroundings.py`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from library.errors import UserError, named
from library.models import family as families
from library.models.base import find_tokenizer, load_tokenizer
from library.models.building import config_of, defaults_of, detected_config
from library.models.checkpoint import (
    ADDED_TOKENS,
    CONFIGURATIONS,
    EXTRAS,
    EXTRAS_FILE,
    UNET,
    VAE,
    WHOLE,
    Checkpoint,
    PlannedPart,
    folder_family,
    split_name,
    stored_tokens,
    tensor_name,
)
from library.models.completeness import parts_of, whole_plan
from library.models.layout import (
    POSITION_IDS,
    TEXT_ROOT,
    TRAINING_ONLY,
    Infos,
    Piece,
    Plan,
    copy_plan,
    plan_to_original,
    unplaced,
)
from library.models.prediction import V_MARKER, ZERO_SNR_MARKER, Prediction, prediction_of
from library.models.tokenizer import VOCABULARY_SIZE, added_tokens

logger = logging.getLogger(__name__)

# Settings that the shapes of the weights determine; and those that do not change what a model computes.
SHAPED: dict[str, tuple[str, ...]] = {
    UNET: (
        *("in_channels", "out_channels", "block_out_channels", "layers_per_block", "down_block_types"),
        *("mid_block_type", "up_block_types", "transformer_layers_per_block", "reverse_transformer_layers_per_block"),
        *("cross_attention_dim", "projection_class_embeddings_input_dim", "time_embedding_dim"),
    ),
    VAE: (
        *("in_channels", "out_channels", "latent_channels", "block_out_channels", "layers_per_block"),
        *("down_block_types", "up_block_types", "mid_block_add_attention"),
    ),
}
WITHOUT_EFFECT = ("sample_size", "upcast_attention", "force_upcast", "use_linear_projection", "dropout")
# The settings of a text encoder that matter: those that the shapes determine, and others.
TEXT_SIZES = ("vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size", "num_hidden_layers")
TEXT_OTHERS = ("num_attention_heads", "hidden_act", "layer_norm_eps")
# Settings that may have one value for all blocks.
ONE_FOR_ALL = ("attention_head_dim", "cross_attention_dim", "layers_per_block", "transformer_layers_per_block")
# Folders of a Diffusers model without weights that change its images.
AROUND = ("scheduler", "tokenizer", "feature_extractor", "safety_checker")


class Kept(NamedTuple):
    """What a checkpoint's tensors do not tell about a model."""

    configurations: Mapping[str, Mapping[str, Any]]  # by part, only of parts of unusual sizes
    tokens: Mapping[str, Mapping[str, int]]  # by text encoder: token -> id, beyond CLIP's vocabulary

    def metadata(self) -> dict[str, str]:
        """Return it as metadata of a .safetensors file."""
        tables = {CONFIGURATIONS: self.configurations, ADDED_TOKENS: self.tokens}
        return {key: json.dumps(table, ensure_ascii=False) for key, table in tables.items() if table}


# --------------------------------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------------------------------


def plan_of_file(model: Checkpoint, *, v_prediction: bool) -> tuple[Plan, Plan]:
    """Return the plan of a checkpoint, and that of all tensors of the model.

    v_prediction: it predicts v. Raises UserError for a model that is incomplete or that a checkpoint cannot express.
    """
    whole = whole_plan(model)
    if not model.is_folder:
        return copy_plan(model), whole
    tell_left_out(model, whole)
    markers = marker_pieces(prediction_of(model)) if v_prediction and model.family.marks_v else {}
    return markers | plan_to_original(model, whole), whole


def marker_pieces(found: Prediction) -> Plan:
    """Return the empty tensors that tell of a file that its model predicts v, and whether with zero terminal SNR."""
    import torch

    names = (V_MARKER, ZERO_SNR_MARKER) if found.zero_snr else (V_MARKER,)
    return {name: Piece((), (0,), torch.zeros(0)) for name in names}


def kept_beside(model: Checkpoint, whole: Plan, infos: Infos, path: Path) -> Kept:
    """Return what the tensors of a checkpoint to be written at a path do not tell about its model, with a whole plan.

    Raises UserError if that changes what the model computes, and the path is that of a pickle, which cannot hold it.
    """
    result = planned_file(path, infos, {})
    lost = {part: lost_settings(model, result, part) for part in parts_of(model)}
    unusual = {part: kept_settings(config_of(model, part)) for part, own in lost.items() if own}
    kept = Kept(unusual, tokens_of(model, whole))
    if path.suffix.lower() == ".safetensors":
        return kept
    for part, own in lost.items():
        names = [key for key in own if key not in (*SHAPED.get(part, TEXT_SIZES), *WITHOUT_EFFECT)]
        if names:
            raise UserError(
                f"{model.path}: a {path.suffix} has no place for the {named(names)} of its {part}, which "
                "differ from the published models: convert it to .safetensors"
            )
    for part, tokens in kept.tokens.items():
        logger.warning(
            "a %s has no place for the tokens added to %s (%s): convert to .safetensors to keep them",
            path.suffix,
            part,
            ", ".join(tokens),
        )
    return Kept({}, {})


def planned_file(path: Path, infos: Infos, metadata: Mapping[str, str]) -> Checkpoint:
    """Return a checkpoint that is not written yet."""
    whole = PlannedPart(path, planned=infos, planned_metadata=metadata)
    return Checkpoint(path, families.detect_family(whole.shapes, str(path)), {WHOLE: whole})


def lost_settings(model: Checkpoint, result: Checkpoint, part: str) -> dict[str, Any]:
    """Return the settings of a part of a model that the tensors of the result do not tell as they are."""
    own = settings_of(part, config_of(model, part))
    try:
        found = settings_of(part, detected_config(result, part))
    except UserError:  # a structure that the names do not tell
        return own
    return {key: value for key, value in own.items() if found[key] != value}


def settings_of(part: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in a configuration or of the libraries' defaults, in a form to compare."""
    known = {**defaults_of(part), **config}
    names = defaults_of(part) if part in SHAPED else (*TEXT_SIZES, *TEXT_OTHERS)
    return {name: comparable(known[name], joins=name in ONE_FOR_ALL) for name in names}


def comparable(value: Any, *, joins: bool) -> Any:
    """Return lists as tuples, since JSON has no tuples; if joins, one value for several that are equal."""
    if not isinstance(value, list | tuple):
        return value
    values = tuple(comparable(each, joins=joins) for each in value)
    return values[0] if joins and values and all(each == values[0] for each in values) else values


def kept_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without what is about its files."""
    return {key: value for key, value in config.items() if not key.startswith(("_", "torch_dtype"))}


def tell_left_out(model: Checkpoint, whole: Plan) -> None:
    """Log what a checkpoint has no place for; raises UserError if it belongs to the U-Net or the VAE."""
    left = [name for name in unplaced(model, whole) if not name.endswith(POSITION_IDS)]
    inner = [name for name in left if split_name(name)[0] in SHAPED]
    if inner:
        raise UserError(f"{model.path} has {named(inner)}, without a place in a checkpoint")
    outer = [name for name in left if split_name(name)[0] != EXTRAS]
    if outer:
        logger.warning("%s left out, without a place in a checkpoint: %s", number_of(outer), named(sorted(outer)))
    folders = [path.name for path in sorted(model.path.iterdir()) if path.is_dir() and path.name not in model.parts]
    others = [name for name in folders if not name.startswith(AROUND)]
    if others:
        logger.warning("folders left out, without a place in a checkpoint: %s", ", ".join(others))


def number_of(names: Sequence[str]) -> str:
    """Return a number of tensors as the subject of a text."""
    return "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"


# --------------------------------------------------------------------------------------------------------------
# Folders
# --------------------------------------------------------------------------------------------------------------


def kept_in_folder(model: Checkpoint, whole: Plan) -> list[str]:
    """Return the tensors of a checkpoint that have no place in Diffusers and are kept; logs what is not."""
    left = unplaced(model, whole)
    unused = [name for name in left if name.startswith(TRAINING_ONLY)]
    kept = [name for name in left if not name.startswith(TRAINING_ONLY)]
    if unused:
        logger.info("%s left out, which only training used: %s", number_of(unused), named(sorted(unused)))
    if kept:
        logger.info(
            "%s kept, without a place in Diffusers, in %s: %s", number_of(kept), EXTRAS_FILE, named(sorted(kept))
        )
    return kept


def planned_folder(folder: Path, infos: Infos) -> Checkpoint:
    """Return a Diffusers folder whose weights are not written yet, only the files around them."""
    by_part: dict[str, dict[str, Any]] = {}
    for name, info in infos.items():
        part, own = split_name(name)
        by_part.setdefault(part, {})[own] = info
    parts = {part: PlannedPart(folder=folder / part, planned=own) for part, own in by_part.items()}
    return Checkpoint(folder, folder_family(folder), parts)


def tokens_of(model: Checkpoint, whole: Plan) -> dict[str, dict[str, int]]:
    """Return text encoder -> token -> id for the tokens of a model beyond CLIP's vocabulary; warns of unknown ones."""
    found = {}
    for text in model.family.text_models:
        rows = whole[tensor_name(text.folder, f"{TEXT_ROOT}embeddings.token_embedding.weight")].shape[0]
        if rows <= VOCABULARY_SIZE:
            continue
        folder = find_tokenizer(text, model.path, None)
        own = added_tokens(load_tokenizer(folder, text)) if folder else stored_tokens(model.metadata, text.folder)
        tokens = {token: number for token, number in own.items() if VOCABULARY_SIZE <= number < rows}
        unknown = rows - VOCABULARY_SIZE - len(tokens)
        if unknown:
            logger.warning(
                "%s has no words for %d of the %d tokens that its %s has beyond CLIP's vocabulary: "
                "they are kept as weights, and no prompt reaches them",
                model.path,
                unknown,
                rows - VOCABULARY_SIZE,
                text.folder,
            )
        if tokens:
            found[text.folder] = tokens
    return found
