"""tools/show_metadata.py and tools/canny.py, as a shell sees them and against json and OpenCV."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from scripts import ROOT, help_of, python
from tensors import opened

from library.errors import UserError
from tools import canny, show_metadata

TAGS = {"1_sks dog": {"犬": 3, 'a "quoted" tag': 1}}
METADATA = {"ss_tag_frequency": json.dumps(TAGS), "ss_seed": "42", "modelspec.title": "わたしの犬", "a_list": "[1, 2]"}


def safetensors(path, metadata=None):
    save_file({"x": torch.ones(2)}, path, metadata=metadata)
    return path


def run(script, *argv, cwd):
    return python(ROOT / "tools" / script, *argv, cwd=cwd, timeout=60)


def show(*argv):
    return show_metadata.main([str(word) for word in argv])


# ---- show_metadata ------------------------------------------------------------------------------------------


def test_what_is_printed_is_what_the_file_has_sorted_and_readable(tmp_path):
    safetensors(tmp_path / "犬.safetensors", METADATA)
    done = run("show_metadata.py", "--model", "犬.safetensors", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    text = done.stdout
    assert text == json.dumps(METADATA, indent=4, sort_keys=True, ensure_ascii=False) + "\n"
    assert "わたしの犬" in text


def test_nested_values_are_shown_as_what_they_hold(tmp_path, capsys):
    more = METADATA | {"broken": "{not json", "number": "1e-4"}
    path = safetensors(tmp_path / "a.safetensors", more)
    assert show("--model", path, "--nested") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == more | {"ss_tag_frequency": TAGS, "a_list": [1, 2]}


def test_several_files_are_told_apart_and_one_without_metadata_is_named(tmp_path, capsys, caplog):
    one, two = safetensors(tmp_path / "a.safetensors", METADATA), safetensors(tmp_path / "b.safetensors", {"x": "y"})
    assert show("--model", one, two) == 0
    assert json.loads(capsys.readouterr().out) == {str(one): METADATA, str(two): {"x": "y"}}
    bare = safetensors(tmp_path / "c.safetensors")
    assert show("--model", one, bare) == 1
    assert json.loads(capsys.readouterr().out) == {str(one): METADATA}
    assert f"{bare} has no metadata" in caplog.text
    assert show("--model", bare) == 1
    assert not capsys.readouterr().out


def test_files_that_are_no_safetensors_are_refused(tmp_path):
    (tmp_path / "damaged.safetensors").write_bytes(b"\x10" * 40)
    torch.save({"x": torch.ones(1)}, tmp_path / "a.ckpt")
    with pytest.raises(UserError) as caught:
        show("--model", tmp_path / "damaged.safetensors", tmp_path / "a.ckpt", tmp_path / "gone.safetensors")
    lines = str(caught.value).splitlines()
    for line, part in zip(
        lines, ("header is damaged", "a pickle of torch, which has no metadata", "does not exist"), strict=True
    ):
        assert part in line
    with pytest.raises(UserError, match="--model is missing"):
        show()
    done = run("show_metadata.py", "--model", "damaged.safetensors", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("show_metadata.py: error: ")


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_any_text_can_be_unfolded(text):
    found = show_metadata.unfolded(text)
    assert found == text or isinstance(found, dict | list)


@settings(max_examples=50, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_unfolding_reads_what_json_wrote(value):
    assert show_metadata.unfolded(json.dumps(value)) == (value if isinstance(value, dict | list) else json.dumps(value))


@pytest.mark.parametrize("script", ["show_metadata.py", "canny.py", "merge_models.py"])
def test_help_comes_without_torch_from_any_folder(tmp_path, script):
    assert "usage" in help_of(f"tools/{script}", tmp_path, "torch", "numpy", "cv2")


def test_show_metadata_never_imports_torch(tmp_path):
    path = safetensors(tmp_path / "a.safetensors", METADATA)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tools import show_metadata\n"
    code += f"show_metadata.main(['--model', {str(path)!r}, '--nested']); sys.exit('torch' in sys.modules)"
    assert python("-c", code, timeout=60).returncode == 0


# ---- canny --------------------------------------------------------------------------------------------------


@pytest.fixture
def drawing(tmp_path):
    """Return a picture with edges of several strengths, under a name that is not ASCII."""
    pixels = np.full((60, 80, 3), 40, np.uint8)
    for index, value in enumerate((60, 120, 250)):
        pixels[10:50, 5 + 25 * index : 20 + 25 * index] = (value, value // 2, 255 - value)
    path = tmp_path / "絵 [1].png"
    Image.fromarray(pixels).save(path)
    return path


def test_edges_are_those_of_opencv(drawing, tmp_path):
    done = run("canny.py", "--input", drawing.name, "--output", "出力/線.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    edges = np.asarray(opened(tmp_path / "出力" / "線.png"))
    gray = cv2.imdecode(np.fromfile(drawing, np.uint8), cv2.IMREAD_GRAYSCALE)
    assert gray is not None
    assert (edges == cv2.Canny(gray, 32, 224)).all()
    assert set(np.unique(edges)) == {0, 255}


def test_lower_thresholds_give_more_edges(drawing, tmp_path):
    counts = []
    for high in (50, 224, 900):
        out = tmp_path / f"{high}.png"
        assert canny.main(["--input", str(drawing), "--output", str(out), "--thres1", "20", "--thres2", str(high)]) == 0
        counts.append(int((np.asarray(opened(out)) > 0).sum()))
    assert counts[0] > counts[1] > counts[2]


def test_mistakes_with_pictures_are_told(drawing, tmp_path):
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    with pytest.raises(UserError, match="gone.png does not exist\n.*must end in .png, .jpg"):
        canny.main(["--input", str(tmp_path / "gone.png"), "--output", str(tmp_path / "out.gif")])
    with pytest.raises(UserError, match="is the picture to be read"):
        canny.main(["--input", str(drawing), "--output", str(drawing)])
    with pytest.raises(UserError, match="text.png cannot be read: not a picture"):
        canny.main(["--input", str(tmp_path / "text.png"), "--output", str(tmp_path / "out.png")])
    with pytest.raises(UserError, match="--thres1 must be at least 0"):
        canny.main(["--thres1", "-1"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.png", drawing.name]
