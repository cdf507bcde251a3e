"""What is kept in fewer bits, what is done about numbers that are not finite, and what a mask weighs."""

from __future__ import annotations

import copy
import json
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL, AutoencoderKLOutput
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from runs import ALSO_SDXL_SLOW, options, same, train, train_killed
from safetensors.torch import load_file

import train_network
from library.config.loss import LossConfig
from library.config.model import ModelConfig
from library.config.prompts import Prompt
from library.diffusion.losses import huber_threshold, per_sample_loss
from library.diffusion.schedule import stable_diffusion_schedule
from library.errors import UserError
from library.models import overflow
from library.models.base import find_base, load_base
from library.models.conditioning import LiveConditioner
from library.models.eight_bit import STORAGE, store_in_eight_bits
from library.models.latent_encoder import LatentEncoder
from library.models.precision import move, types_of
from library.optim.flat import TrainedWeights
from library.sampling.float32 import Float32Port
from library.sampling.pipelines import decode_latents, encode_pixels
from library.sampling.previews import generate_previews
from library.training.prepare import texts
from library.training.run import objective

# ---- 8 bits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_eight_bit_weights_compute_as_their_rounded_values_do(model_store, autocast):
    unet = copy.deepcopy(model_store("sd1")[0]["unet"])
    rounded = copy.deepcopy(unet)
    for name, module in rounded.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and name != "conv_in":
            module.weight.data = module.weight.data.to(STORAGE).float()
    count = sum(parameter.numel() for parameter in unet.parameters())
    saved = store_in_eight_bits(unet)
    assert saved > 0.9 * 3 * count  # three of the four bytes of nearly all numbers
    assert unet.dtype is torch.float32  # which pipelines give the inputs, too
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    text = torch.randn(2, 77, 64, generator=torch.Generator().manual_seed(1))
    results = []
    for model in (unet, rounded):
        latents = x.clone().requires_grad_()
        with torch.autocast("cpu", autocast or torch.float32, enabled=autocast is not None):
            output = model(latents, torch.tensor([5, 900]), encoder_hidden_states=text).sample
        output.float().square().mean().backward()
        results.append((output.detach().float(), latents.grad))
    tolerance = 1e-5 if autocast is None else 3e-2
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


@pytest.mark.repetitions(keep=1)
@pytest.mark.parametrize("more", [{"fp8_base": True}, {"fp8_base_unet": True, "network_train_unet_only": True}])
@ALSO_SDXL_SLOW
def test_a_network_trains_and_draws_over_a_base_in_eight_bits(base, pictures, tmp_path, more):
    (tmp_path / "p.txt").write_text("a dog --w 64 --h 64 --s 2", encoding="utf-8")
    previews = {"sample_prompts": tmp_path / "p.txt", "sample_at_first": True}
    weights = train(base, pictures, tmp_path, mixed_precision="bf16", **more, **previews)
    drawn = list((tmp_path / "sample").glob("*.png"))
    assert drawn
    for path in drawn:
        with Image.open(path) as picture:
            assert np.asarray(picture).std() > 5
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert any(bool(tensor.any()) for name, tensor in weights.items() if "lora_up" in name)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_previews_over_a_base_in_eight_bits_are_those_of_its_rounded_values(model_store, name, dtype):
    precision = "fp16" if dtype is torch.float16 else "bf16"
    files = find_base(ModelConfig(pretrained_model_name_or_path=str(model_store(name)[1]["safetensors"])))
    pictures = []
    for stores in (False, True):
        models = load_base(files, types_of(precision, no_half_vae=True))
        for module in [*models.unet.modules()][1:] if not stores else []:
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and module is not models.unet.conv_in:
                module.weight.data = module.weight.data.to(STORAGE).to(dtype)
        if stores:
            store_in_eight_bits(models.unet)
        prompt = Prompt("a dog", width=64, height=64, steps=2)
        with torch.autocast("cpu", dtype):
            (preview,) = generate_previews(models, LiveConditioner(models.texts), [prompt], [5], sampler="ddim")
        pictures.append(np.asarray(preview.image).astype(int))
    assert pictures[0].std() > 5
    assert np.abs(pictures[0] - pictures[1]).mean() < 2


