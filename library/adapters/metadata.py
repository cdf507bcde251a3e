"""Metadata of files that are created from other files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.adapters.alphas import NOTE
from library.adapters.peft_config import METADATA_KEY
from library.models.family import ModelFamily
from library.weight_file import data_sha256

if TYPE_CHECKING:
    from library.adapters.lora_file import LoraFile
    from library.adapters.merging import Weighted

RECIPE = "merge_recipe"  # JSON: the source files with their hashes and ratios
HASHES = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")  # of the file that they are in


OF_TENSORS = (*HASHES, NOTE, METADATA_KEY)  # what is true of the tensors of one file only


def inherited(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata of a file without what is true of its tensors only, for a file created from it.

    The configuration of PEFT is such: who writes a file that needs one makes it anew.
    """
    return {key: text for key, text in metadata.items() if key not in OF_TENSORS}


def commented(metadata: Mapping[str, str], comment: str) -> dict[str, str]:
    """Return the inherited metadata with a training comment before the existing one."""
    former = metadata.get("ss_training_comment")
    whole = comment if former in (None, "", "None") else f"{comment}; {former}"
    return inherited(metadata) | {"ss_training_comment": whole}


def merged_metadata(
    save_to: Path, operation: str, files: Sequence[Weighted], *, base: str | None = None, settings: Mapping[str, Any]
) -> dict[str, str]:
    """Return title, `modelspec.merged_from` (titles, as in its specification), and the recipe.

    base is the title of the checkpoint, if there is one; settings are added to the recipe unless they are None.
    """
    recipe = {
        "operation": operation,
        "base": base,
        "networks": [
            {"name": each.file.path.name, "sha256": data_sha256(each.file.path), "ratio": each.ratio} for each in files
        ],
        **settings,
    }
    titles = [title for title in (base, *(each.file.title for each in files)) if title]
    return {
        "modelspec.title": save_to.stem,
        "modelspec.merged_from": ", ".join(titles),
        RECIPE: json.dumps({key: value for key, value in recipe.items() if value is not None}, ensure_ascii=False),
    }


def network_metadata(files: Sequence[LoraFile], ranks: set[int], alphas: set[float]) -> dict[str, str]:
    """Return the few keys that readers need, each from the first file that has it."""
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": common(ranks),
        "ss_network_alpha": common(alphas),
    }
    for key in ("ss_v2", "ss_base_model_version"):
        found = next((file.metadata[key] for file in files if key in file.metadata), None)
        metadata |= {} if found is None else {key: found}
    return metadata


def architecture(family: ModelFamily | None, metadata: Mapping[str, str], *, is_network: bool) -> dict[str, str]:
    """Return `modelspec.architecture` if it is known: that of the source, else that of the family."""
    key = "modelspec.architecture"
    if key in metadata or family is None:
        return {key: metadata[key]} if key in metadata else {}
    predicts_v = metadata.get("modelspec.prediction_type") == "v"
    name = family.architecture(predicts_v=predicts_v)
    return {key: f"{name}/lora" if is_network else name}


def common(values: set[Any]) -> str:
    """Return the only value as text, or `Dynamic`, as sd-scripts writes it."""
    return str(next(iter(values))) if len(values) == 1 else "Dynamic"
