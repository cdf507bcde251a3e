"""Metadata files, masks, face crops, and what is held out for validation."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoders import MeanEncoder
from PIL import Image

from library.config.dataset import DatasetConfig, DatasetOptions, SubsetOptions
from library.data import images
from library.data.batches import BatchMaker, BatchRequest, RunPlan, TaskMaker, plan_epoch
from library.data.latent_cache import build_cache
from library.data.records import build_datasets
from library.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """Return a folder with pictures of several shapes, all larger than 64 pixels, half of them transparent."""
    root = tmp_path / "pictures"
    root.mkdir()
    rng = np.random.default_rng(0)
    for index, (width, height) in enumerate([(190, 160), (160, 190), (164, 164), (300, 150), (170, 171)]):
        coarse = rng.integers(0, 255, (height // 10, width // 10, 4), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)
        picture = picture if index % 2 else picture.convert("RGB")
        picture.save(root / f"p{index}.png")
        (root / f"p{index}.txt").write_text(f"tag{index}, a, b", encoding="utf-8")
    return root


def datasets_of(*subsets, masked_loss=False, latents_cached=False, seed=0, **dataset):
    values: dict[str, Any] = {
        "resolution": (64, 64),
        "batch_size": 2,
        "enable_bucket": True,
        "bucket_no_upscale": True,
    } | dataset
    config = DatasetConfig(options=DatasetOptions(**values), subsets=subsets)
    return build_datasets([config], latents_cached=latents_cached, masked_loss=masked_loss, seed=seed)


def subset_of(folder, **values):
    return SubsetOptions(image_dir=folder, caption_extension=".txt", **values)


def batches(datasets, cache=None, seed=3):
    maker = BatchMaker(datasets, TaskMaker(seed, 10, 1.0, cache))
    return [maker[request] for request in RunPlan(datasets, seed, 6, 1)]


def pixels_of(batch):
    assert batch.pixels is not None
    return batch.pixels


# ---- metadata files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_a_metadata_file_lists_pictures_with_caption_and_tags(folder, kind):
    entries: dict[str, dict[str, Any]] = {
        "p0.png": {"caption": "a picture", "tags": "red, blue", "image_size": [1, 1]},
        "p1": {"tags": "green"},  # without extension, as tools of sd-scripts write it
        str(folder / "p2.png"): {"caption": "日本語の説明"},
    }
    path = folder.parent / f"meta.{kind}"
    lines = [json.dumps({"image_path": name} | values, ensure_ascii=False) for name, values in entries.items()]
    text = json.dumps(entries, ensure_ascii=False) if kind == "json" else "\n".join(lines)
    path.write_text(text, encoding="utf-8-sig")
    (dataset,) = datasets_of(subset_of(folder, metadata_file=path, num_repeats=2))
    found = {record.path.name: record for record in dataset.records}
    assert {name: record.caption for name, record in found.items()} == {
        "p0.png": ("a picture,red, blue",),
        "p1.png": ("green",),
        "p2.png": ("日本語の説明",),
    }
    assert {record.repeats for record in dataset.records} == {2}
    assert found["p0.png"].tags == ("red, blue",)
    assert found["p0.png"].size == (190, 160)  # the header's, not the file's


def test_with_wildcards_the_tags_follow_every_line_of_the_caption(folder):
    path = folder.parent / "meta.json"
    path.write_text(json.dumps({"p0": {"caption": "one\ntwo", "tags": "x\ny"}, "p1": {"tags": "z"}}), encoding="utf-8")
    (dataset,) = datasets_of(subset_of(folder, metadata_file=path, enable_wildcard=True))
    assert [record.caption for record in dataset.records] == [("one,x,y", "two,x,y"), ("z",)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "must be an object of picture names, got list"),
        ('{"p0": 3}', "entries of metadata_file .* must have texts as caption and tags:\n  p0: got 3"),
        ('{"p0": {"caption": 5}}', "must have texts as caption and tags:\n  p0: got "),
        ('{"p0": {}, "gone": {}, "away": {}}', r"2 of 3 pictures of .*meta.json are not there; .*\n  gone\n  away"),
    ],
)
def test_a_damaged_metadata_file_is_told(folder, content, message):
    path = folder.parent / "meta.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        datasets_of(subset_of(folder, metadata_file=path))


# ---- masks --------------------------------------------------------------------------------------------------


def save_masks(folder, target, scale=1):
    """Write as the mask of each picture its own colours, so that a mask must follow the picture's red everywhere."""
    target.mkdir()
    for path in folder.glob("*.png"):
        with Image.open(path) as picture:
            size = picture.width * scale, picture.height * scale
            picture.convert("RGB").resize(size, Image.Resampling.BILINEAR).save(target / f"{path.stem}.png")
    return target


