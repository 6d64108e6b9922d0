"""The tiles over panels against float64, with NaN where nothing may be read or left."""

from __future__ import annotations

import numpy as np
import pytest

from fastdl.kernels.cpu.intrinsics import TILE, Matrix
from fastdl.kernels.cpu.panels import (
    LONG_ROWS,
    ROW_COUNTS,
    WORD,
    dot_panels,
    mask_of_nonzero,
    multiply_nonzero,
    multiply_panels,
    multiply_row,
    outer_product,
    panel_of,
    transpose_square,
)
from fastdl.kernels.jit import jit

each_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def close(result, expected, dtype):
    """Compare, allowing for the roundings of sums of some hundred terms of size 1."""
    np.testing.assert_allclose(result, expected, rtol=0, atol=2000 * np.finfo(dtype).eps)


@jit
def _multiply(output, a, a_run, down, b, depth, rows, vectors, accumulate):
    size = depth, rows, vectors
    multiply_panels((output, 0), Matrix(a, 0, a_run), down, (b, 0), size, accumulate)


@each_dtype
@pytest.mark.parametrize("rows", ROW_COUNTS)
@pytest.mark.parametrize("vectors", range(1, TILE.vectors + 1))
@pytest.mark.parametrize("accumulate", [False, True])
def test_tiles_along_rows_and_down_columns(dtype, rows, vectors, accumulate, seed):
    rng = np.random.default_rng(seed)
    panel = panel_of(np.empty(0, dtype))
    used = vectors * panel // TILE.vectors
    for depth in (0, 1, 3, panel, 2 * panel + 5):
        num_panels = depth // panel + 1
        along = rng.standard_normal((num_panels, rows, panel)).astype(dtype)
        down = rng.standard_normal((max(depth, 1), panel)).astype(dtype)
        b = rng.standard_normal((max(depth, 1), panel)).astype(dtype)
        start = (
            rng.standard_normal((rows, panel)).astype(dtype) if accumulate else np.zeros((rows, panel), dtype)
        )
        for is_down, a in ((False, along), (True, down)):
            if is_down and rows > panel:
                continue
            output = start.copy() if accumulate else np.full((rows, panel), np.nan, dtype)
            left = a[:depth, :rows].T if is_down else np.concatenate(list(a), axis=1)[:, :depth]
            _multiply(
                output.reshape(-1),
                a.reshape(-1),
                rows * panel,
                is_down,
                b.reshape(-1),
                depth,
                rows,
                vectors,
                accumulate,
            )
            expected = start.astype(float) + left.astype(float) @ b[:depth].astype(float)
            close(output[:, :used], expected[:, :used], dtype)
            if not accumulate:
                assert np.isnan(output[:, used:]).all()


@jit
def _multiply_row(output, output_panel, a, a_run, b, b_panel, depth, vectors, accumulate):
    output, a, b = Matrix(output, 0, output_panel), Matrix(a, 0, a_run), Matrix(b, 0, b_panel)
    multiply_row(output, a, b, (depth, vectors), accumulate)


