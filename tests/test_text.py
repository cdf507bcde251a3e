"""Captions as conditioning: weights in brackets, and what is encoded once and remembered."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from library.config.dataset import SubsetOptions
from library.data.captions import Moment, draw_caption, possible_captions
from library.models import text_encoding
from library.models.loading import LoadedModels
from library.models.prompt_weights import parse_weights
from library.models.text_encoding import TextOptions, encode_text, remember_texts, tokenize, tokenize_weighted
from library.models.tokenizer import load_clip_tokenizer
from library.randomness import random_for


@pytest.mark.parametrize(
    ("prompt", "runs"),
    [
        ("a dog", [("a dog", 1)]),
        ("", [("", 1)]),
        ("a (dog) x", [("a ", 1), ("dog", 1.1), (" x", 1)]),
        ("a [dog]", [("a ", 1), ("dog", 1 / 1.1)]),
        ("(dog:1.3)", [("dog", 1.3)]),
        ("(a (b:2) c:0.5)", [("a ", 0.5), ("b", 1.0), (" c", 0.5)]),
        ("((x))", [("x", 1.1 * 1.1)]),
        ("([x])", [("x", 1.0)]),
        (r"\(x\) \[y\] \\", [("(x) [y] \\", 1)]),
        ("a (b c", [("a ", 1), ("b c", 1.1)]),
        ("a) b] c", [("a) b] c", 1)]),
        ("12:30 (at 5:00)", [("12:30 ", 1), ("at 5", 0.0)]),  # a number before the bracket is a weight, in web UIs too
        ("(a:-0.5)(b: .5 )", [("a", -0.5), ("b", 0.5)]),
        ("日本語 (猫:1.2)", [("日本語 ", 1), ("猫", 1.2)]),
    ],
)
def test_brackets_are_weights(prompt, runs):
    found = parse_weights(prompt)
    assert [text for text, _ in found] == [text for text, _ in runs]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in runs])


@pytest.fixture(scope="module")
def models(model_store):
    import tiny

    made, _ = model_store("sd1")
    return LoadedModels(
        tiny.FAMILIES["sd1"], [load_clip_tokenizer()], [made["text_encoder"]], made["unet"], made["vae"], False
    )


@pytest.mark.parametrize("max_tokens", [75, 150, 225])
@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_without_brackets_weights_change_nothing(max_tokens, pad):
    tokenizer = load_clip_tokenizer(pad_token=pad)
    captions = ["a dog", "", "word " * 100, "many words " * 200]
    tokens, weights = tokenize_weighted(tokenizer, captions, max_tokens)
    assert torch.equal(tokens, tokenize(tokenizer, captions, max_tokens))
    assert torch.equal(weights, torch.ones(4, max_tokens + 2))


@pytest.mark.parametrize("max_tokens", [75, 150])
def test_the_state_of_a_weighted_token_is_multiplied_and_no_other(models, max_tokens):
    far = "x " * 80 if max_tokens == 150 else ""
    plain = encode_text(models, [f"{far}a big dog"], max_tokens=max_tokens).hidden
    weighted = encode_text(models, [f"{far}a (big:1.5) dog"], max_tokens=max_tokens, weighted=True).hidden
    factors = (weighted / plain).mean(dim=2)[0]
    position = 2 + 80 * bool(far)
    expected = torch.ones(max_tokens + 2)
    expected[position] = 1.5
    torch.testing.assert_close(factors, expected, rtol=1e-4, atol=1e-4)


def test_remembered_texts_are_those_that_would_be_computed(models):
    captions = ["a dog", "", "a (cat:1.2)", "日本語", *(f"number {index}" for index in range(40))]
    options = [TextOptions(75, None, False), TextOptions(150, 2, True)]
    fresh = dataclasses.replace(models, text_encoders=[_copy(models.text_encoders[0])])
    expected = {choice: encode_text(models, captions, **choice._asdict()).hidden for choice in options}
    remember_texts(fresh, [(caption, choice) for caption in captions for choice in options])
    assert all(parameter.is_meta for parameter in fresh.text_encoders[0].parameters())
    for choice in options:
        found = encode_text(fresh, captions, **choice._asdict()).hidden
        torch.testing.assert_close(found, expected[choice], rtol=1e-5, atol=1e-5)
        assert torch.equal(found[[3, 0]], encode_text(fresh, ["日本語", "a dog"], **choice._asdict()).hidden)
    with pytest.raises(KeyError):
        encode_text(fresh, ["unheard of"])


def _copy(encoder):
    import copy

    return copy.deepcopy(encoder)


@pytest.mark.parametrize(
    ("caption", "options", "expected"),
    [
        ("a, b", {}, {"a, b"}),
        ("a, b", {"caption_prefix": "x", "caption_dropout_rate": 0.1}, {"x a, b", ""}),
        ("a, b", {"caption_dropout_every_n_epochs": 2}, {"a, b", ""}),
        ("a, b", {"caption_dropout_rate": 1.0}, {"a, b", ""}),
        ("a {b|c}", {}, {"a {b|c}"}),
        ("a", {"enable_wildcard": True}, {"a"}),
        ("a {b|c}", {"enable_wildcard": True}, None),
        ("a\nb", {"enable_wildcard": True}, None),
        ("a, b", {"shuffle_caption": True}, None),
        ("a, b", {"caption_tag_dropout_rate": 0.1}, None),
        ("a, b", {"token_warmup_step": 5}, None),
        ("a ||| b", {"keep_tokens_separator": "|||"}, {"a, b"}),
    ],
)
def test_possible_captions_are_all_that_are_drawn(caption, options, expected):
    options = SubsetOptions(**options)
    assert possible_captions(caption, options) == expected
    if expected is not None:
        drawn = {
            draw_caption(caption, options, Moment(epoch, 0, 10), random_for(epoch, index))
            for epoch in (1, 2)
            for index in range(30)
        }
        assert drawn <= expected


def test_a_window_of_the_memory_is_as_large_as_its_options(models):
    fresh = dataclasses.replace(models, text_encoders=[_copy(models.text_encoders[0])])
    remember_texts(fresh, [("a", TextOptions(225, None, False))])
    assert encode_text(fresh, ["a"], max_tokens=225).hidden.shape[1] == 3 * text_encoding.PER_WINDOW + 2
