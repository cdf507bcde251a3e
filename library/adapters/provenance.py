"""What a file made of others says of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from library.adapters.lora_file import LoraFile
from library.models.family import ModelFamily

RECIPE = "merge_recipe"  # JSON: which files went in, with their hashes and ratios


def merged_metadata(
    save_to: Path, operation: str, files: Sequence[tuple[LoraFile, Any]], *, base: str | None = None, **settings: Any
) -> dict[str, str]:
    """Return title, `modelspec.merged_from` (titles, as its specification has it), and the recipe.

    files are the LoRA files, each with its ratio; base is the title of the checkpoint, where there is one.
    """
    recipe = {
        "operation": operation,
        "base": base,
        "networks": [{"name": file.path.name, "sha256": file.sha256(), "ratio": ratio} for file, ratio in files],
        **settings,
    }
    titles = [title for title in (base, *(file.title for file, _ in files)) if title]
    return {
        "modelspec.title": save_to.stem,
        "modelspec.merged_from": ", ".join(titles),
        RECIPE: json.dumps({key: value for key, value in recipe.items() if value is not None}, ensure_ascii=False),
    }


def network_metadata(files: Sequence[LoraFile], ranks: set[int], alphas: set[float]) -> dict[str, str]:
    """Return the smallest set of keys that readers need, taken from the first of the files that has them."""
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": common(ranks),
        "ss_network_alpha": common(alphas),
    }
    for key in ("ss_v2", "ss_base_model_version"):
        told = next((file.metadata[key] for file in files if key in file.metadata), None)
        metadata |= {} if told is None else {key: told}
    return metadata


def architecture(family: ModelFamily | None, metadata: Mapping[str, str], *, is_network: bool) -> dict[str, str]:
    """Return `modelspec.architecture` where it is known: what the source says, else what the family tells."""
    key = "modelspec.architecture"
    if key in metadata or family is None:
        return {key: metadata[key]} if key in metadata else {}
    predicts_v = metadata.get("modelspec.prediction_type") == "v"
    name = family.architecture(predicts_v=predicts_v)
    return {key: f"{name}/lora" if is_network else name}


def common(values: set[Any]) -> str:
    """Return the only value as text, or `Dynamic`, as sd-scripts writes it."""
    return str(next(iter(values))) if len(values) == 1 else "Dynamic"
