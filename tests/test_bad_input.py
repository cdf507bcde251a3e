"""Bad input of every kind: exit code 2, a few lines with what is wrong and what to do, and nothing touched.

Each case is a row of a table; what holds for all of them stands in `refused`.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from runs import options, train
from safetensors.torch import save

import train_network
from library import logs
from library.models import keys

ROOT = Path(__file__).resolve().parents[1]
LARGE = 2**20  # bytes of a file whose content is not compared


def permissions_hold():
    """Return whether a folder without permissions cannot be read; root reads it all the same."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0)
        try:
            return not os.access(folder, os.R_OK)
        finally:
            Path(folder).chmod(0o700)


needs_permissions = pytest.mark.skipif(not permissions_hold(), reason="root reads and writes everything")


def contents(folder):
    """Return what is below a folder: the bytes of each file, of a large one its size and time."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            stat = path.stat()
            found[path] = path.read_bytes() if stat.st_size < LARGE else (stat.st_size, stat.st_mtime_ns)
        else:
            found[path] = None
    return found


@pytest.fixture
def refused(base, pictures, tmp_path, monkeypatch, capsys):
    """Return what starts train_network.py with bad input and checks all that holds for a refusal."""
    from library.training import recipe
    from library.training.run.loop import Trainer

    out = tmp_path / "out"
    out.mkdir()
    for name in ("x.safetensors", "x-options.toml", "x-metrics.jsonl"):
        (out / name).write_text("of an earlier run", encoding="utf-8")
    monkeypatch.setattr(logs, "set_up_logging", lambda: None)
    monkeypatch.setattr(Trainer, "run", lambda *_: pytest.fail("training began"))
    monkeypatch.chdir(tmp_path)

    def check(given, *fragments, loads=False):
        if not loads:
            monkeypatch.setattr(recipe, "load_models", lambda *_, **__: pytest.fail("the model was loaded"))
        argv = given if isinstance(given, list) else options(given.pop("base", base), pictures, out, **given)
        monkeypatch.setattr(sys, "argv", ["train_network.py", *argv])
        before = contents(tmp_path)
        with pytest.raises(SystemExit) as ended:
            logs.run_script(train_network.main)
        captured = capsys.readouterr()
        message = captured.err.partition("train_network.py: error: ")[2].rstrip("\n")
        assert ended.value.code == 2, captured.err
        for fragment in fragments:
            assert fragment in message, message
        assert "Traceback" not in captured.err
        assert len(message.splitlines()) <= 5
        assert max(map(len, message.splitlines())) < 700
        assert contents(tmp_path) == before
        return message

    return check


def rows(table):
    """Return the arguments that make a table of cases the parameters of a test."""
    return pytest.mark.parametrize("case", table.values(), ids=table.keys())


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


# ---- the command line ---------------------------------------------------------------------------------------

WORDS = {
    "nothing at all": ([], "--pretrained_model_name_or_path is missing", "--network_module is missing: networks.lora"),
    "unknown option": (["--lerning_rate", "1"], "--lerning_rate is not known; did you mean learning_rate?"),
    "half a name": (["--save_every", "1"], "--save_every is not known; it could be --save_every_n_epochs"),
    "two values": (["--output_name", "my", "model"], "unexpected argument 'model': give it with its option"),
    "no value": (["--seed"], "--seed: expected one argument"),
    "retired": (["--deepspeed"], "--deepspeed is not available: an adapter over a frozen base needs no sharding"),
    "config file to write": (["--output_config"], "--output_config needs --config_file"),
}
OPTIONS = {
    "no whole number": ({"max_train_steps": "3.5"}, "--max_train_steps must be a whole number, got '3.5'"),
    "five thousand digits": ({"max_train_steps": "9" * 5000}, "--max_train_steps must be a whole number, got '999"),
    "no steps": ({"max_train_steps": 0}, "--max_train_steps must be at least 1, got 0"),
    "negative seed": ({"seed": -1}, "--seed must be at least 0, got -1"),
    "rate is no number": ({"learning_rate": "fast"}, "--learning_rate must be a number, got 'fast'"),
    "rate is NaN": ({"learning_rate": "nan"}, "--learning_rate must be at least 0, got nan"),
    "rate is infinite": ({"learning_rate": "inf"}, "--learning_rate must be a finite number, got inf"),
    "one of two rates": ({"text_encoder_lr": ["1e-4", "inf"]}, "--text_encoder_lr must be a finite number, got inf"),
    "power is NaN": ({"lr_scheduler_power": "nan"}, "--lr_scheduler_power must be a finite number, got nan"),
    "weight is NaN": ({"prior_loss_weight": "nan"}, "--prior_loss_weight must be a finite number, got nan"),
    "alpha is infinite": ({"network_alpha": "inf"}, "--network_alpha must be a finite number, got inf"),
    "rank of none": ({"network_dim": 0}, "--network_dim must be at least 1, got 0"),
    "dropout above 1": ({"network_dropout": "1.5"}, "--network_dropout must be at most 1, got 1.5"),
    "norm below 0": ({"scale_weight_norms": "-1"}, "--scale_weight_norms must be at least 0, got -1"),
    "endless warm-up": ({"lr_warmup_steps": "inf"}, "--lr_warmup_steps must be a whole number of steps", "'inf'"),
    "warm-up above all": ({"lr_warmup_steps": "200%"}, "--lr_warmup_steps must be a whole number of steps", "'200%'"),
    "no choice": ({"mixed_precision": "fp32"}, "--mixed_precision must be one of no, fp16, bf16, got 'fp32'"),
    "resolution in words": ({"resolution": "large"}, '--resolution must be one number or "WIDTH,HEIGHT"', "'large'"),
    "resolution of three": ({"resolution": "64,64,64"}, "--resolution must be one number", "got '64,64,64'"),
    "small resolution": ({"resolution": "63"}, "got '63' (a side is less than 64 pixels)"),
    "vast resolution": ({"resolution": "4000000000"}, "(a side is more than 16384 pixels)"),
    "too many repeats": ({"dataset_repeats": 10**9}, "--dataset_repeats must be at most 1000000, got 1000000000"),
    "extension with a folder": ({"caption_extension": "../x"}, "--caption_extension must be an extension such as .txt"),
    "empty separator": ({"caption_separator": ""}, "--caption_separator must be a text of at least one character"),
    "key without value": ({"network_args": ["conv_dim"]}, "--network_args must be a list of key=value", "'conv_dim'"),
    "step beyond the end": ({"initial_step": 99}, "nothing is left to train: 99 steps are made, and 3 are asked for"),
    "layers beyond": ({"clip_skip": 9}, "--clip_skip must be at most 3, the layers of this text encoder, got 9"),
    "empty module": ({"network_module": "."}, "--network_module . failed in import"),
    "absent module": ({"network_module": "networks/lora"}, "No module named 'networks/lora'; networks.lora trains"),
    "network argument is NaN": ({"network_args": ["conv_alpha=nan"]}, "conv_alpha must be a finite number", "got nan"),
    "network argument": ({"network_args": ["conv_dim=a"]}, "network_args: conv_dim must be a number, got 'a'"),
    "thumbnail": ({"metadata_thumbnail": "absent.png"}, "--metadata_thumbnail: absent.png cannot be read"),
    "log file": ({"console_log_file": "train"}, "--console_log_file: train cannot be written (Is a directory)"),
    "tracker": ({"log_with": "tensorboard"}, "--log_with tensorboard needs --logging_dir"),
    "repository": ({"huggingface_repo_id": "name"}, "--huggingface_repo_id must be USER/NAME, got 'name'"),
    "tokenizer": ({"tokenizer_cache_dir": "train"}, "--tokenizer_cache_dir: train holds no vocab.json or tokenizer"),
}
AFTER_LOADING = ("step beyond the end", "layers beyond", "tokenizer")


@rows(WORDS)
def test_words_of_the_command_line(refused, case):
    refused(*case)


@pytest.mark.parametrize("name", OPTIONS)
def test_values_of_options(refused, name):
    given, *fragments = OPTIONS[name]
    refused(dict(given), *fragments, loads=name in AFTER_LOADING)


def test_all_that_is_wrong_is_told_at_once(refused):
    message = refused({"pretrained_model_name_or_path": "a", "vae": "b", "network_weights": "c", "resolution": None})
    assert len(message.splitlines()) == 4


# ---- optimizers and schedules of packages -------------------------------------------------------------------

PACKAGE = """
import torch
class Plain: pass
class Picky(torch.optim.Optimizer):
    def __init__(self, params, lr): raise AssertionError("gamma must be set")
