"""What other programs read of a network file: which names of modules, and which tensors of a module.

Rows of tables, each with the version of the program and the file of its source that it was read from; `readers.py` has
the rules that interpret them. Rows from a `Source` that was run were held against the program itself on files of this
suite and of LyCORIS 4.1.3.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Literal, NamedTuple

from library.adapters.layers import layers_of, norms_of
from library.adapters.names import ALPHA, DOWN, SD, TEXT, TEXT_2, UP
from library.models import keys
from library.models.checkpoint import UNET
from library.models.family import FAMILIES, SD1, SD2, SDXL, ModelFamily
from library.models.layout import unet_rule


@dataclasses.dataclass(frozen=True)
class Source:
    """Where rows are from: version or commit, date, file of the program's source."""

    version: str
    date: str
    file: str
    was_run: bool = True


class Names(NamedTuple):
    """Names that a program reads for the modules of a part of the models of some families.

    A form has the name of a layer in place of {word} (path in diffusers, dots as underscores), {path}, {processor}
    (path with the attention processors of old diffusers), {block_word} and {block_path} (the same in a checkpoint).
    Paths of text encoders are without `text_model`.
    """

    source: Source
    families: tuple[ModelFamily, ...]
    part: str
    forms: tuple[str, ...]
    layers: Literal["blocks", "matrices", "all"] = "all"  # without the edges of a U-Net; without normalisations
    unread: tuple[str, ...] = ()  # names of these forms that it does not find
    together: tuple[str, ...] = ()  # ends of names that it applies only if a file has all of them


class Row(NamedTuple):
    """A kind of module that a program reads: the tensors that it needs, by their endings, and those it may have.

    when are the tensors by which the program takes a module for this kind (None: all that it needs).
    """

    source: Source
    kind: str
    needs: tuple[str, ...]
    may: tuple[str, ...] = ()
    when: tuple[str, ...] | None = None
    refuses: bool = False  # with such a module in it, the program loads nothing of a file


