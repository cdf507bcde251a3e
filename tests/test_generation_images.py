"""Pictures to begin with, two stages and ControlNets in gen_img_diffusers.py, against diffusers."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
import tensors
import torch
from drawing import HIGHRES, SAMPLERS, SETTINGS, differ, opened, pipe_of, pixels_of, same_pixels, slow
from PIL import Image
from safetensors.torch import save_file

from library.errors import UserError

# ---- pictures to begin with ---------------------------------------------------------------------------------


IMG2IMG = [("ddim", 0.3), ("ddim", 1.0), ("euler_a", 0.3), ("heun", 0.3), ("dpmsingle", 1.0)]
MORE = [slow(name, 0.5) for name in SAMPLERS]


@pytest.mark.repetitions(keep=2)
@pytest.mark.parametrize(("sampler", "strength"), [*IMG2IMG, *MORE])
def test_img2img_is_that_of_diffusers(draw, model_store, source, sampler, strength):
    words = ["--image_path", source, "--strength", strength, "--steps", 4, "--sampler", sampler]
    (found,) = draw("--prompt", "a cat --n dog", *words)
    pipe = pipe_of(model_store("sd1")[0], "Img2Img", sampler=sampler)
    values: dict[str, Any] = {
        "image": opened(source),
        "strength": strength,
        "num_inference_steps": 4,
        "width": None,
        "height": None,
    }
    same_pixels(found.pixels, pixels_of(pipe, **values))
    assert f"Denoising strength: {strength:g}" in found.texts["parameters"]


@pytest.mark.parametrize("strength", [0.3, 1.0])
@pytest.mark.parametrize("sampler", ["ddim", "euler_a"])
def test_inpainting_is_that_of_diffusers_and_keeps_the_rest(draw, model_store, source, mask, sampler, strength):
    words = ["--image_path", source, "--mask_path", mask, "--strength", strength, "--steps", 4, "--sampler", sampler]
    (found,) = draw("--prompt", "a cat --n dog", *words)
    pipe = pipe_of(model_store("sd1")[0], "Inpaint", sampler=sampler)
    values: dict[str, Any] = {
        "image": opened(source),
        "mask_image": tensors.opened(mask),
        "strength": strength,
        "num_inference_steps": 4,
    }
    expected = pixels_of(pipe, **values)
    same_pixels(found.pixels[:, 32:], expected[:, 32:])
    assert np.array_equal(found.pixels[:, :32], np.asarray(opened(source)).astype(int)[:, :32])
    differ(found.pixels[:, 32:], np.asarray(opened(source)).astype(int)[:, 32:])


def test_a_grey_mask_blends(draw, source, tmp_path):
    Image.new("L", (64, 64), 200).save(tmp_path / "grey.png")
    Image.new("L", (64, 64), 255).save(tmp_path / "white.png")
    grey, white = (
        draw("--prompt", "a cat", "--image_path", source, "--mask_path", tmp_path / name, "--steps", 4)[0].pixels
        for name in ("grey.png", "white.png")
    )
    kept = np.asarray(opened(source)).astype(int)
    assert np.abs(grey - (white * 200 + kept * 55) / 255).max() <= 1.5


def test_strengths_too_small_for_a_step_keep_the_picture(draw, source, mask):
    picture = ["--prompt", "a cat", "--image_path", source, "--steps", 2]
    nothing = [draw(*picture, "--strength", strength)[0].pixels for strength in (0, 0.3)]
    assert np.array_equal(*nothing)
    same_pixels(nothing[0], draw(*picture, "--strength", 0, "--sampler", "euler_a")[0].pixels)
    kept = draw(*picture, "--strength", 0.3, "--mask_path", mask)[0].pixels
    assert np.array_equal(kept[:, :32], np.asarray(opened(source)).astype(int)[:, :32])


def test_pictures_are_taken_as_they_are_meant_to_be_seen(draw, tmp_path):
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 255, (9, 7, 4), dtype=np.uint8), "RGBA")
    clear = small.resize((75, 93), Image.Resampling.BILINEAR)
    plain = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    folder = tmp_path / "sources"
    folder.mkdir()
    clear.save(folder / "1.PNG")
    plain.save(folder / "2.png")
    plain.transpose(Image.Transpose.ROTATE_90).save(folder / "3.jpg", quality=100, subsampling=0, exif=exif)
    plain.save(folder / "4.jpeg", quality=100, subsampling=0)
    (folder / "no picture.txt").write_text("x", encoding="utf-8")
    words = ["--image_path", folder, "--steps", 4, "--strength", 0.3, "--images_per_prompt", 5]
    shots = draw("--prompt", "a cat --d 5", *words, sized=False)
    assert [shot.pixels.shape for shot in shots] == [(88, 72, 3)] * 5
    assert [json.loads(shot.texts["generation"])["begins_with"] for shot in shots] == [
        "1.PNG", "2.png", "3.jpg", "4.jpeg", "1.PNG"
    ]  # fmt: skip
    same_pixels(shots[0].pixels, shots[1].pixels)
    same_pixels(shots[2].pixels, shots[3].pixels, most=25)  # JPEG turned is not JPEG to the bit
    assert np.abs(shots[1].pixels - shots[3].pixels).mean() < 5
    assert np.array_equal(shots[0].pixels, shots[4].pixels)


def test_masks_of_a_folder_are_taken_in_turn(draw, source, tmp_path):
    folder = tmp_path / "masks"
    folder.mkdir()
    for index, columns in enumerate(([0, 255], [255, 0])):
        Image.fromarray(np.repeat(np.repeat([columns], 64, 0), 32, 1).astype(np.uint8)).save(folder / f"{index}.png")
    words = ["--image_path", source, "--mask_path", folder, "--steps", 4, "--images_per_prompt", 3, "--batch_size", 3]
    shots = draw("--prompt", "a cat --d 5", *words)
    kept = np.asarray(opened(source)).astype(int)
    for index, found in enumerate(shots):
        half = slice(32, 64) if index == 1 else slice(0, 32)
        assert np.array_equal(found.pixels[:, half], kept[:, half])
    assert np.array_equal(shots[0].pixels, shots[2].pixels)


def test_one_side_that_is_given_counts(draw, source):
    (found,) = draw("--prompt", "a cat --w 72", "--image_path", source, sized=False)
    assert found.pixels.shape == (64, 72, 3)


# ---- two stages ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latents", [False, True])
def test_highres_fix_is_the_two_pipelines_by_hand(draw, model_store, latents):
    words = [*HIGHRES, "--steps", 4, "--highres_fix_save_1st"] + ["--highres_fix_latents_upscaling"] * latents
    first, second = draw("--prompt", "a cat --n dog", *words, "--sampler", "euler_a")
    models, _ = model_store("sd1")
    pipe = pipe_of(models, sampler="euler_a")
    same_pixels(first.pixels, pixels_of(pipe))
    if latents:
        small = pipe(
            "a cat", negative_prompt="dog", generator=torch.Generator().manual_seed(5), output_type="latent", **SETTINGS
        ).images
        start: Any = torch.nn.functional.interpolate(small, (16, 16), mode="bicubic")
    else:
        start = Image.fromarray(first.pixels.astype(np.uint8)).resize((128, 128), Image.Resampling.LANCZOS)
    values: dict[str, Any] = {"image": start, "strength": 0.6, "num_inference_steps": 4, "width": None, "height": None}
    same_pixels(second.pixels, pixels_of(pipe_of(models, "Img2Img", sampler="euler_a"), seed=6, **values))
    assert [shot.path.name for shot in (first, second)] == ["im_0000001.png", "im_1000001.png"]
    assert first.texts["seed"] == second.texts["seed"] == "5"


def test_highres_fix_may_begin_with_a_picture(draw, model_store, source):
    words = [*HIGHRES, "--image_path", source, "--highres_fix_strength", 0.5, "--highres_fix_save_1st", "--steps", 4]
    first, _ = draw("--prompt", "a cat --n dog", *words, "--highres_fix_steps", 4)
    pipe = pipe_of(model_store("sd1")[0], "Img2Img")
    values: dict[str, Any] = {
        "image": opened(source),
        "strength": 0.5,
        "num_inference_steps": 4,
        "width": None,
        "height": None,
    }
    same_pixels(first.pixels, pixels_of(pipe, **values))


# ---- ControlNet ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nets(model_store, tmp_path_factory):
    """Return two small ControlNets, and the folders they are in."""
    from diffusers import ControlNetModel

    made = []
    for index in range(2):
        torch.manual_seed(index)
        net = ControlNetModel.from_unet(model_store("sd1")[0]["unet"])
        for part in (*net.controlnet_down_blocks, net.controlnet_mid_block):
            torch.nn.init.normal_(part.weight, std=0.05)
        torch.nn.init.normal_(net.controlnet_cond_embedding.conv_out.weight, std=0.3)
        folder = tmp_path_factory.mktemp("nets") / f"net{index}"
        net.eval().save_pretrained(folder)
        made.append((net, folder))
    return made


@pytest.fixture
def guides(tmp_path):
    """Return two guide pictures with edges."""
    rng = np.random.default_rng(1)
    paths = []
    for index in range(2):
        picture = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
        paths.append(tmp_path / f"guide{index}.png")
        picture.resize((64, 64), Image.Resampling.NEAREST).save(paths[-1])
    return paths


CONTROLS: dict[str, tuple[int, list[Any], dict[str, Any]]] = {
    "one": (1, [], {}),
    "weighted": (1, ["--control_net_weights", 0.4], {"controlnet_conditioning_scale": 0.4}),
    "a share of the steps": (1, ["--control_net_ratios", 0.5], {"control_guidance_end": 0.5}),
    "canny": (1, ["--control_net_preps", "canny_100"], {}),
    "two": (
        2,
        ["--control_net_multipliers", 0.4, 0.9, "--control_net_ratios", 1, 0.5],
        {"controlnet_conditioning_scale": [0.4, 0.9], "control_guidance_end": [1.0, 0.5]},
    ),
    "one that never acts": (
        2,
        ["--control_net_ratios", 1, 0],
        {"controlnet_conditioning_scale": [1.0, 0.0]},
    ),
}


def edges(path, low, high):
    import cv2

    gray = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    assert gray is not None
    return Image.fromarray(cv2.Canny(gray, low, high)).convert("RGB")


@pytest.mark.repetitions(keep=1)
@pytest.mark.parametrize("name", ["two", "canny", *(slow(name) for name in CONTROLS if name not in ("two", "canny"))])
def test_control_nets_are_those_of_diffusers(draw, model_store, nets, guides, name):
    count, words, values = CONTROLS[name]
    folders = [folder for _, folder in nets[:count]]
    argv = ["--control_net_models", *folders, "--guide_image_path", *guides[:count], "--steps", 4, *words]
    (found,) = draw("--prompt", "a cat --n dog", *argv)
    modules = [net for net, _ in nets[:count]]
    pictures = [opened(path) for path in guides[:count]] if name != "canny" else [edges(guides[0], 100, 191)]
    models, _ = model_store("sd1")
    pipe = pipe_of(models, "ControlNet", controlnet=modules if count > 1 else modules[0])
    image = pictures if count > 1 else pictures[0]
    same_pixels(found.pixels, pixels_of(pipe, image=image, num_inference_steps=4, **values))
    differ(found.pixels, pixels_of(pipe_of(models), num_inference_steps=4))


@pytest.mark.parametrize("kind", ["Img2Img", "Inpaint"])
def test_control_nets_go_with_pictures_to_begin_with(draw, model_store, nets, guides, source, mask, kind):
    words = ["--control_net_models", nets[0][1], "--guide_image_path", guides[0], "--image_path", source, "--steps", 4]
    words += ["--mask_path", mask] if kind == "Inpaint" else []
    (found,) = draw("--prompt", "a cat --n dog", *words)
    pipe = pipe_of(model_store("sd1")[0], f"ControlNet{kind}", controlnet=nets[0][0])
    values: dict[str, Any] = {
        "image": opened(source),
        "control_image": opened(guides[0]),
        "strength": 0.8,
        "num_inference_steps": 4,
        "controlnet_conditioning_scale": 1.0,  # theirs differ from pipeline to pipeline
    }
    if kind == "Inpaint":
        values["mask_image"] = tensors.opened(mask)
    same_pixels(found.pixels[:, 32:], pixels_of(pipe, **values)[:, 32:])


def test_batches_are_guided_picture_by_picture(draw, nets, guides, tmp_path):
    folder = tmp_path / "guides"
    folder.mkdir()
    for index, path in enumerate(guides):
        path.rename(folder / f"{index}.png")
    folders = [folder for _, folder in nets]
    words = ["--control_net_models", *folders, "--guide_image_path", folder, folder / "0.png"]
    words = ["--prompt", "a {cat|dog} --d 1,2,3", "--images_per_prompt", 3, *words]
    for one, other in zip(draw(*words), draw(*words, "--batch_size", 3), strict=True):
        same_pixels(one.pixels, other.pixels)


def test_highres_fix_with_a_control_net(draw, nets, guides):
    words = ["--control_net_models", nets[0][1], "--guide_image_path", guides[0], *HIGHRES, "--prompt", "a cat"]
    (both,) = draw(*words)
    (first,) = draw(*words, "--highres_fix_disable_control_net")
    differ(both.pixels, first.pixels)


def ldm_names(state, config):
    """Return a ControlNet under the names of the original layout."""
    from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING

    from library.models import keys

    mapping = DIFFUSERS_TO_LDM_MAPPING["controlnet"]
    assert isinstance(mapping, dict)
    fixed = mapping["layers"]
    rule = keys.unet_rule(config["layers_per_block"], frozenset({1, 2, 3}))
    renamed = {}
    for name, tensor in state.items():
        found = re.fullmatch(r"controlnet_(down_blocks\.(\d+)|mid_block|cond_embedding\.blocks\.(\d+))\.(.+)", name)
        if name in fixed:
            new = fixed[name]
        elif found is None:
            new = rule(name)
        elif found[2] is not None:
            new = f"zero_convs.{found[2]}.0.{found[4]}"
        elif found[3] is not None:
            new = f"input_hint_block.{2 * int(found[3]) + 2}.{found[4]}"
        else:
            new = f"middle_block_out.0.{found[4]}"
        renamed[f"control_model.{new}"] = tensor
    assert keys.UNET_PREFIX not in "".join(renamed)
    return renamed


def test_control_net_files_of_both_layouts_are_read(draw, nets, guides, tmp_path):
    net, folder = nets[0]
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    save_file(state, tmp_path / "diffusers.safetensors")
    save_file(ldm_names(state, dict(net.config)), tmp_path / "ldm.safetensors")
    words = ["--prompt", "a cat", "--guide_image_path", guides[0], "--control_net_models"]
    expected = draw(*words, folder)[0].pixels
    for name in ("diffusers.safetensors", "ldm.safetensors"):
        same_pixels(draw(*words, tmp_path / name)[0].pixels, expected)
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="x.safetensors is no ControlNet"):
        draw(*words, tmp_path / "x.safetensors")