def test_base_weights_are_merged_before_the_base_is_rounded(base, pictures, tmp_path):
    train(base, pictures, tmp_path / "first")
    more = {"fp8_base": True, "mixed_precision": "bf16", "max_train_steps": 1}
    merged = train(base, pictures, tmp_path / "a", **more, base_weights=tmp_path / "first" / "x.safetensors")
    plain = train(base, pictures, tmp_path / "b", **more)
    assert any(not torch.equal(merged[name], plain[name]) for name in merged)


# ---- half-precision adapters --------------------------------------------------------------------------------


@ALSO_SDXL_SLOW
def test_full_bf16_trains_and_saves_in_bf16(base, pictures, tmp_path):
    weights = train(base, pictures, tmp_path, mixed_precision="bf16", full_bf16=True, learning_rate="1e-1")
    assert {tensor.dtype for name, tensor in weights.items() if name.endswith(".weight")} == {torch.bfloat16}
    assert any(bool(tensor.any()) for name, tensor in weights.items() if "lora_up" in name)


def test_full_precision_options_need_their_arithmetic(base, pictures, tmp_path):
    with pytest.raises(UserError, match="--full_fp16 needs --mixed_precision fp16, got no"):
        train_network.main(options(base, pictures, tmp_path, full_fp16=True))


def test_adapters_in_half_precision_are_changed_in_float32():
    """AdamW of torch keeps its state in the type of the parameters, and (1 - b2) g^2 is 0 in fp16 for |g| < 5e-3."""
    generator = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(40, generator=generator), torch.randn(30, 40, generator=generator) * 1e-3
    weights, moved = {}, {}
    for dtype in (torch.float64, torch.float16):
        parameter = torch.nn.Parameter(start.half().to(dtype))
        trained = TrainedWeights([{"params": [parameter]}], dtype)
        optimizer = torch.optim.AdamW(trained.groups(together=True), lr=1e-3)
        for gradient in gradients:
            trained.clear()
            assert parameter.grad is not None  # it stays
            parameter.grad.add_(gradient)
            trained.collect()
            optimizer.step()
            trained.publish()
        weights[dtype], moved[dtype] = parameter.detach(), trained.flats[0].master.detach()
    assert weights[torch.float16].dtype is torch.float16
    torch.testing.assert_close(moved[torch.float16].double(), moved[torch.float64], rtol=0, atol=2e-4)
    assert torch.equal(weights[torch.float16], moved[torch.float16].half())  # what is saved is what was computed with


def test_hidden_masters_are_part_of_a_state():
    parameter = torch.nn.Parameter(torch.ones(4).half())
    trained = TrainedWeights([{"params": [parameter]}], None)
    with torch.no_grad():
        trained.flats[0].master.add_(1e-4)  # too little for fp16
    trained.publish()
    (saved,) = [master.clone() for master in trained.hidden_masters()]
    trained.restore(None)
    assert trained.flats[0].master.tolist() == [1.0] * 4
    trained.restore([saved])
    assert torch.equal(trained.flats[0].master, saved)
    with trained.unhidden():
        parameter.data.mul_(2)
    assert torch.equal(trained.flats[0].master, saved * 2)
    assert parameter.tolist() == [2.0] * 4
    with pytest.raises(ValueError, match="are others"):
        trained.restore([torch.ones(3)])


# ---- numbers that are not finite ----------------------------------------------------------------------------


