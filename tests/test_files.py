"""Files written whole or not at all, weight files against the package safetensors, and hashes."""

from __future__ import annotations

import errno
import hashlib
import os

import pytest
import torch
from safetensors.torch import save_file

from library.files import disk_errors, file_sha256, new_folder, replacing
from library.weight_file import open_weights, write_weights


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("name", ["a.png", "猫" * 80 + ".safetensors"])  # one as long as names may be
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, name, durable):
    path = tmp_path / "sub" / name
    with replacing(path, durable=durable) as temporary:
        assert temporary.suffix == ".tmp", "what a killed run leaves is no picture and no weight file"
        temporary.write_bytes(b"one")
    with pytest.raises(KeyboardInterrupt), replacing(path, durable=durable) as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert contents(path.parent) == {name: b"one"}


def test_what_a_killed_run_left_is_replaced_where_the_next_run_makes_it_again(tmp_path):
    with replacing(tmp_path / "a.png", durable=False) as left:
        left.touch()
    left.write_bytes(b"half")
    with replacing(tmp_path / "a.png", durable=False) as temporary:
        temporary.write_bytes(b"whole")
    assert contents(tmp_path) == {"a.png": b"whole"}


def test_a_folder_takes_the_place_of_an_empty_one_or_of_one_that_may_go(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (tmp_path / "link").symlink_to(target)
    with new_folder(tmp_path / "link") as folder:
        (folder / "a").write_bytes(b"a")
    assert contents(target) == {"a": b"a"}
    with pytest.raises(OSError, match="could not be written: Directory not empty"), new_folder(target) as folder:
        (folder / "b").write_bytes(b"b")
    assert contents(target) == {"a": b"a"}
    with new_folder(target, replace=True) as folder:
        (folder / "b").write_bytes(b"b")
    assert contents(target) == {"b": b"b"}
    assert {path.name for path in tmp_path.iterdir()} == {"model", "link"}


def test_write_failures_are_told_once_and_keep_their_number(tmp_path):
    path = tmp_path / "a"
    once = r"^\S*a could not be written: [^:]*; what was saved before is unchanged$"
    with pytest.raises(OSError, match=once) as caught, disk_errors(tmp_path), disk_errors(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(ValueError, match="other"), disk_errors(path):
        raise ValueError("other")


def test_weights_are_laid_out_as_the_package_safetensors_does(tmp_path):
    kinds = ["int64", "float64", "float32", "int32", "bfloat16", "float16", "int16", "int8", "uint8", "bool"]
    kinds += ["float8_e4m3fn", "float8_e5m2"]
    tensors = {f"{kind}.{shape}": torch.ones(shape).to(getattr(torch, kind)) for kind in kinds for shape in ((), 0, 3)}
    metadata = {"名": 'a "b"\n\x7f\x01'}
    write_weights(tmp_path / "own.safetensors", tensors, metadata)
    save_file(tensors, tmp_path / "package.safetensors", metadata)
    assert (tmp_path / "own.safetensors").read_bytes() == (tmp_path / "package.safetensors").read_bytes()


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_weights_come_back_as_they_were(tmp_path, suffix):
    tensors = {"b": torch.randn(2, 3), "a": torch.randn(4).half()}
    path = tmp_path / f"weights{suffix}"
    write_weights(path, tensors)
    found = dict(open_weights(path).tensors(tensors))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_hashes_of_files_are_those_of_hashlib(tmp_path):
    path, data = tmp_path / "a", os.urandom(2**21 + 5)
    path.write_bytes(data)
    assert file_sha256(path) == hashlib.sha256(data).hexdigest()
    assert file_sha256(path, 2**20 - 3) == hashlib.sha256(data[2**20 - 3 :]).hexdigest()
