"""Show that a redesign changes no result: a fixed list of runs, recorded at one revision and compared at another.

python benchmarks/same_results.py record before.json                   # at the revision that is right
python benchmarks/same_results.py compare before.json                  # after each change
python benchmarks/same_results.py compare before.json --only "train-*" --repository ../other_checkout

Each run calls the scripts as a user does, on tiny models and pictures that are made here from fixed seeds. Recorded
are exit codes, what is printed, and every file: its tensors, metadata, pixels and texts. Left out are paths, times,
random session numbers and progress bars. Equal records need the same machine and the same versions of packages.
`compare` prints what differs and exits with 1 if anything does.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import fnmatch
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import torch

Record = dict[str, dict[str, str]]  # run -> item -> what it is: its text, or the hash of its bytes

ROOT = Path(__file__).resolve().parents[1]
SHOWN = 15  # lines of a difference
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120", "PYTHONIOENCODING": "utf-8"}

# ---- the runs: command lines, executed one after the other in a folder with a copy of make_files() ----------

DATA = "--train_data_dir train --caption_extension .txt --resolution 64"
SD1, SD1_FOLDER, SD2, SDXL = (
    f"../models/{name}" for name in ("sd1.safetensors", "sd1", "sd2.safetensors", "sdxl.safetensors")
)
POCKET = "../models/pocket"
TRAIN = (
    "train_network.py --output_dir out --output_name x --network_module networks.lora --network_dim 4 "
    "--learning_rate 1e-2 --max_train_steps 4 --max_data_loader_n_workers 0 --seed 7 "
)
ON_SD1 = f"{TRAIN} {DATA} --pretrained_model_name_or_path {SD1}"
ON_POCKET = f"{TRAIN} {DATA} --pretrained_model_name_or_path {POCKET}"
DRAW = "gen_img_diffusers.py --outdir out --sequential_file_name --W 64 --H 64 --steps 4 --seed 3"
DRAW_LORA = "--network_module networks.lora --network_weights ../models/sd1-lora.safetensors"
BLOCKS = ",".join(["0.5"] * 6 + ["1"] * 6)
RANKS = ",".join(map(str, [2] * 12 + [4] + [2] * 12))

TRAININGS = {
    "lierla": [
        f"{ON_SD1} --enable_bucket --min_bucket_reso 64 --max_bucket_reso 128 --unet_lr 2e-2 --text_encoder_lr 5e-3 "
        "--flip_aug --shuffle_caption --keep_tokens 1 --caption_tag_dropout_rate 0.3 --save_every_n_steps 2 "
        "--logging_dir logs --log_with tensorboard"
    ],
    "c3lier": [
        f"{ON_POCKET} --network_args conv_dim=2 conv_alpha=1 --cache_latents --vae_batch_size 2 --min_snr_gamma 5 "
        "--noise_offset 0.1 --lr_scheduler cosine --lr_warmup_steps 1 --scale_weight_norms 1 --network_dropout 0.1"
    ],
    "dylora-all": [f"{ON_SD1} --network_module networks.dylora --network_args unit=2 --network_train_unet_only"],
    "dylora-unit-validation": [
        f"{ON_SD1} --network_module networks.dylora --network_args unit=2 dylora_update=unit conv_dim=4 "
        "--validation_split 0.34 --validate_every_n_steps 2",
        f"tools/dylora_report.py --model out/x.safetensors --pretrained_model_name_or_path {SD1} {DATA} "
        "--validation_split 0.34 --timesteps 2 --sample_prompts previews.txt --save_to report/x",
        "networks/extract_lora_from_dylora.py --model out/x.safetensors --save_to split/x.safetensors",
    ],
    "block-weights": [
        f"{ON_SD1} --network_args down_lr_weight={BLOCKS} mid_lr_weight=1.5 up_lr_weight=cosine+.25 "
        "block_lr_zero_threshold=0.3 --max_grad_norm 0.5"
    ],
    "block-dims": [f"{ON_SD1} --network_args block_dims={RANKS} conv_block_dims={RANKS} --network_alpha 2"],
    "lycoris": [f"{ON_SD1} --network_module lycoris.kohya --network_args algo=loha preset=attn-mlp"],
    "cache-on-disk": [
        f"tools/cache_latents.py --pretrained_model_name_or_path {SD1} {DATA} --flip_aug",
        f"{ON_SD1} --cache_latents_to_disk --flip_aug --random_crop",
    ],
    "bf16-ckpt": [f"{ON_SD1} --mixed_precision bf16 --full_bf16 --save_model_as ckpt --save_precision fp16"],
    "accumulation": [
        f"{ON_SD1} --gradient_accumulation_steps 2 --train_batch_size 2 --max_train_epochs 3 --save_every_n_epochs 1 "
        "--save_last_n_epochs 1 --lr_scheduler polynomial --prior_loss_weight 0.5 --reg_data_dir reg"
    ],
    "masks": [f"{TRAIN} --pretrained_model_name_or_path {SD1} --dataset_config masks.toml --masked_loss"],
    "resumed": [
        f"{ON_SD1} --max_train_steps 2 --save_state --save_every_n_steps 1 --save_last_n_steps_state 1",
        f"{ON_SD1} --output_name y --resume out/x-state",
        f"{ON_SD1} --output_name z --initial_step 2 --skip_until_initial_step",
    ],
    "schedule-free": [f"{ON_SD1} --optimizer_type AdamWScheduleFree --optimizer_args weight_decay=0.1 --save_state"],
    "optimizers": [
        f"{ON_SD1} --optimizer_type AdaFactor --max_train_steps 2",
        f"{ON_SD1} --optimizer_type DAdaptAdam --learning_rate 1 --max_train_steps 2 --output_name y",
    ],
    "previews": [
        f"{ON_POCKET} --sample_prompts previews.txt --sample_at_first --sample_every_n_steps 2 --sample_sampler euler_a"
    ],
    "sd2-v": [
        f"{TRAIN} {DATA} --pretrained_model_name_or_path {SD2} --v2 --v_parameterization --zero_terminal_snr "
        "--scale_v_pred_loss_like_noise_pred --clip_skip 2 --sample_prompts previews.txt --sample_every_n_steps 4"
    ],
    "weighted-captions": [f"{ON_SD1} --weighted_captions --max_token_length 150 --caption_extension .caption"],
    "eight-bit": [f"{ON_SD1} --fp8_base --gradient_checkpointing --mixed_precision bf16"],
    "losses": [
        f"{ON_SD1} --loss_type huber --multires_noise_iterations 4 --ip_noise_gamma 0.1 --debiased_estimation_loss "
        "--min_timestep 100 --max_timestep 900 --color_aug --caption_dropout_rate 0.3 --caption_prefix sks"
    ],
    "from-weights": [
        f"{ON_SD1} --network_weights ../models/sd1-lora.safetensors --dim_from_weights "
        "--base_weights ../models/sd1-other.safetensors --base_weights_multiplier 0.5 --no_metadata",
    ],
    "metadata-file": [
        "finetune/merge_captions_to_metadata.py pictures all.json --debug",
        "finetune/merge_dd_tags_to_metadata.py pictures all.json",
        "finetune/clean_captions_and_tags.py all.json clean.json --debug",
        f"{TRAIN} --pretrained_model_name_or_path {SD1_FOLDER} --train_data_dir pictures --in_json clean.json "
        f"--resolution 64 --vae {SD1} --token_warmup_step 2 --shuffle_caption --training_comment hello "
        "--metadata_title T --metadata_author A",
    ],
    "dry-run": [
        f"{ON_SD1} --dry_run --network_args mid_lr_weight=2 up_lr_weight=sine --enable_bucket --min_bucket_reso 64",
        f"{TRAIN} --pretrained_model_name_or_path {POCKET} --dataset_config masks.toml --masked_loss --dry_run",
    ],
}
DRAWINGS = {
    "lora-brackets": [
        f"{DRAW} --ckpt {SD1} {DRAW_LORA} --network_mul 0.7 --max_embeddings_multiples 2 --images_per_prompt 2 "
        '--batch_size 2 --prompt "a (cat:1.3) [on] ((a)) mat BREAK a \\\\(dog --n (bad:1.2) --am 0.5"',
        f'{DRAW} --ckpt {SD1_FOLDER} {DRAW_LORA} --network_merge --prompt "a cat" --clip_skip 2 --sampler dpmsolver++ '
        "--textual_inversion_embeddings ../models/word.safetensors --bf16",
    ],
    "img2img-inpainting": [
        f'{DRAW} --ckpt {POCKET} --image_path photo.png --strength 0.6 --prompt "a fox" --use_original_file_name',
        f'{DRAW} --ckpt {POCKET} --image_path photo.png --mask_path mask.png --prompt "a unicorn" --vae_tiling',
    ],
    "control-net": [
        f'{DRAW} --ckpt {SD1} --control_net_models ../models/control --guide_image_path photo.png --prompt "a cat" '
        "--control_net_preps canny_50_150 --control_net_weights 0.8 --control_net_ratios 0.5 --sampler heun",
    ],
    "grid-two-networks": [
        f"{DRAW} --ckpt {SD1} --network_module networks.lora networks.lora --network_weights "
        '../models/sd1-lora.safetensors ../models/sd1-other.safetensors --prompt "a cat" --grid am=1:0,0:1 seed=1,2 '
        "--network_pre_calc --network_show_meta --html",
    ],
    "dynamic-prompts": [
        f"{DRAW} --ckpt {POCKET} --from_file draw.txt --sampler euler_a --iter_same_seed --n_iter 2",
        f"{DRAW} --ckpt {POCKET} --from_picture out/im_000001.png --outdir again",
    ],
    "highres-v": [
        f"{DRAW} --ckpt {SD2} --v_parameterization --W 128 --H 128 --highres_fix_scale 0.5 --highres_fix_steps 3 "
        '--highres_fix_save_1st --prompt "a cat --l 4" --emb_normalize_mode abs',
    ],
}


def tools_of(family: str, base: str, merge: str) -> list[str]:
    """Return a command line for each tool of networks/ on the files of a family."""
    lora, other = (f"../models/{family}-{name}.safetensors" for name in ("lora", "other"))
    both = f"--models {lora} {other} --ratios 0.8 -0.5"
    return [
        f"networks/{merge} --sd_model {base} --save_to merged.safetensors {both} --save_precision fp16",
        f"networks/{merge} --save_to concat.safetensors {both} --concat --shuffle --seed 5",
        f"networks/{merge} --save_to sum.safetensors --models {lora} {lora} --ratios 0.8 -0.5",
        f"networks/svd_merge_lora.py --save_to svd.safetensors {both} --new_rank 3 --save_precision bf16",
        f"networks/resize_lora.py --model {lora} --save_to small.safetensors --new_rank 2 --verbose",
        f"networks/resize_lora.py --model {lora} --save_to fro.safetensors --new_rank 4 --dynamic_method sv_fro "
        "--dynamic_param 0.9",
        f"networks/extract_lora_from_models.py --model_org {base} --model_tuned ../models/{family}-tuned.safetensors "
        "--save_to extracted.safetensors --dim 2 --conv_dim 2 --min_diff 1e-4",
        f"networks/convert_lora.py --model {lora} --save_to peft.safetensors --to diffusers",
        "networks/convert_lora.py --model peft.safetensors --save_to kohya.safetensors",
        f"networks/check_lora_weights.py {lora}",
        "networks/check_lora_weights.py peft.safetensors --json",
    ]


def conversions_of(base: str) -> list[str]:
    """Return the conversions of a file into a folder and back."""
    convert = "tools/convert_diffusers20_original_sd.py"
    return [f"{convert} {base} folder --fp16", f'{convert} folder back.safetensors --metadata \'{{"title": "x"}}\'']


TOOLS = {
    "sd1": tools_of("sd1", SD1, "merge_lora.py"),
    "sd1-folder": [
        f"networks/merge_lora.py --sd_model {SD1_FOLDER} --save_to merged --models ../models/sd1-lora.safetensors "
        "--ratios 0.5",
        f"tools/convert_diffusers20_original_sd.py {SD1_FOLDER} model.ckpt --bf16 --epoch 2 --global_step 3",
    ],
    "sd1-convert": conversions_of(SD1),
    "sd2-convert": conversions_of(SD2),
    "sd2": tools_of("sd2", SD2, "merge_lora.py"),
    "sdxl": tools_of("sdxl", SDXL, "sdxl_merge_lora.py"),
    "sdxl-convert": conversions_of(SDXL),
    "models": [
        f"tools/merge_models.py --models {SD1} ../models/sd1-tuned.safetensors --ratios 0.7 0.3 --output m "
        "--saving_precision fp16 --show_skipped",
        "tools/show_metadata.py --model m.safetensors ../models/sd1-lora.safetensors --nested",
    ],
    "pictures": [
        "tools/canny.py --input photo.png --output edges.png --thres1 50 --thres2 150",
        "tools/resize_images_to_resolution.py pictures sizes --max_resolution 64x64,32x32 --save_as_png "
        "--copy_associated_files --num_workers 1 --divisible_by 8",
    ],
}

MISTAKES = {
    "train": [
        "train_network.py",
        f"{ON_SD1} --lerning_rate 1",
        f"{ON_SD1} --max_train_steps 3.5 --resolution 32 --lr_scheduler cosin --mixed_precision fp8",
        f"{ON_SD1} --deepspeed",
        f"{ON_SD1} --network_args conv_dims=4",
        f"{ON_SD1} --network_args down_lr_weight=0.5 block_dims=8,8",
        f"{ON_SD1} --network_module networks.none",
        f"{ON_SD1} --optimizer_type Adamm",
        f"{ON_SD1} --v2",
        f"{ON_SD1} --masked_loss",
        f"{ON_SD1} --resume nowhere",
        f"{ON_SD1} --network_weights ../models/sd2-lora.safetensors",
        f"{TRAIN} --pretrained_model_name_or_path {SDXL} {DATA}",
        f"{TRAIN} --pretrained_model_name_or_path nothing.safetensors {DATA}",
        f"{TRAIN} --pretrained_model_name_or_path {SD1} --train_data_dir nothing --resolution 64",
        f"{TRAIN} --pretrained_model_name_or_path {SD1} --dataset_config wrong.toml",
    ],
    "draw": [
        "gen_img_diffusers.py --prompt x",
        f'{DRAW} --ckpt {SD1} --prompt "a cat --w 63 --zz 1" --sampler uler',
        f"{DRAW} --ckpt {SD2} --prompt a {DRAW_LORA}",
        f"{DRAW} --ckpt {SDXL} --prompt a",
        f"{DRAW} --ckpt {SD1} --prompt a --control_net_models {SD1_FOLDER} --guide_image_path photo.png",
        f"{DRAW} --ckpt {SD1} --prompt a --image_path nothing.png --grid colour=1",
    ],
    "tools": [
        f"networks/merge_lora.py --sd_model {SD1} --save_to m.txt --models ../models/sd1-lora.safetensors --ratios 1 2",
        f"networks/merge_lora.py --sd_model {SD1} --save_to m.safetensors --models ../models/sd2-lora.safetensors "
        "--ratios 1",
        "networks/resize_lora.py --model ../models/sd1.safetensors --save_to x.safetensors",
        f"networks/extract_lora_from_models.py --model_org {SD1} --model_tuned {SD2} --save_to x.safetensors",
        "networks/convert_lora.py --model photo.png --save_to x.safetensors",
        "networks/check_lora_weights.py nothing.safetensors",
        f"tools/merge_models.py --models {SD1} {SD2} --output x",
        f"tools/convert_diffusers20_original_sd.py {SD1} folder --v2",
        "tools/dylora_report.py --model ../models/sd1-lora.safetensors",
        "tools/show_metadata.py --model photo.png",
        "finetune/clean_captions_and_tags.py nothing.json x.json",
    ],
}
RUNS = {
    f"{kind}-{name}": lines
    for kind, table in (("train", TRAININGS), ("draw", DRAWINGS), ("tools", TOOLS), ("mistakes", MISTAKES))
    for name, lines in table.items()
}

# ---- what the runs are given --------------------------------------------------------------------------------

TEXT_FILES = {
    "previews.txt": "a unicorn --w 64 --h 64 --d 1 --s 3 --n bad\na (fox:1.2) --w 64 --h 96 --d 2 --s 3 --l 3\n",
    "draw.txt": "a {red|blue|green} fox --d 5\n# none\na {e$$cat|dog} on {2$$red|blue|green} --s 3 --n bad\n",
    "masks.toml": """[general]
