"""The files that gen_img_diffusers.py writes: names, sheets, the page; stopping and typing."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shutil
import sys
import urllib.parse

import numpy as np
import pytest
from drawing import HIGHRES, SIZE, same_pixels, shot
from PIL import Image
from scripts import call

import gen_img_diffusers
from library import logs
from library.config.command_line import given_options
from library.config.generation import GenerateConfig
from library.config.options import build
from library.config.retired import GENERATION
from library.errors import Problems
from library.generation import checks, image_generator

# ---- files --------------------------------------------------------------------------------------------------


def test_numbers_go_on_after_those_of_the_folder(draw):
    words = ["--prompt", "a", "--images_per_prompt", 2, "--steps", 1]
    names = [shot.path.name for _ in range(2) for shot in draw(*words)]
    assert names == ["im_000001.png", "im_000002.png", "im_000003.png", "im_000004.png"]
    both = draw(*words, *HIGHRES, "--highres_fix_save_1st", "--batch_size", 2)
    assert [shot.path.name for shot in both] == ["im_0000005.png", "im_0000006.png", "im_1000005.png", "im_1000006.png"]


def test_names_of_their_own_are_never_written_over(draw, source):
    shots = draw("--prompt", "a --f x/cat.png", "--images_per_prompt", 2, "--steps", 1)
    again = draw("--prompt", "a --f x/cat.png --d 7", "--steps", 1)
    names = [shot.path.name for shot in (*shots, *again)]
    assert sorted(names) == ["cat-1.png", "cat-2.png", "cat.png"]
    words = ["--prompt", "a", "--image_path", source, "--use_original_file_name", "--images_per_prompt", 2]
    assert [shot.path.name for shot in draw(*words)] == ["source-1.png", "source.png"]


def test_default_names_have_time_place_and_seed(model_store, tmp_path):
    words = ["--prompt", "a --d 3,3,8", *SIZE, "--steps", 1, "--batch_size", 2, "--images_per_prompt", 3]
    call(gen_img_diffusers, "--ckpt", model_store("sd1")[1]["folder"], "--outdir", tmp_path / "deep" / "er", *words)
    names = sorted(path.name for path in (tmp_path / "deep" / "er").iterdir())
    found = [re.fullmatch(r"im_\d{14}_(\d{3})_(\d+)\.png", name) for name in names]
    assert [match and match.groups() for match in found] in (
        [("000", "3"), ("000", "8"), ("001", "3")], [("000", "3"), ("001", "3"), ("000", "8")]
    )  # fmt: skip


def test_the_page_holds_every_picture_and_every_prompt(draw, tmp_path):
    prompts = ['<script>alert("1")</script> & a cat', "猫 'quoted'"]
    (tmp_path / "p.txt").write_text("\n".join(prompts) + " --n <b>", encoding="utf-8")
    shots = draw("--from_file", tmp_path / "p.txt", "--html")
    (page,) = (tmp_path / "o").glob("*.html")
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    for prompt, found in zip(prompts, shots, strict=True):
        assert html.escape(prompt) in text
        assert f'href="{found.path.name}"' in text
    assert "Negative prompt: &lt;b&gt;" in text
    encoded_pictures = re.findall(r"data:image/jpeg;base64,([^\"]+)", text)
    for index, code in enumerate(encoded_pictures):
        with Image.open(io.BytesIO(base64.b64decode(code))) as picture:
            own, other = (np.abs(np.asarray(picture) - shots[at].pixels).mean() for at in (index, 1 - index))
        assert own < other / 2
    assert "http" not in text.replace("http-equiv", "")


def test_the_page_links_to_files_in_folders_and_of_any_name(draw, tmp_path):
    (shot,) = draw("--prompt", "a --f x/two%20cats#1.png", "--html", "--steps", 1)
    (page,) = (tmp_path / "o").glob("*.html")
    (link,) = set(re.findall(r'href="([^"]+)"', page.read_text(encoding="utf-8")))
    assert page.parent / urllib.parse.unquote(link) == shot.path


def test_the_end_tells_names_seeds_and_time(draw, caplog):
    caplog.set_level("INFO")
    (shot,) = draw("--prompt", "a --d 3", "--steps", 1)
    (line,) = [line for line in caplog.messages if "(seed" in line]
    assert re.fullmatch(
        rf"1 picture in \d+\.\d s, in {re.escape(str(shot.path.parent))}: im_000001\.png \(seed 3\)", line
    )


@pytest.mark.parametrize(
    ("words", "warning"),
    [
        (["--prompt", "a --d 3", "--images_per_prompt", 2], "--prompt: --d has one seed for 2 pictures"),
        (["--prompt", "a --d 3,4", "--n_iter", 2], "--prompt: --d has one seed for 2 pictures"),
        (["--prompt", "a", "--images_per_prompt", 2, "--iter_same_seed"], "--iter_same_seed gives one seed for 2"),
        (["--prompt", "a --d 3,4", "--images_per_prompt", 3], "--prompt: --d has 2 seeds for 3 pictures"),
        (["--prompt", "a", "--images_per_prompt", 2], None),
        (["--prompt", "a --d 3,4", "--images_per_prompt", 2], None),
        (["--prompt", "{a|b} --d 3", "--images_per_prompt", 2], "--d has one seed"),
        (["--prompt", "a", "--n_iter", 2, "--iter_same_seed"], None),
        (["--prompt", "a --d 3", "--grid", "seed=1,2", "--images_per_prompt", 2], None),
    ],
)
def test_pictures_that_will_be_equal_are_told_before(words, warning, caplog):
    problems = Problems()
    given = given_options(GenerateConfig, ["--ckpt", "m", *map(str, words)], problems, retired=GENERATION)
    config = build(GenerateConfig, given.values, problems)
    checks.warn_of_equal_pictures(config, checks.load_lines(config.prompts))
    assert [warning in line for line in caplog.messages] == ([True] if warning else [])


def test_a_model_for_small_pictures_draws_them_without_a_size(model_store, tmp_path):
    _, paths = model_store("sd1")
    folder = tmp_path / "model"
    shutil.copytree(paths["folder"], folder)
    config = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"sample_size": 9}), encoding="utf-8")
    call(gen_img_diffusers, "--ckpt", folder, "--outdir", tmp_path / "o", "--prompt", "a", "--steps", 1)
    (path,) = (tmp_path / "o").iterdir()
    with Image.open(path) as picture:
        assert picture.size == (72, 72)


def cells_of(path, columns, rows):
    """Return the pictures of a sheet, from its lower right corner."""
    with Image.open(path) as file:
        sheet = np.asarray(file.convert("RGB")).astype(int)
    height, width = sheet.shape[:2]
    at = lambda row, column: (height - 68 * (rows - row), width - 68 * (columns - column))  # noqa: E731
    return [
        [sheet[y : y + 64, x : x + 64] for y, x in (at(row, column) for column in range(columns))]
        for row in range(rows)
    ]


def test_a_grid_of_one_axis_has_a_row_for_each_prompt(draw, tmp_path):
    (tmp_path / "p.txt").write_text("a cat\na dog --l 2\n", encoding="utf-8")
    draw("--from_file", tmp_path / "p.txt", "--grid", "seed=1,2,3", "--batch_size", 4)
    cells = cells_of(tmp_path / "o" / "grid.png", 3, 2)
    for row, line in enumerate(("a cat", "a dog --l 2")):
        for column in range(3):
            (single,) = draw("--prompt", f"{line} --d {column + 1}", out="single")
            same_pixels(cells[row][column], single.pixels)


def test_a_grid_of_two_axes(draw, tmp_path):
    draw("--prompt", "a cat on a mat", "--grid", "replace=cat,dog", "steps=1,3")
    cells = cells_of(tmp_path / "o" / "grid.png", 2, 2)
    for row, steps in enumerate((1, 3)):
        for column, word in enumerate(("cat", "dog")):
            (single,) = draw("--prompt", f"a {word} on a mat --s {steps}", out="single")
            same_pixels(cells[row][column], single.pixels)


@pytest.mark.slow
def test_a_grid_of_three_axes_over_networks(draw, two, tmp_path):
    _, words = two
    axes = ["am=0:0,1:0.5", "sampler=ddim,euler_a", "scale=2,4"]
    draw("--prompt", "a cat", *words, "--grid", *axes)
    sheets = sorted((tmp_path / "o").glob("grid*.png"), key=lambda path: path.stat().st_mtime_ns)
    assert [path.name for path in sheets] == ["grid_scale-2.png", "grid_scale-4.png"]
    names = [path.name for path in sorted((tmp_path / "o").glob("im_*"))]
    assert names[0] == "im_000001_am=0-0-sampler=ddim-scale=2.png"
    assert names[-1] == "im_000008_am=1-0.5-sampler=euler_a-scale=4.png"
    for path, scale in zip(sheets, (2, 4), strict=True):
        cells = cells_of(path, 2, 2)
        line = f"a cat --am 1,0.5 --ss euler_a --l {scale}"
        same_pixels(cells[1][1], draw("--prompt", line, *words, out="single")[0].pixels)
        same_pixels(cells[0][0], draw("--prompt", f"a cat --l {scale}", out="single")[0].pixels)


# ---- stopping and typing ------------------------------------------------------------------------------------


def stop_at(monkeypatch, number):
    """Have Ctrl-C come while the number-th picture is drawn."""
    plain, calls = image_generator.sample_latents, []

    def stopped(*args):
        calls.append(args)
        if len(calls) == number:
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(image_generator, "sample_latents", stopped)


def test_ctrl_c_keeps_what_is_finished(draw, tmp_path, monkeypatch):
    stop_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        draw("--prompt", "a cat", "--images_per_prompt", 5, "--html", "--steps", 1)
    files = sorted(path.name for path in (tmp_path / "o").iterdir())
    assert files[1:] == ["im_000001.png", "im_000002.png"]
    assert files[0].startswith("gallery-")
    assert (tmp_path / "o" / files[0]).read_text(encoding="utf-8").count("<figure>") == 2


def test_ctrl_c_leaves_a_sheet_with_holes(draw, tmp_path, monkeypatch):
    stop_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        draw("--prompt", "a cat", "--grid", "seed=1,2", "scale=2,3", "--steps", 1)
    cells = cells_of(tmp_path / "o" / "grid.png", 2, 2)
    shots = [shot(path) for path in sorted((tmp_path / "o").glob("im_*"))]
    assert len(shots) == 2
    filled = [cell for row in cells for cell in row if (cell != 255).any()]
    assert len(filled) == 2
    for cell in filled:
        assert any(np.array_equal(cell, found.pixels) for found in shots)


def test_ctrl_c_ends_with_its_exit_code(monkeypatch, model_store, tmp_path, capsys):
    monkeypatch.setattr(logs, "set_up_logging", lambda: None)
    stop_at(monkeypatch, 1)
    words = ["--ckpt", model_store("sd1")[1]["folder"], "--prompt", "a", "--outdir", tmp_path, *SIZE]
    monkeypatch.setattr(sys, "argv", ["gen_img_diffusers.py", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        logs.run_script(gen_img_diffusers.main)
    assert ended.value.code == 130
    assert "gen_img_diffusers.py: stopped" in capsys.readouterr().err


def test_typed_prompts_are_drawn_one_by_one(draw, monkeypatch, caplog):
    typed = ["a cat --d 5", "", "a dog --x 3", "a dog --w 70", "a dog --d 6 --s 1"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(typed) + "\n"))
    with caplog.at_level("INFO"):
        shots = draw("--interactive", "--n_iter", 3, "--batch_size", 4)
    assert [shot.texts["prompt"] for shot in shots] == ["a cat", "a dog"]
    assert "--x is not known" in caplog.text
    assert "--w must be a multiple of 8" in caplog.text
    assert str(shots[0].path) in caplog.text
    same_pixels(shots[0].pixels, draw("--prompt", "a cat --d 5")[0].pixels)