@pytest.mark.parametrize("how", ["centre", "random", "no buckets"])
def test_a_mask_shares_resize_crop_and_flip_of_its_picture(folder, how):
    masks = save_masks(folder, folder.parent / "masks")
    subset = subset_of(folder, conditioning_data_dir=masks, flip_aug=True, random_crop=how != "centre")
    datasets = datasets_of(subset, masked_loss=True, enable_bucket=how != "no buckets")
    seen = batches(datasets)
    assert len(seen) == 6
    for batch in seen:
        red = torch.nn.functional.avg_pool2d((batch.pixels[:, :1] + 1) / 2, 8)
        torch.testing.assert_close(batch.masks, red, atol=1e-5, rtol=0)
    assert max(float(batch.masks.std()) for batch in seen) > 0.05


def test_a_mask_of_another_resolution_is_scaled_to_its_picture(folder):
    masks = save_masks(folder, folder.parent / "masks", scale=2)
    datasets = datasets_of(subset_of(folder, conditioning_data_dir=masks), masked_loss=True)
    for batch in batches(datasets):
        red = torch.nn.functional.avg_pool2d((batch.pixels[:, :1] + 1) / 2, 8)
        torch.testing.assert_close(batch.masks, red, atol=0.02, rtol=0)


def test_cached_masks_are_those_of_the_pixels_and_stay_on_disk(folder):
    masks = save_masks(folder, folder.parent / "masks")
    subset = subset_of(folder, conditioning_data_dir=masks, flip_aug=True)
    datasets = datasets_of(subset, masked_loss=True, latents_cached=True)
    for _ in range(2):
        cache = build_cache(datasets, MeanEncoder(), batch_size=2, on_disk=True)
        for cached, drawn in zip(batches(datasets, cache), batches(datasets), strict=True):
            assert torch.equal(cached.masks, drawn.masks)
    Image.new("RGB", (190, 160)).save(masks / "p0.png")  # another mask: its entry, and no other, is made again
    encoder = MeanEncoder()
    build_cache(datasets, encoder, batch_size=1, on_disk=True)
    assert encoder.encoded == [1, 1]  # the picture and its mirror


def test_transparency_masks_the_loss_and_opaque_pictures_have_full_weight(folder):
    datasets = datasets_of(subset_of(folder, alpha_mask=True))
    names: dict[str, torch.Tensor] = {}
    for batch in batches(datasets):
        names |= dict(zip([Path(name).name for name in batch.names], batch.masks, strict=True))
    assert float(names["p0.png"].min()) == 1.0
    record = next(record for record in datasets[0].records if record.path.name == "p1.png")
    with Image.open(record.path) as picture:
        alpha = np.asarray(picture.getchannel("A").resize(record.placement.resized, Image.Resampling.BOX))
    frame = images.centre_frame(record.placement)
    mean = torch.nn.functional.avg_pool2d(torch.from_numpy(frame.cut(alpha) / 255.0)[None], 8)
    torch.testing.assert_close(names["p1.png"].double(), mean, atol=0.01, rtol=0)


def test_a_batch_without_any_mask_has_none(folder):
    assert all(batch.masks is None for batch in batches(datasets_of(subset_of(folder))))


def test_masks_that_are_missing_or_of_another_shape_are_told(folder):
    masks = save_masks(folder, folder.parent / "masks")
    subset = subset_of(folder, conditioning_data_dir=masks)
    with pytest.raises(UserError, match="holds masks for the loss: add --masked_loss"):
        datasets_of(subset)
    with pytest.raises(UserError, match="--masked_loss needs masks"):
        datasets_of(subset_of(folder), masked_loss=True)
    Image.new("RGB", (64, 128)).save(masks / "p0.png")
    with pytest.raises(UserError, match=r"1 masks have another aspect ratio.*\n.*p0.png: 64x128, the picture is 190"):
        datasets_of(subset, masked_loss=True)
    (masks / "p1.png").unlink()
    with pytest.raises(
        UserError, match=r"1 of 5 pictures have no mask of their name in .*masks:\n  .*p1.png\n1 masks have another"
    ):
        datasets_of(subset, masked_loss=True)


# ---- face crops ---------------------------------------------------------------------------------------------


