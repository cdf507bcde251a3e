"""What is told before and after a run: networks that would be replaced, its course, and the commands that follow."""

from __future__ import annotations

import logging
import os
import shlex

import pytest
from runs import options, train
from scripts import ROOT

import gen_img_diffusers
import train_network
from library import shell
from library.config.config_file import to_toml
from library.config.train import parse_train_config, with_seed
from library.errors import Problems, UserError
from library.training.record import next_steps
from library.training.record.replaced import check_replaced
from library.training.record.run_files import RunFiles
from library.words import duration
from networks import merge_lora

MAINS = {
    "gen_img_diffusers.py": gen_img_diffusers.main,
    "networks/merge_lora.py": merge_lora.main,
    "train_network.py": train_network.main,
}


def read(*argv):
    problems = Problems()
    config = parse_train_config([str(word) for word in argv], problems)
    problems.raise_if_any()
    return config


def run(command, *more):
    """Run a command that was told in this process, with further options."""
    start, script, *words = shlex.split(command)
    assert start == "python"
    assert MAINS[os.path.relpath(script, ROOT)]([*words, *more]) == 0


# ---- the end of a training ----------------------------------------------------------------------------------


def told_commands(caplog):
    """Return title -> command of the log."""
    lines = [record.getMessage() for record in caplog.records]
    return dict(line.split(":\n  ") for line in lines if ":\n  " in line)


def test_the_commands_at_the_end_can_be_pasted(base, pictures, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    out = tmp_path / "out put"
    train(base, pictures, out, max_train_epochs=2)
    text = caplog.text
    assert "trained 8 steps in " in text
    assert "the lowest average of an epoch" in text
    assert f"saved {out / 'x.safetensors'} (" in text
    commands = told_commands(caplog)
    assert list(commands) == ["draw with it", "merge it into the model", "train it on"]
    run(commands["draw with it"], "--steps", "1", "--images_per_prompt", "1")
    assert len(list((out / "x-pictures").glob("im_*.png"))) == 1
    run(commands["merge it into the model"])
    assert (out / "x-merged.safetensors").is_file()
    run(commands["train it on"], "--max_train_steps", "1")
    assert (out / "x-2.safetensors").is_file()


def test_a_run_with_a_state_goes_on_under_its_name(base, pictures, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    train(base, pictures, tmp_path, save_state_on_train_end=True, max_train_steps=1, wandb_api_key="mine")
    commands = told_commands(caplog)
    assert "mine" not in caplog.text
    assert commands["train it on (with --wandb_api_key again)"].endswith("x-state --max_train_steps 2")
    run(commands["train it on (with --wandb_api_key again)"])
    assert "trained 1 steps in " in caplog.text
    assert "--network_weights" not in told_commands(caplog)["train it on"]


def test_what_the_network_was_trained_over_is_drawn_and_merged_too():
    config = read("--pretrained_model_name_or_path=m", "--network_module=networks.lora", "--output_dir=o")
    over = read(
        *("--pretrained_model_name_or_path=m.ckpt", "--network_module=networks.lora", "--output_dir=o"),
        *("--base_weights", "a", "b", "--base_weights_multiplier", "0.5", "--initial_step=3", "--resume=s"),
    )
    assert " --ratios 1 --save_to o/last-merged" in next_steps.merge_command(config).replace("\\", "/")
    merged = next_steps.merge_command(over).replace("\\", "/")
    assert merged.endswith(" --models a b o/last.safetensors --ratios 0.5 1 1 --save_to o/last-merged.safetensors")
    on = next_steps.train_on_command(over, 5, 1)
    assert on.endswith("--output_name last-2 --seed 1 --resume= --initial_step 0")
    on = next_steps.go_on_command(over, RunFiles(over.saving).after_step(4), 4, 2).replace("\\", "/")
    assert on.startswith("accelerate launch --num_processes 2 ")
    assert on.endswith("--resume o/at-step00000004-state --initial_step 4")


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (r"C:\a\b.safetensors", r"C:\a\b.safetensors"),
        ("a cat", '"a cat"'),
        ("512,512", '"512,512"'),
        ("", '""'),
        ("a;b&c", '"a;b&c"'),
        ('say "x"', r'"say \"x\""'),
        ("a b\\", r'"a b\\"'),
        ("一角獣", '"一角獣"'),
    ],
)
def test_words_are_quoted_for_windows(word, expected):
    assert shell.quoted(word, windows=True) == expected


