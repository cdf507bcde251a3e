"""What programs do with each tensor of a network file: apply it, skip it, or refuse the file."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from library.adapters.alphas import misread
from library.adapters.names import ALPHA, DIALECTS, Shapes, family_of, kind_of, roles_of
from library.adapters.peft_config import METADATA_KEY, parsed
from library.adapters.programs import (
    DIFFUSERS_LIBRARY,
    DIFFUSERS_PATHS,
    DIFFUSERS_WORDS,
    DOWN_UP,
    PROGRAMS,
    Program,
    Row,
    Source,
    names_read,
)
from library.errors import UserError, named
from library.models.checkpoint import UNET
from library.models.family import SD1, SDXL, ModelFamily
from library.weight_file import EMBEDDING, at_first_dot

LORA, BUNDLED, OTHER = "LoRA", "bundled embedding", "other"
# Endings that belong to a module of any kind.
SHARED = (ALPHA, ".scale", ".weight", ".bias", ".rescale")
TWICE = f"it has alphas both in tensors and in its metadata ({METADATA_KEY})"
HIDDEN = "without the alphas in the metadata"
UNEVEN = "but with one alpha for all attention layers; networks/convert_lora.py mends the file"


@dataclasses.dataclass(frozen=True)
class Key:
    """A tensor of a file: kind of network, its module, and its ending, the rest of its name."""

    name: str
    kind: str
    module: str
    ending: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a program does with a file: the tensors it applies and skips, or why it refuses the file."""

    applied: int
    skipped: tuple[str, ...]
    refusal: str | None = None
    remark: str | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the program applies every tensor as it is meant."""
        return self.refusal is None and not self.skipped and self.remark is None

    def line(self) -> str:
        """Return the verdict in words."""
        if self.refusal is not None:
            return f"refuses the file: {self.refusal}"
        text = f"applies {self.applied} tensors"
        if self.skipped:
            text += f", skips {len(self.skipped)} ({named(self.skipped)})"
        return f"{text}; {self.remark}" if self.remark else text


# --------------------------------------------------------------------------------------------------------------
# The tensors
# --------------------------------------------------------------------------------------------------------------

ENDINGS = sorted(
    {ending for program in PROGRAMS for row in program.rows for ending in (*row.needs, *row.may)}, key=len, reverse=True
)


def parted(name: str) -> tuple[str, str]:
    """Return (module, ending) of a tensor: a word ends at the first dot, a path before an ending that programs know."""
    if name.startswith(("lora_", "lycoris_")):
        return at_first_dot(name)
    ending = next((ending for ending in ENDINGS if name.endswith(ending)), None)
    module, dot, rest = name.rpartition(".")
    return (module, dot + rest) if ending is None else (name.removesuffix(ending), ending)


def keys_of(shapes: Shapes) -> list[Key]:
    """Return the description of each tensor of a file."""
    parts, pairs = {name: parted(name) for name in shapes}, pairs_of(shapes)
    named = {name: kind_by_name(name, shape) for name, shape in shapes.items()}
    # The kind of each module: that of a pair of matrices, or else of the first tensor that tells it.
    kinds = {parts[name][0]: LORA for stem, _, name in roles_of(shapes) if stem in pairs}
    for name, kind in named.items():
        if kind not in (None, LORA):
            kinds.setdefault(parts[name][0], kind or OTHER)
    keys = []
    for name, (module, ending) in parts.items():
        kind = named[name] or (kinds.get(module, OTHER) if ending in SHARED else OTHER)
        if kind == LORA and kinds.get(module) != LORA:
            kind = OTHER  # a matrix without its partner
        keys.append(Key(name, kind, module, ending, tuple(shapes[name])))
    return keys


def kind_by_name(name: str, shape: Sequence[int]) -> str | None:
    """Return the kind of a tensor; None for one that belongs to a module of any kind, and for unknown names."""
    if name.startswith(EMBEDDING):
        return BUNDLED
    kind = kind_of(name)
    if kind is not None:
        return "BOFT" if kind == "OFT" and len(shape) == 4 else kind
    return LORA if any(role != "alpha" for _, role, _ in roles_of([name])) else None


def pairs_of(names: Iterable[str]) -> set[str]:
    """Return the modules that have both matrices of a LoRA."""
    roles: dict[str, set[str]] = {}
    for stem, role, _ in roles_of(names):
        roles.setdefault(stem, set()).add(role)
    return {stem for stem, found in roles.items() if {"down", "up"} <= found}


def detect(shapes: Shapes, metadata: Mapping[str, str]) -> ModelFamily | None:
    """Return the family that a network of any kind is for: by its modules, else by its metadata."""
    downs = {stem: tuple(shapes[name]) for stem, role, name in roles_of(shapes) if role == "down"}
    modules = downs or {name.split(".")[0]: tuple(shape) for name, shape in shapes.items()}
    modules = {name: shape for name, shape in modules.items() if len(shape) > 1}
    return family_of(modules, metadata)


def dialect(shapes: Shapes) -> str:
    """Return the programs whose naming a file follows."""
    return next((title for title, starts in DIALECTS if any(name.startswith(starts) for name in shapes)), "unknown")


def unknown_modules(keys: Sequence[Key], family: ModelFamily | None) -> list[str]:
    """Return the modules whose names no program reads."""
    tables = [*(program.names for program in PROGRAMS), DIFFUSERS_WORDS, DIFFUSERS_PATHS]
    known = [names_read(table, family or SD1) for table in tables]
    modules = {key.module for key in keys if key.kind != BUNDLED}
    return sorted(module for module in modules if not any(module in names for names in known))


# --------------------------------------------------------------------------------------------------------------
# The programs
# --------------------------------------------------------------------------------------------------------------


def verdicts(
    keys: Sequence[Key],
    family: ModelFamily | None,
    alphas: Mapping[str, float],
    metadata: Mapping[str, str],
) -> Iterator[tuple[str, Verdict]]:
    """Yield each program with its verdict on a file with such tensors.

    alphas are what the file means by module, from its tensors or a configuration of PEFT; without either, the ranks.
    """
    verdict = diffusers(keys, family)
    written = {key.module for key in keys if key.ending == ALPHA}
    if verdict.refusal is None and written and metadata.get(METADATA_KEY, "") not in ("", "null"):
        verdict = Verdict(0, (), TWICE)
    if verdict.refusal is None and misread(alphas, written):
        verdict = dataclasses.replace(verdict, remark=UNEVEN)
    yield "diffusers", verdict
    remark = HIDDEN if has_hidden_alphas(keys, alphas) else None
    for program in PROGRAMS:
        verdict = verdict_of(program, keys, family)
        yield program.title, dataclasses.replace(verdict, remark=remark if verdict.applied else None)


def reads_wholly(title: str, shapes: Shapes, metadata: Mapping[str, str]) -> bool:
    """Return whether a program of PROGRAMS applies every tensor of a file as it is meant."""
    program = next(program for program in PROGRAMS if program.title == title)
    verdict = verdict_of(program, keys_of(shapes), detect(shapes, metadata))
    return verdict.is_whole and not has_alphas_of_peft(metadata)


def has_alphas_of_peft(metadata: Mapping[str, str]) -> bool:
    """Return whether metadata have alphas that are not the ranks; damaged metadata tell none."""
    try:
        return METADATA_KEY in metadata and parsed(metadata[METADATA_KEY], METADATA_KEY).has_own_alphas
    except UserError:
        return False


def has_hidden_alphas(keys: Sequence[Key], alphas: Mapping[str, float]) -> bool:
    """Return whether a module has an alpha that is not its rank, and that no tensor tells."""
    shapes = {key.name: key.shape for key in keys}
    roles = list(roles_of(shapes))
    ranks = {module: shapes[name][0] for module, role, name in roles if role == "down" and shapes[name]}
    written = {module for module, role, _ in roles if role == "alpha"}
    return any(module not in written and alphas.get(module, rank) != rank for module, rank in ranks.items())


def audience(
    keys: Sequence[Key], family: ModelFamily | None, alphas: Mapping[str, float], metadata: Mapping[str, str]
) -> str:
    """Return in words who reads a file: wholly, in part, and not at all."""
    found = dict(verdicts(keys, family, alphas, metadata))
    parts = {}
    for title, each in found.items():
        share = f"{each.applied} of {len(keys)} tensors" if each.skipped else None
        parts[title] = f"{title} ({', '.join(filter(None, (share, each.remark)))})"
    groups = (
        ("read by", [title for title, each in found.items() if each.is_whole]),
        ("in part by", [parts[title] for title, each in found.items() if each.applied and not each.is_whole]),
        ("not by", [title for title, each in found.items() if not each.applied]),
    )
    return "; ".join(f"{words} {', '.join(names)}" for words, names in groups if names)


def versions() -> dict[str, str]:
    """Return program -> the versions that the statements on it are from."""
    sources: dict[str, tuple[Source, ...]] = {"diffusers": (DIFFUSERS_LIBRARY,)}
    sources |= {program.title: program.sources for program in PROGRAMS}
    return {title: ", ".join(dict.fromkeys(each.version for each in found)) for title, found in sources.items()}


def verdict_of(program: Program, keys: Sequence[Key], family: ModelFamily | None) -> Verdict:
    """Return what a program does with a file, by its tables."""
    known = names_read(program.names, family or SD1)
    if family is not None and (refusal := refused_names(program, keys, family)):
        return Verdict(0, (), refusal)
    modules: dict[str, dict[str, str]] = {}  # module -> ending -> name
    embeddings = [key.name for key in keys if key.kind == BUNDLED]
    for key in keys:
        if key.kind != BUNDLED:
            module, ending = at_first_dot(key.name) if program.by_first_dot else (key.module, key.ending)
            modules.setdefault(module, {})[ending] = key.name
    taken = {module: taken_of(program, set(parts)) for module, parts in modules.items()}
    for module, parts in modules.items():
        is_checked = program.unfit == "refuses any" or (program.unfit == "refuses known" and module in known)
        refused = next((row.needs[0] for row in program.rows if row.refuses and fits(row, set(parts))), None)
        if (is_checked and not taken[module]) or (refused is not None and module in known):
            return Verdict(0, (), f"it cannot read {parts[refused] if refused else min(parts.values())}")
    unmatched = sum(
        module not in known or not (ending in taken[module] or ending in program.matched_alone)
        for module, parts in modules.items()
        for ending in parts
    ) + len(embeddings) * (program.embeddings == "skips")
    if program.limit is not None and unmatched > program.limit:
        return Verdict(0, (), f"{unmatched} tensors do not match, more than {program.limit}")
    known -= incomplete(program, modules, family or SD1)
    skipped = [
        name
        for module, parts in modules.items()
        for ending, name in parts.items()
        if module not in known or ending not in taken[module]
    ]
    return applied(keys, skipped if program.embeddings == "reads" else [*skipped, *embeddings])


def taken_of(program: Program, endings: set[str]) -> set[str]:
    """Return the endings that a program takes of a module with such endings; none if it reads no such module."""
    rows = [row for row in program.rows if set(row.when or row.needs) <= endings]
    chosen = rows if program.takes == "all rows" else rows[:1]
    return {ending for row in chosen if fits(row, endings) for ending in (*row.needs, *row.may) if ending in endings}


def fits(row: Row, endings: set[str]) -> bool:
    """Return whether a module has all that a row needs."""
    return set(row.needs) <= endings


def incomplete(program: Program, modules: Iterable[str], family: ModelFamily) -> set[str]:
    """Return the modules that a program does not apply because others that it applies with them are not in the file."""
    given, found = set(modules), set()
    for names in program.names:
        if names.together and family in names.families:
            for module in given & names_read((names,), family):
                end = next((end for end in names.together if module.endswith(end)), None)
                if end is not None and not given >= {module.removesuffix(end) + other for other in names.together}:
                    found.add(module)
    return found


def refused_names(program: Program, keys: Sequence[Key], family: ModelFamily) -> str | None:
    """Return why a program refuses a file for the beginnings of its names, or for a mixture of them."""
    starts = program.prefixes.get(family)
    named = [key.name for key in keys if key.kind != BUNDLED]
    if starts is not None:
        strange = next((name for name in named if not name.startswith(starts)), None)
        if strange is not None:
            return f"it does not know the beginning of {strange}"
    if not program.mixes_blocks and family is SDXL and len(set(filter(None, map(blocks_of, named)))) > 1:
        return "it does not take the U-Net's names of diffusers and of the checkpoint in one file"
    return None


def blocks_of(name: str) -> str | None:
    """Return whose blocks the name of a module of the U-Net in one word has; None for all other names."""
    if re.match(r"lora_unet_(in|out)put_blocks_|lora_unet_middle_block_", name):
        return "checkpoint"
    return "diffusers" if re.match(r"lora_unet_(down|up|mid)_block", name) else None


def applied(keys: Sequence[Key], skipped: Sequence[str], remark: str | None = None) -> Verdict:
    """Return the verdict that applies all tensors but the skipped ones."""
    unique = tuple(dict.fromkeys(skipped))
    return Verdict(len(keys) - len(unique), unique, remark=remark)


# --------------------------------------------------------------------------------------------------------------
# diffusers: `load_lora_weights`
# --------------------------------------------------------------------------------------------------------------

WORD = re.compile(r"lora_(te|te1|te2|unet)_")
# Of files with paths it reads the names that begin so, with these endings.
PATH_PARTS = ("unet.", "text_encoder.", "text_encoder_2.")
UNET_ENDINGS = re.compile(
    r"(\.lora_[AB]\.(weight|bias)|\.lora\.(down|up)\.weight|_lora\.(down|up)\.weight|\.lora_magnitude_vector)$"
)
TEXT_ENDINGS = re.compile(r"(\.lora_[AB]\.weight|\.lora_linear_layer\.(down|up)\.weight)$")


def diffusers(keys: Sequence[Key], family: ModelFamily | None) -> Verdict:
    """Return what `load_lora_weights` does: it drops LyCORIS' DoRA, and then reads words or paths, never both."""
    left = [key for key in keys if "dora_scale" not in key.name]
    remark = "it drops DoRA's magnitudes" if len(left) < len(keys) else None
    if all(WORD.match(key.name) for key in left):
        refusal, read = words_in_diffusers(left, family)
    else:
        refusal, read = paths_in_diffusers(left, family)
    refusal = refusal or refused_projection(left, family) or refused_parts(left, read)
    if refusal is not None:
        return Verdict(0, (), refusal)
    if family is SDXL and len(set(filter(None, (blocks_of(key.name) for key in left)))) > 1:
        read = {name for name in read if blocks_of(name) != "checkpoint"}
        remark = "it drops the U-Net's checkpoint names where both kinds of names are in a file"
    return applied(keys, [key.name for key in keys if key.name not in read], remark)


