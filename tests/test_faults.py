"""All that is wrong with the files of a run is told at once; what is not used of them, or beside them, is told, too."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms
from runs import NEEDED

from library.config.dataset import DatasetConfig, DatasetOptions, SubsetOptions
from library.config.train import parse_train_config
from library.data.listing import files_of, folders_in
from library.data.picture_kinds import changes_colours, losses_of
from library.data.records import build_datasets, load_datasets
from library.errors import Problems, UserError

NOISE = np.random.default_rng(0).integers(0, 255, (400, 400, 4), dtype=np.uint8)


def picture(path: Path, width: int = 64, height: int = 64, mode: str = "RGB", **more: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.resize(NOISE, (height, width, 4))
    Image.fromarray(pixels).convert(mode).save(path, **more)
    return path


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def build(*subsets: SubsetOptions, masked_loss: bool = False):
    config = DatasetConfig(options=DatasetOptions(resolution=(64, 64)), subsets=subsets)
    return build_datasets([config], latents_cached=False, masked_loss=masked_loss)


def refusal(*subsets: SubsetOptions, masked_loss: bool = False) -> list[str]:
    with pytest.raises(UserError) as caught:
        build(*subsets, masked_loss=masked_loss)
    return str(caught.value).splitlines()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the warnings about the files of a run."""
    return [record.getMessage() for record in caplog.records if record.name == "library.data.faults"]


# ---- mistakes -----------------------------------------------------------------------------------------------


def test_pictures_with_any_fault_are_in_one_list(tmp_path):
    (tmp_path / "0.png").touch()
    (tmp_path / "1.jpg").write_text("<html>404</html>", encoding="utf-8")
    picture(tmp_path / "2.png", 1, 80)
    picture(tmp_path / "3.png", 3000, 20)
    halve(picture(tmp_path / "4.jpg", 400, 400))
    picture(tmp_path / "good.png")
    lines = refusal(SubsetOptions(image_dir=tmp_path, class_tokens="x"))
    assert lines[:3] == [
        "3 of 6 pictures cannot be read; mend or remove them:",
        f"  {tmp_path / '0.png'}: the file is empty",
        f"  {tmp_path / '1.jpg'}: not a picture that can be read",
    ]
    assert lines[3].startswith(f"  {tmp_path / '4.jpg'}: image file is truncated")
    assert lines[4:] == [
        "1 pictures have a side of less than 8 pixels; remove them:",
        f"  {tmp_path / '2.png'}: 1x80",
        "1 pictures are too long and narrow; crop or remove them:",
        f"  {tmp_path / '3.png'}: 3000x20",
    ]


def test_faults_of_all_subsets_come_together(tmp_path):
    def subset(name: str, **values: Any) -> SubsetOptions:
        return SubsetOptions(image_dir=tmp_path / name, caption_extension=".txt", **values)

    picture(tmp_path / "captions" / "a.png")
    (tmp_path / "captions" / "a.txt").write_bytes(b"caf\xe9")
    halve(picture(tmp_path / "cut" / "b.jpg", 400, 400))
    picture(tmp_path / "listed" / "c.png")
    lines = [{"image_path": "c"}, {"image_path": "gone"}, {"image_path": 3}, {"image_path": "c.png", "tags": 5}]
    file = tmp_path / "m.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n{", encoding="utf-8")
    for name in ("d.png", "e.png"):
        picture(tmp_path / "masked" / name)
    picture(tmp_path / "masks" / "d.png", 64, 200)
    found = refusal(
        subset("absent"),
        subset("captions"),
        subset("cut"),
        subset("listed", metadata_file=file),
        subset("masked", conditioning_data_dir=tmp_path / "masks"),
        masked_loss=True,
    )
    kinds = [line for line in found if not line.startswith("  ")]
    assert kinds == [
        f"image_dir {tmp_path / 'absent'} does not exist",
        "1 caption files are not UTF-8 text; save them as UTF-8:",
        f'2 lines of metadata_file {file} must be objects with a text as "image_path":',
        f"1 entries of metadata_file {file} must have texts as caption and tags:",
        f"1 of 2 pictures of {file} are not there; they are looked for in {tmp_path / 'listed'}:",
        f"1 of 2 pictures have no mask of their name in conditioning_data_dir {tmp_path / 'masks'}:",
        "1 masks have another aspect ratio than their picture:",
        "1 of 6 pictures cannot be read; mend or remove them:",
    ]
    assert len(found) == len(kinds) + 8


def test_of_hundreds_the_first_are_named(tmp_path):
    for index in range(300):
        (tmp_path / f"{index:03}.png").touch()
    lines = refusal(SubsetOptions(image_dir=tmp_path))
    assert lines[0] == "300 of 300 pictures cannot be read; mend or remove them (the first 20 of them):"
    assert lines[1:] == [f"  {tmp_path / f'{index:03}.png'}: the file is empty" for index in range(20)]


