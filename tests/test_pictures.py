"""Pictures, the buckets they go to, and captions."""

from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from library.config.dataset import SubsetOptions
from library.data import buckets, captions, images
from library.data.buckets import Placement
from library.data.caption_files import CaptionFile, read_caption
from library.data.captions import Moment
from library.data.listing import list_pictures
from library.data.sources import caption_from
from library.errors import UserError

MOMENT = Moment(epoch=1, step=0, num_steps=100)
SIDES = st.integers(1, 20_000)


# ---- pictures -----------------------------------------------------------------------------------------------


def sample_pixels(width=40, height=24):
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([x, y, 255 - x], axis=-1).astype(np.uint8)


def test_every_mode_and_format_gives_the_same_picture(tmp_path):
    pixels = sample_pixels()
    rgb = Image.fromarray(pixels)
    rgba = rgb.convert("RGBA")
    rgba.putalpha(Image.fromarray(np.full(pixels.shape[:2], 7, np.uint8)))
    cases = {"rgb.png": rgb, "写真 1.webp": rgb, "transparent.png": rgba, "plain.bmp": rgb, "UPPER.PNG": rgb}
    for name, picture in cases.items():
        picture.save(tmp_path / name, lossless=True)  # which only WebP reads
        assert np.array_equal(images.load_picture(tmp_path / name), pixels), name
    assert [path.name for path in list_pictures(tmp_path)] == sorted(cases)


def test_gray_palette_cmyk_and_16_bit(tmp_path):
    gray = sample_pixels()[..., 0]
    Image.fromarray(gray).save(tmp_path / "gray.png")
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    for name in ("gray.png", "deep.png"):
        assert np.array_equal(images.load_picture(tmp_path / name), np.repeat(gray[..., None], 3, axis=2)), name
    flat = Image.new("RGB", (16, 16), (200, 30, 60))
    palette = flat.quantize(4)
    palette.info["transparency"] = 0
    palette.save(tmp_path / "palette.png", transparency=0)
    assert np.abs(images.load_picture(tmp_path / "palette.png").astype(int) - (200, 30, 60)).max() <= 4
    flat.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    assert np.abs(images.load_picture(tmp_path / "cmyk.jpg").astype(int) - (200, 30, 60)).max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_size_and_pixels_alike(tmp_path, orientation):
    from PIL import ImageOps

    picture = Image.fromarray(sample_pixels())
    exif = picture.getexif()
    exif[images.ORIENTATION_TAG] = orientation
    path = tmp_path / "turned.png"
    picture.save(path, exif=exif)
    pixels = images.load_picture(path)
    assert images.read_size(path) == (pixels.shape[1], pixels.shape[0])
    with Image.open(path) as stored:
        assert np.array_equal(pixels, np.asarray(ImageOps.exif_transpose(stored)))
    assert (pixels.shape[:2] == (40, 24)) == (orientation >= 5)


def test_resizing_keeps_a_gradient_and_does_nothing_at_the_same_size():
    pixels = sample_pixels(64, 48)
    assert images.resize(pixels, (64, 48)) is pixels
    for method in (None, "lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box"):
        for size in ((32, 24), (128, 96)):
            result = images.resize(pixels, size, method)
            assert result.shape == (size[1], size[0], 3)
            assert abs(result.astype(float).mean() - pixels.mean()) < 2


# ---- buckets ------------------------------------------------------------------------------------------------


def reference_buckets(resolution, low, high, step):
    """The candidates, written out from the specification."""
    area = math.prod(resolution)
    found = {(math.floor(math.sqrt(area) / step) * step,) * 2}
    w = low
    while w <= high:
        h = min(high, math.floor(math.floor(area / w) / step) * step)
        if h >= low:
            found.add((w, h))
            found.add((h, w))
        w += step
    return sorted(found)


@pytest.mark.parametrize("resolution", [(512, 512), (768, 768), (512, 768), (640, 448), (1024, 1024)])
@pytest.mark.parametrize("limits", [(256, 1024, 64), (320, 1536, 64), (256, 2048, 128)])
def test_candidates_are_those_of_the_specification(resolution, limits):
    low, high, step = limits
    ours = buckets.bucket_resolutions(resolution, shortest=low, longest=high, step=step)
    assert ours == reference_buckets(resolution, low, high, step)
    assert all(w * h <= resolution[0] * resolution[1] for w, h in ours)


