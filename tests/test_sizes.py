"""Sizes: buckets at a megapixel, and what a model with size conditioning is told of each draw of a picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from encoders import MeanEncoder
from PIL import Image
from runs import train

from library.config.dataset import LEAST_STEP, DatasetConfig, DatasetOptions, SubsetOptions
from library.data.batches import BatchMaker, BatchRequest, RunPlan, TaskMaker
from library.data.latent_cache import Latents, build_cache
from library.data.records import build_datasets, candidates
from library.models.family import FAMILIES

# ---- buckets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("least", "most", "step", "number"),
    [(256, 1024, 64, 25), (256, 2048, 64, 41), (512, 2048, 64, 33), (256, 2048, 32, 81), (256, None, 64, 41)],
)
def test_the_number_of_buckets_at_1024(least, most, step, number):
    options = DatasetOptions(
        resolution=(1024, 1024),
        enable_bucket=True,
        min_bucket_reso=least,
        max_bucket_reso=most,
        bucket_reso_steps=step,
    )
    assert len(candidates(options)) == number


@pytest.mark.parametrize(
    ("resolution", "longest"),
    [((512, 512), 1024), ((768, 768), 1024), ((999, 1001), 1024), ((1000, 1000), 2048), ((832, 1216), 2048)],
)
def test_the_longest_side_grows_with_the_resolution(resolution, longest):
    assert DatasetOptions(resolution=resolution).longest_side == longest
    assert DatasetOptions(resolution=resolution, max_bucket_reso=1536).longest_side == 1536


def test_the_least_step_is_that_of_a_family():
    assert min(family.step for family in FAMILIES) == LEAST_STEP


# ---- what is told of a picture ------------------------------------------------------------------------------


def datasets_of(folder, *, subset=None, **dataset):
    values: dict[str, Any] = {"resolution": (64, 64), "batch_size": 2, "enable_bucket": True}
    options = DatasetOptions(**values | dataset)
    return build_datasets(
        [DatasetConfig(options=options, subsets=(SubsetOptions(image_dir=folder, **subset or {}),))],
        latents_cached=False,
    )


def batches_of(datasets, cache=None):
    """Return the batches of an epoch."""
    maker = BatchMaker(datasets, TaskMaker(3, 100, 1.0, cache))
    return [maker[request] for request in RunPlan(datasets, 3, 100, 1).requests(1)]


def draws_of(batches):
    """Return name of the picture -> the six numbers and the pixels (3, H, W) of each draw."""
    found: dict[str, list[tuple[list[int], torch.Tensor]]] = {}
    for batch in batches:
        for name, sizes, pixels in zip(batch.names, batch.sizes.tolist(), batch.pixels, strict=True):
            found.setdefault(name, []).append((sizes, pixels))
    return found


class NoLatents:
    """A cache that holds nothing but the size of the latents: pictures need not be decoded."""

    def read(self, record, *, mirrored):
        width, height = record.placement.bucket
        return Latents(torch.zeros(8, height // 8, width // 8), None)


@pytest.mark.parametrize(
    ("size", "resized", "bucket", "corner"),
    [
        ((1000, 1500), (832, 1248), (832, 1216), (0, 16)),
        ((1920, 1080), (1365, 768), (1344, 768), (10, 0)),
        ((3000, 2000), (1248, 832), (1216, 832), (16, 0)),
    ],
)
def test_large_pictures_are_told_as_they_are_cut(tmp_path, size, resized, bucket, corner):
    Image.new("RGB", size).save(tmp_path / "a.png")
    datasets = datasets_of(tmp_path, resolution=(1024, 1024), subset={"flip_aug": True, "num_repeats": 8})
    (record,) = datasets[0].records
    assert (record.placement.resized, record.placement.bucket) == (resized, bucket)
    whole = [numbers for batch in batches_of(datasets, NoLatents()) for numbers in batch.sizes.tolist()]
    mirrored = (resized[0] - corner[0] - bucket[0], corner[1])
    expected = {(*size[::-1], top, left, *bucket[::-1]) for left, top in (corner, mirrored)}
    assert set(map(tuple, whole)) == expected
    assert batches_of(datasets, NoLatents())[0].sizes.dtype == torch.int64


def coordinates(width, height):
    """Return pixels whose red is their column and whose green is their row."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.arange(width)
    pixels[..., 1] = np.arange(height)[:, None]
    return pixels


