"""What is remembered of pictures: always what the files say, whatever becomes of them and of the index."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import NEEDED
from scripts import ROOT

from library.config.train import parse_train_config
from library.data import images, picture_index
from library.data.images import Header
from library.data.picture_index import DEFAULT_INDEX, INDEX_FILE, PictureIndex
from library.data.records import ImageRecord, load_datasets
from library.errors import Problems
from library.files import file_sha256


def save(path: Path, size: tuple[int, int] = (16, 24), seed: int = 0, mode: str = "RGB") -> str:
    """Write a picture of noise, all of one size and mode with the same number of bytes; return its path."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], len(mode)), dtype=np.uint8)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path, "BMP" if mode == "RGB" else "PNG")
    return str(path)


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """Let files count as settled at once; the tests would have to wait else."""
    monkeypatch.setattr(picture_index, "SETTLED", 0)


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    files = [save(tmp_path / "x" / f"{number}.bmp", (16, 8 + number), number) for number in range(5)]
    return [*files, save(tmp_path / "x" / "ä'\udce4.png", (9, 9), mode="RGBA")]


def facts(files: list[str], index: PictureIndex = DEFAULT_INDEX):
    """Return all facts about pictures that can be read."""
    headers, bad = index.headers(files)
    assert bad == index.damaged(files) == {}
    return headers, index.digests(files)


def truth(files: list[str]):
    paths = list(map(Path, files))
    headers = {file: images.read_header(path) for file, path in zip(files, paths, strict=True)}
    return headers, {file: file_sha256(path) for file, path in zip(files, paths, strict=True)}


def forbid_reading(monkeypatch):
    def refuse(path, *args, **more):
        raise AssertionError(f"{path} is opened")

    monkeypatch.setattr(images, "_open", refuse)
    monkeypatch.setattr(Path, "open", refuse)


def test_pictures_that_have_not_changed_are_not_opened_again(pictures, monkeypatch):
    true = truth(pictures)
    assert facts(pictures) == true
    forbid_reading(monkeypatch)
    assert facts(pictures) == true
    by_path = DEFAULT_INDEX.headers([Path(pictures[0])])
    assert by_path == ({Path(pictures[0]): Header((16, 8), frozenset())}, {})


def test_the_index_is_found_from_the_folder_itself(pictures, monkeypatch):
    facts(pictures)
    true = truth(pictures)[1][pictures[0]]
    monkeypatch.chdir(Path(pictures[0]).parent)
    forbid_reading(monkeypatch)
    assert DEFAULT_INDEX.digests(["0.bmp"]) == {"0.bmp": true}


def overwrite(path: Path):
    kept = path.stat()
    save(path, seed=9)
    os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))


