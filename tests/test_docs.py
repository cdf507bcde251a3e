"""The documentation says what the code does: tables, links, commands and examples are checked against it."""

from __future__ import annotations

import importlib.util
import re
import shlex

import pytest
from scripts import ROOT, python

import gen_img_diffusers
from benchmarks import gpu
from library.config import command_line, toml_text, train
from library.config.config_file import read_config_file
from library.config.dataset import DatasetOptions, SubsetOptions
from library.config.dataset_file import read_dataset_file
from library.config.options import root_options
from library.config.prompts import parse_preview, read_prompts
from library.config.retired import RETIRED
from library.config.train import TrainConfig
from library.errors import Problems

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
ENGLISH = [page for page in PAGES if not page.stem.endswith("-ja")]

FENCE = re.compile(r"(?ms)^```(?P<kind>[^\n]*)\n(?P<text>.*?)^```$")
FLAG = re.compile(r"--([A-Za-z]\w*)")
# Options in the text that belong to accelerate, torchrun, argparse, and to the lines of prompt files.
FOREIGN = {"num_cpu_threads_per_process", "multi_gpu", "num_processes", "nproc_per_node", "help"}
PROMPT_OPTIONS = {"w", "h", "d", "s", "l", "n", "ss", "t", "am", "f", "g", "ctr", "rcfg", "fs", "cn"} | {
    *("ow", "oh", "nw", "nh", "ct", "cl")
}


def load_tables():
    spec = importlib.util.spec_from_file_location("docs_tables", DOCS / "tables.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def known_flags():
    return {name for entry in root_options(TrainConfig).values() for name in (entry.flag, *entry.spec.aliases)}


def blocks(page, kind=None):
    found = [(match["kind"].strip(), match["text"]) for match in FENCE.finditer(page.read_text(encoding="utf-8"))]
    return [text for name, text in found if kind is None or name == kind]


def without_blocks(page):
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def headings(page):
    return re.findall(r"(?m)^(#+) (.+)$", without_blocks(page))


def anchor(title):
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")


def commands(page):
    """Return what follows train_network.py in each command of the code blocks."""
    for text in blocks(page, "bash") + blocks(page, "bat"):
        for line in re.sub(r"[\\^]\n", " ", text).splitlines():
            _, script, arguments = line.partition("train_network.py")
            if script:
                yield arguments


# --------------------------------------------------------------------------------------------------------------


class Parsed(Exception):
    """A script's command line was read."""


@pytest.fixture
def only_parsed(monkeypatch):
    """Command lines are read, and nothing is done after that."""
    given_options = command_line.given_options

    def reads(root, argv, problems, **more):
        given_options(root, argv, problems, **more)
        problems.raise_if_any()
        raise Parsed

    for module in (command_line, train, gen_img_diffusers):
        monkeypatch.setattr(module, "given_options", reads)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_all_scripts_are_read_by_their_parsers(page, only_parsed):
    """Every option in a command of a page is one of its script, and every value is of its kind."""
    for text in blocks(page, "bash") + blocks(page, "bat"):
        for line in re.sub(r"[\\^]\n", " ", text).splitlines():
            match = re.search(
                r"((?:(?:networks|tools|finetune)[/\\])\w+|gen_img_diffusers|gen_img|sdxl_gen_img)\.py(.*)", line
            )
            if match is None:
                continue
            module = importlib.import_module(re.sub(r"[/\\]", ".", match[1]))
            module = getattr(module, "merge_lora", module)  # sdxl_merge_lora is that program

            with pytest.raises(Parsed):
                module.main(shlex.split(match[2].split("&&")[0].split(">")[0]))


def test_tables_are_up_to_date():
    assert [page.name for page in load_tables().outdated()] == [], "run python docs/tables.py"


def test_every_block_of_tables_stands_in_both_languages():
    tables = load_tables()
    for name in tables.BLOCKS:
        holders = {page.stem for page in PAGES if f"<!-- {name}:begin -->" in page.read_text(encoding="utf-8")}
        assert len(holders) == 2
        assert {stem.removesuffix("-ja") for stem in holders} & holders, name


def test_check_tells_of_a_page_that_is_out_of_date(tmp_path, monkeypatch, capsys):
    tables = load_tables()
    page = tmp_path / "page-ja.md"
    page.write_text("<!-- retired:begin -->\nold\n<!-- retired:end -->\n", encoding="utf-8")
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    assert tables.main(["--check"]) == 1
    assert "page-ja.md" in capsys.readouterr().out
    assert "old" in page.read_text(encoding="utf-8")
    assert tables.main([]) == 0
    assert "警告して無視" in page.read_text(encoding="utf-8")
    assert tables.main(["--check"]) == 0


def test_a_missing_or_surplus_japanese_meaning_is_told(tmp_path, monkeypatch):
    tables = load_tables()
    text = tables.MEANINGS_FILE.read_text(encoding="utf-8").replace("\nv2 = ", "\nv3 = ")
    changed = tmp_path / "meanings-ja.toml"
    changed.write_text(text, encoding="utf-8")
    monkeypatch.setattr(tables, "MEANINGS_FILE", changed)
    with pytest.raises(SystemExit, match=r"'v2' is missing\n.*'v3' is not needed"):
        tables.read_meanings()


def test_tables_do_without_torch():
    code = "import sys; sys.path.insert(0, 'docs'); import tables; tables.outdated(); sys.exit('torch' in sys.modules)"
    assert python("-B", "-c", code, cwd=ROOT, timeout=60).returncode == 0


def test_every_page_exists_in_both_languages():
    assert ENGLISH
    for page in ENGLISH:
        assert page.with_name(f"{page.stem}-ja.md").exists()
    assert len(PAGES) == 2 * len(ENGLISH)


@pytest.mark.parametrize("page", ENGLISH, ids=lambda page: page.stem)
def test_both_languages_have_the_same_headings_and_code(page):
    other = page.with_name(f"{page.stem}-ja.md")
    assert [level for level, _ in headings(page)] == [level for level, _ in headings(other)]
    assert blocks(page, "toml") == blocks(other, "toml")
    assert blocks(page, "text prompts") == blocks(other, "text prompts")
    assert list(commands(page)) == list(commands(other))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page)):
        if target.startswith(("https://", "http://")):
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if fragment:
            assert fragment in [anchor(title) for _, title in headings(file)], target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_use_options_that_exist(page):
    known = known_flags()
    for arguments in commands(page):
        assert set(FLAG.findall(arguments)) <= known | {"help"}, arguments


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_options_named_in_the_text_exist(page):
    known = known_flags() | set(RETIRED) | FOREIGN | PROMPT_OPTIONS | {"learning", "X"}  # an abbreviation, a stand-in
    known |= set(FLAG.findall(gpu.build_parser().format_usage()))
    named = {
        flag
        for code in re.findall(r"`([^`\n]+)`", without_blocks(page))
        for flag in re.findall(r"(?<!\S)--(\w+)", code)
    }
    assert named <= known


