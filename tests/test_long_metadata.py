"""Metadata of any length and content: every writer writes files that the package safetensors reads."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loras import make_lora
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scripts import call

from library import safetensors_io
from library.errors import UserError
from library.networks.parts import Trained
from library.networks.trainable import TrainableNetwork
from library.weight_file import check_name, open_weights, write_weights
from networks import convert_lora, extract_lora_from_dylora, lora, merge_lora, resize_lora, svd_merge_lora
from tools import convert_diffusers20_original_sd, merge_models, show_metadata

LIMIT = 400_000  # in place of the true one
LONG = 300_000
WEIGHTS = {"lora_unet_x.lora_up.weight": torch.ones(2, 2)}


def metadata_of(path: Path) -> dict[str, str]:
    """Return what the package reads; it refuses a header that is too long or no JSON."""
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def shorten(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (lora, safetensors_io):
        monkeypatch.setattr(module, "MAX_HEADER_BYTES", LIMIT)


def header_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return int.from_bytes(file.read(8), "little")


@pytest.mark.parametrize("write", [lora.write_weights, write_weights])
def test_a_table_of_tags_that_is_too_long_is_left_out_and_the_rest_is_kept(tmp_path, caplog, write):
    path = tmp_path / "a.safetensors"
    write(path, WEIGHTS, {"ss_tag_frequency": "x" * 101_000_000, "ss_network_dim": "4", "modelspec.title": "a"})
    assert torch.equal(load_file(path)["lora_unet_x.lora_up.weight"], torch.ones(2, 2))
    found = metadata_of(path)
    assert found.keys() - {"sshs_model_hash", "sshs_legacy_hash"} == {"ss_network_dim", "modelspec.title"}
    assert "left out: ss_tag_frequency (101,000,023 bytes)" in caplog.text


def test_hashes_are_those_of_the_file_as_it_is_written(tmp_path, monkeypatch):
    shorten(monkeypatch)
    path = tmp_path / "a.safetensors"
    lora.write_weights(path, {"x": torch.ones(400_000)}, {"ss_datasets": "d" * LIMIT, "ss_a": "b" * LONG, "c": "d"})
    found = metadata_of(path)
    assert found["ss_a"] == "b" * LONG
    data = path.read_bytes()[8 + header_bytes(path) :]
    assert found["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    save_file(load_file(path), tmp_path / "b.safetensors", {"ss_a": "b" * LONG})
    whole = (tmp_path / "b.safetensors").read_bytes()
    assert found["sshs_legacy_hash"] == hashlib.sha256(whole[0x100000:0x110000]).hexdigest()[:8]


@pytest.mark.parametrize("module", [lora, safetensors_io])
@pytest.mark.parametrize(
    ("given_", "kept"),
    [
        # Tables of tags go before other entries that fit, the longer table first.
        ({"ss_tag_frequency": 250, "ss_datasets": 260}, {"ss_tag_frequency"}),
        ({"ss_tag_frequency": 200, "modelspec.description": 250}, {"modelspec.description"}),
        # What does not fit by itself goes alone.
        (
            {"modelspec.description": 500, "ss_tag_frequency": 200, "ss_datasets": 150},
            {"ss_tag_frequency", "ss_datasets"},
        ),
        ({"modelspec.thumbnail": 300, "modelspec.description": 250, "ss_v2": 5}, {"modelspec.description", "ss_v2"}),
        # What readers need is kept, even if it is long.
        ({"ss_network_dim": 300, "a": 250}, {"ss_network_dim"}),
        ({"a": 10, "b": 20}, {"a", "b"}),
    ],
)
def test_what_is_left_out(monkeypatch, module, given_, kept):
    monkeypatch.setattr(module, "MAX_HEADER_BYTES", 500)
    found = module.fitting({key: "x" * length for key, length in given_.items()}, 100)
    assert list(found) == [key for key in given_ if key in kept]


@settings(max_examples=60, deadline=None)
@given(
    metadata=st.dictionaries(
        st.sampled_from(["ss_tag_frequency", "ss_datasets", "ss_v2", "a", "\ud800", "名", "\x01"]),
        st.text(max_size=40) | st.text("\x00\ud800😀", max_size=60) | st.integers() | st.none(),
    ),
    limit=st.integers(64, 600),
)
def test_any_metadata_are_written_so_that_the_file_is_read(tmp_path_factory, metadata, limit):
    folder = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        for module in (lora, safetensors_io):
            patch.setattr(module.logger, "disabled", True)  # names with half a character cannot pass between processes
            patch.setattr(module, "MAX_HEADER_BYTES", limit)
        assert lora.fitting(metadata, 32) == safetensors_io.fitting(metadata, 32)
        for write, number in ((lora.write_weights, 1), (write_weights, 2)):
            path = folder / f"any{number}.safetensors"
            write(path, WEIGHTS, metadata)
            found = metadata_of(path)
            assert load_file(path).keys() == WEIGHTS.keys()
            # The tensors and, of a network, its hashes need so much in any case.
            assert header_bytes(path) <= max(limit, 300)
            for key, text in found.items():
                assert key.startswith("sshs_") or text in {
                    str(value).encode("utf-8", "replace").decode() for value in metadata.values()
                }


# ---- every script that writes safetensors -------------------------------------------------------------------


def sources(models: Any, checkpoint: Path, folder: Path) -> dict[str, Path]:
    """Return a LoRA, a DyLoRA and a checkpoint whose metadata fit, but not those of two together."""
    said = {"ss_tag_frequency": json.dumps({"a": "b" * LONG}), "modelspec.description": "c" * LONG}
    one = make_lora(models, folder / "one.safetensors", rank=2)
    two = make_lora(models, folder / "two.safetensors", rank=2, seed=1)
    for path in (one, two):
        save_file(load_file(path), path, said | {"ss_network_dim": "2"})
    save_file(load_file(one), folder / "dy.safetensors", said | {"ss_network_module": "networks.dylora"})
    save_file(load_file(checkpoint), folder / "model.safetensors", said | {"other": "d" * LONG})
    return {path.stem: path for path in folder.glob("*.safetensors")}


SCRIPTS: dict[str, Any] = {
    "merge into LoRA": (merge_lora, "--models {one} {two} --ratios 1 1 --save_to {out}"),
    "merge into model": (merge_lora, "--sd_model {model} --models {one} --ratios 1 --save_to {out}"),
    "svd merge": (svd_merge_lora, "--models {one} {two} --ratios 1 1 --new_rank 2 --save_to {out}"),
    "resize": (resize_lora, "--model {one} --new_rank 1 --save_to {out}"),
    "convert": (convert_lora, "--model {one} --save_to {out}"),
    "ranks": (extract_lora_from_dylora, "--model {dy} --unit 1 --save_to {out}"),
    "merge models": (merge_models, "--models {model} --output {out}"),
    "convert model": (convert_diffusers20_original_sd, "{model} {out}"),
}


@pytest.fixture(scope="module")
def long_sources(model_store, tmp_path_factory):
    models, paths = model_store("sd1")
    return sources(models, paths["safetensors"], tmp_path_factory.mktemp("long"))


@pytest.mark.repetitions(keep=3)
@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_write_what_can_be_read(long_sources, tmp_path, monkeypatch, name):
    shorten(monkeypatch)
    script, words = SCRIPTS[name]
    places = long_sources | {"out": tmp_path / "out.safetensors"}
    call(script, *(word.format(**places) for word in words.split()))
    written = list(tmp_path.glob("*.safetensors"))
    assert written
    for path in written:
        assert load_file(path)
        assert header_bytes(path) <= LIMIT


def test_long_metadata_given_on_the_command_line(long_sources, tmp_path, monkeypatch, caplog):
    shorten(monkeypatch)
    given_ = json.dumps({"description": "d" * LIMIT, "author": "somebody"})
    out = tmp_path / "o.safetensors"
    call(convert_diffusers20_original_sd, long_sources["model"], out, "--metadata", given_)
    assert metadata_of(out)["author"] == "somebody"
    assert "description (400,0" in caplog.text


@pytest.mark.slow
def test_training_saves_with_tables_of_tags_that_are_too_long(run, pictures, tmp_path, monkeypatch, caplog):
    shorten(monkeypatch)
    (next(pictures.rglob("*.txt"))).write_text(", ".join(f"tag{n}" for n in range(50_000)), encoding="utf-8")
    assert run(max_train_steps=1)
    found = metadata_of(tmp_path / "o" / "x.safetensors")
    assert "ss_tag_frequency" not in found
    assert found["ss_network_module"] == "networks.lora"
    assert found["ss_num_train_images"] == "4"
    assert "left out: ss_tag_frequency (" in caplog.text


class Foreign(torch.nn.Module):
    """A third party's network, which hands the metadata to the package."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))

    def save_weights(self, file, dtype, metadata):
        save_file({"x": self.weight.detach()}, file, metadata)


def test_networks_of_third_parties_are_saved(tmp_path):
    foreign: Any = Foreign()
    absent: Any = None
    network = TrainableNetwork(foreign, absent, absent, Trained((True,), True))
    network.save(tmp_path / "x.safetensors", None, {"ss_tag_frequency": "x" * 101_000_000, "ss_v2": "False"})
    assert metadata_of(tmp_path / "x.safetensors") == {"ss_v2": "False"}


# ---- files of older versions --------------------------------------------------------------------------------


def test_a_file_with_too_long_a_header_is_read_and_foreign_modules_are_told(tmp_path, capsys):
    path, text = tmp_path / "old.safetensors", "x" * 101_000_000
    table = {"__metadata__": {"ss_tag_frequency": text}, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    header = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<2f", 1.5, -2.0))
    assert lora.read_weights(path)["a"].tolist() == [1.5, -2.0]
    assert open_weights(path).tensor("a").tolist() == [1.5, -2.0]
    assert show_metadata.main(["--model", str(path)]) == 0
    assert len(capsys.readouterr().out) > len(text)
    with pytest.raises(
        UserError, match=r"old.safetensors cannot be read by the package safetensors: .*header too large"
    ):
        check_name(path)
