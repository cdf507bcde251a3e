"""tools/resize_images_to_resolution.py: damage, mistakes and stopping, and nothing lost."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from resizing import names, noise, run, smooth
from scripts import ROOT, python
from tensors import opened

from library.data import images
from library.data.resizing import work
from library.data.resizing.picture import OutputFormat, read_picture
from library.errors import UserError
from library.files import PICTURE_SUFFIXES
from tools import resize_images_to_resolution as tool

SCRIPT = ROOT / "tools" / "resize_images_to_resolution.py"

# ---- what goes wrong ----------------------------------------------------------------------------------------


def test_damaged_files_are_told_at_the_end_and_the_rest_is_done(folders, caplog):
    source, destination = folders
    for suffix in (".jpg", ".png", ".webp"):
        Image.fromarray(noise(200, 150)).save(source / f"good{suffix[1:]}{suffix}")
        whole = (source / f"good{suffix[1:]}{suffix}").read_bytes()
        (source / f"cut{suffix[1:]}{suffix}").write_bytes(whole[: len(whole) // 2])
    (source / "empty.png").touch()
    (source / "text.jpg").write_text("no picture", encoding="utf-8")
    (source / "cutjpg.txt").write_text("caption", encoding="utf-8")
    (source / "link.png").symlink_to(source / "nowhere.png")
    assert run(folders, "--max_resolution", "64x64", "--copy_associated_files") == 1
    good = [f"good{kind}{end}" for kind in ("jpg", "png", "webp") for end in (f".{kind}", "+64x64.jpg")]
    assert names(destination) == sorted([*good, "cutjpg.txt"])
    for name in ("cutjpg.jpg", "cutpng.png", "cutwebp.webp", "empty.png", "text.jpg", "link.png"):
        assert f"{source / name} was left out: " in caplog.text


@given(st.integers(0, 2**32 - 1), st.sampled_from(["JPEG", "PNG", "WEBP", "BMP"]))
@settings(max_examples=60, deadline=None)
def test_whatever_damage_there_is_a_picture_is_read_or_told(tmp_path_factory, seed, format):
    path = tmp_path_factory.getbasetemp() / f"damaged{seed}.{format.lower()}"
    buffer = io.BytesIO()
    Image.fromarray(smooth(40, 30)).save(buffer, format)
    rng, data = np.random.default_rng(seed), bytearray(buffer.getvalue())
    for place in rng.integers(0, len(data), 4):
        data[place] = rng.integers(256)
    path.write_bytes(data[: rng.integers(1, len(data) + 1)] if seed % 2 else data)
    try:
        assert read_picture(path).pixels.dtype == np.uint8
    except images.UnreadablePictureError as error:
        assert str(error)
    path.unlink()


def test_a_picture_that_the_cut_would_leave_nothing_of_is_told(folders, caplog):
    Image.fromarray(noise(400, 20)).save(folders[0] / "thin.png")
    Image.fromarray(noise(90, 80)).save(folders[0] / "a.png")
    assert run(folders, "--max_resolution", "64x64", "--divisible_by", "32") == 1
    assert names(folders[1]) == ["a+64x64.jpg", "a.png"]
    assert "thin.png was left out: at 64x64 it is 286x14, too narrow for --divisible_by 32" in caplog.text


def refused(folders, *words):
    before = names(folders[1]) if folders[1].exists() else None
    with pytest.raises(UserError) as error:
        run(folders, *words)
    assert (names(folders[1]) if folders[1].exists() else None) == before
    assert "\n" not in str(error.value)
    return str(error.value)


def test_existing_files_are_refused_left_or_replaced_as_asked(folders):
    source, destination = folders
    Image.fromarray(smooth(100, 80)).save(source / "a.png")
    assert run(folders, "--max_resolution", "32x32") == 0
    (destination / "a+32x32.jpg").write_bytes(b"mine")
    assert "a+32x32.jpg" in refused(folders, "--max_resolution", "32x32,64x64")
    assert run(folders, "--max_resolution", "32x32,64x64", "--skip_existing") == 0
    assert (destination / "a+32x32.jpg").read_bytes() == b"mine"
    assert (destination / "a+64x64.jpg").exists()
    assert run(folders, "--max_resolution", "32x32,64x64", "--overwrite") == 0
    assert opened(destination / "a+32x32.jpg").size == (35, 28)
    assert "leave one out" in refused(folders, "--skip_existing", "--overwrite")


def test_skip_existing_makes_anew_what_a_power_cut_emptied(folders):
    Image.fromarray(smooth(100, 80)).save(folders[0] / "a.png")
    folders[1].mkdir()
    (folders[1] / "a+32x32.jpg").touch()
    assert run(folders, "--max_resolution", "32x32", "--skip_existing") == 0
    assert opened(folders[1] / "a+32x32.jpg").size == (35, 28)


def test_two_sources_of_one_name_are_refused(folders):
    for name in ("a.png", "a.jpg", "b.png"):
        Image.fromarray(smooth(100, 80)).save(folders[0] / name)
    message = refused(folders, "--max_resolution", "32x32")
    assert f"{folders[0] / 'a.jpg'} and {folders[0] / 'a.png'} would both be written to a+32x32.jpg" in message
    (folders[0] / "a.jpg").rename(folders[0] / "b+32x32.jpg")
    assert "b+32x32.jpg" in refused(folders, "--max_resolution", "32x32")


def test_folders_within_one_another_are_refused(folders, tmp_path):
    source, _ = folders
    Image.fromarray(smooth(10, 8)).save(source / "a.png")
    (tmp_path / "link").symlink_to(source)
    for destination in (
        source,
        source / "out",
        tmp_path,
        tmp_path / "link",
        tmp_path / "link" / "x",
        source / ".." / "src",
    ):
        with pytest.raises(UserError, match="must be two folders"):
            run((source, destination))
    assert names(source) == ["a.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max_resolution", "512"], "--max_resolution must be sizes such as 512x512,256x256, got '512'"),
        (["--max_resolution", "512X512"], "got '512X512'"),
        (["--max_resolution", "0x64"], "got '0x64'"),
        (["--max_resolution", "64x64,64x64"], "64x64 is given twice"),
        (["--divisible_by", "0"], "--divisible_by must be at least 1, got 0"),
        (["--interpolation", "lanczos"], "--interpolation must be one of area, cubic, lanczos4"),
        (["more"], "unexpected argument 'more'"),
        ([], "has no pictures"),
    ],
)
def test_bad_input_is_told_before_any_work(folders, words, message):
    assert message in refused(folders, *words)


def test_folders_that_are_none_are_told(folders, tmp_path):
    file = tmp_path / "file"
    file.touch()
    for arguments, message in (
        ([], "the following arguments are required: src_img_folder, dst_img_folder"),
        ([str(tmp_path / "nowhere"), "x"], "src_img_folder: .*nowhere does not exist"),
        ([str(folders[0]), str(file)], "dst_img_folder: .*file is no folder"),
    ):
        with pytest.raises(UserError, match=message):
            tool.main(arguments)


def test_a_full_disk_stops_the_run_and_leaves_nothing_half_written(folders, monkeypatch):
    Image.fromarray(smooth(100, 80)).save(folders[0] / "a.png")

    def full(self, image, profile, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(OutputFormat, "write", full)
    with pytest.raises(OSError, match="No space left on device; what was written before is whole"):
        run(folders)
    assert names(folders[1]) == []


def test_the_gate_holds_back_what_would_not_fit():
    gate = work.MemoryGate(100 * work.BYTES_PER_PIXEL)
    with gate.holding((10, 6)):
        assert gate.free == 40 * work.BYTES_PER_PIXEL
    with gate.holding((1000, 1000)):  # alone
        assert gate.free == 0
    assert gate.free == gate.most


def test_all_is_done_with_less_memory_than_two_pictures_need(folders, monkeypatch):
    for index in range(6):
        Image.fromarray(smooth(100, 80)).save(folders[0] / f"{index}.png")
    monkeypatch.setattr(work, "MOST_BYTES", 100 * 100 * work.BYTES_PER_PIXEL)
    assert run(folders, "--max_resolution", "32x32", "--num_workers", "3") == 0
    assert len(names(folders[1])) == 12


# ---- as users start it --------------------------------------------------------------------------------------


def test_the_command_line_of_sd_scripts_from_another_folder(folders, tmp_path):
    source, destination = folders
    for name in ("写真 1.png", "img[2].jpg"):
        Image.fromarray(noise(300, 200)).save(source / name)
        (source / name).with_suffix(".txt").write_text("説明", encoding="utf-8")
    words = ["--max_resolution", "128x128,96x96,64x64", "--save_as_png", "--copy_associated_files"]
    words += ["--divisible_by", "8", "--interpolation", "lanczos4", "src", "dst"]
    done = python(SCRIPT, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = "dst: 2 pictures and their captions as they are, 2 in 128x128, 2 in 96x96, 2 in 64x64, 6 files that belong to copies"
    assert told in done.stderr
    assert len(names(destination)) == 2 + 2 + 6 + 6
    again = python(SCRIPT, *words, cwd=tmp_path)
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_killed_run_leaves_whole_files_and_goes_on(folders):
    source, destination = folders
    picture = Image.fromarray(noise(1500, 1000))
    for index in range(12):
        picture.save(source / f"{index}.jpg")
    command = [sys.executable, str(SCRIPT), str(source), str(destination), "--save_as_png", "--num_workers", "1"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while not list(destination.glob("*.png")):
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    written = [path for path in destination.iterdir() if path.suffix in PICTURE_SUFFIXES]
    assert 0 < len(written) < 12 * 5
    for path in written:
        opened(path)
    assert run(folders, "--save_as_png", "--skip_existing") == 0
    assert len(names(destination)) == 12 * 5


def test_help_does_without_torch_and_opencv():
    code = "import sys; from tools import resize_images_to_resolution; sys.exit({'torch', 'cv2'} & set(sys.modules) != set())"
    assert python("-c", code, cwd=ROOT).returncode == 0
