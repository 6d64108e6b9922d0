"""The register tiles that the matrix product is built of, as functions that a kernel can call.

Numba vectorises plain loops, but it can't be told to keep a tile of sums in registers. An intrinsic can: it
writes LLVM's own language, in which ``<16 x float>`` is a type like any other, and LLVM lowers that to what
the CPU has. The code is generic in the element type and in the vector width.

An array argument is followed by the position of its first element that counts, in elements from the array's
start; strides are in elements too. Nothing here checks a bound.
"""

from __future__ import annotations

import os
from functools import partial, wraps
from itertools import islice
from typing import Any, NamedTuple

from llvmlite import binding, ir
from numba import config, types
from numba.extending import intrinsic

from fastdl.kernels.numba_private import cgutils


class Tile(NamedTuple):
    """The shapes of the register tiles for one width of vectors."""

    vector_bytes: int
    rows: int
    vectors: int
    dot_rows: int
    dot_cols: int


# A tile's sums, the vectors that multiply them and one spare must fit in the registers: AVX-512 has 32,
# AVX2 and plain x86-64 have 16.
_TILES = {512: Tile(64, 14, 2, 4, 5), 256: Tile(32, 6, 2, 2, 5), 128: Tile(16, 4, 2, 2, 4)}


def cpu_features() -> set[str]:
    """Return LLVM's names of what the CPU that Numba compiles for can do."""
    if config.CPU_NAME == "generic":
        return set()
    if config.CPU_FEATURES is None:
        return {name for name, present in binding.get_host_cpu_features().items() if present}
    return {name[1:] for name in config.CPU_FEATURES.split(",") if name.startswith("+")}


def _vector_bits():
    forced = os.environ.get("FASTDL_VECTOR_BITS")
    if forced:
        if forced not in map(str, _TILES):
            raise ValueError(f"FASTDL_VECTOR_BITS is {forced!r}; it must be one of 512, 256 and 128.")
        return int(forced)
    features = cpu_features()
    if "avx512f" in features:
        return 512
    return 256 if {"avx2", "fma"} <= features else 128


TILE = _TILES[_vector_bits()]


class Matrix(NamedTuple):
    """A matrix in an array, as a kernel is told of it; positions are in elements.

    An intrinsic takes one in the place of three arguments. What the stride lies between (rows, panels), the
    intrinsic says.
    """

    storage: Any
    offset: int
    stride: int


class Epilogue(NamedTuple):
    """What becomes of a tile's sums: they are added to what ``start`` says, then ReLU follows or doesn't.

    ``bias`` is the array of all columns' biases, ``column`` the tile's first one.
    """

    bias: Any
    column: int
    start: int
    relu: bool


# how many rows a tile may have; a remainder is made of several
ROW_COUNTS = sorted({TILE.rows, *(rows for rows in (8, 4, 2, 1) if rows < TILE.rows)}, reverse=True)

# how many vectors of column sums are kept at a time: enough to hide the latency of an addition
SUM_VECTORS = 4

# how many rows of b are added to a row of the product at a time: L1 has 8 ways, and rows may be 4 KB apart
ROW_DEPTH = 8

# what the sums of a tile are added to
FROM_ZERO, FROM_BIAS, FROM_OUTPUT = range(3)
# the cases of a condition
BOTH = [False, True]

_INT32 = ir.IntType(32)
INTP = ir.IntType(types.intp.bitwidth)
_BOOL = ir.IntType(1)


def write_prefetch(builder, pointer):
    """Write the instruction that prefetches the cache line of an element, which is soon to be read."""
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, _INT32, _INT32, _INT32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [pointer, _INT32(0), _INT32(3), _INT32(1)])