resolution = 64
caption_extension = ".txt"
[[datasets]]
batch_size = 2
  [[datasets.subsets]]
  image_dir = "pictures"
  conditioning_data_dir = "masks"
  num_repeats = 2
  flip_aug = true
[[datasets]]
resolution = [96, 64]
  [[datasets.subsets]]
  image_dir = "transparent"
  alpha_mask = true
  class_tokens = "a sign"
""",
    "wrong.toml": "[[datasets]]\nresolutions = 64\n  [[datasets.subsets]]\n  image_dir = 3\n  num_repeats = -1\n",
}


def make_files(folder: Path) -> None:
    """Write photographs, captions, masks and settings: what every run finds in its folder."""
    rng = np.random.default_rng(0)

    def picture(path: Path, size: tuple[int, int], mode: str = "RGB") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (6, 6, len(mode)), dtype=np.uint8)
        Image.fromarray(coarse.squeeze()).resize(size, Image.Resampling.BICUBIC).save(path)

    for index, size in enumerate([(64, 64), (96, 64), (64, 96), (80, 80), (70, 64), (64, 64)]):
        for data in ("pictures", "train/2_sks dog"):
            picture(folder / data / f"{index}.png", size)
            (folder / data / f"{index}.txt").write_text(f"a dog, tag{index % 3}, 1girl, blue_sky", encoding="utf-8")
            (folder / data / f"{index}.caption").write_text(f"a (dog:1.{index}) [in] the image", encoding="utf-8")
        picture(folder / "masks" / f"{index}.png", size, "L")
    for index in range(2):
        picture(folder / "reg" / "1_dog" / f"{index}.png", (64, 64))
        picture(folder / "transparent" / f"{index}.png", (96, 64), "RGBA")
    picture(folder / "photo.png", (64, 64))
    picture(folder / "mask.png", (64, 64), "L")
    for name, text in TEXT_FILES.items():
        (folder / name).write_text(text, encoding="utf-8")


def make_models(folder: Path) -> None:
    """Write base models of every family, tuned ones, LoRA files, a ControlNet, an embedding, and the pocket model."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import tiny
    import torch
    from diffusers import ControlNetModel
    from safetensors.torch import load_file, save_file

    shutil.copytree(ROOT / "examples" / "pocket_model", folder / "pocket")
    for family in ("sd1", "sd2", "sdxl"):
        models = tiny.make_models(family)
        dtype = torch.float32 if family == "sd1" else torch.float16
        base = load_file(tiny.write_checkpoint(models, family, folder / f"{family}.safetensors", dtype))
        keyed = torch.Generator().manual_seed(1)
        unet = models["unet"].state_dict()
        if family == "sdxl":  # its LoRA files have the original names
            unet = {name.partition("diffusion_model.")[2]: tensor for name, tensor in base.items()}
        layers = {f"lora_unet.{name}": tensor for name, tensor in unet.items()}
        for part in sorted(name for name in models if name.startswith("text_encoder")):
            number = "" if family != "sdxl" else "2" if part.endswith("2") else "1"
            layers |= {f"lora_te{number}.{name}": tensor for name, tensor in tiny.text_state(models[part]).items()}
        for name, rank in (("lora", 4), ("other", 2)):
            tensors, metadata = lora_of(layers, rank, keyed)
            save_file(tensors, folder / f"{family}-{name}.safetensors", metadata)
        tuned = {
            key: tensor + 0.01 * torch.randn(tensor.shape, generator=keyed).to(tensor)
            for key, tensor in base.items()
            if tensor.is_floating_point()
        }
        save_file(base | tuned, folder / f"{family}-tuned.safetensors")
        if family == "sd1":
            tiny.write_folder(models, family, folder / "sd1")
            torch.manual_seed(2)
            control = ControlNetModel.from_unet(models["unet"])
            for block in (*control.controlnet_down_blocks, control.controlnet_mid_block):
                torch.nn.init.normal_(block.weight, std=0.05)
            torch.nn.init.normal_(control.controlnet_cond_embedding.conv_out.weight, std=0.3)
            control.save_pretrained(folder / "control")
            save_file({"emb_params": torch.randn((2, 64), generator=keyed)}, folder / "word.safetensors")


