"""The documentation says what the code does: tables, links, commands and examples are checked against it."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys

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
OUTSIDE = [
    *(path for path in ROOT.glob("*.md") if path.name != "CHANGELOG.md"),
    *(ROOT / "examples").glob("*/*.md"),
]

FENCE = re.compile(r"(?ms)^```(?P<kind>[^\n]*)\n(?P<text>.*?)^```$")  # the kind may be followed by the name of a file
FLAG = re.compile(r"--([A-Za-z]\w*)")
# Options in the text that belong to accelerate, torchrun, argparse, and to the lines of prompt files.
FOREIGN = {"num_cpu_threads_per_process", "multi_gpu", "num_processes", "nproc_per_node", "help", "print_options"}
PROMPT_OPTIONS = {"w", "h", "d", "s", "l", "n", "ss", "t", "am", "f", "g", "ctr", "rcfg", "fs", "cn"} | {
    *("ow", "oh", "nw", "nh", "ct", "cl")
}


def load(name):
    """Return a module of the folder docs."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def load_tables():
    return load("tables")


def known_flags():
    return {name for entry in root_options(TrainConfig).values() for name in (entry.flag, *entry.spec.aliases)}


def blocks(page, kind=None):
    found = [
        (re.sub(r" \S+\.\w+$", "", match["kind"].strip()), match["text"])
        for match in FENCE.finditer(page.read_text(encoding="utf-8"))
    ]
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


@pytest.mark.parametrize("page", [*PAGES, *OUTSIDE], ids=lambda page: str(page.relative_to(ROOT)))
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
        assert set(FLAG.findall(arguments)) <= known | {"help", "print_options"}, arguments


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


# --------------------------------------------------------------------------------------------------------------
# Names of files, and the runner of the commands
# --------------------------------------------------------------------------------------------------------------


# Scripts that take what they read and what they write without option names.
FROM_TO = {
    "tools/convert_diffusers20_original_sd.py",
    "tools/resize_images_to_resolution.py",
    "finetune/merge_captions_to_metadata.py",
    "finetune/clean_captions_and_tags.py",
}


def lines(page):
    """Return the command lines of a page, as lists of words."""
    text = re.sub(r"\\\n", " ", "".join(blocks(page, "bash")))
    return [shlex.split(line.split("&&")[-1]) for line in text.splitlines()]


def value(words, option):
    """Return the value of an option in the words of a command."""
    for word, after in zip(words, [*words[1:], None], strict=True):
        if word == f"--{option}":
            return after
        if word.startswith(f"--{option}="):
            return word.partition("=")[2]
    return None


def output_name(words):
    """Return the name of the LoRA that a command trains, if it trains one that the reader did not set up."""
    config = value(words, "config_file") or ""
    if not any(word.endswith("train_network.py") for word in words) or not config.startswith("examples/"):
        return None
    return value(words, "output_name") or str(read_whole(ROOT / config)["output_name"])


def written(words):
    """Return the files and folders that a command writes, without extensions."""
    paths = [value(words, option) for option in ("save_to", "output", "outdir")]
    if name := output_name(words):
        paths.append(f"output/{name}")
    if FROM_TO & set(words):
        paths.append(words[3])
    return {path.removesuffix(".safetensors") for path in paths if path}


def test_no_training_of_the_pages_replaces_the_file_of_another():
    trainings: dict[str, set[str]] = {}
    for page in [*ENGLISH, ROOT / "README.md"]:
        for words in lines(page):
            name = output_name(words)
            if name and not {"--dry_run", "--print_options"} & set(words):
                options = words[words.index("--config_file") :]
                again = options[:-2] if options[-2:] == ["--resume", "auto"] else options
                trainings.setdefault(name, set()).add(" ".join(again))
    assert len(trainings) > 15
    assert {name: found for name, found in trainings.items() if len(found) > 1} == {}


@pytest.mark.parametrize("page", ENGLISH, ids=lambda page: page.stem)
def test_files_that_the_commands_of_a_page_read_are_made_on_that_page(page):
    made = {"output/mine", "output/mine_xl"}  # the reader's own
    made |= {
        f"output/{name}" for text in blocks(page, "toml") for name in re.findall(r'(?m)^output_name = "(.+)"', text)
    }
    for words in lines(page):
        made |= written(words)
        read = [word for word in words if word.startswith("output/")]
        assert [word for word in read if not word.startswith(tuple(made))] == [], words


def test_the_runner_finds_the_steps_of_a_page():
    runner = load("commands")
    steps = [*runner.steps(DOCS / "tools.md")]
    assert [step.name for step in steps if step.kind == "file"] == ["my_captions.json"]
    assert all("\\" not in step.text for step in steps if step.kind == "bash")
    assert runner.to_run("python train_network.py --config_file my_training.toml", quick=False).endswith("--dry_run")
    assert runner.to_run("python train_network.py --dry_run x/models/a", quick=True).count("--dry_run") == 1
    assert runner.to_run("python train_network.py --config_file a.toml", quick=True).endswith("--max_train_steps 4")
    assert runner.reason_to_skip("pip install lycoris-lora")
    for page, _ in runner.PICTURES.values():
        assert (DOCS / f"{page}.md").exists()


def test_every_picture_is_on_a_page_and_made_by_the_runner():
    pictures = {path.name for path in (DOCS / "images").iterdir()}
    assert pictures == set(load("commands").PICTURES)
    text = "".join(page.read_text(encoding="utf-8") for page in [*PAGES, *OUTSIDE])
    assert {name for name in pictures if f"images/{name})" not in text} == set()


# --------------------------------------------------------------------------------------------------------------
# The site
# --------------------------------------------------------------------------------------------------------------


def test_every_page_stands_in_the_contents_of_the_site():
    hooks = load("site_hooks")
    contents = set(re.findall(r": ([\w./-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    pages = {hooks.site_path(path.relative_to(ROOT).as_posix()) for path in PAGES}
    assert contents == pages | set(hooks.OUTSIDE.values())
    assert set(hooks.OUTSIDE) == {path.relative_to(ROOT).as_posix() for path in [*OUTSIDE, ROOT / "CHANGELOG.md"]}
    assert all(hooks.other_language(hooks.site_path(f"docs/{page.name}"), contents) for page in PAGES)


@pytest.mark.slow
def test_the_site_is_built_and_needs_no_network(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = [*(tmp_path / "site").rglob("*.html")]
    assert len(pages) == 1 + len(PAGES) + len(load("site_hooks").OUTSIDE)
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r"""<(?:script|link|img|iframe)[^>]+(?:src|href)=["']?https?://""", text), page.name
    japanese = (tmp_path / "site/train_network-ja.html").read_text(encoding="utf-8")
    assert '<html lang="ja"' in japanese
    assert 'href="train_network.html" hreflang="en"' in japanese
    shutil.rmtree(tmp_path / "site")


@pytest.mark.slow
@pytest.mark.parametrize("page", ["tools", "gen_img", "merge_and_extract", "lora_in_your_project"])
def test_the_commands_of_a_page_run_as_they_stand(page, tmp_path):
    command = [sys.executable, "docs/commands.py", page, "--quick", "--work", str(tmp_path / "suite")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    shutil.rmtree(tmp_path / "suite")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all commands ran" in done.stdout
