"""The vector exponential: at most 2 units in the last place off, and right at the ends of its range."""

from __future__ import annotations

import numpy as np
import pytest

from fastdl.kernels.cpu.exp import exp, exp_float32
from fastdl.kernels.jit import jit


@jit
def _exp_float32(values, results):
    for i in range(values.size):
        results[i] = exp_float32(values[i])


@jit
def _exp(values, results):
    for i in range(values.size):
        results[i] = exp(values[i])


def _units_off(values, results):
    with np.errstate(over="ignore"):
        exact = np.exp(values.astype(np.float64))
        rounded = exact.astype(np.float32)
    finite = np.isfinite(rounded)
    assert np.array_equal(np.isinf(results), np.isinf(rounded))
    assert not np.isnan(results).any()
    return np.abs(results[finite] - exact[finite]) / np.spacing(rounded[finite]).astype(np.float64)


def test_every_size_of_float32_is_at_most_2_units_off():
    # every 997th pattern of bits
    values = np.arange(0, 2**32, 997, dtype=np.uint64).astype(np.uint32).view(np.float32)
    values = values[~np.isnan(values)]
    results = np.full_like(values, np.nan)
    _exp_float32(values, results)
    assert _units_off(values, results).max() <= 2


def test_the_range_of_softmax_and_the_ends_are_at_most_2_units_off(seed):
    rng = np.random.default_rng(seed)
    ends = [np.linspace(a, b, 100_001) for a, b in ((-104, -87), (88, 89), (-1e-6, 1e-6))]
    values = np.concatenate([rng.uniform(-110, 90, 1_000_000), *ends]).astype(np.float32)
    results = np.full_like(values, np.nan)
    _exp_float32(values, results)
    assert _units_off(values, results).max() <= 2


@pytest.mark.parametrize(
    ("value", "result"),
    [(0, 1), (np.inf, np.inf), (-np.inf, 0), (1e30, np.inf), (-1e30, 0), (np.nan, np.nan)],
)
def test_special_values(value, result):
    results = np.full(1, 7, np.float32)
    _exp_float32(np.full(1, value, np.float32), results)
    np.testing.assert_array_equal(results, np.float32(result))


def test_float64_keeps_its_own_accuracy(seed):
    values = np.random.default_rng(seed).uniform(-700, 700, 1000)
    results = np.empty_like(values)
    _exp(values, results)
    np.testing.assert_allclose(results, np.exp(values), rtol=1e-15)
