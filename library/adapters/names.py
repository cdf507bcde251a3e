"""Names of tensors in network files: roles, the kind of network, the part of a model, the family of models."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from library.models.checkpoint import UNET
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
# More of a change in files of LyCORIS: the core of a Tucker decomposition, and a factor of the whole change.
ALL_ROLES = ROLES | {".lora_mid": "mid", ".scalar": "scalar"}
# PEFT has the name of the adapter behind the matrix in the state dict of a model.
ADAPTER = re.compile(r"(\.lora_[AB])\.[^.]+\.weight$")
# Pattern of a tensor's name, kind of network, and its name in the message that only LoRA files are read.
KINDS = (
    (r"\.hada_", "LoHa", "a LoHa"),
    (r"\.lokr_", "LoKr", "a LoKr"),
    (r"\.dora_scale", "DoRA", "a DoRA"),
    (r"lora_magnitude_vector", "DoRA", "a DoRA"),
    (r"\.oft_", "OFT", "an OFT"),
    (r"\.boft_", "BOFT", "a BOFT"),
    (r"\.on_input", "IA3", "an IA3"),
    (r"\.lora_E$", "AdaLoRA", "an AdaLoRA"),
    (r"\.lora_mid\.", "Tucker", None),
    (r"\.diff$", "difference", "a file with full differences"),
    (r"\.diff_b$", "difference", None),
    (r"\.w_norm$", "norm", None),
    (r"\.b_norm$", "norm", None),
    (r"\.[ab][12]\.weight$", "GLoRA", "a GLoRA"),
    (r"\.set_weight$", "difference", None),
)
# Ending of a tensor that is added to a vector of a layer -> that vector.
VECTORS: dict[str, Literal["weight", "bias"]] = {
    ".w_norm": "weight",
    ".b_norm": "bias",
    ".diff": "weight",  # of ComfyUI, for normalisations; where it is a matrix it is the change of another layer
    ".diff_b": "bias",
}


def kind_of(name: str) -> str | None:
    """Return the kind of network of a tensor by its name; None for a LoRA and for unknown names."""
    return next((kind for pattern, kind, _ in KINDS if re.search(pattern, name)), None)


def refused_kind(name: str, shape: Sequence[int]) -> str | None:
    """Return in words the kind of network of a tensor that is no LoRA; None for all other tensors."""
    if len(shape) == 1 and name.endswith(tuple(VECTORS)):
        return None
    return next((title for pattern, _, title in KINDS if title is not None and re.search(pattern, name)), None)


def roles_of(names: Iterable[str], roles: Mapping[str, str] = ROLES) -> Iterator[tuple[str, str, str]]:
    """Yield (module, role, name) for the names of tensors that are part of a change: down, up, alpha."""
    endings = sorted(roles, key=len, reverse=True)
    for name in names:
        body = ADAPTER.sub(r"\1", name).removesuffix(".weight")
        ending = next((ending for ending in endings if body.endswith(ending)), None)
        if ending is not None:
            stem = body.removesuffix(ending)
            # Old diffusers has attention processors: attn1.processor.to_out_lora.up is of attn1.to_out.0.
            is_processor = ending.startswith("_lora")
            stem = re.sub(r"\.processor\.to_out$", ".to_out.0", stem).replace(".processor.", ".")
            yield (re.sub(r"\.to_out$", ".to_out.0", stem) if is_processor else stem), roles[ending], name


# --------------------------------------------------------------------------------------------------------------
# The part of a model
# --------------------------------------------------------------------------------------------------------------

TEXT, TEXT_2 = "text_encoder", "text_encoder_2"
ANY_TEXT = "text"  # a text encoder, and the name does not tell which
PEFT_ROOT = "base_model.model."  # in names of a model that PEFT wrapped, before or after the name of the part
Families = tuple[ModelFamily, ...]
SD: Families = (SD1, SD2)
# Beginning of a module's name, the part that it is in (None: its path tells), and the families with such names.
PREFIXES: tuple[tuple[str, str | None, Families], ...] = (
    # sd-scripts, this suite, LyCORIS; LyCORIS in SimpleTuner
    ("lora_unet_", UNET, FAMILIES),
    ("lora_te_", TEXT, SD),
    ("lora_te1_", TEXT, FAMILIES),  # of SDXL; diffusers writes it for every model
    ("lora_te2_", TEXT_2, (SDXL,)),
    ("lycoris_", None, FAMILIES),
    # diffusers
    ("unet.", UNET, FAMILIES),
    ("text_encoder.", TEXT, FAMILIES),
    ("text_encoder_2.", TEXT_2, (SDXL,)),
    # ComfyUI
    ("diffusion_model.", UNET, FAMILIES),
    ("model.diffusion_model.", UNET, FAMILIES),
    ("text_encoders.clip_l.transformer.", TEXT, (SD1, SDXL)),
    ("text_encoders.clip_h.transformer.", TEXT, (SD2,)),
    ("text_encoders.clip_g.transformer.", TEXT_2, (SDXL,)),
    # PEFT, and parts of diffusers that were saved alone
    ("", None, FAMILIES),
)
BEGINNINGS = (PEFT_ROOT, *(prefix for prefix, _, _ in PREFIXES if prefix))
# Program -> beginnings of names by its rules; in the names of diffusers, PEFT's beginning may follow that of the part.
DIALECTS = (
    ("sd-scripts", ("lora_",)),
    ("LyCORIS", ("lycoris_",)),
    ("ComfyUI", ("diffusion_model.", "model.diffusion_model.", "text_encoders.")),
    ("diffusers", ("unet.", "text_encoder.", "text_encoder_2.")),
    ("PEFT", (PEFT_ROOT,)),
)
TEXT_PATH = re.compile(r"(text_model_)?encoder_layers_\d")


class Spelled(NamedTuple):
    """What the name of a module says: part, path with underscores, the families with such a beginning of names."""

    part: str
    word: str
    families: Families


def spelled(module: str) -> Spelled:
    """Return what the name of a module in a file says."""
    name = module.removeprefix(PEFT_ROOT)
    prefix, part, families = next(row for row in PREFIXES if name.startswith(row[0]))
    word = name.removeprefix(prefix).removeprefix(PEFT_ROOT).replace(".", "_")
    return Spelled(part or (ANY_TEXT if TEXT_PATH.match(word) else UNET), word, families)


# --------------------------------------------------------------------------------------------------------------
# The family of models
# --------------------------------------------------------------------------------------------------------------

BASE_VERSIONS = {"sd_v1": SD1, "sd_v2": SD2, "sdxl_": SDXL}
ARCHITECTURES = {"stable-diffusion-v1": SD1, "stable-diffusion-v2": SD2, "stable-diffusion-xl": SDXL}
# Pattern of a path in the U-Net, by the blocks of diffusers or of checkpoints -> the families with such a layer.
UNET_PATHS: tuple[tuple[str, Families], ...] = (
    (r".*transformer_blocks_[1-9]", (SDXL,)),
    (r"add_embedding|label_emb", (SDXL,)),
    (r"up_blocks_0_attentions|output_blocks_([01]_1|2_2)_", (SDXL,)),
    (r"(down|up)_blocks_3_|(input|output)_blocks_(9|1\d)_", SD),
    (r"down_blocks_0_attentions|up_blocks_2_attentions|input_blocks_[12]_1_|output_blocks_[678]_1_", SD),
)
BY_BLOCKS = re.compile(r"(input_blocks|middle_block|output_blocks)_|time_embed_\d|label_emb_|out_\d")
MANY_LAYERS = re.compile(r"(text_model_)?encoder_layers_(1[2-9]|2\d)_")  # more than CLIP ViT-L has
TEXT_INPUT = re.compile(r".*(_[qkv]_proj|fc1)$")  # layers of a text encoder whose inputs are its states
# Width of a text encoder -> the families that have one of it.
TEXT_WIDTHS: dict[int, Families] = {
    width: tuple(family for family in FAMILIES if width in family.text_widths.values())
    for width in sorted({width for family in FAMILIES for width in family.text_widths.values()})
}

Modules = Sequence[tuple[Spelled, Sequence[int]]]  # with the shapes of their down matrices


def family_of(modules: Shapes, metadata: Mapping[str, str] | None = None) -> ModelFamily | None:
    """Return the family that modules (name in the file -> shape of down matrix) are for; None if several fit.

    Each piece of evidence leaves some families; one that contradicts those before it is ignored. SDXL is what files
    with the names of checkpoints' blocks are usually for, so these names decide where nothing else does.
    """
    named = [(spelled(module), shape) for module, shape in modules.items()]
    by_version = family_by_version(metadata or {})
    evidence: tuple[Iterable[ModelFamily], ...] = (
        by_context(named),
        by_prefix(named),
        by_path(named),
        FAMILIES if by_version is None else (by_version,),
        by_text_width(named),
        by_blocks(named),
    )
    left = set(FAMILIES)
    for families in evidence:
        left = left & set(families) or left
    return left.pop() if len(left) == 1 else None


def by_context(modules: Modules) -> Families:
    """Return the families with this input width of cross-attention."""
    widths = {shape[1] for module, shape in modules if re.search(r"attn2_to_[kv]$", module.word) and len(shape) > 1}
    return tuple(family for family in FAMILIES if family.context_width in widths) or FAMILIES


def by_prefix(modules: Modules) -> Families:
    """Return the families whose modules have names with these beginnings."""
    return tuple(family for family in FAMILIES if all(family in module.families for module, _ in modules))


def by_path(modules: Modules) -> Families:
    """Return the families that have layers with these paths."""
    unet = [module.word for module, _ in modules if module.part == UNET]
    told = [families for word in unet for pattern, families in UNET_PATHS if re.match(pattern, word)]
    told += [(SD2,) for module, _ in modules if module.part == TEXT and MANY_LAYERS.match(module.word)]
    return tuple(family for family in FAMILIES if all(family in families for families in told))


def family_by_version(metadata: Mapping[str, str]) -> ModelFamily | None:
    """Return the family of the base model in the metadata, None if they do not have it."""
    for key, table in (("ss_base_model_version", BASE_VERSIONS), ("modelspec.architecture", ARCHITECTURES)):
        for start, family in table.items():
            if metadata.get(key, "").startswith(start):
                return family
    return SD2 if metadata.get("ss_v2") == "True" else None


def by_text_width(modules: Modules) -> Families:
    """Return the families with a text encoder of this width."""
    text = [(module.word, shape) for module, shape in modules if module.part in (TEXT, ANY_TEXT) and len(shape) > 1]
    widths = [shape[1] for word, shape in text if TEXT_INPUT.match(word)]
    return next((TEXT_WIDTHS[width] for width in widths if width in TEXT_WIDTHS), FAMILIES)


def by_blocks(modules: Modules) -> Families:
    """Return SDXL if the U-Net has the names of a checkpoint's blocks."""
    has_blocks = any(module.part == UNET and BY_BLOCKS.match(module.word) for module, _ in modules)
    return (SDXL,) if has_blocks else FAMILIES
