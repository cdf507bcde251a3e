"""The page of a run: what it shows, from which files, and that no text of the user becomes part of it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import signal
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from runs import LIERLA, RATE, options, train, train_with
from safetensors import safe_open

from library.errors import UserError
from library.html_page import json_text
from library.training.page import charts, recorder
from library.training.page.facts import Facts, Memory, read_facts, write_facts
from library.training.page.gather import gather, names_in
from library.training.page.old_runs import columns_in, datasets_in, facts_in, tags_in
from library.training.page.page import page_of
from library.training.page.previews import MOST_PICTURES, shown_columns
from library.training.page.repeat import words_of
from library.training.page.sections import head, seconds_left, state_of
from library.training.record import run_lock
from library.words import duration, in_bytes
from tools import report

if TYPE_CHECKING:
    from library.training.run.progress import Progress

NASTY = '</script><b id="evil">&amp; "quoted" <img src="https://example.com/x.png" onerror="alert(1)">'
VOID = {"meta", "img", "input", "br", "link"}


class Page(HTMLParser):
    """The elements of a page, with their attributes and the texts within scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.text += data

    def values(self, name: str) -> list[str]:
        return [attrs[name] or "" for _, attrs in self.elements if name in attrs]


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def run_with(argv: list[str]) -> None:
    import train_network

    assert train_network.main(argv) == 0


@pytest.fixture(scope="module")
def given(model_store, tmp_path_factory):
    """Return what makes the command line of a run that has everything that a page can show."""
    folder = tmp_path_factory.mktemp("given")
    (folder / "train" / "1_sks dog").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)
    for index, (width, height) in enumerate([(64, 64), (64, 64), (128, 64), (128, 64)]):
        Image.fromarray(pixels[index : index + height, :width]).save(folder / "train" / "1_sks dog" / f"{index}.png")
        text = f"{NASTY}, a dog" if index < 2 else "a dog"
        (folder / "train" / "1_sks dog" / f"{index}.txt").write_text(text, encoding="utf-8")
    prompts = folder / "p.txt"
    prompts.write_text(f"{NASTY} --w 64 --h 64 --s 1 --d 5\na cat --w 64 --h 72 --s 1 --d 6\n", encoding="utf-8")
    more = {
        **{"sample_prompts": prompts, "sample_every_n_steps": 2, "sample_at_first": True, "cache_latents": True},
        **{"validation_split": 0.25, "validate_every_n_steps": 2, "save_every_n_steps": 2, "max_train_steps": 5},
        "lr_scheduler_num_cycles": 3,
    }
    base = model_store("sd1")[1]["safetensors"]
    return lambda out, **other: options(base, folder / "train", out, **(more | other))


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory):
    """Return the folder of a run, which is not changed."""
    folder = tmp_path_factory.mktemp("whole")
    run_with(given(folder))
    return folder


@pytest.fixture
def out(whole, tmp_path):
    """Return a copy of the folder of that run."""
    return Path(shutil.copytree(whole, tmp_path / "o"))


def test_the_page_is_a_function_of_the_files_of_the_run(whole, out):
    assert report.main([str(out)]) == 0
    made, written = ((folder / "x-report.html").read_text(encoding="utf-8") for folder in (out, whole))
    assert made.replace(str(out), str(whole)) == written


def test_no_text_of_the_user_is_part_of_the_page_and_nothing_is_of_the_network(whole):
    page = read(whole / "x-report.html")
    assert page.open == []
    assert "evil" not in page.values("id")
    assert not page.values("onerror")
    for address in page.values("src") + page.values("href"):
        assert address.startswith(("data:image/jpeg;", "#", "x", "sample/")), address[:80]
    assert not re.search(r"url\(|@import|<link", (whole / "x-report.html").read_text(encoding="utf-8"))
    assert NASTY in page.text
    data, *_ = page.scripts
    assert set(json.loads(data)["charts"]) == {"loss", "rate", "time", "norms"}


