"""Options that change only the speed of a run, and what is done where a device cannot do what they ask for."""

from __future__ import annotations

import contextlib
import copy
import logging
import re

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from drawing import slow
from runs import LIERLA, NEEDED, options, same, train

import train_network
from library.config.command_line import parse
from library.config.network import NetworkConfig
from library.config.train import TrainConfig
from library.config.training import PrecisionConfig
from library.errors import UserError
from library.models import attention
from library.models.attention import use_xformers
from library.models.memory_format import use_channels_last
from library.models.precision import Device, check_bf16, describe, supported_precision
from library.training.prepare import speed
from library.training.prepare.speed import (
    Kernels,
    compile_unet,
    idle_reasons,
    kernels_for,
    set_kernels,
    tf32_is_left_out,
    uncompiled,
)
from networks.lora import create_network

CPU = torch.device("cpu")
TURING = Device("cuda", "GeForce RTX 2080", has_bf16=False, has_tf32=False)
AMPERE = Device("cuda", "GeForce RTX 3060", has_bf16=True, has_tf32=True)
HOST = Device("cpu", "cpu", has_bf16=True, has_tf32=False)
# With Adam the step of a number whose gradient is nearly 0 depends on the last digits.
BY_GRADIENT = {"optimizer_type": "SGDNesterov", "learning_rate": "1.0"}
ALL_ON = PrecisionConfig(cudnn_benchmark=True, allow_tf32=True)


# ---- what a device can do -----------------------------------------------------------------------------------


def test_the_cpu_takes_bf16_and_has_no_tf32():
    assert describe(CPU) == HOST


def test_a_gpu_that_only_emulates_bf16_is_asked_by_name(monkeypatch):
    """Torch says that it supports what it emulates; and it answers for the current GPU, whichever was meant."""
    current = []

    class Current:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            current.append(self.device)

        def __exit__(self, *error):
            current.pop()

    def natively(including_emulation=True):
        return including_emulation or current[-1].index == 1

    monkeypatch.setattr(torch.cuda, "device", Current)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", natively)
    monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: current[-1].index == 1)
    assert describe(torch.device("cuda", 0)) == Device("cuda", "GPU 0", has_bf16=False, has_tf32=False)
    assert describe(torch.device("cuda", 1)) == Device("cuda", "GPU 1", has_bf16=True, has_tf32=True)


def test_bf16_is_refused_where_it_is_emulated(base, pictures, tmp_path, monkeypatch):
    assert [supported_precision(name, TURING) for name in ("no", "fp16")] == ["no", "fp16"]
    assert supported_precision("bf16", AMPERE) == "bf16"
    with pytest.raises(UserError, match=re.escape("--bf16: this GPU (GeForce RTX 2080) has no bfloat16")):
        check_bf16("--bf16", "--fp16", TURING)
    monkeypatch.setattr("library.training.run.runtime.describe", lambda device: TURING)
    with pytest.raises(UserError, match="use --mixed_precision fp16$"):
        train_network.main(options(base, pictures, tmp_path, mixed_precision="bf16"))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_drawing_refuses_it_too(draw, monkeypatch):
    monkeypatch.setattr("library.generation.recipe.describe", lambda device: TURING)
    with pytest.raises(UserError, match=r"--bf16: this GPU \(GeForce RTX 2080\) has no bfloat16 .*: use --fp16"):
        draw("--prompt", "a cat", "--bf16")


# ---- kernels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "kernels", "idle"),
    [
        (AMPERE, Kernels(tries=True, tf32=True), []),
        (TURING, Kernels(tries=True, tf32=False), ["--allow_tf32 has no effect on this device (GeForce RTX 2080)"]),
        (
            HOST,
            Kernels(tries=False, tf32=False),
            ["--cudnn_benchmark has no effect on this device (cpu)", "--allow_tf32 has no effect on this device (cpu)"],
        ),
    ],
)
def test_kernels_are_set_where_they_have_an_effect(monkeypatch, caplog, device, kernels, idle):
    assert kernels_for(ALL_ON, device) == kernels
    assert kernels_for(PrecisionConfig(), device) == Kernels(tries=False, tf32=False)
    assert idle_reasons(PrecisionConfig(), device) == []
    set_to: list[str] = []
    monkeypatch.setattr(speed, "describe", lambda _: device)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", set_to.append)
    set_kernels(ALL_ON, NetworkConfig(network_module="networks.lora"), CPU)
    assert torch.backends.cudnn.benchmark is kernels.tries
    assert set_to == (["high"] if kernels.tf32 else [])
    assert [record.message.partition(", which")[0] for record in caplog.records] == idle


