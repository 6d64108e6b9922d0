"""What Numba has no words for: typed access through raw pointers, wide loads, sums held in registers.

A kernel gets its arrays as pointers to the element type. ``load`` widens float16, bfloat16 and uint8 to
float32, ``store`` rounds back, so a kernel that is written once computes in float32 or float64. Several
numbers at a time are tuples: a tuple lives in registers, whatever the compiler makes of the loop around it.

numba-cuda's own bfloat16 brings a library that each kernel would have to be linked with; here a bfloat16 is
16 bits with the meaning of a float32's upper half.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from fastdl.kernels.cuda.numba_cuda import extending, types

_FLOAT = ir.FloatType()
_DOUBLE = ir.DoubleType()
_HALF = ir.HalfType()
_INT8 = ir.IntType(8)
_INT16 = ir.IntType(16)
_INT32 = ir.IntType(32)

# element type: what it is in memory, and what is computed in
_MEMORY = {
    types.float32: _FLOAT,
    types.float64: _DOUBLE,
    types.float16: _INT16,
    types.bfloat16: _INT16,
    types.uint8: _INT8,
}
_LLVM = {types.float32: _FLOAT, types.float64: _DOUBLE}
_VECTOR_BYTES = 16
# LLVM's number for the GPU's memory among the address spaces
_GLOBAL = 1


def computed_in(element: Any) -> Any:
    """Return the type in which sums of an element type are kept: float64 for float64, else float32."""
    return types.float64 if element == types.float64 else types.float32


def _item_bytes(element: Any) -> int:
    return int(element.bitwidth) // 8


def _widen(builder: Any, value: Any, element: Any) -> Any:
    if element == types.float16:
        return builder.fpext(builder.bitcast(value, _HALF), _FLOAT)
    if element == types.bfloat16:
        bits = builder.shl(builder.zext(value, _INT32), ir.Constant(_INT32, 16))
        return builder.bitcast(bits, _FLOAT)
    if element == types.uint8:
        return builder.uitofp(value, _FLOAT)
    return value


def _narrow(builder: Any, value: Any, element: Any) -> Any:
    if element == types.float16:
        return builder.bitcast(builder.fptrunc(value, _HALF), _INT16)
    if element == types.bfloat16:
        # to the nearest, ties to even, as torch rounds
        assembly = ir.InlineAsm(ir.FunctionType(_INT16, [_FLOAT]), "cvt.rn.bf16.f32 $0, $1;", "=h,f")
        return builder.call(assembly, [value])
    return value


def _address(builder: Any, pointer: Any, index: Any, as_type: Any, element: Any) -> Any:
    typed = builder.bitcast(pointer, _MEMORY[element].as_pointer())
    return builder.bitcast(builder.gep(typed, [index]), as_type.as_pointer())


def _index(context: Any, builder: Any, value: Any, index_type: Any) -> Any:
    return context.cast(builder, value, index_type, types.int64)


def _store_vector(builder: Any, pointer: Any, index: Any, values: Any, lanes: range, element: Any) -> None:
    """Write some elements of a tuple side by side, in one go."""
    vector = ir.VectorType(_MEMORY[element], len(lanes))
    packed = ir.Constant(vector, ir.Undefined)
    for at, lane in enumerate(lanes):
        value = _narrow(builder, builder.extract_value(values, lane), element)
        packed = builder.insert_element(packed, value, ir.Constant(_INT32, at))
    address = _address(builder, pointer, index, vector, element)
    builder.store(packed, address, align=len(lanes) * _item_bytes(element))


@extending.intrinsic
def load(typing_context, pointer, index):
    """Return ``pointer[index]`` in the type that is computed in."""
    element = pointer.dtype

    def codegen(context, builder, signature, arguments):
        at = _index(context, builder, arguments[1], signature.args[1])
        value = builder.load(_address(builder, arguments[0], at, _MEMORY[element], element))
        return _widen(builder, value, element)

    return computed_in(element)(pointer, index), codegen


@extending.intrinsic
def store(typing_context, pointer, index, value):
    """Write the value, rounded to the element type, to ``pointer[index]``."""
    element = pointer.dtype

    def codegen(context, builder, signature, arguments):
        at = _index(context, builder, arguments[1], signature.args[1])
        builder.store(
            _narrow(builder, arguments[2], element),
            _address(builder, arguments[0], at, _MEMORY[element], element),
        )
        return context.get_dummy_value()

    return types.void(pointer, index, computed_in(element)), codegen


@extending.intrinsic
def load_tuple(typing_context, pointer, index, count):
    """Return ``count`` elements from ``pointer[index]`` on, loaded 16 bytes at a time.

    Their address must be a multiple of 16 bytes, or of all their bytes where those are fewer.
    """
    if not isinstance(count, types.IntegerLiteral):
        return None
    element = pointer.dtype
    length = count.literal_value
    wide = min(length, _VECTOR_BYTES // _item_bytes(element))
    item_bits = 8 * _item_bytes(element)
    # smaller numbers are loaded as whole words: LLVM takes a vector of them apart
    in_word = 32 // item_bits if item_bits < 32 else 1
    is_packed = in_word > 1
    vector = ir.VectorType(_INT32, wide // in_word) if is_packed else ir.VectorType(_MEMORY[element], wide)

    def codegen(context, builder, signature, arguments):
        at = _index(context, builder, arguments[1], signature.args[1])
        values = []
        for start in range(0, length, wide):
            offset = builder.add(at, ir.Constant(at.type, start))
            loaded = builder.load(
                _address(builder, arguments[0], offset, vector, element), align=wide * _item_bytes(element)
            )
            for lane in range(wide):
                if is_packed:
                    word = builder.extract_element(loaded, ir.Constant(_INT32, lane // in_word))
                    shifted = builder.lshr(word, ir.Constant(_INT32, lane % in_word * item_bits))
                    value = builder.trunc(shifted, _MEMORY[element])
                else:
                    value = builder.extract_element(loaded, ir.Constant(_INT32, lane))
                values.append(_widen(builder, value, element))
        return context.make_tuple(builder, signature.return_type, values)

    return types.UniTuple(computed_in(element), length)(pointer, index, count), codegen


@extending.intrinsic
def store_tuple(typing_context, pointer, index, values):
    """Write the tuple to memory from ``pointer[index]`` on, aligned as for ``load_tuple``."""
    element = pointer.dtype
    length = values.count
    wide = min(length, _VECTOR_BYTES // _item_bytes(element))

    def codegen(context, builder, signature, arguments):
        at = _index(context, builder, arguments[1], signature.args[1])
        for start in range(0, length, wide):
            offset = builder.add(at, ir.Constant(at.type, start))
            _store_vector(builder, arguments[0], offset, arguments[2], range(start, start + wide), element)
        return context.get_dummy_value()

    return types.void(pointer, index, values), codegen


@extending.intrinsic
def load_word(typing_context, pointer, index):
    """Return four uint8 from ``pointer[index]`` on as one number; their address is a multiple of 4."""
    if pointer.dtype != types.uint8:
        return None

    def codegen(context, builder, signature, arguments):
        at = _index(context, builder, arguments[1], signature.args[1])
        return builder.load(_address(builder, arguments[0], at, _INT32, types.uint8), align=4)

    return types.uint32(pointer, index), codegen


@extending.intrinsic
def bytes_of(typing_context, word):
    """Return the four uint8 of a word as float32."""
    if word != types.uint32:
        return None

    def codegen(context, builder, signature, arguments):
        shifted = [builder.lshr(arguments[0], ir.Constant(_INT32, 8 * lane)) for lane in range(4)]
        values = [builder.uitofp(builder.trunc(part, _INT8), _FLOAT) for part in shifted]
        return context.make_tuple(builder, signature.return_type, values)

    return types.UniTuple(types.float32, 4)(word), codegen


@extending.intrinsic
def is_null(typing_context, pointer):
    """Return whether the pointer is 0, which means an array left out."""

    def codegen(context, builder, signature, arguments):
        return builder.icmp_unsigned("==", arguments[0], ir.Constant(arguments[0].type, None))

    return types.boolean(pointer), codegen


@extending.intrinsic
def fill(typing_context, pointer, value, count):
    """Return ``count`` times a number in the type that the pointer's elements are computed in."""
    if not (isinstance(value, types.IntegerLiteral) and isinstance(count, types.IntegerLiteral)):
        return None
    number = float(value.literal_value)
    computed = computed_in(pointer.dtype)
    result = types.UniTuple(computed, count.literal_value)

    def codegen(context, builder, signature, arguments):
        values = [ir.Constant(_LLVM[computed], number)] * result.count
        return context.make_tuple(builder, result, values)

    return result(pointer, value, count), codegen


