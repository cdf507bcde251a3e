"""Runs of SDXL as users post them, in a folder with a tiny model: what is accepted as it stands, and what is told.

The command lines and files are complete but for the model, the pictures and the output; --dry_run is added.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from refusals import write
from safetensors.torch import load_file, save_file
from tensors import metadata

import sdxl_train_network
import train_network
from library.errors import UserError

NOTEBOOK = """
[network_arguments]
network_module = "networks.lora"
network_dim = 8
network_alpha = 4
unet_lr = 3e-4
text_encoder_lr = 6e-5
[optimizer_arguments]
optimizer_type = "AdamW8bit"
optimizer_args = ["weight_decay=0.1", "betas=[0.9,0.99]"]
learning_rate = 3e-4
lr_scheduler = "cosine_with_restarts"
lr_scheduler_num_cycles = 3
lr_warmup_steps = 50
max_grad_norm = 1.0
[training_arguments]
pretrained_model_name_or_path = "models/sdxl.safetensors"
vae = "models/sdxl_vae.safetensors"
max_train_epochs = 10
train_batch_size = 4
gradient_accumulation_steps = 1
seed = 42
max_token_length = 225
sdpa = true
lowram = true
no_half_vae = true
gradient_checkpointing = true
mixed_precision = "fp16"
full_fp16 = true
cache_latents = true
cache_latents_to_disk = true
cache_text_encoder_outputs = false
prior_loss_weight = 1.0
loss_type = "l2"
min_timestep = 0
max_timestep = 1000
min_snr_gamma = 8.0
multires_noise_iterations = 6
multires_noise_discount = 0.3
max_data_loader_n_workers = 8
[saving_arguments]
save_precision = "fp16"
save_model_as = "safetensors"
save_every_n_epochs = 1
save_last_n_epochs = 10
output_dir = "output"
output_name = "character"
[dataset_arguments]
dataset_config = "dataset.toml"
"""
PICTURES = """
[general]
resolution = 1024
shuffle_caption = true
keep_tokens = 1
caption_extension = ".txt"
enable_bucket = true
bucket_reso_steps = 64
min_bucket_reso = 256
max_bucket_reso = 4096
[[datasets]]
[[datasets.subsets]]
flip_aug = false
num_repeats = 2
image_dir = "pictures"
"""
V_PREDICTION = NOTEBOOK.replace(
    "sdpa = true\n",
    "sdpa = true\nv_parameterization = true\nscale_v_pred_loss_like_noise_pred = true\nzero_terminal_snr = true\n",
)
TWELVE_GB = """
 --pretrained_model_name_or_path=models/sdxl.safetensors --train_data_dir=train
 --resolution=1024,1024 --enable_bucket --min_bucket_reso=256 --max_bucket_reso=2048 --output_dir=output --output_name=style
 --network_module=networks.lora --network_dim=32 --network_alpha=1 --learning_rate=0.0004 --unet_lr=0.0004
 --text_encoder_lr=0.0004 --lr_scheduler=constant --lr_scheduler_num_cycles=10 --optimizer_type=Adafactor
 --optimizer_args scale_parameter=False relative_step=False warmup_init=False --train_batch_size=1 --max_train_steps=1000
 --mixed_precision=bf16 --save_precision=bf16 --full_bf16 --no_half_vae --cache_latents --cache_latents_to_disk
 --gradient_checkpointing --xformers --max_data_loader_n_workers=0 --bucket_no_upscale --noise_offset=0.0
"""
STYLE = """
 --pretrained_model_name_or_path=models/sdxl.safetensors --train_data_dir=train --resolution=1024,1024
 --enable_bucket --bucket_no_upscale --min_bucket_reso=256 --max_bucket_reso=2048 --network_module=networks.lora --network_dim=16
 --network_alpha=8 --unet_lr=5e-4 --text_encoder_lr=1e-4 --optimizer_type=AdamW8bit --lr_scheduler=cosine_with_restarts
 --lr_scheduler_num_cycles=6 --lr_warmup_steps=162 --max_token_length=225 --train_batch_size=2 --mixed_precision=fp16 --no_half_vae
 --gradient_checkpointing --xformers --cache_latents --sample_every_n_epochs=1 --sample_sampler=euler_a --sample_prompts=prompts.txt
 --output_dir=output