def lora_of(layers: dict[str, torch.Tensor], rank: int, keyed: torch.Generator) -> tuple[dict, dict[str, str]]:
    """Return tensors and metadata of a LoRA with random weights on attention and the first convolutions of resnets."""
    import torch

    tensors = {}
    for name, weight in layers.items():
        if not re.search(r"(attn.*(to_|proj)|conv1|in_layers\.2).*\.weight$", name) or weight.ndim < 2:
            continue
        module = name.removesuffix(".weight").replace(".", "_")
        outputs, inputs, *kernel = weight.shape
        tensors[f"{module}.lora_down.weight"] = torch.randn((rank, inputs, *kernel), generator=keyed) / inputs
        tensors[f"{module}.lora_up.weight"] = torch.randn((outputs, rank, *[1 for _ in kernel]), generator=keyed) / 9
        tensors[f"{module}.alpha"] = torch.tensor(rank / 2)
    metadata = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(rank / 2)}
    return tensors, metadata | {"ss_tag_frequency": '{"x": {"a dog": 2}}', "ss_output_name": f"rank{rank}"}


# ---- what came out ------------------------------------------------------------------------------------------

# What may differ between two runs of the same code -> what is recorded in its place.
UNSTEADY = (
    (re.compile(r"(?m)^[^\n:]*\.py:\d+: (?=\w*Warning)"), "PLACE: "),
    (re.compile(r"\b\d{14}\b"), "TIME"),
    (re.compile(r"\b\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d)?)?(\.\d+)?"), "TIME"),
    (re.compile(r"events\.out\.tfevents\S*"), "events.out.tfevents"),
    (re.compile(r"\b[\d.]+ (s|min|ms|seconds?)\b"), "DURATION"),
)
UNSTEADY_METADATA = re.compile(r"ss_session_id|ss_training_(started|finished)_at|sshs_\w*|modelspec\.date")
BAR = re.compile(r"^(?P<name>[^|]*?):? +(?P<share>\d+)%\|.*\| *(?P<count>\S+)/(?P=count) \[.*$|^[^|]*\d+%\|.*$")


