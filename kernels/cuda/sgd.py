"""The SGD update over all parameters in one launch.

With gradient g of parameter p, its momentum buffer b and the options of ``torch.optim.SGD``:

    g = -g if maximize;  g += weight_decay * p
    b = momentum * b + (1 - dampening) * g, or g at the first step
    g = g + momentum * b if nesterov, else b, where there is momentum
    p -= lr * g

The table of the parameters is an argument of the kernel, so that no copy to the GPU precedes the launch, and
a captured graph keeps it.

Floor: p and g read, p written (12 bytes an element in float32), and b read and written with momentum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastdl.kernels.cuda.intrinsics import (
    as_pointer,
    computed_in,
    fill,
    load,
    load_tuple,
    row_of_block,
    store,
    store_tuple,
)
from fastdl.kernels.cuda.launch import (
    CHUNK,
    ELEMENTS,
    SCALARS,
    VECTOR_BYTES,
    Array,
    Kernel,
    Stream,
    element_of,
)
from fastdl.kernels.cuda.numba_cuda import cuda, types

THREADS = 256
# the columns of the table that tells the kernel where the parameters are
PARAM, GRAD, BUFFER, SIZE, FIRST_STEP = 0, 1, 2, 3, 4
NUM_COLUMNS = 5
# A launch takes a table of so many rows, the smallest that holds the parameters. The greatest is as long as
# the 4 KB of a kernel's arguments allow.
NUM_ROWS = (4, 16, 64)
# elements of a parameter that a block updates
BLOCK = THREADS * CHUNK


def build_update_one(real: Any) -> tuple[Any, Any]:
    """Return the device functions ``stepped``, which is the update's formula, and ``update_one``."""

    @cuda.jit(device=True, inline="always")
    def stepped(param, grad, buffer, first_step, momentum, dampening, weight_decay, nesterov, maximize):
        """Return the step of a parameter, before the learning rate, and its new momentum."""
        step = -grad if maximize else grad
        if weight_decay != real(0):
            step += weight_decay * param
        velocity = buffer
        if momentum != real(0):
            velocity = step if first_step else momentum * buffer + (real(1) - dampening) * step
            step = step + momentum * velocity if nesterov else velocity
        return step, velocity

    @cuda.jit(device=True, inline="always")
    def update_one(param, buffer, i, grad, options):
        """Update the parameter at i, and its momentum buffer where there is momentum."""
        first_step, lr, momentum, dampening, weight_decay, nesterov, maximize = options
        old, velocity = load(param, i), real(0)
        # before the first step the buffer's memory holds nothing
        if momentum != real(0) and not first_step:
            velocity = load(buffer, i)
        step, velocity = stepped(
            old, grad, velocity, first_step, momentum, dampening, weight_decay, nesterov, maximize
        )
        if momentum != real(0):
            store(buffer, i, velocity)
        store(param, i, old - lr * step)

    return stepped, update_one


def _build(real: Any, element: Any) -> Callable[..., None]:
    like = types.CPointer(element)
    stepped, update_one = build_update_one(real)

    def update(table, lr, momentum, dampening, weight_decay, nesterov, maximize):
        row, block = row_of_block(table, NUM_COLUMNS, SIZE, types.int64(cuda.blockIdx.x), BLOCK)
        param, grad, buffer = (
            as_pointer(row[PARAM], like),
            as_pointer(row[GRAD], like),
            as_pointer(row[BUFFER], like),
        )
        size, first_step = row[SIZE], row[FIRST_STEP] != 0
        start = block * BLOCK + cuda.threadIdx.x * CHUNK
        has_momentum = momentum != real(0)
        wide = (row[PARAM] | row[GRAD] | row[BUFFER]) % VECTOR_BYTES == 0
        if wide and start + CHUNK <= size:
            p, g = load_tuple(param, start, CHUNK), load_tuple(grad, start, CHUNK)
            b = fill(param, 0, CHUNK)
            if has_momentum and not first_step:
                b = load_tuple(buffer, start, CHUNK)
            s0, b0 = stepped(
                p[0], g[0], b[0], first_step, momentum, dampening, weight_decay, nesterov, maximize
            )
            s1, b1 = stepped(
                p[1], g[1], b[1], first_step, momentum, dampening, weight_decay, nesterov, maximize
            )
            s2, b2 = stepped(
                p[2], g[2], b[2], first_step, momentum, dampening, weight_decay, nesterov, maximize
            )
            s3, b3 = stepped(
                p[3], g[3], b[3], first_step, momentum, dampening, weight_decay, nesterov, maximize
            )
            if has_momentum:
                store_tuple(buffer, start, (b0, b1, b2, b3))
            store_tuple(param, start, (p[0] - lr * s0, p[1] - lr * s1, p[2] - lr * s2, p[3] - lr * s3))
        else:
            for i in range(start, min(start + CHUNK, size)):
                options = (first_step, lr, momentum, dampening, weight_decay, nesterov, maximize)
                update_one(param, buffer, i, load(grad, i), options)

    return update


def _kernel(element: str, num_rows: int) -> Kernel:
    real = computed_in(ELEMENTS[element])
    table = types.UniTuple(types.int64, num_rows * NUM_COLUMNS)
    arguments = (table, real, real, real, real, types.int64, types.int64)
    return Kernel(f"sgd_{num_rows}_{element}", _build(real, ELEMENTS[element]), arguments, THREADS)


_KERNELS = {(element, num_rows): _kernel(element, num_rows) for element in ELEMENTS for num_rows in NUM_ROWS}


def sgd(
    table: Sequence[tuple[int, int, int, int, int]],
    like: Array,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    stream: Stream,
) -> None:
    """Update every parameter of the table, and its momentum buffer, in place.

    Parameters
    ----------
    table : rows of NUM_COLUMNS int
        A row for each parameter: the addresses of parameter, gradient and momentum buffer (0 without
        momentum), each contiguous; the number of elements; and 1 where the buffer is to be started.
    like : Array
        Any array of the parameters' dtype.
    lr, momentum, dampening, weight_decay : float
    nesterov, maximize : bool
    stream : Stream
    """
    element = element_of(like)
    scalar = SCALARS[element]
    options = (
        scalar(lr),
        scalar(momentum),
        scalar(dampening),
        scalar(weight_decay),
        int(nesterov),
        int(maximize),
    )
    for first in range(0, len(table), NUM_ROWS[-1]):
        rows = table[first : first + NUM_ROWS[-1]]
        blocks = sum(-(-row[SIZE] // BLOCK) for row in rows)
        if blocks == 0:
            continue
        num_rows = next(count for count in NUM_ROWS if count >= len(rows))
        flat = [number for row in rows for number in row]
        flat += [0] * (num_rows * NUM_COLUMNS - len(flat))
        _KERNELS[element, num_rows].launch(stream, blocks, *flat, *options)
