"""The table of optimizers: what a name stands for, and what each does to weights and states."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util

import pytest
import torch
from runs import NEEDED

from library.config.command_line import parse
from library.config.optimizer import OptimizerConfig
from library.config.train import TrainConfig
from library.config.values import parse_pairs
from library.errors import UserError
from library.optim import optimizers
from library.optim.flat import TrainedWeights
from library.optim.optimizers import (
    ROWS,
    adapted_rates,
    averaged_weights,
    build_optimizer,
    check_optimizer,
    choose_optimizer,
    warn_of_rates,
)
from library.training.prepare.checks import check_steps, check_steps_early

SUBSTITUTED = [row.name for row in ROWS if row.substitute is not None]
needs_extra = pytest.mark.skipif(
    importlib.util.find_spec("pytorch_optimizer") is None, reason="pytorch-optimizer is not installed"
)


def chosen(name, *arguments, rate=1.0):
    return choose_optimizer(
        OptimizerConfig(optimizer_type=name, optimizer_args=parse_pairs(arguments), learning_rate=rate)
    )


def train(choice, *, flat, steps=6, rate=1.0):
    """Fit two small matrices to a target; return (optimizer, parameters, losses)."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(4, 3, generator=generator)) for _ in range(2)]
    groups = [{"params": parameters, "lr": rate}]
    optimizer = build_optimizer(choice, TrainedWeights(groups, None).groups(together=True) if flat else groups, rate)
    losses = []
    for _ in range(steps):
        loss = torch.stack([(parameter - 1).square().sum() for parameter in parameters]).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=not flat)
        losses.append(loss.item())
    return optimizer, parameters, losses


@needs_extra
@pytest.mark.parametrize("name", SUBSTITUTED)
def test_every_name_runs_with_the_one_extra_package(name, monkeypatch):
    own = {row.path.split(".")[0] for row in ROWS if row.substitute is not None}
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in own else found(name))
    choice = chosen(name)
    assert choice.path.startswith("pytorch_optimizer.")
    check_optimizer(choice, 1.0)
    rate = 1e-2 if "Adam" in name or name == "Lion" else 1.0
    _, _, losses = train(choice, flat=True, steps=40, rate=rate if "DAdapt" not in name else 1.0)
    assert losses[-1] < losses[0]


@needs_extra
def test_arguments_of_the_original_keep_their_meaning():
    choice = chosen("Prodigy", "decouple=True", "use_bias_correction=True", "d_coef=2.0")
    if choice.path.startswith("pytorch_optimizer"):
        assert choice.arguments == {"weight_decouple": True, "bias_correction": True, "d_coef": 2.0}
        with pytest.raises(UserError, match="Prodigy has no d_coeff; did you mean d_coef?"):
            chosen("Prodigy", "d_coeff=2.0")


def test_a_missing_package_is_told_with_the_extra_that_serves(monkeypatch):
    monkeypatch.setattr(optimizers, "_is_installed", lambda path: False)
    monkeypatch.setitem(__import__("sys").modules, "prodigyopt", None)
    with pytest.raises(UserError, match="pip install pytorch-optimizer"):
        chosen("Prodigy")


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", [row.name for row in ROWS if row.elementwise])
def test_laid_out_flat_gives_the_same_weights(name):
    try:
        choice = chosen(name)
    except UserError:
        pytest.skip(f"the package of {name} is not installed")
    rate = 1.0 if choice.finds_step_size else 1e-2
    _, one, _ = train(choice, flat=False, rate=rate)
    _, other, _ = train(choice, flat=True, rate=rate)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@needs_extra
@pytest.mark.parametrize("name", ["AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree"])
def test_looking_at_the_averaged_weights_changes_nothing(name):
    choice = chosen(name, rate=0.1)
    assert choice.is_schedule_free
    optimizer, parameters, _ = train(choice, flat=True, rate=0.1)
    before = [parameter.detach().clone() for parameter in parameters]
    state = copy.deepcopy(optimizer.state_dict())
    with averaged_weights(optimizer):
        averaged = [parameter.detach().clone() for parameter in parameters]
    assert any(not torch.equal(a, b) for a, b in zip(before, averaged, strict=True))
    for old, new in zip(before, parameters, strict=True):
        assert torch.equal(old, new)
    after = optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]
    for key, values in state["state"].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(after["state"][key][n])) for n, v in values.items())


