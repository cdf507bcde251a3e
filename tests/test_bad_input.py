"""Bad options, optimizers and schedules: exit code 2, a few lines with what is wrong and what to do, nothing touched.

Each case is a row of a table; what holds for all of them is in `refusals.Refused`.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
import torch
from refusals import Payload, pickled, rows, write
from runs import options
from scripts import ROOT, python

import gen_img_diffusers
import train_network
from library import logs
from library.config import tool_files
from library.config.generation import GenerateConfig
from library.config.options import root_options
from library.config.train import TrainConfig
from library.errors import is_out_of_memory
from tools import cache_latents, dylora_report, merge_models

# ---- the command line ---------------------------------------------------------------------------------------

WORDS = {
    "nothing at all": ([], "--pretrained_model_name_or_path is missing", "--network_module is missing: networks.lora"),
    "unknown option": (["--lerning_rate", "1"], "--lerning_rate is not known; did you mean learning_rate?"),
    "half a name": (["--save_every", "1"], "--save_every is not known; it could be --save_every_n_epochs"),
    "two values": (["--output_name", "my", "model"], "unexpected argument 'model': put it after its option"),
    "no value": (["--seed"], "--seed: expected one argument"),
    "retired": (["--deepspeed"], "--deepspeed is not available: an adapter over a frozen base needs no sharding"),
    "rate of one encoder": (
        ["--text_encoder_lr1=1e-5"],
        "--text_encoder_lr1 is not available: the rates of both text encoders are one option",
        "--text_encoder_lr 1e-5 1e-5",
    ),
    "rates of blocks": (["--block_lr", "1,1"], "rates by block are --network_args down_lr_weight="),
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
    "network argument is NaN": (
        {"network_args": ["conv_alpha=nan"]},
        "conv_alpha must be a finite number",
        "got 'nan'",
    ),
    "network argument": (
        {"network_args": ["conv_dim=a"]},
        "network_args: conv_dim must be a whole number of at least 1, got 'a'",
    ),
    "thumbnail": ({"metadata_thumbnail": "absent.png"}, "--metadata_thumbnail: absent.png cannot be read"),
    "log file": ({"console_log_file": "train"}, "--console_log_file: train cannot be written (Is a directory)"),
    "tracker": ({"log_with": "tensorboard"}, "--log_with tensorboard needs --logging_dir"),
    "repository": ({"huggingface_repo_id": "name"}, "--huggingface_repo_id must be USER/NAME, got 'name'"),
    "text cache": (
        {"cache_text_encoder_outputs": True},
        "outputs needs --network_train_unet_only: the outputs of text",
    ),
    "text cache on disk": (
        {"cache_text_encoder_outputs_to_disk": True, "unet_lr": 1e-4},
        "--cache_text_encoder_outputs needs --network_train_unet_only",
    ),
    "steps of SDXL": ({"bucket_reso_steps": 32}, "--bucket_reso_steps must be a multiple of 64 for SD 1.x, got 32"),
    "tokenizer": ({"tokenizer_cache_dir": "train"}, "--tokenizer_cache_dir: train has no vocab.json or tokenizer"),
}
AFTER_LOADING = ("step beyond the end", "layers beyond", "tokenizer")


TWENTY_FIVE = ",".join("4" for _ in range(25))
OPTIONS_OF_SDXL = {
    "steps": ({"bucket_reso_steps": 48}, "--bucket_reso_steps must be a multiple of 32, got 48"),
    "small steps": ({"bucket_reso_steps": 16}, "--bucket_reso_steps must be at least 32, got 16"),
    "no rate": (
        {"network_train_text_encoder_only": True, "text_encoder_lr": [0, 0]},
        "nothing is trained: the learning rate of what is left is 0",
    ),
    "text cache for one encoder": (
        {"cache_text_encoder_outputs": True, "text_encoder_lr": [0, "1e-5"]},
        "--cache_text_encoder_outputs needs --network_train_unet_only",
    ),
    "blocks of SD 1.x": ({"network_args": [f"block_dims={TWENTY_FIVE}"]}, "block_dims must be", "23 for SDXL"),
}


@rows(WORDS)
def test_words_of_the_command_line(refused, case):
    refused(*case)


@pytest.mark.parametrize("name", OPTIONS)
def test_values_of_options(refused, name):
    given, *fragments = OPTIONS[name]
    refused(given, *fragments, loads=name in AFTER_LOADING)


@pytest.mark.parametrize("base", ["sdxl"], indirect=True)
@pytest.mark.parametrize("name", OPTIONS_OF_SDXL)
def test_values_of_options_for_sdxl(refused, name):
    given, *fragments = OPTIONS_OF_SDXL[name]
    refused(given, *fragments, loads=name.startswith("blocks"))


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
    "no such class": ("AdamQ", (), "got 'AdamQ'; did you mean AdamW?"),
    "no such package": ("nowhere.Adam", (), "--optimizer_type nowhere.Adam: No module named 'nowhere'; try `pip"),
    "package is broken": ("broken.Adam", (), "--optimizer_type broken.Adam cannot be imported: no driver"),
    "package is no Python": ("wrong.Adam", (), "--optimizer_type wrong.Adam cannot be imported", "wrong.py, line 1"),
    "no optimizer": ("package.Plain", (), "--optimizer_args: Plain refuses them"),
    "refuses": ("package.Picky", (), "--optimizer_args: Picky refuses them: gamma must be set"),
    "fails": ("package.Fails", (), "--optimizer_type Fails does not work here: KeyError: 'momentum_buffer'"),
    "needs more": ("LBFGS", (), "--optimizer_type LBFGS does not work here", "closure"),
    "unknown argument": ("AdamW", ("foo=1",), "--optimizer_args: AdamW has no foo"),
    "value out of range": ("AdamW", ("betas=(2,3)",), "--optimizer_args betas=(2, 3) is refused: ", "Invalid beta"),
    "too few values": (
        "AdamW",
        ("betas=(0.9,)",),
        "--optimizer_args: betas of AdamW must be 2 values as in (0.9, 0.999), got (0.9,)",
    ),
    "code": ("AdamW", ("betas=__import__('os').mkdir('ran')",), "betas must be a number", "__import__"),
    "brackets": ("AdamW", ("betas=" + "(" * 500,), "--optimizer_args: betas must be a number, True", "got '((("),
}
SCHEDULES = {
    "no such class": ("Cosine", (), "--lr_scheduler_type: torch.optim.lr_scheduler has no class Cosine; did you mean"),
    "package is broken": ("broken.X", (), "--lr_scheduler_type broken.X cannot be imported: no driver"),
    "fails": ("package.Schedule", (), "--lr_scheduler_args: package.Schedule refuses them: IndexError: no rate"),
    "missing argument": ("StepLR", (), "--lr_scheduler_args: StepLR refuses them", "step_size"),
    "unknown argument": ("StepLR", ("size=1",), "--lr_scheduler_args: StepLR has no size; did you mean step_size?"),
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


# ---- as a process -------------------------------------------------------------------------------------------


def test_a_process_ends_with_code_2_and_lines_without_a_traceback(base, pictures, tmp_path):
    evil = write(tmp_path / "evil.pt", pickled({"x": Payload()}))
    cases: dict[str, dict[str, Any]] = {
        "must be a finite number, got inf": {"learning_rate": "inf"},
        "could run code": {"network_weights": evil},
    }
    for fragment, more in cases.items():
        argv = options(base, pictures, tmp_path / "out", **more)
        done = python(ROOT / "train_network.py", *argv, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        (line,) = [line for line in done.stderr.splitlines() if "error: " in line]
        assert line.startswith("train_network.py: error: ")
        assert fragment in line
        assert "Traceback" not in done.stderr
        assert done.stdout == ""
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


GPU_IS_FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
]
ADVICE = {
    train_network: "--gradient_checkpointing",
    gen_img_diffusers: "--offload",
    merge_models: "leave out --device",
    cache_latents: "--vae_batch_size",
    dylora_report: "--mixed_precision",
}


@pytest.mark.parametrize("error", GPU_IS_FULL, ids=lambda error: type(error).__name__)
def test_a_full_gpu_is_told_with_what_helps_in_the_script(monkeypatch, capsys, error):
    monkeypatch.setattr(logs, "set_up_logging", lambda: None)
    monkeypatch.setattr(sys, "argv", ["x.py"])

    def greedy(_):
        raise error

    for script, advice in ADVICE.items():
        less = getattr(script, "LESS_MEMORY", tool_files.LESS_MEMORY)
        with pytest.raises(SystemExit) as ended:
            logs.run_script(greedy, less)
        assert ended.value.code == logs.FAILURE
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("x.py: error: the GPU has too little memory (")
        assert advice in line


def test_the_advice_names_options_of_the_script():
    for script, root in ((train_network, TrainConfig), (gen_img_diffusers, GenerateConfig)):
        named = re.findall(r"--(\w+)", " ".join(script.LESS_MEMORY))
        assert len(named) > 4
        assert set(named) <= set(root_options(root))


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),  # on Windows
        (RuntimeError("size mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_other_errors_are_no_lack_of_memory(error, is_one):
    assert is_out_of_memory(error) is is_one


def test_too_little_memory_is_told(monkeypatch, capsys):
    monkeypatch.setattr(logs, "set_up_logging", lambda: None)
    monkeypatch.setattr(sys, "argv", ["train_network.py"])

    def greedy(_):
        torch.empty(2**60)

    with pytest.raises(SystemExit) as ended:
        logs.run_script(greedy)
    assert ended.value.code == logs.FAILURE
    assert "this machine has too little memory" in capsys.readouterr().err
