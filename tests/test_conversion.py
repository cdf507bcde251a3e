"""tools/convert_diffusers20_original_sd.py: what it writes is what diffusers reads, bit by bit, both ways."""

from __future__ import annotations

import itertools
import json
import shutil

import pytest
import tiny
import torch
from conversions import convert, read
from safetensors.torch import load_file, save_file
from tensors import assert_same, metadata, read_folder

from library.adapters.layers import layers_of
from library.errors import UserError
from library.models import building, layout
from library.models.base import text_body
from library.models.checkpoint import EXTRAS_FILE
from library.models.prediction import V_BIAS

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
SD2_BLOCKS = "cond_stage_model.model.transformer.resblocks."
pytestmark = pytest.mark.usefixtures("tidy")


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def model(request, store):
    return store(request.param)


def pipeline_class(name):
    import diffusers

    return diffusers.StableDiffusionXLPipeline if name == "sdxl" else diffusers.StableDiffusionPipeline


def from_file(model, path):
    """Return what diffusers itself makes of a checkpoint."""
    kind = pipeline_class(model.name)
    return kind.from_single_file(str(path), config=str(model.made_folder), local_files_only=True)


def states(pipeline):
    return {part: getattr(pipeline, part).state_dict() for part in PARTS if hasattr(pipeline, part)}


def prediction_of(folder):
    return json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["prediction_type"]


# ---- diffusers reads the same -------------------------------------------------------------------------------


@pytest.mark.repetitions(keep=1)
def test_a_folder_holds_what_diffusers_makes_of_the_checkpoint(model):
    pipeline = pipeline_class(model.name).from_pretrained(model.made_folder, local_files_only=True)
    found, oracle = states(pipeline), states(from_file(model, model.checkpoint))
    assert found.keys() == oracle.keys()
    for part in found:
        assert_same(found[part], oracle[part])
        assert_same(found[part], model.models[part].state_dict())  # so the tiny checkpoint is true too
    config = dict(pipeline.unet.config)
    for key, value in model.unet.items():
        known = config[key]
        assert (tuple(known) if isinstance(known, list) else known) == value, key
    tokenizers = [getattr(pipeline, name) for name in ("tokenizer", "tokenizer_2") if hasattr(pipeline, name)]
    pads = {"sd1": ["<|endoftext|>"], "sd2": ["!"], "sdxl": ["<|endoftext|>", "!"]}[model.name]
    assert [tokenizer.pad_token for tokenizer in tokenizers] == pads
    for tokenizer in tokenizers:
        assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
        assert tokenizer.model_max_length == 77


def test_diffusers_reads_a_checkpoint_as_the_folder_it_was_made_of(model):
    found = states(from_file(model, model.made_checkpoint))
    for part, state in found.items():
        assert_same(state, model.models[part].state_dict())


def test_a_pipeline_of_the_folder_draws(store):
    """The pooled text of SDXL goes through its projection here; turned the wrong way the picture would differ."""
    model = store("sdxl")
    pictures = []
    for pipeline in (
        pipeline_class("sdxl").from_pretrained(model.made_folder, local_files_only=True),
        from_file(model, model.checkpoint),
    ):
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        size = {"height": 64, "width": 64, "num_inference_steps": 1, "output_type": "latent"}
        pictures.append(pipeline("a cat", generator=generator, **size).images)
    torch.testing.assert_close(pictures[0], pictures[1], rtol=1e-4, atol=1e-4)  # memory is aligned differently


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_the_suite_loads_what_was_written(store, name):
    model = store(name)
    for path in (model.made_folder, model.made_checkpoint):
        loaded = tiny.load(path)
        assert loaded.family is tiny.FAMILIES[name]
        for part, encoder in (("unet", loaded.unet), ("vae", loaded.vae), ("text_encoder", loaded.texts[0].module)):
            assert_same(text_body(encoder).state_dict(), text_body(model.models[part]).state_dict())


def layer_paths(model):
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {name for name, module in model.named_modules() if isinstance(module, kinds)}


SIZES = {"sd1": (859_520_964, 123_060_480), "sd2": (865_910_724, 340_387_840), "sdxl": (2_567_463_684, 694_659_840)}


