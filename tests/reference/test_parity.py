"""The rule: torch passes it against itself, and wrong runs fail each part of it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fastdl import data
from fastdl.reference import concise, parity, scratch
from fastdl.reference.parity import Errors, Run
from fastdl.training import History, Scores

NUM_EPOCHS = 2


@pytest.fixture(scope="module")
def garments():
    images = data.garments()
    return images.X_train[:1000], images.y_train[:1000]


def compare(garments, make_candidate, start=None):
    start = start or concise.mlp(num_hiddens=32, generator=torch.Generator().manual_seed(0)).state

    def make_runs(dtype):
        truth = concise.mlp(num_hiddens=32, dtype=dtype).load(start)
        return {"concise": Run(truth), "candidate": make_candidate(start, dtype)}

    def batches(num_epochs):
        order = torch.Generator().manual_seed(0)
        for _ in range(num_epochs):
            yield from data.batches(*garments, 64, order)

    return parity.compare(make_runs, batches, NUM_EPOCHS)


def test_torch_passes_against_itself(garments):
    checks = compare(garments, lambda start, dtype: Run(scratch.mlp(num_hiddens=32, dtype=dtype).load(start)))
    for name, found in checks.items():
        assert all(check.passes for check in found), (name, list(map(str, found)))


def test_torch_with_another_order_of_rows_passes(garments):
    def candidate(start, dtype):
        program = concise.mlp(num_hiddens=32, dtype=dtype).load(start)
        return Run(program, row_order=torch.Generator().manual_seed(77))

    assert all(check.passes for check in compare(garments, candidate)["candidate"])


def test_a_slightly_different_learning_rate_fails(garments):
    def candidate(start, dtype):
        return Run(scratch.mlp(num_hiddens=32, lr=0.1 * (1 + 1e-6), dtype=dtype).load(start))

    exact, parameters, *_ = compare(garments, candidate)["candidate"]
    assert not exact.passes
    assert not parameters.passes


@pytest.mark.parametrize("is_within_rounding", [True, False])
def test_a_gate_on_the_other_side_passes_where_rounding_can_put_it_there(garments, is_within_rounding):
    start = dict(concise.mlp(num_hiddens=32, generator=torch.Generator().manual_seed(0)).state)
    if is_within_rounding:
        X, _ = next(data.batches(*garments, 64, torch.Generator().manual_seed(0)))
        hidden = concise.mlp(num_hiddens=32).load(start).net[:2](data.to_float(X[:1], torch.float32))
        # the first example's first activation is 0 but for its rounding
        start["1.bias"] = start["1.bias"].clone()
        start["1.bias"][0] -= hidden.detach()[0, 0]
    flips = []

    def candidate(start, dtype):
        program = concise.mlp(num_hiddens=32, dtype=dtype).load(start)

        def flip_nearest(module, inputs):
            if dtype == torch.float64 or flips:
                return None
            activation = inputs[0].detach()
            nearest = activation.abs().argmin()
            flips.append(float(activation.view(-1)[nearest]))
            move = torch.zeros_like(activation)
            move.view(-1)[nearest] = -math.copysign(1e-9, flips[0]) - flips[0]
            return inputs[0] + move

        program.net[2].register_forward_pre_hook(flip_nearest)
        return Run(program)

    checks = compare(garments, candidate, start)["candidate"]
    assert (abs(flips[0]) < 1e-7) == is_within_rounding
    assert [check.passes for check in checks] == [True, True, True, is_within_rounding]


def test_half_precision_fails_in_float32_alone(garments):
    class Coarse(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, X):
            y_hat = self.net(X)
            return y_hat if y_hat.dtype == torch.float64 else y_hat.bfloat16().float()

    def candidate(start, dtype):
        program = concise.mlp(num_hiddens=32, dtype=dtype).load(start)
        return Run(replace(program, net=Coarse(program.net)))

    checks = compare(garments, candidate)["candidate"]
    assert [check.passes for check in checks] == [True, True, False, False]


def test_nan_never_passes():
    errors = Errors()
    errors.add(math.nan, torch.zeros(2))
    errors.add(0.0, torch.tensor([math.nan, 0.0]))
    errors.add(0.0, torch.zeros(2))
    assert not any(check.passes for check in parity.check_exact(errors))
    assert not any(check.passes for check in parity.check_first_epoch(errors, [Errors()], 1.0, 1.0))


def history(train_loss, accuracy):
    made = History()
    made.append(1.0, Scores(train_loss, accuracy), Scores(9.9, accuracy))
    return made


@pytest.mark.parametrize(
    ("loss", "accuracy", "passes"),
    [
        (0.5009, 0.809, [True, True, True]),
        (0.5011, 0.8, [False, True, True]),
        (0.5, 0.811, [True, False, False]),
        (math.nan, 0.8, [False, True, True]),
    ],
)
def test_epochs_are_held_to_a_thousandth_and_a_hundredth(loss, accuracy, passes):
    checks = parity.check_epochs(history(loss, accuracy), history(0.5, 0.8))
    assert [check.passes for check in checks] == passes


def test_a_run_that_stopped_early_is_refused():
    with pytest.raises(ValueError, match="longer"):
        parity.check_epochs(History(), history(0.5, 0.8))
