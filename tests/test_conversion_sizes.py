"""tools/convert_diffusers20_original_sd.py: models of any structure come back as they were, or are refused.

diffusers is the oracle: it builds the model, opens the folder that is made, and where it can the file.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conversions import convert, read
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tensors import assert_same, metadata, read_folder

from library.errors import UserError
from library.models import building, conversion, keys, kinds, layout
from library.models import family as families
from library.models.checkpoint import EXTRAS_FILE, WHOLE, Checkpoint, PlannedPart, open_checkpoint, split_name
from library.models.completeness import check_result, whole_plan
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


def small_unet(**more: Any) -> Any:
    """Return a U-Net without memory."""
    config = {
        "block_out_channels": (32, 32, 64, 64),
        "cross_attention_dim": 64,
        "sample_size": 64,
        "layers_per_block": 1,
    }
    with torch.device("meta"):
        return UNet2DConditionModel(**(config | more))


def small_vae(store: Any, **more: Any) -> Any:
    """Return a VAE without memory."""
    usual = {key: value for key, value in dict(store("sd1").models["vae"].config).items() if not key.startswith("_")}
    with torch.device("meta"):
        return AutoencoderKL(**(usual | more))


def with_part(source: Path, folder: Path, part: str, model: Any) -> Path:
    """Write a copy of a Diffusers folder with another part."""
    shutil.copytree(source, folder, ignore=lambda *_: {part})
    model.save_pretrained(folder / part)
    return folder


def infos_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def planned(source: Path, folder: Path, part: str, model: Any) -> Checkpoint:
    """Return the model of a Diffusers folder with another part, of which only the configuration is written."""
    model.save_config(folder / part)
    whole = open_checkpoint(source)
    own = PlannedPart(folder=folder / part, planned=infos_of(model.state_dict()))
    return dataclasses.replace(whole, parts=dict(whole.parts) | {part: own})


def changed(model: Checkpoint, name: str, shape: tuple[int, ...] | None) -> Checkpoint:
    """Return a model with another shape of a tensor; None: without it."""
    part, own = split_name(name)
    infos = {each: (dtype, size) for each, dtype, size in model.parts[part].infos()}
    infos |= {own: (torch.float32, shape or ())}
    if shape is None:
        del infos[own]
    made = PlannedPart(folder=model.folder_of(part), planned=infos)
    return dataclasses.replace(model, parts=dict(model.parts) | {part: made})


def as_file(model: Checkpoint, path: Path) -> Checkpoint:
    """Return the checkpoint that a model would be written to, as it would be opened again; what is checked first."""
    plan, whole = conversion.plan_of_file(model, v_prediction=False)
    infos = layout.planned_infos(plan, model, None)
    metadata = conversion.kept_beside(model, whole, infos, path).metadata()
    result = conversion.planned_file(path, infos, metadata)
    check_result(result, model, whole)
    return result


def built(model: Checkpoint, part: str) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of what diffusers builds from the configuration that a model's folder would have."""
    config = json.loads(json.dumps(building.config_of(model, part)))  # with lists
    kind = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[part]
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in kind.from_config(config).state_dict().items()}