class Folders:
    """Where a run happened: what is taken out of texts."""

    def __init__(self, work: Path, repository: Path) -> None:
        self.names = {str(work): "WORK", str(repository): "REPOSITORY", sys.prefix: "PYTHON"}

    def steady(self, text: str) -> str:
        """Return a text without what differs between two runs of the same code: paths, times, unfinished bars."""
        lines: list[str] = []
        for line in re.split(r"[\r\n]+", text):
            bar = BAR.match(line)
            if not bar:
                lines.append(line)
            elif bar["count"] and (finished := f"{bar['name']}: all {bar['count']}") not in lines[-1:]:
                lines.append(finished)
        text = "\n".join(lines)
        for path, name in self.names.items():
            text = text.replace(path, name)
        for pattern, replacement in UNSTEADY:
            text = pattern.sub(replacement, text)
        return text


def short_hash(data: bytes) -> str:
    """Return the first twelve digits of a SHA-256."""
    return hashlib.sha256(data).hexdigest()[:12]


def read_safetensors(path: Path, steady: Callable[[str], str]) -> dict[str, str]:
    """Return the metadata of a file, and of each tensor its type, shape and hash."""
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    metadata = {key: value for key, value in header.pop("__metadata__", {}).items() if not UNSTEADY_METADATA.match(key)}
    lines = []
    for name, entry in sorted(header.items()):
        start, end = (begin + offset for offset in entry["data_offsets"])
        lines.append(f"{name} {entry['dtype']} {entry['shape']} {short_hash(data[start:end])}")
    return {
        "tensors": "\n".join(lines),
        "metadata": steady("\n".join(f"{key}: {value}" for key, value in sorted(metadata.items()))),
    }