def test_a_face_crop_holds_the_face_at_the_wanted_size(tmp_path):
    """A white square stands for the face: its share of the crop tells the scale, its middle the place."""
    size, target, face = (800, 600), (128, 128), images.Face(500, 300, 80, 60)
    pixels = np.zeros((*size[::-1], 3), dtype=np.uint8)
    pixels[270:330, 460:540] = 255
    sides, middles = [], []
    for index in range(50):
        frame = images.face_frame(size, face, target, (2.0, 4.0), anywhere=False, rng=random.Random(index))
        crop = images.fit(pixels, frame, None)
        assert crop.shape == (128, 128, 3)
        rows, columns = np.nonzero(crop[..., 0] > 127)
        sides.append(columns.max() - columns.min() + 1)
        middles.append(((columns.min() + columns.max()) / 2 - 64, (rows.min() + rows.max()) / 2 - 64))
    assert 128 / 4 - 2 <= min(sides) < 40
    assert 56 < max(sides) <= 128 / 2 + 2
    assert np.abs(middles).max() <= 64 / 20 + 2
    assert np.abs(middles).max() > 0.6


@pytest.mark.parametrize("face", [(1, 1, 30, 30), (799, 599, 500, 10), (400, 300, 5000, 5000)])
@pytest.mark.parametrize("anywhere", [False, True])
def test_a_face_crop_stays_within_the_picture(face, anywhere):
    for index in range(50):
        frame = images.face_frame(
            (800, 600), images.Face(*face), (128, 192), (1.0, 3.0), anywhere=anywhere, rng=random.Random(index)
        )
        for corner, length, window in zip(frame.corner, frame.resized, frame.size, strict=True):
            assert 0 <= corner <= length - window


def test_only_pictures_named_after_a_face_are_cropped_round_it(tmp_path):
    for name in ("a_100_60_40_40", "plain"):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)).save(
            tmp_path / f"{name}.png"
        )
    plain = datasets_of(subset_of(tmp_path, class_tokens="x"), enable_bucket=False)
    cropped = datasets_of(subset_of(tmp_path, class_tokens="x", face_crop_aug_range=(1.5, 3.0)), enable_bucket=False)
    one, other = (BatchMaker(datasets, TaskMaker(1, 1, 1.0, None)) for datasets in (plain, cropped))
    request = BatchRequest(1, 0, plan_epoch(plain, 1, 1)[0])
    equal = {
        Path(name).stem: torch.equal(a, b)
        for name, a, b in zip(one[request].names, pixels_of(one[request]), pixels_of(other[request]), strict=True)
    }
    assert equal == {"a_100_60_40_40": False, "plain": True}


# ---- validation ---------------------------------------------------------------------------------------------


def names_of(records):
    return {record.path.name for record in records}


def test_what_is_held_out_is_never_trained_on(folder):
    one = DatasetConfig(
        options=DatasetOptions(resolution=(64, 64), batch_size=1), subsets=(subset_of(folder, validation_split=0.4),)
    )
    other = DatasetConfig(options=DatasetOptions(resolution=(128, 128), batch_size=1), subsets=(subset_of(folder),))
    for seed in range(5):
        datasets = build_datasets([one, other], latents_cached=False, seed=seed)
        assert len(datasets[0].held_out) == 2
        assert not names_of(datasets[0].held_out) & (names_of(datasets[0].records) | names_of(datasets[1].records))
        assert len(datasets[0].records) == len(datasets[1].records) == 3
        assert not datasets[1].held_out


def test_the_split_follows_its_seed(folder):
    def held_out(**values):
        return names_of(datasets_of(subset_of(folder, validation_split=0.4), **values)[0].held_out)

    assert held_out(seed=1) == held_out(seed=1)
    assert len({frozenset(held_out(seed=seed)) for seed in range(8)}) > 1
    assert held_out(seed=1, validation_seed=5) == held_out(seed=2, validation_seed=5)


def test_what_is_held_out_is_not_varied_and_regularisation_is_never_held_out(folder, tmp_path):
    reg = tmp_path / "reg"
    reg.mkdir()
    Image.new("RGB", (100, 100)).save(reg / "r.png")
    subset = subset_of(
        folder, validation_split=0.4, flip_aug=True, random_crop=True, caption_dropout_rate=0.9, shuffle_caption=True
    )
    (dataset,) = datasets_of(subset, subset_of(reg, is_reg=True, class_tokens="x", validation_split=0.4))
    assert all(record.subset.source == folder for record in dataset.held_out)
    datasets = [dataset.validation]
    maker = BatchMaker(datasets, TaskMaker(0, 1, 1.0, None))
    for samples in plan_epoch(datasets, 0, 0):
        first, second = (maker[BatchRequest(epoch, 0, samples)] for epoch in (1, 2))
        assert first.captions == second.captions
        assert all(caption.startswith("tag") for caption in first.captions)
        assert torch.equal(pixels_of(first), pixels_of(second))