def replace(path: Path):
    kept = path.stat()
    other = Path(save(path.with_name("other"), seed=9))
    os.utime(other, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    other.replace(path)


def grow_old(path: Path):
    save(path, seed=9)
    os.utime(path, (1e9, 1e9))


def swap(path: Path):
    other = path.with_name("1.bmp")
    path.rename(path.with_name("kept"))
    other.rename(path)
    path.with_name("kept").rename(other)


CHANGES = {
    "other pixels of the same size and time": overwrite,
    "another file of the same size and time": replace,
    "two files swapped": swap,
    "another size": lambda path: save(path, (32, 8), 9),
    "an older file": grow_old,
}


@pytest.mark.skipif(os.name == "nt", reason="Windows tells no time of the last change of anything about a file")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_picture_that_is_replaced_is_read_again(tmp_path, change):
    files = [save(tmp_path / "x" / f"{number}.bmp", seed=number) for number in range(2)]
    before = facts(files)
    time.sleep(0.02)  # the clock of a file system is slow
    change(Path(files[0]))
    assert facts(files) == truth(files) != before
    assert facts(files) == truth(files)


@pytest.mark.parametrize("copy", [shutil.copy2, shutil.copy])
def test_a_copied_folder_and_one_with_other_pictures_under_the_index_of_before_are_read(pictures, tmp_path, copy):
    facts(pictures)
    copied = shutil.copytree(tmp_path / "x", tmp_path / "y", copy_function=copy)
    files = [str(copied / Path(file).name) for file in pictures]
    assert facts(files) == truth(files)
    other = [save(tmp_path / "z" / Path(file).name, seed=7) for file in pictures]  # as if a backup were laid over it
    shutil.copy2(tmp_path / "x" / INDEX_FILE, tmp_path / "z" / INDEX_FILE)
    assert facts(other) == truth(other)


def test_what_is_not_checked_is_taken_as_it_was_and_a_full_check_reads_all(pictures):
    before = facts(pictures)
    for number, file in enumerate(pictures):
        save(Path(file), (32, 32), number + 50)
    new = save(Path(pictures[0]).with_name("new.bmp"))
    unchecked = facts([*pictures, new], PictureIndex("none"))
    assert [of.pop(new) for of in unchecked] == [of[new] for of in truth([new])]
    assert unchecked == before
    assert facts(pictures, PictureIndex("all")) == truth(pictures)
    assert facts(pictures, PictureIndex("none")) == truth(pictures)  # the full check is remembered


def test_a_picture_that_has_just_changed_is_not_remembered(pictures, monkeypatch):
    monkeypatch.setattr(picture_index, "SETTLED", 10**12)
    true = facts(pictures)
    assert not Path(pictures[0]).with_name(INDEX_FILE).exists()
    assert true == facts(pictures)


def test_damaged_pictures_are_told_every_time(pictures):
    damaged = Path(pictures[5])
    damaged.write_bytes(damaged.read_bytes()[:-60])  # the header is there, and not all pixels
    for _ in range(2):
        assert DEFAULT_INDEX.headers(pictures)[0][pictures[5]].size == (9, 9)
        assert list(DEFAULT_INDEX.damaged(pictures)) == [pictures[5]]
    with pytest.raises(FileNotFoundError):
        DEFAULT_INDEX.digests([*pictures, str(damaged.with_name("gone.png"))])


def test_a_damaged_index_never_gives_a_wrong_fact(pictures):
    file = Path(pictures[0]).with_name(INDEX_FILE)
    true = facts(pictures)
    whole = file.read_bytes()
    rng, remembered = random.Random(0), 0
    for _ in range(60):
        data = bytearray(whole[: rng.choice([len(whole), rng.randrange(len(whole))])])
        for position in rng.choices(range(len(data)), k=rng.choice([1, 5, 200])) if data else ():
            data[position] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
        assert facts(pictures) == true
        remembered += len(recalled(file))
    assert remembered  # it was made again, or survived


def recalled(file: Path) -> list[tuple[object, ...]]:
    """Return the rows of an index that can be read, else none."""
    try:
        index = sqlite3.connect(file)
        assert index.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return index.execute("SELECT kind, name FROM facts").fetchall()
    except (sqlite3.Error, AssertionError):
        return []
    finally:
        index.close()


def foreign(file: Path):
    with sqlite3.connect(file) as index:
        index.execute("CREATE TABLE facts (mine)")
    index.close()


UNUSABLE = {
    "a database of another program": foreign,
    "nothing can be written": lambda file: file.mkdir(),
}


@pytest.mark.parametrize("make", UNUSABLE.values(), ids=UNUSABLE.keys())
def test_an_index_that_cannot_be_used_is_left_alone_and_told_once(pictures, caplog, make):
    file = Path(pictures[0]).with_name(INDEX_FILE)
    make(file)
    before = file.read_bytes() if file.is_file() else None
    with caplog.at_level(logging.INFO):
        DEFAULT_INDEX.headers(pictures)
    (line,) = caplog.messages
    assert line.startswith(f"nothing is remembered of the pictures in {file.parent}: ")
    assert facts(pictures) == truth(pictures)
    assert before is None or file.read_bytes() == before


def test_without_sqlite_everything_is_read(pictures, caplog, monkeypatch):
    other = save(Path(pictures[0]).parents[1] / "y" / "a.bmp")
    monkeypatch.setitem(sys.modules, "sqlite3", None)
    with caplog.at_level(logging.INFO):
        assert DEFAULT_INDEX.digests([*pictures, other]) == truth([*pictures, other])[1]
    assert "and 1 more folders: import of sqlite3 halted" in caplog.text


def test_an_index_that_cannot_be_removed_is_not_used(pictures, caplog, monkeypatch):
    Path(pictures[0]).with_name(INDEX_FILE).write_bytes(b"no database" * 100)

    def refuse(path, **more):
        raise PermissionError("in use")

    monkeypatch.setattr(Path, "unlink", refuse)
    with caplog.at_level(logging.INFO):
        assert DEFAULT_INDEX.digests(pictures) == truth(pictures)[1]
    assert "is damaged (file is not a database); it is made anew" in caplog.text
    assert "in use" in caplog.text


def test_an_index_of_another_version_is_made_anew(pictures, monkeypatch):
    monkeypatch.setattr(picture_index, "VERSION", 77)
    facts(pictures)
    monkeypatch.undo()
    monkeypatch.setattr(picture_index, "SETTLED", 0)
    assert facts(pictures) == truth(pictures)
    forbid_reading(monkeypatch)
    facts(pictures)


PROCESS = """
import sys
sys.path.insert(0, sys.argv[1])
from library.data import picture_index
picture_index.SETTLED, picture_index.WRITTEN_AT_ONCE = 0, 3
files = sys.argv[3:]
sys.stdin.readline()
for _ in range(int(sys.argv[2])):
    for kind in ("headers", "digests", "damaged"):
        getattr(picture_index.PictureIndex("all"), kind)(files)
"""


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    files = [save(tmp_path / "x" / f"{number:02}.bmp", seed=number) for number in range(40)]
    halves = (files[:30], files[10:], files)  # the third is killed
    argv = [sys.executable, "-c", PROCESS, str(ROOT)]
    started = [
        subprocess.Popen([*argv, str(times), *half], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for half, times in zip(halves, (3, 3, 1000), strict=True)
    ]
    for process in started:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in started[:2]:
        assert process.communicate(timeout=120)[1] == ""
        assert process.returncode == 0
    started[2].kill()
    started[2].communicate(timeout=60)
    assert facts(files) == truth(files)
    assert len(recalled(tmp_path / "x" / INDEX_FILE)) == 3 * len(files)


# ---- the options of a run -----------------------------------------------------------------------------------


def sizes(folder: Path, *words: str) -> dict[str, tuple[int, int]]:
    problems = Problems()
    argv = [*NEEDED, "--train_data_dir", str(folder), "--caption_extension=.txt", "--resolution=64", *words]
    config = parse_train_config(argv, problems)
    problems.raise_if_any()
    (dataset,) = load_datasets(config)
    return {record.path.name: record.size for record in dataset.records}


def test_the_options_say_what_is_believed_and_the_index_is_no_file_of_the_data(tmp_path, caplog):
    folder = tmp_path / "3_x"
    for name in ("a", "b"):
        save(folder / f"{name}.bmp", (64, 64))
        (folder / f"{name}.txt").write_text("a caption", encoding="utf-8")
    old = {"a.bmp": (64, 64), "b.bmp": (64, 64)}
    assert sizes(tmp_path) == old
    assert (folder / INDEX_FILE).exists()
    save(folder / "b.bmp", (64, 48))
    assert sizes(tmp_path, "--skip_cache_check") == old
    assert sizes(tmp_path, "--check_pictures") == sizes(tmp_path) == old | {"b.bmp": (64, 48)}
    save(folder / "b.bmp", (48, 64))
    assert sizes(tmp_path, "--check_pictures", "--skip_cache_check") == old | {"b.bmp": (48, 64)}
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert [line for line in said if "learning_rate" not in line] == [
        "--skip_cache_check is not used: --check_pictures wins over it"
    ]


def test_records_of_pictures_have_what_they_have_in_common_once(tmp_path):
    folder = tmp_path / "1_x"
    for number in range(3):
        save(folder / f"{number}.bmp", (64, 64))
    problems = Problems()
    config = parse_train_config([*NEEDED, "--train_data_dir", str(tmp_path), "--resolution=64"], problems)
    (dataset,) = load_datasets(config)
    first, *others = dataset.records
    for record in others:
        for name in ("size", "caption", "subset", "placement", "tags"):
            assert getattr(record, name) is getattr(first, name)
    assert not hasattr(first, "__dict__")
    assert isinstance(first, ImageRecord)


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE facts SET text = CAST(text AS BLOB)",
        "UPDATE facts SET name = CAST(name AS TEXT)",
        "DROP TABLE facts",
        "ALTER TABLE facts DROP COLUMN checksum",
    ],
)
def test_an_index_of_another_shape_is_made_anew(pictures, damage, caplog):
    expected = DEFAULT_INDEX.digests(pictures)
    index = Path(pictures[0]).with_name(INDEX_FILE)
    with contextlib.closing(sqlite3.connect(index)) as opened, opened:
        opened.execute(damage)
    assert DEFAULT_INDEX.digests(pictures) == expected
    assert "it is made anew" in caplog.text
    caplog.clear()
    assert DEFAULT_INDEX.digests(pictures) == expected
    assert "it is made anew" not in caplog.text