class Fails(torch.optim.SGD):
    def step(self, closure=None): raise KeyError("momentum_buffer")
class Schedule(torch.optim.lr_scheduler.LRScheduler):
    def get_lr(self): raise IndexError("no rate")
"""
OPTIMIZERS = {
    "no name": ("..", (), "--optimizer_type .. cannot be imported"),
    "no such class": ("AdamQ", (), "torch.optim has no class AdamQ; did you mean"),
    "no such package": ("nowhere.Adam", (), "--optimizer_type nowhere.Adam: No module named 'nowhere'; try `pip"),
    "package is broken": ("broken.Adam", (), "--optimizer_type broken.Adam cannot be imported: no driver"),
    "package is no Python": ("wrong.Adam", (), "--optimizer_type wrong.Adam cannot be imported", "wrong.py, line 1"),
    "no optimizer": ("package.Plain", (), "--optimizer_args: Plain refuses them"),
    "refuses": ("package.Picky", (), "--optimizer_args: Picky refuses them: gamma must be set"),
    "fails": ("package.Fails", (), "--optimizer_type Fails does not work here: KeyError: 'momentum_buffer'"),
    "needs more": ("LBFGS", (), "--optimizer_type LBFGS does not work here", "closure"),
    "unknown argument": ("AdamW", ("foo=1",), "--optimizer_args: AdamW refuses them", "foo"),
    "value out of range": ("AdamW", ("betas=(2,3)",), "--optimizer_args: AdamW refuses them: Invalid beta", "2"),
    "too few values": ("AdamW", ("betas=(0.9,)",), "--optimizer_args: AdamW refuses them: IndexError"),
    "code": ("AdamW", ("betas=__import__('os').mkdir('ran')",), "betas must be a number", "__import__"),
    "brackets": ("AdamW", ("betas=" + "(" * 500,), "--optimizer_args: betas must be a number, True", "got '((("),
}
SCHEDULES = {
    "no such class": ("Cosine", (), "--lr_scheduler_type: torch.optim.lr_scheduler has no class Cosine; did you mean"),
    "package is broken": ("broken.X", (), "--lr_scheduler_type broken.X cannot be imported: no driver"),
    "fails": ("package.Schedule", (), "--lr_scheduler_args: package.Schedule refuses them: IndexError: no rate"),
    "missing argument": ("StepLR", (), "--lr_scheduler_args: StepLR refuses them", "step_size"),
    "unknown argument": ("StepLR", ("size=1",), "--lr_scheduler_args: StepLR refuses them", "size"),
    "no value": ("StepLR", ("step_size=nan",), "--lr_scheduler_args: step_size must be a number", "got 'nan'"),
    "division by zero": ("StepLR", ("step_size=0",), "--lr_scheduler_type StepLR cannot be used", "modulo by zero"),
    "ends before the run": (
        "OneCycleLR",
        ("max_lr=1", "total_steps=2"),
        "--lr_scheduler_type OneCycleLR cannot be used: Tried to step 3 times",
    ),
    "wants a loss": ("ReduceLROnPlateau", (), "--lr_scheduler_type ReduceLROnPlateau cannot be used", "metrics"),
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Put modules that one should not train with on the path."""
    folder = tmp_path / "modules"
    write(folder / "package.py", PACKAGE)
    write(folder / "broken.py", 'raise RuntimeError("no driver")')
    write(folder / "wrong.py", "def (")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield
    for name in ("package", "broken", "wrong"):
        sys.modules.pop(name, None)


@rows(OPTIMIZERS)
def test_optimizers(refused, package, case):
    kind, arguments, *fragments = case
    refused({"optimizer_type": kind, "optimizer_args": list(arguments) or None}, *fragments)


@rows(SCHEDULES)
def test_schedules(refused, package, case):
    kind, arguments, *fragments = case
    refused({"lr_scheduler_type": kind, "lr_scheduler_args": list(arguments) or None}, *fragments)


@pytest.mark.parametrize("rules", ["", "a", "1:10", "1:10:3,1", "nan:10,1", "1:nan,1"])
def test_pieces_of_a_schedule(refused, rules):
    given = {"lr_scheduler": "piecewise_constant", "lr_scheduler_args": [f"step_rules={rules}"]}
    refused(given, "piecewise_constant needs step_rules='1:10,0.1:20,0.01'", f"got {rules!r}")


def test_arguments_for_a_schedule_that_takes_none(refused):
    given = {"lr_scheduler": "cosine", "lr_scheduler_args": ["T_max=3"]}
    refused(given, "--lr_scheduler cosine takes no --lr_scheduler_args", "got T_max=3")


# ---- files of options, datasets, captions and prompts -------------------------------------------------------