def test_a_run_in_float32_is_told_what_the_gpu_has(monkeypatch, caplog):
    assert tf32_is_left_out(PrecisionConfig(), AMPERE)
    for precision, device in (
        (PrecisionConfig(), TURING),
        (PrecisionConfig(allow_tf32=True), AMPERE),
        (PrecisionConfig(mixed_precision="bf16"), AMPERE),
    ):
        assert not tf32_is_left_out(precision, device)
    monkeypatch.setattr(speed, "describe", lambda _: AMPERE)
    with caplog.at_level(logging.INFO):
        set_kernels(PrecisionConfig(), NetworkConfig(network_module="networks.lora"), CPU)
    assert "this GPU is faster with --allow_tf32" in caplog.text


CACHED = {"cache_latents": True, "mixed_precision": "bf16"}


@pytest.mark.parametrize(
    ("given", "network", "device", "is_told"),
    [
        (CACHED, {}, AMPERE, True),
        (CACHED, {"network_args": {"module_dropout": "0.1"}}, AMPERE, False),
        (CACHED, {"network_module": "lycoris.kohya"}, AMPERE, False),
        (CACHED | {"gradient_checkpointing": True}, {}, AMPERE, False),
        (CACHED | {"torch_compile": True}, {}, AMPERE, False),
        (CACHED | {"cuda_graphs": True}, {}, AMPERE, False),
        ({"mixed_precision": "bf16"}, {}, AMPERE, False),
        (CACHED, {}, HOST, False),
    ],
)
def test_a_run_that_could_repeat_recorded_steps_is_told_so(monkeypatch, caplog, given, network, device, is_told):
    monkeypatch.setattr(speed, "describe", lambda _: device)
    with caplog.at_level(logging.INFO):
        set_kernels(PrecisionConfig(**given), NetworkConfig(**{"network_module": "networks.lora", **network}), CPU)
    assert ("--cuda_graphs can make steps several times as fast" in caplog.text) is is_told


# ---- channels last ------------------------------------------------------------------------------------------


def test_channels_last_reaches_every_convolution(model_store):
    unet = copy.deepcopy(model_store("sd1")[0]["unet"])
    use_channels_last(unet)
    weights = [module.weight for module in unet.modules() if isinstance(module, torch.nn.Conv2d)]
    assert len(weights) > 20
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


@pytest.mark.parametrize(
    "more", [{"network_args": ["conv_dim=2"]}, slow({"fp8_base": True}), slow({"gradient_checkpointing": True})]
)
def test_channels_last_trains_to_rounding_the_same(base, pictures, tmp_path, more):
    more = more | BY_GRADIENT
    expected = train(base, pictures, tmp_path / "a", **more)
    same(train(base, pictures, tmp_path / "b", opt_channels_last=True, **more), expected, 1e-3)


# ---- compilation --------------------------------------------------------------------------------------------


@pytest.fixture
def compiler():
    """Forget what was compiled; the name of a compiler that needs none for C++, with the same traces."""
    torch._dynamo.reset()
    yield "aot_eager"
    torch._dynamo.reset()


COMPILED: dict[str, dict[str, object]] = {
    "two sizes": {},
    "checkpointing": {"gradient_checkpointing": True},
    "8 bits": {"fp8_base": True},
    "convolutions": {"network_args": ["conv_dim=2"], "opt_channels_last": True},
    "dylora": LIERLA,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_unet_trains_to_rounding_the_same(base, pictures, tmp_path, compiler, name):
    for path in (pictures / "1_sks dog").glob("[23].*") if name != "two sizes" else ():
        path.unlink()
    more = COMPILED[name] | BY_GRADIENT | {"max_train_steps": 2, "network_train_unet_only": True}
    expected = train(base, pictures, tmp_path / "a", **more)
    got = train(base, pictures, tmp_path / "b", **more, torch_compile=True, dynamo_backend=compiler)
    same(got, expected, 1e-3)


@pytest.mark.slow
def test_the_usual_compiler_gives_the_same_output_and_gradients(compiler):
    """A network comes after the call that has the U-Net compiled, as in a run."""
    torch.manual_seed(0)
    unet = small_unet().requires_grad_(False)
    assert speed.compiler_problem("inductor", CPU) is None
    compile_unet(unet, "inductor")
    network = create_network(1.0, 2, 1.0, None, [], unet)
    network.apply_to([], unet, apply_text_encoder=False, apply_unet=True)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 32)
    results, graphs = [], []
    for context in (contextlib.nullcontext(), uncompiled(unet)):  # as in previews
        network.zero_grad(set_to_none=True)
        with context:
            output = unet(x, torch.tensor([5, 900]), encoder_hidden_states=text).sample
        output.square().mean().backward()
        gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
        results.append({"output": output.detach(), **gradients})
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[0] > 1  # the function to try it, and the U-Net
    for name, tensor in results[1].items():
        torch.testing.assert_close(results[0][name], tensor, rtol=1e-3, atol=1e-3 * float(tensor.abs().max()))