@pytest.fixture
def poisoned(monkeypatch):
    """Make the loss of the second step, or its gradient, NaN."""

    def poison(kind):
        calls = []
        draw, real = objective.Objective.draw_step, objective.Objective.training_loss

        def noted(self, batch):
            calls.append(batch.names)
            return draw(self, batch)

        def spoiled(self, inputs):
            loss = real(self, inputs)
            if len(calls) != 2:
                return loss
            if kind == "gradient":
                loss.register_hook(lambda gradient: gradient * float("nan"))
                return loss
            return loss * float("nan")

        monkeypatch.setattr(objective.Objective, "draw_step", noted)
        monkeypatch.setattr(objective.Objective, "training_loss", spoiled)
        return calls

    return poison


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@ALSO_SDXL_SLOW
def test_a_loss_or_gradient_that_is_not_finite_ends_the_run(base, pictures, tmp_path, poisoned, kind):
    calls = poisoned(kind)
    with pytest.raises(UserError) as caught:
        train_network.main(options(base, pictures, tmp_path))
    text = str(caught.value)
    assert f"the {kind} became nan in step 2 with " in text
    assert calls[1][0] in text
    assert "tag" in text  # the caption
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_or_the_step_is_left_out(base, pictures, tmp_path, poisoned, kind, caplog):
    poisoned(kind)
    weights = train(base, pictures, tmp_path, on_nan="skip")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert any(bool(tensor.any()) for name, tensor in weights.items() if "lora_up" in name)
    assert sum("the step is left out" in record.message for record in caplog.records) == 1
    lines = (tmp_path / "x-metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(np.isfinite(value) for line in lines for value in json.loads(line).values())


def test_a_run_that_never_comes_back_gives_up(base, pictures, tmp_path, monkeypatch):
    real = objective.Objective.training_loss
    monkeypatch.setattr(objective.Objective, "training_loss", lambda self, batch: real(self, batch) * float("nan"))
    with pytest.raises(UserError, match="as in the 9 steps before"):
        train_network.main(options(base, pictures, tmp_path, on_nan="skip", max_train_steps=30))


@pytest.fixture
def untold():
    """Forget what was told of a VAE that overflows, which is told once in a run."""
    overflow.tell.cache_clear()


def test_a_run_that_goes_on_counts_the_steps_that_were_left_out_before(base, pictures, tmp_path, monkeypatch):
    real = objective.Objective.training_loss
    monkeypatch.setattr(objective.Objective, "training_loss", lambda self, step: real(self, step) * float("nan"))
    more = {"on_nan": "skip", "max_train_steps": 30}
    train_killed(options(base, pictures, tmp_path, save_state=True, save_every_n_steps=6, **more), after=6)
    with pytest.raises(UserError, match="in step 10 .*as in the 9 steps before"):
        train_network.main(options(base, pictures, tmp_path, resume="auto", **more))


def test_a_network_that_is_not_finite_is_not_saved(base, pictures, tmp_path):
    argv = options(base, pictures, tmp_path, on_nan="skip", learning_rate="3e38", max_train_steps=4)
    with pytest.raises(
        UserError, match="the network has weights that are not finite, and x.safetensors is not written"
    ):
        train_network.main(argv)
    assert not (tmp_path / "x.safetensors").exists()


class OverflowingVae(AutoencoderKL):
    """A VAE that gives infinities in half precision for bright pictures; calls holds the pictures of each call."""

    def encode(self, pixels):
        vars(self).setdefault("calls", []).append((len(pixels), pixels.dtype))
        moments = torch.nn.functional.avg_pool2d(pixels.float(), 8).repeat(1, 3, 1, 1)[:, :8]
        if pixels.dtype != torch.float32:
            bright = pixels.float().mean(dim=(1, 2, 3)) > 0
            moments = torch.where(bright[:, None, None, None], float("inf"), moments)
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments.to(pixels.dtype)))


def three_pictures():
    """Return pictures of which the second is bright."""
    return torch.cat([torch.full((1, 3, 16, 16), value) for value in (-0.5, 0.5, -0.25)])


