"""The scripts of finetune/: what they write is read by training as the same captions, and nothing is lost on the way."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scripts import ROOT, help_of, python

from finetune import clean_captions_and_tags, merge_captions_to_metadata, merge_dd_tags_to_metadata
from finetune.clean_captions_and_tags import CAPTION_REPLACEMENTS, clean_caption, clean_tags
from library.config.dataset import SubsetOptions
from library.data.faults import Faults, Notes
from library.data.sources import list_subset
from library.errors import UserError

TEXTS = {"赤い 家.png": "a red house", "b.v2.JPG": "a dog\n\n  a cat  ", "c [1].webp": "", "d_10_20_5_6.png": "a face"}


def picture(path, text=None, extension=".caption"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)
    if text is not None:
        path.with_suffix(extension).write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path):
    for name, text in TEXTS.items():
        picture(tmp_path / "絵" / name, text)
    return tmp_path / "絵"


def run(script, *argv, cwd):
    done = python(ROOT / "finetune" / script, *argv, cwd=cwd, timeout=60)
    return done.returncode, done.stderr


def captions(*argv):
    return merge_captions_to_metadata.main([str(word) for word in argv])


def tags(*argv):
    return merge_dd_tags_to_metadata.main([str(word) for word in argv])


def clean(*argv):
    return clean_captions_and_tags.main([str(word) for word in argv])


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def as_trained(folder, metadata=None, **options):
    """Return picture -> caption, as training reads them."""
    subset = SubsetOptions(image_dir=folder, metadata_file=metadata, **options)
    return {Path(listed.file).name: "\n".join(listed.caption) for listed in list_subset(subset, Faults(), Notes())}


# ---- merging ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_path", [False, True])
@pytest.mark.parametrize("wildcards", [False, True])
def test_training_reads_from_the_metadata_what_it_reads_from_the_files(folder, tmp_path, by_path, wildcards):
    out = tmp_path / "meta.json"
    argv = ["絵", "meta.json", *(["--full_path"] if by_path else [])]
    code, errors = run("merge_captions_to_metadata.py", *argv, cwd=tmp_path)
    assert (code, "4 of 4 pictures have caption" in errors) == (0, True), errors
    found = as_trained(folder if not by_path else None, out, enable_wildcard=wildcards)
    assert found == as_trained(folder, enable_wildcard=wildcards)
    assert "赤い 家" in out.read_text(encoding="utf-8")
    assert all(Path(name).is_absolute() == by_path for name in read(out))


def test_captions_and_tags_meet_in_one_file(folder, tmp_path):
    for name in TEXTS:
        (folder / name).with_suffix(".txt").write_text("1girl, 青い_髪", encoding="utf-8")
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    assert captions(folder, first) == 0
    before = first.read_bytes()
    code, errors = run("merge_dd_tags_to_metadata.py", folder, second, "--in_json", first, "--debug", cwd=tmp_path)
    assert code == 0
    assert "c [1]: 1girl, 青い_髪" in errors
    assert first.read_bytes() == before
    assert as_trained(folder, second)["赤い 家.png"] == "a red house,1girl, 青い_髪"
    assert {name: set(entry) for name, entry in read(second).items()} == {
        Path(name).stem: {"caption", "tags"} for name in TEXTS
    }


def test_what_a_metadata_file_has_already_is_kept(folder, tmp_path):
    out = tmp_path / "meta.json"
    old = {"赤い 家": {"caption": "old", "train_resolution": [512, 384]}, "elsewhere": {"tags": "x"}}
    out.write_text(json.dumps(old), encoding="utf-8")
    assert captions(folder, out) == 0
    found = read(out)
    assert found["赤い 家"] == {"caption": "a red house", "train_resolution": [512, 384]}
    assert found["elsewhere"] == {"tags": "x"}
    assert len(found) == 5
    # An entry under the name with extension is that picture's, too.
    out.write_text(json.dumps({"b.v2.JPG": {"tags": "x"}}), encoding="utf-8")
    assert captions(folder, out) == 0
    assert len(read(out)) == len(as_trained(folder, out)) == 4
    assert read(out)["b.v2.JPG"] == {"tags": "x", "caption": "a dog\na cat"}
    # With --in_json, that file's entries are kept in place of those.
    (tmp_path / "other.json").write_text("\ufeff{}", encoding="utf-8")
    assert captions(folder, out, "--in_json", tmp_path / "other.json") == 0
    assert len(read(out)) == 4


def test_texts_of_another_extension_are_told_as_in_training(tmp_path, caplog):
    for name in ("x/a.png", "x/b.png", "y/a.png", "y/c.png"):
        picture(tmp_path / "p" / name, "red" if name != "y/c.png" else None, ".txt")
    out = tmp_path / "meta.json"
    words = (tmp_path / "p", out, "--recursive", "--full_path")
    with pytest.raises(UserError, match="none of the 4 pictures"):
        captions(*words)
    said = (
        "4 pictures have no .caption file (a.png, b.png, a.png, c.png): they are skipped; 3 of them have a .txt file: "
    )
    assert f"{said}--caption_extension .txt" in caplog.messages
    caplog.clear()
    (tmp_path / "p" / "y" / "c.caption").write_text("blue", encoding="utf-8")
    assert captions(*words) == 0
    assert "3 of them have a .txt file: rename these to .caption" in caplog.text
    caplog.clear()
    assert captions(*words, "--caption_extension", ".txt") == 0
    assert "1 of them have a .caption file: rename these to .txt" in caplog.text
    assert {values["caption"] for values in read(out).values()} == {"red", "blue"}


def test_missing_and_damaged_texts_are_counted_and_the_rest_is_done(folder, tmp_path, caplog):
    picture(folder / "no text.png")
    out = tmp_path / "meta.json"
    out.write_text(json.dumps({"no text": {"caption": "as it was"}}), encoding="utf-8")
    assert captions(folder, out) == 0
    assert "1 pictures have no .caption file (no text.png)" in caplog.text
    assert read(out)["no text"] == {"caption": "as it was"}
    picture(folder / "e.png").with_suffix(".caption").write_bytes("犬".encode("cp932"))
    assert captions(folder, out) == 1
    assert "e.caption is not UTF-8 text" in caplog.text
    assert len(read(out)) == 5
    before = out.read_bytes()
    with pytest.raises(UserError, match="none of the 6 pictures .* has a .txt file"):
        tags(folder, out)
    assert captions(folder, out, "--caption_extention", "caption") == 1  # both slips are forgiven
    assert out.read_bytes() == before


def test_pictures_that_a_name_cannot_tell_apart_are_refused_without_their_paths(folder, tmp_path):
    picture(folder / "赤い 家.jpg", None)
    out = tmp_path / "meta.json"
    with pytest.raises(UserError, match="赤い 家.jpg and 赤い 家.png.*--full_path"):
        captions(folder, out)
    assert not out.exists()
    assert captions(folder, out, "--full_path") == 0
    assert len(as_trained(folder, out)) == 5
    # A name that is another's with its extension leads to the wrong picture as well.
    picture(tmp_path / "two" / "a.png", "one")
    picture(tmp_path / "two" / "a.png.jpg", "two")
    with pytest.raises(UserError, match="a.png.jpg and a.png"):
        captions(tmp_path / "two", out)


def test_sub_folders_are_read_by_path(folder, tmp_path):
    picture(folder / "within" / "deep" / "b.v2.png", "deep")
    out = tmp_path / "meta.json"
    with pytest.raises(UserError, match="--recursive needs --full_path"):
        captions(folder, out, "--recursive")
    assert captions(os.path.relpath(folder), out, "--recursive", "--full_path") == 0
    assert as_trained(tmp_path, out)["b.v2.png"] == "deep"
    assert len(read(out)) == 5


def test_mistakes_are_told_and_nothing_is_written(folder, tmp_path):
    note = tmp_path / "note.txt"
    note.write_text("mine", encoding="utf-8")
    (tmp_path / "list.json").write_text("[1]", encoding="utf-8")
    (tmp_path / "bad.json").write_text('{"a": {"caption": 3}}', encoding="utf-8")
    (tmp_path / "empty").mkdir()
    for argv, message in (
        (["gone", note], "train_data_dir: gone does not exist\nout_json must be the name of a .json file, got .*note"),
        ([folder], "required: out_json"),
        ([folder, tmp_path / "o.json", "x.json"], "unexpected argument 'x.json'"),
        ([folder, tmp_path / "list.json"], "must be an object of picture names, got list"),
        ([folder, tmp_path / "o.json", "--in_json", tmp_path / "bad.json"], "'a' must have texts as caption and tags"),
        ([folder, tmp_path / "o.json", "--in_json", tmp_path / "gone.json"], "gone.json does not exist"),
        ([tmp_path / "empty", tmp_path / "o.json"], "has no pictures; --recursive"),
    ):
        with pytest.raises(UserError, match=message):
            captions(*argv)
    assert note.read_text(encoding="utf-8") == "mine"
    assert not (tmp_path / "o.json").exists()
    code, errors = run("merge_captions_to_metadata.py", "gone", "meta.json", cwd=tmp_path)
    assert (code, errors) == (2, "merge_captions_to_metadata.py: error: train_data_dir: gone does not exist\n")


@pytest.mark.skipif(os.name == "nt", reason="names there are always text")
def test_a_file_name_that_is_no_text_is_told(folder, tmp_path):
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.png")).write_bytes((folder / "赤い 家.png").read_bytes())
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.caption")).write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match="is no UTF-8 text and cannot be written"):
        captions(folder, tmp_path / "meta.json")
    assert not (tmp_path / "meta.json").exists()


# ---- cleaning -----------------------------------------------------------------------------------------------


def test_a_metadata_file_is_cleaned_and_the_rest_of_it_kept(tmp_path):
    before = {
        "a": {"tags": "1girl, long_hair, hair, ^_^, 青い_目, rating:safe", "caption": "A woman in a red dress"},
        "b": {"caption": "a ladybug", "train_resolution": [64, 64]},
        "c": {"tags": None, "caption": ""},
    }
    (tmp_path / "in.json").write_text(json.dumps(before), encoding="utf-8")
    code, errors = run("clean_captions_and_tags.py", "in.json", "out.json", "--debug", cwd=tmp_path)
    assert code == 0, errors
    assert read(tmp_path / "out.json") == before | {
        "a": {"tags": "1girl, long hair, ^_^, 青い 目", "caption": "A girl in a red dress"}
    }
    assert "青い 目" in (tmp_path / "out.json").read_text(encoding="utf-8")
    assert "a: A woman in a red dress\n  -> A girl in a red dress" in errors
    assert "2 texts of 3 pictures changed" in errors
    assert read(tmp_path / "in.json") == before
    assert clean(tmp_path / "out.json", tmp_path / "out.json") == 0  # in place
    assert len(read(tmp_path / "out.json")) == 3


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("white_shirt, shirt, t-shirt", "white shirt, t-shirt"),
        ("||_||, (o)_(o), o_o, cat_ear", "||_||, (o)_(o), o_o, cat ear"),
        ("1girl, blue eyes, red eyes", "1girl, blue eyes, red eyes"),
        ("2girls, blue eyes, red eyes, hair between eyes", "2girls, hair between eyes"),
        ("multiple girls, blonde hair, long hair", "multiple girls, blonde hair, long hair"),
        ("2girls, blonde hair, black hair, long hair", "2girls, long hair"),
        ("2boys, long hair, very long hair, red hair", "2boys, red hair"),
        ("6+girls, twin braids, single hair bun, hat", "6+girls, hat"),
        ("2girls, long sleeves, sleeveless, sleeveless dress", "2girls, sleeveless dress"),
        ("2girls, ponytail, smile", "2girls, ponytail, smile"),
        ("solo, rating:questionable", "solo"),
        ("solo,,  operating table , ", "solo, operating table"),
        ("", ""),
    ],
)
def test_rules_of_tags(before, after):
    assert clean_tags(before) == after


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a woman and two women", "a girl and two girls"),
        ("an anime woman with a sword", "a girl with a sword"),
        ("A picture of a beautiful young lady", "a girl"),
        ("Women at sea", "Girls at sea"),
        ("a ladybug, a chairwoman, a wonder-woman", "a ladybug, a chairwoman, a wonder-woman"),
        ("the woman's hat", "the girl's hat"),
        ("a person and a boy", "a person and a boy"),
        ("a girl who is wearing a hat", "a girl wearing a hat"),
    ],
)
def test_rules_of_captions(before, after):
    assert clean_caption(before, CAPTION_REPLACEMENTS) == after


WORDS = sorted(
    {word for phrase in CAPTION_REPLACEMENTS for word in phrase.split()} | {"a", "the", "dog", "犬", "ladybug"}
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join) | st.text(max_size=40))
def test_cleaning_captions_ends_and_twice_is_once(text):
    cleaned = clean_caption(text, CAPTION_REPLACEMENTS)
    assert clean_caption(cleaned, CAPTION_REPLACEMENTS) == cleaned
    assert len(cleaned) <= len(text)
    for phrase in CAPTION_REPLACEMENTS:
        assert not re.search(rf"(?<![\w-]){phrase}(?![\w-])", cleaned)


TAGS = [
    "2girls",
    "1girl",
    "long_hair",
    "short hair",
    "red hair",
    "blue eyes",
    "red_eyes",
    "shirt",
    "white shirt",
    "^_^",
]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(TAGS) | st.text(max_size=8), max_size=10).map(", ".join))
def test_cleaning_tags_twice_is_once_and_adds_nothing(text):
    cleaned = clean_tags(text)
    assert clean_tags(cleaned) == cleaned
    before = {" ".join(tag.replace("_", " ").split()) for tag in text.split(",")}
    assert {" ".join(tag.replace("_", " ").split()) for tag in cleaned.split(",")} <= before | {""}


def test_a_table_of_ones_own_takes_the_place_of_the_built_in_one(tmp_path):
    source, out = tmp_path / "in.json", tmp_path / "out.json"
    source.write_text(json.dumps({"a": {"caption": "A  woman with  a cat"}}), encoding="utf-8")
    table = tmp_path / "table.json"
    for rows, expected in (
        ({}, "A  woman with  a cat"),
        ({"Cat": "dog", "with a": "and her"}, "A woman and her dog"),
        ({"woman": "lady", "lady": "queen"}, "A queen with a cat"),
    ):
        table.write_text(json.dumps(rows), encoding="utf-8")
        assert clean(source, out, "--replacements", table) == 0
        assert read(out) == {"a": {"caption": expected}}
    before = out.read_bytes()
    for wrong, message in (
        ({"woman": "woman woman"}, "never come to an end: 'A  woman"),
        ({"woman": "lady", "lady": "woman"}, "never come to an end"),
        (["woman"], 'must be an object such as {"woman": "girl"}'),
        ({" ": "x"}, "must be an object such as"),
    ):
        table.write_text(json.dumps(wrong), encoding="utf-8")
        with pytest.raises(UserError, match=message):
            clean(source, out, "--replacements", table)
    table.write_text('{"女": "犬"}', encoding="cp932")
    with pytest.raises(UserError, match=r"--replacements: .*table.json is not UTF-8 text \(probably cp932 "):
        clean(source, out, "--replacements", table)
    with pytest.raises(
        UserError, match=r"^.*table.json is not UTF-8 text \(probably cp932 \(Shift JIS\)\): save it as"
    ):
        clean(table, out)
    with pytest.raises(UserError, match="in_json: .*gone.json does not exist\nout_json must be the name of a .json"):
        clean(tmp_path / "gone.json", tmp_path / "out.txt")
    with pytest.raises(UserError, match="unexpected argument"):
        clean("folder", source, out)
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    "script", ["merge_captions_to_metadata.py", "merge_dd_tags_to_metadata.py", "clean_captions_and_tags.py"]
)
def test_help_comes_without_torch_from_any_folder(tmp_path, script):
    assert "out_json" in help_of(f"finetune/{script}", tmp_path, "torch", "numpy")
