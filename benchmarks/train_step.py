"""Time a training step against its floor and against peft, interleaved in one process.

floor, peft: see benchmarks/card/floor.py
ours:        the recipe's own step: noise, text encoder, U-Net with networks.lora, loss, backward, clipping, AdamW

    python benchmarks/train_step.py                 # small model, 64 px, rank 4, one thread
    python benchmarks/train_step.py --size full --resolution 128 --rank 32 --threads 2 --rounds 5
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from torch import nn
    from transformers import CLIPTextModel

    from library.data.batches import Batch

Model = TypeVar("Model", bound="nn.Module")

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks.card import floor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("small", "full"), default="small")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--conv_dim", type=int, default=0, help="LoRA-C3Lier; peft then adapts the same layers")
    parser.add_argument("--network_module", default="networks.lora")
    parser.add_argument("--network_args", nargs="*", default=[])
    parser.add_argument("--keep_shapes", action="store_true", help="as with --torch_compile and --cuda_graphs")
    parser.add_argument("--unet_only", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--without", nargs="*", default=[], help="variants to leave out")
    parser.add_argument("--profile", help="write a profile of our step to this file")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    measure(args)


def measure(args: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(args.threads)
    unet, text_encoder = base_models(args.size)
    makers = {"floor": make_floor, "ours": make_ours, "peft": make_peft}
    variants: dict[str, Callable[[], object]] = {}
    for name, make in makers.items():
        if name not in args.without:
            # peft changes the modules it adapts: each variant has modules of its own over shared weights.
            variants[name] = make(share(unet), share(text_encoder), args)
    for _ in range(args.warmup):
        for step in variants.values():
            step()
    if args.profile:
        profile(variants["ours"], args.profile)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(args.rounds):
        for name, step in variants.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    print(f"{args.size} model, {args.resolution} px, batch {args.batch_size}, rank {args.rank}, {args.threads} threads")
    for name, values in seconds.items():
        ratios = [value / floor for value, floor in zip(values, seconds.get("floor", values), strict=True)]
        print(
            f"{name:6} median {statistics.median(values) * 1000:8.1f} ms   "
            f"ratio to floor: median {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        )


def base_models(size: str) -> tuple:
    """Return (U-Net, text encoder) with random weights: SD 1.5, or its structure with narrow layers."""
    import tiny

    from library.models import building
    from library.models import family as families

    unet_config, text_config = families.SD1.unet, families.SD1.text_models[0].config
    if size == "small":
        unet_config = unet_config | {"block_out_channels": (32, 64, 128, 128), "cross_attention_dim": 64}
        text_config = building.text_encoder_config(
            families.SD1.text_models[0], width=64, inner_width=256, num_layers=12
        )
    unet = tiny.materialise(building.build_unet(unet_config), 0)
    return unet, tiny.materialise(building.build_text_encoder(text_config), 1)


def share(model: Model) -> Model:
    """Return a copy of a model over the same weights."""
    weights = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, memo=weights)


def batch_inputs(args: argparse.Namespace) -> tuple:
    import torch

    generator = torch.Generator().manual_seed(0)
    side = args.resolution // 8
    moments = torch.randn(args.batch_size, 8, side, side, generator=generator)
    return moments, ["a photo of a cat"] * args.batch_size


def work_of(unet: UNet2DConditionModel, text_encoder: CLIPTextModel, args: argparse.Namespace) -> floor.Work:
    return floor.Work(
        unet,
        text_encoder,
        batch=args.batch_size,
        side=args.resolution // 8,
        rank=args.rank,
        conv_dim=args.conv_dim,
        trains_text=not args.unet_only,
        checkpointing=args.checkpointing,
    )


def make_floor(
    unet: UNet2DConditionModel, text_encoder: CLIPTextModel, args: argparse.Namespace
) -> Callable[[], object]:
    return floor.make_floor(work_of(unet, text_encoder, args))


def make_ours(
    unet: UNet2DConditionModel, text_encoder: CLIPTextModel, args: argparse.Namespace
) -> Callable[[], object]:
    from library.config.options import build
    from library.config.train import TrainConfig
    from library.config.values import parse_pairs
    from library.diffusion.schedule import stable_diffusion_schedule
    from library.models import building
    from library.models.base import BaseModel, TextEncoder
    from library.models.conditioning import LiveConditioner, TextOptions
    from library.models.family import SD1
    from library.models.latent_encoder import LatentEncoder
    from library.models.tokenizer import load_clip_tokenizer
    from library.networks.trainable import build_network
    from library.optim.flat import TrainedWeights
    from library.optim.optimizers import build_optimizer, choose_optimizer
    from library.training.prepare.placing import enable_gradient_checkpointing
    from library.training.run.objective import Objective
    from library.training.run.runtime import start_runtime
    from library.training.run.state import TrainState
    from library.training.run.step import EagerPass, OptimizerStep, Verdict

    given = {
        "pretrained_model_name_or_path": "built below",
        "output_dir": Path(),  # where nothing is written
        "network_module": args.network_module,
        "network_dim": args.rank,
        "network_train_unet_only": args.unet_only,
        "network_args": parse_pairs(args.network_args) | ({"conv_dim": str(args.conv_dim)} if args.conv_dim else {}),
        "learning_rate": 1e-4,
    }
    config = build(TrainConfig, given)
    runtime = start_runtime(config.precision, config.logs, vae_overflows=False)
    vae = building.build_vae(SD1.vae)  # whose weights are not needed: the latents are given
    texts = (TextEncoder(SD1.text_models[0], load_clip_tokenizer(), text_encoder),)
    base = BaseModel(SD1, predicts_v=False, zero_snr=False, unet=unet, vae=vae, texts=texts)
    network = build_network(config.network, config.optimizer, base, checkpointing=False, device=runtime.device)
    if args.checkpointing:
        enable_gradient_checkpointing(base, network)
    groups, names = network.groups(config.optimizer)
    weights = TrainedWeights(groups, runtime.types.unet)
    network.compute_with(weights.copies)
    if args.keep_shapes:
        network.keep_shapes()
    optimizer = build_optimizer(choose_optimizer(config.optimizer), weights.groups(together=True), 1e-4)
    objective = Objective(
        base=base,
        network=network,
        encoder=LatentEncoder(vae, runtime.types.vae),
        conditioner=LiveConditioner(texts),
        text=TextOptions(),
        schedule=stable_diffusion_schedule(),
        loss=config.loss,
        types=runtime.types,
        device=runtime.device,
        seed=1,
    )
    state = TrainState(network, weights, optimizer, None, runtime.scaler, names)
    step = OptimizerStep(
        objective,
        EagerPass(objective),
        state,
        runtime,
        verdict=Verdict("stop", runtime.scaler),
        seed=1,
        max_grad_norm=1.0,
    )
    network.on_epoch_start()
    numbers, batch = itertools.count(), one_batch(args)
    return lambda: step(next(numbers), [batch]).result()


def one_batch(args: argparse.Namespace) -> Batch:
    """Return a batch of random latents with captions."""
    import torch

    from library.data.batches import Batch, Sample

    moments, captions = batch_inputs(args)
    return Batch(
        epoch=1,
        samples=tuple(Sample(0, index, 0) for index in range(args.batch_size)),
        names=("x",) * args.batch_size,
        captions=tuple(captions),
        loss_weights=torch.ones(args.batch_size),
        preserved=torch.zeros(args.batch_size, dtype=torch.bool),
        moments=moments,
        pixels=None,
        masks=None,
        sizes=torch.zeros(args.batch_size, 6, dtype=torch.int64),
    )


def make_peft(
    unet: UNet2DConditionModel, text_encoder: CLIPTextModel, args: argparse.Namespace
) -> Callable[[], object]:
    return floor.make_peft(work_of(unet, text_encoder, args))


def profile(step: Callable[[], object], path: str) -> None:
    """Write where the time of our step goes, by operator."""
    import torch

    with torch.profiler.profile() as recorded:
        for _ in range(5):
            step()
    table = recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=40)
    Path(path).write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
