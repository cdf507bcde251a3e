"""SDXL from disk: what diffusers computes with it, its tokenizers, what it predicts, and the kinds that are refused."""

from __future__ import annotations

import copy
import json
import re
import shutil
from typing import Any

import pytest
import tiny
import torch
from conversions import convert, read
from drawing import slow
from safetensors.torch import load_file, save_file
from tensors import assert_same

from library.config.loss import LossConfig
from library.config.model import ModelConfig
from library.diffusion.losses import timestep_weights
from library.diffusion.schedule import stable_diffusion_schedule
from library.errors import UserError
from library.generation.embeddings import add_vectors, embedding_layer
from library.models import family as families
from library.models.base import TextEncoder, find_base, find_tokenizer, load_tokenizer, text_body
from library.models.building import build_unet
from library.models.conditioning import LiveConditioner, TextOptions, tokenize, windows_of
from library.models.kinds import check_usable
from library.models.layout import unet_rule
from library.models.precision import types_of
from library.models.prediction import V_BIAS, prediction_of
from library.models.surroundings import write_tokenizer
from library.models.tokenizer import load_clip_tokenizer

EOS = 49407
FIRST, SECOND = (text.prefixes[0] for text in families.SDXL.text_models)
TEXTS = ["a photo of a cat", "日本語 and a rather long text", ""]


def found(path, **options):
    return find_base(ModelConfig(pretrained_model_name_or_path=str(path), **options))


def changed(path, to, **tensors):
    """Write a file with further or other tensors."""
    save_file(load_file(path) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}, to)
    return to


def projection(encoder):
    return encoder.get_parameter("text_projection.weight")


def parts(base):
    modules = {"unet": base.unet, "vae": base.vae} | {text.row.folder: text.module for text in base.texts}
    return {name: text_body(module).state_dict() for name, module in modules.items()}


# ---- the weights, and what diffusers computes with them -----------------------------------------------------


def test_file_and_folder_give_the_same_tensors(model_store):
    models, paths = model_store("sdxl")
    file, folder = (tiny.load(paths[layout]) for layout in ("safetensors", "folder"))
    for name, state in parts(file).items():
        assert_same(state, parts(folder)[name])
        assert_same(state, text_body(models[name]).state_dict())
    for base in (file, folder):
        assert torch.equal(projection(base.texts[1].module), projection(models["text_encoder_2"]))


@torch.no_grad()
def test_conditioning_and_output_are_those_of_diffusers(store):
    import diffusers

    model = store("sdxl")
    kind = diffusers.StableDiffusionXLPipeline
    options = {"config": str(model.made_folder), "local_files_only": True}
    pipelines = [
        (kind.from_pretrained(model.made_folder, local_files_only=True), model.made_folder),
        (kind.from_single_file(str(model.checkpoint), **options), model.checkpoint),
    ]
    sizes = torch.tensor([[1500, 1001, 16, 0, 1216, 832], [64, 64, 0, 8, 64, 64], [3001, 2047, 0, 0, 1024, 1024]])
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for pipeline, path in pipelines:
        base = tiny.load(path)
        encoded = [pipeline.encode_prompt(text, do_classifier_free_guidance=False) for text in TEXTS]
        hidden, pooled = (torch.cat([tensors[index] for tensors in encoded]) for index in (0, 2))
        ours = LiveConditioner(base.texts).encode(TEXTS, TextOptions())
        torch.testing.assert_close(ours.hidden, hidden, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.pooled, pooled, rtol=1e-5, atol=1e-5)
        width = base.texts[1].module.config.projection_dim
        ids = torch.cat(
            [
                pipeline._get_add_time_ids(row[:2], row[2:4], row[4:], torch.float32, text_encoder_projection_dim=width)
                for row in map(tuple, sizes.tolist())
            ]
        )
        given = ours.for_unet(sizes)
        assert torch.equal(given["added_cond_kwargs"]["time_ids"], ids)
        added = {"text_embeds": pooled, "time_ids": ids}
        steps = torch.tensor([10, 500, 999])
        expected = pipeline.unet(latents, steps, encoder_hidden_states=hidden, added_cond_kwargs=added).sample
        torch.testing.assert_close(base.unet(latents, steps, **given).sample, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["text_projection.weight", "text_projection.weight.weight"])
def test_a_projection_of_a_linear_layer_is_not_turned(model_store, tmp_path, name):
    models, paths = model_store("sdxl")
    state = load_file(paths["safetensors"])
    state[SECOND + name] = state.pop(f"{SECOND}text_projection").T.contiguous()
    save_file(state, tmp_path / "a.safetensors")
    found = projection(tiny.load(tmp_path / "a.safetensors").texts[1].module)
    assert torch.equal(found, projection(models["text_encoder_2"]))


