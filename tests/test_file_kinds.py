"""Weight files under any name, and what is none: content tells, and what is told is true."""

from __future__ import annotations

import argparse
import collections
import copy
import datetime
import io
import os
import pathlib
import pickle
import shutil
import sys
import tarfile
import types
import zipfile
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from loras import assert_deltas, deltas, make_lora
from refusals import Payload, pickled, rows
from safetensors.torch import load_file, save
from scripts import call

import gen_img_diffusers
from library.config.network import NetworkConfig
from library.errors import UserError
from library.file_kinds import weight_format
from library.generation.embeddings import embeddings_of
from library.networks.modules import check_network
from library.pickle_names import names_of
from library.pickles import load_pickle
from library.weight_file import data_sha256, open_weights, read_metadata, read_weights
from networks import (
    check_lora_weights,
    convert_lora,
    extract_lora_from_dylora,
    extract_lora_from_models,
    lora,
    merge_lora,
    resize_lora,
    svd_merge_lora,
)
from tools import convert_diffusers20_original_sd, merge_models, show_metadata

GOOD = {"a": torch.ones(3), "b": torch.full((2, 2), 0.5).half()}


def zipped(name: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(name, "x")
    return content.getvalue()


def tarred(*names: str) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name))
    return content.getvalue()


def program() -> bytes:
    content = io.BytesIO()
    with pytest.warns(DeprecationWarning):
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), content)
    return content.getvalue()


