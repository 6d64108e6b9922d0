"""The matrix product: right at every size and at every width of vectors, whoever shares the work."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product as pairs
from pathlib import Path

import numpy as np
import pytest

from fastdl.kernels.cpu.gemm import Left, Right, gemm
from tests.kernels.cpu import widths

# around the edges of every tile: 4, 6 or 14 rows, 2 to 32 columns, and the 32 steps of a shallow product
SIZES = (0, 1, 2, 3, 5, 8, 13, 14, 15, 16, 31, 32, 33, 67, 130)
# beyond the limits of every block: of depth, packed and streamed, of columns, of dot products
LARGE = (
    (20, 1100, 40),
    (50, 1100, 300),
    (27, 90, 530),
    (3, 2500, 6),
    (40, 2500, 9),
    (300, 70, 16),
    (4, 3, 90),
    (270, 530, 1100),
)
FORMS = ((False, False), (False, True), (True, False), (True, True))


def _random(rng, rows, cols, dtype, transposed=False):
    matrix = rng.standard_normal((cols, rows) if transposed else (rows, cols))
    return matrix.astype(dtype)


def _multiply(a, b, forms=(False, False), mask_source=None, bias=None, relu=False, sums=None, num_threads=1):
    """Return what gemm writes to a product that was NaN before."""
    a_is_transposed, b_is_transposed = forms
    rows = a.shape[1] if a_is_transposed else a.shape[0]
    cols = b.shape[0] if b_is_transposed else b.shape[1]
    product = np.full((rows, cols), np.nan, a.dtype)
    mask_source = np.empty((0, 0), a.dtype) if mask_source is None else mask_source
    bias = np.empty(0, a.dtype) if bias is None else bias
    sums = np.empty(0, a.dtype) if sums is None else sums
    left, right = Left(a, a_is_transposed, mask_source), Right(b, b_is_transposed)
    gemm(left, right, bias, relu, product, sums, num_threads)
    return product


def _check(a, b, result, what):
    """Check a product against float64, by what NumPy's own product of this type is off.

    Twice NumPy's greatest error, as the order of a sum is luck; and 4 units in the last place of the greatest
    sum of sizes, as NumPy's error may be 0 where a sum has few terms.
    """
    exact = a.astype(np.longdouble) @ b.astype(np.longdouble)
    if exact.size == 0:
        assert result.shape == exact.shape, what
        return
    largest = (np.abs(a) @ np.abs(b)).max()
    allowed = 2 * np.abs(a @ b - exact).max() + 4 * np.finfo(a.dtype).eps * largest
    assert np.abs(result - exact).max() <= allowed, what


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("forms", FORMS)
def test_product_is_right_at_every_size(forms, dtype, seed):
    rng = np.random.default_rng(seed)
    sizes = [(n, k, m) for n, k in pairs(SIZES, SIZES) for m in rng.choice(SIZES, 3)]
    for n, k, m in [*sizes, *LARGE]:
        a, b = _random(rng, n, k, dtype, forms[0]), _random(rng, k, m, dtype, forms[1])
        result = _multiply(a, b, forms)
        _check(a.T if forms[0] else a, b.T if forms[1] else b, result, (n, k, m))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("forms", FORMS)
def test_mask_bias_relu_and_sums_are_part_of_the_product(forms, dtype, seed):
    rng = np.random.default_rng(seed)
    for n, k, m in [*((*rng.choice(SIZES[1:], 2), m) for m in SIZES[1:]), *LARGE]:
        a, b = _random(rng, n, k, dtype, forms[0]), _random(rng, k, m, dtype, forms[1])
        mask_source = _random(rng, *a.shape, dtype)
        mask_source.flat[:: max(1, mask_source.size // 5)] = np.nan
        mask_source.flat[1 :: max(1, mask_source.size // 3)] = 0
        bias = rng.standard_normal(m).astype(dtype)
        sums = np.full(a.shape[1], np.nan, dtype)
        result = _multiply(a, b, forms, mask_source, bias, True, sums)
        masked = np.where(mask_source <= 0, dtype(0), a)
        left = np.concatenate([masked.T if forms[0] else masked, np.ones((n, 1), dtype)], axis=1)
        right = np.concatenate([b.T if forms[1] else b, bias[None]])
        # ReLU changes no two numbers by more than they differ, so the bound on the product is one on this
        exact = left.astype(np.longdouble) @ right.astype(np.longdouble)
        allowed = 4 * np.finfo(dtype).eps * (np.abs(left) @ np.abs(right)).max()
        allowed += 2 * np.abs(left @ right - exact).max()
        assert np.abs(result - np.maximum(exact, 0)).max() <= allowed, (n, k, m)
        _check(np.ones((1, len(masked)), dtype), masked, sums[None], (n, k, m))


@pytest.mark.parametrize("forms", FORMS)
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 5, 2), (10, 784, 10), (33, 40, 67), (60, 1100, 50)])
def test_zero_times_infinity_is_nan_and_relu_keeps_it(forms, size, seed):
    rng = np.random.default_rng(seed)
    n, k, m = size
    a, b = _random(rng, n, k, np.float32), _random(rng, k, m, np.float32)
    a[rng.random(a.shape) < 0.3] = 0
    a[rng.integers(n), rng.integers(k)] = np.nan
    b[rng.integers(k), rng.integers(m)] = np.inf
    b[rng.integers(k), rng.integers(m)] = -np.inf
    with np.errstate(invalid="ignore"):
        expected = a.astype(np.float64) @ b.astype(np.float64)
    stored_a, stored_b = a.T.copy() if forms[0] else a, b.T.copy() if forms[1] else b
    np.testing.assert_allclose(_multiply(stored_a, stored_b, forms), expected, rtol=1e-3, atol=1e-3)
    expected[expected <= 0] = 0
    np.testing.assert_allclose(
        _multiply(stored_a, stored_b, forms, relu=True), expected, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("forms", FORMS)
def test_nothing_is_read_or_written_outside_the_arrays(forms):
    # the neighbours in memory are NaN: read, they would show in the product; written, they would be gone
    for n, k, m in ((1, 1, 1), (13, 15, 31), (15, 33, 17), (30, 40, 33), (5, 700, 3)):
        memory = np.full(150_000, np.nan, np.float32)
        shapes = [(k, n) if forms[0] else (n, k), (m, k) if forms[1] else (k, m), (n, m)]
        views = [
            memory[at : at + rows * cols].reshape(rows, cols)
            for at, (rows, cols) in zip((1_003, 50_007, 90_001), shapes, strict=True)
        ]
        a, b, product = views
        a[:], b[:] = 1, 1
        none = np.empty(0, np.float32)
        left = Left(a, forms[0], np.empty((0, 0), np.float32))
        gemm(left, Right(b, forms[1]), none, False, product, none, 1)
        assert (product == k).all()
        assert np.isnan(memory).sum() == memory.size - a.size - b.size - product.size


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [(256, 300, 128), (4096, 16, 16), (600, 784, 10), (3, 900, 300)])
@pytest.mark.parametrize("forms", FORMS)
def test_number_of_threads_changes_no_bit(forms, size, dtype, seed):
    rng = np.random.default_rng(seed)
    n, k, m = size
    a, b = _random(rng, n, k, dtype, forms[0]), _random(rng, k, m, dtype, forms[1])
    mask_source = _random(rng, *a.shape, dtype)
    outcomes = []
    for num_threads in (1, 2, 3):
        sums = np.full(a.shape[1], np.nan, dtype)
        outcomes.append((_multiply(a, b, forms, num_threads=num_threads), sums))
        outcomes.append((_multiply(a, b, forms, mask_source, sums=sums, num_threads=num_threads), sums))
    for alone, shared in ((0, 2), (0, 4), (1, 3), (1, 5)):
        for one, other in zip(outcomes[alone], outcomes[shared], strict=True):
            np.testing.assert_array_equal(one, other)


def _python(*arguments, **variables):
    """Run another Python with these arguments and environment variables."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | variables,
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )


