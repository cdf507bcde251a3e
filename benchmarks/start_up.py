"""Time what a user waits for: --help, a mistake, and the first step of a full-size run with 40 pictures.

The base model is SD 1.5 in size with random weights, fp16, in the original layout (2.1 GB, written to a
temporary folder or to --model). Peak memory is the operating system's figure for the whole process.

    python benchmarks/start_up.py --model some/folder/random_sd15.safetensors
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
SCRIPT = [sys.executable, str(ROOT / "train_network.py")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="where the random model is, or is to be written")
    parser.add_argument("--family", choices=("sd1", "sd2"), default="sd1")
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--pictures", type=int, default=40)
    parser.add_argument("--options", nargs="*", default=[], help="further options of the run, without their dashes")
    args = parser.parse_args()
    for name, argv in (("--help", ["--help"]), ("a mistake", ["--netwrk_dim", "4"])):
        seconds = [timed([*SCRIPT, *argv])[0] for _ in range(7)]
        print(f"{name:10} median {statistics.median(seconds):.3f} s")
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or Path(folder) / "random.safetensors"
        if not model.exists():
            write_model(model, args.family)
        pictures = write_pictures(Path(folder) / "pictures" / "1_x", args.pictures)
        run(model, pictures.parent, Path(folder) / "out", args)


def timed(command: list[str]) -> tuple[float, str]:
    start = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    return time.perf_counter() - start, done.stderr


def run(model: Path, pictures: Path, out: Path, args: argparse.Namespace) -> None:
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
    """Write a full-size checkpoint with random weights, fp16."""
    import tiny
    import torch

    from library.models import building

    kind = tiny.FAMILIES[family]
    models = {
        "unet": tiny.materialise(building.build_unet(kind.unet), 0),
        "vae": tiny.materialise(building.build_vae(kind.vae), 1),
        "text_encoder": tiny.materialise(building.build_text_encoder(kind.text_models[0].config), 2),
    }
    tiny.write_checkpoint(models, family, path, torch.float16)


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
