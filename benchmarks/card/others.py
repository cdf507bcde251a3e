"""Parts on the tools with `--device`, and on two processes with a card each."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from words import words

from benchmarks.card import suite
from benchmarks.card.correctness import weight_difference
from benchmarks.card.rows import MEASURED, NotHere, Row, attempt, compared
from benchmarks.card.running import python
from benchmarks.card.setting import Setting

TOOL_BOUND = 1e-3  # relative difference of what two LoRA files add to the weights


def tools(setting: Setting) -> Iterator[Row]:
    """Compare what the tools write with the card and with the CPU."""
    networks = [suite.small_training(setting, "sd1", f"tool-{seed}", seed=seed) for seed in (1, 2)]
    files = [suite.network_file(options) for options in networks]
    pocket = suite.POCKET["sd1"]
    merged = setting.work / "merged"  # a folder, as the pocket model is
    sources: dict[str, list[object]] = {
        "merge_lora": ["--sd_model", pocket, "--save_to", merged, "--models", files[0], "--ratios", 1],
        "resize_lora": ["--model", files[0], "--new_rank", 2],
        "svd_merge_lora": ["--models", *files, "--ratios", 0.7, 0.3, "--new_rank", 4],
        "extract_lora_from_models": ["--model_org", pocket, "--model_tuned", merged, "--dim", 4, "--exact"],
    }

    name = "two networks, and a model with one merged in"
    yield attempt(name, prepared, setting, name, networks, sources.pop("merge_lora"))
    for tool, source in sources.items():
        yield attempt(f"{tool}.py --device", tool_compared, setting, tool, source)


def prepared(setting: Setting, name: str, networks: list[dict[str, object]], merging: list[object]) -> Row:
    """Write what the tools read."""
    for options in networks:
        suite.train(setting, options)
    shutil.rmtree(setting.work / "merged", ignore_errors=True)
    call("merge_lora", merging)
    return Row(name, MEASURED)


def tool_compared(setting: Setting, tool: str, source: list[object]) -> Row:
    """Compare the files that a tool writes with each device."""
    written: list[Path] = []
    for device in ("cpu", setting.device):
        written.append(setting.work / f"{tool}-{len(written)}.safetensors")
        call(tool, [*source, "--save_to", written[-1], "--device", device])
    return compared(f"{tool}.py --device", weight_difference(written[1], written[0]), TOOL_BOUND)


def call(name: str, values: list[object]) -> None:
    """Run a script of networks/ in this process."""
    code = importlib.import_module(f"networks.{name}").main([str(value) for value in values])
    if code:
        raise RuntimeError(f"{name}.py ended with {code}")


# ---- two processes -----------------------------------------------------------------------------------------------

RANK_BOUND = 1e-2  # of losses: the sums over two halves of a batch, and what they become in further steps


def ranks(setting: Setting) -> Iterator[Row]:
    """Compare two processes with one whose batches are twice as large."""
    name = "two processes against one with batches of twice the size"
    yield attempt(name, two_ranks, setting, name)


def two_ranks(setting: Setting, name: str) -> Row:
    """Train with torchrun, and in one process."""
    import torch

    if setting.on_card and torch.cuda.device_count() < 2:
        raise NotHere("it needs two cards, and there is one")
    common = {
        "train_data_dir": suite.small_pictures(setting, 2),  # with two, the batches are the same
        "optimizer_type": "SGDNesterov",  # the steps of AdamW do not become smaller with the gradient
        "learning_rate": "1e-1",
        "max_train_steps": setting.steps(8, tiny=2),
    }
    two = suite.small_training(setting, "sd1", "two-ranks", train_batch_size=1, **common)
    one = suite.small_training(setting, "sd1", "one-rank", train_batch_size=2, **common)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    done = subprocess.run(
        python(*launch, suite.ROOT / "train_network.py", *words(**two)), env=os.environ, cwd=suite.ROOT, check=False
    )
    if done.returncode:
        raise RuntimeError(f"torchrun ended with {done.returncode}")
    suite.train(setting, one)
    lines = [json.loads(line) for line in metrics(two).read_text(encoding="utf-8").splitlines()]
    steps = [line["step"] for line in lines if "loss/current" in line]
    difference = weight_difference(suite.network_file(two), suite.network_file(one))
    return compared(name, difference, RANK_BOUND, {"steps": len(steps)})


def metrics(options: suite.Options) -> Path:
    """Return the file of the losses of a run."""
    return Path(str(options["output_dir"])) / f"{options['output_name']}-metrics.jsonl"