def test_what_merges_carry_beside_the_encoders_is_no_error(model_store, tmp_path):
    models, paths = model_store("sdxl")
    inner = FIRST.removesuffix("text_model.")
    more = {
        f"{inner}text_projection.weight": torch.ones(64, 64),
        f"{inner}logit_scale": torch.ones(()),
        f"{FIRST}text_projection": torch.ones(64, 64),
        f"{SECOND}embeddings.position_ids": torch.arange(77)[None],
        "v_pred": torch.zeros(0),
        "ztsnr": torch.zeros(0),
        "denoiser.sigmas": torch.zeros(1000),
    }
    file = changed(paths["safetensors"], tmp_path / "a.safetensors", **more)
    for name, state in parts(tiny.load(file)).items():
        assert_same(state, text_body(models[name]).state_dict())


# ---- tokenizers and the pooled output -----------------------------------------------------------------------


@pytest.mark.parametrize("pad_id", [0, EOS])
@pytest.mark.parametrize("kind", ["included", "folder", "tokenizer.json"])
def test_an_exclamation_mark_stays_a_word(tmp_path, pad_id, kind):
    folder = None
    if kind != "included":
        folder = tmp_path / "tokenizer"
        write_tokenizer(folder, 0, added={"<a>": 49408, "<b>": 49409})  # registers "!", as published folders do
    if kind == "tokenizer.json":
        from transformers import CLIPTokenizer

        CLIPTokenizer.from_pretrained(str(folder)).save_pretrained(tmp_path / "again")
        folder = tmp_path / "again"
    tokenizer = load_clip_tokenizer(folder, pad_id=pad_id)
    assert tokenizer.pad_token_id == pad_id
    texts = {"a cat!": [320, 2368, 256], "a cat !": [320, 2368, 256], "!!!": [995]}
    if folder is not None:
        texts["a <b>! <a>"] = [320, 49409, 256, 49408]
    tokenizer.add_tokens(["<c>"])  # as embeddings do
    for text, ids in texts.items():
        assert tokenizer(text).input_ids == [49406, *ids, EOS]


def test_each_encoder_has_its_own_padding(model_store, tmp_path):
    _, paths = model_store("sdxl")
    cache = tmp_path / "cache"
    names = ["laion_CLIP-ViT-bigG-14-laion2B-39B-b160k", "openai_clip-vit-large-patch14"]
    for name in names:
        write_tokenizer(cache / name, EOS, added={})  # the published one says EOS, which is not the padding
    for options in ({}, {"tokenizer_cache_dir": cache}):
        folders = found(paths["safetensors"], **options).tokenizers
        for row, folder, pad in zip(families.SDXL.text_models, folders, (EOS, 0), strict=True):
            text = TextEncoder(row, load_tokenizer(folder, row), model_store("sdxl")[0][row.folder])
            (tokens,) = tokenize(text, ["a cat!"], TextOptions())
            ids, _ = windows_of(text.tokenizer, tokens, 1)
            assert ids[0].tolist() == [49406, 320, 2368, 256, EOS, *[pad] * 72]
    assert [find_tokenizer(row, paths["folder"], cache) for row in families.SDXL.text_models] == [
        cache / name for name in reversed(names)
    ]
    folder = tmp_path / "folder"
    shutil.copytree(paths["folder"], folder)
    for row in families.SDXL.text_models:
        write_tokenizer(folder / row.tokenizer_folder, 0, added={})
    assert found(folder).tokenizers == (folder / "tokenizer", folder / "tokenizer_2")


@torch.no_grad()
@pytest.mark.parametrize(
    ("text", "first_words", "windows"),
    [
        ("a cat", "a cat", 1),
        ("a cat <word> sits", "a cat <word> sits", 1),  # its id is above that of EOS
        ("a cat <word> BREAK dog", "a cat <word>", 2),
        (" ".join(["cat"] * 90), " ".join(["cat"] * 75), 2),
        ("", "", 3),
    ],
)
def test_the_pooled_output_is_the_state_of_the_first_end(model_store, text, first_words, windows):
    row, module = families.SDXL.text_models[1], copy.deepcopy(model_store("sdxl")[0]["text_encoder_2"])
    encoder = TextEncoder(row, load_clip_tokenizer(pad_id=row.pad_id), module)
    encoder.module.config.eos_token_id = 2  # as published configurations say
    encoder.tokenizer.add_tokens(["<word>"])
    add_vectors(
        embedding_layer(encoder.module), [49408], torch.randn(1, 128, generator=torch.Generator().manual_seed(1))
    )
    options = TextOptions(windows=windows, has_breaks=True, keeps_ends=True)
    pooled = LiveConditioner((encoder,)).encode([text], options).pooled
    words = encoder.tokenizer(first_words, add_special_tokens=False).input_ids
    ids = torch.tensor([[49406, *words, EOS]])
    states = text_body(encoder.module)(ids).last_hidden_state  # after the final norm
    expected = states[:, -1] @ projection(encoder.module).T
    torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-5)


