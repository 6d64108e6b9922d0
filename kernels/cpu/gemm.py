"""The matrix product that all dense layers are made of.

How a fast product comes about, in five versions of one sum:

1. Three nested loops. Each multiply-add loads two numbers and stores one, so the CPU waits for memory.
2. A tile of the product, 14 x 32 numbers, stays in registers while the summed dimension runs: a step loads
   14 + 32 numbers for 448 multiply-adds (``multiply_tile``).
3. What a tile reads is first copied ("packed") in the order in which it is read, so that every load is the
   next one in memory, and rows that are a power of 2 apart don't evict each other from the caches.
4. A block is packed while it is used: 32 columns of b times a block of the depth come from L2, once for
   every tile of rows; 14 rows of a stay in L1 for all the columns.
5. Products too thin to repay the copying aren't packed. They are dot products along the rows (``dot_tile``),
   or tiles over a few steps of the depth at a time, which read b in the order in which it lies in memory.

Floor for (N, K) by (K, M): N K M multiply-adds, of which a core does one or two vectors a cycle, and
N K + K M + N M numbers through memory. Where N or M is small the second is the greater.

The order in which a number of the product is summed depends on the sizes of the whole product and on nothing
else, so neither the number of threads nor their timing shows in a result. An exact 0 is multiplied like any
other number: 0 times infinity is NaN.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from fastdl.kernels.cpu.intrinsics import (
    FROM_BIAS,
    FROM_OUTPUT,
    FROM_ZERO,
    ROW_DEPTH,
    SUM_VECTORS,
    TILE,
    add_rows,
    aligned,
    copy_block,
    dot_tile,
    multiply_tile,
    sum_open,
    transpose_block,
)
from fastdl.kernels.cpu.parallel import share
from fastdl.kernels.jit import jit, linked_jit

# The block of b that is packed at a time: 256 columns of 2 KB, half of the L2 of a Zen 4.
BLOCK_DEPTH_BYTES = 2048
BLOCK_COLUMNS = 256
# Up to this depth b isn't packed: a tile's part of it fits L1 as it lies.
SHALLOW_DEPTH = 32
# Up to this many tiles of rows b isn't packed either: it would be read too few times. A few steps of the
# depth at a time, all columns are done, so that b is read along its rows.
FEW_TILES = 2
STREAMED_DEPTH = 16
STREAMED_COLUMNS = 8192
# Up to this many rows or steps the CPU waits for memory, and reads and writes go along whole rows.
THIN = 4
ROW_COLUMNS = 512
# So many tiles of rows of a are packed at a time, and so many lines of an operand for one tile, then for the
# next: where tiles lie side by side, a cache line that they share is still in L1.
GROUP = 8
LINES = 32
# Dot products read their rows in pieces of this size, of which L1 holds a tile's.
DOT_DEPTH_BYTES = 4096
# Cycles that a product takes besides its multiply-adds, measured on a Zen 4: for each number of a and of b
# that is packed, and for each sum of a vector's lanes. They only decide between the two ways.
PACK_A_CYCLES = 0.15
PACK_B_CYCLES = 0.35
SUM_LANES_CYCLES = 5.0
# A thread's share of a smaller product takes less time than entering a parallel region.
MIN_PRODUCTS_PER_THREAD = 1 << 17
# Fewer columns aren't split among threads: tiles would be left without half of their vectors.
FEW_COLUMNS = 64
# Columns are split in whole cache lines, and packed rows are kept a line apart.
LINE = 16


@jit
def _tile_rows(rows, tile, tiles):
    """Return a tile's rows; all are about as high, as one of few rows would leave most registers empty."""
    height, higher = divmod(rows[1] - rows[0], tiles)
    start = rows[0] + tile * height + min(tile, higher)
    return start, start + height + (1 if tile < higher else 0)


