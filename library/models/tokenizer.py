"""The CLIP tokenizer, built from the vocabulary that is included in the suite.

All Stable Diffusion families use the vocabulary of OpenAI's CLIP (49,408 entries), so none is downloaded; a folder
named by the user replaces it. The text encoders differ only in the id of their padding: EOS for CLIP-L, 0 for OpenCLIP.

The id 0 is that of "!". Where a tokenizer has "!" registered as its padding token, as folders of SD 2.x and SDXL have,
each "!" of a text becomes padding; OpenCLIP, which trained the encoders, reads it as a word. So it is never registered.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

VOCABULARY_FILE = Path(__file__).parent / "clip_vocabulary" / "bpe_simple_vocab_16e6.txt.gz"
BOS_TOKEN, EOS_TOKEN = "<|startoftext|>", "<|endoftext|>"
EOS_ID, ZERO_ID = 49407, 0  # the ids of padding
NUM_MERGES = 49152 - 256 - 2  # 49,408 entries minus twice the 256 byte symbols and the two special tokens
VOCABULARY_SIZE = 49408
WINDOW = 77  # tokens in one pass of the text encoder, including BOS and EOS

# A tokenizer with a wrong vocabulary raises no error but returns wrong ids, so it is checked with a known text.
KNOWN_TEXT, KNOWN_IDS = "a photo of a cat", [49406, 320, 1125, 539, 320, 2368, 49407]


def load_clip_tokenizer(
    folder: str | Path | None = None, *, pad_id: int = EOS_ID, added: Mapping[str, int] | None = None
) -> CLIPTokenizer:
    """Return the CLIP tokenizer from a folder, or from the included vocabulary with added tokens if folder is None.

    A folder has `vocab.json` and `merges.txt`, or `tokenizer.json`. pad_id is the id of the padding, whatever the
    folder says. Raises ValueError for a folder of another tokenizer.
    """
    from transformers import CLIPTokenizer

    if folder is None:
        vocabulary, merges = shipped_vocabulary()
        tokenizer = new_tokenizer(vocabulary, merges)
        tokenizer.add_tokens(added_in_order(added or {}))
    else:
        # Without model_max_length a folder that lacks tokenizer_config.json gets a limit of 1e30 tokens.
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), model_max_length=WINDOW, local_files_only=True)
        if ZERO_ID in tokenizer.added_tokens_decoder:
            tokenizer = without_registered_padding(tokenizer)
    if tokenizer(KNOWN_TEXT).input_ids != KNOWN_IDS:
        raise ValueError(
            f"{folder or VOCABULARY_FILE.name} is not the CLIP tokenizer: it returns other ids for {KNOWN_TEXT!r}"
        )
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)  # registers nothing, unlike pad_token when it is made
    return tokenizer


def new_tokenizer(vocabulary: Mapping[str, int], merges: Iterable[Sequence[str]], name: str = "") -> CLIPTokenizer:
    """Return a tokenizer with a vocabulary and its merges, in order of rank; name is that of its folder."""
    from transformers import CLIPTokenizer

    pairs: list[Any] = list(map(tuple, merges))  # transformers declares texts, but takes pairs
    return CLIPTokenizer(vocab=dict(vocabulary), merges=pairs, model_max_length=WINDOW, name_or_path=name)


def without_registered_padding(tokenizer: CLIPTokenizer) -> CLIPTokenizer:
    """Return a tokenizer of the same vocabulary and added tokens, for which the token of the id 0 is a word."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    rebuilt = new_tokenizer(model["vocab"], model["merges"], tokenizer.name_or_path)
    others = [token for number, token in sorted(tokenizer.added_tokens_decoder.items()) if number != ZERO_ID]
    rebuilt.add_tokens(others)
    return rebuilt


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
