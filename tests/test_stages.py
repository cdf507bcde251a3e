"""Models are on the device in their stage only: VAE, text encoders, U-Net; and none is there twice."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from runs import options
from safetensors.torch import load_file
from tensors import assert_same
from torch import nn

import train_network
from library.models import memory
from library.models.precision import move
from library.training.record import preview

KINDS = {
    "UNet2DConditionModel": "U-Net",
    "AutoencoderKL": "VAE",
    "CLIPTextModel": "text 1",
    "CLIPTextModelWithProjection": "text 2",
}
TEXTS = {"text 1", "text 2"}


@pytest.fixture
def base(model_store):
    return model_store("sdxl")[1]["fp16"]


@pytest.fixture
def timeline(monkeypatch):
    """Return the parts on the device after each move of a whole model; the device of runs is a second name of the CPU.

    cpu:0 is the device, and cpu, which tensors have, is the host.
    """
    from accelerate import Accelerator

    device, real = torch.device("cpu", 0), nn.Module.to
    there: set[str] = set()
    seen: list[frozenset[str]] = []

    def recording(self, *args, **named):
        part = KINDS.get(type(self).__name__)
        target = torch._C._nn._parse_to(*args, **named)[0]
        if part is not None and target is not None:
            (there.add if target == device else there.discard)(part)
            seen.append(frozenset(there))
        return real(self, *args, **named)

    monkeypatch.setattr(nn.Module, "to", recording)
    monkeypatch.setattr(Accelerator, "device", property(lambda self: device))
    return seen


def stages(timeline):
    """Return the sets of parts on the device, without repetitions and moments at which it is empty."""
    found: list[frozenset[str]] = []
    for parts in timeline:
        if parts and (not found or found[-1] != parts):
            found.append(parts)
    return [set(parts) for parts in found]


def run(base, pictures, out, **more):
    out.mkdir(exist_ok=True)
    prompts = out / "prompts.txt"
    prompts.write_text("a dog --w 64 --h 64 --s 1\na cat --w 64 --h 64 --s 1", encoding="utf-8")
    more = {
        "network_train_unet_only": True,
        "max_train_steps": 1,
        "sample_prompts": prompts,
        "sample_at_first": True,
    } | more
    assert train_network.main(options(base, pictures, out, **more)) == 0


CACHED = [{"VAE"}, {"text 1"}, TEXTS, {"text 2"}, {"U-Net"}]


def test_each_part_comes_to_the_device_in_its_stage(base, pictures, tmp_path, timeline):
    run(base, pictures, tmp_path, cache_latents=True)
    decoding = [{"U-Net", "VAE"}, {"U-Net"}]
    assert stages(timeline) == [*CACHED, *decoding * 4]  # of two previews at the start and two at the end


def test_the_unet_waits_where_decoding_has_no_room(base, pictures, tmp_path, timeline, monkeypatch):
    monkeypatch.setattr(preview, "free_memory", lambda device: 0)
    run(base, pictures, tmp_path / "small", cache_latents=True)
    assert stages(timeline) == [*CACHED, *[{"VAE"}, {"U-Net"}] * 4]


def test_previews_and_weights_are_the_same_without_room(base, pictures, tmp_path, monkeypatch):
    found = []
    for name, free in (("large", None), ("small", 0)):
        monkeypatch.setattr(preview, "free_memory", lambda device, free=free: free)
        run(base, pictures, tmp_path / name, cache_latents=True, fp8_base=True, mixed_precision="bf16")
        samples = sorted((tmp_path / name / "sample").glob("*.png"))
        found.append(([path.read_bytes() for path in samples], load_file(tmp_path / name / "x.safetensors")))
    (pictures_with_room, with_room), (pictures_without, without) = found
    assert len(pictures_with_room) == 4
    assert pictures_with_room == pictures_without
    assert_same(with_room, without)


@pytest.mark.slow
def test_what_every_step_needs_stays_on_the_device(base, pictures, tmp_path, timeline):
    run(base, pictures, tmp_path, network_train_unet_only=None, sample_prompts=None, sample_at_first=None)
    assert stages(timeline)[-1] == {"U-Net", "VAE", *TEXTS}


def test_a_part_that_moved_leaves_nothing_behind(base):
    from library.config.model import ModelConfig
    from library.models.base import find_base, load_base
    from library.models.precision import types_of

    loaded = load_base(find_base(ModelConfig(pretrained_model_name_or_path=str(base))), types_of("bf16"))
    left: list[str] = []
    gone = 0
    for part in (loaded.unet, loaded.vae, *loaded.text_modules):
        for name, parameter in part.named_parameters():
            left.append(name)
            weakref.finalize(parameter.untyped_storage(), left.remove, name)
        del parameter
        move(part, "meta")  # a stand-in for a device with memory of its own
        gone += 1
    assert gone == 4
    assert left == []


def test_only_memory_of_a_gpu_is_short():
    assert preview.free_memory(torch.device("cpu")) is None
    assert preview.free_memory(torch.device("mps")) is None


@pytest.mark.parametrize(
    ("left_on_the_gpu", "fraction", "expected"),
    [(60, 1.0, 62), (60, 0.1, 7), (1, 0.1, 3), (0, 1.0, 2)],
    ids=["an empty GPU", "a limit of torch", "a GPU that others fill", "a full GPU"],
)
def test_free_memory_obeys_a_limit_of_torch(monkeypatch, left_on_the_gpu, fraction, expected):
    def share_of(device):
        assert isinstance(device, int), "torch wants the index here"
        return fraction

    facts = {"mem_get_info": (left_on_the_gpu, 80), "memory_reserved": 3, "memory_allocated": 1}
    for name, fact in facts.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, fact=fact: fact)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", share_of)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert preview.free_memory(torch.device("cuda", 0)) == expected
    assert preview.free_memory(torch.device("cuda")) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_vae_computes_what_that_of_diffusers_does_with_less_memory(model_store, dtype):
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    from library.models.vae_blocks import change_in_place

    given = model_store("sdxl")[0]["vae"]
    theirs = AutoencoderKL.from_config(given.config).requires_grad_(False).eval()
    theirs.load_state_dict(given.state_dict())
    for parameter in theirs.parameters():
        parameter.data = parameter.data.to(dtype)
    ours = copy.deepcopy(theirs)
    change_in_place(ours)
    pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)).to(dtype) * 2 - 1
    peaks = []
    results = []
    for vae in (theirs, ours):
        with memory.PeakMemory() as peak, torch.no_grad():
            moments = vae.encode(pixels).latent_dist.parameters
            encoding = peak.peak
            results.append((moments, vae.decode(moments[:, :4]).sample))
            peaks.append((encoding, peak.peak))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    assert all(less < more for more, less in zip(*peaks, strict=True))


def test_the_room_that_decoding_needs_is_counted(model_store):
    vae = model_store("sdxl")[0]["vae"]
    needed = memory.bytes_to_decode(vae, (64, 96))
    with memory.PeakMemory() as peak:
        peak.ignore(memory.weights_of(vae.modules()))
        memory.decode(vae, (64, 96))
    assert needed - memory.weight_bytes(vae) == pytest.approx(peak.peak, rel=0.02)
