"""Passes that are recorded and repeated, with a stand-in for the graphs of CUDA; and what cannot be recorded."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from runs import options, train

import train_network
from library.errors import UserError
from library.models.sending import mapped, tensors_in
from library.training import recipe
from library.training.run.graphs import GraphPass
from library.training.run.objective import Inputs, StepInputs
from library.training.run.step import EagerPass


class Recordings:
    """Records by keeping the work; each repetition writes its result to the same tensor, as a graph does."""

    def __init__(self):
        self.number = self.repetitions = 0

    def __call__(self, work):
        self.number += 1
        work()  # as a warm-up
        result = torch.full((), float("nan"))

        def repeat():
            self.repetitions += 1
            result.copy_(work())

        return repeat, result


@pytest.mark.parametrize(
    "more",
    [
        {"gradient_accumulation_steps": 2},
        pytest.param({"network_module": "networks.dylora", "network_args": ["unit=2"]}, marks=pytest.mark.slow),
        pytest.param({"mixed_precision": "bf16"}, marks=pytest.mark.slow),
    ],
)
def test_recorded_passes_train_like_eager_ones(base, pictures, tmp_path, more, monkeypatch):
    given = {"cache_latents": True, "max_train_steps": 4, "network_dim": 4, **more}
    made = Recordings()
    results = []
    for records in (False, True):
        with monkeypatch.context() as patch:
            if records:

                def choose(precision, objective, state, device):
                    models = [objective.base.unet, *objective.base.text_modules]
                    return GraphPass(EagerPass(objective), lambda: made, state.weights.pass_gradients, models)

                patch.setattr(recipe, "choose_passes", choose)
            results.append(train(base, pictures, tmp_path / str(records), **given))
    eager, recorded = results
    assert eager.keys() == recorded.keys()
    for name, tensor in eager.items():
        # In another order: gradients are added to those that are restored after the recording.
        torch.testing.assert_close(recorded[name], tensor, rtol=1e-3, atol=1e-6)
    assert 0 < made.number < made.repetitions


def test_inputs_keep_their_structure_and_their_tensors():
    value = (torch.ones(2), None, (torch.zeros(1), "text"))
    doubled = mapped(value, lambda tensor: tensor * 2)
    assert [tensor.tolist() for tensor in tensors_in(doubled)] == [[2.0, 2.0], [0.0]]
    assert doubled[1] is None
    assert doubled[2][1] == "text"


def test_weights_that_moved_are_recorded_anew():
    layer = torch.nn.Linear(2, 1)
    made = Recordings()

    def eager(inputs, scale):
        return layer(inputs.timesteps).sum().detach() * scale

    passes, given = GraphPass(eager, lambda: made, [], [layer]), StepInputs(cast("Inputs", None), torch.ones(1, 2))
    for _ in range(2):
        assert passes(given, 1.0) == eager(given, 1.0)
    assert (made.number, made.repetitions) == (1, 2)
    layer.weight.data = layer.weight.data.clone()
    assert passes(given, 2.0) == eager(given, 2.0)
    assert made.number == 2


def test_without_a_gpu_nothing_is_recorded_and_that_is_told(base, pictures, tmp_path, caplog):
    train(base, pictures, tmp_path, cuda_graphs=True, cache_latents=True, max_train_steps=1)
    assert any("--cuda_graphs: this run has no CUDA GPU (cpu)" in record.message for record in caplog.records)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"network_module": "lycoris.kohya"}, "--cuda_graphs does not go with --network_module lycoris.kohya"),
        ({"network_args": ["module_dropout=0.1"]}, "--cuda_graphs does not go with module_dropout"),
        ({"gradient_checkpointing": True}, "does not go with --gradient_checkpointing"),
    ],
)
def test_what_cannot_be_recorded_is_refused(base, pictures, tmp_path, more, message):
    if more.get("network_module"):
        pytest.importorskip("lycoris")
    with pytest.raises(UserError, match=message):
        train_network.main(options(base, pictures, tmp_path, cuda_graphs=True, cache_latents=True, **more))