@pytest.mark.parametrize("name", SIZES)
def test_published_models_come_back_from_the_shapes_of_their_files(name):
    """Nothing is in memory here but names and shapes; every tensor has a name that the plan knows."""
    family = tiny.FAMILIES[name]
    text = family.text_models[-1]
    unet = building.build_unet(family.unet)
    encoder = building.build_text_encoder(text.config, has_projection=text.has_projection)
    assert tuple(sum(p.numel() for p in model.parameters()) for model in (unet, encoder)) == SIZES[name]
    names = tiny.original_names(layout.unet_rule(family, {}), unet.state_dict())
    assert len(set(names.values())) == len(names)
    assert building.unet_config(family, {names[n]: tuple(t.shape) for n, t in unet.state_dict().items()}) == family.unet
    known = {(layer.part, layer.path) for layer in layers_of(family)}
    assert {("unet", name) for name in layer_paths(unet)} <= known

    assert {(text.folder, name) for name in layer_paths(text_body(encoder))} <= known


# ---- there and back -----------------------------------------------------------------------------------------


@pytest.mark.repetitions(keep=1)
def test_checkpoint_to_folder_to_checkpoint_keeps_every_bit_and_type(model, tmp_path):
    types = itertools.cycle([torch.float16, torch.float32, torch.bfloat16])
    state = {
        name: tensor.to(next(types)) if tensor.is_floating_point() else tensor
        for name, tensor in read(model.checkpoint).items()
    }
    state |= {"v_pred": torch.zeros(0), "alphas_cumprod": torch.rand(1000, dtype=torch.float64)}
    save_file(state, tmp_path / "mixed.safetensors")
    convert(tmp_path / "mixed.safetensors", tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "back.safetensors")
    assert_same(read(tmp_path / "back.safetensors"), state)


@pytest.mark.repetitions(keep=1)
def test_folder_to_checkpoint_to_folder_keeps_every_bit_and_type(model, tmp_path):
    types = itertools.cycle([torch.float16, torch.float32, torch.bfloat16])
    folder = tmp_path / "mixed"
    shutil.copytree(model.folder, folder)
    for path in sorted(folder.glob("*/*.safetensors")):
        # Query, key and value may be one tensor in the checkpoint, which has one type.
        kinds: dict[str, torch.dtype] = {}
        state = {
            name: tensor.to(kinds.setdefault(name.replace("k_proj", "q_proj").replace("v_proj", "q_proj"), next(types)))
            for name, tensor in load_file(path).items()
        }
        save_file(state, path, {"format": "pt"})
    convert(folder, tmp_path / "there.safetensors")
    convert(tmp_path / "there.safetensors", tmp_path / "back")
    assert_same(read_folder(tmp_path / "back"), read_folder(folder))


@pytest.mark.parametrize("name", ["sd2", "sdxl"])
def test_what_is_joined_takes_the_widest_of_its_types(store, name, tmp_path):
    model, part = store(name), {"sd2": "text_encoder", "sdxl": "text_encoder_2"}[name]
    shutil.copytree(model.folder, tmp_path / "folder")
    path = tmp_path / "folder" / part / "model.safetensors"
    state = {name: tensor.half() if "q_proj" in name else tensor for name, tensor in load_file(path).items()}
    save_file(state, path, {"format": "pt"})
    convert(tmp_path / "folder", tmp_path / "out.safetensors")
    whole = next(
        tensor
        for name, tensor in read(tmp_path / "out.safetensors").items()
        if name.endswith("resblocks.0.attn.in_proj_weight")
    )
    layer = "text_model.encoder.layers.0.self_attn.{}_proj.weight"
    assert torch.equal(whole, torch.cat([state[layer.format(letter)].float() for letter in "qkv"]))


def test_what_diffusers_has_no_place_for_survives(store, tmp_path):
    model = store("sd2")
    convert(model.made_folder, tmp_path / "back.safetensors")
    assert_same(read(tmp_path / "back.safetensors"), read(model.checkpoint))
    prefix = "cond_stage_model.model."
    kept = load_file(model.made_folder / EXTRAS_FILE)
    assert {f"{prefix}text_projection", f"{prefix}logit_scale"} <= kept.keys()
    assert {name.split(".")[4] for name in kept if name.startswith(SD2_BLOCKS)} == {"3"}