def read_pickle(path: Path, steady: Callable[[str], str]) -> dict[str, str]:
    """Return each tensor and value of a file of torch.save."""
    import torch

    def walk(value: Any, name: str) -> Iterator[str]:
        if isinstance(value, torch.Tensor):
            data = value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
            yield f"{name} {value.dtype} {list(value.shape)} {short_hash(data)}"
        elif isinstance(value, dict):
            for key, part in value.items():
                yield from walk(part, f"{name}/{key}")
        elif isinstance(value, (list, tuple)) and any(isinstance(part, (dict, torch.Tensor)) for part in value):
            for index, part in enumerate(value):
                yield from walk(part, f"{name}/{index}")
        else:
            yield f"{name} {value!r}"

    return {"content": steady("\n".join(walk(torch.load(path, weights_only=False, map_location="cpu"), "")))}


def read_picture(path: Path, steady: Callable[[str], str]) -> dict[str, str]:
    """Return mode, size and pixels of a picture, and the texts in its file."""
    with Image.open(path) as file:
        pixels = f"{file.mode} {file.size} {short_hash(file.tobytes())}"
        texts = "\n".join(f"{key}: {value}" for key, value in sorted(file.info.items(), key=str))
    return {"pixels": pixels, "texts": steady(texts)}


def read_metrics(path: Path, steady: Callable[[str], str]) -> dict[str, str]:
    """Return the lines of a file of metrics, without times."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {"content": "\n".join(json.dumps({key: line[key] for key in line if key != "time"}) for line in lines)}


def read_events(path: Path, steady: Callable[[str], str]) -> dict[str, str]:
    """Return the numbers that were logged to TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    events = EventAccumulator(str(path)).Reload()
    scalars = [f"{tag} {event.step} {event.value}" for tag in events.Tags()["scalars"] for event in events.Scalars(tag)]
    tensors = [(tag, event) for tag in events.Tags()["tensors"] for event in events.Tensors(tag)]
    texts = [f"{tag} {event.step} {tensor_util.make_ndarray(event.tensor_proto)}" for tag, event in tensors]
    return {"content": steady("\n".join(sorted(scalars + texts)))}