@linked_jit
def _pack_a(a, a_is_transposed, gate, rows, tile, tile_stop, tiles, start, stop, panels, at, stride, size):
    """Copy tiles of rows of a, 0 where the gate is shut: row by row, or step by step if they lie that way."""
    lines = LINES if a_is_transposed else stop - start
    for p in range(start, stop, max(lines, 1)):
        for t in range(tile, tile_stop):
            row, row_stop = _tile_rows(rows, t, tiles)
            target = at + (t - tile) * size
            if a_is_transposed:
                source, target = p * a.shape[1] + row, target + (p - start) * stride
                count, length = min(lines, stop - p), row_stop - row
            else:
                source, count, length = row * a.shape[1] + p, row_stop - row, stop - p
            copy_block(
                a, source, a.shape[1], gate, source, gate.size > 0, panels, target, stride, count, length
            )


@linked_jit
def _pack_b(b, b_is_transposed, start, stop, col, col_stop, panels, at, lanes):
    """Copy columns of b into panels as wide as a tile, one step of the depth after the other."""
    width = TILE.vectors * lanes
    depth = stop - start
    if not b_is_transposed:
        for p in range(start, stop, LINES):
            lines = min(LINES, stop - p)
            for j in range(col, col_stop, width):
                source, target = p * b.shape[1] + j, at + (j - col) * depth + (p - start) * width
                count = min(width, col_stop - j)
                copy_block(b, source, b.shape[1], b, 0, False, panels, target, width, lines, count)
        return
    for j in range(col, col_stop, lanes):
        panel = (j - col) // width * width
        target = at + panel * depth + (j - col - panel)
        # whole square blocks in registers, the edges one by one
        rest = start
        if j + lanes <= col_stop:
            rest = start + depth // lanes * lanes
            for p in range(start, rest, lanes):
                transpose_block(
                    b, j * b.shape[1] + p, b.shape[1], panels, target + (p - start) * width, width
                )
        for column in range(j, min(j + lanes, col_stop)):
            for p in range(rest, stop):
                panels[0, target + (p - start) * width + column - j] = b[column, p]


@linked_jit
def _multiply_rows(a, a_is_transposed, gate, b, bias, relu, product, rows, cols):
    """Write a block of the product row by row, adding a few rows of b at a time to each."""
    depth = b.shape[0]
    row_stride, step = (1, a.shape[1]) if a_is_transposed else (a.shape[1], 1)
    # one row of the product needs no part of b twice
    col_limit = STREAMED_COLUMNS if product.shape[0] == 1 or depth <= ROW_DEPTH else ROW_COLUMNS
    for col in range(cols[0], cols[1], col_limit):
        col_stop = min(col + col_limit, cols[1])
        for first in range(0, max(depth, 1), ROW_DEPTH):
            last = min(first + ROW_DEPTH, depth)
            start = FROM_OUTPUT if first > 0 else FROM_BIAS if bias.size > 0 else FROM_ZERO
            for row in range(rows[0], rows[1]):
                at = row * row_stride + first * step
                add_rows(
                    product, row * product.shape[1] + col,
                    a, at, gate, at, gate.size > 0, step,
                    b, first * b.shape[1] + col, b.shape[1],
                    last - first, col_stop - col,
                    bias, col, start, relu and last == depth,
                )  # fmt: skip


