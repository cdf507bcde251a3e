"""tools/convert_diffusers20_original_sd.py: models of any structure come back as they were, or are refused.

diffusers is the oracle: it builds the model, opens the folder that is made, and where it can the file.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conversions import convert, read
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tensors import assert_same, metadata, read_folder

from library.errors import UserError
from library.models import building, keys, layout
from library.models import family as families
from library.models.checkpoint import EXTRAS_FILE
from library.models.tokenizer import load_clip_tokenizer

pytestmark = pytest.mark.usefixtures("tidy")

WIDTHS = {"sd1": 64, "sd2": 64, "sdxl": 64 + 128}
TEXT = "cond_stage_model.transformer.text_model."
UNET = keys.UNET_PREFIX
PIPELINES = {"sd1": "StableDiffusionPipeline", "sd2": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}

# Settings of U-Nets of SD 1.x: what differs from the usual tiny one.
UNETS: dict[str, dict[str, Any]] = {
    "one layer, no middle": {"layers_per_block": 1, "mid_block_type": None},
    "three layers": {"layers_per_block": 3},
    "layers by block": {"layers_per_block": [1, 2, 1, 3]},
    "middle without attention": {"mid_block_type": "UNetMidBlock2D"},
    "three levels, attention in the last": {
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3,
        "up_block_types": ("CrossAttnUpBlock2D",) * 3,
        "mid_block_type": None,
        "layers_per_block": 1,
    },
    "attention on one side": {"up_block_types": ("CrossAttnUpBlock2D", *("UpBlock2D",) * 3)},
    "two transformers": {"transformer_layers_per_block": 2},
    "transformers by layer": {
        "transformer_layers_per_block": [1, [1, 2], 1, 1],
        "reverse_transformer_layers_per_block": [1, 1, [2, 1, 1], 1],
    },
    "linear projections": {"use_linear_projection": True},
    "eight outputs": {"out_channels": 8},
    "wide embedding of time": {"time_embedding_dim": 96},
}
VAES: dict[str, dict[str, Any]] = {
    "three levels": {
        "block_out_channels": (32, 32, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
    },
    "three layers": {"layers_per_block": 3},
    "sixteen channels": {"latent_channels": 16},
    "no attention": {"mid_block_add_attention": False},
    "opacity": {"in_channels": 4, "out_channels": 4},
}


def small_unet(**more: Any) -> UNet2DConditionModel:
    config = {
        "block_out_channels": (32, 32, 64, 64),
        "cross_attention_dim": 64,
        "sample_size": 64,
        "layers_per_block": 1,
    }
    return tiny.materialise(UNet2DConditionModel(**(config | more)), seed=5)


def with_part(source: Path, folder: Path, part: str, model: Any) -> Path:
    """Write a copy of a Diffusers folder with another part."""
    shutil.copytree(source, folder, ignore=lambda *_: {part})
    model.save_pretrained(folder / part)
    return folder


def with_tensors(path: Path, out: Path, change: dict[str, torch.Tensor], without: tuple[str, ...] = ()) -> Path:
    """Write a copy of a weight file with other tensors."""
    state = {name: tensor for name, tensor in read(path).items() if name not in without}
    save_file({name: tensor.contiguous() for name, tensor in (state | change).items()}, out, {"format": "pt"})
    return out


def config(folder: Path, part: str) -> dict[str, Any]:
    return json.loads((folder / part / "config.json").read_text(encoding="utf-8"))


def opened(folder: Path) -> Any:
    """Return what diffusers makes of a folder; it warns of nothing, and no weight is missing."""
    import diffusers

    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    return getattr(diffusers, index["_class_name"]).from_pretrained(folder, local_files_only=True)


def there_and_back(folder: Path, tmp_path: Path, suffix: str = ".safetensors") -> Path:
    """Convert a folder to a file and back; the weights are the same."""
    file, back = tmp_path / f"there{suffix}", tmp_path / "back"
    convert(folder, file)
    convert(file, back)
    found, expected = read_folder(back), read_folder(folder)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].reshape(tensor.shape), tensor), name
    return back


# ---- sizes come from the tensors ----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("case", UNETS)
def test_a_unet_of_another_structure_comes_back(store, tmp_path, case, suffix):
    if suffix == ".ckpt" and case not in ("one layer, no middle", "layers by block", "transformers by layer"):
        pytest.skip("one of each kind is enough")
    model = store("sd1")
    unet = small_unet(**UNETS[case])
    folder = with_part(model.folder, tmp_path / "folder", "unet", unet)
    back = there_and_back(folder, tmp_path, suffix)
    again = UNet2DConditionModel.from_pretrained(back / "unet", local_files_only=True)
    assert_same(again.state_dict(), unet.state_dict())
    loaded = tiny.load(tmp_path / f"there{suffix}").unet  # as training opens it
    assert_same(loaded.state_dict(), unet.state_dict())


def test_diffusers_opens_the_file_of_a_small_unet(store, tmp_path):
    from diffusers import StableDiffusionPipeline

    unet = small_unet(mid_block_type=None)
    folder = with_part(store("sd1").folder, tmp_path / "folder", "unet", unet)
    back = there_and_back(folder, tmp_path)
    found = StableDiffusionPipeline.from_single_file(
        str(tmp_path / "there.safetensors"), config=str(back), local_files_only=True
    )
    assert_same(found.unet.state_dict(), unet.state_dict())
    assert_same(opened(back).unet.state_dict(), unet.state_dict())


@pytest.mark.parametrize("case", VAES)
def test_a_vae_of_another_structure_comes_back(store, tmp_path, case):
    usual = {key: value for key, value in dict(store("sd1").models["vae"].config).items() if not key.startswith("_")}
    vae = tiny.materialise(AutoencoderKL(**(usual | VAES[case])), seed=6)
    folder = with_part(store("sd1").folder, tmp_path / "folder", "vae", vae)
    back = there_and_back(folder, tmp_path, ".ckpt")
    again = AutoencoderKL.from_pretrained(back / "vae", local_files_only=True)
    assert_same(again.state_dict(), vae.state_dict())


def test_uneven_transformers_of_sdxl_come_back(store, tmp_path):
    """As in SSD-1B, whose layers have different numbers of transformers, and whose middle has no attention."""
    usual = dict(store("sdxl").unet)
    depths = {"transformer_layers_per_block": [1, [1, 2], [2, 3]], "mid_block_type": "UNetMidBlock2D"}
    depths |= {"reverse_transformer_layers_per_block": [[3, 2, 4], [2, 1, 1], 1]}
    unet = tiny.materialise(UNet2DConditionModel(**(usual | depths)), seed=8)
    folder = with_part(store("sdxl").folder, tmp_path / "folder", "unet", unet)
    back = there_and_back(folder, tmp_path, ".ckpt")
    again = UNet2DConditionModel.from_pretrained(back / "unet", local_files_only=True)
    assert_same(again.state_dict(), unet.state_dict())


PUBLISHED: dict[str, tuple[families.ModelFamily, dict[str, Any]]] = {
    "BK-SDM": (families.SD1, {"layers_per_block": 1}),
    "SSD-1B": (
        families.SDXL,
        {
            "transformer_layers_per_block": (1, (2, 2), (4, 4)),
            "reverse_transformer_layers_per_block": ((4, 4, 10), (2, 1, 1), 1),
            "mid_block_type": "UNetMidBlock2D",
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_structure_of_published_small_models_comes_from_their_names(name):
    family, own = PUBLISHED[name]
    unet = building.build_unet(family.unet | own)
    names = tiny.original_names(layout.unet_rule(family, family.unet | own), unet.state_dict())
    shapes = {names[name]: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    again = building.build_unet(building.unet_config(family, shapes))
    assert {name: t.shape for name, t in again.state_dict().items()} == {
        name: t.shape for name, t in unet.state_dict().items()
    }


@pytest.mark.parametrize(("positions", "limit"), [(248, 77), (32, 32)])
def test_positions_of_a_text_encoder_are_those_of_the_file(store, tmp_path, positions, limit):
    name = f"{TEXT}embeddings.position_embedding.weight"
    file = with_tensors(store("sd1").checkpoint, tmp_path / "a.safetensors", {name: torch.randn(positions, 64)})
    convert(file, tmp_path / "out")
    assert config(tmp_path / "out", "text_encoder")["max_position_embeddings"] == positions
    pipeline = opened(tmp_path / "out")
    assert torch.equal(
        pipeline.text_encoder.state_dict()["embeddings.position_embedding.weight"]
        if "embeddings.position_embedding.weight" in pipeline.text_encoder.state_dict()
        else pipeline.text_encoder.state_dict()["text_model.embeddings.position_embedding.weight"],
        read(file)[name],
    )
    assert pipeline.tokenizer.model_max_length == limit
    pipeline.encode_prompt("a cat", "cpu", 1, False)  # padded to the length that the encoder takes
    if positions < 77:
        with pytest.raises(UserError, match="its text_encoder has 32 positions, 77 are needed"):
            tiny.load(file)
    else:
        assert tiny.load(file).texts[0].module.config.max_position_embeddings == positions


def test_the_projection_of_sdxl_is_that_of_the_file(store, tmp_path):
    """Wider than the encoder, and the U-Net with it."""
    model = store("sdxl")
    more = {"conditioner.embedders.1.model.text_projection": torch.randn(128, 160)}
    more[f"{UNET}label_emb.0.0.weight"] = torch.randn(256, 6 * 256 + 160)
    file = with_tensors(model.checkpoint, tmp_path / "a.safetensors", more)
    convert(file, tmp_path / "out")
    assert config(tmp_path / "out", "text_encoder_2")["projection_dim"] == 160
    assert config(tmp_path / "out", "unet")["projection_class_embeddings_input_dim"] == 6 * 256 + 160
    opened(tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "back.ckpt")
    assert_same(read(tmp_path / "back.ckpt"), read(file))


@pytest.mark.parametrize(
    ("blocks", "head", "used"),
    [(4, True, 3), (3, False, 3), (23, True, 23), (23, False, 23), (24, True, 23), (24, False, 23)],
)
def test_an_unused_block_of_sd2_is_cut_once(store, tmp_path, blocks, head, used):
    model = store("sd2")
    prefix = "cond_stage_model.model."
    block = f"{prefix}transformer.resblocks."
    state = {name: tensor for name, tensor in read(model.checkpoint).items() if not name.startswith(block)}
    for number in range(blocks):
        state |= {
            name.replace(f"{block}0.", f"{block}{number}."): tensor.clone()
            for name, tensor in read(model.checkpoint).items()
            if name.startswith(f"{block}0.")
        }
    if not head:
        state = {
            name: t for name, t in state.items() if name not in (f"{prefix}text_projection", f"{prefix}logit_scale")
        }
    save_file(state, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "out")
    assert config(tmp_path / "out", "text_encoder")["num_hidden_layers"] == used
    convert(tmp_path / "out", tmp_path / "back.safetensors")
    convert(tmp_path / "back.safetensors", tmp_path / "again")
    assert config(tmp_path / "again", "text_encoder")["num_hidden_layers"] == used
    back = read(tmp_path / "back.safetensors")
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_a_model_without_vae_is_of_its_family(store, tmp_path, name):
    state = {n: t for n, t in read(store(name).checkpoint).items() if not n.startswith(keys.VAE_PREFIX)}
    save_file(state, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text(encoding="utf-8"))
    assert (index["_class_name"], index["vae"]) == (PIPELINES[name], [None, None])


# ---- other inputs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "channels", "kind"),
    [
        ("sd1", 9, "StableDiffusionInpaintPipeline"),
        ("sd1", 8, "StableDiffusionInstructPix2PixPipeline"),
        ("sd2", 9, "StableDiffusionInpaintPipeline"),
        ("sdxl", 9, "StableDiffusionXLInpaintPipeline"),
        ("sdxl", 8, "StableDiffusionXLInstructPix2PixPipeline"),
    ],
)
def test_models_with_more_inputs_are_converted_and_not_trained(store, tmp_path, name, channels, kind):
    model = store(name)
    first = f"{UNET}input_blocks.0.0.weight"
    width = len(read(model.checkpoint)[first])
    file = with_tensors(model.checkpoint, tmp_path / "a.safetensors", {first: torch.randn(width, channels, 3, 3)})
    convert(file, tmp_path / "out")
    pipeline = opened(tmp_path / "out")
    assert type(pipeline).__name__ == kind
    assert pipeline.unet.config["in_channels"] == channels
    convert(tmp_path / "out", tmp_path / "back.safetensors")
    assert_same(read(tmp_path / "back.safetensors"), read(file))
    if name != "sdxl":
        for path in (file, tmp_path / "out"):
            with pytest.raises(UserError, match=f"takes {channels} channels, and only those that take 4 are trained"):
                tiny.load(path)


@pytest.mark.parametrize(("channels", "kind"), [(5, "a depth model"), (7, "another kind of model")])
def test_a_model_whose_folder_needs_more_is_refused_with_the_reason(store, tmp_path, channels, kind):
    more = {f"{UNET}input_blocks.0.0.weight": torch.randn(32, channels, 3, 3)}
    file = with_tensors(store("sd1").checkpoint, tmp_path / "a.safetensors", more)
    with pytest.raises(UserError, match=f"is {kind}: its U-Net takes {channels} channels") as caught:
        convert(file, tmp_path / "out")
    assert "trained" not in str(caught.value)
    convert(file, tmp_path / "copy.safetensors", "--fp16")  # the file needs no pipeline
    assert read(tmp_path / "copy.safetensors").keys() == read(file).keys()


# ---- what is missing, and what is too much ------------------------------------------------------------------

HOLES = {
    "unet": "conv_out.weight",
    "unet ": "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0.bias",
    "vae": "quant_conv.weight",
    "text_encoder": "text_model.embeddings.position_embedding.weight",
    "text_encoder ": "text_model.encoder.layers.2.self_attn.q_proj.bias",
}


@pytest.mark.parametrize("target", ["out.safetensors", "out.ckpt", "out"])
@pytest.mark.parametrize("part", HOLES)
def test_a_folder_with_a_hole_is_refused_by_name(store, tmp_path, part, target):
    name, part = HOLES[part], part.strip()
    folder = tmp_path / "folder"
    shutil.copytree(store("sd1").folder, folder)
    path = next((folder / part).glob("*.safetensors"))
    with_tensors(path, path, {}, without=(name,))
    with pytest.raises(UserError, match=rf"folder is incomplete: {part}/{name} is missing"):
        convert(folder, tmp_path / target)
    assert not (tmp_path / target).exists()


FILE_HOLES = (
    f"{UNET}out.2.weight",
    f"{UNET}input_blocks.4.0.skip_connection.weight",
    f"{UNET}input_blocks.3.0.op.weight",
    f"{UNET}output_blocks.2.1.conv.bias",
    f"{keys.VAE_PREFIX}quant_conv.weight",
    f"{keys.VAE_PREFIX}decoder.conv_in.weight",
    f"{TEXT}embeddings.position_embedding.weight",
    f"{TEXT}final_layer_norm.weight",
)


@pytest.mark.parametrize("target", ["out", "out.safetensors"])
@pytest.mark.parametrize("name", FILE_HOLES)
def test_a_file_with_a_hole_is_refused_by_name(store, tmp_path, name, target):
    file = with_tensors(store("sd1").checkpoint, tmp_path / "a.safetensors", {}, without=(name,))
    with pytest.raises(UserError, match=rf"incomplete.*{name}"):
        convert(file, tmp_path / target)
    assert not (tmp_path / target).exists()


def test_a_missing_layer_is_not_taken_for_a_shorter_model(store, tmp_path):
    state = read(store("sd1").checkpoint)
    for prefix, expected in (
        (f"{UNET}input_blocks.2.", r"incomplete U-Net: model.diffusion_model.input_blocks.2.0.in_layers.0.weight"),
        (f"{TEXT}encoder.layers.1.", r"encoder.layers.1.* is missing and 15 more"),
        (f"{UNET}middle_block.1.", r"has model.diffusion_model.middle_block.2.* which the unet that its other tensors"),
        (f"{keys.VAE_PREFIX}encoder.down.1.", r"incomplete VAE: .*encoder.down.3.block.0.conv2.weight|incomplete"),
        (f"{keys.VAE_PREFIX}encoder.", r"incomplete VAE|has no VAE"),
    ):
        save_file({n: t for n, t in state.items() if not n.startswith(prefix)}, tmp_path / "a.safetensors")
        for target in ("out", "out.safetensors"):
            with pytest.raises(UserError, match=expected):
                convert(tmp_path / "a.safetensors", tmp_path / target)


SURPLUS = (
    f"{UNET}label_emb.0.0.weight",  # class embeddings
    f"{UNET}output_blocks.8.2.conv.weight",
    f"{keys.VAE_PREFIX}decoder.up.1.block.5.conv1.weight",
    f"{TEXT}encoder.layers.7.mlp.fc1.weight",
)


@pytest.mark.parametrize("name", SURPLUS)
def test_a_layer_that_has_no_place_is_refused_by_name(store, tmp_path, name):
    file = with_tensors(store("sd1").checkpoint, tmp_path / "a.safetensors", {name: torch.randn(32, 32, 3, 3)})
    for target in ("out", "out.safetensors"):
        with pytest.raises(UserError, match=rf"{name}|incomplete|no U-Net that can be built"):
            convert(file, tmp_path / target)
    with pytest.raises(UserError, match=rf"{name}|incomplete|missing|no U-Net that can be built"):
        tiny.load(file)


def test_what_is_of_no_layer_is_told_and_kept(store, tmp_path, caplog):
    caplog.set_level("INFO")
    more = {"model.diffusion_model.note": torch.ones(1), "model_ema.decay": torch.ones(1)}
    file = with_tensors(store("sd1").checkpoint, tmp_path / "a.safetensors", more)
    convert(file, tmp_path / "out")
    kept = (
        f"2 tensors are kept, without a place in Diffusers, in {EXTRAS_FILE}: {TEXT}embeddings.position_ids, {UNET}note"
    )
    assert kept in caplog.text
    assert "1 tensor is left out, which only training used: model_ema.decay" in caplog.text
    convert(tmp_path / "out", tmp_path / "back.safetensors")
    assert_same(read(tmp_path / "back.safetensors"), {n: t for n, t in read(file).items() if "model_ema" not in n})


def test_parts_that_only_folders_have_are_told(store, tmp_path, caplog):
    folder = tmp_path / "folder"
    shutil.copytree(store("sd1").folder, folder)
    (folder / "image_encoder").mkdir()
    (folder / "safety_checker").mkdir()
    path = folder / "text_encoder" / "model.safetensors"
    with_tensors(path, path, {"text_projection.weight": torch.ones(64, 64)})
    convert(folder, tmp_path / "out.safetensors")
    assert "1 tensor is left out, without a place in a checkpoint: text_encoder/text_projection.weight" in caplog.text
    assert "folders left out, without a place in a checkpoint: image_encoder\n" in caplog.text
    assert_same(read(tmp_path / "out.safetensors"), read(store("sd1").made_checkpoint))


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_sdxl_without_a_text_encoder_is_refused(store, tmp_path, part):
    folder = tmp_path / "folder"
    shutil.copytree(store("sdxl").folder, folder, ignore=lambda *_: {part})
    with pytest.raises(UserError, match=f"is not a Diffusers folder: {part}/config.json is missing"):
        convert(folder, tmp_path / "out.safetensors")


# ---- what a file cannot express -----------------------------------------------------------------------------

ODD_UNETS: dict[str, tuple[dict[str, Any], str]] = {
    "classes": ({"num_class_embeds": 3}, "class_embedding.weight, which has no place in a checkpoint"),
    "class projection": (
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 8},
        "class_embedding.linear_1.weight, which has no place in a checkpoint",
    ),
    "image projection": (
        {"encoder_hid_dim": 16, "encoder_hid_dim_type": "text_proj"},
        "encoder_hid_proj.weight, which has no place in a checkpoint",
    ),
}


@pytest.mark.parametrize("target", ["out.safetensors", "out.ckpt"])
@pytest.mark.parametrize("case", ODD_UNETS)
def test_a_unet_without_a_place_in_files_is_refused(store, tmp_path, case, target):
    own, text = ODD_UNETS[case]
    folder = with_part(store("sd1").folder, tmp_path / "folder", "unet", small_unet(**own))
    with pytest.raises(UserError, match=text):
        convert(folder, tmp_path / target)
    assert not (tmp_path / target).exists()


SETTINGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "heads": ("unet", {"attention_head_dim": 4}, "attention_head_dim"),
    "groups": ("unet", {"norm_num_groups": 8}, "norm_num_groups"),
    "activation": ("unet", {"act_fn": "gelu"}, "act_fn"),
    "scale of times": ("unet", {"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
    "other blocks": (
        "unet",
        {"down_block_types": ("ResnetDownsampleBlock2D", *("CrossAttnDownBlock2D",) * 2, "DownBlock2D")},
        "cannot be written to .*, since that describes no U-Net that can be built",
    ),
    "scale of latents": ("vae", {"scaling_factor": 0.5}, "scaling_factor"),
    "groups of the VAE": ("vae", {"norm_num_groups": 16}, "norm_num_groups"),
    "no quantisation": ("vae", {"use_quant_conv": False}, "use_quant_conv"),
    "text": ("text_encoder", {"hidden_act": "relu"}, "hidden_act"),
    "text heads": ("text_encoder", {"num_attention_heads": 2}, "num_attention_heads"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_no_shape_tells_come_back_or_are_refused(store, tmp_path, case):
    part, own, key = SETTINGS[case]
    model, folder = store("sd1"), tmp_path / "folder"
    if part == "unet":
        with_part(model.folder, folder, part, small_unet(**own))
    elif part == "vae":
        usual = {key: value for key, value in dict(model.models["vae"].config).items() if not key.startswith("_")}
        with_part(model.folder, folder, part, tiny.materialise(AutoencoderKL(**(usual | own)), seed=6))
    else:
        shutil.copytree(model.folder, folder)
        path = folder / part / "config.json"
        path.write_text(json.dumps(config(folder, part) | own), encoding="utf-8")
    try:
        back = there_and_back(folder, tmp_path)
    except UserError as error:
        assert case == "other blocks", error
    else:
        found = config(back, part)
        assert {key: tuple(v) if isinstance(v, list) else v for key, v in found.items()}.items() >= own.items()
    with pytest.raises(UserError, match=rf"{key}"):
        convert(folder, tmp_path / "out.ckpt")
    assert not (tmp_path / "out.ckpt").exists()
    if "groups" not in case and case != "other blocks":
        with pytest.raises(UserError, match=key):  # nor does a file lose them on its way to another
            convert(tmp_path / "there.safetensors", tmp_path / "out.ckpt")


def test_hints_of_published_models_do_not_stop_a_pickle(store, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(store("sd2").folder, folder)
    path = folder / "unet" / "config.json"
    path.write_text(
        json.dumps(config(folder, "unet") | {"sample_size": 96, "upcast_attention": True}), encoding="utf-8"
    )
    convert(folder, tmp_path / "out.ckpt")
    back = there_and_back(folder, tmp_path)
    assert config(back, "unet")["sample_size"] == 96
    assert config(back, "unet")["upcast_attention"] is True


def test_another_kind_of_vae_is_refused(store, tmp_path):
    from diffusers import AutoencoderTiny

    folder = with_part(store("sd1").folder, tmp_path / "folder", "vae", AutoencoderTiny())
    with pytest.raises(UserError, match="its vae is of the kind AutoencoderTiny, and only AutoencoderKL is read"):
        convert(folder, tmp_path / "out.safetensors")


# ---- added tokens -------------------------------------------------------------------------------------------


@pytest.fixture
def taught(store, tmp_path):
    """Return a folder of a model whose text encoder knows three more tokens, one of them without a word."""
    folder = tmp_path / "taught"
    shutil.copytree(store("sd1").folder, folder)
    path = folder / "text_encoder" / "model.safetensors"
    name = "text_model.embeddings.token_embedding.weight"
    table = torch.cat([load_file(path)[name], torch.randn(3, 64)])
    with_tensors(path, path, {name: table})
    changed = config(folder, "text_encoder") | {"vocab_size": len(table)}
    (folder / "text_encoder" / "config.json").write_text(json.dumps(changed), encoding="utf-8")
    tokenizer = load_clip_tokenizer()
    tokenizer.add_tokens(["<cat-toy>", "<ねこ>"])
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


PROMPT = "a <cat-toy> and a <ねこ>"


def ids_in(folder: Path) -> list[int]:
    return load_clip_tokenizer(folder / "tokenizer")(PROMPT).input_ids


def test_added_tokens_come_back_from_a_file(taught, tmp_path, caplog):
    assert {49408, 49409} <= set(ids_in(taught))
    convert(taught, tmp_path / "there.safetensors")
    assert "has no words for 1 of the 3 tokens" in caplog.text
    convert(tmp_path / "there.safetensors", tmp_path / "copy.safetensors", "--fp16")
    for file in ("there.safetensors", "copy.safetensors"):
        back = tmp_path / Path(file).stem
        convert(tmp_path / file, back)
        assert ids_in(back) == ids_in(taught)
        pipeline = opened(back)
        assert pipeline.tokenizer(PROMPT).input_ids == ids_in(taught)
        assert pipeline.text_encoder.config.vocab_size == 49411
        assert tiny.load(tmp_path / file).texts[0].tokenizer(PROMPT).input_ids == ids_in(taught)
    convert(tmp_path / "there", tmp_path / "again.safetensors")
    files = (tmp_path / "there.safetensors", tmp_path / "again.safetensors")
    assert len({metadata(file)["diffusers_added_tokens"] for file in files}) == 1


def test_added_tokens_that_are_lost_are_told(taught, tmp_path, caplog):
    convert(taught, tmp_path / "out.ckpt")
    assert "a .ckpt has no place for the tokens added to text_encoder (<cat-toy>, <ねこ>)" in caplog.text
    caplog.clear()
    convert(tmp_path / "out.ckpt", tmp_path / "back")
    assert "has no words for 3 of the 3 tokens" in caplog.text
    assert opened(tmp_path / "back").text_encoder.config.vocab_size == 49411


def test_the_ids_of_added_tokens_have_gaps(store, tmp_path):
    name = f"{TEXT}embeddings.token_embedding.weight"
    table = torch.cat([read(store("sd1").checkpoint)[name], torch.randn(5, 64)])
    state = read(store("sd1").checkpoint) | {name: table}
    tokens = {"text_encoder": {"<late>": 49411, "<early>": 49409, "<beyond>": 49500, "<odd>": "x"}, "unet": 3}
    save_file(state, tmp_path / "a.safetensors", {"diffusers_added_tokens": json.dumps(tokens)})
    convert(tmp_path / "a.safetensors", tmp_path / "out")
    tokenizer = opened(tmp_path / "out").tokenizer
    assert tokenizer("<early> <late>").input_ids[1:-1] == [49409, 49411]
    assert tiny.load(tmp_path / "a.safetensors").texts[0].tokenizer("<late>").input_ids[1:-1] == [49411]


def test_a_vocabulary_that_is_too_small_is_not_trained(store, tmp_path):
    more = {f"{TEXT}embeddings.token_embedding.weight": torch.randn(1000, 64)}
    file = with_tensors(store("sd1").checkpoint, tmp_path / "a.safetensors", more)
    with pytest.raises(UserError, match="its text_encoder has 1000 tokens, 49408 are needed"):
        tiny.load(file)