@pytest.mark.parametrize(("at_once", "calls"), [(None, [3]), (2, [2, 1])])
def test_pictures_that_overflow_in_fp16_are_encoded_in_float32(caplog, untold, at_once, calls):
    vae = OverflowingVae()
    move(vae, torch.float16)
    encoder = LatentEncoder(vae, torch.float16, at_once)
    for _ in range(2):
        moments = encoder.moments(three_pictures())
        assert moments.dtype == torch.float16
        assert moments[:, 0, 0, 0].tolist() == [-0.5, 0.5, -0.25]
        assert vae.dtype == torch.float16
    once = [(number, torch.float16) for number in calls] + [(1, torch.float32)]
    assert vars(vae)["calls"] == once * 2
    assert sum("--no_half_vae" in record.message for record in caplog.records) == 1


def test_bf16_has_the_range_of_float32_and_is_not_checked():
    """The check is a wait for the device, and what overflows there overflows in float32, too."""
    vae = OverflowingVae()
    move(vae, torch.bfloat16)
    moments = LatentEncoder(vae, torch.bfloat16).moments(three_pictures())
    assert vars(vae)["calls"] == [(3, torch.bfloat16)]
    assert torch.isinf(moments[1]).all()


def test_a_whole_batch_is_encoded_in_a_step_and_no_more_than_asked_for(base, pictures, tmp_path, monkeypatch):
    real, calls = AutoencoderKL.encode, []

    def counting(self, pixels, *given, **more):
        calls.append(len(pixels))
        return real(self, pixels, *given, **more)

    monkeypatch.setattr(AutoencoderKL, "encode", counting)
    for asked, expected in ((None, {2}), (1, {1})):
        calls.clear()
        train(base, pictures, tmp_path / str(asked), train_batch_size=2, vae_batch_size=asked, max_train_steps=2)
        assert set(calls) == expected


def overflowing(model_store):
    """Return a tiny VAE in fp16 whose first layers overflow, and the same in float32."""
    half = copy.deepcopy(model_store("sd1")[0]["vae"])
    half.encoder.conv_in.weight.data *= 5e4
    half.decoder.conv_in.weight.data *= 2e4
    move(half, torch.float16)
    whole = copy.deepcopy(half)
    move(whole, torch.float32)
    return half, whole


def test_pictures_are_decoded_in_float32_where_the_vae_overflows(model_store, caplog, untold):
    half, whole = overflowing(model_store)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).half()
    assert not torch.isfinite(half.decode(latents / 0.18215).sample).all()
    found = decode_latents(Mock(vae=half), latents)
    assert half.dtype is torch.float16
    assert sum("--no_half_vae" in record.message for record in caplog.records) == 1
    for one, other in zip(found, decode_latents(Mock(vae=whole), latents.float()), strict=True):
        difference = np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int))
        assert np.asarray(one).std() > 5  # not black
        assert difference.max() <= 1


def test_pictures_to_begin_with_are_encoded_in_float32_where_the_vae_overflows(model_store, untold):
    half, whole = overflowing(model_store)
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        one, other = (
            encode_pixels(vae, pixels, [torch.Generator().manual_seed(seed) for seed in range(2)])
            for vae in (half, whole)
        )
    assert half.dtype is torch.float16
    torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_port_narrows_what_the_model_computes_with_and_nothing_else(dtype):
    """981 becomes 980 in bf16, and a size of 1533 becomes 1536."""
    seen = {}

    class Model(torch.nn.Module):
        config = "its own"

        def forward(self, **given):
            seen.update(given)
            return ([given["sample"]], given["sample"])

    model: Any = Model()
    model.dtype = dtype
    port = Float32Port(model)
    sample, sizes = torch.tensor([1 + 2**-12]), {"time_ids": torch.tensor([1533.0])}
    residuals = [torch.ones(1), torch.ones(1)]
    given = {"added_cond_kwargs": sizes, "encoder_hidden_states": sample, "residuals": residuals, "scale": 0.5}
    (first,), second = port(sample, torch.tensor(981.0), **given)
    assert (port.dtype, port.config) == (torch.float32, "its own")
    assert [first.dtype, second.dtype] == [torch.float32] * 2
    assert [seen[name].dtype for name in ("sample", "encoder_hidden_states")] == [dtype] * 2
    assert [one.dtype for one in seen["residuals"]] == [dtype] * 2
    assert (float(seen["timestep"]), float(seen["added_cond_kwargs"]["time_ids"]), seen["scale"]) == (981, 1533, 0.5)


