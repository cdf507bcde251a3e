"""Training goes on from a file: what the file and the network do not share is told."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from loras import make_lora
from runs import options, train
from safetensors.torch import load_file, save_file

import train_network
from library.errors import UserError
from library.networks.views import with_canonical_names
from library.weight_file import read_weights
from networks import lora

CONV = {"network_dim": 2, "network_args": ["conv_dim=3", "conv_alpha=2"]}
PLAIN = {"network_dim": 2, "max_train_steps": 1}


@pytest.fixture
def file(model_store, tmp_path):
    """Return a file with modules over the 3x3 convolutions."""
    models, _ = model_store("sd1")
    return make_lora(models, tmp_path / "start.safetensors", rank=2, alpha=1, conv_dim=3, conv_alpha=2)


def warnings_of(caplog):
    return [record.message for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("module", [{}, {"network_module": "networks.dylora", "network_args": ["unit=1"]}])
def test_modules_without_a_place_are_told_with_the_way_out(base, pictures, tmp_path, file, caplog, module):
    weights = train(base, pictures, tmp_path, **PLAIN, **module, network_weights=file)
    assert not any("resnets" in name for name in weights)
    (text,) = [message for message in warnings_of(caplog) if str(file) in message]
    assert "86 of 296 modules (lora_unet_down_blocks_0_downsamplers_0_conv, " in text
    assert "left out: give the --network_args" in text
    assert "conv_dim and conv_alpha" in text
    assert "--dim_from_weights" in text


def test_modules_that_the_file_lacks_are_told(base, pictures, tmp_path, file, caplog):
    few = {name: tensor for name, tensor in load_file(file).items() if "lora_te_" not in name}
    save_file(few, tmp_path / "few.safetensors")
    train(base, pictures, tmp_path, **CONV, max_train_steps=1, network_weights=tmp_path / "few.safetensors")
    (text,) = [message for message in warnings_of(caplog) if "few.safetensors" in message]
    assert "18 of 296 modules of the network (lora_te_text_model_encoder_layers_0_mlp_fc1, " in text
    assert "start fresh" in text


def test_a_part_that_is_not_trained_will_not_be_in_the_new_file(base, pictures, tmp_path, file, caplog):
    for more in ({}, {"dim_from_weights": True, "network_args": None}):
        caplog.clear()
        unet_only = CONV | {"max_train_steps": 1, "network_train_unet_only": True, "network_weights": file} | more
        train(base, pictures, tmp_path, **unet_only)
        (text,) = [message for message in warnings_of(caplog) if f"{file}: 18 of 296 modules" in message]
        assert "are of a part that is not trained, and will not be in the new file" in text


def test_tensors_without_a_place_in_a_module_are_told(base, pictures, tmp_path, file, caplog):
    weights = load_file(file)
    up = min(name for name in weights if name.endswith("lora_up.weight"))
    scale = up.replace("lora_up.weight", "dora_scale")
    save_file(weights | {scale: torch.ones(len(weights[up]), 1)}, tmp_path / "dora.safetensors")
    train(base, pictures, tmp_path, **CONV, max_train_steps=1, network_weights=tmp_path / "dora.safetensors")
    (text,) = [message for message in warnings_of(caplog) if "dora.safetensors" in message]
    assert f"1 of 889 tensors ({scale}) have no place in the modules of the network and are left out" in text


def test_a_file_that_fits_is_no_warning(base, pictures, tmp_path, file, caplog):
    caplog.set_level("INFO")
    for more in (CONV, {"dim_from_weights": True}):
        train(base, pictures, tmp_path, **more, max_train_steps=1, network_weights=file)
    assert not [message for message in warnings_of(caplog) if str(file) in message]
    assert caplog.text.count("296 modules loaded") == 2


@pytest.mark.parametrize("option", ["network_weights", "base_weights"])
def test_a_file_of_which_nothing_fits_ends_the_run(base, pictures, tmp_path, option):
    names = ("lora_up.weight", "lora_down.weight")
    shapes = ((4, 2), (2, 4))
    save_file(
        {f"lora_unet_other.{name}": torch.ones(*shape) for name, shape in zip(names, shapes, strict=True)},
        tmp_path / "w.safetensors",
    )
    with pytest.raises(UserError, match=r"w\.safetensors: none of (its|the) 1 modules"):
        train_network.main(options(base, pictures, tmp_path / "out", **PLAIN, **{option: tmp_path / "w.safetensors"}))


def test_modules_of_base_weights_that_the_models_lack_are_told(base, pictures, tmp_path, file, caplog):
    more = {"lora_unet_other.lora_up.weight": torch.ones(4, 2), "lora_unet_other.lora_down.weight": torch.ones(2, 4)}
    save_file(load_file(file) | more, tmp_path / "w.safetensors")
    train(base, pictures, tmp_path, **PLAIN, base_weights=tmp_path / "w.safetensors")
    (text,) = [message for message in warnings_of(caplog) if "w.safetensors" in message]
    assert "296 modules used, 1 left out (such as lora_unet_other)" in text


@pytest.mark.repetitions(keep=1)
@pytest.mark.parametrize("name", ["lora_te1_text_model_", "lora_te1_", "lora_te_"])
def test_names_of_other_trainers_are_no_warning(base, pictures, tmp_path, file, caplog, name):
    """diffusers numbers a text encoder that is alone, and trainers with transformers from 5.6 on omit `text_model`."""
    caplog.set_level("INFO")
    renamed = {key.replace("lora_te_text_model_", name): tensor for key, tensor in load_file(file).items()}
    save_file(renamed, tmp_path / "renamed.safetensors")
    train(base, pictures, tmp_path, **CONV, max_train_steps=1, network_weights=tmp_path / "renamed.safetensors")
    assert not [message for message in warnings_of(caplog) if "renamed.safetensors" in message]
    assert "296 modules loaded" in caplog.text


def test_all_that_the_suite_reads_is_read_from_weights(base, pictures, tmp_path, file):
    """A pickle with harmless objects, and weights in 8 bits with a scale, as from any other tool of the suite."""
    still = {"max_train_steps": 1, "learning_rate": "1e-12"}
    weights = load_file(file)
    torch.save({"state_dict": weights, "loss": np.float64(0.5)}, tmp_path / "a.ckpt")
    scaled = dict(weights)
    up = min(name for name in weights if name.endswith("lora_up.weight"))
    scaled[up] = torch.full_like(weights[up], 2.0).to(torch.float8_e4m3fn)
    scaled[f"{up}_scale"] = torch.tensor(0.25)
    save_file(scaled, tmp_path / "b.safetensors")
    for path, expected in ((tmp_path / "a.ckpt", weights[up]), (tmp_path / "b.safetensors", torch.tensor(0.5))):
        found = train(base, pictures, tmp_path / path.stem, **CONV, **still, network_weights=path)
        torch.testing.assert_close(found[up], expected.expand_as(found[up]), atol=1e-6, rtol=1e-5)
    with pytest.raises(
        ValueError, match=r"8 bits with a scale \(.*weight_scale\): networks/convert_lora.py reads them"
    ):
        lora.read_weights(tmp_path / "b.safetensors")


def test_arrays_among_the_weights_are_not_dropped(tmp_path):
    torch.save({"a.weight": torch.ones(2), "b.weight": np.ones(2)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"b\.weight is an array of NumPy, not a tensor"):
        read_weights(tmp_path / "a.pt")


def test_both_rules_for_the_names_of_text_encoders_are_one():
    """networks/lora.py stands alone, so it has the rule, too."""
    modules = [f"lora_te{number}_{middle}{rest}.alpha" for number in ("", "1", "2") for middle in ("", "text_model_")
               for rest in ("encoder_layers_0_mlp_fc1", "final_layer_norm", "embeddings")]  # fmt: skip
    for name in [*modules, "lora_unet_conv_in.alpha"]:
        weights = {name: torch.ones(())}
        for number in (1, 2):
            ours = lora.with_own_names(weights, number, is_sgm=False)
            assert list(ours) == list(with_canonical_names(weights, None, is_alone=number == 1, unet={}))
