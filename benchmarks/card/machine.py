"""The part that tells on which machine and with which versions a report was made."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator

import psutil

from benchmarks.card import suite
from benchmarks.card.rows import MEASURED, Row, Value
from benchmarks.card.running import now
from benchmarks.card.setting import GIB, Setting, device_of, has_bf16

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "bitsandbytes", "xformers", "triton")


def machine(setting: Setting) -> Iterator[Row]:
    """Describe the machine."""
    from library import VERSION

    found: dict[str, Value] = {"date": now(), "suite": VERSION, "commit": output("git", "rev-parse", "--short", "HEAD")}
    if setting.on_card:
        found |= card(setting)
    found |= {
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "Python": platform.python_version(),
        "system": platform.platform(),
        "processor": f"{platform.processor() or platform.machine()}, {os.cpu_count()} threads",
        "main memory GiB": psutil.virtual_memory().total / GIB,
    }
    found |= {name: version(name) for name in PACKAGES}
    yield Row("machine", MEASURED, found)


def card(setting: Setting) -> dict[str, Value]:
    """Describe the card, as far as torch sees one; "card" is there only if it can compute."""
    import torch

    found: dict[str, Value] = {
        "CUDA of torch": torch.version.cuda or torch.version.hip,
        "cards": torch.cuda.device_count(),
    }
    if not torch.cuda.is_available():
        return found
    float(torch.ones(1, device=device_of(setting)).sum())  # a driver that is too old raises here
    facts: dict[str, Callable[[], Value]] = {
        "card": torch.cuda.get_device_name,
        "compute capability": lambda: ".".join(map(str, torch.cuda.get_device_capability())),
        "memory of the card GiB": lambda: torch.cuda.get_device_properties(0).total_memory / GIB,
        "free of it GiB": lambda: torch.cuda.mem_get_info()[0] / GIB,
        "multiprocessors": lambda: torch.cuda.get_device_properties(0).multi_processor_count,
        "bfloat16 of its own": lambda: str(has_bf16()),
        "cuDNN": torch.backends.cudnn.version,
    }
    return found | {name: guarded(fact) for name, fact in facts.items()}


def guarded(fact: Callable[[], Value]) -> Value:
    """Return a fact, or why it is not known."""
    try:
        return fact()
    except (RuntimeError, AttributeError, AssertionError) as error:
        return f"not known ({error})"


def version(package: str) -> str:
    """Return the version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def output(*words: str) -> str | None:
    """Return what a program says on one line, or None where it is not there or fails."""
    program = shutil.which(words[0])
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, *words[1:]], capture_output=True, text=True, check=True, timeout=20, cwd=suite.ROOT
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return ", ".join(done.stdout.split("\n")).strip(", ")