# ---- what it predicts ---------------------------------------------------------------------------------------

V, ZERO = {"v_pred": torch.zeros(0)}, {"ztsnr": torch.zeros(0)}
SIGNS = {
    "nothing": ("sdxl", {}, {}, {}, (False, False), None),
    "a tensor": ("sdxl", V, {}, {}, (True, False), "predicts v, by its tensors? v_pred: --v_parameterization is set"),
    "tensors": (
        "sdxl",
        V | ZERO,
        {"modelspec.prediction_type": "epsilon"},  # weaker: merging tools write it without a look
        {},
        (True, True),
        "predicts v with zero terminal SNR, by its tensors v_pred and ztsnr: --v_parameterization and "
        "--zero_terminal_snr are set",
    ),
    "metadata": ("sdxl", {}, {"modelspec.prediction_type": "v"}, {}, (True, False), "by its metadata"),
    "longer metadata": ("sd1", {}, {"modelspec.prediction_type": "v_prediction"}, {}, (True, False), "by its metadata"),
    "strange metadata": ("sdxl", {}, {"modelspec.prediction_type": "x"}, {}, (False, False), None),
    "half a sign": ("sdxl", ZERO, {}, {}, (False, False), "has zero terminal SNR, which only models that predict v"),
    "half a sign and the option": (
        "sdxl",
        ZERO,
        {},
        {"v_parameterization": True},
        (True, True),
        "--zero_terminal_snr is set",
    ),
    "the option": ("sdxl", {}, {}, {"v_parameterization": True}, (True, False), None),
    "a contradiction": (
        "sdxl",
        {},
        {"modelspec.prediction_type": "epsilon"},
        {"v_parameterization": True},
        (True, False),
        "--v_parameterization was given, but .* predicts noise, by its metadata; v is used",
    ),
    "a guess": ("sd2", {V_BIAS: torch.linspace(-1, 1, 64)}, {}, {}, (False, False), "seems to predict v"),
    "a guess and the option": (
        "sd2",
        {V_BIAS: torch.linspace(-1, 1, 64)},
        {},
        {"v_parameterization": True},
        (True, False),
        None,
    ),
}


@pytest.mark.parametrize("name", SIGNS)
def test_what_a_file_predicts_is_found_and_said(model_store, tmp_path, caplog, name):
    family, tensors, metadata, options, expected, said = SIGNS[name]
    state = load_file(model_store(family)[1]["safetensors"]) | tensors
    save_file(state, tmp_path / "a.safetensors", metadata=metadata)
    with caplog.at_level("INFO"):
        files = found(tmp_path / "a.safetensors", **options)
    assert (files.predicts_v, files.zero_snr) == expected
    told = [record.message for record in caplog.records if record.name == "library.models.prediction"]
    assert len(told) == (said is not None)
    assert said is None or re.search(said, told[0])


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_a_folder_goes_by_its_scheduler(model_store, tmp_path, caplog, family):
    folder = tmp_path / "folder"
    shutil.copytree(model_store(family)[1]["folder"], folder)
    path = folder / "scheduler" / "scheduler_config.json"

    def said(**more):
        path.write_text(json.dumps(tiny.SCHEDULER | more), encoding="utf-8")
        files = found(folder)
        return files.predicts_v, files.zero_snr

    assert said() == (False, False)
    assert said(prediction_type="v_prediction") == (True, False)
    assert said(prediction_type="v_prediction", rescale_betas_zero_snr=True) == (True, True)
    assert said(rescale_betas_zero_snr=True) == (False, False)
    assert "which only models that predict v can use" in caplog.text
    path.unlink()
    assert found(folder, v_parameterization=True).predicts_v
    base = tiny.load(folder)
    assert (base.predicts_v, base.zero_snr) == (False, False)


def test_zero_terminal_snr_of_the_options_reaches_the_model(model_store):
    path = model_store("sdxl")[1]["safetensors"]
    config = ModelConfig(pretrained_model_name_or_path=str(path), v_parameterization=True)
    assert find_base(config, zero_snr=True).zero_snr