def test_a_script_is_named_by_its_path_elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert shell.command_line("train_network.py", ["a b"]).split()[1] == "train_network.py"
    monkeypatch.chdir(tmp_path)
    assert str(ROOT / "train_network.py") in shell.command_line("train_network.py", [])


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.21, "3.2 s"), (60, "1 min 0 s"), (3599, "59 min 59 s"), (7260, "2 h 1 min")]
)
def test_durations_are_said_in_two_units(seconds, text):
    assert duration(seconds) == text


# ---- networks of another run --------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path):
    """Return what puts a network and its record where a run wrote them, and the command line of that run."""
    argv = [
        *("--pretrained_model_name_or_path=m", "--network_module=networks.lora", f"--output_dir={tmp_path}"),
        *("--output_name=x", "--learning_rate=1e-3", "--resolution=96", "--network_args", "a=1", "b=2"),
    ]

    def make(*more, name="x.safetensors"):
        config = with_seed(read(*argv, *more), 5)
        (tmp_path / name).write_bytes(b"")
        RunFiles(config.saving).options.write_text(to_toml(config), encoding="utf-8")
        return argv

    return make


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--learning_rate=0.001",),
        ("--sample_every_n_steps=5", "--save_every_n_epochs=1"),
        ("--learning_rate=2", "--overwrite"),
        ("--learning_rate=2", "--output_name=y"),
        ("--learning_rate=2", "--resume=auto"),
    ],
)
def test_a_run_replaces_its_own_network_and_what_it_is_told_to(made, more):
    check_replaced(read(*made(), *more))


def test_the_network_of_another_run_is_named(made, tmp_path, caplog):
    argv = made()
    with pytest.raises(UserError) as raised:
        check_replaced(read(*argv, "--learning_rate=2", "--seed=3"))
    assert str(tmp_path / "x.safetensors") in str(raised.value)
    assert "(--learning_rate, --seed)" in str(raised.value)
    assert "--overwrite" in str(raised.value)
    check_replaced(read(*argv, "--learning_rate=2", "--dry_run"))
    assert "would be replaced" in caplog.text


@pytest.mark.parametrize("damage", [None, "= ="])
def test_a_network_without_a_record_is_named(made, tmp_path, damage):
    argv, record = made(), tmp_path / "x-options.toml"
    record.unlink() if damage is None else record.write_text(damage, encoding="utf-8")
    with pytest.raises(UserError, match="without a record"):
        check_replaced(read(*argv))


@pytest.mark.parametrize(
    ("name", "option"), [("x-000002.safetensors", "--save_every_n_epochs=1"), ("x-step00000002.safetensors", "")]
)
def test_networks_within_a_run_count_if_it_writes_such(made, tmp_path, name, option):
    argv = made(name=name)
    check_replaced(read(*argv, "--learning_rate=2"))
    with pytest.raises(UserError, match=name):
        check_replaced(read(*argv, "--learning_rate=2", option or "--save_every_n_steps=1"))


def test_a_training_repeats_but_replaces_no_other(base, pictures, tmp_path):
    train(base, pictures, tmp_path, max_train_steps=1, seed=None, overwrite=None)
    train(base, pictures, tmp_path, max_train_steps=1, seed=None, overwrite=None)
    with pytest.raises(UserError, match="of a run with other options .--max_train_steps"):
        train_network.main(options(base, pictures, tmp_path, seed=None, overwrite=None))
