"""Count what a training step gives a GPU to do, without a GPU: launches, bytes kept for backward, waits of the host.

    python benchmarks/launches.py                              # all cases and variants
    python benchmarks/launches.py sd15 --variants floor ours   # one case, some variants
    python benchmarks/launches.py --json counts.json

Models of full size run on a device in Python (`tests/fake_device.py`) with shapes alone, so that a step takes seconds
and little memory. `ours` and `dylora` are the suite's own training, started from its command line; what is counted is
the third step. `floor` is the frozen models forward and backward to the inputs of the first adapted layers, with noise
and loss; `peft` the same with peft's adapters, clipping and AdamW.

Launches are operations of the device, each weighted with the kernels that it is on CUDA (`WEIGHTS`, by reading ATen:
within one table they compare, as times they mean nothing). `saved` are the bytes that autograd saves, without
the frozen weights; `kept` is by how much the memory of the device grows until the U-Net's output is there. Waits are
those of a real training of a tiny model, in steps after the second.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import logging
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import fake_device as fake
import torch
from torch import Tensor, nn

VARIANTS = ("floor", "floor-no-autocast", "ours", "dylora", "peft")
PARTS = ("text", "unet", "backward", "other")
COUNTED = 3  # the step that is counted, from 1


@dataclasses.dataclass(frozen=True)
class Case:
    """A training at full size."""

    family: str  # of full_size
    side: int
    unet_only: bool = False
    checkpointing: bool = False


CASES = {
    "sd15": Case("SD1", 512),
    "sd15-unet": Case("SD1", 512, unet_only=True),
    "sd15-checkpointing": Case("SD1", 512, checkpointing=True),
    "sdxl": Case("SDXL", 1024),
    "sdxl-unet": Case("SDXL", 1024, unet_only=True),
}


@dataclasses.dataclass(frozen=True)
class Given:
    """What is the same for all cases."""

    batch: int
    rank: int
    precision: str
    steps: int = COUNTED + 1


@dataclasses.dataclass
class Count:
    """The figures of a step."""

    launches: dict[str, int]  # by part
    saved: int  # bytes
    kept: int  # bytes
    operations: dict[str, int]

    @property
    def total(self) -> int:
        """Launches of the step."""
        return sum(self.launches.values())


# ---- launches of an operation on CUDA -------------------------------------------------------------------------------


def _lists(per_launch: int) -> Callable[[Sequence[Any]], int]:
    """A kernel over lists of tensors takes so many of them at once."""
    return lambda args: math.ceil(len(args[0]) / per_launch)


# Operations that are not one launch; by reading ATen of torch 2.13.
WEIGHTS: dict[str, Callable[[Sequence[Any]], int]] = {
    "aten::baddbmm": lambda args: 2,  # the summand is copied into the result first
    "aten::addmm": lambda args: 1 if args[0].ndim == 1 else 2,  # a bias is added by cuBLASLt
    "aten::convolution": lambda args: 1 if args[2] is None else 2,
    "aten::convolution_backward": lambda args: sum(args[-1]),
    "aten::native_group_norm": lambda args: 3,
    "aten::native_group_norm_backward": lambda args: 4 + any(args[-1][1:]),
    "aten::native_layer_norm_backward": lambda args: 1 + any(args[-1][1:]),
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": lambda args: 3,
    "aten::nonzero": lambda args: 4,
    "aten::index.Tensor": lambda args: 1 + 4 * sum(one is not None and one.dtype is torch.bool for one in args[1]),
    "aten::_fused_adamw_": _lists(36),
}


def weigh(name: str, args: Sequence[Any]) -> int:
    """Return the launches of an operation."""
    if name in WEIGHTS:
        return WEIGHTS[name](args)
    return _lists(64)(args) if name.startswith("aten::_foreach_") and isinstance(args[0], list | tuple) else 1


# ---- models ---------------------------------------------------------------------------------------------------------


def full_base(family: str, types: Any, device: torch.device | str) -> Any:
    """Return a base model of full size whose weights have memory, but nothing in it."""
    import full_size

    from library.models import family as families
    from library.training.rehearse.dry_run import take_types

    base = full_size.empty_base(getattr(families, family))
    take_types(base, types)
    for model in (base.unet, base.vae, *base.text_modules):
        model.to_empty(device=device)
        for module in model.modules():
            if isinstance(ids := getattr(module, "position_ids", None), Tensor):
                module.position_ids = torch.arange(ids.shape[-1], device=device).expand(ids.shape)
    return base


class Counter:
    """Counts in a step: launches by part of the model, what autograd saves, the memory that grows."""

    def __init__(self) -> None:
        self._models: list[nn.Module] = []
        self._frozen: set[int] = set()  # addresses of storages of weights
        self._saved: dict[int, int] = {}
        self._before = self._kept = 0
        self._outer: list[str] = []  # the parts around the one that runs

    def watch(self, base: Any) -> None:
        """Tell operations inside the U-Net and the text encoders from the others."""
        self._models = [base.unet, *base.text_modules]
        for model in self._models:
            part = "unet" if model is base.unet else "text"
            model.register_forward_pre_hook(lambda module, given, part=part: self._enter(part))
            model.register_forward_hook(lambda module, given, output: self._leave())

    def begin(self) -> None:
        """Count from here."""
        self._frozen = {p.untyped_storage().data_ptr() for model in self._models for p in model.parameters()}
        fake.RECORD.clear()
        fake.RECORD.part = "other"
        self._saved.clear()
        self._before, self._kept = fake.RECORD.bytes, 0

    def end(self) -> Count:
        """Return what was counted since `begin`."""
        launches = {part: fake.RECORD.launches[part] for part in PARTS}
        return Count(launches, sum(self._saved.values()), self._kept, dict(fake.RECORD.operations))

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count what autograd saves within it."""

        def pack(tensor: Tensor) -> Tensor:
            if fake.is_fake(tensor) and (address := tensor.untyped_storage().data_ptr()) not in self._frozen:
                self._saved[address] = tensor.untyped_storage().nbytes()
            return tensor

        fake.RECORD.weigh = weigh
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    def _enter(self, part: str) -> None:
        self._outer.append(fake.RECORD.part)
        fake.RECORD.part = part

    def _leave(self) -> None:
        fake.RECORD.part = self._outer.pop()
        self._kept = max(self._kept, fake.RECORD.bytes - self._before)