def read_text(path: Path, steady: Callable[[str], str]) -> dict[str, str]:
    """Return a text, or the hash of what is none."""
    data = path.read_bytes()
    try:
        return {"content": steady(data.decode("utf-8"))}
    except UnicodeDecodeError:
        return {"content": short_hash(data)}


READERS = {".safetensors": read_safetensors, ".jsonl": read_metrics}
READERS |= dict.fromkeys((".png", ".jpg", ".webp"), read_picture) | dict.fromkeys((".ckpt", ".pt", ".bin"), read_pickle)


def run_all(name: str, work: Path, repository: Path, python: str) -> dict[str, str]:
    """Execute the command lines of a run in a folder of its own and return everything that came out."""
    folder = work / name
    shutil.copytree(work / "files", folder)
    folders = Folders(work, repository)
    items = {}
    for number, line in enumerate(RUNS[name], 1):
        script, *words = shlex.split(line)
        done = subprocess.run(
            [python, str(repository / script), *words],
            cwd=folder,
            env=os.environ | ENVIRONMENT,
            capture_output=True,
            encoding="utf-8",
            stdin=subprocess.DEVNULL,
            check=False,
        )
        items[f"{number} {script}: exit code"] = str(done.returncode)
        items[f"{number} {script}: output"] = folders.steady(done.stdout)
        items[f"{number} {script}: errors"] = folders.steady(done.stderr)
    items |= contents(folder, work / "files", folders)
    shutil.rmtree(folder)
    return items


