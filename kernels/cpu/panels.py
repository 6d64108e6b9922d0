"""Register tiles over panels, the layout in which a training run keeps everything that it multiplies.

A panel holds as many columns of a matrix as a register tile is wide, one row after the other. A matrix of R
rows and C columns is an array ``(ceil(C / panel), R, panel)``, 0 in the columns that it doesn't have. So laid
out, every product of a dense layer reads its operands in the order in which they lie, and nothing is
transposed or packed between the products of a training step:

    forward      output[n, m]      += input[n, k] weight[k, m]          rows n, steps k along the rows of a
    grad_input   grad_input[k, n]  += weight[k, m] grad_output[m, n]    rows k, steps m along the rows of a
    grad_weight  grad_weight[k, m] += input[n, k] grad_output[n, m]     rows k, steps n down the columns of a

Four kernels multiply. ``multiply_panels`` holds a tile of sums in registers; a step loads one panel row of b
and one number for each row of the tile. ``multiply_row`` holds one row of several panels.
``multiply_nonzero`` does too, and steps only over the numbers of a that aren't 0, by the set bits of a mask.
``dot_panels`` sums along the panels, for products that have few columns.

An operand is a ``Matrix``, or an array and a position where its rows are those of one panel. Positions and
strides are in elements. Nothing here checks a bound.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastdl.kernels.cpu.intrinsics import (
    BOTH,
    INTP,
    ROW_COUNTS,
    TILE,
    llvm_function,
    pointer_to,
    write_prefetch,
)
from fastdl.kernels.jit import inlined_jit

# How many vectors one row of sums may have. 8 of them hide the latency of a multiply-add; WORD rows of b
# that are as long must fit L1.
LONG_ROWS = (8, 4, 2) if TILE.vector_bytes == 64 else (12, 8, 4, 2)
WORD = 64
# So many bytes of a panel of b are multiplied at a time: they stay in L1, of which they take half.
PANEL_BYTES = 16384

_ROW_COUNTS = tuple(ROW_COUNTS)
_INT32 = ir.IntType(32)
_INT64 = ir.IntType(64)
_BIT = ir.IntType(1)


@inlined_jit
def panel_of(array):
    """Return how many elements of an array's dtype a row of a panel has."""
    return TILE.vectors * (TILE.vector_bytes // array.itemsize)


@inlined_jit
def panels_of(columns, panel):
    """Return how many panels so many columns take."""
    return (columns + panel - 1) // panel


@inlined_jit
def tile_height(rows):
    """Return the most rows, of those left, that one tile takes."""
    for count in _ROW_COUNTS:
        if count <= rows:
            return count
    return 1


def _long_row(vectors, start, stride, num_vectors):
    """Return pointers to the vectors of a row that goes on in the panels after the first, stride apart."""
    distances = [vectors.builder.mul(stride, INTP(p)) for p in range(-(-num_vectors // TILE.vectors))]
    starts = [vectors.at(start, distance) for distance in distances]
    return [
        vectors.at(starts[v // TILE.vectors], v % TILE.vectors * vectors.width) for v in range(num_vectors)
    ]


def _add_products(vectors, sums, a, is_down, b, depth, num_vectors):
    """Write the loop that adds ``a[i, p] * b[p, j]`` for each step p to a tile of sums in registers.

    Columns behind those of a panel of b are in the panels after it, its stride apart.
    """
    builder = vectors.builder
    panel = TILE.vectors * vectors.width
    a_step = panel if is_down else 1
    num_rows = len(sums) // num_vectors
    a, a_run = a
    b, b_panel = b

    def step(a, b, sums):
        right = [vectors.load(pointer) for pointer in _long_row(vectors, b, b_panel, num_vectors)]
        left = [
            vectors.splat(builder.load(vectors.at(a, i if is_down else i * panel))) for i in range(num_rows)
        ]
        return vectors.add_outer_product(left, right, sums)

    def steps(count, state):
        return vectors.loop_by_four(count, (a_step, panel), state, step)[1:]

    def run(first, state):
        a, *_ = state
        left = builder.sub(depth, first)
        count = builder.select(builder.icmp_signed("<", left, INTP(panel)), left, INTP(panel))
        return [vectors.at(a, a_run), *steps(count, state)]

    if is_down:
        return steps(depth, [a, b, *sums])[1:]
    return vectors.loop(depth, panel, [a, b, *sums], run)[2:]


def _sums(vectors, pointers, accumulate):
    """Write what sums start from: what is at their pointers, or 0."""

    def start(adds):
        return [vectors.load(pointer) if adds else vectors.zero for pointer in pointers]

    return vectors.choose(start, (accumulate, BOTH))


# a constant for down, as it usually is, halves what there is to compile
@llvm_function(prefer_literal=True)
def multiply_panels(vectors, output, a, down, b, size, accumulate):
    """Write, or add, one tile of a product: ``output[i, j] += sum over p < depth of a[i, p] b[p, j]``.

    Rows of the output and of b are rows of a panel, one after the other. Where down is false the rows of a
    are too, and a's next panel is its stride further; where it is true a's rows are the columns of one panel.
    ``size`` is the depth, the rows, one of ``ROW_COUNTS``, and how many vectors of columns are computed.
    """
    panel = TILE.vectors * vectors.width
    (output,), (b,), (depth, rows, used) = output, b, size

    def write(num_vectors, num_rows, is_down):
        pointers = [
            vectors.at(output, i * panel + v * vectors.width)
            for i in range(num_rows)
            for v in range(num_vectors)
        ]
        sums = _sums(vectors, pointers, accumulate)
        sums = _add_products(vectors, sums, a, is_down, (b, INTP(0)), depth, num_vectors)
        for pointer, total in zip(pointers, sums, strict=True):
            vectors.store(total, pointer)
        return []

    vectors.choose(write, (used, range(1, TILE.vectors + 1)), (rows, ROW_COUNTS), (down, BOTH))


@llvm_function
def multiply_packed(vectors, output, a, down, b, size, epilogue):
    """Write one tile of a product as ``multiply_panels`` does, but to rows of any stride, with an epilogue.

    The output is a Matrix with a stride of rows, a one with a stride of panels, b (array, position), and size
    (depth, rows, cols), where the tile has cols columns, of at most a panel.
    """
    (output, output_stride), (a, a_run), (b,) = output, a, b
    depth, rows, cols = size
    used = vectors.vectors_of(cols)

    def write(num_vectors, num_rows, is_down):
        tile = vectors.tile(output, output_stride, num_rows, num_vectors, cols)
        tile.prefetch()
        sums = [vectors.zero] * (num_rows * num_vectors)
        sums = _add_products(vectors, sums, (a, a_run), is_down, (b, INTP(0)), depth, num_vectors)
        tile.write(sums, *epilogue)
        return []

    vectors.choose(write, (used, range(1, TILE.vectors + 1)), (rows, ROW_COUNTS), (down, BOTH))


@llvm_function
def multiply_row(vectors, output, a, b, size, accumulate):
    """Write, or add, one row of a product as ``multiply_panels`` does, over several panels.

    A row alone is too few sums to hide the latency of a multiply-add; here it is as many vectors long, one of
    ``LONG_ROWS``, which lie in successive panels, strides apart. ``size`` is the depth and the vectors.
    """
    depth, used = size

    def write(num_vectors):
        pointers = _long_row(vectors, *output, num_vectors)
        sums = _sums(vectors, pointers, accumulate)
        sums = _add_products(vectors, sums, a, False, b, depth, num_vectors)
        for pointer, total in zip(pointers, sums, strict=True):
            vectors.store(total, pointer)
        return []

    vectors.choose(write, (used, LONG_ROWS))


@llvm_function
def outer_product(vectors, output, a, b, rows):
    """Write rows of a panel, one after the other: ``output[i, j] = a[i] b[j]``, with b one row of a panel."""
    (output,), (a,), (b,) = output, a, b
    panel = TILE.vectors * vectors.width
    columns = [v * vectors.width for v in range(TILE.vectors)]
    right = [vectors.load(vectors.at(b, column)) for column in columns]

    def row(i, state):
        (output,) = state
        factor = vectors.splat(vectors.builder.load(vectors.at(a, i)))
        for column, y in zip(columns, right, strict=True):
            vectors.store(vectors.builder.fmul(factor, y), vectors.at(output, column))
        return [vectors.at(output, panel)]

    vectors.loop(rows, 1, [output], row)


@llvm_function
def transpose_square(vectors, source, target):
    """Write the transpose of a square block, one vector wide or of 16 x 16 bytes; the stride is of rows."""
    builder, is_bytes = vectors.builder, isinstance(vectors.element, ir.IntType)
    (source, source_stride), (target, target_stride) = source, target
    kind = ir.VectorType(vectors.element, 16 if is_bytes else vectors.width)

    def line(start, stride, i):
        return builder.bitcast(vectors.at(start, builder.mul(stride, INTP(i))), kind.as_pointer())

    rows = [builder.load(line(source, source_stride, i), align=1) for i in range(kind.count)]
    if is_bytes:
        # four rounds that interleave the rows
        lanes = [lane for i in range(16) for lane in (i, 16 + i)]
        for _ in range(4):
            pairs = [(rows[i], rows[i + 8]) for i in range(8)]
            rows = [vectors.shuffle(a, b, half) for a, b in pairs for half in (lanes[:16], lanes[16:])]
    else:
        rows = vectors.transpose(rows)
    for i, row in enumerate(rows):
        builder.store(row, line(target, target_stride, i), align=1)


@llvm_function
def pack_panel(vectors, source, mask_source, is_masked, target, size):
    """Copy lines of a matrix, cols columns of each, to the rows of a panel, and 0 to the columns behind.

    Where is_masked is true, 0 is written for each number for which mask_source, a matrix of the same stride,
    is 0 or less. The source is a Matrix with a stride of lines, mask_source and target are (array, position),
    and size is (lines, cols).
    """
    builder = vectors.builder
    (source, stride), (mask_source,), (target,) = source, mask_source, target
    lines, cols = size
    panel = TILE.vectors * vectors.width

    def write(is_whole, is_masked):
        columns = [v * vectors.width for v in range(TILE.vectors)]
        masks = [None if is_whole else vectors.first(builder.sub(cols, INTP(c))) for c in columns]

        def line(_, state):
            source, mask_source, target = state
            for column, mask in zip(columns, masks, strict=True):
                value = vectors.load(vectors.at(source, column), mask)
                if is_masked:
                    value = vectors.masked(vectors.load(vectors.at(mask_source, column), mask), value)
                vectors.store(value, vectors.at(target, column))
            return [vectors.at(source, stride), vectors.at(mask_source, stride), vectors.at(target, panel)]

        vectors.loop(lines, 1, [source, mask_source, target], line)
        return []

    whole = builder.icmp_signed("==", cols, INTP(panel))
    vectors.choose(write, (whole, BOTH), (is_masked, BOTH))


@llvm_function
def multiply_nonzero(vectors, output, values, masks, b, size):
    """Add to rows of a product: ``output[i, j] += sum over the bits p of masks[i] of values[i, p] b[p, j]``.

    For each row, ``masks`` has a word of WORD bits, and values, which may be uint8, WORD numbers. Rows of the
    output and of b are rows of a panel; they are as many vectors long, one of ``LONG_ROWS``, which lie in
    successive panels, strides apart. ``size`` is the rows and the vectors.
    """
    builder = vectors.builder
    (output, output_panel), (values,), (masks,), (b, b_panel), (rows, used) = output, values, masks, b, size
    panel = TILE.vectors * vectors.width

    def write(num_vectors):
        def row(n, _):
            bits = builder.load(builder.gep(masks, [n]))
            row_values = builder.gep(values, [builder.mul(n, INTP(WORD))])
            at = builder.mul(n, INTP(panel))
            pointers = _long_row(vectors, vectors.at(output, at), output_panel, num_vectors)
            first, inside, last, after = (
                builder.append_basic_block(name) for name in ("first", "bit", "last", "after")
            )
            builder.cbranch(builder.icmp_signed("!=", bits, bits.type(0)), first, after)
            builder.position_at_end(first)
            loaded = [vectors.load(pointer) for pointer in pointers]
            builder.branch(inside)
            builder.position_at_end(inside)
            left = builder.phi(bits.type)
            sums = [builder.phi(vectors.type) for _ in pointers]
            for phi, value in zip([left, *sums], [bits, *loaded], strict=True):
                phi.add_incoming(value, first)
            position = vectors.call("cttz.i64", bits.type, left, _BIT(1))
            rest = builder.and_(left, builder.sub(left, bits.type(1)))
            value = builder.load(builder.gep(row_values, [position]))
            if isinstance(value.type, ir.IntType):
                value = builder.sitofp(builder.zext(value, _INT32), vectors.element)
            factor = vectors.splat(value)
            at = builder.mul(position, INTP(panel))
            b_row = _long_row(vectors, vectors.at(b, at), b_panel, num_vectors)
            added = [
                vectors.multiply_add(factor, vectors.load(pointer), total)
                for pointer, total in zip(b_row, sums, strict=True)
            ]
            for phi, value in zip([left, *sums], [rest, *added], strict=True):
                phi.add_incoming(value, builder.block)
            builder.cbranch(builder.icmp_signed("!=", rest, bits.type(0)), inside, last)
            builder.position_at_end(last)
            for pointer, total in zip(pointers, added, strict=True):
                vectors.store(total, pointer)
            builder.branch(after)
            builder.position_at_end(after)
            return []

        vectors.loop(rows, 1, [], row)
        return []

    vectors.choose(write, (used, LONG_ROWS))


@llvm_function
def dot_panels(vectors, output, a, b, size):
    """Write ``output[i, j] = sum over p of a[i, p] b[j, p]``, for few rows i and columns j.

    Rows are rows of a panel in all three; p runs along the rows of so many panels, strides apart. ``size`` is
    the panels, the rows, 1 or TILE.dot_rows, and the columns, up to TILE.dot_cols.
    """
    (output,), (a, a_panel), (b, b_panel), (panels, rows, cols) = output, a, b, size
    panel = TILE.vectors * vectors.width

    def write(num_rows, num_cols):
        def step(_, state):
            a, b, *sums = state
            for v in range(TILE.vectors):
                right = [vectors.load(vectors.at(b, j * panel + v * vectors.width)) for j in range(num_cols)]
                left = [vectors.load(vectors.at(a, i * panel + v * vectors.width)) for i in range(num_rows)]
                sums = vectors.add_outer_product(left, right, sums)
            return [vectors.at(a, a_panel), vectors.at(b, b_panel), *sums]

        _, _, *sums = vectors.loop(panels, 1, [a, b, *[vectors.zero] * (num_rows * num_cols)], step)
        for i in range(num_rows):
            row = vectors.sum_lanes(sums[i * num_cols : (i + 1) * num_cols])
            vectors.store(vectors.shuffle(row, row, range(num_cols)), vectors.at(output, i * panel))
        return []

    vectors.choose(write, (rows, sorted({1, TILE.dot_rows})), (cols, range(1, TILE.dot_cols + 1)))


@intrinsic
def mask_of_nonzero(typing_context, values, at, count):
    """Return 64 bits, of which bit i says that ``values[at + i]`` isn't 0, for ``i < count <= 64``.

    NaN isn't 0. All 64 values are read.
    """

    def generate(context, builder, signature, arguments):
        kind = context.get_value_type(values.dtype)
        start = pointer_to(context, builder, values, *arguments[:2])
        is_integer = isinstance(kind, ir.IntType)
        lanes = WORD if is_integer else 8
        parts = []
        for first in range(0, WORD, lanes):
            vector = ir.VectorType(kind, lanes)
            pointer = builder.bitcast(builder.gep(start, [INTP(first)]), vector.as_pointer())
            loaded = builder.load(pointer, align=1)
            zero = ir.Constant(vector, [0 if is_integer else 0.0] * lanes)
            compare = builder.icmp_unsigned if is_integer else builder.fcmp_unordered
            bits = builder.bitcast(compare("!=", loaded, zero), ir.IntType(lanes))
            parts.append(builder.shl(builder.zext(bits, _INT64), _INT64(first)) if lanes < WORD else bits)
        word = parts[0]
        for part in parts[1:]:
            word = builder.or_(word, part)
        missing = builder.sub(_INT64(WORD), arguments[2])
        return builder.lshr(builder.shl(word, missing), missing)

    return types.int64(values, types.intp, types.intp), generate


def _copy(source, target, width, *others):
    """Return the signature and the code generator of a copy of some numbers to the target's type."""

    def generate(context, builder, signature, arguments):
        pointers = []
        for array, *place in ((source, *arguments[:2]), (target, *arguments[2:4])):
            kind = ir.VectorType(context.get_value_type(array.dtype), width)
            pointers.append(builder.bitcast(pointer_to(context, builder, array, *place), kind.as_pointer()))
        value = builder.load(pointers[0], align=1)
        if source.dtype != target.dtype:
            value = builder.uitofp(value, pointers[1].type.pointee)
        builder.store(value, pointers[1], align=1)
        return context.get_dummy_value()

    return types.void(source, types.intp, target, types.intp, *others), generate


@intrinsic
def copy_word(typing_context, source, source_at, target, target_at):
    """Copy WORD numbers."""
    return _copy(source, target, WORD)


@intrinsic
def copy_panel(typing_context, source, source_at, target, target_at, like):
    """Copy one row of a panel, as wide as the dtype of like makes it, to numbers of the target's type."""
    return _copy(source, target, TILE.vectors * (TILE.vector_bytes // (like.dtype.bitwidth // 8)), like)


@intrinsic
def prefetch(typing_context, array, at):
    """Prefetch the cache line of one element, which is soon to be read."""

    def generate(context, builder, signature, arguments):
        write_prefetch(builder, pointer_to(context, builder, array, *arguments))
        return context.get_dummy_value()

    return types.void(array, types.intp), generate