"""
PRODIGY = """
pretrained_model_name_or_path = "models/sdxl.safetensors"
train_data_dir = "train"
output_dir = "output"
network_module = "networks.lora"
network_dim = 32
network_alpha = 16
learning_rate = 1.0
unet_lr = 1.0
text_encoder_lr = 1.0
optimizer_type = "Prodigy"
optimizer_args = ["weight_decay=0.01","decouple=True","d0=0.0001","use_bias_correction=True"]
lr_scheduler = "constant"
train_batch_size = 8
mixed_precision = "bf16"
scale_weight_norms = 5
min_snr_gamma = 5
resolution = "1024,1024"
enable_bucket = true
min_bucket_reso = 256
max_bucket_reso = 2048
bucket_reso_steps = 32
bucket_no_upscale = true
max_train_epochs = 160
max_train_steps = 1600
"""
OWN_RATE = """
pretrained_model_name_or_path = "models/sdxl.safetensors"
train_data_dir = "train"
output_dir = "output"
network_module = "networks.lora"
network_dim = 128
network_alpha = 128
optimizer_type = "Adafactor"
learning_rate = 1.0
lr_scheduler = "adafactor"
train_batch_size = 5
noise_offset = 0.0357
adaptive_noise_scale = 0.00357
scale_weight_norms = 1
resolution = "1024,1024"
enable_bucket = true
min_bucket_reso = 64
max_bucket_reso = 2048
bucket_reso_steps = 32
clip_skip = 1
"""
EIGHT_GB = """
 --pretrained_model_name_or_path=models/sdxl.safetensors --dataset_config=dataset.toml
 --network_module=networks.lora --network_dim=4 --network_train_unet_only --cache_text_encoder_outputs
 --cache_text_encoder_outputs_to_disk --cache_latents --cache_latents_to_disk --gradient_checkpointing --mixed_precision=bf16
 --no_half_vae --optimizer_type=AdamW8bit --learning_rate=1e-4 --train_batch_size=1 --output_dir=output
"""
GUIDE = NOTEBOOK.replace('optimizer_type = "AdamW8bit"', 'optimizer_type = "Prodigy"').replace(
    'optimizer_args = ["weight_decay=0.1", "betas=[0.9,0.99]"]', 'optimizer_args = ["d_coef=2"]'
)
GUIDE = re.sub(r"(learning_rate|unet_lr|text_encoder_lr) = \S+", r"\1 = 1.0", GUIDE).replace(
    "[saving_arguments]", "clip_skip = 2\ndebiased_estimation_loss = true\n[saving_arguments]"
)
GUIDE = GUIDE.replace("min_snr_gamma = 8.0\n", "").replace(
    '"cosine_with_restarts"\nlr_scheduler_num_cycles = 3', '"cosine"'
)
PAGE = """
 --pretrained_model_name_or_path=models/sdxl.safetensors --dataset_config=dataset.toml --output_dir=output
 --output_name=my_sdxl_lora --save_model_as=safetensors --network_module=networks.lora --network_dim=32 --network_alpha=16
 --learning_rate=1e-4 --unet_lr=1e-4 {rates} --optimizer_type=AdamW8bit --lr_scheduler=constant --max_train_epochs=10
 --save_every_n_epochs=1 --mixed_precision=bf16 --gradient_checkpointing --cache_text_encoder_outputs --cache_latents
