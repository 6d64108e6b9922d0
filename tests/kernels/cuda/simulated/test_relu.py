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
def test_nan_passes_and_opens_the_mask(offset):
    input = DeviceArray([np.nan, -1, -np.inf, np.inf, np.nan], offset=offset)
    output, grad_input = DeviceArray.nan((5,), offset=offset), DeviceArray.nan((5,), offset=offset)
    kernels.relu_forward(input, output, STREAM)
    np.testing.assert_array_equal(output.numpy(), [np.nan, 0, 0, np.inf, np.nan])
    kernels.relu_backward(DeviceArray([1, 2, 3, 4, 5], offset=offset), output, grad_input, STREAM)
    np.testing.assert_array_equal(grad_input.numpy(), [1, 0, 0, 4, 5])
