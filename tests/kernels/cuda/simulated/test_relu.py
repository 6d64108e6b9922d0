"""ReLU in the simulator."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.cuda.simulated.simulator import STREAM, DeviceArray, kernels


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("size", [0, 1, 3, 4, 1025])
def test_values_pass_where_they_are_positive(seed, size, dtype):
    rng = np.random.default_rng(seed)
    input = DeviceArray(rng.standard_normal(size), dtype)
    output, grad_input = DeviceArray.nan((size,), dtype), DeviceArray.nan((size,), dtype)
    grad_output = DeviceArray(rng.standard_normal(size), dtype)
    kernels.relu_forward(input, output, STREAM)
    kernels.relu_backward(grad_output, output, grad_input, STREAM)
    np.testing.assert_array_equal(output.numpy(), np.maximum(input.numpy(), 0))
    np.testing.assert_array_equal(grad_input.numpy(), np.where(input.numpy() > 0, grad_output.numpy(), 0))


@pytest.mark.parametrize("offset", [0, 4])
def test_nan_passes_and_so_does_its_gradient(offset):
    input = DeviceArray([np.nan, -1, -np.inf, np.inf, np.nan], offset=offset)
    output, grad_input = DeviceArray.nan((5,), offset=offset), DeviceArray.nan((5,), offset=offset)
    kernels.relu_forward(input, output, STREAM)
    np.testing.assert_array_equal(output.numpy(), [np.nan, 0, 0, np.inf, np.nan])
    kernels.relu_backward(DeviceArray([1, 2, 3, 4, 5], offset=offset), output, grad_input, STREAM)
    np.testing.assert_array_equal(grad_input.numpy(), [1, 0, 0, 4, 5])


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("size", [1, 4, 5])
def test_minus_zero_becomes_zero_as_torchs_maximum_with_zero_on_a_gpu_gives_it(size, dtype):
    input, output = DeviceArray(np.full(size, -0.0), dtype), DeviceArray.nan((size,), dtype)
    kernels.relu_forward(input, output, STREAM)
    assert not output.numpy().any()
    assert not np.signbit(output.numpy()).any()
    grad_input = DeviceArray.nan((size,), dtype)
    kernels.relu_backward(DeviceArray(np.ones(size), dtype), input, grad_input, STREAM)
    assert not grad_input.numpy().any()
