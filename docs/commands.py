"""Run the commands of the documentation as they stand on the pages, and make the pictures of the pages from them.

python docs/commands.py --list gen_img resume     prints what would run
python docs/commands.py gen_img resume            runs the commands of these pages, in the order of the pages
python docs/commands.py --quick                   all pages, with four steps in every training
python docs/commands.py --pictures                trains in full, and replaces the pictures in docs/images

Everything happens in a copy of the repository (--work, by default a temporary folder). Models and pictures that the
reader brings along are there as stand-ins, which are the small models and pictures of the examples; trainings with them
are dry runs. The exit code is 1 if a command failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"(?ms)^```(?P<kind>\w+)(?: (?P<name>[^\n]*))?\n(?P<text>.*?)^```$")
# Parts of commands that need what is not here, and why.
SKIPPED = {
    ".venv": "makes an environment",
    "pip install": "needs the network",
    "--huggingface_repo_id": "needs the network",
    "--resume_from_huggingface": "needs the network",
    "--multi_gpu": "needs two GPUs",
    "--resume auto": "needs a training that was interrupted",
    "benchmarks/gpu.py": "needs a GPU",
    "--in_json": "needs a metadata file of the reader",
    "--masked_loss": "needs masks of the reader",
    "theirs.safetensors": "needs a file of sd-scripts",
}
OWN = re.compile(r"models/|my_pictures\.toml|my_training\.toml|pictures/|--train_data_dir")  # what the reader brings
SMALLER = {"train_network.py": ("--dry_run",), "gen_img_diffusers.py": ("--W", "128", "--H", "128", "--steps", "2")}
QUICK = ("--max_train_steps", "4")
# Picture in docs/images -> the page whose commands make it, and the file that they write.
PICTURES: dict[str, tuple[str, str]] = {
    "unicorn-sheet.png": ("train_network", "output/unicorn-sheet.png"),
    "unicorn_xl-sheet.png": ("lora_in_your_project", "output/unicorn_xl-sheet.png"),
    "gen-grid.png": ("gen_img", "output/grid/grid.png"),
    "character-before.png": ("tutorial_character", "output/before/grid.png"),
    "character-pictures.png": ("tutorial_character", "output/my_unicorn-pictures.png"),
    "character-sheet.png": ("tutorial_character", "output/my_unicorn-sheet.png"),
    "character-loss.png": ("tutorial_character", "output/my_unicorn-loss.png"),
    "character-which.png": ("tutorial_character", "output/which/grid.png"),
    "character-strengths.png": ("tutorial_character", "output/strengths/grid.png"),
    "style-before.png": ("tutorial_style", "output/plain/grid.png"),
    "style-pictures.png": ("tutorial_style", "output/my_style-pictures.png"),
    "style-sheet.png": ("tutorial_style", "output/my_style-sheet.png"),
    "style-strengths.png": ("tutorial_style", "output/style-strengths/grid.png"),
    "style-which.png": ("tutorial_style", "output/style-which/grid.png"),
    "style-and-unicorn.png": ("tutorial_style", "output/style-and-unicorn/grid.png"),
    "report.png": ("report", "output/unicorn_page-report.html"),
}


@dataclasses.dataclass(frozen=True)
class Step:
    """A command to run, or a file to write with a text of the page."""

    kind: str
    text: str
    name: str | None = None


def steps(page: Path) -> Iterator[Step]:
    """Yield what a page has a reader do: files to save, then each command; the lines of Python are one program."""
    python = []
    for match in FENCE.finditer(page.read_text(encoding="utf-8")):
        if match["name"] and "." in match["name"]:
            yield Step("file", match["text"], match["name"])
        elif match["kind"] == "bash":
            for line in re.sub(r"\\\n\s*", "", match["text"]).splitlines():
                if line.strip():
                    yield Step("bash", line)
        elif match["kind"] == "python":
            python.append(match["text"])
    if python:
        yield Step("python", "\n".join(python))


def reason_to_skip(command: str) -> str | None:
    """Return why a command cannot run here, if so."""
    return next((reason for part, reason in SKIPPED.items() if part in command), None)


def to_run(command: str, *, quick: bool) -> str:
    """Return a command as it is run: with less work for models that are too large here, or where it shall be quick."""
    extra: Sequence[str] = ()
    if OWN.search(command):
        extra = next((options for script, options in SMALLER.items() if script in command), ())
    elif quick and "train_network.py" in command and "--help" not in command:
        extra = QUICK
    return command if set(extra) <= set(command.split()) else " ".join([command, *extra])


def prepare(folder: Path) -> None:
    """Write a copy of the repository, as it is now."""
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in names.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / "output").mkdir()


def bring_along(folder: Path) -> None:
    """Write stand-ins for what the reader brings along."""
    for place in ("mine", "unicorn", "10_name", "horses", "landscapes"):
        shutil.copytree(folder / "examples/unicorn/images", folder / "pictures" / place)
    shutil.copytree(folder / "pictures/mine", folder / "regularisation/1_horse")
    shutil.copy2(folder / "examples/unicorn/prompts.txt", folder / "my_prompts.txt")
    for step in steps(ROOT / "docs/train_network.md"):
        if step.kind == "file":
            run(step, folder, quick=True)
    (folder / "models").mkdir()
    for model, source in (("base", "pocket_model"), ("sdxl", "pocket_xl")):
        script = [sys.executable, "tools/convert_diffusers20_original_sd.py", f"examples/{source}"]
        subprocess.run([*script, f"models/{model}.safetensors"], cwd=folder, check=True, capture_output=True)
    for name, config in (("mine", "train"), ("mine_xl", "train_xl")):
        script = [sys.executable, "train_network.py", "--config_file", f"examples/unicorn/{config}.toml", *QUICK]
        subprocess.run([*script, "--output_name", name], cwd=folder, check=True, capture_output=True)


def run(step: Step, folder: Path, *, quick: bool) -> int:
    """Do one step in the copy of the repository; returns the exit code."""
    if step.kind == "file":
        assert step.name
        (folder / step.name).write_text(step.text, encoding="utf-8")
        return 0
    if step.kind == "python":
        done = subprocess.run(
            [sys.executable, "-"], check=False, cwd=folder, input=step.text, text=True, capture_output=True
        )
    else:
        command = to_run(step.text, quick=quick)
        # python and torchrun are those of this environment
        paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        environment = {**os.environ, "PATH": paths}
        done = subprocess.run(
            ["bash", "-c", command], check=False, cwd=folder, env=environment, text=True, capture_output=True
        )
    if done.returncode:
        sys.stdout.write(f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}\n")
    return done.returncode


def run_pages(pages: Sequence[Path], folder: Path, *, quick: bool) -> list[str]:
    """Run the commands of pages; returns those that failed. A command that several pages have runs once."""
    failed: list[str] = []
    seen: set[str] = set()
    for page in pages:
        for step in steps(page):
            title = step.name or ("lines of Python" if step.kind == "python" else step.text)
            reason = reason_to_skip(step.text) if step.kind == "bash" else None
            if reason or (step.kind == "bash" and step.text in seen):
                sys.stdout.write(f"{page.stem}: left out ({reason or 'ran before'}): {title}\n")
                continue
            seen.add(step.text)
            start = time.monotonic()
            code = run(step, folder, quick=quick)
            sys.stdout.write(
                f"{page.stem}: {'ok' if code == 0 else f'FAILED ({code})'} {time.monotonic() - start:.0f} s: {title}\n"
            )
            sys.stdout.flush()
            if code:
                failed.append(f"{page.stem}: {title}")
    return failed


def take_picture(source: Path, target: Path) -> None:
    """Copy a picture, or take one of a page, with Chromium."""
    if source.suffix != ".html":
        shutil.copy2(source, target)
        return
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1000,900"]
    subprocess.run(["chromium", *options, f"--screenshot={target}", source.as_uri()], check=True, capture_output=True)


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("pages", nargs="*", help="names of pages; none: all English ones")
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--quick", action="store_true", help="four steps in every training")
    parser.add_argument(
        "--pictures", action="store_true", help="replace the pictures in docs/images by those of the run"
    )
    parser.add_argument("--work", type=Path, help="a new folder to work in, which is kept")
    args = parser.parse_args()
    names = args.pages or ([*dict.fromkeys(page for page, _ in PICTURES.values())] if args.pictures else None)
    pages = sorted(page for page in (ROOT / "docs").glob("*.md") if not page.stem.endswith("-ja"))
    if names:
        pages = [ROOT / "docs" / f"{name}.md" for name in names]
    if args.list:
        for page in pages:
            for step in steps(page):
                sys.stdout.write(f"{page.stem}: {step.name or to_run(step.text, quick=args.quick)}\n")
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.work or Path(temporary) / "suite"
        folder.mkdir()
        prepare(folder)
        if any(OWN.search(step.text) for page in pages for step in steps(page)):
            bring_along(folder)
        failed = run_pages(pages, folder, quick=args.quick)
        for picture, (maker, file) in PICTURES.items() if args.pictures else ():
            if maker in {page.stem for page in pages}:
                take_picture(folder / file, ROOT / "docs/images" / picture)
    sys.stdout.write("\n".join(["failed:", *failed] if failed else ["all commands ran"]) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
