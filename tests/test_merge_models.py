"""tools/merge_models.py: every tensor is the weighted sum in float64, to rounding; what does not fit is refused."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scripts import ROOT, python
from tensors import metadata

from library import pickles, weight_file
from library.errors import UserError
from tools import merge_models

POSITIONS = "cond_stage_model.transformer.text_model.embeddings.position_ids"


def merge(*argv):
    assert merge_models.main([str(word) for word in argv]) == 0


def assert_close(found, expected, dtype):
    """Compare with a sum in float64; the type that was written rounds once."""
    assert found.dtype == dtype
    allowed = expected.abs() * torch.finfo(dtype).eps + 1e-6 + torch.finfo(dtype).tiny
    assert ((found.double() - expected).abs() <= allowed).all()


@pytest.fixture(scope="session")
def pair(model_store, tmp_path_factory):
    """Return two checkpoints of SD 1.x: one with EMA weights and metadata, one as a pickle."""
    folder = tmp_path_factory.mktemp("pair")
    paths = model_store("sd1")[1]
    state = load_file(paths["safetensors"])
    save_file(state, folder / "a.safetensors", metadata={"modelspec.author": "わたし", "sshs_model_hash": "abc" * 20})
    generator = torch.Generator().manual_seed(7)
    other = {
        name: torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor + 1
        for name, tensor in state.items()
        if not name.startswith("model_ema.")
    }
    torch.save({"state_dict": other, "epoch": 1}, folder / "b.ckpt")
    return folder / "a.safetensors", folder / "b.ckpt", state, other


def test_the_sum_is_that_of_float64_and_what_is_told_of_it_is_true(pair, tmp_path):
    one, two, state, other = pair
    words = ["--models", one, two, "--output", "混ぜた", "--ratios", 0.7, 0.3, "--show_skipped"]
    done = python(ROOT / "tools" / "merge_models.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    merged = load_file(tmp_path / "混ぜた.safetensors")
    assert merged.keys() == state.keys()
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            assert torch.equal(merged[name], tensor)
        else:
            assert_close(merged[name], 0.7 * tensor.double() + 0.3 * other.get(name, tensor).double(), torch.float32)
    told = metadata(tmp_path / "混ぜた.safetensors")
    recipe = json.loads(told.pop("merge_recipe"))
    assert told == {
        "modelspec.author": "わたし",
        "modelspec.title": "混ぜた",
        "modelspec.merged_from": "a, b",
    }
    assert recipe["models"] == [
        {"name": "a.safetensors", "ratio": 0.7, "sshs_model_hash": "abc" * 20},
        {"name": "b.ckpt", "ratio": 0.3},
    ]
    assert "lacks 20 tensors" in done.stderr
    assert "lacks model_ema." in done.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "混ぜた.safetensors"]


def test_a_merge_of_one_model_with_itself_is_that_model(pair, tmp_path):
    one, _, state, _ = pair
    merge("--models", one, one, one, "--output", tmp_path / "same.safetensors")
    for name, tensor in load_file(tmp_path / "same.safetensors").items():
        assert torch.allclose(tensor, state[name], rtol=1e-6, atol=1e-7)


@pytest.mark.repetitions(keep=2)
@pytest.mark.parametrize("word", [None, "float", "fp16", "bf16"])
def test_types_are_the_first_models_or_as_asked(model_store, tmp_path, word):
    paths = model_store("sd1")[1]
    out = tmp_path / "out.safetensors"
    merge("--models", paths["fp16"], paths["ckpt"], "--output", out, *(["--saving_precision", word] if word else []))
    first, second = load_file(paths["fp16"]), pickles.read_pickle(paths["ckpt"])
    dtype = {None: torch.float16, "float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[word]
    merged = load_file(out)
    assert merged[POSITIONS].dtype == torch.int64
    for name, tensor in merged.items():
        if tensor.is_floating_point():
            assert_close(tensor, (first[name].double() + second[name].double()) / 2, dtype)


def test_unet_only_leaves_the_rest_to_the_bit(pair, tmp_path):
    one, two, state, other = pair
    merge("--models", one, two, "--output", tmp_path / "u.safetensors", "--unet_only", "--ratios", "0.25", "0.75")
    merged = load_file(tmp_path / "u.safetensors")
    changed = {name for name, tensor in state.items() if not torch.equal(tensor, merged[name])}
    assert changed
    assert all(name.startswith("model.diffusion_model.") for name in changed)
    name = "model.diffusion_model.input_blocks.0.0.weight"
    assert_close(merged[name], 0.25 * state[name].double() + 0.75 * other[name].double(), torch.float32)


def test_text_encoders_under_old_names_are_the_same_tensors(pair, tmp_path):
    one, _, state, other = pair
    old = {name.replace(".transformer.text_model.", ".transformer."): tensor for name, tensor in other.items()}
    assert old.keys() != other.keys()
    save_file(old, tmp_path / "old.safetensors")
    out = [tmp_path / f"{index}.safetensors" for index in range(2)]
    merge("--models", tmp_path / "old.safetensors", one, "--output", out[0])
    merge("--models", one, tmp_path / "old.safetensors", "--output", out[1])
    first, second = load_file(out[0]), load_file(out[1])
    assert first.keys() == other.keys()
    assert second.keys() == state.keys()
    for name in other:
        if other[name].is_floating_point():
            assert_close(first[name], (state[name].double() + other[name].double()) / 2, torch.float32)
            assert torch.allclose(first[name], second[name], rtol=1e-6, atol=1e-7)


def test_a_file_with_old_and_new_names_has_each_tensor_once():
    old, new = (f"cond_stage_model.transformer.{middle}encoder.layers.0.x" for middle in ("", "text_model."))
    for names in ({old: 0, new: 1}, {new: 1, old: 0}):
        assert merge_models.current_names(names) == {new: new}
    assert merge_models.current_names({old: 0, "other": 1}) == {new: old, "other": "other"}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ratios=st.lists(st.floats(-2, 2).map(lambda ratio: round(ratio, 3)), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    shape=st.lists(st.integers(0, 4), max_size=3),
    lacking=st.integers(0, 3),
)
def test_sums_of_any_ratios_types_and_shapes(tmp_path, ratios, dtype, shape, lacking):
    generator = torch.Generator().manual_seed(len(ratios) * 7 + len(shape))
    states = []
    for index in range(len(ratios)):
        tensor = torch.randn(shape, generator=generator).to(dtype)
        state = {"x": tensor, "count": torch.full((2,), index), "y": torch.ones(1)}
        if index == lacking and index:
            del state["x"]
        states.append(state)
        save_file(state, tmp_path / f"{index}.safetensors")
    paths = [tmp_path / f"{index}.safetensors" for index in range(len(ratios))]
    merge(
        "--models", *paths, "--output", tmp_path / "out.safetensors", "--ratios", *ratios, "--saving_precision", "float"
    )
    merged = load_file(tmp_path / "out.safetensors")
    parts = zip(states, ratios, strict=True)
    expected = sum(ratio * state.get("x", states[0]["x"]).double() for state, ratio in parts)
    assert ((merged["x"].double() - expected).abs() <= 1e-5).all()
    assert torch.equal(merged["count"], torch.zeros(2, dtype=torch.int64))


# ---- what is no weight --------------------------------------------------------------------------------------

SCHEDULE = {
    **dict.fromkeys(("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod")),
    **dict.fromkeys(("sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod")),
    **dict.fromkeys(("sqrt_recipm1_alphas_cumprod", "posterior_variance", "posterior_mean_coef1", "lvlb_weights")),
    **dict.fromkeys(("posterior_log_variance_clipped", "denoiser.sigmas", "model_ema.decay", "model_ema.num_updates")),
    **dict.fromkeys(("v_pred", "edm_vpred.sigma_max", "logvar", "cond_stage_model.model.attn_mask")),
    "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": None,
}
STAYING_WEIGHTS = (
    "model.diffusion_model.alphas_cumprod_proj.weight",
    "cond_stage_model.model.logit_scale",
    "x.sigmas.bias",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.float64])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_indices_and_schedules_are_those_of_the_first_model(tmp_path, caplog, dtype, suffix):
    first = {name: torch.arange(77).to(dtype)[None] for name in SCHEDULE}
    second = {name: tensor + 1 for name, tensor in first.items()}
    weights = {name: torch.full((3,), 2.0) for name in STAYING_WEIGHTS}
    for name, state in (("a", first | weights), ("b", second | {name: tensor * 3 for name, tensor in weights.items()})):
        weight_file.write_weights(tmp_path / f"{name}{suffix}", state)
    words = ["--models", tmp_path / f"a{suffix}", tmp_path / f"b{suffix}", "--ratios", 0.35, 0.65]
    merge(*words, "--output", tmp_path / "o", "--saving_precision", "fp16")
    merged = load_file(tmp_path / "o.safetensors")
    for name, tensor in first.items():
        assert merged[name].dtype == dtype, "a schedule loses digits in half precision"
        assert torch.equal(merged[name], tensor), name
    for name in STAYING_WEIGHTS:
        assert merged[name].dtype == torch.float16
        assert_close(merged[name], torch.full((3,), 0.35 * 2 + 0.65 * 6).double(), torch.float16)
    for kind in ("noise schedule", "indices and counts", "masks and frequencies", "settings"):
        assert f"b{suffix}: the {kind} differ (" in caplog.text


def test_constants_that_differ_only_by_rounding_or_type_are_the_same(tmp_path, caplog):
    schedule = torch.linspace(0.99, 0.01, 50)
    first = {"alphas_cumprod": schedule, "a.position_ids": torch.arange(77)[None], "x": torch.ones(2)}
    second = {"alphas_cumprod": schedule.half(), "a.position_ids": torch.arange(77)[None].float(), "x": torch.ones(2)}
    save_file(first, tmp_path / "a.safetensors")
    save_file(second, tmp_path / "b.safetensors")
    for order in ("ab", "ba"):
        files = [tmp_path / f"{name}.safetensors" for name in order]
        merge("--models", *files, "--output", tmp_path / f"{order}.safetensors")
    assert "differ" not in caplog.text
    merged = load_file(tmp_path / "ba.safetensors")
    assert merged["a.position_ids"].tolist() == [list(range(77))]
    # A position that an earlier merge has moved is told, also a little.
    save_file(second | {"a.position_ids": torch.arange(77)[None] * 0.9996}, tmp_path / "b.safetensors")
    merge("--models", *[tmp_path / f"{name}.safetensors" for name in "ab"], "--output", tmp_path / "c")
    assert "b.safetensors: the indices and counts differ (a.position_ids); those of the first model" in caplog.text


def test_indices_of_a_text_encoder_that_is_not_merged_are_not_compared(tmp_path, caplog):
    states = [{POSITIONS: torch.arange(5.0) + n, "model.diffusion_model.x": torch.ones(1)} for n in range(2)]
    for name, state in zip("ab", states, strict=True):
        save_file(state, tmp_path / f"{name}.safetensors")
    files = [tmp_path / f"{name}.safetensors" for name in "ab"]
    merge("--models", *files, "--output", tmp_path / "c", "--unet_only")
    assert "differ" not in caplog.text


def test_sums_that_are_rounded_to_eight_bits_are_told(tmp_path, caplog):
    save_file({"x": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "a.safetensors")
    save_file({"x": torch.full((2,), 2.0)}, tmp_path / "b.safetensors")
    files = [tmp_path / f"{name}.safetensors" for name in "ab"]
    merge("--models", *files, "--output", tmp_path / "c")
    assert "a.safetensors stores 1 tensors in 8 bits, and so does the merged model" in caplog.text
    assert load_file(tmp_path / "c.safetensors")["x"].float().tolist() == [1.5, 1.5]
    caplog.clear()
    merge("--models", *files, "--output", tmp_path / "c", "--saving_precision", "fp16")
    assert "8 bits" not in caplog.text


# ---- mistakes -----------------------------------------------------------------------------------------------


def test_mistakes_are_told_all_at_once_before_anything_is_read(pair, tmp_path, monkeypatch):
    one, two, *_ = pair
    monkeypatch.setattr(weight_file, "open_weights", lambda path: pytest.fail("a file was read"))
    before = one.read_bytes()
    with pytest.raises(UserError) as caught:
        merge("--models", one, tmp_path / "gone.safetensors", ROOT / "README.md", "--output", one, "--ratios", 1)
    lines = str(caught.value).splitlines()
    parts = (
        "a number for each of the 3",
        "is one of the inputs",
        "gone.safetensors does not exist; name a file",
        "README.md is not a weight file, but a text",
    )
    assert all(any(part in line for line in lines) for part in parts)
    assert one.read_bytes() == before
    # The ending that is appended is minded, too.
    with pytest.raises(UserError, match="is one of the inputs"):
        merge("--models", one, two, "--output", one.with_suffix(""))
    with pytest.raises(UserError, match="--models is missing"):
        merge("--output", tmp_path / "x")
    with pytest.raises(UserError, match="--output is missing"):
        merge("--models", one)
    with pytest.raises(UserError, match="must end in .safetensors, got .*x.ckpt"):
        merge("--models", one, "--output", tmp_path / "x.ckpt")


def test_models_that_do_not_belong_together_are_refused_in_one_line(model_store, tmp_path):
    one, two = (model_store(name)[1]["safetensors"] for name in ("sd1", "sd2"))
    out = tmp_path / "out.safetensors"
    inpainting = load_file(one)
    first = "model.diffusion_model.input_blocks.0.0.weight"
    inpainting[first] = torch.cat([inpainting[first]] * 2, dim=1).contiguous()
    save_file(inpainting, tmp_path / "inpainting.safetensors")
    save_file({"lora_unet_x.lora_down.weight": torch.ones(2, 2)}, tmp_path / "lora.safetensors")
    sdxl = {"conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight": torch.ones(2, 2)}
    sdxl["model.diffusion_model.time_embed.0.bias"] = torch.ones(7)
    save_file(sdxl, tmp_path / "sdxl.safetensors")
    for other, message in (
        (two, "only models of one family can be merged: .* is SD 1.x, .* is SD 2.x"),
        (tmp_path / "sdxl.safetensors", "only models of one family"),
        (tmp_path / "inpainting.safetensors", f"{first} is of the shape .*4.* and .*8"),
        (
            tmp_path / "lora.safetensors",
            "is a network \\(LoRA\\), and no checkpoint: networks/merge_lora.py merges LoRA",
        ),
    ):
        with pytest.raises(UserError, match=message) as caught:
            merge("--models", one, other, "--output", out)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="--device: there is no nonsense that torch can use here"):
        merge("--models", one, "--output", out, "--device", "nonsense")
    assert not out.exists()


def test_ratios_that_do_not_add_up_to_one_are_told(pair, tmp_path, caplog):
    one, two, *_ = pair
    merge("--models", one, two, one, "--ratios", 0.33, 0.33, 0.33, "--output", tmp_path / "a")
    assert "add up" not in caplog.text
    merge("--models", one, two, "--ratios", 1, 1, "--output", tmp_path / "b")
    assert "the ratios add up to 2, not 1" in caplog.text


def test_what_breaks_in_the_middle_leaves_the_old_file(pair, tmp_path, monkeypatch):
    one, two, *_ = pair
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"old")
    whole, calls = merge_models.WeightedCheckpoint.tensor, []

    def breaking(model, name):
        calls.append(name)
        if len(calls) > 40:
            raise OSError("the disk went away")
        return whole(model, name)

    monkeypatch.setattr(merge_models.WeightedCheckpoint, "tensor", breaking)
    with pytest.raises(OSError, match="disk went away"):
        merge("--models", one, two, "--output", out)
    assert list(tmp_path.iterdir()) == [out]
    assert out.read_bytes() == b"old"


KEY = "model.diffusion_model.input_blocks.1.1.proj_in.weight"


def two_files(folder, one, other, name=KEY):
    paths = folder / "a.safetensors", folder / "b.safetensors"
    for path, tensor in zip(paths, (one, other), strict=True):
        save_file({name: tensor, "model.diffusion_model.out.0.bias": torch.ones(2)}, path)
    return paths


@pytest.mark.parametrize(
    "tensors",
    [
        {"lora_unet_x.weight": torch.ones(4), "lora_unet_x.on_input": torch.tensor(False)},
        {f"lora_unet_x.{end}.weight": torch.ones(2, 2) for end in ("a1", "a2", "b1", "b2")},
        {"lora_unet_x.oft_blocks": torch.ones(2, 2, 2)},
        {"lora_unet_x.diff": torch.ones(2, 2)},
        {"unet.x.processor.to_k_lora.down.weight": torch.ones(2, 2)},
    ],
    ids=["IA3", "GLoRA", "OFT", "difference", "LoRA"],
)
def test_networks_of_all_kinds_are_refused(tmp_path, tensors, request):
    save_file(tensors, tmp_path / "a.safetensors")
    kind = request.node.callspec.id
    with pytest.raises(UserError, match=rf"is a network \({kind}\), and no checkpoint"):
        merge("--models", tmp_path / "a.safetensors", tmp_path / "a.safetensors", "--output", tmp_path / "out")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_checkpoint_with_an_embedding_is_no_network(tmp_path):
    paths = two_files(tmp_path, torch.ones(2, 2), torch.ones(2, 2), "bundle_emb.word.string_to_param.*")
    merge("--models", *paths, "--output", tmp_path / "out")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("argv", [[], ["--saving_precision", "bf16"]])
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path, bad, at, argv):
    tensors = [torch.ones(2, 2), torch.ones(2, 2)]
    tensors[at][1, 0] = bad
    paths = two_files(tmp_path, *tensors)
    with pytest.raises(UserError, match=f"{paths[at].name}: {KEY} holds NaN or infinity"):
        merge("--models", *paths, "--output", tmp_path / "out", *argv)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_part_that_is_copied_is_checked_and_constants_may_be_infinite(tmp_path):
    vae = "first_stage_model.quant_conv.weight"
    paths = two_files(tmp_path, torch.full((2, 2), torch.nan), torch.ones(2, 2), vae)
    with pytest.raises(UserError, match=f"{vae} holds NaN"):
        merge("--models", *paths, "--output", tmp_path / "out", "--unet_only")
    paths = two_files(tmp_path, torch.tensor([-torch.inf, 1.0]), torch.tensor([-torch.inf, 1.0]), "log_sigmas")
    merge("--models", *paths, "--output", tmp_path / "out")
    assert torch.isinf(load_file(tmp_path / "out.safetensors")["log_sigmas"][0])


@pytest.mark.parametrize("large", [40000.0, -60000.0])
def test_sums_that_are_too_large_for_their_type_are_refused(tmp_path, large):
    halves = torch.full((2, 2), large, dtype=torch.float16)
    argv = ["--models", *two_files(tmp_path, halves, halves), "--ratios", 1, 1, "--output", tmp_path / "out"]
    with pytest.raises(UserError, match=f"{KEY} becomes too large for float16: .*--saving_precision bf16 or float"):
        merge(*argv)
    assert not (tmp_path / "out.safetensors").exists()
    merge(*argv, "--saving_precision", "float")
    assert torch.equal(load_file(tmp_path / "out.safetensors")[KEY], 2 * halves.float())
