"""networks/check_lora_weights.py: what it says of a file is so; what it says of diffusers, diffusers does."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from drawing import pipe_of
from loras import deltas, make_lora, outputs
from safetensors.torch import load_file, save_file
from scripts import ROOT, python

from networks import check_lora_weights, convert_lora, lora

MIDDLE = "lora_unet_mid_block_attentions_0_proj_in"


def report(path, capsys, *argv, code=0):
    capsys.readouterr()
    assert check_lora_weights.main([str(path), "--json", *argv]) == code
    return json.loads(capsys.readouterr().out)


def test_modules_ranks_norms_and_metadata_are_those_of_the_file(model_store, tmp_path, capsys):
    models, _ = model_store("sd1")
    file = make_lora(models, tmp_path / "a.safetensors", rank=4, alpha=2.0, conv_dim="3", conv_alpha="1")
    found = report(file, capsys)
    norms = {name: float(delta.norm()) for name, delta in deltas(file).items()}
    unet = {name: norm for name, norm in norms.items() if name.startswith("lora_unet_")}
    part = found["parts"]["U-Net"]
    assert part["modules"] == len(unet)
    assert set(part["ranks"]) == {"3", "4"}
    assert set(part["alphas"]) == {"2", "1"}
    assert part["mean_norm"] == pytest.approx(sum(unet.values()) / len(unet))
    assert part["largest"] == max(unet, key=unet.__getitem__)
    assert part["largest_norm"] == pytest.approx(max(unet.values()))
    assert found["kinds"] == {"LoRA": len(load_file(file))}
    assert found["hash_is_true"] is True
    assert found["damage"] == found["unknown_modules"] == []
    done = python(ROOT / "networks" / "check_lora_weights.py", file, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = done.stdout
    assert len(text.splitlines()) < 28
    assert f"{len(unet)}" in text


VARIANTS = {
    "plain": lambda w: w,
    "no alphas": lambda w: {n: t for n, t in w.items() if not n.endswith(".alpha")},
    "a stray alpha": lambda w: w | {"lora_unet_nowhere.alpha": torch.tensor(1.0)},
    "Tucker": lambda w: w | {f"{MIDDLE}.lora_mid.weight": torch.ones(4, 4, 1, 1)},
    "LoHa": lambda w: {n: t for n, t in w.items() if MIDDLE not in n} | {f"{MIDDLE}.hada_w1_a": torch.ones(2, 2)},
    "a difference": lambda w: w | {"lora_unet_conv_in.diff": torch.ones(2, 2)},
    "(1, 1) alphas": lambda w: {n: t.reshape(1, 1) if n.endswith(".alpha") else t for n, t in w.items()},
    "a foreign tensor": lambda w: w | {"emp": torch.ones(1)},
    "2-D projections": lambda w: {n: t.flatten(1) if "proj_in" in n and t.ndim == 4 else t for n, t in w.items()},
}


@pytest.mark.repetitions(keep=4)
@pytest.mark.parametrize("change", VARIANTS.values(), ids=VARIANTS)
def test_diffusers_refuses_what_is_said_to_be_refused(model_store, tmp_path, capsys, change):
    models, _ = model_store("sd1")
    file = make_lora(models, tmp_path / "a.safetensors")
    # The width of the text tells the family, and a tiny model has another: real ones are 768 wide.
    lora.write_weights(file, change(load_file(file)), {"ss_base_model_version": "sd_v1"})
    verdict = report(file, capsys)["readers"]["diffusers"]
    text, unet = copy.deepcopy(models["text_encoder"]), copy.deepcopy(models["unet"])
    pipe = pipe_of(model_store("sd1")[0] | {"text_encoder": text, "unet": unet}, family="sd1")
    try:
        pipe.load_lora_weights(tmp_path, weight_name=file.name)
    except Exception:  # noqa: BLE001 - whatever it raises
        assert verdict.startswith("refuses the file")
    else:
        assert verdict.startswith("applies")


def test_other_names_and_kinds_are_told(model_store, tmp_path, capsys):
    models, _ = model_store("sd1")
    file = make_lora(models, tmp_path / "a.safetensors")
    out = tmp_path / "b.safetensors"
    assert convert_lora.main(["--model", str(file), "--save_to", str(out), "--to", "diffusers"]) == 0
    one, other = report(file, capsys), report(out, capsys)
    assert (one["names"], other["names"]) == ("sd-scripts", "diffusers")
    for title, part in one["parts"].items():
        assert other["parts"][title]["mean_norm"] == pytest.approx(part["mean_norm"])
    factors = {f"{MIDDLE}.lokr_w1": torch.ones(2, 2), f"{MIDDLE}.lokr_w2": torch.ones(2, 2)}
    save_file(factors | {f"{MIDDLE}.alpha": torch.tensor(1.0)}, out)
    found = report(out, capsys)
    assert found["kinds"] == {"LoKr": 3}
    assert found["readers"]["diffusers"].endswith("is a part of a LoKr network")
    assert found["readers"]["ComfyUI"] == "applies 3 tensors"


def test_forge_refuses_more_than_twelve_unknown_tensors(tmp_path, capsys):
    for count in (4, 5):
        weights: dict[str, torch.Tensor] = {}
        for index in range(count):
            weights |= {f"lora_unet_odd{index}.lora_{end}.weight": torch.ones(1, 1) for end in ("down", "up")}
            weights[f"lora_unet_odd{index}.alpha"] = torch.tensor(1.0)
        save_file(weights, tmp_path / "a.safetensors")
        found = report(tmp_path / "a.safetensors", capsys)
        assert len(found["unknown_modules"]) == count
        assert found["readers"]["Forge"].startswith("refuses" if count > 4 else "applies 0 tensors, skips 12")
        assert found["readers"]["AUTOMATIC1111"].startswith("applies 0 tensors")


def test_damage_is_told_and_ends_with_one(model_store, tmp_path, capsys):
    models, _ = model_store("sd1")
    file = make_lora(models, tmp_path / "a.safetensors")
    weights = load_file(file)
    weights[f"{MIDDLE}.lora_up.weight"][0, 0] = torch.nan
    other = "lora_unet_mid_block_attentions_0_proj_out"
    weights[f"{other}.lora_down.weight"] = weights[f"{other}.lora_down.weight"][:3].contiguous()
    del weights["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"]
    save_file(weights, file, metadata={"sshs_model_hash": "0" * 64})
    found = report(file, capsys, code=1)
    assert found["damage"] == [
        f"{MIDDLE}.lora_up.weight holds NaN or infinity",
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight has no partner",
        f"{other}: the matrices have the ranks [3, 4]",
    ]
    assert found["hash_is_true"] is False
    assert check_lora_weights.main([str(file)]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_all_keys_are_shown_on_demand(model_store, tmp_path, capsys):
    models, _ = model_store("sd2")
    file = make_lora(models, tmp_path / "a.safetensors")
    weights = load_file(file)
    tensors = {tensor["name"]: tensor for tensor in report(file, capsys, "-s")["tensors"]}
    assert tensors.keys() == weights.keys()
    for name, tensor in weights.items():
        assert tensors[name]["mean"] == pytest.approx(float(tensor.double().abs().mean()))
        assert tensors[name]["shape"] == list(tensor.shape)


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match:RuntimeWarning")
def test_alphas_that_diffusers_does_not_apply_are_told_and_convert_mends_it(model_store, tmp_path, capsys):
    """diffusers 0.42 takes one alpha for all attention layers of a file in the names of sd-scripts."""
    models, _ = model_store("sd1")
    file = make_lora(models, tmp_path / "a.safetensors", alpha=2.0)
    weights = load_file(file)
    weights = {n: t * 4 if n.endswith("alpha") and "_attn1_to_k" in n else t for n, t in weights.items()}
    save_file(weights, file)
    assert "one alpha" in report(file, capsys)["readers"]["diffusers"]
    out = tmp_path / "b.safetensors"
    assert convert_lora.main(["--model", str(file), "--save_to", str(out), "--to", "diffusers"]) == 0
    assert "one alpha" not in report(out, capsys)["readers"]["diffusers"]
    text, unet = copy.deepcopy(models["text_encoder"]), copy.deepcopy(models["unet"])
    network, _ = lora.create_network_from_weights(1.0, str(file), None, text, unet)
    network.load_state_dict(weights)
    network.apply_to(text, unet)
    expected = outputs(text, unet)[1]
    network.remove()
    found = []
    for path in (file, out):
        pipe = pipe_of(model_store("sd1")[0] | {"text_encoder": text, "unet": unet}, family="sd1")
        pipe.load_lora_weights(tmp_path, weight_name=path.name)
        found.append(outputs(text, unet)[1])
        pipe.unload_lora_weights()
    assert (found[0] - expected).norm() > 1e-3 * expected.norm()
    assert (found[1] - expected).norm() < 1e-5 * expected.norm()


# ---- alphas of PEFT's configurations, and the names of other programs ----------------------------------------

WIDE = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


def pair(module, downs=(".lora_A.weight", ".lora_B.weight"), rank=16, width=768):
    torch.manual_seed(0)
    return {f"{module}{downs[0]}": torch.randn(rank, width), f"{module}{downs[1]}": torch.randn(8, rank)}


def norm_of(weights, scale):
    down, up = (tensor.double() for tensor in weights.values())
    return scale * float((up @ down).norm())


def test_alpha_and_norm_are_those_of_the_configuration(tmp_path, capsys):
    weights = pair(f"base_model.model.{WIDE}")
    file = tmp_path / "adapter_model.safetensors"
    save_file(weights, file)
    (tmp_path / "adapter_config.json").write_text('{"r": 16, "lora_alpha": 0.5}', encoding="utf-8")
    found = report(file, capsys)
    part = found["parts"]["U-Net"]
    assert part["alphas"] == {"0.5": 1}
    assert part["largest_norm"] == pytest.approx(norm_of(weights, 0.5 / 16))
    assert found["names"] == "PEFT"
    weights = pair(f"unet.{WIDE}")
    table = {"unet.r": 16, "unet.lora_alpha": 16, "unet.alpha_pattern": {WIDE: 4}}
    save_file(weights, tmp_path / "b.safetensors", {"lora_adapter_metadata": json.dumps(table)})
    found = report(tmp_path / "b.safetensors", capsys)
    part = found["parts"]["U-Net"]
    assert (part["alphas"], part["largest_norm"]) == ({"4": 1}, pytest.approx(norm_of(weights, 4 / 16)))
    assert "without the alphas" in found["readers"]["stable-diffusion.cpp"]
    save_file(weights, tmp_path / "b.safetensors")
    assert "without the alphas" not in report(tmp_path / "b.safetensors", capsys)["readers"]["stable-diffusion.cpp"]


def test_a_configuration_that_cannot_be_used_is_told(tmp_path, capsys, caplog):
    file = tmp_path / "adapter_model.safetensors"
    save_file(pair(f"base_model.model.{WIDE}"), file)
    assert report(file, capsys)["parts"]["U-Net"]["alphas"] == {"16": 1}
    assert "put that file beside it; the ranks are taken for alphas" in caplog.text


def test_alphas_in_whole_numbers_count(tmp_path, capsys):
    weights = pair(
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k", (".lora_down.weight", ".lora_up.weight")
    )
    alpha = {"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.alpha": torch.tensor(2)}
    save_file(weights | alpha, tmp_path / "a.safetensors")
    part = report(tmp_path / "a.safetensors", capsys)["parts"]["U-Net"]
    assert (part["alphas"], part["largest_norm"]) == ({"2": 1}, pytest.approx(norm_of(weights, 2 / 16)))


@pytest.mark.parametrize(
    ("names", "unet", "text"),
    [
        ("PEFT", f"base_model.model.{WIDE}", "base_model.model.text_model.encoder.layers.0.self_attn.q_proj"),
        (
            "ComfyUI",
            "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k",
            "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj",
        ),
        ("LyCORIS", f"lycoris_{WIDE.replace('.', '_')}", "lycoris_text_model_encoder_layers_0_self_attn_q_proj"),
        ("unknown", WIDE, "text_model.encoder.layers.0.self_attn.q_proj"),
    ],
)
def test_parts_and_names_are_told_for_the_files_of_all_programs(tmp_path, capsys, names, unet, text):
    save_file(pair(unet) | pair(text) | pair("nowhere.at.all"), tmp_path / "a.safetensors")
    found = report(tmp_path / "a.safetensors", capsys)
    assert {title: part["modules"] for title, part in found["parts"].items()} == {
        "U-Net": 1,
        "text encoder": 1,
        "other": 1,
    }
    assert found["names"] == names
    save_file(pair("lycoris_nowhere"), tmp_path / "a.safetensors")
    assert list(report(tmp_path / "a.safetensors", capsys)["parts"]) == ["U-Net"]


def test_alphas_in_tensors_and_metadata_are_refused_as_diffusers_does(model_store, tmp_path, capsys):
    models, _ = model_store("sd1")
    file = make_lora(models, tmp_path / "a.safetensors")
    weights, about = load_file(file), {"ss_base_model_version": "sd_v1"}
    text, unet = copy.deepcopy(models["text_encoder"]), copy.deepcopy(models["unet"])
    pipe = pipe_of(models | {"text_encoder": text, "unet": unet}, family="sd1")
    save_file(weights, file, about | {"lora_adapter_metadata": '{"unet.r": 4, "unet.lora_alpha": 8}'})
    found = report(file, capsys)["readers"]
    assert found["diffusers"].startswith("refuses the file: it has alphas both")
    assert "without the alphas" not in found["ComfyUI"]  # each module has its own
    with pytest.raises(ValueError, match="cannot be specified"):
        pipe.load_lora_weights(tmp_path, weight_name=file.name)
    save_file(weights, file, about | {"lora_adapter_metadata": "null"})
    assert report(file, capsys)["readers"]["diffusers"].startswith("applies")
    pipe.load_lora_weights(tmp_path, weight_name=file.name)