def old(content: object) -> bytes:
    """Return a pickle as torch wrote it before 1.6."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


# Content (or what makes it), and what is told.
OTHERS: dict[str, tuple[Any, str]] = {
    "web page": (b"<html>404</html>", "is not a weight file, but a web page (HTML): the download failed"),
    "web page after a mark and a comment": (b"\xef\xbb\xbf\r\n<!-- x -->\n<!doctype HTML>", "but a web page (HTML)"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7\nsize 2\n", "but a pointer of Git LFS"),
    "nothing": (b"", "is not a weight file: it is empty (0 bytes)"),
    "message of a server": (b'{"error": "Unauthorized"}', 'but a text that begins \'{"error": "Unauthorized"}\''),
    "XML": (b'<?xml version="1.0"?><Error>', "but an XML text"),
    "text": ("見つかりません\n".encode() * 100, "but a text that begins '見つかりません"),
    "text of Windows": ("Not found\r\n".encode("utf-16"), "but a text that begins 'Not found'"),
    "picture": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "but a PNG picture"),
    "photograph": (b"\xff\xd8\xff\xe0\0\x10JFIF", "but a JPEG picture"),
    "gzip": (b"\x1f\x8b\x08\0\0\0\0\0", "but a gzip archive: unpack it"),
    "7z": (b"7z\xbc\xaf\x27\x1c\0\x04", "but a 7z archive"),
    "GGUF": (b"GGUF\x03\0\0\0\x10\0", "but a GGUF file"),
    "ONNX": (b"\x08\x07\x12\x07pytorch\x1a\x051.0", "but an ONNX model"),
    "HDF5": (b"\x89HDF\r\n\x1a\n\0", "but an HDF5 file"),
    "NumPy": (b"\x93NUMPY\x01\0", "but a NumPy array"),
    "Flax": (b"\x82\xa7conv_in\x82\xa4bias", "but a file of Flax"),
    "zeros": (bytes(3000), "but a file that begins with zeros: its download did not finish"),
    "zip of something else": (zipped("model/readme.txt"), "but a zip archive with 'model/readme.txt' in it: unpack it"),
    "empty zip": (b"PK\x05\x06" + bytes(18), "but an empty zip archive"),
    "zip whose list is empty": (b"PK\x03\x04" + bytes(26) + b"PK\x05\x06" + bytes(18), "but an empty zip archive"),
    "program": (program, "but a program of torch (TorchScript)"),
    "tar": (tarred("a", "b"), "but a tar archive: unpack it"),
    "oldest torch": (tarred("sys_info", "pickle", "storages", "tensors"), "is in the oldest format of torch (tar"),
    "cut tar": (tarred("a")[:300], "is a tar archive that is cut short"),
    "cut pickle": (pickled(GOOD)[:-40], "is a zip archive, as torch writes, that is cut short or damaged"),
    "cut old pickle": (old(GOOD)[:-8], "is damaged or cut short, or a pickle that torch did not write"),
    "pickle of Python": (pickle.dumps({"a": 1}), "is damaged or cut short, or a pickle that torch did not write"),
    "old pickle of Python": (pickle.dumps({"a": 1}, 0), "is not a weight file, but a text"),
    "cut safetensors": (save(GOOD)[:-5], "is cut short: it has"),
    "safetensors cut in the header": (save(GOOD)[:40], "is cut short, or its header is damaged"),
    "safetensors cut at once": (save(GOOD)[:6], "is not a weight file, or its header is damaged"),
    "bytes": (b"\x9d\x01\xc3" * 500, "is not a weight file, or its header is damaged"),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@rows(OTHERS)
def test_what_is_no_weight_file_is_called_what_it_is(tmp_path, case, suffix):
    content, message = case
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content() if callable(content) else content)
    for read in (open_weights, read_weights):
        with pytest.raises(UserError) as caught:
            read(path)
        assert message in str(caught.value)
        assert "run code" not in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1


def test_folders_absent_and_unreadable_files_are_told(tmp_path, monkeypatch):
    (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(UserError, match="is not a weight file, but a folder"):
        open_weights(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="gone.pt does not exist"):
        open_weights(tmp_path / "gone.pt")
    (tmp_path / "y").touch()
    monkeypatch.setattr(
        pathlib.Path, "open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    with pytest.raises(UserError, match="y cannot be read: Permission denied"):
        weight_format(tmp_path / "y")


# ---- everything that opens weights tells it -----------------------------------------------------------------

WRONG = b"<!DOCTYPE html><title>Sign in</title>"
LORA_SCRIPTS: dict[str, Any] = {
    "merge_lora": (merge_lora, "--models {good} {bad} --ratios 1 1 --save_to {out}"),
    "merge_lora, base": (merge_lora, "--sd_model {bad} --models {good} --ratios 1 --save_to {out}"),
    "svd_merge_lora": (svd_merge_lora, "--models {good} {bad} --ratios 1 1 --save_to {out}"),
    "resize_lora": (resize_lora, "--model {bad} --save_to {out}"),
    "convert_lora": (convert_lora, "--model {bad} --save_to {out}"),
    "check_lora_weights": (check_lora_weights, "{bad}"),
    "extract_lora_from_dylora": (extract_lora_from_dylora, "--model {bad} --unit 1 --save_to {out}"),
    "extract_lora_from_models": (
        extract_lora_from_models,
        "--model_org {base} --model_tuned {bad} --save_to {out}",
    ),
    "merge_models": (merge_models, "--models {base} {bad} --output {out}"),
    "convert_diffusers": (convert_diffusers20_original_sd, "{bad} {folder}"),
    "show_metadata": (show_metadata, "--model {bad}"),
}


@pytest.fixture(scope="module")
def good(model_store, tmp_path_factory):
    return make_lora(model_store("sd1")[0], tmp_path_factory.mktemp("good") / "good.safetensors", rank=2)


@pytest.mark.parametrize("name", ["bad.safetensors", "bad.ckpt"])
@rows(LORA_SCRIPTS)
def test_every_script_tells_it(base, good, tmp_path, case, name):
    script, words = case
    (tmp_path / name).write_bytes(WRONG)
    places = {"good": good, "bad": tmp_path / name, "base": base, "out": tmp_path / "o.safetensors"}
    with pytest.raises(UserError, match=rf"{name} is not a weight file, but a web page"):
        call(script, *(word.format(folder=tmp_path / "folder", **places) for word in words.split()))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(("o.", "folder"))] == []


BOTH: dict[str, tuple[Any, str]] = {
    "merge_lora": (merge_lora, "--models {page} {good} {pointer} --ratios 1 1 1"),
    "merge_lora, base": (merge_lora, "--sd_model {page} --models {pointer} --ratios 1"),
    "svd_merge_lora": (svd_merge_lora, "--models {page} {good} {pointer} --ratios 1 1 1"),
    "extract_lora_from_models": (extract_lora_from_models, "--model_org {page} --model_tuned {pointer}"),
}


@rows(BOTH)
def test_several_broken_files_are_told_at_once(good, tmp_path, case):
    script, words = case
    places = {"good": good, "page": tmp_path / "page.safetensors", "pointer": tmp_path / "pointer.ckpt"}
    places["page"].write_bytes(WRONG)
    places["pointer"].write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7\nsize 2\n")
    with pytest.raises(UserError) as caught:
        call(script, *(word.format(**places) for word in words.split()), "--save_to", tmp_path / "o.safetensors")
    first, second = caught.value.lines
    assert "page.safetensors is not a weight file, but a web page" in first
    assert "pointer.ckpt is not a weight file, but a pointer of Git LFS" in second


@pytest.mark.parametrize("option", ["base", "vae", "network_weights", "base_weights"])
def test_training_tells_it_before_anything_is_loaded(refused, tmp_path, option):
    (tmp_path / "x.pt").write_bytes(WRONG)
    given = tmp_path / "x.pt"
    refused({option: [given] if option == "base_weights" else given}, "x.pt is not a weight file, but a web page")


def test_parts_of_folders_and_embeddings_tell_it(model_store, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_store("sd1")[1]["folder"], folder)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(WRONG)
    with pytest.raises(UserError, match="vae.diffusion_pytorch_model.safetensors is not a weight file, but a web page"):
        tiny.load(folder)
    (tmp_path / "word.pt").write_bytes(WRONG)
    with pytest.raises(UserError, match="word.pt is not a weight file, but a web page"):
        embeddings_of(tmp_path / "word.pt")


def test_drawing_tells_all_of_them_before_anything_is_loaded(tmp_path):
    names = ("net.safetensors", "word.pt", "lora.ckpt")
    for name in names:
        (tmp_path / name).write_bytes(WRONG)
    net, word, network = (str(tmp_path / name) for name in names)
    words = ["--ckpt", "absent", "--outdir", str(tmp_path / "o"), "--prompt", "a cat", "--guide_image_path", "a.png"]
    words += ["--control_net_models", net, "--textual_inversion_embeddings", word]
    with pytest.raises(UserError) as caught:
        gen_img_diffusers.main([*words, "--network_module", "networks.lora", "--network_weights", network])
    for name in names:
        assert f"{name} is not a weight file, but a web page" in str(caught.value)


@pytest.mark.parametrize("name", ["net.safetensors", "net/diffusion_pytorch_model.bin"])
def test_control_nets_tell_it(model_store, tmp_path, name):
    from library.generation.control_nets import load_control_net

    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(WRONG)
    base = tiny.load(model_store("sd1")[1]["folder"])
    with pytest.raises(UserError, match="is not a weight file, but a web page"):
        load_control_net(tmp_path / name.split("/")[0], base)


# ---- the content counts, not the name -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.ckpt", "x.pt", "x.bin", "x.pth", "x", "x.download", "x.SAFETENSORS"])
@pytest.mark.parametrize("content", [save(GOOD), pickled(GOOD), old(GOOD), pickled({"state_dict": GOOD})])
def test_both_formats_are_read_under_any_name(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    for found in (read_weights(path), lora.read_weights(path)):
        assert found.keys() == GOOD.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in GOOD.items())
    assert open_weights(path).shapes == {"a": (3,), "b": (2, 2)}
    assert read_metadata(path) == {}
    assert data_sha256(path)


def test_checkpoints_and_networks_are_read_under_wrong_names(model_store, good, tmp_path):
    models, paths = model_store("sd1")
    shutil.copy(paths["safetensors"], tmp_path / "a.ckpt")
    shutil.copy(paths["ckpt"], tmp_path / "b.safetensors")
    for name in ("a.ckpt", "b.safetensors"):
        state = tiny.load(tmp_path / name).unet.state_dict()
        assert all(torch.equal(state[key], tensor) for key, tensor in models["unet"].state_dict().items())
    shutil.copy(good, tmp_path / "c.pt")
    torch.save(load_file(good), tmp_path / "d.safetensors")
    for name in ("c.pt", "d.safetensors"):
        call(convert_lora, "--model", tmp_path / name, "--save_to", tmp_path / "e.safetensors")
        assert_deltas(tmp_path / "e.safetensors", deltas(good))
    call(merge_models, "--models", tmp_path / "a.ckpt", tmp_path / "b.safetensors", "--output", tmp_path / "f")
    # A pickle has epochs and steps, which a conversion counts on, also under another name.
    call(convert_diffusers20_original_sd, tmp_path / "b.safetensors", tmp_path / "g.ckpt", "--global_step", 5)
    assert torch.load(tmp_path / "g.ckpt", weights_only=True)["global_step"] == 15


def test_training_goes_on_from_a_network_under_a_wrong_name(run, good, tmp_path):
    torch.save(load_file(good), tmp_path / "d.safetensors")
    shutil.copy(good, tmp_path / "c.pt")
    expected = run("a", network_weights=good, dim_from_weights=True, base_weights=[good], max_train_steps=1)
    found = run(
        "b",
        network_weights=tmp_path / "d.safetensors",
        base_weights=[tmp_path / "c.pt"],
        dim_from_weights=True,
        max_train_steps=1,
    )
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_foreign_module_goes_by_the_name_and_that_is_told(good, tmp_path, monkeypatch):
    module = types.ModuleType("foreign_network")
    for name in ("create_network", "create_network_from_weights"):
        monkeypatch.setattr(module, name, lambda *args, **more: None, raising=False)
    monkeypatch.setitem(sys.modules, "foreign_network", module)
    torch.save(load_file(good), tmp_path / "d.safetensors")
    shutil.copy(good, tmp_path / "c.pt")
    for name, suffix in (("d.safetensors", ".pt"), ("c.pt", ".safetensors")):
        config = NetworkConfig(network_module="foreign_network", network_weights=tmp_path / name)
        with pytest.raises(UserError, match=rf"{name} is a .* file under another name.*: end it in \{suffix}"):
            check_network(config)
    check_network(NetworkConfig(network_module="foreign_network", network_weights=good))


def test_formats_are_told_where_only_one_will_do(tmp_path):
    (tmp_path / "a.ckpt").write_bytes(save(GOOD))
    with pytest.raises(UserError, match="a.ckpt is a safetensors file, a pickle of torch is needed"):
        load_pickle(tmp_path / "a.ckpt")


# ---- what pickles hold beside weights -----------------------------------------------------------------------


def created(module: str, name: str, monkeypatch: pytest.MonkeyPatch, base: type = object) -> Any:
    """Return a class of a module that is not installed here."""
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        if path not in sys.modules:
            monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
    found = type(name, (base,), {"__module__": module})
    monkeypatch.setattr(sys.modules[module], name, found, raising=False)
    return found


def lightning(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    checkpoint = created("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint", monkeypatch)
    stopping = created("lightning.pytorch.callbacks.early_stopping", "EarlyStopping", monkeypatch)
    settings = created("pytorch_lightning.utilities.parsing", "AttributeDict", monkeypatch, dict)()
    settings.update(lr=1e-4, betas=(0.9, 0.99))
    return {"callbacks": {checkpoint: {"monitor": "loss"}, stopping: {"wait": 0}}, "hyper_parameters": settings}


def omegaconf(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    values = created("omegaconf.listconfig", "ListConfig", monkeypatch)()
    node = created("omegaconf.nodes", "AnyNode", monkeypatch)()
    node.__dict__.update(_content=320, _metadata={"type": dict, "key": int})
    values.__dict__.update(_content=[node], _parent=None)
    return {"config": values, "types": [dict, list, str, int, float, bool, tuple]}


def of_python(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {
        "args": argparse.Namespace(lr=1.0, path=pathlib.PurePosixPath("a/b"), old=pathlib.PureWindowsPath("a")),
        "losses": collections.deque([1.0, 2.0], maxlen=3),
        "stats": collections.defaultdict(list, {"a": [1]}),
        "times": (datetime.datetime(2023, 1, 1), datetime.timedelta(1)),
        "names": {"a", "b"},
        "simple": types.SimpleNamespace(a=1),
        "counted": collections.Counter("aab"),
    }


def of_numpy(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"loss": np.float64(1.5), "count": np.int64(3), "row": np.arange(4.0), "type": np.dtype("float32")}


def of_optimizers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    return {"optimizer": optimizer, "state": optimizer.state_dict()}


HARMLESS = (lightning, omegaconf, of_python, of_numpy, of_optimizers)


@pytest.mark.parametrize("make", HARMLESS)
@pytest.mark.parametrize("written", [pickled, old])
def test_harmless_objects_are_passed_over_without_their_classes(tmp_path, make, written):
    with pytest.MonkeyPatch.context() as patch:
        content = written({"epoch": 1} | make(patch) | {"state_dict": GOOD})
    path = tmp_path / "x.ckpt"
    path.write_bytes(content)
    found = read_weights(path)
    assert all(torch.equal(found[name], tensor) for name, tensor in GOOD.items())
    assert found.keys() == GOOD.keys()
    assert not [name for name in sys.modules if name.startswith(("pytorch_lightning", "lightning", "omegaconf"))]


def test_a_checkpoint_of_lightning_is_a_base_model(model_store, tmp_path):
    models, paths = model_store("sd1")
    with pytest.MonkeyPatch.context() as patch:
        content = torch.load(paths["ckpt"], weights_only=True) | lightning(patch)
        torch.save(content, tmp_path / "sd.ckpt")
    call(convert_diffusers20_original_sd, tmp_path / "sd.ckpt", tmp_path / "sd.safetensors")
    state = load_file(tmp_path / "sd.safetensors")
    expected = tiny.original_state(models, "sd1")
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_textual_inversions_of_the_first_kind_are_read(tmp_path):
    vectors = torch.randn(2, 8)
    table = torch.nn.ParameterDict({"*": torch.nn.Parameter(vectors)})
    torch.save({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": table}, tmp_path / "word.pt")
    (found,) = embeddings_of(tmp_path / "word.pt")["word"]
    assert torch.equal(found, vectors)


class Nested:
    """Reads a pickle within a pickle, which no table of names sees."""

    def __reduce__(self) -> tuple[Any, ...]:
        return torch.storage._load_from_bytes, (pickled({"a": 1}),)


class Evaluated:
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("1 + 1",)


class Called:
    """Calls a function that is neither of weights nor in the table."""

    def __reduce__(self) -> tuple[Any, ...]:
        return copy.deepcopy, ([],)


DANGEROUS = {
    "a call": (Payload, f"({os.name}.mkdir)"),
    "a pickle in a pickle": (Nested, "(torch.storage._load_from_bytes)"),
    "evaluation": (Evaluated, "(builtins.eval)"),
    "copy": (Called, "(copy.deepcopy)"),
    "a whole model": (lambda: torch.nn.Linear(1, 1), "(torch.nn.modules.linear.Linear)"),
}


@rows(DANGEROUS)
@pytest.mark.parametrize("written", [pickled, old])
def test_what_would_run_code_is_refused_and_named(tmp_path, monkeypatch, case, written):
    make, named = case
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.ckpt"
    # Also beside harmless things, and before the weights.
    path.write_bytes(written({"times": datetime.date(2023, 1, 1), "x": make(), "state_dict": GOOD}))
    with pytest.raises(UserError) as caught:
        open_weights(path)
    assert f"is refused: it contains more than weights {named}, and loading that could run code" in str(caught.value)
    with pytest.raises(ValueError, match="no weight file, or holds more than tensors"):
        lora.read_weights(path)
    assert not (tmp_path / "ran").exists()


def test_several_strange_names_are_counted_up_to_three(tmp_path):
    class Many:
        def __reduce__(self) -> tuple[Any, ...]:
            return print, (eval, exec, input, compile)

    (tmp_path / "x.ckpt").write_bytes(pickled(Many()))
    with pytest.raises(UserError, match=r"\(builtins.compile, builtins.eval, builtins.exec, \.\.\.\)"):
        open_weights(tmp_path / "x.ckpt")


def test_states_of_a_run_need_all_that_is_in_them(tmp_path):
    (tmp_path / "state.pt").write_bytes(pickled({"optimizer": np.float64(1.5)}))
    with pytest.raises(UserError, match="it contains more than weights"):
        load_pickle(tmp_path / "state.pt", needs_all=True)


@pytest.mark.parametrize("protocol", range(6))
def test_names_are_found_in_every_version_of_pickles(protocol):
    content = {"a": [Payload(), datetime.date(2023, 1, 1), Payload()], "b": collections.OrderedDict(x=datetime.date)}
    found = set(names_of(io.BytesIO(pickle.dumps(content, protocol))))
    assert {name for name in found if not name.startswith(("_codecs", "copyreg"))} == {
        "posix.mkdir" if os.name == "posix" else "nt.mkdir",
        "datetime.date",
        "collections.OrderedDict",
    }
    assert set(names_of(io.BytesIO(b"\x80\x02\x82\x05."))) == {"copyreg.extension_5"}
    assert set(names_of(io.BytesIO(b"\x80\x04\x93."))) == {"?.?"}


def test_the_place_of_weights_that_are_not_found_is_told(tmp_path):
    torch.save({"model": {"state_dict": {"a.weight": torch.ones(2)}}, "epoch": 3}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="has its weights under model/state_dict, where nothing reads them"):
        open_weights(tmp_path / "a.ckpt")
