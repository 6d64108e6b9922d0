"""Products of bytes in fixed point against exact integers, against float64, and against torch's float32."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdl.kernels.cpu.integer import (
    DEPTH,
    MAX_BLOCKS,
    NUM_DIGITS,
    PANEL,
    SIDE,
    Bytes,
    Epilogue,
    Tiles,
    blocks_of,
    digits_memory,
    digits_of,
    find_scales,
    multiply_bytes,
    note_largest,
    tiles_memory,
    transpose_bytes,
    write_columns,
)
from fastdl.kernels.cpu.intrinsics import FROM_BIAS, FROM_OUTPUT, FROM_ZERO, Matrix
from fastdl.kernels.cpu.memory import aligned
from fastdl.kernels.cpu.tiles import IS_EMULATED, has_amx, tile_begin, tile_end
from fastdl.kernels.jit import jit

pytestmark = pytest.mark.skipif(not (IS_EMULATED or has_amx()), reason="the process may not use AMX")


@jit
def _product(tiles, a, rows, digits, columns, blocks, output, epilogue):
    tile_begin(tiles.registers)
    multiply_bytes(tiles, a, rows, digits_of(digits, 0), columns, blocks, output, epilogue)
    tile_end()


@jit
def _write(digits, matrix, size, scale):
    """Write a matrix's digits, and return whether each of its columns has a scale."""
    own = digits_of(digits, 0)
    num_tiles = own.inverses.size // SIDE
    note_largest(matrix, (0, size[0]), (0, num_tiles), digits.largest[0])
    have_scales = True
    for tile in range(num_tiles):
        has_scale, _ = find_scales(own, tile, size[1], scale)
        have_scales &= has_scale
    write_columns(own, matrix, (0, size[0]), size, (0, num_tiles))
    return have_scales