@extending.intrinsic
def pointer_to(typing_context, shared):
    """Return the address of a shared array as a pointer: no strides, no negative indices."""
    result = types.CPointer(shared.dtype)

    def codegen(context, builder, signature, arguments):
        return context.make_array(signature.args[0])(context, builder, arguments[0]).data

    return result(shared), codegen


@extending.intrinsic
def store_rows(typing_context, pointer, index, stride, values, length):
    """Write the tuple as rows of ``length`` numbers, ``stride`` apart, each aligned as for ``load_tuple``."""
    if not isinstance(length, types.IntegerLiteral):
        return None
    element = pointer.dtype
    wide = length.literal_value

    def codegen(context, builder, signature, arguments):
        at = _index(context, builder, arguments[1], signature.args[1])
        step = _index(context, builder, arguments[2], signature.args[2])
        for start in range(0, values.count, wide):
            _store_vector(builder, arguments[0], at, arguments[3], range(start, start + wide), element)
            at = builder.add(at, step)
        return context.get_dummy_value()

    return types.void(pointer, index, stride, values, length), codegen


@extending.intrinsic
def as_pointer(typing_context, address, like):
    """Return the address as a pointer of a type."""
    result = like.instance_type

    def codegen(context, builder, signature, arguments):
        generic = context.get_value_type(result)
        # the detour tells the compiler that this is memory of the GPU, and no shared or local address
        pointer = builder.inttoptr(arguments[0], ir.PointerType(generic.pointee, _GLOBAL))
        return builder.addrspacecast(pointer, generic)

    return result(types.int64, like), codegen


