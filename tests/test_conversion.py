"""tools/convert_diffusers20_original_sd.py: what it writes is what diffusers reads, bit by bit, both ways."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tensors import assert_same, metadata, read_folder

from library import files, weight_file
from library.config.model import ModelConfig
from library.errors import UserError
from library.models import family as families
from library.models import keys, loading
from library.models.conversion import V_BIAS
from library.models.model_files import EXTRAS_FILE, open_model
from tools import convert_diffusers20_original_sd as tool

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tools" / "convert_diffusers20_original_sd.py"
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
CHANNELS = {families.SD2: (64, 64, 128, 128), families.SDXL: (64, 64, 128)}  # to write less
SD2_BLOCKS = "cond_stage_model.model.transformer.resblocks."


@pytest.fixture(autouse=True)
def _tidy(tmp_path):
    """Leave nothing of the hundreds of megabytes behind that each test writes."""
    yield
    shutil.rmtree(tmp_path, ignore_errors=True)


def convert(*argv):
    assert tool.main([str(word) for word in argv]) == 0


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Return family name -> its models and what is made of them, each once; no two tensors in it are alike."""
    made = {}

    def get(name):
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(tiny, "CHANNELS", tiny.CHANNELS | CHANNELS)
                models, unet = tiny.make_models(name, seed=7), tiny.unet_config(tiny.FAMILIES[name])
            generator = torch.Generator().manual_seed(1)
            for parameter in itertools.chain(*(model.parameters() for model in models.values())):
                parameter.data += torch.randn(parameter.shape, generator=generator) * 0.01  # norms too
            checkpoint = tiny.write_checkpoint(models, name, root / "model.safetensors")
            folder = tiny.write_folder(models, name, root / "folder")
            convert(checkpoint, root / "made")
            convert(folder, root / "made.safetensors")
            made[name] = SimpleNamespace(
                name=name, unet=unet, models=models, checkpoint=checkpoint, folder=folder,
                made_folder=root / "made", made_checkpoint=root / "made.safetensors",
            )  # fmt: skip
        return made[name]

    return get


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


def read(path):
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, weights_only=True)["state_dict"]


def prediction_of(folder):
    return json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["prediction_type"]


# ---- diffusers reads the same -------------------------------------------------------------------------------


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
        config = ModelConfig(pretrained_model_name_or_path=str(path))
        loaded = loading.load_models(config, loading.detect(config), dtype=torch.float32, vae_dtype=torch.float32)
        assert loaded.family is tiny.FAMILIES[name]
        for part, encoder in (("unet", loaded.unet), ("vae", loaded.vae), ("text_encoder", loaded.text_encoders[0])):
            assert_same(loading.text_model(encoder).state_dict(), loading.text_model(model.models[part]).state_dict())


SIZES = {"sd1": (859_520_964, 123_060_480), "sd2": (865_910_724, 340_387_840), "sdxl": (2_567_463_684, 694_659_840)}


@pytest.mark.parametrize("name", SIZES)
def test_published_models_come_back_from_the_shapes_of_their_files(name):
    """Nothing is in memory here but names and shapes; every tensor has a name that the plan knows."""
    family = tiny.FAMILIES[name]
    text = family.text_models[-1]
    unet = loading.build_unet(family.unet)
    encoder = loading.build_text_encoder(text.config, has_projection=text.has_projection)
    assert tuple(sum(p.numel() for p in model.parameters()) for model in (unet, encoder)) == SIZES[name]
    names = keys.table(unet.state_dict(), loading.unet_rule_for(family.unet))
    assert len(set(names.values())) == len(names)
    assert families.unet_config(family, {names[n]: tuple(t.shape) for n, t in unet.state_dict().items()}) == family.unet
    assert names.keys() <= set(keys.tensors(keys.unet_modules(len(family.unet["block_out_channels"]))))
    own = loading.canonical_text_state(encoder)
    assert own.keys() <= set(keys.tensors(keys.text_modules(text.config["num_hidden_layers"])))


# ---- there and back -----------------------------------------------------------------------------------------


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


def test_folder_to_checkpoint_to_folder_keeps_every_bit_and_type(model, tmp_path):
    types = itertools.cycle([torch.float16, torch.float32, torch.bfloat16])
    folder = tmp_path / "mixed"
    shutil.copytree(model.folder, folder)
    for path in sorted(folder.glob("*/*.safetensors")):
        # Query, key and value may be one tensor in the checkpoint, which has one type.
        kinds = {}
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


# ---- folders ------------------------------------------------------------------------------------------------


