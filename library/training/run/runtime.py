"""The processes of a run: device, dtypes, gradients across processes.

Accelerate starts the processes and the trackers. Autocast, the gradient scaler and the averaging of gradients are
ours: accelerate silently replaces fp16 on a CPU by fp32, and DistributedDataParallel ignores a network whose own
forward is never called.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import random
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from library.config.saving import LoggingConfig
from library.config.training import PrecisionConfig
from library.errors import UserError
from library.models.precision import Types, describe, supported_precision, types_of
from library.processes import Launch, check_launch
from library.randomness import seed_for
from library.training.record.tracking import tracker_names

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

T = TypeVar("T")

# While the first process draws previews, measures or downloads a state, the others wait in a message to all, and torch
# ends a run whose messages take longer than 10 minutes. A process that dies ends the others by itself: its launcher
# stops them. So the limit is for a process that hangs, which no preview comes near.
LONGEST_WAIT = 24 * 60  # minutes

SAVE_DTYPES = {None: None, "float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Runtime:
    """The processes of a run as one of them sees them."""

    accelerator: Accelerator
    types: Types
    scaler: torch.amp.GradScaler

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        return self.accelerator.process_index

    @property
    def num_processes(self) -> int:
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and logs."""
        return self.accelerator.is_main_process

    def barrier(self) -> None:
        """Wait for all processes."""
        self.accelerator.wait_for_everyone()


def start_runtime(
    precision: PrecisionConfig, logs: LoggingConfig, *, vae_overflows: bool, wait: int | None = None
) -> Runtime:
    """Join the processes of the run and choose device and dtypes.

    vae_overflows: in fp16. wait: minutes that the processes wait for each other at most; None or 0: `LONGEST_WAIT`.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    launch = check_launch()
    check_devices(launch)
    accelerator = Accelerator(
        mixed_precision="no",
        # Without a GPU accelerate joins processes only if it is told to use the CPU.
        cpu=launch.size > 1 and not torch.accelerator.is_available(),
        log_with=tracker_names(logs) or None,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=wait or LONGEST_WAIT))],
        project_dir=None if logs.logging_dir is None else str(log_folder(logs.logging_dir, logs.log_prefix)),
    )
    if accelerator.num_processes != launch.size:
        raise UserError(
            f"{launch.size} processes were started, but they cannot work together on {accelerator.device.type}: start "
            "a single process"
        )
    types = types_of_run(precision, accelerator.device, vae_overflows=vae_overflows)
    processes = f"{accelerator.num_processes} process{'' if accelerator.num_processes == 1 else 'es'}"
    dtype = str(types.unet).removeprefix("torch.")
    logger.info("runs on %s, %s (%s)", accelerator.device, processes, dtype)
    if types.vae is not types.unet and not precision.no_half_vae:
        logger.info("the VAE runs in float32: it overflows in fp16")
    scaler = torch.amp.GradScaler(accelerator.device.type, enabled=types.unet is torch.float16)
    return Runtime(accelerator, types, scaler)


def check_devices(launch: Launch, environment: Mapping[str, str] = os.environ) -> None:
    """Raise UserError for more processes on this machine than GPUs, of which each process needs one of its own."""
    here, gpus = launch.local_size(environment), torch.cuda.device_count()
    uses_cpu = environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "t", "on")
    if launch.size > 1 and here is not None and here > gpus > 0 and not uses_cpu:
        raise UserError(
            f"{here} processes were started on this machine, but it has {gpus} GPU(s), and each process needs its own: "
            f"start {gpus} on it (torchrun: --nproc_per_node {gpus})"
        )


def types_of_run(precision: PrecisionConfig, device: torch.device | None = None, *, vae_overflows: bool) -> Types:
    """Return the dtypes of a run on a device; without one, those of a device that supports all of them."""
    asked = precision.mixed_precision
    return types_of(
        asked if device is None else supported_precision(asked, describe(device)),
        vae_overflows=vae_overflows,
        no_half_vae=precision.no_half_vae,
        half_adapter=precision.full_fp16 or precision.full_bf16,
    )


def log_folder(folder: Path, prefix: str | None) -> Path:
    """Return the folder of this run's logs under --logging_dir, named by prefix and date."""
    return folder / f"{prefix or ''}{datetime.now().strftime('%Y%m%d%H%M%S')}"


def shared(value: T, runtime: Runtime) -> T:
    """Return the first process's value on all processes."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0] if runtime.num_processes > 1 else value


def seed_micro_batch(seed: int, step: int, micro_batch: int, rank: int) -> None:
    """Seed the global generators of torch and Python for one micro-batch.

    Dropouts, ours and those of foreign network modules, use them. Seeded by position, they do not depend on
    interruptions and previews.
    """
    key = seed_for(seed, "micro-batch", step, micro_batch, rank)
    # Where there is no GPU, torch.manual_seed would still note the seed for one, with the whole stack of calls.
    if torch.accelerator.is_available():
        torch.manual_seed(key)
    else:
        torch.default_generator.manual_seed(key)
    random.seed(key)


def broadcast_parameters(parameters: Iterable[nn.Parameter], num_processes: int) -> None:
    """Copy the first process's values to all processes."""
    if num_processes > 1:
        for parameter in parameters:
            torch.distributed.broadcast(parameter.data, 0)


def average_gradients(gradients: Iterable[torch.Tensor], num_processes: int) -> None:
    """Replace gradients by their means over the processes, in one message for each."""
    if num_processes > 1:
        for gradient in gradients:
            torch.distributed.all_reduce(gradient)
            gradient.div_(num_processes)


def anywhere(flag: torch.Tensor, num_processes: int) -> torch.Tensor:
    """Return the largest of a flag over the processes."""
    if num_processes > 1:
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return flag