@pytest.fixture
def folder(tmp_path):
    """Return a folder of pictures that tell where each pixel came from; one is stored turned."""
    for width, height in [(151, 90), (90, 151), (64, 64), (201, 70)]:
        Image.fromarray(coordinates(width, height)).save(tmp_path / f"{width}.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(np.rot90(coordinates(120, 200))).save(tmp_path / "turned.png", exif=exif)
    return tmp_path


SIZES = {"151": (151, 90), "90": (90, 151), "64": (64, 64), "201": (201, 70), "turned": (120, 200)}
WAYS = {
    "centre": ({}, {}),
    "mirrored": ({}, {"flip_aug": True}),
    "anywhere": ({}, {"random_crop": True, "flip_aug": True}),
    "windows without buckets": ({"enable_bucket": False}, {"random_crop": True, "flip_aug": True}),
}


@pytest.mark.parametrize(("dataset", "subset"), WAYS.values(), ids=WAYS)
def test_the_corner_is_that_of_the_pixels(folder, dataset, subset):
    """Nothing is resized here, so the first pixel of a draw says which one of the picture it is."""
    options = {"resolution": (64, 64)} if dataset else {"resolution": (256, 256), "bucket_no_upscale": True}
    draws = draws_of(batches_of(datasets_of(folder, subset=subset | {"num_repeats": 6}, **options | dataset)))
    corners, mirrored_ones = set(), 0
    for stem, (width, height) in SIZES.items():
        for (*original, top, left, high, wide), pixels in draws[str(folder / f"{stem}.png")]:
            column, row = (pixels[:2, 0, 0] + 1).mul(127.5).round().int().tolist()
            mirrored = bool(pixels[0, 0, 0] > pixels[0, 0, 1])
            assert original == [height, width]
            assert [high, wide] == list(pixels.shape[1:])
            assert (left, top) == (width - 1 - column if mirrored else column, row)
            corners.add((stem, left, top))
            mirrored_ones += mirrored
    assert bool(mirrored_ones) == bool(subset.get("flip_aug"))
    assert len(corners) > len(SIZES) or not subset


def test_the_corner_of_a_crop_round_a_face_is_in_the_resized_picture(tmp_path):
    Image.fromarray(coordinates(240, 250)).save(tmp_path / "a_150_120_30_30.png")
    datasets = datasets_of(
        tmp_path, enable_bucket=False, subset={"face_crop_aug_range": (2.5, 4.0), "num_repeats": 6, "flip_aug": True}
    )
    (draws,) = draws_of(batches_of(datasets)).values()
    scales = set()
    for (*original, top, left, high, wide), pixels in draws:
        columns, rows = (pixels[0].mean(0) + 1) * 127.5, (pixels[1].mean(1) + 1) * 127.5
        scale = 59 / float((columns[61] - columns[2]).abs())
        column = float(columns[1] if columns[0] < columns[-1] else 239 - columns[1])
        assert (original, high, wide) == ([250, 240], 64, 64)
        assert (column + 0.5) * scale - 0.5 == pytest.approx(left + 1, abs=2)
        assert (float(rows[1]) + 0.5) * scale - 0.5 == pytest.approx(top + 1, abs=2)
        scales.add(round(scale, 1))
    assert len(scales) > 1


def test_cached_latents_are_told_like_pixels(folder):
    datasets = datasets_of(folder, subset={"flip_aug": True, "num_repeats": 3}, min_bucket_reso=64)
    cache = build_cache(datasets, MeanEncoder(), batch_size=2, on_disk=False)
    for live, cached in zip(batches_of(datasets), batches_of(datasets, cache), strict=True):
        assert torch.equal(live.sizes, cached.sizes)


def test_the_order_of_a_batch_changes_nothing(folder):
    datasets = datasets_of(folder, batch_size=5, subset={"random_crop": True}, enable_bucket=False)
    maker = BatchMaker(datasets, TaskMaker(3, 100, 1.0, None))
    (request,) = RunPlan(datasets, 3, 1, 1).requests(1)
    alone = [maker[BatchRequest(1, 0, (sample,))].sizes for sample in request.samples]
    assert torch.equal(maker[request].sizes, torch.cat(alone))
    turned = maker[request._replace(samples=request.samples[::-1])]
    assert torch.equal(turned.sizes.flip(0), torch.cat(alone))


def test_held_out_pictures_are_told_without_chance(folder):
    subset = {"validation_split": 0.8, "random_crop": True, "flip_aug": True}
    (dataset,) = datasets_of(folder, subset=subset, enable_bucket=False)
    assert len(dataset.held_out) == 4
    for batch in batches_of([dataset.validation]):
        for name, (*original, top, left, high, wide) in zip(batch.names, batch.sizes.tolist(), strict=True):
            (record,) = (record for record in dataset.held_out if str(record.path) == name)
            width, height = record.placement.resized
            assert original == list(record.size[::-1])
            assert (left, top, wide, high) == ((width - 64) // 2, (height - 64) // 2, 64, 64)


def test_training_tells_the_sizes_in_full_precision(model_store, tmp_path, monkeypatch):
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    Image.fromarray(np.zeros((96, 1533, 3), dtype=np.uint8)).save(tmp_path / "wide.png")
    told, forward = [], UNet2DConditionModel.forward

    def recorded(self, *args, **more):
        told.append(more["added_cond_kwargs"]["time_ids"])
        return forward(self, *args, **more)

    monkeypatch.setattr(UNet2DConditionModel, "forward", recorded)
    folder = tmp_path / "train" / "1_x"
    folder.mkdir(parents=True)
    (tmp_path / "wide.png").rename(folder / "wide.png")
    base = model_store("sdxl")[1]["safetensors"]
    train(base, folder.parent, tmp_path / "out", mixed_precision="bf16", max_train_steps=1, network_dim=1)
    assert [ids.dtype for ids in told] == [torch.float32]
    assert told[0][0, :2].tolist() == [96, 1533]  # in bfloat16 the latter would be 1536