CONFIG_FILES = {
    "no TOML": ("network_dim = ", "c.toml is not valid TOML: Invalid value"),
    "brackets": ("x = " + "[" * 5000, "c.toml is not valid TOML: maximum recursion depth"),
    "not UTF-8": ("output_name = 'é'".encode("latin-1"), "c.toml cannot be read as UTF-8 text", "byte 0xe9"),
    "unknown key": ("[a]\nnetwrk_dim = 4", "c.toml: netwrk_dim is not known; did you mean network_dim?"),
    "retired": ("dataset_class = 'mine'", "c.toml: dataset_class is not available: a foreign dataset class"),
    "of another type": ("network_dim = 4.5", "c.toml: network_dim must be a whole number, got 4.5"),
    "a date": ("network_dim = 1979-05-27", "c.toml: network_dim must be a whole number, got datetime.date"),
    "a list": ("wandb_run_name = ['a']", "c.toml: wandb_run_name must be a text, got ['a']"),
    "a switch as text": ("xformers = 'yes'", "c.toml: xformers must be true or false, got 'yes'"),
    "infinite": ("lr_warmup_steps = inf", "c.toml: lr_warmup_steps must be", "got inf"),
    "a file name with a NUL": ('vae = "a\\u0000b"', "c.toml: vae must be a path, got 'a\\x00b'"),
    "a key of the dataset file": ("image_dir = 'x'", "c.toml: image_dir is not known"),
    "a secret is not shown": ("wandb_api_key = 12345", "c.toml: wandb_api_key must be a text, got something else"),
}
DATASETS = {
    "empty": ("d.toml", "", "d.toml: no [[datasets]] table"),
    "one bracket": ("d.toml", "[datasets]\nresolution = 64", "d.toml: no [[datasets]] table"),
    "another ending": ("d.yaml", "", "--dataset_config must be a .toml or .json file, got "),
    "no table": ("d.toml", "datasets = [1]", "d.toml: datasets[0] must be a table, got 1"),
    "subsets are no list": ("d.toml", "[[datasets]]\nsubsets = 3", "datasets[0].subsets must be an array of", "got 3"),
    "unknown key": ("d.toml", "IMG num_repeat = 3", "subsets[0].num_repeat is not known; did you mean num_repeats?"),
    "key of a dataset": ("d.toml", "IMG batch_size = 3", "batch_size does not belong here: it is set in [general], "),
    "no folder": ("d.toml", "[[datasets]]\nsubsets = [{}]", "datasets[0].subsets[0].image_dir is missing"),
    "folder is a number": ("d.toml", "[[datasets]]\nsubsets = [{image_dir = 3}]", "image_dir must be a path, got 3"),
    "absent folder": (
        "d.toml",
        "[[datasets]]\nresolution = 64\nsubsets = [{image_dir = 'no'}]",
        "image_dir no is not a folder",
    ),
    "separator": ("d.toml", "IMG caption_separator = ''", "caption_separator must be a text of at least one", "''"),
    "range": ("d.toml", "IMG face_crop_aug_range = [nan, 2]", 'face_crop_aug_range must be "LOW,HIGH"', "[nan, 2]"),
    "endless": ("d.toml", "IMG token_warmup_step = inf", "token_warmup_step must be a finite number, got inf"),
    "repeated for ever": (
        "d.toml",
        "IMG num_repeats = 100000000000",
        "num_repeats must be at most 1000000, got 100000000000",
    ),
    "never repeated": ("d.toml", "IMG num_repeats = 0", "no subset to train on in ", "num_repeats of 1 or more"),
    "all held out": (
        "d.toml",
        "IMG validation_split = 1.0",
        "validation_split holds out all 4 pictures in ",
        "lower it",
    ),
    "mask without loss": ("d.toml", "IMG conditioning_data_dir = 'train'", "holds masks for the loss: add --masked"),
    "no JSON": ("d.json", '{"datasets":', "d.json is not valid JSON: Expecting value: line 1 column 13"),
    "JSON of brackets": ("d.json", "[" * 100_000, "d.json is not valid JSON: maximum recursion depth"),
    "JSON of digits": ("d.json", '{"datasets": [' + "9" * 5000 + "]}", "d.json is not valid JSON: Exceeds the limit"),
    "JSON list": ("d.json", "[]", "d.json must be a table, got []"),
    "JSON null": ("d.json", '{"general": null}', "d.json: general must be a table, got None"),
    "half a character": (
        "d.json",
        '{"datasets": [{"resolution": 64, "subsets": [{"image_dir": "a", "class_tokens": "\\ud800"}]}]}',
        "datasets[0].subsets[0].class_tokens must be a text, got '\\ud800'",
    ),
    "JSON in UTF-16": ("d.json", "{}".encode("utf-16"), "d.json cannot be read as UTF-8 text"),
}
METADATA = {
    "empty": ("m.json", "", "m.json cannot be read: Expecting value: line 1"),
    "not UTF-8": ("m.json", '{"0": {"caption": "é"}}'.encode("latin-1"), "m.json cannot be read: 'utf-8' codec"),
    "no object": ("m.json", "[]", "m.json must be an object of picture names, got list"),
    "no pictures": ("m.json", "{}", "no pictures (.png, .jpg", "m.json"),
    "an entry is a number": ("m.json", '{"0": 3}', "m.json: 0 must have texts as caption and tags, got 3"),
    "tags are a list": (
        "m.json",
        '{"0": {"tags": ["a"]}}',
        "0 must have texts as caption and tags, got {'tags': ['a']}",
    ),
    "half a character": ("m.json", '{"0": {"caption": "\\ud800"}}', "0 must have texts as caption", "\\ud800"),
    "absent pictures": ("m.json", '{"a": {}, "b": {}, "0": {}}', "2 of 3 pictures are not there", "a, b"),
    "a name of 5000 letters": ("m.json", json.dumps({"a" * 300: {}}), "1 of 1 pictures are not there", "aaaa"),
    "the root as a picture": ("m.json", '{"/": {}}', "1 of 1 pictures are not there", ": /"),
    "brackets": ("m.json", "[" * 100_000, "m.json cannot be read: maximum recursion depth"),
    "line cut short": ("m.jsonl", '{"image_path": "0"}\n{"image_pa', "m.jsonl cannot be read: line 2: Unterminated"),
    "line without a picture": ("m.jsonl", '{"caption": "a"}', 'line 1 must be an object with a text as "image_path"'),
    "picture is a number": ("m.jsonl", '\n{"image_path": 3}', 'line 2 must be an object with a text as "image_path"'),
}
PROMPTS = {
    "empty": ("p.txt", "# nothing\n", "p.txt has no prompts"),
    "another ending": ("p.yaml", "a", "--sample_prompts must be a .txt, .toml or .json file, got"),
    "not UTF-8": ("p.txt", b"\xe9", "p.txt cannot be read as UTF-8 text"),
    "unknown option": ("p.txt", "a\nb --q 3", "p.txt:2: --q is not known (known: --w --h"),
    "width in words": ("p.txt", "a --w big", "p.txt:1: width must be a whole number of pixels", "got 'big'"),
    "no width": ("p.txt", "a --w", "p.txt:1: width must be a whole number of pixels, at most 16384, got ''"),
    "vast width": ("p.txt", "a --w 99999999", "p.txt:1: width must be", "got '99999999'"),
    "vast seed": ("p.txt", f"a --d {10**30}", "p.txt:1: seed must be a whole number of at most 63 bits, got '1000"),
    "scale is NaN": ("p.txt", "a --l nan", "p.txt:1: scale must be a finite number, got 'nan'"),
    "unknown sampler": ("p.txt", "a --ss eulr", "p.txt:1: sampler 'eulr' is not known; did you mean euler?"),
    "no table": ("p.toml", "x = 3", "p.toml has no [prompt] table"),
    "no prompt": ("p.toml", "[prompt]\nwidth = 64", "p.toml: prompt.subset[0]: prompt is missing"),
    "unknown key": ("p.toml", "[prompt]\nwidh = 64", "prompt.subset[0]: widh is not known; did you mean width?"),
    "prompt is a number": ("p.toml", "[prompt]\nprompt = 3", "prompt.subset[0]: prompt must be a text, got 3"),
    "width is infinite": ("p.toml", "[prompt]\nprompt = 'a'\nwidth = inf", "width must be a whole number", "got inf"),
    "height is a switch": ("p.toml", "[prompt]\nprompt = 'a'\nheight = true", "height must be a whole", "got True"),
    "one subset": ("p.toml", "[prompt.subset]\nprompt = 'a'", "prompt.subset must be an array of tables"),
    "JSON object": ("p.json", "{}", "p.json must hold a list of texts or objects, got {}"),
    "JSON number": ("p.json", '["a", 3]', "p.json[1] must be a text or an object, got 3"),
    "JSON null": ("p.json", '[{"prompt": null}]', "p.json[0]: prompt is missing"),
    "JSON infinite": ("p.json", '[{"prompt": "a", "scale": Infinity}]', "p.json[0]: scale must be a finite number"),
    "JSON digits": ("p.json", '[{"prompt": "a", "width": ' + "9" * 5000 + "}]", "p.json is not valid JSON: Exceeds"),
    "half a character": ("p.json", '[{"prompt": "\\ud800"}]', "p.json[0]: prompt must be a text, got '\\ud800'"),
}
BY_FILE = dict.fromkeys(
    ("train_data_dir", "enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_no_upscale", "resolution")
)
FOLDER_NAMED = ("dataset_config", "network_weights", "base_weights", "sample_prompts", "log_tracker_config")


