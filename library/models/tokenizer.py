"""The CLIP tokenizer, built from the vocabulary that is included in the suite.

All Stable Diffusion families use the vocabulary of OpenAI's CLIP (49,408 entries), so none is downloaded; a folder
named by the user replaces it. The families differ only in the padding token (EOS for CLIP-L, "!" for OpenCLIP).
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

VOCABULARY_FILE = Path(__file__).parent / "clip_vocabulary" / "bpe_simple_vocab_16e6.txt.gz"
BOS_TOKEN, EOS_TOKEN = "<|startoftext|>", "<|endoftext|>"
NUM_MERGES = 49152 - 256 - 2  # 49,408 entries minus twice the 256 byte symbols and the two special tokens
VOCABULARY_SIZE = 49408
WINDOW = 77  # tokens in one pass of the text encoder, including BOS and EOS

# A tokenizer with a wrong vocabulary raises no error but returns wrong ids, so it is checked with a known text.
KNOWN_TEXT, KNOWN_IDS = "a photo of a cat", [49406, 320, 1125, 539, 320, 2368, 49407]


def load_clip_tokenizer(
    folder: str | Path | None = None, *, pad_token: str = EOS_TOKEN, added: Mapping[str, int] | None = None
) -> CLIPTokenizer:
    """Return the CLIP tokenizer from a folder, or from the included vocabulary with added tokens if folder is None.

    A folder has `vocab.json` and `merges.txt`, or `tokenizer.json`, and keeps its own padding token; pad_token is for
    the included vocabulary. Raises ValueError for a folder of another tokenizer.
    """
    from transformers import CLIPTokenizer

    if folder is None:
        vocabulary, merges = shipped_vocabulary()
        pairs: list[Any] = list(merges)  # transformers declares texts, but takes pairs
        tokenizer = CLIPTokenizer(vocab=dict(vocabulary), merges=pairs, model_max_length=WINDOW, pad_token=pad_token)
        tokenizer.add_tokens(added_in_order(added or {}))
    else:
        # Without model_max_length a folder that lacks tokenizer_config.json gets a limit of 1e30 tokens.
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), model_max_length=WINDOW, local_files_only=True)
    if tokenizer(KNOWN_TEXT).input_ids != KNOWN_IDS:
        raise ValueError(
            f"{folder or VOCABULARY_FILE.name} is not the CLIP tokenizer: it returns other ids for {KNOWN_TEXT!r}"
        )
    return tokenizer


def added_tokens(tokenizer: CLIPTokenizer) -> dict[str, int]:
    """Return token -> id for the tokens of a tokenizer beyond CLIP's vocabulary."""
    found = tokenizer.get_vocab().items()
    return {token: number for token, number in sorted(found, key=lambda pair: pair[1]) if number >= VOCABULARY_SIZE}


def added_in_order(added: Mapping[str, int]) -> list[str]:
    """Return added tokens so that each has its id when they are appended to the vocabulary; gaps are filled."""
    by_id = {number: token for token, number in added.items()}
    ids = range(VOCABULARY_SIZE, max(by_id, default=VOCABULARY_SIZE - 1) + 1)
    return [by_id.get(number, f"<|unused_{number}|>") for number in ids]


@cache
def shipped_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return (token -> id, merges in order of rank) of OpenAI's CLIP byte-pair encoding."""
    lines = gzip.decompress(VOCABULARY_FILE.read_bytes()).decode("utf-8").split("\n")
    merges = [(first, second) for first, second in (line.split() for line in lines[1 : NUM_MERGES + 1])]
    symbols = byte_symbols()
    ends = [symbol + "</w>" for symbol in symbols]
    tokens = [*symbols, *ends, *("".join(pair) for pair in merges), BOS_TOKEN, EOS_TOKEN]
    return {token: index for index, token in enumerate(tokens)}, merges


def byte_symbols() -> list[str]:
    """Return the 256 characters that represent bytes in the vocabulary, in the order of their ids.

    Printable Latin-1 bytes come first and represent themselves; the others have the code points from 256 upwards, so
    that no symbol is a space or a control character.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = len([byte for byte in range(256) if byte not in printable])
    return [chr(code) for code in printable] + [chr(256 + index) for index in range(others)]
