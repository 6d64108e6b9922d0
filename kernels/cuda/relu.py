"""ReLU. Floor: 2 (forward) or 3 (backward) arrays through memory, no arithmetic to speak of."""

from __future__ import annotations

from fastdl.kernels.cuda.intrinsics import load, load_tuple, store, store_tuple, zero_where_closed
from fastdl.kernels.cuda.launch import (
    CHUNK,
    ELEMENTS,
    Array,
    Kernel,
    Stream,
    address,
    element_of,
    is_wide,
    pointer,
    size_of,
)
from fastdl.kernels.cuda.numba_cuda import cuda, types

THREADS = 256


def _masked(values, gate, masked, size, wide):
    """Write the values, or 0 where the gate is 0 or less; NaN <= 0 is false, so a NaN gate is open."""
    start = (types.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x) * CHUNK
    if wide and start + CHUNK <= size:
        chunk = zero_where_closed(load_tuple(values, start, CHUNK), load_tuple(gate, start, CHUNK))
        store_tuple(masked, start, chunk)
    else:
        for i in range(start, min(start + CHUNK, size)):
            value = (load(values, i),)
            store(masked, i, zero_where_closed(value, (load(gate, i),))[0])


_MASKED = {
    element: Kernel(f"relu_{element}", _masked, (pointer(element),) * 3 + (types.int64, types.int64), THREADS)
    for element in ELEMENTS
}


def _launch(values: Array, gate: Array, masked: Array, stream: Stream) -> None:
    size = size_of(values)
    if size > 0:
        _MASKED[element_of(values)].launch(
            stream,
            -(-size // (THREADS * CHUNK)),
            address(values),
            address(gate),
            address(masked),
            size,
            is_wide(0, values, gate, masked),
        )


def relu_forward(input: Array, output: Array, stream: Stream) -> None:
    """Write ``max(input, 0)`` to the output, both of n elements; NaN stays NaN."""
    _launch(input, input, output, stream)


def relu_backward(grad_output: Array, output: Array, grad_input: Array, stream: Stream) -> None:
    """Write grad_output where not ``output <= 0``, else 0, to grad_input; all of n elements."""
    _launch(grad_output, output, grad_input, stream)