@dataclasses.dataclass(frozen=True)
class Program:
    """A program that reads network files."""

    title: str
    names: tuple[Names, ...]
    rows: tuple[Row, ...]
    takes: Literal["first row", "all rows"] = "first row"  # that fit a module
    by_first_dot: bool = False  # the name of a module ends at its first dot, whatever follows
    # What it does with a module that fits no row: nothing, or it loads nothing of the file.
    unfit: Literal["skips", "refuses known", "refuses any"] = "skips"
    limit: int | None = None  # unmatched tensors up to which it accepts a file
    matched_alone: tuple[str, ...] = ()  # endings that it does not count as unmatched in a module that fits no row
    embeddings: Literal["reads", "skips"] = "skips"  # textual inversions in the file, named bundle_emb.
    prefixes: Mapping[ModelFamily, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # others are refused
    mixes_blocks: bool = True  # takes a U-Net with names of diffusers and of the checkpoint in one file

    @property
    def sources(self) -> tuple[Source, ...]:
        """Where its rows are from."""
        return tuple(dict.fromkeys([*(names.source for names in self.names), *(row.source for row in self.rows)]))


# --------------------------------------------------------------------------------------------------------------
# Rows that several programs share
# --------------------------------------------------------------------------------------------------------------

DOWN_UP = (DOWN, UP)
A_B = (".lora_A.weight", ".lora_B.weight")
DIFFUSERS = (".lora.down.weight", ".lora.up.weight")
PROCESSOR = ("_lora.down.weight", "_lora.up.weight")
LINEAR_LAYER = (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")
BARE_A_B = (".lora_A", ".lora_B")
DEFAULT_A_B = (".lora_A.default.weight", ".lora_B.default.weight")
CORE, DORA = ".lora_mid.weight", ".dora_scale"
LOHA = (".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b")
LOHA_CORES = (".hada_t1", ".hada_t2")
GLORA = (".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight")
IA3 = (".weight", ".on_input")


def lokr(source: Source, *may: str) -> tuple[Row, ...]:
    """Return the rows of LoKr: each of the two factors whole, or as a product."""
    firsts, seconds = ((".lokr_w1",), (".lokr_w1_a", ".lokr_w1_b")), ((".lokr_w2",), (".lokr_w2_a", ".lokr_w2_b"))
    return tuple(Row(source, "LoKr", (*first, *second), may) for first in firsts for second in seconds)


# --------------------------------------------------------------------------------------------------------------
# The programs
# --------------------------------------------------------------------------------------------------------------

A1111 = Source("fork lshqqytiger e61adddd", "2026-11-25", "extensions-builtin/Lora/networks.py")
A1111_KINDS = Source("1.10", "2026-11-25", "extensions-builtin/Lora/network_*.py", was_run=False)
A1111_MAY = (ALPHA, ".scale", DORA)
FORGE = Source("dfdcbab6", "2026-11-25", "packages_3rdparty/comfyui_lora_collection/lora.py")
COMFY = Source("a125cd84", "2026-11-25", "comfy/lora.py")
COMFY_KINDS = Source("a125cd84", "2026-11-25", "comfy/weight_adapter/", was_run=False)
COMFY_MAY = (ALPHA, DORA, ".reshape_weight")
INVOKE = Source("8e71a8a5", "2026-11-25", "invokeai/backend/patches/layer_patcher.py")
INVOKE_KINDS = Source("8e71a8a5", "2026-11-25", "invokeai/backend/patches/layers/utils.py", was_run=False)
SDS = Source("0.10.1", "2026-11-25", "networks/lora.py")
CPP = Source("0.4.7 (PyPI)", "2026-11-25", "src/name_conversion.cpp")
CPP_KINDS = Source("master", "2026-11-25", "src/model/adapter/lora.hpp", was_run=False)
DIFFUSERS_LIBRARY = Source("0.42.1, peft 0.21.2", "2026-11-25", "loaders/lora_conversion_utils.py")

WORDS = ("lora_unet_{word}", "lora_unet_{block_word}")
COMFY_UNET = (*WORDS, "lycoris_{word}", "unet.{processor}", "{processor}", "diffusion_model.{block_path}")
TEXT_WORDS = ("lora_te_text_model_{word}", "lora_te1_text_model_{word}")
TEXT_2_WORDS = ("lora_te2_text_model_{word}",)
ATTENTION = ("_q_proj", "_k_proj", "_v_proj", "_out_proj")  # one layer in OpenCLIP


def names_like_comfy(source: Source) -> tuple[Names, ...]:
    """Return the names that ComfyUI reads, and Forge, which has its table from there."""
    first, second = (*TEXT_WORDS, "text_encoder.text_model.{path}"), (*TEXT_2_WORDS, "text_encoder_2.text_model.{path}")
    return (
        Names(source, FAMILIES, UNET, COMFY_UNET),
        Names(source, FAMILIES, TEXT, first, "matrices"),
        Names(source, (SDXL,), TEXT_2, second, "matrices"),
    )


def rows_like_comfy(source: Source, may: tuple[str, ...]) -> tuple[Row, ...]:
    """Return the kinds that ComfyUI and Forge read alike."""
    return (
        Row(source, "LoRA", DOWN_UP, (CORE, *may)),
        *(Row(source, "LoRA", pair, may) for pair in (PROCESSOR, A_B, DIFFUSERS, LINEAR_LAYER)),
        Row(source, "LoHa", LOHA, (*LOHA_CORES, *may)),
        *lokr(source, ".lokr_t2", *may),
        Row(source, "GLoRA", GLORA, may),
        Row(source, "norm", (".w_norm",), (".b_norm",)),
        *(Row(source, "difference", (ending,)) for ending in (".diff", ".diff_b", ".set_weight")),
    )


PROGRAMS = (
    Program(
        "AUTOMATIC1111",
        names=(
            Names(A1111, SD, UNET, WORDS, unread=("lora_unet_conv_norm_out",)),
            Names(
                A1111,
                (SDXL,),
                UNET,
                WORDS,
                unread=(
                    "lora_unet_conv_norm_out",
                    *(f"lora_unet_add_embedding_linear_{number}" for number in (1, 2)),
                    "lora_unet_up_blocks_0_upsamplers_0_conv",  # taken for output_blocks_2_1, as in SD 1.x
                ),
            ),
            Names(A1111, (SD1,), TEXT, TEXT_WORDS),
            Names(A1111, (SD2,), TEXT, TEXT_WORDS[:1], "matrices", together=ATTENTION),
            Names(A1111, (SDXL,), TEXT, TEXT_WORDS[1:]),
            Names(A1111, (SDXL,), TEXT_2, TEXT_2_WORDS, "matrices", together=ATTENTION),
        ),
        rows=(
            Row(A1111_KINDS, "LoRA", DOWN_UP, (CORE, ".bias", *A1111_MAY)),
            Row(A1111_KINDS, "LoRA", A_B),
            Row(A1111_KINDS, "LoHa", LOHA, (*LOHA_CORES, *A1111_MAY)),
            Row(A1111_KINDS, "IA3", IA3, A1111_MAY, when=(".weight",)),
            *lokr(A1111_KINDS, ".lokr_t2", *A1111_MAY),
            Row(A1111_KINDS, "difference", (".diff",), (".diff_b", *A1111_MAY)),
            Row(A1111_KINDS, "norm", (".w_norm", ".b_norm")),
            Row(A1111_KINDS, "GLoRA", (*GLORA, ALPHA), (".scale", DORA)),
            *(Row(A1111_KINDS, "OFT", (ending,), (ALPHA, ".rescale")) for ending in (".oft_blocks", ".oft_diag")),
        ),
        by_first_dot=True,
        unfit="refuses known",
        embeddings="reads",
    ),
    Program(
        "Forge",
        names=names_like_comfy(FORGE),
        rows=rows_like_comfy(FORGE, (ALPHA, DORA)),
        takes="all rows",
        limit=12,
        matched_alone=(ALPHA, DORA),
    ),
    Program(
        "ComfyUI",
        names=(
            *names_like_comfy(COMFY),
            *(
                Names(COMFY, families, part, (f"text_encoders.{encoder}.transformer.text_model.{{path}}",))
                for families, part, encoder in (
                    ((SD1, SDXL), TEXT, "clip_l"),
                    ((SD2,), TEXT, "clip_h"),
                    ((SDXL,), TEXT_2, "clip_g"),
                )
            ),
        ),
        rows=(
            *rows_like_comfy(COMFY_KINDS, COMFY_MAY),
            *(Row(COMFY_KINDS, "LoRA", pair, COMFY_MAY) for pair in (BARE_A_B, DEFAULT_A_B)),
            Row(COMFY_KINDS, "OFT", (".oft_blocks",), (".rescale", ALPHA, DORA)),
        ),
        takes="all rows",
        matched_alone=(ALPHA, DORA),
    ),
    Program(
        "InvokeAI",
        names=(
            Names(INVOKE, SD, UNET, WORDS[:1]),
            Names(INVOKE, SD, TEXT, TEXT_WORDS[:1]),
            Names(INVOKE, (SDXL,), UNET, WORDS),
            Names(INVOKE, (SDXL,), TEXT, TEXT_WORDS[1:]),
            Names(INVOKE, (SDXL,), TEXT_2, TEXT_2_WORDS),
        ),
        rows=(
            Row(INVOKE_KINDS, "DoRA", (DORA, *DOWN_UP), (ALPHA,), when=(DORA,)),
            Row(INVOKE_KINDS, "LoRA", DOWN_UP, (CORE, ALPHA), when=DOWN_UP[1:]),
            Row(INVOKE_KINDS, "LoHa", LOHA, (*LOHA_CORES, ALPHA), when=LOHA[:1]),
            *lokr(INVOKE_KINDS, ".lokr_t2", ALPHA),
            Row(INVOKE_KINDS, "difference", (".diff",), (".diff_b",)),
            Row(INVOKE_KINDS, "IA3", IA3, when=IA3[1:]),
            Row(INVOKE_KINDS, "norm", (".w_norm",), (".b_norm",)),
        ),
        by_first_dot=True,
        unfit="refuses any",
        prefixes={SDXL: ("lora_unet_", "lora_te1_", "lora_te2_")},
        mixes_blocks=False,
    ),
    Program(
        "sd-scripts",
        names=(
            Names(SDS, SD, UNET, WORDS[:1], "blocks"),
            Names(SDS, SD, TEXT, TEXT_WORDS[:1], "matrices"),
            Names(SDS, (SDXL,), UNET, WORDS[1:], "blocks"),
            Names(SDS, (SDXL,), TEXT, TEXT_WORDS[1:], "matrices"),
            Names(SDS, (SDXL,), TEXT_2, TEXT_2_WORDS, "matrices"),
        ),
        rows=(
            Row(SDS, "Tucker", (CORE,), refuses=True),  # its down matrix has a kernel of another size there
            Row(SDS, "LoRA", DOWN_UP, (ALPHA,)),
        ),
        by_first_dot=True,
    ),
    Program(
        "stable-diffusion.cpp",
        names=(
            Names(
                CPP,
                FAMILIES,
                UNET,
                (
                    *(*WORDS, "lycoris_{word}", "unet.{path}", "unet.{processor}", "{path}", "{processor}"),
                    *("diffusion_model.{block_path}", "model.diffusion_model.{block_path}"),
                ),
                "matrices",
            ),
            Names(CPP, FAMILIES, TEXT, TEXT_WORDS, "matrices"),
            Names(CPP, (SDXL,), TEXT_2, TEXT_2_WORDS, "matrices"),
        ),
        rows=(
            *(
                Row(CPP_KINDS, "LoRA", pair, (CORE, ALPHA, ".scale"))
                for pair in (DOWN_UP, DIFFUSERS, PROCESSOR, A_B, DEFAULT_A_B, BARE_A_B)
            ),
            Row(CPP_KINDS, "difference", (".diff",)),
            Row(CPP_KINDS, "difference", (".diff_b",)),
            Row(CPP_KINDS, "LoHa", LOHA, (*LOHA_CORES, ALPHA)),
            *lokr(CPP_KINDS, ALPHA),
        ),
        takes="all rows",
    ),
)
# The names that diffusers reads; its other rules are not of this form.
DIFFUSERS_WORDS = (
    Names(DIFFUSERS_LIBRARY, SD, UNET, WORDS[:1], "matrices"),
    Names(
        DIFFUSERS_LIBRARY,
        (SDXL,),
        UNET,
        WORDS,
        "matrices",
        unread=tuple(f"lora_unet_add_embedding_linear_{number}" for number in (1, 2)),
    ),
    Names(DIFFUSERS_LIBRARY, FAMILIES, TEXT, tuple(f"lora_{te}_{{word}}" for te in ("te", "te1")), "matrices"),
    Names(DIFFUSERS_LIBRARY, FAMILIES, TEXT, TEXT_WORDS, "matrices"),
    Names(DIFFUSERS_LIBRARY, (SDXL,), TEXT_2, (*TEXT_2_WORDS, "lora_te2_{word}"), "matrices"),
)
DIFFUSERS_PATHS = (
    Names(DIFFUSERS_LIBRARY, FAMILIES, UNET, ("unet.{path}", "unet.{processor}"), "matrices"),
    Names(DIFFUSERS_LIBRARY, FAMILIES, TEXT, ("text_encoder.{path}", "text_encoder.text_model.{path}"), "matrices"),
    Names(
        DIFFUSERS_LIBRARY, (SDXL,), TEXT_2, ("text_encoder_2.{path}", "text_encoder_2.text_model.{path}"), "matrices"
    ),
)


@functools.cache
def names_read(table: tuple[Names, ...], family: ModelFamily) -> frozenset[str]:
    """Return all names of modules that the rows of a table read for models of a family."""
    found: set[str] = set()
    for names in table:
        if family in names.families:
            spelled = [fields for fields in layers_spelled(family) if fits(names, fields)]
            found |= {form.format(**fields) for fields in spelled for form in names.forms} - set(names.unread)
    return frozenset(found)


def fits(names: Names, fields: Mapping[str, str]) -> bool:
    """Return whether a layer is one of those of a row."""
    is_edge, is_norm = fields["part"] == UNET and "block" not in fields["path"], fields["sort"] == "norm"
    return (
        fields["part"] == names.part
        and {
            "blocks": not is_edge and not is_norm,
            "matrices": not is_norm,
            "all": True,
        }[names.layers]
    )


@functools.cache
def layers_spelled(family: ModelFamily) -> tuple[Mapping[str, str], ...]:
    """Return the fields of forms for all layers and normalisations of models of a family, with their part and sort."""
    rule = unet_rule(family, {})
    found = []
    # No program has a name for the last normalisation of a text encoder.
    norms = [layer for layer in norms_of(family) if not layer.path.startswith("final_")]
    for sort, layers in (("matrix", layers_of(family)), ("norm", norms)):
        for layer in layers:
            block = layer.path
            if layer.part == UNET:
                block = next(rule(f"{layer.path}.")).name.removeprefix(keys.UNET_PREFIX).removesuffix(".")
            found.append({"part": layer.part, "sort": sort} | spellings(layer.path, block))
    return tuple(found)


def spellings(path: str, block_path: str) -> dict[str, str]:
    """Return the fields of forms for the path of a layer in diffusers and in a checkpoint."""
    processor = path.replace(".to_", ".processor.to_")
    return {
        "path": path,
        "word": path.replace(".", "_"),
        "block_path": block_path,
        "block_word": block_path.replace(".", "_"),
        "processor": processor.removesuffix(".0") if path.endswith(".to_out.0") else processor,
    }