def test_a_conversion_keeps_both_signs(store, tmp_path):
    file = changed(store("sdxl").checkpoint, tmp_path / "a.safetensors", **V, **ZERO)
    convert(file, tmp_path / "folder")
    scheduler = json.loads((tmp_path / "folder" / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    kept = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    assert kept.items() <= scheduler.items()
    (tmp_path / "folder" / "original_extras.safetensors").unlink()  # as a folder that diffusers wrote
    convert(tmp_path / "folder", tmp_path / "back.safetensors")
    assert {"v_pred", "ztsnr"} <= read(tmp_path / "back.safetensors").keys()
    files = found(tmp_path / "back.safetensors")
    assert (files.predicts_v, files.zero_snr) == (True, True)
    assert prediction_of(files.checkpoint).is_sure


@pytest.mark.parametrize("predicts_v", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"min_snr_gamma": 5.0},
        {"scale_v_pred_loss_like_noise_pred": True},
        {"v_pred_like_loss": 0.5},
        {"debiased_estimation_loss": True},
        {"min_snr_gamma": 1.0, "debiased_estimation_loss": True, "scale_v_pred_loss_like_noise_pred": True},
    ],
    ids=str,
)
def test_every_weight_at_the_last_timestep_is_finite(options, predicts_v):
    schedule = stable_diffusion_schedule(zero_terminal_snr=True)
    weights = timestep_weights(torch.arange(1000), schedule, LossConfig(**options), predicts_v=predicts_v)
    assert weights.isfinite().all()
    assert (weights >= 0).all()
    assert weights[999] == weights[998]


# ---- kinds --------------------------------------------------------------------------------------------------

