"""Arrays that begin at a cache line, and arrays over memory that a kernel is told by its address."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from fastdl.kernels.jit import inlined_jit

# bytes of a cache line
_LINE = 64


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


def aligned(count: int, dtype: Any) -> NDArray[Any]:
    """Return zeros that begin at the start of a cache line."""
    if count == 0:
        return np.empty(0, dtype)
    size = count * np.dtype(dtype).itemsize
    memory = np.zeros(size + _LINE, np.uint8)
    start = -memory.ctypes.data % _LINE
    return memory[start : start + size].view(dtype)