class Vectors:
    """Writes instructions on vectors of one element type, as wide as the CPU's or of a given width."""

    def __init__(self, builder, element, width=None):
        self.builder = builder
        self.element = element
        self.align = 4 if isinstance(element, ir.FloatType) else 8
        self.width = width or TILE.vector_bytes // self.align
        self.name = f"v{self.width}f{8 * self.align}"
        self.type = ir.VectorType(element, self.width)
        self.zero = ir.Constant(self.type, [0.0] * self.width)

    def call(self, name, result, *arguments):
        """Call one of LLVM's own functions."""
        signature = ir.FunctionType(result, [argument.type for argument in arguments])
        function = cgutils.get_or_insert_function(self.builder.module, signature, f"llvm.{name}")
        return self.builder.call(function, arguments)

    def shuffle(self, a, b, lanes):
        """Return chosen lanes of two vectors."""
        lanes = list(lanes)
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INT32, len(lanes)), lanes))

    def splat(self, value, width=None):
        """Return a vector with one value in every lane."""
        width = width or self.width
        vector = ir.Constant(ir.VectorType(value.type, width), ir.Undefined)
        vector = self.builder.insert_element(vector, value, _INT32(0))
        return self.shuffle(vector, vector, [0] * width)

    def first(self, count):
        """Return the mask of the first count lanes."""
        lanes = ir.Constant(ir.VectorType(INTP, self.width), list(range(self.width)))
        return self.builder.icmp_signed("<", lanes, self.splat(count))

    def at(self, pointer, position):
        """Return the pointer to an element further on."""
        position = position if isinstance(position, ir.Value) else INTP(position)
        return self.builder.gep(pointer, [position])

    def load(self, pointer, mask=None, width=None):
        """Return a vector from memory, of bytes too; 0 where the mask is false."""
        if isinstance(pointer.type.pointee, ir.IntType):
            kind = ir.VectorType(pointer.type.pointee, self.width)
            value = self.builder.load(self.builder.bitcast(pointer, kind.as_pointer()), align=1)
            return self.builder.uitofp(value, self.type)
        kind = ir.VectorType(self.element, width or self.width)
        pointer = self.builder.bitcast(pointer, kind.as_pointer())
        if mask is None:
            return self.builder.load(pointer, align=self.align)
        return self.call(f"masked.load.{self.name}.p0", kind, pointer, _INT32(self.align), mask, self.zero)

    def store(self, value, pointer, mask=None):
        """Write a vector to memory, where the mask is true."""
        pointer = self.builder.bitcast(pointer, value.type.as_pointer())
        if mask is None:
            self.builder.store(value, pointer, align=self.align)
        else:
            name = f"masked.store.{self.name}.p0"
            self.call(name, ir.VoidType(), value, pointer, _INT32(self.align), mask)

    def load_start(self, start, bias, output, mask=None, width=None):
        """Return what a sum starts from; where that is 0 the output is read in vain, without a branch."""
        builder = self.builder
        from_bias = builder.icmp_signed("==", start, INTP(FROM_BIAS))
        value = self.load(builder.select(from_bias, bias, output), mask, width)
        from_zero = builder.icmp_signed("==", start, INTP(FROM_ZERO))
        return builder.select(from_zero, ir.Constant(value.type, [0.0] * value.type.count), value)

    def multiply_add(self, a, b, c):
        """Return ``a * b + c``, rounded once where the CPU can."""
        # fmuladd is one instruction where the CPU has it; llvm.fma would call a library where it hasn't
        return self.call(f"fmuladd.{self.name}", self.type, a, b, c)

    def add_outer_product(self, left, right, sums):
        """Return the sums, row by row, plus each product of a vector of the left and one of the right."""
        pairs = [(x, y) for x in left for y in right]
        return [self.multiply_add(x, y, total) for (x, y), total in zip(pairs, sums, strict=True)]

    def relu(self, value, relu):
        """Return max(value, 0) where relu is true; NaN and -0.0 stay what they are, as in torch."""
        low, zero = ir.Constant(self.element, float("-inf")), ir.Constant(self.element, 0.0)
        bound = self.splat(self.builder.select(relu, zero, low), value.type.count)
        return self.builder.select(self.builder.fcmp_ordered("<", value, bound), bound, value)

    def masked(self, mask_source, value):
        """Return the value, and 0 where the ReLU whose output is mask_source gave 0."""
        return self.builder.select(self.builder.fcmp_ordered("<=", mask_source, self.zero), self.zero, value)

    def loop(self, stop, step, values, body):
        """Write ``for i in range(0, stop, step): values = body(i, values)`` and return the values."""
        builder = self.builder
        before = builder.block
        head, inside, after = (builder.append_basic_block(name) for name in ("head", "inside", "after"))
        builder.branch(head)
        builder.position_at_end(head)
        index = builder.phi(INTP)
        phis = [builder.phi(value.type) for value in values]
        for phi, value in zip([index, *phis], [INTP(0), *values], strict=True):
            phi.add_incoming(value, before)
        builder.cbranch(builder.icmp_signed("<", index, stop), inside, after)
        builder.position_at_end(inside)
        values = body(index, phis)
        for phi, value in zip([index, *phis], [builder.add(index, INTP(step)), *values], strict=True):
            phi.add_incoming(value, builder.block)
        builder.branch(head)
        builder.position_at_end(after)
        return phis

    def loop_by_four(self, count, steps, state, body):
        """Write count rounds of ``values = body(*pointers, values)``, four at a time; return the state.

        The state is the pointers, each of which goes its step further after a round, and then the values.
        """

        def rounds(number, state):
            pointers, values = state[: len(steps)], state[len(steps) :]
            for i in range(number):
                values = body(*map(self.at, pointers, [i * step for step in steps]), values)
            return [*map(self.at, pointers, [number * step for step in steps]), *values]

        fours = self.builder.and_(count, INTP(-4))
        state = self.loop(fours, 4, state, lambda _, state: rounds(4, state))
        return self.loop(self.builder.sub(count, fours), 1, state, lambda _, state: rounds(1, state))

    def choose(self, write, *choices):
        """Write a branch ``write(*cases)`` for all cases of some choices, each a value and what it may be.

        Of a constant there is one case. Returns the values that the branches return, merged.
        """
        if not choices:
            return write()
        (value, cases), *others = choices
        if isinstance(value, ir.Constant):
            return self.choose(partial(write, value.constant), *others)
        builder = self.builder
        after = builder.append_basic_block("chosen")
        blocks = [builder.append_basic_block(f"case_{case}") for case in cases]
        switch = builder.switch(builder.zext(value, INTP) if value.type == _BOOL else value, blocks[0])
        ends = []
        for case, block in zip(cases, blocks, strict=True):
            switch.add_case(INTP(int(case)), block)
            builder.position_at_end(block)
            results = self.choose(partial(write, case), *others)
            ends.append((builder.block, results))
            builder.branch(after)
        builder.position_at_end(after)
        merged = [builder.phi(result.type) for result in ends[0][1]]
        for block, results in ends:
            for phi, result in zip(merged, results, strict=True):
                phi.add_incoming(result, block)
        return merged

    def vectors_of(self, count):
        """Return how many vectors hold so many elements."""
        return self.builder.sdiv(self.builder.add(count, INTP(self.width - 1)), INTP(self.width))

    def tile(self, output, stride, num_rows, num_vectors, cols):
        """Return a tile of a matrix, cols columns of which are in the matrix."""
        return _TileOf(self, output, stride, num_rows, num_vectors, cols)

    def sum_lanes(self, values):
        """Return one short vector whose lane i is the sum of the lanes of ``values[i]``.

        Each round adds the halves of two vectors into one, so n vectors cost about 2 n shuffles in all, not
        n log2(width).
        """
        count = 1 << (len(values) - 1).bit_length()
        values = [*values, *[self.zero] * (count - len(values))]
        part = self.width
        while part > 1:
            half = part // 2
            if len(values) == 1:
                pairs = [(values[0], values[0])]
                length = values[0].type.count
            else:
                pairs = list(zip(values[::2], values[1::2], strict=True))
                length = 2 * self.width
            low = [i for start in range(0, length, part) for i in range(start, start + half)]
            high = [i + half for i in low]
            values = [self.builder.fadd(self.shuffle(a, b, low), self.shuffle(a, b, high)) for a, b in pairs]
            part = half
        while len(values) > 1:
            lanes = range(2 * values[0].type.count)
            values = [self.shuffle(a, b, lanes) for a, b in zip(values[::2], values[1::2], strict=True)]
        return values[0]

    def transpose(self, rows):
        """Return the columns of a square block, in log2(width) rounds of shuffles."""
        width = self.width
        step = width // 2
        while step:
            low = [width + lane - step if lane & step else lane for lane in range(width)]
            high = [width + lane if lane & step else lane + step for lane in range(width)]
            swapped = list(rows)
            for i in range(width):
                if not i & step:
                    a, b = rows[i], rows[i + step]
                    swapped[i], swapped[i + step] = self.shuffle(a, b, low), self.shuffle(a, b, high)
            rows = swapped
            step //= 2
        return rows


