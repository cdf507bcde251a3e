"""Captions and prompts that have more tokens than are encoded. What is counted is what is fed to the text encoder."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from library.config.prompts import Prompt
from library.data.captions import lengths_vary, longest_samples, order_varies
from library.data.records import Dataset, ImageRecord, all_records
from library.models.base import TextEncoder
from library.models.conditioning import TextOptions, Tokens, tokenize
from library.models.prompt_weights import parse_weights
from library.sampling.previews import text_options

logger = logging.getLogger(__name__)

Varies = Literal["", "order", "length"]
# How a caption varies -> end of the warning about captions of that kind.
SENTENCES: dict[Varies, str] = {
    "": "captions have more than {limit} tokens and are cut",
    "order": "captions have more than {limit} tokens and are cut after their tags are shuffled",
    "length": "captions can have more than {limit} tokens, depending on chance, and are cut then",
}
CAPTIONS_AT_ONCE = 10_000  # whose longest samples are in memory
REMEDIES = {75: "--max_token_length takes 150 or 225", 150: "--max_token_length takes 225", 225: "shorten them"}


class CutText(NamedTuple):
    """A text of which not all tokens are encoded; of a caption that varies, its longest sample."""

    text: str
    tokens: Tokens
    limit: int
    varies: Varies
    lost: str  # the words that are left out; "" where they differ from sample to sample

    def describe(self) -> str:
        """Return one line: how many tokens there are, and what is lost."""
        number = len(self.tokens.ids)
        if self.varies:
            most = "up to " if self.varies == "length" else ""
            return f"{most}{number} tokens, {number - self.limit} too many: {self.text!r}"
        return f"{number} tokens, without {self.lost!r}: {self.text!r}"


def cut_captions(
    datasets: Sequence[Dataset], encoder: TextEncoder, options: TextOptions, num_steps: int
) -> list[CutText]:
    """Return the captions that are cut in some sample of a run, sorted by text; BREAK must not begin a window."""
    lengths = Lengths(encoder, options)
    records = all_records(datasets)
    texts: dict[str, Varies] = {}
    for start in range(0, len(records), CAPTIONS_AT_ONCE):
        samples = {
            text: record
            for record in reversed(records[start : start + CAPTIONS_AT_ONCE])  # of equal samples the first counts
            for text in longest_samples(record.caption, record.subset, num_steps, lengths.of)
        }
        lengths.learn(samples)
        for text, record in samples.items():
            if text not in texts and lengths.of(text) > options.num_tokens:
                texts[text] = how_varied(record)
    return cut_texts(sorted(texts.items()), encoder, options)


def how_varied(record: ImageRecord) -> Varies:
    """Return how the samples of a record's caption differ in what matters for their length."""
    caption, subset = record.caption, record.subset
    return "length" if lengths_vary(caption, subset) else "order" if order_varies(caption, subset) else ""


class Lengths:
    """Numbers of tokens of texts, by their words: a tokenizer takes a hundred times as long as a sum.

    No token has a part of two words, except a token with a space that a tokenizer got from its user: then a text has
    fewer tokens than its words.
    """

    def __init__(self, encoder: TextEncoder, options: TextOptions) -> None:
        self._encoder, self._options = encoder, options
        self._by_word: dict[str, int] = {}

    def of(self, text: str) -> int:
        """Return the number of tokens of a text."""
        try:
            return sum(map(self._by_word.__getitem__, self._words(text)))
        except KeyError:
            self.learn([text])
            return self.of(text)

    def learn(self, texts: Iterable[str]) -> None:
        """Tokenize the words of texts that are not known yet, all at once."""
        unknown = list(dict.fromkeys(word for text in texts for word in self._words(text) if word not in self._by_word))
        if unknown:
            found = self._encoder.tokenizer(unknown, add_special_tokens=False, verbose=False).input_ids
            self._by_word.update(zip(unknown, map(len, found), strict=True))

    def _words(self, text: str) -> list[str]:
        runs = [text] if self._options.weights is None else [run for run, _ in parse_weights(text)]
        return [word for run in runs for word in self._encoder.expand(run).split(" ")]


def cut_texts(texts: Sequence[tuple[str, Varies]], encoder: TextEncoder, options: TextOptions) -> list[CutText]:
    """Return those of the texts that have more tokens than are encoded."""
    limit = options.num_tokens
    found = []
    for (text, varies), tokens in zip(texts, tokenize(encoder, [text for text, _ in texts], options), strict=True):
        if len(tokens.ids) > limit:
            lost = "" if varies else str(encoder.tokenizer.decode(list(tokens.ids[limit:])))
            found.append(CutText(text, tokens, limit, varies, lost))
    return found


def warn_of_cut_captions(cut: Sequence[CutText]) -> list[str]:
    """Warn of captions that are cut; return the lines of the warning."""
    lines = []
    for varies, sentence in SENTENCES.items():
        of_kind = [text for text in cut if text.varies == varies]
        if of_kind:
            limit = of_kind[0].limit
            lines.append(f"{len(of_kind)} {sentence.format(limit=limit)}; {REMEDIES[limit]}")
            logger.warning("%s", lines[-1])
    return lines


def tell_long_prompts(
    prompts: Sequence[Prompt], encoder: TextEncoder, captions: TextOptions, clip_skip: int | None
) -> None:
    """Warn of prompts of previews that are cut, and tell which are longer than captions can be."""
    for number, prompt in enumerate(prompts, 1):
        options = text_options(encoder, prompt, clip_skip)
        for title, text in (("prompt", prompt.prompt), ("negative prompt", prompt.negative_prompt)):
            for cut in cut_texts([(text, "")], encoder, options):
                logger.warning(
                    "%s %d of the previews is cut at %d tokens: %s", title, number, cut.limit, cut.describe()
                )
        if options.windows > captions.windows:
            logger.info(
                "prompt %d of the previews is drawn with up to %d tokens; captions are trained with %d",
                number,
                options.num_tokens,
                captions.num_tokens,
            )
