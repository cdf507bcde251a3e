"""Caption files that are missing, empty, in the wrong place or in another encoding: each is told, with its remedy."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from library.config.dataset import DatasetConfig, DatasetOptions, SubsetOptions
from library.data.records import build_datasets
from library.errors import UserError
from library.text_files import UnreadableTextError, probable_encoding, read_text


def save(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        Image.new("RGB", (64, 64), (9, 99, 200)).save(folder / name)
    return folder


def build(*subsets: SubsetOptions, **more: Any):
    options = DatasetOptions(resolution=(64, 64))
    return build_datasets([DatasetConfig(options=options, subsets=subsets)], latents_cached=False, **more)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


FOUR = ("0.png", "1.png", "2.png", "3.png")
LACK = "4 of 4 pictures have no {} file and {}: 0.png, 1.png, 2.png, 3.png"
CLASS, EMPTY = "get the caption 'cls'", "an empty caption"
OTHERS: dict[str, tuple[str, str, str | None, str]] = {
    # ending of the files that are there -> the extension that is asked for, class tokens, what is said
    "text for the default": (".txt", ".caption", "cls", LACK.format(".caption", CLASS)),
    "two extensions in one": (".txt", ".txt .caption", "cls", LACK.format("'.txt .caption'", CLASS)),
    "a list of extensions": (".caption", ".txt,.caption", None, LACK.format("'.txt,.caption'", EMPTY)),
    "upper case": (".TXT", ".txt", None, LACK.format(".txt", EMPTY)),
    "behind the picture's": (".png.txt", ".txt", "cls", LACK.format(".txt", CLASS)),
    "of a tagger": (".tags", ".txt", None, LACK.format(".txt", EMPTY)),
    "in two parts": (".wd.txt", ".caption", None, LACK.format(".caption", EMPTY)),
}


@pytest.mark.parametrize("case", OTHERS.values(), ids=OTHERS.keys())
def test_caption_files_of_another_name_are_told_with_the_option_that_reads_them(tmp_path, caplog, case):
    ending, extension, tokens, said = case
    for name in save(tmp_path / "x", *FOUR).glob("*.png"):
        name.with_name(f"{name.stem}{ending}").write_text("a dog", encoding="utf-8")
    subset = SubsetOptions(image_dir=tmp_path / "x", caption_extension=extension, class_tokens=tokens)
    (dataset,) = build(subset)
    assert {record.caption for record in dataset.records} == {(tokens or "",)}
    (line,) = warnings(caplog)
    assert said in line
    (option,) = re.findall(r"4 of them have a \S+ file: --caption_extension (\S+), or caption_extension in the", line)
    (dataset,) = build(SubsetOptions(image_dir=tmp_path / "x", caption_extension=option))
    assert {record.caption for record in dataset.records} == {("a dog",)}


def test_some_without_captions_are_told_and_files_to_rename(tmp_path, caplog):
    folder = save(tmp_path / "x", *(f"{index}.png" for index in range(9)))
    (folder / "0.txt").write_text("a dog", encoding="utf-8")
    (folder / "1.caption").write_text("a cat", encoding="utf-8")
    (folder / "2.json").write_text("{}", encoding="utf-8")  # never a caption
    (folder / "3.dat").write_bytes(b"\0\1\2")
    build(SubsetOptions(image_dir=folder, caption_extension=".txt", class_tokens="cls"))
    assert warnings(caplog) == [
        f"{folder}: 8 of 9 pictures have no .txt file and get the caption 'cls': 1.png, 2.png, 3.png, 4.png, 5.png and "
        "3 more; 1 of them have a .caption file: rename these to .txt"
    ]


SEPARATED: dict[str, tuple[dict[str, Any], str, str, str]] = {
    # options, separator of the captions, how it is written on the command line, what the captions lack
    "ideographic": ({"shuffle_caption": True}, "、", "、", ","),
    "full width": ({"caption_tag_dropout_rate": 0.5}, "，", "，", ","),
    "semicolon": ({"token_warmup_step": 2.0, "keep_tokens": 1}, "; ", '";"', ","),
    "comma": ({"shuffle_caption": True, "caption_separator": "|"}, ", ", '","', "|"),
}


@pytest.mark.parametrize("case", SEPARATED.values(), ids=SEPARATED.keys())
def test_captions_that_another_separator_divides_are_told(tmp_path, caplog, case):
    options, separator, written, own = case
    rules = [name for name in options if name not in ("keep_tokens", "caption_separator")]
    text, folder = separator.join(("red", "blue")), save(tmp_path / "x", "0.png", "1.png", "2.png")
    for name in ("0", "1"):
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    (folder / "2.txt").write_text("alone", encoding="utf-8")
    subset = SubsetOptions(image_dir=folder, caption_extension=".txt", **options)
    build(subset)
    said = f"2 of 3 captions have no '{own}' but '{separator.strip()}', so that each is a single tag for {rules[0]}"
    option = f"--caption_separator {written}, or caption_separator in the dataset file, separates them"
    assert warnings(caplog) == [f"{folder}: {said}: 0.png, 1.png; {option}"]
    # Where some captions have the separator of the options, the others are to be changed.
    caplog.clear()
    (folder / "2.txt").write_text(f"a{own}b", encoding="utf-8")
    build(subset)
    assert warnings(caplog) == [f"{folder}: {said}: 0.png, 1.png; write '{own}' in these"]
    # Nothing is said where nothing divides captions, or where all are divided.
    caplog.clear()
    divided = {"caption_separator": separator.strip(), "shuffle_caption": True}
    build(SubsetOptions(image_dir=folder, caption_extension=".txt"))
    (folder / "2.txt").unlink()
    (folder / "2.png").unlink()
    build(SubsetOptions(image_dir=folder, caption_extension=".txt", **divided))
    assert warnings(caplog) == []


def test_separators_of_metadata_files_and_marks_are_told_apart(tmp_path, caplog):
    folder, file = save(tmp_path / "x", "0.png", "1.png"), tmp_path / "m.json"
    rows = {"0": {"caption": "A flower, red", "tags": "花、赤"}, "1": {"caption": "a;;;b"}}
    file.write_text(json.dumps(rows), encoding="utf-8")
    build(
        SubsetOptions(image_dir=folder, metadata_file=file, shuffle_caption=True, secondary_separator=";;;"),
    )
    (line,) = warnings(caplog)
    assert "1 of 2 captions have no ',' but '、', so that each is a single tag for shuffle_caption: 0.png;" in line


def test_a_text_in_another_encoding_is_a_caption_file_too(tmp_path, caplog):
    (save(tmp_path / "x", "0.png") / "0.txt").write_bytes("ねこ".encode("cp932"))
    build(SubsetOptions(image_dir=tmp_path / "x"))
    assert "1 of them have a .txt file: --caption_extension .txt" in caplog.text


def test_class_tokens_for_all_are_no_mistake_and_said(tmp_path, caplog):
    caplog.set_level("INFO")
    folder = save(tmp_path / "x", "0.png", "1.png")
    build(SubsetOptions(image_dir=folder, class_tokens="a dog"))
    assert warnings(caplog) == []
    assert f"{folder}: the caption of all 2 pictures is 'a dog'" in caplog.text


def test_a_folder_that_is_used_twice_is_told_once(tmp_path, caplog):
    subset = SubsetOptions(image_dir=save(tmp_path / "x", "0.png"))
    configs = [DatasetConfig(options=DatasetOptions(resolution=(side, side)), subsets=(subset,)) for side in (64, 128)]
    assert len(build_datasets(configs, latents_cached=False)) == 2
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize("tokens", [None, "cls"])
def test_empty_files_lonely_files_and_lines_that_are_not_read_are_told(tmp_path, caplog, tokens):
    folder = save(tmp_path / "x", *FOUR, "face_1_2_3_4.png")
    texts = {"0": "a\n\nb", "1": " \n", "2": "", "3": "c", "face": "of a crop", "4": "gone", "notes": "x"}
    for stem, text in texts.items():
        (folder / f"{stem}.txt").write_text(text, encoding="utf-8")
    (folder / "2.caption").write_text("a text", encoding="utf-8")
    build(SubsetOptions(image_dir=folder, caption_extension=".txt", class_tokens=tokens))
    unused = ", and not 'cls'" if tokens else ""
    assert warnings(caplog) == [
        f"{folder}: the .txt files of 2 of 5 pictures are empty, so that their caption is empty{unused}: 1.png, 2.png; "
        "1 of them have a .caption file: rename these to .txt",
        f"{folder}: the .txt files of 1 of 5 pictures have several lines, of which only the first is used: 0.png; "
        "--enable_wildcard takes one at random",
        f"{folder}: 2 .txt files belong to no picture: 4.txt, notes.txt",
    ]
    caplog.clear()
    build(SubsetOptions(image_dir=folder, caption_extension=".txt", enable_wildcard=True))
    assert "several lines" not in caplog.text


def test_a_file_belongs_to_the_picture_with_the_longest_name(tmp_path, caplog):
    folder = save(tmp_path / "x", "a.png", "a.b.png")
    (folder / "a.b.txt").write_text("of a.b", encoding="utf-8")
    (dataset,) = build(SubsetOptions(image_dir=folder, caption_extension=".txt"))
    assert [record.caption for record in dataset.records] == [("of a.b",), ("",)]
    assert warnings(caplog) == [f"{folder}: 1 of 2 pictures have no .txt file and an empty caption: a.png"]


# ---- metadata files -----------------------------------------------------------------------------------------


def metadata(tmp_path: Path, text: str, name: str = "m.json", **values: Any):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return build(SubsetOptions(image_dir=tmp_path / "x", metadata_file=tmp_path / name, **values))


def test_pictures_that_no_metadata_file_lists_are_told(tmp_path, caplog):
    folder = save(tmp_path / "x", *FOUR)
    metadata(tmp_path, json.dumps({"0": {"caption": "a"}, "1.png": {"caption": "b"}}))
    assert warnings(caplog) == [f"{folder}: 2 pictures are in no metadata file and are not used: 2.png, 3.png"]
    caplog.clear()
    (tmp_path / "n.json").write_text(json.dumps({"2": {"tags": "c"}, "3": {"tags": "d"}}), encoding="utf-8")
    subsets = [SubsetOptions(image_dir=folder, metadata_file=tmp_path / name) for name in ("m.json", "n.json")]
    build(*subsets)
    assert warnings(caplog) == []


TWICE = {
    "json": '{"0": {"caption": "a", "x": {"0": 1}}, "1": {"caption": "b"}, "0": {"caption": "c"}}',
    "jsonl": '{"image_path": "0", "caption": "a"}\n{"image_path": "1", "caption": "b"}\n'
    '{"image_path": "0", "caption": "c"}',
    "two names": '{"0": {"caption": "a"}, "1": {"caption": "b"}, "0.png": {"caption": "c"}}',
}


@pytest.mark.parametrize("kind", TWICE)
def test_a_picture_that_is_listed_twice_is_told_and_used_once(tmp_path, caplog, kind):
    save(tmp_path / "x", "0.png", "1.png")
    (dataset,) = metadata(tmp_path, TWICE[kind], "m.jsonl" if kind == "jsonl" else "m.json")
    assert [record.caption for record in dataset.records] == [("c",), ("b",)]
    name = "0.png" if kind == "two names" else "0"
    (line,) = warnings(caplog)
    assert line.endswith(f": 1 pictures are listed twice, and the last entry counts: {name}")


def test_empty_entries_with_captions_beside_them_and_further_lines_are_told(tmp_path, caplog):
    folder = save(tmp_path / "x", "0.png", "1.png", "2.png")
    (folder / "0.txt").write_text("a dog", encoding="utf-8")
    metadata(tmp_path, json.dumps({"0": {}, "1": {"caption": " ", "tags": ""}, "2": {"caption": "a\nb"}}))
    file = tmp_path / "m.json"
    assert warnings(caplog) == [
        f"{file}: 1 captions have several lines, of which only the first is used: 2.png; --enable_wildcard takes one "
        "at random",
        f"{file}: 2 of 3 pictures have neither caption nor tags: 0.png, 1.png; 1 of them have a caption file, which is "
        "not read: finetune/merge_captions_to_metadata.py takes it into the metadata file",
    ]


# ---- encodings ----------------------------------------------------------------------------------------------

ENCODED = [
    ("犬とねこ、ひらがな", "cp932", "cp932 (Shift JIS)"),
    ("1girl, 赤い家", "cp932", "cp932 (Shift JIS)"),
    ("a dog", "utf-16", "UTF-16"),
    ("犬", "utf-16", "UTF-16"),
    ("a dog, x", "utf-16-le", "UTF-16 without a byte order mark"),
    ("a dog, x", "utf-16-be", "UTF-16 without a byte order mark"),
    ("a dog", "utf-32", "UTF-32"),
    ("café, a dog", "latin-1", "Windows-1252 (Latin-1)"),
    ("élan, éclair", "latin-1", "Windows-1252 (Latin-1)"),
    ("Mädchen, grün", "cp1252", "Windows-1252 (Latin-1)"),
    ("é", "latin-1", "Windows-1252 (Latin-1)"),
    ("собака, дом у реки", "cp1251", "Windows-1251"),
    ("一隻貓, 紅色", "big5", "Big5"),
]
UNSURE = [("日本", "euc_jp"), ("一只猫", "gb2312"), ("개와 고양이", "euc_kr"), ("“quoted”", "cp1252"), ("田", "cp932")]


@pytest.mark.parametrize(("text", "codec", "name"), ENCODED)
def test_another_encoding_is_named_where_it_is_sure(tmp_path, text, codec, name):
    assert probable_encoding(text.encode(codec)) == name
    (tmp_path / "a.txt").write_bytes(text.encode(codec))
    with pytest.raises(UnreadableTextError, match=re.escape(f"a.txt is not UTF-8 text (probably {name}): save it as")):
        read_text(tmp_path / "a.txt")


@pytest.mark.parametrize(("text", "codec"), UNSURE)
def test_an_encoding_that_is_not_sure_is_not_named(text, codec):
    assert probable_encoding(text.encode(codec)) is None


def test_zero_bytes_are_no_text_and_a_mark_is_removed(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\x00\x01\x02\x03\x04")
    with pytest.raises(UnreadableTextError, match=r"is not UTF-8 text \(it has zero bytes\)"):
        read_text(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("犬", encoding="utf-8-sig")
    assert read_text(tmp_path / "a.txt") == "犬"
    with pytest.raises(UnreadableTextError, match=r"cannot be read \(.*\); mend its permissions"):
        read_text(tmp_path)


def test_all_captions_in_other_encodings_are_told_at_once(tmp_path, caplog):
    folder = save(tmp_path / "x", "a.png", "b.png", "c.png", "d.png")
    for name, text, codec in (("a", "ねこ", "cp932"), ("b", "a dog", "utf-16"), ("c", "café", "latin-1")):
        (folder / f"{name}.txt").write_bytes(text.encode(codec))
    (folder / "d.txt").write_text("a dog", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        build(SubsetOptions(image_dir=folder, caption_extension=".txt"))
    assert str(caught.value).splitlines() == [
        "3 caption files are not UTF-8 text; save them as UTF-8:",
        f"  {folder / 'a.txt'}: probably cp932 (Shift JIS)",
        f"  {folder / 'b.txt'}: probably UTF-16",
        f"  {folder / 'c.txt'}: probably Windows-1252 (Latin-1)",
    ]
    assert warnings(caplog) == []