def shapes_in(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


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


@pytest.mark.repetitions(keep=4)
@pytest.mark.parametrize("case", UNETS)
def test_a_unet_of_another_structure_is_known_from_a_file(store, tmp_path, case):
    unet = small_unet(**UNETS[case])
    model = planned(store("sd1").folder, tmp_path, "unet", unet)
    for name in ("a.safetensors", "a.ckpt"):
        assert built(as_file(model, tmp_path / name), "unet") == shapes_in(unet)


@pytest.mark.parametrize(("case", "suffix"), [("one layer, no middle", ".safetensors"), ("layers by block", ".ckpt")])
def test_a_unet_of_another_structure_comes_back(store, tmp_path, case, suffix):
    from diffusers import StableDiffusionPipeline

    unet = tiny.materialise(small_unet(**UNETS[case]), seed=5)
    folder = with_part(store("sd1").folder, tmp_path / "folder", "unet", unet)
    back = there_and_back(folder, tmp_path, suffix)
    again = UNet2DConditionModel.from_pretrained(back / "unet", local_files_only=True)
    assert_same(again.state_dict(), unet.state_dict())
    assert_same(tiny.load(tmp_path / f"there{suffix}").unet.state_dict(), unet.state_dict())  # as training opens it
    if case == "one layer, no middle":  # diffusers cannot read the other from a file
        file = str(tmp_path / f"there{suffix}")
        found = StableDiffusionPipeline.from_single_file(file, config=str(back), local_files_only=True)
        assert_same(found.unet.state_dict(), unet.state_dict())


@pytest.mark.parametrize("case", VAES)
def test_a_vae_of_another_structure_is_known_from_a_file(store, tmp_path, case):
    vae = small_vae(store, **VAES[case])
    model = planned(store("sd1").folder, tmp_path, "vae", vae)
    assert built(as_file(model, tmp_path / "a.ckpt"), "vae") == shapes_in(vae)


def test_uneven_transformers_of_sdxl_are_known_from_a_file(store, tmp_path):
    """As in SSD-1B, whose layers have different numbers of transformers, and whose middle has no attention."""
    depths = {"transformer_layers_per_block": [1, [1, 2], [2, 3]], "mid_block_type": "UNetMidBlock2D"}
    depths |= {"reverse_transformer_layers_per_block": [[3, 2, 4], [2, 1, 1], 1]}
    unet = small_unet(**(store("sdxl").unet | depths))
    model = planned(store("sdxl").folder, tmp_path, "unet", unet)
    assert built(as_file(model, tmp_path / "a.ckpt"), "unet") == shapes_in(unet)


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
def test_an_unused_block_of_sd2_is_cut_once(store, blocks, head, used):
    prefix = "cond_stage_model.model."
    shapes = keys.without_prefix(open_checkpoint(store("sd2").checkpoint).shapes, prefix)
    first = {name: shape for name, shape in shapes.items() if name.startswith("transformer.resblocks.0.")}
    own = {name: shape for name, shape in shapes.items() if not name.startswith("transformer.")}
    own |= {name.replace(".0.", f".{at}.", 1): shape for at in range(blocks) for name, shape in first.items()}
    if not head:
        own = {name: shape for name, shape in own.items() if name not in building.OPENCLIP_HEAD}
    text = families.SD2.text_models[0]
    assert building.text_config(text, own)["num_hidden_layers"] == used


def test_a_file_of_sd2_without_its_unused_block_comes_back(store, tmp_path):
    """As converters write it: also without what OpenCLIP has behind the layers."""
    prefix = "cond_stage_model.model."
    left_out = (f"{prefix}transformer.resblocks.3.", f"{prefix}text_projection", f"{prefix}logit_scale")
    state = {name: t for name, t in read(store("sd2").checkpoint).items() if not name.startswith(left_out)}
    save_file(state, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "out")
    assert_same(read_folder(tmp_path / "out"), read_folder(store("sd2").made_folder))
    convert(tmp_path / "out", tmp_path / "back.safetensors")
    assert_same(read(tmp_path / "back.safetensors"), read(store("sd2").made_checkpoint))


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_model_without_vae_is_of_its_family(store, tmp_path, name):
    state = {n: t for n, t in read(store(name).checkpoint).items() if not n.startswith(keys.VAE_PREFIX)}
    save_file(state, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text(encoding="utf-8"))
    assert (index["_class_name"], index["vae"]) == (PIPELINES[name], [None, None])


# ---- other inputs -------------------------------------------------------------------------------------------


def test_the_pipelines_of_models_with_more_inputs():
    import diffusers

    for family in families.FAMILIES:
        for channels in (4, 8, 9):
            assert hasattr(diffusers, kinds.pipeline_name(family, channels, Path("a")))


@pytest.mark.repetitions(keep=1)
@pytest.mark.parametrize(
    ("name", "channels", "kind"),
    [("sd1", 9, "StableDiffusionInpaintPipeline"), ("sdxl", 8, "StableDiffusionXLInstructPix2PixPipeline")],
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
    for path in (file, tmp_path / "out") if name == "sd1" else ():
        with pytest.raises(UserError, match=f"takes {channels} channels, and only those that take 4 can be used"):
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


@pytest.mark.parametrize("part", HOLES)
def test_a_folder_with_a_hole_is_refused_by_name(store, part):
    name = f"{part.strip()}/{HOLES[part]}"
    with pytest.raises(UserError, match=rf"folder is incomplete: {name} is missing$"):
        whole_plan(changed(open_checkpoint(store("sd1").folder), name, None))


def test_nothing_is_written_of_what_is_incomplete(store, tmp_path):
    folder, file = tmp_path / "folder", tmp_path / "a.safetensors"
    shutil.copytree(store("sd1").folder, folder)
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    with_tensors(path, path, {}, without=("conv_out.weight",))
    with_tensors(store("sd1").checkpoint, file, {}, without=(f"{UNET}out.2.bias",))
    for source in (folder, file):
        for target in ("out.safetensors", "out.ckpt", "out"):
            with pytest.raises(UserError, match="is incomplete: unet/conv_out"):
                convert(source, tmp_path / target)
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


@pytest.mark.parametrize("name", FILE_HOLES)
def test_a_file_with_a_hole_is_refused_by_name(store, name):
    with pytest.raises(UserError, match=rf"incomplete.*{name}"):
        whole_plan(changed(open_checkpoint(store("sd1").checkpoint), name, None))


@pytest.mark.parametrize(
    ("prefix", "text"),
    [
        (f"{UNET}input_blocks.2.", "incomplete U-Net: model.diffusion_model.input_blocks.2.0.in_layers.0.weight"),
        (f"{TEXT}encoder.layers.1.", r"encoder.layers.1.* and 11 more are missing \(as Diffusers"),
        (
            f"{UNET}middle_block.1.",
            "has model.diffusion_model.middle_block.2.* but the other tensors of its unet describe no",
        ),
        (f"{keys.VAE_PREFIX}encoder.down.1.", "incomplete VAE: first_stage_model.encoder.down.1.block.0.conv2"),
        (f"{keys.VAE_PREFIX}encoder.", "has no VAE: name one with --vae"),
    ],
)
def test_a_missing_layer_is_not_taken_for_a_shorter_model(store, prefix, text):
    model = open_checkpoint(store("sd1").checkpoint)
    own = {name: (dtype, shape) for name, dtype, shape in model.infos() if not name.startswith(prefix)}
    with pytest.raises(UserError, match=text):
        whole_plan(dataclasses.replace(model, parts={WHOLE: PlannedPart(planned=own)}))


SURPLUS = (
    f"{UNET}label_emb.0.0.weight",  # class embeddings
    f"{UNET}output_blocks.11.2.conv.weight",
    f"{keys.VAE_PREFIX}decoder.up.1.block.5.conv1.weight",
    f"{TEXT}encoder.layers.7.mlp.fc1.weight",
)


@pytest.mark.parametrize("name", SURPLUS)
def test_a_layer_that_has_no_place_is_refused_by_name(store, name):
    with pytest.raises(UserError, match=rf"has {name}, but the|incomplete|no U-Net that can be built"):
        whole_plan(changed(open_checkpoint(store("sd1").checkpoint), name, (32, 32, 3, 3)))


def test_a_layer_that_has_no_place_is_not_trained_without(store, tmp_path):
    more = {f"{UNET}label_emb.0.0.weight": torch.ones(3, 3)}
    file = with_tensors(store("sd1").checkpoint, tmp_path / "a.safetensors", more)
    with pytest.raises(UserError, match=rf"has {UNET}label_emb.0.0.weight, but the other tensors of its unet describe"):
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
    "classes": ({"num_class_embeds": 3}, "class_embedding.weight, without a place in a checkpoint"),
    "class projection": (
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 8},
        "class_embedding.linear_1.weight, without a place in a checkpoint",
    ),
    "image projection": (
        {"encoder_hid_dim": 16, "encoder_hid_dim_type": "text_proj"},
        "encoder_hid_proj.weight, without a place in a checkpoint",
    ),
}