def tile_columns(columns):
    return -(-columns // SIDE)


def in_panels(matrix):
    """Return a matrix in panels, with NaN behind its last column."""
    rows, columns = matrix.shape
    panels = aligned(max(1, -(-columns // PANEL)) * rows * PANEL, np.float32)
    panels[:] = np.nan
    view = panels.reshape(-1, rows, PANEL)
    for c in range(columns):
        view[c // PANEL, :, c % PANEL] = matrix[:, c]
    # a tile's columns may be in a panel that the matrix doesn't have
    return np.concatenate([panels, np.full(rows * PANEL, np.nan, np.float32)]), rows * PANEL


def fixed_point(matrix, scale=1.0):
    """Return a matrix's digits, and whether each column has a scale."""
    digits = digits_memory(*matrix.shape, 1)
    digits.storage[:] = 77
    panels, stride = in_panels(matrix)
    return digits, _write(digits, Matrix(panels, 0, stride), matrix.shape, np.float32(scale))


def integers_of(digits):
    """Return the integers that digits stand for, with the rows and columns behind those of the matrix."""
    tiles = digits.largest.size // SIDE
    parts = digits.storage[0].view(np.int8).astype(np.int64)
    parts = parts.reshape(tiles, digits.blocks, NUM_DIGITS, SIDE, SIDE, 4)
    # digit, depth, column
    return parts.transpose(2, 1, 3, 5, 0, 4).reshape(NUM_DIGITS, digits.blocks * DEPTH, tiles * SIDE)


def in_words(rows):
    """Return bytes as the tiles read them, with 255 wherever nothing may count."""
    count, depth = rows.shape
    stride, blocks = -(-count // SIDE) * SIDE + 5, blocks_of(depth)
    words = aligned((blocks * stride + DEPTH) * DEPTH, np.uint8)
    words[:] = 255
    view = words[: blocks * stride * DEPTH].reshape(blocks, stride, DEPTH)
    for block in range(blocks):
        part = rows[:, block * DEPTH : (block + 1) * DEPTH]
        view[block, :count, : part.shape[1]] = part
    return Bytes(words, stride)


def tiles():
    registers, sums = tiles_memory(1)
    return Tiles(registers[0], sums[0])


def product(rows, matrix, scale=1.0, bias=None, relu=False, split=None):
    """Return rows of bytes times a matrix, computed part by part where split says where."""
    count = len(rows)
    columns = matrix.shape[1]
    digits, can_hold = fixed_point(matrix, scale)
    assert can_hold
    stride = (count + 1) * PANEL
    panels = -(-tile_columns(columns) * SIDE // PANEL)
    output = aligned(panels * stride, np.float32)
    output[:] = np.nan
    padded = aligned(tile_columns(columns) * SIDE, np.float32)
    if bias is not None:
        padded[:columns] = bias
    epilogue = Epilogue(padded, 0, FROM_ZERO if bias is None else FROM_BIAS, relu)
    row_cuts, column_cuts = split or ([0, count], [0, tile_columns(columns)])
    for row in itertools.pairwise(row_cuts):
        for column in itertools.pairwise(column_cuts):
            _product(
                tiles(),
                in_words(rows),
                row,
                digits,
                column,
                digits.blocks,
                Matrix(output, 0, stride),
                epilogue,
            )
    view = output.reshape(panels, count + 1, PANEL)
    assert np.isnan(view[:, count]).all()
    return np.concatenate(list(view[:, :count]), axis=1)[:, :columns]


def exact(rows, matrix, scale=1.0):
    """Return the product as its definition says, from sums in int64."""
    digits, _ = fixed_point(matrix, scale)
    parts = integers_of(digits)[:, : matrix.shape[0], : matrix.shape[1]]
    sums = (rows.astype(np.int64) @ parts).astype(np.float32)
    total = np.float32(65536) * sums[0] + (np.float32(256) * sums[1] + sums[2])
    return total * digits.factors[0, : matrix.shape[1]]


def images(rng, count, depth):
    return (rng.integers(0, 256, (count, depth)) * (rng.random((count, depth)) < 0.5)).astype(np.uint8)


def weights(rng, depth, columns):
    return (rng.standard_normal((depth, columns)) * 0.05).astype(np.float32)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 63, 64, 65, 130])
@pytest.mark.parametrize("columns", [1, 10, 16, 17, 33])
def test_digits_are_numbers_rounded_to_nearest_even(depth, columns, seed):
    matrix = weights(np.random.default_rng(seed), depth, columns)
    digits, can_hold = fixed_point(matrix)
    assert can_hold
    parts = integers_of(digits)
    integers = parts[0] * 65536 + parts[1] * 256 + parts[2]
    scaled = matrix.astype(np.float64) * digits.inverses[0, :columns].astype(np.float64)
    np.testing.assert_array_equal(integers[:depth, :columns], np.rint(scaled))
    assert (np.abs(integers[:depth, :columns]).max(axis=0) >= 2**21).all()
    assert not parts[:, depth:].any()
    assert not parts[:, :, columns:].any()
    np.testing.assert_array_equal(digits.inverses * digits.factors, 1)


@pytest.mark.parametrize("exponent", [-100, -1, 0, 1, 100])
def test_the_greatest_numbers_of_an_exponent(exponent):
    # mantissas about the greatest integer that three digits hold, and both ends
    mantissas = np.array([0x800000, 0xFEFEFD, 0xFEFEFE, 0xFEFEFF, 0xFEFF00, 0xFF0000, 0xFFFFFF])
    values = np.ldexp(mantissas, exponent - 24).astype(np.float32)
    for sign in (-1, 1):
        matrix = sign * values[None]
        digits, can_hold = fixed_point(matrix)
        assert can_hold
        parts = integers_of(digits)[:, 0, : values.size]
        integers = parts[0] * 65536 + parts[1] * 256 + parts[2]
        scaled = matrix[0].astype(np.float64) * digits.inverses[0, : values.size]
        np.testing.assert_array_equal(integers, np.rint(scaled))


def test_halves_are_rounded_to_even():
    largest = 2.0**22
    matrix = np.array([[largest, largest], [0.5, 1.5], [2.5, -0.5], [-1.5, -2.5]], np.float32) * 2
    digits, _ = fixed_point(matrix)
    parts = integers_of(digits)[:, :4, :2]
    integers = parts[0] * 65536 + parts[1] * 256 + parts[2]
    step = 1 / float(digits.inverses[0, 0])
    np.testing.assert_array_equal(integers, np.rint(matrix / step))
    assert step == 2


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 1e-40, 2.0**-149, -(2.0**-110)])
@pytest.mark.parametrize("columns", [1, 16, 40])
def test_a_column_that_has_no_scale_is_told(value, columns, seed):
    rng = np.random.default_rng(seed)
    matrix = weights(rng, 70, columns)
    column, row = rng.integers(columns), rng.integers(70)
    if np.isfinite(value):
        matrix[:, column] = 0
    matrix[row, column] = value
    assert not fixed_point(matrix)[1]


def test_a_column_of_zeros_has_a_scale(seed):
    rng = np.random.default_rng(seed)
    matrix = weights(rng, 70, 20)
    matrix[:, 3] = 0
    matrix[:, 4] = -0.0
    rows = images(rng, 9, 70)
    np.testing.assert_array_equal(product(rows, matrix, 1 / 255)[:, 3:5], 0)


@pytest.mark.parametrize("scale", [0.0, 1e-38, 3e38, np.inf, np.nan])
def test_a_scale_that_leaves_the_normal_numbers_is_told(scale):
    matrix = np.full((1, 1), 1e-7 if scale < 1 else 1e7, np.float32)
    assert not fixed_point(matrix, scale)[1]


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 31, 32, 33, 100])
@pytest.mark.parametrize(("depth", "columns"), [(1, 1), (63, 10), (64, 16), (65, 17), (130, 33), (784, 256)])
def test_products_have_the_bits_of_exact_sums(count, depth, columns, seed):
    rng = np.random.default_rng(seed)
    rows, matrix = images(rng, count, depth), weights(rng, depth, columns)
    np.testing.assert_array_equal(product(rows, matrix, 1 / 255), exact(rows, matrix, 1 / 255))


@pytest.mark.parametrize("byte", [0, 1, 255])
def test_products_of_one_byte(byte, seed):
    matrix = weights(np.random.default_rng(seed), 784, 40)
    rows = np.full((20, 784), byte, np.uint8)
    result = product(rows, matrix)
    np.testing.assert_array_equal(result, exact(rows, matrix))
    assert byte > 0 or not result.any()


def test_a_batch_of_4096_rows(seed):
    rng = np.random.default_rng(seed)
    rows, matrix = images(rng, 4096, 70), weights(rng, 70, 10)
    np.testing.assert_array_equal(product(rows, matrix), exact(rows, matrix))


def test_the_deepest_sums_dont_overflow():
    depth = MAX_BLOCKS * DEPTH
    rows = np.full((2, depth), 255, np.uint8)
    # digits of -128, but for the first: the least sums that there are
    matrix = np.full((depth, 2), -(0x7F8080 + 0.0), np.float32)
    result = product(rows, matrix)
    np.testing.assert_array_equal(result, exact(rows, matrix))
    np.testing.assert_allclose(result, -255.0 * depth * 0x7F8080, rtol=1e-6)


def test_deeper_sums_are_split(seed):
    rng = np.random.default_rng(seed)
    depth = MAX_BLOCKS * DEPTH + 100
    rows, matrix = images(rng, 3, depth), weights(rng, depth, 3)
    rows[0] = 255
    matrix[:, 0] = 0.05
    bias = rng.standard_normal(3).astype(np.float32)
    expected = rows.astype(float) @ matrix.astype(float) + bias
    sizes = rows.astype(float) @ np.abs(matrix).astype(float)
    # each number is rounded at 2**-24 of the greatest of its column, and the sum twice
    np.testing.assert_array_less(np.abs(product(rows, matrix, 1, bias) - expected), 1e-6 * sizes + 1e-6)
    relu = product(rows, matrix, 1, -1e9 * np.ones(3, np.float32), relu=True)
    np.testing.assert_array_equal(relu, 0)


@pytest.mark.parametrize("relu", [False, True])
def test_bias_and_relu(relu, seed):
    rng = np.random.default_rng(seed)
    rows, matrix = images(rng, 40, 100), weights(rng, 100, 40)
    bias = rng.standard_normal(40).astype(np.float32)
    bias[3] = np.nan
    expected = exact(rows, matrix, 1 / 255).astype(float) + bias
    if relu:
        expected = np.where(expected <= 0, 0, expected)
    # the product and the sum are each rounded once, or both at once
    np.testing.assert_allclose(product(rows, matrix, 1 / 255, bias, relu), expected, rtol=1e-6, atol=1e-6)


def test_what_is_in_the_output_may_be_added_to(seed):
    rng = np.random.default_rng(seed)
    rows, matrix = images(rng, 5, 70), weights(rng, 70, 16)
    digits, _ = fixed_point(matrix)
    output = np.ones(5 * max(PANEL, SIDE), np.float32)
    epilogue = Epilogue(np.empty(0, np.float32), 0, FROM_OUTPUT, False)
    _product(tiles(), in_words(rows), (0, 5), digits, (0, 1), 2, Matrix(output, 0, 5 * PANEL), epilogue)
    result = np.concatenate(list(output.reshape(-1, 5, PANEL)), axis=1)[:, :16]
    np.testing.assert_allclose(result, exact(rows, matrix) + 1, rtol=1e-6, atol=1e-5)


def test_numbers_of_any_size_beside_the_greatest_of_a_column(seed):
    rng = np.random.default_rng(seed)
    rows = images(rng, 30, 200)
    matrix = weights(rng, 200, 40) * np.exp2(rng.integers(-60, 60, (200, 40))).astype(np.float32)
    error = np.abs(product(rows, matrix).astype(float) - rows.astype(float) @ matrix.astype(float))
    # half a unit of 24 bits for each number, and three roundings of the sum
    unit = np.abs(matrix).max(axis=0) * 2.0**-22
    bound = rows.sum(axis=1, keepdims=True) * unit / 2 + 2.0**-22 * (
        rows.astype(float) @ np.abs(matrix).astype(float)
    )
    np.testing.assert_array_less(error, bound + 1e-30)


@pytest.mark.parametrize("count", [1, 64, 65, 200])
def test_any_split_has_the_same_bits(count, seed):
    rng = np.random.default_rng(seed)
    rows, matrix = images(rng, count, 130), weights(rng, 130, 100)
    bias = rng.standard_normal(100).astype(np.float32)
    whole = product(rows, matrix, 1 / 255, bias, relu=True)
    for _ in range(5):
        cuts = [
            [0, *np.sort(rng.integers(0, last + 1, rng.integers(0, 4))).tolist(), last]
            for last in (count, tile_columns(100))
        ]
        np.testing.assert_array_equal(product(rows, matrix, 1 / 255, bias, True, cuts), whole)


@pytest.mark.parametrize(("count", "depth"), [(1, 1), (5, 16), (63, 17), (64, 784), (65, 100), (256, 784)])
def test_bytes_are_transposed_part_by_part(count, depth, seed):
    rng = np.random.default_rng(seed)
    rows = images(rng, count, depth)
    inputs, stride = -(-depth // SIDE) * SIDE, depth + 20
    blocks = blocks_of(count)
    transposed = Bytes(aligned(blocks * stride * DEPTH, np.uint8), stride)
    cut = int(rng.integers(0, inputs // SIDE + 1)) * SIDE
    for part in ((0, cut), (cut, inputs)):
        transpose_bytes(in_words(rows), count, part, transposed)
    view = transposed.storage.reshape(blocks, stride, DEPTH)
    result = view.transpose(1, 0, 2).reshape(stride, blocks * DEPTH)
    np.testing.assert_array_equal(result[:depth, :count], rows.T)


def _largest(errors):
    """Return the mean of the products' largest errors: the largest of all hangs on one element's luck."""
    return np.abs(errors).max(axis=(1, 2)).mean()


def _check_parity(products, scale):
    """Check that the errors against float64, over some products, are at most those of torch's float32."""
    errors = [[], []]
    for rows, matrix in products:
        expected = rows.astype(float) @ matrix.astype(float) * scale
        floats = (torch.from_numpy(rows).float() * scale) @ torch.from_numpy(matrix)
        for found, result in zip(errors, (product(rows, matrix, scale), floats.numpy()), strict=True):
            found.append(result.astype(float) - expected)
    for size in (np.linalg.norm, _largest):
        ours, torchs = map(size, np.array(errors))
        assert ours <= torchs, f"{size.__name__}: {ours:.3g} against torch's {torchs:.3g}"


def test_parity_on_images_of_noise(seed):
    rng = np.random.default_rng(seed)
    # Of one product the norms are those of torch's times 0.98, give or take 0.03: one draw in eight is above
    # torch's. Of 30 products it is 0.979, give or take 0.003, and of the means of their largest errors 0.70,
    # give or take 0.02. The largest of all 30 is luck: 0.65, give or take 0.09, once above torch's.
    _check_parity([(images(rng, 256, 784), weights(rng, 784, 256)) for _ in range(30)], 1 / 255)


@pytest.fixture(scope="module")
def trained(fashion_mnist_data):
    """Return Fashion-MNIST's first batch, an MLP's first weight after 50 steps, and its output's gradient."""
    X, y = fashion_mnist_data.X_train.reshape(-1, 784), fashion_mnist_data.y_train.long()
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(784, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    loss = torch.nn.CrossEntropyLoss()
    for batch in torch.randperm(len(X))[: 50 * 256].reshape(-1, 256):
        optimizer.zero_grad()
        loss(net(X[batch].float() / 255), y[batch]).backward()
        optimizer.step()
    rows = X[:256]
    hidden = net[0](rows.float() / 255)
    hidden.retain_grad()
    loss(net[2](hidden.relu()), y[:256]).backward()
    return rows.numpy(), net[0].weight.detach().T.numpy().copy(), hidden.grad.numpy().copy()


@pytest.mark.real_data
def test_parity_of_forward_on_fashion_mnist(trained):
    rows, weight, _ = trained
    _check_parity([(rows, weight)], 1 / 255)


@pytest.mark.real_data
def test_parity_of_the_gradient_on_fashion_mnist(trained):
    rows, _, grad = trained
    _check_parity([(np.ascontiguousarray(rows.T), grad)], 1 / 255)


def digest_of_products():
    """Return a digest of products of many shapes, which every kind of units must have."""
    rng = np.random.default_rng(0)
    digest = hashlib.sha256()
    for count, depth, columns in ((1, 1, 1), (33, 65, 17), (20, 784, 40), (100, 200, 100)):
        rows, matrix = images(rng, count, depth), weights(rng, depth, columns)
        digest.update(product(rows, matrix, 1 / 255, rng.standard_normal(columns)).tobytes())
    return digest.hexdigest()


@pytest.mark.slow
def test_the_units_and_the_emulation_have_the_same_bits(tmp_path):
    program = "from tests.kernels.cpu.test_integer import digest_of_products as d; print(d())"
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"FASTDL_INTEGER_UNITS": "emulated", "FASTDL_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == digest_of_products(), result.stderr
