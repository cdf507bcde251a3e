"""SDXL in gen_img_diffusers.py: its pictures against diffusers' own pipelines, and what the model is told of sizes."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import tensors
import tiny
import torch
from drawing import HIGHRES, Drawing, Shot, differ, opened, pipe_of, pixels_of, same_pixels, slow
from PIL import Image
from safetensors.torch import save_file
from test_generation_images import ldm_names

import gen_img
import sdxl_gen_img
from library.config.prompts import SIZES, Prompt
from library.config.samplers import SAMPLER_NAMES
from library.errors import UserError
from library.generation import jobs
from library.models.conditioning import Conditioning, LiveConditioner, TextOptions
from library.sampling import pipelines, samplers
from library.sampling.pipelines import ControlInputs, PictureSizes, PipelineInputs, sample_latents
from library.sampling.previews import generate_previews
from networks import lora

GIVEN = "--ow 1533 --oh 2047 --nw 300 --ct 5 --cl 7"
# What diffusers is told for it.
TOLD = {
    "original_size": (2047, 1533),
    "crops_coords_top_left": (5, 7),
    "target_size": (64, 64),
    "negative_original_size": (2047, 300),
    "negative_crops_coords_top_left": (5, 7),
    "negative_target_size": (64, 64),
}


@pytest.fixture
def draw_xl(draw: Drawing) -> Any:
    """Return what runs the script over a tiny SDXL model."""

    def drawn(*words: object, **more: Any) -> list[Shot]:
        return draw(*words, **{"family": "sdxl"} | more)

    return drawn


@pytest.fixture(scope="module")
def models(model_store):
    return model_store("sdxl")[0]


@pytest.fixture(scope="module")
def base(model_store):
    """Return the loaded model."""
    return tiny.load(model_store("sdxl")[1]["safetensors"])


@pytest.fixture(scope="module")
def net(models):
    """Return a small ControlNet."""
    from diffusers import ControlNetModel

    torch.manual_seed(0)
    net = ControlNetModel.from_unet(models["unet"])
    for part in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        torch.nn.init.normal_(part.weight, std=0.05)
    torch.nn.init.normal_(net.controlnet_cond_embedding.conv_out.weight, std=0.3)
    return net.requires_grad_(False).eval()


# ---- the same picture as diffusers --------------------------------------------------------------------------


@pytest.mark.repetitions(keep=2)
@pytest.mark.parametrize(
    ("kind", "with_net", "given"),
    [
        slow("", False, ""),
        ("", False, GIVEN),
        slow("Img2Img", False, GIVEN),
        ("Inpaint", False, GIVEN),
        slow("", True, GIVEN),
        ("Img2Img", True, GIVEN),
        ("Inpaint", True, GIVEN.replace("--nw 300 ", "")),  # of which diffusers' pipeline knows nothing
    ],
)
def test_every_kind_draws_what_the_pipeline_of_diffusers_draws(
    draw_xl, models, net, source, mask, tmp_path, kind, with_net, given
):
    words: list[Any] = ["--prompt", f"a cat --n dog {given}", "--steps", 4]
    values: dict[str, Any] = {"num_inference_steps": 4}
    values |= TOLD if given else {}
    more = {}
    if kind:
        words += ["--image_path", source]
        values |= {"image": opened(source), "strength": 0.8}
    if kind == "Img2Img":
        values |= {"width": None, "height": None}
    if kind == "Inpaint":
        words += ["--mask_path", mask]
        values |= {"mask_image": tensors.opened(mask)}
    if with_net:
        net.save_pretrained(tmp_path / "net")
        words += ["--control_net_models", tmp_path / "net", "--guide_image_path", source]
        values |= {"control_image" if kind else "image": opened(source), "controlnet_conditioning_scale": 1.0}
        more = {"controlnet": net}
    if with_net and kind == "Inpaint":
        values = {name: value for name, value in values.items() if not name.startswith("negative_")}
    (found,) = draw_xl(*words)
    pipe = pipe_of(models, f"{'ControlNet' * with_net}{kind}", family="sdxl", **more)
    expected = pixels_of(pipe, **values)
    same_pixels(found.pixels[:, 32:], expected[:, 32:])
    if given:
        differ(found.pixels[:, 32:], draw_xl(*words, "--prompt", "a cat --n dog")[0].pixels[:, 32:])


def test_an_empty_negative_prompt_is_encoded(draw_xl, models):
    (found,) = draw_xl("--prompt", "a cat")
    pipe = pipe_of(models, family="sdxl", force_zeros_for_empty_prompt=False)
    same_pixels(found.pixels, pixels_of(pipe, negative_prompt=""))
    differ(found.pixels, pixels_of(pipe_of(models, family="sdxl"), negative_prompt=None))


def test_both_stages_are_told_their_own_sizes(draw_xl, models):
    words = [*HIGHRES, "--highres_fix_save_1st", "--steps", 4]
    first, second = draw_xl("--prompt", f"a cat --n dog {GIVEN}", *words)
    half: dict[str, Any] = {name: (round(pair[0] / 2), round(pair[1] / 2)) for name, pair in TOLD.items()}
    half |= {"target_size": (64, 64), "negative_target_size": (64, 64)}
    same_pixels(first.pixels, pixels_of(pipe_of(models, family="sdxl"), **half))
    start = Image.fromarray(first.pixels.astype(np.uint8)).resize((128, 128), Image.Resampling.LANCZOS)
    values: dict[str, Any] = {"image": start, "strength": 0.6, "num_inference_steps": 4, "width": None, "height": None}
    values |= TOLD | {"target_size": (128, 128), "negative_target_size": (128, 128)}
    same_pixels(second.pixels, pixels_of(pipe_of(models, "Img2Img", family="sdxl"), seed=6, **values))


@torch.no_grad()
def test_sizes_reach_the_unet_in_float32(base, models, net, source, mask):
    unet = copy.deepcopy(base.unet).to(torch.bfloat16)
    half_net = type(net).from_config(net.config)
    half_net.load_state_dict(net.state_dict())
    half_net.to(torch.bfloat16)
    both = LiveConditioner(base.texts).encode(["a cat", "dog"], TextOptions())
    seen: list[torch.Tensor] = []
    for module in (unet, half_net):
        module.register_forward_pre_hook(
            lambda _, arguments, named: seen.append(named["added_cond_kwargs"]["time_ids"]), with_kwargs=True
        )
    for kind in ("", "Img2Img", "Inpaint"):
        for control in (None, ControlInputs([half_net], [[opened(source)]], [1.0], [1.0])):
            sample_latents(
                dataclasses.replace(base, unet=unet),
                PipelineInputs(
                    text=both.part(0, 1),
                    negative=both.part(1, 2),
                    seeds=[5],
                    width=64,
                    height=64,
                    steps=1,
                    scale=4.0,
                    sampler="ddim",
                    init_images=[opened(source)] if kind else None,
                    masks=[tensors.opened(mask)] if kind == "Inpaint" else None,
                    control=control,
                    sizes=PictureSizes(1533, 2047, 300, None, 3001, 7),
                ),
            )
    assert len(seen) == 9
    for ids in seen:
        assert ids.dtype is torch.float32
        assert ids.tolist() == [[2047, 300, 3001, 7, 64, 64], [2047, 1533, 3001, 7, 64, 64]]


def test_a_vae_in_float32_stays_so_beside_a_half_unet(draw_xl, source, mask, monkeypatch):
    """diffusers would leave it in the type of the U-Net, for its configuration says force_upcast."""
    types = []
    decode = pipelines.decode_latents

    def watched(base, *arguments):
        types.append((base.unet.dtype, base.vae.dtype))
        return decode(base, *arguments)

    monkeypatch.setattr("library.generation.image_generator.decode_latents", watched)
    draw_xl("--prompt", "a cat", "--bf16", "--no_half_vae", "--image_path", source, "--mask_path", mask)
    draw_xl("--prompt", "a cat", "--bf16", "--image_path", source, "--mask_path", mask)
    assert types == [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]


# ---- prompts ------------------------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(base, models, words: str, weights: list[float], normalize: bool) -> Conditioning:
    """Return the conditioning of words in two windows, as the documentation says, by transformers alone."""
    parts, pooled = [], torch.zeros(0)
    windows = [base.texts[0].tokenizer(text, add_special_tokens=False).input_ids for text in words.split(" BREAK ")]
    for folder, pad in (("text_encoder", 49407), ("text_encoder_2", 0)):
        rows = [[49406, *ids, 49407, *[pad] * (75 - len(ids))] for ids in windows]
        output = models[folder](torch.tensor(rows), output_hidden_states=True)
        states = output.hidden_states[-2].flatten(0, 1).double()
        scale = torch.ones(len(states), 1, dtype=torch.float64)
        scale[1 : 1 + len(weights), 0] = torch.tensor(weights, dtype=torch.float64)
        changed = states * scale
        parts.append(changed * (states.mean() / changed.mean()) if normalize else changed)
        if folder == "text_encoder_2":
            normed = tiny.text_body(models[folder]).get_submodule("final_layer_norm")(output.hidden_states[-1])
            pooled = models[folder].text_projection(normed[0, len(windows[0]) + 1])
    return Conditioning(torch.cat(parts, dim=-1)[None], pooled[None])


@pytest.mark.parametrize("normalize", [True, False])
def test_weights_and_break_act_on_both_encoders(base, models, normalize):
    options = TextOptions(2, weights="original" if normalize else "none", has_breaks=True, keeps_ends=True)
    with torch.no_grad():
        found = LiveConditioner(base.texts).encode(["a (cat:1.4) [sits] BREAK dog"], options)
    expected = by_hand(base, models, "a cat sits BREAK dog", [1, 1.4, 1 / 1.1], normalize)
    assert found.hidden.shape == (1, 154, 192)
    assert found.pooled is not None
    assert expected.pooled is not None
    torch.testing.assert_close(found.hidden.double(), expected.hidden, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.pooled, expected.pooled, rtol=1e-4, atol=1e-4)


def test_embeddings_go_to_the_encoders_of_their_widths(draw_xl, models, tmp_path, caplog):
    generator = torch.Generator().manual_seed(0)
    vectors = {name: torch.randn(2, width, generator=generator) for name, width in (("clip_l", 64), ("clip_g", 128))}
    save_file(vectors, tmp_path / "zqx.safetensors")
    option = ["--textual_inversion_embeddings", tmp_path / "zqx.safetensors"]
    (found,) = draw_xl("--prompt", "a zqx cat --n dog", *option)
    pipe = pipe_of(models, family="sdxl", changed=True)
    for folder, name in (("", "clip_l"), ("_2", "clip_g")):
        encoder, tokenizer = getattr(pipe, f"text_encoder{folder}"), getattr(pipe, f"tokenizer{folder}")
        encoder.config.eos_token_id = 49407  # published configurations say 2, and then the largest id is meant
        pipe.load_textual_inversion(vectors[name], token="zqx", text_encoder=encoder, tokenizer=tokenizer)
    same_pixels(found.pixels, pixels_of(pipe, "a zqx cat"))
    differ(found.pixels, draw_xl("--prompt", "a zqx cat --n dog")[0].pixels)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"clip_l": (1, 64)}, "has vectors of 64 numbers, this model 64 and 128"),
        ({"clip_l": (1, 64), "clip_g": (2, 128)}, "has 1 and 2 vectors for the text encoders"),
    ],
)
def test_embeddings_for_one_encoder_are_refused(draw_xl, tmp_path, shapes, message):
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "zqx.safetensors")
    with pytest.raises(UserError, match=message):
        draw_xl("--prompt", "a", "--textual_inversion_embeddings", tmp_path / "zqx.safetensors")


# ---- sizes --------------------------------------------------------------------------------------------------


def test_sizes_are_one_list():
    assert [field.name for field in dataclasses.fields(PictureSizes)] == list(SIZES)


def test_sizes_of_the_run_hold_where_the_prompt_has_none(draw_xl):
    options = ["--original_width", 1533, "--original_height", 2047, "--original_width_negative", 300]
    (found,) = draw_xl("--prompt", "a cat --ct 5", *options, "--crop_top", 9, "--crop_left", 7)
    (expected,) = draw_xl("--prompt", f"a cat {GIVEN}")
    assert np.array_equal(found.pixels, expected.pixels)
    assert found.texts == expected.texts


def test_a_picture_is_drawn_again_with_its_sizes(draw_xl):
    (first,) = draw_xl("--prompt", f"a cat {GIVEN}", layout="safetensors")
    table = json.loads(first.texts["generation"])
    assert {name: table.get(name) for name in SIZES} == {
        "original_width": 1533,
        "original_height": 2047,
        "original_width_negative": 300,
        "original_height_negative": None,  # that of the prompt
        "crop_top": 5,
        "crop_left": 7,
    }
    assert first.texts["original-height-negative"] == first.texts["original-height"] == "2047"
    (again,) = draw_xl("--from_picture", first.path, "--crop_top", 3, layout="safetensors")
    assert np.array_equal(first.pixels, again.pixels)
    assert json.loads(again.texts["generation"]) == table


def test_the_sizes_of_sd_scripts_are_read(draw_xl, tmp_path):
    from PIL import PngImagePlugin

    (first,) = draw_xl("--prompt", "a cat --ow 900 --cl 7")
    info = PngImagePlugin.PngInfo()
    keys = ("prompt", "seed", "sampler", "steps", "scale", *(name.replace("_", "-") for name in SIZES))
    for key in keys:
        # It writes None where nothing was given.
        info.add_text(key, "None" if key.startswith("original-height") else first.texts[key])
    Image.fromarray(first.pixels.astype(np.uint8)).save(tmp_path / "theirs.png", pnginfo=info)
    (again,) = draw_xl("--from_picture", tmp_path / "theirs.png")
    assert np.array_equal(first.pixels, again.pixels)


def test_sizes_are_axes_of_a_grid(draw_xl):
    shots = draw_xl("--prompt", "a cat", "--grid", "crop_top=0,500", "original_width=64,2048")
    found = [json.loads(shot.texts["generation"]) for shot in shots]
    combinations = {(row.get("crop_top", 0), row["original_width"]) for row in found}
    assert combinations == {(0, 64), (0, 2048), (500, 64), (500, 2048)}
    for index in range(3):
        differ(shots[index].pixels, shots[index + 1].pixels)


def test_models_that_take_no_sizes_say_so_once(draw, caplog):
    jobs.warn_of_sizes.cache_clear()
    with caplog.at_level("WARNING"):
        (found,) = draw("--prompt", "a cat --ow 900", "--n_iter", 1)
        draw("--prompt", "a cat", "--crop_left", 3)
    assert [message for message in caplog.messages if "sizes" in message] == [
        "SD 1.x models are told no sizes of pictures: --original_width, --crop_top and the like (--ow, --ct in "
        "prompts) have no effect"
    ]
    assert np.array_equal(found.pixels, draw("--prompt", "a cat")[0].pixels)
    assert "original-width" not in found.texts
    assert "original_width" not in found.texts["generation"]


def test_the_side_is_that_of_the_family(draw, draw_xl, monkeypatch):
    seen = []

    def sampled(base, inputs, on_step):
        seen.append((inputs.width, inputs.height))
        return torch.zeros(1, 4, 8, 8)

    monkeypatch.setattr("library.generation.image_generator.sample_latents", sampled)
    draw("--prompt", "a", sized=False)
    draw_xl("--prompt", "a", sized=False)
    draw_xl("--prompt", "a --w 832", sized=False)
    assert seen == [(512, 512), (1024, 1024), (832, 1024)]


@pytest.mark.parametrize(("family", "side"), [("sd1", 512), ("sdxl", 1024)])
def test_the_side_of_a_preview_is_that_of_the_family(base, monkeypatch, family, side):
    base = dataclasses.replace(base, family=tiny.FAMILIES[family])
    seen = []

    def sampled(base, inputs, on_step):
        seen.append((inputs.width, inputs.height))
        return torch.zeros(1, 4, 8, 8)

    monkeypatch.setattr("library.sampling.previews.sample_latents", sampled)
    prompts = [Prompt("a"), Prompt("a", height=64)]
    list(generate_previews(base, LiveConditioner(base.texts), prompts, [1, 2], sampler="ddim"))
    assert seen == [(side, side), (side, 64)]


def test_previews_are_those_of_diffusers(base, models):
    prompt = Prompt("a cat", "dog", 64, 72, None, 3, 3.0)
    (found,) = generate_previews(base, LiveConditioner(base.texts), [prompt], [5], sampler="euler_a")
    pipe = pipe_of(models, family="sdxl", sampler="euler_a")
    expected = pixels_of(pipe, width=64, height=72, num_inference_steps=3, guidance_scale=3.0)
    same_pixels(np.asarray(found.image).astype(int), expected)


# ---- v-prediction and zero terminal SNR ---------------------------------------------------------------------

KNOWING = ("ddim", "euler", "euler_a", "dpmsolver", "dpmsolver++")


def test_samplers_that_know_zero_snr_begin_with_pure_noise(caplog):
    for name in SAMPLER_NAMES:
        samplers.warn_of_schedule.cache_clear()
        caplog.clear()
        scheduler = samplers.build_sampler(name, predicts_v=True, zero_snr=True)
        scheduler.set_timesteps(10)
        if name.removeprefix("k_") not in KNOWING:
            assert f"which the sampler {name} does not know" in caplog.text
            assert "ddim, euler, euler_a, dpmsolver, dpmsolver++ do" in caplog.text
            continue
        assert caplog.text == ""
        assert scheduler.timesteps[0] == 999
        assert scheduler.alphas_cumprod[-1] < 1e-6
        assert scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_a_model_that_predicts_noise_never_begins_with_pure_noise(name):
    usual, asked = (samplers.build_sampler(name, predicts_v=False, zero_snr=given) for given in (False, True))
    assert dict(asked.config) == dict(usual.config)
    latents = torch.ones(1, 4, 8, 8)
    asked.set_timesteps(4)
    for timestep in asked.timesteps:
        asked.scale_model_input(latents, timestep)  # some count steps by it
        latents = asked.step(torch.ones_like(latents), timestep, latents).prev_sample
    assert latents.isfinite().all()


@pytest.mark.parametrize(
    ("family", "sampler"),
    [("sdxl", "euler_a"), slow("sd2", "euler_a"), slow("sd2", "ddim"), slow("sdxl", "dpmsolver++")],
)
def test_zero_snr_is_that_of_diffusers(draw, model_store, caplog, family, sampler):
    words = ["--v_parameterization", "--zero_terminal_snr", "--sampler", sampler, "--steps", 4]
    where: dict[str, Any] = {"family": family, "layout": "safetensors"}  # where nothing says what is predicted
    (found,) = draw("--prompt", "a cat --n dog", *words, **where)
    pipe = pipe_of(model_store(family)[0], family=family, sampler=sampler, predicts_v=True, zero_snr=True)
    same_pixels(found.pixels, pixels_of(pipe, num_inference_steps=4))
    (usual,) = draw("--prompt", "a cat --n dog", *words[:1], *words[2:], **where)
    differ(found.pixels, usual.pixels)
    assert "Noise Schedule: Zero Terminal SNR" in found.texts["parameters"]
    assert "Noise Schedule" not in usual.texts["parameters"]

    def told() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name.startswith("library")]

    with caplog.at_level("WARNING"):
        (again,) = draw("--from_picture", found.path, *words, **where)
        assert told() == []
        draw("--from_picture", found.path, "--v_parameterization", **where)
        draw("--from_picture", usual.path, *words, **where)
    assert told() == [
        "a picture was drawn with zero terminal SNR: give --zero_terminal_snr, or it will differ",
        "a picture was drawn without zero terminal SNR, which this model has: it will differ",
    ]
    assert np.array_equal(found.pixels, again.pixels)


def test_zero_snr_needs_v(draw_xl):
    with pytest.raises(UserError, match="--zero_terminal_snr is for models that predict v: give --v_parameterization"):
        draw_xl("--prompt", "a", "--zero_terminal_snr")


# ---- files --------------------------------------------------------------------------------------------------


def test_control_net_files_of_both_layouts_are_read(draw_xl, net, source, tmp_path):
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net.save_pretrained(tmp_path / "net")
    save_file(state, tmp_path / "diffusers.safetensors")
    save_file(ldm_names(state, dict(net.config)), tmp_path / "ldm.safetensors")
    words = ["--prompt", "a cat", "--guide_image_path", source, "--control_net_models"]
    expected = draw_xl(*words, tmp_path / "net")[0].pixels
    for name in ("diffusers.safetensors", "ldm.safetensors"):
        same_pixels(draw_xl(*words, tmp_path / name)[0].pixels, expected)


def test_a_control_net_of_another_family_is_refused(draw, net, source, tmp_path):
    net.save_pretrained(tmp_path / "net")
    message = "net is for another kind of models than the model .cross_attention_dim is 192, not 64"
    with pytest.raises(UserError, match=message):
        draw("--prompt", "a", "--guide_image_path", source, "--control_net_models", tmp_path / "net")


def test_clip_skip_has_no_effect_and_is_told_once(draw_xl, caplog):
    jobs.tell_once.cache_clear()
    with caplog.at_level("INFO"):
        shots = draw_xl("--prompt", "a cat", "--clip_skip", 2, "--images_per_prompt", 2)
    said = "--clip_skip 2 has no effect: SDXL models are always used with the same layer"
    assert caplog.messages.count(said) == 1
    assert np.array_equal(shots[0].pixels, draw_xl("--prompt", "a cat", "--images_per_prompt", 2)[0].pixels)
    assert "Clip skip" not in shots[0].texts["parameters"]


@pytest.mark.parametrize("module", ["networks.lora", slow("lycoris.kohya")])
def test_networks_act_with_the_strength_of_the_prompt(draw_xl, models, tmp_path, module):
    torch.manual_seed(0)
    encoders = [models["text_encoder"], models["text_encoder_2"]]
    network = lora.create_network(1.0, 4, 3.0, None, encoders, models["unet"])
    for part in network.modules_in_order():
        torch.nn.init.normal_(part.lora_up.weight, std=0.05)
    lora.write_weights(tmp_path / "net.safetensors", network.state_dict(), {})
    words = ["--network_module", module, "--network_weights", tmp_path / "net.safetensors"]
    plain, half = draw_xl("--prompt", "a cat --n dog")[0], draw_xl("--prompt", "a cat --n dog --am 0.5", *words)[0]
    assert np.array_equal(plain.pixels, draw_xl("--prompt", "a cat --n dog --am 0", *words)[0].pixels)
    differ(plain.pixels, half.pixels)
    pipe = pipe_of(models, family="sdxl", changed=True)
    pipe.load_lora_weights(str(tmp_path / "net.safetensors"))
    pipe.set_adapters(pipe.get_active_adapters(), 0.5)
    same_pixels(half.pixels, pixels_of(pipe), most=2)
    assert "<lora:net:0.5>" in half.texts["parameters"]


@pytest.mark.parametrize(("flag", "title"), [("--v1", "SDXL"), ("--v2", "SDXL"), ("--sdxl", "SD 1.x")])
def test_flags_of_other_families_are_refused(draw, flag, title):
    with pytest.raises(UserError, match=f"{flag} was given, but .* is an {title} model: omit {flag}"):
        draw("--prompt", "a", flag, family="sd1" if flag == "--sdxl" else "sdxl")


@pytest.mark.parametrize("words", [["--offload", "--vae_tiling"], slow(["--opt_channels_last"])], ids=str)
def test_saving_memory_changes_no_picture(draw_xl, words):
    argv = ["--prompt", "a cat", "--images_per_prompt", 2, "--batch_size", 2]
    for one, other in zip(draw_xl(*argv), draw_xl(*argv, *words), strict=True):
        same_pixels(one.pixels, other.pixels)


@pytest.mark.parametrize("script", [gen_img, sdxl_gen_img])
def test_the_other_names_are_the_same_script(script, model_store, tmp_path, capsys):
    flag = ["--sdxl"] if script is gen_img else []
    words = ["--ckpt", model_store("sdxl")[1]["folder"], "--prompt", "a", "--W", 64, "--H", 64, "--steps", 1, *flag]
    assert script.main([str(word) for word in [*words, "--outdir", tmp_path]]) == 0
    assert len(list(tmp_path.glob("*.png"))) == 1
    with pytest.raises(SystemExit):
        script.main(["--help"])
    assert f"python {script.__name__}.py --ckpt" in capsys.readouterr().out
