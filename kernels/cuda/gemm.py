"""The matrix product that all dense layers are made of.

How a fast product comes about on a GPU, in four versions of one sum:

1. A thread for each number of the product. A multiply-add loads two numbers from memory.
2. A block of threads computes a tile. What the tile reads is first copied to shared memory, so that each
   number comes from memory once for a whole row or column of the tile.
3. A thread computes a small square of the tile in registers: a step of the depth loads 4 + 4 numbers from
   shared memory for 16 multiply-adds. The next tile's part of memory is on its way meanwhile.
4. A small product has fewer tiles than the GPU has multiprocessors, and few steps hide no latency. So the
   depth is cut into slices: each slice of a block's threads sums its own part, and the parts are added in
   the order of the slices.

Floor for (I, P) by (P, J): I P J multiply-adds, and I P + P J + I J numbers through memory.

The order in which a number of the product is summed depends on the sizes of the product and on nothing else.
An exact 0 is multiplied like any other number: 0 times infinity is NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastdl.kernels.cuda.chunks import load_chunk
from fastdl.kernels.cuda.intrinsics import (
    add_outer_product,
    add_tuples,
    computed_in,
    fill,
    is_null,
    load,
    load_tuple,
    pointer_to,
    relu_masked,
    store,
    store_rows,
    store_tuple,
)
from fastdl.kernels.cuda.launch import CHUNK, ELEMENTS, Array, Elements, Kernel, Stream, element_of, is_wide
from fastdl.kernels.cuda.numba_cuda import cuda, types

# The three products of a linear layer: which operand is transposed, and what happens to a sum at its end.
FORWARD, GRAD_INPUT, GRAD_WEIGHT = "forward", "grad_input", "grad_weight"
# A row of a tile in shared memory is this much longer, so that a column's numbers lie in other banks.
PADDING = 4


class Matrix(NamedTuple):
    """An operand of a product, (num_lines, length), and whether its lines can be read a chunk at a time."""

    array: Elements
    num_lines: int
    length: int
    is_wide: bool


def matrix_of(array: Array, mask: Array | None = None) -> Matrix:
    """Return an array of two dimensions as an operand, with the mask that is read beside it."""
    num_lines, length = array.shape
    return Matrix(array, num_lines, length, is_wide(length, array, mask))


@dataclass(frozen=True)
class Tile:
    """How a block computes its part of the product.

    That has ``size`` rows and columns, a thread's has ``square``, and the depth is cut into slices.
    """

    size: int
    square: int
    slices: int

    @property
    def slice_threads(self) -> int:
        """The threads that compute a tile's sums over one slice."""
        return (self.size // self.square) ** 2

    @property
    def threads(self) -> int:
        """The threads of a block."""
        return self.slice_threads * self.slices

    @property
    def depth(self) -> int:
        """The steps that a slice has in shared memory at a time: one chunk a thread, of a and of b."""
        return CHUNK * self.slice_threads // self.size

    @property
    def stride(self) -> int:
        """The numbers between two steps in shared memory."""
        return self.size + PADDING

    @property
    def buffer(self) -> int:
        """The numbers of one operand that a slice has in shared memory at a time."""
        return self.depth * self.stride

    @property
    def shared_size(self) -> int:
        """The numbers that a block needs in shared memory: two buffers of both operands, or the sums."""
        return max(self.slices * 4 * self.buffer, self.slices * (self.size + 1) * self.size)


# Below this many rows or columns of a product most of a larger tile would lie outside of it.
SKINNY = 16
# The H200 has 132 multiprocessors and the A100 108: with fewer large tiles some have nothing to do.
FEW_TILES = 264

# float64 is there for checks, and its buffers take twice the shared memory; a large product of float16 or
# bfloat16 belongs on tensor cores, which torch's own product uses.
_SMALL, _SKINNY = Tile(32, 4, 4), Tile(16, 2, 8)
TILES = {
    "float32": {"skinny": _SKINNY, "small": _SMALL, "large": Tile(64, 4, 1)},
    "float64": {"skinny": Tile(16, 2, 4), "small": Tile(32, 4, 2)},
    "float16": {"skinny": _SKINNY, "small": _SMALL},
    "bfloat16": {"skinny": _SKINNY, "small": _SMALL},
}


def tile_for(element: str, num_rows: int, num_cols: int) -> str:
    """Return the name of the tile for a product of these sizes."""
    if min(num_rows, num_cols) <= SKINNY:
        return "skinny"
    large = TILES[element].get("large")
    if large and -(-num_rows // large.size) * -(-num_cols // large.size) >= FEW_TILES:
        return "large"
    return "small"


@cuda.jit(device=True, inline="always")
def tile_origin(block, num_cols, size):
    """Return the row and column of the product at which a block's tile begins; tiles come row by row."""
    # a division of 64 bits would take longer than a small tile's sums
    col_tiles = types.uint32(max(1, (num_cols + size - 1) // size))
    tile_row = types.uint32(block) // col_tiles
    tile_col = types.uint32(block) - tile_row * col_tiles
    return types.int64(tile_row) * size, types.int64(tile_col) * size


class Operand(NamedTuple):
    """How ``build_sums`` reads an operand, whose lines run along the depth of the product, or across it.

    ``load(operand, line, offset)`` returns CHUNK numbers of a line as they are in memory, with 0 for those
    outside of it; ``widen(operand, chunk)`` returns them in the type that is computed in.
    """

    load: Any
    widen: Any
    runs_along_depth: bool


def build_sums(tile: Tile, real: Any, a_operand: Operand, b_operand: Operand) -> tuple[Any, Any, Any]:
    """Return the device functions that every tiled product is made of; ``real`` is what is computed in.

    Returns
    -------
    sum_tile
        ``sum_tile(a, b, shared, (row, col), num_steps, wants_sums)`` leaves the sums of the tile at this row
        and column in shared memory, for each slice its own; with the sums of a over the depth, if wanted.
    total
        ``total(shared, at)`` is the sum of all slices of a number of the tile.
    row_total
        ``row_total(shared, i)`` is the sum of all slices' sums of a, of a row of the tile.
    """
    load_a, widen_a, a_runs_along_depth = a_operand
    load_b, widen_b, b_runs_along_depth = b_operand
    size, square, slices, depth = tile.size, tile.square, tile.slices, tile.depth
    slice_threads, stride, buffer, tile_size = tile.slice_threads, tile.stride, tile.buffer, size * size
    square_size, sums_at = square * square, slices * size * size
    depth_chunks, size_chunks = depth // CHUNK, size // CHUNK
    # a longer loop the compiler would not write out
    unrolled = min(depth, 8)

    @cuda.jit(device=True, inline="always")
    def chunk_origin(runs_along_depth, lane, first, step):
        """Return the line and the offset in it of a thread's chunk."""
        if runs_along_depth:
            return first + lane // depth_chunks, step + lane % depth_chunks * CHUNK
        return step + lane // size_chunks, first + lane % size_chunks * CHUNK

    @cuda.jit(device=True, inline="always")
    def keep_chunk(chunk, runs_along_depth, lane, shared, at):
        """Copy a thread's chunk to shared memory, where a step's numbers lie side by side."""
        if runs_along_depth:
            at += lane % depth_chunks * CHUNK * stride + lane // depth_chunks
            store(shared, at, chunk[0])
            store(shared, at + stride, chunk[1])
            store(shared, at + 2 * stride, chunk[2])
            store(shared, at + 3 * stride, chunk[3])
        else:
            store_tuple(shared, at + lane // size_chunks * stride + lane % size_chunks * CHUNK, chunk)

    @cuda.jit(device=True, inline="always")
    def sum_tile(a, b, shared, origin, num_steps, wants_sums):
        row, col = origin
        thread = types.int64(cuda.threadIdx.x)
        part, lane = thread // slice_threads, thread % slice_threads
        i, j = lane // (size // square) * square, lane % (size // square) * square
        # While a thread computes with one buffer in shared memory, the chunk for the other is on its way.
        products = fill(shared, 0, square_size)
        sums = fill(shared, 0, square)
        full, empty = part * 4 * buffer + 2 * buffer, part * 4 * buffer
        for done in range(-depth * slices, num_steps, depth * slices):
            step = done + (part + slices) * depth
            line, offset = chunk_origin(a_runs_along_depth, lane, row, step)
            a_chunk = load_a(a, line, offset)
            line, offset = chunk_origin(b_runs_along_depth, lane, col, step)
            b_chunk = load_b(b, line, offset)
            if done >= 0:
                for start in range(0, depth, unrolled):
                    for p in range(unrolled):
                        at = full + (start + p) * stride
                        a_square = load_tuple(shared, at + i, square)
                        b_square = load_tuple(shared, at + buffer + j, square)
                        products = add_outer_product(products, a_square, b_square)
                        if wants_sums:
                            sums = add_tuples(sums, a_square)
            # whatever is done to a chunk waits for it, so it is done here
            keep_chunk(widen_a(a, a_chunk), a_runs_along_depth, lane, shared, empty)
            keep_chunk(widen_b(b, b_chunk), b_runs_along_depth, lane, shared, empty + buffer)
            cuda.syncthreads()
            full, empty = empty, full
        store_rows(shared, part * tile_size + i * size + j, size, products, square)
        if j == 0:
            store_tuple(shared, sums_at + part * size + i, sums)
        cuda.syncthreads()

    @cuda.jit(device=True, inline="always")
    def total(shared, at):
        value = load(shared, at)
        for other in range(1, slices):
            value += load(shared, other * tile_size + at)
        return value

    @cuda.jit(device=True, inline="always")
    def row_total(shared, i):
        value = load(shared, sums_at + i)
        for other in range(1, slices):
            value += load(shared, sums_at + other * size + i)
        return value

    return sum_tile, total, row_total


@cuda.jit(device=True, inline="always")
def as_it_is(operand, chunk):
    """Return a chunk that is in memory what it is computed in."""
    return chunk


@cuda.jit(device=True, inline="always")
def load_matrix(matrix, line, offset):
    """Return a chunk of a line of a Matrix, with 0 for what is outside of it: a loader for ``build_sums``."""
    if line >= matrix.num_lines or offset >= matrix.length:
        return fill(matrix.array, 0, CHUNK)
    at = line * matrix.length + offset
    return load_chunk(matrix.array, at, matrix.length - offset, matrix.is_wide)


@cuda.jit(device=True, inline="always")
def with_bias_and_relu(total, bias, m, relu):
    """Return a number of column m of a product as a layer gives it; NaN stays NaN."""
    if not is_null(bias):
        total += load(bias, m)
    if relu:
        total = relu_masked((total,), (total,))[0]
    return total


def _build(tile: Tile, real: Any, kind: str) -> Callable[..., None]:
    size, threads, tile_size = tile.size, tile.threads, tile.size * tile.size
    shared_size = tile.shared_size
    a_runs_along_depth, b_runs_along_depth = kind != GRAD_WEIGHT, kind == FORWARD
    is_forward, is_grad_weight = kind == FORWARD, kind == GRAD_WEIGHT

    @cuda.jit(device=True, inline="always")
    def load_masked(operand, line, offset):
        matrix, mask = operand
        chunk = load_matrix(matrix, line, offset)
        if not is_forward and not is_null(mask):
            mask_matrix = Matrix(mask, matrix.num_lines, matrix.length, matrix.is_wide)
            chunk = relu_masked(chunk, load_matrix(mask_matrix, line, offset))
        return chunk

    sum_tile, slices_total, row_total = build_sums(
        tile,
        real,
        Operand(load_masked, as_it_is, a_runs_along_depth),
        Operand(load_matrix, as_it_is, b_runs_along_depth),
    )

    def product_of_tiles(
        a: Matrix,
        mask: Elements,
        b: Matrix,
        bias: Elements,
        relu: bool,
        product: Elements,
        row_sums: Elements,
    ) -> None:
        shared = pointer_to(cuda.shared.array(shared_size, real, alignment=16))
        thread = types.int64(cuda.threadIdx.x)
        num_rows, num_steps = (a.num_lines, a.length) if a_runs_along_depth else (a.length, a.num_lines)
        num_cols = b.num_lines if b_runs_along_depth else b.length
        row, col = tile_origin(cuda.blockIdx.x, num_cols, size)
        wants_sums = is_grad_weight and col == 0 and not is_null(row_sums)

        # 1: the sums over each slice of the depth
        sum_tile((a, mask), b, shared, (row, col), num_steps, wants_sums)

        # 2: the slices' sums, one after the other
        for at in range(thread, tile_size, threads):
            n, m = row + at // size, col + at % size
            if n < num_rows and m < num_cols:
                total = slices_total(shared, at)
                if is_forward:
                    total = with_bias_and_relu(total, bias, m, relu)
                store(product, n * num_cols + m, total)
        if wants_sums and thread < size and row + thread < num_rows:
            store(row_sums, row + thread, row_total(shared, thread))

    return product_of_tiles


def _kernel(element: str, name: str, kind: str) -> Kernel:
    tile = TILES[element][name]
    function = _build(tile, computed_in(ELEMENTS[element]), kind)
    return Kernel(f"linear_{kind}_{name}_{element}", function, tile.threads, element)


_KERNELS = {
    (element, name, kind): _kernel(element, name, kind)
    for element, tiles in TILES.items()
    for name in tiles
    for kind in (FORWARD, GRAD_INPUT, GRAD_WEIGHT)
}


def gemm(
    kind: str,
    a: Array,
    b: Array,
    product: Array | None,
    stream: Stream,
    *,
    mask: Array | None = None,
    bias: Array | None = None,
    relu: bool = False,
    row_sums: Array | None = None,
) -> None:
    """Write one of the three products of a linear layer; the product is None where it isn't wanted.

    ``FORWARD`` is ``a @ b.T``, plus a bias for each column, with 0 for each number that is 0 or less if relu.
    ``GRAD_INPUT`` is ``a @ b`` and ``GRAD_WEIGHT`` ``a.T @ b``, where a is the gradient of a ReLU if there is
    a mask, its output: a number of a counts as 0 where that is 0 or less. ``row_sums`` gets those of the
    masked ``a.T``.
    """
    num_rows = a.shape[1 if kind == GRAD_WEIGHT else 0]
    b_matrix = matrix_of(b) if product is not None else Matrix(b, b.shape[0], 0, False)
    num_cols = b_matrix.num_lines if kind == FORWARD else b_matrix.length
    if num_rows == 0 or (num_cols == 0 and row_sums is None):
        return
    element = element_of(a)
    name = tile_for(element, num_rows, num_cols)
    size = TILES[element][name].size
    _KERNELS[element, name, kind].launch(
        stream,
        -(-num_rows // size) * max(1, -(-num_cols // size)),
        a=matrix_of(a, mask),
        mask=mask,
        b=b_matrix,
        bias=bias,
        relu=relu,
        product=product,
        row_sums=row_sums,
    )