def words_in_diffusers(keys: Sequence[Key], family: ModelFamily | None) -> tuple[str | None, set[str]]:
    """Return (why diffusers refuses a file with words as names, the tensors that it reads)."""
    endings: dict[str, set[str]] = {}
    for key in keys:
        endings.setdefault(key.module, set()).add(key.ending)
    for key in keys:
        if key.ending not in (*DOWN_UP, ALPHA) or not set(DOWN_UP) <= endings[key.module]:
            return f"{key.name} is {kind_words(key.kind)}", set()
        if key.ending == ALPHA and math.prod(key.shape) != 1:
            return f"{key.name} is not one number", set()
    text = [module for module in endings if module.startswith(("lora_te_", "lora_te1_"))]
    if text and not any(re.search(r"_out_proj$|_mlp_fc\d$", module) for module in text):
        return "its text encoder has neither out_proj nor mlp layers, by which diffusers knows the format", set()
    known = names_read(DIFFUSERS_WORDS, family or SD1)
    return None, {key.name for key in keys if key.module in known}


def paths_in_diffusers(keys: Sequence[Key], family: ModelFamily | None) -> tuple[str | None, set[str]]:
    """Return (why diffusers refuses a file in which some names are paths, the tensors that it reads)."""
    strange = next((key for key in keys if "lora" not in key.name), None)
    if strange is not None:
        return f"{strange.name} has no lora in its name", set()
    for part in PATH_PARTS:
        names = [key.name for key in keys if key.name.startswith(part)]
        endings = UNET_ENDINGS if part == "unet." else TEXT_ENDINGS
        unread = next((name for name in names if not endings.search(name) and ".lora_A.default" not in name), None)
        if unread is not None and ".lora_B.default" not in unread:
            return f"it cannot read {unread}", set()
        if part != "unet." and names and not any(".self_attn." in name or "linear_layer" in name for name in names):
            return f"its {part[:-1]} has no attention layers, by which diffusers knows the format", set()
    known = names_read(DIFFUSERS_PATHS, family or SD1)
    found = {}
    for key in keys:
        ending = UNET_ENDINGS.search(key.name) or TEXT_ENDINGS.search(key.name)
        found[key.name] = key.name[: ending.start()] if ending else ""
    return None, {name for name, module in found.items() if module in known}


