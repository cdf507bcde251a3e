"""Text encoding, tokenizer, prompt files and the iterator over pictures."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from drawing import pipe_of, pixels_of

from library.config.prompts import Prompt, parse_preview, preview_of, read_prompts
from library.config.samplers import SAMPLER_NAMES, SAMPLERS
from library.errors import UserError
from library.models.base import TextEncoder, text_body
from library.models.conditioning import LiveConditioner, TextOptions, tokenize, windows_of
from library.models.tokenizer import load_clip_tokenizer, shipped_vocabulary
from library.sampling import contact_sheet
from library.sampling.contact_sheet import draw_sheet
from library.sampling.previews import generate_previews

EOS = 49407


# ---- tokenizer and text encoding ----------------------------------------------------------------------------


def test_the_shipped_vocabulary_gives_the_known_ids():
    tokenizer = load_clip_tokenizer()
    assert len(tokenizer) == 49408
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("日本").input_ids == [49406, 39121, 19277, 361, 49407]
    assert tokenizer.pad_token_id == EOS
    assert load_clip_tokenizer(pad_id=0).pad_token_id == 0


def test_a_tokenizer_folder_takes_the_place_of_the_shipped_one(tmp_path, model_store):
    vocabulary, merges = shipped_vocabulary()
    folder = tmp_path / "cache" / "stabilityai_stable-diffusion-2"
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    text = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)])
    (folder / "merges.txt").write_text(text, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "!"}), encoding="utf-8")
    (encoder,) = tiny.load(model_store("sd2")[1]["safetensors"], tokenizer_cache_dir=tmp_path / "cache").texts
    assert encoder.tokenizer.name_or_path == str(folder)
    assert encoder.tokenizer.model_max_length == 77
    assert ids_of(encoder, ["a photo of a cat"])[0, 0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, EOS, 0]
    (folder / "vocab.json").write_text(
        json.dumps({token: (i + 1) % 49408 for token, i in vocabulary.items()}), encoding="utf-8"
    )
    with pytest.raises(UserError, match="is not the CLIP tokenizer"):
        tiny.load(model_store("sd2")[1]["safetensors"], tokenizer_cache_dir=tmp_path / "cache")


def encoder_of(model_store, family):
    text = tiny.FAMILIES[family].text_models[0]
    return TextEncoder(text, load_clip_tokenizer(pad_id=text.pad_id), model_store(family)[0]["text_encoder"])


def ids_of(encoder, texts, windows=1):
    """Return the token ids (B, K, 77) of texts."""
    found = tokenize(encoder, texts, TextOptions())
    return torch.stack([windows_of(encoder.tokenizer, tokens, windows)[0] for tokens in found])


@torch.no_grad()
def hidden(encoder, texts, **options):
    return LiveConditioner((encoder,)).encode(texts, TextOptions(**options)).hidden


@pytest.mark.parametrize("max_tokens", [75, 150, 225])
@pytest.mark.parametrize("pad", [EOS, 0])
def test_windows_hold_the_caption_between_bos_and_an_end(model_store, max_tokens, pad):
    tokenizer = load_clip_tokenizer(pad_id=pad)
    encoder = dataclasses.replace(encoder_of(model_store, "sd1"), tokenizer=tokenizer)
    long = " ".join(f"word{i}" for i in range(200))
    plain = tokenizer(long, add_special_tokens=False).input_ids
    windows = max_tokens // 75
    tokens = ids_of(encoder, ["a cat", long], windows)
    assert tokens.shape == (2, windows, 77)
    assert (tokens[:, :, 0] == 49406).all()
    assert tokens[1, :, 1:-1].flatten().tolist() == plain[:max_tokens]
    assert (tokens[1, :, -1] == EOS).all()
    assert tokens[0, 0, 1:4].tolist() == [320, 2368, EOS]
    for empty in tokens[0, 1:]:
        assert empty[1] == EOS
        assert (empty[2:-1] == tokenizer.pad_token_id).all()
    assert [tokens.windows for tokens in tokenize(encoder, ["a cat", long], TextOptions())] == [1, -(-len(plain) // 75)]


def test_one_window_is_what_the_pipeline_of_diffusers_encodes(model_store, family_name):
    encoder = encoder_of(model_store, family_name)
    texts = ["a photo of a cat", ""]
    oracle = encoder.tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = encoder.module(oracle.input_ids)[0]
    assert torch.equal(hidden(encoder, texts), expected)
    assert torch.equal(hidden(encoder, texts, clip_skip=1), expected)


def test_clip_skip_stops_that_many_layers_early(model_store, family_name):
    import copy

    encoder = encoder_of(model_store, family_name)
    for skip in (2, 3):
        shorter = dataclasses.replace(encoder, module=copy.deepcopy(encoder.module))
        holder: Any = text_body(shorter.module)
        holder.encoder.layers = holder.encoder.layers[: len(holder.encoder.layers) - skip + 1]
        torch.testing.assert_close(hidden(encoder, ["a cat"], clip_skip=skip), hidden(shorter, ["a cat"]))


def test_long_captions_are_encoded_window_by_window(model_store):
    encoder = encoder_of(model_store, "sd1")
    text = " ".join(f"word{i}" for i in range(200))
    tokens = ids_of(encoder, [text], 3)
    joined = hidden(encoder, [text], windows=3)
    with torch.no_grad():
        single = [encoder.encode(tokens[:, i], None)[0] for i in range(3)]
    assert joined.shape == (1, 227, 64)
    expected = torch.cat([single[0][:, :1], *(part[:, 1:-1] for part in single), single[2][:, -1:]], dim=1)
    torch.testing.assert_close(joined, expected)


# ---- prompts ------------------------------------------------------------------------------------------------


def test_a_line_carries_its_options():
    line = "a cat, --n blurry --W 515 --h 20 --d 7 --s 5000 --l 3.5 --ss euler_a --g 1"
    assert preview_of(parse_preview(line, "x:1")) == Prompt("a cat,", "blurry", 512, 64, 7, 1000, 3.5, "euler_a")
    assert preview_of(parse_preview("semi-real--istic cat", "x:1")) == Prompt("semi-real--istic cat")


def test_files_of_three_kinds_give_the_same_prompts(tmp_path):
    (tmp_path / "p.txt").write_text("# no\n  # no\n\n猫 --w 64 --d 3\ndog --w 64 --d 4\n", encoding="utf-8")
    (tmp_path / "p.toml").write_text(
        '[prompt]\nwidth = 64\nseed = 3\n[[prompt.subset]]\nprompt = "猫"\n[[prompt.subset]]\nprompt = "dog"\nseed = 4\n',
        encoding="utf-8",
    )
    (tmp_path / "p.json").write_text(
        json.dumps(["猫 --w 64 --d 3", {"prompt": "dog", "width": 64, "seed": 4}]), encoding="utf-8"
    )
    expected = [Prompt("猫", width=64, seed=3), Prompt("dog", width=64, seed=4)]
    assert [read_prompts(tmp_path / f"p.{suffix}") for suffix in ("txt", "toml", "json")] == [expected] * 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("cat --x 3", "p.txt:1: --x is not known"),
        ("cat --w wide", "p.txt:1: --w must be a whole number, got 'wide'"),
        ("cat --w 0", "p.txt:1: --w must be at least 1, got 0"),
        ("cat --h 16385", "p.txt:1: --h must be at most 16384, got 16385"),
        ("cat --ss eule", "p.txt:1: --ss must be one of ddim, pndm, lms, euler,"),
        ("cat --d -1", "p.txt:1: --d must be at least 0, got -1"),
        ("cat --d 1,2", "p.txt:1: a preview is one image and has one seed, got (1, 2)"),
        ("cat --t 0.5", "p.txt:1: --t is an option of gen_img_diffusers.py, which previews do not have"),
        ("cat --nl 3", "p.txt:1: --nl is not available: three-way guidance"),
        ("", "has no prompts"),
    ],
)
def test_mistakes_in_a_prompt_file_name_their_line(tmp_path, line, message):
    (tmp_path / "p.txt").write_text(line, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_prompts(tmp_path / "p.txt")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"width": 64}, "p.json[0]: prompt is missing"),
        ({"prompt": 3}, "p.json[0]: prompt must be a text, got 3"),
        ({"prompt": "a", "seed": [1, 2]}, "p.json[0]: a preview is one image"),
        (
            {"prompt": "a", "sample_step": 3},
            "p.json[0]: sample_step is not known; did you mean sample_steps? (known: prompt",
        ),
        ({"prompt": "a", "scale": None, "width": "x"}, "p.json[0]: width must be a whole number, got 'x'"),
    ],
)
def test_mistakes_in_a_table_of_prompts_name_their_key(tmp_path, table, message):
    (tmp_path / "p.json").write_text(json.dumps([table]), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_prompts(tmp_path / "p.json")
    assert message in str(caught.value)


# ---- pictures -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(model_store):
    return tiny.load(model_store("sd1")[1]["folder"])


def draw(models, prompts, seeds, sampler="ddim"):
    return [
        np.asarray(picture.image)
        for picture in generate_previews(models, LiveConditioner(models.texts), prompts, seeds, sampler=sampler)
    ]


@pytest.mark.repetitions(keep=6)
@pytest.mark.parametrize("sampler", sorted(SAMPLER_NAMES))
def test_every_sampler_draws_what_the_pipeline_of_diffusers_draws(models, model_store, sampler):
    settings: dict[str, Any] = {"width": 64, "height": 72, "num_inference_steps": 3, "guidance_scale": 3.0}
    expected = pixels_of(pipe_of(model_store("sd1")[0], sampler=sampler), **settings)
    (got,) = draw(models, [Prompt("a cat", "dog", 64, 72, None, 3, 3.0)], [5], sampler)
    assert got.shape == (72, 64, 3)
    assert np.abs(got.astype(int) - expected).max() <= 1


def test_a_prompt_is_drawn_alike_alone_and_among_others(models):
    prompts = [Prompt(text, width=64, height=64, steps=2, sampler="euler_a") for text in ("a", "b", "c")]
    together = draw(models, prompts, [1, 2, 3])
    for index in range(3):
        assert np.array_equal(draw(models, prompts[index : index + 1], [index + 1])[0], together[index])
    assert not np.array_equal(together[0], together[1])


def test_the_table_of_samplers_is_the_list_of_the_option():
    assert set(SAMPLERS) == set(SAMPLER_NAMES)


def test_a_contact_sheet_has_each_picture_in_its_cell():
    from PIL import Image

    cells: list[list[Image.Image | None]] = [
        [Image.new("RGB", (64, 64), (50 * row, 80 * column, 0)) for column in range(3)] for row in range(2)
    ]
    cells[1][2] = None
    sheet = np.asarray(
        draw_sheet(cells, ["first prompt that is long enough to be wrapped", "猫"], ["start", "step 1", "step 2"])
    )
    height, width = sheet.shape[:2]
    for row in range(2):
        for column in range(3):
            x, y = width - 68 * (3 - column) + 32, height - 68 * (2 - row) + 32
            expected = (255, 255, 255) if cells[row][column] is None else (50 * row, 80 * column, 0)
            assert tuple(sheet[y, x]) == expected


def dejavu_is_installed() -> bool:
    return bool(list(contact_sheet.installed(("DejaVuSans.ttf",), 13)))


def sheet_of(monkeypatch, fonts: tuple[str, ...], *rows: str) -> np.ndarray:
    """Return a sheet whose usual font is that of Pillow, which has Latin letters only."""
    monkeypatch.setattr(contact_sheet, "FONTS", ())
    monkeypatch.setattr(contact_sheet, "OTHER_FONTS", fonts)
    contact_sheet.warn_of_boxes.cache_clear()
    return np.asarray(draw_sheet([[None]] * len(rows), rows, ["start"], title="Sheet", cell=64))


def test_characters_that_no_font_has_are_told_once(monkeypatch, caplog):
    sheet_of(monkeypatch, ("absent.ttf",), "a cat", "black and white \u3000")
    assert caplog.messages == []
    sheet_of(monkeypatch, ("absent.ttf",), "猫", "赤い花")
    (line,) = caplog.messages
    assert "show boxes" in line
    assert "fonts-noto-cjk" in line


@pytest.mark.skipif(not dejavu_is_installed(), reason="no DejaVuSans.ttf")
def test_a_font_that_has_the_characters_is_used_for_their_text_alone(monkeypatch, caplog):
    boxes = sheet_of(monkeypatch, (), "a cat", "жук", "b")
    assert len(caplog.messages) == 1
    caplog.clear()
    letters = sheet_of(monkeypatch, ("absent.ttf", "DejaVuSans.ttf"), "a cat", "жук", "b")
    assert caplog.messages == []
    changed = np.flatnonzero((boxes != letters).any(axis=(1, 2)))
    step = (len(boxes) - contact_sheet.LABEL_HEIGHT) // 3
    assert set((changed - contact_sheet.LABEL_HEIGHT) // step) == {1}
    # 猫 is a box in both fonts.
    sheet_of(monkeypatch, ("DejaVuSans.ttf",), "猫")
    assert len(caplog.messages) == 1