def test_what_original_files_of_sd2_have_besides_is_filled(store):
    """As sd-scripts does it: the last block a copy of the one before, ones as projection, a scale of 1."""
    state = read(store("sd2").made_checkpoint)
    last = {name: tensor for name, tensor in state.items() if name.startswith(f"{SD2_BLOCKS}3.")}
    assert len(last) == 12
    for name, tensor in last.items():
        assert torch.equal(tensor, state[name.replace("resblocks.3.", "resblocks.2.")])
    assert torch.equal(state["cond_stage_model.model.text_projection"], torch.ones(64, 64))
    assert state["cond_stage_model.model.logit_scale"] == 1
    assert state.keys() == read(store("sd2").checkpoint).keys()


def test_weights_of_the_training_stay_out_of_folders(store, tmp_path):
    model = store("sd1")
    state = read(model.checkpoint)
    more = {"model_ema.a": torch.ones(1), "first_stage_model.loss.b": torch.ones(1), "model_ema.decay": torch.ones(1)}
    save_file(state | more, tmp_path / "ema.safetensors")
    convert(tmp_path / "ema.safetensors", tmp_path / "folder")
    assert load_file(tmp_path / "folder" / EXTRAS_FILE).keys() == {
        "cond_stage_model.transformer.text_model.embeddings.position_ids"
    }
    assert_same(read_folder(tmp_path / "folder"), read_folder(model.folder))


def test_text_encoders_without_their_inner_name(store, tmp_path):
    """SD 1.x files without `text_model`, and folders as transformers writes them since 5.6."""
    model = store("sd1")
    state = {name.replace("transformer.text_model.", "transformer."): t for name, t in read(model.checkpoint).items()}
    save_file(state, tmp_path / "flat.safetensors")
    convert(tmp_path / "flat.safetensors", tmp_path / "folder")
    assert_same(read_folder(tmp_path / "folder"), read_folder(model.folder))
    path = tmp_path / "folder" / "text_encoder" / "model.safetensors"
    save_file({name.removeprefix("text_model."): tensor for name, tensor in load_file(path).items()}, path)
    (tmp_path / "folder" / EXTRAS_FILE).unlink()
    convert(tmp_path / "folder", tmp_path / "out.safetensors")
    assert_same(read(tmp_path / "out.safetensors"), read(model.made_checkpoint))


def test_the_attention_of_old_vae_folders(store, tmp_path):
    model = store("sd1")
    shutil.copytree(model.folder, tmp_path / "old")
    path = tmp_path / "old" / "vae" / "diffusion_pytorch_model.safetensors"
    words = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    state = load_file(path)
    for word, old in words.items():
        state = {name.replace(word, old): tensor for name, tensor in state.items()}
    assert sum(".proj_attn." in name for name in state) == 4
    save_file(state, path, {"format": "pt"})
    convert(tmp_path / "old", tmp_path / "out.safetensors")
    assert_same(read(tmp_path / "out.safetensors"), read(model.made_checkpoint))


# ---- formats and types --------------------------------------------------------------------------------------


def test_pickles_in_and_out_count_on(store, tmp_path):
    model = store("sd1")
    source = tiny.write_checkpoint(model.models, "sd1", tmp_path / "model.ckpt")  # epoch 1, global_step 10
    convert(source, tmp_path / "folder")
    assert_same(read_folder(tmp_path / "folder"), read_folder(model.folder))
    convert(source, tmp_path / "more.ckpt", "--epoch", 2, "--global_step", 5)
    content = torch.load(tmp_path / "more.ckpt", weights_only=True)
    assert (content["epoch"], content["global_step"]) == (3, 15)
    assert_same(content["state_dict"], read(source))
    convert(model.folder, tmp_path / "new.ckpt", "--epoch", 2)
    content = torch.load(tmp_path / "new.ckpt", weights_only=True)
    assert (content["epoch"], content["global_step"]) == (2, 0)
    assert_same(content["state_dict"], read(model.made_checkpoint))
    assert_same(
        states(from_file(model, tmp_path / "new.ckpt"))["text_encoder"], model.models["text_encoder"].state_dict()
    )


