"""The linear layer's three products, on arrays, against NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest

from fastdl.kernels.cpu import linear

SIZES = (0, 1, 2, 3, 13, 14, 15, 31, 32, 33, 67, 130)


def _addresses(*arrays):
    """Return where arrays begin; 0 for an empty one, which stands for one left out."""
    return tuple(array.ctypes.data if array.size else 0 for array in arrays)


def linear_forward(input, weight, bias, relu, output, num_threads):
    sizes = *input.shape, len(weight)
    addresses = _addresses(input, weight, bias, output)
    linear.linear_forward(addresses, sizes, relu, num_threads, input.reshape(-1)[:0])


def linear_grad_input(grad_output, output, weight, grad_input, num_threads):
    sizes = *grad_input.shape, len(weight)
    addresses = _addresses(grad_output, output, weight, grad_input)
    linear.linear_grad_input(addresses, sizes, num_threads, weight.reshape(-1)[:0])


def linear_grad_weight(grad_output, output, input, grad_weight, grad_bias, num_threads):
    sizes = *input.shape, grad_output.shape[1]
    addresses = _addresses(grad_output, output, input, grad_weight, grad_bias)
    linear.linear_grad_weight(addresses, sizes, num_threads, input.reshape(-1)[:0])


def _assert_near(result, a, b, bias=0.0, relu=False):
    """Check a result against ``a @ b + bias`` in float64.

    Whatever the order of a sum of K products and a bias, rounding puts it off by at most (K + 1) eps / 2
    times the sum of the terms' sizes, to first order. Twice that is allowed: float64 is checked by itself.
    """
    exact = a.astype(np.float64) @ b.astype(np.float64) + np.asarray(bias, np.float64)
    sizes = np.abs(a).astype(np.float64) @ np.abs(b) + np.abs(bias)
    if relu:
        exact = np.maximum(exact, 0)
    assert result.shape == exact.shape
    assert (np.abs(result - exact) <= (a.shape[1] + 1) * np.finfo(result.dtype).eps * sizes).all()


def _nan(*shape, dtype):
    return np.full(shape, np.nan, dtype)


@pytest.fixture(params=[np.float32, np.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


@pytest.fixture
def cases(seed, dtype):
    """Return input, weight, bias and grad_output for sizes around the edges of every tile."""
    rng = np.random.default_rng(seed)
    sizes = [(n, k, m) for n in SIZES for k in SIZES for m in rng.choice(SIZES, 2)]
    sizes += [(10, 2, 1), (256, 784, 10), (1, 300, 300), (64, 1100, 40)]
    return [
        tuple(rng.standard_normal(shape).astype(dtype) for shape in ((n, k), (m, k), (m,), (n, m)))
        for n, k, m in sizes
    ]


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_forward_is_right_at_every_size(cases, dtype, has_bias, relu):
    for input, weight, bias, grad_output in cases:
        output = _nan(*grad_output.shape, dtype=dtype)
        if not has_bias:
            bias = bias[:0]
        linear_forward(input, weight, bias, relu, output, 1)
        _assert_near(output, input, weight.T, bias if has_bias else 0.0, relu)


@pytest.mark.parametrize("has_relu", [False, True])
def test_gradients_are_right_at_every_size(cases, dtype, has_relu):
    for input, weight, bias, grad_output in cases:
        output = np.empty((0, 0), dtype)
        masked = grad_output
        if has_relu:
            output = _nan(*grad_output.shape, dtype=dtype)
            linear_forward(input, weight, bias, True, output, 1)
            masked = np.where(output <= 0, dtype(0), grad_output)
        grad_input = _nan(*input.shape, dtype=dtype)
        linear_grad_input(grad_output, output, weight, grad_input, 1)
        _assert_near(grad_input, masked, weight)
        grad_weight, grad_bias = _nan(*weight.shape, dtype=dtype), _nan(*bias.shape, dtype=dtype)
        linear_grad_weight(grad_output, output, input, grad_weight, grad_bias, 1)
        _assert_near(grad_weight, masked.T, input)
        _assert_near(grad_bias[None], np.ones((1, len(masked)), dtype), masked)


def test_either_gradient_can_be_had_without_the_other(cases, dtype):
    for input, weight, bias, grad_output in cases:
        no_output, no_bias = np.empty((0, 0), dtype), np.empty(0, dtype)
        grad_weight, grad_bias = _nan(*weight.shape, dtype=dtype), _nan(*bias.shape, dtype=dtype)
        linear_grad_weight(grad_output, no_output, input, grad_weight, grad_bias, 1)
        bias_alone, weight_alone = _nan(*bias.shape, dtype=dtype), _nan(*weight.shape, dtype=dtype)
        linear_grad_weight(grad_output, no_output, input, np.empty((0, 0), dtype), bias_alone, 1)
        linear_grad_weight(grad_output, no_output, input, weight_alone, no_bias, 1)
        np.testing.assert_array_equal(bias_alone, grad_bias)
        np.testing.assert_array_equal(weight_alone, grad_weight)


def test_no_terms_give_the_bias_forward_and_zeros_backward(dtype):
    bias = np.array([-1, 0, 2], dtype)
    output = _nan(2, 3, dtype=dtype)
    linear_forward(np.empty((2, 0), dtype), np.empty((3, 0), dtype), bias, True, output, 1)
    np.testing.assert_array_equal(output, [[0, 0, 2]] * 2)
    grad_weight, grad_bias = _nan(3, 4, dtype=dtype), _nan(3, dtype=dtype)
    nothing = np.empty((0, 3), dtype)
    linear_grad_weight(nothing, nothing, np.empty((0, 4), dtype), grad_weight, grad_bias, 1)
    assert not grad_weight.any()
    assert not grad_bias.any()


def test_nan_passes_the_relu_forward_and_backward(dtype):
    input = np.array([[np.nan], [-1], [2]], dtype)
    output = _nan(3, 1, dtype=dtype)
    linear_forward(input, np.ones((1, 1), dtype), np.empty(0, dtype), True, output, 1)
    np.testing.assert_array_equal(output, [[np.nan], [0], [2]])
    grad_output = np.array([[3], [5], [7]], dtype)
    grad_input = _nan(3, 1, dtype=dtype)
    linear_grad_input(grad_output, output, np.ones((1, 1), dtype), grad_input, 1)
    np.testing.assert_array_equal(grad_input, [[3], [0], [7]])


def test_a_masked_gradient_of_infinity_counts_as_zero(dtype):
    output = np.array([[0, 1]], dtype)
    grad_output = np.array([[np.inf, 2]], dtype)
    grad_input, grad_weight, grad_bias = (_nan(*shape, dtype=dtype) for shape in ((1, 1), (2, 1), (2,)))
    linear_grad_input(grad_output, output, np.ones((2, 1), dtype), grad_input, 1)
    linear_grad_weight(grad_output, output, np.ones((1, 1), dtype), grad_weight, grad_bias, 1)
    np.testing.assert_array_equal(grad_input, [[2]])
    np.testing.assert_array_equal(grad_weight, [[0], [2]])
    np.testing.assert_array_equal(grad_bias, [0, 2])


def test_number_of_threads_changes_no_bit(seed, dtype):
    rng = np.random.default_rng(seed)
    for n, k, m in ((256, 784, 128), (1000, 784, 10), (5000, 30, 20)):
        shapes = ((n, k), (m, k), (m,), (n, m))
        input, weight, bias, grad_output = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
        outcomes = []
        for num_threads in (1, 2):
            results = [_nan(*shape, dtype=dtype) for shape in ((n, m), (n, k), (m, k), (m,))]
            linear_forward(input, weight, bias, True, results[0], num_threads)
            linear_grad_input(grad_output, results[0], weight, results[1], num_threads)
            linear_grad_weight(grad_output, results[0], input, *results[2:], num_threads)
            outcomes.append(results)
        for one, two in zip(*outcomes, strict=True):
            np.testing.assert_array_equal(one, two)
