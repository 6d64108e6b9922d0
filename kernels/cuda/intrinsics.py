"""What Numba has no words for: typed access through raw pointers, wide loads, sums held in registers.

A kernel gets its arrays as pointers to the element type. ``load`` widens float16, bfloat16 and uint8 to
float32, ``store`` rounds back, so a kernel that is written once computes in float32 or float64. Several
numbers at a time are tuples: a tuple lives in registers, whatever the compiler makes of the loop around it.

numba-cuda's own bfloat16 brings a library that each kernel would have to be linked with; here a bfloat16 is
16 bits with the meaning of a float32's upper half.
"""

from __future__ import annotations

from functools import wraps
from typing import Any, NamedTuple

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


class _Call(NamedTuple):
    """A call of an intrinsic, whose instructions are to be written: the types of arguments and result."""

    context: Any
    builder: Any
    kinds: Any
    result: Any

    def widen(self, value: Any, element: Any) -> Any:
        """Return a number as it is in memory in the type that is computed in."""
        builder = self.builder
        if element == types.float16:
            return builder.fpext(builder.bitcast(value, _HALF), _FLOAT)
        if element == types.bfloat16:
            bits = builder.shl(builder.zext(value, _INT32), _INT32(16))
            return builder.bitcast(bits, _FLOAT)
        if element == types.uint8:
            return builder.uitofp(value, _FLOAT)
        return value

    def narrow(self, value: Any, element: Any) -> Any:
        """Return a number that was computed as it is in memory."""
        if element == types.float16:
            return self.builder.bitcast(self.builder.fptrunc(value, _HALF), _INT16)
        if element == types.bfloat16:
            # to the nearest, ties to even, as torch rounds
            assembly = ir.InlineAsm(ir.FunctionType(_INT16, [_FLOAT]), "cvt.rn.bf16.f32 $0, $1;", "=h,f")
            return self.builder.call(assembly, [value])
        return value

    def address(self, pointer: Any, index: Any, as_type: Any) -> Any:
        """Return the address of an element of the first argument as a pointer to a type."""
        typed = self.builder.bitcast(pointer, _MEMORY[self.kinds[0].dtype].as_pointer())
        return self.builder.bitcast(self.builder.gep(typed, [index]), as_type.as_pointer())

    def store_vector(self, pointer: Any, index: Any, values: Any, lanes: range) -> None:
        """Write some elements of a tuple side by side, in one go."""
        builder, element = self.builder, self.kinds[0].dtype
        vector = ir.VectorType(_MEMORY[element], len(lanes))
        packed = ir.Constant(vector, ir.Undefined)
        for at, lane in enumerate(lanes):
            value = self.narrow(builder.extract_value(values, lane), element)
            packed = builder.insert_element(packed, value, _INT32(at))
        address = self.address(pointer, index, vector)
        builder.store(packed, address, align=len(lanes) * _item_bytes(element))


