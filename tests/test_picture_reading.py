"""The one reader of pictures as generation uses it, against Pillow; masks, and what they are in a cache."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps, features
from tensors import opened

from library.config.dataset import SubsetOptions
from library.data import images
from library.data.buckets import Placement
from library.data.images import Mask
from library.data.latent_cache import DiskCache
from library.data.records import ImageRecord
from library.errors import UserError
from library.generation.init_images import check_images, list_images, load_image

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8))
MODES = {
    ".png": ("1", "L", "LA", "P", "RGB", "RGBA"),
    ".webp": ("RGB", "RGBA"),
    ".jpg": ("L", "RGB", "CMYK"),
    ".bmp": ("RGB",),
}
KINDS = [(suffix, mode) for suffix, modes in MODES.items() for mode in modes]


def as_pillow_shows(path, mode):
    picture = ImageOps.exif_transpose(opened(path))
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    return np.asarray(picture.convert(mode))


@pytest.mark.parametrize(("suffix", "mode"), KINDS)
def test_pictures_of_8_bits_are_turned_and_laid_on_white_as_by_pillow(tmp_path, suffix, mode):
    exif = Image.Exif()
    exif[images.ORIENTATION_TAG] = 6
    path = tmp_path / f"a{suffix}"
    options: dict[str, Any] = {} if suffix == ".bmp" else {"exif": exif}
    options |= {"transparency": 3} if mode in ("P", "L") and suffix == ".png" else {}
    NOISE.convert(mode).save(path, **options)
    for wanted in ("RGB", "L"):
        assert np.array_equal(np.asarray(load_image(path, wanted)), as_pillow_shows(path, wanted))


def test_a_depth_guide_of_16_bits_keeps_its_gradient(tmp_path):
    depth = np.arange(256, dtype=np.uint8)[None].repeat(8, axis=0)
    Image.fromarray(depth.astype(np.uint16) * 257).save(tmp_path / "depth.png")
    assert np.array_equal(np.asarray(load_image(tmp_path / "depth.png", "L")), depth)
    assert np.array_equal(np.asarray(load_image(tmp_path / "depth.png")), images.load_picture(tmp_path / "depth.png"))


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_generation_reads_the_formats_of_training(tmp_path):
    NOISE.convert("RGB").save(tmp_path / "a.avif")
    NOISE.convert("RGB").save(tmp_path / "b.png")
    (tmp_path / "c.txt").touch()
    pictures = list_images("--image_path", tmp_path)
    assert [path.name for path in pictures.files] == ["a.avif", "b.png"]
    check_images("--image_path", tmp_path)
    assert load_image(pictures.files[0]).size == NOISE.size


def test_what_is_no_picture_is_told_with_the_option(tmp_path):
    (tmp_path / "empty.png").touch()
    with pytest.raises(UserError, match=r"^--mask_path: .*empty.png cannot be read: the file is empty$"):
        check_images("--mask_path", tmp_path)
    with pytest.raises(UserError, match=r"empty.png cannot be read: the file is empty$"):
        load_image(tmp_path / "empty.png")


def test_a_mask_is_one_channel_of_a_file_even_where_the_file_is_the_picture(tmp_path):
    NOISE.save(tmp_path / "a.png")
    pixels = np.asarray(NOISE)
    assert np.array_equal(Mask(str(tmp_path / "a.png"), "alpha").load(), pixels[..., 3])
    assert np.array_equal(Mask(str(tmp_path / "a.png"), "red").load(), pixels[..., 0])


@pytest.mark.parametrize(
    ("mask", "own"), [(None, ()), (Mask("a.png", "alpha"), ("alpha",)), (Mask("m.png", "red"), ("2m",))]
)
def test_fingerprints_of_entries_on_disk_stay_as_they_are(mask, own):
    placement = Placement(bucket=(64, 48), resized=(64, 51))
    record = ImageRecord("a.png", (640, 510), ("",), 1, SubsetOptions(), placement, mask=mask)
    parts = ("1", "1a", (64, 51), (0, 1), (64, 48), None, "vae float32", *own)
    expected = hashlib.sha256(repr(parts).encode()).hexdigest()
    cache = DiskCache({"a.png": "1a", "m.png": "2m"}, "vae float32")
    assert cache.identify(record).fingerprint == expected