def contents(folder: Path, given: Path, folders: Folders) -> dict[str, str]:
    """Return names and contents of the files in a folder, but for those that were given and are as they were."""
    items, names = {}, [f"{path.name} is gone" for path in given.glob("*") if not (folder / path.name).exists()]
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        own = path.relative_to(folder)
        if (given / own).is_file() and (given / own).read_bytes() == path.read_bytes():
            continue
        name = folders.steady(own.as_posix())
        names.append(name)
        read = read_events if "tfevents" in name else READERS.get(path.suffix, read_text)
        items |= {f"{name}: {kind}": text for kind, text in read(path, folders.steady).items()}
    return items | {"files": "\n".join(names)}


def make_record(args: argparse.Namespace) -> Record:
    """Execute the runs that were asked for, several at a time."""
    names = [name for name in RUNS if fnmatch.fnmatch(name, args.only)]
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(args.jobs) as pool:
        work = Path(temporary).resolve()
        make_files(work / "files")
        with contextlib.redirect_stderr(None):
            make_models(work / "models")

        def timed(name: str) -> dict[str, str]:
            begin = time.perf_counter()
            items = run_all(name, work, args.repository.resolve(), args.python)
            codes = " ".join(text for item, text in items.items() if item.endswith(": exit code"))
            print(f"{name}: {time.perf_counter() - begin:.0f} s, exit {codes}", file=sys.stderr, flush=True)
            return items

        given = contents(work / "models", work / "none", Folders(work, args.repository))
        return {"given": given} | dict(zip(names, pool.map(timed, names), strict=True))