def split_text_encoder(folder, ending=""):
    """Split the weights of a text encoder into two files with an index."""
    whole = folder / "model.safetensors"
    state = load_file(whole)
    names, weight_map = sorted(state), {}
    for at, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model{ending}-0000{at}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"model.safetensors.index{ending}.json").write_text(json.dumps(index))
    whole.unlink()


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_sharded_folders(store, tmp_path, name):
    model = store(name)
    folder = tmp_path / "folder"
    shutil.copytree(model.folder, folder)
    shutil.rmtree(folder / "unet")
    model.models["unet"].save_pretrained(folder / "unet", max_shard_size="10MB")
    assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 1
    split_text_encoder(folder / "text_encoder")
    convert(folder, tmp_path / "out.safetensors")
    assert_same(read(tmp_path / "out.safetensors"), read(model.made_checkpoint))
    convert(folder, tmp_path / "whole")  # one file of each part, and no index of files that are not there
    assert not list((tmp_path / "whole").glob("*/*.index*"))
    assert_same(read_folder(tmp_path / "whole"), read_folder(model.folder))


def test_variants(store, tmp_path):
    model = store("sd1")
    folder = tmp_path / "folder"
    shutil.copytree(model.folder, folder)
    for path in sorted(folder.glob("*/*.safetensors")):
        state = {name: tensor.half() for name, tensor in load_file(path).items()}
        save_file(state, path.with_name(f"{path.stem}.fp16.safetensors"), {"format": "pt"})
    convert(folder, tmp_path / "full.safetensors")
    convert(folder, tmp_path / "half.safetensors", "--variant", "fp16")
    assert_same(read(tmp_path / "full.safetensors"), read(model.made_checkpoint))
    half = {name: tensor.half() for name, tensor in read(model.made_checkpoint).items()}
    assert_same(read(tmp_path / "half.safetensors"), half)
    with pytest.raises(UserError, match="unet holds no weights of the variant bf16"):
        convert(folder, tmp_path / "x.safetensors", "--variant", "bf16")
    with pytest.raises(UserError, match="--variant is for Diffusers folders"):
        convert(model.checkpoint, tmp_path / "x", "--variant", "fp16")


def test_a_sharded_variant_does_not_stand_for_the_full_weights(store, tmp_path):
    model = store("sd1")
    folder, encoder = tmp_path / "folder", tmp_path / "folder" / "text_encoder"
    shutil.copytree(model.folder, folder)
    full = (encoder / "model.safetensors").read_bytes()
    save_file({name: tensor.half() for name, tensor in load_file(encoder / "model.safetensors").items()},
              encoder / "model.safetensors", {"format": "pt"})  # fmt: skip
    split_text_encoder(encoder, ".fp16")
    types = {tensor.dtype for name, tensor in folder_tensors(folder).items() if name.startswith("text_encoder/")}
    assert types == {torch.float16}  # nothing else is there
    (encoder / "model.safetensors").write_bytes(full)
    assert_same(folder_tensors(folder), folder_tensors(model.folder))
    split_text_encoder(encoder)
    assert_same(folder_tensors(folder), folder_tensors(model.folder))


def folder_tensors(folder):
    files = open_model(folder)
    return {name: files.read(name) for name in files.shapes}


def test_scheduler_and_tokenizer_of_another_folder(store, tmp_path):
    model, other = store("sdxl"), tmp_path / "other"
    for part in ("scheduler", "tokenizer", "unet"):
        (other / part).mkdir(parents=True)
    (other / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "EulerDiscreteScheduler"}')
    (other / "tokenizer" / "tokenizer.json").write_text("{}")
    convert(model.checkpoint, tmp_path / "out", "--reference_model", other)
    out = tmp_path / "out"
    assert "Euler" in (out / "scheduler" / "scheduler_config.json").read_text()
    assert [path.name for path in (out / "tokenizer").iterdir()] == ["tokenizer.json"]
    assert (out / "tokenizer_2" / "vocab.json").is_file()
    assert_same(read_folder(out), read_folder(model.made_folder))
    with pytest.raises(UserError, match="--reference_model: runwayml/x is not a folder, and nothing is downloaded"):
        convert(model.checkpoint, tmp_path / "no", "--reference_model", "runwayml/x")