# ---- the suite's own step -------------------------------------------------------------------------------------------


class Counted(Exception):
    """The step was counted."""


def count_ours(module: str, case: Case, given: Given) -> Count:
    """Return the figures of a step of train_network.py."""
    from runs import train_with

    from library.training.prepare import placing

    counter, counts = Counter(), []

    def load(files: Any, types: Any, *, filled: Any = None) -> Any:
        base = full_base(case.family, types, "cpu")
        counter.watch(base)
        return base

    def act(progress: Any) -> None:
        if progress.step == COUNTED:
            counts.append(counter.end())
            raise Counted
        counter.begin()

    own = placing.load_base
    with tempfile.TemporaryDirectory() as folder, counter.counting():
        placing.load_base = load
        try:
            train_with(command_line(module, case, given, Path(folder)), act, after=None)
        except Counted:
            return counts[0]
        finally:
            placing.load_base = own
    raise AssertionError("the training ended before its third step")


def command_line(module: str, case: Case, given: Given, folder: Path) -> list[str]:
    """Return the words of a training of a full-size model, which stands behind the files of a small one."""
    from PIL import Image
    from runs import options

    pictures = folder / "pictures" / "1_a"
    pictures.mkdir(parents=True)
    for index in range(2 * given.batch):
        Image.new("RGB", (case.side, case.side), (index, 0, 0)).save(pictures / f"{index}.png")
        (pictures / f"{index}.txt").write_text("a photo of a cat", encoding="utf-8")
    return options(
        ROOT / "examples" / {"SD1": "pocket_model", "SDXL": "pocket_xl"}[case.family],
        pictures.parent,
        folder / "out",
        resolution=case.side,
        min_bucket_reso=None,
        max_bucket_reso=None,
        enable_bucket=None,
        bucket_no_upscale=None,
        train_batch_size=given.batch,
        network_module=module,
        network_dim=given.rank,
        network_train_unet_only=case.unet_only,
        gradient_checkpointing=case.checkpointing,
        mixed_precision=given.precision,
        cache_latents=True,
        max_train_steps=given.steps,
        learning_rate="1e-4",
    )


# ---- the floor, and peft --------------------------------------------------------------------------------------------

UNET_LAYERS = r".*attentions.*(to_[qkv]|to_out\.0|proj_in|proj_out|net\.0\.proj|net\.2)"
TEXT_LAYERS = r".*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"


