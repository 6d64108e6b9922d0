"""The matrix product that all dense layers are made of.

How a fast product comes about, in six versions of one sum:

1. Three nested loops. Each multiply-add loads two numbers and stores one, so the CPU waits for memory.
2. A tile of the product, 6 x 16 numbers with AVX2 (14 x 32 with AVX-512), stays in registers while the
   summed dimension runs: a step loads 6 + 16 numbers for 96 multiply-adds (``multiply_tile``).
3. What a tile reads is first copied ("packed") to panels, in the order in which it is read, so that every
   load is the next one in memory, and rows a power of 2 apart don't evict each other from the caches.
4. A block is packed while it is used: a panel of b stays in L1 for all rows, a block of a in L2 for all
   columns.
5. The inner loop has one address for a and one for b, and constants for the rest (``multiply_packed``).
   Rows a variable stride apart, and masks for the edge, took registers that the sums need: a third of the
   speed.
6. Skinny products, which don't repay the copying, aren't packed. They are dot products along the rows
   (``dot_tile``), or tiles over a few steps of the depth at a time, which read b in its order in memory.

Floor for (N, K) by (K, M): N K M multiply-adds, of which a core does one or two vectors a cycle, and
N K + K M + N M numbers through memory. Where N or M is small the second is the greater. On a Zen 3
256 x 784 x 256 runs at 87 to 92 % of what a loop of multiply-adds on registers reaches, 1,024 cubed at 87 %.

The order in which a number of the product is summed depends on the sizes of the whole product and on nothing
else, so neither the number of threads nor their timing shows in a result. An exact 0 is multiplied like any
other number: 0 times infinity is NaN.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastdl.kernels.cpu.intrinsics import (
    FROM_BIAS,
    FROM_OUTPUT,
    FROM_ZERO,
    ROW_DEPTH,
    SUM_VECTORS,
    TILE,
    Epilogue,
    Matrix,
    add_rows,
    aligned,
    dot_tile,
    multiply_tile,
    sum_rows,
)
from fastdl.kernels.cpu.panels import (
    PANEL_BYTES,
    multiply_packed,
    pack_panel,
    panel_of,
    panels_of,
    tile_height,
    transpose_square,
)
from fastdl.kernels.cpu.parallel import share, shared_out
from fastdl.kernels.jit import inlined_jit, linked_jit

# What is packed at a time: PANEL_BYTES of a panel of b (a step of its depth is one row of the panel); so many
# rows of a, which stay in L2; and so many columns of b.
BLOCK_ROWS = 256
BLOCK_COLUMNS = 1024
# Up to this depth b isn't packed: a tile's part of it fits L1 as it lies.
SHALLOW_DEPTH = 32
# Up to this many tiles of rows b isn't packed either: it would be read too few times. A few steps of the
# depth at a time, all columns are done, so that b is read along its rows.
FEW_TILES = 2
STREAMED_DEPTH = 16
STREAMED_COLUMNS = 8192
# Up to this many rows or steps the CPU waits for memory, and reads and writes go along whole rows.
SKINNY = 4
ROW_COLUMNS = 512
# Dot products read their rows in pieces of this size, of which L1 holds a tile's.
DOT_DEPTH_BYTES = 4096
# Cycles that a product takes besides its multiply-adds, measured on a Zen 4: for each number of a and of b
# that is packed, and for each sum of a vector's lanes. They only decide between the two ways.
PACK_A_CYCLES = 0.15
PACK_B_CYCLES = 0.35
SUM_LANES_CYCLES = 5.0
# A thread's share of a smaller product takes less time than handing it over.
MIN_PRODUCTS_PER_THREAD = 1 << 17
# Fewer columns aren't split among threads: tiles would be left without half of their vectors.
FEW_COLUMNS = 64
# numbers of a cache line
LINE = 16


class Left(NamedTuple):
    """The left factor: ``values`` (N, K), or (K, N) where it is transposed.

    A value counts as 0 where ``mask_source``, of the same shape or (0, 0), is 0 or less (NaN isn't): the
    output of the ReLU that a gradient passes back through.
    """

    values: Any
    is_transposed: bool
    mask_source: Any


class Right(NamedTuple):
    """The right factor: ``values`` (K, M), or (M, K) where it is transposed."""

    values: Any
    is_transposed: bool


@inlined_jit
def _start(first, bias):
    """Return what the sums of a tile whose first step is the first one are added to."""
    return FROM_OUTPUT if first > 0 else FROM_BIAS if bias.size > 0 else FROM_ZERO


@linked_jit
def _pack_a(a, rows, steps, panels, at):
    """Copy a block of a to panels, 0 where it is masked.

    A panel holds columns of a as it lies: steps of the depth, or rows where a is transposed.
    """
    values, mask_source = a.values, a.mask_source
    panel, stride = panel_of(values), values.shape[1]
    is_masked = mask_source.size > 0
    lines, cols = (steps, rows) if a.is_transposed else (rows, steps)
    num_lines = lines[1] - lines[0]
    for col in range(cols[0], cols[1], panel):
        source, target = lines[0] * stride + col, at + (col - cols[0]) * num_lines
        size = (num_lines, min(panel, cols[1] - col))
        matrix = Matrix(values, source, stride)
        pack_panel(matrix, (mask_source, source), is_masked, (panels, target), size)


@linked_jit
def _pack_b(b, steps, cols, panels, at):
    """Copy a block of b to panels over its columns, and 0 to the columns that it doesn't have."""
    values = b.values
    panel, stride = panel_of(values), values.shape[1]
    first, last = steps
    depth = last - first
    if not b.is_transposed:
        for j in range(cols[0], cols[1], panel):
            target = at + (j - cols[0]) * depth
            matrix, size = Matrix(values, first * stride + j, stride), (depth, min(panel, cols[1] - j))
            pack_panel(matrix, (values, 0), False, (panels, target), size)
        return
    lanes = panel // TILE.vectors
    for j in range(cols[0], cols[1], lanes):
        target = at + (j - cols[0]) // panel * panel * depth + (j - cols[0]) % panel
        # whole square blocks in registers, the edges one by one
        rest = first
        if j + lanes <= cols[1]:
            rest = first + depth // lanes * lanes
            for p in range(first, rest, lanes):
                transpose_square(
                    Matrix(values, j * stride + p, stride),
                    Matrix(panels, target + (p - first) * panel, panel),
                )
        for p in range(rest, last):
            for column in range(j, j + lanes):
                value = values[column, p] if column < cols[1] else values.dtype.type(0)
                panels[target + (p - first) * panel + column - j] = value


@linked_jit
def _multiply_packed(a, b, bias, relu, product, rows, cols):
    """Write a block of the product by register tiles over panels of a and of b."""
    depth = a.values.shape[0] if a.is_transposed else a.values.shape[1]
    dtype, width = product.dtype, product.shape[1]
    panel = panel_of(product)
    depth_panels = panels_of(depth, panel)
    blocks = max(1, (depth * panel * product.itemsize + PANEL_BYTES - 1) // PANEL_BYTES)
    longest = panels_of(depth_panels, blocks) * panel
    highest = min(panels_of(rows[1] - rows[0], panel) * panel, BLOCK_ROWS)
    widest = min(panels_of(cols[1] - cols[0], panel) * panel, BLOCK_COLUMNS)
    left, right = np.empty(highest * longest + LINE, dtype), np.empty(widest * longest + LINE, dtype)
    left_at: int = aligned(left)
    right_at: int = aligned(right)
    for col in range(cols[0], cols[1], BLOCK_COLUMNS):
        col_stop = min(col + BLOCK_COLUMNS, cols[1])
        for block in range(blocks):
            first, last = share(depth_panels, block, blocks)
            first, last = first * panel, min(last * panel, depth)
            steps = last - first
            _pack_b(b, (first, last), (col, col_stop), right, right_at)
            start, has_relu = _start(block, bias), relu and block == blocks - 1
            for block_row in range(rows[0], rows[1], BLOCK_ROWS):
                row_stop = min(block_row + BLOCK_ROWS, rows[1])
                _pack_a(a, (block_row, row_stop), (first, last), left, left_at)
                a_run = (row_stop - block_row) * panel
                for j in range(col, col_stop, panel):
                    row = block_row
                    while row < row_stop:
                        i = row - block_row
                        if a.is_transposed:
                            # a tile doesn't reach over the edge of a panel
                            a_at = left_at + i // panel * panel * steps + i % panel
                            height = tile_height(min(panel - i % panel, row_stop - row))
                        else:
                            a_at = left_at + i * panel
                            height = tile_height(row_stop - row)
                        multiply_packed(
                            Matrix(product, row * width + j, width),
                            Matrix(left, a_at, a_run),
                            a.is_transposed,
                            (right, right_at + (j - col) * steps),
                            (steps, height, min(panel, col_stop - j)),
                            Epilogue(bias, j, start, has_relu),
                        )
                        row += height


@linked_jit
def _multiply_rows(a, b, bias, relu, product, rows, cols):
    """Write a block of the product row by row, adding a few rows of b at a time to each."""
    (depth, stride), width = b.values.shape, product.shape[1]
    row_stride, step = (1, a.values.shape[1]) if a.is_transposed else (a.values.shape[1], 1)
    is_masked = a.mask_source.size > 0
    # one row of the product needs no part of b twice
    col_limit = STREAMED_COLUMNS if product.shape[0] == 1 or depth <= ROW_DEPTH else ROW_COLUMNS
    for col in range(cols[0], cols[1], col_limit):
        col_stop = min(col + col_limit, cols[1])
        for first in range(0, max(depth, 1), ROW_DEPTH):
            last = min(first + ROW_DEPTH, depth)
            for row in range(rows[0], rows[1]):
                at = row * row_stride + first * step
                add_rows(
                    (product, row * width + col),
                    Matrix(a.values, at, step),
                    (a.mask_source, at),
                    is_masked,
                    Matrix(b.values, first * stride + col, stride),
                    (last - first, col_stop - col),
                    Epilogue(bias, col, _start(first, bias), relu and last == depth),
                )


@linked_jit
def _multiply_streamed(a, b, bias, relu, product, rows, cols):
    """Write a block of the product by register tiles that read a and b as they lie."""
    (depth, stride), width = b.values.shape, product.shape[1]
    left, mask_source = a.values, a.mask_source
    if mask_source.size > 0:
        left = np.empty_like(a.values)
        lines = (0, depth) if a.is_transposed else rows
        for i in range(lines[0], lines[1]):
            for j in range(left.shape[1]):
                value = a.values[i, j]
                left[i, j] = left.dtype.type(0) if mask_source[i, j] <= 0 else value
    row_stride, step = (1, left.shape[1]) if a.is_transposed else (left.shape[1], 1)
    panel = panel_of(product)
    depth_limit = SHALLOW_DEPTH if depth <= SHALLOW_DEPTH else STREAMED_DEPTH
    for col in range(cols[0], cols[1], STREAMED_COLUMNS):
        col_stop = min(col + STREAMED_COLUMNS, cols[1])
        for first in range(0, max(depth, 1), depth_limit):
            last = min(first + depth_limit, depth)
            row = rows[0]
            while row < rows[1]:
                height = tile_height(rows[1] - row)
                for j in range(col, col_stop, panel):
                    multiply_tile(
                        Matrix(product, row * width + j, width),
                        (left, row * row_stride + first * step, row_stride, step),
                        Matrix(b.values, first * stride + j, stride),
                        (last - first, height, min(panel, col_stop - j)),
                        Epilogue(bias, j, _start(first, bias), relu and last == depth),
                    )
                row += height


@linked_jit
def _multiply_dots(a, b, bias, relu, product, rows, cols):
    """Write a block of ``relu(a @ b.T + bias)`` by dot products."""
    depth, width = a.shape[1], product.shape[1]
    # The operand with more rows is read once, from memory; the other one again and again, from a cache.
    rows_outside = product.shape[0] >= width
    outer, inner = (rows, cols) if rows_outside else (cols, rows)
    dot_rows, dot_cols = TILE.dot_rows, TILE.dot_cols
    outer_step, inner_step = (dot_rows, dot_cols) if rows_outside else (dot_cols, dot_rows)
    depth_limit = max(depth, 1)
    if min(product.shape[0], width) > max(dot_rows, dot_cols):
        depth_limit = DOT_DEPTH_BYTES // a.itemsize
    for first in range(0, max(depth, 1), depth_limit):
        last = min(first + depth_limit, depth)
        for u in range(outer[0], outer[1], outer_step):
            for v in range(inner[0], inner[1], inner_step):
                i, j = (u, v) if rows_outside else (v, u)
                dot_tile(
                    Matrix(product, i * width + j, width),
                    Matrix(a, i * depth + first, depth),
                    Matrix(b, j * depth + first, depth),
                    (last - first, min(dot_rows, rows[1] - i), min(dot_cols, cols[1] - j)),
                    Epilogue(bias, j, _start(first, bias), relu and last == depth),
                )


@inlined_jit
def _prefers_dots(rows, cols, depth, lanes):
    """Return whether ``a @ b.T`` takes less time as dot products than packed."""
    vectors = (cols + lanes - 1) // lanes
    packed = rows * vectors * depth + depth * (PACK_A_CYCLES * rows + PACK_B_CYCLES * cols)
    return rows * cols * (depth / lanes + SUM_LANES_CYCLES) < packed


@inlined_jit
def _splits_rows(rows, cols):
    """Return whether threads share the rows of a product, not its columns, in whole cache lines."""
    # every thread packs all of the operand whose rows or columns aren't shared, and b is the dearer to pack
    return rows > 2 * cols or cols < FEW_COLUMNS


@shared_out
def _part(a, b, bias, relu, product, sums, length, start, stop):
    """Do one thread's part of ``gemm``."""
    values, mask_source, depth = a.values, a.mask_source, b.values.shape[0]
    lanes = TILE.vector_bytes // values.itemsize
    rows, cols = (0, product.shape[0]), (0, product.shape[1])
    if _splits_rows(rows[1], cols[1]):
        rows = start, min(stop, rows[1])
    else:
        cols = min(start * LINE, cols[1]), min(stop * LINE, cols[1])
    can_be_dots = b.is_transposed and not a.is_transposed and mask_source.size == 0
    if can_be_dots and _prefers_dots(product.shape[0], product.shape[1], values.shape[1], lanes):
        _multiply_dots(values, b.values, bias, relu, product, rows, cols)
    elif not b.is_transposed and (product.shape[0] <= SKINNY or depth <= SKINNY):
        _multiply_rows(a, b, bias, relu, product, rows, cols)
    elif not b.is_transposed and (product.shape[0] <= FEW_TILES * TILE.rows or depth <= SHALLOW_DEPTH):
        _multiply_streamed(a, b, bias, relu, product, rows, cols)
    else:
        _multiply_packed(a, b, bias, relu, product, rows, cols)
    width = SUM_VECTORS * lanes
    first, last = sums.size * start // length, sums.size * stop // length
    for j in range(first, last, width):
        size = (values.shape[0], min(width, last - j))
        source = Matrix(values, j, values.shape[1])
        sum_rows(source, (mask_source, j), mask_source.size > 0, size, (sums, j))


@linked_jit
def gemm(a, b, bias, relu, product, sums, num_threads):
    """Write the matrix product ``relu(a @ b + bias)``.

    All arrays are C-contiguous and of one type, float32 or float64.

    Parameters
    ----------
    a : Left
        Of N rows and K columns.
    b : Right
        Of K rows and M columns.
    bias : (M,) or (0,)
    relu : bool
        Whether to write 0 for each number that is less than 0. NaN stays NaN.
    product : (N, M), or (0, 0) for the sums alone
    sums : (columns of a's values,) or (0,)
        The sum of each column of the masked values, where it is wanted.
    num_threads : int
        How many threads may share the work.
    """
    num_products = product.size * a.values.shape[0 if a.is_transposed else 1]
    num_threads = max(1, min(num_threads, num_products // MIN_PRODUCTS_PER_THREAD))
    rows, cols = product.shape
    length = max(1, rows if _splits_rows(rows, cols) else (cols + LINE - 1) // LINE)
    _part((a, b, bias, relu, product, sums, length), length, num_threads)
