"""Arrays over memory that a kernel is told by its address."""

from __future__ import annotations

from numba import carray, types
from numba.extending import intrinsic

from fastdl.kernels.jit import inlined_jit


@intrinsic
def _pointer(typing_context, address, dtype):
    """Return the address as a pointer to elements of the dtype."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(dtype.dtype)(types.intp, dtype), generate


@inlined_jit
def array_at(address, shape, dtype):
    """Return the C-contiguous array of a shape and dtype whose first element is at the address."""
    return carray(_pointer(address, dtype), shape)
