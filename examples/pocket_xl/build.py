"""Train the pocket XL model from nothing: latents, U-Net with two text encoders, export.

    python build.py --work FOLDER                 all stages; run it again to go on after an interruption
    python build.py --work FOLDER --stage export  write a usable model from the newest snapshot

A small SDXL with the machinery, the subjects and the trained VAE of ../pocket_model. It also learns what SDXL calls
size conditioning: the size of the original picture and the corner at which it was cut. Letters in shapes:
B batch, N pictures, H and W pixels, T tokens, D text width.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

import torch
from PIL import Image
from torch import Tensor, nn

from examples.pocket_model import build as pocket
from examples.pocket_model.glyphs import SIZE, draw
from examples.pocket_model.workers import Data, Recipe, attach, train

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

VAE = FOLDER.parent / "pocket_model" / "vae"
PAD_2 = 0  # the second encoder pads with the token of this id
WIDTHS = (16, 32)  # of the text encoders
SIZE_WIDTH = 256  # of the embedding of each of the six sizes

UNET_CONFIG = {
    "sample_size": SIZE // 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (56, 64, 40),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "norm_num_groups": 8,
    "attention_head_dim": (2, 2, 2),  # as in SDXL this is the number of heads
    "use_linear_projection": True,
    "cross_attention_dim": sum(WIDTHS),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": SIZE_WIDTH,
    "projection_class_embeddings_input_dim": 6 * SIZE_WIDTH + WIDTHS[1],
}
TEXT_CONFIGS = tuple(
    {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "projection_dim": width,
        "num_hidden_layers": 4,
        "num_attention_heads": width // 8,
        "max_position_embeddings": pocket.TOKENS,
        "hidden_act": activation,
    }
    for width, activation in zip(WIDTHS, ("quick_gelu", "gelu"), strict=True)
)
SPECIAL_TOKENS = (pocket.SPECIAL_TOKENS, pocket.SPECIAL_TOKENS | {"pad_token_id": PAD_2})

# How many of each 24 pictures of a caption are of which kind; the rest are plain.
SMALL, CROPPED, BOTH, LARGE, KINDS = 4, 4, 2, 1, 24
SMALL_SIDES, LARGE_SIDES = (8, 40), (136, 1024)  # pixels of originals that are blurred, and of those that are not
CROPS, MARGIN = 40, 32  # pixels: the largest cut, and the most that is left beyond the opposite edge


# ---- pictures ----


def sized_picture(subject: str, background: str, kind: int, numbers: random.Random) -> tuple[Image.Image, list[int]]:
    """Return a training picture, and its original height and width, top and left of the cut, height and width.

    The glyph lies in the upper left 128x128 pixels of a picture that goes on beyond the right and lower edges, so that
    a cut at (top, left) moves it by as many pixels up and to the left. A small original is blurred by the enlargement.
    """
    bounds = (SMALL, SMALL + CROPPED, SMALL + CROPPED + BOTH, SMALL + CROPPED + BOTH + LARGE)
    small, large = kind < bounds[0] or bounds[1] <= kind < bounds[2], bounds[2] <= kind < bounds[3]
    corner, resized = [0, 0], [SIZE, SIZE]
    if bounds[0] <= kind < bounds[2]:
        corner = numbers.choice(([1, 0], [0, 1], [1, 1]))
        corner = [used * numbers.randint(1, CROPS) for used in corner]
        resized = [SIZE + cut + numbers.randint(0, MARGIN) for cut in corner]
    original = SIZE
    if small or large:
        low, high = SMALL_SIDES if small else LARGE_SIDES
        original = round(low * (high / low) ** numbers.random())
    elif sum(corner):
        original = numbers.randint(SIZE * SIZE // max(resized), SIZE)  # sharp, or next to it

    top, left = corner
    offset = (
        numbers.randint(-pocket.JITTER, pocket.JITTER) - left,
        numbers.randint(-pocket.JITTER, pocket.JITTER) - top,
    )
    picture = draw(subject, background, numbers.uniform(*pocket.SCALES), offset)
    if original < SIZE:
        picture = picture.resize((original, original), Image.Resampling.LANCZOS)
        picture = picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    height, width = (round(length * original / SIZE) for length in resized)
    return picture, [height, width, top, left, SIZE, SIZE]


def encode_subjects(vae: AutoencoderKL, *, copies: int, seed: int) -> Data:
    """Return scaled latents (N, 4, H/8, W/8) of pictures, their captions by number (N), their sizes (N, 6)."""
    numbers = random.Random(seed)
    latents, sizes = [], []
    for pair in pocket.pairs():
        drawn = [sized_picture(*pair, copy % KINDS, numbers) for copy in range(copies)]
        latents.append(pocket.encode(vae, pocket.as_tensor([picture for picture, _ in drawn])))
        sizes += [size for _, size in drawn]
    captions = torch.arange(len(latents)).repeat_interleave(copies)
    scaled = torch.cat(latents) * vae.config["scaling_factor"]
    return {"latents": scaled, "captions": captions, "sizes": torch.tensor(sizes)}


# ---- U-Net and text encoders ----


class TextConditionedUNet(nn.Module):
    """The U-Net, and two text encoders whose embedding tables have only the rows that the captions use."""

    def __init__(
        self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, text_encoder_2: CLIPTextModelWithProjection
    ) -> None:
        super().__init__()
        self.unet, self.text_encoder, self.text_encoder_2 = unet, text_encoder, text_encoder_2

    def predict(self, noisy: Tensor, timesteps: Tensor, captions: Tensor, chosen: Tensor, data: Data) -> Tensor:
        """Return the noise in latents (B, 4, H/8, W/8) at timesteps (B), given captions by number (B)."""
        distinct, place = captions.unique(return_inverse=True)
        first = self.text_encoder(data["tokens"][distinct], output_hidden_states=True)
        second = self.text_encoder_2(data["tokens_2"][distinct], output_hidden_states=True)
        text = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)[place]  # (B, T, D)
        added = {"text_embeds": second.text_embeds[place], "time_ids": data["sizes"][chosen].float()}
        return self.unet(noisy, timesteps, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False)[0]


def build_unet() -> TextConditionedUNet:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def config(number: int) -> CLIPTextConfig:
        used = caption_tokens(number).unique()
        special = {name: int(torch.searchsorted(used, token)) for name, token in SPECIAL_TOKENS[number].items()}
        return CLIPTextConfig.from_dict(TEXT_CONFIGS[number] | special | {"vocab_size": len(used)})

    encoders = CLIPTextModel(config(0)), CLIPTextModelWithProjection(config(1))
    return TextConditionedUNet(UNet2DConditionModel(**UNET_CONFIG), *encoders)


def caption_tokens(number: int) -> Tensor:
    """Return the token ids (pairs + 1, T) of all captions for an encoder, 0 or 1; the last caption is empty."""
    tokens = pocket.caption_tokens()
    end = SPECIAL_TOKENS[number]["eos_token_id"]
    padding = (tokens == end).cumsum(dim=1) > 1
    return tokens.masked_fill(padding, SPECIAL_TOKENS[number]["pad_token_id"])


def unet_data(cached: Data) -> Data:
    """Return what encode_subjects returned with the captions' tokens, as rows of the small tables, and alpha-bar."""
    tokens = [caption_tokens(number) for number in (0, 1)]
    rows = [torch.searchsorted(ids.unique(), ids) for ids in tokens]
    return cached | {"tokens": rows[0], "tokens_2": rows[1], "signal": pocket.alpha_bar()}