@linked_jit
def _multiply(a, a_is_transposed, gate, b, b_is_transposed, bias, relu, product, rows, cols):
    """Write a block of the product by register tiles."""
    depth = a.shape[0] if a_is_transposed else a.shape[1]
    if not b_is_transposed and (product.shape[0] <= THIN or depth <= THIN):
        _multiply_rows(a, a_is_transposed, gate, b, bias, relu, product, rows, cols)
        return
    lanes = TILE.vector_bytes // a.itemsize
    width = TILE.vectors * lanes
    packs_b = b_is_transposed or (depth > SHALLOW_DEPTH and product.shape[0] > FEW_TILES * TILE.rows)
    packs_a = packs_b or gate.size > 0
    if packs_b:
        depth_limit, col_limit = BLOCK_DEPTH_BYTES // a.itemsize, BLOCK_COLUMNS
    else:
        depth_limit, col_limit = SHALLOW_DEPTH if depth <= SHALLOW_DEPTH else STREAMED_DEPTH, STREAMED_COLUMNS
    blocks = max(1, (depth + depth_limit - 1) // depth_limit)
    longest = (depth + blocks - 1) // blocks
    tiles = (rows[1] - rows[0] + TILE.rows - 1) // TILE.rows
    # a number of a that is packed is at its tile * size + row * row_stride + depth * step
    left, left_at, size = a, 0, 0
    row_stride, step = (1, a.shape[1]) if a_is_transposed else (a.shape[1], 1)
    if packs_a:
        row_stride, step = (1, TILE.rows) if a_is_transposed else (longest + LINE, 1)
        size = (longest + LINE) * TILE.rows
        left = np.empty((1, min(tiles, GROUP) * size + LINE), a.dtype)
        left_at = aligned(left)
    right, right_at, b_step = b, 0, b.shape[1]
    if packs_b:
        right = np.empty((1, longest * (min(col_limit, cols[1] - cols[0]) + width) + LINE), a.dtype)
        right_at, b_step = aligned(right), width
    for col in range(cols[0], cols[1], col_limit):
        col_stop = min(col + col_limit, cols[1])
        for block in range(blocks):
            first, last = share(depth, block, blocks)
            if packs_b:
                _pack_b(b, b_is_transposed, first, last, col, col_stop, right, right_at, lanes)
            start = FROM_OUTPUT if block > 0 else FROM_BIAS if bias.size > 0 else FROM_ZERO
            for tile in range(tiles):
                row, row_stop = _tile_rows(rows, tile, tiles)
                a_at = row * row_stride + first * step
                if packs_a:
                    if tile % GROUP == 0:
                        stride, stop = max(row_stride, step), min(tile + GROUP, tiles)
                        _pack_a(
                            a, a_is_transposed, gate, rows, tile, stop, tiles, first, last,
                            left, left_at, stride, size,
                        )  # fmt: skip
                    a_at = left_at + tile % GROUP * size
                for j in range(col, col_stop, width):
                    b_at = right_at + (j - col) * (last - first) if packs_b else first * b.shape[1] + j
                    multiply_tile(
                        product, row * product.shape[1] + j, product.shape[1],
                        left, a_at, row_stride, step,
                        right, b_at, b_step,
                        last - first, row_stop - row, min(width, col_stop - j),
                        bias, j, start, relu and block == blocks - 1,
                    )  # fmt: skip


@linked_jit
def _multiply_dots(a, b, bias, relu, product, rows, cols):
    """Write a block of ``relu(a @ b.T + bias)`` by dot products."""
    depth = a.shape[1]
    # The operand with more rows is read once, from memory; the other one again and again, from a cache.
    rows_outside = product.shape[0] >= product.shape[1]
    outer, inner = (rows, cols) if rows_outside else (cols, rows)
    dot_rows, dot_cols = TILE.dot_rows, TILE.dot_cols
    outer_step, inner_step = (dot_rows, dot_cols) if rows_outside else (dot_cols, dot_rows)
    depth_limit = max(depth, 1)
    if min(product.shape[0], product.shape[1]) > max(dot_rows, dot_cols):
        depth_limit = DOT_DEPTH_BYTES // a.itemsize
    for first in range(0, max(depth, 1), depth_limit):
        last = min(first + depth_limit, depth)
        start = FROM_OUTPUT if first > 0 else FROM_BIAS if bias.size > 0 else FROM_ZERO
        for u in range(outer[0], outer[1], outer_step):
            for v in range(inner[0], inner[1], inner_step):
                i, j = (u, v) if rows_outside else (v, u)
                dot_tile(
                    product, i * product.shape[1] + j, product.shape[1],
                    a, i * depth + first, depth,
                    b, j * depth + first, depth,
                    last - first, min(dot_rows, rows[1] - i), min(dot_cols, cols[1] - j),
                    bias, j, start, relu and last == depth,
                )  # fmt: skip


@jit
def _prefers_dots(rows, cols, depth, lanes):
    """Return whether ``a @ b.T`` takes less time as dot products than packed."""
    vectors = (cols + lanes - 1) // lanes
    packed = rows * vectors * depth + depth * (PACK_A_CYCLES * rows + PACK_B_CYCLES * cols)
    return rows * cols * (depth / lanes + SUM_LANES_CYCLES) < packed


@jit
def _block(shape, thread, num_threads):
    """Return a thread's rows and columns: all of the one, a share of the other."""
    rows, cols = shape
    # Every thread packs all of the operand whose rows or columns aren't shared, and b is the dearer to pack.
    if rows > 2 * cols or cols < FEW_COLUMNS:
        return share(rows, thread, num_threads), (0, cols)
    start, stop = share((cols + LINE - 1) // LINE, thread, num_threads)
    return (0, rows), (min(start * LINE, cols), min(stop * LINE, cols))


@jit
def _part(a, a_is_transposed, gate, b, b_is_transposed, bias, relu, product, sums, thread, num_threads):
    """Do one thread's part of ``gemm``."""
    lanes = TILE.vector_bytes // a.itemsize
    rows, cols = _block(product.shape, thread, num_threads)
    can_be_dots = b_is_transposed and not a_is_transposed and gate.size == 0
    if can_be_dots and _prefers_dots(product.shape[0], product.shape[1], a.shape[1], lanes):
        _multiply_dots(a, b, bias, relu, product, rows, cols)
    elif product.size > 0:
        _multiply(a, a_is_transposed, gate, b, b_is_transposed, bias, relu, product, rows, cols)
    width = SUM_VECTORS * lanes
    start, stop = share(sums.size, thread, num_threads)
    for j in range(start, stop, width):
        sum_open(a, j, gate, j, gate.size > 0, a.shape[1], a.shape[0], min(width, stop - j), sums, j)


@linked_jit(parallel=True)
def gemm(a, a_is_transposed, gate, b, b_is_transposed, bias, relu, product, sums, num_threads):
    """Write the matrix product ``relu(gated(a) @ b + bias)``.

    All arrays are C-contiguous and of one type, float32 or float64.

    Parameters
    ----------
    a : (N, K), or (K, N) if a_is_transposed
    a_is_transposed : bool
    gate : the shape of a, or (0, 0)
        a counts as 0 where this is 0 or less (NaN isn't): the output of the ReLU that the gradient a passes
        back through.
    b : (K, M), or (M, K) if b_is_transposed
    b_is_transposed : bool
    bias : (M,) or (0,)
    relu : bool
        Whether to write 0 for each number that is 0 or less. NaN stays NaN.
    product : (N, M), or (0, 0) for the sums alone
    sums : (columns of a,) or (0,)
        The sum of each column of gated(a), where it is wanted.
    num_threads : int
        How many threads may share the work. With 1 no parallel region is entered.
    """
    num_products = product.size * (a.shape[0] if a_is_transposed else a.shape[1])
    num_threads = max(1, min(num_threads, num_products // MIN_PRODUCTS_PER_THREAD))
    if num_threads == 1:
        # a literal 0 would be a type of its own, and so is prange's index: _part would be compiled twice
        thread = np.intp(0)
        _part(a, a_is_transposed, gate, b, b_is_transposed, bias, relu, product, sums, thread, num_threads)
    else:
        for index in prange(num_threads):
            thread = np.intp(index)
            _part(
                a, a_is_transposed, gate, b, b_is_transposed, bias, relu, product, sums, thread, num_threads
            )
