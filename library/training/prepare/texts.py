"""The texts of a run: when they are encoded, and by what.

The text encoders are in memory for texts that change with every step (they are trained), or because nobody asked for
more. Otherwise they encode before the first step, and leave the device. If captions vary, the very captions of the
steps are drawn ahead, which is possible because they are pure functions of the position in the run; what does not fit
the memory is encoded in parts, between steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import itertools
import logging
from collections.abc import Iterator, Sequence

import torch

from library.config.prompts import Prompt
from library.config.training import PrecisionConfig
from library.data.batches import BatchMaker, RunPlan
from library.data.captions import possible_captions
from library.data.listing import parents_of
from library.data.records import Dataset, all_records
from library.models.base import BaseModel, TextEncoder
from library.models.conditioning import Conditioner, Conditioning, LiveConditioner, TextOptions
from library.models.precision import move
from library.models.text_cache import Call, bytes_of, bytes_of_text, encode_calls, remember
from library.networks.trainable import TrainableNetwork
from library.sampling.previews import text_options
from library.training.measure.validation import HeldOut
from library.training.prepare.placing import free_cache, unet_away
from library.training.run.events import Event, Every, Moment, Needs
from library.training.run.interruption import StopRequest
from library.training.run.runtime import Runtime

logger = logging.getLogger(__name__)

LARGEST_MEMORY = 2 * 2**30  # bytes of text conditioning that are stored at a time
FOREIGN_CACHES = "*_te_outputs.npz"  # of sd-scripts, beside the pictures
GIGA = 1e9


class When(enum.Enum):
    """When captions are encoded."""

    IN_STEPS = "in every step, by text encoders on the device"
    ONCE = "all before the first step"
    AHEAD = "in parts, between steps"


@dataclasses.dataclass(frozen=True)
class RunTexts:
    """The texts that one process encodes in a run, in the batches in which it does."""

    plan: RunPlan
    maker: BatchMaker
    held_out: HeldOut | None
    prompts: Sequence[Prompt]  # of previews
    options: TextOptions  # of captions

    def steps(self) -> Iterator[tuple[int, list[Call]]]:
        """Yield each step that is left (from 0) with its calls of the conditioner."""
        for step, requests in itertools.groupby(self.plan, key=lambda request: request.step):
            yield step, [Call(self.maker.captions(request), self.options) for request in requests]

    def throughout(self, encoder: TextEncoder) -> list[Call]:
        """Return the calls that come again and again: held-out pictures and previews."""
        calls: list[Call] = []
        if self.held_out is not None:
            share = self.held_out.share(self.plan.rank, self.plan.num_processes)
            calls = [Call(self.held_out.maker.captions(request), self.options) for request in share]
        for prompt in self.prompts:
            of_prompt = text_options(encoder, prompt, self.options.clip_skip)
            calls.append(Call((prompt.prompt, prompt.negative_prompt), of_prompt))
        return calls


def when_encoded(
    precision: PrecisionConfig,
    datasets: Sequence[Dataset],
    base: BaseModel,
    options: TextOptions,
    dtype: torch.dtype,
    *,
    trains_text_encoder: bool,
) -> When:
    """Return when the captions of datasets are encoded; IN_STEPS alone keeps the text encoders on the device.

    dtype is that of the conditioning, in which it is stored.
    """
    if trains_text_encoder:
        return When.IN_STEPS
    captions = all_captions(datasets)
    if captions is not None and len(captions) * bytes_of_text(base.texts, options, dtype) <= LARGEST_MEMORY:
        return When.ONCE
    return When.AHEAD if precision.cache_text_encoder_outputs else When.IN_STEPS


def all_captions(datasets: Sequence[Dataset]) -> set[str] | None:
    """Return every text of a caption in the run, or None if captions vary randomly."""
    captions: set[str] = set()
    for record in all_records(datasets):
        possible = possible_captions(record.caption, record.subset)
        if possible is None:
            return None
        captions |= possible
    return captions


def bytes_kept(
    when: When, datasets: Sequence[Dataset], base: BaseModel, options: TextOptions, dtype: torch.dtype
) -> int:
    """Return how much main memory the conditioning of captions takes at most, in bytes."""
    if when is When.ONCE:
        return len(all_captions(datasets) or ()) * bytes_of_text(base.texts, options, dtype)
    return LARGEST_MEMORY if when is When.AHEAD else 0


def build_conditioner(
    when: When, texts: RunTexts, base: BaseModel, network: TrainableNetwork, *, runtime: Runtime, stop: StopRequest
) -> tuple[Conditioner, list[Event]]:
    """Return the conditioner of captions and prompts, and the events between steps that it needs.

    If texts are encoded in the steps, the text encoders come to the device. Otherwise those of the first steps, or
    all, are encoded now; the text encoders' memory is released once nothing is left to encode.
    """
    if when is When.AHEAD:
        ahead = CaptionsAhead(texts, base, network, runtime=runtime, stop=stop)
        ahead.encode_first()
        return ahead, [Event("captions", Every(1), ahead.encode_next, Needs.NOTHING)]
    for module in base.text_modules:
        move(module, runtime.device)
    live = LiveConditioner(base.texts)
    if when is When.IN_STEPS:
        return live, []
    wanted = [(caption, texts.options) for caption in all_captions(texts.plan.datasets) or ()]
    wanted += [(text, call.options) for call in texts.throughout(base.texts[0]) for text in call.texts]
    with runtime.types.autocast(runtime.device):
        remembered = remember(live, wanted, runtime.types.unet)
    for module in base.text_modules:
        module.to("meta")
    rows = remembered.rows
    logger.info("text: all %s captions and prompts encoded, %.2f GB", f"{len(rows):,}", bytes_of(rows.values()) / GIGA)
    return remembered, []


class CaptionsAhead:
    """Knows the conditioning of the coming steps: encoded in parts that fit the memory, before they are needed.

    Texts are encoded in the batches of the steps, so that a step gets the bits that it would compute.
    """

    def __init__(
        self, texts: RunTexts, base: BaseModel, network: TrainableNetwork, *, runtime: Runtime, stop: StopRequest
    ) -> None:
        self._base, self._network, self._runtime, self._stop = base, network, runtime, stop
        self._texts = texts
        self._throughout: dict[Call, Conditioning] = {}
        self._part: dict[Call, Conditioning] = {}  # of the next steps
        self._steps = texts.steps()
        self._next = next(self._steps, None)  # the first step that is not encoded

    def encode(self, texts: Sequence[str], options: TextOptions) -> Conditioning:
        """Return the conditioning of texts that are encoded together; raises KeyError for those of other steps."""
        call = Call(tuple(texts), options)
        return (self._throughout if call in self._throughout else self._part)[call]

    def read(self, texts: Sequence[str], options: TextOptions) -> Conditioning:
        """Return the conditioning of texts that are encoded together; raises KeyError for those of other steps."""
        return self.encode(texts, options)

    def encode_first(self) -> None:
        """Encode what the whole run needs, and the captions of the first steps."""
        calls = self._texts.throughout(self._base.texts[0])
        with text_encoders_on(self._base, self._network, self._runtime.device):
            self._throughout = self._encoded(calls)
            self._encode_part()
        self._release_if_done()

    def encode_next(self, moment: Moment) -> None:
        """Encode the captions of the next steps if the next one needs them; a stop leaves it out."""
        if self._next is None or moment.progress.step < self._next[0]:
            return

        def encode() -> None:
            with text_encoders_on(self._base, self._network, self._runtime.device):
                self._encode_part()
            self._release_if_done()

        self._stop.cut_short(encode)

    def _encode_part(self) -> None:
        """Replace the part that was encoded by the next one."""
        start, calls = self._next, self._take_part()
        if start is None:
            return
        self._part = {}  # its memory is needed
        self._part = self._encoded(calls)
        logger.info(
            "text: %s captions encoded for steps %s to %s, %.2f GB",
            f"{sum(len(call.texts) for call in calls):,}",
            f"{start[0] + 1:,}",
            f"{self._texts.plan.num_steps if self._next is None else self._next[0]:,}",
            bytes_of(self._part.values()) / GIGA,
        )

    def _take_part(self) -> list[Call]:
        """Return the calls of the next steps, at least one, whose conditioning fits the memory."""
        options, types = self._texts.options, self._runtime.types
        most = LARGEST_MEMORY // bytes_of_text(self._base.texts, options, types.unet)  # texts
        part: dict[Call, None] = {}
        taken = 0
        while self._next is not None:
            fresh = {call: None for call in self._next[1] if call not in part and call not in self._throughout}
            taken += sum(len(call.texts) for call in fresh)
            if part and taken > most:
                break
            part |= fresh
            self._next = next(self._steps, None)
        return list(part)

    def _encoded(self, calls: Sequence[Call]) -> dict[Call, Conditioning]:
        with self._runtime.types.autocast(self._runtime.device):
            return encode_calls(LiveConditioner(self._base.texts), calls, self._runtime.types.unet)

    def _release_if_done(self) -> None:
        """Free the memory of the text encoders after the last part."""
        if self._next is None:
            for module in self._base.text_modules:
                module.to("meta")


@contextlib.contextmanager
def text_encoders_on(base: BaseModel, network: TrainableNetwork, device: torch.device) -> Iterator[None]:
    """Within it the text encoders are on a device, and the U-Net is not: the device never has to hold both."""
    with unet_away(base, network, device):
        for module in base.text_modules:
            move(module, device)
        try:
            yield
        finally:
            for module in base.text_modules:
                move(module, "cpu")
            free_cache(device)


def tell_of_files(precision: PrecisionConfig, datasets: Sequence[Dataset]) -> None:
    """Tell what becomes of files with the outputs of text encoders: none is written, those of sd-scripts are not read.

    Encoding a caption takes less than a hundredth of the step that it is for (`benchmarks/text_encoding.py`), and a
    file would be wrong after any change of the model, the caption or the options.
    """
    if not precision.cache_text_encoder_outputs:
        return
    if precision.cache_text_encoder_outputs_to_disk:
        logger.info("--cache_text_encoder_outputs_to_disk: nothing is written; captions are encoded to memory")
    folders = parents_of(record.file for record in all_records(datasets))
    found = sum(1 for folder in folders for _ in folder.glob(FOREIGN_CACHES))
    if found:
        logger.info("%d files %s beside the pictures are those of sd-scripts, and are not used", found, FOREIGN_CACHES)