def test_the_name_of_a_folder_may_hold_a_dot_and_the_folder_be_there(store, tmp_path):
    model = store("sd1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for name in ("my.model", "link"):
        convert(model.checkpoint, tmp_path / name)
        assert (tmp_path / name / "model_index.json").is_file()
    assert_same(read_folder(tmp_path / "my.model"), read_folder(tmp_path / "empty"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "link", "my.model"]


def test_a_model_without_vae(store, tmp_path):
    model = store("sd1")
    state = {name: t for name, t in read(model.checkpoint).items() if not name.startswith("first_stage_model.")}
    save_file(state, tmp_path / "bare.safetensors")
    convert(tmp_path / "bare.safetensors", tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "back.safetensors")
    assert_same(read(tmp_path / "back.safetensors"), state)


# ---- mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["gone.safetensors", "{out}"], "gone.safetensors is not a file or a folder: name a checkpoint .* nothing is"),
        (["runwayml/stable-diffusion-v1-5", "{out}"], "nothing is downloaded"),
        (["{checkpoint}", "{full}"], "is there already and not empty: take another name"),
        (["{folder}", "{folder}"], "is within .*, which is read: take another place"),
        (["{checkpoint}", "{checkpoint}"], "is one of the files to be read: take another name"),
        (["{folder}", "{inside}"], "is within .*, which is read: take another place"),
        (["{checkpoint}", "{out}", "--v2"], "--v2 was given, but .* is an SD 1.x model: leave out --v2"),
        (["{sdxl}", "{out}", "--v1"], "--v1 was given, but .* is an SDXL model: leave out --v1"),
        (["{checkpoint}", "{out}", "--v1", "--v2"], "--v1 and --v2 were both given"),
        (["{checkpoint}", "{out}", "--fp16", "--bf16"], "one type can be written, got --fp16 --bf16"),
        (["{lora}", "{out}"], "is no Stable Diffusion checkpoint"),
        (["{refiner}", "{out}"], "is an SDXL refiner"),
        (["{inpainting}", "{out}"], "is an inpainting model"),
        (["{noise}", "{out}"], "is not a safetensors file"),
        (["{empty}", "{out}"], "is no Diffusers folder: unet/config.json is missing"),
        (["{headless}", "{out}"], "holds no text encoder"),
        (["{blind}", "{out}"], "holds no whole text encoder: conditioner.embedders.1.model.text_projection is missing"),
        (["{odd}", "{out}.safetensors"], "holds something.weight, which has no place in a checkpoint"),
    ],
)
def test_mistakes_are_told_and_leave_nothing(store, tmp_path, argv, text):
    model, sdxl = store("sd1"), store("sdxl")
    paths = {"checkpoint": model.checkpoint, "folder": model.folder, "sdxl": sdxl.checkpoint, "out": tmp_path / "out"}
    paths |= {"inside": model.folder / "vae" / "diffusion_pytorch_model.safetensors", "full": model.made_folder}
    changed = {
        "lora": lambda: {"lora_unet_a.lora_down.weight": torch.ones(1, 1)},
        "refiner": lambda: {"conditioner.embedders.0.model.ln_final.weight": torch.ones(1)},
        "inpainting": lambda: (
            read(model.checkpoint) | {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(32, 9, 3, 3)}
        ),
        "headless": lambda: {name: t for name, t in read(model.checkpoint).items() if "cond_stage" not in name},
        "blind": lambda: {name: t for name, t in read(sdxl.checkpoint).items() if "text_projection" not in name},
    }
    for name, make in changed.items():
        if f"{{{name}}}" in argv:
            paths[name] = tmp_path / f"{name}.safetensors"
            save_file(make(), paths[name])
    paths["noise"], paths["empty"], paths["odd"] = tmp_path / "noise.safetensors", tmp_path / "empty", tmp_path / "odd"
    paths["noise"].write_bytes(bytes(range(200)))
    paths["empty"].mkdir()
    if "{odd}" in argv:
        shutil.copytree(model.folder, paths["odd"])
        unet = paths["odd"] / "unet" / "diffusion_pytorch_model.safetensors"
        save_file(load_file(unet) | {"something.weight": torch.ones(1)}, unet)
    before = sorted(tmp_path.rglob("*"))
    stamp = paths["inside"].stat().st_mtime_ns
    with pytest.raises(UserError, match=text) as caught:
        convert(*(word.format(**paths) for word in argv))
    assert len(str(caught.value).splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert paths["inside"].stat().st_mtime_ns == stamp


# ---- safety and size ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["out.safetensors", "out.ckpt", "out"])
@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
def test_an_end_in_the_middle_leaves_what_was_there(store, tmp_path, monkeypatch, target, failure):
    model, out = store("sd2"), tmp_path / target
    if out.suffix:
        out.write_bytes(b"old")
    else:
        out.mkdir()
    reads = itertools.count()
    true_read = weight_file.WeightFile.tensor

    def failing(self, name):
        if next(reads) == 700:
            raise KeyboardInterrupt if failure is KeyboardInterrupt else OSError(errno.EIO, "the disk is gone")
        return true_read(self, name)

    monkeypatch.setattr(weight_file.WeightFile, "tensor", failing)
    with pytest.raises(failure):
        convert(model.checkpoint if target == "out" else model.folder, out)
    assert list(tmp_path.iterdir()) == [out]
    assert not list(out.iterdir()) if target == "out" else out.read_bytes() == b"old"


@pytest.mark.parametrize("target", ["out.safetensors", "out.ckpt", "out"])
def test_a_full_disk_leaves_what_was_there(store, tmp_path, monkeypatch, target):
    model, out = store("sd1"), tmp_path / target
    if out.suffix:
        out.write_bytes(b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="could not be written: No space left"):
        convert(model.checkpoint, out)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([b"old"] if out.suffix else [])


def test_tensors_go_through_one_by_one(store, tmp_path, monkeypatch):
    """No more is alive than some tensors that are written and the parts of the next: query, key and value."""
    model, alive, most, number = store("sdxl"), weakref.WeakSet(), 0, 0
    true_read = weight_file.WeightFile.tensor

    def counted(self, name):
        nonlocal most, number
        tensor = true_read(self, name)
        holder = tensor.untyped_storage()
        alive.add(holder)
        tensor.holder = holder  # a storage object lives as long as a tensor that knows it
        most, number = max(most, len(alive)), number + 1
        return tensor

    monkeypatch.setattr(weight_file.WeightFile, "tensor", counted)
    convert(model.checkpoint, tmp_path / "folder")
    convert(model.folder, tmp_path / "out.safetensors")
    assert number > 1500
    assert 2 <= most <= 10


# ---- the command line ---------------------------------------------------------------------------------------


def test_the_script_runs_from_any_folder(store, tmp_path):
    model = store("sd1")
    shutil.copy(model.checkpoint, tmp_path / "model.safetensors")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, str(SCRIPT), "model.safetensors", "a b/folder"], check=False, **run)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert_same(read_folder(tmp_path / "a b" / "folder"), read_folder(model.folder))


