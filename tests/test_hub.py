"""Upload to the Hugging Face Hub and states from it, against a hub on this machine."""

from __future__ import annotations

import re
import signal
import time
from typing import Any

import pytest
from runs import NEEDED, options, same, train, train_with

import train_network
from library.config.command_line import parse
from library.config.config_file import to_toml
from library.config.hub import HubConfig, HubState, parse_hub_state
from library.config.train import TrainConfig
from library.errors import UserError
from library.training.record.upload import Uploads

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"
TARGET = {"huggingface_repo_id": "u/r", "huggingface_token": TOKEN}


def warnings(caplog):
    return [record.message for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("in_background", [None, True], ids=["at once", "async"])
def test_every_file_and_state_arrives_before_it_is_removed(hub, base, pictures, tmp_path, caplog, in_background):
    caplog.set_level("DEBUG")
    hub.delay = 0.02
    train(
        base,
        pictures,
        tmp_path / "out",
        **TARGET,
        huggingface_path_in_repo="loras/dog/",
        save_every_n_steps=1,
        save_last_n_steps=1,
        save_state=True,
        save_state_to_huggingface=True,
        async_upload=in_background,
        logging_dir=tmp_path / "logs",
        log_config=True,
    )
    states = [[f"{name}-state/{part}" for part in ("options.toml", "state.pt", "train_state.json")] for name in NAMES]
    expected = [[f"{name}.safetensors", *state] for name, state in zip(NAMES, states, strict=True)]
    in_order = [path.removeprefix("loras/dog/") for path in hub.commits]
    assert [sorted(in_order[start : start + 4]) for start in range(0, 16, 4)] == [sorted(entry) for entry in expected]
    assert len(in_order) == 16
    local = {path.name for path in (tmp_path / "out").iterdir()}
    assert "x-step00000001.safetensors" not in local
    assert "x-step00000001-state" not in local
    assert hub.files["u/r"]["loras/dog/x.safetensors"] == (tmp_path / "out" / "x.safetensors").read_bytes()
    assert hub.private == {"u/r": True}
    assert f"Bearer {TOKEN}" in hub.tokens
    assert all("bucket_reso" in text for text in warnings(caplog))  # that of the pictures is not used
    # The token is in no file and in no line.
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 10
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in caplog.text
    assert not [name for name, content in hub.files["u/r"].items() if TOKEN.encode() in content]


NAMES = ["x-step00000001", "x-step00000002", "x-step00000003", "x"]


def test_an_upload_that_fails_is_one_line_and_the_training_goes_on(hub, base, pictures, tmp_path, caplog):
    expected = train(base, pictures, tmp_path / "a")
    hub.refuses = lambda path: "step00000002" in path
    found = train(base, pictures, tmp_path / "b", **TARGET, save_every_n_steps=1, huggingface_repo_visibility="public")
    same(found, expected)
    assert hub.private == {"u/r": False}
    assert sorted(hub.files["u/r"]) == ["x-step00000001.safetensors", "x-step00000003.safetensors", "x.safetensors"]
    (line,) = [text for text in warnings(caplog) if "upload" in text]
    assert "x-step00000002.safetensors was not uploaded: " in line
    assert "You may not write here." in line
    assert "\n" not in line


def test_without_a_network_the_run_is_told_of_at_its_start_and_goes_on(base, pictures, tmp_path, caplog):
    train(base, pictures, tmp_path, **TARGET, async_upload=True, max_train_steps=1)
    told = [text for text in warnings(caplog) if "u/r" in text or "uploaded" in text]
    assert told[0].startswith("--huggingface_repo_id u/r is not ready for uploads: ")
    assert told[1].startswith(f"{tmp_path / 'x.safetensors'} was not uploaded: ")
    assert len(told) == 2


def test_a_state_on_the_hub_goes_on_like_one_on_the_disk(hub, base, pictures, tmp_path):
    states = {"save_state": True, "save_state_to_huggingface": True, "huggingface_path_in_repo": "a/b"}
    expected = train(base, pictures, tmp_path / "whole", max_train_steps=4)
    train(base, pictures, tmp_path / "first", max_train_steps=4, save_every_n_steps=2, **TARGET, **states)
    resume = {"resume_from_huggingface": True, "resume": "u/r/a/b/x-step00000002-state:main:model"}
    same(train(base, pictures, tmp_path / "rest", max_train_steps=4, huggingface_token=TOKEN, **resume), expected)
    assert (tmp_path / "rest" / "from_hub" / "x-step00000002-state" / "state.pt").is_file()
    assert not list((tmp_path / "rest").rglob("*.tmp"))
    lines = (tmp_path / "rest" / "x-metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert '"step": 3,' in lines[0], "the first two steps were made elsewhere"


@pytest.mark.parametrize("place", ["u/r/none", "u/absent/x-state"])
def test_a_state_that_is_not_there_is_told_before_the_model_is_loaded(
    hub,
    base,
    pictures,
    tmp_path,
    monkeypatch,
    place,
):
    from library.training import recipe

    hub.files["u/r"] = {}
    monkeypatch.setattr(recipe, "open_base", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match=r"--resume: \S+ of u/\w+ cannot be downloaded: 404") as caught:
        train_network.main(options(base, pictures, tmp_path / "out", resume_from_huggingface=True, resume=place))
    assert "\n" not in str(caught.value)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no repository": ({"async_upload": True}, "--async_upload needs --huggingface_repo_id"),
    "a token alone": ({"huggingface_token": TOKEN}, "--huggingface_token needs --huggingface_repo_id"),
    "states alone": ({"save_state_to_huggingface": True}, "--save_state_to_huggingface needs --huggingface_repo_id"),
    "no states": (TARGET | {"save_state_to_huggingface": True}, "needs --save_state or --save_state_on_train_end"),
    "no owner": ({"huggingface_repo_id": "r"}, "--huggingface_repo_id must be USER/NAME, got 'r'"),
    "type": (TARGET | {"huggingface_repo_type": "lora"}, "must be model, dataset or space, got 'lora'"),
    "no state": ({"resume_from_huggingface": True}, "--resume must be USER/REPO/PATH[:REVISION[:TYPE]], got None"),
    "auto": ({"resume_from_huggingface": True, "resume": "auto"}, "--resume must be USER/REPO/PATH"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_before_anything_is_read(base, pictures, tmp_path, name):
    more, message = MISTAKES[name]
    with pytest.raises(UserError) as caught:
        train_network.main(options(base, pictures, tmp_path / "out", **more))
    assert message in str(caught.value)
    assert TOKEN not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("u/r/p", HubState("u/r", "p", None, "model")),
        ("u/r/a/b-state:main", HubState("u/r", "a/b-state", "main", "model")),
        ("u/r/a:v1:dataset", HubState("u/r", "a", "v1", "dataset")),
        ("u/r/a::space", HubState("u/r", "a", None, "space")),
        *((text, None) for text in ("", "u", "u/r", "u/r/", "u/r/../x", "u/r/p:a:lora", "u/r/p:a:model:x", r"C:\a\b")),
    ],
)
def test_the_place_of_a_state_is_read(text, place):
    if place is not None:
        assert parse_hub_state(text) == place
        return
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        parse_hub_state(text)


def read(*argv):
    return parse(TrainConfig, [*NEEDED, *argv])


def test_secrets_are_not_recorded_and_gui_files_that_leave_the_hub_off_are_read(tmp_path, caplog):
    config = read("--huggingface_token", TOKEN, "--wandb_api_key", TOKEN, "--network_dim", "2")
    assert "network_dim" in to_toml(config)
    assert TOKEN not in to_toml(config)
    path = tmp_path / "gui.toml"
    names = ("repo_id", "repo_type", "path_in_repo", "token", "repo_visibility")
    lines = [f'huggingface_{name} = ""' for name in names]
    lines += ['save_state_to_huggingface = ""', 'resume_from_huggingface = ""', "async_upload = false"]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert read("--config_file", str(path)).hub == HubConfig()
    path.write_text(f'[a]\nhuggingface_token = "x"\n[b]\nhuggingface_token = "{TOKEN}"\n', encoding="utf-8")
    assert read("--config_file", str(path)).hub.huggingface_token == TOKEN
    assert "huggingface_token is given twice; the later value is used" in caplog.text
    path.write_text(f'huggingface_token = ["{TOKEN}"]\n', encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read("--config_file", str(path))
    assert TOKEN not in caplog.text + str(caught.value)


def test_uploads_in_the_background_keep_their_order_and_are_waited_for(hub, tmp_path):
    hub.delay = 0.2
    paths = [tmp_path / f"{index}.bin" for index in range(3)]
    with Uploads(HubConfig(huggingface_repo_id="u/r", async_upload=True), is_main=True) as uploads:
        begin = time.monotonic()
        for path in paths:
            path.write_bytes(path.name.encode())
            uploads.add(path)
            uploads.after(path.unlink)
        uploads.after(lambda: 1 / 0)  # what fails does not end the thread
        uploads.after(lambda: hub.commits.append("end"))
        assert time.monotonic() - begin < 0.2
    assert hub.commits == ["0.bin", "1.bin", "2.bin", "end"]
    assert hub.files["u/r"] == {path.name: path.name.encode() for path in paths}
    assert not any(path.exists() for path in paths)


def test_a_run_that_is_stopped_in_order_waits_for_its_uploads(hub, base, pictures, tmp_path):
    hub.delay = 0.3
    more = TARGET | {"async_upload": True, "save_state": True, "save_state_to_huggingface": True}
    with pytest.raises(KeyboardInterrupt):
        train_with(options(base, pictures, tmp_path, **more), lambda _: signal.raise_signal(signal.SIGINT), after=1)
    assert hub.commits[0] == "x-step00000001.safetensors"
    assert {path.rpartition("/")[0] for path in hub.commits[1:]} == {"x-step00000001-state"}


def test_a_run_that_is_stopped_at_once_does_not_wait(hub, tmp_path):
    hub.delay = 5
    (tmp_path / "a.bin").touch()
    begin = time.monotonic()
    with (
        pytest.raises(KeyboardInterrupt),
        Uploads(HubConfig(huggingface_repo_id="u/r", async_upload=True), is_main=True) as uploads,
    ):
        uploads.add(tmp_path / "a.bin")
        raise KeyboardInterrupt
    assert time.monotonic() - begin < 2
