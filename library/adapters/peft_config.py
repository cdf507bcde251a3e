"""Configurations of PEFT: the alphas of files that have none, and what other than a plain LoRA a file is.

PEFT writes `adapter_config.json` beside `adapter_model.safetensors`; diffusers writes the same into the metadata of its
files, with the part of the model before each key, or without if only one part was saved.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.adapters.names import PEFT_ROOT
from library.errors import UserError

METADATA_KEY = "lora_adapter_metadata"
CONFIG_FILE = "adapter_config.json"
# Settings with which matrices mean something else than alpha / rank * up @ down, or with which layers are shared.
OTHER_NETWORKS = (
    *("use_dora", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config"),
    *("alora_invocation_tokens", "layer_replication"),
)
# Beginnings of `init_lora_weights` with which PEFT also changes the weights of the base model.
CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga")


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """Settings of PEFT by key, which may begin with the part of the model: `unet.lora_alpha`."""

    source: str  # where they are, for messages
    settings: Mapping[str, Any]

    def alpha_of(self, module: str, rank: int) -> float | None:
        """Return the alpha by which programs divide by the rank, for a module by its name in the file; None: not told.

        Patterns match the ends of paths, as in PEFT. Raises UserError for an alpha that is no number.
        """
        name = module.removeprefix(PEFT_ROOT)
        part, _, path = name.partition(".")
        prefix = f"{part}." if f"{part}.lora_alpha" in self.settings else ""
        path = path.removeprefix(PEFT_ROOT) if prefix else name
        alpha = self.settings.get(f"{prefix}lora_alpha")
        patterns = self.settings.get(f"{prefix}alpha_pattern") or {}
        try:
            own = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path))
            alpha = next(own, alpha)
            if alpha is None:
                return None
            # Rank-stabilised LoRA: PEFT divides alpha by the root of the rank, other programs by the rank.
            return float(alpha) * (rank**0.5 if self.settings.get(f"{prefix}use_rslora") else 1.0)
        except (AttributeError, TypeError, ValueError, re.error) as error:
            raise UserError(f"{self.source}: the alphas cannot be read: {error}") from None

    @property
    def has_own_alphas(self) -> bool:
        """Whether some alpha is not the rank: then a program that does not read the settings applies another change."""
        starts = [key.removesuffix("lora_alpha") for key in self.settings if key.rpartition(".")[2] == "lora_alpha"]
        return any(
            self.settings[f"{start}lora_alpha"] != self.settings.get(f"{start}r")
            or (self.settings.get(f"{start}alpha_pattern") or {}) != (self.settings.get(f"{start}rank_pattern") or {})
            for start in starts
        )

    def check(self) -> None:
        """Raise UserError for the settings of another network than a LoRA, and of one for a changed base model."""
        for key, value in self.settings.items():
            setting = key.rpartition(".")[2]
            if setting == "peft_type" and value not in (None, "LORA"):
                raise UserError(f"{self.source}: {key} is {value}; only LoRA files are taken here")
            if setting in OTHER_NETWORKS and value:
                raise UserError(f"{self.source}: {key} is set; only LoRA files without it are taken here")
            if setting == "init_lora_weights" and str(value).lower().startswith(CHANGES_BASE):
                raise UserError(
                    f"{self.source}: {key} is {value}, which changes the base model, too; PEFT makes a LoRA of it when "
                    "it saves with path_initial_model_for_weight_conversion"
                )


def read_config(path: Path, metadata: Mapping[str, str], *, is_peft: bool) -> PeftConfig | None:
    """Return the checked configuration of a file with these metadata; None if it has none.

    is_peft tells that PEFT named the modules: then the configuration may be in the folder of the file.
    """
    if METADATA_KEY in metadata:
        config = parsed(metadata[METADATA_KEY], f"{path}: {METADATA_KEY} in its metadata")
    elif is_peft and (path.parent / CONFIG_FILE).is_file():
        beside = path.parent / CONFIG_FILE
        config = parsed(beside.read_text(encoding="utf-8", errors="replace"), str(beside))
    else:
        return None
    config.check()
    return config


def parsed(text: str, source: str) -> PeftConfig:
    """Return the settings of a JSON object; raises UserError for another text."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{source} is no JSON object: copy or download it again")
    return PeftConfig(source, found)
