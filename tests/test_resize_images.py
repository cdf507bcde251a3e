"""tools/resize_images_to_resolution.py: sizes by a written-out formula, means in float64, kinds of pictures."""

from __future__ import annotations

import logging
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from resizing import names, noise, run, smooth
from tensors import opened

from library.data import images
from library.data.resizing import picture as pictures
from library.data.resizing.picture import read_picture

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SIDES = st.integers(1, 3000)


def pixels(path):
    return np.asarray(opened(path))


def cover(large, small):
    """Return the share (small, large) that each of `large` equal parts of a line has in each of `small` ones."""
    edges = np.arange(small + 1) * large / small
    starts = np.arange(large)
    overlap = np.minimum(edges[1:, None], starts + 1) - np.maximum(edges[:-1, None], starts)
    return np.clip(overlap, 0, None) * small / large


def block_mean(array, size):
    """Return the mean of the area under each pixel of the result, float64 (H, W, C)."""
    return np.einsum(
        "yY,xX,YXc->yxc", cover(array.shape[0], size[1]), cover(array.shape[1], size[0]), array, optimize=True
    )


# ---- sizes --------------------------------------------------------------------------------------------------


@given(SIDES, SIDES, st.integers(1, 600), st.integers(1, 600))
@settings(max_examples=200, deadline=None)
def test_sizes_are_the_formula_rounded_down_and_never_larger(width, height, w, h):
    size = pictures.reduced_size((width, height), w * h)
    if width * height <= w * h:
        assert size == (width, height)
        return
    assert size[0] <= width
    assert size[1] <= height
    assert math.prod(size) <= w * h
    if 1 in size:  # the other side fills the area, or keeps the aspect ratio if that is less
        return
    for side, exact_square in zip(
        size, (Fraction(width * w * h, height), Fraction(height * w * h, width)), strict=True
    ):
        assert side**2 <= exact_square
        assert exact_square < (side + 1) ** 2
    scale = math.sqrt(w * h / (width * height))
    assert all(
        abs(side - max(1, number * scale)) <= 1 + 1e-9 for side, number in zip(size, (width, height), strict=True)
    )


def test_the_sizes_of_the_document():
    assert pictures.reduced_size((1000, 600), 384 * 384) == (495, 297)
    assert pictures.reduced_size((600, 1000), 384 * 384) == (297, 495)
    assert pictures.reduced_size((1536, 1536), 512 * 512) == (512, 512)


@pytest.mark.parametrize(
    ("size", "area", "reduced"),
    [
        ((100_000, 1), 64 * 64, (4096, 1)),
        ((3, 50_000), 100, (1, 100)),
        ((65_535, 2), 96 * 96, (9216, 1)),
        ((40_000, 3), 180, (180, 1)),
        ((900, 2), 1, (1, 1)),
    ],
)
def test_the_area_holds_at_extreme_ratios(size, area, reduced):
    assert pictures.reduced_size(size, area) == reduced
    assert pictures.reduced_size(size[::-1], area) == reduced[::-1]


@given(SIDES, SIDES, st.integers(1, 64))
@settings(max_examples=100, deadline=None)
def test_cuts_take_the_middle_and_leave_multiples(width, height, divisor):
    frame = pictures.middle_frame((width, height), 512 * 512, divisor)
    for side, start, length in zip(frame.resized, frame.corner, frame.size, strict=True):
        assert length % divisor == 0
        assert side - length < divisor
        assert start == (side - length) // 2


# ---- what is written ----------------------------------------------------------------------------------------


def test_three_sizes_make_four_files_and_the_picture_is_kept_byte_for_byte(folders):
    source, destination = folders
    Image.fromarray(noise(300, 200)).save(source / "photo.png")
    assert run(folders, "--max_resolution", "128x128,96x96,64x64") == 0
    assert names(destination) == ["photo+128x128.jpg", "photo+64x64.jpg", "photo+96x96.jpg", "photo.png"]
    assert (destination / "photo.png").read_bytes() == (source / "photo.png").read_bytes()
    for side in (128, 96, 64):
        scale = math.sqrt(side * side / (300 * 200))
        assert opened(destination / f"photo+{side}x{side}.jpg").size == (int(300 * scale), int(200 * scale))
    assert names(source) == ["photo.png"]


def test_the_default_sizes(folders):
    Image.fromarray(smooth(700, 500)).save(folders[0] / "a.jpg")
    assert run(folders) == 0
    assert names(folders[1]) == sorted(["a.jpg", *(f"a+{side}x{side}.jpg" for side in (512, 384, 256, 128))])


