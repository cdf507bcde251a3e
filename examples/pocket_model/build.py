"""Train the pocket model from nothing: glyph sheet, VAE, latents, U-Net with text encoder, decoder, export.

    python build.py --work FOLDER                 all stages; run it again to go on after an interruption
    python build.py --work FOLDER --stage export  write a usable model from the newest snapshot

The pictures come from the font of the Debian package fonts-noto-color-emoji. `workers.py` has the training. Letters in
shapes: B batch, H and W pixels, T tokens, D text width.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

# One thread a worker, and none of them spinning while it waits for the other.
os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="0")

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from examples.pocket_model.glyphs import BACKGROUNDS, HELD_OUT, SHEET, SIZE, SUBJECTS, caption, draw, save_sheet
from examples.pocket_model.workers import Data, Recipe, Turn, attach, train
from library.diffusion.schedule import BETA_END, BETA_START, NUM_TIMESTEPS
from library.models.tokenizer import load_clip_tokenizer, shipped_vocabulary

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextModel, PreTrainedModel

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONT_SIZE = 109  # the only size of the font's bitmaps
# Where the font has pictures; the VAE sees all of them but the held-out subjects.
CODE_POINTS = (*range(0x1F300, 0x1FB00), *range(0x2600, 0x27C0), 0x2B50)
SNOWMEN = (0x2603, 0x26C4, 0x26C7)  # three glyphs of the held-out snowman

VOCABULARY, TOKENS, TEXT_WIDTH = 49408, 77, 48
LATENT_SIDE = SIZE // 8
SCALES, JITTER = (0.62, 0.85), 6  # range of a glyph's size as a part of the picture; pixels off the centre
EMPTY_CAPTIONS = 0.1  # share of captions left empty, for classifier-free guidance
MIN_SNR_GAMMA = 5.0
COARSE_FROM = 1000  # the step from which high noise, where the background is decided, counts more
LATENT_NOISE = (0.1, 0.03)  # on the latents while the VAE learns, in their deviations: first two thirds, last third

VAE_CONFIG = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 32, 64, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 4,
    "sample_size": SIZE,
}
UNET_CONFIG = {
    "sample_size": LATENT_SIDE,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (48, 96, 96, 96),
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "attention_head_dim": 3,  # as in SD 1.x this is the number of heads
    "cross_attention_dim": TEXT_WIDTH,
}
TEXT_CONFIG = {
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 4 * TEXT_WIDTH,
    "projection_dim": TEXT_WIDTH,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": TOKENS,
    "hidden_act": "quick_gelu",
}
SPECIAL_TOKENS = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
SCHEDULER_CONFIG = {
    "_class_name": "DDIMScheduler",
    "beta_start": BETA_START,
    "beta_end": BETA_END,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": NUM_TIMESTEPS,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}

# ---- pictures ----


def make_sheet() -> None:
    """Write glyphs.png from the font."""
    codes = (*SUBJECTS.values(), *HELD_OUT.values())
    cells = renders(codes)
    assert len(cells) == len(codes), "the font lacks a subject"
    save_sheet(cells)


def renders(codes: Iterable[int]) -> list[Image.Image]:
    """Return the font's pictures of those code points for which it has one."""
    return [cell for cell in map(render, codes) if cell]


def render(code: int) -> Image.Image | None:
    """Return the font's picture of a code point as RGBA, cut to its outline, or None where it has none."""
    if not FONT.exists():
        raise SystemExit(f"{FONT} is missing: install the Debian package fonts-noto-color-emoji")
    canvas = Image.new("RGBA", (170, 170))
    font = ImageFont.truetype(str(FONT), FONT_SIZE)
    ImageDraw.Draw(canvas).text((10, 10), chr(code), font=font, embedded_color=True)
    box = canvas.getbbox()
    return canvas.crop(box) if box and min(box[2] - box[0], box[3] - box[1]) > 16 else None


def vae_pictures(seed: int, *, generic: int = 2600, own: int = 1400) -> Tensor:
    """Return pictures (generic + own, 3, H, W) in bytes: any emoji on any light colour, and the base subjects."""
    numbers = random.Random(seed)
    banned = {*HELD_OUT.values(), *SNOWMEN}
    cells = renders(code for code in CODE_POINTS if code not in banned)
    pictures = [paste(numbers.choice(cells), light_colour(numbers), numbers) for _ in range(generic)]
    pictures += [
        subject_picture(numbers.choice([*SUBJECTS]), numbers.choice([*BACKGROUNDS]), numbers) for _ in range(own)
    ]
    return as_tensor(pictures)


