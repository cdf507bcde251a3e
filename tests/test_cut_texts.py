"""What is said about texts that are too long: true for every sample that a run draws, before training and in it."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from library.config.dataset import DatasetConfig, DatasetOptions, SubsetOptions
from library.config.prompts import Prompt
from library.data.captions import Moment, longest_samples, order_varies, sample_caption
from library.data.records import build_datasets
from library.models.base import TextEncoder
from library.models.conditioning import TextOptions, tokenize
from library.models.family import SD1
from library.models.tokenizer import load_clip_tokenizer
from library.training.prepare.cut_texts import Lengths, cut_captions, tell_long_prompts, warn_of_cut_captions

NO_MODEL: Any = torch.nn.Identity()  # only the tokenizer is used
ENCODER = TextEncoder(SD1.text_models[0], load_clip_tokenizer(), NO_MODEL)
PLAIN, WEIGHTED = TextOptions(), TextOptions(weights="none")


def length(text, options=PLAIN):
    return len(tokenize(ENCODER, [text], options)[0].ids)


WORDS = st.sampled_from(["a dog", "sky", "{a|a long red thing|b}", "(bright:1.3)", "x ||| y", "p;;;q", "[dim] light"])
RULES = st.fixed_dictionaries(
    {
        "caption_prefix": st.sampled_from([None, "photo of my"]),
        "caption_suffix": st.sampled_from([None, "at {noon|late midnight}"]),
        "enable_wildcard": st.booleans(),
        "shuffle_caption": st.booleans(),
        "keep_tokens": st.integers(0, 2),
        "keep_tokens_separator": st.sampled_from(["", "|||"]),
        "secondary_separator": st.sampled_from([None, ";;;"]),
        "caption_dropout_rate": st.sampled_from([0.0, 0.5, 1.0]),
        "caption_dropout_every_n_epochs": st.sampled_from([0, 1, 3]),
        "caption_tag_dropout_rate": st.sampled_from([0.0, 0.4, 1.0]),
        "token_warmup_step": st.sampled_from([0.0, 0.5, 4.0, 50.0]),
    }
)


@given(st.lists(st.lists(WORDS, min_size=1, max_size=6).map(", ".join), min_size=1, max_size=2), RULES)
@example(["(bright:1.3), a dog"], {"shuffle_caption": True})  # "),", but ")" at the end
@settings(max_examples=60, deadline=None)
def test_no_sample_is_longer_than_the_longest_one_told(lines, rules):
    caption, subset, steps = tuple(lines), SubsetOptions(**rules), 10
    longest = max(map(length, longest_samples(caption, subset, steps, length)))
    for key in range(20):
        moment = Moment(1 + key // 10, key // 2, steps)
        assert length(sample_caption(caption, subset, moment, random.Random(key))) <= longest


@given(st.one_of(st.text(max_size=40), st.lists(st.one_of(WORDS, st.text(max_size=9)), max_size=8).map(" ".join)))
@example("It's 12 o'clock\u3000, a\xa0b\n c\x1cd \u0130 \u0344x e \u0301")
@settings(max_examples=150, deadline=None)
def test_the_length_of_a_text_is_the_sum_of_those_of_its_words(text):
    for options in (PLAIN, WEIGHTED):
        assert Lengths(ENCODER, options).of(text) == length(text, options)


@pytest.mark.parametrize("rules", [{}, {"caption_dropout_rate": 0.9}, {"shuffle_caption": True, "keep_tokens": 1}])
def test_without_choices_the_longest_sample_is_one_that_is_drawn(rules):
    subset = SubsetOptions(caption_prefix="a very", **rules)
    (text,) = longest_samples(("red, blue", "unused line"), subset, 5, length)
    assert text == "a very red, blue"


def cut(folder, caption, options=PLAIN, num_steps=10, **rules):
    from PIL import Image

    Image.new("RGB", (64, 64)).save(folder / "0.png")
    (folder / "0.txt").write_text(caption, encoding="utf-8")
    subset = SubsetOptions(image_dir=folder, caption_extension=".txt", **rules)
    config = DatasetConfig(options=DatasetOptions(resolution=(64, 64)), subsets=(subset,))
    return cut_captions(build_datasets([config], latents_cached=False), ENCODER, options, num_steps)


SKIES = ", ".join(f"(sky:1.{i:02})" for i in range(30))
NOT_CUT: dict[str, tuple[str, TextOptions, dict[str, Any]]] = {
    "weights": (SKIES, WEIGHTED, {}),
    "escaped brackets": (r"\(sky\) " * 25, WEIGHTED, {}),
    "choices that are not taken": ("a {" + "|".join(["red apple pie"] * 40) + "}", PLAIN, {"enable_wildcard": True}),
    "the mark of kept tags": ("sky, " * 36 + "sky ||| a", PLAIN, {"keep_tokens_separator": "|||"}),
    "all dropped": ("sky " * 90, PLAIN, {"caption_dropout_rate": 1.0}),
    "dropped in every epoch": ("sky " * 90, PLAIN, {"caption_dropout_every_n_epochs": 1}),
    "tags dropped": ("a, " + "sky, " * 60, PLAIN, {"caption_tag_dropout_rate": 1.0, "keep_tokens": 1}),
    "tags that a warm-up never shows": ("a, " + "sky, " * 60, PLAIN, {"token_warmup_step": 1000.0}),
    "a long separator": ("&&&&&".join(["sky"] * 38), PLAIN, {"caption_separator": " ", "secondary_separator": "&&&&&"}),
    "lines that are not read": ("sky\n" + "sky " * 90, PLAIN, {}),
}
CUT: dict[str, tuple[str, TextOptions, dict[str, Any], str, str]] = {
    "a prefix": ("sky " * 74, PLAIN, {"caption_prefix": "a fine old photograph"}, "have more", "without 'sky"),
    "a suffix": ("sky " * 74, PLAIN, {"caption_suffix": "in red"}, "have more", "76 tokens, without 'red"),
    "a long choice": ("sky " * 73 + "{a|a very long thing}", PLAIN, {"enable_wildcard": True}, "can have", "up to 77"),
    "one of two lines": ("sky\n" + "sky " * 76, PLAIN, {"enable_wildcard": True}, "can have", "up to 76 tokens"),
    "brackets as text": ("(sky:1.2)" * 20, PLAIN, {}, "have more", "without "),
    "weights": ("(sky " * 80 + ")", WEIGHTED, {}, "have more", "80 tokens, without 'sky"),
    "shuffled": (", ".join(f"tag {i}" for i in range(40)), PLAIN, {"shuffle_caption": True}, "after their", "too many"),
    "some dropped": ("sky, " * 60, PLAIN, {"caption_tag_dropout_rate": 0.1}, "can have", "up to "),
}


@pytest.mark.parametrize("case", NOT_CUT.values(), ids=NOT_CUT.keys())
def test_no_caption_is_said_to_be_cut_that_is_not(tmp_path, case):
    caption, options, rules = case
    assert cut(tmp_path, caption, options, **rules) == []


@pytest.mark.parametrize("case", CUT.values(), ids=CUT.keys())
def test_every_caption_that_is_cut_is_told(tmp_path, caplog, case):
    caption, options, rules, said, described = case
    (found,) = cut(tmp_path, caption, options, **rules)
    (line,) = warn_of_cut_captions([found])
    assert line.startswith(f"1 captions {said}" if said != "after their" else "1 captions have")
    assert said in line
    assert described in found.describe()
    assert ("without" in found.describe()) == (found.varies == "")
    assert caplog.text.count("more than 75 tokens") == 1


def test_the_remedy_is_one_that_is_left(tmp_path):
    remedies = {}
    for windows in (1, 2, 3):
        (line,) = warn_of_cut_captions(cut(tmp_path, "sky " * 230, TextOptions(windows=windows)))
        remedies[windows] = line.partition("; ")[2]
    assert remedies == {
        1: "--max_token_length takes 150 or 225",
        2: "--max_token_length takes 225",
        3: "shorten them",
    }


def test_order_varies_only_with_two_tags_to_shuffle():
    def varies(text, **rules):
        return order_varies((text,), SubsetOptions(shuffle_caption=True, **rules))

    assert varies("a, b")
    assert not varies("a, b", keep_tokens=1)
    assert not varies("a, b", caption_tag_dropout_rate=1.0)
    assert varies("a", caption_suffix=", b")


def test_prompts_of_previews_that_are_cut_or_longer_than_captions_are_told(caplog):
    caplog.set_level("INFO")
    prompts = [Prompt("a dog"), Prompt("sky " * 240, "blur"), Prompt("a dog", negative_prompt="bad " * 100)]
    tell_long_prompts(prompts, ENCODER, PLAIN, None)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    (told,) = warnings
    assert re.match(r"prompt 2 of the previews is cut at 225 tokens: 240 tokens, without 'sky", told)
    assert "prompt 2 of the previews is drawn with up to 225 tokens; captions are trained with 75" in caplog.text
    assert "prompt 3 of the previews is drawn with up to 150 tokens" in caplog.text
    assert "prompt 1" not in caplog.text