def test_any_other_optimizer_has_nothing_to_average():
    optimizer, parameters, _ = train(chosen("AdamW"), flat=False, rate=0.1)
    before = [parameter.detach().clone() for parameter in parameters]
    with averaged_weights(optimizer):
        assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


@needs_extra
def test_small_and_different_rates_are_warned_of_where_the_step_size_is_found(caplog):
    config = OptimizerConfig(optimizer_type="Prodigy", learning_rate=1e-4, unet_lr=1.0)
    warn_of_rates(choose_optimizer(config), config)
    texts = [record.message for record in caplog.records]
    assert any("1.0 suits, got 0.0001" in text for text in texts)
    assert any("the same learning rate" in text for text in texts)
    caplog.clear()
    warn_of_rates(choose_optimizer(config), OptimizerConfig(optimizer_type="Prodigy", learning_rate=1.0))
    warn_of_rates(chosen("AdamW"), config)
    assert not caplog.records


@needs_extra
def test_the_rate_that_is_found_is_reported():
    optimizer, _, _ = train(chosen("Prodigy"), flat=True, steps=20)
    (rate,) = adapted_rates(optimizer)
    assert rate > 1e-6  # where it began
    assert adapted_rates(train(chosen("AdamW"), flat=True)[0]) == []


# ---- before a process has its GPU ---------------------------------------------------------------------------


class ForGpus(torch.optim.SGD):
    """An optimizer without kernels for the CPU."""

    def step(self, closure=None):
        if any(parameter.device.type == "cpu" for group in self.param_groups for parameter in group["params"]):
            raise RuntimeError("no kernel for the CPU")
        return super().step(closure)


GPU = torch.device("meta")  # another device than the CPU


@pytest.fixture
def for_gpus(monkeypatch):
    """Return a configuration with an optimizer that works on another device than the CPU only."""
    monkeypatch.setattr(optimizers, "ForGpus", ForGpus, raising=False)
    argv = [*NEEDED, "--learning_rate", "1", "--optimizer_type", "library.optim.optimizers.ForGpus"]
    config = parse(TrainConfig, argv)
    return config, choose_optimizer(config.optimizer)


def test_an_optimizer_for_gpus_is_tried_once_there_is_one(for_gpus, monkeypatch):
    """In a process that has none yet, the first GPU would be touched, which is another process's."""
    config, choice = for_gpus
    with pytest.raises(UserError, match="does not work here: no kernel for the CPU$"):
        check_steps_early(config, choice)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_steps_early(config, choice)
    check_steps(config, choice, GPU)
    dry = dataclasses.replace(config, run=dataclasses.replace(config.run, dry_run=True))
    with pytest.raises(UserError, match="no kernel for the CPU; a dry run uses no GPU, so leave out --dry_run"):
        check_steps_early(dry, choice)


def test_wrong_arguments_are_told_before_there_is_a_gpu(for_gpus, monkeypatch):
    config, _ = for_gpus
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    for name, arguments in (("library.optim.optimizers.ForGpus", ["momentum=-1.0"]), ("AdamW", ["eps=-1.0"])):
        with pytest.raises(UserError, match="refuses them"):
            check_steps_early(config, chosen(name, *arguments))


def test_too_little_memory_is_no_mistake_of_the_user(monkeypatch):
    def full(*given, **more):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    with pytest.raises(RuntimeError, match="ALLOC_FAILED") as caught:
        check_optimizer(chosen("AdamW"), 1.0)
    assert not isinstance(caught.value, UserError)
    monkeypatch.setattr(torch.optim.AdamW, "__init__", full)
    with pytest.raises(RuntimeError, match="ALLOC_FAILED") as caught:
        check_optimizer(chosen("AdamW"), 1.0)
    assert not isinstance(caught.value, UserError)
