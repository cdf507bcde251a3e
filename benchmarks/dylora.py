"""What DyLoRA costs, and what its ranks are worth.

--part step    the training step of networks.dylora against that of networks.lora with the same rank, interleaved in
               one process; and against a variant that cuts D[:b] and U[:, :b] out in place of the mask.
--part ranks   on the pocket model: one DyLoRA for each way to update, and a plain LoRA of every rank, trained with the
               same steps; the loss on held-out pictures of each extracted rank beside its plain counterpart and the
               plain LoRA of full rank cut to it. About 15 minutes on one core.

    python benchmarks/dylora.py --part step
    python benchmarks/dylora.py --part step --size full --rounds 5 --threads 2
    python benchmarks/dylora.py --part ranks --steps 300

What is compared in part ranks: a plain LoRA of rank r has alpha r, so that it acts with U D, whatever its rank. Rank b
of a DyLoRA acts with alpha / b U D. Two alphas are fair in two ways: 16, the rank, makes the full rank what the plain
LoRA is, but lower ranks learn faster than theirs; 8, near the harmonic mean of the ranks 4 to 16, makes alpha / b 1 on
average over the steps. The plain LoRA cut to rank b gets alpha b, so that what is left acts as it did.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

if TYPE_CHECKING:
    from library.training.measure.picture_losses import Losses, Measurement

UPDATES = ("all", "unit")
# Name, kind of the DyLoRA, update; no kind is the plain LoRA. Masks keep the shapes of all ranks, slices do not.
VARIANTS = (
    ("plain LoRA", "", ""),
    *((f"DyLoRA, {update}", "slices", update) for update in UPDATES),
    *((f"with masks, {update}", "masks", update) for update in UPDATES),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("step", "ranks"), required=True)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--unit", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1, help="with 1, times are those on the processor")
    step = parser.add_argument_group("part step")
    step.add_argument("--size", choices=("small", "full"), default="small")
    step.add_argument("--resolution", type=int, default=64)
    step.add_argument("--batch_size", type=int, default=1)
    step.add_argument("--rounds", type=int, default=60)
    step.add_argument("--warmup", type=int, default=3)
    step.add_argument("--conv_dim", type=int, default=0, help="LoRA-C3Lier; must be --rank")
    step.add_argument("--unet_only", action="store_true")
    step.add_argument("--checkpointing", action="store_true")
    ranks = parser.add_argument_group("part ranks")
    ranks.add_argument("--steps", type=int, default=300)
    ranks.add_argument("--learning_rate", default="1e-3")
    ranks.add_argument("--alphas", type=float, nargs="*", default=[16, 8], help="of the DyLoRA, one training for each")
    ranks.add_argument("--seed", type=int, default=42)
    ranks.add_argument("--held_out", type=float, default=0.34, help="share of the pictures")
    ranks.add_argument("--timesteps", type=int, default=16)
    ranks.add_argument("--draws", type=int, default=4)
    ranks.add_argument("--work", type=Path, help="folder for the files; those that are there are not trained again")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)

    import torch

    torch.set_num_threads(args.threads)
    {"step": measure_steps, "ranks": measure_ranks}[args.part](args)


def clock_of(args: argparse.Namespace) -> Callable[[], float]:
    """Return the clock: of one thread the time on the processor, which other work on the machine disturbs less."""
    return time.process_time if args.threads == 1 else time.perf_counter


# --------------------------------------------------------------------------------------------------------------
# Part step
# --------------------------------------------------------------------------------------------------------------


def measure_steps(args: argparse.Namespace) -> None:
    """Print the time of a step for each variant, and its ratio to the plain step of the same round."""
    from benchmarks.train_step import base_models, make_ours, share

    unet, text_encoder = base_models(args.size)
    steps: dict[str, Callable[[], object]] = {}
    for name, kind, update in VARIANTS:
        own = copy.copy(args)
        own.network_module = "networks.dylora" if kind else "networks.lora"
        own.network_args = [f"unit={args.unit}", f"dylora_update={update}"] if kind else []
        own.keep_shapes = kind == "masks"
        steps[name] = make_ours(share(unet), share(text_encoder), own)
    for _ in range(args.warmup):
        for step in steps.values():
            step()
    clock = clock_of(args)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            start = clock()
            step()
            seconds[name].append(clock() - start)
    print(
        f"{args.size} model, {args.resolution} px, batch {args.batch_size}, rank {args.rank}, unit {args.unit}, "
        f"{args.threads} threads, {args.rounds} rounds"
    )
    for name, values in seconds.items():
        ratios = [value / plain for value, plain in zip(values, seconds["plain LoRA"], strict=True)]
        quarters = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        print(
            f"{name:20} median {statistics.median(values) * 1000:8.1f} ms   ratio to the plain LoRA: "
            f"median {statistics.median(ratios):.3f} (middle half {quarters[0]:.3f} to {quarters[2]:.3f}), "
            f"of the fastest {min(values) / min(seconds['plain LoRA']):.3f}"
        )


# --------------------------------------------------------------------------------------------------------------
# Part ranks
# --------------------------------------------------------------------------------------------------------------


def measure_ranks(args: argparse.Namespace) -> None:
    """Train what is compared, measure every rank of everything, and print the tables."""
    from networks import extract_lora_from_dylora

    os.chdir(ROOT)  # the dataset file names its folder from there
    folder = args.work or Path(tempfile.mkdtemp())
    ranks = range(args.unit, args.rank + 1, args.unit)
    train(args, folder, "warm-up", rank=args.unit, alpha=args.unit, steps=2)  # imports; not counted
    seconds = {f"plain {rank}": train(args, folder, f"plain-{rank}", rank=rank, alpha=rank) for rank in ranks}
    dyloras = {f"DyLoRA, {update}, alpha {alpha:g}": (update, alpha) for alpha in args.alphas for update in UPDATES}
    stems = {kind: f"dylora-{update}-{alpha:g}" for kind, (update, alpha) in dyloras.items()}
    for kind, (update, alpha) in dyloras.items():
        more = [f"unit={args.unit}", f"dylora_update={update}"]
        seconds[kind] = train(args, folder, stems[kind], rank=args.rank, alpha=alpha, more=more)
        path = str(folder / f"{stems[kind]}.safetensors")
        extract_lora_from_dylora.main(["--model", path, "--save_to", path])
    cut(folder / f"plain-{args.rank}.safetensors", ranks)
    measurement = load(args, folder)
    files = {
        "plain LoRA": {rank: f"plain-{rank}" for rank in ranks},
        **{kind: {rank: f"{stem}-{rank:04d}" for rank in ranks} for kind, stem in stems.items()},
        f"plain {args.rank} cut": {rank: f"cut-{rank:04d}" for rank in ranks},
    }
    losses = {
        kind: {rank: losses_of(measurement, folder / f"{name}.safetensors") for rank, name in names.items()}
        for kind, names in files.items()
    }
    print(
        f"{args.steps} steps, rank {args.rank}, unit {args.unit}, learning rate {args.learning_rate}, "
        f"seed {args.seed}, {args.threads} threads\n"
    )
    print_losses(losses, losses_of(measurement, folder / f"plain-{args.rank}.safetensors", absent=True))
    print_seconds(seconds)


def options(args: argparse.Namespace, folder: Path, name: str, *, rank: int, alpha: float, steps: int) -> list[str]:
    """Return the command line of a training: that of examples/unicorn, with pictures held out and no previews."""
    values = {
        "pretrained_model_name_or_path": ROOT / "examples" / "pocket_model",
        "dataset_config": ROOT / "examples" / "unicorn" / "dataset.toml",
        "validation_split": args.held_out,
        "validate_every_n_epochs": 1_000_000,  # it is measured afterwards, more closely
        "vae_batch_size": 4,
        "network_module": "networks.lora",
        "network_dim": rank,
        "network_alpha": alpha,
        "learning_rate": args.learning_rate,
        "max_train_steps": steps,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": min(20, steps - 1),
        "seed": args.seed,
        "output_dir": folder,
        "output_name": name,
    }
    return ["--cache_latents", *(word for key, value in values.items() for word in (f"--{key}", str(value)))]


def train(
    args: argparse.Namespace,
    folder: Path,
    name: str,
    *,
    rank: int,
    alpha: float,
    more: Sequence[str] = (),
    steps: int | None = None,
) -> float:
    """Train a network, a DyLoRA where more has its arguments, and return the seconds; once for each folder."""
    import train_network

    record = folder / f"{name}.seconds"
    if record.is_file():
        return float(record.read_text(encoding="utf-8"))
    argv = options(args, folder, name, rank=rank, alpha=alpha, steps=steps or args.steps)
    argv += ["--network_module", "networks.dylora"] if more else []
    argv += ["--network_args", *more, f"conv_dim={rank}", f"conv_alpha={alpha}"]
    clock = clock_of(args)
    start = clock()
    train_network.main(argv)
    seconds = clock() - start
    record.write_text(str(seconds), encoding="utf-8")
    return seconds


def cut(path: Path, ranks: Sequence[int]) -> None:
    """Write the first ranks of a plain LoRA; alpha falls with the rank, so that alpha / rank stays."""
    from library.adapters.dylora import truncated_to
    from library.adapters.names import ALPHA
    from networks.lora import read_weights, write_weights

    weights, full = read_weights(path), ranks[-1]
    for rank in ranks:
        part = truncated_to(rank, weights)
        part = {name: tensor * rank / full if name.endswith(ALPHA) else tensor for name, tensor in part.items()}
        write_weights(path.with_name(f"cut-{rank:04d}.safetensors"), part, None)


def load(args: argparse.Namespace, folder: Path) -> Measurement:
    """Return the measurement on what is held out."""
    from library.config.train import parse_train_config
    from library.data.records import load_datasets
    from library.errors import Problems
    from library.models.base import find_base
    from library.training.measure.picture_losses import load_measurement, to_measure

    problems = Problems()
    given = options(args, folder, "measured", rank=args.rank, alpha=args.rank, steps=args.steps)
    config = parse_train_config(given, problems)
    problems.raise_if_any()
    datasets = to_measure(load_datasets(config))
    files = find_base(config.model)
    return load_measurement(config, datasets, files, seed=args.seed, num_timesteps=args.timesteps, draws=args.draws)


def losses_of(measurement: Measurement, path: Path, *, absent: bool = False) -> Losses:
    """Return the losses with a LoRA file applied, or of the base model."""
    from library.config.network import NetworkConfig
    from library.config.optimizer import OptimizerConfig
    from library.networks.trainable import build_network

    network = build_network(
        NetworkConfig(network_module="networks.lora", network_weights=path, dim_from_weights=True),
        OptimizerConfig(),
        measurement.base,
        checkpointing=False,
        device=measurement.runtime.device,
    )
    network.eval()
    if absent:
        with network.absent():
            losses = measurement.losses(network, "base model")
    else:
        losses = measurement.losses(network, path.stem)
    network.remove()
    return losses


def print_losses(losses: dict[str, dict[int, Losses]], base: Losses) -> None:
    """Print a row for each rank: the loss of each kind, and its difference to the plain LoRA with its 95 % interval."""
    from library.training.measure.picture_losses import interval, paired, picture_means

    mean = interval(picture_means(base)).mean
    print(f"base model: {mean:.5f}; {len(base)} pictures held out; in brackets the difference to the plain LoRA\n")
    print(f"| rank | {' | '.join(losses)} |")
    print("|---" * (1 + len(losses)) + "|")
    for rank, plain in losses["plain LoRA"].items():
        cells = []
        for kind, found in losses.items():
            difference = "" if kind == "plain LoRA" else f" ({paired(found[rank], plain)})"
            cells.append(f"{interval(picture_means(found[rank])).mean:.5f}{difference}")
        print(f"| {rank} | {' | '.join(cells)} |")
    print()


def print_seconds(seconds: dict[str, float]) -> None:
    """Print the time of each training, and of all plain ones together."""
    plain = sum(value for name, value in seconds.items() if name.startswith("plain"))
    print("| training | seconds |\n|---|---|")
    for name, value in (seconds | {"all plain ones": plain}).items():
        print(f"| {name} | {value:.1f} |")


if __name__ == "__main__":
    main()
