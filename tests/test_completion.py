"""tools/completion.py: what bash, zsh and PowerShell complete."""

from __future__ import annotations

import re
import shutil
import subprocess
from shlex import quote

import pytest
from scripts import ROOT
from test_imports import modules

from library.config.optimizer import OPTIMIZER_NAMES
from library.config.samplers import SAMPLER_NAMES
from tools import completion

# What stands before the cursor, and what is offered there; "files" and "folders" are left to the shell, "" is nothing.
ASKED = {
    "an option": ("python train_network.py --max_train_e", ["--max_train_epochs"]),
    "an alias": ("python train_network.py --networkd", ["--networkdim"]),
    "in a folder": ("python ../suite/networks/merge_lora.py --sd_", ["--sd_model"]),
    "by accelerate": ("accelerate launch --num_processes 2 train_network.py --print", ["--print_options"]),
    "as a program": ("./gen_img.py --sampl", ["--sampler"]),
    "a choice": ("python train_network.py --mixed_precision ", ["no", "fp16", "bf16"]),
    "optimizers": ("python train_network.py --seed 3 --optimizer_type ", list(OPTIMIZER_NAMES)),
    "samplers": ("python gen_img_diffusers.py --sampler ", list(SAMPLER_NAMES)),
    "one of several": ("python gen_img_diffusers.py --network_module networks.lora networks.d", ["networks.dylora"]),
    "no second value": ("python train_network.py --mixed_precision fp16 b", []),
    "another script": ("python other.py --max_train_e", []),
    "a number": ("python train_network.py --seed ", []),
}


def written(shell, tmp_path, capsys):
    completion.main([shell])
    path = tmp_path / f"suite.{shell}"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    return path


def needs(shell):
    return pytest.mark.skipif(shutil.which(shell) is None, reason=f"{shell} is not installed")


def answers(*argv):
    done = subprocess.run(argv, capture_output=True, encoding="utf-8", check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return [line.split() for line in done.stdout.splitlines()]


@needs("bash")
def test_bash_completes_names_and_values(tmp_path, capsys):
    script = tmp_path / "ask.bash"
    asked = "".join(
        f"COMP_WORDS=({before} {quote(word)})\nCOMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))\n"
        'COMPREPLY=(); _lora_suite python x y; echo "${COMPREPLY[@]}"\n'
        for before, _, word in (line.rpartition(" ") for line, _ in ASKED.values())
    )
    script.write_text(f"set -u\nsource '{written('bash', tmp_path, capsys)}'\n{asked}", encoding="utf-8")
    assert dict(zip(ASKED, answers("bash", script), strict=True)) == {name: found for name, (_, found) in ASKED.items()}


@needs("bash")
def test_bash_splits_at_the_equals_sign_and_keeps_what_was_there_before(tmp_path, capsys):
    script = tmp_path / "ask.bash"
    script.write_text(
        "_before() { COMPREPLY=(before); }\ncomplete -F _before python\n"
        f"source '{written('bash', tmp_path, capsys)}'; source '{tmp_path / 'suite.bash'}'\n"
        'ask() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _lora_suite python x y; echo "${COMPREPLY[@]}"; }\n'
        "ask python train_network.py --mixed_precision = b\nask python train_network.py --mixed_precision =\n"
        "ask python other.py --x\n",
        encoding="utf-8",
    )
    assert answers("bash", script) == [["bf16"], ["no", "fp16", "bf16"], ["before"]]


@needs("zsh")
def test_zsh_completes_names_and_values(tmp_path, capsys):
    """The functions that do the asking and offering are replaced, since they work only in the line editor."""
    script = tmp_path / "ask.zsh"
    asked = "".join(
        f"words=({before} {quote(word)}) CURRENT=$#words PREFIX={quote(word)} service=python\n_lora_suite; print\n"
        for before, _, word in (line.rpartition(" ") for line, _ in ASKED.values())
    )
    script.write_text(
        "compdef() { :; }; _default() { :; }; _message() { :; }; _files() { :; }; typeset -A _comps\n"
        'offer() { local each; for each in $@; do [[ $each == $PREFIX* ]] && print -n -- "$each "; done; }\n'
        "compadd() { shift; offer $@; }; _describe() { offer ${${(P)3}%%:*}; }\n"
        f"source '{written('zsh', tmp_path, capsys)}'\n{asked}",
        encoding="utf-8",
    )
    assert dict(zip(ASKED, answers("zsh", "-f", script), strict=True)) == {
        name: found for name, (_, found) in ASKED.items()
    }


def test_powershell_has_every_name_once_whatever_its_case():
    """PowerShell reads two keys that differ in case as one, and refuses the table."""
    text = completion.powershell(completion.groups())
    for block in re.findall(r"(?s)\[ordered\]@\{\n(.*?)\n    \}", text):
        rows = [
            re.fullmatch(r"        '([\w-]+)' = @\('([^']*)', '((?:[^']|'')*)'\)", row) for row in block.split("\n")
        ]
        names = [row[1].casefold() for row in rows if row]
        assert len(set(names)) == len(names) == len(rows)
    assert text.isascii()


def test_paths_are_files_or_folders():
    of = {name.name: name.follows for name in completion.groups()[0].names}
    assert of["--network_weights"] == of["--pretrained_model_name_or_path"] == of["--resume"] == "files"
    assert of["--output_dir"] == of["--train_data_dir"] == "folders"
    assert of["--cache_latents"] == of["--help"] == "switch"


def test_every_script_is_completed():
    starts = [path for path in modules() if "\n    run_script(main" in path.read_text(encoding="utf-8")]
    assert sorted(completion.SCRIPTS) == sorted(path.relative_to(ROOT).as_posix() for path in starts)