def test_each_file_and_each_preview_is_named(whole):
    page = read(whole / "x-report.html")
    files = sorted(path.name for path in whole.glob("x*.safetensors"))
    assert len(files) == 3
    assert sorted(address for address in page.values("href") if address.endswith(".safetensors")) == files
    previews = sorted(f"sample/{path.name}" for path in (whole / "sample").iterdir())
    assert len(previews) == 8
    assert sorted(set(page.values("data-href"))) == previews
    assert all(attrs.get("alt") is not None for tag, attrs in page.elements if tag == "img")
    with safe_open(whole / "x.safetensors", "pt") as file:
        assert file.metadata()["sshs_model_hash"] in page.values("title")


def test_the_run_says_what_is_in_no_other_file(whole):
    facts = read_facts(whole / "x-run.json")
    assert (facts.state, facts.step, facts.steps, facts.epoch) == ("finished", 5, 5, 2)
    assert [column.label for column in facts.columns] == ["start", "step 2", "step 4", "step 5"]
    assert [save.step for save in facts.saves] == [2, 4, 5]
    assert [data.held_out for data in facts.datasets] == [1]
    assert any("--lr_scheduler_num_cycles 3 has no effect" in text for text in facts.warnings)
    assert len(facts.captions) == 3
    assert dict(facts.tags)["a dog"] == 3
    assert facts.memory.process
    assert facts.first_step == 0
    assert "Finished" in read(whole / "x-report.html").text
    times = gather(whole, "x").series.times
    assert [step for step, _ in times["step"]] == [1, 2, 3, 4, 5]
    assert all(all_of >= wait >= 0 for (_, all_of), (_, wait) in zip(times["step"], times["data"], strict=True))


def test_without_its_record_a_run_shows_what_its_files_tell(out):
    known = gather(out, "x")
    (out / "x-run.json").unlink()
    found = gather(out, "x")
    assert found.facts.columns == known.facts.columns
    assert [(entry.path, entry.save.step, entry.size, entry.hash) for entry in found.files] == [
        (entry.path, entry.save.step, entry.size, entry.hash) for entry in known.files
    ]
    for name in ("step", "epoch", "steps", "epochs", "steps_per_epoch", "tags", "num_tags", "best", "state"):
        assert getattr(found.facts, name) == getattr(known.facts, name), name
    (one,), (other,) = found.facts.datasets, known.facts.datasets
    assert [(b.width, b.height, b.draws) for b in one.buckets] == [(b.width, b.height, b.draws) for b in other.buckets]
    assert (one.size, one.batch_size, one.held_out) == (other.size, other.batch_size, other.held_out)
    assert Page(page_of(found)).open == []
    (out / "x-metrics.jsonl").unlink()
    shutil.rmtree(out / "sample")
    assert "No step is recorded" in page_of(gather(out, "x"))
    for path in out.glob("*.safetensors"):
        path.write_bytes(b"{}")
    assert "x.safetensors" in page_of(gather(out, "x"))


STEADY = ("steps", "epochs", "step", "epoch", "best", "saves", "datasets", "captions", "tags", "prompts")


def test_a_run_that_is_stopped_and_resumed_shows_what_an_uninterrupted_one_shows(given, whole, tmp_path):
    seen = []

    def stop(progress: Progress) -> None:
        seen.append(head(gather(tmp_path, "x")))
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train_with(given(tmp_path), stop, after=2)
    assert "Running" in seen[0]
    assert "Time left" in seen[0]
    assert read_facts(tmp_path / "x-run.json").state == "stopped"
    run_with(given(tmp_path, resume=tmp_path / "x-step00000002-state"))
    one, other = gather(whole, "x"), gather(tmp_path, "x")
    for name in STEADY:
        assert getattr(one.facts, name) == getattr(other.facts, name), name
    columns = [[(column.label, len(column.pictures)) for column in run.facts.columns] for run in (one, other)]
    assert columns[0] == columns[1]
    assert charts.loss_chart(one) == charts.loss_chart(other)
    assert charts.norm_chart(one) == charts.norm_chart(other)
    assert [entry.hash for entry in one.files] == [entry.hash for entry in other.files]
    assert other.facts.seconds_before > 0
    assert other.facts.first_step == 2
    assert "resume" in other.options
    assert not any(word.startswith("--resume") for word in words_of(other.options))


