"""svd_merge_lora, resize_lora, extract_lora_from_models: equal to the decomposition of the full matrix, in float64."""

from __future__ import annotations

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loras import assert_deltas, deltas, make_lora, weighted_sum
from safetensors.torch import load_file, save_file
from scripts import call, help_of
from tensors import metadata

from library.adapters import low_rank
from library.adapters.low_rank import Change
from library.errors import UserError
from networks import extract_lora_from_models, merge_lora, resize_lora, svd_merge_lora


def truncated(matrix, rank):
    """Return the nearest matrix of a rank, by the whole decomposition."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def is_large_conv(path, module):
    return load_file(path)[f"{module}.lora_down.weight"].shape[2:] == (3, 3)


# ---- svd_merge_lora -----------------------------------------------------------------------------------------


def test_svd_merge_is_the_truncated_decomposition_of_the_weighted_sum(model_store, tmp_path):
    models, _ = model_store("sd2")
    files = [
        make_lora(models, tmp_path / "a.safetensors", rank=4, alpha=2.0, seed=1, conv_dim="2"),
        make_lora(models, tmp_path / "b.safetensors", rank=7, alpha=9.0, seed=2, conv_dim="5"),
        make_lora(models, tmp_path / "c.safetensors", rank=2, seed=3, keep=lambda name: "mid_block" in name),
    ]
    ratios = (0.8, -1.3, 0.5)
    out = tmp_path / "out.safetensors"
    argv = ["--save_to", out, "--models", *files, "--ratios", *ratios, "--new_rank", 3, "--new_conv_rank", 2]
    call(svd_merge_lora, *argv)
    found = deltas(out)
    total = weighted_sum(files, ratios)
    assert found.keys() == total.keys()
    for module in sorted(total)[::6]:  # the whole decomposition of all takes long
        exact = truncated(total[module], 2 if is_large_conv(out, module) else 3)
        assert (found[module] - exact).norm() <= 1e-5 * exact.norm(), module
    written = metadata(out)
    assert (written["ss_network_dim"], written["ss_network_alpha"]) == ("3", "3.0")
    assert json.loads(written["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "2.0"}
    assert written["modelspec.merged_from"] == "a, b, c"


def test_with_enough_ranks_svd_merge_is_exact_and_no_larger_than_needed(model_store, tmp_path):
    models, _ = model_store("sd1")
    file = make_lora(models, tmp_path / "a.safetensors", rank=4)
    twin = tmp_path / "b.safetensors"
    twin.write_bytes(file.read_bytes())
    out = tmp_path / "out.safetensors"
    call(svd_merge_lora, "--save_to", out, "--models", file, twin, "--ratios", 0.5, 0.25, "--new_rank", 64)
    assert_deltas(out, weighted_sum([file], [0.75]), 1e-5)
    ranks = {tensor.shape[0] for name, tensor in load_file(out).items() if "lora_down" in name}
    assert ranks == {4}, "equal files add no rank"


@pytest.mark.parametrize(
    ("method", "target"),
    [("sv_ratio", 2.0), ("sv_ratio", 20.0), ("sv_fro", 0.8), ("sv_fro", 1.0), ("sv_cumulative", 0.6)],
)
def test_a_dynamic_rank_is_the_smallest_that_reaches_its_target(model_store, tmp_path, method, target):
    models, _ = model_store("sd1")
    file = make_lora(models, tmp_path / "a.safetensors", rank=8)
    out, most = tmp_path / "out.safetensors", 7
    more = ["--new_rank", most, "--dynamic_method", method, "--dynamic_param", target]
    call(svd_merge_lora, "--save_to", out, "--models", file, "--ratios", 1, *more)
    written = load_file(out)
    seen = set()
    for module, delta in deltas(file).items():
        values = torch.linalg.svdvals(delta)[:8]
        reached = {
            "sv_ratio": lambda r, s=values: r == 8 or s[r] <= s[0] / target,
            "sv_fro": lambda r, s=values: s[:r].square().sum() >= target**2 * s.square().sum() * (1 - 1e-6),
            "sv_cumulative": lambda r, s=values: s[:r].sum() >= target * s.sum(),
        }[method]
        smallest = min(next(rank for rank in range(1, 9) if reached(rank)), most)
        rank = written[f"{module}.lora_down.weight"].shape[0]
        seen.add(rank)
        assert rank == smallest, module
    assert len(seen) > 1 or target in (1.0, 20.0)
    assert metadata(out)["ss_network_dim"] == ("Dynamic" if len(seen) > 1 else str(most))


def test_what_is_kept_is_told_by_block(model_store, tmp_path, caplog):
    models, _ = model_store("sd1")
    file = make_lora(models, tmp_path / "a.safetensors", rank=8)
    caplog.set_level("INFO")
    call(svd_merge_lora, "--save_to", tmp_path / "o.safetensors", "--models", file, "--ratios", 1, "--new_rank", 3)
    table = {line[:16].strip(): line[16:].split() for line in caplog.messages if line.endswith("%")}
    assert list(table) == ["text encoder", "down 0", "down 1", "down 2", "middle", "up 1", "up 2", "up 3", "all"]
    middle = [delta for name, delta in deltas(file).items() if "mid_block" in name]
    kept = sum(torch.linalg.svdvals(delta)[:3].square().sum() for delta in middle)
    share = float(kept / sum(delta.square().sum() for delta in middle))
    assert table["middle"] == [str(len(middle)), "3.0", f"{share:.2%}"]


# ---- resize_lora --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [pytest.param(2, marks=pytest.mark.slow), 6, pytest.param(50, marks=pytest.mark.slow)])
def test_resize_cuts_the_change_and_keeps_the_scale_of_training(model_store, tmp_path, rank):
    models, _ = model_store("sd2")
    file = make_lora(models, tmp_path / "a.safetensors", rank=6, alpha=3.0, conv_dim="4", conv_alpha="1")
    out = tmp_path / "out.safetensors"
    call(resize_lora, "--model", file, "--save_to", out, "--new_rank", rank, "--new_conv_rank", rank)
    exact = {module: truncated(delta, rank) for module, delta in deltas(file).items()}
    assert_deltas(out, exact, 1e-5)
    before, after = load_file(file), load_file(out)
    for module in exact:
        old, new = before[f"{module}.lora_down.weight"].shape[0], after[f"{module}.lora_down.weight"].shape[0]
        assert new == min(rank, old)
        scale = before[f"{module}.alpha"].double() / old
        torch.testing.assert_close(after[f"{module}.alpha"].double() / new, scale, rtol=1e-6, atol=0)


def test_resize_keeps_metadata_and_says_what_it_did(model_store, tmp_path, capsys):
    models, _ = model_store("sd1")
    file = make_lora(models, tmp_path / "a.safetensors", rank=6)
    weights = load_file(file) | {"something.else": torch.ones(2)}
    said = {"ss_training_comment": "of mine", "sshs_model_hash": "old", "ss_tag_frequency": "{}"}
    save_file(weights, file, metadata=said)
    out = tmp_path / "out.safetensors"
    call(resize_lora, "--model", file, "--save_to", out, "--new_rank", 2, "--verbose", "--save_precision", "fp16")
    found = metadata(out)
    assert found["ss_training_comment"] == "resized from rank 6 to 2; of mine"
    assert found["ss_network_dim"] == "2"
    assert found["ss_tag_frequency"] == "{}"
    assert found["sshs_model_hash"] != "old"
    written = load_file(out)
    assert torch.equal(written["something.else"], torch.ones(2))
    assert {t.dtype for name, t in written.items() if name.endswith("lora_up.weight")} == {torch.float16}
    assert len(re.findall(r"rank 6 -> 2", capsys.readouterr().out)) == len(deltas(file))


def test_all_modules_have_one_alpha_whatever_their_ranks(model_store, tmp_path):
    """diffusers takes one alpha for all attention layers of a file."""
    models, _ = model_store("sd1")
    file, out = make_lora(models, tmp_path / "a.safetensors", rank=8), tmp_path / "out.safetensors"
    dynamic = ["--new_rank", 7, "--dynamic_method", "sv_fro", "--dynamic_param", 0.8]
    for module, argv in (
        (resize_lora, ["--model", file]),
        (svd_merge_lora, ["--models", file, "--ratios", 1]),
    ):
        call(module, *argv, "--save_to", out, *dynamic)
        written = load_file(out)
        ranks = {tensor.shape[0] for name, tensor in written.items() if "lora_down" in name}
        assert len(ranks) > 1
        assert len({float(tensor) for name, tensor in written.items() if name.endswith("alpha")}) == 1


def test_parts_that_cancel_leave_nothing(model_store, tmp_path, caplog):
    models, _ = model_store("sd1")
    file, out = make_lora(models, tmp_path / "a.safetensors", rank=4), tmp_path / "out.safetensors"
    caplog.set_level("INFO")
    call(svd_merge_lora, "--models", file, file, "--ratios", 1, -1, "--save_to", out)
    assert all(not delta.any() for delta in deltas(out).values())


# ---- extract_lora_from_models -------------------------------------------------------------------------------


def tuned_model(model_store, family, tmp_path, **lora):
    """Return (original, tuned, LoRA file): tuned is original with the LoRA merged."""
    models, paths = model_store(family)
    file = make_lora(models, tmp_path / "true.safetensors", **lora)
    out = tmp_path / "tuned.safetensors"
    call(merge_lora, "--sd_model", paths["safetensors"], "--save_to", out, "--models", file, "--ratios", 1)
    return paths["safetensors"], out, file


@pytest.mark.repetitions(keep=2)
@pytest.mark.parametrize("exact", [[], ["--exact"]])
def test_extraction_at_the_rank_of_a_lora_gives_its_change_back(model_store, tmp_path, family_name, exact):
    original, tuned, file = tuned_model(model_store, family_name, tmp_path, rank=4, conv_dim="3")
    out = tmp_path / "out.safetensors"
    argv = ["--model_org", original, "--model_tuned", tuned, "--save_to", out, "--dim", 4, "--conv_dim", 3, *exact]
    call(extract_lora_from_models, *argv)
    expected = deltas(file)
    found = deltas(out)
    assert found.keys() == expected.keys()
    for module, delta in expected.items():
        assert (found[module] - delta).norm() < 3e-5 * max(1.0, delta.norm()), module  # the sum was rounded to float32
    told = metadata(out)
    assert (told["ss_network_dim"], told["ss_network_alpha"]) == ("4", "4.0")
    assert json.loads(told["ss_network_args"]) == {"conv_dim": "3", "conv_alpha": "3"}
    assert told["ss_v2"] == str(family_name == "sd2")


def test_a_folder_and_a_file_are_compared_and_equal_text_encoders_left_out(model_store, tmp_path, caplog):
    models, paths = model_store("sd1")
    file = make_lora(models, tmp_path / "a.safetensors", keep=lambda name: "unet" in name)
    tuned, out = tmp_path / "tuned.safetensors", tmp_path / "out.safetensors"
    call(merge_lora, "--sd_model", paths["safetensors"], "--save_to", tuned, "--models", file, "--ratios", 1)
    caplog.set_level("INFO")
    models_given = "--model_org", paths["folder"], "--model_tuned", tuned
    call(extract_lora_from_models, *models_given, "--save_to", out, "--v_parameterization")
    assert metadata(out)["ss_base_model_version"] == "sd_v1_v"  # as training names it
    assert all(module.startswith("lora_unet_") for module in deltas(out))
    assert_deltas(out, deltas(file), 3e-5)
    assert any("text encoder is omitted" in line for line in caplog.messages)


def test_a_tuned_model_with_a_hole_is_refused(model_store, tmp_path):
    original, tuned, _ = tuned_model(model_store, "sd1", tmp_path, rank=4)
    state = load_file(tuned)
    del state["model.diffusion_model.middle_block.1.proj_in.weight"]
    save_file(state, tuned)
    with pytest.raises(UserError, match=r"mid_block\.attentions\.0\.proj_in.* is incomplete"):
        call(extract_lora_from_models, "--model_org", original, "--model_tuned", tuned, "--save_to", tmp_path / "o.pt")


def test_min_diff_and_the_share_kept(model_store, tmp_path, caplog):
    original, tuned, file = tuned_model(model_store, "sd1", tmp_path, rank=4)
    largest = max(float(delta.abs().max()) for name, delta in deltas(file).items() if "lora_te_" in name)
    for limit, is_there in ((largest * 1.01, False), (largest * 0.99, True)):
        out = tmp_path / f"{is_there}.safetensors"
        argv = ["--model_org", original, "--model_tuned", tuned, "--save_to", out, "--dim", 2, "--min_diff", limit]
        call(extract_lora_from_models, *argv)
        assert any(module.startswith("lora_te_") for module in deltas(out)) == is_there
    caplog.clear()
    caplog.set_level("INFO")
    call(extract_lora_from_models, *argv)
    total = sum(delta.square().sum() for delta in deltas(file).values())
    kept = sum(torch.linalg.svdvals(delta)[:2].square().sum() for delta in deltas(file).values())
    (line,) = [line for line in caplog.messages if line.startswith("all ")]
    assert line.endswith(f"{float(kept / total):.2%}")


# ---- algebra ------------------------------------------------------------------------------------------------


def spectra(size, generator):
    """Yield matrices with a flat, a falling and a steep spectrum."""
    yield torch.randn(size, 2 * size, generator=generator)
    bases = [torch.linalg.qr(torch.randn(size, size, generator=generator))[0] for _ in range(2)]
    for power in (0.5, 2.0):
        yield bases[0] * torch.arange(1, size + 1) ** -power @ bases[1]
    yield torch.zeros(size, size)
    yield torch.randn(size, 3, generator=generator) @ torch.randn(3, size, generator=generator)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_the_random_decomposition_keeps_what_the_exact_one_does(rank, transposed):
    generator = torch.Generator().manual_seed(rank)
    for wide in spectra(320, generator):
        matrix = wide.T if transposed else wide
        values = torch.linalg.svdvals(matrix.double())
        best = float(values[:rank].square().sum())
        total = float(values.square().sum())
        for spectrum in (
            low_rank.nearest_spectrum(matrix, rank, generator),
            low_rank.exact_spectrum(matrix),
        ):
            change = spectrum.truncated(rank, (rank, matrix.shape[1]))
            lost = float((matrix.double() - change.delta().double()).square().sum())
            assert total - lost >= best * 0.999 - 1e-5 * total
            assert spectrum.kept(rank) == pytest.approx(best, rel=1e-3, abs=1e-6)
            assert spectrum.total == pytest.approx(total, rel=1e-4, abs=1e-9)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(out=st.integers(1, 30), inner=st.integers(1, 30), rank=st.integers(1, 30), seed=st.integers(0, 99))
def test_the_gram_decomposition_is_that_of_the_matrix(out, inner, rank, seed):
    matrix = torch.randn(out, inner, generator=torch.Generator().manual_seed(seed))
    spectrum = low_rank.exact_spectrum(matrix)
    torch.testing.assert_close(spectrum.values, torch.linalg.svdvals(matrix), rtol=1e-4, atol=1e-5)
    rank = min(rank, out, inner)
    found = spectrum.truncated(rank, (rank, inner)).delta()
    torch.testing.assert_close(found, truncated(matrix.double(), rank).float(), rtol=1e-3, atol=1e-4)


def test_clamping_does_not_depend_on_signs_of_vectors():
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(40, 5, generator=generator), torch.randn(5, 30, generator=generator)
    signs = torch.tensor([1.0, -1, 1, -1, -1])
    one = low_rank.clamped(Change(up, down, 5.0, (5, 30)), 0.9)
    other = low_rank.clamped(Change(up * signs, down * signs[:, None], 5.0, (5, 30)), 0.9)
    torch.testing.assert_close(one.delta(), other.delta())
    pooled = torch.cat([up.flatten(), down.flatten()]).abs()
    limit = float(one.up.abs().max())
    assert (pooled <= limit).float().mean() == pytest.approx(0.9, abs=0.01)
    assert torch.equal(low_rank.clamped(one, 1.0).up, one.up)


# ---- mistakes -----------------------------------------------------------------------------------------------

MISTAKES = {
    "no target": (svd_merge_lora, ["--dynamic_method", "sv_fro"], "needs --dynamic_param"),
    "no method": (resize_lora, ["--dynamic_param", "0.5"], "needs --dynamic_method"),
    "ratio of one": (resize_lora, ["--dynamic_method", "sv_ratio", "--dynamic_param", "1"], "above 1 for sv_ratio"),
    "share over one": (resize_lora, ["--dynamic_method", "sv_fro", "--dynamic_param", "1.1"], "at most 1 for sv_fro"),
    "rank of nothing": (resize_lora, ["--new_rank", "0"], "--new_rank"),
    "quantile": (svd_merge_lora, ["--clamp_quantile", "1.5"], "--clamp_quantile must be above 0 and at most 1"),
    "two kinds": (extract_lora_from_models, ["--v2", "--sdxl"], "leave out both"),
    "no such device": (resize_lora, ["--device", "cuda:7"], "there is no cuda:7"),
    "ending": (resize_lora, ["--save_to", "x.png"], "--save_to must end in"),
    "absent": (resize_lora, ["--model", "gone.safetensors"], "gone.safetensors does not exist"),
    "ratios": (svd_merge_lora, ["--models", "a", "--ratios", "1", "2"], "a number for each of the 1 files"),
}


@pytest.mark.parametrize(("module", "argv", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_told_before_anything_is_read(module, argv, message, monkeypatch):
    for reader in ("lora_file", "merging"):
        monkeypatch.setattr(f"library.adapters.{reader}.read_lora", lambda path: pytest.fail("a file was read"))
    with pytest.raises(UserError, match=re.escape(message)):
        call(module, *argv)


def test_models_that_do_not_belong_together_are_refused(model_store, tmp_path):
    _, paths = model_store("sd1")
    _, other = model_store("sd2")
    argv = ["--model_org", paths["safetensors"], "--save_to", tmp_path / "o.safetensors"]
    with pytest.raises(UserError, match="is an SD 1.x model, .* an SD 2.x model"):
        call(extract_lora_from_models, *argv, "--model_tuned", other["safetensors"])
    with pytest.raises(UserError, match="--v2 was given"):
        call(extract_lora_from_models, *argv, "--model_tuned", paths["ckpt"], "--v2")
    with pytest.raises(UserError, match="do not differ in the layers that are extracted.* nothing to extract$"):
        call(extract_lora_from_models, *argv, "--model_tuned", paths["ckpt"])
    state = load_file(paths["safetensors"])
    conv = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    save_file(state | {conv: state[conv] + 1}, tmp_path / "conv.safetensors")
    with pytest.raises(UserError, match=r"nothing to extract, but 1 other tensors differ \(.*--conv_dim extracts 1"):
        call(extract_lora_from_models, *argv, "--model_tuned", tmp_path / "conv.safetensors")
    name = "model.diffusion_model.middle_block.1.proj_in.weight"
    state[name] = state[name].clone().fill_(torch.nan)
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(UserError, match=r"middle_block\.1\.proj_in\.weight holds NaN"):
        call(extract_lora_from_models, *argv, "--model_tuned", tmp_path / "nan.safetensors")


@pytest.mark.parametrize("script", ["svd_merge_lora", "resize_lora", "extract_lora_from_models", "sdxl_merge_lora"])
def test_scripts_run_from_any_folder_and_answer_without_torch(script, tmp_path):
    text = help_of(f"networks/{script}.py", tmp_path, "torch")
    assert "--save_to" in text
    assert "%%" not in text
