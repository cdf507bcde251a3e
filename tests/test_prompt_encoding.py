"""Prompts: attention weights, windows of tokens, and groups of variants."""

from __future__ import annotations

import copy
import random

import pytest
import tiny
import torch
from drawing import LONG
from hypothesis import given, settings
from hypothesis import strategies as st

from library.generation import dynamic_prompts
from library.models.base import TextEncoder, text_body
from library.models.conditioning import LiveConditioner, TextOptions, tokenize, windows_of
from library.models.prompt_weights import parse_weights
from library.models.tokenizer import load_clip_tokenizer

# ---- attention weights and windows --------------------------------------------------------------------------

WEIGHTS = {
    "(unbalanced": [("unbalanced", 1.1)],
    "(a)(b)": [("ab", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0), ("house", 1.573), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1),
        ("sky", 1.4641), (".", 1.1),
    ],
    r"\(a\) \[b\] \\": [("(a) [b] \\", 1.0)],
    "a) b] c:1.2)": [("a) b] c:1.2)", 1.0)],
    "(a:-0.5)[b]": [("a", -0.5), ("b", 1 / 1.1)],
    "": [("", 1.0)],
}  # fmt: skip


@pytest.mark.parametrize("prompt", WEIGHTS)
def test_worked_weights(prompt):
    found = parse_weights(prompt)
    assert [text for text, _ in found] == [text for text, _ in WEIGHTS[prompt]]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in WEIGHTS[prompt]])


@pytest.fixture(scope="module")
def encoders(model_store):
    """Return family -> text encoder, whose states have a mean as those of real ones have."""
    made = {}
    for name in ("sd1", "sd2"):
        encoder = copy.deepcopy(model_store(name)[0]["text_encoder"])
        text_body(encoder).get_parameter("final_layer_norm.bias").data.fill_(-0.2)
        text = tiny.FAMILIES[name].text_models[0]
        made[name] = TextEncoder(text, load_clip_tokenizer(pad_id=text.pad_id), encoder)
    return made


PROMPTS = TextOptions(weights="original", has_breaks=True, keeps_ends=True)


def encoded(encoder, *prompts, **options):
    return LiveConditioner((encoder,)).encode(prompts, PROMPTS._replace(**options)).hidden


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize("normalize", ["original", "abs", "none"])
@torch.no_grad()
def test_weights_multiply_states_and_the_mean_is_kept(encoders, family, normalize):
    tokenizer, encoder = encoders[family].tokenizer, encoders[family].module
    words = tokenizer("a big cat sits", add_special_tokens=False).input_ids
    assert len(words) == 4
    ids = [49406, *words, 49407, *[tokenizer.pad_token_id] * 71]
    states = encoder(torch.tensor([ids])).last_hidden_state[0].double()
    weights = torch.tensor([1.0, 1.0, 1.4, 1 / 1.1, 1 / 1.1, *[1.0] * 72], dtype=torch.float64)
    expected = states * weights[:, None]
    if normalize == "original":
        expected *= states.mean() / expected.mean()
    if normalize == "abs":
        expected *= states.abs().mean() / expected.abs().mean()
    found = encoded(encoders[family], "a (big:1.4) [cat sits]", weights=normalize)[0].double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalize", ["original", "abs", "none"])
@torch.no_grad()
def test_plain_prompts_stay_to_the_bit_beside_weighted_ones(encoders, normalize):
    both = encoded(encoders["sd1"], r"a cat \(1\)", "a (cat:1.2)", weights=normalize)
    plain = LiveConditioner((encoders["sd1"],)).encode(["a cat (1)", "a cat"], TextOptions())
    assert torch.equal(both[:1], plain.hidden[:1])


def test_a_mean_near_zero_is_not_brought_back(encoders):
    found = encoded(encoders["sd1"], "(a cat:-40)", "(a cat:0)")
    assert found.isfinite().all()
    assert found.abs().max() < 1e3


def test_break_begins_a_window_and_is_no_part_of_a_word(encoders):
    encoder = encoders["sd2"]
    tokenizer = encoder.tokenizer
    one, other = (tokenizer(word, add_special_tokens=False).input_ids for word in ("a cat", "dog"))

    def ids(prompt):
        return list(tokenize(encoder, [prompt], PROMPTS)[0].ids)

    assert ids("a cat BREAK dog") == [*one, 49407, *[0] * (74 - len(one)), *other]
    assert ids("a cat BREAK(dog)") == ids("a cat BREAK dog")
    full = " ".join(["cat"] * 75)
    assert ids(f"{full} BREAK dog") == ids(f"{full} dog")
    assert ids("BREAK a cat BREAK") == [*one, 49407, *[0] * (74 - len(one))]
    assert ids("BREAKFAST breaks") == tokenizer("BREAKFAST breaks", add_special_tokens=False).input_ids
    assert tokenize(encoder, ["(a cat BREAK dog:1.5)"], PROMPTS)[0].weights == (1.5,) * 2 + (1.0,) * 73 + (1.5,)


