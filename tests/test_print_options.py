"""--print_options: what holds and where it comes from; mistyped values."""

from __future__ import annotations

import pytest
from scripts import ROOT, python
from test_given import ROOTS

import gen_img_diffusers
import train_network
from library.config.command_line import parse
from library.config.options import root_options
from library.config.printed import MARK
from library.errors import UserError
from library.optim.optimizers import OPTIMIZER_NAMES, ROWS
from tools import cache_latents


def printed(capsys, main, *argv):
    """Return label -> (whether it is marked, value, source) of what a script prints before it ends with 0."""
    with pytest.raises(SystemExit) as ended:
        main([*map(str, argv), "--print_options"])
    assert ended.value.code == 0
    rows = {}
    for line in capsys.readouterr().out.splitlines():
        mark, text = line[:1], line[2:]
        if line[:2] in ("* ", "  ") and text.startswith("--"):
            label, value, source = (part.strip() for part in [*text.split("  "), ""] if part.strip())
            rows[label] = (mark == MARK, value, source)
    return rows


def test_each_value_has_its_source(tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text("network_dim = 4\nlearning_rate = 1\nmax_train_epochs = 2\nsample_every_n_steps = 0\nseed = 5\n")
    rows = printed(
        capsys,
        train_network.main,
        *("--config_file", file, "--network_dim", 8, "--cache_latents_to_disk", "--use_8bit_adam"),
        *("--max_train_steps", 9, "--wandb_api_key", "mine", "--optimizer_args", "a=1", "b=2"),
    )
    assert rows["--network_dim"] == (True, "8", "command line")
    assert rows["--learning_rate"] == (True, "1", str(file))
    assert rows["--cache_latents"] == (True, "on", "--cache_latents_to_disk implies it")
    assert rows["--optimizer_type"] == (True, "AdamW8bit", "--use_8bit_adam stands for it")
    assert rows["--sample_every_n_steps"] == (False, "unset", "0 is no interval")
    assert rows["--optimizer_args"] == (True, "a=1 b=2", "command line")
    assert rows["--wandb_api_key"] == (True, "(hidden)", "command line")
    assert rows["--max_train_epochs"] == (False, "unset", "default")  # the command line wins over the file
    assert rows["--network_alpha"] == (False, "1", "default")
    assert rows["--output_dir"] == (True, "missing", "required")
    assert set(rows) == {entry.label for entry in root_options(ROOTS["train"]).values()}


def test_what_a_script_sets_is_told(capsys):
    assert printed(capsys, cache_latents.main)["--cache_latents"] == (True, "on", "set by the script")


@pytest.mark.parametrize("root", ROOTS.values(), ids=list(ROOTS))
def test_every_script_prints_all_its_options(root, capsys):
    with pytest.raises(SystemExit):
        parse(root, ["--print_options"])
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[1 if line.startswith("*") else 0] for line in lines if line[:2] in ("* ", "  ")} - {"is"} == {
        entry.label for entry in root_options(root).values()
    }


def test_non_defaults_come_first_in_each_section(capsys):
    with pytest.raises(SystemExit):
        gen_img_diffusers.main(["--ckpt", "m", "--seed", "3", "--print_options"])
    for block in capsys.readouterr().out.split("\n\n")[1:]:
        marks = [line[0] for line in block.splitlines()[1:]]
        assert marks == sorted(marks, reverse=True)


def test_a_mistake_is_told_instead(tmp_path):
    with pytest.raises(UserError, match="--network_dim must be a whole number"):
        train_network.main(["--network_dim", "x", "--print_options"])


def test_nothing_is_imported_or_written(tmp_path):
    code = "import sys, train_network\ntry: train_network.main(sys.argv[1:])\n"
    code += "finally: assert not {'torch', 'numpy', 'PIL'} & set(sys.modules)"
    done = python("-c", code, "--output_dir", tmp_path / "o", "--print_options", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--mixed_precision", "FP61"], "must be one of no, fp16, bf16, got 'FP61'; did you mean fp16?"),
        (["--sample_sampler", "Euler_A"], "; did you mean euler_a?"),
        (["--dynamo_backend", "indutcor"], "or no, got 'indutcor'; did you mean inductor?"),
        (["--max_token_length", "151"], "must be one of 75, 150, 225, got '151'; did you mean 150?"),
    ],
)
def test_a_mistyped_value_shows_the_choices_and_the_nearest(argv, message):
    with pytest.raises(UserError) as raised:
        train_network.main(argv)
    assert any(line.startswith(f"{argv[0]} must be one of") and message in line for line in raised.value.lines)


def test_optimizers_that_are_known_by_name_are_the_rows():
    assert sorted(OPTIMIZER_NAMES) == sorted(row.name for row in ROWS)
