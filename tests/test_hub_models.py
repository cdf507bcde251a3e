"""Models named by their repository on the Hugging Face Hub, against a hub on this machine."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import types
from pathlib import Path
from typing import Any

import pytest
from drawing import COMMON, SIZE, shot
from runs import NEEDED, options, same, train
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scripts import call
from tensors import assert_same

import gen_img_diffusers
import train_network
from library.adapters.metadata import RECIPE
from library.config import toml_text
from library.config.config_file import to_toml
from library.config.hub_names import HubName, read_hub_name
from library.config.train import check, parse_train_config
from library.errors import Problems, UserError
from library.models import hub as hub_models
from library.models.hub import fetch_models, locate_models
from library.models.hub_files import needed
from library.words import in_bytes
from networks import extract_lora_from_models, merge_lora
from tools import convert_diffusers20_original_sd, merge_models

COMMIT = "0123456789abcdef0123456789abcdef01234567"

# ---- names --------------------------------------------------------------------------------------------------

NAMES = {
    "someone/model": HubName("someone/model"),
    "someone/model/": HubName("someone/model"),
    "some.one/model-1.5_x": HubName("some.one/model-1.5_x"),
    f"someone/model@{COMMIT}": HubName("someone/model", COMMIT),
    "someone/model@refs/pr/3": HubName("someone/model", "refs/pr/3"),
    "someone/model/v1.safetensors": HubName("someone/model", None, "v1.safetensors"),
    "someone/model/sub/v1.CKPT": HubName("someone/model", None, "sub/v1.CKPT"),
    "someone/model@main/vae": HubName("someone/model", "main", "vae"),
    "hf://someone/model/vae": HubName("someone/model", None, "vae"),
    "https://huggingface.co/someone/model": HubName("someone/model"),
    "https:/huggingface.co/someone/model/": HubName("someone/model"),  # as a path has it
    "https://huggingface.co/someone/model/tree/main": HubName("someone/model", "main"),
    "https://huggingface.co/someone/model/resolve/main/a%20b.ckpt?download=true": HubName(
        "someone/model", "main", "a b.ckpt"
    ),
    "https://hf.co/someone/model/blob/fp16/vae/x.bin": HubName("someone/model", "fp16", "vae/x.bin"),
}
PATHS = (
    *("model", "model.safetensors", "models/v1.safetensors", "models/v1.ckpt", "./a/b", "../b", "/a/b", "a/../b"),
    *(
        "a\\b",
        "C:/b",
        "~/b",
        "a//",
        "models/sd/v1",
        "a/b@main/../c",
        "https://example.com/a/b",
        "a b/c",
        "a/-b",
    ),
    *("https://huggingface.co/someone", "hf://a"),
)


@pytest.mark.parametrize("text", NAMES)
def test_names_are_read_and_written(text):
    name = read_hub_name(text)
    assert name == NAMES[text]
    assert read_hub_name(str(name)) == name or (name.path and not name.revision)  # which only a link or hf:// has


@pytest.mark.parametrize("text", PATHS)
def test_other_texts_are_paths(text):
    assert read_hub_name(text) is None


# ---- the files that are needed ------------------------------------------------------------------------------


def part(name, *endings, config="config.json"):
    return [f"{name}/{config}", *(f"{name}/{ending}" for ending in endings)]


UNET = tuple(f"diffusion_pytorch_model.{kind}" for kind in ("safetensors", "bin", "fp16.safetensors", "fp16.bin"))
UNET = (*UNET, "diffusion_flax_model.msgpack", "model.onnx", "openvino_model.bin")
TEXT = ("model.safetensors", "pytorch_model.bin", "model.fp16.safetensors", "flax_model.msgpack", "model.onnx")
TOKENIZER = ("tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json")
MODEL = [
    *("README.md", ".gitattributes", "model_index.json", "v1.safetensors", "v1.ckpt", "v1-fp16.safetensors"),
    *(*part("unet", *UNET), *part("vae", *UNET), *part("text_encoder", *TEXT), *part("safety_checker", *TEXT)),
    *(*TOKENIZER, "scheduler/scheduler_config.json", "feature_extractor/preprocessor_config.json"),
]
SMALL = ["model_index.json", "scheduler/scheduler_config.json", *sorted(TOKENIZER)]
SMALL = [*SMALL, "unet/config.json", "vae/config.json", "text_encoder/config.json"]
SHARDS = [f"unet/diffusion_pytorch_model-0000{at}-of-00002.safetensors" for at in (1, 2)]
SHARDED = ["unet/config.json", "unet/diffusion_pytorch_model.safetensors.index.json", *SHARDS]
SHARDED += [f"unet/diffusion_pytorch_model.fp16-0000{at}-of-00002.safetensors" for at in (1, 2)]
OF_PART = ["config.json", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors", "x.safetensors"]
CHOICES: dict[str, tuple[Any, ...]] = {  # names, role, path and variant -> files
    "full": (
        (MODEL, "model", "", None),
        [*SMALL, f"unet/{UNET[0]}", f"vae/{UNET[0]}", f"text_encoder/{TEXT[0]}"],
    ),
    "fp16": (
        (MODEL, "model", "", "fp16"),
        [*SMALL, f"unet/{UNET[2]}", f"vae/{UNET[2]}", f"text_encoder/{TEXT[2]}"],
    ),
    "no safetensors": (
        ([name for name in MODEL if not name.endswith(".safetensors")], "model", "", None),
        [*SMALL, f"unet/{UNET[1]}", f"vae/{UNET[1]}", f"text_encoder/{TEXT[1]}"],
    ),
    "shards": ((SHARDED, "model", "", None), SHARDED[:4]),
    "one file": ((["README.md", "a.ckpt", "a.safetensors"], "model", "", None), ["a.safetensors"]),
    "one pickle": ((["a.ckpt", "vae/b.ckpt"], "model", "", None), ["a.ckpt"]),
    "a named file": ((MODEL, "model", "v1.ckpt", None), ["v1.ckpt"]),
    "a folder in it": (
        (["x/config.json", f"x/{UNET[1]}"], "control net", "x", None),
        ["x/config.json", f"x/{UNET[1]}"],
    ),
    "a vae": ((OF_PART, "vae", "", "fp16"), [OF_PART[0], OF_PART[2]]),
    "the vae of a model": ((MODEL, "vae", "", None), ["vae/config.json", f"vae/{UNET[0]}"]),
    "a vae in a file": ((["a.safetensors", "a.ckpt"], "vae", "", None), ["a.safetensors"]),
    "a ControlNet": ((OF_PART, "control net", "", None), [OF_PART[0], OF_PART[2]]),
    "surroundings": ((MODEL, "surroundings", "", None), SMALL[1:5]),
}


@pytest.mark.parametrize("name", CHOICES)
def test_only_what_is_needed_is_chosen(name):
    (names, role, path, variant), expected = CHOICES[name]
    found = needed(names, role, path=path, variant=variant)
    assert list(found.files) == expected
    assert found.variant == variant if role == "model" else found.variant is None


WRONG: dict[str, tuple[tuple[Any, ...], str]] = {
    "a transformer": ((["transformer/config.json", "vae/config.json"], "model", "", None), "transformer in place of"),
    "no variant": (
        (MODEL, "model", "", "fp8"),
        "its unet has no config.json with weights for torch of the variant fp8",
    ),
    "only flax": ((["unet/config.json", "unet/x.msgpack"], "model", "", None), "no config.json with weights for torch"),
    "several": (
        (["a.safetensors", "b.safetensors", "c.ckpt"], "model", "", None),
        "one must be named .*: a.safeten.*b.",
    ),
    "a part": ((["config.json", "model.safetensors"], "model", "", None), "there is no Diffusers model"),
    "data": ((["data.parquet"], "vae", "", None), "there is no VAE"),
    "no weights": ((MODEL, "model", "README.md", None), "README.md is no weight file"),
    "no such file": ((MODEL, "model", "v2.ckpt", None), "there is no v2.ckpt in it"),
    "a variant of a file": ((["a.safetensors"], "model", "", "fp16"), "--variant is for Diffusers folders"),
    "no tokenizer": ((["a.safetensors"], "surroundings", "", None), "there is no scheduler and no tokenizer"),
}


@pytest.mark.parametrize("name", WRONG)
def test_repositories_without_a_model_are_told(name):
    (names, role, path, variant), message = WRONG[name]
    with pytest.raises(UserError, match=message):
        needed(names, role, path=path, variant=variant)


# ---- trainings ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(model_store):
    """Return the Diffusers folder of a tiny model."""
    return model_store("sd1")[1]["folder"]


@pytest.fixture
def published(hub, folder, tmp_path):
    """Return the hub with the model someone/tiny, which has more files than are needed."""
    more = tmp_path / "more"
    shutil.copytree(folder, more)
    index = json.loads((more / "model_index.json").read_text(encoding="utf-8"))
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (more / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    for name in ("README.md", "v1.safetensors", "safety_checker/model.safetensors", "unet/model.onnx"):
        (more / name).parent.mkdir(exist_ok=True)
        (more / name).write_bytes(b"not needed")
    shutil.copy(more / "unet" / UNET[0], more / "unet" / UNET[1])
    hub.put("someone/tiny", more)
    return hub


def located(*words):
    """Return the options of a training, with its models found and fetched."""
    problems = Problems()
    config = locate_models(parse_train_config([*NEEDED[1:], *map(str, words)], problems), problems)
    problems.raise_if_any()
    fetch_models(config)
    return config


def located_model(text, *words):
    return located("--pretrained_model_name_or_path", text, *words)


def recorded(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_a_model_is_downloaded_once_and_its_commit_recorded(published, folder, pictures, tmp_path, caplog):
    caplog.set_level("INFO")
    hub, commit = published, published.commit_of("someone/tiny")
    expected = train(folder, pictures, tmp_path / "path", max_train_steps=2)
    found = train(Path("someone/tiny"), pictures, tmp_path / "named", max_train_steps=2)
    same(found, expected)
    requests, files = hub.asked()
    assert sorted(files) == sorted(needed(list(hub.files["someone/tiny"]), "model").files)
    assert "safety_checker/model.safetensors" not in files
    assert f"unet/{UNET[1]}" not in files
    assert len(requests) <= 2 * len(files) + 2  # a list, a look at each file, and the commit of the branch
    size = sum(len(hub.files["someone/tiny"][name]) for name in files)
    assert f"someone/tiny: downloading {len(files)} files, {in_bytes(size)}, of commit {commit} to" in caplog.text
    metadata = recorded(tmp_path / "named" / "x.safetensors")
    assert metadata["ss_sd_model_name"] == "someone/tiny"
    assert metadata["ss_sd_model_revision"] == commit
    assert "ss_sd_model_revision" not in recorded(tmp_path / "path" / "x.safetensors")

    # The record repeats the run with the same files, whatever the branch has become, and without a request.
    record = tmp_path / "named" / "x-options.toml"
    assert toml_text.load(record)["model"]["pretrained_model_name_or_path"] == f"someone/tiny@{commit}"
    hub.put("someone/tiny", folder)
    for words in (["someone/tiny"], ["someone/tiny", "--offline"], [f"someone/tiny@{commit}"]):
        config = located_model(*words)
        assert (
            Path(config.model.pretrained_model_name_or_path).parent.parent == tmp_path / "cache/models--someone--tiny"
        )
        assert f'"someone/tiny@{commit}"' in to_toml(config)
    assert hub.asked() == ([], [])
    assert f"someone/tiny: it is in the cache at commit {commit}" in caplog.text
    argv = ["--config_file", record, "--output_dir", tmp_path / "again", "--dry_run"]
    call(train_network, *argv)
    assert hub.asked() == ([], [])


def test_a_revision_is_another_snapshot(published, folder, tmp_path):
    first = published.commit_of("someone/tiny")
    published.former["someone/tiny", "v1"] = published.files["someone/tiny"]
    second = published.put("someone/tiny", folder)
    assert Path(located_model("someone/tiny@v1").model.pretrained_model_name_or_path).name == first
    published.asked()
    config = located_model("someone/tiny")
    assert Path(config.model.pretrained_model_name_or_path).name == second
    _, files = published.asked()
    assert files == ["model_index.json"], "the other files are those of the first commit"
    located_model("someone/tiny@v1", "--offline")


def test_the_only_file_is_taken_and_recorded_by_name(hub, base, tmp_path):
    commit = hub.put("someone/one", base.parent, base.name)
    config = located_model("someone/one", "--vae", "https://huggingface.co/someone/one/blob/main/model.safetensors")
    assert Path(config.model.pretrained_model_name_or_path).read_bytes() == base.read_bytes()
    assert config.model.vae == Path(config.model.pretrained_model_name_or_path)
    assert config.model.title_of("vae") == base.name
    assert to_toml(config).count(f'= "someone/one@{commit}/{base.name}"\n') == 2
    hub.asked()
    assert located_model("someone/one").model.pretrained_model_name_or_path == str(config.model.vae)
    assert hub.asked() == ([], [])


def test_fp16_weights_are_taken_where_they_are_asked_for_or_alone(hub, model_store, folder, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(folder, half)
    for path in half.rglob("*.safetensors"):
        tensors = {name: tensor.half() for name, tensor in load_file(path).items()}
        save_file(tensors, path.with_name(f"{path.stem}.fp16.safetensors"))
    hub.put("someone/both", half)
    for path in half.rglob("*.safetensors"):
        if ".fp16." not in path.name:
            path.unlink()
    hub.put("someone/half", half)
    for words in (["someone/both", "--variant", "fp16"], ["someone/half"]):
        config = located_model(*words)
        _, files = hub.asked()
        assert {name.partition(".")[2] for name in files if name.endswith("safetensors")} == {"fp16.safetensors"}
        assert config.model.variant == "fp16", "the record names the weights"
    full = located_model("someone/both", "--variant=")
    assert full.model.variant == "fp16", "what is in the cache is used without a request"
    with pytest.raises(UserError, match="--variant is for Diffusers folders, and .*model.safetensors is a file"):
        located_model(model_store("sd1")[1]["safetensors"], "--variant", "fp16")


def test_an_interrupted_download_goes_on_where_it_was(published):
    files = needed(list(published.files["someone/tiny"]), "model").files

    def interrupt(path):
        if path.endswith(f"unet/{UNET[0]}"):
            published.half = lambda path: None
            os.kill(os.getpid(), signal.SIGINT)

    published.half = interrupt
    with pytest.raises(KeyboardInterrupt):
        located_model("someone/tiny")
    published.asked()
    with pytest.raises(UserError, match="has no model of that name; nothing is downloaded"):
        located_model("someone/tiny", "--offline")
    assert published.asked() == ([], [])
    config = located_model("someone/tiny")
    _, rest = published.asked()
    assert rest == list(files[files.index(f"unet/{UNET[0]}") :])
    for name in files:
        got = Path(config.model.pretrained_model_name_or_path) / name
        assert got.read_bytes() == published.files["someone/tiny"][name]


def test_what_another_program_left_is_completed(published, monkeypatch):
    from huggingface_hub import hf_hub_download

    hf_hub_download("someone/tiny", "unet/config.json")  # which records the commit of the branch
    hf_hub_download("someone/tiny", f"unet/{UNET[0]}")
    with pytest.raises(UserError, match="the Hugging Face cache has only a part of it; nothing is downloaded"):
        located_model("someone/tiny", "--offline")
    published.asked()
    located_model("someone/tiny")
    _, files = published.asked()
    assert "vae/config.json" in files
    assert f"unet/{UNET[0]}" not in files


def test_a_model_of_no_use_is_told_by_its_small_files(published):
    refiner = {"unet/config.json": b'{"cross_attention_dim": 1280}', "text_encoder_2/config.json": b"{}"}
    published.files["someone/tiny"] |= refiner | {"text_encoder_2/model.safetensors": b"large"}
    with pytest.raises(UserError, match="is an SDXL refiner, which is not supported"):
        located_model("someone/tiny")
    _, files = published.asked()
    assert not [name for name in files if name.endswith(".safetensors")]


# ---- mistakes -----------------------------------------------------------------------------------------------


def closed(code):
    return lambda hub, _: hub.closed.update({"someone/tiny": code})


def full(hub, monkeypatch):
    usage = types.SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def failing(error):
    def prepare(hub, monkeypatch):
        from huggingface_hub import HfApi

        def fail(*_, **__):
            raise error

        monkeypatch.setattr(HfApi, "hf_hub_download", fail)

    return prepare


def away(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


def nothing(hub, monkeypatch):
    pass


ME, GONE = "someone/tiny", "models/v1-5"
REFUSED: dict[str, tuple[Any, str, list[str]]] = {
    "private": (closed("RepoNotFound"), ME, ["someone/tiny does not exist here, and", "hf auth login", "HF_TOKEN"]),
    "gated": (closed("GatedRepo"), ME, ["accept the terms at https://huggingface.co/someone/tiny", "hf auth login"]),
    "missing": (nothing, GONE, ["models/v1-5 does not exist here, and the Hugging Face Hub has no model models/v1-5"]),
    "revision": (nothing, f"{ME}@v9", ["someone/tiny@v9 of the Hugging Face Hub: it has no revision v9"]),
    "file": (nothing, f"{ME}/x.ckpt", ["someone/tiny/x.ckpt of the Hugging Face Hub: there is no x.ckpt in it"]),
    "entry": (nothing, f"{ME}@main/README.md", ["README.md is no weight file"]),
    "network": (away, ME, ["someone/tiny does not exist here, and the Hugging Face Hub cannot be asked ("]),
    "little room": (full, ME, ["must be downloaded to", "where 1 kB are free: make room, or set HF_HOME"]),
    "full disk": (failing(OSError(errno.ENOSPC, "No space left")), ME, ["the disk of", "is full: make room"]),
    "broken off": (
        failing(ValueError("Cut\noff")),
        ME,
        ["someone/tiny: the download broke off", "Cut off", "start again"],
    ),
    "unreadable": (failing(OSError(errno.EIO, "I/O")), ME, ["someone/tiny: the download broke off ([Errno 5] I/O)"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_had_is_one_line_before_anything_is_loaded(published, pictures, tmp_path, monkeypatch, name):
    from library.training import recipe

    prepare, model, told = REFUSED[name]
    prepare(published, monkeypatch)
    monkeypatch.setattr(recipe, "train", lambda *_, **__: pytest.fail("the training began"))
    with pytest.raises(UserError) as caught:
        train_network.main(options(Path(model), pictures, tmp_path / "o"))
    (line,) = caught.value.lines
    assert [text for text in told if text not in line] == []
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("start", ["./", ".\\"])
@pytest.mark.parametrize("option", ["--vae", "--pretrained_model_name_or_path"])
def test_what_begins_with_a_dot_is_a_path(published, pictures, tmp_path, monkeypatch, option, start):
    monkeypatch.setattr(hub_models, "find", lambda *_, **__: pytest.fail("the hub was asked"))
    argv = options(Path("m"), pictures, tmp_path / "o")
    with pytest.raises(UserError, match=rf"{option}: .*someone.tiny does not exist"):
        train_network.main([*argv, option, f"{start}someone/tiny"])


def test_a_token_is_sent_and_never_told(published, monkeypatch):
    published.closed["someone/tiny"] = "RepoNotFound"
    config = located_model("someone/tiny", "--huggingface_token", "hf_abc")
    assert published.tokens >= {"Bearer hf_abc"}
    assert "hf_abc" not in to_toml(config)
    assert "hf_abc" not in hub_models.reason(ValueError("Illegal header 'Bearer hf_abc'"), "hf_abc")
    problems = Problems()
    check(config, problems)
    with pytest.raises(UserError) as caught:
        problems.raise_if_any()
    assert "--huggingface_token" not in str(caught.value), "it is of use, without a repository to upload to"


def test_all_models_are_told_together_with_other_mistakes(hub, pictures, tmp_path):
    with pytest.raises(UserError) as caught:
        train_network.main(options(Path("a/b"), pictures, tmp_path / "o", vae="c/d", learning_rate="x"))
    text = str(caught.value)
    for told in ("--pretrained_model_name_or_path: a/b", "--vae: c/d", "--learning_rate must be"):
        assert told in text
    with pytest.raises(UserError, match="--pretrained_model_name_or_path is missing"):
        train_network.main(options(None, pictures, tmp_path / "o", vae="c/d"))


def test_a_name_that_is_nearly_that_of_a_file_is_told(hub, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "v1-5-pruned").mkdir()
    for text in ("models/v1-5", "models/v1-5-prnd.ckpt"):
        with pytest.raises(UserError, match=r"; did you mean models[/\\]v1-5-pruned\?"):
            located_model(text)
    with pytest.raises(UserError, match="--models: models is not a file"):
        merge_models.main(["--models", "models", "x", "--output", "o"])


# ---- the other scripts --------------------------------------------------------------------------------------


def test_pictures_are_drawn_with_models_of_the_hub(published, folder, model_store, source, tmp_path):
    models, _ = model_store("sd1")
    from diffusers import ControlNetModel

    net = ControlNetModel.from_unet(models["unet"])
    net.save_pretrained(tmp_path / "net", variant="fp16")
    published.put("someone/net", tmp_path / "net")
    words = ["--prompt", "a", "--guide_image_path", source, *SIZE, *COMMON]
    hub = ["--ckpt", "someone/tiny", "--vae", "someone/tiny", "--control_net_models", "someone/net"]
    call(gen_img_diffusers, *words, *hub, "--outdir", tmp_path / "one")
    requests, _ = published.asked()
    assert requests
    local = ["--ckpt", folder, "--vae", folder / "vae", "--control_net_models", tmp_path / "net"]
    call(gen_img_diffusers, *words, *local, "--outdir", tmp_path / "two")
    (one,), (two,) = (list((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert (shot(one).pixels == shot(two).pixels).all()
    assert "Model: tiny, " in shot(one).texts["parameters"]
    assert json.loads(shot(one).texts["generation"])["model"] == "someone/tiny"
    call(gen_img_diffusers, *words, *hub, "--offline", "--outdir", tmp_path / "one")
    assert published.asked() == ([], [])


@pytest.mark.slow
def test_tools_take_models_of_the_hub(published, folder, base, model_store, tmp_path):
    published.put("someone/one", base.parent, base.name, "fp16.safetensors")
    out = tmp_path / "out"
    call(convert_diffusers20_original_sd, "someone/tiny", out / "a.safetensors", "--fp16")
    call(convert_diffusers20_original_sd, folder, out / "b.safetensors", "--fp16")
    assert_same(load_file(out / "a.safetensors"), load_file(out / "b.safetensors"))
    call(convert_diffusers20_original_sd, base, out / "c", "--reference_model", "someone/tiny")
    copied = out / "c" / "scheduler" / "scheduler_config.json"
    assert copied.read_bytes() == (folder / "scheduler" / "scheduler_config.json").read_bytes()
    models = [f"someone/one/{base.name}", "someone/one/fp16.safetensors"]
    call(merge_models, "--models", *models, "--output", out / "d.safetensors")
    difference = ["--save_to", out / "e.safetensors", "--dim", 1]
    call(extract_lora_from_models, "--model_org", "someone/tiny", "--model_tuned", models[1], *difference)
    recipe = json.loads(recorded(out / "e.safetensors")[RECIPE])
    assert recipe == {"operation": "extract", "original": "someone/tiny", "tuned": "fp16.safetensors"}
    lora = ["--models", out / "e.safetensors", "--ratios", 0.5]
    call(merge_lora, "--sd_model", "someone/tiny", *lora, "--save_to", out / "f")
    index = json.loads((out / "f" / "model_index.json").read_text(encoding="utf-8"))
    assert index["safety_checker"] == [None, None], "which was not downloaded, and is not in the folder"
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    call(merge_lora, "--sd_model", "someone/one/fp16.safetensors", *lora, "--save_to", out / "g.safetensors")
    with pytest.raises(UserError, match="--save_to must be a folder, because the model is one"):
        merge_lora.main(["--sd_model", "someone/tiny", *map(str, lora), "--save_to", str(out / "h.safetensors")])
