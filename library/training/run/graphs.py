"""Forward and backward passes recorded as CUDA graphs: launched as one, where a host would launch thousands.

At small batches a fast GPU waits for the host, which needs 6 to 9 microseconds for each of some 4,000 launches. A graph
is recorded for each shape of the inputs, and then repeated on new values in the same memory. What is random is drawn
outside, gradients lie in tensors that stay, and weights change in place; so a repetition does what the code would do.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from library.config.training import PrecisionConfig
from library.models.sending import mapped, tensors_in
from library.training.run.objective import Objective, StepInputs
from library.training.run.state import TrainState
from library.training.run.step import EagerPass, Pass

logger = logging.getLogger(__name__)

WARM_UPS = 3  # passes before a recording, as libraries choose kernels and take memory in the first ones


class Recorder(Protocol):
    """Records work on a device."""

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """Return what repeats the work, and the tensor that each repetition writes its result to."""
        ...


class CudaRecorder:
    """Records CUDA graphs that share one pool of memory, since no two of them run at the same time."""

    def __init__(self) -> None:
        self._pool: Any = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """Record work; it must not make the host wait."""
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):  # as PyTorch's notes on graphs ask for
            for _ in range(WARM_UPS):
                work()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = work()
        return graph.replay, result


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A pass for inputs of certain shapes."""

    inputs: StepInputs  # the tensors that it reads
    scale: Tensor
    repeat: Callable[[], object]
    loss: Tensor  # of the last repetition


def choose_passes(precision: PrecisionConfig, objective: Objective, state: TrainState, device: torch.device) -> Pass:
    """Return how passes are made: repeated from recordings where the options ask for it and the device can."""
    eager = EagerPass(objective)
    if not precision.cuda_graphs or not precision.cache_latents:
        return eager
    if device.type != "cuda":
        logger.warning("--cuda_graphs: this run has no CUDA GPU (%s); nothing is recorded", device.type)
        return eager
    objective.network.keep_shapes()
    # Text encoders that are not trained may be released during the run.
    texts = objective.base.text_modules if objective.network.trains_text_encoder else []
    return GraphPass(eager, CudaRecorder, state.weights.pass_gradients, [objective.base.unet, *texts])


class GraphPass:
    """Makes passes by repeating recorded ones; a `Pass`."""

    def __init__(
        self,
        eager: Pass,
        recorder: Callable[[], Recorder],
        gradients: Sequence[Tensor],
        models: Sequence[nn.Module],
    ) -> None:
        """gradients are the tensors that a backward pass adds to, models those whose weights it reads."""
        self._eager, self._recorder, self._gradients = eager, recorder, gradients
        self._weights = [parameter for model in models for parameter in model.parameters()]
        self._addresses: list[int] = []
        self._record = recorder()
        self._recorded: dict[Hashable, Recorded] = {}

    def __call__(self, inputs: StepInputs, scale: Tensor | float) -> Tensor:
        """Make the passes of one micro-batch."""
        addresses = [weight.data_ptr() for weight in self._weights]
        if addresses != self._addresses:  # the weights were away from the device, as while previews are decoded
            self._recorded.clear()
            self._record = self._recorder()  # the memory of graphs that are gone cannot be recorded into again
            self._addresses = addresses
        key = repr(mapped(inputs, _signature))
        recorded = self._recorded.get(key)
        if recorded is None:
            recorded = self._recorded[key] = self._begin(inputs, scale)
        for own, given in zip(tensors_in(recorded.inputs), tensors_in(inputs), strict=True):
            own.copy_(given)
        _set(recorded.scale, scale)
        recorded.repeat()
        return recorded.loss.clone()

    def _begin(self, inputs: StepInputs, scale: Tensor | float) -> Recorded:
        """Record a pass; gradients are afterwards as before."""
        own = mapped(inputs, torch.clone)
        own_scale = torch.ones((), device=inputs.timesteps.device)
        _set(own_scale, scale)
        before = [gradient.clone() for gradient in self._gradients]
        repeat, loss = self._record(lambda: self._eager(own, own_scale))
        for gradient, old in zip(self._gradients, before, strict=True):
            gradient.copy_(old)
        return Recorded(own, own_scale, repeat, loss)


def _signature(tensor: Tensor) -> Any:
    """Return what a recording depends on of a tensor."""
    return tuple(tensor.shape), tensor.dtype


def _set(target: Tensor, value: Tensor | float) -> None:
    if isinstance(value, Tensor):
        target.copy_(value)
    else:
        target.fill_(value)
