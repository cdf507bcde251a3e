"""networks/extract_lora_from_dylora.py: the files that are cut out of a DyLoRA."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from runs import C3LIER, LIERLA, RATE, same, train
from safetensors.torch import load_file, save_file
from scripts import ROOT, help_of, python
from tensors import metadata

from library.adapters.dylora import full_rank, truncated_to
from library.errors import UserError
from networks import dylora, extract_lora_from_dylora, lora

# ---- extraction ---------------------------------------------------------------------------------------------


def extract(path, *more):
    argv = ["--model", str(path), "--save_to", str(path.with_name("cut.safetensors")), *more]
    assert extract_lora_from_dylora.main(argv) == 0


@pytest.mark.parametrize("kind", [LIERLA, pytest.param(C3LIER, marks=pytest.mark.slow)], ids=["LierLa", "C3Lier"])
def test_the_file_of_a_rank_gives_what_training_saw_at_that_rank(base, pictures, tmp_path, model_store, kind):
    import copy

    train(base, pictures, tmp_path, **kind, **RATE)
    extract(tmp_path / "x.safetensors", "--unit", "2")
    unet = model_store("sd1")[0]["unet"]
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 77, 64))

    def output_of(model):
        with torch.no_grad():
            return model(*inputs).sample

    trained = copy.deepcopy(unet)
    arguments = dict(text.split("=") for text in kind["network_args"])
    network = dylora.create_network(1.0, 8, 4.0, None, None, trained, **arguments)
    network.load_state_dict(load_file(tmp_path / "x.safetensors"), strict=False)
    network.apply_to(None, trained)
    network.train()
    plain = output_of(unet)
    for rank in (2, 4, 6, 8):
        network.sampled_rank = rank
        network.train()
        expected = output_of(trained)
        size = float((expected - plain).abs().max())
        assert size > 1e-4
        path = tmp_path / f"cut-{rank:04d}.safetensors"
        weights = load_file(path)
        read = copy.deepcopy(unet)
        applied, _ = lora.create_network_from_weights(1.0, None, None, None, read, _unet_only(weights))
        applied.load_state_dict(_unet_only(weights))
        applied.apply_to(None, read)
        torch.testing.assert_close(output_of(read), expected, rtol=0, atol=2e-3 * size)
        other = copy.deepcopy(unet)
        torch.testing.assert_close(_through_diffusers(other, weights, output_of), expected, rtol=0, atol=2e-3 * size)


def _unet_only(weights):
    return {name: tensor for name, tensor in weights.items() if name.startswith("lora_unet")}


def _through_diffusers(unet, weights, output_of):
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(_unet_only(weights))
    StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, network_alphas=alphas, unet=unet)
    return output_of(unet)


def test_every_rank_has_its_file_with_true_metadata_and_hashes(base, pictures, tmp_path):
    import hashlib

    train(base, pictures, tmp_path, **LIERLA, **RATE, training_comment="mine")
    extract(tmp_path / "x.safetensors")  # the unit is in the metadata
    whole = load_file(tmp_path / "x.safetensors")
    names = sorted(path.name for path in tmp_path.glob("cut*"))
    assert names == [f"cut-{rank:04d}.safetensors" for rank in (2, 4, 6, 8)]
    same(load_file(tmp_path / "cut-0008.safetensors"), whole)
    for rank in (2, 6):
        path = tmp_path / f"cut-{rank:04d}.safetensors"
        part, written = load_file(path), metadata(path)
        for name, tensor in part.items():
            if "lora_down" in name:
                assert torch.equal(tensor, whole[name][:rank])
            elif "lora_up" in name:
                assert torch.equal(tensor, whole[name][:, :rank])
            else:
                assert torch.equal(tensor, whole[name])
        assert written["ss_network_dim"] == str(rank)
        assert written["ss_training_comment"] == f"rank {rank} of a DyLoRA of rank 8; mine"
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        assert written["sshs_model_hash"] == hashlib.sha256(content[start:]).hexdigest()
        assert written["ss_seed"] == metadata(tmp_path / "x.safetensors")["ss_seed"]


def test_files_without_metadata_and_of_sd_scripts_are_cut_as_well(tmp_path, caplog):
    rng = np.random.default_rng(0)
    tensors = {
        "lora_unet_a.lora_down.weight": torch.from_numpy(rng.normal(size=(8, 5)).astype(np.float16)),
        "lora_unet_a.lora_up.weight": torch.from_numpy(rng.normal(size=(6, 8)).astype(np.float16)),
        "lora_unet_a.alpha": torch.tensor(4.0),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="--unit is missing"):
        extract(tmp_path / "x.safetensors")
    extract(tmp_path / "x.safetensors", "--unit", "4")
    assert load_file(tmp_path / "cut-0004.safetensors")["lora_unet_a.lora_down.weight"].dtype == torch.float16
    save_file(tensors, tmp_path / "x.safetensors", metadata={"modelspec.implementation_version": "sd-scripts/1"})
    extract(tmp_path / "x.safetensors", "--unit", "4")
    assert "trained by sd-scripts" in caplog.text
    extract(tmp_path / "x.safetensors", "--unit", "4", "--sd_scripts_alpha")
    part = load_file(tmp_path / "cut-0004.safetensors")
    scale = float(part["lora_unet_a.alpha"]) / 4
    assert scale == pytest.approx(4.0 / 8 * (8 / 4) ** 0.5)  # alpha / R sqrt(R / b), its scale in training


@pytest.mark.parametrize(("down", "up"), [("lora_down", "lora_up"), ("lora_A", "lora_B"), ("lora.down", "lora.up")])
def test_ranks_are_cut_under_the_names_of_every_trainer(down, up):
    weights = {
        f"a.{down}.weight": torch.randn(4, 3),
        f"a.{up}.weight": torch.randn(5, 4, 1, 1),
        "a.alpha": torch.ones(()),
    }
    assert [tuple(tensor.shape) for tensor in truncated_to(3, weights).values()] == [(3, 3), (5, 3, 1, 1), ()]
    assert full_rank({name: tensor.shape for name, tensor in weights.items()}, ROOT) == 4


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--model is missing"),
        (["--model", "gone.safetensors"], "gone.safetensors does not exist"),
        (["--model", "X"], "--save_to is missing"),
        (["--model", "X", "--save_to", "a.bin"], "must end in .safetensors"),
        (["--model", "X", "--save_to", "a.safetensors", "--unit", "3"], "does not divide the rank of"),
        (["--model", "X", "--save_to", "a.safetensors", "--unit", "0"], "--unit must be at least 1, got 0"),
    ],
)
def test_mistakes_of_the_extractor_are_told(tmp_path, argv, message):
    path = tmp_path / "x.safetensors"
    save_file({"lora_unet_a.lora_down.weight": torch.ones(8, 2), "lora_unet_a.lora_up.weight": torch.ones(2, 8)}, path)
    with pytest.raises(UserError) as caught:
        extract_lora_from_dylora.main([str(path) if word == "X" else word for word in argv])
    assert message in str(caught.value)


def test_the_script_runs_from_any_folder(tmp_path):
    assert "--save_to" in help_of("networks/extract_lora_from_dylora.py", tmp_path)
    done = python(ROOT / "networks" / "extract_lora_from_dylora.py", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 2)  # --model and --save_to are missing
