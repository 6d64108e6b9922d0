"""The linear layer's three products in the simulator, against NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest

from fastdl.kernels.cuda import gemm
from tests.kernels.cuda.simulated.near import assert_near
from tests.kernels.cuda.simulated.simulator import LAUNCHES, STREAM, DeviceArray, kernels

# around the edges of the tiles, the slices and the chunks
SIZES = [(1, 1, 1), (10, 2, 1), (16, 32, 16), (17, 33, 5), (33, 36, 35), (32, 100, 20)]
DTYPES = ["float32", "float64", "float16", "bfloat16"]


def _check(rng, sizes, dtype, relu=True, has_bias=True, offset=0):
    n, k, m = sizes
    input, weight, bias, grad_output = (
        DeviceArray(rng.standard_normal(shape), dtype, offset) for shape in ((n, k), (m, k), (m,), (n, m))
    )
    x, w, b, g = (array.numpy() for array in (input, weight, bias, grad_output))
    output = DeviceArray.nan((n, m), dtype, offset)
    kernels.linear_forward(input, weight, bias if has_bias else None, relu, output, STREAM)
    b = b if has_bias else 0 * b
    exact = x @ w.T + b
    assert_near(output, np.maximum(exact, 0) if relu else exact, np.abs(x) @ np.abs(w.T) + np.abs(b), k + 2)

    mask = output if relu else None
    masked = np.where(output.numpy() <= 0, 0, g) if relu else g
    grad_input = DeviceArray.nan((n, k), dtype, offset)
    kernels.linear_grad_input(grad_output, mask, weight, grad_input, STREAM)
    assert_near(grad_input, masked @ w, np.abs(masked) @ np.abs(w), m + 1)

    grad_weight, grad_bias = DeviceArray.nan((m, k), dtype, offset), DeviceArray.nan((m,), dtype, offset)
    kernels.linear_grad_weight(grad_output, mask, input, grad_weight, grad_bias, STREAM)
    assert_near(grad_weight, masked.T @ x, np.abs(masked.T) @ np.abs(x), n + 1)
    assert_near(grad_bias, masked.sum(0), np.abs(masked).sum(0), n + 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_products_are_right_around_the_edges_of_a_tile(seed, sizes, dtype):
    _check(np.random.default_rng(seed), sizes, dtype)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_bias_and_relu_are_each_optional(seed, has_bias, relu):
    _check(np.random.default_rng(seed), (18, 21, 19), "float32", relu, has_bias)


def test_the_tile_of_a_large_product(seed, monkeypatch):
    monkeypatch.setattr(gemm, "FEW_TILES", 1)
    LAUNCHES.clear()
    _check(np.random.default_rng(seed), (65, 36, 67), "float32")
    assert [name.split("_")[-2] for name in LAUNCHES] == ["large"] * 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_arrays_at_an_odd_address_are_read_one_by_one(seed, dtype):
    _check(np.random.default_rng(seed), (18, 24, 20), dtype, offset=2 if dtype == "bfloat16" else 4)


def test_either_gradient_can_be_had_without_the_other(seed):
    rng = np.random.default_rng(seed)
    input, grad_output = DeviceArray(rng.standard_normal((9, 21))), DeviceArray(rng.standard_normal((9, 18)))
    results = []
    for has_weight, has_bias in ((True, True), (True, False), (False, True)):
        grad_weight = DeviceArray.nan((18, 21)) if has_weight else None
        grad_bias = DeviceArray.nan((18,)) if has_bias else None
        kernels.linear_grad_weight(grad_output, None, input, grad_weight, grad_bias, STREAM)
        results.append((grad_weight, grad_bias))
    np.testing.assert_array_equal(results[1][0].numpy(), results[0][0].numpy())
    assert_near(results[2][1], grad_output.numpy().sum(0), np.abs(grad_output.numpy()).sum(0), 10)


def test_no_terms_give_the_bias_forward_and_zeros_backward():
    output = DeviceArray.nan((2, 3))
    kernels.linear_forward(
        DeviceArray(np.empty((2, 0))),
        DeviceArray(np.empty((3, 0))),
        DeviceArray([-1, 0, 2]),
        True,
        output,
        STREAM,
    )
    np.testing.assert_array_equal(output.numpy(), [[0, 0, 2]] * 2)
    grad_weight, grad_bias = DeviceArray.nan((3, 4)), DeviceArray.nan((3,))
    nothing = DeviceArray(np.empty((0, 3)))
    kernels.linear_grad_weight(
        nothing, nothing, DeviceArray(np.empty((0, 4))), grad_weight, grad_bias, STREAM
    )
    assert not grad_weight.numpy().any()
    assert not grad_bias.numpy().any()


def test_nothing_is_launched_for_an_empty_result():
    LAUNCHES.clear()
    empty = DeviceArray(np.empty((0, 3)))
    kernels.linear_forward(
        empty, DeviceArray(np.ones((2, 3))), None, False, DeviceArray(np.empty((0, 2))), STREAM
    )
    assert not LAUNCHES


def test_nan_passes_the_relu_and_opens_its_mask():
    output, one = DeviceArray.nan((3, 1)), DeviceArray([[1.0]])
    kernels.linear_forward(DeviceArray([[np.nan], [-1], [2]]), one, None, True, output, STREAM)
    np.testing.assert_array_equal(output.numpy(), [[np.nan], [0], [2]])
    grad_input = DeviceArray.nan((3, 1))
    kernels.linear_grad_input(DeviceArray([[3], [5], [7]]), output, one, grad_input, STREAM)
    np.testing.assert_array_equal(grad_input.numpy(), [[3], [0], [7]])


def test_a_masked_gradient_of_infinity_counts_as_zero():
    output, grad_output = DeviceArray([[0, 1]]), DeviceArray([[np.inf, 2]])
    grad_input, grad_weight, grad_bias = (DeviceArray.nan(shape) for shape in ((1, 1), (2, 1), (2,)))
    kernels.linear_grad_input(grad_output, output, DeviceArray(np.ones((2, 1))), grad_input, STREAM)
    kernels.linear_grad_weight(grad_output, output, DeviceArray([[1.0]]), grad_weight, grad_bias, STREAM)
    np.testing.assert_array_equal(grad_input.numpy(), [[2]])
    np.testing.assert_array_equal(grad_weight.numpy(), [[0], [2]])
    np.testing.assert_array_equal(grad_bias.numpy(), [0, 2])