def difference(before: str | None, after: str | None) -> list[str]:
    """Return at most SHOWN lines that say how a text changed."""
    if before is None or after is None:
        return ["is new" if before is None else "is gone"]
    lines = list(difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0))[2:]
    more = [f"... {len(lines) - SHOWN} more lines"] if len(lines) > SHOWN else []
    return [line[:300] for line in lines[:SHOWN]] + more


def compare(before: Record, after: Record) -> bool:
    """Print for each run that it is equal or how it differs; return whether all are equal."""
    for name, items in after.items():
        old = before.get(name, {})
        changed = [item for item in {**old, **items} if old.get(item) != items.get(item)]
        print(f"{name}: {'equal' if not changed else f'{len(changed)} of {len(items)} items differ'}")
        for item in changed:
            print(f"  {item}", *difference(old.get(item), items.get(item)), sep="\n    ")
    return all(before.get(name) == items for name, items in after.items())


def main() -> int:
    """Run the script with the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("record", "compare"))
    parser.add_argument("file", type=Path, help="the record: JSON")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="runs whose names match, such as 'train-*'")
    parser.add_argument("--repository", type=Path, default=ROOT, help="folder of the scripts that are run")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that runs the scripts")
    args = parser.parse_args()
    begin = time.perf_counter()
    before = json.loads(args.file.read_text(encoding="utf-8")) if args.command == "compare" else None
    after = make_record(args)
    print(f"{len(after) - 1} runs in {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    if before is not None:
        return 0 if compare(before, after) else 1
    args.file.write_text(json.dumps(after, indent=1, ensure_ascii=False), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