def _intrinsic(find_signature: Any) -> Any:
    """Make an intrinsic of a function that writes its instructions.

    ``find_signature(*kinds)`` is the signature for these types of arguments, or False if there is none. The
    function gets a _Call and the arguments; it returns the result, a list for a tuple, or nothing.
    """

    def decorate(write: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            call = _Call(context, builder, signature.args, signature.return_type)
            result = write(call, *arguments)
            if isinstance(result, list):
                return context.make_tuple(builder, signature.return_type, result)
            return context.get_dummy_value() if result is None else result

        @extending.intrinsic
        @wraps(write)
        def define(typing_context: Any, *kinds: Any) -> Any:
            signature = find_signature(*kinds)
            return (signature, codegen) if signature else None

        return define

    return decorate


def _has_literals(*kinds: Any) -> bool:
    return all(isinstance(kind, types.IntegerLiteral | types.StringLiteral) for kind in kinds)


@_intrinsic(lambda pointer, index: computed_in(pointer.dtype)(pointer, types.int64))
def load(call, pointer, index):
    """Return ``pointer[index]`` in the type that is computed in."""
    element = call.kinds[0].dtype
    value = call.builder.load(call.address(pointer, index, _MEMORY[element]))
    return call.widen(value, element)


@_intrinsic(lambda pointer, index, value: types.void(pointer, types.int64, computed_in(pointer.dtype)))
def store(call, pointer, index, value):
    """Write the value, rounded to the element type, to ``pointer[index]``."""
    element = call.kinds[0].dtype
    call.builder.store(call.narrow(value, element), call.address(pointer, index, _MEMORY[element]))


@_intrinsic(
    lambda pointer, index, count: (
        _has_literals(count)
        and types.UniTuple(computed_in(pointer.dtype), count.literal_value)(pointer, types.int64, count)
    )
)
def load_tuple(call, pointer, index, count):
    """Return ``count`` elements from ``pointer[index]`` on, loaded 16 bytes at a time.

    Their address must be a multiple of 16 bytes, or of all their bytes where those are fewer.
    """
    builder, element = call.builder, call.kinds[0].dtype
    length, item_bytes = call.result.count, _item_bytes(element)
    wide = min(length, _VECTOR_BYTES // item_bytes)
    # smaller numbers are loaded as whole words: LLVM takes a vector of them apart
    in_word = max(1, 4 // item_bytes)
    is_packed = in_word > 1
    vector = ir.VectorType(_INT32, wide // in_word) if is_packed else ir.VectorType(_MEMORY[element], wide)
    values = []
    for start in range(0, length, wide):
        address = call.address(pointer, builder.add(index, index.type(start)), vector)
        loaded = builder.load(address, align=wide * item_bytes)
        for lane in range(wide):
            value = builder.extract_element(loaded, _INT32(lane // in_word))
            if is_packed:
                shifted = builder.lshr(value, _INT32(lane % in_word * 8 * item_bytes))
                value = builder.trunc(shifted, _MEMORY[element])
            values.append(call.widen(value, element))
    return values


@_intrinsic(lambda pointer, index, values: types.void(pointer, types.int64, values))
def store_tuple(call, pointer, index, values):
    """Write the tuple to memory from ``pointer[index]`` on, aligned as for ``load_tuple``."""
    length = call.kinds[2].count
    wide = min(length, _VECTOR_BYTES // _item_bytes(call.kinds[0].dtype))
    for start in range(0, length, wide):
        at = call.builder.add(index, index.type(start))
        call.store_vector(pointer, at, values, range(start, start + wide))


@_intrinsic(lambda pointer, index: pointer.dtype == types.uint8 and types.uint32(pointer, types.int64))
def load_word(call, pointer, index):
    """Return four uint8 from ``pointer[index]`` on as one number; their address is a multiple of 4."""
    return call.builder.load(call.address(pointer, index, _INT32), align=4)


@_intrinsic(lambda word: word == types.uint32 and types.UniTuple(types.float32, 4)(word))
def bytes_of(call, word):
    """Return the four uint8 of a word as float32."""
    builder = call.builder
    shifted = [builder.lshr(word, _INT32(8 * lane)) for lane in range(4)]
    return [builder.uitofp(builder.trunc(part, _INT8), _FLOAT) for part in shifted]


@_intrinsic(lambda pointer: types.boolean(pointer))
def is_null(call, pointer):
    """Return whether the pointer is 0, which means an array left out."""
    return call.builder.icmp_unsigned("==", pointer, ir.Constant(pointer.type, None))


@_intrinsic(
    lambda pointer, value, count: (
        _has_literals(value, count)
        and types.UniTuple(computed_in(pointer.dtype), count.literal_value)(pointer, value, count)
    )
)
def fill(call, pointer, value, count):
    """Return ``count`` times a number in the type that the pointer's elements are computed in."""
    number = ir.Constant(_LLVM[call.result.dtype], float(call.kinds[1].literal_value))
    return [number] * call.result.count


@_intrinsic(lambda shared: types.CPointer(shared.dtype)(shared))
def pointer_to(call, shared):
    """Return the address of a shared array as a pointer: no strides, no negative indices."""
    return call.context.make_array(call.kinds[0])(call.context, call.builder, shared).data


@_intrinsic(
    lambda pointer, index, stride, values, length: (
        _has_literals(length) and types.void(pointer, types.int64, types.int64, values, length)
    )
)
def store_rows(call, pointer, index, stride, values, length):
    """Write the tuple as rows of ``length`` numbers, ``stride`` apart, each aligned as for ``load_tuple``."""
    wide = call.kinds[4].literal_value
    for start in range(0, call.kinds[3].count, wide):
        call.store_vector(pointer, index, values, range(start, start + wide))
        index = call.builder.add(index, stride)


@_intrinsic(lambda address, like: like.instance_type(types.int64, like))
def as_pointer(call, address, like):
    """Return the address as a pointer of a type."""
    generic = call.context.get_value_type(call.result)
    # the detour tells the compiler that this is memory of the GPU, and no shared or local address
    pointer = call.builder.inttoptr(address, ir.PointerType(generic.pointee, _GLOBAL))
    return call.builder.addrspacecast(pointer, generic)


@_intrinsic(
    lambda table, size_field, block, block_size: (
        _has_literals(size_field, block_size)
        and types.Tuple((table.dtype, types.int64))(table, size_field, types.int64, block_size)
    )
)
def row_of_block(call, table, size_field, block, block_size):
    """Return the record of a table whose elements a block works on, and which of its blocks that is.

    The number of a record's elements is in the field of this name. A chain of selects finds the record: a
    table that is indexed by a number known at run time would have to be copied to memory.
    """
    builder, (rows, field, _, elements) = call.builder, call.kinds
    row_type, elements, integer = rows.dtype, elements.literal_value, block.type
    at_size = row_type.fields.index(field.literal_value)
    first = integer(0)
    found, found_block = [first] * row_type.count, first
    for row in range(rows.count):
        numbers = [builder.extract_value(table, [row, field]) for field in range(row_type.count)]
        padded = builder.add(numbers[at_size], integer(elements - 1))
        stop = builder.add(first, builder.udiv(padded, integer(elements)))
        is_here = builder.and_(builder.icmp_signed(">=", block, first), builder.icmp_signed("<", block, stop))
        found = [builder.select(is_here, *pair) for pair in zip(numbers, found, strict=True)]
        found_block = builder.select(is_here, builder.sub(block, first), found_block)
        first = stop
    return [call.context.make_tuple(builder, row_type, found), found_block]


@_intrinsic(lambda sums, a, b: sums(sums, a, b))
def add_outer_product(call, sums, a, b):
    """Return the sums (len(a) * len(b),), row by row, plus each product of an element of a and one of b."""
    value, (_, a_kind, b_kind) = call.builder.extract_value, call.kinds
    return [
        call.builder.fma(value(a, i), value(b, j), value(sums, i * b_kind.count + j))
        for i in range(a_kind.count)
        for j in range(b_kind.count)
    ]


@_intrinsic(lambda a, b: a(a, b))
def add_tuples(call, a, b):
    """Return the elementwise sum of two tuples."""
    value = call.builder.extract_value
    return [call.builder.fadd(value(a, i), value(b, i)) for i in range(call.result.count)]


@_intrinsic(lambda values, outputs: values(values, outputs))
def relu_masked(call, values, outputs):
    """Return each value, or 0 where the ReLU's output is 0 or less; NaN isn't, as ReLU lets NaN pass."""
    builder, chosen = call.builder, []
    for i in range(call.result.count):
        value = builder.extract_value(values, i)
        zero = ir.Constant(value.type, 0.0)
        is_masked = builder.fcmp_ordered("<=", builder.extract_value(outputs, i), zero)
        chosen.append(builder.select(is_masked, zero, value))
    return chosen
