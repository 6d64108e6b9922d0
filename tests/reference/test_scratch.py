"""The programs from scratch: their formulas, against values worked out by hand and against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastdl.reference import scratch, textbook

# sums of a few hundred float64 terms, in another order
CLOSE = {"rtol": 1e-12, "atol": 1e-14}


def test_linreg_is_x_w_plus_b():
    X = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert scratch.linreg(X, torch.tensor([[2.0], [-1.0]]), torch.tensor([0.5])).tolist() == [[0.5], [2.5]]


def test_squared_loss_is_halved_and_follows_the_shape_of_y_hat():
    assert scratch.squared_loss(torch.tensor([[1.0], [4.0]]), torch.tensor([3.0, 3.0])).tolist() == [
        [2.0],
        [0.5],
    ]


def test_relu_is_the_maximum_with_zero():
    assert scratch.relu(torch.tensor([-1.0, 0.0, 2.0])).tolist() == [0.0, 0.0, 2.0]


def test_softmax_and_cross_entropy_are_torchs(seed):
    logits, y = torch.randn(37, 10, dtype=torch.float64), torch.randint(0, 10, (37,))
    y_hat = scratch.softmax(logits)
    torch.testing.assert_close(y_hat, logits.softmax(dim=1), **CLOSE)
    losses = scratch.cross_entropy(y_hat, y)
    torch.testing.assert_close(losses, F.cross_entropy(logits, y, reduction="none"), **CLOSE)


def test_sgd_divides_by_the_rows_of_the_batch_and_clears_the_gradient():
    param = torch.tensor([1.0, 2.0], requires_grad=True)
    (param * torch.tensor([3.0, 6.0])).sum().backward()
    scratch.sgd([param], lr=0.5, batch_size=3)
    assert param.tolist() == [0.5, 1.0]
    assert param.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("make", "shapes"),
    [
        (scratch.linear_regression, {"0.weight": (1, 2), "0.bias": (1,)}),
        (scratch.softmax_regression, {"1.weight": (10, 784), "1.bias": (10,)}),
        (
            scratch.mlp,
            {"1.weight": (256, 784), "1.bias": (256,), "3.weight": (10, 256), "3.bias": (10,)},
        ),
    ],
)
def test_start_is_normal_with_standard_deviation_a_hundredth_and_biases_zero(make, shapes):
    state = make(generator=torch.Generator().manual_seed(0)).state
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shapes
    for name, tensor in state.items():
        if name.endswith("bias"):
            assert not tensor.any()
        elif tensor.numel() > 1000:
            assert tensor.mean().abs() < 1e-3
            assert 0.0095 < tensor.std() < 0.0105
        else:
            assert 0 < tensor.abs().max() < 0.05


def test_the_last_smaller_batch_is_divided_by_its_own_rows(seed):
    program = scratch.softmax_regression(6, 3, lr=0.1, dtype=torch.float64)
    X, y = torch.rand(5, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    W = program.state["1.weight"].clone().requires_grad_()
    b = program.state["1.bias"].clone().requires_grad_()
    for rows in (slice(0, 4), slice(4, 5)):
        F.cross_entropy(F.linear(X[rows], W, b), y[rows]).backward()
        with torch.no_grad():
            for param in (W, b):
                param -= 0.1 * param.grad
                param.grad = None
    textbook.train_epoch(program, textbook.Batches(X, y, 4, dtype=torch.float64, shuffle=False))
    torch.testing.assert_close(program.state["1.weight"], W.detach(), **CLOSE)
    torch.testing.assert_close(program.state["1.bias"], b.detach(), **CLOSE)
