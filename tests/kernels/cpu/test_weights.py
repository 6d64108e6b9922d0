"""Weights in torch's layout and in panels."""

from __future__ import annotations

import numpy as np
import pytest

from fastdl.kernels.cpu.panels import panel_of
from fastdl.kernels.cpu.weights import copy_weight


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("width", "depth"), [(1, 1), (10, 33), (16, 16), (45, 203), (64, 784)])
@pytest.mark.parametrize("is_skinny", [False, True])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_threads_lay_a_weight_out_in_panels_and_back(dtype, width, depth, is_skinny, num_threads, seed):
    matrix = np.random.default_rng(seed).standard_normal((width, depth)).astype(dtype)
    panel = panel_of(np.empty(0, dtype))
    # panels over the columns, or over the rows, and 7 numbers before them that stay
    columns = matrix if is_skinny else matrix.T
    num_panels = -(-columns.shape[1] // panel)
    padded = np.zeros((columns.shape[0], num_panels * panel), dtype)
    padded[:, : columns.shape[1]] = columns
    expected = padded.reshape(-1, num_panels, panel).swapaxes(0, 1).reshape(-1)
    state = np.zeros(7 + expected.size, dtype)
    for thread in range(num_threads):
        copy_weight(matrix, state, 7, is_skinny, True, thread, num_threads)
    np.testing.assert_array_equal(state, np.concatenate([np.zeros(7, dtype), expected]))
    back = np.full_like(matrix, np.nan)
    for thread in range(num_threads):
        copy_weight(back, state, 7, is_skinny, False, thread, num_threads)
    np.testing.assert_array_equal(back, matrix)