def test_each_size_is_made_from_the_picture_in_whatever_order(folders, tmp_path):
    source, destination = folders
    Image.fromarray(noise(301, 203)).save(source / "a.png")
    assert run(folders, "--max_resolution", "128x128,64x64", "--save_as_png") == 0
    other = tmp_path / "other"
    assert run((source, other), "--max_resolution", "64x64,128x128", "--save_as_png") == 0
    for name in names(destination):
        assert (destination / name).read_bytes() == (other / name).read_bytes()
    found = pixels(destination / "a+64x64.png")
    expected = block_mean(noise(301, 203).astype(float), found.shape[1::-1])
    assert np.abs(found - expected).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("size", [(123, 89), (40, 31), (200, 100), (50, 25), (7, 3), (1, 1)])
@pytest.mark.parametrize("channels", [0, 3, 4])
def test_area_is_the_mean_of_what_a_pixel_covers(size, channels):
    array = noise(200, 100, channels)
    found = pictures.area_mean(array, size)
    assert found.dtype == np.uint8
    expected = block_mean(array.reshape(100, 200, -1).astype(float), size)
    assert np.abs(found.reshape(expected.shape) - expected).max() <= 0.5 + 1e-3


@given(st.integers(1, 120), st.integers(1, 120), st.integers(1, 120), st.integers(1, 120))
@settings(max_examples=60, deadline=None)
def test_area_is_that_of_opencv_to_one_level(width, height, w, h):
    import cv2

    size = min(w, width), min(h, height)
    array = noise(width, height)
    expected = cv2.resize(array, size, interpolation=cv2.INTER_AREA).reshape(size[1], size[0], 3)
    assert np.abs(pictures.area_mean(array, size).astype(int) - expected).max() <= 1


def test_interpolations_are_those_of_their_names(folders):
    import cv2

    array = noise(150, 100)
    Image.fromarray(array).save(folders[0] / "a.png")
    flags = {"cubic": cv2.INTER_CUBIC, "lanczos4": cv2.INTER_LANCZOS4, "linear": cv2.INTER_LINEAR}
    for name, flag in (flags | {"nearest": cv2.INTER_NEAREST_EXACT}).items():
        assert run(folders, "--max_resolution=64x64", "--save_as_png", "--overwrite", "--interpolation", name) == 0
        found = pixels(folders[1] / "a+64x64.png")
        assert (found == cv2.resize(array, found.shape[1::-1], interpolation=flag)).all()
    assert run(folders, "--max_resolution=64x64", "--save_as_png", "--overwrite", "--interpolation=box") == 0
    box = Image.fromarray(array).resize(found.shape[1::-1], Image.Resampling.BOX)
    assert (pixels(folders[1] / "a+64x64.png") == np.asarray(box)).all()


def test_pictures_are_never_enlarged(folders, caplog):
    caplog.set_level(logging.INFO)
    Image.fromarray(noise(60, 40)).save(folders[0] / "small.png")
    Image.fromarray(smooth(60, 40)).save(folders[0] / "other.jpg", quality=80)
    assert run(folders, "--max_resolution", "64x64,32x32") == 0
    assert opened(folders[1] / "small+64x64.jpg").size == (60, 40)
    assert opened(folders[1] / "small+32x32.jpg").size == (39, 26)
    # The same pixels are not compressed a second time.
    assert (folders[1] / "other+64x64.jpg").read_bytes() == (folders[0] / "other.jpg").read_bytes()
    assert "2 of these copies no smaller" in caplog.text


def test_skip_small_leaves_out_copies_that_are_not_smaller_and_their_captions(folders):
    Image.fromarray(noise(60, 40)).save(folders[0] / "small.png")
    (folders[0] / "small.txt").write_text("a", encoding="utf-8")
    assert run(folders, "--max_resolution", "64x64,32x32", "--skip_small", "--copy_associated_files") == 0
    assert names(folders[1]) == ["small+32x32.jpg", "small+32x32.txt", "small.png", "small.txt"]


def test_divisible_by_cuts_the_middle_out(folders):
    array = noise(100, 70)
    Image.fromarray(array).save(folders[0] / "a.png")
    assert run(folders, "--max_resolution", "512x512", "--save_as_png", "--divisible_by", "32") == 0
    assert (pixels(folders[1] / "a+512x512.png") == array[3:67, 2:98]).all()


def test_jpeg_is_of_quality_100_and_half_chroma_unless_asked(folders):
    Image.fromarray(smooth(100, 80)).save(folders[0] / "a.png")
    for words, factors in ((), (2, 2)), (["--full_chroma"], (1, 1)):
        assert run(folders, "--max_resolution=32x32", "--overwrite", *words) == 0
        file = opened(folders[1] / "a+32x32.jpg")
        assert isinstance(file, JpegImageFile)
        assert {value for table in file.quantization.values() for value in table} == {1}
        assert file.layer[0][1:3] == factors


