"""Names of tensors in network files: their roles, the kind of network, and the family of models."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from library.models.family import FAMILIES, SD1, SD2, SDXL, ModelFamily

Shapes = Mapping[str, Sequence[int]]

DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
# Ending of a tensor's name without `.weight` -> role.
ROLES = {
    ".lora_down": "down",
    ".lora_up": "up",
    ".alpha": "alpha",
    ".lora_A": "down",
    ".lora_B": "up",
    ".lora_A.default": "down",
    ".lora_B.default": "up",
    ".lora.down": "down",
    ".lora.up": "up",
    ".lora_linear_layer.down": "down",
    ".lora_linear_layer.up": "up",
    "_lora.down": "down",
    "_lora.up": "up",
}
# Part of a tensor's name, kind of network, and its name in the message that only LoRA files are read.
KINDS = (
    (".hada_", "LoHa", "a LoHa"),
    (".lokr_", "LoKr", "a LoKr"),
    (".dora_scale", "DoRA", "a DoRA"),
    ("lora_magnitude_vector", "DoRA", "a DoRA"),
    (".oft_", "OFT", "an OFT"),
    (".boft_", "BOFT", "a BOFT"),
    (".on_input", "IA3", "an IA3"),
    (".lora_mid.", "Tucker", "a LoCon with Tucker decomposition"),
    (".diff", "difference", "a file with full differences"),
    (".w_norm", "norm", None),
    (".b_norm", "norm", None),
)
BASE_VERSIONS = {"sd_v1": SD1, "sd_v2": SD2, "sdxl_": SDXL}


def kind_of(name: str) -> str | None:
    """Return the kind of network of a tensor by its name; None for a LoRA and for unknown names."""
    return next((kind for part, kind, _ in KINDS if part in name), None)


def roles_of(names: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Yield (module, role, name) for the names of tensors that are part of a change; role is down, up or alpha."""
    for name in names:
        body = name.removesuffix(".weight")
        ending = next((ending for ending in sorted(ROLES, key=len, reverse=True) if body.endswith(ending)), None)
        if ending is not None:
            stem = body.removesuffix(ending)
            # Old diffusers has attention processors: attn1.processor.to_out_lora.up is of attn1.to_out.0.
            is_processor = ending.startswith("_lora")
            stem = re.sub(r"\.processor\.to_out$", ".to_out.0", stem).replace(".processor.", ".")
            yield (re.sub(r"\.to_out$", ".to_out.0", stem) if is_processor else stem), ROLES[ending], name


def family_of(modules: Shapes) -> ModelFamily | None:
    """Return the family of models that modules (name -> shape of down matrix) are for; None if several fit.

    Evidence, in this order: the input width of cross-attention, names, the width of the text encoder.
    """
    by_context = {family.context_width: family for family in FAMILIES}
    for name, shape in modules.items():
        if re.search(r"attn2[._]to_k$", name) and len(shape) > 1 and shape[1] in by_context:
            return by_context[shape[1]]
    if any(re.match(r"lora_te[12]_|text_encoder_2\.|lora_unet_(input|middle|output)_block", name) for name in modules):
        return SDXL
    if any(re.search(r"transformer_blocks[._][1-9][._]", name) for name in modules):
        return SDXL
    for name, shape in modules.items():
        if re.match(r"lora_te_|text_encoder\.", name) and re.search(r"(_proj|fc1)$", name):
            return {768: SD1, 1024: SD2}.get(shape[1])
    return None


def family_by_version(metadata: Mapping[str, str]) -> ModelFamily | None:
    """Return the family of the base model in the metadata, None if they do not have it."""
    version = metadata.get("ss_base_model_version", "")
    return next((family for start, family in BASE_VERSIONS.items() if version.startswith(start)), None)