def run_with(width):
    return widths.run(width, __file__, "mask_bias or zero_times")


@pytest.mark.ahead(run_with, "width")
@pytest.mark.parametrize("width", widths.OTHERS)
def test_other_widths_of_vectors_pass_these_tests(width, ahead):
    run = ahead(run_with, width).result()
    assert run.returncode == 0, run.stdout + run.stderr


def test_unknown_width_of_vectors_is_named():
    run = _python("-c", "import fastdl.kernels.cpu.intrinsics", FASTDL_VECTOR_BITS="64")
    assert "FASTDL_VECTOR_BITS is '64'; it must be one of 512, 256 and 128." in run.stderr


_PROGRAM = """
import numpy as np
from numba.core import event
from fastdl.kernels.cpu.linear import linear_forward
compiled = []
class Listener(event.Listener):
    def on_start(self, e): compiled.append(e.data["dispatcher"].py_func.__name__)
    def on_end(self, e): pass
one = np.ones((40, 40), np.float32)
output = np.empty_like(one)
with event.install_listener("numba:compile", Listener()):
    addresses = one.ctypes.data, one.ctypes.data, one.ctypes.data, output.ctypes.data
    linear_forward(addresses, (40, 40, 40), False, 1, one[0, :0])
print(*compiled, output.min(), output.max())
"""


@pytest.mark.slow
def test_a_new_process_links_what_an_old_one_compiled_and_compiles_what_is_missing(tmp_path):
    first, second = (_python("-c", _PROGRAM, FASTDL_CACHE_DIR=str(tmp_path)) for _ in range(2))
    assert {"linear_forward", "gemm", "_multiply_packed"} <= set(first.stdout.split()), first.stderr
    assert second.stdout.split() == ["41.0", "41.0"], second.stderr
    for path in tmp_path.glob("*/cpu.gemm._pack_b.linked-*"):
        path.unlink()
    third = _python("-c", _PROGRAM, FASTDL_CACHE_DIR=str(tmp_path))
    compiled, result = set(third.stdout.split()[:-2]), third.stdout.split()[-2:]
    assert "_pack_b" in compiled, third.stderr
    assert not {"gemm", "_multiply_packed", "linear_forward"} & compiled
    assert result == ["41.0", "41.0"]