@pytest.mark.parametrize("before", [74, 75], ids=["at the end of a window", "at the beginning of one"])
def test_a_word_with_the_id_of_the_padding_stays_a_word(encoders, before):
    encoder = encoders["sd2"]
    (tokens,) = tokenize(encoder, [f"{'cat ' * before}!/"], PROMPTS)
    assert tokens.ids[before] == encoder.tokenizer.pad_token_id == 0
    ids, _ = windows_of(encoder.tokenizer, tokens, 2)
    assert ids[:, 1:-1].flatten()[: len(tokens.ids)].tolist() == list(tokens.ids)
    assert ids[0, -1] == 49407  # the end of a window that is full of words, where the pooled output is taken
    assert (ids[0, :-1] != 49407).all()


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize("windows", [2, 3])
@torch.no_grad()
def test_every_window_keeps_all_its_positions(encoders, family, windows):
    tokenizer, encoder = encoders[family].tokenizer, encoders[family].module
    words = tokenizer(" ".join(f"word {index}" for index in range(200)), add_special_tokens=False).input_ids
    text = tokenizer.decode(words[: 75 * windows - 10])
    words = tokenizer(text, add_special_tokens=False).input_ids
    assert 75 * (windows - 1) < len(words) <= 75 * windows
    found = encoded(encoders[family], text, "", windows=windows)
    parts = []
    for index in range(windows):
        part = words[75 * index : 75 * index + 75]
        row = [49406, *part, *([49407] if len(part) < 75 else []), *[tokenizer.pad_token_id] * (74 - len(part)), 49407]
        if len(part) < 75 and family == "sd2":  # EOS only after the words
            row = [49406, *part, 49407, *[0] * (75 - len(part))]
        parts.append(encoder(torch.tensor([row])).last_hidden_state)
    assert found.shape == (2, 77 * windows, 64)
    torch.testing.assert_close(found[:1], torch.cat(parts, dim=1), rtol=1e-5, atol=1e-5)


def test_what_is_cut_is_named(draw, caplog):
    with caplog.at_level("WARNING"):
        draw("--prompt", f"{LONG} --n {LONG} end")
    lost = [message for message in caplog.messages if "is left out" in message]
    assert len(lost) == 2
    assert lost[0].startswith("the prompt is too long, this is left out: ")
    assert lost[1].startswith("the negative prompt is too long")
    assert "thing 39" in lost[0].replace("3 9", "39")
    assert "end" in lost[1]
    assert "--max_embeddings_multiples 2 has room for more" in lost[0]


# ---- dynamic prompts ----------------------------------------------------------------------------------------


def expansions(text, number=200):
    return {dynamic_prompts.expand(text, random.Random(seed)) for seed in range(number)}


DYNAMIC = {
    "a {b|c} d": {"a b d", "a c d"},
    "{a}": {"a"},
    "{2$$a|b|c}": {"a, b", "b, a", "a, c", "c, a", "b, c", "c, b"},
    "{5$$a|b}": {"a, b", "b, a"},
    "{2-1$$ and $$a|b}": {"a", "b", "a and b", "b and a"},
    "{0-1$$a}": {"", "a"},
    "{a{b|c}|d}": {"ab", "ac", "d"},
    r"\{a|b\} {c}": {"{a|b} c"},
    "{a|b": {"{a|b"},
    "a}": {"a}"},
    "{a|}": {"a", ""},
    "{1$$x$$a|b}": {"a", "b"},
}


@pytest.mark.parametrize("text", DYNAMIC)
def test_groups_choose_among_their_variants(text):
    assert expansions(text) == DYNAMIC[text]


ENUMERATED = {
    "{e$$a|b|c}": ["a", "b", "c"],
    "{E$$a|b} {e$$c|d}": ["a c", "a d", "b c", "b d"],
    "{e$$2$$a|b|c}": ["a, b", "a, c", "b, c"],
    "{e$$1-2$$+$$a|b}": ["a", "b", "a+b"],
}


@pytest.mark.parametrize("text", ENUMERATED)
def test_groups_that_are_enumerated_give_all_combinations(draw, text):
    number = dynamic_prompts.num_combinations(text)
    assert number
    found = [dynamic_prompts.expand(text, random.Random(0), index) for index in range(number)]
    assert found == ENUMERATED[text]


def test_enumeration_takes_the_place_of_images_per_prompt(draw):
    shots = draw("--prompt", "{e$$a|b} {c|d} --d 1,2", "--images_per_prompt", 5, "--steps", 1)
    assert [shot.texts["prompt"][0] for shot in shots] == ["a", "b"]
    assert [shot.texts["seed"] for shot in shots] == ["1", "2"]
    assert shots[0].texts["raw-prompt"] == "{e$$a|b} {c|d}"


@given(st.text("ab{}|$\\ 12-", max_size=30), st.integers(0, 2**31))
@settings(max_examples=200, deadline=None)
def test_any_text_is_expanded_and_the_same_with_the_same_seed(text, seed):
    number = dynamic_prompts.num_combinations(text)
    assert number is None or number > 0
    once, again = (dynamic_prompts.expand(text, random.Random(seed)) for _ in range(2))
    assert once == again
    if "{" not in text:
        assert once == text.replace("\\}", "}")
