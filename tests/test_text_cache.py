"""Captions that are encoded ahead, while the text encoders are off the device: what is learned is the same to the bit."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from runs import BY_FILE, options, same, train_killed
from safetensors.torch import load_file

import train_network
from library.config.training import PrecisionConfig
from library.models.base import TextEncoder
from library.models.conditioning import LiveConditioner, TextOptions
from library.models.text_cache import Call, bytes_of, bytes_of_text, encode_calls
from library.models.tokenizer import load_clip_tokenizer
from library.training.prepare import placing, texts
from library.training.prepare.texts import When, text_encoders_on, when_encoded

CACHED = {"cache_text_encoder_outputs": True}
SMALL = 700_000  # bytes: captions of a few steps


@pytest.fixture
def varied(tmp_path):
    """Return a dataset file in which captions vary in every way, and one subset preserves the base model's output."""
    rng = np.random.default_rng(0)
    folders = [tmp_path / "plain", tmp_path / "preserved"]
    for folder in folders:
        folder.mkdir()
        for index, size in enumerate([(64, 64), (64, 128), (64, 64), (64, 128)]):
            Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / f"{index}.png")
            text = f"(a:1.2) {{cat|dog}}, b;b2, c, ||| d, tag{index}\nanother {{one|two|three}}, x, y, [z]\n"
            (folder / f"{index}.txt").write_text(text + f"{'long, ' * 100}, {index}", encoding="utf-8")
    drawn = {
        "caption_extension": ".txt",
        "enable_wildcard": True,
        "shuffle_caption": True,
        "caption_dropout_rate": 0.2,
        "caption_dropout_every_n_epochs": 3,
        "caption_tag_dropout_rate": 0.2,
        "token_warmup_step": 6,
        "caption_prefix": "pre,",
        "caption_suffix": ", post",
        "secondary_separator": ";",
        "keep_tokens_separator": "|||",
    }
    preserved = {"custom_attributes": {"diff_output_preservation": True}}
    subsets = [{"image_dir": str(folder)} | drawn for folder in folders]
    sizes = {"resolution": 64, "enable_bucket": True, "bucket_no_upscale": True, "min_bucket_reso": 64}
    dataset = {**sizes, "batch_size": 2, "validation_split": 0.25, "subsets": [subsets[0], subsets[1] | preserved]}
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"datasets": [dataset]}), encoding="utf-8")
    return path


def arguments(base, data, out, **more):
    values = BY_FILE | {"dataset_config": data, "network_train_unet_only": True, "max_train_steps": 6} | more
    values |= {
        "weighted_captions": True,
        "gradient_accumulation_steps": 2,
        "validate_every_n_epochs": 2,
        "network_dropout": 0.1,
    }
    return options(base, None, out, **values)


def run(base, data, out, **more):
    assert train_network.main(arguments(base, data, out, **more)) == 0
    return load_file(out / "x.safetensors")


