"""Squared error: ``(input - target) ** 2``, its mean or sum, and its gradient.

Floor: both arrays read once forward; both read and one written backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastdl.kernels.cuda.intrinsics import (
    computed_in,
    is_null,
    load,
    load_tuple,
    pointer_to,
    store,
    store_tuple,
)
from fastdl.kernels.cuda.launch import (
    CHUNK,
    ELEMENTS,
    SCALARS,
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
from fastdl.kernels.cuda.reduction import (
    ADD_PARTIAL_SUMS,
    MAX_BLOCKS,
    MEAN,
    NONE,
    THREADS,
    WARPS,
    block_sum,
)

# chunks of a thread, where there are enough for more blocks than the GPU runs at a time
_CHUNKS_PER_THREAD = 4


def _elements(input, target, loss, size):
    i = types.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
    if i < size:
        difference = load(input, i) - load(target, i)
        store(loss, i, difference * difference)


def _build_block_sums(real: Any) -> Callable[..., None]:
    def block_sums(input, target, partial, loss, factor, size, num_blocks, wide):
        """Write each block's sum to partial, or the only block's sum times factor to loss."""
        shared = pointer_to(cuda.shared.array(WARPS, real, alignment=16))
        total = real(0)
        start = (types.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x) * CHUNK
        for at in range(start, size, num_blocks * THREADS * CHUNK):
            if wide and at + CHUNK <= size:
                x, y = load_tuple(input, at, CHUNK), load_tuple(target, at, CHUNK)
                total += (x[0] - y[0]) * (x[0] - y[0])
                total += (x[1] - y[1]) * (x[1] - y[1])
                total += (x[2] - y[2]) * (x[2] - y[2])
                total += (x[3] - y[3]) * (x[3] - y[3])
            else:
                for i in range(at, min(at + CHUNK, size)):
                    difference = load(input, i) - load(target, i)
                    total += difference * difference
        total = block_sum(total, shared)
        if cuda.threadIdx.x == 0:
            if is_null(partial):
                store(loss, 0, total * factor)
            else:
                store(partial, types.int64(cuda.blockIdx.x), total)

    return block_sums


def _backward(grad_loss, input, target, factor, grad_input, size, num_upstream, wide):
    start = (types.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x) * CHUNK
    if wide and num_upstream == 1 and start + CHUNK <= size:
        upstream = load(grad_loss, 0)
        x, y = load_tuple(input, start, CHUNK), load_tuple(target, start, CHUNK)
        chunk = (
            factor * (x[0] - y[0]) * upstream,
            factor * (x[1] - y[1]) * upstream,
            factor * (x[2] - y[2]) * upstream,
            factor * (x[3] - y[3]) * upstream,
        )
        store_tuple(grad_input, start, chunk)
    else:
        for i in range(start, min(start + CHUNK, size)):
            upstream = load(grad_loss, i if num_upstream > 1 else 0)
            store(grad_input, i, factor * (load(input, i) - load(target, i)) * upstream)


def _real(element: str) -> Any:
    return computed_in(ELEMENTS[element])


_ELEMENTS = {
    element: Kernel(
        f"mse_loss_elements_{element}", _elements, (*(pointer(element),) * 3, types.int64), THREADS
    )
    for element in ELEMENTS
}
_BLOCK_SUMS = {
    element: Kernel(
        f"mse_loss_block_sums_{element}",
        _build_block_sums(_real(element)),
        (
            pointer(element),
            pointer(element),
            types.CPointer(_real(element)),
            pointer(element),
            _real(element),
            types.int64,
            types.int64,
            types.int64,
        ),
        THREADS,
    )
    for element in ELEMENTS
}
_BACKWARD = {
    element: Kernel(
        f"mse_loss_backward_{element}",
        _backward,
        (
            *(pointer(element),) * 3,
            _real(element),
            pointer(element),
            types.int64,
            types.int64,
            types.int64,
        ),
        THREADS,
    )
    for element in ELEMENTS
}


def mse_loss_partial_sums(size: int) -> int:
    """Return how many numbers of scratch ``mse_loss_forward`` needs for a mean or sum over size elements."""
    blocks = -(-size // (THREADS * CHUNK * _CHUNKS_PER_THREAD))
    return 0 if blocks <= 1 else min(blocks, MAX_BLOCKS)


def mse_loss_forward(
    input: Array, target: Array, reduction: int, loss: Array, partial: Array | None, stream: Stream
) -> None:
    """Write ``(input - target) ** 2`` of n elements each to loss, of n elements or reduced (1,).

    ``partial`` is scratch for ``mse_loss_partial_sums(n)`` numbers of the type that is computed in.
    """
    element, size = element_of(input), size_of(input)
    if reduction == NONE:
        if size > 0:
            _ELEMENTS[element].launch(
                stream, -(-size // THREADS), address(input), address(target), address(loss), size
            )
        return
    # the mean of nothing is 0 / 0
    factor = SCALARS[element](1.0 if reduction != MEAN else 1.0 / size if size > 0 else float("nan"))
    blocks = max(1, mse_loss_partial_sums(size))
    _BLOCK_SUMS[element].launch(
        stream,
        blocks,
        address(input),
        address(target),
        address(partial) if blocks > 1 else 0,
        address(loss),
        factor,
        size,
        blocks,
        is_wide(0, input, target),
    )
    if blocks > 1:
        ADD_PARTIAL_SUMS[element].launch(stream, 1, address(partial), blocks, factor, 0, address(loss))


def mse_loss_backward(
    grad_loss: Array, input: Array, target: Array, reduction: int, grad_input: Array, stream: Stream
) -> None:
    """Write ``2 (input - target) grad_loss``, over n for the mean, to grad_input of n elements.

    ``grad_loss`` has n elements without reduction, else 1. The gradient of the target is the negative.
    """
    element, size = element_of(input), size_of(input)
    if size == 0:
        return
    _BACKWARD[element].launch(
        stream,
        -(-size // (THREADS * CHUNK)),
        address(grad_loss),
        address(input),
        address(target),
        SCALARS[element](2.0 / size if reduction == MEAN else 2.0),
        address(grad_input),
        size,
        size_of(grad_loss),
        is_wide(0, input, target, grad_input),
    )
