"""Runs of the scripts on the device in Python, one after another in one process, for tests and `mutations.py`.

    python tests/device_cases.py FOLDER CASE...     # prints what became of each case as a line of JSON

FOLDER was made by `make_world`. A case is a function of it that runs scripts and returns the files they wrote.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gc
import hashlib
import json
import shutil
import sys
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from library.config.samplers import SAMPLER_NAMES  # noqa: E402

if TYPE_CHECKING:
    from library.training.run.progress import Progress

NAME = "fakegpu"
LATENTS = "MemoryCache"
MODELS = ("UNet2DConditionModel", "AutoencoderKL", "CLIPTextModel", "CLIPTextModelWithProjection")
STEPS = 4  # of a training; the waits of the second and third are told


@dataclasses.dataclass(frozen=True)
class World:
    """The files that the cases read, and a folder that they write to."""

    folder: Path

    def __getattr__(self, name: str) -> Path:
        """Return the path of a file or folder that `make_world` wrote, by its name."""
        found = list(self.folder.glob(f"{name}*"))
        assert len(found) == 1, f"{name}: {found}"
        return found[0]

    def out(self, case: str) -> Path:
        """Return the folder of a case."""
        return self.folder / "out" / case


def make_world(folder: Path) -> World:
    """Write a tiny model, a network over it and pictures into a folder."""
    import tiny
    from loras import make_lora

    models = tiny.make_models("sd1")
    tiny.write_folder(models, "sd1", folder / "sd1")
    make_lora(models, folder / "lora.safetensors", conv_dim="2", conv_alpha="1.5")
    rng = np.random.default_rng(0)
    (folder / "pictures" / "1_dog").mkdir(parents=True)
    for index, size in enumerate([(64, 64), (64, 64), (64, 128), (64, 128)]):
        picture = Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8))
        picture.save(folder / "pictures" / "1_dog" / f"{index}.png")
        caption = f"a (dog:1.2), tag{index}, x"
        (folder / "pictures" / "1_dog" / f"{index}.txt").write_text(caption, encoding="utf-8")
    picture.resize((64, 64)).save(folder / "source.png")
    (folder / "prompts.txt").write_text("a dog --n cat --w 64 --h 64 --s 2 --d 3\n", encoding="utf-8")
    return World(folder)


def make_rest(world: World) -> World:
    """Write what only the cases need that are run less often: SDXL, a ControlNet, masks, further files."""
    import tiny
    import torch
    from diffusers import ControlNetModel
    from safetensors.torch import save_file

    folder, models = world.folder, tiny.make_models("sd1")
    tiny.write_checkpoint(models, "sd1", folder / "original.safetensors")
    tiny.write_checkpoint(tiny.make_models("sd1", seed=9), "sd1", folder / "tuned.safetensors")
    tiny.write_checkpoint(tiny.make_models("sdxl"), "sdxl", folder / "sdxl.safetensors")
    torch.manual_seed(0)
    net = ControlNetModel.from_unet(models["unet"])
    for part in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        torch.nn.init.normal_(part.weight, std=0.05)
    net.save_pretrained(folder / "net")
    save_file({"emb_params": torch.randn(2, 64) * 0.1}, folder / "sks-word.safetensors")
    shutil.copytree(folder / "pictures" / "1_dog", folder / "regular" / "1_pet")
    (folder / "masks").mkdir()
    for path in (folder / "pictures" / "1_dog").glob("*.png"):
        with Image.open(path) as picture:
            picture.convert("L").save(folder / "masks" / path.name)
    Image.fromarray(np.repeat(np.repeat([[0, 255]], 64, 0), 32, 1).astype(np.uint8)).save(folder / "half.png")
    (folder / "masked.toml").write_text(
        "[[datasets]]\nresolution = 64\nbatch_size = 2\n[[datasets.subsets]]\n"
        f"image_dir = {json.dumps(str(folder / 'pictures' / '1_dog'))}\ncaption_extension = '.txt'\n"
        f"conditioning_data_dir = {json.dumps(str(folder / 'masks'))}\n"
        "custom_attributes.diff_output_preservation = true\n",
        encoding="utf-8",
    )
    return world


Case = Callable[[World, Path], list[Path]]  # writes into a folder, and returns what it wrote

# ---- training -------------------------------------------------------------------------------------------------------

FP16: dict[str, object] = {"mixed_precision": "fp16", "cache_latents": True}
BF16: dict[str, object] = {"mixed_precision": "bf16"}
PREVIEW: dict[str, object] = {"sample_at_first": True, "sample_every_n_steps": 4, "sample_sampler": "euler_a"}
DYLORA: dict[str, object] = {"network_module": "networks.dylora", "network_dim": 8}
NOISE: dict[str, object] = {
    "noise_offset": 0.1,
    "noise_offset_random_strength": True,
    "adaptive_noise_scale": 0.1,
    "ip_noise_gamma": 0.1,
    "ip_noise_gamma_random_strength": True,
}
BY_FILE: dict[str, object] = dict.fromkeys(
    ("train_data_dir", "enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_no_upscale", "resolution")
)

# Options of trainings; the ones after the first column are those of a short run.
TRAININGS: dict[str, dict[str, object]] = {
    "float32": {"cache_latents": True},
    "fp16": FP16 | PREVIEW | {"train_batch_size": 2},
    "bf16": BF16 | {"gradient_checkpointing": True},
    "validated": BF16 | {"validation_split": 0.25, "validate_every_n_steps": 2},
    "fp8": FP16 | PREVIEW | {"fp8_base": True},
    "fp8-unet": BF16 | PREVIEW | {"fp8_base_unet": True, "network_train_unet_only": True},
    "sdxl": FP16 | PREVIEW | {"pretrained_model_name_or_path": "sdxl"},
    "sdxl-unet": BF16
    | {
        "pretrained_model_name_or_path": "sdxl",
        "network_train_unet_only": True,
        "cache_text_encoder_outputs": True,
    },
    "full_fp16": FP16 | {"full_fp16": True, "max_train_steps": 30},
    "full_bf16": BF16 | {"full_bf16": True, "network_args": ["conv_dim=2"]},
    "dylora": FP16 | DYLORA | {"network_args": ["unit=2", "conv_dim=8"]},
    "dylora-unit": FP16 | DYLORA | {"network_args": ["unit=2", "dylora_update=unit"]},
    "lycoris": FP16 | {"network_module": "lycoris.kohya", "network_args": ["algo=loha", "preset=attn-mlp"]},
    "lycoris-full": BF16 | {"network_module": "lycoris.kohya", "network_args": ["algo=lokr", "preset=attn-mlp"]},
    "8bit": FP16 | {"optimizer_type": "AdamW8bit"},
    "8bit-full": FP16 | {"optimizer_type": "AdamW8bit", "full_fp16": True},
    "adafactor": FP16 | {"optimizer_type": "AdaFactor", "lr_scheduler": "adafactor"},
    "prodigy": FP16 | {"optimizer_type": "Prodigy", "learning_rate": 1},
    "texts": FP16 | {"network_train_unet_only": True, "cache_text_encoder_outputs": True} | PREVIEW,
    "text-encoder": FP16 | {"network_train_text_encoder_only": True, "text_encoder_lr": "1e-3"},
    "long": BF16 | {"max_token_length": 150, "clip_skip": 2, "weighted_captions": True},
    "noise": NOISE | {"min_snr_gamma": 5, "loss_type": "huber", "huber_schedule": "snr"},
    "multires": BF16 | {"multires_noise_iterations": 3, "v_parameterization": True, "zero_terminal_snr": True},
    "debiased": FP16
    | {
        "debiased_estimation_loss": True,
        "scale_weight_norms": 0.01,
        "loss_type": "smooth_l1",
        "huber_schedule": "constant",
    },
    "masked": FP16 | BY_FILE | {"dataset_config": "masked", "masked_loss": True},
    "regular": FP16 | {"reg_data_dir": "regular", "prior_loss_weight": 0.5},
    "dropouts": FP16 | {"network_dropout": 0.2, "network_args": ["rank_dropout=0.2", "module_dropout=0.2"]},
    "accumulated": FP16 | {"gradient_accumulation_steps": 2, "max_grad_norm": 0},
    "merged": FP16 | {"base_weights": "lora", "network_weights": "lora", "network_dim": 4},
    "batched": {"vae_batch_size": 2, "train_batch_size": 2, "cache_latents_to_disk": True},
}
PATHS = ("pretrained_model_name_or_path", "dataset_config", "reg_data_dir", "base_weights", "network_weights")


def training(world: World, out: Path, **more: object) -> list[str]:
    """Return the command line of a training in the world."""
    from runs import options

    values: dict[str, Any] = {"max_train_steps": STEPS, "learning_rate": "1e-3"} | more
    if "sample_at_first" in more:
        values["sample_prompts"] = world.prompts
    values |= {name: getattr(world, str(values[name])) for name in PATHS if name in more}
    base = values.pop("pretrained_model_name_or_path", world.sd1)
    return options(base, world.pictures, out, **{"pretrained_model_name_or_path": base} | values)


def train(world: World, out: Path, **more: object) -> list[Path]:
    """Train, and note the waits of two steps."""
    import fake_device
    from runs import train_with

    totals: list[collections.Counter[Any]] = []

    def act(progress: Progress) -> None:
        totals.append(collections.Counter(fake_device.RECORD.waits))
        if progress.step == STEPS - 1:
            PLACES.update(where_models_are())

    train_with(training(world, out, **more), act, after=None)
    if len(totals) == STEPS:
        WAITS.update({one: number / 2 for one, number in (totals[2] - totals[0]).items()})
    return [*out.glob("x.safetensors"), *sorted(out.glob("sample/*.png"))]


def _training(options: dict[str, Any]) -> Case:
    """Return a case that trains with some options."""
    return lambda world, out: train(world, out, **options)


WAITS: dict[Any, float] = {}  # of a step of the training that a case made last
PLACES: dict[str, str] = {}  # of its models


def resumed(world: World, out: Path) -> list[Path]:
    """Train in two runs, the second of which begins with the state of the first."""
    first = out / "first"
    train(world, first, **FP16, max_train_steps=2, save_state=True)
    (state,) = first.glob("x*state*")
    return train(world, out / "second", **FP16, resume=state, max_train_steps=4)


def unbroken(world: World, out: Path) -> list[Path]:
    """Train in one run what `resumed` does in two."""
    return train(world, out, **FP16, max_train_steps=4, save_state=True)


# ---- drawing --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def noting_places() -> Iterator[None]:
    """Note where the parts that ran before are when the U-Net runs."""
    from torch.nn.modules.module import register_module_forward_pre_hook

    seen: dict[str, weakref.ref[Any]] = {}

    def note(module: Any, given: Any) -> None:
        name = type(module).__name__
        if name in (*MODELS, "Encoder", "Decoder"):  # the last two of a VAE
            seen[name] = weakref.ref(module)
        if name == MODELS[0]:
            parts = {kind: part for kind, ref in seen.items() if (part := ref()) is not None}
            PLACES.update({kind: next(part.parameters()).device.type for kind, part in parts.items()})

    hook = register_module_forward_pre_hook(note)
    try:
        yield
    finally:
        hook.remove()


def draw(world: World, out: Path, *words: object, model: str = "sd1") -> list[Path]:
    """Run gen_img_diffusers.py."""
    from scripts import call

    import gen_img_diffusers

    given = ["--ckpt", getattr(world, model), "--outdir", out, "--W", 64, "--H", 64, "--steps", 3, "--seed", 5]
    prompt = [] if "--prompt" in words or "--from_file" in words else ["--prompt", "a cat --n dog"]
    with noting_places():
        call(gen_img_diffusers, *given, "--device", NAME, "--sequential_file_name", *prompt, *words)
    return sorted(out.rglob("*.png"))


def _drawing(*words: str, model: str = "sd1") -> Case:
    """Return a case; a word @NAME stands for a file of the world."""

    def case(world: World, out: Path) -> list[Path]:
        return draw(world, out, *(getattr(world, w[1:]) if w.startswith("@") else w for w in words), model=model)

    return case


NETWORK = ("--network_module", "networks.lora", "--network_weights", "@lora")
DRAWINGS: dict[str, Case] = {
    "draw": _drawing("--fp16", "--sampler", "euler_a", *NETWORK),
    "draw-offload": _drawing("--fp16", "--offload", "--image_path", "@source", "--strength", "0.6", *NETWORK),
    "draw-inpaint": _drawing("--bf16", "--image_path", "@source", "--mask_path", "@half"),
    "draw-control": _drawing("--fp16", "--control_net_models", "@net", "--guide_image_path", "@source"),
    "draw-highres": _drawing(
        *("--fp16", "--highres_fix_scale", "0.5", "--highres_fix_steps", "2", "--strength", "0.6"),
        *("--W", "128", "--H", "128", "--images_per_prompt", "2", "--batch_size", "2"),
    ),
    "draw-words": _drawing(
        "--textual_inversion_embeddings", "@sks-word", "--prompt", "a (sks-word:1.3) cat", "--clip_skip", "2"
    ),
    "draw-merged": _drawing("--fp16", "--network_merge", *NETWORK, "--vae_tiling", "--opt_channels_last"),
    "draw-sdxl": _drawing("--fp16", "--sampler", "dpmsolver++", model="sdxl"),
    "draw-sdxl-offload": _drawing("--bf16", "--offload", "--image_path", "@source", "--vae_tiling", model="sdxl"),
}


# ---- tools ----------------------------------------------------------------------------------------------------------


def tool(name: str, *words: str) -> Case:
    """Return a case that runs a tool with --device; @NAME stands for a file of the world, @OUT for the one written."""

    def case(world: World, out: Path) -> list[Path]:
        import importlib

        from scripts import call

        out.mkdir(parents=True, exist_ok=True)
        paths = {"@OUT": out / "x.safetensors"}
        given = [paths.get(w) or getattr(world, w[1:]) if w.startswith("@") else w for w in words]
        call(importlib.import_module(name), *given, "--device", NAME)
        return [out / "x.safetensors"]

    return case


def report(world: World, out: Path) -> list[Path]:
    """Train a DyLoRA, and compare its ranks with pictures of each."""
    from scripts import call

    from tools import dylora_report

    train(world, out, **DYLORA, network_args=["unit=4"], validation_split=0.5, validate_every_n_steps=3)
    told = out / "told"
    words = ["--model", out / "x.safetensors", "--pretrained_model_name_or_path", world.sd1, "--save_to", told]
    words += ["--train_data_dir", world.pictures, "--caption_extension", ".txt", "--resolution", 64]
    call(dylora_report, *words, "--timesteps", 2, "--sample_prompts", world.prompts, "--mixed_precision", "bf16")
    return sorted(out.glob("told*.png"))


def cached(world: World, out: Path) -> list[Path]:
    """Cache the latents, and train with them."""
    from scripts import call

    from tools import cache_latents

    words = training(world, out, mixed_precision="fp16", cache_latents_to_disk=True, flip_aug=True)
    call(cache_latents, *words)
    return train(world, out, mixed_precision="fp16", cache_latents_to_disk=True, flip_aug=True)


def decomposed(world: World, out: Path) -> list[Path]:
    """Decompose a matrix that is large enough for the iteration, as extractions do with layers of full size."""
    import torch
    from safetensors.torch import save_file

    from library.adapters.low_rank import nearest_spectrum

    matrix = torch.randn(200, 160, generator=torch.Generator().manual_seed(0)).to(NAME)
    found = nearest_spectrum(matrix, 2, torch.Generator().manual_seed(1))
    out.mkdir(parents=True)
    save_file({"values": found.values.cpu()}, out / "x.safetensors")
    return [out / "x.safetensors"]


TOOLS: dict[str, Case] = {
    "resize": tool("networks.resize_lora", "--model", "@lora", "--save_to", "@OUT", "--new_rank", "2"),
    "svd-merge": tool(
        *("networks.svd_merge_lora", "--models", "@lora", "@lora", "--ratios", "0.5", "0.4"),
        *("--save_to", "@OUT", "--new_rank", "2"),
    ),
    "extract": tool(
        *("networks.extract_lora_from_models", "--model_org", "@original", "--model_tuned", "@tuned"),
        *("--save_to", "@OUT", "--dim", "2", "--conv_dim", "2"),
    ),
    "extract-exact": tool(
        *("networks.extract_lora_from_models", "--model_org", "@original", "--model_tuned", "@tuned"),
        *("--save_to", "@OUT", "--dim", "2", "--exact", "--clamp_quantile", "0.99"),
    ),
    "decomposed": decomposed,
    "report": report,
    "cached": cached,
    "merge-models": tool("tools.merge_models", "--models", "@original", "@tuned", "--output", "@OUT"),
}

# ---- all cases ------------------------------------------------------------------------------------------------------

CASES: dict[str, Case] = {
    **{name: _training(options) for name, options in TRAININGS.items()},
    "unbroken": unbroken,
    "resumed": resumed,
    **DRAWINGS,
    **{f"sampler-{name}": _drawing("--fp16", "--sampler", name) for name in SAMPLER_NAMES if name[:2] != "k_"},
    **TOOLS,
}


def digest(files: list[Path]) -> str:
    """Return a hash of the tensors of weight files and the pixels of pictures; raises ValueError for NaN."""
    import torch
    from safetensors.torch import load_file

    total = hashlib.sha256()
    for file in files:
        if file.suffix == ".png":
            with Image.open(file) as picture:
                total.update(np.asarray(picture.convert("RGB")).tobytes())
            continue
        for name, tensor in sorted(load_file(file).items()):
            if not tensor.isfinite().all():
                raise ValueError(f"{file}: {name} is not finite")
            total.update(name.encode() + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a case."""

    error: str | None  # the traceback
    digest: str
    waits: dict[str, float]  # of a step of a training, by reason, file and function
    places: dict[str, str]  # kind of model -> device that it is on in the third step of a training
    operations: int  # of the device
    seconds: float  # of the processor