@pytest.mark.parametrize("case", ODD_UNETS)
def test_a_unet_without_a_place_in_files_is_refused(store, tmp_path, case):
    own, text = ODD_UNETS[case]
    model = planned(store("sd1").folder, tmp_path, "unet", small_unet(**own))
    with pytest.raises(UserError, match=text):
        as_file(model, tmp_path / "out.safetensors")


SETTINGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "heads": ("unet", {"attention_head_dim": 4}, "attention_head_dim"),
    "groups": ("unet", {"norm_num_groups": 8}, "norm_num_groups"),
    "activation": ("unet", {"act_fn": "gelu"}, "act_fn"),
    "scale of times": ("unet", {"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
    "other blocks": (
        "unet",
        {"down_block_types": ("ResnetDownsampleBlock2D", *("CrossAttnDownBlock2D",) * 2, "DownBlock2D")},
        "cannot be written to .*, which would be wrong: .* describes no U-Net that can be built",
    ),
    "scale of latents": ("vae", {"scaling_factor": 0.5}, "scaling_factor"),
    "groups of the VAE": ("vae", {"norm_num_groups": 16}, "norm_num_groups"),
    "no quantisation": ("vae", {"use_quant_conv": False}, "use_quant_conv"),
    "text": ("text_encoder", {"hidden_act": "relu"}, "hidden_act"),
    "text heads": ("text_encoder", {"num_attention_heads": 2}, "num_attention_heads"),
}


@pytest.mark.repetitions(keep=4)
@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_no_shape_tells_are_kept_or_refused(store, tmp_path, case):
    part, own, text = SETTINGS[case]
    if part == "text_encoder":
        folder = tmp_path / "folder"
        shutil.copytree(store("sd1").folder, folder)
        (folder / part / "config.json").write_text(json.dumps(config(folder, part) | own), encoding="utf-8")
        model = open_checkpoint(folder)
    else:
        changed_part = small_unet(**own) if part == "unet" else small_vae(store, **own)
        model = planned(store("sd1").folder, tmp_path, part, changed_part)
    result = as_file(model, tmp_path / "out.safetensors")
    assert json.loads(json.dumps(building.config_of(result, part))).items() >= json.loads(json.dumps(own)).items()
    for source in (model, result):  # nor does a file lose them on its way to another
        with pytest.raises(UserError, match=text):
            as_file(source, tmp_path / "out.ckpt")


def test_a_unet_without_texts_is_known_only_from_metadata(store, tmp_path):
    """Its context has a width in the configuration, and no tensor tells it."""
    plain = {"down_block_types": ("DownBlock2D",) * 4, "up_block_types": ("UpBlock2D",) * 4, "mid_block_type": None}
    unet = small_unet(**plain)
    model = planned(store("sd1").folder, tmp_path, "unet", unet)
    assert built(as_file(model, tmp_path / "a.safetensors"), "unet") == shapes_in(unet)
    with pytest.raises(UserError, match="a .ckpt has no place for the"):
        as_file(model, tmp_path / "a.ckpt")


def test_a_result_that_would_be_read_as_another_model_is_refused(store, tmp_path):
    model = open_checkpoint(store("sd1").folder)
    whole = whole_plan(model)
    result = as_file(model, tmp_path / "a.safetensors")
    lost = {**whole, "unet/lost.weight": whole["unet/conv_in.weight"]}
    with pytest.raises(
        UserError, match="cannot be written to .*, which would be wrong: .* would be read without unet/lost.weight"
    ):
        check_result(result, model, lost)


def test_indices_that_old_folders_hold_have_no_place_in_openclip(store, tmp_path):
    model = open_checkpoint(store("sd2").folder)
    more = changed(model, "text_encoder/text_model.embeddings.position_ids", (1, 77))
    expected = as_file(model, tmp_path / "a.safetensors").shapes
    assert as_file(more, tmp_path / "a.safetensors").shapes == expected


def test_hints_of_published_models_do_not_stop_a_pickle(store, tmp_path):
    hints = {"sample_size": 96, "upcast_attention": True}
    unet = small_unet(**(store("sd2").unet | hints))
    model = planned(store("sd2").folder, tmp_path, "unet", unet)
    as_file(model, tmp_path / "out.ckpt")
    found = building.config_of(as_file(model, tmp_path / "out.safetensors"), "unet")
    assert found.items() >= hints.items()


def test_another_kind_of_vae_is_refused(store, tmp_path):
    from diffusers import AutoencoderTiny

    model = planned(store("sd1").folder, tmp_path, "vae", AutoencoderTiny())
    with pytest.raises(UserError, match="its vae is of the kind AutoencoderTiny, and only AutoencoderKL is read"):
        whole_plan(model)


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


@pytest.mark.slow
def test_added_tokens_come_back_from_a_file(taught, tmp_path, caplog):
    assert {49408, 49409} <= set(ids_in(taught))
    convert(taught, tmp_path / "there.safetensors")
    assert "has no words for 1 of the 3 tokens" in caplog.text
    convert(tmp_path / "there.safetensors", tmp_path / "copy.safetensors", "--fp16")
    convert(tmp_path / "copy.safetensors", tmp_path / "back")
    pipeline = opened(tmp_path / "back")
    assert pipeline.tokenizer(PROMPT).input_ids == ids_in(taught)
    assert pipeline.text_encoder.config.vocab_size == 49411
    assert tiny.load(tmp_path / "there.safetensors").texts[0].tokenizer(PROMPT).input_ids == ids_in(taught)
    convert(tmp_path / "back", tmp_path / "again.safetensors")
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