def test_captions_and_other_files_go_along(folders):
    source, destination = folders
    for name in ("img[1].png", "a.JPG", "sub folder/猫.webp"):
        (source / name).parent.mkdir(exist_ok=True)
        Image.fromarray(smooth(80, 60)).save(source / name)
    texts = ["img[1].txt", "img1.txt", "a.txt", "a.caption", "a.b.txt", "a.npz", "a.safetensors", "notes.md", "LICENSE"]
    for name in [*texts, "sub folder/猫.txt", "sub folder/meta.json"]:
        (source / name).write_text(name, encoding="utf-8")
    assert run(folders, "--max_resolution", "32x32", "--copy_associated_files") == 0
    expected = {path: path for path in names(source)}
    expected |= {"img[1]+32x32.txt": "img[1].txt", "a+32x32.txt": "a.txt", "a+32x32.caption": "a.caption"}
    expected |= {"sub folder/猫+32x32.txt": "sub folder/猫.txt"}
    pictures = {"img[1]+32x32.jpg", "a+32x32.jpg", "sub folder/猫+32x32.jpg"}
    assert set(names(destination)) == set(expected) | pictures
    for path, origin in expected.items():
        assert (destination / path).read_bytes() == (source / origin).read_bytes()


def test_without_the_option_captions_are_copied_once(folders):
    Image.fromarray(smooth(80, 60)).save(folders[0] / "a.png")
    (folders[0] / "a.txt").write_text("a", encoding="utf-8")
    assert run(folders, "--max_resolution", "32x32") == 0
    assert names(folders[1]) == ["a+32x32.jpg", "a.png", "a.txt"]


# ---- kinds of pictures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_copies_are_upright(folders, orientation, suffix):
    exif = Image.Exif()
    exif[images.ORIENTATION_TAG] = orientation
    Image.fromarray(smooth(120, 80)).save(folders[0] / f"a{suffix}", exif=exif)
    assert run(folders, "--max_resolution", "40x40,512x512", "--save_as_png") == 0
    upright = np.asarray(ImageOps.exif_transpose(opened(folders[0] / f"a{suffix}"))).astype(float)
    small = pixels(folders[1] / "a+40x40.png")
    assert small.shape[:2] == ((48, 32) if orientation >= 5 else (32, 48))
    assert np.abs(small - block_mean(upright, small.shape[1::-1])).max() <= 1
    large = opened(folders[1] / "a+512x512.png")
    assert (np.asarray(ImageOps.exif_transpose(large)) == upright).all()


@pytest.mark.parametrize("interpolation", sorted(pictures.RESIZERS))
def test_what_lies_beneath_transparency_does_not_shine_through(folders, interpolation):
    array = np.zeros((90, 90, 4), np.uint8)
    array[:, :] = (255, 0, 0, 0)  # red, but unseen
    array[:, 40:] = (0, 0, 255, 255)
    Image.fromarray(array).save(folders[0] / "a.png")
    assert run(folders, "--max_resolution", "32x32", "--save_as_png", "--interpolation", interpolation) == 0
    found = pixels(folders[1] / "a+32x32.png")
    assert found.shape == (32, 32, 4)
    assert (found[found[..., 3] > 4][:, :3] == (0, 0, 255)).all()
    assert abs(found[..., 3].mean() - array[..., 3].mean()) < 3


def test_jpeg_lays_transparency_on_white_and_says_so(folders, caplog):
    array = np.zeros((64, 64, 4), np.uint8)
    array[:, 32:] = (0, 0, 0, 255)
    Image.fromarray(array).save(folders[0] / "a.png")
    palette = Image.new("P", (64, 64), 1)
    palette.putpalette([0, 0, 0, 0, 200, 0])
    palette.save(folders[0] / "b.png", transparency=1)
    assert run(folders, "--max_resolution", "32x32") == 0
    found = pixels(folders[1] / "a+32x32.jpg")
    assert found[:, :14].min() > 250
    assert found[:, 18:].max() < 5
    assert pixels(folders[1] / "b+32x32.jpg").min() > 250
    assert "--save_as_png keeps it: 2 (" in caplog.text


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_colour_profiles_go_along(folders, suffix):
    for mode in ("RGB", "L"):  # of a gray picture too, which is made RGB for it
        Image.fromarray(smooth(80, 60)).convert(mode).save(folders[0] / f"{mode}{suffix}", icc_profile=SRGB)
    assert run(folders, "--max_resolution", "32x32", *(["--save_as_png"] if suffix == ".png" else [])) == 0
    for mode in ("RGB", "L"):
        copy = opened(folders[1] / f"{mode}+32x32{suffix}")
        assert copy.info["icc_profile"] == SRGB
        assert copy.mode == "RGB"


