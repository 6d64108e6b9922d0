"""Arrays that begin at a cache line, and arrays over memory that a kernel is told by its address.

A training step of a small model passes dozens of tensors to kernels that take a few microseconds each. To
make an array over a tensor's memory costs Python 1.5 us, to ask for the memory's address 0.1 us. So an op's
kernel takes the addresses of its arrays' first elements, 0 for an array that is left out, and then the sizes;
``like`` is an empty array of the dtype of all floating-point arrays. The memory is C-contiguous, and the
caller keeps it alive during the call.
"""

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


@inlined_jit
def vector_at(address, size, like):
    """Return an array (size,) of the dtype of like at the address, or (0,) where that is 0."""
    return array_at(address, size if address else 0, like.dtype)


@inlined_jit
def matrix_at(address, shape, like):
    """Return an array of two dimensions of the dtype of like at the address, or (0, 0) where that is 0."""
    return array_at(address, shape if address else (0, 0), like.dtype)


def aligned(count: int, dtype: Any) -> NDArray[Any]:
    """Return zeros that begin at the start of a cache line."""
    if count == 0:
        return np.empty(0, dtype)
    size = count * np.dtype(dtype).itemsize
    memory = np.zeros(size + _LINE, np.uint8)
    start = -memory.ctypes.data % _LINE
    return memory[start : start + size].view(dtype)
