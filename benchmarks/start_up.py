"""Time what a user waits for: --help, a mistake, and the first step of a full-size run with 40 pictures.

The base model has the published sizes and random weights, fp16, in the original layout (SD 1.5 2.1 GB, SDXL 6.9 GB,
written to a temporary folder or to --model). Peak memory is the operating system's figure for the whole process; beside
it are the bytes of the weights in the type of the run.

    python benchmarks/start_up.py --model some/folder/random_sd15.safetensors
    python benchmarks/start_up.py --family sdxl --load --options mixed_precision=bf16

--load ends the run when the models are loaded, in its types and on the CPU, where the step of a large model takes long.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
SCRIPT = [sys.executable, str(ROOT / "train_network.py")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="where the random model is, or is to be written")
    parser.add_argument("--family", choices=("sd1", "sd2", "sdxl"), default="sd1")
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--pictures", type=int, default=40)
    parser.add_argument("--options", nargs="*", default=[], help="further options of the run, without their dashes")
    parser.add_argument("--load", action="store_true", help="only load the model")
    parser.add_argument("--part", choices=("model", "libraries", "weights"), help=argparse.SUPPRESS)
    parser.add_argument("--few", action="store_true", help="leave out the timings of --help and of a mistake")
    args = parser.parse_args()
    if args.part == "model":
        write_model(args.model, args.family)
        return
    if args.part:
        load_here(args)
        return
    for name, argv in () if args.few else (("--help", ["--help"]), ("a mistake", ["--netwrk_dim", "4"])):
        seconds = [timed([*SCRIPT, *argv])[0] for _ in range(7)]
        print(f"{name:10} median {statistics.median(seconds):.3f} s")
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or Path(folder) / "random.safetensors"
        if not model.exists():  # in another process, because the system counts the memory of this one for its children
            words = ["--part", "model", "--model", str(model), "--family", args.family]
            subprocess.run([sys.executable, __file__, *words], check=True)
        pictures = write_pictures(Path(folder) / "pictures" / "1_x", args.pictures)
        print(f"weights in the type of the file: {model.stat().st_size / 2**30:.2f} GiB")
        if args.load:
            load(model, args.options)
        else:
            run(model, pictures.parent, Path(folder) / "out", args)


def load(model: Path, options: list[str]) -> None:
    """Load a model in a process of its own, and print how long that takes and the memory at its peak."""
    import resource  # not on Windows

    command = [sys.executable, __file__, "--part", "libraries", "--model", str(model), "--options", *options]
    subprocess.run(command, check=True)
    bare = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    start = time.perf_counter()
    command[3] = "weights"
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    weights = int(done.stdout.splitlines()[-1])
    print(
        f"loaded in {seconds:.1f} s, peak {peak / 1e9:.2f} GB: libraries {bare / 1e9:.2f}, weights in the type of the "
        f"run {weights / 1e9:.2f}, and {(peak - bare) / weights - 1:.1%} of these"
    )


def load_here(args: argparse.Namespace) -> None:
    """Import what loads a model, and unless only the libraries are wanted, load it; print the bytes of its weights."""
    from library.config.options import build
    from library.config.train import TrainConfig
    from library.errors import Problems
    from library.models import building
    from library.models.base import find_base, load_base
    from library.models.family import SD1
    from library.training.prepare.placing import store_models
    from library.training.run.runtime import types_of_run

    words = dict(option.partition("=")[::2] for option in args.options)
    given = {name: value or True for name, value in words.items()}
    config = build(TrainConfig, given | {"pretrained_model_name_or_path": str(args.model)}, Problems())
    if args.part == "libraries":
        building.build_unet(SD1.unet)
        building.build_text_encoder(SD1.text_models[0].config)
        return
    files = find_base(config.model)
    base = load_base(files, types_of_run(config.precision, vae_overflows=files.vae_overflows))
    store_models(config.precision, base)
    parts = (base.unet, base.vae, *base.text_modules)
    print(sum(parameter.nbytes for part in parts for parameter in part.parameters()))


def timed(command: list[str]) -> tuple[float, str]:
    start = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    return time.perf_counter() - start, done.stderr


def run(model: Path, pictures: Path, out: Path, args: argparse.Namespace) -> None:
    import resource  # not on Windows

    argv = [
        f"--pretrained_model_name_or_path={model}",
        f"--train_data_dir={pictures}",
        f"--output_dir={out}",
        f"--resolution={args.resolution}",
        "--network_module=networks.lora",
        "--network_dim=32",
        "--learning_rate=1e-4",
        "--max_train_steps=1",
        "--cache_latents",
        "--seed=1",
        *(f"--{option}" for option in args.options),
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds, output = timed([*SCRIPT, *argv])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(output.replace("\r", "\n").strip().splitlines()[-1])
    peak = after.ru_maxrss / 2**20
    print(f"from the shell to the saved first step: {seconds:.1f} s ({cpu:.1f} s CPU), peak {peak:.2f} GiB")


def write_model(path: Path, family: str) -> None:
    """Write a full-size checkpoint with random weights, fp16, tensor by tensor."""
    import full_size
    import tiny
    import torch

    from library.safetensors_io import write_stream

    base = full_size.empty_base(tiny.FAMILIES[family])
    models = {"unet": base.unet, "vae": base.vae} | {text.row.folder: text.module for text in base.texts}
    state = tiny.original_state(models, family)
    infos = {
        name: (torch.float16 if tensor.is_floating_point() else tensor.dtype, tuple(tensor.shape))
        for name, tensor in state.items()
    }
    generator = torch.Generator().manual_seed(0)

    def filled() -> Iterator[tuple[str, torch.Tensor]]:
        for name, (dtype, shape) in infos.items():
            if not dtype.is_floating_point:
                yield name, state[name]
            elif len(shape) < 2:
                yield name, torch.full(shape, float(name.endswith("weight")), dtype=dtype)
            else:
                values = torch.randn(shape, generator=generator) * math.prod(shape[1:]) ** -0.5
                yield name, values.to(dtype)

    write_stream(path, infos, filled())


def write_pictures(folder: Path, number: int) -> Path:
    """Write photographs' worth of noise: JPEG, 1024 x 768."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(number):
        small = Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8))
        small.resize((1024, 768), Image.Resampling.BICUBIC).save(folder / f"{index:03d}.jpg", quality=92)
    return folder


if __name__ == "__main__":
    main()
