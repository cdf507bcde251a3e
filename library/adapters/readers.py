"""What programs do with each tensor of a network file: diffusers, the web UI of AUTOMATIC1111, Forge, ComfyUI."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from library.adapters.layers import UNET, layers_by_name
from library.adapters.names import Shapes, family_by_version, family_of, kind_of, roles_of
from library.models.family import SD1, SDXL, ModelFamily

LORA, OTHER = "LoRA", "other"
FORGE_LIMIT = 12  # unmatched tensors up to which Forge accepts a file
# Program that logs and skips tensors that it does not know -> kinds that it does not know.
UNKNOWN_KINDS = {
    "AUTOMATIC1111": (OTHER, "BOFT", "Tucker"),
    "Forge": (OTHER, "BOFT", "IA3"),
    "ComfyUI": (OTHER, "BOFT", "IA3"),
}
UNEVEN = (
    "but with one alpha for all attention layers; networks/convert_lora.py --to diffusers puts alphas into the matrices"
)


@dataclasses.dataclass(frozen=True)
class Key:
    """A tensor of a file: kind of network, its module, and whether models have such a module."""

    name: str
    kind: str
    module: str
    is_known: bool
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a program does with a file: the tensors it applies and skips, or why it refuses the file."""

    applied: int
    skipped: tuple[str, ...]
    refusal: str | None = None
    remark: str | None = None

    def line(self) -> str:
        """Return the verdict in words."""
        if self.refusal is not None:
            return f"refuses the file: {self.refusal}"
        text = f"applies {self.applied} tensors"
        if self.skipped:
            more = ", ..." if len(self.skipped) > 2 else ""
            text += f", skips {len(self.skipped)} ({', '.join(self.skipped[:2])}{more})"
        return f"{text}; {self.remark}" if self.remark else text


def keys_of(shapes: Shapes, family: ModelFamily | None) -> list[Key]:
    """Return the description of each tensor of a file."""
    stems = {name: stem for stem, _, name in roles_of(shapes)}
    paired = pairs_of(shapes)
    known = layers_by_name(family or SD1)
    keys = []
    for name, shape in shapes.items():
        kind = kind_of(name)
        module = stems.get(name, name.split(".")[0])
        if kind is None:
            kind = LORA if name in stems and module in paired else alpha_kind(name, module, shapes)
        keys.append(Key(name, kind, module, module in known, tuple(shape)))
    return keys


def pairs_of(names: Iterable[str]) -> set[str]:
    """Return the modules that have both matrices of a LoRA."""
    roles: dict[str, set[str]] = {}
    for stem, role, _ in roles_of(names):
        roles.setdefault(stem, set()).add(role)
    return {stem for stem, found in roles.items() if {"down", "up"} <= found}


def alpha_kind(name: str, module: str, shapes: Shapes) -> str:
    """Return the kind of network of an alpha, by the other tensors of its module."""
    if name.endswith(".alpha"):
        start = f"{module}."
        others = [other[len(module) :] for other in shapes if other.startswith(start) and other != name]
        return next((kind for other in others if (kind := kind_of(other)) is not None), OTHER)
    return OTHER


def detect(shapes: Shapes, metadata: Mapping[str, str]) -> ModelFamily | None:
    """Return the family that a network of any kind is for: by its modules, else by its metadata."""
    downs = {stem: tuple(shapes[name]) for stem, role, name in roles_of(shapes) if role == "down"}
    modules = downs or {name.split(".")[0]: tuple(shape) for name, shape in shapes.items()}
    return family_of(modules) or family_by_version(metadata)


def dialect(shapes: Shapes) -> str:
    """Return the programs whose naming a file follows."""
    starts = {name.split(".")[0].split("_")[0] for name in shapes}
    if "lora" in starts:
        return "sd-scripts"
    return "diffusers or PEFT" if starts & {"unet", "text"} else "unknown"


# --------------------------------------------------------------------------------------------------------------
# The programs
# --------------------------------------------------------------------------------------------------------------


def diffusers(keys: Sequence[Key], family: ModelFamily | None) -> Verdict:
    """Return what `load_lora_weights` does: it refuses a file with a single unknown tensor."""
    refusal = refusal_of_diffusers(keys, family)
    if refusal is not None:
        return Verdict(0, (), refusal)
    skipped = [key.name for key in keys if not key.is_known or key.kind == "DoRA"]
    original = [key for key in keys if re.match(r"lora_unet_(in|out)put_blocks_|lora_unet_middle_block_", key.name)]
    others = [key for key in keys if re.match(r"lora_unet_(down|up|mid)_block", key.name)]
    if family is SDXL and original and others:
        skipped += [key.name for key in original]
        return applied(keys, skipped, "it drops the U-Net's checkpoint names where both kinds of names are in a file")
    return applied(keys, skipped, "it drops DoRA's magnitudes" if any(key.kind == "DoRA" for key in keys) else None)


def refusal_of_diffusers(keys: Sequence[Key], family: ModelFamily | None) -> str | None:
    """Return why diffusers refuses a file, by its first tensor of another kind, name or number of dimensions."""
    for key in keys:
        if key.kind not in (LORA, "DoRA"):
            return f"{key.name} is {kind_words(key.kind)}"
        if "lora" not in key.name and not key.name.endswith(".alpha"):
            return f"{key.name} has no lora in its name"
    if family is None:
        return None
    dimensions, layer = (4, "a 1x1 convolution") if family is SD1 else (2, "a linear layer")
    other = next((key for key in keys if is_projection(key) and len(key.shape) != dimensions), None)
    return None if other is None else f"{other.name} is {len(other.shape)}-D, {family.title} has {layer} there"


def is_projection(key: Key) -> bool:
    """Return whether a tensor is a matrix for the input or output projection of a transformer of the U-Net."""
    return bool(re.search(r"(?<!ff_net_0_)proj_(in|out)$", key.module)) and UNET in key.module and len(key.shape) > 1


def kind_words(kind: str) -> str:
    """Return a kind of tensor in words."""
    return "no part of a LoRA" if kind == OTHER else f"a part of a {kind} network"


def applied(keys: Sequence[Key], skipped: Sequence[str], remark: str | None = None) -> Verdict:
    """Return the verdict that applies all tensors but the skipped ones."""
    unique = tuple(dict.fromkeys(skipped))
    return Verdict(len(keys) - len(unique), unique, remark=remark)


def verdicts(
    keys: Sequence[Key], family: ModelFamily | None, alphas: Mapping[str, float]
) -> Iterator[tuple[str, Verdict]]:
    """Yield each program with its verdict on a file with such tensors, and alphas by module."""
    verdict = diffusers(keys, family)
    if verdict.refusal is None and is_uneven(alphas):
        verdict = dataclasses.replace(verdict, remark=UNEVEN)
    yield "diffusers", verdict
    for program, kinds in UNKNOWN_KINDS.items():
        skipped = [key.name for key in keys if not key.is_known or key.kind in kinds]
        if program == "Forge" and len(skipped) > FORGE_LIMIT:
            yield program, Verdict(0, (), f"{len(skipped)} tensors do not match, more than {FORGE_LIMIT}")
        else:
            yield program, applied(keys, skipped)


def is_uneven(alphas: Mapping[str, float]) -> bool:
    """Return whether attention layers of a file with the names of sd-scripts have several alphas."""
    return len({alpha for name, alpha in alphas.items() if re.match(r"lora_.*(attn[12]|self_attn)_", name)}) > 1
