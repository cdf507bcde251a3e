"""What a file with the outputs of SDXL's text encoders would save: the cost of encoding beside a step, and of a file.

Operations are counted on shapes, so they hold for every machine: a caption of 75 tokens, and forward and backward pass
of the U-Net at 1024 x 1024 (without weights' gradients and without recomputation). Times are those of this machine,
with random weights in full size.

    python benchmarks/text_encoding.py                  # operations, and the time of a file of 200 captions
    python benchmarks/text_encoding.py --times          # also texts per second, by number of texts in a call
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from library.models.base import TextEncoder

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SIZES = ((768, 3072, 12), (1280, 5120, 32))  # width, inner width, layers of the two encoders
TOKENS, LATENT = 77, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", action="store_true", help="time the encoders on the CPU; needs 3.3 GB")
    parser.add_argument("--captions", type=int, default=200, help="in the file")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    import torch

    torch.set_num_threads(args.threads)
    encoders = full_encoders()
    of_text, of_step = operations(encoders)
    print(
        f"operations: {of_text / 1e12:.3f} T for a caption, {of_step / 1e12:.1f} T for its step in the U-Net: ", end=""
    )
    print(f"{of_text / of_step:.2%}")
    time_file(encoders, args.captions)
    if args.times:
        time_encoders(encoders)


def full_encoders() -> tuple[TextEncoder, ...]:
    """Return the text encoders of SDXL on the meta device."""
    from library.models import building, family
    from library.models.base import TextEncoder, load_tokenizer

    found = []
    for row, (width, inner, layers) in zip(family.SDXL.text_models, SIZES, strict=True):
        config = building.text_encoder_config(row, width=width, inner_width=inner, num_layers=layers)
        module: Any = building.build_text_encoder(config, has_projection=row.has_projection)
        found.append(TextEncoder(row, load_tokenizer(None, row), module.requires_grad_(False).eval()))
    return tuple(found)


def operations(encoders: tuple[TextEncoder, ...]) -> tuple[int, int]:
    """Return the floating-point operations of encoding a text, and of a forward and backward pass of the U-Net."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from library.models import building, family

    def counted(act: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counter:
            act()
        return counter.get_total_flops()

    ids = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    of_text = counted(lambda: [encoder.module(ids) for encoder in encoders])
    unet = building.build_unet(family.SDXL.unet).requires_grad_(False)
    latents = torch.zeros(1, 4, LATENT, LATENT, device="meta", requires_grad=True)
    added = {"text_embeds": torch.zeros(1, 1280, device="meta"), "time_ids": torch.zeros(1, 6, device="meta")}
    states = torch.zeros(1, TOKENS, 2048, device="meta")
    timesteps = torch.zeros(1, dtype=torch.long, device="meta")

    def step() -> None:
        unet(latents, timesteps, encoder_hidden_states=states, added_cond_kwargs=added).sample.sum().backward()

    return of_text, counted(step)


def time_file(encoders: tuple[TextEncoder, ...], number: int) -> None:
    """Print the size of captions in bf16, and the time to write and read a file of them."""
    import torch
    from safetensors.torch import load_file, save_file

    from library.models.conditioning import TextOptions
    from library.models.text_cache import bytes_of_text

    size = bytes_of_text(encoders, TextOptions(), torch.bfloat16)
    rows = {str(index): torch.zeros(size // 2, dtype=torch.bfloat16) for index in range(number)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.safetensors"
        start = time.perf_counter()
        save_file(rows, path)
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        written = time.perf_counter()
        load_file(path)
        read = time.perf_counter()
    print(f"{size:,} bytes for a caption; {number} captions: {size * number / 1e9:.2f} GB, ", end="")
    print(f"written in {written - start:.2f} s, read in {read - written:.2f} s")


def time_encoders(encoders: tuple[TextEncoder, ...]) -> None:
    """Print texts per second, and whether a text has the same bits as in a call of 4."""
    import torch

    from library.models.conditioning import Conditioning, LiveConditioner, TextOptions

    for encoder in encoders:
        module: Any = encoder.module
        module.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(0)
        for parameter in module.parameters():
            parameter.data.normal_(0, 0.02, generator=generator)
            if parameter.ndim == 1:
                parameter.data.fill_(1.0)
        for part in module.modules():
            if torch.is_tensor(getattr(part, "position_ids", None)):
                part.position_ids = torch.arange(TOKENS).expand(1, -1).clone()
    live, texts = LiveConditioner(encoders), [f"a photo of {number} cats" for number in range(4)]
    with torch.no_grad():
        expected = live.encode(texts, TextOptions())
        for at_once in (1, 2, 4):
            start = time.perf_counter()
            parts = [live.encode(texts[at : at + at_once], TextOptions()) for at in range(0, 4, at_once)]
            seconds = time.perf_counter() - start
            found = Conditioning.stacked(parts)
            assert found.pooled is not None and expected.pooled is not None  # of the second encoder
            same = torch.equal(found.hidden, expected.hidden), torch.equal(found.pooled, expected.pooled)
            print(f"{at_once:2} in a call: {4 / seconds:.2f} texts/s; states and pooled output are the same: {same}")


if __name__ == "__main__":
    main()
