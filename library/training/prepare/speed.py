"""The options that change only how fast a run is: what torch's kernels may do, and the compilation of the U-Net.

What a device can do comes as data, so that every decision can be tested without the device.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from library.config.network import NetworkConfig
from library.config.training import PrecisionConfig
from library.errors import is_out_of_memory, message_of
from library.models.precision import Device, describe
from library.networks.modules import is_foreign

logger = logging.getLogger(__name__)


# Warnings of the compiler that are not about the user's code: of the gradients of the U-Net's inputs, and of what
# diffusers keeps of the version of torch.
HARMLESS = (
    "The .grad attribute of a Tensor that is not a leaf Tensor",
    "Dynamo detected a call to a `functools.lru_cache`-wrapped function",
)


class Kernels(NamedTuple):
    """What torch's kernels may do on a GPU."""

    tries: bool  # cuDNN tries its kernels for each new size, and takes the fastest
    tf32: bool  # float32 products take 10 bits of their factors; sums stay in float32


def kernels_for(precision: PrecisionConfig, device: Device) -> Kernels:
    """Return what the options allow, as far as it has an effect on a device."""
    return Kernels(precision.cudnn_benchmark and device.kind == "cuda", precision.allow_tf32 and device.has_tf32)


def idle_reasons(precision: PrecisionConfig, device: Device) -> list[str]:
    """Return a line for each of these options that has no effect on a device."""
    lines = []
    if precision.cudnn_benchmark and device.kind != "cuda":
        lines.append(f"--cudnn_benchmark has no effect on this device ({device.name}), which has no cuDNN")
    if precision.allow_tf32 and not device.has_tf32:
        lines.append(f"--allow_tf32 has no effect on this device ({device.name}), which has no TF32")
    return lines


def tf32_is_left_out(precision: PrecisionConfig, device: Device) -> bool:
    """Return whether a run in float32 would be faster with an option that was not given."""
    return precision.mixed_precision == "no" and device.has_tf32 and not precision.allow_tf32


def graphs_obstacle(precision: PrecisionConfig, network: NetworkConfig) -> str | None:
    """Return why the passes of a run cannot be recorded, or None: they decide on the host what the device does."""
    if precision.gradient_checkpointing:
        return "--gradient_checkpointing, which asks the device for the state of its random numbers"
    if precision.torch_compile:
        return "--torch_compile, which records graphs of its own"
    if is_foreign(network):
        return f"--network_module {network.network_module}: only the suite's own networks keep their tensors in place"
    try:
        dropout = float((network.network_args or {}).get("module_dropout", 0))
    except ValueError:  # no number, which `check_arguments` tells
        return None
    return "module_dropout of --network_args, which is drawn on the host for each call" if dropout else None


def graphs_are_left_out(precision: PrecisionConfig, network: NetworkConfig, device: Device) -> bool:
    """Return whether passes could be recorded, and the option was not given."""
    can = device.kind == "cuda" and precision.cache_latents and graphs_obstacle(precision, network) is None
    return can and not precision.cuda_graphs


def set_kernels(precision: PrecisionConfig, network: NetworkConfig, device: torch.device) -> None:
    """Set what torch's kernels may do in this process; tell options that have no effect, and those that would help."""
    facts = describe(device)
    for line in idle_reasons(precision, facts):
        logger.warning("%s", line)
    if tf32_is_left_out(precision, facts):
        logger.info(
            "the run computes in full float32: this GPU is faster with --allow_tf32, and still more with "
            "--mixed_precision bf16"
        )
    if graphs_are_left_out(precision, network, facts):
        logger.info("at small batches a fast GPU waits for the CPU: --cuda_graphs can make steps several times as fast")
    chosen = kernels_for(precision, facts)
    if chosen.tries:
        torch.backends.cudnn.benchmark = True
    if chosen.tf32:
        torch.set_float32_matmul_precision("high")


def find_compiler(precision: PrecisionConfig, device: torch.device) -> str | None:
    """Return the compiler that the options ask for; None, with a warning, if it does not work on a device.

    The run has the same result without.
    """
    if not precision.torch_compile:
        return None
    if precision.dynamo_backend == "":
        logger.warning("--torch_compile: the run is not compiled, because --dynamo_backend is no")
        return None
    backend = precision.dynamo_backend or "inductor"
    reason = compiler_problem(backend, device)
    if reason is not None:
        logger.warning("--torch_compile: %s does not work here (%s); the run is not compiled", backend, reason)
        return None
    return backend


def compile_unet(unet: nn.Module, compiler: str) -> None:
    """Have the U-Net compiled when it is first called, with the network that is in it by then."""
    for beginning in HARMLESS:
        warnings.filterwarnings("ignore", beginning)
    unet.compile(backend=compiler)
    logger.info("--torch_compile: the first steps, and the first with a new size, are slow: they compile the U-Net")


def compiler_problem(backend: str, device: torch.device) -> str | None:
    """Return why a compiler does not work on a device, or None if it compiles a small function.

    The usual one needs a C++ compiler for the CPU, and Triton for a GPU.
    """

    def small(x: torch.Tensor) -> torch.Tensor:
        return (x + 1).sin() * 2

    try:
        x = torch.ones(8, device=device)
        torch.compile(small, backend=backend)(x)
    except Exception as error:  # each compiler has its own
        if is_out_of_memory(error):
            raise
        return message_of(error)
    return None


def is_compiled(unet: nn.Module) -> bool:
    """Return whether a U-Net is compiled when it is called."""
    return unet._compiled_call_impl is not None


@contextlib.contextmanager
def uncompiled(unet: nn.Module) -> Iterator[None]:
    """Within it a compiled U-Net runs as it is: compiling it for the few calls of a preview would take longer."""
    if not is_compiled(unet):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
