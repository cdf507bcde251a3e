"""The configurations in `examples/`: each does what it says, as it is and with the values for one's own pictures."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from scripts import ROOT, call

import train_network
from library.config import toml_text
from library.config.train import check, parse_train_config, warn_of_idle_options
from library.data.records import load_datasets, subsets_of
from library.errors import Problems
from library.models.hub import locate_models

RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.toml"))
CONFIGS = [*RECIPES, *sorted((ROOT / "examples" / "unicorn").glob("train*.toml"))]
YOURS = re.compile(r"^(\w+) = .*?  # yours: (.+)$", re.MULTILINE)


def named(path):
    return path.stem


def read(path):
    """Return a configuration that passes the checks before torch, and its datasets."""
    problems = Problems()
    config = locate_models(parse_train_config(["--config_file", str(path)], problems), problems)
    check(config, problems)
    problems.raise_if_any()
    return config, load_datasets(config)


def warnings(caplog):
    """Return the warnings of the suite."""
    return [entry.message for entry in caplog.records if entry.levelname == "WARNING" and entry.name[:8] == "library."]


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_recipes_are_right_as_they_are(path, caplog):
    config, datasets = read(path)
    warn_of_idle_options(config, subsets_of(datasets))
    assert warnings(caplog) == []
    text = path.read_text(encoding="utf-8")
    assert f"python train_network.py --config_file examples/recipes/{path.name}\n" in text
    for name in re.findall(r"output/(recipe\w*)\.safetensors", text):
        assert name in (config.saving.output_name, "recipe_rank")


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_the_values_for_own_pictures_fit_together(path, tmp_path, monkeypatch, caplog):
    text = path.read_text(encoding="utf-8")
    changes = dict(YOURS.findall(text))
    assert {"pretrained_model_name_or_path", "dataset_config", "learning_rate", "max_train_steps"} <= set(changes)
    assert len(changes) == text.count("# yours:")
    changed = tmp_path / "mine.toml"
    changed.write_text(YOURS.sub(r"\1 = \2", text), encoding="utf-8")
    # What it names, as somebody has it.
    monkeypatch.chdir(tmp_path)
    values = {key: value for table in toml_text.load(changed).values() for key, value in table.items()}
    shutil.copytree(ROOT / "examples" / "unicorn" / "images", "examples/unicorn/images")
    shutil.copy(ROOT / "examples" / "unicorn" / "dataset.toml", values["dataset_config"])
    for name in (values["pretrained_model_name_or_path"], values.get("sample_prompts", "prompts.txt")):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("a cat\n", encoding="utf-8")
    config, datasets = read(changed)
    warn_of_idle_options(config, subsets_of(datasets))
    assert warnings(caplog) == []


def test_no_example_writes_the_files_of_another():
    names = [read(path)[0].saving.output_name for path in CONFIGS]
    assert len(CONFIGS) >= 7
    assert len(set(names)) == len(names)


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_recipes_run_dry(path, tmp_path, caplog):
    call(train_network, "--config_file", path, "--output_dir", tmp_path, "--dry_run")
    name = read(path)[0].saving.output_name
    assert (tmp_path / f"{name}-dry_run.txt").is_file()
    assert (tmp_path / f"{name}-blocks.png").is_file()
    assert warnings(caplog) == []