def test_the_table_at_512_is_the_known_one():
    ours = buckets.bucket_resolutions((512, 512), shortest=256, longest=1024, step=64)
    narrow = [(256, 1024), (256, 960), (256, 896), (256, 832), (320, 768), (320, 704), (384, 640), (448, 576)]
    assert set(narrow) | {(512, 512)} <= set(ours)
    assert ours == sorted(ours)
    assert (320, 832) not in ours


@pytest.mark.parametrize(
    ("size", "bucket", "resized"),
    [
        ((1920, 1080), (640, 384), (683, 384)),
        ((512, 512), (512, 512), (512, 512)),
        ((640, 384), (640, 384), (640, 384)),
        ((3000, 4000), (448, 576), (448, 597)),
        ((100, 100), (512, 512), (512, 512)),
        ((5000, 200), (1024, 256), (6400, 256)),
    ],
)
def test_pictures_go_to_the_nearest_ratio_and_cover_it(size, bucket, resized):
    candidates = buckets.bucket_resolutions((512, 512), shortest=256, longest=1024, step=64)
    placed = buckets.place(size, candidates)
    errors = {candidate: abs(candidate[0] / candidate[1] - size[0] / size[1]) for candidate in candidates}
    if size not in candidates:
        assert errors[placed.bucket] == min(errors.values())
    assert placed.bucket == bucket or errors[bucket] == errors[placed.bucket]
    assert placed == Placement(bucket, resized)


@pytest.mark.parametrize(
    ("size", "bucket", "resized"),
    [
        ((400, 300), (384, 256), (400, 300)),  # small enough: only trimmed
        ((512, 512), (512, 512), (512, 512)),
        ((1000, 1000), (512, 512), (512, 512)),
        ((1920, 1080), (640, 384), (683, 384)),
        ((1080, 1920), (384, 640), (384, 683)),
        ((40, 300), (64, 448), (64, 480)),  # a side below one step is enlarged to it
        ((1, 4000), (64, 4096), (64, 256000)),
    ],
)
def test_no_upscale_never_enlarges_but_to_fill_one_step(size, bucket, resized):
    assert buckets.place_without_upscale(size, (512, 512), 64) == Placement(bucket, resized)


def test_any_size_is_covered_by_its_bucket():
    rng = random.Random(0)
    candidates = buckets.bucket_resolutions((512, 512), shortest=256, longest=1024, step=64)
    for _ in range(3000):
        size = (rng.randint(1, 4000), rng.randint(1, 4000))
        for placed in (buckets.place(size, candidates), buckets.place_without_upscale(size, (512, 512), 64)):
            assert min(placed.surplus) >= 0
            assert min(placed.bucket) >= 64


@given(st.tuples(SIDES, SIDES), st.tuples(st.integers(64, 1500), st.integers(64, 1500)), st.sampled_from((64, 128)))
@example((1150, 896), (508, 507), 64)  # 576 x 448 would be more than 508 x 507
@example((16_000, 9), (700, 333), 64)
@example((63, 5000), (512, 512), 64)
@settings(max_examples=300, deadline=None)
def test_no_bucket_has_more_area_than_the_resolution(size, resolution, step):
    assume(step * step <= math.prod(resolution))
    shortest, longest = buckets.adjusted_range(64, 2048, step)
    candidates = buckets.bucket_resolutions(resolution, shortest=shortest, longest=longest, step=step)
    for placed in (buckets.place(size, candidates), buckets.place_without_upscale(size, resolution, step)):
        assert math.prod(placed.bucket) <= math.prod(resolution)
        assert min(placed.surplus) >= 0
        assert all(side >= step and side % step == 0 for side in placed.bucket)


# ---- captions -----------------------------------------------------------------------------------------------


def options(**values):
    return SubsetOptions(image_dir=Path("x"), **values)


def sample(*texts, key=0, moment=MOMENT, **values):
    return captions.sample_caption(texts, options(**values), moment, random.Random(key))


def test_a_caption_without_rules_stays_as_it_is():
    assert sample("a,  b , c") == "a,  b , c"
    assert sample("first", "second") == "first"


def test_prefix_and_suffix_go_to_every_line():
    assert sample("cat", caption_prefix="photo of", caption_suffix="in 4k") == "photo of cat in 4k"
    samples = {sample("a", "b", key=k, caption_prefix="p", enable_wildcard=True) for k in range(30)}
    assert samples == {"p a", "p b"}