@pytest.mark.repetitions(keep=2)
@pytest.mark.parametrize(
    ("words", "dtype"),
    [
        (["--fp16"], torch.float16),
        (["--float"], torch.float32),
        (["--save_precision_as", "bf16"], torch.bfloat16),
        (["--save_precision_as", "no"], torch.bfloat16),
    ],
)
def test_types(store, tmp_path, words, dtype):
    model = store("sd1")
    source = torch.float32 if dtype == torch.bfloat16 and "no" not in words else torch.bfloat16
    state = {
        name: tensor.to(source) if tensor.is_floating_point() else tensor
        for name, tensor in read(model.checkpoint).items()
    }
    save_file(state, tmp_path / "source.safetensors")
    expected = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}  # position ids stay
    convert(tmp_path / "source.safetensors", tmp_path / "folder", *words)
    assert {tensor.dtype for tensor in read_folder(tmp_path / "folder").values()} == {dtype}
    for name in ("source.safetensors", "folder"):
        convert(tmp_path / name, tmp_path / "out.safetensors", *words)
        assert_same(read(tmp_path / "out.safetensors"), expected)


def test_metadata_stay_are_added_and_never_run(store, tmp_path):
    model, mark = store("sd1"), tmp_path / "mark"
    source, out = tmp_path / "source.safetensors", tmp_path / "out.safetensors"
    save_file(read(model.checkpoint) | {"extra.x": torch.ones(1)}, source, {"author": "somebody", "title": "old"})
    convert(source, out, "--metadata", '{"title": "new", "tags": {"a": [1, true]}}')
    found = metadata(out)
    assert (found["author"], found["title"], json.loads(found["tags"])) == ("somebody", "new", {"a": [1, True]})
    assert found["modelspec.architecture"] == "stable-diffusion-v1"
    assert_same(read(out), read(source))
    convert(model.folder, out, "--metadata", "{'title': 'x', 'set': {1}, 'n': None, 3: 'three'}")
    found = metadata(out)
    assert (found["title"], found["n"], found["3"]) == ("x", "null", "three")
    for text in (
        f"__import__('pathlib').Path({str(mark)!r}).touch()",
        f"{{'a': open({str(mark)!r}, 'w')}}",
        "{[]: 1}",
        "[" * 100000,
        '["a"]',
        "no",
        "3",
    ):
        with pytest.raises(UserError, match="--metadata must be a JSON object such as"):
            convert(source, tmp_path / "never.safetensors", "--metadata", text)
    assert not mark.exists()
    assert not (tmp_path / "never.safetensors").exists()


def test_what_the_model_predicts_is_written(store, tmp_path):
    model = store("sd2")
    assert prediction_of(model.made_folder) == "epsilon"
    assert metadata(model.made_checkpoint)["modelspec.architecture"] == "stable-diffusion-v2-512"
    convert(model.made_folder, tmp_path / "v.safetensors", "--v_parameterization")
    found = metadata(tmp_path / "v.safetensors")
    assert found["modelspec.prediction_type"] == "v"
    assert found["modelspec.architecture"] == "stable-diffusion-v2-768-v"
    convert(tmp_path / "v.safetensors", tmp_path / "v")
    assert prediction_of(tmp_path / "v") == "v_prediction"
    convert(tmp_path / "v", tmp_path / "v.safetensors")
    assert metadata(tmp_path / "v.safetensors")["modelspec.prediction_type"] == "v"
    # Without a word the spread of a bias tells it.
    state = read(model.checkpoint)
    state[V_BIAS] = torch.linspace(-0.5, 0.5, len(state[V_BIAS]))
    save_file(state, tmp_path / "guess.safetensors")
    convert(tmp_path / "guess.safetensors", tmp_path / "guessed")
    assert prediction_of(tmp_path / "guessed") == "v_prediction"
