"""ReLU. Floor: 2 (forward) or 3 (backward) arrays through memory, no arithmetic to speak of."""

from __future__ import annotations

from fastdl.kernels.cuda.chunks import load_chunk, store_chunk
from fastdl.kernels.cuda.intrinsics import relu_masked
from fastdl.kernels.cuda.launch import (
    CHUNK,
    Array,
    Elements,
    Stream,
    build_kernels,
    element_of,
    is_wide,
    size_of,
)
from fastdl.kernels.cuda.numba_cuda import cuda, types

THREADS = 256


def _masked(values: Elements, output: Elements, masked: Elements, size: int, wide: bool) -> None:
    """Write the values, or 0 where the output is 0 or less; NaN <= 0 is false."""
    start = (types.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x) * CHUNK
    if start < size:
        left = size - start
        whole = wide != 0 and left >= CHUNK
        chunk, outputs = load_chunk(values, start, left, whole), load_chunk(output, start, left, whole)
        store_chunk(masked, start, left, whole, relu_masked(chunk, outputs))


_MASKED = build_kernels("relu", lambda real: _masked, THREADS)


def _launch(values: Array, output: Array, masked: Array, stream: Stream) -> None:
    size = size_of(values)
    if size > 0:
        _MASKED[element_of(values)].launch(
            stream,
            -(-size // (THREADS * CHUNK)),
            values=values,
            output=output,
            masked=masked,
            size=size,
            wide=is_wide(0, values, output, masked),
        )


def relu_forward(input: Array, output: Array, stream: Stream) -> None:
    """Write ``max(input, 0)`` to the output, both of n elements; NaN stays NaN."""
    _launch(input, input, output, stream)


def relu_backward(grad_output: Array, output: Array, grad_input: Array, stream: Stream) -> None:
    """Write grad_output where not ``output <= 0``, else 0, to grad_input; all of n elements."""
    _launch(grad_output, output, grad_input, stream)
