"""Schedule, noise, losses and learning rates against diffusers, transformers and formulae in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from library.config.loss import LossConfig
from library.config.optimizer import OptimizerConfig, ScheduleConfig
from library.diffusion.losses import huber_threshold, loss_tables, per_sample_loss, target_for, timestep_weights
from library.diffusion.noise import (
    latents_of,
    multires_noise,
    offset_noise,
    perturbation,
    posterior_noise,
    sample_noise,
    sample_timesteps,
)
from library.diffusion.schedule import stable_diffusion_schedule, with_zero_terminal_snr
from library.errors import UserError
from library.optim.flat import TrainedWeights
from library.optim.optimizers import build_optimizer, choose_optimizer
from library.optim.schedulers import build_scheduler, curve_for, factor

SCHEDULE = stable_diffusion_schedule()
BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
ABAR = np.cumprod(1 - BETAS)
STEPS = torch.tensor([0, 1, 250, 500, 998, 999])
SAMPLES = [(7, 1, 0, index, 0) for index in range(6)]


def test_the_schedule_and_its_use_are_those_of_diffusers():
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    oracle = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    torch.testing.assert_close(SCHEDULE.alphas_cumprod, oracle.alphas_cumprod, rtol=1e-4, atol=0)
    torch.testing.assert_close(SCHEDULE.alphas_cumprod.double(), torch.from_numpy(ABAR), rtol=1e-6, atol=0)
    x, noise = torch.randn(6, 4, 8, 8), torch.randn(6, 4, 8, 8)
    torch.testing.assert_close(
        SCHEDULE.add_noise(x, noise, STEPS), oracle.add_noise(x, noise, STEPS), rtol=1e-4, atol=1e-4
    )
    v = target_for(x, noise, STEPS, SCHEDULE, predicts_v=True)
    torch.testing.assert_close(v, oracle.get_velocity(x, noise, STEPS), rtol=1e-4, atol=1e-4)
    assert target_for(x, noise, STEPS, SCHEDULE, predicts_v=False) is noise


@pytest.mark.parametrize("predicts_v", [False, True])
def test_min_snr_weights_are_the_papers(predicts_v):
    snr = ABAR / (1 - ABAR)
    expected = np.minimum(snr, 5) / (snr + 1 if predicts_v else snr)
    got = timestep_weights(STEPS, SCHEDULE, LossConfig(min_snr_gamma=5.0), predicts_v=predicts_v)
    np.testing.assert_allclose(got.double().numpy(), expected[STEPS.numpy()], rtol=1e-4)
    assert timestep_weights(STEPS, SCHEDULE, LossConfig(), predicts_v=predicts_v).tolist() == [1.0] * 6


@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
@pytest.mark.parametrize("kind", ["l1", "l2", "huber", "smooth_l1"])
def test_losses_are_their_formulae(kind, schedule):
    config = LossConfig(loss_type=kind, huber_schedule=schedule, huber_c=0.2, huber_scale=1.5)
    prediction, target = torch.randn(6, 4, 8, 8), torch.randn(6, 4, 8, 8)
    t = STEPS.numpy().astype(np.float64)
    sigma = np.sqrt((1 - ABAR) / ABAR)[STEPS.numpy()]
    c = {
        "constant": np.full(6, 0.2 * 1.5),
        "exponential": 0.2 ** (t / 1000) * 1.5,
        "snr": ((1 - 0.2) / (1 + sigma) ** 2 + 0.2) * 1.5,
    }[schedule]
    np.testing.assert_allclose(huber_threshold(STEPS, SCHEDULE, config).double().numpy(), c, rtol=1e-4)
    d, c = (prediction.double() - target.double()).numpy(), c[:, None, None, None]
    root = np.sqrt(d**2 + c**2) - c
    expected = {"l1": np.abs(d), "l2": d**2, "huber": 2 * c * root, "smooth_l1": 2 * root}[kind].mean((1, 2, 3))
    tables = loss_tables(SCHEDULE, config, predicts_v=False)
    got = per_sample_loss(prediction, target, kind, None if tables.thresholds is None else tables.thresholds[STEPS])
    np.testing.assert_allclose(got.double().numpy(), expected, rtol=1e-4)


def test_what_is_drawn_for_a_sample_does_not_depend_on_its_batch():
    every = LossConfig(
        noise_offset=0.1,
        noise_offset_random_strength=True,
        adaptive_noise_scale=0.2,
        multires_noise_iterations=6,
        ip_noise_gamma=0.1,
        ip_noise_gamma_random_strength=True,
    )
    x = torch.randn(6, 4, 8, 8)
    shape = (4, 8, 8)
    noise = sample_noise(shape, SAMPLES, every, x)
    perturbed = perturbation(shape, SAMPLES, every)
    assert perturbed is not None
    steps = sample_timesteps(SAMPLES)
    units = posterior_noise(shape, SAMPLES)
    for index, key in enumerate(SAMPLES):
        row = x[index : index + 1]
        assert torch.equal(sample_noise(shape, [key], every, row)[0], noise[index])
        own = perturbation(shape, [key], every)
        assert own is not None
        assert torch.equal(own[0], perturbed[index])
        assert sample_timesteps([key])[0] == steps[index]
        assert torch.equal(posterior_noise(shape, [key])[0], units[index])
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(sample_noise(shape, [(8, *key[1:]) for key in SAMPLES], every, x), noise)


def test_draws_have_the_distributions_they_should():
    keys = [(3, 1, 0, index, 0) for index in range(3000)]
    noise = sample_noise((4, 4, 4), keys, LossConfig(), None)
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    channel_means = sample_noise((4, 8, 8), keys, LossConfig(noise_offset=0.5), None).mean(dim=(2, 3))
    assert abs(channel_means.std() - math.sqrt(0.25 + 1 / 64)) < 0.02
    steps = sample_timesteps(keys)
    assert 0 <= steps.min() < 10
    assert 990 <= steps.max() < 1000
    assert abs(steps.float().mean() - 499.5) < 20
    moments = torch.cat([torch.full((3000, 4, 2, 2), 2.0), torch.full((3000, 4, 2, 2), 2 * math.log(0.5))], dim=1)
    latents = latents_of(moments, posterior_noise((4, 2, 2), keys))
    assert abs(latents.mean() - 2) < 0.02
    assert abs(latents.std() - 0.5) < 0.01


def test_the_strength_of_offset_noise_is_its_formula():
    keys = [(3, 1, 0, index, 0) for index in range(4000)]
    x = torch.zeros(4000, 2, 4, 4)
    x[:, 1] = -2.0
    stds = offset_noise(2, keys, 0.1, LossConfig(adaptive_noise_scale=0.3), x).std(dim=0).flatten()
    torch.testing.assert_close(stds, torch.tensor([0.1, 0.1 + 0.3 * 2]), rtol=0.05, atol=0)
    shrunk = offset_noise(2, keys, 0.1, LossConfig(adaptive_noise_scale=-1.0), x)
    assert not shrunk[:, 1].any()
    varied = offset_noise(2, keys, 0.6, LossConfig(noise_offset_random_strength=True), None).std(dim=0).flatten()
    torch.testing.assert_close(varied, torch.full((2,), 0.6 / 3**0.5), rtol=0.05, atol=0)  # E[u^2] = 1/3


def test_input_perturbation_adds_its_variance_to_the_input_only():
    keys = [(3, 1, 0, index, 0) for index in range(500)]
    further = perturbation((4, 8, 8), keys, LossConfig(ip_noise_gamma=0.2))
    assert further is not None
    assert abs(further.std() - 0.2) < 0.005
    assert perturbation((4, 8, 8), keys, LossConfig()) is None


def test_multires_noise_is_smooth_and_of_unit_deviation():
    torch.manual_seed(0)
    plain = torch.randn(4, 64, 64)
    rows = [multires_noise(plain, (1, index), 8, 0.8) for index in range(20)]
    assert all(row.std() == pytest.approx(1.0, rel=1e-4) for row in rows)
    blocks = torch.stack(rows).unfold(2, 16, 16).unfold(3, 16, 16).mean(dim=(4, 5))
    assert blocks.std() > 5 / 16, "coarse noise must show in means over blocks, where white noise has 1/16"


def test_timesteps_stay_in_their_range():
    keys = [(3, 1, 0, index, 0) for index in range(2000)]
    steps = sample_timesteps(keys, 200, 210)
    assert sorted(set(steps.tolist())) == list(range(200, 210))


def test_zero_terminal_snr_is_that_of_diffusers_and_reaches_the_weights():
    from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr

    oracle = (1 - rescale_zero_terminal_snr(torch.from_numpy(BETAS))).cumprod(0)
    ours = with_zero_terminal_snr(torch.from_numpy(ABAR))
    torch.testing.assert_close(ours, oracle, rtol=1e-9, atol=1e-12)
    schedule = stable_diffusion_schedule(zero_terminal_snr=True)
    assert schedule.snr(torch.tensor([999])).item() == 0
    config = LossConfig(min_snr_gamma=5.0)
    snr = ours / (1 - ours)
    expected = snr.clamp(max=5) / (snr + 1)
    got = timestep_weights(STEPS[:-1], schedule, config, predicts_v=True)
    np.testing.assert_allclose(got.double().numpy(), expected[STEPS[:-1]].numpy(), rtol=1e-3)
    for weighting in ({"min_snr_gamma": 5.0}, {"debiased_estimation_loss": True}, {"v_pred_like_loss": 1.0}):
        for predicts_v in (False, True):
            weights = timestep_weights(STEPS, schedule, LossConfig(**weighting), predicts_v=predicts_v)
            assert torch.isfinite(weights).all()


@pytest.mark.parametrize(
    ("options", "predicts_v", "formula"),
    [
        ({"scale_v_pred_loss_like_noise_pred": True}, True, lambda snr, s: s / (s + 1)),
        ({"v_pred_like_loss": 0.5}, False, lambda snr, s: 1 + 0.5 * (s + 1) / s),
        ({"debiased_estimation_loss": True}, False, lambda snr, s: 1 / np.sqrt(s)),
        ({"debiased_estimation_loss": True}, True, lambda snr, s: 1 / (s + 1)),
        (
            {"debiased_estimation_loss": True, "min_snr_gamma": 3.0},
            False,
            lambda snr, s: np.minimum(snr, 3) / snr / np.sqrt(s),
        ),
    ],
)
def test_weightings_are_their_formulae_and_multiply(options, predicts_v, formula):
    snr = (ABAR / (1 - ABAR))[STEPS.numpy()]
    got = timestep_weights(STEPS, SCHEDULE, LossConfig(**options), predicts_v=predicts_v)
    np.testing.assert_allclose(got.double().numpy(), formula(snr, np.minimum(snr, 1000)), rtol=1e-4)


# ---- learning rates -----------------------------------------------------------------------------------------


def optimizer_of(rate=1.0):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)


def factors(config, num_steps=40, rate=1e-3):
    curve = curve_for(config, num_steps, rate)
    return [factor(config.lr_scheduler, step, curve) for step in range(num_steps)]


ORACLES: dict[str, dict[str, Any]] = {
    "constant": {},
    "constant_with_warmup": {"lr_warmup_steps": 7},
    "linear": {"lr_warmup_steps": 7},
    "cosine": {"lr_warmup_steps": 7},
    "cosine_with_restarts": {"lr_warmup_steps": 7, "lr_scheduler_num_cycles": 3},
    "polynomial": {"lr_warmup_steps": 7, "lr_scheduler_power": 2.0},
    "inverse_sqrt": {"lr_warmup_steps": 7},
    "cosine_with_min_lr": {"lr_warmup_steps": 7, "lr_scheduler_min_lr_ratio": 0.2},
}


@pytest.mark.parametrize("name", ORACLES)
def test_schedules_are_those_of_transformers(name):
    from transformers import get_scheduler

    config = ScheduleConfig(lr_scheduler=name, **ORACLES[name])
    specific: dict[str, dict[str, float]] = {
        "cosine_with_restarts": {"num_cycles": 3},
        "polynomial": {"power": 2.0},
        "cosine_with_min_lr": {
            "min_lr_rate": 0.2,
            "num_cycles": 0.5,
        },  # in waves; here, as in sd-scripts, in half waves
    }
    optimizer = optimizer_of(1e-3)
    oracle = get_scheduler(
        name,
        optimizer,
        num_warmup_steps=int(config.lr_warmup_steps),
        num_training_steps=40,
        scheduler_specific_kwargs=specific.get(name, {}),
    )
    expected = []
    for _ in range(40):
        expected.append(oracle.get_last_lr()[0] / 1e-3)
        optimizer.step()
        oracle.step()
    assert factors(config) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_piecewise_constant_is_that_of_diffusers():
    from diffusers.optimization import get_piecewise_constant_schedule

    rules = "1:10,0.1:20,0.01"
    oracle = get_piecewise_constant_schedule(optimizer_of(), rules).lr_lambdas[0]
    config = ScheduleConfig(lr_scheduler="piecewise_constant", lr_scheduler_args={"step_rules": rules})
    assert factors(config) == pytest.approx([oracle(step) for step in range(40)])


def test_warmup_stable_decay_warms_stays_and_falls():
    config = ScheduleConfig(
        lr_scheduler="warmup_stable_decay", lr_warmup_steps=10, lr_decay_steps=0.25, lr_scheduler_min_lr_ratio=0.1
    )
    got = factors(config)
    assert got[:10] == pytest.approx([step / 10 for step in range(10)])
    assert got[10:30] == [1.0] * 20
    assert got[30:] == pytest.approx([0.9 * (1 + math.cos(math.pi * i / 10)) / 2 + 0.1 for i in range(10)])


def test_shares_of_steps_are_of_the_whole_run():
    curve = curve_for(ScheduleConfig(lr_scheduler="linear", lr_warmup_steps=0.1), 200, 1.0)
    assert curve.warmup == 20


def test_a_group_keeps_its_own_rate_under_a_schedule():
    first, second = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [first], "lr": 1.0}, {"params": [second], "lr": 0.5}], lr=0.1)
    schedule = build_scheduler(ScheduleConfig(lr_scheduler="linear"), optimizer, 10, 0.1)
    assert schedule is not None
    for _ in range(5):
        optimizer.step()
        schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5, 0.25])


def test_flat_parameters_train_like_separate_ones():
    shapes = [(3, 4), (5,), (2, 3, 1, 1)]
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in shapes]
    results = []
    for flat in (False, True):
        parameters = [torch.nn.Parameter(tensor.clone()) for tensor in start]
        groups = [{"params": parameters[:2], "lr": 0.1}, {"params": parameters[2:], "lr": 0.01}]
        optimizer = torch.optim.AdamW(TrainedWeights(groups, None).groups(together=True) if flat else groups, lr=1.0)
        for step in range(4):
            used = parameters if step != 2 else parameters[1:]
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            torch.stack([(parameter - 1).pow(2).sum() for parameter in used]).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        results.append(parameters)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_optimizers_are_found_by_any_spelling_and_recorded():
    choice = choose_optimizer(
        OptimizerConfig(optimizer_type="adamw8BIT", optimizer_args={"weight_decay": "0.1", "betas": ".9,.99"})
    )
    assert choice.record == "bitsandbytes.optim.adamw.AdamW8bit(weight_decay=0.1,betas=(0.9, 0.99))"
    parameter = torch.nn.Parameter(torch.ones(8192))
    optimizer = build_optimizer(choice, [{"params": [parameter]}], 1e-3)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert parameter.max() < 1
    assert optimizer.state[parameter]["state1"].dtype == torch.uint8
    with pytest.raises(UserError, match="one of AdamW, .*AdaFactor, .* got .AdamW9bit.; did you mean AdamW8bit"):
        choose_optimizer(OptimizerConfig(optimizer_type="AdamW9bit"))