def measured(out):
    lines = map(json.loads, (out / "x-metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [value for line in lines for name, value in line.items() if "validation" in name and "average" in name]


@pytest.fixture
def parts(monkeypatch):
    """Return the size of each part that is encoded; hold that text encoders work only in their place."""
    sizes, inside = [], []
    place, encode, encode_all = texts.text_encoders_on, LiveConditioner.encode, texts.encode_calls

    @contextlib.contextmanager
    def at_work(*given):
        with place(*given):
            inside.append(given)
            yield
            inside.pop()

    def guarded(self, *given):
        assert inside
        return encode(self, *given)

    def counted(*given):
        found = encode_all(*given)
        sizes.append(bytes_of(found.values()))
        return found

    def begin():
        monkeypatch.setattr(texts, "text_encoders_on", at_work)
        monkeypatch.setattr(LiveConditioner, "encode", guarded)
        monkeypatch.setattr(texts, "encode_calls", counted)
        return sizes

    return begin


@pytest.mark.parametrize(
    ("family", "more"),
    [
        pytest.param("sd1", {"max_token_length": 225, "cache_latents": True}, id="sd1"),
        pytest.param("sdxl", {}, id="sdxl", marks=pytest.mark.slow),
        pytest.param("sdxl", {"max_token_length": 225, "mixed_precision": "bf16"}, id="long", marks=pytest.mark.slow),
        pytest.param(
            "sd2", {"max_token_length": 225, "max_data_loader_n_workers": 2}, id="sd2", marks=pytest.mark.slow
        ),
    ],
)
def test_captions_that_vary_are_encoded_ahead_to_the_same_bits(
    model_store, varied, tmp_path, monkeypatch, parts, family, more
):
    base = model_store(family)[1]["safetensors"]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"a {'long ' * 90} dog --w 64 --h 64 --s 1 --n bad", encoding="utf-8")
    more = more | {"sample_prompts": prompts, "sample_every_n_steps": 6}
    live = run(base, varied, tmp_path / "live", **more)
    sizes = parts()
    monkeypatch.setattr(texts, "LARGEST_MEMORY", SMALL)
    same(run(base, varied, tmp_path / "ahead", **more, **CACHED, cache_text_encoder_outputs_to_disk=True), live)
    assert len(sizes) > 2, "what the whole run needs, and more than one part"
    assert max(sizes[1:]) < SMALL
    assert measured(tmp_path / "ahead") == measured(tmp_path / "live")
    pictures = [
        [path.read_bytes() for path in sorted(tmp_path.glob(f"{out}/sample/*.png"))] for out in ("live", "ahead")
    ]
    assert pictures[0] == pictures[1]
    assert len(pictures[0]) == 1
    assert not list(tmp_path.rglob("*.npz"))


def test_a_stop_does_not_wait_for_captions_and_what_goes_on_encodes_the_rest(base, varied, tmp_path, monkeypatch):
    live = run(base, varied, tmp_path / "live")
    monkeypatch.setattr(texts, "LARGEST_MEMORY", 0)  # a part is of one step then
    calls, encode_all = [], texts.encode_calls

    def signalled(conditioner, wanted, dtype):
        calls.append(wanted)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)
        return encode_all(conditioner, wanted, dtype)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(texts, "encode_calls", signalled)
        train_network.main(arguments(base, varied, tmp_path / "out", **CACHED))
    assert len(calls) == 4
    assert (tmp_path / "out" / "x-step00000002-state").is_dir()
    same(run(base, varied, tmp_path / "out", **CACHED, resume="auto"), live)


@pytest.mark.slow
def test_a_run_with_only_its_file_left_to_write_encodes_no_captions(base, varied, tmp_path):
    states = {"save_state": True, "save_every_n_steps": 1}
    train_killed(arguments(base, varied, tmp_path, **CACHED, **states), after=6)
    same(run(base, varied, tmp_path, **CACHED, resume="auto"), load_file(tmp_path / "x-step00000006.safetensors"))


def test_captions_that_do_not_vary_are_encoded_once_or_ahead(base, pictures, tmp_path, monkeypatch, caplog):
    def trained(out, **more):
        given = {"network_train_unet_only": True, "max_train_steps": 2, "train_batch_size": 2}
        assert train_network.main(options(base, pictures, tmp_path / out, **given, **more)) == 0
        return load_file(tmp_path / out / "x.safetensors")

    caplog.set_level(logging.INFO, "library")
    same(trained("a", **CACHED), trained("b"))
    assert caplog.text.count("text: all 4 captions and prompts encoded, 0.00 GB") == 2
    monkeypatch.setattr(texts, "LARGEST_MEMORY", 0)
    caplog.clear()
    same(trained("c", **CACHED), trained("d"))
    assert "text: 2 captions encoded for steps 1 to 1, 0.00 GB" in caplog.text