"""
BLOCKS = [
    "block_dims=2,2,2,2,4,4,4,4,8,8,8,8,8,8,8,8,4,4,4,4,2,2,2",
    "down_lr_weight=0,0,0,0,0.5,0.5,0,1,1",
    "mid_lr_weight=1,1,1",
    "up_lr_weight=1,1,1,0.5,0.5,0.5,0,0,0",
]
ADAFACTOR = ["scale_parameter=False", "relative_step=False", "warmup_init=False"]
PRODIGY_ARGS = [
    "decouple=True",
    "weight_decay=0.01",
    "betas=[0.9,0.999]",
    "d_coef=2",
    "use_bias_correction=True",
    "safeguard_warmup=True",
]


@pytest.fixture
def folder(model_store, tmp_path, monkeypatch):
    """Return a folder, which is the current one, with what the commands name."""
    models, paths = model_store("sdxl")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "sdxl.safetensors").hardlink_to(paths["fp16"])
    vae = {name: tensor.half() for name, tensor in models["vae"].state_dict().items()}
    save_file(vae, tmp_path / "models" / "sdxl_vae.safetensors")
    rng = np.random.default_rng(0)
    for inner in ("pictures", "train/2_style"):
        (tmp_path / inner).mkdir(parents=True)
        for index, (width, height) in enumerate([(100, 150), (128, 128)]):
            pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / inner / f"{index}.png")
            for suffix in (".txt", ".caption"):
                write(tmp_path / inner / f"{index}{suffix}", f"a style, tag{index}, b, c")
    write(tmp_path / "prompts.txt", "a style --w 1024 --h 1024 --d 1\n")
    write(tmp_path / "dataset.toml", PICTURES)
    write(tmp_path / "c.toml", NOTEBOOK)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config_file(text, *more):
    """Return what writes a configuration file and returns the command line that reads it."""

    def prepared(folder):
        write(folder / "c.toml", text)
        return ["--config_file", "c.toml", *more]

    return prepared


def of_rate(rate):
    return [f"--{name}={rate}" for name in ("learning_rate", "unet_lr", "text_encoder_lr")]


def line(text, *more):
    return lambda folder: [*shlex.split(text), *more]


LOWRAM = "c.toml: lowram is ignored: "
RANGE = "--max_bucket_reso 2048 has no effect with --bucket_no_upscale"
EPOCHS = "--max_train_steps 1600 is not used: --max_train_epochs 160 wins over it"
COUPLED = "estimates one step size for all parts"
# Name -> (command line, beginnings of what is warned of).
ACCEPTED = {
    "R1": (config_file(NOTEBOOK), [LOWRAM]),
    "R1 with convolutions": (
        config_file(NOTEBOOK, "--network_dim=16", "--network_args", "conv_dim=16", "conv_alpha=8"),
        [LOWRAM],
    ),
    "R1 with Prodigy": (
        config_file(NOTEBOOK, "--optimizer_type=Prodigy", *of_rate(0.75), "--optimizer_args", *PRODIGY_ARGS),
        [LOWRAM],
    ),
    "R1 with AdaFactor": (
        config_file(NOTEBOOK, "--optimizer_type=AdaFactor", "--ip_noise_gamma=0.05", "--optimizer_args", *ADAFACTOR),
        [LOWRAM],
    ),
    "R1 with shuffled captions and the text cache": (
        config_file(NOTEBOOK, "--network_train_unet_only", "--cache_text_encoder_outputs"),
        [LOWRAM, "--text_encoder_lr 6e-05 has no effect with --network_train_unet_only"],
    ),
    "R2": (config_file(V_PREDICTION), [LOWRAM]),
    "R3": (line(TWELVE_GB), ["--lr_scheduler_num_cycles 10 has no effect without ", RANGE]),
    "R4": (line(STYLE), [RANGE]),
    "R5": (config_file(PRODIGY), [EPOCHS, RANGE]),
    "R5 with betas": (config_file(PRODIGY, "--optimizer_args", "weight_decay=0.01", "betas=0.9,0.99"), [EPOCHS, RANGE]),
    "R5 of the U-Net": (
        config_file(
            PRODIGY,
            *("--network_dim=256", "--network_alpha=256", "--keep_tokens=2", "--shuffle_caption"),
            *("--max_token_length=225", "--network_train_unet_only", "--noise_offset=0.0357"),
        ),
        [EPOCHS, "--text_encoder_lr 1 has no effect with --network_train_unet_only", RANGE],
    ),
    "R5 with noise in several resolutions": (
        config_file(PRODIGY, "--multires_noise_iterations=8", "--multires_noise_discount=0.2"),
        [EPOCHS, RANGE],
    ),
    "R6": (config_file(OWN_RATE), []),
    "R6 of a face": (
        config_file(
            OWN_RATE,
            *("--optimizer_type=AdamW8bit", "--learning_rate=1e-4", "--lr_scheduler=constant"),
            *("--network_dim=92", "--network_alpha=46"),
        ),
        [],
    ),
    "R7": (line(EIGHT_GB), []),
    "R7 with Adafactor in 8 bits": (line(EIGHT_GB, "--optimizer_type=Adafactor", "--fp8_base"), []),
    "R8": (config_file(GUIDE), [LOWRAM]),
    "R8 with AdamW": (
        config_file(NOTEBOOK, "--unet_lr=3e-4", "--text_encoder_lr=3e-5", "--network_dim=32"),
        [LOWRAM],
    ),
    "R10": (line(PAGE.format(rates="--network_train_unet_only")), []),
    "R10 with a rate for each encoder": (
        line(PAGE.format(rates="--text_encoder_lr 1e-5 1e-5").replace("--cache_text_encoder_outputs ", "")),
        [],
    ),
    "R11": (config_file(NOTEBOOK, "--network_args", BLOCKS[0]), [LOWRAM]),
    "R11 with rates": (config_file(NOTEBOOK, "--network_args", *BLOCKS[1:]), [LOWRAM]),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_users_run_is_accepted_as_it_stands(folder, name, caplog, monkeypatch):
    """Whatever can be known before the model is loaded is right, and all that has no effect is told."""
    from library.training import recipe

    prepare, expected = ACCEPTED[name]
    monkeypatch.setattr(recipe, "dry_run", lambda *_, **__: Path("report"))
    script = sdxl_train_network if name in ("R3", "R7") else train_network
    assert script.main([*prepare(folder), "--dry_run"]) == 0
    told = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == len(expected), told
    for text, beginning in zip(told, expected, strict=True):
        assert text.startswith(beginning)


@pytest.mark.slow
@pytest.mark.parametrize("name", ACCEPTED)
def test_what_users_run_is_rehearsed(folder, name, caplog):
    caplog.set_level("INFO")
    assert train_network.main([*ACCEPTED[name][0](folder), "--dry_run"]) == 0
    assert "adapter (networks.lora): " in caplog.text
    assert re.search(r"memory on the device: \d", caplog.text)


SMALL = PICTURES.replace("resolution = 1024", "resolution = 128").replace("= 256", "= 64").replace("= 4096", "= 192")
OF_TEXTS = (18, 12)
# Name -> (its modules in each text encoder, what is recorded of it).
TRAINED = {
    "R1": (OF_TEXTS, {"ss_base_model_version": "sdxl_base_v1-0", "modelspec.prediction_type": "epsilon"}),
    "R2": (OF_TEXTS, {"ss_base_model_version": "sdxl_base_v1-0", "modelspec.prediction_type": "v"}),
    "R7": (
        (0, 0),
        {"ss_v2": "False", "modelspec.implementation": "https://github.com/Stability-AI/generative-models"},
    ),
    "R8": (OF_TEXTS, {"ss_clip_skip": "None", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}),
}


@pytest.mark.repetitions(keep=1)
@pytest.mark.parametrize(
    "name", ["R1", "R7", pytest.param("R2", marks=pytest.mark.slow), pytest.param("R8", marks=pytest.mark.slow)]
)
def test_what_users_run_trains(folder, name, caplog):
    """At a small resolution; everything else is as it was posted."""
    caplog.set_level("INFO")
    of_texts, recorded = TRAINED[name]
    argv = [*ACCEPTED[name][0](folder), "--max_train_steps=2", "--seed=1"]
    write(folder / "dataset.toml", SMALL)
    given = (folder / "c.toml").read_text(encoding="utf-8")
    write(folder / "c.toml", given.replace("max_train_epochs = 10\n", ""))
    assert train_network.main(argv) == 0
    (path,) = [path for path in Path("output").glob("*.safetensors") if not re.search(r"-0+\d", path.stem)]
    weights, found = load_file(path), metadata(path)
    modules = {key.partition(".")[0] for key in weights}
    assert sum(module.startswith("lora_unet_") for module in modules) == 302
    assert tuple(sum(module.startswith(f"lora_te{n}_") for module in modules) for n in (1, 2)) == of_texts
    changed = {key.partition(".")[0] for key, tensor in weights.items() if "lora_up" in key and bool(tensor.any())}
    # The states of the first encoder are taken before its last layer, whose six modules have no gradient.
    assert modules - changed == {
        module for module in modules if module.startswith("lora_te1_text_model_encoder_layers_2_")
    }
    assert recorded.items() <= found.items()
    assert "modelspec.encoder_layer" not in found
    assert found["modelspec.resolution"] == "128x128"
    assert ("--clip_skip 2 has no effect" in caplog.text) == (name == "R8")


@pytest.mark.slow
def test_lycoris_trains_over_sdxl(folder):
    """R9, Pony with LyCORIS, with convolutions of a smaller rank."""
    pytest.importorskip("lycoris.kohya")
    lycoris = [
        *("--network_module=lycoris.kohya", "--network_alpha=4"),
        *("--network_args", "preset=full", "algo=locon", "conv_dim=4", "conv_alpha=4"),
    ]
    write(folder / "dataset.toml", SMALL)
    text = NOTEBOOK.replace("max_train_epochs = 10", "max_train_steps = 2")
    assert train_network.main(config_file(text, *lycoris)(folder)) == 0
    assert any(key.startswith("lora_unet_input_blocks_4_1_") for key in load_file("output/character.safetensors"))


def test_a_rate_of_each_encoder_under_another_name_is_answered(folder):
    rates = "--text_encoder_lr1=1e-5 --text_encoder_lr2=1e-5"
    with pytest.raises(UserError) as caught:
        train_network.main(line(PAGE.format(rates=rates))(folder))
    assert len(caught.value.lines) == 2
    assert all("as in --text_encoder_lr 1e-5 1e-5" in text for text in caught.value.lines)


def test_the_text_cache_of_encoders_that_are_trained_is_answered(folder):
    with pytest.raises(UserError, match="--cache_text_encoder_outputs needs --network_train_unet_only"):
        train_network.main(line(PAGE.format(rates=""))(folder))