# ---- masks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["l2", "l1", "huber", "smooth_l1"])
def test_a_mask_multiplies_the_distance_of_each_element(kind):
    generator = torch.Generator().manual_seed(0)
    prediction, target = (torch.randn(3, 4, 6, 8, generator=generator) for _ in range(2))
    masks = torch.rand(3, 1, 6, 8, generator=generator)
    config = LossConfig(loss_type=kind, huber_schedule="constant", huber_c=0.3)
    timesteps = torch.tensor([1, 500, 900])
    thresholds = huber_threshold(timesteps, stable_diffusion_schedule(), config)
    found = per_sample_loss(prediction, target, kind, thresholds, masks=masks)
    d = (prediction.double() - target.double()).numpy()
    c = 0.3
    root = np.sqrt(d**2 + c**2)
    distances = {"l2": d**2, "l1": np.abs(d), "huber": 2 * c * (root - c), "smooth_l1": 2 * (root - c)}[kind]
    np.testing.assert_allclose(found.numpy(), (distances * masks.double().numpy()).mean(axis=(1, 2, 3)), rtol=1e-5)


def masked_run(base, pictures, out, value, **more):
    masks = out.parent / f"masks{value}"
    masks.mkdir(exist_ok=True)
    for path in pictures.rglob("*.png"):
        with Image.open(path) as picture:
            Image.new("L", picture.size, value).save(masks / path.name)
    return train(base, pictures, out, masked_loss=True, conditioning_data_dir=masks, **more)


@ALSO_SDXL_SLOW
def test_a_white_mask_changes_nothing_and_a_black_one_leaves_nothing_to_learn(base, pictures, tmp_path):
    plain = train(base, pictures, tmp_path / "plain")
    same(plain, masked_run(base, pictures, tmp_path / "white", 255))
    black = masked_run(base, pictures, tmp_path / "black", 0, cache_latents=True)
    assert not any(bool(tensor.any()) for name, tensor in black.items() if "lora_up" in name)


# ---- text that is encoded once ------------------------------------------------------------------------------


@pytest.mark.slow
def test_without_its_training_the_text_encoder_is_given_up(base, pictures, tmp_path, monkeypatch):
    seen = []
    real = texts.remember

    def spying(live, *given):
        seen.append(live)
        return real(live, *given)

    monkeypatch.setattr(texts, "remember", spying)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog --w 64 --h 64 --s 2 --n bad", encoding="utf-8")
    more = {"network_train_unet_only": True, "sample_prompts": prompts, "sample_every_n_steps": 3}
    remembered = train(base, pictures, tmp_path / "a", **more)
    assert len(seen) == 1
    assert all(parameter.is_meta for parameter in seen[0].encoders[0].module.parameters())
    assert len(list((tmp_path / "a" / "sample").glob("*.png"))) == 1
    monkeypatch.setattr("library.training.prepare.texts.LARGEST_MEMORY", 0)
    computed = train(base, pictures, tmp_path / "b", **more)
    assert len(seen) == 1
    same(computed, remembered, tolerance=2e-3)
    train(base, pictures, tmp_path / "c", **more, shuffle_caption=True)
    assert len(seen) == 1


@pytest.mark.parametrize("more", [pytest.param({}, marks=pytest.mark.slow), {"network_train_unet_only": True}])
@ALSO_SDXL_SLOW
def test_weighted_captions_train_on_other_states(base, pictures, tmp_path, more):
    for path in pictures.rglob("*.txt"):
        path.write_text("a (dog:1.8), [x]", encoding="utf-8")
    literal = train(base, pictures, tmp_path / "a", **more)
    weighted = train(base, pictures, tmp_path / "b", **more, weighted_captions=True)
    assert any(not torch.equal(literal[name], weighted[name]) for name in literal)
    assert load_file(tmp_path / "b" / "x.safetensors").keys() == literal.keys()