def test_files_of_other_programs_are_not_read_and_none_is_written(tmp_path, caplog):
    caplog.set_level(logging.INFO, "library")
    for name in ("a_te_outputs.npz", "b_te_outputs.npz", "c.npz"):
        (tmp_path / name).write_bytes(b"")
    datasets = [Mock(all_records=[Mock(file=str(tmp_path / name)) for name in ("a.png", "b.png")])]
    texts.tell_of_files(PrecisionConfig(), datasets)
    assert not caplog.text
    texts.tell_of_files(PrecisionConfig(cache_text_encoder_outputs=True), datasets)
    assert caplog.messages == ["2 files *_te_outputs.npz beside the pictures are those of sd-scripts, and are not used"]
    caplog.clear()
    both = PrecisionConfig(cache_text_encoder_outputs=True, cache_text_encoder_outputs_to_disk=True)
    texts.tell_of_files(both, [])
    assert len(caplog.messages) == 1
    assert "nothing is written; captions are encoded to memory" in caplog.text


@pytest.mark.parametrize(
    ("caption", "trained", "asked", "memory", "expected"),
    [
        ({"a"}, False, False, 10**9, When.ONCE),
        ({"a"}, False, True, 10**9, When.ONCE),
        ({"a"}, True, False, 10**9, When.IN_STEPS),
        ({"a"}, False, False, 100, When.IN_STEPS),
        ({"a"}, False, True, 100, When.AHEAD),
        (None, False, False, 10**9, When.IN_STEPS),
        (None, False, True, 10**9, When.AHEAD),
    ],
)
def test_when_captions_are_encoded(monkeypatch, encoders, caption, trained, asked, memory, expected):
    monkeypatch.setattr(texts, "all_captions", lambda datasets: caption)
    monkeypatch.setattr(texts, "LARGEST_MEMORY", memory)
    precision = PrecisionConfig(cache_text_encoder_outputs=asked)
    base = Mock(texts=encoders)
    found = when_encoded(precision, [], base, TextOptions(), torch.float32, trains_text_encoder=trained)
    assert found is expected


@pytest.fixture
def encoders(model_store):
    from tiny import FAMILIES

    family, made = FAMILIES["sdxl"], model_store("sdxl")[0]
    return tuple(TextEncoder(row, load_clip_tokenizer(), made[row.folder]) for row in family.text_models)


@pytest.mark.parametrize("windows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calls_are_repeated_to_the_bit_and_their_size_is_known(encoders, windows, dtype):
    live, given = LiveConditioner(encoders), TextOptions(windows=windows)
    calls = [Call(("a dog", "", "a cat"), given), Call(("a dog",), given), Call(("a dog",), given)]
    found = encode_calls(live, calls, dtype)
    assert len(found) == 2
    assert bytes_of(found.values()) == 4 * bytes_of_text(encoders, given, dtype)
    for call, conditioning in found.items():
        expected = live.encode(*call)
        assert torch.equal(conditioning.hidden, expected.hidden.to(dtype))
        assert conditioning.pooled is not None and expected.pooled is not None
        assert torch.equal(conditioning.pooled, expected.pooled.to(dtype))
        assert not conditioning.hidden.requires_grad


@pytest.mark.parametrize("shares", [False, True])
def test_the_unet_waits_elsewhere_unless_it_holds_what_is_trained(monkeypatch, shares):
    moves: list[object] = []
    unet, encoder = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    for module in (texts, placing):
        monkeypatch.setattr(module, "move", lambda module, to: moves.append((module, str(to))))
    network = Mock(all_parameters=lambda: list((unet if shares else encoder).parameters()))
    with text_encoders_on(Mock(unet=unet, text_modules=[encoder]), network, torch.device("cuda")):
        moves.append("work")
    away = [] if shares else [(unet, "cpu")]
    assert moves == [*away, (encoder, "cuda"), "work", (encoder, "cpu"), (unet, "cuda")]
