"""Squared error: ``(input - target) ** 2``, its mean or sum, and its gradient.

Floor: both arrays read once forward; both read and one written backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastdl.kernels.cuda.chunks import load_chunk, store_chunk
from fastdl.kernels.cuda.intrinsics import is_null, load, pointer_to, store
from fastdl.kernels.cuda.launch import (
    CHUNK,
    Array,
    Elements,
    Stream,
    Sums,
    build_kernels,
    element_of,
    is_wide,
    size_of,
)
from fastdl.kernels.cuda.numba_cuda import cuda, types
from fastdl.kernels.cuda.reduction import ADD_PARTIAL_SUMS, MAX_BLOCKS, MEAN, NONE, THREADS, WARPS, block_sum

# chunks of a thread, where there are enough for more blocks than the GPU runs at a time
_CHUNKS_PER_THREAD = 4


def _elements(input: Elements, target: Elements, loss: Elements, size: int) -> None:
    i = types.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
    if i < size:
        difference = load(input, i) - load(target, i)
        store(loss, i, difference * difference)


def _build_block_sums(real: Any) -> Callable[..., None]:
    def block_sums(
        input: Elements,
        target: Elements,
        partial_sums: Sums,
        loss: Elements,
        factor: float,
        size: int,
        num_blocks: int,
        wide: bool,
    ) -> None:
        """Write each block's sum to partial_sums, or the only block's sum times factor to loss."""
        shared = pointer_to(cuda.shared.array(WARPS, real, alignment=16))
        total = real(0)
        start = (types.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x) * CHUNK
        for at in range(start, size, num_blocks * THREADS * CHUNK):
            left = size - at
            whole = wide != 0 and left >= CHUNK
            x, y = load_chunk(input, at, left, whole), load_chunk(target, at, left, whole)
            for i in range(CHUNK):
                total += (x[i] - y[i]) * (x[i] - y[i])
        total = block_sum(total, shared)
        if cuda.threadIdx.x == 0:
            if is_null(partial_sums):
                store(loss, 0, total * factor)
            else:
                store(partial_sums, types.int64(cuda.blockIdx.x), total)

    return block_sums


def _backward(
    grad_loss: Elements,
    input: Elements,
    target: Elements,
    factor: float,
    grad_input: Elements,
    size: int,
    num_upstream: int,
    wide: bool,
) -> None:
    start = (types.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x) * CHUNK
    if start < size:
        left = size - start
        whole = wide != 0 and left >= CHUNK
        x, y = load_chunk(input, start, left, whole), load_chunk(target, start, left, whole)
        first = load(grad_loss, 0)
        upstream = (first, first, first, first)
        if num_upstream > 1:
            upstream = load_chunk(grad_loss, start, left, False)
        chunk = (
            factor * (x[0] - y[0]) * upstream[0],
            factor * (x[1] - y[1]) * upstream[1],
            factor * (x[2] - y[2]) * upstream[2],
            factor * (x[3] - y[3]) * upstream[3],
        )
        store_chunk(grad_input, start, left, whole, chunk)


_ELEMENTS = build_kernels("mse_loss_elements", lambda real: _elements, THREADS)
_BLOCK_SUMS = build_kernels("mse_loss_block_sums", _build_block_sums, THREADS)
_BACKWARD = build_kernels("mse_loss_backward", lambda real: _backward, THREADS)


def mse_loss_partial_sums(size: int) -> int:
    """Return how many numbers of workspace ``mse_loss_forward`` needs for a reduced loss of size elements."""
    blocks = -(-size // (THREADS * CHUNK * _CHUNKS_PER_THREAD))
    return 0 if blocks <= 1 else min(blocks, MAX_BLOCKS)


def mse_loss_forward(
    input: Array, target: Array, reduction: int, loss: Array, partial_sums: Array | None, stream: Stream
) -> None:
    """Write ``(input - target) ** 2`` of n elements each to loss, of n elements or reduced (1,).

    ``partial_sums`` is workspace for ``mse_loss_partial_sums(n)`` numbers of the type that is computed in.
    """
    element, size = element_of(input), size_of(input)
    if reduction == NONE:
        if size > 0:
            blocks = -(-size // THREADS)
            _ELEMENTS[element].launch(stream, blocks, input=input, target=target, loss=loss, size=size)
        return
    # the mean of nothing is 0 / 0
    factor = 1.0 if reduction != MEAN else 1.0 / size if size > 0 else float("nan")
    blocks = max(1, mse_loss_partial_sums(size))
    _BLOCK_SUMS[element].launch(
        stream,
        blocks,
        input=input,
        target=target,
        partial_sums=partial_sums if blocks > 1 else None,
        loss=loss,
        factor=factor,
        size=size,
        num_blocks=blocks,
        wide=is_wide(0, input, target),
    )
    if blocks > 1:
        ADD_PARTIAL_SUMS[element].launch(
            stream,
            1,
            partial_sums=partial_sums,
            count=blocks,
            factor=factor,
            has_divisor=False,
            has_second=False,
            loss=loss,
        )


def mse_loss_backward(
    grad_loss: Array, input: Array, target: Array, reduction: int, grad_input: Array, stream: Stream
) -> None:
    """Write ``2 (input - target) grad_loss``, over n for the mean, to grad_input of n elements.

    ``grad_loss`` has n elements without reduction, else 1. The gradient of the target is the negative.
    """
    size = size_of(input)
    if size > 0:
        _BACKWARD[element_of(input)].launch(
            stream,
            -(-size // (THREADS * CHUNK)),
            grad_loss=grad_loss,
            input=input,
            target=target,
            factor=2.0 / size if reduction == MEAN else 2.0,
            grad_input=grad_input,
            size=size,
            num_upstream=size_of(grad_loss),
            wide=is_wide(0, input, target, grad_input),
        )