class _TileOf:
    """A tile of a matrix in memory, whose last vectors may reach over the matrix's edge."""

    def __init__(self, vectors, output, stride, num_rows, num_vectors, cols):
        builder = vectors.builder
        self._vectors = vectors
        self._num_rows = num_rows
        self._columns = [v * vectors.width for v in range(num_vectors)]
        self._whole = builder.icmp_signed("==", cols, INTP(num_vectors * vectors.width))
        self._cols = cols
        rows = [vectors.at(output, builder.mul(stride, INTP(i))) for i in range(num_rows)]
        self._pointers = [vectors.at(row, column) for row in rows for column in self._columns]

    def choose(self, write):
        """Write ``write(masks)``, the masks of the vectors in a row: None each where the tile is whole.

        A mask takes a register, and with AVX2 a masked store takes as long as twenty stores.
        """
        vectors = self._vectors

        def case(is_whole):
            if is_whole:
                return write([None] * len(self._columns))
            return write([vectors.first(vectors.builder.sub(self._cols, INTP(c))) for c in self._columns])

        return vectors.choose(case, (self._whole, BOTH))

    def prefetch(self):
        """Prefetch the tile's cache lines, which are read and written when its sums are done."""
        for pointer in self._pointers[:: len(self._columns)]:
            write_prefetch(self._vectors.builder, pointer)

    def write(self, sums, bias, start, relu):
        """Write the sums, added to what ``start`` says, with ReLU where relu is true."""
        vectors = self._vectors
        biases = [vectors.at(bias, column) for column in self._columns]

        def case(kind, masks):
            masks = self._num_rows * masks
            if kind == FROM_OUTPUT:
                added = list(map(vectors.load, self._pointers, masks))
            elif kind == FROM_BIAS:
                added = self._num_rows * list(map(vectors.load, biases, masks))
            if kind == FROM_ZERO:
                totals = sums
            else:
                totals = [vectors.builder.fadd(*pair) for pair in zip(added, sums, strict=True)]
            for total, pointer, mask in zip(totals, self._pointers, masks, strict=True):
                vectors.store(vectors.relu(total, relu), pointer, mask)
            return []

        starts = [FROM_ZERO, FROM_BIAS, FROM_OUTPUT]
        vectors.choose(lambda kind: self.choose(partial(case, kind)), (start, starts))