def test_a_profile_of_another_kind_of_pixels_is_left_out_and_told(folders, caplog):
    gray = SRGB[:16] + b"GRAY" + SRGB[20:]
    Image.fromarray(smooth(80, 60)).save(folders[0] / "a.png", icc_profile=gray)
    assert run(folders, "--max_resolution", "32x32") == 0
    assert "icc_profile" not in opened(folders[1] / "a+32x32.jpg").info
    assert "copies are without the colour profile, which is not for their picture's kind of pixels: 1 (" in caplog.text


def test_cmyk_and_gray_of_16_bits_are_made_what_they_look_like(folders, caplog):
    array = smooth(80, 60)
    Image.fromarray(array).convert("CMYK").save(folders[0] / "cmyk.jpg", quality=100)
    Image.fromarray(array[..., 0].astype(np.uint16) * 257).save(folders[0] / "deep.png")
    assert run(folders, "--max_resolution", "512x512", "--save_as_png") == 0
    assert np.abs(pixels(folders[1] / "cmyk+512x512.png").astype(int) - array).mean() < 3
    assert (pixels(folders[1] / "deep+512x512.png") == array[..., 0]).all()
    assert "CMYK pictures are in sRGB: 1 (" in caplog.text
    assert "more than 8 bits" in caplog.text


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "P", "I;16", "CMYK"])
@pytest.mark.parametrize("words", [[], ["--save_as_png"]])
def test_pictures_of_every_mode_are_written(folders, mode, words):
    suffix = ".jpg" if mode == "CMYK" else ".png"
    picture = Image.fromarray(smooth(50, 40))
    deep = Image.fromarray(smooth(50, 40)[..., 0].astype(np.uint16) * 257)
    (deep if mode == "I;16" else picture.convert(mode)).save(folders[0] / f"a{suffix}")
    assert run(folders, "--max_resolution", "20x20", *words) == 0
    assert opened(next(folders[1].glob("a+*"))).size == (22, 17)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp"])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "P"])
def test_pixels_are_those_of_pillow(tmp_path, suffix, mode):
    if (suffix, mode) in {(".jpg", "LA"), (".jpg", "RGBA"), (".jpg", "P"), (".bmp", "LA"), (".bmp", "RGBA")}:
        pytest.skip("not in this format")
    picture = Image.fromarray(noise(37, 23)).convert(mode)
    path = tmp_path / f"a{suffix}"
    picture.save(path)
    with Image.open(path) as file:
        wanted = {"1": "L", "P": "RGB"}.get(file.mode, file.mode)
        assert (read_picture(path).pixels == np.asarray(file.convert(wanted))).all()


def test_pixels_of_odd_png_files_are_those_of_pillow(tmp_path):
    import cv2
    from PIL import PngImagePlugin

    gamma = PngImagePlugin.PngInfo()
    gamma.add(b"gAMA", (220000).to_bytes(4, "big"))
    array, path = noise(37, 23), tmp_path / "a.png"
    frames = [Image.fromarray(noise(37, 23, seed=seed)) for seed in (1, 2)]
    for write, mode in (
        (lambda: Image.fromarray(array).save(path, pnginfo=gamma), "RGB"),
        (lambda: Image.fromarray(array).save(path, transparency=tuple(map(int, array[0, 0]))), "RGBA"),
        (lambda: Image.fromarray(array[..., 0]).save(path, transparency=7), "LA"),
        (lambda: cv2.imwrite(str(path), noise(37, 23).astype(np.uint16) * 251), "RGB"),
        (lambda: cv2.imwrite(str(path), noise(37, 23, 4).astype(np.uint16) * 251), "RGBA"),
        (lambda: Image.fromarray(array[..., 0] & 3).save(path, bits=2), "L"),
        (lambda: frames[0].save(path, save_all=True, append_images=frames[1:]), "RGB"),
    ):
        write()
        with Image.open(path) as file:
            assert (read_picture(path).pixels == np.asarray(file.convert(mode))).all()


def test_a_moving_picture_gives_its_first_frame_and_is_told(folders, caplog):
    frames = [Image.fromarray(noise(40, 30, seed=seed)) for seed in range(2)]
    frames[0].save(folders[0] / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert run(folders, "--max_resolution", "64x64", "--save_as_png") == 0
    assert (pixels(folders[1] / "a+64x64.png")[..., :3] == noise(40, 30)).all()
    assert "show the first frame: 1 (" in caplog.text
