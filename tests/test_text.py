"""Captions as conditioning: weights in brackets, and what is encoded once and remembered."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from library.config.dataset import SubsetOptions
from library.data.captions import Moment, possible_captions, sample_caption
from library.models.base import BaseFiles, TextEncoder, load_base
from library.models.checkpoint import open_checkpoint
from library.models.conditioning import LiveConditioner, TextOptions
from library.models.family import SD1
from library.models.precision import types_of
from library.models.prompt_weights import parse_weights
from library.models.text_cache import remember
from library.models.tokenizer import load_clip_tokenizer
from library.randomness import random_for
from library.sampling.samplers import build_sampler


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
def encoder(model_store):
    return TextEncoder(SD1.text_models[0], load_clip_tokenizer(), model_store("sd1")[0]["text_encoder"])


@pytest.mark.parametrize("windows", [1, 2, 3])
@pytest.mark.parametrize("pad", [49407, 0])
def test_without_brackets_weights_change_nothing(encoder, windows, pad):
    encoder = dataclasses.replace(encoder, tokenizer=load_clip_tokenizer(pad_id=pad))
    captions = ["a dog", "", "word " * 100, "many words " * 200]
    plain, weighted = (
        LiveConditioner((encoder,)).encode(captions, TextOptions(windows=windows, weights=weights)).hidden
        for weights in (None, "none")
    )
    assert torch.equal(plain, weighted)


@pytest.mark.parametrize("windows", [1, 2])
def test_the_state_of_a_weighted_token_is_multiplied_and_no_other(encoder, windows):
    conditioner, options = LiveConditioner((encoder,)), TextOptions(windows=windows)
    far = "x " * 80 if windows == 2 else ""
    plain = conditioner.encode([f"{far}a big dog"], options).hidden
    weighted = conditioner.encode([f"{far}a (big:1.5) dog"], options._replace(weights="none")).hidden
    factors = (weighted / plain).mean(dim=2)[0]
    expected = torch.ones(75 * windows + 2)
    expected[2 + 80 * bool(far)] = 1.5
    torch.testing.assert_close(factors, expected, rtol=1e-4, atol=1e-4)


def test_remembered_texts_are_those_that_would_be_computed(encoder):
    captions = ["a dog", "", "a (cat:1.2)", "日本語", *(f"number {index}" for index in range(40))]
    live = LiveConditioner((encoder,))
    options = [TextOptions(), TextOptions(windows=2, clip_skip=2, weights="none"), TextOptions(windows=3)]
    remembered = remember(live, [(caption, choice) for caption in captions for choice in options], torch.float32)
    for choice in options:
        found = remembered.encode(captions, choice).hidden
        assert found.shape[1] == choice.num_tokens + 2
        torch.testing.assert_close(found, live.encode(captions, choice).hidden, rtol=1e-5, atol=1e-5)
        assert torch.equal(found[[3, 0]], remembered.encode(["日本語", "a dog"], choice).hidden)
    with pytest.raises(KeyError):
        remembered.encode(["unheard of"], TextOptions())


@torch.no_grad()
def test_the_two_encoders_of_sdxl_give_what_its_pipeline_of_diffusers_encodes(model_store):
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

    made, paths = model_store("sdxl")
    files = open_checkpoint(paths["safetensors"])
    base = load_base(BaseFiles(files, files, (None, None), predicts_v=False, zero_snr=False), types_of("no"))
    texts = ["a photo of a cat", "日本語 and a rather long text", ""]
    pipeline = StableDiffusionXLPipeline(
        vae=made["vae"],
        text_encoder=made["text_encoder"],
        text_encoder_2=made["text_encoder_2"],
        tokenizer=base.texts[0].tokenizer,
        tokenizer_2=base.texts[1].tokenizer,
        unet=made["unet"],
        scheduler=build_sampler("ddim", predicts_v=False, zero_snr=False),
    )
    encoded = [pipeline.encode_prompt(text, do_classifier_free_guidance=False) for text in texts]
    expected, pooled = (torch.cat([parts[index] for parts in encoded]) for index in (0, 2))
    found = LiveConditioner(base.texts).encode(texts, TextOptions())
    torch.testing.assert_close(found.hidden, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.pooled, pooled, rtol=1e-5, atol=1e-5)
    (row,) = remember(LiveConditioner(base.texts), [(texts[1], TextOptions())], torch.float32).rows.values()
    assert row.pooled is not None
    assert row.pooled.shape == (1, pooled.shape[1])


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
    texts = tuple(caption.split("\n"))
    assert possible_captions(texts, options) == expected
    if expected is not None:
        drawn = {
            sample_caption(texts, options, Moment(epoch, 0, 10), random_for(epoch, index))
            for epoch in (1, 2)
            for index in range(30)
        }
        assert drawn <= expected