def test_the_first_command_works_as_pasted():
    first = next(commands(DOCS / "train_network.md")).split()
    assert first[0] == "--config_file"
    read_whole(ROOT / first[1])


def read_datasets_of(path):
    """Return the datasets of a definition file in which everything is known and right."""
    problems = Problems()
    found = read_dataset_file(path, DatasetOptions(), SubsetOptions(), problems)
    problems.raise_if_any()
    return found


def read_whole(path):
    """Return flag -> value of a configuration file in which everything is known and right."""
    problems = Problems()
    given = read_config_file(path, root_options(TrainConfig), problems)
    problems.raise_if_any()
    return given.values


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_toml_examples_are_read(page, tmp_path):
    for index, text in enumerate(blocks(page, "toml")):
        file = tmp_path / f"{index}.toml"
        file.write_text(text, encoding="utf-8")
        table = toml_text.load(file)
        if "datasets" in table:
            assert read_datasets_of(file)
        elif "prompt" in table:
            assert read_prompts(file)
        else:
            assert read_whole(file)


def test_prompt_lines_are_read(caplog):
    lines = [line for page in PAGES for text in blocks(page, "text prompts") for line in text.splitlines()]
    assert lines
    for line in lines:
        prompt = parse_preview(line, "documentation")
        assert prompt.prompt
        assert "--" not in prompt.prompt
    assert not caplog.records


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_examples_compile(page):
    for text in blocks(page, "python"):
        compile(text, page.name, "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_path_of_one_machine(page):
    assert not re.search(r"(?<![\w.])/(work|tmp|home|root)/", page.read_text(encoding="utf-8"))
