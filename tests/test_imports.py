"""Who may import whom: the direction of imports, and where heavy libraries may stand."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from scripts import ROOT

STANDARD_AND_CONFIG = {"library.config", "library.errors", "library.text_files", "library.words"}
PROGRESS = {"library.progress"}
FILES = {
    *("library.files", "library.file_kinds", "library.pickles", "library.pickle_names"),
    *("library.safetensors_io", "library.scaled_weights", "library.weight_file", "library.parallel"),
}

# Package -> packages of the suite that its modules may import (besides itself).
MAY_IMPORT = {
    "library/config": {"library.errors", "library.text_files"},
    "library/data": STANDARD_AND_CONFIG | FILES | PROGRESS | {"library.randomness"},
    "library/diffusion": STANDARD_AND_CONFIG | {"library.randomness"},
    "library/optim": STANDARD_AND_CONFIG,
    "library/models": STANDARD_AND_CONFIG | FILES | PROGRESS,
    "library/adapters": STANDARD_AND_CONFIG | FILES | PROGRESS | {"library.models"},
    "library/sampling": STANDARD_AND_CONFIG | FILES | PROGRESS | {"library.models", "library.diffusion"},
    "library/networks": STANDARD_AND_CONFIG | FILES | PROGRESS | {"library.models"},
    "library/training": {"library"},
    "library/generation": {"library"},
    "networks": {"library", "networks"},
    "tools": {"library", "networks"},
    "finetune": {"library"},
}
# Heavy library -> the only places that may import it.
ONLY_IN = {
    "diffusers": (
        "library/models",
        "library/sampling",
        "library/generation/control_nets.py",
        "library/generation/embeddings.py",
    ),
    "transformers": ("library/models",),
    "accelerate": ("library/training",),
    "xformers": ("library/models",),
    "huggingface_hub": ("library/training", "library/models/hub.py"),
    "wandb": ("library/training",),
    "matplotlib": ("library/training/charts",),
    "argparse": ("library/config/command_line.py", "library/networks/trainable.py"),
}
NO_TORCH_AT_THE_TOP = [
    "train_network.py",
    "gen_img_diffusers.py",
    "gen_img.py",
    "sdxl_gen_img.py",
    "library/config",
    "library/generation/checks.py",
    "library/generation/requests.py",
    "library/data/records.py",
    "tools/show_metadata.py",
    "finetune",
]


def modules():
    for name in ("train_network", "sdxl_train_network", "gen_img_diffusers", "gen_img", "sdxl_gen_img"):
        yield ROOT / f"{name}.py"
    for folder in ("library", "networks", "tools", "finetune"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def imports(path, *, top_only=False):
    """Return the dotted names that a module imports; those under TYPE_CHECKING do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes: list[ast.AST] = [*(tree.body if top_only else ast.walk(tree))]
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in nodes:
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name, packages):
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("path", list(modules()), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_in_one_direction(path):
    place = path.relative_to(ROOT).as_posix()
    suite = ("library", "networks", "tools", "finetune", "train_network")
    own = [name for name in imports(path) if within(name, suite)]
    for package, allowed in MAY_IMPORT.items():
        if place.startswith(f"{package}/"):
            bad = [
                name for name in own if not within(name, allowed | {package.replace("/", ".")}) and name != "library"
            ]
            assert bad == []
    for library, places in ONLY_IN.items():
        if within(library, [name.split(".")[0] for name in imports(path)]):
            assert place.startswith(places), f"{place} imports {library}"


@pytest.mark.parametrize("path", sorted((ROOT / "library" / "generation").glob("*.py")), ids=lambda path: path.name)
def test_generation_does_not_import_training(path):
    assert [name for name in imports(path) if within(name, {"library.training"})] == []


def test_lora_stands_alone():
    import sys

    path = ROOT / "networks" / "lora.py"
    names = {name for name in imports(path) if name.split(".")[0] not in sys.stdlib_module_names}
    assert {name.split(".")[0] for name in names} <= {"torch", "safetensors", "networks"}
    # Ranks and rates by block are for training; without them the file does without the other one.
    assert {name for name in names if name.startswith("networks.")} <= {
        "networks.block_weights",
        *(f"networks.block_weights.{name}" for name in ("ARGUMENTS", "read_plan")),
    }
    assert not [name for name in imports(path, top_only=True) if name.startswith("networks")]


@pytest.mark.parametrize("place", NO_TORCH_AT_THE_TOP)
def test_what_answers_at_once_does_not_import_torch(place):
    target = ROOT / place
    for path in [target] if target.is_file() else sorted(target.rglob("*.py")):
        assert not within("torch", [name.split(".")[0] for name in imports(path, top_only=True)]), path


def test_matplotlib_is_imported_only_when_a_chart_is_drawn():
    """It takes half a second. Which modules may import it at all is checked above."""
    for path in sorted((ROOT / "library/training/charts").glob("*.py")):
        assert not within("matplotlib", [name.split(".")[0] for name in imports(path, top_only=True)]), path


def places_on_the_map():
    """Return the paths of the modules that CONTRIBUTING names.

    A name is below the folder of its heading; without a folder of its own it is beside the one before it.
    """
    text = (
        (ROOT / "CONTRIBUTING.md")
        .read_text(encoding="utf-8")
        .split("## The map")[1]
        .split("\n## Where a change goes")[0]
    )
    folder = Path()
    for row in text.splitlines():
        cell = row.split("|")[1] if row.startswith("|") else ""
        heading = re.search(r"\*\*`(.*)/`\*\*", cell)
        if heading:
            folder = Path(heading[1])
        beside = folder
        for name in re.findall(r"(?<!\*)`(\S+(?:\.py|/))`", cell):
            if "/" in name:
                beside = folder / name if name.endswith("/") else (folder / name).parent
            if name.endswith(".py"):
                yield (beside / Path(name).name).as_posix()


def test_the_map_names_every_module_at_its_place():
    there = {path.relative_to(ROOT).as_posix() for path in modules() if path.name != "__init__.py"}
    assert there - set(places_on_the_map()) == set()
    assert [place for place in places_on_the_map() if not (ROOT / place).is_file()] == []
