"""Steps a second of gen_img_diffusers.py's drawing against diffusers' own pipeline on the same model, in one run.

python benchmarks/generate.py [--size 128] [--batch 1] [--steps 20] [--rounds 5] [--start_up]

The model is examples/pocket_model, or --ckpt. Rounds of both are interleaved; --start_up times whole processes that
draw one picture of one step: the script, and a program that imports diffusers, loads the model and does the same.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PLAIN = """
import sys, torch
from diffusers import StableDiffusionPipeline
options = {"local_files_only": True, "safety_checker": None, "torch_dtype": torch.float32}
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], **options)
pipe("a cat", height=int(sys.argv[2]), width=int(sys.argv[2]), num_inference_steps=1).images[0].save(sys.argv[3])
"""


def main() -> None:
    """Run the script with the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, default=ROOT / "examples" / "pocket_model")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--start_up", action="store_true")
    args = parser.parse_args()
    times = start_up(args) if args.start_up else drawing(args)
    ours, theirs = min(times["suite"]), min(times["diffusers"])
    unit = "s a picture of one step" if args.start_up else "steps a second"
    shown = (ours, theirs) if args.start_up else tuple(args.steps * args.batch / seconds for seconds in (ours, theirs))
    print(f"{args.size} px, batch {args.batch}: suite {shown[0]:.2f} {unit}, diffusers {shown[1]:.2f}")
    print(f"suite takes {ours / theirs:.3f} x the time of diffusers; shortest of {args.rounds} rounds")


def drawing(args: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds of drawing a batch, model loaded, pictures decoded, nothing saved."""
    import torch
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    from library.config.command_line import parse
    from library.config.generation import GenerateConfig
    from library.generation.image_generator import ImageGenerator
    from library.generation.jobs import ImageLists, JobMaker
    from library.generation.networks import LoadedNetworks
    from library.generation.recipe import device_of, open_base
    from library.generation.requests import Request

    config = parse(GenerateConfig, ["--ckpt", str(args.ckpt), "--steps", str(args.steps)])
    device = device_of(config.speed.device)
    base = open_base(config, device)
    networks = LoadedNetworks([], base)
    generator = ImageGenerator(config.images, config.control, config.speed, base, networks, device)
    maker = JobMaker(
        config.prompts,
        config.drawing,
        config.images,
        ImageLists(),
        networks,
        base.family,
        base.family.side,
        base.texts[0],
    )
    requests = [
        Request(prompt="a cat", seed=seed, width=args.size, height=args.size, steps=args.steps)
        for seed in range(args.batch)
    ]
    pipe = StableDiffusionPipeline.from_pretrained(
        args.ckpt,
        vae=base.vae,
        text_encoder=base.texts[0].module,
        tokenizer=base.texts[0].tokenizer,
        unet=base.unet,
        scheduler=DDIMScheduler.from_pretrained(args.ckpt, subfolder="scheduler"),
        safety_checker=None,
    )
    pipe.set_progress_bar_config(disable=True)

    def suite() -> None:
        list(generator.generate(map(maker.job_of, requests, range(args.batch)), args.batch))

    def diffusers() -> None:
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in range(args.batch)]
        size = {"height": args.size, "width": args.size}
        pipe(["a cat"] * args.batch, num_inference_steps=args.steps, generator=generators, **size)

    return interleaved({"suite": suite, "diffusers": diffusers}, args.rounds)


def start_up(args: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds of whole processes that draw one picture of one step."""
    with tempfile.TemporaryDirectory() as folder:
        size, model = str(args.size), str(args.ckpt)
        ours = [sys.executable, str(ROOT / "gen_img_diffusers.py"), "--ckpt", model, "--outdir", folder]
        ours += ["--prompt", "a cat", "--W", size, "--H", size, "--steps", "1"]
        theirs = [sys.executable, "-c", PLAIN, model, size, f"{folder}/x.png"]

        def run(command: list[str]) -> None:
            subprocess.run(command, check=True, capture_output=True)

        return interleaved({"suite": lambda: run(ours), "diffusers": lambda: run(theirs)}, args.rounds)


def interleaved(jobs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each job, all jobs once in each round, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if number:
                times[name].append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    main()