def test_a_run_that_ended_without_a_word_was_broken_off(out):
    facts = read_facts(out / "x-run.json")
    write_facts(out / "x-run.json", dataclasses.replace(facts, state="running"))
    assert state_of(gather(out, "x")) == "broken"
    lock = out / "x-run.lock"
    run_lock.create(lock, run_lock.own_holder())
    assert state_of(gather(out, "x")) == "running"
    lock.unlink()
    run_lock.create(lock, dataclasses.replace(run_lock.own_holder(), birth="of another process"))
    assert state_of(gather(out, "x")) == "broken"
    lock.write_text("cut", encoding="utf-8")
    assert state_of(gather(out, "x")) == "running"


def test_an_error_that_ends_the_run_is_on_its_page(given, tmp_path):
    import train_network

    with pytest.raises(UserError, match="the loss became nan"):
        train_network.main(given(tmp_path, learning_rate="1e30", sample_at_first=None, validation_split=None))
    text = page_of(gather(tmp_path, "x"))
    assert "Ended by an error" in text
    assert "the loss became nan" in text
    assert "Ended by an error" in (tmp_path / "x-report.html").read_text(encoding="utf-8")


def test_no_report_leaves_out_the_page_and_nothing_else(given, whole, tmp_path):
    run_with(given(tmp_path, no_report=True, max_train_steps=2, sample_at_first=None))
    ours, theirs = ({path.name for path in folder.iterdir()} for folder in (whole, tmp_path))
    assert {"x-report.html", "x-run.json"} & theirs == set()
    assert ours - theirs == {"x-report.html", "x-run.json", "x-step00000004.safetensors"}


# ---- the record ---------------------------------------------------------------------------------------------


