"""The runs of same_results.py: command lines, executed one after the other in a folder with a copy of its files."""

from __future__ import annotations

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
        f"{ON_SD1} --cache_latents_to_disk --flip_aug",
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
    "sdxl": [
        f"{TRAIN} {DATA} --pretrained_model_name_or_path {SDXL} --text_encoder_lr 1e-2 3e-3 --flip_aug --enable_bucket "
        "--min_bucket_reso 64 --bucket_reso_steps 32 --sample_prompts previews.txt --sample_every_n_steps 4",
        f"{TRAIN} {DATA} --pretrained_model_name_or_path {SDXL} --network_train_unet_only --cache_latents "
        "--cache_text_encoder_outputs --shuffle_caption --output_name y --network_args conv_dim=2",
        f'{DRAW} --ckpt {SDXL} --network_module networks.lora --network_weights out/y.safetensors --prompt "a (cat:1.2) '
        '--ow 512 --oh 256 --ct 8"',
    ],
    "weighted-captions": [f"{ON_SD1} --weighted_captions --max_token_length 150 --caption_extension .caption"],
    "eight-bit": [f"{ON_SD1} --fp8_base --gradient_checkpointing --mixed_precision bf16"],
    "losses": [
        f"{ON_SD1} --loss_type huber --multires_noise_iterations 4 --ip_noise_gamma 0.1 --debiased_estimation_loss "
        "--min_timestep 100 --max_timestep 900 --color_aug --random_crop "
        "--caption_dropout_rate 0.3 --caption_prefix sks"
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
    "config-file": [
        f"{ON_SD1} --output_config --config_file run.toml",
        "train_network.py --config_file run.toml --max_train_steps 1 --log_config --console_log_file log.txt "
        "--console_log_level DEBUG",
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
        f'{DRAW} --ckpt {SD1_FOLDER} {DRAW_LORA} --network_merge --prompt "a sksword cat" --clip_skip 2 '
        "--sampler dpmsolver++ --textual_inversion_embeddings ../models/sksword.safetensors --bf16",
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
        f"{DRAW} --ckpt merged --vae model.ckpt --prompt dog",
    ],
    "sd1-convert": conversions_of(SD1),
    "sd2-convert": [
        *conversions_of(f"{SD2} --v_parameterization"),
        f"{DRAW} --ckpt folder --prompt dog",
        f"{TRAIN} {DATA} --pretrained_model_name_or_path folder --max_train_steps 1",
    ],
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