# ---- what is lost of a picture ------------------------------------------------------------------------------


def exchanged_profile() -> bytes:
    """Return a colour profile in which red and green have changed places."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = [(bytes(profile[132 + 12 * i :][:4]), 132 + 12 * i) for i in range(int.from_bytes(profile[128:132], "big"))]
    red, green = (dict(tags)[name] for name in (b"rXYZ", b"gXYZ"))
    profile[red + 4 : red + 12], profile[green + 4 : green + 12] = (
        profile[green + 4 : green + 12],
        profile[red + 4 : red + 12],
    )
    return bytes(profile)


def deep_png(path: Path, colours: int) -> None:
    """Write a PNG of 64 x 64 pixels with 16 bits in gray (0) or RGB (2)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes(64 * (1 + 64 * 2 * (3 if colours else 1))))
    header = struct.pack(">IIBBBBB", 64, 64, 16, colours, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def make_kinds(folder: Path) -> dict[str, set[str]]:
    """Write pictures of all kinds; return kind -> names."""
    frames = [Image.fromarray(NOISE[:64, index * 64 : index * 64 + 64, :3]) for index in range(3)]
    for name, kind in (("moving.webp", "WEBP"), ("moving.png", "PNG"), ("gif.png", "GIF")):
        frames[0].save(folder / name, kind, save_all=True, append_images=frames[1:])
    picture(folder / "cmyk.jpg", mode="CMYK")
    picture(folder / "wide.png", icc_profile=exchanged_profile())
    picture(folder / "wide gray.png", mode="L", icc_profile=exchanged_profile())
    picture(folder / "srgb.jpg", icc_profile=SRGB)
    picture(folder / "broken profile.png", icc_profile=b"nothing")
    deep_png(folder / "gray16.png", 0)
    deep_png(folder / "rgb16.png", 2)
    picture(folder / "palette.png", mode="P", transparency=3)
    picture(folder / "rgba.webp", mode="RGBA")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(folder / "turned.jpg", exif=exif)
    return {
        "frames": {"moving.webp", "moving.png", "gif.png"},
        "CMYK": {"cmyk.jpg"},
        "profile": {"wide.png"},
        "depth": {"gray16.png", "rgb16.png"},
        "alpha": {"palette.png", "rgba.webp"},
    }


def test_what_is_lost_of_pictures_is_told_with_their_names(tmp_path, caplog):
    kinds = make_kinds(tmp_path)
    found: dict[str, set[str]] = {}
    for path in tmp_path.iterdir():
        with Image.open(path) as opened:
            for loss in losses_of(opened):
                found.setdefault(loss, set()).add(path.name)
    assert found == kinds
    build(SubsetOptions(image_dir=tmp_path, class_tokens="x"))
    lines = warnings(caplog)
    assert len(lines) == len(kinds)
    for names in kinds.values():
        assert sum(line.startswith(f"{len(names)} pictures") and all(n in line for n in names) for line in lines) == 1
    caplog.clear()
    build(SubsetOptions(image_dir=tmp_path, class_tokens="x", alpha_mask=True))
    assert len(warnings(caplog)) == len(kinds) - 1
    assert "transparent" not in caplog.text


@pytest.mark.parametrize("content", [b'{"a": ', '{"a": {"caption": "赤い花"}}'.encode("cp932"), b"[]"])
def test_pictures_are_not_called_unused_if_what_lists_them_cannot_be_read(tmp_path, caplog, content):
    file, other = tmp_path / "m.json", tmp_path / "n.json"
    file.write_bytes(content)
    other.write_text('{"b": {"caption": "b"}}', encoding="utf-8")
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    subsets = [SubsetOptions(image_dir=tmp_path, metadata_file=path) for path in (file, other)]
    assert len(refusal(*subsets)) == 1
    assert warnings(caplog) == []
    build(subsets[1])
    assert "1 pictures are in no metadata file and are not used: a.png" in warnings(caplog)[0]


def test_without_colour_management_no_profile_is_judged(monkeypatch):
    def absent(*given: object, **named: object) -> None:
        raise ImportError("no littlecms")

    profile = exchanged_profile() + b"\0"  # which no test has asked about before
    monkeypatch.setattr(ImageCms, "profileToProfile", absent)
    assert not changes_colours(profile, "RGB")


# ---- what lies beside the pictures --------------------------------------------------------------------------


def load(tmp_path: Path, *words: object):
    problems = Problems()
    config = parse_train_config([*NEEDED, "--resolution=64", "--max_train_steps=1", *map(str, words)], problems)
    problems.raise_if_any()
    return load_datasets(config)


def told(tmp_path: Path, caplog: pytest.LogCaptureFixture, *words: object) -> list[str]:
    load(tmp_path, *words)
    return warnings(caplog)


def test_other_formats_and_sub_folders_are_told(tmp_path, caplog):
    folder = tmp_path / "train" / "1_x"
    for name in ("a.png", "b.gif", "c.TIFF", "deep/d.png", "deep/deeper/e.png"):
        picture(folder / name, mode="P" if name.endswith("gif") else "RGB")
    assert told(tmp_path, caplog, "--train_data_dir", folder.parent) == [
        f"{folder}: 2 pictures are of formats that are not read (.png, .jpg, .jpeg, .webp, .bmp, .avif, .jxl are): "
        "b.gif, c.TIFF",
        f"{folder}: 1 pictures in its sub-folders are not used, for these are not searched: deep/d.png",
    ]


def test_a_folder_whose_pictures_are_all_too_deep_is_told(tmp_path, caplog):
    picture(tmp_path / "train" / "1_x" / "a.png")
    picture(tmp_path / "train" / "1_y" / "deep" / "b.png")
    lines = told(tmp_path, caplog, "--train_data_dir", tmp_path / "train")
    assert f"{tmp_path / 'train' / '1_y'} has no pictures; it is skipped" in lines
    assert any(line.endswith("not searched: deep/b.png") for line in lines)


REGULARISATION: dict[str, tuple[str, str]] = {
    "directly": ("reg/a.png", "but 1 pictures directly in it (a.png): move them to such a sub-folder"),
    "one level too deep": ("reg/x/1_dog/a.png", "but {reg}/x has: --reg_data_dir {reg}/x"),
    "without a number": ("reg/dog/a.png", "but {reg}/dog has 1 pictures: rename it to 10_dog"),
    "nothing": ("reg/x/y/z/a.png", ": put the pictures into such a sub-folder"),
}


@pytest.mark.parametrize("case", REGULARISATION.values(), ids=REGULARISATION.keys())
def test_a_run_without_its_regularisation_says_so(tmp_path, caplog, case):
    place, hint = case
    reg = tmp_path / "reg"
    picture(tmp_path / "train" / "1_x" / "a.png")
    picture(tmp_path / place)
    lines = told(tmp_path, caplog, "--train_data_dir", tmp_path / "train", "--reg_data_dir", reg)
    (line,) = [line for line in lines if line.startswith(f"--reg_data_dir {reg} has no sub-folder named like 10_name")]
    assert hint.format(reg=reg) in line
    assert line.endswith("; the training goes on without regularisation")


def test_a_numbered_folder_is_to_be_named_by_the_one_above(tmp_path, caplog):
    folder = picture(tmp_path / "train" / "10_x" / "a.png").parent
    with pytest.raises(UserError, match="has no sub-folder") as caught:
        load(tmp_path, "--train_data_dir", folder)
    assert str(caught.value).endswith(f": name the folder above it, --train_data_dir {folder.parent}")
    picture(tmp_path / "train" / "loose.png")
    (line,) = told(tmp_path, caplog, "--train_data_dir", folder.parent)
    assert "1 pictures directly in it are not used: loose.png; move them to a sub-folder" in line


def test_empty_regularisation_of_a_dataset_file_is_told(tmp_path, caplog):
    picture(tmp_path / "x" / "a.png")
    (tmp_path / "reg").mkdir()
    build(
        SubsetOptions(image_dir=tmp_path / "x", class_tokens="x"),
        SubsetOptions(image_dir=tmp_path / "reg", is_reg=True, class_tokens="x"),
    )
    (line,) = warnings(caplog)
    assert (
        line
        == f"{tmp_path / 'reg'} has no pictures; it is skipped, and the training goes on without regularisation by it"
    )


def test_masks_that_no_picture_has_are_told_over_all_subsets(tmp_path, caplog):
    masks = tmp_path / "x" / "masks"  # beside the pictures, and still not taken for forgotten ones
    for name in ("x/a.png", "y/b.png", "x/masks/a.png", "x/masks/b.png", "x/masks/b.jpg", "x/masks/c.png"):
        picture(tmp_path / name)
    subsets = [
        SubsetOptions(image_dir=tmp_path / name, class_tokens="x", conditioning_data_dir=masks) for name in ("x", "y")
    ]
    build(*subsets, masked_loss=True)
    assert warnings(caplog) == [
        f"{masks}: 1 masks are of no picture of the run: c.png",
        f"{masks}: 1 masks go unused, for another has the same name: b.jpg",
    ]


def test_folders_that_cannot_be_looked_into_are_passed_over(tmp_path):
    assert files_of(tmp_path / "absent") == []
    assert folders_in(tmp_path / "absent") == []
