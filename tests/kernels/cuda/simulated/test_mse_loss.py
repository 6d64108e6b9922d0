"""Squared error in the simulator, against NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest

from fastdl.kernels.cuda import mse_loss
from fastdl.kernels.cuda.reduction import MEAN, NONE, SUM
from tests.kernels.cuda.simulated.near import assert_near
from tests.kernels.cuda.simulated.simulator import STREAM, DeviceArray, kernels


def _scratch(size, dtype):
    count = mse_loss.mse_loss_partial_sums(size)
    return DeviceArray.nan((count,), "float64" if dtype == "float64" else "float32") if count else None


def _pair(seed, size, dtype, offset=0):
    rng = np.random.default_rng(seed)
    return tuple(DeviceArray(rng.standard_normal(size), dtype, offset) for _ in range(2))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("size", [1, 10, 1026])
def test_forward_and_backward_in_every_reduction(seed, size, dtype):
    input, target = _pair(seed, size, dtype)
    difference = input.numpy() - target.numpy()
    squares = difference * difference
    loss = DeviceArray.nan((size,), dtype)
    kernels.mse_loss_forward(input, target, NONE, loss, None, STREAM)
    # a difference is rounded once, and its square again
    assert_near(loss, squares, squares, 3)
    for reduction, factor in ((MEAN, 1 / size), (SUM, 1.0)):
        loss = DeviceArray.nan((1,), dtype)
        kernels.mse_loss_forward(input, target, reduction, loss, _scratch(size, dtype), STREAM)
        assert_near(loss, squares.sum(keepdims=True) * factor, squares.sum() * factor, size + 3)
        upstream = DeviceArray([1.5], dtype)
        grad_input = DeviceArray.nan((size,), dtype)
        kernels.mse_loss_backward(upstream, input, target, reduction, grad_input, STREAM)
        exact = 3.0 * factor * difference
        assert_near(grad_input, exact, np.abs(exact), 4)
    upstream, grad_input = DeviceArray(difference, dtype), DeviceArray.nan((size,), dtype)
    kernels.mse_loss_backward(upstream, input, target, NONE, grad_input, STREAM)
    exact = 2 * difference * upstream.numpy()
    assert_near(grad_input, exact, np.abs(exact), 4)


@pytest.mark.parametrize("offset", [0, 4])
def test_several_blocks_add_up_to_one_sum(seed, offset, monkeypatch):
    monkeypatch.setattr(mse_loss, "_CHUNKS_PER_THREAD", 1)
    size = 2 * 4 * mse_loss.THREADS + 5
    input, target = _pair(seed, size, "float32", offset)
    squares = (input.numpy() - target.numpy()) ** 2
    assert mse_loss.mse_loss_partial_sums(size) == 3
    # the grid is bounded: its blocks then go round more than once
    for most in (3, 2):
        monkeypatch.setattr(mse_loss, "MAX_BLOCKS", most)
        loss = DeviceArray.nan((1,))
        kernels.mse_loss_forward(input, target, MEAN, loss, _scratch(size, "float32"), STREAM)
        assert_near(loss, squares.mean(keepdims=True), squares.mean(), 64)


def test_the_mean_of_nothing_is_nan_and_its_sum_is_zero():
    empty = DeviceArray(np.empty(0))
    for reduction, expected in ((MEAN, np.nan), (SUM, 0.0)):
        loss = DeviceArray([7.0])
        kernels.mse_loss_forward(empty, empty, reduction, loss, None, STREAM)
        np.testing.assert_array_equal(loss.numpy(), [expected])