def test_the_record_is_read_as_it_was_written(tmp_path):
    facts = Facts(best=(0.5, 2), versions={"a": "\ud800"}, memory=Memory(process=3), warnings=("x",), began=1.0)
    write_facts(tmp_path / "r.json", facts)
    assert read_facts(tmp_path / "r.json") == dataclasses.replace(facts, versions={"a": "?"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "it has no version"),
        ('{"version": 2}', "another version of the suite"),
        ('{"version": 1, "step": "2"}', "is damaged: '2' is not a whole number"),
        ('{"version": 1, "step": true}', "is damaged"),
        ('{"version": 1, "state": "lost"}', "is damaged"),
        ('{"version": 1, "columns": [{}]}', "is damaged"),
        ('{"version": 1, "columns": 3}', "is damaged"),
        ('{"version": 1, "more": 3}', "is damaged"),
        ('{"version": 1, "best": [1]}', "is damaged"),
        ("{", "not valid JSON"),
    ],
)
def test_a_damaged_record_is_told_and_the_other_files_serve(tmp_path, caplog, text, message):
    (tmp_path / "x-run.json").write_text(text, encoding="utf-8")
    (tmp_path / "x-metrics.jsonl").write_text('{"step": 1, "loss/current": 2.0}\n{"ste', encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_facts(tmp_path / "x-run.json")
    run = gather(tmp_path, "x")
    assert message in caplog.text
    assert (run.facts.step, state_of(run)) == (1, "unknown")
    assert Page(page_of(run)).open == []


def test_a_damaged_record_is_not_gone_on_from(tmp_path, caplog):
    assert recorder.earlier_facts(tmp_path / "x-run.json", 1) == Facts()
    assert not caplog.text
    (tmp_path / "x-run.json").write_text("{}", encoding="utf-8")
    assert recorder.earlier_facts(tmp_path / "x-run.json", 1) == Facts()
    assert "the page of the run begins anew" in caplog.text


def test_pictures_of_old_runs_are_found_by_their_names(tmp_path):
    (tmp_path / "sample").mkdir()
    for name in ("x_000010_00_20260101000000_5", "x_000010_01_20260101000001_5", "x_e000000_00_20250101000000_1"):
        (tmp_path / "sample" / f"{name}.png").touch()
    for name in (
        "x_000010_00_20270101000000_5",
        "xy_000010_00_20260101000000_5",
        "other",
        "x_e000002_01_20260101000001_5",
    ):
        (tmp_path / "sample" / f"{name}.png").touch()
    found = columns_in(tmp_path, "x", 3)
    assert [(column.label, column.step) for column in found] == [("start", 0), ("epoch 2", 6), ("step 10", 10)]
    assert found[2].pictures == ("sample/x_000010_00_20270101000000_5.png", "sample/x_000010_01_20260101000001_5.png")
    assert found[1].pictures == ("", "sample/x_e000002_01_20260101000001_5.png")
    (tmp_path / "sample" / "000003_00_20260101000000_5.png").touch()
    assert [column.step for column in columns_in(tmp_path, None, None)] == [3]


def test_metadata_of_others_are_no_mistake():
    assert facts_in({}) == Facts()
    assert facts_in({"ss_tag_frequency": "["}) == Facts()
    assert datasets_in({}) == ()
    assert tags_in({"ss_tag_frequency": '{"a": {"x": 1, "y": 3}, "b": {"x": 1}}'}) == ((("y", 3), ("x", 2)), 2)
    entry = {
        **{"resolution": [64, 32], "batch_size_per_device": 2, "num_train_images": 6, "num_reg_images": 0},
        **{"bucket_info": None, "subsets": [{"img_count": 3}]},
    }
    (found,) = datasets_in({"ss_datasets": json.dumps([entry])})
    assert (found.size, found.pictures, found.has_buckets, found.buckets) == ((64, 32), 3, False, ())


# ---- numbers ------------------------------------------------------------------------------------------------


def test_a_long_run_has_few_points_and_keeps_its_extremes():
    points = [(step, math.sin(step) + (step == 77_777) * 9) for step in range(1, 100_001)]
    steps, values = charts.lines_of([("a", "raw", points)], further=[100_007])["data"]
    assert len(steps) <= charts.MOST_POINTS + 1
    assert steps == sorted(steps)
    assert dict(zip(steps, values, strict=True))[77_777] == pytest.approx(dict(points)[77_777], rel=1e-5)
    assert (steps[-1], values[-1]) == (100_007, None)


def test_steps_that_were_left_out_break_the_line(tmp_path):
    rows = [{"step": step, "loss/current": 0.5} for step in (1, 2, 4)] + [{"step": 3, "left_out": 1}]
    (tmp_path / "x-metrics.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    run = gather(tmp_path, "x")
    chart = charts.loss_chart(run)
    assert chart is not None
    assert chart["data"][:2] == [[1, 2, 3, 4], [0.5, 0.5, None, 0.5]]
    assert "1 step left out" in page_of(run)


def test_numbers_that_are_not_finite_and_texts_that_end_scripts_stay_json():
    text = json_text({"a": [math.nan, math.inf, (1.5,)], "</script>": "<!-- \u2028"})
    assert "<" not in text
    assert "\u2028" not in text
    assert json.loads(text) == {"a": [None, None, [1.5]], "</script>": "<!-- \u2028"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (duration(0.5), "0.5 s"),
        (duration(75), "1 min 15 s"),
        (duration(7260), "2 h 1 min"),
        (duration(90_000), "1 d 1 h"),
        (in_bytes(999), "999 B"),
        (in_bytes(3_553_172), "3.55 MB"),
        (in_bytes(12_300_000_000), "12.3 GB"),
    ],
)
def test_durations_and_sizes_in_words(text, expected):
    assert text == expected


def test_only_so_many_previews_are_within_the_page():
    from library.training.page.facts import Column

    columns = tuple(Column(label=f"step {step}", step=step, pictures=("a",) * 20) for step in range(100))
    run: Any = SimpleNamespace(facts=Facts(columns=columns))
    chosen = shown_columns(run)
    assert len(chosen) * 20 <= MOST_PICTURES
    assert (chosen[0][0], chosen[-1][0]) == (0, 99)


def test_the_time_left_is_known_after_the_first_step_alone():
    facts = Facts(began=100.0, updated=130.0, steps=40, step=10)
    assert seconds_left(facts) == pytest.approx(90)
    assert seconds_left(dataclasses.replace(facts, step=0)) is None
    assert seconds_left(dataclasses.replace(facts, first_step=5)) == pytest.approx(180)


def test_norms_of_a_dylora_are_those_of_its_file_and_a_page_that_cannot_be_written_ends_no_training(
    base, pictures, tmp_path, caplog
):
    (tmp_path / "x-report.html").mkdir()
    weights = train(base, pictures, tmp_path, **(LIERLA | RATE))
    assert "the page of the run was not written" in caplog.text
    (save,) = read_facts(tmp_path / "x-run.json").saves
    squares = dict.fromkeys((2, 4, 6, 8), 0.0)
    for name in weights:
        if name.endswith("lora_down.weight"):
            down, up = (weights[name.replace("lora_down", f"lora_{side}")].flatten(1) for side in ("down", "up"))
            alpha = float(weights[name.replace("lora_down.weight", "alpha")])
            for rank in squares:
                squares[rank] += float((alpha / rank * up[:, :rank] @ down[:rank]).square().sum())
    assert save.norms_by_rank == pytest.approx({str(r): math.sqrt(total) for r, total in squares.items()}, rel=2e-3)
    for norms in (save.norms_by_block, save.norms_by_kind):
        assert math.hypot(*norms.values()) == pytest.approx(math.sqrt(squares[8]), rel=2e-3)
    assert list(save.norms_by_block)[:2] == ["text", "down 1"]
    assert "By rank" in page_of(gather(tmp_path, "x"))


def test_modules_have_a_block_and_a_kind():
    names = {
        "lora_te_text_model_encoder_layers_0_mlp_fc1": ("text", "text feed-forward"),
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj": ("text", "text attention"),
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k": ("middle", "cross-attention"),
        "lora_unet_input_blocks_4_1_transformer_blocks_0_ff_net_2": ("down 4", "feed-forward"),
        "lora_unet_up_blocks_1_resnets_0_time_emb_proj": ("up 3", "time embedding"),
        "lora_unet_input_blocks_4_0_in_layers_2": ("down 4", "convolutions"),
        "something": ("other", "other"),
    }
    assert {name: (recorder.block_label(name), recorder.kind_label(name)) for name in names} == names
    assert recorder.step_of("start", 3, 9) == 0
    assert recorder.step_of("epoch 4", 3, 10) == 10
    assert recorder.step_of("step 7", 3, 9) == 7


# ---- tools/report.py ----------------------------------------------------------------------------------------


def test_runs_are_compared_side_by_side(whole, out, tmp_path):
    options_file = out / "x-options.toml"
    text = options_file.read_text(encoding="utf-8")
    options_file.write_text(text.replace("learning_rate = 0.01", "learning_rate = 0.5"), encoding="utf-8")
    facts = read_facts(out / "x-run.json")
    fewer = dataclasses.replace(facts, columns=facts.columns[1::2])
    write_facts(out / "x-run.json", fewer)
    folders = [str(whole), str(out)]
    assert report.main([*folders, "--compare", "--save_to", str(tmp_path / "c.html")]) == 0
    page = read(tmp_path / "c.html")
    assert page.open == []
    titles = [f"{whole.name}/x", "o/x"]
    for chart in json.loads(page.scripts[0])["charts"].values():
        assert [line["title"] for line in chart["lines"]] == titles
    assert "o/x-report.html" in page.values("href")
    shown = [address for address in page.values("data-href") if address.startswith("o/")]
    assert sorted(shown) == sorted(f"o/{path}" for column in fewer.columns for path in column.pictures)
    assert len(page.values("data-same")) == 2, "of each prompt one picture serves for two steps"
    assert page.text.count("none yet") == 2
    assert "learning_rate" in page.text
    assert "network_module" not in page.text
    (out / "bare-options.toml").write_text("[x]\n", encoding="utf-8")
    assert report.main([str(out), "--compare", "--output_name", "x", "bare"]) == 0
    assert read(out / "comparison.html").open == []
    shutil.copy(options_file, out / "bare-options.toml")
    assert report.main([str(out), "--compare"]) == 0
    assert "None, as far as the files tell" in read(out / "comparison.html").text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent"], "absent does not exist"),
        (["o/x-metrics.jsonl"], "x-metrics.jsonl is not a folder"),
        (["."], "no training is in"),
        (["o", "--output_name", "y"], "no run y is there; these are: x"),
        (["o", "--compare"], "--compare needs at least two runs, found x"),
    ],
)
def test_mistakes_are_told(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "x-metrics.jsonl").touch()
    (tmp_path / "o" / ".x-metrics.jsonl").touch()
    assert names_in(tmp_path / "o") == ["x"]
    with pytest.raises(UserError, match=re.escape(message)):
        report.main(words)