@rows(CONFIG_FILES)
def test_files_of_options(refused, tmp_path, case):
    content, *fragments = case
    message = refused({"config_file": write(tmp_path / "c.toml", content)}, *fragments)
    assert "12345" not in message


@rows(DATASETS)
def test_dataset_files(refused, tmp_path, pictures, case):
    name, content, *fragments = case
    if isinstance(content, str) and content.startswith("IMG "):
        head = f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{pictures / '1_sks dog'}'\n"
        content = head + content.removeprefix("IMG ")
    refused({"dataset_config": write(tmp_path / name, content), **BY_FILE}, *fragments)


@rows(METADATA)
def test_metadata_files(refused, tmp_path, pictures, case):
    name, content, *fragments = case
    refused({"in_json": write(tmp_path / name, content), "train_data_dir": pictures / "1_sks dog"}, *fragments)


@rows(PROMPTS)
def test_prompt_files(refused, tmp_path, case):
    name, content, *fragments = case
    refused({"sample_prompts": write(tmp_path / name, content), "sample_every_n_steps": 1}, *fragments)


@pytest.mark.parametrize("option", FOLDER_NAMED)
def test_a_folder_where_a_file_is_wanted(refused, option):
    given = {option: ["train"] if option == "base_weights" else "train"}
    refused(given | ({"train_data_dir": None} if option == "dataset_config" else {}), f"--{option}: train is a folder")


@pytest.mark.parametrize(
    ("content", "message"),
    [("[tensorboard]\nfoo = 3", "tensorboard.foo is not known"), ("[foo]", "foo is not known: the tables are [")],
)
def test_files_for_the_trackers(refused, tmp_path, content, message):
    path = write(tmp_path / "t.toml", content)
    refused({"log_tracker_config": path, "logging_dir": tmp_path / "logs"}, "t.toml: ", message)


# ---- weight files -------------------------------------------------------------------------------------------


class Payload:
    """What an evil pickle holds: loading it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_the_payload_would_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Payload()))
    assert (tmp_path / "ran").is_dir()


def pickled(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def raw(header, data=b""):
    """Return a safetensors file with a header as it is given."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8")
    return struct.pack("<Q", len(text)) + text + data


