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

from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastdl.kernels.cpu.intrinsics import INTP, ROW_COUNTS, TILE, call_of, write_prefetch
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
        factors = [(x, y) for x in left for y in right]
        return [vectors.multiply_add(x, y, total) for (x, y), total in zip(factors, sums, strict=True)]

    def steps(count, a, b, sums):
        def one(_, state):
            a, b, *sums = state
            return [vectors.at(a, a_step), vectors.at(b, panel), *step(a, b, sums)]

        def four(_, state):
            a, b, *sums = state
            for p in range(4):
                sums = step(vectors.at(a, p * a_step), vectors.at(b, p * panel), sums)
            return [vectors.at(a, 4 * a_step), vectors.at(b, 4 * panel), *sums]

        fours = builder.and_(count, INTP(-4))
        a, b, *sums = vectors.loop(fours, 4, [a, b, *sums], four)
        a, b, *sums = vectors.loop(builder.sub(count, fours), 1, [a, b, *sums], one)
        return b, sums

    def run(first, state):
        a, b, *sums = state
        left = builder.sub(depth, first)
        count = builder.select(builder.icmp_signed("<", left, INTP(panel)), left, INTP(panel))
        b, sums = steps(count, a, b, sums)
        return [vectors.at(a, a_run), b, *sums]

    if is_down:
        return steps(depth, a, b, sums)[1]
    return vectors.loop(depth, panel, [a, b, *sums], run)[2:]


def _choose_tile(vectors, used, rows, down, ways, write):
    """Write ``write(num_vectors, num_rows, is_down)`` for each shape that a tile may have, and way of a."""

    def write_rows(num_vectors):
        return vectors.choose(
            rows,
            ROW_COUNTS,
            lambda num_rows: vectors.choose(
                down, ways, lambda is_down: write(num_vectors, num_rows, is_down)
            ),
        )

    vectors.choose(used, range(1, TILE.vectors + 1), write_rows)


def _sums(vectors, pointers, accumulate):
    """Write what sums start from: what is at their pointers, or 0."""
    return vectors.choose(
        accumulate,
        [False, True],
        lambda added: [vectors.load(pointer) if added else vectors.zero for pointer in pointers],
    )


def _multiply_panels(vectors, output, a, down, b, size, accumulate, *, ways=(False, True)):
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

    _choose_tile(vectors, used, rows, down, ways, write)


def _multiply_panels_along(*arguments):
    _multiply_panels(*arguments, ways=[False])


def _multiply_panels_down(*arguments):
    _multiply_panels(*arguments, ways=[True])


def _multiply_packed(vectors, output, a, down, b, size, epilogue):
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

    _choose_tile(vectors, used, rows, down, [False, True], write)


def _multiply_row(vectors, output, a, b, size, accumulate):
    depth, used = size

    def write(num_vectors):
        pointers = _long_row(vectors, *output, num_vectors)
        sums = _sums(vectors, pointers, accumulate)
        sums = _add_products(vectors, sums, a, False, b, depth, num_vectors)
        for pointer, total in zip(pointers, sums, strict=True):
            vectors.store(total, pointer)
        return []

    vectors.choose(used, LONG_ROWS, write)


def _outer_product(vectors, output, a, b, rows):
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


def _transpose_square(vectors, source, target):
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


def _pack_panel(vectors, source, mask_source, is_masked, target, size):
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
    vectors.choose(
        whole,
        [False, True],
        lambda is_whole: vectors.choose(is_masked, [False, True], lambda masked: write(is_whole, masked)),
    )


def _multiply_nonzero(vectors, output, values, masks, b, size):
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

    vectors.choose(used, LONG_ROWS, write)


def _dot_panels(vectors, output, a, b, size):
    (output,), (a, a_panel), (b, b_panel), (panels, rows, cols) = output, a, b, size
    panel = TILE.vectors * vectors.width

    def write(num_rows, num_cols):
        def step(_, state):
            a, b, *sums = state
            for v in range(TILE.vectors):
                right = [vectors.load(vectors.at(b, j * panel + v * vectors.width)) for j in range(num_cols)]
                left = [vectors.load(vectors.at(a, i * panel + v * vectors.width)) for i in range(num_rows)]
                factors = [(x, y) for x in left for y in right]
                sums = [
                    vectors.multiply_add(x, y, total) for (x, y), total in zip(factors, sums, strict=True)
                ]
            return [vectors.at(a, a_panel), vectors.at(b, b_panel), *sums]

        _, _, *sums = vectors.loop(panels, 1, [a, b, *[vectors.zero] * (num_rows * num_cols)], step)
        for i in range(num_rows):
            row = vectors.sum_lanes(sums[i * num_cols : (i + 1) * num_cols])
            vectors.store(vectors.shuffle(row, row, range(num_cols)), vectors.at(output, i * panel))
        return []

    def write_cols(num_rows):
        return vectors.choose(cols, range(1, TILE.dot_cols + 1), lambda num_cols: write(num_rows, num_cols))

    vectors.choose(rows, sorted({1, TILE.dot_rows}), write_cols)


@intrinsic(prefer_literal=True)
def multiply_panels(typing_context, output, a, down, b, size, accumulate):
    """Write, or add, one tile of a product: ``output[i, j] += sum over p < depth of a[i, p] b[p, j]``.

    Rows of the output and of b are rows of a panel, one after the other. Where down is false the rows of a
    are too, and a's next panel is its stride further; where it is true a's rows are the columns of one panel.
    ``size`` is the depth, the rows, one of ``ROW_COUNTS``, and how many vectors of columns are computed.
    """
    # a constant, as it usually is, halves what there is to compile
    write: Callable[..., None] = _multiply_panels
    if isinstance(down, types.BooleanLiteral):
        write = _multiply_panels_down if down.literal_value else _multiply_panels_along
    return call_of(write, output, a, down, b, size, accumulate)


