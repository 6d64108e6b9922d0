"""Products of bytes and float32 in integers: a matrix in fixed point, as digits that tiles multiply.

Each column of a matrix of floats has a scale, a power of 2 near its greatest magnitude, and each number is
rounded, to nearest even, to a multiple of the scale of 24 bits, which are three signed digits of 8:

    number = scale * (65536 digit0 + 256 digit1 + digit2),    -128 <= digit < 128

A product with bytes is three products of integers, each of which is exact, and one combination of their sums
in float32: ``scale * (65536 sum0 + (256 sum1 + sum2))``. Its bits don't depend on how the work is split.

Digits lie as the tiles read them, ``(columns / 16, depth / DEPTH, NUM_DIGITS, 16, 16, 4)``: a tile of 16
columns and DEPTH numbers of each, of which four lie side by side. So do bytes, ``(depth / DEPTH, rows,
DEPTH)``; what lies behind a row's last byte is multiplied by digits that are 0.

Floor of a product of N rows, depth K and M columns: ``3 N K M / 16384`` tile products of 16 cycles.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir

from fastdl.kernels.cpu.intrinsics import FROM_OUTPUT, INTP, TILE, Epilogue, Matrix, Vectors, llvm_function
from fastdl.kernels.cpu.memory import aligned
from fastdl.kernels.cpu.tiles import (
    DEPTH,
    NUM_TILES,
    SIDE,
    TILE_BYTES,
    tile_load,
    tile_multiply,
    tile_store,
    tile_zero,
)
from fastdl.kernels.jit import inlined_jit, linked_jit

NUM_DIGITS = 3
# numbers of a matrix of floats that lie side by side in a panel, and of them in a tile
PANEL = TILE.vectors * TILE.vector_bytes // 4
_PART = min(SIDE, PANEL)
_PARTS = SIDE // _PART
# so many rows are summed at a time, in two tiles for each digit
PAIR = 2 * SIDE
TILE_SUMS, PAIR_SUMS = SIDE * SIDE, PAIR * SIDE
NUM_SUMS = NUM_DIGITS * PAIR_SUMS
# the bytes of a tile column's digits of DEPTH numbers
BLOCK = NUM_DIGITS * TILE_BYTES
# A sum of so many blocks of products of a byte and a digit is less than 2**31.
MAX_BLOCKS = 65536 // DEPTH

# The greatest number of three digits is 127 * 65793, not 2**23 - 1: a column whose greatest magnitude would
# pass it at a scale has the next scale. Added to the bits of a float32, this makes it the next exponent.
_ROUND_UP = 0x10101
_MAGNITUDE = 0x7FFFFFFF
_INFINITY = 0x7F800000
_MANTISSA_BITS = 23
# The scale of a column of this exponent is 2**(exponent - 149); it and its inverse are normal numbers.
_LEAST_EXPONENT, _EXPONENT_OF_ZERO, _GREATEST_EXPONENT = 23, 149, 255
_LEAST_NORMAL = np.float32(2.0**-126)
_DIGITS_OF_ZERO = 0x808080

_INT32 = ir.IntType(32)
_BYTE = ir.IntType(8)
_WORDS = ir.VectorType(_INT32, SIDE)


class Tiles(NamedTuple):
    """Memory for the tiles: a thread's is (NUM_TILES * TILE_BYTES,) uint8, and (NUM_SUMS,) int32."""

    registers: Any
    sums: Any


class Bytes(NamedTuple):
    """Rows of bytes: byte p of row i is at ``(p // DEPTH * stride + i) * DEPTH + p % DEPTH``."""

    storage: Any
    stride: int


class Digits(NamedTuple):
    """A matrix of depth x columns in fixed point, which threads write together.

    storage : (copies, tile columns * blocks * BLOCK), uint8
        The digits: one copy for all threads, or one for each.
    largest : (num_threads, tile columns * 16), int32
        The bits of the greatest magnitude of each column's numbers that a thread has.
    inverses, factors : (num_threads, tile columns * 16), float32
        What a column's numbers are multiplied by to become integers, and what sums are multiplied by.
    blocks : int
        How many blocks of DEPTH numbers a tile column has.
    """

    storage: Any
    largest: Any
    inverses: Any
    factors: Any
    blocks: int