def entry(**more):
    return {"lora_unet_x.lora_down.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | more}


DAMAGED = "header is damaged; copy or download it again"
UNREADABLE = "is not a weight file that torch can read, or it is damaged; copy or download it again"
EVIL = "is refused: it carries more than weights (posix.mkdir)" if os.name == "posix" else "is refused: it carries more"
# Suffix, content from the tensors of a sound file, what is told. These are damaged whatever they should be.
DAMAGED_FILES = {
    "empty": (".safetensors", lambda _: b"", "f.safetensors", DAMAGED),
    "a few bytes": (".safetensors", lambda good: save(good)[:5], DAMAGED),
    "header cut short": (".safetensors", lambda good: save(good)[:100], DAMAGED),
    "data cut short": (
        ".safetensors",
        lambda good: save(good)[:-1000],
        "f.safetensors is cut short: it has",
        "copy it",
    ),
    "vast header": (".safetensors", lambda good: b"\xff" * 8 + save(good)[8:], DAMAGED),
    "wrong length of the header": (".safetensors", lambda good: b"\x99" + save(good)[1:], DAMAGED),
    "header is no JSON": (".safetensors", lambda _: raw(b"hello, this is no JSON"), DAMAGED),
    "header is a list": (".safetensors", lambda _: raw([1]), DAMAGED),
    "header of brackets": (".safetensors", lambda _: raw(b"[" * 100_000), DAMAGED),
    "metadata is a list": (".safetensors", lambda _: raw({"__metadata__": [1]} | entry(), bytes(4)), DAMAGED),
    "negative place": (".safetensors", lambda _: raw(entry(data_offsets=[-4, 0]), bytes(4)), DAMAGED),
    "negative shape": (".safetensors", lambda _: raw(entry(shape=[-1]), bytes(4)), DAMAGED),
    "a web page": (".safetensors", lambda _: b"<!DOCTYPE html><html>Not found", DAMAGED),
    "a pickle by another name": (".safetensors", pickled, DAMAGED),
    "empty pickle": (".pt", lambda _: b"", "f.pt", UNREADABLE),
    "a text": (".pt", lambda _: b"hello", UNREADABLE),
    "pickle cut short": (".ckpt", lambda good: pickled(good)[:-1000], UNREADABLE),
    "pickle that runs code": (".ckpt", lambda good: pickled(good | {"x": Payload()}), EVIL, "could run code; convert"),
    "old pickle that runs code": (
        ".pt",
        lambda _: pickle.dumps(Payload()),
        "could run code; convert it to .safetensors",
    ),
    "pickle of a list": (".pt", lambda _: pickled([1, 2]), "f.pt holds no weights"),
    "pickle of numbers": (".pt", lambda _: pickled({1: torch.zeros(1)}), "f.pt holds no weights"),
}


@pytest.fixture(scope="session")
def adapters(model_store):
    """Return family name -> tensors of an adapter of rank 4."""
    from networks.lora import create_network

    def make(family):
        models = model_store(family)[0]
        network = create_network(1.0, 4, 1.0, None, models["text_encoder"], models["unet"])
        return {name: tensor.clone() for name, tensor in network.state_dict().items()}

    return {family: make(family) for family in ("sd1", "sd2")}


UP = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight"
ADAPTERS = {
    "holds nothing": (".safetensors", lambda _: {}, "f.safetensors holds no weights"),
    "nothing but metadata": (".safetensors", lambda _: raw({"__metadata__": {"a": "b"}}), "holds no weights"),
    "another type": (".safetensors", lambda _: raw(entry(dtype="Q3"), bytes(4)), "has the type Q3, which is not read"),
    "another size": (".safetensors", lambda _: raw(entry(shape=[2]), bytes(4)), "has 4 bytes, its shape needs 8"),
    "vast size": (".safetensors", lambda _: raw(entry(shape=[10**12]), bytes(4)), "has 4 bytes, its shape needs 40000"),
    "more than it tells": (
        ".safetensors",
        lambda good: save(good) + bytes(9),
        "f.safetensors is damaged: 9 bytes follow its last tensor",
    ),
    "no ending": ("", save, "f must be a .safetensors, .ckpt or .pt file: the ending tells"),
    "NaN": (
        ".safetensors",
        lambda good: good | {UP: good[UP] * torch.nan},
        f"f.safetensors: {UP} holds NaN",
        "another copy",
    ),
    "one infinity": (
        ".pt",
        lambda good: good | {UP: good[UP].index_fill(0, torch.tensor(3), torch.inf)},
        f"{UP} holds",
    ),
    "NaN in 8 bits": (
        ".safetensors",
        lambda good: good | {UP: (good[UP] * torch.nan).to(torch.float8_e4m3fn)},
        f"{UP} holds NaN or infinity",
    ),
}
OTHERS = {
    "no adapter": (lambda _: {"a.b": torch.zeros(1)}, "f.safetensors: none of ", "1 modules", "(such as a)"),
    "another family": (lambda all_: all_["sd2"], "f.safetensors: lora_", "the file is for another model or has other"),
    "another shape": (lambda all_: all_["sd1"] | {UP: torch.zeros(3, 4)}, f"f.safetensors: {UP} has the shape (3, 4)"),
}


def as_file(path, content):
    """Write bytes, or tensors as the suffix says."""
    if not isinstance(content, bytes):
        content = save(content) if path.suffix == ".safetensors" else pickled(content)
    return write(path, content)


@rows(DAMAGED_FILES | ADAPTERS)
def test_adapters_to_start_from(refused, tmp_path, adapters, case):
    suffix, change, *fragments = case
    refused({"network_weights": as_file(tmp_path / f"f{suffix}", change(adapters["sd1"]))}, *fragments)


@pytest.mark.parametrize("name", ["empty", "data cut short", "pickle that runs code", "holds nothing", "NaN"])
def test_adapters_to_merge(refused, tmp_path, adapters, name):
    suffix, change, *fragments = (DAMAGED_FILES | ADAPTERS)[name]
    sound = as_file(tmp_path / "sound.safetensors", adapters["sd1"])
    refused({"base_weights": [sound, as_file(tmp_path / f"f{suffix}", change(adapters["sd1"]))]}, *fragments)


@pytest.mark.parametrize("option", ["network_weights", "base_weights"])
@rows(OTHERS)
def test_adapters_for_something_else(refused, tmp_path, adapters, option, case):
    change, *fragments = case
    path = as_file(tmp_path / "f.safetensors", change(adapters))
    refused({option: [path] if option == "base_weights" else path}, *fragments, loads=True)


@pytest.fixture(scope="session")
def checkpoint(model_store):
    """Return the tensors of a tiny checkpoint."""
    return tiny.original_state(model_store("sd1")[0], "sd1")


@pytest.fixture(scope="session")
def small(checkpoint):
    """Return a few tensors of a checkpoint, for files that are damaged as files."""
    return {name: checkpoint[name] for name in list(checkpoint)[:5]}


TO_Q = f"{keys.UNET_PREFIX}input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
STEM = f"{keys.UNET_PREFIX}input_blocks.0.0.weight"
FEED = f"{keys.UNET_PREFIX}input_blocks.1.1.transformer_blocks.0.ff.net.0.proj.weight"
TEXT = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
NORM = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
CONV_IN = "encoder.conv_in.weight"
VAE = keys.VAE_PREFIX + CONV_IN


def without(*prefixes):
    return lambda state: {name: tensor for name, tensor in state.items() if not name.startswith(prefixes)}


def changed(name, change):
    return lambda state: state | {name: change(state[name])}


def poisoned(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[tensor.numel() // 2] = torch.nan
    return tensor


CHECKPOINTS = {
    "SDXL": (
        lambda _: {"conditioner.embedders.0.x": torch.zeros(1)},
        "is an SDXL model; this version trains SD 1.x and",
    ),
    "another architecture": (
        lambda _: {"double_blocks.0.x": torch.zeros(1)},
        "is no Stable Diffusion",
        "double_blocks",
    ),
    "nothing": (lambda _: {}, "is no Stable Diffusion", "its first is none"),
    "an inpainting model": (
        changed(STEM, lambda stem: torch.zeros(len(stem), 9, 3, 3)),
        "is an inpainting model: its U-Net takes 9 channels, and only those that take 4 are trained",
    ),
}
INCOMPLETE_CHECKPOINTS = {
    "no U-Net": (without(keys.UNET_PREFIX), "holds no whole U-Net: model.diffusion_model.input_blocks", "is missing"),
    "no text encoder": (
        without("cond_stage_model."),
        "holds no text encoder (nothing under cond_stage",
        "name a whole",
    ),
    "no VAE": (without(keys.VAE_PREFIX), "holds no VAE: name one with --vae"),
    "one tensor less": (without(TO_Q), "1 tensors of the UNet2DConditionModel are missing (such as", TO_Q),
    "one tensor less of the text": (without(TEXT), f"holds no whole text encoder: {TEXT} is missing"),
    "wrong shape": (changed(TO_Q, lambda _: torch.zeros(3, 5)), f"{TO_Q} has the shape (3, 5), (32, 32) is needed"),
    "turned": (changed(FEED, lambda t: t.t().contiguous()), f"{FEED} has the shape (32, 256), (256, 32) is needed"),
    "one number for a matrix": (changed(STEM, lambda _: torch.zeros(())), "describes no U-Net that can be built"),
    "odd width": (
        changed(f"{keys.UNET_PREFIX}input_blocks.1.0.out_layers.3.weight", lambda _: torch.zeros(33, 3, 3, 3)),
        "describes no U-Net that can be built: num_channels (33) must be divisible",
    ),
    "another type": (
        changed(TO_Q, lambda t: t.to(torch.complex64)),
        f"{TO_Q} has the type C64, which is not read here",
    ),
    "NaN in the U-Net": (changed(TO_Q, poisoned), f"{TO_Q} holds NaN or infinity", "take another copy"),
    "NaN in the text encoder": (changed(NORM, poisoned), f"{NORM} holds NaN or infinity"),
    "NaN in the VAE": (changed(VAE, poisoned), f"{VAE} holds NaN or infinity"),
}
VAES = {
    "a U-Net": (lambda state: {TO_Q: state[TO_Q]}, False, "--vae: ", "holds no VAE; name a file or a Diffusers folder"),
    "one tensor less": (without(CONV_IN), True, "1 tensors of the AutoencoderKL are missing (such as", CONV_IN),
    "wrong shape": (changed(CONV_IN, lambda _: torch.zeros(3, 5)), True, f"{CONV_IN} has the shape (3, 5)"),
    "NaN": (changed(CONV_IN, poisoned), True, f"v.safetensors: {CONV_IN} holds NaN or infinity"),
    "a part in Diffusers names": (
        lambda _: {"encoder.down_blocks.0.resnets.0.conv1.weight": torch.zeros(32, 32, 3, 3)},
        True,
        "holds no whole VAE: encoder.down.0.block.0.conv2.weight is missing",
    ),
}


@rows(DAMAGED_FILES)
@pytest.mark.parametrize("option", ["base", "vae"])
def test_models_that_are_damaged(refused, tmp_path, small, option, case):
    suffix, change, *fragments = case
    refused({option: as_file(tmp_path / f"f{suffix}", change(small))}, *fragments)


@rows(CHECKPOINTS)
def test_checkpoints_of_another_kind(refused, tmp_path, checkpoint, case):
    change, *fragments = case
    refused({"base": as_file(tmp_path / "m.safetensors", change(checkpoint))}, "m.safetensors ", *fragments)


@rows(INCOMPLETE_CHECKPOINTS)
def test_checkpoints_that_are_not_whole(refused, tmp_path, checkpoint, case):
    change, *fragments = case
    refused({"base": as_file(tmp_path / "m.safetensors", change(checkpoint))}, "m.safetensors", *fragments, loads=True)


def test_nan_in_a_pickled_checkpoint(refused, tmp_path, checkpoint):
    path = as_file(tmp_path / "m.ckpt", changed(TO_Q, poisoned)(checkpoint))
    refused({"base": path}, f"m.ckpt: {TO_Q} holds NaN or infinity", loads=True)


def test_a_flag_that_contradicts_the_checkpoint(refused, model_store):
    refused({"v2": True}, "--v2 was given, but ", "is an SD 1.x model: leave out --v2")


@rows(VAES)
def test_vaes_that_are_none(refused, tmp_path, checkpoint, case):
    change, loads, *fragments = case
    bare = {name.removeprefix(keys.VAE_PREFIX): tensor for name, tensor in checkpoint.items()}
    refused({"vae": as_file(tmp_path / "v.safetensors", change(bare))}, *fragments, loads=loads)


def test_a_folder_that_holds_no_vae(refused):
    refused({"vae": "train"}, "train is no Diffusers folder: vae/config.json is missing")


UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
# What changes in a Diffusers folder: a part to remove (None), or a file to write. Then whether the model is loaded.
FOLDERS = {
    "no U-Net": ("unet", None, False, "is no Diffusers folder: unet/config.json is missing"),
    "no text encoder": ("text_encoder", None, False, "is no Diffusers folder: text_encoder/config.json is missing"),
    "no VAE": ("vae", None, True, "is no Diffusers folder: vae/config.json is missing"),
    "no weights": (UNET_FILE, None, True, "holds no weights: a .safetensors or .bin file is missing"),
    "empty weights": (UNET_FILE, "", True, "diffusion_pytorch_model.safetensors", DAMAGED),
    "damaged configuration": ("unet/config.json", "{", False, "config.json is not valid JSON: Expecting property name"),
    "configuration is a list": ("text_encoder/config.json", "[1]", False, "config.json must hold an object, got [1]"),
    "damaged scheduler": ("scheduler/scheduler_config.json", "x", False, "scheduler_config.json is not valid JSON"),
    "an inpainting model": (
        "unet/config.json",
        '{"in_channels": 9}',
        False,
        "is an inpainting model: its U-Net takes 9",
    ),
    "unbuildable U-Net": ("unet/config.json", '{"block_out_channels": 3}', True, "describes no unet that can be built"),
    "unbuildable text encoder": (
        "text_encoder/config.json",
        '{"hidden_size": "wide"}',
        True,
        "config.json describes no text_encoder that can be built",
        "wide",
    ),
    "another VAE": ("vae/config.json", "{}", True, "has the shape (32,), (64,) is needed"),
    "shards without a map": (f"{UNET_FILE}.index.json", "{}", True, 'index.json has no "weight_map" of tensors'),
    "an absent shard": (f"{UNET_FILE}.index.json", '{"weight_map": {"a": "b.safetensors"}}', True, "does not exist"),
    "damaged tokenizer": ("tokenizer/tokenizer.json", "{}", True, "tokenizer in ", "cannot be read"),
    "SDXL": ("text_encoder_2/config.json", "{}", False, "is an SDXL model; this version trains SD 1.x and SD 2.x"),
}


@rows(FOLDERS)
def test_folders_that_are_no_model(refused, tmp_path, model_store, case):
    part, content, loads, *fragments = case
    folder = tmp_path / "model"
    shutil.copytree(model_store("sd1")[1]["folder"], folder)
    if content is not None:
        write(folder / part, content)
    elif (folder / part).is_dir():
        shutil.rmtree(folder / part)
    else:
        (folder / part).unlink()
    refused({"base": folder}, *fragments, loads=loads)


# ---- states -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def state(model_store, tmp_path_factory):
    """Return the folder of a state after one step."""
    root = tmp_path_factory.mktemp("state")
    (root / "train" / "1_x").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(root / "train" / "1_x" / "0.png")
    train(model_store("sd1")[1]["safetensors"], root / "train", root, max_train_steps=1, save_state=True)
    return root / "x-state"


def position(**more):
    def change(folder):
        path = folder / "train_state.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | more), encoding="utf-8")

    return change


def tensors(change):
    def rewrite(folder):
        content = torch.load(folder / "state.pt", weights_only=True)
        torch.save(change(content), folder / "state.pt")

    return rewrite


def one_bit(folder):
    content = bytearray((folder / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "state.pt").write_bytes(content)


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-20])


POSITION_DAMAGED, TENSORS_DAMAGED = "train_state.json is damaged (", "state.pt is damaged ("
STATES = {
    "missing": (shutil.rmtree, {}, "--resume: state is no state of this suite: it has no train_state.json"),
    "another folder": (cut("options.toml"), {"resume": "train"}, "--resume: train is no state of this suite"),
    "without position": (lambda f: (f / "train_state.json").unlink(), {}, "it has no train_state.json or no state.pt"),
    "without tensors": (lambda f: (f / "state.pt").unlink(), {}, "it has no train_state.json or no state.pt"),
    "position cut short": (cut("train_state.json"), {}, POSITION_DAMAGED, "take another state"),
    "position is a number": (lambda f: write(f / "train_state.json", "3"), {}, POSITION_DAMAGED),
    "position not UTF-8": (lambda f: write(f / "train_state.json", b'{"\xe9": 1}'), {}, POSITION_DAMAGED, "0xe9"),
    "step is a text": (position(current_step="a"), {}, POSITION_DAMAGED, "current_step is 'a'"),
    "step is negative": (position(current_step=-5), {}, POSITION_DAMAGED, "current_step is -5"),
    "no seed": (position(seed=None), {}, POSITION_DAMAGED, "seed is None"),
    "losses are a text": (position(losses="abc"), {}, POSITION_DAMAGED, "'a'"),
    "of another version": (position(version=9), {}, "was written by another version of the suite"),
    "tensors are empty": (lambda f: write(f / "state.pt", b""), {}, TENSORS_DAMAGED, "take another state"),
    "tensors cut short": (cut("state.pt"), {}, TENSORS_DAMAGED),
    "one bit turned": (one_bit, {}, TENSORS_DAMAGED, "checksum"),
}
UNFIT = "--resume: the state does not fit this run ("
UNFIT_STATES = {
    "of a finished run": (
        position(current_step=9),
        {},
        "nothing is left to train: 9 steps are made, and 3 are asked for",
    ),
    "pickle that runs code": (tensors(lambda t: t | {"x": Payload()}), {}, "state.pt is refused", "could run code"),
    "tensors are a list": (tensors(lambda _: [1]), {}, UNFIT, "use the options it has"),
    "of another network": (tensors(dict), {"network_dim": 8}, UNFIT, "lora_down.weight has the shape (4, "),
    "of another optimizer": (tensors(dict), {"optimizer_type": "SGD"}, UNFIT, "its optimizer is AdamW, this one SGD"),
    "of another part": (tensors(dict), {"network_train_unet_only": True}, UNFIT, "Unexpected key"),
}


@pytest.mark.parametrize("name", [*STATES, *UNFIT_STATES])
def test_states(refused, tmp_path, monkeypatch, state, name):
    change, more, *fragments = (STATES | UNFIT_STATES)[name]
    shutil.copytree(state, tmp_path / "state")
    change(tmp_path / "state")
    refused({"resume": "state", "network_dim": 4, **more}, *fragments, loads=name in UNFIT_STATES)


def test_of_several_states_a_damaged_one_is_passed_over(state, tmp_path, caplog):
    from library.config.saving import SavingConfig
    from library.training.run.state import find_state

    for step in (3, 4):
        shutil.copytree(state, tmp_path / f"x-step{step:08d}-state")
        position(current_step=step)(tmp_path / f"x-step{step:08d}-state")
    one_bit(tmp_path / "x-step00000004-state")
    assert find_state("auto", SavingConfig(output_dir=tmp_path, output_name="x")).name == "x-step00000003-state"
    assert "x-step00000004-state" in caplog.text


# ---- pictures, masks, captions, folders ---------------------------------------------------------------------


def png_of(width, height):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = {
    "cut short": (lambda good: good[:2000], "0.png: image file is truncated"),
    "cut in the header": (lambda good: good[:20], "0.png: "),
    "one byte changed": (lambda good: good[:300] + bytes([good[300] ^ 255]) + good[301:], "0.png: broken data stream"),
    "no bytes": (lambda _: b"", "0.png: the file is empty"),
    "a text": (lambda _: b"a dog", "0.png: not a picture that can be read"),
    "a web page": (lambda _: b"<!DOCTYPE html>", "0.png: not a picture that can be read"),
    "1 x 1": (lambda _: png_of(1, 1), "1 pictures have a side of less than 8 pixels; remove them:", "0.png: 1x1"),
    "30000 x 10": (lambda _: png_of(30000, 10), "1 pictures are too long and narrow; crop or remove them:", "30000x10"),
    "10 x 30000": (lambda _: png_of(10, 30000), "1 pictures are too long and narrow; crop or remove them:", "10x30000"),
    "no pixels": (
        lambda _: b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBBI", 13, b"IHDR", 0, 0, 8, 2, 0, 0, 0, 0),
        "0.png: not a picture",
    ),
}
MASKS = {
    "absent folder": (shutil.rmtree, "conditioning_data_dir masks is not a folder"),
    "absent mask": (lambda f: (f / "0.png").unlink(), "masks: 1 of 4 pictures have no mask of their name: 0.png"),
    "cut short": (
        lambda f: write(f / "0.png", (f / "0.png").read_bytes()[:2000]),
        "1 of 8 pictures cannot",
        "masks/0.png",
    ),
    "no bytes": (lambda f: write(f / "0.png", b""), "1 of 8 pictures cannot be read", "masks/0.png: the file is empty"),
    "a text": (lambda f: write(f / "0.png", b"white"), "masks/0.png: not a picture that can be read"),
    "another shape": (lambda f: write(f / "0.png", png_of(64, 128)), "1 masks have another aspect ratio", "64x128"),
}
CAPTIONS = {
    "Latin-1": ("é".encode("latin-1"), "0.txt is not UTF-8 text (unexpected end of data at byte 0): save it as UTF-8"),
    "UTF-16": ("a dog".encode("utf-16"), "0.txt is not UTF-8 text (invalid start byte at byte 0): save it as UTF-8"),
    "binary": (bytes(range(256)), "0.txt is not UTF-8 text (invalid start byte at byte 128)"),
}
TRAINING_FOLDERS = {
    "absent": (lambda f: shutil.rmtree(f.parent), "--train_data_dir: ", "train does not exist"),
    "empty": (shutil.rmtree, "no subset to train on in ", "(sub-folders are named like 10_name)"),
    "without a number": (lambda f: f.rename(f.parent / "dog"), "(sub-folders are named like 10_name)"),
    "repeated never": (lambda f: f.rename(f.parent / "0_dog"), "num_repeats of 1 or more"),
    "repeated for ever": (
        lambda f: f.rename(f.parent / f"{10**12}_dog"),
        "_dog: num_repeats must be at most 1000000, got 1000000000000",
    ),
    "without pictures": (lambda f: [path.unlink() for path in f.glob("*.png")], "no pictures (.png, .jpg", "1_sks dog"),
    "a file": (lambda f: (shutil.rmtree(f.parent), write(f.parent, "")), "is a file; name the folder above the N_name"),
}


@rows(PICTURES)
def test_pictures(refused, pictures, case):
    change, *fragments = case
    path = pictures / "1_sks dog" / "0.png"
    path.write_bytes(change(path.read_bytes()))
    refused({}, *fragments)


def test_a_picture_that_is_found_out_as_it_is_encoded(refused, pictures):
    path = pictures / "1_sks dog" / "0.png"
    path.write_bytes(path.read_bytes()[:2000])
    refused({"cache_latents": True}, "1 of 4 pictures cannot be read; mend or remove them:", "0.png: ", loads=True)


def test_all_pictures_that_cannot_be_read_are_told(refused, pictures):
    for name in "012":
        (pictures / "1_sks dog" / f"{name}.png").write_bytes(b"")
    assert refused({}, "3 of 4 pictures cannot be read").count("the file is empty") == 3


@rows(MASKS)
def test_masks(refused, pictures, tmp_path, case):
    change, *fragments = case
    folder = tmp_path / "masks"
    folder.mkdir()
    for path in (pictures / "1_sks dog").glob("*.png"):
        shutil.copy(path, folder)
    change(folder)
    refused({"masked_loss": True, "conditioning_data_dir": "masks"}, *fragments)


def test_masked_loss_without_masks(refused):
    refused({"masked_loss": True}, "--masked_loss needs masks: conditioning_data_dir of a subset, or --alpha_mask")


@rows(CAPTIONS)
def test_captions(refused, pictures, case):
    content, *fragments = case
    (pictures / "1_sks dog" / "0.txt").write_bytes(content)
    refused({}, *fragments)


@rows(TRAINING_FOLDERS)
def test_folders_of_pictures(refused, pictures, case):
    change, *fragments = case
    change(pictures / "1_sks dog")
    refused({}, *fragments)


@pytest.mark.parametrize("folder", ["train", "train/1_sks dog"])
@needs_permissions
def test_folders_that_cannot_be_read(refused, tmp_path, monkeypatch, folder):
    monkeypatch.setattr(sys.modules[__name__], "contents", lambda _: None)
    (tmp_path / folder).chmod(0o000)
    try:
        refused({}, f"{folder} cannot be read (Permission denied); mend its permissions")
    finally:
        (tmp_path / folder).chmod(0o700)


# ---- where to write -----------------------------------------------------------------------------------------

OUTPUT = {
    "a file": ({"output_dir": "train/1_sks dog/0.png"}, "--output_dir: train/1_sks dog/0.png is a file, not a folder"),
    "in a file": (
        {"output_dir": "train/1_sks dog/0.png/out"},
        "--output_dir: nothing can be written to ",
        "another folder",
    ),
    "too long": ({"output_dir": "a" * 300}, "--output_dir: nothing can be written to aaa", "File name too long"),
    "name too long": ({"output_name": "a" * 300}, "--output_name: no file can have the name 'aaa", "take another"),
    "name of a folder": (
        {"output_name": "../train"},
        "--output_name: ",
        "train.safetensors",
        "is a folder; take another",
    ),
    "logs in a file": (
        {"logging_dir": "train/1_sks dog/0.png"},
        "--logging_dir: nothing can be written to train/1_sks dog/0.png",
        "name another folder",
    ),
    "config in a file": (
        {"output_config": True, "config_file": "train/1_sks dog/0.png/c.toml"},
        "--output_config: train/1_sks dog/0.png/c.toml cannot be written",
    ),
    "config that is there": ({"output_config": True, "config_file": "train/c"}, "does not overwrite train/c.toml"),
}


@rows(OUTPUT)
def test_places_where_nothing_can_be_written(refused, pictures, case):
    given, *fragments = case
    (pictures.parent / "train.safetensors").mkdir()
    write(pictures / "c.toml", "")
    refused(dict(given), *fragments)


@needs_permissions
def test_an_output_folder_without_permission(refused, tmp_path):
    (tmp_path / "out").chmod(0o500)
    try:
        refused({}, "--output_dir: nothing can be written to ", "(Permission denied); name another folder")
    finally:
        (tmp_path / "out").chmod(0o700)


# ---- as a process -------------------------------------------------------------------------------------------


def test_a_process_ends_with_code_2_and_lines_without_a_traceback(base, pictures, tmp_path):
    evil = write(tmp_path / "evil.pt", pickled({"x": Payload()}))
    cases = {
        "must be a finite number, got inf": {"learning_rate": "inf"},
        "could run code": {"network_weights": evil},
    }
    for fragment, more in cases.items():
        done = subprocess.run(
            [sys.executable, str(ROOT / "train_network.py"), *options(base, pictures, tmp_path / "out", **more)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2, done.stderr
        (line,) = [line for line in done.stderr.splitlines() if "error: " in line]
        assert line.startswith("train_network.py: error: ")
        assert fragment in line
        assert "Traceback" not in done.stderr
        assert done.stdout == ""
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_too_little_memory_is_told(monkeypatch, capsys):
    monkeypatch.setattr(logs, "set_up_logging", lambda: None)
    monkeypatch.setattr(sys, "argv", ["train_network.py"])

    def greedy(_):
        torch.empty(2**60)

    with pytest.raises(SystemExit) as ended:
        logs.run_script(greedy)
    assert ended.value.code == logs.FAILURE
    assert "this machine has too little memory" in capsys.readouterr().err
