"""Bad input of train_network.py: what holds for every refusal, and what bad files are made of, for tests."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import options
from safetensors.torch import save

import train_network
from library import logs
from library.data.picture_index import INDEX_FILE

LARGE = 2**20  # bytes of a file whose content is not compared


def rows(table: Mapping[str, Any]) -> pytest.MarkDecorator:
    """Return the arguments that make a table of cases the parameters of a test."""
    return pytest.mark.parametrize("case", table.values(), ids=table.keys())


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def pickled(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def as_file(path: Path, content: bytes | dict[str, torch.Tensor]) -> Path:
    """Write bytes, or tensors as the suffix says."""
    if not isinstance(content, bytes):
        content = save(content) if path.suffix == ".safetensors" else pickled(content)
    return write(path, content)


class Payload:
    """What an evil pickle holds: loading it makes a folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def contents(folder: Path) -> dict[Path, object]:
    """Return what is below a folder, without indices of pictures: bytes of each file, of a large one size and time."""
    found: dict[Path, object] = {}
    for path in folder.rglob("*"):
        if path.name.startswith(INDEX_FILE):  # pictures of more than two seconds have one
            continue
        if path.is_file():
            stat = path.stat()
            found[path] = path.read_bytes() if stat.st_size < LARGE else (stat.st_size, stat.st_mtime_ns)
        else:
            found[path] = None
    return found


class Refused:
    """What starts train_network.py in a folder with bad input, and checks all that holds for a refusal."""

    def __init__(
        self,
        base: Path,
        pictures: Path,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        from library.training import recipe

        self.base, self.pictures, self.folder, self.out = base, pictures, folder, folder / "out"
        self.monkeypatch, self.capsys = monkeypatch, capsys
        for name in ("x.safetensors", "x-options.toml", "x-metrics.jsonl"):
            write(self.out / name, "of an earlier run")
        monkeypatch.setattr(logs, "set_up_logging", lambda: None)
        monkeypatch.setattr(recipe, "run", lambda *_, **__: pytest.fail("training began"))
        monkeypatch.chdir(folder)

    def __call__(
        self, given: list[str] | dict[str, Any], *fragments: str, loads: bool = False, readable: bool = True
    ) -> str:
        """Return the message, which holds the fragments; whether the model may be loaded before, and all be read."""
        from library.training import recipe

        if not loads:
            self.monkeypatch.setattr(recipe, "open_base", lambda *_, **__: pytest.fail("the model was loaded"))
        if not isinstance(given, list):
            given = dict(given)
            given = options(given.pop("base", self.base), self.pictures, self.out, **given)
        self.monkeypatch.setattr(sys, "argv", ["train_network.py", *given])
        before = contents(self.folder) if readable else None
        with pytest.raises(SystemExit) as ended:
            logs.run_script(train_network.main)
        told = self.capsys.readouterr().err
        message = told.partition("train_network.py: error: ")[2].rstrip("\n")
        assert ended.value.code == 2, told
        for fragment in fragments:
            assert fragment in message, message
        assert "Traceback" not in told
        assert len(message.splitlines()) <= 6
        assert max(map(len, message.splitlines())) < 700
        assert not readable or contents(self.folder) == before
        return message