def test_help_and_mistakes_are_answered_without_torch(tmp_path):
    code = "import sys, runpy; sys.argv = {!r}\ntry: runpy.run_path({!r}, run_name='__main__')\n"
    code += "except SystemExit as end: code = end.code\nsys.exit(10 * ('torch' in sys.modules) + (code or 0))"
    for argv, expected in ((["x", "--help"], 0), (["x", "gone", "out"], 2)):
        done = subprocess.run(
            [sys.executable, "-c", code.format(argv, str(SCRIPT))], cwd=tmp_path, capture_output=True, check=False
        )
        assert done.returncode == expected, done.stderr


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.input_blocks.1.0.in_layers.2.bias",
        "first_stage_model.decoder.mid.block_1.norm1.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.bias",
    ],
)
def test_a_checkpoint_with_a_hole_is_refused(model_store, tmp_path, name):
    state = load_file(model_store("sd1")[1]["safetensors"])
    del state[name]
    save_file(state, tmp_path / "hole.safetensors")
    with pytest.raises(UserError, match="is not whole|holds no whole"):
        tool.main([str(tmp_path / "hole.safetensors"), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_metadata_of_a_checkpoint_come_back_with_it(model_store, tmp_path):
    source = tmp_path / "a.safetensors"
    save_file(load_file(model_store("sd1")[1]["safetensors"]), source, metadata={"modelspec.title": "mine", "x": "1"})
    folder, back = tmp_path / "folder", tmp_path / "back.safetensors"
    assert tool.main([str(source), str(folder)]) == 0
    assert tool.main([str(folder), str(back)]) == 0
    with safe_open(back, "pt") as file:
        assert {"modelspec.title": "mine", "x": "1"}.items() <= file.metadata().items()
    with pytest.raises(UserError, match="--metadata is for .safetensors files"):
        tool.main([str(back), str(tmp_path / "other"), "--metadata", '{"a": 1}'])


def test_a_model_of_unusual_sizes_comes_back_with_its_settings(tmp_path):
    source = ROOT / "examples" / "pocket_model"
    file, folder = tmp_path / "a.safetensors", tmp_path / "back"
    assert tool.main([str(source), str(file)]) == 0
    assert tool.main([str(file), str(folder)]) == 0
    for part in ("unet", "vae", "text_encoder"):
        before, after = (json.loads((path / part / "config.json").read_text()) for path in (source, folder))
        own = {key: value for key, value in before.items() if not key.startswith("_") and "dtype" not in key}
        assert own.items() <= after.items(), part
    config = ModelConfig(pretrained_model_name_or_path=str(file))
    models = loading.load_models(config, loading.detect(config), dtype=torch.float32, vae_dtype=torch.float32)
    assert (
        models.unet.config.norm_num_groups
        == json.loads((source / "unet" / "config.json").read_text())["norm_num_groups"]
    )
    state = load_file(file)
    save_file(state, tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match="is no Stable Diffusion of the usual sizes"):
        tool.main([str(tmp_path / "bare.safetensors"), str(tmp_path / "other")])
