"""Where a run logs to: TensorBoard, wandb, and the lines on the console."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import sys

import pytest
from runs import NEEDED, options, same, train
from scripts import ROOT

import train_network
from library import logs
from library.config.command_line import parse
from library.config.train import TrainConfig
from library.errors import UserError
from library.training.record import tracking

SECRETS = {
    "wandb_api_key": "0123456789abcdef0123456789abcdef01234567",
    "huggingface_token": "hf_abcdefghijklmnop",
}


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """Return wandb without a login, and without reports of its own to anyone."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "NETRC"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_API_KEY", "")
    import wandb

    yield wandb
    wandb.teardown()


def offline_run(folder):
    """Return what an offline run wrote, as bytes."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    return path.read_bytes()


def read(argv):
    return parse(TrainConfig, [*NEEDED, *argv])


@pytest.mark.slow
def test_wandb_without_a_key_logs_offline_and_says_how_to_send_the_run(wandb, base, pictures, tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "p.txt").write_text("a dog --w 64 --h 64 --s 1\n", encoding="utf-8")
    (tmp_path / "t.toml").write_text('[wandb]\ntags = ["mytag"]\nname = "other"\n', encoding="utf-8")
    comment = {"training_comment": "it is mine"}
    found = train(
        base,
        pictures,
        tmp_path / "out",
        **comment,
        log_with="wandb",
        wandb_run_name="myrun",
        log_tracker_name="myproject",
        log_tracker_config=tmp_path / "t.toml",
        log_config=True,
        sample_prompts=tmp_path / "p.txt",
        sample_at_first=True,
    )
    same(found, train(base, pictures, tmp_path / "plain", **comment))
    content = offline_run(tmp_path / "out")
    names = ["loss/current", "loss/epoch_average", "lr/unet", "sample_0", "myrun", "myproject", "mytag", "it is mine"]
    assert [name for name in names if name.encode() not in content] == []
    assert str(base).encode() not in content
    (line,) = [record.message for record in caplog.records if "wandb sync" in record.message]
    assert line.endswith(str(next((tmp_path / "out").glob("wandb/offline-run-*"))))


def test_wandb_that_does_not_answer_ends_no_run_and_nothing_secret_is_written(
    wandb, base, pictures, tmp_path, caplog, monkeypatch
):
    caplog.set_level("DEBUG")
    init, keys = wandb.init, []

    def unreachable(**more):
        keys.append(os.environ["WANDB_API_KEY"])
        if more.get("mode") != "offline":
            raise wandb.errors.CommError("no answer\nat all")
        return init(**more)

    monkeypatch.setattr(wandb, "login", lambda **_: True)
    monkeypatch.setattr(wandb, "init", unreachable)
    more = {"logging_dir": tmp_path / "logs", "log_with": "all", "log_config": True, "huggingface_repo_id": "u/r"}
    argv = options(base, pictures, tmp_path / "out", **more, **SECRETS)
    monkeypatch.setattr(sys, "argv", ["train_network.py", *argv])
    assert train_network.main(argv) == 0
    assert keys == [SECRETS["wandb_api_key"]] * 2
    assert "wandb does not answer (no answer): the run is logged offline" in caplog.text
    assert b"loss/current" in offline_run(tmp_path / "logs")
    assert list((tmp_path / "logs").rglob("events.out.*"))
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 10
    for secret in SECRETS.values():
        assert not [path for path in written if secret.encode() in path.read_bytes()]
        assert secret not in caplog.text


def test_wandb_can_be_switched_off_from_outside(wandb, tmp_path, monkeypatch, caplog):
    from accelerate import Accelerator

    monkeypatch.setenv("WANDB_MODE", "disabled")
    config = read(["--log_with", "wandb", "--output_dir", str(tmp_path)])
    accelerator = Accelerator(log_with=["wandb"])
    tracking.start_trackers(config, accelerator)
    accelerator.log({"loss/current": 1.0}, step=1)
    accelerator.trackers[0].finish()
    assert not (tmp_path / "wandb").exists()
    assert "wandb sync" not in caplog.text


def test_tensorboard_takes_arguments_and_the_options_without_paths(base, pictures, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "t.toml").write_text('[tensorboard]\nfilename_suffix = ".mine"\n[wandb]\n', encoding="utf-8")
    more = {"log_config": True, "log_tracker_config": tmp_path / "t.toml", "log_tracker_name": "tracker"}
    train(base, pictures, tmp_path / "out", logging_dir=tmp_path / "logs", **more)
    (run,) = (tmp_path / "logs").glob("20*/tracker")
    assert len(list(run.glob("events.out.*.mine"))) == 1
    assert EventAccumulator(str(run)).Reload().Scalars("loss/current")[-1].step == 3
    (record,) = run.rglob("hparams.yml")
    told = record.read_text(encoding="utf-8")
    assert "learning_rate: 0.01" in told
    assert "output_name: x" in told
    assert str(tmp_path) not in told


def test_options_for_trackers_hold_neither_keys_nor_paths():
    argv = ["--wandb_api_key", "k1", "--huggingface_token", "k2", "--vae", "v.safetensors", "--resume", "C:\\a\\b"]
    argv += [
        "--base_weights",
        "a.safetensors",
        "--network_args",
        "conv_dim=4",
        "weights=/a/b",
        "--optimizer_args",
        "eps=1",
    ]
    told = tracking.loggable_options(read([*argv, "--resolution", "512"]))
    gone = {"wandb_api_key", "huggingface_token", "vae", "resume", "base_weights", "network_args"}
    assert not gone & set(told)
    assert told["resolution"] == "(512, 512)"
    assert told["optimizer_args"] == "('eps=1',)"
    assert told["train_batch_size"] == 1
    assert all(isinstance(value, bool | int | float | str) for value in told.values())


TABLES = {
    "[wandb]\ntag = 1": "wandb.tag is not known; did you mean tags?",
    '[wandb]\nproject = "x"': "wandb.project is not taken: give --log_tracker_name",
    "[tensorboard]\nflush = 1": "tensorboard.flush is not known; did you mean flush_secs?",
    "[aim]\na = 1": "aim is not known: the tables are [tensorboard], [wandb]",
    "wandb = 1": "wandb is not known",
    "[wandb": "is not valid TOML",
}


@pytest.mark.parametrize("content", TABLES)
def test_mistakes_in_the_arguments_of_trackers_are_told_before_the_model_is_loaded(
    base, pictures, tmp_path, monkeypatch, content
):
    from library.training import recipe

    monkeypatch.setattr(recipe, "open_base", lambda *_, **__: pytest.fail("the model was loaded"))
    path = tmp_path / "t.toml"
    path.write_text(content, encoding="utf-8")
    more = {"log_with": "all", "logging_dir": tmp_path / "logs", "log_tracker_config": path}
    with pytest.raises(UserError) as caught:
        train_network.main(options(base, pictures, tmp_path / "out", **more))
    assert TABLES[content] in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("page", ["files_and_logs.md", "files_and_logs-ja.md"])
def test_the_arguments_in_the_documentation_are_accepted(tmp_path, page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    (tmp_path / "t.toml").write_text(text.split("```toml trackers\n")[1].split("```")[0], encoding="utf-8")
    argv = ["--log_with", "all", "--log_tracker_config", str(tmp_path / "t.toml")]
    assert set(tracking.tracker_arguments(read(argv).logs)) == {"tensorboard", "wandb"}


def test_a_tracker_that_is_not_installed_is_told_before_the_model_is_loaded(base, pictures, tmp_path, monkeypatch):
    from library.training import recipe

    monkeypatch.setattr(recipe, "open_base", lambda *_, **__: pytest.fail("the model was loaded"))
    version = importlib.metadata.version

    def absent(name):
        if name == "wandb":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    argv = options(base, pictures, tmp_path / "out", log_with="wandb")
    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(UserError, match="logging to wandb needs its package: pip install wandb"):
        train_network.main(argv)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.19.1" if name == "wandb" else version(name))
    with pytest.raises(UserError, match=r"needs wandb 0\.31 or newer, not 0\.19\.1"):
        train_network.main(argv)


@pytest.mark.parametrize("choice", ["tensorboard", "all"])
def test_tensorboard_needs_a_folder(base, pictures, tmp_path, choice):
    with pytest.raises(UserError, match=f"--log_with {choice} needs --logging_dir"):
        train_network.main(options(base, pictures, tmp_path / "out", log_with=choice))


# ---- the console --------------------------------------------------------------------------------------------


@pytest.fixture
def console(capsys):
    """Return what catches the console; after the test log lines are as before."""
    loggers = [logging.getLogger(name) for name in ("", *logs.SUITE)]
    levels, handlers = [logger.level for logger in loggers], loggers[0].handlers[:]
    yield capsys
    for handler in loggers[0].handlers:
        if handler not in handlers:
            handler.close()
    loggers[0].handlers[:] = handlers
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def test_log_lines_go_to_a_file_in_place_of_the_console(console, base, pictures, tmp_path):
    logs.set_up_logging()
    path = tmp_path / "new" / "log.txt"
    for name in ("x", "一角獣"):
        more = {"output_name": name, "console_log_file": path, "console_log_level": "DEBUG", "xformers": True}
        assert train_network.main(options(base, pictures, tmp_path / "out", **more)) == 0
    lines = path.read_text(encoding="utf-8").splitlines()
    assert any(line.startswith(f"saved {tmp_path / 'out' / '一角獣.safetensors'} (") for line in lines)
    assert sum("warning: --xformers" in line for line in lines) == 1
    assert not any("x.safetensors" in line and "saved" in line for line in lines), "the file begins anew"
    captured = console.readouterr()
    assert "saved" not in captured.err + captured.out
    assert "--xformers" not in captured.err + captured.out


@pytest.mark.parametrize(("level", "shown"), [(None, {"info", "warning"}), ("WARNING", {"warning"}), ("ERROR", set())])
def test_lines_below_the_level_are_not_shown(console, level, shown):
    logs.set_up_logging()
    logs.choose_log_lines(level, None)
    for name in ("library.training.recipe", "some.package"):
        logging.getLogger(name).info("info of %s", name)
        logging.getLogger(name).warning("warning of %s", name)
    text = console.readouterr().err
    assert {word for word in ("info", "warning") if f"{word} of library" in text} == shown
    assert {word for word in ("info", "warning") if f"{word} of some" in text} == shown - {"info"}


def test_of_several_processes_the_first_one_speaks(console, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    logs.set_up_logging()
    logs.choose_log_lines("DEBUG", tmp_path / "log.txt")
    logging.getLogger("library").warning("quiet")
    logging.getLogger("library").error("loud")
    assert console.readouterr().err == "error: loud\n"
    assert not (tmp_path / "log.txt").exists()


def test_a_log_file_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(UserError, match="--console_log_file: .* cannot be written"):
        train_network.main(["--console_log_file", str(tmp_path)])