def run_case(name: str, world: World) -> Outcome:
    """Run a case on the device."""
    import fake_device

    WAITS.clear()
    PLACES.clear()
    fake_device.RECORD.clear()
    shutil.rmtree(world.out(name), ignore_errors=True)
    for path in world.folder.rglob("*.latents.safetensors"):  # as if no other case had run
        path.unlink()
    start, error, result = time.process_time(), None, ""
    try:
        files = CASES[name](world, world.out(name))
        assert files, "nothing was written"
        result = digest(files)
    except (Exception, SystemExit):  # noqa: BLE001 (told to whoever asked)
        error = traceback.format_exc()
    waits: dict[str, float] = {}
    for one, number in WAITS.items():
        place = f"{one.why}: {one.file} {one.function}"
        waits[place] = waits.get(place, 0) + number
    operations = fake_device.RECORD.operations.total()
    return Outcome(error, result, waits, dict(PLACES), operations, time.process_time() - start)


def where_models_are() -> dict[str, str]:
    """Return kind -> device of the base models and of the cached latents that this process holds."""
    modules = [one for one in gc.get_objects() if type(one).__name__ in MODELS]
    found = {type(one).__name__: next(one.parameters()).device.type for one in modules}
    caches = [one for one in gc.get_objects() if type(one).__name__ == LATENTS]
    for one in caches:
        found[LATENTS] = ", ".join(sorted(devices_below(one)))
    return found


def devices_below(value: object) -> set[str]:
    """Return the devices of the tensors that an object holds."""
    left: list[Any] = [vars(value)]
    seen, found = {id(value)}, set()
    while left:
        one = left.pop()
        if type(one).__name__ == "Tensor":
            found.add(one.device.type)
        elif isinstance(one, dict | list | tuple):
            inner = [part for part in gc.get_referents(one) if id(part) not in seen]
            seen.update(map(id, inner))
            left += inner
    return found


def main(folder: str, *names: str) -> None:
    """Run cases, each told when it is done."""
    import fake_device

    fake_device.install_for_accelerate()
    for name in names:
        outcome = run_case(name, World(Path(folder)))
        sys.stdout.write(json.dumps({"case": name} | dataclasses.asdict(outcome)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