def test_shuffling_keeps_the_first_tags_and_all_of_them():
    seen = set()
    for key in range(200):
        tags = sample("one, two, a, b, c", key=key, shuffle_caption=True, keep_tokens=2).split(", ")
        assert tags[:2] == ["one", "two"]
        assert sorted(tags[2:]) == ["a", "b", "c"]
        seen.add(tuple(tags))
    assert len(seen) == 6


def test_the_separator_for_kept_tags_fixes_both_ends_and_never_shows():
    values = {"keep_tokens_separator": "|||", "shuffle_caption": True}
    for key in range(50):
        tags = sample("one, two ||| a, b, c ||| end", key=key, **values).split(", ")
        assert (tags[:2], sorted(tags[2:5]), tags[5:]) == (["one", "two"], ["a", "b", "c"], ["end"])
    assert sample("one ||| a", keep_tokens_separator="|||") == "one, a"


def test_dropping_is_at_the_rate_and_spares_kept_tags():
    samples: Counter[str] = Counter()
    for key in range(4000):
        tags = sample("keep, a, b, c", key=key, caption_tag_dropout_rate=0.25, keep_tokens=1).split(", ")
        assert tags[0] == "keep"
        samples.update(tags)
    assert all(abs(samples[tag] / 4000 - 0.75) < 0.03 for tag in "abc")
    empty = sum(sample("cat", key=key, caption_dropout_rate=0.2) == "" for key in range(4000))
    assert abs(empty / 4000 - 0.2) < 0.03


def test_every_nth_epoch_drops_all_captions():
    samples = [sample("cat", moment=Moment(epoch, 0, 1), caption_dropout_every_n_epochs=3) for epoch in range(1, 7)]
    assert samples == ["cat", "cat", "", "cat", "cat", ""]


def test_wildcards_take_one_part_and_double_braces_are_literal():
    seen = Counter(sample("a {red|blue|green} {{x}}", key=key, enable_wildcard=True) for key in range(3000))
    assert set(seen) == {"a red {x}", "a blue {x}", "a green {x}"}
    assert min(seen.values()) > 800
    assert sample("a {red|blue}") == "a {red|blue}"


def test_secondary_separator_moves_a_group_as_one():
    for key in range(30):
        text = sample("x;;;y, a, b", key=key, shuffle_caption=True, secondary_separator=";;;")
        assert "x,y" in text


def test_token_warmup_shows_more_tags_with_time():
    values = {"token_warmup_min": 1, "token_warmup_step": 10}
    counts = [len(sample("a, b, c, d, e", moment=Moment(1, step, 100), **values).split(", ")) for step in (0, 5, 9, 10)]
    assert counts == [1, 3, 4, 5]
    half = {"token_warmup_step": 0.5}
    assert sample("a, b", moment=Moment(1, 49, 100), **half) == "a"
    assert sample("a, b", moment=Moment(1, 50, 100), **half) == "a, b"


def test_caption_files_and_those_of_face_crops(tmp_path):
    picture = tmp_path / "photo_10_20_30_40.png"
    assert read_caption(picture, ".txt") == CaptionFile(None, ())
    (tmp_path / "photo.txt").write_text("\ufeff a photo \n\nsecond", encoding="utf-8")
    assert read_caption(picture, ".txt") == CaptionFile("photo.txt", ("a photo", "second"))
    (tmp_path / "photo_10_20_30_40.txt").write_text(" \n", encoding="utf-8")
    assert read_caption(picture, ".txt").lines == ()
    (tmp_path / "photo_10_20_30_40.txt").write_bytes("日本語".encode("cp932"))
    with pytest.raises(UserError, match="is not UTF-8 text"):
        read_caption(picture, ".txt")


def test_a_caption_is_the_first_line_or_with_wildcards_all_or_the_class_token(tmp_path):
    def caption(stem, **values):
        return caption_from(read_caption(tmp_path / f"{stem}.png", ".txt"), options(**values))

    (tmp_path / "a.txt").write_text("own\nlines", encoding="utf-8")
    (tmp_path / "empty.txt").touch()
    assert caption("a", class_tokens="dog") == ("own",)
    assert caption("a", enable_wildcard=True) == ("own", "lines")
    assert caption("b", class_tokens="dog") == ("dog",)
    assert caption("b") == caption("empty", class_tokens="dog") == ("",)


def test_the_tag_counts_are_those_of_all_texts():
    assert captions.tag_counts(["Cat, red", "", "red,cat ,,red"]) == {"cat": 2, "red": 3}