UNET_INPUT = "model.diffusion_model.input_blocks.0.0.weight"
REFUSED = {
    "refiner": ({"conditioner.embedders.0.model.ln_final.weight": torch.ones(1280)}, "is an SDXL refiner"),
    "inpainting": ({UNET_INPUT: torch.ones(64, 9, 3, 3)}, "is an inpainting model: its U-Net takes 9 channels"),
    "edit": ({UNET_INPUT: torch.ones(64, 8, 3, 3)}, "is an editing model: its U-Net takes 8 channels"),
    "Playground v2.5": (
        {"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)},
        "is an EDM model .*by its tensor edm_m",
    ),
    "CosXL": ({"edm_vpred.sigma_max": torch.zeros(())}, "is a CosXL model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_of_other_kinds_are_refused_by_name(model_store, tmp_path, name):
    tensors, said = REFUSED[name]
    file = changed(model_store("sdxl")[1]["safetensors"], tmp_path / "a.safetensors", **tensors)
    with pytest.raises(UserError, match=said):
        found(file)


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "an SD 3 model"),
        ("double_blocks.0.img_attn.qkv.weight", "a model of the kind of Flux"),
    ],
)
def test_files_of_transformers_are_refused_by_name(tmp_path, name, title):
    save_file({name: torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=f"is {title}, which is not supported"):
        found(tmp_path / "a.safetensors")


FOLDERS = {
    "EDM": ("scheduler/scheduler_config", {"_class_name": "EDMEulerScheduler"}, "is an EDM model"),
    "flow": ("scheduler/scheduler_config", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "is a flow-matching"),
    "sample": ("scheduler/scheduler_config", {"prediction_type": "sample"}, "is a model that predicts sample"),
    "inpainting": ("unet/config", {"in_channels": 9}, "is an inpainting model"),
    "refiner": ("unet/config", {"cross_attention_dim": 1280}, "is an SDXL refiner"),
    "Kolors": ("text_encoder/config", {"model_type": "chatglm"}, "its text_encoder is a chatglm, and only CLIP"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_of_other_kinds_are_refused_by_name(model_store, tmp_path, name):
    part, more, said = FOLDERS[name]
    folder = tmp_path / "folder"
    shutil.copytree(model_store("sdxl")[1]["folder"], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    path = folder / f"{part}.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | more), encoding="utf-8")
    with pytest.raises(UserError, match=said):
        found(folder)


def test_a_folder_with_a_transformer_is_refused_by_name(tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text('{"_class_name": "SD3Transformer2DModel"}', encoding="utf-8")
    with pytest.raises(UserError, match=r"a model with a transformer \(SD3Transformer2DModel\) in place of the U-Net"):
        found(tmp_path)


def test_sd2_in_the_layout_of_sdxl_is_no_refiner(model_store, tmp_path):
    models, paths = model_store("sd2")
    state = {
        name.replace("cond_stage_model.model.", families.SGM_SINGLE): tensor
        for name, tensor in load_file(paths["safetensors"]).items()
    }
    save_file(state, tmp_path / "a.safetensors")
    base = tiny.load(tmp_path / "a.safetensors")
    assert base.family is families.SD2
    assert_same(text_body(base.texts[0].module).state_dict(), text_body(models["text_encoder"]).state_dict())


DEPTHS: dict[str, dict[str, Any]] = {
    "SSD-1B": {
        "transformer_layers_per_block": (1, (2, 2), (4, 4)),
        "reverse_transformer_layers_per_block": ((4, 4, 10), (2, 1, 1), 1),
        "mid_block_type": "UNetMidBlock2D",
    },
    "Vega": {"transformer_layers_per_block": (1, 1, 2)},
    "KOALA": {"layers_per_block": 1, "transformer_layers_per_block": (1, 2, 5), "mid_block_type": None},
}


@pytest.mark.parametrize("name", ["SSD-1B", slow("Vega"), slow("KOALA")])
@torch.no_grad()
def test_models_of_other_depths_are_built_from_their_shapes(model_store, tmp_path, name):
    _, paths = model_store("sdxl")
    config = tiny.unet_config(families.SDXL) | DEPTHS[name]
    unet = tiny.materialise(build_unet(config), 5)
    rule = unet_rule(families.SDXL, config)
    state = {key: t for key, t in load_file(paths["safetensors"]).items() if not key.startswith("model.diffusion")}
    state |= {next(rule(own)).name: tensor.contiguous() for own, tensor in unet.state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    base = tiny.load(tmp_path / "a.safetensors")
    assert_same(base.unet.state_dict(), unet.state_dict())
    text = LiveConditioner(base.texts).encode(["a cat"], TextOptions())
    given = text.for_unet(torch.full((1, 6), 64.0))
    latents = torch.ones(1, 4, 8, 8)
    torch.testing.assert_close(base.unet(latents, 10, **given).sample, unet(latents, 10, **given).sample)


# ---- the VAE ------------------------------------------------------------------------------------------------


def with_config(folder, to, **more):
    shutil.copytree(folder, to)
    path = to / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | more), encoding="utf-8")
    return to


def test_a_vae_that_overflows_is_in_float32_in_fp16_alone(model_store, tmp_path):
    _, paths = model_store("sdxl")
    files = found(paths["safetensors"])
    assert files.vae_overflows
    half = {"fp16": torch.float16, "bf16": torch.bfloat16, "no": torch.float32}
    for precision, dtype in half.items():
        types = types_of(precision, vae_overflows=files.vae_overflows)
        assert types.unet is dtype
        assert types.vae is (torch.float32 if precision == "fp16" else dtype)
        assert types_of(precision, vae_overflows=False).vae is dtype
        assert types_of(precision, vae_overflows=False, no_half_vae=True).vae is torch.float32
    repaired = with_config(paths["folder"] / "vae", tmp_path / "repaired", force_upcast=False)
    assert not found(paths["safetensors"], vae=repaired).vae_overflows
    assert found(paths["safetensors"], vae=paths["safetensors"]).vae_overflows  # a file does not tell
    # The default of diffusers, which it writes into configurations of every family.
    sd1 = model_store("sd1")[1]
    forced = with_config(sd1["folder"] / "vae", tmp_path / "forced", force_upcast=True)
    assert not found(sd1["safetensors"], vae=forced).vae_overflows


def test_a_vae_of_another_family_is_refused(model_store, tmp_path):
    _, paths = model_store("sdxl")
    other = model_store("sd1")[1]["folder"] / "vae"
    with pytest.raises(
        UserError, match=r"--vae: .* has the scaling factor 0.18215, and the model needs one with 0.13025"
    ):
        found(paths["safetensors"], vae=other)
    own = with_config(paths["folder"] / "vae", tmp_path / "own", scaling_factor=0.5)
    folder = tmp_path / "folder"
    shutil.copytree(paths["folder"], folder)
    shutil.copy(own / "config.json", folder / "vae" / "config.json")
    assert found(folder, vae=own).vae.path == own  # the model's own factor
    shutil.rmtree(folder / "vae")
    with pytest.raises(UserError, match=r"the scaling factor 0.5"):
        found(folder, vae=own)
    assert found(folder, vae=paths["folder"]).vae.path == paths["folder"]


def test_v2_with_a_file_of_sdxl_is_a_mistake(model_store):
    with pytest.raises(UserError, match=r"--v2 was given, but .* is an SDXL model: omit --v2"):
        found(model_store("sdxl")[1]["safetensors"], v2=True)
    check_usable(found(model_store("sdxl")[1]["folder"]).checkpoint)