def _argument_type(kind):
    """Return the type that an intrinsic takes for an argument: its own for arrays, tuples and constants."""
    if isinstance(kind, types.Array | types.BaseTuple | types.BooleanLiteral):
        return kind
    return types.boolean if isinstance(types.unliteral(kind), types.Boolean) else types.intp


def _flattened(context, builder, kinds, values):
    """Return types and values with those of tuples' members in the tuples' places."""
    flat = []
    for kind, value in zip(kinds, values, strict=True):
        if isinstance(kind, types.BaseTuple):
            members = cgutils.unpack_tuple(builder, value, len(kind))
            flat += _flattened(context, builder, kind.types, members)
        else:
            target = _argument_type(kind)
            flat.append((target, context.cast(builder, value, kind, target)))
    return flat


def _num_values(kind):
    """Return how many values a function gets for an argument; an array and its position are one."""
    if isinstance(kind, types.BaseTuple):
        return sum(map(_num_values, kind.types))
    return 0 if isinstance(kind, types.Array) else 1


def _grouped(kinds, values):
    """Return the values with those of a tuple's members as a tuple."""
    values = iter(values)
    groups = [(kind, tuple(islice(values, _num_values(kind)))) for kind in kinds]
    return [group if isinstance(kind, types.BaseTuple) else group[0] for kind, group in groups if group]