def count_plain(case: Case, given: Given, *, has_peft: bool, autocast: bool = True) -> Count:
    """Return the figures of a step written in a few lines of torch."""
    from library.models.precision import types_of

    device, types = torch.device(fake.NAME, 0), types_of(given.precision)
    base, counter = full_base(case.family, types, device), Counter()
    counter.watch(base)
    if case.checkpointing:
        base.unet.enable_gradient_checkpointing()
        base.unet.train()
    parameters = add_peft(base, case, given.rank) if has_peft else []
    optimizer = torch.optim.AdamW(parameters, lr=1e-4) if has_peft else None
    schedule = torch.rand(1000, device=device)
    ids = torch.zeros(given.batch, 77, dtype=torch.int64, device=device)
    latents = torch.empty(given.batch, 4, case.side // 8, case.side // 8, device=device)
    timesteps = torch.zeros(given.batch, dtype=torch.int64, device=device)
    sizes = torch.zeros(given.batch, 6, device=device)
    if not has_peft and not case.unet_only:  # gradients go as far as those of adapters
        for model in base.text_modules:
            model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())

    def step() -> None:
        noise, scale = torch.randn_like(latents), schedule[timesteps][:, None, None, None]
        noisy = (latents * scale + noise * scale).to(types.unet).requires_grad_(not has_peft)
        with torch.autocast(device.type, types.unet, enabled=autocast and types.unet is not torch.float32):
            with torch.set_grad_enabled(not case.unet_only):
                outputs = [model(ids, output_hidden_states=True) for model in base.text_modules]
            hidden = torch.cat([one.hidden_states[-2 if len(outputs) > 1 else -1] for one in outputs], -1)
            added = {}
            if len(outputs) > 1:
                added = {"added_cond_kwargs": {"text_embeds": outputs[1].text_embeds, "time_ids": sizes}}
            prediction = base.unet(noisy, timesteps, hidden.to(types.unet), **added).sample
        (prediction.float() - noise).square().mean().backward()
        if optimizer is not None:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    with counter.counting():
        for _ in range(COUNTED):
            counter.begin()
            step()
    return counter.end()


def add_peft(base: Any, case: Case, rank: int) -> list[nn.Parameter]:
    """Put peft's adapters over the models; return their parameters, in float32."""
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    adapted = [(base.unet, UNET_LAYERS)] + [(model, TEXT_LAYERS) for model in base.text_modules if not case.unet_only]
    for model, layers in adapted:
        LoraModel(model, LoraConfig(r=rank, lora_alpha=1, target_modules=layers), "default")
    parameters = [p for model, _ in adapted for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    return parameters


# ---- waits ----------------------------------------------------------------------------------------------------------


def waits_of_a_step(given: Given) -> dict[str, float]:
    """Return the waits of the host in a step of a real training of a tiny model, by place."""
    words = ["--waits", "--precision", given.precision, "--batch", str(given.batch)]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, encoding="utf-8", check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_waits(given: Given) -> dict[str, float]:
    """Train a small model on the device, with values, and return the waits of a step by place."""
    from runs import train_with

    fake.install_for_accelerate()
    totals: list[collections.Counter[fake.Wait]] = []

    def act(progress: Any) -> None:
        totals.append(collections.Counter(fake.RECORD.waits))

    with tempfile.TemporaryDirectory() as folder:
        argv = command_line("networks.lora", Case("SD1", 64), dataclasses.replace(given, steps=6), Path(folder))
        train_with(argv, act, after=None)
    first, last = totals[1], totals[4]
    return {f"{one.why}, {one.file} {one.function}": n / 3 for one, n in (last - first).items()}


# ---- the table ------------------------------------------------------------------------------------------------------


def count(variant: str, case: Case, given: Given) -> Count:
    """Return the figures of a variant of a case."""
    fake.install_for_accelerate(shapes_only=True)
    if variant in ("ours", "dylora"):
        return count_ours("networks.lora" if variant == "ours" else "networks.dylora", case, given)
    return count_plain(case, given, has_peft=variant == "peft", autocast=variant != "floor-no-autocast")


def main() -> None:
    """Run the script with the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="default: all")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--precision", choices=("fp16", "bf16", "no"), default="fp16")
    parser.add_argument("--operations", type=int, default=0, help="also list so many of the most frequent operations")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--no_waits", action="store_true")
    parser.add_argument("--waits", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    given = Given(args.batch, args.rank, args.precision)
    if args.waits:
        print(json.dumps(measure_waits(given)))
        return
    logging.disable(logging.INFO)
    figures: dict[str, Any] = {}
    for name in args.cases or CASES:
        print(f"{name}, {CASES[name].side} px, batch {args.batch}, rank {args.rank}, {args.precision}")
        print(f"{'':18}" + "".join(f"{title:>10}" for title in (*PARTS, "all", "MB saved", "MB kept")))
        for variant in args.variants:
            one = count(variant, CASES[name], given)
            figures[f"{name} {variant}"] = dataclasses.asdict(one)
            values = (*one.launches.values(), one.total, round(one.saved / 1e6), round(one.kept / 1e6))
            print(f"{variant:18}" + "".join(f"{value:10,}" for value in values), flush=True)
            for operation, number in collections.Counter(one.operations).most_common(args.operations):
                print(f"{number:12,} {operation}")
    if not args.no_waits:
        figures["waits"] = waits_of_a_step(given)
        print(f"waits of the host in a step: {sum(figures['waits'].values()):g}")
        for place, number in figures["waits"].items():
            print(f"{number:8g}  {place}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