def light_colour(numbers: random.Random) -> tuple[int, int, int]:
    """Return one of BACKGROUNDS or any light colour."""
    if numbers.random() < 0.5:
        return numbers.choice([*BACKGROUNDS.values()])
    red, green, blue = (numbers.randint(110, 255) for _ in range(3))
    return red, green, blue


def paste(cell: Image.Image, colour: tuple[int, int, int], numbers: random.Random) -> Image.Image:
    """Return a 128x128 picture of a glyph, mirrored by chance and moved further than the U-Net's pictures are."""
    side = numbers.uniform(0.55, 1.0) * SIZE / max(cell.size)
    cell = cell.resize((round(cell.width * side), round(cell.height * side)), Image.Resampling.LANCZOS)
    if numbers.random() < 0.5:
        cell = cell.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    picture = Image.new("RGB", (SIZE, SIZE), colour)
    x, y = ((SIZE - length) // 2 + numbers.randint(-12, 12) for length in cell.size)
    picture.paste(cell, (x, y), cell)
    return picture


def subject_picture(subject: str, background: str, numbers: random.Random) -> Image.Image:
    """Return a training picture of a base subject."""
    offset = (numbers.randint(-JITTER, JITTER), numbers.randint(-JITTER, JITTER))
    return draw(subject, background, numbers.uniform(*SCALES), offset)


def as_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """Return pictures as bytes (N, 3, H, W)."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2).contiguous()


# ---- VAE ----


def build_vae() -> AutoencoderKL:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return AutoencoderKL(**VAE_CONFIG)


def vae_loss(vae: AutoencoderKL, data: Data, turn: Turn) -> Tensor:
    """Return the error of pictures, of their edges, and a small KL term.

    The first three quarters of the steps see crops of 64x64; the rest see whole pictures, a quarter as many, so that
    the group norms meet the flat backgrounds they will meet in use. Noise on the latents teaches the decoder to
    forgive the U-Net's small errors; there is less of it in the last third, for the sake of detail.
    """
    numbers, count = turn.random_numbers(), turn.count
    if turn.step < turn.recipe.steps * 3 // 4:
        chosen = torch.randint(len(data["pictures"]), (count,), generator=numbers)
        corners = torch.randint(SIZE // 2 + 1, (count, 2), generator=numbers).tolist()
        places = zip(data["pictures"][chosen], corners, strict=True)
        pictures = torch.stack([picture[:, y : y + 64, x : x + 64] for picture, (y, x) in places])
    else:
        pictures = data["pictures"][torch.randint(len(data["pictures"]), (max(1, count // 4),), generator=numbers)]
    pictures = (pictures.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)  # (B, 3, H, W)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        posterior = vae.encode(pictures).latent_dist
        mean, std = posterior.mean.float(), posterior.std.float()  # (B, 4, H/8, W/8)
        added = LATENT_NOISE[turn.step >= turn.recipe.steps * 2 // 3] * mean.detach().std()
        noise = torch.randn(mean.shape, generator=numbers)
        latents = mean + noise * (std.square() + added**2).sqrt()
        decoded = vae.decode(latents).sample
    kl = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).mean()
    return picture_error(decoded.float() - pictures) + 1e-4 * kl


def picture_error(difference: Tensor) -> Tensor:
    """Return the absolute and the squared error (B, 3, H, W) -> scalar, and that of differences of neighbours."""
    edges = difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()
    return difference.abs().mean() + difference.square().mean() + 0.5 * edges


def load_vae(recipe: Recipe, decoder_recipe: Recipe | None = None) -> AutoencoderKL:
    """Return the VAE, with the decoder of its own last stage where that has been trained."""
    vae = build_vae()
    attach(vae, torch.load(recipe.snapshot, weights_only=True)["average"])
    if decoder_recipe and decoder_recipe.snapshot.exists():
        attach(decoder_of(vae), torch.load(decoder_recipe.snapshot, weights_only=True)["average"])
    return vae.eval().requires_grad_(False)


# ---- decoder ----


def build_decoder(recipe: Recipe) -> nn.Module:
    """Return the decoding half of the trained VAE; the U-Net's latents fix the other half."""
    return decoder_of(load_vae(recipe).train().requires_grad_(True))


def decoder_of(vae: AutoencoderKL) -> nn.Module:
    return nn.Sequential(vae.post_quant_conv or nn.Identity(), vae.decoder)


def decoder_data(vae: AutoencoderKL, pictures: Tensor) -> Data:
    """Return pictures (N, 3, H, W) in bytes, their latents (N, 4, H/8, W/8), and the deviation of the latents."""
    latents = torch.cat([encode(vae, part) for part in pictures.split(32)])
    return {"pictures": pictures, "latents": latents, "deviation": latents.std()}


def decoder_loss(decoder: nn.Module, data: Data, turn: Turn) -> Tensor:
    """Return the error of whole pictures decoded from slightly noisy latents."""
    numbers = turn.random_numbers()
    chosen = torch.randint(len(data["pictures"]), (turn.count,), generator=numbers)
    latents = data["latents"][chosen]
    noisy = latents + LATENT_NOISE[1] * data["deviation"] * torch.randn(latents.shape, generator=numbers)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decoded = decoder(noisy.contiguous(memory_format=torch.channels_last))
    return picture_error(decoded.float() - (data["pictures"][chosen].float() / 127.5 - 1))


# ---- latents ----


def encode_subjects(vae: AutoencoderKL, *, copies: int, seed: int) -> Data:
    """Return latents (subjects * backgrounds * copies, 4, H/8, W/8) of deviation 1, their captions, and the scale.

    A caption is given by its number: n stands for the n-th pair of subject and background.
    """
    numbers = random.Random(seed)
    latents = [
        encode(vae, as_tensor([subject_picture(subject, background, numbers) for _ in range(copies)]))
        for subject, background in pairs()
    ]
    captions = torch.arange(len(latents)).repeat_interleave(copies)
    stacked = torch.cat(latents)
    scale = 1 / stacked.std()
    return {"latents": stacked * scale, "captions": captions, "scale": scale}


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Return the means of the latents (B, 4, H/8, W/8) of pictures (B, 3, H, W) in bytes."""
    scaled = (pictures.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return vae.encode(scaled).latent_dist.mean.float().contiguous()


def pairs() -> list[tuple[str, str]]:
    return list(product(SUBJECTS, BACKGROUNDS))


# ---- U-Net and text encoder ----


class TextConditionedUNet(nn.Module):
    """The U-Net, and a text encoder whose embedding table has only the rows that the captions use."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def predict(self, noisy: Tensor, timesteps: Tensor, captions: Tensor, chosen: Tensor, data: Data) -> Tensor:
        """Return the noise in latents (B, 4, H/8, W/8) at timesteps (B), given captions by number (B)."""
        distinct, place = captions.unique(return_inverse=True)
        text = self.text_encoder(data["tokens"][distinct]).last_hidden_state[place]  # (B, T, D)
        return self.unet(noisy, timesteps, encoder_hidden_states=text, return_dict=False)[0]


class NoisePredictor(Protocol):
    """A model that unet_loss trains. chosen (B) are the samples' places in data, should it need more of them."""

    def predict(self, noisy: Tensor, timesteps: Tensor, captions: Tensor, chosen: Tensor, data: Data) -> Tensor: ...


def build_unet() -> TextConditionedUNet:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    used = used_tokens()
    special = {name: int(torch.searchsorted(used, token)) for name, token in SPECIAL_TOKENS.items()}
    config = CLIPTextConfig.from_dict(TEXT_CONFIG | special | {"vocab_size": len(used)})
    text_encoder = CLIPTextModel(config)
    return TextConditionedUNet(UNet2DConditionModel(**UNET_CONFIG), text_encoder)


def caption_tokens() -> Tensor:
    """Return the token ids (pairs + 1, T) of all captions; the last one is empty."""
    texts = [*(caption(*pair) for pair in pairs()), ""]
    tokens = load_clip_tokenizer()(texts, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
    assert tokens.shape[1] == TOKENS
    return tokens


def used_tokens() -> Tensor:
    """Return the sorted ids of the tokens that occur in any caption."""
    return caption_tokens().unique()


def unet_loss(model: NoisePredictor, data: Data, turn: Turn) -> Tensor:
    """Return the mean squared error of the noise with min-SNR weights (arXiv 2303.09556).

    From COARSE_FROM on the weight grows with the noise by 1 / sqrt(SNR): a wrong background colour hardly shows in
    the error of the noise where there is next to nothing else, yet sampling settles it there.
    Time steps are spread evenly over the batch, one in each of its equal parts, which makes the gradient less noisy.
    """
    numbers, count = turn.random_numbers(), turn.count
    chosen = torch.randint(len(data["latents"]), (count,), generator=numbers)
    latents = data["latents"][chosen].contiguous(memory_format=torch.channels_last)  # (B, 4, H/8, W/8)
    empty = torch.rand(count, generator=numbers) < EMPTY_CAPTIONS
    captions = torch.where(empty, len(data["tokens"]) - 1, data["captions"][chosen])
    parts = torch.arange(count) * turn.workers + turn.rank
    timesteps = ((parts + torch.rand(count, generator=numbers)) * 1000 / (count * turn.workers)).long()

    signal = data["signal"][timesteps].view(-1, 1, 1, 1)  # alpha-bar
    noise = torch.randn(latents.shape, generator=numbers).contiguous(memory_format=torch.channels_last)
    noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
    predicted = model.predict(noisy, timesteps, captions, chosen, data)

    snr = (signal / (1 - signal)).flatten()
    weights = snr.clamp(max=MIN_SNR_GAMMA) / snr
    if turn.step >= COARSE_FROM:
        weights = weights / snr.clamp(max=1).sqrt()
    return ((predicted - noise).square().mean(dim=(1, 2, 3)) * weights).mean()


def unet_data(cached: Data) -> Data:
    """Return the cached latents with the captions' tokens, as rows of the small table, and alpha-bar (1000)."""
    tokens = torch.searchsorted(used_tokens(), caption_tokens())
    data = {"latents": cached["latents"], "captions": cached["captions"]}
    return data | {"tokens": tokens, "signal": alpha_bar()}


def alpha_bar() -> Tensor:
    """Return the signal's share of the power at each time step (1000)."""
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, NUM_TIMESTEPS) ** 2
    return (1 - betas).cumprod(dim=0)


# ---- export ----


def export(unet_recipe: Recipe, vae: AutoencoderKL, scale: float, output: Path) -> None:
    """Write the newest weight averages as a Diffusers folder in fp16 with the key names of SD 1.x."""
    trained = build_unet()
    attach(trained, torch.load(unet_recipe.snapshot, weights_only=True)["average"])
    vae.register_to_config(scaling_factor=scale)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    with new_model(output) as new:
        export_index(new, index)
        export_model(trained.unet, new / "unet")
        export_model(vae, new / "vae")
        used = used_tokens()
        export_text_encoder(trained.text_encoder, new / "text_encoder", used, SPECIAL_TOKENS, seed=unet_recipe.seed)
        export_tokenizer(new / "tokenizer")


@contextmanager
def new_model(output: Path) -> Iterator[Path]:
    """Give an empty folder; its parts take the place of those in output at the end."""
    new = output.with_name(output.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    yield new
    output.mkdir(parents=True, exist_ok=True)
    for part in sorted(new.iterdir()):
        replace(part, output / part.name)
    new.rmdir()


def export_model(model: UNet2DConditionModel | AutoencoderKL, folder: Path) -> None:
    """Write a model in fp16."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float16, memory_format=torch.contiguous_format)
    model.save_pretrained(folder)


def export_index(folder: Path, index: dict) -> None:
    """Write the scheduler, and the index of the folder with the parts added that all pipelines have."""
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER_CONFIG)
    parts = {
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", SCHEDULER_CONFIG["_class_name"]],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(folder / "model_index.json", dict(sorted((index | parts).items())))


def export_text_encoder(
    small: PreTrainedModel, folder: Path, used: Tensor, special: dict[str, int], *, seed: int
) -> None:
    """Write a text encoder with the whole vocabulary, under the `text_model.` names of every older release.

    The rows of tokens that no caption used are random, with the deviation of the trained rows: a LoRA that
    teaches a new word finds a distinct vector for it. used are the ids of the rows of the small table, sorted.
    """
    from safetensors.torch import save_file

    tensors = {
        key if key.startswith("text_projection.") else f"text_model.{key.removeprefix('text_model.')}": value
        for key, value in small.state_dict().items()
    }
    key = "text_model.embeddings.token_embedding.weight"
    trained = tensors[key]
    shape = (VOCABULARY, trained.shape[1])
    table = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * trained.std()
    table[used] = trained
    tensors[key] = table
    kept = {key: value.to(torch.float16).contiguous() for key, value in tensors.items() if "position_ids" not in key}
    folder.mkdir(parents=True)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"architectures": [type(small).__name__], "model_type": "clip_text_model", "torch_dtype": "float16"}
    sizes = {key: getattr(small.config, key) for key in TEXT_CONFIG}
    write_json(folder / "config.json", config | sizes | special | {"vocab_size": VOCABULARY})


def export_tokenizer(folder: Path, pad: str = "<|endoftext|>") -> None:
    vocabulary, merges = shipped_vocabulary()
    folder.mkdir(parents=True)
    text = json.dumps(vocabulary, ensure_ascii=False, separators=(",", ":"))
    (folder / "vocab.json").write_text(text, encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": pad,
        "unk_token": "<|endoftext|>",
    }
    write_json(folder / "special_tokens_map.json", special)
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "do_lower_case": True}
    write_json(folder / "tokenizer_config.json", config | special)


def write_json(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def replace(source: Path, target: Path) -> None:
    """Put a file or folder in the place of an older one."""
    if target.is_dir():
        old = target.with_name(target.name + ".old")
        target.rename(old)
        source.rename(target)
        shutil.rmtree(old)
    else:
        source.replace(target)


# ---- command line ----


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--work", type=Path, required=True, help="folder for snapshots and cached latents")
    options.add_argument("--output", type=Path, default=FOLDER, help="where the model is written (default: here)")
    stages = ("all", "sheet", "vae", "latents", "unet", "decoder", "export")
    options.add_argument("--stage", choices=stages, default="all")
    options.add_argument("--vae_steps", type=int, default=3000)
    options.add_argument("--unet_steps", type=int, default=2900)
    options.add_argument("--decoder_steps", type=int, default=400)
    options.add_argument("--copies", type=int, default=24, help="pictures of each subject on each background")
    options.add_argument("--workers", type=int, default=2, help="processes, at best one for each CPU core")
    options.add_argument("--seed", type=int, default=1)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    vae_recipe, unet_recipe, decoder_recipe = (
        Recipe(
            name=name,
            steps=steps,
            batch=batch,
            lr=lr,
            ema=ema,
            decay=decay,
            seed=args.seed,
            snapshot=args.work / f"{name}.pt",
        )
        for name, steps, batch, lr, ema, decay in (
            ("vae", args.vae_steps, 16, 2e-3, 0.995, 1.0),
            ("unet", args.unet_steps, 16, 1.2e-3, 0.999, 0.4),
            ("decoder", args.decoder_steps, 4, 1e-3, 0.995, 1.0),
        )
    )
    latents = args.work / "latents.pt"

    if args.stage in {"sheet", "all"} and not (args.stage == "all" and SHEET.exists()):
        make_sheet()
    if args.stage in {"vae", "all"}:
        train(vae_recipe, build_vae, vae_loss, {"pictures": vae_pictures(args.seed)}, workers=args.workers)
    if args.stage == "latents" or (args.stage == "all" and not latents.exists()):
        torch.save(encode_subjects(load_vae(vae_recipe), copies=args.copies, seed=args.seed), latents)
    if args.stage in {"unet", "all"}:
        data = unet_data(torch.load(latents, weights_only=True))
        train(unet_recipe, build_unet, unet_loss, data, workers=args.workers)
    if args.stage in {"decoder", "all"}:
        build = partial(build_decoder, vae_recipe)
        data = decoder_data(load_vae(vae_recipe), vae_pictures(args.seed + 1, generic=800, own=800))
        train(decoder_recipe, build, decoder_loss, data, workers=args.workers)
    if args.stage in {"export", "all"}:
        scale = float(torch.load(latents, weights_only=True)["scale"])
        export(unet_recipe, load_vae(vae_recipe, decoder_recipe), scale, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