def refused_parts(keys: Sequence[Key], read: set[str]) -> str | None:
    """Return why diffusers refuses a file: a part of which it knows no module."""
    for start in (("lora_unet_", "unet."), ("lora_te_", "lora_te1_", "text_encoder.")):
        names = [key.name for key in keys if key.name.startswith(start)]
        if names and not any(name in read for name in names) and not any(".default." in name for name in names):
            is_word = WORD.match(names[0])
            if not is_word or all(WORD.match(key.name) for key in keys):  # words beside paths are ignored
                return f"it knows no module of the kind {names[0]}"
    return None


def refused_projection(keys: Sequence[Key], family: ModelFamily | None) -> str | None:
    """Return why diffusers refuses a file: a projection with another number of dimensions."""
    if family is None:
        return None
    dimensions, layer = (4, "a 1x1 convolution") if family is SD1 else (2, "a linear layer")
    other = next((key for key in keys if is_projection(key) and len(key.shape) != dimensions), None)
    return None if other is None else f"{other.name} is {len(other.shape)}-D, {family.title} has {layer} there"


def is_projection(key: Key) -> bool:
    """Return whether a tensor is a matrix for the input or output projection of a transformer of the U-Net."""
    named = re.search(r"(?<!ff_net_0_)proj_(in|out)$", key.module) and UNET in key.module
    return bool(named) and key.ending != ALPHA and len(key.shape) > 1


def kind_words(kind: str) -> str:
    """Return a kind of tensor in words."""
    return "no part of a LoRA" if kind in (OTHER, LORA) else f"a part of a {kind} network"