def pointer_to(context, builder, kind, array, position):
    """Return the pointer to an element of an array of this type."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [position])


def llvm_function(write=None, *, prefer_literal=False):
    """Make an intrinsic that calls the LLVM function whose instructions ``write`` writes.

    That gets Vectors, and a pointer for each array and the position behind it; for a tuple, such as a Matrix,
    a tuple of these. Where literals are preferred, a bool that is one is an ir.Constant.
    """
    if write is None:
        return lambda write: llvm_function(write, prefer_literal=prefer_literal)
    call = wraps(write)(lambda typing_context, *kinds: _call_of(write, *kinds))
    return intrinsic(prefer_literal=prefer_literal)(call)


def _call_of(write, *kinds):
    """Return the signature and the code generator of a call of the function that write writes."""
    argument_types = [_argument_type(kind) for kind in kinds]

    def generate(context, builder, signature, values):
        arguments: list[Any] = []
        constants = {}
        pairs = iter(_flattened(context, builder, signature.args, values))
        arrays = []
        for kind, value in pairs:
            if isinstance(kind, types.Array):
                arrays.append(kind)
                _, position = next(pairs)
                value = pointer_to(context, builder, kind, value, position)
            elif isinstance(kind, types.BooleanLiteral):
                constants[len(arguments)] = _BOOL(kind.literal_value)
            arguments.append(value)
        element = context.get_value_type(arrays[0].dtype)
        names = [str(value.type.pointee) for value in arguments if value.type.is_pointer]
        names += [str(constant.constant) for constant in constants.values()]
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments]),
            f"fastdl.{write.__name__}.{'.'.join(names)}",
        )
        if function.is_declaration:
            function.linkage = "internal"
            # inlined into its caller, a tile of many cases takes LLVM several times as long
            function.attributes.add("noinline")
            inner = ir.IRBuilder(function.append_basic_block("entry"))
            values = [constants.get(index, argument) for index, argument in enumerate(function.args)]
            write(Vectors(inner, element), *_grouped(argument_types, values))
            inner.ret_void()
        builder.call(function, arguments)
        return context.get_dummy_value()

    return types.void(*argument_types), generate


@llvm_function
def multiply_tile(vectors, output, a, b, size, epilogue):
    """Write one tile of a product, held in registers from the first of its terms to the last.

    ``output[i, j] = sum over p < depth of a[i, p] * b[p, j]`` for ``i < rows``, one of ``ROW_COUNTS``, and
    ``j < cols`` of at most ``TILE.vectors`` vectors; then the epilogue. Elements of b are next to each other
    in j. Each step loads ``TILE.vectors`` vectors and ``rows`` single elements for ``rows * TILE.vectors``
    multiply-adds. Output and b are a Matrix with a stride of rows, a is (array, position, stride of rows,
    stride of steps), and size is (depth, rows, cols).
    """
    builder = vectors.builder
    (output, output_stride), (a, a_row_stride, a_step), (b, b_step) = output, a, b
    depth, rows, cols = size

    def write(num_vectors, num_rows):
        tile = vectors.tile(output, output_stride, num_rows, num_vectors, cols)
        a_offsets = [builder.mul(a_row_stride, INTP(i)) for i in range(num_rows)]

        def products(masks):
            def step(_, state):
                a, b, *sums = state
                right = [vectors.load(vectors.at(b, v * vectors.width), mask) for v, mask in enumerate(masks)]
                left = [vectors.splat(builder.load(vectors.at(a, offset))) for offset in a_offsets]
                sums = vectors.add_outer_product(left, right, sums)
                return [vectors.at(a, a_step), vectors.at(b, b_step), *sums]

            return vectors.loop(depth, 1, [a, b, *[vectors.zero] * (num_rows * num_vectors)], step)[2:]

        tile.write(tile.choose(products), *epilogue)
        return []

    used = vectors.vectors_of(cols)
    vectors.choose(write, (used, range(1, TILE.vectors + 1)), (rows, ROW_COUNTS))


@llvm_function
def add_rows(vectors, output, a, mask_source, is_masked, b, size, epilogue):
    """Write one row of a product, adding up at most ``ROW_DEPTH`` rows of b.

    ``output[j] = sum over p < depth of a[p] * b[p, j]`` for ``j < cols``; then the epilogue. An element of a
    counts as 0 where is_masked is true and mask_source, at the same distances, is 0 or less. Output and
    mask_source are (array, position), a is a Matrix with a stride of steps and b one with a stride of rows,
    and size is (depth, cols).
    """
    builder = vectors.builder
    (output,), (a, a_step), (mask_source,), (b, b_step) = output, a, mask_source, b
    depth, cols = size
    bias, start, relu = epilogue
    whole = builder.and_(cols, INTP(-vectors.width))
    tail = vectors.first(builder.sub(cols, whole))

    def write(count):
        def factors(is_masked):
            found = []
            for offset in [builder.mul(a_step, INTP(p)) for p in range(count)]:
                factor = builder.load(vectors.at(a, offset))
                if is_masked:
                    zero = ir.Constant(vectors.element, 0.0)
                    source = builder.load(vectors.at(mask_source, offset))
                    factor = builder.select(builder.fcmp_ordered("<=", source, zero), zero, factor)
                found.append(vectors.splat(factor))
            return found

        left = vectors.choose(factors, (is_masked, BOTH))
        b_rows = [vectors.at(b, builder.mul(b_step, INTP(p))) for p in range(count)]

        def step(j, _, mask=None):
            total = vectors.load_start(start, vectors.at(bias, j), vectors.at(output, j), mask)
            for factor, row in zip(left, b_rows, strict=True):
                total = vectors.multiply_add(factor, vectors.load(vectors.at(row, j), mask), total)
            vectors.store(vectors.relu(total, relu), vectors.at(output, j), mask)
            return []

        vectors.loop(whole, vectors.width, [], step)
        return step(whole, [], tail)

    vectors.choose(write, (depth, range(ROW_DEPTH + 1)))


@llvm_function
def dot_tile(vectors, output, a, b, size, epilogue):
    """Write one tile of dot products of the rows of a with the rows of b.

    ``output[i, j] = sum over p < depth of a[i, p] * b[j, p]`` for ``i < rows <= TILE.dot_rows`` and
    ``j < cols <= TILE.dot_cols``; then the epilogue. Elements of both are next to each other in p, and so are
    the lanes of a sum. All three are a Matrix with a stride of rows, and size is (depth, rows, cols).
    """
    builder = vectors.builder
    (output, output_stride), (a, a_stride), (b, b_stride) = output, a, b
    depth, rows, cols = size
    bias, start, relu = epilogue
    whole = builder.and_(depth, INTP(-vectors.width))
    tail = vectors.first(builder.sub(depth, whole))

    def write(num_rows, num_cols):
        a_rows = [vectors.at(a, builder.mul(a_stride, INTP(i))) for i in range(num_rows)]
        b_rows = [vectors.at(b, builder.mul(b_stride, INTP(j))) for j in range(num_cols)]

        def step(p, sums, mask=None):
            right = [vectors.load(vectors.at(row, p), mask) for row in b_rows]
            left = [vectors.load(vectors.at(row, p), mask) for row in a_rows]
            return vectors.add_outer_product(left, right, sums)

        sums = vectors.loop(whole, vectors.width, [vectors.zero] * (num_rows * num_cols), step)
        sums = step(whole, sums, tail)
        for i in range(num_rows):
            target = vectors.at(output, builder.mul(output_stride, INTP(i)))
            row = vectors.sum_lanes(sums[i * num_cols : (i + 1) * num_cols])
            row = vectors.shuffle(row, row, range(num_cols))
            first = vectors.load_start(start, bias, target, width=num_cols)
            vectors.store(vectors.relu(builder.fadd(row, first), relu), target)
        return []

    vectors.choose(write, (rows, range(1, TILE.dot_rows + 1)), (cols, range(1, TILE.dot_cols + 1)))


@llvm_function
def sum_rows(vectors, source, mask_source, is_masked, size, target):
    """Write the sum of a matrix's rows, masked as in ``add_rows``.

    The source is a Matrix with a stride of rows; size is (rows, cols), cols of at most ``SUM_VECTORS``
    vectors; mask_source and target are (array, position).
    """
    builder = vectors.builder
    (source, stride), (mask_source,), (target,) = source, mask_source, target
    rows, cols = size
    columns = [v * vectors.width for v in range(SUM_VECTORS)]
    masks = [vectors.first(builder.sub(cols, INTP(column))) for column in columns]

    def write(is_masked):
        def step(i, sums):
            row = builder.mul(i, stride)
            added = []
            for column, mask, total in zip(columns, masks, sums, strict=True):
                position = builder.add(row, INTP(column))
                value = vectors.load(vectors.at(source, position), mask)
                if is_masked:
                    value = vectors.masked(vectors.load(vectors.at(mask_source, position), mask), value)
                added.append(builder.fadd(total, value))
            return added

        sums = vectors.loop(rows, 1, [vectors.zero] * SUM_VECTORS, step)
        for column, mask, total in zip(columns, masks, sums, strict=True):
            vectors.store(total, vectors.at(target, column), mask)
        return []

    vectors.choose(write, (is_masked, BOTH))


@intrinsic
def aligned(typing_context, array):
    """Return the first position of an array at which a cache line of 64 bytes starts."""

    def generate(context, builder, signature, values):
        data = context.make_array(array)(context, builder, values[0]).data
        skipped = builder.and_(builder.neg(builder.ptrtoint(data, INTP)), INTP(63))
        return builder.udiv(skipped, INTP(array.dtype.bitwidth // 8))

    return types.intp(array), generate
