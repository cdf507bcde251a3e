"""Where a run happens: processes, device, types of arithmetic, gradients across processes.

Accelerate starts the processes and carries the trackers. Autocast, the gradient scaler and the averaging of
gradients are ours: accelerate takes fp16 on a CPU for fp32 without a word, and DistributedDataParallel does
not see a network whose own forward is never called.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import random
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from library.config.saving import LoggingConfig
from library.config.training import PrecisionConfig
from library.errors import UserError
from library.randomness import seed_for
from library.training.record.tracking import tracker_names

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SAVE_DTYPES = {None: None, "float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class GradientScaler(torch.amp.GradScaler):
    """Torch's scaler, for gradients in fp16 as well: torch refuses those, lest their own range be overlooked."""

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: torch.Tensor, found_inf: torch.Tensor, allow_fp16: bool
    ) -> dict[torch.device, torch.Tensor]:
        del allow_fp16
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, True)


@dataclasses.dataclass(frozen=True)
class Runtime:
    """The processes of a run as one of them sees them."""

    accelerator: Accelerator
    dtype: torch.dtype  # of the U-Net's and text encoder's weights and of their arithmetic
    vae_dtype: torch.dtype
    adapter_dtype: torch.dtype  # of the network's weights and of their gradients
    scaler: torch.amp.GradScaler

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.accelerator.device

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        return self.accelerator.process_index

    @property
    def num_processes(self) -> int:
        """Number of processes."""
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.accelerator.is_main_process

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the context of a forward pass: mixed precision where it is on."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32)

    def barrier(self) -> None:
        """Wait for all processes."""
        self.accelerator.wait_for_everyone()


def start_runtime(precision: PrecisionConfig, logs: LoggingConfig) -> Runtime:
    """Join the processes of the run and decide device and types."""
    from accelerate import Accelerator

    accelerator = Accelerator(
        mixed_precision="no",
        log_with=tracker_names(logs) or None,
        project_dir=str(log_folder(logs)) if logs.logging_dir else None,
    )
    dtype = resolve_dtype(precision.mixed_precision, accelerator.device)
    logger.info(
        "runs on %s, %d process%s (%s)",
        accelerator.device,
        accelerator.num_processes,
        "" if accelerator.num_processes == 1 else "es",
        str(dtype).removeprefix("torch."),
    )
    return Runtime(
        accelerator=accelerator,
        dtype=dtype,
        vae_dtype=torch.float32 if precision.no_half_vae else dtype,
        adapter_dtype=dtype if precision.full_fp16 or precision.full_bf16 else torch.float32,
        scaler=GradientScaler(accelerator.device.type, enabled=dtype is torch.float16),
    )


def log_folder(logs: LoggingConfig) -> os.PathLike:
    """Return the folder of this run's logs: prefix and date under --logging_dir."""
    from datetime import datetime

    return logs.logging_dir / f"{logs.log_prefix or ''}{datetime.now().strftime('%Y%m%d%H%M%S')}"


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the type that --mixed_precision means on a device; warns where it cannot be honoured."""
    if name == "fp16" and device.type == "cpu":
        logger.warning("--mixed_precision fp16 needs a GPU; this machine has none, so the run is in float32")
        return torch.float32
    if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise UserError("--mixed_precision bf16: this GPU has no bfloat16; use fp16")
    return DTYPES[name]


def use_attention(precision: PrecisionConfig, unet: nn.Module, vae: nn.Module, device: torch.device) -> None:
    """Switch the models to xformers where it was asked for and works; torch's attention is the default."""
    if not precision.xformers:
        return
    reason = xformers_problem(device)
    if reason is not None:
        logger.warning("--xformers: %s; torch's attention (SDPA) is used, which is as fast and sparing", reason)
        return
    unet.enable_xformers_memory_efficient_attention()
    vae.enable_xformers_memory_efficient_attention()


def xformers_problem(device: torch.device) -> str | None:
    """Return why xformers cannot be used on a device, or None if one small call works."""
    if device.type != "cuda":
        return "it needs a CUDA GPU, which is absent here"
    try:
        from xformers.ops import memory_efficient_attention

        probe = torch.zeros(1, 8, 1, 64, device=device, dtype=torch.float16)
        memory_efficient_attention(probe, probe, probe)
    except (ImportError, NotImplementedError, RuntimeError) as error:
        return f"it does not work here ({str(error).splitlines()[0]})"
    return None


def shared(value: int, runtime: Runtime) -> int:
    """Return the first process's value on all processes."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0] if runtime.num_processes > 1 else value


def seed_micro_batch(seed: int, step: int, micro_batch: int, rank: int) -> None:
    """Seed torch's global generators for one micro-batch.

    Dropouts, ours and those of foreign network modules, draw from the global generators, some of them from
    Python's. Keyed by position, they are the same whether or not a run was interrupted, and previews cannot
    disturb them.
    """
    key = seed_for(seed, "micro-batch", step, micro_batch, rank)
    torch.manual_seed(key)
    random.seed(key)


def broadcast_parameters(parameters: Iterable[nn.Parameter], num_processes: int) -> None:
    """Give every process the first one's values."""
    if num_processes > 1:
        for parameter in parameters:
            torch.distributed.broadcast(parameter.data, 0)


def average_gradients(parameters: Iterable[nn.Parameter], num_processes: int) -> None:
    """Replace each gradient by its mean over the processes, all in one message for each type."""
    if num_processes == 1:
        return
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        # A process in whose batches a module was left out must still send its share, or the others wait.
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        by_dtype.setdefault(parameter.dtype, []).append(parameter)
    for group in by_dtype.values():
        flat = torch.cat([parameter.grad.reshape(-1) for parameter in group])
        torch.distributed.all_reduce(flat)
        flat /= num_processes
        start = 0
        for parameter in group:
            parameter.grad.copy_(flat[start : start + parameter.numel()].view_as(parameter))
            start += parameter.numel()