@extending.intrinsic
def row_of_block(typing_context, table, size_field, block, block_size):
    """Return the record of a table whose elements a block works on, and which of its blocks that is.

    The number of a record's elements is in the field of this name. A chain of selects finds the record: a
    table that is indexed by a number known at run time would have to be copied to memory.
    """
    if not (isinstance(size_field, types.StringLiteral) and isinstance(block_size, types.IntegerLiteral)):
        return None
    row_type, elements = table.dtype, block_size.literal_value
    at_size = row_type.fields.index(size_field.literal_value)

    def codegen(context, builder, signature, arguments):
        integer = ir.IntType(64)
        own = context.cast(builder, arguments[2], signature.args[2], types.int64)
        first = ir.Constant(integer, 0)
        found, found_block = [first] * row_type.count, first
        for row in range(table.count):
            numbers = [builder.extract_value(arguments[0], [row, field]) for field in range(row_type.count)]
            padded = builder.add(numbers[at_size], ir.Constant(integer, elements - 1))
            stop = builder.add(first, builder.udiv(padded, ir.Constant(integer, elements)))
            is_here = builder.and_(builder.icmp_signed(">=", own, first), builder.icmp_signed("<", own, stop))
            found = [builder.select(is_here, *pair) for pair in zip(numbers, found, strict=True)]
            found_block = builder.select(is_here, builder.sub(own, first), found_block)
            first = stop
        row_value = context.make_tuple(builder, row_type, found)
        return context.make_tuple(builder, signature.return_type, [row_value, found_block])

    result = types.Tuple((row_type, types.int64))
    return result(table, size_field, block, block_size), codegen


@extending.intrinsic
def add_outer_product(typing_context, sums, a, b):
    """Return the sums (len(a) * len(b),), row by row, plus each product of an element of a and one of b."""

    def codegen(context, builder, signature, arguments):
        values = [
            builder.fma(
                builder.extract_value(arguments[1], i),
                builder.extract_value(arguments[2], j),
                builder.extract_value(arguments[0], i * b.count + j),
            )
            for i in range(a.count)
            for j in range(b.count)
        ]
        return context.make_tuple(builder, signature.return_type, values)

    return sums(sums, a, b), codegen


@extending.intrinsic
def add_tuples(typing_context, a, b):
    """Return the elementwise sum of two tuples."""

    def codegen(context, builder, signature, arguments):
        values = [
            builder.fadd(builder.extract_value(arguments[0], i), builder.extract_value(arguments[1], i))
            for i in range(a.count)
        ]
        return context.make_tuple(builder, signature.return_type, values)

    return a(a, b), codegen


@extending.intrinsic
def relu_masked(typing_context, values, outputs):
    """Return each value, or 0 where the ReLU's output is 0 or less; NaN isn't, as ReLU lets NaN pass."""

    def codegen(context, builder, signature, arguments):
        chosen = []
        for i in range(values.count):
            value = builder.extract_value(arguments[0], i)
            is_masked = builder.fcmp_ordered(
                "<=", builder.extract_value(arguments[1], i), ir.Constant(value.type, 0.0)
            )
            chosen.append(builder.select(is_masked, ir.Constant(value.type, 0.0), value))
        return context.make_tuple(builder, signature.return_type, chosen)

    return values(values, outputs), codegen
