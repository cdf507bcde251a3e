"""networks/merge_lora.py: what is written equals what the networks mean, to rounding, in float64."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loras import assert_deltas, deltas, make_lora, weighted_sum
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scripts import ROOT, help_of, python

from library.adapters.low_rank import Change, concatenated, mixed, spectrum_of
from library.errors import UserError
from networks import lora, merge_lora


def merge(*argv):
    assert merge_lora.main([str(word) for word in argv]) == 0


# ---- into a checkpoint --------------------------------------------------------------------------------------


@pytest.mark.repetitions(keep=2)
@pytest.mark.parametrize("conv", [False, True])
def test_the_merged_checkpoint_is_the_base_with_the_networks_applied(model_store, family_name, tmp_path, conv):
    models, paths = model_store(family_name)
    more: dict[str, Any] = {"conv_dim": "2", "conv_alpha": "1.5"} if conv else {}
    files = [make_lora(models, tmp_path / f"{n}.safetensors", seed=n, rank=2 + n, **more) for n in range(2)]
    ratios = (0.7, -0.4)
    out = tmp_path / "merged.safetensors"
    merge("--sd_model", paths["safetensors"], "--save_to", out, "--models", *files, "--ratios", *ratios)
    merged = tiny.load(out)

    unet, encoder = copy.deepcopy(models["unet"]), copy.deepcopy(models["text_encoder"])
    for file, ratio in zip(files, ratios, strict=True):
        network, weights = lora.create_network_from_weights(ratio, str(file), None, encoder, unet)
        network.load_state_dict(weights)
        network.apply_to(encoder, unet)
    tokens, inputs = torch.arange(77)[None], (torch.randn(1, 4, 16, 16), torch.tensor([300]))
    with torch.no_grad():
        hidden = encoder(tokens).last_hidden_state
        expected = unet(*inputs, encoder_hidden_states=hidden).sample
        torch.testing.assert_close(merged.texts[0].module(tokens).last_hidden_state, hidden, rtol=1e-3, atol=1e-4)
        found = merged.unet(*inputs, encoder_hidden_states=hidden).sample
        plain = models["unet"](*inputs, encoder_hidden_states=hidden).sample
    assert (plain - expected).norm() > 1e-2 * expected.norm()
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_sums_are_made_in_float32_and_only_what_changes_is_touched(model_store, tmp_path):
    models, paths = model_store("sd1")
    file = make_lora(models, tmp_path / "a.safetensors", dtype=torch.float16)
    out = tmp_path / "out.safetensors"
    merge("--sd_model", paths["fp16"], "--save_to", out, "--models", file, "--ratios", 0.5, "--save_precision", "fp16")
    before, after, changes = load_file(paths["fp16"]), load_file(out), deltas(file)
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == len(changes)
    name = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    delta = changes["lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"]
    torch.testing.assert_close(after[name], (before[name].double() + 0.5 * delta).half(), rtol=1e-3, atol=1e-7)
    assert {tensor.dtype for tensor in after.values() if tensor.is_floating_point()} == {torch.float16}
    assert not [path for path in tmp_path.iterdir() if ".tmp" in path.name]


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_either_format_reads_and_writes(model_store, tmp_path, suffix):
    models, paths = model_store("sd1")
    file = make_lora(models, tmp_path / "a.safetensors")
    one, two = tmp_path / "one.safetensors", tmp_path / f"two{suffix}"
    merge("--sd_model", paths["safetensors"], "--save_to", one, "--models", file, "--ratios", 1)
    merge("--sd_model", paths["ckpt"], "--save_to", two, "--models", file, "--ratios", 1)
    expected = load_file(one)
    found = load_file(two) if suffix == ".safetensors" else torch.load(two, weights_only=True)
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_merging_and_unmerging_gives_the_base_back(model_store, tmp_path):
    models, paths = model_store("sd1")
    file = make_lora(models, tmp_path / "a.safetensors")
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    merge("--sd_model", paths["safetensors"], "--save_to", there, "--models", file, "--ratios", 0.8)
    merge("--sd_model", there, "--save_to", back, "--models", file, "--ratios", -0.8)
    base, found = load_file(paths["safetensors"]), load_file(back)
    for name, tensor in base.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
    with safe_open(there, "pt") as written:
        metadata = written.metadata()
    assert metadata["modelspec.merged_from"] == "model, a"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1"
    (origin,) = json.loads(metadata["merge_recipe"])["networks"]
    with safe_open(file, "pt") as source:
        assert origin == {"name": "a.safetensors", "sha256": source.metadata()["sshs_model_hash"], "ratio": 0.8}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_kill_in_the_middle_of_writing_leaves_what_was_there(model_store, tmp_path, kind):
    models, paths = model_store("sd1")
    file, out = (
        make_lora(models, tmp_path / "a.safetensors"),
        tmp_path / ("out" if kind == "folder" else "o.safetensors"),
    )
    if kind == "file":
        out.write_bytes(b"of mine")
    code = (
        "import itertools, os, signal, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from library.adapters import merging\n"
        "from networks import merge_lora\n"
        "whole, calls = merging.merged_tensor, itertools.count()\n"
        "def killed(*args):\n"
        "    if next(calls) == 300: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return whole(*args)\n"
        "merging.merged_tensor = killed\n"
        "merge_lora.main(sys.argv[1:])\n"
    )
    source = paths["folder" if kind == "folder" else "safetensors"]
    argv = ["--sd_model", source, "--save_to", out, "--models", file, "--ratios", "1"]
    done = python("-c", code, *argv)
    assert done.returncode == -9
    assert out.read_bytes() == b"of mine" if kind == "file" else not out.exists()
    assert [path for path in tmp_path.iterdir() if ".tmp" in path.name], "it was killed while it wrote"
    merge(*argv)
    assert out.exists()


# ---- into one LoRA ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [False, True])
def test_concat_is_the_weighted_sum_for_any_ranks_modules_and_signs(model_store, tmp_path, shuffle):
    models, _ = model_store("sd1")
    files = [
        make_lora(models, tmp_path / "a.safetensors", rank=4, alpha=2.0, seed=1),
        make_lora(models, tmp_path / "b.safetensors", rank=7, alpha=9.0, seed=2, conv_dim="3"),
        make_lora(models, tmp_path / "c.safetensors", rank=2, seed=3, keep=lambda name: "mid_block" in name),
    ]
    ratios = (0.8, -1.3, 0.5)
    out = tmp_path / "out.safetensors"
    more = ["--shuffle", "--seed", "5"] if shuffle else []
    merge("--save_to", out, "--models", *files, "--ratios", *ratios, "--concat", *more)
    assert_deltas(out, weighted_sum(files, ratios), 3e-6)
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_dim"] == "Dynamic"
    assert metadata["modelspec.merged_from"] == "a, b, c"
    assert [part["ratio"] for part in json.loads(metadata["merge_recipe"])["networks"]] == list(ratios)
    assert {"sshs_model_hash", "sshs_legacy_hash"} <= metadata.keys()


def test_a_shuffled_file_shows_nothing_of_its_parts(model_store, tmp_path):
    """No row of a part is a row of the mix, nor a multiple of one, and another seed gives another mix."""
    models, _ = model_store("sd1")
    files = [make_lora(models, tmp_path / f"{n}.safetensors", seed=n) for n in range(2)]
    name = "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"
    rows = torch.cat([load_file(file)[name].flatten(1) for file in files])
    mixes = []
    for seed in (1, 2):
        out = tmp_path / f"out{seed}.safetensors"
        merge("--save_to", out, "--models", *files, "--ratios", 1, 1, "--concat", "--shuffle", "--seed", seed)
        mixes.append(load_file(out)[name].flatten(1))
    for mix, other in itertools.permutations((*mixes, rows), 2):
        cosines = torch.nn.functional.normalize(mix) @ torch.nn.functional.normalize(other).T
        assert cosines.abs().max() < 0.999


@pytest.mark.repetitions(keep=1)
@pytest.mark.parametrize("ratio", [0.5, -0.7, 2.0])
def test_one_file_is_scaled_by_its_ratio_and_equal_files_add_up(model_store, tmp_path, ratio):
    models, _ = model_store("sd1")
    file = make_lora(models, tmp_path / "a.safetensors", alpha=2.0)
    out = tmp_path / "out.safetensors"
    merge("--save_to", out, "--models", file, "--ratios", ratio)
    assert_deltas(out, weighted_sum([file], [ratio]))
    same = tmp_path / "b.safetensors"
    same.write_bytes(file.read_bytes())
    for other in (0.25, 1.0, -0.2):
        merge("--save_to", out, "--models", file, same, "--ratios", ratio, other)
        assert_deltas(out, weighted_sum([file], [ratio + other]), 1e-5)


def test_the_numbers_of_sd_scripts_can_be_had(model_store, tmp_path):
    models, _ = model_store("sd1")
    files = [make_lora(models, tmp_path / f"{n}.safetensors", seed=n, alpha=2.0 + n) for n in range(2)]
    ratios = (0.5, -0.7)
    name = "lora_unet_mid_block_attentions_0_proj_in"
    weights = [load_file(file) for file in files]
    strengths = [(weights[n][f"{name}.alpha"] / weights[0][f"{name}.alpha"]).sqrt() * ratios[n] for n in range(2)]
    for more in ([], ["--concat"]):
        out = tmp_path / "out.safetensors"
        merge("--save_to", out, "--models", *files, "--ratios", *ratios, "--reference_scale", *more)
        found = load_file(out)
        ups = [w[f"{name}.lora_up.weight"] * t.abs() for w, t in zip(weights, strengths, strict=True)]
        downs = [w[f"{name}.lora_down.weight"] * t for w, t in zip(weights, strengths, strict=True)]
        expected = (torch.cat(ups, 1), torch.cat(downs)) if more else (sum(ups), sum(downs))
        torch.testing.assert_close(found[f"{name}.lora_up.weight"], expected[0])
        torch.testing.assert_close(found[f"{name}.lora_down.weight"], expected[1])
        assert float(found[f"{name}.alpha"]) == 2.0


# ---- algebra ------------------------------------------------------------------------------------------------


def change(out, inner, rank, alpha, generator):
    up = torch.randn(out, rank, generator=generator)
    return Change(up, torch.randn(rank, inner, generator=generator), alpha, (rank, inner))


def test_no_change_gets_the_alpha_zero_but_one_that_has_it():
    own = change(2, 3, 1, 4.0, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="with alpha 4 cannot have alpha 0"):
        own.with_alpha(0.0)
    assert own.with_alpha(4.0) is own


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    out=st.integers(1, 12),
    inner=st.integers(1, 12),
    parts=st.lists(st.tuples(st.integers(1, 9), st.floats(0.1, 8), st.floats(-2, 2)), min_size=1, max_size=4),
)
def test_sums_and_spectra_are_those_of_the_full_matrices(out, inner, parts):
    generator = torch.Generator().manual_seed(out * 100 + inner)
    changes = [(ratio, change(out, inner, rank, alpha, generator)) for rank, alpha, ratio in parts]
    full = sum(ratio * (c.alpha / c.rank) * c.up.double() @ c.down.double() for ratio, c in changes)
    scale = sum(abs(ratio) * c.delta().norm().item() for ratio, c in changes) + 1e-9
    joined = concatenated(changes)
    assert (joined.delta().double() - full).norm() < 1e-5 * scale
    assert (mixed(joined, generator).delta().double() - full).norm() < 1e-5 * scale
    spectrum = spectrum_of(joined)
    values = torch.linalg.svdvals(full)
    count = min(len(values), len(spectrum.values))
    assert (spectrum.values[:count].double() - values[:count]).abs().max() < 1e-5 * scale
    for rank in range(1, count + 1):
        left, exact, right = torch.linalg.svd(full, full_matrices=False)
        best = (left[:, :rank] * exact[:rank]) @ right[:rank]
        error = (spectrum.truncated(rank, joined.down_shape).delta().double() - full).norm()
        assert abs(error - (best - full).norm()) < 1e-5 * scale


# ---- mistakes -----------------------------------------------------------------------------------------------


def test_mistakes_are_told_all_at_once_before_anything_is_read(model_store, tmp_path, monkeypatch):
    models, paths = model_store("sd1")
    file = make_lora(models, tmp_path / "a.safetensors")
    monkeypatch.setattr("library.adapters.merging.read_lora", lambda path: pytest.fail("a file was read"))
    with pytest.raises(UserError) as caught:
        merge("--save_to", file, "--models", file, tmp_path / "gone", "--ratios", 1, "--shuffle", "--sd_model", "x")
    lines = str(caught.value).splitlines()
    for part in (
        "a number for each of the 2",
        "is one of the inputs",
        "gone does not exist",
        "--sd_model: x does not exist; name a",
        "--conc",
    ):
        assert any(part in line for line in lines), part
    with pytest.raises(UserError, match="--save_to is missing"):
        merge()
    assert paths["safetensors"].exists()


def test_what_does_not_belong_together_is_refused(model_store, tmp_path):
    models, paths = model_store("sd1")
    other, other_paths = model_store("sd2")
    one = make_lora(models, tmp_path / "a.safetensors")
    out = tmp_path / "out.safetensors"
    with pytest.raises(UserError, match="has the ranks 4, 6 in the files: merge with --concat"):
        merge(
            "--save_to", out, "--models", one, make_lora(models, tmp_path / "b.safetensors", rank=6), "--ratios", 1, 1
        )
    with pytest.raises(UserError, match="is for a layer of|for different layers|are for"):
        two = make_lora(other, tmp_path / "c.safetensors")
        merge("--sd_model", paths["safetensors"], "--save_to", out, "--models", two, "--ratios", 1)
    with pytest.raises(UserError, match="--v2 was given"):
        merge("--sd_model", paths["safetensors"], "--save_to", out, "--models", one, "--ratios", 1, "--v2")
    weights = load_file(one)
    weights = {name.replace("mid_block", "middle_thing"): tensor for name, tensor in weights.items()}
    save_file(weights, tmp_path / "d.safetensors")
    argv = ["--sd_model", paths["safetensors"], "--save_to", out, "--models", tmp_path / "d.safetensors", "--ratios", 1]
    with pytest.raises(UserError, match="12 of 210 modules are not in"):
        merge(*argv)
    assert not out.exists()
    merge(*argv, "--allow_unmatched")
    assert out.exists()
    assert other_paths


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lora_unet_a.hada_w1_a", "a LoHa"),
        ("lora_unet_a.lokr_w1", "a LoKr"),
        ("lora_unet_a.dora_scale", "a DoRA"),
        ("unet.a.lora_A.weight", "is damaged: unet.a.lora_A.weight has no up matrix"),
        ("something.else", "no LoRA file"),
    ],
)
def test_other_kinds_of_networks_are_named(tmp_path, name, kind):
    save_file({name: torch.ones(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=kind):
        merge("--save_to", tmp_path / "o.safetensors", "--models", tmp_path / "x.safetensors", "--ratios", 1)


def test_the_script_runs_from_any_folder_and_answers_at_once(tmp_path):
    assert "--concat" in help_of("networks/merge_lora.py", tmp_path, "torch")


def test_what_is_read_is_never_written_over_even_within_a_folder(model_store, tmp_path):
    models, paths = model_store("sd1")
    file = make_lora(models, tmp_path / "a.safetensors")
    for target in (paths["folder"] / "unet" / "diffusion_pytorch_model.safetensors", paths["folder"] / "merged"):
        with pytest.raises(UserError, match="is within .*, which is an input"):
            merge("--sd_model", paths["folder"], "--save_to", target, "--models", file, "--ratios", 1)
    (tmp_path / "a_file").write_text("x")
    with pytest.raises(UserError, match="a_file is a file, so"):
        merge("--save_to", tmp_path / "a_file" / "b.safetensors", "--models", file, "--ratios", 1)


def test_numbers_that_become_too_large_are_told_and_nothing_is_written(model_store, tmp_path, caplog):
    models, paths = model_store("sd1")
    file, out = make_lora(models, tmp_path / "a.safetensors"), tmp_path / "out.safetensors"
    argv = ["--save_to", out, "--models", file, "--ratios", "1e7", "--save_precision", "fp16"]
    with pytest.raises(UserError, match=r"becomes too large for float16: take smaller ratios"):
        merge(*argv, "--sd_model", paths["safetensors"])
    with pytest.raises(UserError, match=r"becomes too large for float16"):
        merge("--save_to", out, "--models", file, "--ratios", "1e12", "--save_precision", "fp16")
    assert not out.exists()
    state = load_file(paths["safetensors"])
    state["model.diffusion_model.out.2.bias"] = state["model.diffusion_model.out.2.bias"] * torch.nan
    save_file(state, tmp_path / "nan.safetensors")
    merge("--sd_model", tmp_path / "nan.safetensors", "--save_to", out, "--models", file, "--ratios", 1)
    assert any("out.2.bias holds NaN" in line for line in caplog.messages)


def test_a_ratio_of_zero_changes_nothing_and_is_not_counted(model_store, tmp_path, caplog):
    models, paths = model_store("sd1")
    file, out = make_lora(models, tmp_path / "a.safetensors"), tmp_path / "out.safetensors"
    caplog.set_level("INFO")
    merge("--sd_model", paths["safetensors"], "--save_to", out, "--models", file, "--ratios", 0)
    assert any(line.startswith("0 tensors of") for line in caplog.messages)
    before, after = load_file(paths["safetensors"]), load_file(out)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_model_in_the_place_of_a_network_is_named(model_store, tmp_path):
    _, paths = model_store("sd1")
    with pytest.raises(UserError, match="is a base model, not a LoRA file"):
        merge("--save_to", tmp_path / "o.safetensors", "--models", paths["safetensors"], "--ratios", 1)


def test_a_merged_folder_holds_the_model_and_nothing_else(model_store, tmp_path):
    models, paths = model_store("sd1")
    source = tmp_path / "source"
    shutil.copytree(paths["folder"], source)
    (source / "README.md").write_text("of the source")
    config = json.loads((source / "text_encoder" / "config.json").read_text()) | {"torch_dtype": "float32"}
    (source / "text_encoder" / "config.json").write_text(json.dumps(config))
    file, out = make_lora(models, tmp_path / "a.safetensors"), tmp_path / "out"
    argv = ["--sd_model", source, "--save_to", out, "--models", file, "--ratios", 1, "--save_precision", "bf16"]
    merge(*argv)
    assert not (out / "README.md").exists()
    assert json.loads((out / "text_encoder" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert (out / "scheduler" / "scheduler_config.json").exists()