# ---- export ----


def export(recipe: Recipe, output: Path) -> None:
    """Write the newest weight averages as a Diffusers folder in fp16."""
    trained = build_unet()
    attach(trained, torch.load(recipe.snapshot, weights_only=True)["average"])
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": False,  # it learned what an empty caption is
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
    }
    with pocket.new_model(output) as new:
        pocket.export_index(new, index)
        pocket.export_model(trained.unet, new / "unet")
        shutil.copytree(VAE, new / "vae")
        for number, encoder in enumerate((trained.text_encoder, trained.text_encoder_2)):
            suffix, used = ("", "_2")[number], caption_tokens(number).unique()
            folder = new / f"text_encoder{suffix}"
            pocket.export_text_encoder(encoder, folder, used, SPECIAL_TOKENS[number], seed=recipe.seed)
            pocket.export_tokenizer(new / f"tokenizer{suffix}", pad=("<|endoftext|>", "!")[number])


# ---- command line ----


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--work", type=Path, required=True, help="folder for snapshots and cached latents")
    options.add_argument("--output", type=Path, default=FOLDER, help="where the model is written (default: here)")
    options.add_argument("--stage", choices=("all", "latents", "unet", "export"), default="all")
    options.add_argument("--unet_steps", type=int, default=4000)
    options.add_argument("--copies", type=int, default=KINDS, help="pictures of each subject on each background")
    options.add_argument("--workers", type=int, default=2, help="processes, at best one for each CPU core")
    options.add_argument("--seed", type=int, default=1)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    args = parser().parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(
        name="unet",
        steps=args.unet_steps,
        batch=16,
        lr=1.2e-3,
        ema=0.999,
        decay=0.4,
        seed=args.seed,
        snapshot=args.work / "unet.pt",
    )
    latents = args.work / "latents.pt"

    if args.stage == "latents" or (args.stage == "all" and not latents.exists()):
        vae = AutoencoderKL.from_pretrained(str(VAE), torch_dtype=torch.float32)
        torch.save(encode_subjects(vae, copies=args.copies, seed=args.seed), latents)
    if args.stage in {"unet", "all"}:
        data = unet_data(torch.load(latents, weights_only=True))
        train(recipe, build_unet, pocket.unet_loss, data, workers=args.workers)
    if args.stage in {"export", "all"}:
        export(recipe, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