def digits_memory(depth: int, columns: int, num_threads: int, copies: int = 1) -> Digits:
    """Return memory for the digits of a matrix of at most depth x columns."""
    tiles, blocks = -(-columns // SIDE), -(-depth // DEPTH)

    def of_columns(dtype: Any) -> Any:
        return aligned(num_threads * tiles * SIDE, dtype).reshape(num_threads, tiles * SIDE)

    return Digits(
        aligned(copies * tiles * blocks * BLOCK, np.uint8).reshape(copies, tiles * blocks * BLOCK),
        of_columns(np.int32),
        of_columns(np.float32),
        of_columns(np.float32),
        blocks,
    )


def tiles_memory(num_threads: int) -> Tiles:
    """Return each thread's memory for the tiles."""
    return Tiles(
        aligned(num_threads * NUM_TILES * TILE_BYTES, np.uint8).reshape(num_threads, NUM_TILES * TILE_BYTES),
        aligned(num_threads * NUM_SUMS, np.int32).reshape(num_threads, NUM_SUMS),
    )


@inlined_jit
def digits_of(digits, thread):
    """Return digits with a thread's own copy, or the only one, and its own scales."""
    copy = digits.storage[thread if digits.storage.shape[0] > 1 else 0]
    return Digits(copy, digits.largest, digits.inverses[thread], digits.factors[thread], digits.blocks)


@inlined_jit
def blocks_of(depth):
    """Return how many blocks of DEPTH numbers, the last of which may be incomplete, so many are."""
    return (depth + DEPTH - 1) // DEPTH


@inlined_jit
def tile_at(matrix, row, column):
    """Return where a row of a tile column begins in a matrix whose panels are the stride apart."""
    col = column * SIDE
    return matrix.offset + col // PANEL * matrix.stride + row * PANEL + col % PANEL


def _integers(value):
    return ir.Constant(_WORDS, [value] * SIDE)


def _words(vectors, pointer):
    return vectors.builder.bitcast(pointer, _WORDS.as_pointer())


def _load_row(vectors, source, panel):
    """Return 16 columns of a row, which may lie in two panels, so far apart."""
    parts = [
        vectors.load(vectors.at(source, vectors.builder.mul(panel, INTP(part))), width=_PART)
        for part in range(_PARTS)
    ]
    return parts[0] if _PARTS == 1 else vectors.shuffle(*parts, range(SIDE))


@llvm_function
def find_largest(vectors, source, rows, target):
    """Raise the bits of the greatest magnitudes of 16 columns to those of some rows; NaN is the greatest.

    ``source`` is a Matrix with a stride of panels, target (array, position).
    """
    (source, panel), (target,) = source, target
    vectors = Vectors(vectors.builder, vectors.element, SIDE)
    builder = vectors.builder
    greatest = builder.load(_words(vectors, target), align=4)

    def add(source, values):
        bits = builder.bitcast(_load_row(vectors, source, panel), _WORDS)
        magnitude = builder.and_(bits, _integers(_MAGNITUDE))
        return [vectors.call("smax.v16i32", _WORDS, *values, magnitude)]

    _, greatest = vectors.loop_by_four(rows, (PANEL,), [source, greatest], add)
    builder.store(greatest, _words(vectors, target), align=4)


@llvm_function
def write_digits(vectors, source, rows, columns, inverses, target):
    """Write the digits of a tile column's ``rows = (first, stop, end)``, and of 0 from stop to end.

    ``source`` is a Matrix with a stride of panels, which begins at row first, a multiple of 4. Of the 16
    columns so many are in the matrix. Inverses and target are (array, position).
    """
    (source, panel), (first, stop, end), (inverses,), (target,) = source, rows, inverses, target
    vectors = Vectors(vectors.builder, vectors.element, SIDE)
    builder = vectors.builder
    inverse = vectors.load(inverses)
    inside = vectors.first(columns)

    def select(a, b, mask):
        low, high = builder.and_(a, _integers(mask)), builder.and_(b, _integers(~mask & 0xFFFFFFFF))
        return builder.or_(low, high)

    def shifted(value, count):
        shift = builder.shl if count > 0 else builder.lshr
        return shift(value, _integers(abs(count)))

    def integers(source):
        # rounds to nearest even
        scaled = builder.fmul(_load_row(vectors, source, panel), inverse)
        whole = vectors.call("lrint.v16i32.v16f32", _WORDS, scaled)
        # what lies behind a matrix's last column may be anything
        whole = builder.select(inside, whole, _integers(0))
        return builder.add(whole, _integers(_DIGITS_OF_ZERO))

    def write(rows, group):
        # each row's digits are three bytes of 32 bits; each digit's are to lie side by side
        pairs = []
        for low, high in (rows[:2], rows[2:]):
            high = shifted(high, 8)
            pairs.append((select(low, high, 0x00FF00FF), select(low, high, 0x0000FFFF)))
        (outer, middle), (next_outer, next_middle) = pairs
        digits = (
            select(shifted(outer, -16), next_outer, 0xFFFF),
            select(shifted(middle, -8), shifted(next_middle, 8), 0xFFFF),
            select(outer, shifted(next_outer, 16), 0xFFFF),
        )
        at = builder.add(
            builder.mul(builder.ashr(group, INTP(4)), INTP(BLOCK)),
            builder.mul(builder.and_(group, INTP(SIDE - 1)), INTP(DEPTH)),
        )
        for digit, value in enumerate(digits):
            place = _words(vectors, vectors.at(vectors.at(target, at), digit * TILE_BYTES))
            builder.store(builder.xor(value, _integers(0x80808080)), place, align=4)

    def group_of(row):
        return builder.ashr(builder.add(first, row), INTP(2))

    def whole_group(row, state):
        (source,) = state
        write([integers(vectors.at(source, i * PANEL)) for i in range(4)], group_of(row))
        return [vectors.at(source, 4 * PANEL)]

    def last_group(_, state):
        (source,) = state
        zero = _integers(_DIGITS_OF_ZERO)
        rows = []
        for i in range(3):
            is_row = builder.icmp_signed("<", builder.add(fours, INTP(i)), count)
            place = builder.select(is_row, vectors.at(source, i * PANEL), source)
            rows.append(builder.select(is_row, integers(place), zero))
        write([*rows, zero], group_of(fours))
        return [source]

    def empty_group(row, _):
        write([_integers(_DIGITS_OF_ZERO)] * 4, group_of(builder.add(row, used)))
        return []

    count = builder.sub(stop, first)
    fours = builder.and_(count, INTP(-4))
    used = builder.and_(builder.add(count, INTP(3)), INTP(-4))
    (source,) = vectors.loop(fours, 4, [source], whole_group)
    vectors.loop(builder.sub(count, fours), 4, [source], last_group)
    vectors.loop(builder.sub(builder.sub(end, first), used), 4, [], empty_group)


@llvm_function
def combine(vectors, output, rows, epilogue, factors, sums):
    """Write rows of a tile of a product from the sums of its digits.

    ``output`` is a Matrix with a stride of panels, factors and sums are (array, position).
    """
    (output, panel), (bias, start, relu), (factors,), (sums,) = output, epilogue, factors, sums
    vectors = Vectors(vectors.builder, vectors.element, _PART)
    builder = vectors.builder
    integers = ir.VectorType(_INT32, _PART)

    def row(i, state):
        output, sums = state
        for part in range(_PARTS):
            place = vectors.at(output, builder.mul(panel, INTP(part)))
            terms = []
            for digit in range(NUM_DIGITS):
                pointer = vectors.at(sums, digit * PAIR_SUMS + part * _PART)
                value = builder.load(builder.bitcast(pointer, integers.as_pointer()), align=4)
                terms.append(builder.sitofp(value, vectors.type))
            # products with powers of 2 are exact: fused or not, these have the same bits
            total = vectors.multiply_add(ir.Constant(vectors.type, [256.0] * _PART), terms[1], terms[2])
            total = vectors.multiply_add(ir.Constant(vectors.type, [65536.0] * _PART), terms[0], total)
            begin = vectors.load_start(start, vectors.at(bias, part * _PART), place)
            factor = vectors.load(vectors.at(factors, part * _PART))
            vectors.store(vectors.relu(vectors.multiply_add(total, factor, begin), relu), place)
        return [vectors.at(output, PANEL), vectors.at(sums, SIDE)]

    vectors.loop(rows, 1, [output, sums], row)


@llvm_function
def transpose_block(vectors, source, target):
    """Write the transpose of 64 rows of 16 bytes; both are a Matrix with a stride of rows."""
    (source, stride), (target, target_stride) = source, target
    builder = vectors.builder
    lane = ir.VectorType(_BYTE, SIDE)

    def joined(values):
        width = values[0].type.count * 2
        return [vectors.shuffle(a, b, range(width)) for a, b in zip(values[::2], values[1::2], strict=True)]

    rows = []
    for i in range(SIDE):
        lanes = []
        for part in range(DEPTH // SIDE):
            place = vectors.at(source, builder.mul(stride, INTP(part * SIDE + i)))
            lanes.append(builder.load(builder.bitcast(place, lane.as_pointer()), align=1))
        rows += joined(joined(lanes))
    # four rounds that interleave rows, in each lane by itself
    halves = [
        [
            part * SIDE + half * 8 + i // 2 + i % 2 * DEPTH
            for part in range(DEPTH // SIDE)
            for i in range(SIDE)
        ]
        for half in range(2)
    ]
    for _ in range(4):
        rows = [vectors.shuffle(rows[i], rows[i + 8], half) for i in range(8) for half in halves]
    for i, row in enumerate(rows):
        place = vectors.at(target, builder.mul(target_stride, INTP(i)))
        builder.store(row, builder.bitcast(place, row.type.as_pointer()), align=1)


@inlined_jit
def find_scales(digits, tile, columns, scale):
    """Write the scales of a tile column; return whether all columns have one, and whether one has changed.

    ``digits`` is a thread's. None has a column with infinity or NaN, or one of numbers so small, or a factor
    so small or great, that a float32 wouldn't be normal. Columns behind the matrix's may hold anything.
    """
    inverse_bits, factor_bits = digits.inverses.view(np.int32), digits.factors.view(np.int32)
    has_scale, has_changed = True, False
    for c in range(tile * SIDE, (tile + 1) * SIDE):
        largest = 0
        for thread in range(digits.largest.shape[0]):
            largest = max(largest, digits.largest[thread, c])
        if c >= columns:
            largest = 0
        exponent = _EXPONENT_OF_ZERO if largest == 0 else (largest + _ROUND_UP) >> _MANTISSA_BITS
        has_scale &= largest < _INFINITY and exponent >= _LEAST_EXPONENT
        exponent = min(max(exponent, _LEAST_EXPONENT), _GREATEST_EXPONENT)
        bits = (276 - exponent) << _MANTISSA_BITS
        has_changed |= inverse_bits[c] != bits
        inverse_bits[c] = bits
        factor_bits[c] = (exponent - 22) << _MANTISSA_BITS
        digits.factors[c] *= scale
        factor = abs(digits.factors[c])
        has_scale &= factor >= _LEAST_NORMAL and factor < np.inf
    return has_scale, has_changed


@linked_jit
def note_largest(matrix, rows, tiles, largest):
    """Raise the bits of the greatest magnitudes of some tile columns to those of some rows."""
    for tile in range(tiles[0], tiles[1]):
        part = Matrix(matrix.storage, tile_at(matrix, rows[0], tile), matrix.stride)
        find_largest(part, rows[1] - rows[0], (largest, tile * SIDE))


@linked_jit
def write_columns(digits, matrix, rows, size, tiles):
    """Write the digits of some rows, from a multiple of 4, and tile columns of a matrix of a size.

    ``digits`` is a thread's. Behind the last row come zeros up to a whole block.
    """
    depth, columns = size
    end = blocks_of(depth) * DEPTH if rows[1] == depth else rows[1]
    for tile in range(tiles[0], tiles[1]):
        write_digits(
            Matrix(matrix.storage, tile_at(matrix, rows[0], tile), matrix.stride),
            (rows[0], rows[1], end), columns - tile * SIDE,
            (digits.inverses, tile * SIDE), (digits.storage, tile * digits.blocks * BLOCK),
        )  # fmt: skip


@linked_jit
def transpose_bytes(a, count, inputs, transposed):
    """Write, for some inputs, a row of the bytes of all count rows.

    Inputs begin at a multiple of 16 and are done in whole tiles; 64 rows are read at a time.
    """
    for k in range(inputs[0], inputs[1], SIDE):
        for n in range(0, count, DEPTH):
            source = (k // DEPTH * a.stride + n) * DEPTH + k % DEPTH
            target = (n // DEPTH * transposed.stride + k) * DEPTH
            transpose_block(Matrix(a.storage, source, DEPTH), Matrix(transposed.storage, target, DEPTH))


@inlined_jit
def _sum_pair(tiles, a, left, digits, right, blocks):
    """Write the sums of the products of 32 rows with each digit of 16 columns."""
    registers, sums = tiles
    tile_zero(registers, 0)
    tile_zero(registers, 1)
    tile_zero(registers, 2)
    tile_zero(registers, 3)
    tile_zero(registers, 4)
    tile_zero(registers, 5)
    for _ in range(blocks):
        tile_load(registers, 6, a.storage, left, DEPTH)
        tile_load(registers, 7, digits.storage, right, DEPTH)
        tile_multiply(registers, 0, 6, 7)
        tile_load(registers, 7, digits.storage, right + TILE_BYTES, DEPTH)
        tile_multiply(registers, 1, 6, 7)
        tile_load(registers, 7, digits.storage, right + 2 * TILE_BYTES, DEPTH)
        tile_multiply(registers, 2, 6, 7)
        tile_load(registers, 6, a.storage, left + TILE_BYTES, DEPTH)
        tile_multiply(registers, 5, 6, 7)
        tile_load(registers, 7, digits.storage, right + TILE_BYTES, DEPTH)
        tile_multiply(registers, 4, 6, 7)
        tile_load(registers, 7, digits.storage, right, DEPTH)
        tile_multiply(registers, 3, 6, 7)
        left, right = left + a.stride * DEPTH, right + BLOCK
    tile_store(registers, 0, sums, 0, DEPTH)
    tile_store(registers, 1, sums, PAIR_SUMS, DEPTH)
    tile_store(registers, 2, sums, 2 * PAIR_SUMS, DEPTH)
    tile_store(registers, 3, sums, TILE_SUMS, DEPTH)
    tile_store(registers, 4, sums, PAIR_SUMS + TILE_SUMS, DEPTH)
    tile_store(registers, 5, sums, 2 * PAIR_SUMS + TILE_SUMS, DEPTH)


@inlined_jit
def _sum_one(tiles, a, left, digits, right, blocks):
    """Do what ``_sum_pair`` does for 16 rows."""
    registers, sums = tiles
    tile_zero(registers, 0)
    tile_zero(registers, 1)
    tile_zero(registers, 2)
    for _ in range(blocks):
        tile_load(registers, 6, a.storage, left, DEPTH)
        tile_load(registers, 7, digits.storage, right, DEPTH)
        tile_multiply(registers, 0, 6, 7)
        tile_load(registers, 7, digits.storage, right + TILE_BYTES, DEPTH)
        tile_multiply(registers, 1, 6, 7)
        tile_load(registers, 7, digits.storage, right + 2 * TILE_BYTES, DEPTH)
        tile_multiply(registers, 2, 6, 7)
        left, right = left + a.stride * DEPTH, right + BLOCK
    tile_store(registers, 0, sums, 0, DEPTH)
    tile_store(registers, 1, sums, PAIR_SUMS, DEPTH)
    tile_store(registers, 2, sums, 2 * PAIR_SUMS, DEPTH)


@linked_jit
def multiply_bytes(tiles, a, rows, digits, columns, blocks, output, epilogue):
    """Write some rows, and tile columns, of a product of bytes with a matrix in fixed point.

    The caller has begun to use the tiles, by ``tile_begin``, and ends it.

    Parameters
    ----------
    tiles : Tiles
    a : Bytes
        Memory for whole pairs of tiles, of 32 rows, from row ``rows[0]`` on.
    rows, columns : (int, int)
        Which rows, and which tile columns, are computed.
    digits : Digits
        A thread's.
    blocks : int
        How many blocks of DEPTH numbers of each row count.
    output : Matrix
        float32; rows of a panel lie one after the other, panels are the stride apart.
    epilogue : Epilogue
    """
    bias, bias_at, start, relu = epilogue
    for column in range(columns[0], columns[1]):
        col = column * SIDE
        for row in range(rows[0], rows[1], PAIR):
            count = min(PAIR, rows[1] - row)
            for first in range(0, blocks, MAX_BLOCKS):
                last = min(first + MAX_BLOCKS, blocks)
                left = (first * a.stride + row) * DEPTH
                right = (column * digits.blocks + first) * BLOCK
                if count > SIDE:
                    _sum_pair(tiles, a, left, digits, right, last - first)
                else:
                    _sum_one(tiles, a, left, digits, right, last - first)
                begin, ends = start if first == 0 else FROM_OUTPUT, relu and last == blocks
                combine(
                    Matrix(output.storage, tile_at(output, row, column), output.stride), count,
                    Epilogue(bias, bias_at + col, begin, ends), (digits.factors, col), (tiles.sums, 0),
                )  # fmt: skip