def test_options_that_can_do_nothing_here_change_nothing_and_say_so(base, pictures, tmp_path, caplog, monkeypatch):
    def broken(*given, **more):
        raise RuntimeError("no C++ compiler was found\nInstall one")

    monkeypatch.setattr(torch, "compile", broken)
    expected = train(base, pictures, tmp_path / "a")
    more = {"torch_compile": True, "cuda_allow_tf32": True, "cuda_cudnn_benchmark": True}
    same(train(base, pictures, tmp_path / "b", **more), expected)
    assert caplog.text.count("has no effect on this device (cpu)") == 2
    told = (
        "--torch_compile: inductor does not work here (no C++ compiler was found Install one); the run is not compiled"
    )
    assert [record.message for record in caplog.records if "compile" in record.message] == [told]


def test_a_compiler_that_lacks_memory_is_no_missing_compiler(monkeypatch):
    def full(*given, **more):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch, "compile", full)
    with pytest.raises(torch.OutOfMemoryError):
        speed.find_compiler(PrecisionConfig(torch_compile=True), CPU)


@pytest.mark.parametrize(
    ("given", "value"), [("inductor", "inductor"), ("EAGER", "eager"), ("no", ""), ("NO", ""), ("", None)]
)
def test_compilers_are_named_as_sd_scripts_and_guis_do(given, value):
    config = parse(TrainConfig, [*NEEDED, "--torch_compile", "--dynamo_backend", given])
    assert config.precision.dynamo_backend == value


def test_no_compiler_compiles_nothing_and_that_is_told(caplog):
    assert speed.find_compiler(PrecisionConfig(torch_compile=True, dynamo_backend=""), CPU) is None
    assert "the run is not compiled, because --dynamo_backend is no" in caplog.text


def test_an_unknown_compiler_is_refused():
    with pytest.raises(UserError, match="--dynamo_backend must be one of inductor, .*, got 'nvprims_nvfuser'"):
        parse(TrainConfig, [*NEEDED, "--torch_compile", "--dynamo_backend", "nvprims_nvfuser"])


# ---- xformers -----------------------------------------------------------------------------------------------


def small_unet():
    return UNet2DConditionModel(
        block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=32,
    )


def test_xformers_that_fails_when_it_is_switched_on_is_left_out(monkeypatch, caplog):
    """The package is not installed here, which diffusers finds out; another model was switched on before."""

    class Switched:
        xformers = False

        def enable_xformers_memory_efficient_attention(self):
            self.xformers = True

        def disable_xformers_memory_efficient_attention(self):
            self.xformers = False

    monkeypatch.setattr(attention, "xformers_problem", lambda device: None)
    other, unet = Switched(), small_unet()
    use_xformers(CPU, other, unet)
    assert not other.xformers
    (message,) = [record.message for record in caplog.records]
    assert re.match(r"--xformers: it does not work here \(.+\); torch's attention \(SDPA\) is used", message)
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 32)
    assert torch.isfinite(unet(x, 5, encoder_hidden_states=text).sample).all()


def test_too_little_memory_is_no_broken_xformers(monkeypatch):
    class Full:
        def enable_xformers_memory_efficient_attention(self):
            raise torch.OutOfMemoryError("CUDA out of memory.")

        def disable_xformers_memory_efficient_attention(self):
            pass

    monkeypatch.setattr(attention, "xformers_problem", lambda device: None)
    with pytest.raises(torch.OutOfMemoryError):
        use_xformers(CPU, Full())