@each_dtype
@pytest.mark.parametrize("vectors", LONG_ROWS)
@pytest.mark.parametrize("accumulate", [False, True])
def test_a_long_row_has_the_bits_of_tiles_of_one_row(dtype, vectors, accumulate, seed):
    rng = np.random.default_rng(seed)
    panel = panel_of(np.empty(0, dtype))
    num_panels = vectors // TILE.vectors
    for depth in (0, 1, 3, panel, 2 * panel + 5):
        a = rng.standard_normal((depth // panel + 1, 3, panel)).astype(dtype)
        b = rng.standard_normal((num_panels, depth + 1, panel)).astype(dtype)
        # a row of three is written, and one row of b lies behind those that are read
        b[:, depth:] = np.nan
        output = np.full((num_panels, 3, panel), np.nan, dtype)
        if accumulate:
            output[:, 0] = rng.standard_normal((num_panels, panel))
        expected = output.copy()
        for p in range(num_panels):
            _multiply(
                expected[p].reshape(-1), a.reshape(-1), 3 * panel, False, b[p].reshape(-1), depth, 1,
                TILE.vectors, accumulate,
            )  # fmt: skip
        _multiply_row(
            output.reshape(-1), 3 * panel, a.reshape(-1), 3 * panel, b.reshape(-1), (depth + 1) * panel,
            depth, vectors, accumulate,
        )  # fmt: skip
        np.testing.assert_array_equal(output, expected)
        assert np.isfinite(output[:, 0]).all()


@jit
def _outer(output, a, b, rows):
    outer_product((output, 0), (a, 0), (b, 0), rows)


@each_dtype
def test_an_outer_product_has_a_row_for_each_factor(dtype, seed):
    rng = np.random.default_rng(seed)
    panel = panel_of(np.empty(0, dtype))
    a, b = rng.standard_normal(panel).astype(dtype), rng.standard_normal(panel).astype(dtype)
    for rows in (0, 1, panel - 1, panel):
        output = np.full((panel, panel), np.nan, dtype)
        _outer(output.reshape(-1), a, b, rows)
        np.testing.assert_array_equal(output[:rows], a[:rows, None] * b)
        assert np.isnan(output[rows:]).all()


@jit
def _multiply_nonzero(output, output_panel, values, masks, rows, b, b_panel, vectors):
    size = rows, vectors
    output, b = Matrix(output, 0, output_panel), Matrix(b, 0, b_panel)
    multiply_nonzero(output, (values, 0), (masks, 0), b, size)


@jit
def _masks(values, masks, count):
    for row in range(masks.size):
        masks[row] = mask_of_nonzero(values, row * WORD, count)


@each_dtype
@pytest.mark.parametrize("vectors", LONG_ROWS)
@pytest.mark.parametrize("integers", [False, True])
def test_only_what_is_not_zero_is_multiplied(dtype, vectors, integers, seed):
    rng = np.random.default_rng(seed)
    panel = panel_of(np.empty(0, dtype))
    rows, num_panels = 5, vectors // TILE.vectors
    values = rng.integers(0, 256, (rows, WORD)) if integers else rng.standard_normal((rows, WORD))
    values = (values * (rng.random((rows, WORD)) < 0.5)).astype(np.uint8 if integers else dtype)
    values[1] = 0
    values[:, 7] = 0
    masks = np.empty(rows, np.int64)
    _masks(values.reshape(-1), masks, WORD)
    b = rng.standard_normal((num_panels, WORD, panel)).astype(dtype)
    expected = np.einsum("nk,pkm->pnm", values.astype(float), b.astype(float))
    # a row that isn't wanted must not be read
    b[:, 7] = np.nan
    output = np.ones((num_panels, rows, panel), dtype)
    _multiply_nonzero(
        output.reshape(-1),
        rows * panel,
        values.reshape(-1),
        masks,
        rows,
        b.reshape(-1),
        WORD * panel,
        vectors,
    )
    # sums of 64 terms of size up to 255
    np.testing.assert_allclose(output, expected + 1, rtol=0, atol=2e4 * np.finfo(dtype).eps * 8)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_masks_say_what_is_not_zero(dtype, seed):
    rng = np.random.default_rng(seed)
    values = (rng.integers(1, 100, WORD) * (rng.random(WORD) < 0.5)).astype(dtype)
    if dtype != np.uint8:
        values[3], values[4] = np.nan, -0.0
    for count in (1, 5, WORD):
        masks = np.empty(1, np.int64)
        _masks(values, masks, count)
        bits = [bool(int(masks[0]) >> i & 1) for i in range(WORD)]
        assert bits == [bool(values[i] != 0) and i < count for i in range(WORD)]


@jit
def _dots(output, a, a_panel, b, b_panel, panels, rows, cols):
    dot_panels((output, 0), Matrix(a, 0, a_panel), Matrix(b, 0, b_panel), (panels, rows, cols))


@each_dtype
@pytest.mark.parametrize("rows", sorted({1, TILE.dot_rows}))
@pytest.mark.parametrize("cols", range(1, TILE.dot_cols + 1))
def test_dots_run_along_panels(dtype, rows, cols, seed):
    rng = np.random.default_rng(seed)
    panel = panel_of(np.empty(0, dtype))
    for panels in (0, 1, 7):
        a = rng.standard_normal((max(panels, 1), rows, panel)).astype(dtype)
        b = rng.standard_normal((max(panels, 1), cols, panel)).astype(dtype)
        output = np.full((rows, panel), np.nan, dtype)
        _dots(
            output.reshape(-1), a.reshape(-1), rows * panel, b.reshape(-1), cols * panel, panels, rows, cols
        )
        expected = np.einsum("pnk,pmk->nm", a[:panels].astype(float), b[:panels].astype(float))
        close(output[:, :cols], expected, dtype)
        assert np.isnan(output[:, cols:]).all()


@jit
def _transpose(source, target, stride, target_stride):
    transpose_square(Matrix(source, 0, stride), Matrix(target, 0, target_stride))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_squares_are_transposed(dtype, seed):
    side = 16 if dtype == np.uint8 else panel_of(np.empty(0, dtype)) // TILE.vectors
    source = np.random.default_rng(seed).integers(0, 256, (side, 40)).astype(dtype)
    target = np.zeros((side, side), dtype)
    _transpose(source.reshape(-1), target.reshape(-1), 40, side)
    assert np.array_equal(target, source[:, :side].T)