@intrinsic
def multiply_row(typing_context, output, a, b, size, accumulate):
    """Write, or add, one row of a product as ``multiply_panels`` does, over several panels.

    A row alone is too few sums to hide the latency of a multiply-add; here it is as many vectors long, one of
    ``LONG_ROWS``, which lie in successive panels, strides apart. ``size`` is the depth and the vectors.
    """
    return call_of(_multiply_row, output, a, b, size, accumulate)


@intrinsic
def outer_product(typing_context, output, a, b, rows):
    """Write rows of a panel, one after the other: ``output[i, j] = a[i] b[j]``, with b one row of a panel."""
    return call_of(_outer_product, output, a, b, rows)


@intrinsic
def multiply_packed(typing_context, output, a, down, b, size, epilogue):
    """Write one tile of a product as ``multiply_panels`` does, but to rows of any stride, with an epilogue.

    The output is a Matrix with a stride of rows, a one with a stride of panels, b (array, position), and size
    (depth, rows, cols), where the tile has cols columns, of at most a panel.
    """
    return call_of(_multiply_packed, output, a, down, b, size, epilogue)


@intrinsic
def pack_panel(typing_context, source, mask_source, is_masked, target, size):
    """Copy lines of a matrix, cols columns of each, to the rows of a panel, and 0 to the columns behind.

    Where is_masked is true, 0 is written for each number for which mask_source, a matrix of the same stride,
    is 0 or less. The source is a Matrix with a stride of lines, mask_source and target are (array, position),
    and size is (lines, cols).
    """
    return call_of(_pack_panel, source, mask_source, is_masked, target, size)


@intrinsic
def multiply_nonzero(typing_context, output, values, masks, b, size):
    """Add to rows of a product: ``output[i, j] += sum over the bits p of masks[i] of values[i, p] b[p, j]``.

    For each row, ``masks`` has a word of WORD bits, and values, which may be uint8, WORD numbers. Rows of the
    output and of b are rows of a panel; they are as many vectors long, one of ``LONG_ROWS``, which lie in
    successive panels, strides apart. ``size`` is the rows and the vectors.
    """
    return call_of(_multiply_nonzero, output, values, masks, b, size)


@intrinsic
def dot_panels(typing_context, output, a, b, size):
    """Write ``output[i, j] = sum over p of a[i, p] b[j, p]``, for few rows i and columns j.

    Rows are rows of a panel in all three; p runs along the rows of so many panels, strides apart. ``size`` is
    the panels, the rows, 1 or TILE.dot_rows, and the columns, up to TILE.dot_cols.
    """
    return call_of(_dot_panels, output, a, b, size)


@intrinsic
def mask_of_nonzero(typing_context, values, at, count):
    """Return 64 bits, of which bit i says that ``values[at + i]`` isn't 0, for ``i < count <= 64``.

    NaN isn't 0. All 64 values are read.
    """
    element = values.dtype

    def generate(context, builder, signature, arguments):
        data = context.make_array(values)(context, builder, arguments[0]).data
        kind = context.get_value_type(element)
        start = builder.gep(data, [arguments[1]])
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


@intrinsic
def transpose_square(typing_context, source, target):
    """Write the transpose of a square block, one vector wide or of 16 x 16 bytes; the stride is of rows."""
    return call_of(_transpose_square, source, target)


@intrinsic
def copy_word(typing_context, source, source_at, target, target_at):
    """Copy WORD numbers."""

    def generate(context, builder, signature, arguments):
        kind = ir.VectorType(context.get_value_type(source.dtype), WORD).as_pointer()
        places = []
        for array, values, at in ((source, *arguments[:2]), (target, *arguments[2:])):
            data = context.make_array(array)(context, builder, values).data
            places.append(builder.bitcast(builder.gep(data, [at]), kind))
        builder.store(builder.load(places[0], align=1), places[1], align=1)
        return context.get_dummy_value()

    return types.void(source, types.intp, target, types.intp), generate


@intrinsic
def copy_panel(typing_context, source, source_at, target, target_at, like):
    """Copy one row of a panel, as wide as the dtype of like makes it, to numbers of the target's type."""

    def generate(context, builder, signature, arguments):
        width = TILE.vectors * (TILE.vector_bytes // (like.dtype.bitwidth // 8))
        pointers = []
        for array, values, at in ((source, *arguments[:2]), (target, *arguments[2:4])):
            data = context.make_array(array)(context, builder, values).data
            kind = ir.VectorType(context.get_value_type(array.dtype), width)
            pointers.append(builder.bitcast(builder.gep(data, [at]), kind.as_pointer()))
        value = builder.load(pointers[0], align=1)
        if source.dtype != target.dtype:
            value = builder.uitofp(value, pointers[1].type.pointee)
        builder.store(value, pointers[1], align=1)
        return context.get_dummy_value()

    return types.void(source, types.intp, target, types.intp, like), generate


@intrinsic
def prefetch(typing_context, array, at):
    """Prefetch the cache line of one element, which is soon to be read."""

    def generate(context, builder, signature, arguments):
        data = context.make_array(array)(context, builder, arguments[0]).data
        pointer = builder.gep(data, [arguments[1]])
        write_prefetch(builder, pointer)
        return context.get_dummy_value()

    return types.void(array, types.intp), generate
